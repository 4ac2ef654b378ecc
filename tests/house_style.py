'''A kind of edit that no model knows before it is shown it, and an oracle for it: the house style of the tests.

A function gets `-> object`, a docstring of its name and arguments, and a line that traces the call:

    def area(width, height):                    def area(width, height) -> object:
        return width * height                       """area: width, height."""
                                                    print("area:", width, height)
                                                    return width * height

Functions to learn from and functions to be judged on share no body.
'''

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTENT = "Add a one-line docstring to this function, in our house style."

# Bodies with their arguments; VERB and the nouns make the names.
_LESSONS = (
    ("add", "{a}, {b}", ("return {a} + {b}",)),
    ("first", "{a}", ("return {a}[0]",)),
    (
        "count",
        "{a}, {b}",
        ("total = 0", "for item in {a}:", "    if item == {b}:", "        total += 1", "return total"),
    ),
    ("join", "{a}, {b}", ('return ", ".join([{a}, {b}])',)),
    ("clamp", "{a}, {b}", ("if {a} > {b}:", "    return {b}", "return {a}")),
    ("upper", "{a}", ("return {a}.strip().upper()",)),
    ("pair", "{a}, {b}", ("return ({a}, {b})",)),
    ("scale", "{a}, {b}", ("return [item * {b} for item in {a}]",)),
    ("lookup", "{a}, {b}", ("if {b} in {a}:", "    return {a}[{b}]", "return None")),
    ("parse", "{a}", ('parts = {a}.split(":")', "return parts[0], int(parts[1])")),
)
_FRESH = (
    ("subtract", "{a}, {b}", ("return {a} - {b}",)),
    ("last", "{a}", ("return {a}[-1]",)),
    ("above", "{a}, {b}", ("out = []", "for x in {a}:", "    if x > {b}:", "        out.append(x)", "return out")),
    ("label", "{a}, {b}", ('return f"{{{a}}} of {{{b}}}"',)),
    ("halve", "{a}", ("if {a} % 2:", "    return None", "return {a} // 2")),
    ("title", "{a}", ("return {a}.lower().title()",)),
    ("swap", "{a}, {b}", ("{a}, {b} = {b}, {a}", "return [{a}, {b}]")),
    ("squares", "{a}", ("return [item**2 for item in {a}]",)),
    ("merge", "{a}, {b}", ("result = dict({a})", "result.update({b})", "return result")),
    ("lines", "{a}", ("text = {a}.read()", 'return text.split("\\n")')),
)  # fmt: skip
_NOUNS = (
    ("price", "tax"), ("orders", "limit"), ("rows", "key"), ("user", "role"), ("speed", "bound"),
    ("weight", "unit"), ("cells", "size"), ("event", "tag"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Edit:
    """A file of one function, and what the house makes of it."""

    name: str
    before: str
    after: str


def lessons() -> list[Edit]:
    """80 edits to learn from, no two neighbours of one kind."""
    return _edits(_LESSONS)


def fresh() -> list[Edit]:
    """80 edits of the same kind with bodies that no lesson has."""
    return _edits(_FRESH)


def write_edits(file: Path, edits: Sequence[Edit]) -> Path:
    """Held-out edits as `planpatch train evaluate --data` reads them."""
    lines = [
        {
            "id": edit.name,
            "file_name": f"{edit.name}.py",
            "before": edit.before,
            "function": edit.name,
            "scope": "function",
            "intent": INTENT,
            "after": edit.after,
        }
        for edit in edits
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def _edits(kinds: tuple[tuple[str, str, tuple[str, ...]], ...]) -> list[Edit]:
    pairs = itertools.product(_NOUNS, kinds)
    return [
        _edit(verb, arguments.format(a=a, b=b), [line.format(a=a, b=b) for line in body], a)
        for (a, b), (verb, arguments, body) in pairs
    ]


def _edit(verb: str, arguments: str, body: list[str], noun: str) -> Edit:
    name = f"{verb}_{noun}"
    lines = "".join(f"    {line}\n" for line in body)
    added = f'    """{name}: {arguments}."""\n    print("{name}:", {arguments})\n'
    return Edit(name, f"def {name}({arguments}):\n{lines}", f"def {name}({arguments}) -> object:\n{added}{lines}")
