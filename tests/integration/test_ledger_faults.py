"""What a ledger and the files it writes look like after real faults: killed processes, full disks, two at once."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import LedgerError
from engine.patching.ledger import Ledger, State
from tests.integration.ledger_worker import BASES, proposal, versions

NUM_KILLS = 1_000 if os.environ.get("PLANPATCH_LONG") == "1" else 25
ROOT = Path(__file__).parents[2]

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and mounts as POSIX has them")


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a worker."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.ledger_worker", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def wait_until_ready(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None and worker.stderr is not None
    line = worker.stdout.readline()
    assert line == "ready\n", worker.stderr.read()


def output(worker: subprocess.Popen[str], text: str | None = None) -> str:
    """What a worker says until it ends; it must end well."""
    out, errors = worker.communicate(text, timeout=120)
    assert worker.returncode == 0, errors
    return out.removeprefix("ready\n")


def kill(worker: subprocess.Popen[str]) -> str:
    """End a worker like a power switch; what it wrote to stderr before."""
    worker.kill()
    return worker.communicate(timeout=60)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "code"
    path.mkdir()
    for name, base in BASES.items():
        (path / name).write_bytes(base)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.sqlite3"


def check_sound(home: Path, folder: Path) -> None:
    """Nothing is damaged, half written or left over, and the ledger says what is in the files."""
    with Ledger(home) as ledger:
        assert ledger.problems() == []
        assert {path.name for path in folder.iterdir()} == set(BASES)
        for name in BASES:
            found, applied = (folder / name).read_bytes(), ledger.last_applied(folder / name)
            assert found == versions(name)[() if applied is None else applied.standing.hunks]
        states = {line.state for line in ledger.list_proposals(limit=None)}
        assert states <= {State.PROPOSED, State.APPLIED, State.ROLLED_BACK}


def test_a_process_killed_at_any_moment_leaves_everything_sound(
    home: Path, folder: Path, record_figure: Callable[[str, int, str], None]
) -> None:
    moments = random.Random(1)
    for number in range(NUM_KILLS):
        worker = start("loop", home, folder, number)
        wait_until_ready(worker)
        time.sleep(moments.uniform(0.005, 0.150))
        assert kill(worker) == ""
        check_sound(home, folder)
    with sqlite3.connect(home) as connection:
        kinds = dict(connection.execute("SELECT kind, count(*) FROM events GROUP BY kind"))
        settled = connection.execute("SELECT count(*) FROM events WHERE data LIKE '%the process ended%'").fetchone()
    connection.close()
    assert {"applied", "rolled_back", "redone"} <= set(kinds)
    record_figure("processes killed while they used the ledger", NUM_KILLS, "")
    record_figure("of these between the beginning of a write and its record", settled[0], "")


def test_a_process_killed_while_it_makes_the_ledger_leaves_a_sound_one(home: Path, folder: Path) -> None:
    moments = random.Random(2)
    for number in range(NUM_KILLS // 5):
        path = home.with_name(f"{number}") / home.name
        worker = start("loop", path, folder, number)
        while not path.parent.exists() and worker.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        assert kill(worker) == ""
        with Ledger(path) as ledger:
            assert ledger.problems() == []
        for name, base in BASES.items():
            (folder / name).write_bytes(base)


def test_one_of_two_processes_is_killed_and_the_other_goes_on(home: Path, folder: Path) -> None:
    other = folder.with_name("other code")
    shutil.copytree(folder, other)
    survivor = start("loop", home, other, 0)
    wait_until_ready(survivor)
    for number in range(5):
        worker = start("loop", home, folder, number)
        wait_until_ready(worker)
        time.sleep(0.05)
        assert kill(worker) == ""
    assert survivor.poll() is None
    assert kill(survivor) == ""
    check_sound(home, folder)
    check_sound(home, other)


def test_two_processes_write_at_once_and_nothing_is_lost(home: Path) -> None:
    workers = [start("propose", home, 300) for _ in range(2)]
    for worker in workers:
        assert output(worker) == ""
    with Ledger(home) as ledger:
        assert len(ledger.list_proposals(limit=None)) == 600
        assert len({entry.proposal.key for entry in ledger.entries()}) == 600
        assert ledger.problems() == []


def test_what_is_written_after_another_process_came_and_went_is_not_lost(home: Path) -> None:
    """A second ledger in one process ended the locks of the first: a process that came and went deleted the log that
    the first one went on writing into. An editor with HTTP lost every event after the first `planpatch ledger list`."""
    look = f"from pathlib import Path; from engine.patching.ledger import Ledger; Ledger(Path({str(home)!r})).close()"
    with Ledger(home) as first, Ledger(home):
        patch_id = first.propose(proposal(home.parent / "unix 🐍.py", "unix 🐍.py"))
        subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True)
        first.record(patch_id, "applied")
        with Ledger(home) as other:
            assert [event.kind for event in other.get(patch_id).events] == ["proposed", "applied"]


def test_eight_processes_may_make_the_ledger_at_once(home: Path) -> None:
    workers = [start("propose", home, 3) for _ in range(8)]
    for worker in workers:
        assert output(worker) == ""
    with Ledger(home) as ledger:
        assert len(ledger.list_proposals(limit=None)) == 24


def test_of_two_processes_that_patch_one_file_exactly_one_wins(home: Path, folder: Path) -> None:
    path = folder / "windows.py"
    workers = [start("apply", home) for _ in range(2)]
    for worker in workers:
        wait_until_ready(worker)
    with Ledger(home) as ledger:
        for _ in range(20):
            path.write_bytes(BASES["windows.py"])
            ids = [ledger.propose(proposal(path, "windows.py")) for _ in workers]
            for worker, patch_id in zip(workers, ids, strict=True):
                assert worker.stdin is not None
                worker.stdin.write(patch_id + "\n")
                worker.stdin.flush()
            answers = [worker.stdout.readline().strip() for worker in workers if worker.stdout is not None]
            assert sorted(answers) == ["applied", "stale_text"]
            assert path.read_bytes() == versions("windows.py")[0, 1]
            winner = ids[answers.index("applied")]
            assert [ledger.get(patch_id).state is State.APPLIED for patch_id in ids] == [
                patch_id == winner for patch_id in ids
            ]
    for worker in workers:
        assert output(worker) == ""


@posix_only
def test_a_ledger_that_cannot_grow_says_so_and_goes_on_afterwards(home: Path) -> None:
    said, count = output(start("fill", home, 1_000_000)).splitlines()
    assert said.startswith(f"ledger {home}")
    with Ledger(home) as ledger:
        assert len(ledger.list_proposals(limit=None)) == int(count) > 10
        assert ledger.problems() == []


def small_disk(mounted: Path, command: list[object]) -> subprocess.CompletedProcess[str]:
    """Run a worker where a folder is a file system of 1 MB with a file in it; then list what is there."""
    script = (
        'mount -t tmpfs -o size=1m none "$0" && printf old > "$0/code.py" && "$@" && ls -A "$0" && cat "$0/code.py"'
    )
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    worker = [sys.executable, "-m", "tests.integration.ledger_worker", *map(str, command)]
    return subprocess.run(
        [*namespace, "sh", "-c", script, str(mounted), *worker],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small file system")
def test_a_really_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = small_disk(mounted, ["write", mounted / "code.py"])
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"this machine lets nobody mount here: {done.stderr.strip()}")
    assert done.stderr == ""
    said, *names_and_text = done.stdout.splitlines()
    assert said == f"write {mounted}/code.py was not written: the disk or quota of {mounted} is full."
    assert names_and_text == ["code.py", "old"]


@contextmanager
def as_somebody_else() -> Generator[None, None, None]:
    """Root ignores permissions; for the length of a test it becomes somebody who does not."""
    if sys.platform == "win32" or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix_only
def test_a_ledger_in_a_read_only_folder_is_named() -> None:
    folder = Path(tempfile.mkdtemp(prefix="planpatch-test-"))
    path = folder / "ledger.sqlite3"
    try:
        Ledger(path).close()
        path.chmod(0o444)
        folder.chmod(0o555)
        with as_somebody_else(), pytest.raises(LedgerError, match=r"ledger\.sqlite3 cannot be") as caught:
            Ledger(path)
        assert "PLANPATCH_HOME" in caught.value.hint
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
