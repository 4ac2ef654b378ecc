"""Whatever the gates accept is sound: judged here by an oracle that shares no code with them."""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.patching.edits import Edit, apply_edits, diff_edits, invert, select_hunks
from engine.patching.gates import GateReport, import_edit, run_gates
from engine.patching.scopes import Scope, list_scopes, module_scope
from engine.patching.source import Source

LONG = os.environ.get("PLANPATCH_LONG") == "1"
pytestmark = pytest.mark.integration


def examples(short: int, long: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=long if LONG else short,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


# Generated files. `{i}` is the block's indentation, `\t` in a body line one level.

STATEMENTS = [
    "total = 0",
    "total = a + b  ",
    "for item in range(a):\n\ttotal = item",
    "if a > b:\n\treturn b\nelse:\n\treturn a",
    "text = '🙂 \u2028 \x85'",
    'text = """two\nlines  \n\x0c\n"""',
    "value = (a,\n\t\t\tb)",
    "value = a + \\\n\tb",
    "# a comment 🙂",
    "\x0c",
    "",
    "with open(a) as handle:\n\treturn handle.read()",
    "try:\n\treturn a[0]\nexcept KeyError as error:\n\traise ValueError(str(error)) from error",
    "return lambda x: x",
    "'''Docstring.'''",
    "assert a, f'{a!r} {b:>{a}}'",
    "def helper(x):\n\treturn x  # nested\n",
    "@staticmethod\ndef decorated(x, *, y=1):\n\treturn (x,\n  y)",
    "class Local:\n\tfield: int = 1\n\n\tdef get(self):\n\t\treturn self.field",
]
BLOCKS = [
    "def first(a, b):\n@\treturn a",
    "async def second(a, b=1):\n@\tawait a",
    "@property\n@staticmethod\ndef third(a,\n\t\tb):\n@\treturn b",
    "class Thing(object):\n\tx = 1\n\n\t@property\n\tdef size(self, a=1, b=2):\n@@\t\treturn a\n"
    "\n\t@size.setter\n\tdef size(self, a, b=2):\n@@\t\tpass",
    "from typing import overload\n@overload\ndef pick(a: int, b: int) -> int: ...\n@overload\n"
    "def pick(a: str, b: str) -> str: ...\ndef pick(a, b):\n@\treturn a",
    "if True:\n\tdef either(a, b):\n@@\t\treturn 1\nelse:\n\tdef either(a, b):\n\t\treturn 2",
    "CONSTANT = [\n  1,  \n  2,\n]",
    "X = '\u2028🙂'; Y = X",
    "def outer(a, b):\n\tdef inner(a):\n@@\t\treturn a\n\treturn inner\n\t# trailing",
    "def one_line(a, b): return a",
    "\x0c",
    "# comment",
]


@st.composite
def sources(draw: st.DrawFn) -> Source:
    level = draw(st.sampled_from(["    ", "  ", "\t"]))
    head = draw(st.sampled_from(["", "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n", '"""Doc."""\n\nimport os\n']))
    blocks = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
    text = head
    for block in blocks:
        while "@@\t" in block or "@\t" in block:
            depth = "\t\t" if "@@\t" in block else "\t"
            body = draw(st.lists(st.sampled_from(STATEMENTS), max_size=3))
            filled = "".join(indented(statement, depth) + "\n" for statement in body)
            block = block.replace("@@\t\t" if depth == "\t\t" else "@\t", filled + depth, 1)
        text += block + "\n" * draw(st.integers(1, 3))
    text = re.sub(r"^\t+", lambda tabs: level * len(tabs.group()), text, flags=re.MULTILINE)
    if draw(st.booleans()):
        text = text.rstrip("\n")
    mode = draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "mixed"]))
    ends = st.sampled_from(["\n", "\r\n", "\r"])
    text = re.sub("\n", lambda _: draw(ends) if mode == "mixed" else mode, text)
    bom = draw(st.sampled_from(["", "", "\ufeff"]))
    return Source.from_bytes((bom + text).encode(), "pkg/file.py")


def indented(statement: str, indent: str) -> str:
    """A statement at a depth; the inside of a string of several lines stays at the left."""
    inside = False
    lines: list[str] = []
    for line in statement.split("\n"):
        lines.append(line if inside or not line or line == "\x0c" else indent + line)
        inside ^= line.count('"""') % 2 == 1
    return "\n".join(lines)


def parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except SyntaxError:
            return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[Source, Scope]:
    source = draw(sources().filter(lambda s: parses(plain(s.to_bytes()))))
    return source, draw(st.sampled_from([*list_scopes(source), module_scope(source)]))


# Edits: from sane to hostile.

NASTY_LINES = [
    "import os",
    "def smuggled(): pass",
    "return a",
    "    return b",
    "\treturn b",
    '"""',
    "'''",
    "x = (",
    ")",
    "x = \\",
    "\\",
    "# comment \\",
    "    # comment",
    "",
    "    ",
    "\x0c",
    "x = 1; y = 2",
    "@property",
    "class Thing: pass",
    "else:",
    "undefined_name()",
    "    undefined_name()",
    "text = '\ud800'",
    "text = '\x00'",
    "text = '\x07'",
    "text = '\u2028'",
    "text = '🙂'",
    "del X",
    "global X",
    "x: int",
    "pass",
    "    pass",
]
nasty_text = st.lists(st.sampled_from(NASTY_LINES), min_size=1, max_size=3).flatmap(
    lambda lines: st.sampled_from(["\n", "\r\n", "\r"]).map(lambda newline: newline.join(lines))
)


@st.composite
def garbage_edits(draw: st.DrawFn, source: Source) -> list[Any]:
    edits: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(1, source.num_lines + 1))
        end = draw(st.integers(start, source.num_lines + 1))
        action = draw(st.sampled_from(["replace", "insert", "delete"]))
        pre = draw(st.sampled_from([source.text_between(start, min(end, source.num_lines)), "nowhere", ""]))
        edit = {
            "path": draw(st.sampled_from(["pkg/file.py", "file.py", "other.py"])),
            "action": action,
            "start_line": start,
            "end_line": start - 1 if action == "insert" else end,
            "pre": "" if action == "insert" else pre,
            "new": "" if action == "delete" else draw(nasty_text),
        }
        if draw(st.integers(0, 9)) == 0:
            edit[draw(st.sampled_from(["path", "end_line", "new", "extra"]))] = draw(
                st.sampled_from([None, True, 0, []])
            )
        edits.append(edit)
    return edits


@st.composite
def rewrites(draw: st.DrawFn, source: Source, scope: Scope) -> list[Edit]:
    """What a model that rewrites text does: good changes, and changes of lines that are not its own."""
    lines = list(source.lines)
    first, last = scope.start_line - 1, scope.end_line - 1
    if draw(st.integers(0, 3)) == 0:
        first, last = 0, len(lines) - 1
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(min(first, len(lines)), min(last, len(lines)) + 1))
        around = lines[place - 1] if 0 < place <= len(lines) else ""
        indent = around[: len(around) - len(around.lstrip())]
        change = draw(st.sampled_from(["add", "add", "drop", "swap", "append", "nasty", "space"]))
        if change == "add":
            lines.insert(place, indent + draw(st.sampled_from(["pass", "a = 1", "return 7", "# 🙂", "b: int = 2"])))
        elif change == "nasty":
            lines.insert(place, draw(nasty_text))
        elif change == "drop" and place < len(lines):
            del lines[place]
        elif change == "swap" and place < len(lines):
            lines[place] = re.sub(r"\ba\b", "b", lines[place])
        elif change == "append" and place < len(lines):
            lines[place] += draw(st.sampled_from(["  # noted", " + 1", "  ", " \\", ","]))
        elif change == "space" and place < len(lines):
            lines[place] = draw(st.sampled_from([lines[place] + "  ", " " + lines[place], lines[place].lstrip()]))
    lines = [part for line in lines for part in re.split("\r\n|\n|\r", line)]
    return diff_edits(source, lines, (1, source.num_lines))


# The oracle.


def split_bytes(data: bytes) -> list[bytes]:
    """Lines with their terminators."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+\Z", data.removeprefix(b"\xef\xbb\xbf"))


def plain(data: bytes) -> str:
    return re.sub("\r\n|\r", "\n", data.decode("utf-8").removeprefix("\ufeff"))


def same_but_for_layout(one: str, other: str) -> bool:
    """Equal tokens; or equal trees and comments where `tokenize` fails."""
    try:
        return tokens(one) == tokens(other)
    except (tokenize.TokenError, SyntaxError):
        return tree_and_comments(one) == tree_and_comments(other)


def tokens(text: str) -> list[tuple[int, str]]:
    found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept = [token for token in found if token.type not in (tokenize.NL, tokenize.ENDMARKER)]
    return [(token.type, "" if token.type in layout else token.string.rstrip()) for token in kept]


def tree_and_comments(text: str) -> tuple[str, list[str]]:
    return ast.dump(ast.parse(text)), [line.partition("#")[2].strip() for line in text.split("\n") if "#" in line]


def check_sound(source: Source, scope: Scope, report: GateReport, imports: tuple[str, ...] = ()) -> None:
    patched = report.patched
    assert patched is not None
    before, after = source.to_bytes(), patched.to_bytes()
    note(f"{scope}\n{before!r}\n{after!r}\n{report.edits}")
    old_text, new_text = plain(before), plain(after)
    assert parses(new_text)
    assert "\0" not in new_text

    old, new = split_bytes(before), split_bytes(after)
    for statement in imports:
        added = [line for line in new if line.strip() == statement.encode()]
        new.remove(added[0])
    if not imports:
        num_below = len(old) - scope.end_line
        assert new[: scope.start_line - 1] == old[: scope.start_line - 1]
        assert new[len(new) - num_below :] == old[scope.end_line :]
    else:
        code = [line for line in old[: scope.start_line - 1] if line.strip()]
        assert [line for line in new if line.strip()][: len(code)] == code

    old_tree, new_tree = ast.parse(old_text), ast.parse(new_text)
    if scope.kind != "module":
        assert outline(new_tree, scope.qualname, imports) == outline(old_tree, scope.qualname)
    assert not same_but_for_layout(old_text, new_text)

    assert after.startswith(b"\xef\xbb\xbf") == before.startswith(b"\xef\xbb\xbf")
    assert (after[-1:] in b"\r\n") == (before[-1:] in b"\r\n")
    styles = {line[len(line.rstrip(b"\r\n")) :] for line in split_bytes(before)} - {b""}
    assert {line[len(line.rstrip(b"\r\n")) :] for line in split_bytes(after)} - {b""} <= (styles or {b"\n"})

    restored = apply_edits(patched, invert(source, report.edits), keep_newlines=True)
    assert restored.to_bytes() == before


def outline(tree: ast.AST, skip: str, imports: tuple[str, ...] = (), prefix: str = "") -> list[Any]:
    """The program without the body of one definition, as nested lists."""
    result: list[Any] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and ast.unparse(node) in imports:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = prefix + node.name
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            if name == skip:
                result.append([kind, name])
            else:
                result.append([kind, name, outline(node, skip, imports, name + ".")])
        elif any(isinstance(child, (ast.stmt, ast.excepthandler)) for child in ast.iter_child_nodes(node)):
            result.append([type(node).__name__, outline(node, skip, imports, prefix)])
        else:
            result.append(ast.dump(node))
    return result


def judge(source: Source, scope: Scope, edits: Any, data: st.DataObject) -> None:
    report = run_gates(source, scope, edits, expected_sha256=source.sha256)
    event(f"{scope.kind}: {report.refused.gate if report.refused else 'accepted'}")
    if not report.ok:
        refused = report.refused
        assert refused is not None and refused.reason.endswith(".") and report.patched is None
        return
    check_sound(source, scope, report)
    if len(report.edits) > 1:
        indexes = data.draw(st.lists(st.integers(0, len(report.edits) - 1), min_size=1, unique=True))
        part = run_gates(source, scope, select_hunks(report.edits, indexes))
        if part.ok:
            check_sound(source, scope, part)


@examples(120, 900)
@given(st.data())
def test_accepted_rewrites_stay_in_scope_and_roll_back(data: st.DataObject) -> None:
    source, scope = data.draw(cases())
    judge(source, scope, data.draw(rewrites(source, scope)), data)


@examples(100, 800)
@given(st.data())
def test_garbage_edits_are_refused_or_sound(data: st.DataObject) -> None:
    source, scope = data.draw(cases())
    judge(source, scope, data.draw(garbage_edits(source)), data)


@examples(60, 400)
@given(st.data())
def test_a_plain_change_of_a_function_is_accepted_wherever_its_lines_are_said_to_be(data: st.DataObject) -> None:
    source, scope = data.draw(cases().filter(lambda case: case[1].kind == "function"))
    body = source.lines[scope.def_line - 1 : scope.end_line]
    returns = [number for number, line in enumerate(body) if re.search(r"\breturn (?:a|b|1)$", line)]
    if not returns:
        return
    number = data.draw(st.sampled_from(returns))
    line = scope.def_line + number
    new = re.sub(r"return \w+$", "return 42  # 🙂", body[number])
    edit = Edit("pkg/file.py", "replace", line, line, body[number], new)
    own_lines = source.lines[scope.start_line - 1 : scope.end_line]
    stated = data.draw(st.integers(1, source.num_lines)) if own_lines.count(body[number]) == 1 else line
    if stated != line and source.lines[stated - 1] == body[number]:
        stated = line
    moved = Edit(edit.path, "replace", stated, stated, edit.pre, edit.new)
    report = run_gates(source, scope, [moved.to_json()], expected_sha256=source.sha256)
    assert report.ok, report.refused
    assert list(report.edits) == [edit]
    assert len(report.repairs) == (stated != line)
    check_sound(source, scope, report)


@examples(30, 200)
@given(st.data())
def test_declared_imports_are_the_only_change_outside(data: st.DataObject) -> None:
    source, scope = data.draw(cases().filter(lambda case: case[1].kind != "module"))
    imports = ("import zlib",)
    place = import_edit(source, imports)
    assert place is not None
    lines = list(source.lines[scope.start_line - 1 : scope.end_line])
    lines[-1] += "  # zlib"
    edits = [place, *diff_edits(source, lines, scope)]
    report = run_gates(source, scope, edits, imports=imports)
    if report.ok or "\r" not in source.eols:  # "\r" and an empty line's "\n" would become one line end
        assert report.ok, report.refused
        check_sound(source, scope, report, imports)
    undeclared = run_gates(source, scope, edits)
    assert undeclared.refused is not None and undeclared.refused.gate == "scope"


@examples(40, 200)
@given(st.data())
def test_a_file_that_does_not_parse_is_patched_in_one_function_only(data: st.DataObject) -> None:
    good, _ = data.draw(cases())
    broken = Source.from_text(good.text + good.newline + "def = broken (" + good.newline, good.path)
    scopes = [scope for scope in list_scopes(broken) if scope.kind == "function"]
    if not scopes:
        return
    scope = data.draw(st.sampled_from(scopes))
    report = run_gates(broken, scope, data.draw(rewrites(broken, scope)))
    event(report.refused.gate if report.refused else "accepted")
    if report.ok:
        assert report.patched is not None
        old, new = split_bytes(broken.to_bytes()), split_bytes(report.patched.to_bytes())
        below = old[scope.end_line :]
        assert new[: scope.start_line - 1] == old[: scope.start_line - 1] and new[len(new) - len(below) :] == below
        own = b"".join(new[scope.start_line - 1 : len(new) - len(below)])
        tree = ast.parse("if 1:\n" * bool(scope.indent) + plain(own))
        (node,) = tree.body[0].body if isinstance(tree.body[0], ast.If) and scope.indent else tree.body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == scope.name


@given(st.lists(st.integers(-3, 5), max_size=4))
def test_hunks_that_do_not_exist_cannot_be_selected(indexes: list[int]) -> None:
    edits = [Edit("f.py", "delete", line, line, "", "") for line in (1, 2, 3)]
    if indexes and all(0 <= index < 3 for index in indexes):
        assert [edit.start_line - 1 for edit in select_hunks(edits, indexes)] == sorted(set(indexes))
    else:
        with pytest.raises(UsageError, match="hunk"):
            select_hunks(edits, indexes)
