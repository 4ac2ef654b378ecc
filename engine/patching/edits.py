"""The edit list: the envelope of every patch and what the ledger stores.

`pre` and `new` hold whole lines joined by newlines, without the last line's terminator, so that "" is one empty line
(and nothing at all in an `insert`'s `pre` and a `delete`'s `new`). All edits of a list count lines of the same text,
the one before any of them, so any subset of them applies.

When edits are applied, a replaced block keeps its last line's terminator, other new lines take the file's usual one,
and the file's final terminator (or its absence) stays.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from engine.errors import UsageError
from engine.patching.scopes import ParseFault, Scope, parse_text, standalone_text
from engine.patching.source import Source

Action = Literal["replace", "insert", "delete"]

EDITS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "action": {"enum": ["replace", "insert", "delete"]},
            "start_line": {"type": "integer", "minimum": 1},
            "end_line": {"type": "integer", "minimum": 0},
            "pre": {"type": "string"},
            "new": {"type": "string"},
        },
        "required": ["path", "action", "start_line", "end_line", "pre", "new"],
        "additionalProperties": False,
    },
}

_LINE_END = re.compile(r"\r\n|\n|\r")
_WHITESPACE = " \t\f"
_MOST_LINES_COMPARED = 4000  # with every line; beyond that difflib leaves common ones out


class SchemaFault(ValueError):
    """JSON that is not a list of edits; never leaves engine.patching."""


class AnchorError(ValueError):
    """An edit whose place cannot be found, or that overlaps another; never leaves engine.patching."""


@dataclass(frozen=True)
class Edit:
    """One change of whole lines.

    Args:
        path: The file, as `Source.path` names it.
        action: `insert` goes before `start_line`; the last line + 1 appends.
        start_line: First line, 1-based.
        end_line: Last line, inclusive; `start_line - 1` for an insert.
        pre: The exact text replaced or deleted.
        new: The text put there.
    """

    path: str
    action: Action
    start_line: int
    end_line: int
    pre: str
    new: str

    def to_json(self) -> dict[str, Any]:
        """The edit as an object for programs, its keys in the schema's order."""
        return {
            "path": self.path,
            "action": self.action,
            "start_line": self.start_line,
            "end_line": self.end_line,
            "pre": self.pre,
            "new": self.new,
        }

    @classmethod
    def from_json(cls, value: object) -> Edit:
        """Check and read one edit.

        Args:
            value: What a JSON parser returned.

        Returns:
            The edit.

        Raises:
            SchemaFault: Keys, types, line numbers or the action's own rules are violated.
        """
        if not isinstance(value, dict):
            raise SchemaFault(f"an edit is an object, not {_json_type(value)}")
        fields = cast("dict[object, object]", value)
        _check_keys(fields)
        for key in ("path", "action", "pre", "new"):
            if not isinstance(fields[key], str):
                raise SchemaFault(f"`{key}` is a string, not {_json_type(fields[key])}")
        for key in ("start_line", "end_line"):
            if not isinstance(fields[key], int) or isinstance(fields[key], bool):
                raise SchemaFault(f"`{key}` is a whole number, not {_json_type(fields[key])}")
        if fields["action"] not in ("replace", "insert", "delete"):
            raise SchemaFault(f"`action` is replace, insert or delete, not {str(fields['action'])[:40]!r}")
        edit = cls(**cast("dict[str, Any]", fields))
        edit._check_rules()
        return edit

    def _check_rules(self) -> None:
        if self.start_line < 1:
            raise SchemaFault(f"`start_line` is at least 1, not {self.start_line}")
        if self.action == "insert":
            if self.end_line != self.start_line - 1:
                raise SchemaFault(f"an insert's `end_line` is start_line - 1, not {self.end_line}")
            if self.pre:
                raise SchemaFault("an insert's `pre` is empty")
        elif self.end_line < self.start_line:
            raise SchemaFault(f"`end_line` {self.end_line} is before `start_line` {self.start_line}")
        if self.action == "delete" and self.new:
            raise SchemaFault("a delete's `new` is empty")


def edits_from_json(value: object) -> list[Edit]:
    """Check and read a list of edits.

    Args:
        value: What a JSON parser returned.

    Returns:
        The edits, in order.

    Raises:
        SchemaFault: It is not a list of valid edits; the message says which edit and why.
    """
    if not isinstance(value, list):
        raise SchemaFault(f"the edits are a list, not {_json_type(value)}")
    edits: list[Edit] = []
    for number, item in enumerate(cast("list[object]", value), 1):
        try:
            edits.append(Edit.from_json(item))
        except SchemaFault as fault:
            raise SchemaFault(f"edit {number}: {fault}") from None
    return edits


def lines_of(text: str) -> list[str]:
    r"""The lines of `pre` or `new`: "" is one empty line, "a\n" is two lines.

    Args:
        text: Text without a final terminator.

    Returns:
        At least one line.
    """
    return _LINE_END.split(text)


def line_range(start_line: int, end_line: int) -> str:
    """Lines in words.

    Args:
        start_line: First line.
        end_line: Last line; `start_line - 1` for the place before `start_line`.

    Returns:
        `line 3` or `lines 3-5`.
    """
    return f"lines {start_line}-{end_line}" if end_line > start_line else f"line {start_line}"


def new_lines(edit: Edit) -> list[str]:
    """The lines that an edit puts in.

    Args:
        edit: Any edit.

    Returns:
        No lines for a delete.
    """
    return [] if edit.action == "delete" else lines_of(edit.new)


def resolve_anchors(
    source: Source, scope: Scope, edits: Sequence[Edit], *, path: str | None = None
) -> tuple[list[Edit], list[str]]:
    """Find each edit's place by the text it replaces.

    `pre` must be at its lines, else exactly once inside the scope. Newlines never count, trailing whitespace counts
    unless nothing matches with it.

    Args:
        source: The file as it is.
        scope: Where moved edits may land.
        edits: What was proposed.
        path: The file that is meant; None for `source.path`.

    Returns:
        The edits with their true path, lines and `pre`, in the order of the file; and one sentence for each repair.

    Raises:
        AnchorError: A place is not found or not unique, another file is meant, or two edits overlap.
    """
    path = source.path if path is None else path
    repairs: list[str] = []
    resolved: list[Edit] = []
    for number, edit in enumerate(_mend_paths(edits, path, repairs), 1):
        placed = _place(source, scope, edit, number, repairs)
        if placed.action == "replace" and lines_of(placed.new) == lines_of(placed.pre):
            repairs.append(f"Edit {number} was left out: it puts back the text that it replaces.")
        else:
            resolved.append(placed)
    return ordered(source, resolved), repairs


def ordered(source: Source, edits: Sequence[Edit]) -> list[Edit]:
    """The edits in the order of the file.

    Args:
        source: The text whose lines they count.
        edits: The edits.

    Returns:
        Sorted by line; an insert comes before the edit of the line it precedes, inserts at one place keep their order.

    Raises:
        AnchorError: Lines beyond the file, or two edits of one line.
    """
    in_order = sorted(edits, key=lambda edit: (edit.start_line, edit.action != "insert"))
    free_line = 1
    for edit in in_order:
        if edit.end_line > source.num_lines or edit.start_line > source.num_lines + 1:
            place = line_range(edit.start_line, edit.end_line)
            raise AnchorError(f"{place} is beyond the end of {source.path}, line {source.num_lines}")
        if edit.start_line < free_line:
            raise AnchorError(f"two edits change line {edit.start_line}; make them one")
        free_line = max(free_line, edit.end_line + 1)
    return in_order


def apply_edits(source: Source, edits: Sequence[Edit], *, keep_newlines: bool = False) -> Source:
    """The text after the edits.

    Args:
        source: The text whose lines the edits count; `pre` is not compared.
        edits: Edits that do not overlap.
        keep_newlines: Take the terminators inside `new` as they are (for `invert`'s edits) instead of the file's usual.

    Returns:
        The new text; every untouched line keeps its terminator, and the file its byte-order mark and final terminator.

    Raises:
        AnchorError: Lines beyond the file, or two edits of one line.
    """
    lines: list[str] = []
    eols: list[str] = []
    next_line = 1
    for edit in ordered(source, edits):
        lines += source.lines[next_line - 1 : edit.start_line - 1]
        eols += source.eols[next_line - 1 : edit.start_line - 1]
        next_line = edit.end_line + 1
        added = new_lines(edit)
        if added:
            inner = _LINE_END.findall(edit.new) if keep_newlines else [source.newline] * (len(added) - 1)
            lines += added
            eols += [*inner, source.newline if edit.action == "insert" else source.eols[edit.end_line - 1]]
    lines += source.lines[next_line - 1 :]
    eols += source.eols[next_line - 1 :]
    if eols:
        eols = [eol or source.newline for eol in eols]
        eols[-1] = source.eols[-1] if source.eols else source.newline
    return Source(source.path, tuple(lines), tuple(eols), source.bom)


@dataclass(frozen=True, slots=True)
class Replacement:
    """New text for a part of a text; `start` and `end` count code points of `Source.text`."""

    start: int
    end: int
    text: str


def replacements(source: Source, edits: Sequence[Edit]) -> list[Replacement]:
    """The edits as an editor applies them: exact text for exact text, terminators included.

    Args:
        source: The text whose lines the edits count.
        edits: Edits that do not overlap.

    Returns:
        One for each edit, in the order of the text; a single one where they meet at the end of the file. Applied
        together they give the text of `apply_edits`.

    Raises:
        AnchorError: Lines beyond the file, or two edits of one line.
    """
    in_order = ordered(source, edits)
    target = apply_edits(source, in_order)
    parts = [_replacement(source, apply_edits(source, [edit])) for edit in in_order]
    if replaced(source.text, parts) == target.text:
        return parts
    return [_replacement(source, target)]


def replaced(text: str, parts: Sequence[Replacement]) -> str:
    """A text after replacements.

    Args:
        text: The text before.
        parts: In its order.

    Returns:
        The text after; where parts overlap, text is lost.
    """
    pieces: list[str] = []
    end = 0
    for part in parts:
        pieces += [text[end : part.start], part.text]
        end = part.end
    return "".join([*pieces, text[end:]])


def _replacement(before: Source, after: Source) -> Replacement:
    """The whole lines that differ."""
    old, new = _exact_lines(before), _exact_lines(after)
    head = _num_common(old, new)
    tail = _num_common(old[head:][::-1], new[head:][::-1])
    start = sum(map(len, old[:head]))
    middle = sum(map(len, old[head : len(old) - tail]))
    return Replacement(start, start + middle, "".join(new[head : len(new) - tail]))


def _exact_lines(source: Source) -> list[str]:
    return [line + eol for line, eol in zip(source.lines, source.eols, strict=True)]


def diff_edits(before: Source, after_lines: Sequence[str], region: Scope | tuple[int, int]) -> list[Edit]:
    """The minimal hunks that turn a region's lines into others.

    Lines that differ in trailing whitespace alone are kept as they are, except inside strings of several lines.

    Args:
        before: The file.
        after_lines: The region's new lines, without terminators.
        region: A scope, or its first and last line.

    Returns:
        Edits that do not touch each other, each of which may be applied alone.
    """
    start_line, end_line = (region.start_line, region.end_line) if isinstance(region, Scope) else region
    old_lines = before.lines[start_line - 1 : end_line]
    old_keys, new_keys = _comparison_keys(old_lines), _comparison_keys(after_lines)
    skip = _num_common(old_keys, new_keys)
    tail = _num_common(old_keys[skip:][::-1], new_keys[skip:][::-1])
    matcher = difflib.SequenceMatcher(
        None, old_keys[skip : len(old_keys) - tail], new_keys[skip : len(new_keys) - tail], autojunk=False
    )
    edits: list[Edit] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            edit = _hunk(before, start_line + skip, (i1, i2), after_lines[skip + j1 : skip + j2])
            if edit is not None:
                edits.append(edit)
    return edits


def unified_diff(before: Source, edits: Sequence[Edit], *, num_context_lines: int = 3) -> str:
    r"""A patch as `diff -u` shows it: exactly its edits, each as small as it can be.

    Args:
        before: The old text; its path is shown with a/ and b/.
        edits: The patch.
        num_context_lines: Unchanged lines around each hunk.

    Returns:
        The diff, "" if nothing changed. \r\n stays in it, so that it can be applied; a lone \r is shown as \n.

    Raises:
        AnchorError: The edits do not apply to `before`.
    """
    after = apply_edits(before, edits)
    old, new = _diff_lines(before), _diff_lines(after)
    changes = _KnownChanges(_opcodes(before, edits, old, new))
    path = before.path.lstrip("/")
    result: list[str] = []
    for group in changes.get_grouped_opcodes(num_context_lines):
        result += [] if result else [f"--- a/{path}\n", f"+++ b/{path}\n"]
        (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
        result.append(f"@@ -{_hunk_range(i1, i2)} +{_hunk_range(j1, j2)} @@\n")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                result += [f" {line}" for line in old[i1:i2]]
            else:
                result += [*(f"-{line}" for line in old[i1:i2]), *(f"+{line}" for line in new[j1:j2])]
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in result)


def _hunk_range(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + 1}" if length == 1 else f"{start + 1 if length else start},{length}"


_Tag = Literal["replace", "delete", "insert", "equal"]
_Opcode = tuple[_Tag, int, int, int, int]


class _KnownChanges(difflib.SequenceMatcher[str]):
    """Changes that are known; looked for, difflib would take common lines for junk, or a very long time."""

    def __init__(self, opcodes: list[_Opcode]) -> None:
        super().__init__(None, "", "")
        self._opcodes = opcodes

    def get_opcodes(self) -> list[_Opcode]:
        """The changes."""
        return self._opcodes


def _opcodes(before: Source, edits: Sequence[Edit], old: Sequence[str], new: Sequence[str]) -> list[_Opcode]:
    """What changed where, in difflib's form; both texts from beginning to end."""
    found: list[_Opcode] = []
    i = j = 0

    def take(i2: int, j2: int, *, is_edit: bool) -> None:
        nonlocal i, j
        for tag, a1, a2, b1, b2 in _line_changes(old[i:i2], new[j:j2], is_edit=is_edit):
            _add(found, (tag, i + a1, i + a2, j + b1, j + b2))
        i, j = i2, j2

    for edit in ordered(before, edits):
        start = edit.start_line - 1
        take(start, j + start - i, is_edit=False)
        take(max(start, edit.end_line), j + len(new_lines(edit)), is_edit=True)
    take(len(old), len(new), is_edit=False)
    return found


def _line_changes(old: Sequence[str], new: Sequence[str], *, is_edit: bool) -> list[_Opcode]:
    """An edit is compared as difflib does; beside edits only ends of lines can differ, so lines stand in pairs."""
    if old == new:
        return [("equal", 0, len(old), 0, len(new))]
    if is_edit:
        autojunk = len(old) + len(new) > _MOST_LINES_COMPARED
        return list(difflib.SequenceMatcher(None, old, new, autojunk=autojunk).get_opcodes())
    pairs = enumerate(zip(old, new, strict=True))
    return [("equal" if left == right else "replace", n, n + 1, n, n + 1) for n, (left, right) in pairs]


def _add(found: list[_Opcode], code: _Opcode) -> None:
    """Add an opcode, joined with the one before where both are changes or both are not."""
    tag, i1, i2, j1, j2 = code
    if i1 == i2 and j1 == j2:
        return
    if found and (found[-1][0] == "equal") == (tag == "equal"):
        before, a1, _, b1, _ = found.pop()
        tag = "equal" if before == "equal" else "replace"
        i1, j1 = a1, b1
    found.append((tag, i1, i2, j1, j2))


def invert(before: Source, edits: Sequence[Edit]) -> list[Edit]:
    """The edits that take a patch back.

    What was deleted comes back as a replacement of a neighbouring line, so that its place can be found by text.

    Args:
        before: The text before the patch.
        edits: The patch.

    Returns:
        Edits that count the lines of the patched text; `apply_edits(..., keep_newlines=True)` with them gives the exact
        bytes of `before` (unless the patch left an empty file).

    Raises:
        AnchorError: The edits do not apply to `before`.
    """
    after = apply_edits(before, edits)
    regions: list[_Region] = []
    shift = 0
    for edit in ordered(before, edits):
        num_new = len(new_lines(edit))
        start = edit.start_line + shift
        regions.append(_Region(edit.start_line, edit.end_line, start, start + num_new - 1))
        shift += num_new - (edit.end_line - edit.start_line + 1)
    regions = _join_touching(regions)
    while (wider := _join_touching([_widen(before, after, region) for region in regions])) != regions:
        regions = wider
    return [_inverse_edit(before, after, region) for region in regions]


def select_hunks(edits: Sequence[Edit], indexes: Sequence[int]) -> list[Edit]:
    """Some of a patch's edits.

    Args:
        edits: The patch.
        indexes: 0-based places in `edits`.

    Returns:
        Those edits, in the patch's order; since all count the same lines, any subset applies.

    Raises:
        UsageError: An index is out of range, or none is given.
    """
    wanted = set(indexes)
    unknown = sorted(index for index in wanted if not 0 <= index < len(edits))
    if unknown or not wanted:
        what = f"no hunk {', '.join(map(str, unknown))}" if unknown else "no hunk was selected"
        raise UsageError(f"{what}; the patch has {len(edits)} hunks, counted from 0.", hint="Select existing hunks.")
    return [edit for index, edit in enumerate(edits) if index in wanted]


def _check_keys(fields: dict[object, object]) -> None:
    expected = EDITS_SCHEMA["items"]["required"]
    missing = [key for key in expected if key not in fields]
    unknown = [str(key)[:40] for key in fields if key not in expected]
    if missing:
        raise SchemaFault(f"the key `{missing[0]}` is missing")
    if unknown:
        raise SchemaFault(f"the key `{unknown[0]}` is unknown")


def _json_type(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    names = {"dict": "an object", "list": "a list", "str": "a string"}
    return names.get(type(value).__name__, type(value).__name__)


def _mend_paths(edits: Sequence[Edit], path: str, repairs: list[str]) -> list[Edit]:
    """Give every edit the true path, if only one file can be meant."""
    named = {_plain_path(edit.path) for edit in edits}
    others = named - {_plain_path(path)}
    strangers = [name for name in others if name.rpartition("/")[2] != _plain_path(path).rpartition("/")[2]]
    if strangers and len(named) > 1:
        raise AnchorError(f"the edits name several files ({', '.join(sorted(named))}); only {path} may be edited")
    mended: list[Edit] = []
    for number, edit in enumerate(edits, 1):
        if _plain_path(edit.path) != _plain_path(path):
            repairs.append(f"Edit {number}: the path {edit.path!r} was taken as {path!r}, the only file edited.")
        mended.append(replace(edit, path=path))
    return mended


def _plain_path(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")


def _place(source: Source, scope: Scope, edit: Edit, number: int, repairs: list[str]) -> Edit:
    new = source.newline.join(new_lines(edit))
    if edit.action == "insert":
        if edit.start_line > source.num_lines + 1:
            raise AnchorError(f"edit {number} inserts before line {edit.start_line} of {source.num_lines}")
        return replace(edit, new=new)
    start_line, pre_lines, notes = _find_pre(source, scope, edit, number)
    end_line = start_line + len(pre_lines) - 1
    if (start_line, end_line) != (edit.start_line, edit.end_line):
        moved = f"moved from {line_range(edit.start_line, edit.end_line)} to {line_range(start_line, end_line)}"
        notes.append(f"{moved}, where its text is")
    if len(pre_lines) < len(lines_of(edit.pre)) and edit.new.endswith(("\n", "\r")):
        new = source.newline.join(new_lines(edit)[:-1])
    if notes:
        repairs.append(f"Edit {number}: {'; '.join(notes)}.")
    pre = source.text_between(start_line, end_line)
    return replace(edit, start_line=start_line, end_line=end_line, pre=pre, new=new)


def _find_pre(source: Source, scope: Scope, edit: Edit, number: int) -> tuple[int, list[str], list[str]]:
    """Where `pre` is, the lines of it that matched, and what had to be overlooked."""
    exact = lines_of(edit.pre)
    attempts: list[tuple[list[str], bool, list[str]]] = [(exact, False, [])]
    if len(exact) > 1 and not exact[-1]:
        attempts.append((exact[:-1], False, ["a newline at the end of `pre` was dropped"]))
        attempts.sort(key=lambda attempt: len(attempt[0]) != edit.end_line - edit.start_line + 1)
    attempts += [(lines, True, [*notes, "trailing whitespace in `pre` was overlooked"]) for lines, _, notes in attempts]
    for lines, loose, notes in attempts:
        if _is_at(source, edit.start_line, lines, loose):
            return edit.start_line, lines, notes
    for lines, loose, notes in attempts:
        if not any(line.strip(_WHITESPACE) for line in lines):
            continue
        last_start = scope.end_line - len(lines) + 1
        places = [start for start in range(scope.start_line, last_start + 1) if _is_at(source, start, lines, loose)]
        if len(places) == 1:
            return places[0], lines, notes
        if places:
            raise AnchorError(
                f"the `pre` of edit {number} is not at line {edit.start_line} but at lines "
                f"{', '.join(map(str, places))}; give the right line or more lines"
            )
    raise AnchorError(
        f"the `pre` of edit {number} is not at {line_range(edit.start_line, edit.end_line)} nor anywhere else in "
        f"{line_range(scope.start_line, scope.end_line)}; copy the text to replace exactly"
    )


def _is_at(source: Source, start_line: int, lines: Sequence[str], loose: bool) -> bool:
    there = source.lines[start_line - 1 : start_line - 1 + len(lines)]
    if len(there) != len(lines):
        return False
    if loose:
        return all(old.rstrip(_WHITESPACE) == line.rstrip(_WHITESPACE) for old, line in zip(there, lines, strict=True))
    return all(old == line for old, line in zip(there, lines, strict=True))


def _comparison_keys(lines: Sequence[str]) -> list[str]:
    """Each line without trailing whitespace, unless a string goes on after the line."""
    open_lines = lines_inside_strings(lines)
    return [line if index in open_lines else line.rstrip(_WHITESPACE) for index, line in enumerate(lines)]


def lines_inside_strings(lines: Sequence[str]) -> frozenset[int]:
    """0-based lines whose end lies inside a string; all of them if the lines do not parse."""
    text = standalone_text(lines, indent := _first_indent(lines))
    try:
        tree = parse_text(text)
    except ParseFault:
        return frozenset(range(len(lines)))
    first_line = 2 if indent else 1
    return frozenset(
        line - first_line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None
        for line in range(node.lineno, node.end_lineno)
    )


def _first_indent(lines: Sequence[str]) -> str:
    for line in lines:
        code = line.lstrip(_WHITESPACE)
        if code and not code.startswith("#"):
            return line[: len(line) - len(code)]
    return ""


def _num_common(left: Sequence[str], right: Sequence[str]) -> int:
    number = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        number += 1
    return number


def _hunk(before: Source, first_line: int, old: tuple[int, int], new: Sequence[str]) -> Edit | None:
    start_line, end_line = first_line + old[0], first_line + old[1] - 1
    text = before.newline.join(new)
    pre = before.text_between(start_line, end_line)
    if not new:
        return Edit(before.path, "delete", start_line, end_line, pre, "")
    if end_line < start_line:
        return Edit(before.path, "insert", start_line, end_line, "", text)
    if tuple(new) == before.lines[start_line - 1 : end_line]:
        return None
    return Edit(before.path, "replace", start_line, end_line, pre, text)


def _diff_lines(source: Source) -> list[str]:
    return [line + ("\n" if eol == "\r" else eol) for line, eol in zip(source.lines, source.eols, strict=True)]


@dataclass(frozen=True)
class _Region:
    """Lines of the text before and the lines of the text after that stand for them; either may be none."""

    before_start: int
    before_end: int
    after_start: int
    after_end: int


def _join_touching(regions: Sequence[_Region]) -> list[_Region]:
    joined: list[_Region] = []
    for region in regions:
        if joined and region.before_start <= joined[-1].before_end + 1:
            last = joined.pop()
            region = _Region(
                last.before_start,
                max(last.before_end, region.before_end),
                last.after_start,
                max(last.after_end, region.after_end),
            )
        joined.append(region)
    return joined


def _widen(before: Source, after: Source, region: _Region) -> _Region:
    """Take in an unchanged line where the text alone would lose a terminator or a place."""
    if region.before_end < region.before_start:
        return region
    replaces = region.after_end >= region.after_start
    if replaces and before.eols[region.before_end - 1] == after.eols[region.after_end - 1]:
        return region
    if region.after_end < after.num_lines:
        return replace(region, before_end=region.before_end + 1, after_end=region.after_end + 1)
    if region.after_start > 1:
        return replace(region, before_start=region.before_start - 1, after_start=region.after_start - 1)
    return region


def _inverse_edit(before: Source, after: Source, region: _Region) -> Edit:
    pre = after.text_between(region.after_start, region.after_end)
    new = before.text_between(region.before_start, region.before_end)
    action: Action = "replace"
    if region.before_end < region.before_start:
        action = "delete"
    elif region.after_end < region.after_start:
        action = "insert"
    return Edit(before.path, action, region.after_start, region.after_end, pre, new)
