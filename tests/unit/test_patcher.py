"""The way from an intent to a proved patch, with an engine that writes what the test says and a real ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import (
    BudgetError,
    CancelledError,
    ContextLengthError,
    EngineError,
    GateError,
    RefusedError,
    StaleTextError,
)
from engine.inference.protocol import FinishReason
from engine.patching.ledger import Ledger
from engine.patching.patcher import Patch, Patcher, PatcherOptions, StageOptions
from engine.patching.prompts import Feedback
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from tests.scripted_engine import Reply, Script, ScriptedEngine

pytestmark = pytest.mark.unit

FILE = '''\
import os


class Store:
    def size(self, names):
        """Count 🙂."""
        total = 0
        for name in names:
            total -= len(name)
        return total


def last():
    return os.name
'''
OLD = "".join(FILE.splitlines(keepends=True)[4:10])
GOOD = OLD.replace("-=", "+=")
BAD = OLD.replace("return total", "return totals")
INTENT = "Add the lengths up."


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        yield ledger


class Desk:
    """A patcher and all that it touches."""

    def __init__(
        self, script: Script, ledger: Ledger | None = None, *, context_length: int = 1_000_000, **options: object
    ):
        self.engine = ScriptedEngine(script, context_length=context_length)
        self.options = PatcherOptions(**{"patch": StageOptions(2000, 1.0), **options})  # type: ignore[arg-type]
        self.patcher = Patcher(self.engine, ledger, self.options)
        self.heard: list[tuple[str, str]] = []

    def plan(self, text: str = FILE, name: str = "size"):
        source = Source.from_text(text, "store.py")
        return self.patcher.plan(source, find_scope(source, name), INTENT)

    def patch(self, text: str = FILE, name: str = "size", **arguments: object) -> Patch:
        source = Source.from_text(text, "store.py")
        scope = find_scope(source, name)
        listener = lambda stage, piece: self.heard.append((stage, piece))  # noqa: E731
        return self.patcher.patch(source, scope, INTENT, listener=listener, **arguments)  # type: ignore[arg-type]


def refusals(ledger: Ledger) -> list[str]:
    return [entry.proposal.error["code"] for entry in ledger.entries() if entry.proposal.error]


# PLAN


@pytest.mark.parametrize(
    ("answer", "steps", "truncated"),
    [
        ("use += here", ("use += here",), False),
        ("use += in line 9 instead", ("use += in line",), True),
        ("use += in line  9", ("use += in line",), True),
        ("- 1\n* two 🙂\n", ("1", "two 🙂"), False),
        ("- one\n* two 🙂🙂", ("one", "two"), True),
        ("1. one\n2) two", ("one", "two"), False),
        ("- one\n\nnot this", ("one",), False),
        ("<think>so</think>", (), True),
        ("", (), False),
        ("abcdefghijklmnopqrst", ("abcdefghijklmnop",), True),
    ],
)
def test_a_plan_is_its_lines_without_marks_and_ends_at_a_word(
    answer: str, steps: tuple[str, ...], truncated: bool, ledger: Ledger
) -> None:
    desk = Desk([answer], ledger)
    plan = desk.plan()
    assert plan.truncated is truncated
    assert plan.steps == steps
    assert ledger.get_plan(plan.id).steps == steps
    assert plan.to_json()["range"] == {"start_line": 5, "end_line": 10}


def test_a_plan_that_runs_out_of_time_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="The PLAN ran out of time") as caught:
        Desk([Reply("use", FinishReason.TIME)]).plan()
    assert caught.value.details["budget"] == "time"
    assert "plan_max_time" in caught.value.hint


def test_the_plan_is_part_of_the_patchs_prompt() -> None:
    desk = Desk(["- use +=", GOOD])
    desk.patch(plan=desk.plan())
    assert "## Plan:\nuse +=\n" in desk.engine.prompts[1]
    without = Desk([GOOD])
    without.patch()
    assert "## Plan:" not in without.engine.prompts[0]


def test_a_plan_for_another_text_is_stale_and_nothing_is_asked(ledger: Ledger) -> None:
    desk = Desk(["- use +="], ledger)
    plan = desk.plan()
    with pytest.raises(StaleTextError, match=r"store.py changed since the plan was made") as caught:
        desk.patch(FILE + "\n", plan=plan)
    assert caught.value.details["plan_id"] == plan.id
    assert len(desk.engine.requests) == 1
    assert list(ledger.entries()) == []


# PATCH


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_good_answer_becomes_a_patch_with_its_diff_in_the_ledger(newline: str, ledger: Ledger) -> None:
    desk = Desk([GOOD], ledger)
    patch = desk.patch(FILE.replace("\n", newline).removesuffix(newline))
    assert [(edit.start_line, edit.pre, edit.new) for edit in patch.edits] == [
        (9, "            total -= len(name)", "            total += len(name)")
    ]
    assert patch.patched.text == FILE.replace("-=", "+=").replace("\n", newline).removesuffix(newline)
    assert f"-            total -= len(name){newline}+            total += len(name){newline}" in patch.diff
    assert [gate["ok"] for gate in patch.gates] == [True] * 9
    entry = ledger.get(patch.id)
    assert entry.proposal.patched == patch.patched.to_bytes()
    assert desk.heard == [("patch", GOOD), ("prove", "")]


@pytest.mark.parametrize(
    ("reply", "budget"),
    [(Reply(GOOD, FinishReason.TIME), "time"), (Reply(GOOD, FinishReason.LENGTH), "tokens"), (GOOD * 20, "tokens")],
)
def test_a_budget_that_runs_out_is_typed_and_never_a_partial_patch(reply: Reply, budget: str, ledger: Ledger) -> None:
    desk = Desk([reply], ledger, patch=StageOptions(192, 1.0), num_repairs=1)
    with pytest.raises(BudgetError, match="The PATCH") as caught:
        desk.patch()
    assert caught.value.details["budget"] == budget
    assert caught.value.exit_code == 1
    assert refusals(ledger) == ["budget"]
    assert ledger.get(caught.value.details["patch_id"]).proposal.patched is None
    assert len(desk.engine.requests) == 1


def test_the_token_budget_grows_with_the_function() -> None:
    desk = Desk([GOOD], patch=StageOptions(192, 1.0))
    desk.patch()
    assert desk.engine.requests[0].params.max_new_tokens == int(1.3 * len(OLD.encode())) + 64
    small = Desk(["def f():\n    return 2\n"], patch=StageOptions(192, 1.0))
    small.patch("def f():\n    return 1\n", "f")
    assert small.engine.requests[0].params.max_new_tokens == 192
    edits = Desk(['[{"x"'], patch=StageOptions(192, 1.0), edit_format="json_edits", num_repairs=0)
    with pytest.raises(GateError):
        edits.patch()
    assert edits.engine.requests[0].params.max_new_tokens == 192
    assert edits.engine.requests[0].params.grammar is not None


def test_a_repair_is_told_the_gate_and_its_reason_and_may_succeed(ledger: Ledger) -> None:
    desk = Desk([BAD, GOOD], ledger)
    patch = desk.patch()
    assert patch.num_attempts == 2
    first, second = desk.engine.prompts
    assert "refused by the check `names`: After the patch `totals` would be undefined" in second
    assert BAD in second
    assert "refused" not in first
    assert [stage for stage, _ in desk.heard] == ["patch", "prove", "repair", "prove"]
    assert refusals(ledger) == []
    assert patch.timings.num_tokens == len(BAD.encode()) + len(GOOD.encode())


def test_what_is_refused_twice_is_kept_as_refused_and_not_found_again(ledger: Ledger) -> None:
    desk = Desk([BAD, OLD, GOOD], ledger)
    with pytest.raises(GateError, match="refused by the gate `change`") as caught:
        desk.patch()
    gates = caught.value.details["gates"]
    assert [gate["gate"] for gate in gates] == [
        "fresh",
        "schema",
        "anchors",
        "ast",
        "libcst",
        "scope",
        "names",
        "change",
    ]
    assert [gate["ok"] for gate in gates] == [True] * 7 + [False]
    assert refusals(ledger) == ["gate"]
    entry = ledger.get(caught.value.details["patch_id"])
    assert list(entry.proposal.gates) == gates
    assert ledger.find(entry.proposal.key) is None
    patch = desk.patch()
    assert not patch.is_known, "the refusal is not what an equal request gets"


@pytest.mark.parametrize("num_repairs", [0, 2])
def test_as_many_repairs_are_tried_as_asked_for(num_repairs: int) -> None:
    desk = Desk([BAD] * 3, num_repairs=num_repairs)
    with pytest.raises(GateError):
        desk.patch()
    assert len(desk.engine.requests) == num_repairs + 1


def test_a_repair_that_no_longer_fits_leaves_the_gates_verdict() -> None:
    probe = Desk([BAD, GOOD])
    probe.patch()
    first, second = (len(request.prompt_token_ids) + request.params.max_new_tokens for request in probe.engine.requests)
    assert first < second
    with pytest.raises(GateError, match="`names`"):
        Desk([BAD, GOOD], context_length=first).patch()


# second choices

BYTES = OLD.encode()  # a token is a byte
MINUS = BYTES.index(b"-=")
RETURN = BYTES.index(b"return total")
SUM = "return sum(map(len, names))\n"


def hesitating(*second_choices: tuple[int, str, float]) -> Reply:
    """The function as it is, with places where something else was nearly as likely."""
    return Reply(OLD, second_choices=second_choices)


def test_an_answer_that_changes_nothing_goes_on_from_its_likeliest_second_choice(ledger: Ledger) -> None:
    desk = Desk([hesitating((RETURN + 7, "s", -3.0), (MINUS, "+", -1.0)), BYTES[MINUS + 1 :].decode()], ledger)
    patch = desk.patch()
    assert patch.patched.text == FILE.replace("-=", "+=")
    assert patch.num_attempts == 2
    assert "goes on from a second choice" in patch.repairs[-1]
    assert desk.engine.prompts[1] == desk.engine.prompts[0] + BYTES[:MINUS].decode() + "+"
    assert desk.engine.requests[1].params.max_new_tokens == 2000 - MINUS - 1
    known = desk.patch()
    assert (known.is_known, known.repairs) == (True, patch.repairs)


def test_second_choices_are_followed_until_one_passes_the_gates() -> None:
    script = [
        hesitating((MINUS, "+", -1.0), (RETURN + 7, "s", -2.0), (4, " ", -3.0)),
        " broken (\n",
        SUM[8:],
    ]
    patch = Desk(script).patch()
    assert patch.patched.text == FILE.replace("return total\n", SUM)
    assert patch.num_attempts == 3


@pytest.mark.parametrize("num_forks", [0, 2])
def test_without_a_second_choice_that_passes_the_model_is_asked_again(num_forks: int) -> None:
    forks = [" (\n", BYTES[RETURN + 8 :].decode()][:num_forks]  # does not parse; the same again
    answer = hesitating((MINUS, "+", -1.0), (RETURN + 7, "t", -2.0), (4, "x", -3.0))
    desk = Desk([answer, *forks, GOOD], num_forks=num_forks)
    patch = desk.patch()
    assert patch.patched.text == FILE.replace("-=", "+=")
    assert "The code after is the same" in desk.engine.prompts[-1]
    assert patch.repairs == []


def test_a_second_choice_that_changes_a_comment_alone_is_the_last_resort() -> None:
    comment = " the sum\n        return total\n"
    patch = Desk([hesitating((RETURN, "#", -1.0)), comment]).patch()
    assert patch.patched.text == FILE.replace("        return total\n", "        # the sum\n        return total\n")
    both = hesitating((RETURN, "#", -1.0), (MINUS, "+", -2.0))
    patch = Desk([both, comment, BYTES[MINUS + 1 :].decode()]).patch()
    assert patch.patched.text == FILE.replace("-=", "+=")


def test_a_second_choice_after_which_nothing_is_returned_is_none() -> None:
    hesitant = hesitating((RETURN, "d", -1.0), (MINUS, "+", -2.0))
    patch = Desk([hesitant, "el total\n", BYTES[MINUS + 1 :].decode()]).patch()
    assert patch.patched.text == FILE.replace("-=", "+=")
    assert patch.is_second_choice
    assert not Desk([GOOD]).patch().is_second_choice


def test_a_model_that_is_sure_is_believed() -> None:
    desk = Desk([hesitating((MINUS, "+", -5.0))], num_repairs=0)
    with pytest.raises(GateError, match="changes nothing"):
        desk.patch()
    assert len(desk.engine.requests) == 1


def test_second_choices_at_once_give_what_one_after_the_other_gives_and_the_rest_is_cancelled() -> None:
    first = hesitating((MINUS, "*", -1.0), (RETURN + 7, "s", -1.5), (MINUS - 1, "+", -2.0), (4, " ", -2.5))

    heads = {BYTES[:MINUS].decode() + "*": " broken (\n", BYTES[: RETURN + 7].decode() + "s": SUM[8:]}

    def script(prompt: str) -> Reply | str:
        return next((rest for head, rest in heads.items() if prompt.endswith(head)), first)

    found: list[Patch] = []
    for forks_at_once in (1, 2, 8):
        desk = Desk(script, forks_at_once=forks_at_once)
        found.append(desk.patch())
        num_asked = 1 + {1: 2, 2: 2, 8: 4}[forks_at_once]
        assert len(desk.engine.requests) == num_asked
        assert desk.engine.num_cancelled == num_asked - 3, "what came after the one that passed"
    assert {(patch.patched.text, patch.num_attempts) for patch in found} == {(found[0].patched.text, 3)}


def test_a_cancel_or_a_full_queue_leaves_no_second_choice_behind() -> None:
    answer = hesitating((MINUS, "+", -1.0), (RETURN + 7, "s", -2.0), (4, " ", -3.0))
    desk = Desk([answer, Reply("", FinishReason.CANCELLED), "", ""], forks_at_once=8)
    with pytest.raises(CancelledError):
        desk.patch()
    assert desk.engine.num_cancelled == 2
    full = Desk([answer, "", ""], forks_at_once=8)
    full.engine.most_waiting = 2
    with pytest.raises(EngineError, match="queue is full"):
        full.patch()
    assert full.engine.num_cancelled == 2


def test_second_choices_stay_within_the_time_of_one_answer() -> None:
    answer = hesitating((MINUS, "+", -1.0), (RETURN + 7, "s", -2.0))
    desk = Desk([answer, " (\n"], patch=StageOptions(2000, 1.0, max_time_s=0.5), num_repairs=0)
    with pytest.raises(GateError, match="changes nothing"):
        desk.patch()
    assert [request.params.max_time_s for request in desk.engine.requests] == [0.5, 0.5]


def test_a_second_choice_that_does_not_end_is_left_and_a_cancel_ends_all() -> None:
    answer = hesitating((MINUS, "+", -1.0), (RETURN + 7, "s", -2.0))
    patch = Desk([answer, Reply(BYTES[MINUS + 1 :].decode(), FinishReason.LENGTH), SUM[8:]]).patch()
    assert patch.patched.text == FILE.replace("return total\n", SUM)
    with pytest.raises(CancelledError):
        Desk([answer, Reply("", FinishReason.CANCELLED)]).patch()


def test_the_same_request_gets_the_same_proposal_without_the_engine(ledger: Ledger) -> None:
    desk = Desk([GOOD, GOOD.replace("+=", "+= 1 *")], ledger)
    patch, again = desk.patch(), desk.patch()
    assert len(desk.engine.requests) == 1
    assert again.is_known
    assert (again.id, again.edits, again.diff, again.patched) == (patch.id, patch.edits, patch.diff, patch.patched)
    fresh = desk.patch(fresh=True)
    assert len(desk.engine.requests) == 2
    assert not fresh.is_known
    assert fresh.id != patch.id


def test_a_rejected_proposal_is_made_anew(ledger: Ledger) -> None:
    desk = Desk([GOOD, GOOD.replace("+=", "+= 1 *")], ledger)
    ledger.reject(desk.patch().id)
    assert not desk.patch().is_known


def test_without_a_ledger_every_request_reaches_the_engine() -> None:
    desk = Desk([GOOD, GOOD])
    assert desk.patch().id == desk.patch().id == ""
    assert len(desk.engine.requests) == 2


@pytest.mark.parametrize("change", ["feedback", "style", "preset", "text", "repairs"])
def test_whatever_changes_the_answer_changes_the_request(change: str, ledger: Ledger) -> None:
    Desk([GOOD], ledger).patch()
    other = Desk([GOOD], ledger, **({"style": "Use sum()."} if change == "style" else {}))  # type: ignore[arg-type]
    if change == "repairs":
        other.patcher.options = replace(other.options, num_repairs=0)
    arguments = {"feedback": Feedback("Too slow.", "Use sum."), "preset": "simplify"}
    text = FILE.replace("import os", "import os, re") if change == "text" else FILE
    patch = other.patch(text, **{change: arguments[change]} if change in arguments else {})
    assert not patch.is_known
    told = {"feedback": ("\nToo slow.\nUse sum.\n",), "style": ("\nUse sum().\n",)}.get(change, ())
    assert all(f"## Instruction:\n{INTENT}{words}" in other.engine.prompts[0] for words in told)


def test_a_forgotten_import_of_the_standard_library_is_declared() -> None:
    patch = Desk([GOOD.replace("len(name)", "math.floor(len(name))")]).patch()
    assert patch.imports == ("import math",)
    assert patch.patched.text.startswith("import os\nimport math\n")
    assert [edit.start_line for edit in patch.edits] == [2, 9]


def test_an_import_written_above_the_function_goes_to_the_top_of_the_file() -> None:
    answer = "import numpy as np\n\ndef size(self, names):\n    return np.sum(names)\n"
    patch = Desk([answer]).patch()
    assert patch.imports == ("import numpy as np",)
    assert patch.patched.text.startswith(
        "import os\nimport numpy as np\n\n\nclass Store:\n    def size(self, names):\n"
    )


def test_a_function_that_does_not_fit_is_named_with_both_numbers(ledger: Ledger) -> None:
    desk = Desk([GOOD], ledger, context_length=500)
    with pytest.raises(ContextLengthError, match=r"function Store.size does not fit: .*\(\d+ tokens\).*\(2000\).* 500"):
        desk.patch()
    assert refusals(ledger) == ["context_length"]
    with pytest.raises(ContextLengthError, match="the file does not fit"):
        desk.patch(name="<module>")


def test_no_plan_is_made_for_a_function_that_no_patch_could_be_written_for() -> None:
    desk = Desk(["a plan"], context_length=2100)
    with pytest.raises(ContextLengthError, match=r"function Store.size does not fit: .*\(2000\).* 2100"):
        desk.plan()
    assert desk.engine.requests == []


def test_a_cancel_leaves_nothing_in_the_ledger(ledger: Ledger) -> None:
    desk = Desk([Reply(GOOD, FinishReason.CANCELLED), Reply("x", FinishReason.CANCELLED)], ledger)
    for work in (desk.patch, desk.plan):
        with pytest.raises(CancelledError):
            work()
    assert list(ledger.entries()) == []


def test_a_failed_device_is_no_refusal(ledger: Ledger) -> None:
    with pytest.raises(EngineError):
        Desk([EngineError("The device failed")], ledger).patch()
    assert list(ledger.entries()) == []


def test_a_file_that_does_not_parse_is_patched_where_its_function_does(ledger: Ledger) -> None:
    broken = FILE + "\ndef broken(:\n    pass\n"
    patch = Desk([GOOD], ledger).patch(broken)
    assert patch.patched.text == broken.replace("-=", "+=")
    assert patch.imports == ()


@pytest.mark.parametrize("answer", ["", "\0", "# coding: latin-1", "<think>" + GOOD, "{}", "def size(", "\ud800"])
def test_an_answer_of_anything_at_all_is_a_refusal(answer: str, ledger: Ledger) -> None:
    for edit_format in ("rewrite", "json_edits"):
        script = [answer] if "\ud800" not in answer else ['[{"path": "\\ud800"}]']
        desk = Desk(script, ledger, num_repairs=0, edit_format=edit_format)
        with pytest.raises(RefusedError):
            desk.patch()
    assert refusals(ledger) == ["gate", "gate"]


def test_edits_with_a_lone_surrogate_are_a_refusal(ledger: Ledger) -> None:
    text = (
        '[{"path": "store.py", "action": "replace", "start_line": 9, "end_line": 9, '
        '"pre": "            total -= len(name)", "new": "            total += len(\\ud800)"}]'
    )
    with pytest.raises(GateError):
        Desk([text], ledger, num_repairs=0, edit_format="json_edits").patch()
    assert refusals(ledger) == ["gate"]


def test_a_patch_as_programs_see_it() -> None:
    shown = Desk([GOOD]).patch().to_json()
    assert shown["ok"] is True
    assert shown["edits"] == [
        {
            "path": "store.py",
            "action": "replace",
            "start_line": 9,
            "end_line": 9,
            "pre": "            total -= len(name)",
            "new": "            total += len(name)",
        }
    ]
    assert (shown["function"], shown["attempts"], shown["known"]) == ("Store.size", 1, False)
    assert shown["patched"] == FILE.replace("-=", "+=")
