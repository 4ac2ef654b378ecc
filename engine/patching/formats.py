"""What the model writes, and how it becomes edits. Two formats behind one small interface.

`rewrite`     the whole new function, raw, in a fence; minimal hunks are computed from it
`json_edits`  a grammar-constrained JSON list of edits whose `pre` can only be text of the function

Nothing here decides whether a patch is good: the gates do.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from engine.errors import PlanPatchError, UnknownScopeError
from engine.inference.protocol import Grammar, Message
from engine.patching.edits import Edit, diff_edits, lines_inside_strings
from engine.patching.names import module_imports
from engine.patching.prompts import Task, fence_of, json_messages, rewrite_messages
from engine.patching.scopes import ParseFault, Scope, find_scope, indent_width, leading_whitespace, parse_text
from engine.patching.source import Source

FormatName = Literal["rewrite", "json_edits"]

_MAX_ANCHORS = 1500  # (start, end) pairs in one grammar; llguidance compiles them in about 0.1 s
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


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
        answer = Source.from_text(strip_thinking(text).strip("\r\n"), source.path)
        if scope.kind == "module":
            return Answer(diff_edits(source, answer.lines, scope))
        lines = _cut_out(answer, scope)
        lines = _reindented(lines, scope, source)
        return Answer(diff_edits(source, lines, scope), _new_imports(answer, lines, source))


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
        except ValueError:
            return Answer([text])
        items = cast(list[object], value) if isinstance(value, list) else [cast(object, value)]
        return Answer([_with_newline(item, source.newline) for item in items])


FORMATS: dict[FormatName, EditFormat] = {"rewrite": Rewrite(), "json_edits": JsonEdits()}


def strip_thinking(text: str) -> str:
    """Text without `<think>` blocks, closed or not.

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
    rules = [
        'start: "[" edit (", " edit){0,7} "]"',
        "edit: " + _lark('{"path": ' + path + ', "action": ') + ' (replace | insert | delete) "}"',
        f"STRING: /{_JSON_STRING}/",
        "replace: " + _lark('"replace", "start_line": ') + f" ({_alternatives('replace', numbers)})",
        "delete: " + _lark('"delete", "start_line": ') + f" ({_alternatives('delete', numbers)})",
        "insert: " + _lark('"insert", "start_line": ') + f" ({_inserts(scope)}) STRING",
    ]
    for start in numbers:
        ends = range(start, min(start + longest, scope.end_line + 1))
        rules += _rules_from(source, start, ends)
    return "\n".join(rules)


_JSON_STRING = r'"(\\(["\\\/bfnrt]|u[a-fA-F0-9]{4})|[^\\"\x00-\x1F\x7F])+"'


def _rules_from(source: Source, start: int, ends: range) -> list[str]:
    """What may follow `"start_line": start`: an end line, the text between, and for `replace` any other text."""
    replace: list[str] = []
    delete: list[str] = []
    rules: list[str] = []
    for end in ends:
        pre = json.dumps(source.text_between(start, end), ensure_ascii=False)
        other = f"OTHER_{start}_{end}"
        escaped = re.escape(pre).replace("/", r"\/")
        rules.append(f"{other}: STRING & ~/{escaped}/")
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
    return json.dumps(text, ensure_ascii=False)


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


def _cut_out(answer: Source, scope: Scope) -> tuple[str, ...]:
    """The lines of the scope's own definition; the whole answer where it cannot be found."""
    try:
        found = find_scope(answer, scope.name, None)
    except UnknownScopeError:
        found = _first_of_name(answer, scope)
    except PlanPatchError:
        return answer.lines
    return answer.lines[found.start_line - 1 : found.end_line] if found else answer.lines


def _first_of_name(answer: Source, scope: Scope) -> Scope | None:
    for number, line in enumerate(answer.lines, 1):
        if re.match(rf"[ \t]*(?:async[ \t]+def|def|class)[ \t]+{re.escape(scope.name)}\b", line):
            try:
                return find_scope(answer, scope.name, number)
            except PlanPatchError:
                return None
    return None


def _reindented(lines: Sequence[str], scope: Scope, source: Source) -> list[str]:
    """Lines shifted to the scope's indentation and in its indentation characters; insides of strings stay."""
    if not lines:
        return []
    inside = frozenset(index + 2 for index in lines_inside_strings(lines))
    old_width = indent_width(leading_whitespace(lines[0]))
    new_width = indent_width(scope.indent)
    unit = _tab_unit(source, scope)
    shifted: list[str] = []
    for number, line in enumerate(lines, 1):
        if number in inside or not line.strip():
            shifted.append(line)
            continue
        white = leading_whitespace(line)
        width = max(0, indent_width(white) - old_width) + new_width
        if unit is None and old_width == new_width and "\t" not in white:
            shifted.append(line)
        elif unit is None:
            shifted.append(" " * width + line[len(white) :])
        else:
            depth = scope.indent.count("\t") + max(0, indent_width(white) - old_width) // _step(lines, inside)
            shifted.append("\t" * depth + line[len(white) :])
    return shifted


def _tab_unit(source: Source, scope: Scope) -> str | None:
    """A tab if the scope's own lines are indented with tabs."""
    own = source.lines[scope.start_line - 1 : scope.end_line]
    return (
        "\t" if any(line.startswith("\t") for line in own) and not any(line.startswith("  ") for line in own) else None
    )


def _step(lines: Sequence[str], inside: frozenset[int]) -> int:
    """Columns of one level of indentation in the answer."""
    widths = {
        indent_width(leading_whitespace(line))
        for number, line in enumerate(lines, 1)
        if line.strip() and number not in inside
    }
    base = min(widths, default=0)
    return min((width - base for width in widths if width > base), default=4)


def _new_imports(answer: Source, lines: Sequence[str], source: Source) -> tuple[str, ...]:
    """Top-level imports of the answer that its function uses and the file does not have."""
    try:
        tree = parse_text(answer.plain_text())
        present = {item.binds for item in module_imports(parse_text(source.plain_text()))}
    except ParseFault:
        return ()
    used = set(re.findall(r"\w+", "\n".join(lines)))
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
