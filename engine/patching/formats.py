"""What the model writes, and how it becomes edits. Two formats behind one small interface.

`rewrite`     the whole new function, raw, in a fence; minimal hunks are computed from it
`json_edits`  a grammar-constrained JSON list of edits whose `pre` can only be text of the function

Nothing here decides whether a patch is good: the gates do.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from engine.inference.protocol import Grammar, Message
from engine.patching.edits import Edit, apply_edits, diff_edits
from engine.patching.names import BUILTIN_NAMES, import_edit, missing_stdlib_imports, newly_undefined, use_of_names
from engine.patching.prompts import Task, fence_of, json_messages, rewrite_messages
from engine.patching.scopes import (
    DefinitionNode,
    ParseFault,
    Scope,
    indent_width,
    leading_whitespace,
    list_scopes,
    parse_text,
    standalone_text,
)
from engine.patching.source import Source, split_lines

FormatName = Literal["rewrite", "json_edits"]

_MAX_ANCHORS = 1500  # (start, end) pairs in one grammar; llguidance compiles them in about 0.1 s
_THINK = re.compile(r"^[ \t]*<think>.*?(?:</think>|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer, read.

    Args:
        edits: The edits, unproved.
        imports: Import statements that it declares.
    """

    edits: Sequence[Edit] | Sequence[Any]
    imports: tuple[str, ...] = ()


class EditFormat(Protocol):
    """One way for the model to write an edit."""

    name: FormatName

    def messages(self, source: Source, scope: Scope, task: Task, plan_text: str) -> list[Message]:
        """The chat that asks for the edit."""
        ...

    def prefill(self, task: Task) -> str:
        """The given beginning of the model's answer."""
        ...

    def stop(self, task: Task) -> tuple[str, ...]:
        """Strings that end the answer."""
        ...

    def grammar(self, source: Source, scope: Scope) -> Grammar | None:
        """The constraint on the answer."""
        ...

    def read(self, text: str, source: Source, scope: Scope) -> Answer:
        """Turn the answer into edits."""
        ...


class Rewrite:
    """The whole new function as raw code."""

    name: FormatName = "rewrite"

    def messages(self, source: Source, scope: Scope, task: Task, plan_text: str) -> list[Message]:
        """The chat that asks for the new function."""
        return rewrite_messages(task, plan_text)

    def prefill(self, task: Task) -> str:
        """An open fence, so that the answer starts with code."""
        return f"{fence_of(task.context)}python\n"

    def stop(self, task: Task) -> tuple[str, ...]:
        """The closing fence."""
        return (f"\n{fence_of(task.context)}",)

    def grammar(self, source: Source, scope: Scope) -> Grammar | None:
        """None: the parse is a gate."""
        return None

    def read(self, text: str, source: Source, scope: Scope) -> Answer:
        """Cut the function out of the answer, give it the file's indentation, and compute minimal hunks.

        Args:
            text: What the model wrote.
            source: The file.
            scope: What it rewrote.

        Returns:
            The hunks, and the imports written beside the function that the file does not have.
        """
        answer = Source(source.path, *split_lines(strip_thinking(text).strip("\r\n")))
        if scope.kind == "module":
            lines = _with_forgotten_imports(answer, source).lines
            return Answer(diff_edits(source, _with_blank_ends(lines, source.lines), scope))
        lines = _reindented(_cut_out(answer, scope, source), scope, source)
        return Answer(diff_edits(source, lines, scope), _new_imports(answer, lines, scope, source))


class JsonEdits:
    """A JSON list of edits, constrained so that it always parses, fits its schema and finds its anchors."""

    name: FormatName = "json_edits"

    def messages(self, source: Source, scope: Scope, task: Task, plan_text: str) -> list[Message]:
        """The chat that asks for the list."""
        numbered = "".join(
            f"{number}: {line}\n"
            for number, line in enumerate(source.lines[scope.start_line - 1 : scope.end_line], scope.start_line)
        )
        return json_messages(task, plan_text, numbered)

    def prefill(self, task: Task) -> str:
        """Nothing: the grammar forces the beginning."""
        return ""

    def stop(self, task: Task) -> tuple[str, ...]:
        """Nothing: the grammar ends with its array."""
        return ()

    def grammar(self, source: Source, scope: Scope) -> Grammar | None:
        """A grammar in which `start_line`, `end_line` and `pre` always belong together."""
        return Grammar("lark", edits_grammar(source, scope))

    def read(self, text: str, source: Source, scope: Scope) -> Answer:
        """Parse the list; lines of `new` get the file's newline, and hunks are made minimal by the gates' anchors."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return Answer([text])
        items = cast(list[object], value) if isinstance(value, list) else [cast(object, value)]
        return Answer([_with_newline(item, source.newline) for item in items])


FORMATS: dict[FormatName, EditFormat] = {"rewrite": Rewrite(), "json_edits": JsonEdits()}


def strip_thinking(text: str) -> str:
    """Text without `<think>` blocks, closed or not; one inside a line is code that speaks of such blocks.

    Args:
        text: What the model wrote.

    Returns:
        The rest.
    """
    return _THINK.sub("", text)


def edits_grammar(source: Source, scope: Scope) -> str:
    """A grammar (llguidance's Lark) of the edit lists that are possible in a scope.

    Each range of lines is followed by its exact text as `pre`, and `new` cannot be that text again: an anchor that is
    not there and a replacement that changes nothing cannot be written.

    Args:
        source: The file.
        scope: Where edits may be.

    Returns:
        The grammar.
    """
    path = json.dumps(source.path.replace("\\", "/").rpartition("/")[2], ensure_ascii=False)
    numbers = range(scope.start_line, scope.end_line + 1)
    longest = max(1, min(len(numbers), _MAX_ANCHORS // max(1, len(numbers))))
    actions = "replace | insert | delete" if numbers else "insert"  # a scope without lines has none to replace
    rules = [
        'start: "[" edit (", " edit){0,7} "]"',
        "edit: " + _lark('{"path": ' + path + ', "action": ') + f' ({actions}) "}}"',
        f"STRING: /{_JSON_STRING}/",
        "insert: " + _lark('"insert", "start_line": ') + f" ({_inserts(scope)}) STRING",
    ]
    if numbers:
        rules.append("replace: " + _lark('"replace", "start_line": ') + f" ({_alternatives('replace', numbers)})")
        rules.append("delete: " + _lark('"delete", "start_line": ') + f" ({_alternatives('delete', numbers)})")
    for start in numbers:
        ends = range(start, min(start + longest, scope.end_line + 1))
        rules += _rules_from(source, start, ends)
    return "\n".join(rules)


# Every text has one spelling, so that "any text but this" means what it says; newlines are the file's in any case.
_JSON_STRING = r'"(\\["\\fnt]|[^\\"\x00-\x1F])+"'


def _rules_from(source: Source, start: int, ends: range) -> list[str]:
    """What may follow `"start_line": start`: an end line, the text between, and for `replace` any other text."""
    replace: list[str] = []
    delete: list[str] = []
    rules: list[str] = []
    for end in ends:
        pre = json.dumps(source.text_between(start, end), ensure_ascii=False)
        same = json.dumps("\n".join(source.lines[start - 1 : end]), ensure_ascii=False)[:-1]
        other = f"OTHER_{start}_{end}"
        escaped = re.escape(same).replace("/", r"\/")
        rules.append(rf'{other}: STRING & ~/{escaped}(\\n)?"/')
        head = f'{start}, "end_line": {end}, "pre": {pre}, "new": '
        replace.append(f"{_lark(head)} {other}")
        delete.append(_lark(f'{head}""'))
    return [*rules, f"replace_{start}: {' | '.join(replace)}", f"delete_{start}: {' | '.join(delete)}"]


def _alternatives(rule: str, numbers: range) -> str:
    return " | ".join(f"{rule}_{number}" for number in numbers)


def _inserts(scope: Scope) -> str:
    places = range(scope.start_line, scope.end_line + 2)
    return " | ".join(_lark(f'{place}, "end_line": {place - 1}, "pre": "", "new": ') for place in places)


def _lark(text: str) -> str:
    """`text` as a literal of a Lark grammar, which takes JSON's escapes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _with_newline(item: object, newline: str) -> object:
    if not isinstance(item, dict):
        return item
    fields = cast(dict[str, object], item)
    new = fields.get("new")
    if not isinstance(new, str):
        return fields
    new = re.sub(r"\r\n?|\n", "\n", new)
    new = new.removesuffix("\n") if new != "\n" else new
    return {**fields, "new": new.replace("\n", newline)}


def _with_forgotten_imports(answer: Source, source: Source) -> Source:
    """A whole file with the standard library's imports that its new code needs and does not have."""
    try:
        names = newly_undefined(source.plain_text(), answer.plain_text())
    except ParseFault:
        return answer
    edit = import_edit(answer, list(missing_stdlib_imports(names, answer.plain_text()).values()))
    return apply_edits(answer, [edit]) if edit else answer


def _with_blank_ends(lines: Sequence[str], own: Sequence[str]) -> list[str]:
    """A file's lines between the blank lines that it began and ended with: models leave them out and make up others."""
    first, end = _ends(lines)
    own_first, own_end = _ends(own)
    return [*own[:own_first], *lines[first:end], *(own[own_end:] if own_end else ())]


def _ends(lines: Sequence[str]) -> tuple[int, int]:
    """Index of the first line that is not blank, and the one after the last; two zeros if all are."""
    used = [index for index, line in enumerate(lines) if line.strip()]
    return (used[0], used[-1] + 1) if used else (0, 0)


def _cut_out(answer: Source, scope: Scope, source: Source) -> tuple[str, ...]:
    """The lines of the scope's own definition; the whole answer where it cannot be found."""
    named = [found for found in list_scopes(answer) if (found.kind, found.name) == (scope.kind, scope.name)]
    named = [found for found in named if found.qualname == scope.qualname] or named
    alike = _decorated_alike(answer, named, _decorators(source, scope))
    if not (candidates := alike or named):
        return answer.lines
    twins = _decorated_alike(source, list_scopes(source), _decorators(source, scope))
    twins = [twin for twin in twins if twin.qualname == scope.qualname]
    index = twins.index(scope) if scope in twins and len(twins) == len(candidates) else 0
    return answer.lines[candidates[index].start_line - 1 : candidates[index].end_line]


def _decorated_alike(source: Source, scopes: Sequence[Scope], decorators: Sequence[str]) -> list[Scope]:
    return [scope for scope in scopes if _decorators(source, scope) == decorators]


def _decorators(source: Source, scope: Scope) -> list[str]:
    return [line.strip() for line in source.lines[scope.start_line - 1 : scope.def_line - 1]]


def _reindented(lines: Sequence[str], scope: Scope, source: Source) -> list[str]:
    """Lines shifted to the scope's indentation and in its indentation characters; insides of strings stay.

    A string's line is shifted all the same where that gives a line back which the scope has, and in a docstring, whose
    indentation means nothing.
    """
    if not lines:
        return []
    own = source.lines[scope.start_line - 1 : scope.end_line]
    inside, in_docstring = _string_lines(lines)
    own_inside = {own[index] for index in _string_lines(own)[0]}
    shift = _Shift(lines, inside, scope, source)
    shifted: list[str] = []
    for index, line in enumerate(lines):
        moved = shift.move(line)
        stays = index in inside and (line in own_inside or not (moved in own_inside or index in in_docstring))
        shifted.append(line if stays else moved)
    return shifted


class _Shift:
    """Moves lines of an answer to a scope's indentation."""

    def __init__(self, lines: Sequence[str], inside: frozenset[int], scope: Scope, source: Source) -> None:
        code = [line for index, line in enumerate(lines) if index not in inside and line.strip()]
        self._from, self._to = leading_whitespace(lines[0]), scope.indent
        self._unit = _unit(source, scope)
        self._step = _step(code)
        self._keeps_characters = any("\t" in leading_whitespace(line) for line in code) == (self._unit == "\t")

    def move(self, line: str) -> str:
        white = leading_whitespace(line)
        if white == line:
            return line.strip(" \t")
        if self._keeps_characters and white.startswith(self._from):
            return self._to + line[len(self._from) :]
        if self._keeps_characters and self._from == self._to:
            return line
        form_feeds = white[: white.rfind("\f") + 1]
        levels, rest = divmod(max(0, indent_width(white) - indent_width(self._from)), self._step)
        indent = self._unit * levels + ("" if self._unit == "\t" else " " * rest)
        return form_feeds + self._to + indent + line[len(white) :]


def _string_lines(lines: Sequence[str]) -> tuple[frozenset[int], frozenset[int]]:
    """0-based lines that begin inside a string, and those of them in a docstring; all lines if they do not parse."""
    indent = next((leading_whitespace(line) for line in lines if line.strip()), "")
    text = standalone_text(lines, indent)
    try:
        tree = parse_text(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (ParseFault, tokenize.TokenError, SyntaxError):
        return frozenset(range(len(lines))), frozenset()
    first_line = 2 if indent else 1
    nodes = [node for node in ast.walk(tree) if isinstance(node, DefinitionNode)]
    starts = {node.body[0].lineno for node in nodes if _has_docstring(node)}
    inside: set[int] = set()
    in_docstring: set[int] = set()
    opened: list[int] = []
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            opened.append(token.start[0])
        elif kind == "STRING" or kind.endswith("STRING_END"):
            start = opened.pop() if kind != "STRING" else token.start[0]
            rows = range(start + 1 - first_line, token.end[0] + 1 - first_line)
            inside.update(rows)
            in_docstring.update(rows if start in starts else ())
    return frozenset(inside), frozenset(in_docstring)


def _has_docstring(node: DefinitionNode) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _unit(source: Source, scope: Scope) -> str:
    """One level of indentation: of the scope's own lines, else of the file's."""
    for lines in (source.lines[scope.start_line - 1 : scope.end_line], source.lines):
        inside, _ = _string_lines(lines)
        code = [line for index, line in enumerate(lines) if index not in inside and line.strip()]
        if any(line.startswith("\t") for line in code) and not any(line.startswith("  ") for line in code):
            return "\t"
        if any(line.startswith(" ") for line in code):
            return " " * _step(code)
    return " " * 4


def _step(code: Sequence[str]) -> int:
    """Columns of one level of indentation."""
    widths = {indent_width(leading_whitespace(line)) for line in code}
    base = min(widths, default=0)
    return min((width - base for width in widths if width > base), default=4)


def _new_imports(answer: Source, lines: Sequence[str], scope: Scope, source: Source) -> tuple[str, ...]:
    """Top-level imports of the answer that its function uses and nothing in the file defines."""
    try:
        tree = parse_text(answer.plain_text())
        present = use_of_names(source.plain_text()).module_names
        used = _global_names(standalone_text(lines, scope.indent))
    except ParseFault:
        return ()
    statements: list[str] = []
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "module", "") == "__future__":
            continue
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            if name in used and name not in present:
                single = (
                    ast.Import([alias])
                    if isinstance(node, ast.Import)
                    else ast.ImportFrom(node.module, [alias], node.level)
                )
                statements.append(ast.unparse(single))
    return tuple(dict.fromkeys(statements))


def _global_names(text: str) -> set[str]:
    """Names that a text looks up outside itself; of builtins, which an import may hide, all that it names."""
    names = {node.id for node in ast.walk(parse_text(text)) if isinstance(node, ast.Name)}
    return {*use_of_names(text).unbound, *(names & BUILTIN_NAMES)}
