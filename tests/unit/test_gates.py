"""Each gate refuses what it is for, in words that help, and lets good patches through."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import pytest

from engine.patching.edits import Edit, apply_edits, diff_edits, invert, select_hunks
from engine.patching.gates import GateReport, import_edit, missing_stdlib_imports, run_gates, suggest_imports
from engine.patching.scopes import MODULE_NAME, find_scope
from engine.patching.source import Source

pytestmark = pytest.mark.unit

ALL_GATES = ["fresh", "schema", "anchors", "ast", "libcst", "scope", "names", "change", "layout"]

TEXT = '''\
#!/usr/bin/env python
"""Module 🙂."""

import os
from typing import overload

LIMIT = 3


@decorate
def sort(items, key=None):
    """Sort."""
    found = []
    for item in items:
        found.append(item)

    def inner(x):
        return x + LIMIT
    return inner(found)


class Store(object):
    size = 1

    def __init__(self, root):
        self.root = root
        self.count = 0

    async def read(self, name):
        return os.path.join(self.root, name), self.count

    def helper(self):
        return self.size


def last(): return sort([])
'''
STYLES = {
    "lf": TEXT,
    "crlf": TEXT.replace("\n", "\r\n"),
    "cr and no final newline": TEXT.replace("\n", "\r").rstrip("\r"),
    "tabs and byte-order mark": "\ufeff" + TEXT.replace("    ", "\t"),
    "form feeds": TEXT.replace("\n\n\n", "\n\x0c\n"),
}


def gate(text: str, name: str | None, old: str, new: str, *, imports: tuple[str, ...] = ()) -> GateReport:
    """Judge the patch that replaces `old` by `new` in a file; both may span lines."""
    source = Source.from_text(text, "pkg/store.py")
    plain = source.plain_text()
    assert plain.count(old) == 1, old
    after = plain.replace(old, new)
    lines = (after[:-1] if after.endswith("\n") else after).split("\n") if after else []
    edits = diff_edits(source, lines, (1, source.num_lines))
    place = import_edit(source, imports) if imports else None
    edits = [place, *edits] if place else edits
    return run_gates(source, find_scope(source, name), edits, imports=imports, expected_sha256=source.sha256)


def refusal(report: GateReport) -> tuple[str, str]:
    assert report.refused is not None and report.patched is None
    return report.refused.gate, report.refused.reason


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES.keys())
def test_a_good_patch_passes_every_gate_and_keeps_the_style(text: str) -> None:
    tab = "\t" if "\t" in text else "    "
    report = gate(text, "sort", f"{tab}found = []", f"{tab}found = list()\n{tab}extra = '🙂'")
    assert report.ok and [verdict.gate for verdict in report.verdicts] == ALL_GATES
    assert report.patched is not None
    newline = Source.from_text(text, "x").newline
    assert report.patched.to_bytes() == text.replace("[]", f"list(){newline}{tab}extra = '🙂'", 1).encode()
    original = Source.from_text(text, "pkg/store.py")
    assert apply_edits(report.patched, invert(original, report.edits), keep_newlines=True) == original


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sort", '    """Sort."""', '    """Sort the items."""'),
        ("sort", "@decorate\n", "@decorate\n@decorate(1)\n"),
        ("sort", "        found.append(item)\n", "        found.append(item)  # why\n"),
        ("sort.inner", "return x + LIMIT", "return x - LIMIT"),
        ("Store.read", "    async def read(self, name):", "    def read(self, name, *, mode='r'):"),
        ("Store", "class Store(object):", "@decorate\nclass Store:"),
        ("Store", "    size = 1\n", "    size = 1\n\n    def more(self):\n        return self.size\n"),
        ("last", "def last(): return sort([])", "def last():\n    return sort([1])"),
        (MODULE_NAME, "LIMIT = 3\n", "LIMIT = 4\n\n\ndef new():\n    return LIMIT\n"),
        (MODULE_NAME, "\n\ndef last(): return sort([])", ""),
        ("sort", "    return inner(found)\n", "    return inner(found)\n    # done\n"),
        ("sort", "    for item in items:\n", "    for item in items:\n        LIMIT: int = 3\n        del LIMIT\n"),
    ],
)
def test_changes_of_many_kinds_are_accepted(name: str, old: str, new: str) -> None:
    report = gate(TEXT, name, old, new)
    assert report.ok, report.refused


# fresh, schema, anchors


def test_a_patch_for_another_text_is_stale() -> None:
    source = Source.from_text(TEXT, "a.py")
    report = run_gates(source, find_scope(source, "sort"), [], expected_sha256="0" * 64)
    assert refusal(report) == ("fresh", "a.py has changed since this patch was made for it; make the patch again.")
    assert len(report.verdicts) == 1


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ('[{"path": "a.py"', "The edit list is not valid JSON"),
        ("[" * 100_000, "The edit list is not valid JSON"),
        ('{"edits": []}', "The edit list is not valid: the edits are a list, not an object."),
        ([{"path": "a.py"}], "The edit list is not valid: edit 1: the key `action` is missing."),
        (None, "The edit list is not valid: the edits are a list, not null."),
    ],
)
def test_what_is_no_edit_list_fails_the_schema(edits: Any, reason: str) -> None:
    source = Source.from_text(TEXT, "a.py")
    gate_name, said = refusal(run_gates(source, find_scope(source, "sort"), edits))
    assert gate_name == "schema" and said.startswith(reason)


def test_json_text_is_accepted_and_a_misplaced_edit_is_moved() -> None:
    source = Source.from_text("def f():\n    a = 1\n    return a\n", "a.py")
    edit = Edit("elsewhere/a.py", "replace", 1, 1, "    a = 1", "    a = 2")
    report = run_gates(source, find_scope(source, "f"), json.dumps([edit.to_json()]))
    assert report.ok and report.edits == (Edit("a.py", "replace", 2, 2, "    a = 1", "    a = 2"),)
    assert len(report.repairs) == 2
    assert json.loads(json.dumps(report.to_json()))["gates"][0] == {"gate": "fresh", "ok": True, "reason": ""}


def test_an_edit_that_is_found_nowhere_fails_the_anchors() -> None:
    source = Source.from_text("def f():\n    return 1\n", "a.py")
    edit = Edit("a.py", "replace", 2, 2, "    return 2", "    return 3")
    gate_name, reason = refusal(run_gates(source, find_scope(source, "f"), [edit]))
    assert gate_name == "anchors" and reason.startswith("The `pre` of edit 1 is not at line 2 nor anywhere else")


# ast, libcst


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (
            "    return inner(found",
            "The result does not parse: line 18: '(' was never closed, at `return inner(found`.",
        ),
        ("  return inner(found)", "does not parse: line 18: unindent does not match any outer indentation level"),
        ("    return '''x", "does not parse: line 18: unterminated triple-quoted string literal"),
        ("    nonlocal found", "parses but does not compile: line 18: nonlocal declaration not allowed"),
        ("    break", "parses but does not compile: line 18: 'break' outside loop, at `break`."),
        ("    await found", "does not compile: line 18: 'await' outside async function"),
        ("    return '\ud800'", "surrogates not allowed"),
        ("    return '\0'", "does not parse"),
    ],
)
def test_a_result_that_python_cannot_read_is_refused_with_the_line(new: str, reason: str) -> None:
    if "nonlocal" in new:
        text = TEXT.replace("@decorate\n", "")
        text = text.replace("    return inner(found)", "    nonlocal_ = found\n    return inner(found)")
        report = gate(text, "sort", "    nonlocal_ = found", "    nonlocal zzz")
        assert "does not compile: line" in refusal(report)[1] and "nonlocal" in refusal(report)[1]
        return
    gate_name, said = refusal(gate(TEXT, "sort", "    return inner(found)", new))
    assert gate_name == "ast" and reason in said.replace("line 19", "line 18")


@pytest.mark.parametrize("expression", ["-" * 700 + "1", "a" + ".b" * 700, "+".join("1" * 700)])
def test_deep_nesting_is_refused_and_not_a_crash(expression: str) -> None:
    gate_name, reason = refusal(gate(TEXT, "sort", "    return inner(found)", f"    return inner({expression})"))
    assert gate_name in ("ast", "libcst") and "nested" in reason


@pytest.mark.parametrize("num_terms", [700, 3000])
def test_what_is_nested_deeply_elsewhere_blocks_no_patch(num_terms: int) -> None:
    text = TEXT + f"\nz = {'+'.join('1' * num_terms)}\n"
    assert gate(text, "sort", "    return inner(found)", "    return inner(found[:])").ok


def test_the_most_brackets_that_python_reads_do_not_crash_a_thread_with_a_small_stack() -> None:
    reports: list[GateReport] = []
    brackets = "(" * 190 + "1" + ")" * 190

    def judge() -> None:
        reports.append(gate(TEXT, "sort", "    return inner(found)", f"    return inner({brackets})"))

    previous = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=judge)
        thread.start()
    finally:
        threading.stack_size(previous)
    thread.join()
    assert reports and reports[0].ok


# scope


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sort", "LIMIT = 3", "LIMIT = 4"),
        ("sort", "class Store(object):\n", "class Store(object):\n    # noted\n"),
        ("sort", "    size = 1\n", "    size = 1  \n    width = 1\n"),
        ("sort", "    return inner(found)\n", "    return inner(found)\nprint('smuggled')\n"),
        ("sort", "    return inner(found)\n", "    return inner(found)\n\ndef sort2():\n    pass\n"),
        ("sort", "@decorate\n", "import sys\n@decorate\n"),
        ("sort", "def sort(items, key=None):", "def sort2(items, key=None):"),
        ("last", "def last(): return sort([])", "class last: value = sort([])"),
        ("sort.inner", "    def inner(x):\n        return x + LIMIT", "    inner = abs"),
        (
            "sort.inner",
            "    def inner(x):\n        return x + LIMIT",
            "    if 1:\n        def inner(x):\n            return x",
        ),
        ("Store", "class Store(object):", "class Shop(object):"),
        ("Store.helper", "        return self.size\n", "        return self.size\n    width = 1\n"),
        ("Store.helper", "        return self.size\n", "        return self.size\n\n    def more(self): pass\n"),
        ("Store.helper", "    def helper(self):\n        return self.size\n", ""),
        ("sort", "    return inner(found)\n", '    return inner(found)\n"""\n'),
        (MODULE_NAME, TEXT, ""),
        (MODULE_NAME, TEXT, "# nothing left\n"),
    ],
)
def test_what_leaves_the_scope_is_refused(name: str, old: str, new: str) -> None:
    gate_name, reason = refusal(gate(TEXT, name, old, new))
    assert gate_name in ("scope", "ast") and reason.endswith(".")
    assert gate_name == "scope" or new.endswith('"""\n')


def test_the_reason_names_the_edit_and_the_scope() -> None:
    assert refusal(gate(TEXT, "sort", "LIMIT = 3", "LIMIT = 4")) == (
        "scope",
        "Edit 1 changes line 7, outside the function `sort` (lines 10-19); change only that, and declare imports that "
        "it needs.",
    )


@pytest.mark.parametrize(
    "smuggled",
    [
        "x = 1",
        "import zlib; x = 1",
        "import zlib  # comment",
        "# comment\nimport zlib",
        "import shutil",
        "from zlib import *",
    ],
)
def test_only_declared_imports_may_be_added_outside(smuggled: str) -> None:
    source = Source.from_text(TEXT, "a.py")
    edits = [
        Edit("a.py", "insert", 6, 5, "", smuggled),
        Edit("a.py", "replace", 13, 13, "    found = []", "    found = zlib"),
    ]
    gate_name, _ = refusal(run_gates(source, find_scope(source, "sort"), edits, imports=["import zlib"]))
    assert gate_name == "scope"


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES.keys())
def test_a_declared_import_is_added_below_the_others(text: str) -> None:
    tab = "\t" if "\t" in text else "    "
    report = gate(text, "sort", f"{tab}found = []", f"{tab}found = zlib.adler32(b'')", imports=("import zlib",))
    assert report.ok and report.patched is not None, report.refused
    assert report.patched.lines[3:6] == ("import os", "from typing import overload", "import zlib")
    undeclared = run_gates(
        Source.from_text(text, "pkg/store.py"), find_scope(report.patched, "last"), list(report.edits)
    )
    assert undeclared.refused is not None


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from x import sort", "already defines `sort`"),
        ("import x as LIMIT", "already defines `LIMIT`"),
        ("from x import object", "would replace the builtin"),
        ("from x import *", "Star imports"),
        ("from __future__ import annotations", "`from __future__` imports change the whole file"),
    ],
)
def test_an_import_that_changes_the_rest_of_the_file_is_refused(statement: str, reason: str) -> None:
    report = gate(TEXT, "sort", "    found = []", "    found = list()", imports=(statement,))
    gate_name, said = refusal(report)
    assert gate_name in ("scope", "ast") and (reason in said or "__future__" in said)


def test_an_import_above_the_docstring_is_refused() -> None:
    source = Source.from_text('"""Doc."""\ndef f():\n    return 1\n', "a.py")
    edits = [
        Edit("a.py", "insert", 1, 0, "", "import os"),
        Edit("a.py", "replace", 3, 3, "    return 1", "    return os"),
    ]
    gate_name, reason = refusal(run_gates(source, find_scope(source, "f"), edits, imports=["import os"]))
    assert (gate_name, reason[:32]) == ("scope", "The module's docstring would no ")


def test_a_scope_of_another_text_is_refused() -> None:
    other = find_scope(Source.from_text("\n\ndef f():\n    return 1\n", "a.py"), "f")
    source = Source.from_text("def f():\n    return 1\n\nx = 1\n", "a.py")
    edit = Edit("a.py", "replace", 4, 4, "x = 1", "x = 2")
    assert refusal(run_gates(source, other, [edit]))[0] == "scope"
    short = Source.from_text("x = 1\n", "a.py")
    assert refusal(run_gates(short, other, [edit]))[0] == "anchors"


# names


@pytest.mark.parametrize(
    ("name", "old", "new", "missing"),
    [
        ("sort", "    found = []\n", "", None),
        ("sort", "        found.append(item)", "        found.append(thing)", "`thing`"),
        ("sort", "        found.append(item)", "        found.append(math.sqrt(item))", "declare `import math`"),
        ("sort", "    def inner(x):\n        return x + LIMIT\n", "", "`inner`"),
        ("sort", "def sort(items, key=None):", "def sort(things, key=None):", "`items`"),
        ("sort", "def sort(items, key=None):", "def sort(items: List, key=None):", "declare `from typing import List`"),
        (MODULE_NAME, "LIMIT = 3\n", "", "`LIMIT`"),
        (MODULE_NAME, "import os\n", "", "`os`"),
        (MODULE_NAME, "def sort(items", "def sort_all(items", "`sort`"),
        ("Store", "    size = 1\n", "", "`Store.size`"),
        ("Store.__init__", "        self.count = 0\n", "", "`Store.count`"),
        ("Store.read", "self.count\n", "count\n", "`count`"),
    ],
)
def test_a_name_that_loses_its_definition_is_refused(name: str, old: str, new: str, missing: str | None) -> None:
    report = gate(TEXT, name, old, new)
    gate_name, reason = refusal(report)
    assert gate_name == "names" and (missing or "`found`") in reason


@pytest.mark.parametrize(
    ("text", "name", "old", "new"),
    [
        ("from x import *\ndef f():\n    return 1\n", "f", "1", "anything"),
        ("def f():\n    return missing\ndef g():\n    return 1\n", "g", "1", "missing"),
        ("def f():\n    global late\n    late = 2\ndef g():\n    return 1\n", "g", "1", "late"),
        ("class A:\n    def f(self):\n        return 1\n", "f", "1", "__class__, __name__, super().f"),
        ("def f():\n    return 1\n", "f", "1", "[y for x in (1, 2) if (y := x)]"),
        ("def f(v):\n    return 1\n", "f", "return 1", "match v:\n        case [a, *b]:\n            return a, b"),
        ("class A(Unknown):\n    x = 1\n    def f(self):\n        return self.x\n", "A", "    x = 1\n", ""),
        (
            "class A:\n    def f(self):\n        self.x = 1\n        return self.x\n",
            "A",
            "self.x = 1",
            "setattr(self, 'x', 1)",
        ),
        (
            "class B:\n    x = 1\nclass A(B):\n    x = 2\n    def f(self):\n        return self.x\n",
            "A",
            "    x = 2\n",
            "",
        ),
        ("class A: x = 1\nclass A:\n    y = 1\n    def f(self): return self.y\n", MODULE_NAME, "x = 1", "z = 1"),
    ],
)
def test_names_that_may_be_defined_are_not_refused(text: str, name: str, old: str, new: str) -> None:
    assert gate(text, name, old, new).ok


def test_a_name_of_dunder_all_must_stay() -> None:
    text = "__all__ = ['f', 'g']\ndef f(): pass\ndef g(): pass\n"
    assert "`g`" in refusal(gate(text, MODULE_NAME, "def g(): pass\n", ""))[1]


def test_annotations_count_even_if_they_are_not_evaluated() -> None:
    text = "from __future__ import annotations\ndef f(a):\n    return a\n"
    assert "`Optional`" in refusal(gate(text, "f", "def f(a):", "def f(a: Optional[int]):"))[1]
    assert gate(text, "f", "def f(a):", "def f(a: int | None) -> f:").ok


# change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    found = []\n", "    found = []   \n\n"),
        ("    found = []\n", "    found  =  [ ]\n"),
        ("    found = []\n", "    found = [\n    ]\n"),
        ("    found = []\n", "    found = \\\n        []\n"),
        ("    return inner(found)\n", "    return inner(found)   \n"),
    ],
)
def test_a_change_of_whitespace_alone_is_none(old: str, new: str) -> None:
    gate_name, reason = refusal(gate(TEXT, "sort", old, new))
    assert gate_name == "change"
    assert (
        reason == "The patch changes nothing in the function `sort` but whitespace; make the change that was asked for."
    )


def test_an_empty_list_changes_nothing() -> None:
    source = Source.from_text(TEXT, "a.py")
    assert refusal(run_gates(source, find_scope(source, "sort"), []))[0] == "change"


def test_moving_a_statement_out_of_a_loop_is_a_change() -> None:
    text = "def f(x):\n    for y in x:\n        x = y\n        return x\n"
    assert gate(text, "f", "        return x", "    return x").ok


# layout


@pytest.mark.parametrize(
    ("text", "old", "new", "reason"),
    [
        (TEXT, "    found = []\n", "    found = []\n    if 1:\n    \tfound = 1\n", "indented with spaces"),
        (
            STYLES["tabs and byte-order mark"],
            "\tfound = []\n",
            "\tfound = []\n\tif 1:\n\t\tfound = (\n    1)\n",
            "with tabs",
        ),
        (TEXT, "    found = []\n", "    found = '\x07'\n", "U+0007"),
        (TEXT, "    found = []\n", "    found = '\u202e'\n", "U+202E"),
        (TEXT, "    found = []\n", "    found = '\u2028'\n", "U+2028"),
    ],
)
def test_foreign_characters_and_indentation_are_refused(text: str, old: str, new: str, reason: str) -> None:
    gate_name, said = refusal(gate(text, "sort", old, new))
    assert gate_name == "layout" and reason in said


def test_characters_that_the_file_already_has_are_no_reason_to_refuse() -> None:
    text = "def f():\n    return '\u2028 \x1b'\n"
    assert gate(text, "f", "return '\u2028", "return '🙂 \u2028").ok
    assert gate(TEXT, "sort", "    found = []\n", "    found = '''\n\ttab in a string'''\n").ok


def test_a_declaration_of_another_encoding_is_refused() -> None:
    report = gate("x = 1\n", MODULE_NAME, "x = 1\n", "# coding: latin-1\nx = 2\n")
    assert refusal(report)[0] == "layout"


def test_newlines_that_would_join_are_refused() -> None:
    source = Source.from_text("def f():\r    a = 1\n\n    return 2\n", "a.py")
    report = run_gates(source, find_scope(source, "f"), [Edit("a.py", "delete", 2, 2, "    a = 1", "")])
    assert refusal(report)[0] == "layout"


# Files that do not parse

BROKEN = """\
import math

class C:
    def f(self, a):
        return helper(a)

    def g(self)
        pass

def helper(a): return a
"""


@pytest.mark.parametrize(
    ("old", "new", "gate_name"),
    [
        ("return helper(a)", "return math.sqrt(helper(a))", None),
        ("return helper(a)", "return undefined_helper(a)", "names"),
        ("return helper(a)", "return helper(a", "ast"),
        ("return helper(a)", "return helper( a )", "change"),
        ("        return helper(a)\n", "        return helper(a)\n    x = 1\n", "scope"),
        ("    def g(self)\n", "    def g(self):\n", "scope"),
        ("def f(self, a):", "def f2(self, a):", "scope"),
    ],
)
def test_in_a_broken_file_a_function_is_judged_alone(old: str, new: str, gate_name: str | None) -> None:
    report = gate(BROKEN, "C.f", old, new)
    assert (report.refused.gate if report.refused else None) == gate_name
    if report.patched is not None:
        assert report.patched.text == BROKEN.replace(old, new)


def test_no_import_is_added_to_a_broken_file() -> None:
    source = Source.from_text(BROKEN, "a.py")
    edits = [
        Edit("a.py", "insert", 2, 1, "", "import zlib"),
        Edit("a.py", "replace", 5, 5, "        return helper(a)", "        return zlib"),
    ]
    gate_name, reason = refusal(run_gates(source, find_scope(source, "f"), edits, imports=["import zlib"]))
    assert gate_name == "scope" and "does not parse, so no import can be added" in reason
    assert import_edit(source, ["import zlib"]) is None


# Hunks


def test_a_subset_of_hunks_passes_the_gates_again_or_is_refused() -> None:
    report = gate(
        TEXT,
        "sort",
        "    found = []\n    for item in items:\n        found.append(item)",
        "    kept = []\n    for item in items:\n        kept.append(item)\n    found = kept",
    )
    assert report.ok and len(report.edits) == 2
    source = Source.from_text(TEXT, "pkg/store.py")
    part = run_gates(source, find_scope(source, "sort"), select_hunks(report.edits, [1]))
    assert refusal(part) == (
        "names",
        "After the patch `kept` would be undefined; define it, import it, or use a name that exists.",
    )


# Imports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nx = 1\n", "import os\nimport math\nx = 1\n"),
        ("from a import (b,\n  c)\nx = 1", "from a import (b,\n  c)\nimport math\nx = 1"),
        ('"""Doc."""\n\ndef f(): pass\n', '"""Doc."""\n\nimport math\n\ndef f(): pass\n'),
        ('"""Doc."""\ndef f(): pass\n', '"""Doc."""\n\nimport math\n\ndef f(): pass\n'),
        (
            '"""Two\nlines."""\r\nfrom __future__ import annotations\r\n',
            '"""Two\nlines."""\r\nfrom __future__ import annotations\r\nimport math\r\n',
        ),
        (
            "#!/usr/bin/python\n# coding: utf-8\ndef f(): pass\n",
            "#!/usr/bin/python\n# coding: utf-8\n\nimport math\n\ndef f(): pass\n",
        ),
        (
            "#!/usr/bin/python\n# Licence\n# text\n\n@d\ndef f(): pass\n",
            "#!/usr/bin/python\n# Licence\n# text\n\nimport math\n\n@d\ndef f(): pass\n",
        ),
        ("# about f\ndef f(): pass\n", "import math\n\n# about f\ndef f(): pass\n"),
        ("@d\ndef f(): pass\n", "import math\n\n@d\ndef f(): pass\n"),
        ("x = 1\nimport os\n", "import math\n\nx = 1\nimport os\n"),
        ("", "import math\n"),
        ("\ufeffimport os", "\ufeffimport os\nimport math"),
    ],
)
def test_imports_go_to_the_head_of_the_file(text: str, expected: str) -> None:
    source = Source.from_text(text, "a.py")
    edit = import_edit(source, ["import math"])
    assert edit is not None
    patched = apply_edits(source, [edit])
    assert patched.to_bytes() == expected.encode()
    assert import_edit(patched, ["import math"]) is None


def test_an_import_that_is_there_in_other_words_is_not_added() -> None:
    source = Source.from_text("try:\n    from a import (b, c as d)\nexcept ImportError: pass\n", "a.py")
    assert import_edit(source, ["from a import b", "from a import c as d"]) is None
    edit = import_edit(source, ["from a import c", "from a import c"])
    assert edit is not None and edit.new.split("\n") == ["from a import c", ""]


def test_known_names_come_with_their_import() -> None:
    names = ["math", "defaultdict", "List", "Path", "string", "queue", "nonsense", "lru_cache", "Iterable"]
    assert missing_stdlib_imports(names) == {
        "math": "import math",
        "defaultdict": "from collections import defaultdict",
        "List": "from typing import List",
        "Path": "from pathlib import Path",
        "lru_cache": "from functools import lru_cache",
        "Iterable": "from collections.abc import Iterable",
    }
    assert missing_stdlib_imports(["math", "re"], "x = math.pi + re") == {"math": "import math"}


def test_every_known_import_exists() -> None:
    from engine.patching import names

    known: dict[str, Any] = dict(vars(names))
    for module, members in known["_IMPORTABLE_MEMBERS"].items():
        exec("".join(f"from {module} import {member}\n" for member in members), {})
    assert known["_IMPORTABLE_MODULES"] <= set(sys.stdlib_module_names)


def test_forgotten_imports_are_suggested_but_never_for_a_lost_local_name() -> None:
    text = "def f(a):\n    re = a\n    return re\n"
    source = Source.from_text(text, "a.py")
    scope = find_scope(source, "f")
    lost = Source.from_text("def f(a):\n    return re.match(a)\n", "a.py")
    assert suggest_imports(source, scope, lost) == []
    new = Source.from_text("def f(a):\n    re = math.sqrt(a)\n    return deque([re])\n", "a.py")
    assert suggest_imports(source, scope, new) == ["from collections import deque", "import math"]


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("        return self.size\n", "        return self.size + 1\n", True),
        ("        return self.size\n", "        # the size\n        return self.size\n", False),
        ("        return self.size\n", '        """The size 🙂."""\n        return self.size\n', False),
        ("        return self.size\n", "        return (self.size)\n", False),
        ("        return self.size\n", '        "The size."\n        return "The size."\n', True),
    ],
)
def test_a_report_says_whether_more_than_comments_and_docstrings_changed(old: str, new: str, changes: bool) -> None:
    report = gate(TEXT, "Store.helper", old, new)
    assert (report.ok, report.changes_program) == (True, changes)
