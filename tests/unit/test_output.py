"""Where results go: a reader that went away, an output that is closed or full. Each command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.patching.ledger import Ledger, PlanRecord, Proposal
from lsp_server.console import READER_GONE

ROOT = Path(__file__).resolve().parent.parent.parent
START = "import sys; from lsp_server.__main__ import _run; sys.exit(_run())"
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="redirections of sh")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose ledger holds more than a pipe does."""
    folder = tmp_path / "home"
    monkeypatch.setenv("PLANPATCH_HOME", str(folder))
    base = b"# " + b"x" * 100_000 + b"\n"
    with Ledger(folder / "ledger.sqlite3") as ledger:
        ledger.add_plan(PlanRecord(None, "", "module", 1, 1, base, ("🐍",)))
        for number in range(3):
            error = {"code": "gate", "message": "no"}
            ledger.propose(
                Proposal(str(number), None, "", "module", 1, 1, base, None, (), "cli", outcome="refused", error=error)
            )
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-X", "utf8", "-c", START, *arguments]


@pytest.mark.parametrize("arguments", ["ledger export", "ledger list", "ledger list --json", "ledger show p", "--help"])
def test_a_reader_that_went_away_ends_every_command_quietly(home: Path, arguments: str) -> None:
    """Errors went the same way as results: a traceback, exit code 1, or `Exception ignored` at the very end."""
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        command(*arguments.split(), *(["--json"] if "show" in arguments else [])),
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(write)
        assert process.stderr is not None
        assert (process.stderr.read().decode(), process.wait()) == ("", READER_GONE)
    with Ledger(home / "ledger.sqlite3") as ledger:
        assert ledger.problems() == []


def test_a_reader_that_has_enough_after_one_line_ends_the_export(home: Path) -> None:
    with subprocess.Popen(
        command("ledger", "export"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b'{"id": "p_')
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", READER_GONE)


def test_a_reader_of_messages_that_went_away_ends_it_quietly_too(home: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(command("ledger", "show", "none"), cwd=ROOT, stdout=write, stderr=write) as process:
        os.close(write)
        assert process.wait() == READER_GONE


def run_in_shell(redirection: str, *arguments: str) -> tuple[int, str, str]:
    line = ["/bin/sh", "-c", f'"$@" {redirection}', "sh", *command(*arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


@posix_only
def test_a_closed_output_is_no_fault(home: Path) -> None:
    assert run_in_shell(">&-", "ledger", "list", "--json") == (0, "", "")
    assert run_in_shell(">&- 2>&-", "ledger", "show", "none") == (2, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_output_is_told_on_the_other_one(home: Path) -> None:
    said = (
        "write: The output cannot be written: No space left on device\n  Free disk space, or send the output elsewhere."
    )
    for arguments in ("ledger export", "ledger list", "ledger list --json"):
        assert run_in_shell(">/dev/full", *arguments.split()) == (3, "", f"{said}\n")
    code, _, err = run_in_shell(">/dev/full", "ledger", "show", "none", "--json")
    assert (code, err.splitlines()[0].startswith("usage: There is no patch 'none'")) == (2, True)
    assert run_in_shell("2>/dev/full", "ledger", "show", "none") == (2, "", "")
