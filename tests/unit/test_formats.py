"""Edit formats: what a model's answer becomes, and what a grammar lets it write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.inference.protocol import Grammar
from engine.patching.context import build_context
from engine.patching.edits import EDITS_SCHEMA, apply_edits, edits_from_json, resolve_anchors
from engine.patching.formats import FORMATS, edits_grammar, strip_thinking
from engine.patching.gates import run_gates
from engine.patching.prompts import Task, fence_for
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import Source

pytestmark = pytest.mark.unit

FILE = '''\
import os


def first(x):
    return x


class Store:
    @property
    def value(self):
        return self._value

    @value.setter
    def value(self, new):
        self._value = new

    async def size(self, names):
        """Count 🙂.

        Indented twice.
        """
        total = 0

        def add(name):
            return total + len(name)
\x0c
        for name in names:
            total = add(name)
        query = """
    select *
        from t
        """
        return (
            total,
            query
        )


def last():
    return os.name
'''
SIZE = """\
async def size(self, names):
    total = 1
    return total
"""


def lines_of(text: str, name: str, line: int | None = None) -> str:
    source = Source.from_text(text, "a.py")
    scope = find_scope(source, name, line)
    return source.plain_text(scope.start_line, scope.end_line)


def dedented(text: str, level: str = "    ") -> str:
    """What models do to a method: every line loses its indentation, insides of strings too."""
    return "".join(line.removeprefix(level) for line in re.split(r"(?<=\n)", text))


def rewrite(text: str, name: str, answer: str, line: int | None = None) -> tuple[list[str], tuple[str, ...], str]:
    """The hunks as `-old` and `+new` lines, the imports, and the whole result."""
    source = Source.from_text(text, "a.py")
    answered = FORMATS["rewrite"].read(answer, source, find_scope(source, name, line))
    edits = list(answered.edits)
    hunks: list[str] = []
    for edit in edits:
        hunks += [f"-{old}" for old in source.lines[edit.start_line - 1 : edit.end_line]]
        hunks += [f"+{new}" for new in edit.new.splitlines()]
    return hunks, answered.imports, apply_edits(source, edits).text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("tabs", [False, True])
@pytest.mark.parametrize(
    "shape", ["as shown", "at column 0", "in its class", "in the whole file", "with a test after it", "CRLF"]
)
def test_an_answer_in_any_shape_gives_the_one_line_that_changed(shape: str, tabs: bool, newline: str) -> None:
    text = FILE.replace("    ", "\t") if tabs else FILE
    own = lines_of(text, "Store.size")
    changed = own.replace("total = 0", "total = 1")
    at_column_0 = dedented(changed, "\t" if tabs else "    ")
    answer = {
        "as shown": changed,
        "at column 0": at_column_0,
        "in its class": "class Store:\n" + changed,
        "in the whole file": text.replace("total = 0", "total = 1"),
        "with a test after it": at_column_0 + "\n\ndef test():\n    pass\n\nprint(1)\n",
        "CRLF": changed.replace("\n", "\r\n"),
    }[shape]
    hunks, imports, result = rewrite(text.replace("\n", newline), "Store.size", answer)
    indent = "\t\t" if tabs else "        "
    assert hunks == [f"-{indent}total = 0", f"+{indent}total = 1"]
    assert imports == ()
    assert result == text.replace("total = 0", "total = 1").replace("\n", newline)


@pytest.mark.parametrize("ends", [("\n\n", "\n\n\n"), ("\f\n", "\n \n"), ("", ""), ("\n", "no newline")])
@pytest.mark.parametrize("answer_ends", [("", ""), ("\n", "\n\n\n"), ("\f\n", "")])
def test_a_whole_file_keeps_its_blank_beginning_and_end(ends: tuple[str, str], answer_ends: tuple[str, str]) -> None:
    body = '"""Bits 🙂."""\n\n\ndef f():\n    return 0\n'
    after = ends[1] if ends[1] != "no newline" else ""
    text = ends[0] + body + after if ends[1] != "no newline" else ends[0] + body.rstrip("\n")
    answer = answer_ends[0] + body.replace("0", "1") + answer_ends[1]
    hunks, _, result = rewrite(text, "<module>", answer)
    assert hunks == ["-    return 0", "+    return 1"]
    assert result == text.replace("return 0", "return 1")


def test_a_file_of_tabs_answered_with_spaces_keeps_its_tabs() -> None:
    text = "class A:\n\tdef f(self, x):\n\t\tif x:\n\t\t\treturn [\n\t\t\t\tx,\n\t\t\t]\n\t\treturn 0\n"
    answer = "def f(self, x):\n    if x:\n        return [\n            x,\n        ]\n    return 1\n"
    assert rewrite(text, "f", answer)[0] == ["-\t\treturn 0", "+\t\treturn 1"]
    two_spaces = answer.replace("    ", "  ")
    assert rewrite(text, "f", two_spaces)[0] == ["-\t\treturn 0", "+\t\treturn 1"]


@pytest.mark.parametrize("unit", ["    ", "  "])
def test_a_file_of_spaces_answered_with_tabs_keeps_its_spaces(unit: str) -> None:
    text = "class A:\n    def f(self, x):\n        if x:\n            return 1\n        return 0\n".replace(
        "    ", unit
    )
    answer = "\tdef f(self, x):\n\t\tif x:\n\t\t\treturn 1\n\t\treturn 2\n"
    assert rewrite(text, "f", answer)[0] == [f"-{unit * 2}return 0", f"+{unit * 2}return 2"]


def test_a_one_line_function_of_a_file_of_tabs_grows_with_tabs() -> None:
    text = "def f(): return 1\n\ndef g():\n\treturn 2\n"
    assert rewrite(text, "f", "def f():\n    return 3\n")[2] == "def f():\n\treturn 3\n\ndef g():\n\treturn 2\n"


def test_a_changed_docstring_takes_the_indentation_and_a_new_other_string_stays_as_written() -> None:
    text = 'class A:\n    def f(self):\n        """One."""\n        return ""\n'
    answer = 'def f(self):\n    """One.\n\n    Two 🙂.\n    """\n    return """\n  as\n    it is\n"""\n'
    assert rewrite(text, "f", answer)[2] == (
        'class A:\n    def f(self):\n        """One.\n\n        Two 🙂.\n        """\n'
        '        return """\n  as\n    it is\n"""\n'
    )


def test_lines_left_of_the_function_and_aligned_ones_stay_where_they_are() -> None:
    text = "class A:\n    def f(self):\n# a comment at the edge\n        return g(1,\n                 2)\n"
    assert rewrite(text, "f", lines_of(text, "f").replace("2)", "3)"))[0] == [
        "-                 2)",
        "+                 3)",
    ]
    tabs = "class A:\n\tdef f(self):\n\t\treturn g(1,\n\t\t         2)\n"
    assert rewrite(tabs, "f", lines_of(tabs, "f").replace("2)", "3)"))[0] == ["-\t\t         2)", "+\t\t         3)"]


def test_trailing_whitespace_alone_gives_no_hunk() -> None:
    noisy = "".join(f"{line} \t\n" if "*" not in line and line.strip() else f"{line}\n" for line in FILE.splitlines())
    assert rewrite(FILE, "last", lines_of(noisy, "last"))[0] == []
    assert rewrite(FILE, "first", "\n\n" + lines_of(noisy, "first") + "\n \n")[0] == []


@pytest.mark.parametrize(("line", "old", "new"), [(11, "return self._value", "return 5"), (15, "= new", "= int(new)")])
def test_of_two_definitions_of_one_name_the_meant_one_is_taken(line: int, old: str, new: str) -> None:
    both = "".join(FILE.splitlines(keepends=True)[8:15])
    hunks, _, _ = rewrite(FILE, "value", dedented(both.replace(old, new)), line)
    assert [hunk for hunk in hunks if hunk.startswith("+")] == [f"+        {'self._value ' if '=' in new else ''}{new}"]


def test_of_definitions_that_look_alike_the_one_at_the_same_place_is_taken() -> None:
    text = "if a:\n    def f():\n        return 1\nelse:\n    def f():\n        return 2\n"
    assert rewrite(text, "f", text.replace("return 2", "return 3"), 5)[0] == ["-        return 2", "+        return 3"]
    assert rewrite(text, "f", "def f():\n    return 3\n", 5)[0] == ["-        return 2", "+        return 3"]
    assert (
        rewrite(text, "f", "def f():\n    return 3\ndef f():\n    return 4\n\nf()\nf()", 2)[0][1] == "+        return 3"
    )


def test_the_implementation_is_told_from_its_overloads() -> None:
    text = (
        "from typing import overload\n\n@overload\ndef f(x: int) -> int: ...\n@overload\ndef f(x: str) -> str: ...\n"
        "def f(x):\n    return x\n"
    )
    whole = text.replace("return x", "return x + x").replace("x: str", "x: bytes")
    assert rewrite(text, "f", whole)[0] == ["-    return x", "+    return x + x"]
    assert rewrite(text, "f", whole, 6)[0] == ["-def f(x: str) -> str: ...", "+def f(x: bytes) -> str: ..."]


def test_a_method_is_not_mistaken_for_that_of_another_class() -> None:
    text = "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        return 2\n"
    assert rewrite(text, "B.f", text.replace("return 2", "return 3"))[0] == ["-        return 2", "+        return 3"]


def test_a_nested_function_is_found_inside_the_outer_one() -> None:
    answer = dedented(lines_of(FILE, "Store.size").replace("len(name)", "len(name or '')"))
    assert rewrite(FILE, "add", answer)[0] == [
        "-            return total + len(name)",
        "+            return total + len(name or '')",
    ]


@pytest.mark.parametrize(
    ("head", "body", "imports"),
    [
        ("import math\n", "return math.floor(1)", ("import math",)),
        ("import math, re\n", "return re.escape('math')", ("import re",)),
        ("import os.path\n", "return os.path.sep", ()),
        ("from . import a as b\nfrom ..x import y\n", "return b, y", ("from . import a as b", "from ..x import y")),
        ("from __future__ import annotations\n", "return annotations", ()),
        ("from typing import Any\n", "x: Any = 1", ("from typing import Any",)),
        ("from store import first, Store\n", "return first(Store())", ()),
        ("import json\n", "return 'json'  # json", ()),
        ("import json\n", "json = 1; return json", ()),
        ("from math import pow\n", "return pow(2, 2)", ("from math import pow",)),
        ("from m import *\n", "return name", ()),
    ],
)
def test_an_import_above_the_function_is_declared_if_it_is_used_and_missing(
    head: str, body: str, imports: tuple[str, ...]
) -> None:
    hunks, declared, _ = rewrite(FILE, "last", f'{head}\n\ndef last():\n    """math re."""\n    {body}\n')
    assert declared == imports
    assert not any("import" in hunk for hunk in hunks)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n\n",
        "def last():\n    return 5 +\n",
        "I cannot do that.",
        "<think>def last():\n    return 5\n",
        "def last():\n    return '\0'\n",
        "# coding: latin-1\nreturn 5 5",
        "def last():\n    return " + "(" * 500 + ")" * 500 + "\n",
        "  def last():\n return 1\n",
        "class last:\n    pass\n",
        "def other():\n    pass\n",
        "\ufeffdef last():\n    return '\ufeff'\n",
    ],
)
def test_an_answer_that_is_no_such_function_is_refused_by_a_gate(answer: str) -> None:
    source = Source.from_text(FILE, "a.py")
    scope = find_scope(source, "last")
    answered = FORMATS["rewrite"].read(answer, source, scope)
    report = run_gates(source, scope, answered.edits, imports=answered.imports)
    assert report.refused is not None
    assert report.patched is None


def test_an_encoding_cookie_in_an_answer_does_no_harm() -> None:
    assert rewrite(FILE, "last", "# coding: latin-1\ndef last():\n    return 5\n")[0] == [
        "-    return os.name",
        "+    return 5",
    ]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a\nb</think>\nx = 1", "\nx = 1"),
        ("  <think>a\n\nb", ""),
        ("x = 1\n<think>so</think>y = 2", "x = 1\ny = 2"),
        ("x = '<think>kept</think>'", "x = '<think>kept</think>'"),
        ("<think></think><think>x", "<think>x"),
    ],
)
def test_thinking_is_dropped_closed_or_not_and_code_about_it_stays(text: str, left: str) -> None:
    assert strip_thinking(text) == left


def test_the_fence_is_longer_than_any_run_of_backticks_in_the_file() -> None:
    text = 'def f():\n    """Show:\n\n    ````python\n    f()\n    ````\n    """\n    return 1\n'
    source = Source.from_text(text, "a.py")
    scope = find_scope(source, "f")
    task = Task(build_context(source, scope), "Return 2.")
    assert FORMATS["rewrite"].prefill(task) == "`````python\n"
    assert FORMATS["rewrite"].stop(task) == ("\n`````",)
    assert rewrite(text, "f", text.replace("return 1", "return 2"))[0] == ["-    return 1", "+    return 2"]
    assert (fence_for("a"), fence_for("``"), fence_for("x```y", "`")) == ("```", "```", "````")


def test_the_whole_file_as_scope_is_compared_line_by_line() -> None:
    assert rewrite(FILE, "<module>", FILE.replace("return x\n", "return x + 1\n"))[0] == [
        "-    return x",
        "+    return x + 1",
    ]


# JSON


def edit(action: str, start: int, end: int, pre: str, new: str) -> dict[str, Any]:
    return {"path": "a.py", "action": action, "start_line": start, "end_line": end, "pre": pre, "new": new}


def test_new_lines_take_the_files_newline() -> None:
    source = Source.from_text("def f():\r\n    return 1\r\n", "a.py")
    text = json.dumps([edit("replace", 2, 2, "    return 1", "    x = 1\n    return x\n")])
    answered = FORMATS["json_edits"].read(text, source, find_scope(source, "f"))
    assert run_gates(source, find_scope(source, "f"), answered.edits).patched == Source.from_text(
        "def f():\r\n    x = 1\r\n    return x\r\n", "a.py"
    )


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '[{"path": 1}]', "[" * 100_000, '"a"', "[] []", '[{"new": 5}]']
)
def test_text_that_is_no_list_of_edits_is_refused_and_nothing_is_raised(text: str) -> None:
    source = Source.from_text("def f():\n    return 1\n", "a.py")
    scope = find_scope(source, "f")
    report = run_gates(source, scope, FORMATS["json_edits"].read(text, source, scope).edits)
    assert report.refused is not None
    assert report.refused.gate == "schema"


class Writer:
    """Follows grammars with the real tokenizer."""

    def __init__(self, folder: Path) -> None:
        from engine.inference.grammar import GrammarCompiler
        from engine.inference.tokenizer import HFChatTokenizer

        vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        self.tokenizer = HFChatTokenizer(folder)
        self.eos = min(self.tokenizer.eos_token_ids)
        self.closing = [self.tokenizer.encode(text)[0] for text in ('"}]', '"}', "}]", '"', "}", "]")]
        self.compiler = GrammarCompiler(folder, vocab_size, self.eos)

    def matcher(self, source: Source, scope: Scope):
        return self.compiler.compile(Grammar("lark", edits_grammar(source, scope)))

    def takes(self, source: Source, scope: Scope, edits: list[dict[str, Any]] | str) -> bool:
        """Whether the grammar lets a whole text be written."""
        text = edits if isinstance(edits, str) else json.dumps(edits, ensure_ascii=False)
        matcher = self.matcher(source, scope)
        try:
            for token_id in self.tokenizer.encode(text):
                matcher.advance(token_id)
        except AssertionError:
            return False
        return matcher.is_complete

    def walk(self, source: Source, scope: Scope, choices: list[int]) -> str:
        """Write a random allowed text to its end; in between go back and see that the same tokens are allowed again."""
        matcher = self.matcher(source, scope)
        token_ids: list[int] = []
        steps: list[tuple[int, Any]] = []  # how much was written before each choice, and what was allowed then
        while not matcher.is_complete:
            for token_id in matcher.forced_token_ids():
                token_ids.append(token_id)
                matcher.advance(token_id)
            if matcher.is_complete:
                break
            allowed = matcher.allowed()
            steps.append((len(token_ids), allowed))
            choice = choices[len(steps) % len(choices)]
            num_before, allowed_before = steps[max(0, len(steps) - 1 - choice % 3)]
            if choice % 2:
                matcher.rollback(len(token_ids) - num_before)
                assert matcher.allowed().equal(allowed_before)
                for token_id in token_ids[num_before:]:
                    matcher.advance(token_id)
                assert matcher.allowed().equal(allowed)
            closing = [token_id for token_id in self.closing if allowed[token_id]]
            ids = allowed.nonzero().flatten()
            token_ids.append(closing[0] if closing and len(steps) > 12 else int(ids[choice % len(ids)]))
            matcher.advance(token_ids[-1])
        return self.tokenizer.decode(token_ids)


@pytest.fixture(scope="module")
def writer(model_folder_05b: Path) -> Writer:
    return Writer(model_folder_05b)


HARD = 'def f(x):\n\ty = "\\\\ / \' \\" é 🙂 \u2028 \x7f\x85"\n\x0c\n\treturn x  # [a]&~-{}|.*\n'
SCOPES = {
    "plain": ("def f(x):\n    return x\n", "f"),
    "CRLF": ("def f(x):\r\n    y = 1\r\n\r\n    return y\r\n", "f"),
    "hard": (HARD, "f"),
    "one line": ("x = 1\ndef f(): return 1", "f"),
    "method": (FILE, "Store.size"),
    "empty file": ("", "<module>"),
    "blank lines": ("\n\n", "<module>"),
}


@pytest.mark.parametrize("name", SCOPES)
@settings(max_examples=4)
@given(choices=st.lists(st.integers(0, 2**31), min_size=8, max_size=20))
def test_whatever_the_grammar_allows_is_a_valid_list_whose_anchors_hold(
    writer: Writer, name: str, choices: list[int]
) -> None:
    text, qualname = SCOPES[name]
    source = Source.from_text(text, "a folder/a.py")
    scope = find_scope(source, qualname)
    written = writer.walk(source, scope, choices)
    edits = edits_from_json(json.loads(written))
    assert 1 <= len(edits) <= 8
    for item in edits:
        placed, repairs = resolve_anchors(source, scope, [item], path="a.py")
        assert [(one.start_line, one.end_line) for one in placed] == [(item.start_line, item.end_line)]
        assert repairs == []
        assert item.action == "insert" or item.pre == source.text_between(item.start_line, item.end_line)
    assert set(EDITS_SCHEMA["items"]["required"]) == set(json.loads(written)[0])


def test_every_edit_that_makes_sense_can_be_written(writer: Writer) -> None:
    source = Source.from_text(HARD, "a.py")
    scope = find_scope(source, "f")
    line = source.lines[1]
    assert writer.takes(source, scope, [edit("replace", 2, 2, line, line + '  # é 🙂 \\ / "quoted"\n\tz = 1')])
    assert writer.takes(source, scope, [edit("replace", 1, 4, source.text_between(1, 4), "def f(x): return 1")])
    assert writer.takes(source, scope, [edit("delete", 3, 3, "\f", ""), edit("insert", 5, 4, "", "\tpass")])
    crlf = Source.from_text("def f(x):\r\n    y = 1\r\n", "a.py")
    both = [edit("replace", 1, 2, "def f(x):\r\n    y = 1", "def f():\n    y = 1")]
    assert writer.takes(crlf, find_scope(crlf, "f"), both)
    empty = Source.from_text("", "a.py")
    assert writer.takes(empty, find_scope(empty), [edit("insert", 1, 0, "", "x = 1\n")])
    assert not writer.takes(empty, find_scope(empty), '[{"path": "a.py", "action": "replace", "start_line": }]')


@pytest.mark.parametrize(
    "new",
    [
        '"    return x"',
        '"    return x\\n"',
        '"    ret\\u0075rn x"',
        '"    return x\\r\\n"',
        '"\\u0020   return x"',
        '""',
    ],
)
def test_a_replacement_that_changes_nothing_cannot_be_written(writer: Writer, new: str) -> None:
    for newline in ("\n", "\r\n"):
        source = Source.from_text(f"def f(x):{newline}    return x{newline}", "a.py")
        scope = find_scope(source, "f")
        head = '[{"path": "a.py", "action": "replace", "start_line": 2, "end_line": 2, "pre": "    return x", "new": '
        assert not writer.takes(source, scope, f"{head}{new}" + "}]")
        assert writer.takes(source, scope, head + '"    return x2"}]')


def test_a_replacement_of_crlf_lines_by_the_same_lines_cannot_be_written(writer: Writer) -> None:
    source = Source.from_text("def f(x):\r\n    return x\r\n", "a.py")
    same = [edit("replace", 1, 2, "def f(x):\r\n    return x", "def f(x):\n    return x")]
    assert not writer.takes(source, find_scope(source, "f"), same)


def test_a_missing_anchor_and_a_line_outside_cannot_be_written(writer: Writer) -> None:
    source = Source.from_text("a = 1\ndef f(x):\n    return x\nb = 2\n", "a.py")
    scope = find_scope(source, "f")
    assert writer.takes(source, scope, [edit("delete", 3, 3, "    return x", "")])
    assert not writer.takes(source, scope, [edit("delete", 3, 3, "    return y", "")])
    assert not writer.takes(source, scope, [edit("delete", 1, 1, "a = 1", "")])
    assert not writer.takes(source, scope, [edit("insert", 5, 4, "", "pass")])
    assert not writer.takes(source, scope, [edit("delete", 2, 3, "def f(x):", "")])
    assert not writer.takes(source, scope, [])


def test_a_scope_of_600_lines_has_a_grammar(writer: Writer) -> None:
    body = "".join(f'    x{number} = "{number} 🙂"\n' for number in range(600))
    source = Source.from_text(f"def f():\n{body}", "a.py")
    scope = find_scope(source, "f")
    assert writer.takes(source, scope, [edit("replace", 601, 601, '    x599 = "599 🙂"', "    x599 = None")])
    assert writer.takes(source, scope, [edit("delete", 300, 301, source.text_between(300, 301), "")])
