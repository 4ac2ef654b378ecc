"""What the model is shown besides the function itself.

Parts are dropped until the rest fits a budget in characters: far surroundings first, then signatures, the class header,
imports last. The function is never cut, and no line is shown twice.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from engine.patching.scopes import (
    DefinitionNode,
    ParseFault,
    Scope,
    leading_whitespace,
    list_scopes,
    parse_definition,
    parse_text,
    shared_tree,
    standalone_text,
)
from engine.patching.source import Source

DEFAULT_MAX_CHARS = 1200
DEFAULT_SURROUNDING_LINES = 25

_IMPORT_LINE = re.compile(r"(?:import|from)[ \t]+[\w.]")


@dataclass(frozen=True)
class Context:
    r"""The parts of a prompt, each text made of whole lines ended by "\n", or empty.

    Args:
        path: The file.
        scope: What is to be edited.
        imports: The file's import statements.
        class_header: The class around the scope: its line, its docstring's first line, fields and `__init__`.
        signatures: First lines of functions and classes of the file that the scope calls.
        before: Lines just above the scope.
        function: The scope's own text, whole.
        after: Lines just below the scope.
        dropped: What did not fit, in words.
    """

    path: str
    scope: Scope
    imports: str
    class_header: str
    signatures: str
    before: str
    function: str
    after: str
    dropped: tuple[str, ...]

    @property
    def num_chars(self) -> int:
        """Characters of everything but the function."""
        return sum(map(len, (self.imports, self.class_header, self.signatures, self.before, self.after)))

    @property
    def sha256(self) -> str:
        """Hex digest of the scope's name and all parts."""
        parts = (self.scope.qualname, self.imports, self.class_header, self.signatures, self.before, self.function)
        return hashlib.sha256(json.dumps([*parts, self.after]).encode()).hexdigest()


@dataclass(frozen=True)
class _Piece:
    """Something that may be shown: lines of the file, or a made-up line that stands for line `lines[0]`."""

    name: str
    lines: tuple[int, ...]
    made_up: str = ""
    dedent: bool = False


@dataclass(frozen=True)
class _Choice:
    """What is shown at most; `text_of` leaves out the lines that the surroundings show already."""

    imports: tuple[_Piece, ...]
    class_header: tuple[_Piece, ...]
    signatures: tuple[_Piece, ...]
    num_around: int


def prompt_source(source: Source) -> Source:
    """A file under its name alone, so that a prompt does not depend on the folder it lies in.

    Args:
        source: The file.

    Returns:
        The same text.
    """
    return replace(source, path=source.path.replace("\\", "/").rpartition("/")[2])


def build_context(
    source: Source,
    scope: Scope,
    *,
    max_chars: int = DEFAULT_MAX_CHARS,
    surrounding_lines: int = DEFAULT_SURROUNDING_LINES,
) -> Context:
    """Choose what the model sees of a file.

    Args:
        source: The file.
        scope: What is to be edited.
        max_chars: Budget for everything but the scope's own text.
        surrounding_lines: Most lines to show above and below the scope.

    Returns:
        The context; `dropped` says what the budget cost.
    """
    full = _Choice(
        tuple(_import_pieces(source, scope)),
        tuple(_class_pieces(source, scope)),
        tuple(_signature_pieces(source, scope)),
        surrounding_lines,
    )
    choice = full
    context = _lay_out(source, scope, choice)
    while context.num_chars > max_chars and (smaller := _drop_one(choice)) is not None:
        choice = smaller
        context = _lay_out(source, scope, choice)
    return _lay_out(source, scope, choice, _dropped(source, scope, full, choice))


def _drop_one(choice: _Choice) -> _Choice | None:
    """The choice without what is missed least."""
    imports, class_header, signatures = choice.imports, choice.class_header, choice.signatures
    if choice.num_around:
        return _Choice(imports, class_header, signatures, choice.num_around - 1)
    if signatures:
        return _Choice(imports, class_header, signatures[:-1], 0)
    if class_header:
        return _Choice(imports, class_header[:-1], (), 0)
    if imports:
        return _Choice(imports[:-1], (), (), 0)
    return None


def _lay_out(source: Source, scope: Scope, choice: _Choice, dropped: tuple[str, ...] = ()) -> Context:
    above, below = _surroundings(source, scope, choice.num_around)
    shown = {*above, *below, *range(scope.start_line, scope.end_line + 1)}
    return Context(
        path=source.path,
        scope=scope,
        imports=_text_of(source, choice.imports, shown),
        class_header=_text_of(source, choice.class_header, shown),
        signatures=_text_of(source, choice.signatures, shown),
        before=source.plain_text(above.start, above.stop - 1) if above else "",
        function=source.plain_text(scope.start_line, scope.end_line),
        after=source.plain_text(below.start, below.stop - 1) if below else "",
        dropped=dropped,
    )


def _surroundings(source: Source, scope: Scope, num_lines: int) -> tuple[range, range]:
    """Lines above and below, without blank lines at the far ends."""
    first, last = max(1, scope.start_line - num_lines), min(source.num_lines, scope.end_line + num_lines)
    while first < scope.start_line and not source.lines[first - 1].strip():
        first += 1
    while last > scope.end_line and not source.lines[last - 1].strip():
        last -= 1
    return range(first, scope.start_line), range(scope.end_line + 1, last + 1)


def _text_of(source: Source, pieces: Iterable[_Piece], shown: set[int]) -> str:
    lines: list[str] = []
    for piece in pieces:
        if piece.made_up:
            lines += [piece.made_up] if piece.lines[0] not in shown else []
        else:
            indent = len(leading_whitespace(source.lines[piece.lines[0] - 1])) if piece.dedent else 0
            lines += [source.lines[number - 1][indent:] for number in piece.lines if number not in shown]
        shown.update(piece.lines)
    return "".join(line + "\n" for line in lines)


def _dropped(source: Source, scope: Scope, full: _Choice, choice: _Choice) -> tuple[str, ...]:
    dropped: list[str] = []
    wanted = [len(lines) for lines in _surroundings(source, scope, full.num_around)]
    kept = [len(lines) for lines in _surroundings(source, scope, choice.num_around)]
    for where, num_wanted, num_kept in zip(("before", "after"), wanted, kept, strict=True):
        if num_kept < num_wanted:
            dropped.append(f"{num_wanted - num_kept} of {num_wanted} lines {where}")
    groups = (
        ("signature", full.signatures, choice.signatures),
        ("class header", full.class_header, choice.class_header),
        ("import", full.imports, choice.imports),
    )
    for kind, all_pieces, kept_pieces in groups:
        names = dict.fromkeys(piece.name for piece in all_pieces[len(kept_pieces) :])
        if names:
            dropped.append(f"{kind}: {', '.join(names)}")
    return tuple(dropped)


def _import_pieces(source: Source, scope: Scope) -> list[_Piece]:
    try:
        tree = shared_tree(source.plain_text())
    except ParseFault:
        numbers = [n for n, line in enumerate(source.lines, 1) if _IMPORT_LINE.match(line) and not scope.contains(n)]
        return [_Piece(source.lines[number - 1].strip(), (number,)) for number in numbers]
    pieces: list[_Piece] = []
    waiting: list[ast.AST] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not scope.contains(node.lineno):
            lines = tuple(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            pieces.append(_Piece(ast.unparse(node), lines, dedent=True))
        elif isinstance(node, (ast.If, ast.Try)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
        elif isinstance(node, ast.ExceptHandler):
            waiting.extend(reversed(node.body))
    return pieces


def _class_pieces(source: Source, scope: Scope) -> list[_Piece]:
    """The class around the scope, the most telling first."""
    owner = _owner_class(source, scope)
    if owner is None:
        return []
    try:
        node = parse_definition(source.lines[owner.start_line - 1 : owner.end_line], owner)
    except ParseFault:
        return []
    pieces = _head_pieces(source, owner, node, f"class {owner.name}")
    first_line = owner.start_line - (2 if owner.indent else 1)
    for child in node.body:
        lines = tuple(range(child.lineno + first_line, (child.end_lineno or child.lineno) + first_line + 1))
        if isinstance(child, (ast.Assign, ast.AnnAssign)):
            pieces.append(_Piece(f"fields of {owner.name}", lines))
        elif isinstance(child, ast.FunctionDef) and child.name == "__init__" and not scope.contains(lines[0]):
            pieces.append(_Piece(f"{owner.name}.__init__", lines))
    return pieces


def _owner_class(source: Source, scope: Scope) -> Scope | None:
    owners = [
        other
        for other in list_scopes(source)
        if other.kind == "class" and other != scope and other.contains(scope.def_line) and scope.kind != "module"
    ]
    return max(owners, key=lambda other: other.start_line, default=None)


def _signature_pieces(source: Source, scope: Scope) -> list[_Piece]:
    if scope.kind == "module":
        return []
    own_lines = source.lines[scope.start_line - 1 : scope.end_line]
    try:
        tree = parse_text(standalone_text(own_lines, scope.indent))
    except ParseFault:
        return []
    owner = _owner_class(source, scope)
    by_name: dict[str, Scope] = {}
    for other in list_scopes(source):
        if not scope.contains(other.def_line) and not (other.kind == "class" and other.contains(scope.def_line)):
            by_name[other.qualname] = other
    pieces: list[_Piece] = []
    for name in _called_names(tree, owner.qualname if owner else ""):
        callee = by_name.get(name)
        if callee is not None and (owner is None or callee.name != "__init__" or "." not in name):
            pieces += _head_of(source, callee)
    return pieces


def _called_names(tree: ast.Module, owner: str) -> list[str]:
    """Qualified names that the code may call, in the order of the calls."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names: list[str] = []
    for function in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(function, ast.Name):
            names.append(function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            holder = function.value.id
            names.append(f"{owner if holder in ('self', 'cls') else holder}.{function.attr}")
    return list(dict.fromkeys(names))


def _head_of(source: Source, callee: Scope) -> list[_Piece]:
    try:
        node = parse_definition(source.lines[callee.start_line - 1 : callee.end_line], callee)
    except ParseFault:
        return []
    return _head_pieces(source, callee, node, callee.qualname)


def _head_pieces(source: Source, scope: Scope, node: DefinitionNode, name: str) -> list[_Piece]:
    """A definition's own line or lines, and the first line of its docstring."""
    shift = scope.start_line - (2 if scope.indent else 1)
    first_statement = node.body[0]
    decorators = first_statement.decorator_list if isinstance(first_statement, DefinitionNode) else []
    body_line = min([first_statement.lineno, *(decorator.lineno for decorator in decorators)]) + shift
    last_line = max(scope.def_line, body_line - 1)
    while last_line > scope.def_line and source.lines[last_line - 1].lstrip().startswith(("#", "\\")):
        last_line -= 1
    pieces = [_Piece(name, tuple(range(scope.def_line, last_line + 1)))]
    docstring = _first_docstring_line(node)
    if docstring and body_line > scope.def_line:
        indent = source.lines[body_line - 1][: first_statement.col_offset]
        pieces.append(_Piece(name, (body_line,), f'{indent}"""{docstring}"""'))
    return pieces


def _first_docstring_line(node: DefinitionNode) -> str:
    lines: Sequence[str] = (ast.get_docstring(node) or "").split("\n")
    return lines[0].strip()
