"""The ledger records everything once, finds it again, and takes patches back exactly."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from engine.errors import LedgerError, PathError, StaleTextError, UsageError, WriteError
from engine.patching.disk import sha256_hex
from engine.patching.edits import Edit, apply_edits
from engine.patching.ledger import Label, Ledger, PlanRecord, Proposal, State, request_key
from engine.patching.ledger_db import SCHEMA_VERSION, set_aside
from engine.patching.source import Source

BASE = (
    b"\xef\xbb\xbfimport os\r\n\r\n\x0c\r\n@decorated\r\ndef greet(name):\r\n\tdef inner():\r\n\t\treturn name\r\n"
    b"\treturn 'hi ' + inner()\r\n\r\n\r\ndef other(name):\r\n\treturn '\xf0\x9f\x90\x8d' + name"
)


class Clock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger(tmp_path / "home" / "ledger.sqlite3", clock=clock) as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "greet 🐍.py"
    path.write_bytes(BASE)
    return path


def proposal(path: Path | None, base: bytes = BASE, *changes: tuple[int, int, str], key: str = "key") -> Proposal:
    """A proposal whose edits replace lines; by default two hunks of BASE."""
    before = Source.from_bytes(base, "m.py")
    wanted = changes or ((7, 7, "\t\treturn name.strip()"), (12, 12, "\treturn f'🐍 {name}'"))
    edits = [Edit("m.py", "replace", i, j, before.text_between(i, j), new) for i, j, new in wanted]
    return Proposal(
        key=key,
        path=path,
        scope="greet",
        scope_kind="function",
        start_line=4,
        end_line=8,
        base=base,
        patched=apply_edits(before, edits).to_bytes(),
        edits=tuple(edits),
        surface="cli",
        intent="strip the name 🐍",
        feedback={"hint": "short"},
        settings={"max_new_tokens": 192},
        gates=[{"gate": "parses", "ok": True}],
        timings={"patch_s": 1.5},
    )


def patched(base: bytes = BASE) -> bytes:
    made = proposal(None, base).patched
    assert made is not None
    return made


# Recording and finding


def test_a_proposal_is_read_back_as_it_was(ledger: Ledger, file: Path) -> None:
    made = proposal(file)
    entry = ledger.get(ledger.propose(made))
    assert entry.proposal == replace(made, imports=[], gates=[{"gate": "parses", "ok": True}], repairs=[])
    assert entry.proposal.base == BASE
    assert (entry.state, entry.label, entry.created_at) == (
        State.PROPOSED,
        Label.UNREVIEWED,
        "2026-01-01T00:00:00.000000Z",
    )


def test_the_ledger_is_read_page_by_page_and_a_filter_looks_at_all_of_it(ledger: Ledger, file: Path) -> None:
    ids = [ledger.propose(replace(proposal(file, key=str(number)), intent=f"wish {number}")) for number in range(250)]
    pages = [ledger.list_proposals(limit=100)]
    while pages[-1]:
        pages.append(ledger.list_proposals(limit=100, before=pages[-1][-1].id))
    assert [len(page) for page in pages] == [100, 100, 50, 0]
    assert sorted(summary.id for page in pages for summary in page) == sorted(ids)
    found = ledger.list_proposals(limit=2, is_wanted=lambda summary: summary.intent.endswith("7"))
    assert [summary.intent for summary in found] == ["wish 247", "wish 237"]
    (oldest,) = ledger.list_proposals(is_wanted=lambda summary: summary.intent == "wish 0")
    assert oldest.id == ids[0]


def test_a_refusal_is_recorded_with_its_error_and_cannot_be_applied(ledger: Ledger, file: Path) -> None:
    refused = replace(
        proposal(file), outcome="refused", patched=None, edits=(), error={"code": "gate", "message": "does not parse"}
    )
    patch_id = ledger.propose(refused)
    assert ledger.get(patch_id).state is State.REFUSED
    assert ledger.list_proposals()[0].error == "does not parse"
    for refuse in (ledger.apply, ledger.accept, ledger.reject, ledger.rollback, ledger.redo):
        with pytest.raises(UsageError, match="refused"):
            refuse(patch_id)


def test_edits_that_do_not_give_the_patched_text_are_not_recorded(ledger: Ledger, file: Path) -> None:
    with pytest.raises(UsageError, match="do not turn its text into the patched text"):
        ledger.propose(replace(proposal(file), patched=BASE + b"# more"))
    assert ledger.list_proposals() == []


def test_an_id_is_found_by_a_prefix_that_no_other_has(ledger: Ledger, file: Path, clock: Clock) -> None:
    first = ledger.propose(proposal(file))
    clock.now += timedelta(days=400)
    second = ledger.propose(proposal(file))
    common = "".join(one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=True)))
    assert ledger.get(first[: len(common) + 1]).id == first
    assert ledger.get(second[2:].upper()).id == second
    with pytest.raises(UsageError, match="begin with") as caught:
        ledger.get(common)
    assert first in caught.value.hint and second in caught.value.hint


@pytest.mark.parametrize("wrong", ["", "p_", "p_nothing", "%", "p_'; --", "🐍"])
def test_an_unknown_id_names_the_latest_ones(ledger: Ledger, file: Path, wrong: str) -> None:
    patch_id = ledger.propose(proposal(file))
    with pytest.raises(UsageError, match="There is no patch") as caught:
        ledger.get(wrong)
    assert caught.value.hint == f"The latest are {patch_id}."


def test_ids_sort_by_time_within_one_moment(ledger: Ledger, file: Path) -> None:
    ids = [ledger.propose(proposal(file)) for _ in range(20)]
    assert ids == sorted(set(ids))
    assert [line.id for line in ledger.list_proposals(limit=3)] == ids[:-4:-1]


def test_equal_requests_have_equal_keys_and_any_difference_another() -> None:
    request: dict[str, Any] = {
        "scope_text": "def f(): pass",
        "context": "import os",
        "intent": "i",
        "plan_text": "p",
        "feedback": {"hint": "h", "reason": "r"},
        "preset": "",
        "model_digest": "m",
        "adapter_digest": "__none__",
        "edit_format": "rewrite",
        "prompt_version": "1",
        "settings": {"a": 1, "b": 2},
    }

    def key_with(**changes: Any) -> str:
        changed: dict[str, Any] = {**request, **changes}
        return request_key(**changed)

    key = key_with()
    assert key == key_with(settings={"b": 2, "a": 1})
    others = {
        key_with(**{name: {"x": "y"} if isinstance(value, dict) else value + "."}) for name, value in request.items()
    }
    assert len(others | {key}) == len(request) + 1
    assert len(key) == 64


def test_an_identical_request_returns_the_same_proposal_until_it_is_unwanted(ledger: Ledger, file: Path) -> None:
    first = ledger.propose(proposal(file))
    assert getattr(ledger.find("key"), "id", None) == first
    ledger.apply(first)
    assert getattr(ledger.find("key"), "id", None) == first
    ledger.rollback(first)
    assert ledger.find("key") is None
    ledger.redo(first)
    assert getattr(ledger.find("key"), "id", None) == first
    ledger.reject(first)
    assert ledger.find("key") is None
    assert ledger.find("another key") is None


def test_a_result_that_was_rejected_is_not_returned_under_another_id(ledger: Ledger, file: Path) -> None:
    ledger.propose(proposal(file))
    ledger.reject(ledger.propose(proposal(file)))
    assert ledger.find("key") is None
    other = ledger.propose(proposal(file, BASE, (7, 7, "\t\treturn 'other'")))
    assert getattr(ledger.find("key"), "id", None) == other


def test_a_refused_request_is_not_returned(ledger: Ledger, file: Path) -> None:
    ledger.propose(replace(proposal(file), outcome="refused", patched=None, edits=(), error={"message": "no"}))
    assert ledger.find("key") is None


def test_equal_scopes_in_other_files_or_texts_are_told_apart(ledger: Ledger, file: Path, tmp_path: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    assert getattr(ledger.find("key", path=file, base_sha256=sha256_hex(BASE)), "id", None) == patch_id
    assert ledger.find("key", path=tmp_path / "other.py") is None
    assert ledger.find("key", path=file, base_sha256=sha256_hex(b"")) is None


def test_proposals_are_listed_by_file_state_and_time(ledger: Ledger, file: Path, tmp_path: Path, clock: Clock) -> None:
    first = ledger.propose(proposal(file))
    clock.now += timedelta(hours=1)
    second = ledger.propose(proposal(tmp_path / "other.py"))
    ledger.accept(second)
    link = tmp_path / "folder" / ".." / file.name
    assert [line.id for line in ledger.list_proposals()] == [second, first]
    assert [line.id for line in ledger.list_proposals(path=link)] == [first]
    assert [line.id for line in ledger.list_proposals(state=State.ACCEPTED)] == [second]
    assert [line.id for line in ledger.list_proposals(since=clock.now)] == [second]
    assert ledger.list_proposals(limit=0) == []
    assert json.loads(json.dumps(ledger.list_proposals()[0].to_json()))["state"] == "accepted"


def test_a_plan_is_read_back_with_its_source(ledger: Ledger, file: Path) -> None:
    plan = PlanRecord(
        file, "greet", "function", 4, 8, BASE, ("1. strip 🐍", "2. test"), "strip", True, "model", {"s": 1}
    )
    plan_id = ledger.add_plan(plan)
    assert ledger.get_plan(plan_id) == replace(plan, id=plan_id, created_at="2026-01-01T00:00:00.000000Z")
    with pytest.raises(UsageError, match="There is no plan 'pl_x'"):
        ledger.get_plan("pl_x")


def test_the_export_is_one_json_object_a_line(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id, [1])
    ledger.label(patch_id, "accepted", reason="kept", final_text=BASE)
    stream = io.StringIO()
    assert ledger.export(stream) == 1
    (line,) = stream.getvalue().splitlines()
    row = json.loads(line)
    assert (row["id"], row["state"], row["label"], row["hunks"]) == (patch_id, "applied", "accepted", [1])
    assert row["base"].encode() == BASE == row["final_text"].encode()
    assert row["patched"].encode() == patched()
    assert [event["kind"] for event in row["events"]] == ["proposed", "applying", "applied", "label"]
    with pytest.raises(UsageError, match="'csv'"):
        ledger.export(stream, fmt="csv")


@pytest.mark.parametrize(
    ("field", "value"), [("intent", "lone \ud800"), ("settings", {"a": float("nan")}), ("timings", {"a": object()})]
)
def test_a_value_that_cannot_be_stored_is_named(ledger: Ledger, file: Path, field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        ledger.propose(replace(proposal(file), **{field: value}))
    assert ledger.list_proposals() == []


# Files


def test_apply_roll_back_and_redo_give_exact_bytes_any_number_of_times(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    assert ledger.apply(patch_id).sha256 == sha256_hex(patched())
    for _ in range(3):
        assert file.read_bytes() == patched()
        ledger.rollback(patch_id)
        assert file.read_bytes() == BASE
        assert ledger.get(patch_id).state is State.ROLLED_BACK
        ledger.redo(patch_id)
    assert file.read_bytes() == patched()
    assert ledger.get(patch_id).state is State.APPLIED


def test_only_the_hunks_that_were_applied_are_rolled_back(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id, [1])
    with_second = BASE.replace("\treturn '🐍' + name".encode(), "\treturn f'🐍 {name}'".encode())
    assert file.read_bytes() == with_second
    assert ledger.get(patch_id).standing.hunks == (1,)
    file.write_bytes(with_second.replace(b"\t\treturn name\r\n", b"\t\treturn name.strip()\r\n"))
    ledger.rollback(patch_id)
    assert file.read_bytes() == BASE.replace(b"\t\treturn name\r\n", b"\t\treturn name.strip()\r\n")


@pytest.mark.parametrize("hunks", [[], [2], [-1], [0, 5]])
def test_hunks_that_do_not_exist_are_refused(ledger: Ledger, file: Path, hunks: list[int]) -> None:
    patch_id = ledger.propose(proposal(file))
    with pytest.raises(UsageError, match="has no hunks"):
        ledger.apply(patch_id, hunks)
    assert file.read_bytes() == BASE


def test_a_stale_text_is_refused_and_nothing_is_recorded(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    file.write_bytes(BASE + b"\r\n")
    with pytest.raises(StaleTextError, match="changed since"):
        ledger.apply(patch_id)
    assert file.read_bytes() == BASE + b"\r\n"
    assert [event.kind for event in ledger.get(patch_id).events] == ["proposed"]


def test_a_roll_back_after_restart_keeps_edits_elsewhere(tmp_path: Path, file: Path) -> None:
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        patch_id = ledger.propose(proposal(file))
        ledger.apply(patch_id)
    elsewhere = ((b"import os\r\n", b"import os\r\nimport re\r\n"), (b"def other(name)", b"def another(name)"))
    now, expected = patched(), BASE
    for old, new in elsewhere:
        now, expected = now.replace(old, new), expected.replace(old, new)
    file.write_bytes(now)
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        ledger.rollback(patch_id)
        assert file.read_bytes() == expected
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        ledger.redo(patch_id)
        assert file.read_bytes() == now


def test_an_edit_inside_a_hunk_refuses_the_whole_roll_back(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    now = patched().replace(b"name.strip()", b"name.lstrip()")
    file.write_bytes(now)
    with pytest.raises(StaleTextError) as caught:
        ledger.rollback(patch_id)
    assert file.read_bytes() == now
    assert [(hunk["hunk"], hunk["found"]) for hunk in caught.value.details["hunks"]] == [(0, False), (1, True)]
    assert "\t\treturn name.lstrip()\n" in caught.value.details["hunks"][0]["view"]
    assert ledger.get(patch_id).state is State.APPLIED


def test_a_later_patch_on_the_same_lines_is_rolled_back_first(ledger: Ledger, file: Path) -> None:
    first = ledger.propose(proposal(file))
    ledger.apply(first)
    second = ledger.propose(proposal(file, patched(), (7, 7, "\t\treturn 'second'")))
    ledger.apply(second)
    assert getattr(ledger.last_applied(file), "id", None) == second
    with pytest.raises(StaleTextError) as caught:
        ledger.rollback(first)
    assert second in caught.value.hint
    ledger.rollback(second)
    assert getattr(ledger.last_applied(file), "id", None) == first
    assert getattr(ledger.last_rolled_back(file), "id", None) == second
    ledger.rollback(first)
    assert file.read_bytes() == BASE
    assert ledger.last_applied(file) is None


def test_a_patch_made_on_top_of_others_is_redone_after_them(ledger: Ledger, file: Path) -> None:
    """Each hunk was called edited, and nothing said that an earlier patch was missing below it."""
    first = ledger.propose(proposal(file))
    ledger.apply(first)
    beside = ledger.propose(proposal(file, patched(), (1, 1, "import re")))
    ledger.apply(beside)
    never = ledger.propose(proposal(file, file.read_bytes(), (2, 2, "import json")))
    second = ledger.propose(proposal(file, file.read_bytes(), (7, 7, "\t\treturn 'second'")))
    ledger.apply(second)
    on_top = file.read_bytes()
    for patch_id in (second, beside, first):
        ledger.rollback(patch_id)
    assert file.read_bytes() == BASE
    with pytest.raises(StaleTextError) as caught:
        ledger.redo(second)
    assert caught.value.hint == (
        f"This patch was made on top of {first}, {beside}: redo them first, in this order, or change the lines by hand."
    )
    ledger.redo(beside)
    with pytest.raises(StaleTextError) as caught:
        ledger.redo(second)
    assert caught.value.hint.startswith(f"This patch was made on top of {first}: redo it first, or")
    for patch_id in (first, second):
        ledger.redo(patch_id)
    assert file.read_bytes() == on_top
    assert ledger.get(never).state is State.PROPOSED


def test_a_patch_that_was_taken_out_or_put_in_by_other_means_is_recorded_so(ledger: Ledger, file: Path) -> None:
    """It could be neither rolled back (edited inside) nor applied (is in its file already) nor redone (is applied)."""
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    file.write_bytes(BASE.replace(b"import os", b"import re"))
    for step, state, word in ((ledger.rollback, State.ROLLED_BACK, "without"), (ledger.redo, State.APPLIED, "with")):
        now = file.read_bytes()
        done = step(patch_id)
        assert (done.was_so_already, done.sha256, file.read_bytes()) == (True, sha256_hex(now), now)
        assert done.warnings == [f"{file} was {word} the patch already; nothing was written"]
        assert ledger.get(patch_id).state is state
        file.write_bytes(patched())
    ledger.rollback(patch_id)
    assert file.read_bytes() == BASE


@pytest.mark.parametrize("again", ["apply", "redo"])
def test_a_patch_that_was_taken_out_by_hand_is_put_in_again(ledger: Ledger, file: Path, again: str) -> None:
    """apply said "is in its file already" without looking, and redo "was not rolled back: it is applied"."""
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    file.write_bytes(BASE)
    getattr(ledger, again)(patch_id)
    assert file.read_bytes() == patched()
    kinds = [event.kind for event in ledger.get(patch_id).events]
    assert kinds[-3:] == ["rolled_back", "applying", "applied" if again == "apply" else "redone"]


def test_apply_looks_whether_an_applied_patch_is_still_in_its_file(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    file.write_bytes(patched() + b"\r\nmore = 1")
    with pytest.raises(UsageError, match="is in its file already: it is applied"):
        ledger.apply(patch_id)
    file.write_bytes(BASE + b"\r\nmore = 1")
    with pytest.raises(UsageError, match=r"is recorded as applied, but .* does not hold its lines") as caught:
        ledger.apply(patch_id)
    assert f"planpatch ledger rollback {patch_id} records that" in caught.value.hint
    ledger.rollback(patch_id)
    ledger.redo(patch_id)
    assert file.read_bytes() == patched() + b"\r\nmore = 1"


def test_half_a_patch_taken_out_by_hand_is_still_an_edit(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    half = patched().replace(b"name.strip()", b"name")
    file.write_bytes(half)
    with pytest.raises(StaleTextError):
        ledger.rollback(patch_id)
    assert (file.read_bytes(), ledger.get(patch_id).state) == (half, State.APPLIED)


def test_a_later_patch_that_undoes_an_earlier_one_is_not_taken_for_its_roll_back(ledger: Ledger, file: Path) -> None:
    first = ledger.propose(proposal(file, BASE, (7, 7, "\t\treturn 1")))
    ledger.apply(first)
    second = ledger.propose(proposal(file, file.read_bytes(), (7, 7, "\t\treturn name")))
    ledger.apply(second)
    assert file.read_bytes() == BASE
    with pytest.raises(StaleTextError, match="was edited inside") as caught:
        ledger.rollback(first)
    assert (second in caught.value.hint, ledger.get(first).state) == (True, State.APPLIED)
    for again in (ledger.apply, ledger.redo):
        with pytest.raises(UsageError):
            again(first)
    assert (file.read_bytes(), ledger.get(first).state) == (BASE, State.APPLIED)


@pytest.mark.parametrize("edited", [b"return name.strip(1)", b"return name.strip()\r\n\t\tpass"])
def test_inserted_lines_that_were_edited_are_not_taken_for_gone(ledger: Ledger, file: Path, edited: bytes) -> None:
    """Between two lines of before there is something now: the gap is not as it was."""
    new = "\t\treturn name.strip()\n\t\tpass\n\t\treturn name"
    patch_id = ledger.propose(proposal(file, BASE, (7, 7, new)))
    ledger.apply(patch_id)
    now = file.read_bytes().replace(b"return name.strip()\r\n\t\tpass", edited + b"  # mine")
    file.write_bytes(now)
    with pytest.raises(StaleTextError):
        ledger.rollback(patch_id)
    assert (file.read_bytes(), ledger.get(patch_id).state) == (now, State.APPLIED)


def test_pasted_code_has_no_file_to_write(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="pasted code"):
        ledger.apply(ledger.propose(proposal(None)))


def test_a_missing_file_is_named(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    file.unlink()
    with pytest.raises(PathError, match=f"the file of {patch_id}, does not exist any more") as caught:
        ledger.apply(patch_id)
    assert caught.value.hint == (
        f"Put it back; planpatch ledger show {patch_id} --json has its `base` and `patched` text."
    )


@pytest.mark.skipif(sys.platform == "win32", reason="mode bits are POSIX's")
def test_a_read_only_file_is_left_alone_and_the_failure_is_recorded(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    file.chmod(0o444)
    with pytest.raises(WriteError, match="read-only"):
        ledger.apply(patch_id)
    assert file.read_bytes() == BASE
    events = ledger.get(patch_id).events
    assert [event.kind for event in events] == ["proposed", "applying", "apply_failed"]
    assert "is read-only" in events[-1].data["reason"]
    assert ledger.get(patch_id).state is State.PROPOSED


def test_roll_back_and_redo_need_the_right_state(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    with pytest.raises(UsageError, match="is not applied: it is proposed"):
        ledger.rollback(patch_id)
    with pytest.raises(UsageError, match="was not rolled back: it is proposed"):
        ledger.redo(patch_id)
    ledger.apply(patch_id)
    with pytest.raises(UsageError, match="was not rolled back: it is applied"):
        ledger.redo(patch_id)


def test_an_editor_gets_edits_instead_of_a_written_file(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.record(patch_id, "applied", hunks=[0])
    buffer = Source.from_text(ledger.get(patch_id).applied_text([0]).text + "\n# more", "m.py")
    back = ledger.plan_rollback(patch_id, buffer)
    assert [(edit.action, edit.start_line, edit.new) for edit in back] == [("replace", 7, "\t\treturn name")]
    ledger.record(patch_id, "rolled_back")
    again = ledger.plan_redo(patch_id, apply_edits(buffer, back))
    assert [(edit.action, edit.start_line, edit.new) for edit in again] == [("replace", 7, "\t\treturn name.strip()")]
    assert ledger.get(patch_id).state is State.ROLLED_BACK
    assert file.read_bytes() == BASE


# Recovery


def interrupted(ledger: Ledger, patch_id: str, operation: str, before: bytes, after: bytes, path: Path) -> None:
    """Record the beginning of a write, as a process does that is killed right afterwards."""
    facts = {
        "operation": operation,
        "hunks": [0, 1],
        "path": str(path),
        "from_sha256": sha256_hex(before),
        "to_sha256": sha256_hex(after),
    }
    with sqlite3.connect(ledger.path) as connection:
        connection.execute(
            "INSERT INTO events (patch_id, at, kind, data) VALUES (?, ?, 'applying', ?)",
            (patch_id, "2026-01-01T00:00:00.000000Z", json.dumps(facts)),
        )
    connection.close()


@pytest.mark.parametrize(
    ("text_found", "state"),
    [
        (patched(), State.APPLIED),
        (BASE, State.PROPOSED),
        (patched().replace(b"import os", b"import re"), State.APPLIED),
        (BASE.replace(b"import os", b"import re"), State.PROPOSED),
        (b"something else", State.DIVERGED),
        (None, State.PROPOSED),
    ],
    ids=["written", "not written", "written and edited", "not written and edited", "neither", "removed"],
)
def test_an_interrupted_apply_is_settled_by_what_the_file_has(
    ledger: Ledger, file: Path, text_found: bytes | None, state: State
) -> None:
    patch_id = ledger.propose(proposal(file))
    interrupted(ledger, patch_id, "apply", BASE, patched(), file)
    file.unlink() if text_found is None else file.write_bytes(text_found)
    with Ledger(ledger.path) as reopened:
        assert reopened.get(patch_id).state is state
        assert reopened.get(patch_id).events[-1].data["reason"] == "the process ended before this was recorded"
        settled = len(reopened.get(patch_id).events)
    with Ledger(ledger.path) as again:
        assert len(again.get(patch_id).events) == settled


@pytest.mark.parametrize(("text_found", "state"), [(BASE, State.ROLLED_BACK), (patched(), State.APPLIED)])
def test_an_interrupted_roll_back_is_settled_without_reopening(
    ledger: Ledger, file: Path, text_found: bytes, state: State
) -> None:
    patch_id = ledger.propose(proposal(file))
    ledger.apply(patch_id)
    interrupted(ledger, patch_id, "rollback", patched(), BASE, file)
    file.write_bytes(text_found)
    assert ledger.list_proposals()[0].state is state


def test_a_write_of_a_living_process_is_not_settled_by_a_reader(ledger: Ledger, file: Path) -> None:
    patch_id = ledger.propose(proposal(file))
    with FileLock(ledger.path.with_name("ledger.sqlite3.lock")):
        interrupted(ledger, patch_id, "apply", BASE, patched(), file)
        with Ledger(ledger.path, lock_timeout_s=0.05) as reader:
            assert [event.kind for event in reader.get(patch_id).events] == ["proposed", "applying"]
            with pytest.raises(LedgerError, match=r"has held .*ledger\.sqlite3\.lock for 0\.05 s"):
                reader.apply(patch_id)
    assert ledger.get(patch_id).events[-1].kind == "apply_failed"


# Verdicts


def verdicts(ledger: Ledger, file: Path, *steps: str) -> tuple[str, str]:
    patch_id = ledger.propose(proposal(file))
    for step in steps:
        if step.startswith("label "):
            ledger.label(patch_id, "accepted" if step == "label accepted" else "rejected", reason="kept")
        elif step == "diverged":
            ledger.record(patch_id, "diverged")
        else:
            getattr(ledger, step)(patch_id)
    entry = ledger.get(patch_id)
    return entry.state.value, entry.label.value


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), ("proposed", "unreviewed")),
        (("apply",), ("applied", "unreviewed")),
        (("apply", "accept"), ("accepted", "accepted")),
        (("apply", "accept", "reject"), ("rejected", "rejected")),
        (("apply", "reject", "rollback"), ("rolled_back", "rolled_back")),
        (("apply", "accept", "rollback"), ("rolled_back", "rolled_back")),
        (("apply", "rollback", "redo"), ("applied", "unreviewed")),
        (("apply", "label accepted"), ("applied", "accepted")),
        (("apply", "label accepted", "label rejected"), ("applied", "rejected")),
        (("apply", "reject", "label accepted"), ("rejected", "rejected")),
        (("apply", "rollback", "redo", "label accepted"), ("applied", "accepted")),
        (("diverged",), ("diverged", "unreviewed")),
        (("diverged", "label accepted"), ("diverged", "unreviewed")),
        (("diverged", "reject"), ("rejected", "rejected")),
        (("accept",), ("accepted", "accepted")),
    ],
)
def test_the_strongest_verdict_wins(
    ledger: Ledger, file: Path, steps: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert verdicts(ledger, file, *steps) == expected


@pytest.mark.parametrize("steps", [("diverged", "accept"), ("apply", "rollback", "accept"), ("reject", "apply")])
def test_a_verdict_that_the_state_does_not_allow_is_refused(ledger: Ledger, file: Path, steps: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        verdicts(ledger, file, *steps)


# Retention


def test_what_is_older_than_its_days_is_removed_with_its_texts(ledger: Ledger, file: Path, clock: Clock) -> None:
    ledger.propose(proposal(file))
    ledger.add_plan(PlanRecord(file, "greet", "function", 4, 8, b"old plan", ("x",)))
    clock.now += timedelta(days=29)
    kept = ledger.propose(proposal(file, b"a = 1\n", (1, 1, "a = 2")))
    clock.now += timedelta(days=2)
    pruned = ledger.prune(max_age_days=30)
    assert (pruned.num_proposals, pruned.num_plans) == (1, 1)
    assert [line.id for line in ledger.list_proposals()] == [kept]
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("SELECT count(*) FROM texts").fetchone() == (2,)
    connection.close()


def test_age_counts_from_the_last_event(ledger: Ledger, file: Path, clock: Clock) -> None:
    patch_id = ledger.propose(proposal(file))
    clock.now += timedelta(days=29)
    ledger.apply(patch_id)
    clock.now += timedelta(days=29)
    assert ledger.prune(max_age_days=30).num_proposals == 0
    ledger.rollback(patch_id)
    assert file.read_bytes() == BASE


def test_to_make_room_the_oldest_go_first_and_applied_ones_last(ledger: Ledger, file: Path) -> None:
    applied = ledger.propose(proposal(file))
    ledger.apply(applied)
    others = [
        ledger.propose(proposal(file, b"a = 1\n" + os.urandom(30_000).hex().encode() + b"\n", (1, 1, "a = 2")))
        for _ in range(10)
    ]
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    size = ledger.path.stat().st_size
    pruned = ledger.prune(max_bytes=400_000)
    left = [line.id for line in ledger.list_proposals()]
    assert pruned.used_bytes <= 400_000 < size
    assert applied in left
    assert left[:-1] == others[::-1][: len(left) - 1] != []
    assert ledger.path.stat().st_size < size
    assert ledger.prune(max_bytes=0).num_proposals == len(left)
    assert ledger.problems() == []


# The file


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET kind = 'accepted'",
        "DELETE FROM events",
        "UPDATE proposals SET intent = ''",
        "DELETE FROM proposals",
        "UPDATE texts SET zlib = x''",
        "DELETE FROM texts",
        "DELETE FROM plans",
        "INSERT OR REPLACE INTO events SELECT 1, patch_id, at, 'label', '{}', NULL FROM events",
        "INSERT OR REPLACE INTO texts SELECT sha256, 0, x'' FROM texts",
    ],
)
def test_rows_cannot_be_changed_by_sql(ledger: Ledger, file: Path, statement: str) -> None:
    ledger.propose(proposal(file))
    ledger.add_plan(PlanRecord(file, "greet", "function", 4, 8, BASE, ("x",)))
    connection = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.Error, match=r"append-only|no such function: planpatch_retention"):
        connection.execute(statement)
    connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="mode bits are POSIX's")
def test_only_the_owner_may_read_the_ledger(ledger: Ledger, file: Path) -> None:
    ledger.apply(ledger.propose(proposal(file)))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in ledger.path.parent.iterdir()}
    assert modes == {
        "ledger.sqlite3": 0o600,
        "ledger.sqlite3-wal": 0o600,
        "ledger.sqlite3-shm": 0o600,
        "ledger.sqlite3.lock": 0o600,
    }
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(sys.platform == "win32", reason="mode bits are POSIX's")
def test_a_ledger_that_others_may_read_is_closed_to_them(ledger: Ledger) -> None:
    ledger.path.chmod(0o644)
    with Ledger(ledger.path):
        assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_a_ledger_of_a_newer_version_says_to_upgrade(ledger: Ledger) -> None:
    with sqlite3.connect(ledger.path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(LedgerError, match="newer PlanPatch") as caught:
        Ledger(ledger.path)
    assert caught.value.hint.startswith("Upgrade PlanPatch")


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="another program"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named_and_can_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"this is no database, but somebody's notes \xf0\x9f\x90\x8d" * 99)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite3 is damaged or not a ledger") as caught:
        Ledger(path)
    assert "rename" in caught.value.hint
    (kept,) = set_aside(path)
    assert kept.read_bytes().startswith(b"this is no database")
    Ledger(path).close()


def test_a_damaged_page_is_an_error_of_the_ledger(ledger: Ledger, file: Path) -> None:
    for i in range(50):
        ledger.propose(proposal(file, b"a = 1\n" + os.urandom(999).hex().encode(), (1, 1, f"a = {i}")))
    ledger.close()
    data = bytearray(ledger.path.read_bytes())
    data[8192:60_000] = os.urandom(60_000 - 8192)
    ledger.path.write_bytes(data)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite3"), Ledger(ledger.path) as opened:
        opened.list_proposals()
        list(opened.entries())


@pytest.mark.parametrize("blocked", ["a folder is there", "its folder is a file"])
def test_a_place_that_cannot_hold_a_ledger_is_named(tmp_path: Path, blocked: str) -> None:
    path = tmp_path / "home" / "ledger.sqlite3"
    if blocked == "a folder is there":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("a file")
    with pytest.raises(LedgerError, match="home") as caught:
        Ledger(path)
    assert "PLANPATCH_HOME" in caught.value.hint


def test_threads_share_one_ledger(ledger: Ledger, file: Path) -> None:
    ids: list[str] = []

    def work() -> None:
        for _ in range(25):
            patch_id = ledger.propose(proposal(file))
            ledger.accept(patch_id)
            ids.append(patch_id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 100
    assert {line.state for line in ledger.list_proposals(limit=None)} == {State.ACCEPTED}
    assert ledger.problems() == []
