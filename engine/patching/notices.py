"""What a person should know of a patch although every gate passed it.

Not covered: whether a comment that stays is still true, and text in strings that are no docstrings.
"""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence

from engine.patching.directives import is_directive
from engine.patching.edits import Edit, apply_edits, new_lines
from engine.patching.scopes import ParseFault, Scope, definitions, parse_text, shared_tree, standalone_text
from engine.patching.source import Source

_MOST_NAMED = 5
_LIKENESS_OF_REWORDED = 0.6


def notices(source: Source, scope: Scope, edits: Sequence[Edit]) -> list[str]:
    """What to tell the user of a patch, or of a part of one.

    Args:
        source: The file before.
        scope: What was changed.
        edits: Edits that passed the gates, in the coordinates of `source`.

    Returns:
        Sentences without a full stop; often none.
    """
    before, after = source.lines[scope.start_line - 1 : scope.end_line], _lines_after(source, scope, edits)
    own = "" if scope.kind == "module" else scope.name
    texts = standalone_text(before, scope.indent), standalone_text(after, scope.indent)
    lost, gone = removed(*texts, own), removed_definitions(*texts)
    return [
        *_fault_elsewhere(source, scope),
        *([f"the patch removes {', '.join(gone)}"] if gone else []),
        *([f"the patch removes {lost}"] if lost else []),
        *(f"after the patch `{name}` never returns a value, and it did before" for name in no_longer_returning(*texts)),
    ]


def removed_definitions(old: str, new: str) -> list[str]:
    """Functions and classes that others may use and that are gone, or have another name.

    What was in one that is gone is left out, as is what is local to a function.

    Args:
        old: Python text.
        new: What became of it.

    Returns:
        Their qualified names in backticks, the last one `3 more` where there are many; none if one does not parse.
    """
    try:
        before, after = (dict(definitions(shared_tree(text))) for text in (old, new))
    except ParseFault:
        return []
    gone = [name for name in before if name not in after]
    inside = [*gone, *(name for name, node in before.items() if not isinstance(node, ast.ClassDef))]
    outermost = [name for name in gone if not any(name.startswith(f"{other}.") for other in inside)]
    named = [f"`{name}`" for name in outermost[:_MOST_NAMED]]
    return [*named, f"{len(outermost) - _MOST_NAMED} more"] if len(outermost) > _MOST_NAMED else named


def no_longer_returning(old: str, new: str) -> list[str]:
    """Functions that returned or yielded a value and never do any more; those that are gone do not count.

    Args:
        old: Python text.
        new: What became of it.

    Returns:
        Their qualified names; none if one of the texts does not parse.
    """
    try:
        before, after = _returning(shared_tree(old)), _returning(shared_tree(new))
    except ParseFault:
        return []
    return [name for name, returns in before.items() if returns and not after.get(name, True)]


def _returning(tree: ast.Module) -> dict[str, bool]:
    """Whether each function returns a value somewhere; of several with one name, whether any does."""
    found: dict[str, bool] = {}
    for name, node in definitions(tree):
        if not isinstance(node, ast.ClassDef):
            found[name] = found.get(name, False) or any(map(_gives_a_value, _own_nodes(node)))
    return found


def _gives_a_value(node: ast.AST) -> bool:
    return isinstance(node, (ast.Yield, ast.YieldFrom)) or (isinstance(node, ast.Return) and node.value is not None)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """What a function holds, functions and classes in it left out."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield node
            waiting += ast.iter_child_nodes(node)


def removed(old: str, new: str, own: str = "") -> str:
    """Comments and docstrings that are gone.

    A comment that moved, was re-indented or reworded is not gone; nor is a docstring that says something else now, or
    whose function is gone as a whole.

    Args:
        old: Python text that parses.
        new: What became of it.
        own: Name of the one definition that the texts are; empty for a module.

    Returns:
        Such as `2 comments and the docstring`; empty if nothing is gone, or one of the texts does not parse.
    """
    try:
        num_comments = _num_removed_comments(old, new)
        docstrings = list(_removed_docstrings(parse_text(old), parse_text(new)))
    except (tokenize.TokenError, SyntaxError, ParseFault):
        return ""
    parts = [_count(num_comments, "comment")] if num_comments else []
    if len(docstrings) == 1:
        parts.append("the docstring" if docstrings[0] == own else f"the docstring of `{docstrings[0]}`")
    elif docstrings:
        parts.append(_count(len(docstrings), "docstring"))
    return " and ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _num_removed_comments(old: str, new: str) -> int:
    before, after = _comments(old), _comments(new)
    added = list((after - before).elements())
    num_removed = 0
    for comment in (before - after).elements():
        reworded = difflib.get_close_matches(comment, added, n=1, cutoff=_LIKENESS_OF_REWORDED)
        if reworded:
            added.remove(reworded[0])
        else:
            num_removed += 1
    return num_removed


def _comments(text: str) -> Counter[str]:
    """Comments without their marks; rules, empty ones and directives, which patches remove, are left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = (token.string for token in tokens if token.type == tokenize.COMMENT and not is_directive(token.string))
    words = (" ".join(comment.lstrip("#").split()) for comment in found)
    return Counter(comment for comment in words if any(map(str.isalnum, comment)))


def _removed_docstrings(old: ast.Module, new: ast.Module) -> Iterator[str]:
    """Qualified names of what lost its docstring; of two definitions of one name, one may have lost it."""
    before, after = _documented(old), _documented(new)
    still_there = Counter(["", *(name for name, _ in definitions(new))])
    for name, number in before.items():
        for _ in range(min(number, still_there[name]) - after[name]):
            yield name


def _documented(tree: ast.Module) -> Counter[str]:
    """Names of definitions with a docstring; the module's is empty."""
    nodes = [("", tree), *definitions(tree)]
    return Counter(name for name, node in nodes if (ast.get_docstring(node, clean=False) or "").strip())


def _lines_after(source: Source, scope: Scope, edits: Sequence[Edit]) -> Sequence[str]:
    """The scope's lines in the patched file; imports may have been added above it or below."""
    first, last = scope.start_line, scope.end_line
    for edit in edits:
        growth = len(new_lines(edit)) - (edit.end_line - edit.start_line + 1)
        is_above = edit.start_line < scope.start_line
        is_below = edit.start_line > scope.end_line + (edit.action == "insert")
        first += growth if is_above else 0
        last += 0 if is_below else growth
    return apply_edits(source, edits).lines[first - 1 : last]


def _fault_elsewhere(source: Source, scope: Scope) -> list[str]:
    if scope.parses:
        return []
    try:
        shared_tree(source.plain_text())
    except ParseFault as fault:
        return [f"{source.path} does not parse ({fault}); only `{scope.qualname}` itself was checked"]
    return []
