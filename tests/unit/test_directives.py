"""Intents written into the code, and edits as an editor applies them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.patching.directives import directive_intent, without_directives
from engine.patching.edits import Edit, apply_edits, diff_edits, replaced, replacements
from engine.patching.patcher import Patcher
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from tests.scripted_engine import ScriptedEngine

METHOD = "class A:\n\t@property\n\tdef f(self):\n\t\t# pp: return two 🙂\n\t\ts = '# pp: no'\n\t\treturn 1  #pp: now\n"


def test_directives_of_a_function_are_its_intent() -> None:
    source = Source.from_text(METHOD.replace("\n", "\r\n"), "a.py")
    scope = find_scope(source, "A.f")
    assert directive_intent(source, scope) == "return two 🙂 now"
    view, view_scope = without_directives(source, scope)
    assert view.text == "class A:\r\n\t@property\r\n\tdef f(self):\r\n\t\ts = '# pp: no'\r\n\t\treturn 1\r\n"
    assert (view_scope.qualname, view_scope.start_line, view_scope.end_line) == ("A.f", 2, 5)


def test_a_directive_may_be_written_in_capitals() -> None:
    source = Source.from_text("def f():\n    # PP: return two\n    return 1\n", "a.py")
    assert directive_intent(source, find_scope(source, "f")) == "return two"


def test_other_functions_keep_theirs() -> None:
    source = Source.from_text("def f():\n    return 1  # pp: a\n\n\ndef g():\n    return 2  # pp: b", "a.py")
    scope = find_scope(source, "g")
    assert directive_intent(source, scope) == "b"
    assert without_directives(source, scope)[0].text == "def f():\n    return 1  # pp: a\n\n\ndef g():\n    return 2"
    assert directive_intent(source, find_scope(source)) == "a b"


def test_without_a_directive_nothing_is_made_anew() -> None:
    source = Source.from_text("def f():\n    return 1\n", "a.py")
    scope = find_scope(source, "f")
    assert without_directives(source, scope) == (source, scope)
    assert without_directives(source, scope)[0] is source


def test_the_model_does_not_see_the_directive_and_the_patch_removes_it() -> None:
    source = Source.from_text("import os\n\n\ndef f():\n    # pp: two\n    x = 1\n    return x\n", "a.py")
    engine = ScriptedEngine(["def f():\n    x = 2\n    return x\n"])
    patch = Patcher(engine, None).patch(source, find_scope(source, "f"), "two", drop_directives=True)
    assert "# pp" not in engine.prompts[0]
    assert patch.patched.text == "import os\n\n\ndef f():\n    x = 2\n    return x\n"
    assert [edit.action for edit in patch.edits] == ["replace"]


def test_a_neighbours_directive_that_the_model_copies_goes_too_and_the_neighbour_keeps_it() -> None:
    text = "def f():\n    # pp: two\n    return 1\n\n\ndef g():\n    # pp: two\n    return 1\n"
    source = Source.from_text(text, "a.py")
    engine = ScriptedEngine(["def f():\n    # pp: two\n    return 2\n"])
    patch = Patcher(engine, None).patch(source, find_scope(source, "f"), "two", drop_directives=True)
    assert patch.patched.text == "def f():\n    return 2\n\n\ndef g():\n    # pp: two\n    return 1\n"


def test_an_answer_that_changes_nothing_but_the_directive_is_refused() -> None:
    from engine.errors import GateError

    source = Source.from_text("def f():\n    # pp: two\n    return 1\n", "a.py")
    engine = ScriptedEngine(["def f():\n    return 1\n"] * 2)
    with pytest.raises(GateError, match="gate `change`"):
        Patcher(engine, None).patch(source, find_scope(source, "f"), "two", drop_directives=True)


# --- replacements -----------------------------------------------------------------------------------------------------


def test_an_edit_of_the_last_line_keeps_the_missing_final_newline() -> None:
    source = Source.from_text("a\r\nb\r\nc", "a.py")
    delete = Edit("a.py", "delete", 3, 3, "c", "")
    append = Edit("a.py", "insert", 4, 3, "", "d")
    assert replaced(source.text, replacements(source, [delete])) == "a\r\nb"
    assert replaced(source.text, replacements(source, [append])) == "a\r\nb\r\nc\r\nd"


LINES = st.lists(st.sampled_from(["a", "b", "", "\tx", "🙂", "\x0c", "é"]), max_size=8)


@given(old=LINES, new=LINES, newline=st.sampled_from(["\n", "\r\n"]), final=st.booleans(), bom=st.booleans())
def test_replacements_together_give_the_patched_text(
    old: list[str], new: list[str], newline: str, final: bool, bom: bool
) -> None:
    text = ("\ufeff" if bom else "") + newline.join(old) + (newline if final and old else "")
    source = Source.from_text(text, "a.py")
    edits = diff_edits(source, new, (1, source.num_lines))
    parts = replacements(source, edits) if edits else []
    assert replaced(source.text, parts) == apply_edits(source, edits).text
    assert all(one.end <= other.start for one, other in pairwise(parts))
