"""The gate's measurement: rows are read, answers judged by gates and tree, both sides asked alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from engine.inference.adapters import BASE
from engine.inference.protocol import FinishReason
from engine.patching.patcher import PatcherOptions
from tests.scripted_engine import Reply, ScriptedEngine
from training.evaluate import HeldOut, evaluate, read_held_out, trained_on
from training.general import TASKS

pytestmark = pytest.mark.unit

OPTIONS = PatcherOptions()
BEFORE = "import os\n\n\ndef f(a):\n    return a\n\n\ndef g():\n    return os\n"
AFTER = BEFORE.replace("return a\n", "return -a  # 🙂\n")


def edit(name: str = "e1", **changes: Any) -> dict[str, Any]:
    row = {"id": name, "file_name": "m.py", "before": BEFORE, "function": "f", "scope": "function", "after": AFTER}
    return {**row, "intent": "negate it", **changes}


def held_out(folder: Path, *rows: dict[str, Any], **options: Any) -> HeldOut:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return read_held_out(file, options.pop("journal", []), OPTIONS, **options)


def judged(folder: Path, base: str | Reply, candidate: str | Reply, **changes: Any):
    found = held_out(folder, edit(**changes))
    done = evaluate(ScriptedEngine([base, candidate]), found, "adapter", OPTIONS, tasks=())
    return done.base.judged[0], done.candidate.judged[0]


@pytest.mark.parametrize(
    ("answer", "right", "exact", "valid", "edited", "gate"),
    [
        ("def f(a):\n    return -a  # 🙂\n", True, True, True, True, ""),
        ("def f(a):\n    return (-a)\n", True, False, True, True, ""),
        ("def f(a):\n    return 0 - a\n", False, False, True, True, ""),
        ("def f(a):\n    return a\n", False, False, False, False, "change"),
        ("def f(a:\n", False, False, False, True, "ast"),
        ("def other(a):\n    return -a\n", False, False, False, True, "scope"),
    ],
)
def test_an_answer_is_judged_in_its_whole_file(
    tmp_path: Path, answer: str, right: bool, exact: bool, valid: bool, edited: bool, gate: str
) -> None:
    _, one = judged(tmp_path, "x", answer)
    assert (one.is_right, one.is_exact, one.is_valid, one.is_edited) == (right, exact, valid, edited)
    assert one.gate == gate or (gate == "ast" and one.gate)


def test_an_answer_that_does_not_end_is_not_valid(tmp_path: Path) -> None:
    base, _ = judged(tmp_path, Reply("def f(a):\n    return -a", FinishReason.LENGTH), "x")
    assert (base.is_valid, base.gate) == (False, "tokens")


def test_both_get_the_same_prompt_in_turn_and_their_own_adapter(tmp_path: Path) -> None:
    found = held_out(tmp_path, edit("a"), edit("b", intent="b"), edit("c", intent="c"))
    engine = ScriptedEngine(lambda _: "x")
    steps: list[tuple[int, int]] = []
    evaluate(engine, found, "adapter", OPTIONS, tasks=TASKS[:1], on_step=lambda *step: steps.append(step[:2]))
    adapters = [request.adapter for request in engine.requests]
    assert adapters == [BASE, "adapter", "adapter", BASE, BASE, "adapter", BASE, "adapter"]
    assert engine.prompts[0] == engine.prompts[1] and engine.prompts[2] == engine.prompts[3]
    assert steps[0] == (0, 8) and steps[-1] == (8, 8)
    assert {request.params.temperature for request in engine.requests} == {0.0}


def test_the_figures_hold_no_text_and_no_path(tmp_path: Path) -> None:
    found = held_out(tmp_path, *(edit(f"e{number}", intent=f"negate {number}") for number in range(8)))
    good = "def f(a):\n    return -a\n"
    same = "def f(a):\n    return a\n"
    script = [same, good, good, same] * 4
    done = evaluate(ScriptedEngine(script), found, "adapter", OPTIONS, tasks=())
    figures = done.to_json()
    edits = figures["edits"]
    assert (edits["base"]["right"], edits["candidate"]["right"], edits["rows"]) == (0, 8, 8)
    assert edits["right"]["won"] == 8 and edits["right"]["interval"][0] > 0 and figures["general"] is None
    assert edits["base"]["refused_by"] == {"change": 8}
    text = json.dumps([figures, done.rows_to_json()])
    assert str(tmp_path) not in text and "return" not in text and "negate" not in text
    assert [row["id"] for row in done.rows_to_json()] == [f"e{number}" for number in range(8)]


def test_general_tasks_are_run(tmp_path: Path) -> None:
    done = evaluate(
        ScriptedEngine(["x", "x", "def to_binary(number): return ''", "def to_binary(n):\n    return bin(n)[2:]"]),
        held_out(tmp_path, edit()),
        "adapter",
        OPTIONS,
        tasks=[task for task in TASKS if task.name == "to_binary"],
    )
    assert (done.base.passed, done.candidate.passed) == ([False], [True])
    assert done.to_json()["general"]["passed"]["won"] == 1


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_line_without_a_file_is_judged_by_itself(tmp_path: Path) -> None:
    row = {"id": "x", "input": "Write f.", "output": "```python\ndef f():\n    return 1\n```", "prefill": "```python\n"}
    found = held_out(tmp_path, row)
    script = ["def f():\n    return (1)\n", "def f(:\n"]
    done = evaluate(ScriptedEngine(script), found, "adapter", OPTIONS, tasks=())
    one, other = done.base.judged[0], done.candidate.judged[0]
    assert (one.is_right, one.is_exact, one.is_valid) == (True, False, True)
    assert (other.is_right, other.is_valid, other.gate) == (False, False, "ast")


def test_what_was_trained_on_is_left_out(tmp_path: Path) -> None:
    row = {"id": "x", "instruction": "", "input": "Write f.", "output": "1"}
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = held_out(
        tmp_path, row, edit("learnt"), edit("kept"), seen=trained_on(train), seen_ids=frozenset({"learnt"})
    )
    assert ([one.id for one in found.rows], dict(found.left_out)) == (["kept"], {"trained on": 2})
    with pytest.raises(UsageError, match=r"has no row to judge by \(1 trained on\)"):
        held_out(tmp_path, row, seen=trained_on(train))
    assert trained_on(tmp_path / "none.jsonl") == frozenset()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:1 is not JSON"),
        ("[]", "rows.jsonl:1 is not a JSON object"),
        ("{}", "rows.jsonl:1 has neither input and output nor before and after"),
        (json.dumps({"before": "", "after": ""}), "rows.jsonl:1 has no 'file_name'"),
        (json.dumps(edit(function="nobody")), "rows.jsonl:1: "),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_held_out(file, [], OPTIONS)
    assert message in caught.value.message
