"""The journal and forgetting after real faults: processes killed at any moment, and two at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from engine.errors import LedgerError
from engine.patching.ledger import Forgettable, Label, Ledger
from tests.integration.learning_worker import consent_in, places_in
from tests.learning import accepted
from training.dataset import Options, build
from training.forget import forget, unfinished
from training.journal import bring_up_to_date
from training.journal_file import JournalFile

LONG = os.environ.get("PLANPATCH_LONG") == "1"
NUM_KILLS = 200 if LONG else 6
ROOT = Path(__file__).parents[2]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a worker and wait until it has the ledger open."""
    worker = subprocess.Popen(
        [sys.executable, "-X", "utf8", "-m", "tests.integration.learning_worker", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert worker.stdout is not None and worker.stderr is not None
    line = worker.stdout.readline()
    assert line == "ready\n", worker.stderr.read()
    return worker


def kill(worker: subprocess.Popen[str]) -> str:
    """End a worker like a power switch; what it said before."""
    worker.kill()
    out, errors = worker.communicate(timeout=60)
    assert errors == ""
    return out


def bytes_in(home: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(home.rglob("*")) if file.is_file()}


def test_a_process_killed_at_any_moment_loses_no_accepted_edit_and_doubles_none(
    tmp_path: Path, record_figure: Callable[[str, int, str], None]
) -> None:
    moments = random.Random(1)
    home, code = tmp_path / "home", tmp_path / "code"
    journal = JournalFile(home / "training" / "success_logs")
    told: list[str] = []
    for number in range(NUM_KILLS):
        worker = start("keep", home, code, number * 1_000)
        time.sleep(moments.uniform(0.1, 1.2))
        told += kill(worker).split()
    with Ledger(home / "ledger.sqlite3") as ledger:
        bring_up_to_date(journal, ledger, consent_in(home))
        in_ledger = [line.id for line in ledger.list_proposals(limit=None) if line.label is Label.ACCEPTED]
        assert ledger.problems() == []
    found = [json.loads(line) for file in journal.files for line in file.read_bytes().splitlines()]
    lines = [record["id"] for record in found if record["label"] == "accepted"]  # a kill may come before the accept
    assert len(found) == len({record["id"] for record in found})
    assert sorted(lines) == sorted(in_ledger)
    assert set(told) <= set(lines)
    record_figure("processes killed while they journaled", NUM_KILLS, "")
    record_figure("accepted edits, each in the journal once", len(lines), "")


def filled(home: Path, code: Path) -> Path:
    """A home with everything that forgetting has to find; the folder to be forgotten."""
    places = places_in(home)
    secret_folder = code / "zebra-folder"
    with Ledger(places.ledger) as ledger:
        for number in range(12):
            folder = secret_folder if number % 2 else code / "horse-folder"
            mark = "zebra" if number % 2 else "horse"
            text = f"def {mark}{number}(a):\n    {mark} = a + {number}\n    return {mark}\n"
            after = text.replace("    return", f"    {mark} += {number} * a\n    return")
            file = folder / f"{mark}{number}.py"
            accepted(ledger, file, text, after, f"{mark}{number}", f"change the {mark} {number} well")
        bring_up_to_date(JournalFile(places.journal), ledger, consent_in(home))
    build(JournalFile(places.journal).records(), places.data, Options())
    places.plans.mkdir()
    for mark in ("zebra", "horse"):
        facts = json.dumps({"path": str(code / f"{mark}-folder" / f"{mark}1.py"), "function": mark, "plan": ""})
        (places.plans / f"{mark[0]}.md").write_text(
            f"<!-- planpatch {facts} -->\n## Intent\n\n{mark}\n", encoding="utf-8"
        )
    (home / "server.log").write_text(f"kept\nopened {secret_folder / 'zebra1.py'}\nkept too\n", encoding="utf-8")
    return secret_folder


def test_what_was_forgotten_is_in_no_byte_under_the_home(tmp_path: Path) -> None:
    home, code = tmp_path / "home", tmp_path / "code"
    folder = filled(home, code)
    assert sum(b"zebra" in data for data in bytes_in(home).values()) >= 5
    with Ledger(home / "ledger.sqlite3") as ledger:
        done = forget(places_in(home), ledger, Forgettable(folder=folder))
        assert (done.num_proposals, done.num_journal_lines, done.num_documents, done.num_log_lines) == (6, 6, 1, 1)
        assert done.left == [] and done.num_data_lines > 0
        bring_up_to_date(JournalFile(places_in(home).journal), ledger, consent_in(home))
        assert ledger.problems() == []
        assert len([line for line in ledger.list_proposals(limit=None) if line.label is Label.ACCEPTED]) == 6
    found = bytes_in(home)
    assert [name for name, data in found.items() if b"zebra" in data] == []
    assert sum(b"horse" in data for data in found.values()) >= 4
    assert (home / "server.log").read_text(encoding="utf-8") == "kept\nkept too\n"


def test_forgetting_that_is_killed_at_any_moment_runs_again_to_completion(
    tmp_path: Path, record_figure: Callable[[str, int, str], None]
) -> None:
    moments = random.Random(3)
    num_interrupted = 0
    for number in range(NUM_KILLS):
        home, code = tmp_path / str(number) / "home", tmp_path / str(number) / "code"
        folder = filled(home, code)
        worker = start("forget", home, folder)
        time.sleep(moments.uniform(0, 0.04))
        num_interrupted += kill(worker) == ""
        places = places_in(home)
        with Ledger(places.ledger) as ledger:
            bring_up_to_date(JournalFile(places.journal), ledger, consent_in(home))
            which = unfinished(places) or Forgettable(folder=folder)
            forget(places, ledger, which)
            assert ledger.problems() == []
        assert [name for name, data in bytes_in(home).items() if b"zebra" in data] == [], number
        assert unfinished(places) is None
    record_figure("forgettings that were killed before they ended, and ended by the next", num_interrupted, "")


def test_a_home_that_is_in_use_is_not_forgotten_in_part_and_says_who_waits(tmp_path: Path) -> None:
    home, code = tmp_path / "home", tmp_path / "code"
    folder = filled(home, code)
    before = bytes_in(places_in(home).journal)
    with (
        FileLock(home / "ledger.sqlite3.lock"),
        Ledger(home / "ledger.sqlite3", lock_timeout_s=0.1) as ledger,
        pytest.raises(LedgerError, match="Another PlanPatch process") as caught,
    ):
        forget(places_in(home), ledger, Forgettable(folder=folder))
    assert "try again" in caught.value.hint
    assert unfinished(places_in(home)) is not None and before
    with Ledger(home / "ledger.sqlite3") as ledger:
        forget(places_in(home), ledger, Forgettable(folder=folder))
    assert [name for name, data in bytes_in(home).items() if b"zebra" in data] == []


def test_another_process_that_keeps_edits_meanwhile_is_waited_for(tmp_path: Path) -> None:
    home, code = tmp_path / "home", tmp_path / "zebra-code"
    worker = start("keep", home, code, 0)
    forgotten = 0
    with Ledger(home / "ledger.sqlite3") as ledger:
        for _ in range(6):
            time.sleep(0.3)
            forgotten += forget(places_in(home), ledger, Forgettable(folder=code)).num_proposals
        assert worker.poll() is None, worker.communicate()[1]
        told = kill(worker).split()
        forgotten += forget(places_in(home), ledger, Forgettable(folder=code)).num_proposals
        assert ledger.problems() == []
    assert forgotten >= len(told) > 5
    assert [name for name, data in bytes_in(home).items() if b"zebra" in data] == []
