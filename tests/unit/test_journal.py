"""The journal has every kept edit once, with the very prompt of the model, and no secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from engine.errors import LedgerError
from engine.patching.ledger import Ledger, Surface
from engine.patching.patcher import PatcherOptions
from engine.patching.prompts import Feedback
from lsp_server.log_masking import mask_log
from lsp_server.settings import opts_out
from tests.learning import accepted, keep, propose
from tests.secret_samples import plant
from tests.unit.test_survival import ANSWER, PATCHED, TEXT, Desk, at_desk
from training.consent import Consent, LogSwitch
from training.dataset import Options, build
from training.journal import Journaled, bring_up_to_date
from training.journal_file import JournalFile

BITS = (
    '\ufeff"""Bits \U0001f40d."""\r\nimport os\r\n\r\n\x0c\r\nclass Bits:\r\n\t@cache  # for a day\r\n'
    '\tdef ones(self, n):\r\n\t\t"""Count ```ones```."""\r\n'
    "\t\tdef bit():\r\n\t\t\treturn n & 1\r\n\t\treturn bit()\r\n\r\n\r\n"
    "def zeros(n):\r\n\t# pp: count them\r\n\treturn 0"
)
NEW_ONES = (
    '\t@cache  # for a day\n\tdef ones(self, n):\n\t\t"""Count ```ones```."""\n\t\tdef bit():\n\t\t\treturn n & 1\n'
    "\t\treturn n.bit_count()\n"
)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


class Home:
    """A ledger, a journal and a folder of code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.code = folder / "code"
        self.code.mkdir(parents=True)
        self.ledger = Ledger(folder / "home" / "ledger.sqlite3", clock=self.clock)
        self.journal = JournalFile(folder / "home" / "training" / "success_logs")
        self.switch = LogSwitch(folder / "home" / "training" / "log.json", clock=self.clock)

    def update(self, **changes: Any) -> Journaled:
        consent = Consent(self.switch, opted_out=opts_out)
        return bring_up_to_date(self.journal, self.ledger, replace(consent, **changes))

    def records(self, kind: str = "edit") -> list[dict[str, Any]]:
        return [record for record in self.journal.records() if record["kind"] == kind]

    def bytes_written(self) -> bytes:
        root = self.folder / "home" / "training"
        return b"".join(file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file())

    def file(self, name: str, text: str) -> Path:
        path = self.code / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    made.ledger.close()


def asked(record: dict[str, Any]) -> str:
    """A record's prompt as the scripted engine shows it."""
    turns = "".join(f"<{message['role']}>{message['content']}\n" for message in record["messages"])
    return f"{turns}<assistant>{record['prefill']}"


# --- what a record holds ---------------------------------------------------------------------------------------------


def test_a_record_holds_the_very_prompt_and_an_answer_that_gives_the_kept_text(home: Home) -> None:
    file = home.file("bits \U0001f40d.py", BITS)
    method = propose(
        home.ledger,
        file,
        "Bits.ones",
        NEW_ONES,
        "Count all ones.",
        options=PatcherOptions(surroundings_chars=90, style="Be brief."),
        plan="use bit_count",
        feedback=Feedback("it counted one bit", "count all"),
    )
    keep(home.ledger, method)
    assert home.update().num_written == {"edit": 1}
    (record,) = home.records()
    assert asked(record) == method.prompt
    assert record["is_same_prompt"] and record["is_exact"]
    assert record["answer"] == f"{NEW_ONES}````"
    assert (record["base"], record["final"]) == (BITS, BITS.replace("return bit()", "return n.bit_count()"))
    assert (record["intent"], record["plan"]) == ("Count all ones.", "use bit_count")
    assert record["feedback"] == {"reason": "it counted one bit", "hint": "count all"}
    assert record["path"] == str(file)
    assert record["model"] == "scripted" and record["adapter_digest"] == "__none__"
    assert all(gate["ok"] for gate in record["gates"])
    assert record["created_at"] < record["applied_at"] < record["kept_at"]


def test_directives_module_scope_and_new_imports_are_learnt_as_they_were_asked(home: Home) -> None:
    file = home.file("bits.py", BITS)
    directive = propose(
        home.ledger, file, "zeros", "def zeros(n):\n\treturn math.prod([n])\n", "count them", drop_directives=True
    )
    keep(home.ledger, directive)
    whole = home.file("whole.py", "a = 1\n\ndef f():\n    return a\n")
    module = propose(home.ledger, whole, None, "a = 2\n\ndef f():\n    return a\n", "two")
    keep(home.ledger, module)
    assert home.update().num_written == {"edit": 2}
    first, second = home.records()
    assert asked(first) == directive.prompt and "pp:" not in directive.prompt
    assert asked(second) == module.prompt
    assert first["is_same_prompt"] and first["is_exact"] and "import math" in first["final"]
    assert second["is_same_prompt"] and second["is_exact"]


def test_a_prompt_with_another_key_is_not_taken_for_the_same(home: Home) -> None:
    file = home.file("bits.py", BITS)
    made = propose(home.ledger, file, "Bits.ones", NEW_ONES)
    entry = home.ledger.get(made.patch.id)
    other = home.ledger.propose(replace(entry.proposal, key="another"))
    home.ledger.apply(other)
    home.ledger.accept(other)
    home.update()
    assert [record["is_same_prompt"] for record in home.records()] == [False]


def test_what_the_user_made_of_a_patch_is_learnt_and_preferred_to_it(home: Home) -> None:
    file = home.file("m.py", "def f(a):\n    return a\n")
    made = propose(home.ledger, file, "f", "def f(a):\n    return a + 1\n")
    keep(home.ledger, made, "X = 1\n\n\ndef f(a):\n    return a + 2\n")
    home.update()
    (record,), (pair,) = home.records(), home.records("preference")
    assert record["final_is_users"] and record["answer"] == "def f(a):\n    return a + 2\n```"
    assert (pair["chosen"], pair["rejected"]) == (record["answer"], "def f(a):\n    return a + 1\n```")
    assert pair["why"] == "changed_by_user" and asked(pair) == made.prompt


def test_a_roll_back_is_kept_with_what_replaced_it(home: Home) -> None:
    file = home.file("m.py", "def f(a):\n    return a\n")
    worse = propose(home.ledger, file, "f", "def f(a):\n    return a + 1\n", "add two")
    home.ledger.apply(worse.patch.id)
    home.ledger.rollback(worse.patch.id)
    home.update()
    assert home.records() == home.records("preference") == []
    better = propose(home.ledger, file, "f", "def f(a):\n    return a + 2\n", "add two, not one")
    keep(home.ledger, better)
    home.update()
    home.update()
    (pair,) = home.records("preference")
    assert (pair["chosen"], pair["rejected"]) == (
        "def f(a):\n    return a + 2\n```",
        "def f(a):\n    return a + 1\n```",
    )
    assert (pair["rejected_id"], pair["chosen_id"]) == (worse.patch.id, better.patch.id)
    assert asked(pair) == worse.prompt
    assert len(home.records()) == 1


def test_an_edit_that_is_taken_back_later_is_withdrawn_and_comes_again(home: Home) -> None:
    name = accepted(home.ledger, home.code / "m.py", "def f(a):\n    return a\n", "def f(a):\n    return -a\n", "f")
    assert home.update().num_written == {"edit": 1}
    assert home.update().num_written == {}
    home.ledger.rollback(name)
    assert home.update().num_written == {"withdrawn": 1}
    assert home.records() == []
    home.ledger.redo(name)
    home.ledger.accept(name)
    assert home.update().num_written == {"edit": 1}
    assert [record["id"] for record in home.records()] == [name]


def test_only_what_is_kept_is_journaled(home: Home) -> None:
    file = home.file("m.py", "def f(a):\n    return a\n")
    surfaces: list[tuple[Surface, bool]] = [("cli", False), ("lsp", True), ("http", True), ("bench", False)]
    for surface, is_applied in surfaces:
        made = propose(home.ledger, file, "f", "def f(a):\n    return -a\n", options=PatcherOptions(surface=surface))
        if is_applied:
            home.ledger.record(made.patch.id, "applied")
    home.update()
    found = [(record["surface"], record["label"]) for record in home.records()]
    assert found == [("http", "unreviewed"), ("bench", "unreviewed")]


def test_a_torn_line_is_removed_and_its_edit_written_again(home: Home) -> None:
    accepted(home.ledger, home.code / "m.py", "def f(a):\n    return a\n", "def f(a):\n    return -a\n", "f")
    accepted(home.ledger, home.code / "n.py", "def g(a):\n    return a\n", "def g(a):\n    return -a\n", "g")
    home.update()
    before = home.records()
    (file,) = home.journal.files
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) - 400, data.index(b"\n") + 1, 7, 0):
        file.write_bytes(data[:length])
        home.update()
        assert home.records() == before
        assert file.read_bytes() == data


def test_an_edit_kept_in_an_editor_is_learnt_as_the_editor_asked_for_it(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.type(TEXT.replace("    # one", "    # pp: add one\n    # one"))
        await desk.bench.patch({"uri": desk.uri, "function": "f"})
        await desk.rest()
        assert desk.buffer.text == PATCHED
        desk.now += 601
        await desk.bench.labels.tick()

    desk = at_desk(tmp_path, story)
    journal = JournalFile(tmp_path / "training" / "success_logs")
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        bring_up_to_date(journal, ledger, Consent(LogSwitch(tmp_path / "training" / "log.json")))
    (record,) = journal.records()
    assert (record["label"], record["label_reason"]) == ("accepted", "kept for 10 minutes")
    assert asked(record) == desk.engine.prompts[0] and "pp:" not in asked(record)
    assert record["is_same_prompt"] and record["is_exact"]
    assert record["answer"] == f"{ANSWER}```"


# --- consent ---------------------------------------------------------------------------------------------------------


def edit(home: Home, name: str) -> str:
    return accepted(home.ledger, home.code / name, "def f(a):\n    return a\n", "def f(a):\n    return -a\n", "f")


def test_what_was_made_or_kept_while_the_log_was_off_stays_out_for_ever(home: Home) -> None:
    first = edit(home, "one.py")
    between = propose(home.ledger, home.file("two.py", "def f(a):\n    return a\n"), "f", "def f(a):\n    return -a\n")
    home.switch.turn(False)
    keep(home.ledger, between)
    edit(home, "three.py")
    home.switch.turn(True)
    home.switch.turn(True)
    last = edit(home, "four.py")
    assert home.switch.is_on
    assert home.update().num_left_out == {"log_off": 2}
    assert [record["id"] for record in home.records()] == [first, last]


def test_a_workspace_opts_out_for_its_files_alone_and_never_in(home: Home) -> None:
    (home.code / "private" / "package").mkdir(parents=True)
    home.file("private/pyproject.toml", "[tool.planpatch]\ntraining-log = false\n")
    home.file("private/package/pyproject.toml", "[tool.planpatch]\ntraining_log = true\n")
    home.file("damaged/pyproject.toml", "[tool.planpatch\n")
    home.file("other/pyproject.toml", "[tool.planpatch]\nstyle = 'x'\n")
    for folder in ("private", "private/package", "damaged", "other"):
        edit(home, f"{folder}/m.py")
    assert home.update().num_left_out == {"opted_out": 3}
    assert [Path(record["path"]).parent.name for record in home.records()] == ["other"]
    assert home.update(is_allowed=False).num_left_out == {"setting_off": 3}


def test_an_opt_out_that_held_when_the_edit_was_made_holds_for_ever(home: Home) -> None:
    file = home.file("m.py", "def f(a):\n    return a\n")
    made = propose(home.ledger, file, "f", "def f(a):\n    return -a\n", options=PatcherOptions(training_log=False))
    keep(home.ledger, made)
    assert home.update().num_left_out == {"opted_out": 1}


def test_a_damaged_switch_keeps_nothing_and_says_so(home: Home) -> None:
    edit(home, "m.py")
    home.switch.turn(False)
    (home.folder / "home" / "training" / "log.json").write_text("{", encoding="utf-8")
    with pytest.raises(LedgerError, match="damaged") as caught:
        home.update()
    assert "planpatch train log" in caught.value.hint
    assert home.records() == []


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_a_hundred_planted_secrets_are_in_no_file_that_is_learnt_from(home: Home, tmp_path: Path) -> None:
    planted = plant(num_each=10)
    assert len(planted) == 100 and len({one.kind for one in planted}) == 10
    for number, one in enumerate(planted):
        name = one.before.partition("def ")[2].partition("(")[0]
        file = home.file(f"m{number}.py", f"import os\n\n\n{one.before}")
        made = propose(
            home.ledger, file, name, one.after, f"{one.prose} ({number})", plan=one.prose,
            feedback=Feedback(one.prose, one.prose),
        )  # fmt: skip
        keep(home.ledger, made)
    assert home.update().num_written == {"edit": 100}
    built = build(home.journal.records(), tmp_path / "home" / "training" / "data", Options())
    assert built.num_train + built.num_val >= 20
    written = home.bytes_written().decode()
    unescaped = "\n".join(_texts(json.loads(line)) for line in written.splitlines() if line.startswith('{"'))
    missed = [one for one in planted for needle in one.needles if needle in written or needle in unescaped]
    assert missed == []
    assert all(record["masked"] and record["is_same_prompt"] for record in home.records())
    for record in home.records():
        compile(record["base"], "base", "exec")
        compile(record["final"], "final", "exec")


def _texts(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(_texts(inner) for inner in value.values())
    return "\n".join(map(_texts, value)) if isinstance(value, list) else str(value)


def test_what_is_logged_is_masked_with_its_traceback(tmp_path: Path) -> None:
    root, file = logging.getLogger(), tmp_path / "server.log"
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    others = list(root.handlers)
    root.handlers[:] = [handler]
    try:
        mask_log()
        planted = plant(num_each=3, seed=9)
        for one in planted:
            logging.getLogger("planpatch.test").error("cannot read %s", one.before)
            try:
                raise ValueError(one.prose)
            except ValueError:
                logging.getLogger("planpatch.test").exception("failed")
    finally:
        root.handlers[:] = others
        handler.close()
    text = file.read_text(encoding="utf-8")
    assert "Traceback" in text and text.count("<secret>") >= 60
    assert [one for one in planted if any(needle in text for needle in one.needles)] == []
