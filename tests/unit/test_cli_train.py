"""`planpatch train` as a user types it; ledger, files and gates are real, the model writes what a test says."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lsp_server import cli, cli_bench, patch_command
from tests.command_line import Said
from tests.scripted_engine import Script, ScriptedEngine
from tests.secret_samples import plant
from tests.unit.test_adapters import write

TEXT = "def f(a):\n    return a\n"


class Desk:
    """A home, a current folder, and the commands."""

    def __init__(self, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.home, self.folder = home, folder
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, script: Script = ()) -> Said:
        @contextmanager
        def engine(*_: object, **__: object) -> Generator[ScriptedEngine]:
            yield ScriptedEngine(script)

        self._monkeypatch.setattr(patch_command, "open_engine", engine)
        self._monkeypatch.setattr(cli_bench, "open_engine", engine)
        self._capsys.readouterr()
        code = cli.main(list(arguments))
        said = self._capsys.readouterr()
        return Said(code, said.out, said.err)

    def json(self, *arguments: str) -> Any:
        said = self(*arguments, "--json")
        assert said.code == 0, said
        return said.json

    def keep(self, name: str, number: int = 1, intent: str = "negate it") -> str:
        """Patch a file's function on disk and accept the patch."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TEXT.replace("return a", f"return a + {number}"), encoding="utf-8")
        answer = f"def f(a):\n    return -a - {number}\n"
        made = self("patch", name, "-f", "f", "-i", intent, "--write", "--json", script=[answer]).json
        assert self("ledger", "accept", made["patch_id"]).code == 0
        return made["patch_id"]

    def holding(self, text: str) -> list[str]:
        """Files under the home that hold a text."""
        files = [file for file in sorted(self.home.rglob("*")) if file.is_file()]
        return [file.relative_to(self.home).as_posix() for file in files if text.encode() in file.read_bytes()]


@pytest.fixture
def planpatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    home, folder = tmp_path / "home", tmp_path / "a workspace \U0001f40d"
    folder.mkdir()
    monkeypatch.setenv("PLANPATCH_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(folder)
    return Desk(home, folder, monkeypatch, capsys)


def test_a_kept_edit_goes_from_the_ledger_to_the_data_set(planpatch: Desk) -> None:
    ids = [planpatch.keep(f"m{number}.py", number) for number in range(3)]
    status = planpatch.json("train", "log", "status")
    assert status["on"] and status["journal"] == {"edit": 3, "preference": 0, "withdrawn": 0, "withheld": 0}
    assert status["written"] == {"edit": 3}
    made = planpatch.json("train", "dataset")
    assert (made["train"] + made["val"], made["dropped"]) == (3, {})
    lines = [json.loads(line) for line in Path(made["files"]["train"]).read_text(encoding="utf-8").splitlines()]
    assert {line["id"] for line in lines} <= set(ids) and "negate it" in lines[0]["input"]
    said = planpatch("train", "dataset")
    assert said.code == 0 and "3 to train on, 0 held out" in said.err and "train_from_logs.jsonl" in said.out
    assert "nothing is held out: no choice of the 3 files" in said.err


def test_the_log_is_turned_off_and_on_and_says_so(planpatch: Desk) -> None:
    planpatch.keep("before.py", 1)
    assert planpatch("train", "log", "off").out == "the training log is off\n"
    planpatch.keep("while.py", 2)
    assert planpatch.json("train", "log", "status")["left_out"] == {"log_off": 1}
    assert planpatch.json("train", "log", "on")["on"] is True
    planpatch.keep("after.py", 3)
    status = planpatch.json("train", "log", "status")
    assert status["journal"]["edit"] == 2 and status["left_out"] == {"log_off": 1}
    assert planpatch.holding("while.py") and not [name for name in planpatch.holding("while.py") if "success" in name]


def test_a_workspace_opts_out_and_is_named(planpatch: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    project = planpatch.folder / "pyproject.toml"
    project.write_text("[tool.planpatch]\ntraining_log = false\n", encoding="utf-8")
    monkeypatch.setenv("PLANPATCH_TRAINING_LOG", "on")  # what the workspace turned off no other source turns on
    planpatch.keep("m.py")
    status = planpatch.json("train", "log", "status", "--file", "m.py")
    assert (status["left_out"], status["opted_out_by"]) == ({"opted_out": 1}, str(project))
    project.write_text("[tool.planpatch]\ntraining_log = true\n", encoding="utf-8")
    said = planpatch("patch", "m.py", "-f", "f", "-i", "again", script=["def f(a):\n    return 7\n"])
    assert "a workspace may only turn this off" in said.err
    assert planpatch.json("train", "log", "status")["left_out"] == {"opted_out": 1}  # as it was when it was made


def test_the_users_setting_turns_the_log_off(planpatch: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    planpatch.keep("m.py")
    monkeypatch.setenv("PLANPATCH_TRAINING_LOG", "off")
    said = planpatch("train", "log", "status")
    assert said.out == "the training log is off\n"
    assert "the setting training_log is off (environment variable PLANPATCH_TRAINING_LOG)" in said.err
    assert planpatch.holding('"kind": "edit"') == []


def test_forget_names_a_copy_of_a_data_set_that_it_leaves(planpatch: Desk) -> None:
    planpatch.keep("zebra.py", 1, intent="negate the zebra")
    made = planpatch.json("train", "dataset")
    train, copy = Path(made["files"]["train"]), Path(made["files"]["train"] + ".bak")
    copy.write_bytes(train.read_bytes())
    train.with_name("notes.txt").write_text("nothing of it")
    done = planpatch.json("train", "forget", "--file", "zebra.py", "--yes")
    assert (done["left"], done["data_lines"]) == ([str(copy)], 1)


def test_forget_removes_a_file_from_everything_and_is_refused_without_yes(planpatch: Desk) -> None:
    planpatch.keep("zebra.py", 1, intent="negate the zebra")
    planpatch.keep("horse.py", 2, intent="negate the horse")
    planpatch.json("train", "dataset")
    said = planpatch("train", "forget", "--file", "zebra.py")
    assert said.code == 2 and "1 proposals" in said.err and "--yes" in said.err
    assert (
        planpatch("train", "forget", "--file", "zebra.py", "--json").json["error"]["details"]["would"]["journal_lines"]
        == 1
    )
    done = planpatch.json("train", "forget", "--file", "zebra.py", "--yes")
    counts = {name: done[name] for name in ("proposals", "journal_lines", "data_lines", "left")}
    assert counts == {"proposals": 1, "journal_lines": 1, "data_lines": 1, "left": []}
    assert planpatch.holding("zebra") == []
    assert len(planpatch.holding("horse")) >= 3
    listed = planpatch.json("ledger", "list")
    assert {(line["state"], line["path"] is None) for line in listed} == {("accepted", False), ("forgotten", True)}
    forgotten = next(line["id"] for line in listed if line["state"] == "forgotten")
    assert planpatch("ledger", "rollback", forgotten).code == 2
    assert planpatch("ledger", "show", forgotten).code == 0


def test_forget_by_folder_and_by_time(planpatch: Desk) -> None:
    planpatch.keep("one/zebra.py", 1)
    planpatch.keep("two/horse.py", 2)
    assert planpatch.json("train", "forget", "--folder", "one", "--yes")["proposals"] == 1
    assert planpatch.json("train", "forget", "--before", "2001-01-01", "--yes")["proposals"] == 0
    assert planpatch.json("train", "forget", "--before", "2999-01-01T00:00Z", "--yes")["proposals"] == 1
    assert planpatch.holding("horse") == planpatch.holding("zebra") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Exactly one of"),
        (["--file", "a", "--folder", "b"], "Exactly one of"),
        (["--before", "yesterday"], "'yesterday' is no date"),
    ],
)
def test_forget_says_what_is_wrong_with_its_options(planpatch: Desk, options: list[str], message: str) -> None:
    said = planpatch("train", "forget", *options, "--yes")
    assert said.code == 2 and message in said.err


def test_a_forget_that_was_interrupted_is_ended_by_the_next_command(planpatch: Desk) -> None:
    planpatch.keep("zebra.py")
    planpatch.json("train", "log", "status")
    pending = planpatch.home / "training" / "forget.json"
    pending.write_text(json.dumps({"file": str(planpatch.folder / "zebra.py")}), encoding="utf-8")
    assert "it is ended now" in planpatch("train", "log", "status").err
    assert planpatch.holding("zebra") == [] and not pending.exists()


def test_retention_drops_nothing_that_is_not_in_the_journal(planpatch: Desk) -> None:
    name = planpatch.keep("m.py")
    assert planpatch.holding('"kind": "edit"') == []
    assert planpatch("ledger", "prune", "--days", "0.0000001").code == 0
    assert planpatch.json("ledger", "list") == []
    (file,) = planpatch.home.rglob("*.jsonl")
    (record,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert (record["kind"], record["id"]) == ("edit", name)
    assert planpatch.json("train", "dataset")["train"] == 1


def test_log_only_fills_the_journal_and_applies_nothing(planpatch: Desk) -> None:
    file = planpatch.folder / "m.py"
    file.write_text(TEXT, encoding="utf-8")
    said = planpatch(
        "bench", "-N", "3", "--path", "m.py", "-f", "f", "-i", "negate", "--log-only",
        script=["def f(a):\n    return -a\n", "def f(a):\n    return 0 - a\n", "def f(a):\n    return -a\n"],
    )  # fmt: skip
    assert said.code == 0 and "3 edits went to the training log, as unreviewed" in said.err
    assert file.read_text(encoding="utf-8") == TEXT
    assert planpatch.json("train", "dataset")["dropped"] == {"not_reviewed": 3}
    made = planpatch.json("train", "dataset", "--include", "unreviewed")
    assert (made["train"], made["dropped"]) == (1, {"superseded": 1, "exact_duplicate": 1})


def test_sanitize_and_merge_say_what_they_did(planpatch: Desk) -> None:
    secret = plant(1, seed=3)[0]
    rows = [{"instruction": secret.prose, "input": None, "output": ["x", secret.after]}]
    (planpatch.folder / "old.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode() + b"\r\n{\r\n")
    said = planpatch("train", "sanitize", "old.jsonl")
    assert said.code == 0 and "old.jsonl: 1 usable, 1 broken" in said.err
    assert [Path(line).name for line in said.out.split("\n") if line] == ["old.sanitized.jsonl", "old.broken.jsonl"]
    assert planpatch("train", "sanitize", "old.jsonl").code == 2
    again = planpatch.json("train", "sanitize", "old.jsonl", "--force")
    assert again[0]["mended"]["byte-order marks"] == 1 and again[0]["broken_because"] == {"not JSON": 1}
    planpatch.keep("m.py")
    made = planpatch.json("train", "dataset", "--merge", "old.jsonl")
    assert (made["train"], made["base"], Path(made["files"]["base"]).name) == (2, 1, "train_from_logs.base.jsonl")
    assert [name for needle in secret.needles for name in planpatch.holding(needle)] == []
    (planpatch.folder / "empty.jsonl").write_text("{\n", encoding="utf-8")
    assert planpatch("train", "sanitize", "empty.jsonl").code == 1
    assert planpatch("train", "sanitize", "none.jsonl").code == 2
    assert planpatch("train", "dataset", "--merge", "empty.jsonl").code == 2


def test_no_other_command_loads_training(planpatch: Desk) -> None:
    import subprocess

    code = "import sys; from lsp_server import cli; cli.main(['ledger', 'list']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert "'training'" not in done.stdout and "detect_secrets" not in done.stdout


@pytest.mark.parametrize("command", ["log", "log on", "log off", "log status", "dataset", "sanitize", "forget"])
def test_every_command_has_help(planpatch: Desk, command: str) -> None:
    said = planpatch("train", *command.split(), "--help")
    assert said.code == 0 and "Usage: planpatch train" in said.out


def test_a_server_keeps_and_drops_beside_its_work(planpatch: Desk) -> None:
    import os
    import threading
    import time

    from lsp_server.cli_options import open_session

    name = planpatch.keep("m.py")
    session = open_session({}, None, False)
    os.utime(session.paths.retention_mark, (0, 0))
    session.served_ledger().close()
    for thread in threading.enumerate():
        if thread.name == "planpatch-retention":
            thread.join(30)
    assert time.time() - session.paths.retention_mark.stat().st_mtime < 60
    assert [file for file in planpatch.holding(name) if "success_logs" in file]


def test_a_journal_that_cannot_be_written_stops_retention_and_no_work(planpatch: Desk) -> None:
    import os

    name = planpatch.keep("m.py")
    (planpatch.home / "training").write_text("a file in the place of the folder", encoding="utf-8")
    os.utime(planpatch.home / "ledger.pruned", (0, 0))
    assert [line["id"] for line in planpatch.json("ledger", "list")] == [name]
    assert (planpatch.home / "ledger.pruned").stat().st_mtime == 0
    said = planpatch("train", "log", "status")
    assert said.code == 3 and "cannot be written" in said.err


def test_a_patch_that_was_changed_in_its_file_is_accepted_as_it_is_there(planpatch: Desk) -> None:
    """The user's own text was lost where a patch was accepted by command: the model's was learnt instead."""
    file = planpatch.folder / "own.py"
    file.write_text(TEXT, encoding="utf-8")
    script = ["def f(a):\n    return -a\n"]
    made = planpatch("patch", "own.py", "-f", "f", "-i", "negate", "--write", "--json", script=script).json
    file.write_text("import math\n\n\ndef f(a):\n    return math.copysign(a, -a)  # 🙂\n", encoding="utf-8")
    assert planpatch("ledger", "accept", made["patch_id"]).code == 0
    built = planpatch.json("train", "dataset", "--include", "unreviewed")
    (line,) = [json.loads(text) for text in Path(built["files"]["train"]).read_text(encoding="utf-8").splitlines()]
    assert "return math.copysign(a, -a)  # 🙂" in line["output"]
    assert built["journal"]["written"] == {"edit": 1, "preference": 1}


def test_a_patch_whose_file_was_only_reformatted_is_accepted_as_it_was_made(planpatch: Desk) -> None:
    made = planpatch.keep("same.py")
    other = planpatch.folder / "same.py"
    other.write_text(other.read_text(encoding="utf-8").replace("-a - 1", "( -a  -  1 )"), encoding="utf-8")
    assert planpatch("ledger", "accept", made).code == 0
    shown = planpatch.json("ledger", "show", made)
    assert shown["final_text"] is None


# --- adapters that learnt --------------------------------------------------------------------------------------------


def adapter_of(planpatch: Desk, name: str, row_ids: list[str] | None) -> Path:
    """An adapter as training leaves it."""
    folder = write(planpatch.home / "training" / "qlora-out" / name)
    if row_ids is not None:
        (folder / "manifest.json").write_text(json.dumps({"row_ids": row_ids}), encoding="utf-8")
    return folder


def test_adapters_that_learnt_what_is_forgotten_are_named(planpatch: Desk) -> None:
    secret, other = planpatch.keep("secret.py"), planpatch.keep("other.py", 2)
    learnt, innocent = adapter_of(planpatch, "learnt-v1", [secret]), adapter_of(planpatch, "innocent-v1", [other])
    adapter_of(planpatch, "foreign", None)
    (planpatch.home / "training" / "qlora-out" / ".learnt-v2.partial").mkdir()
    said = planpatch("train", "forget", "--file", "secret.py", "--yes")
    assert said.code == 0
    assert "the adapter learnt-v1 has learnt some of it: planpatch adapters rm learnt-v1 removes it" in said.err
    assert "the adapter foreign does not say what it learnt" in said.err
    assert "the adapter learnt-v2.partial does not say what it learnt" in said.err
    assert "innocent" not in said.err and learnt.is_dir() and innocent.is_dir()
    assert planpatch("adapters", "rm", "learnt-v1").code == 0
    assert not learnt.exists()


def test_adapters_are_removed_on_request_and_none_of_them_stays_in_use(planpatch: Desk) -> None:
    secret = planpatch.keep("secret.py")
    folder = adapter_of(planpatch, "learnt-v1", [secret, "p_other"])
    assert planpatch("adapters", "use", "learnt-v1").code == 0
    said = planpatch("adapters", "rm", "learnt-v1")
    assert (said.code, said.err.splitlines()[0]) == (2, "usage: learnt-v1 is used")
    answer = planpatch.json("train", "forget", "--file", "secret.py", "--adapters", "--yes")
    assert (answer["adapters"], answer["adapters_removed"], answer["adapters_maybe"]) == (["learnt-v1"], 1, [])
    assert not folder.exists()
    assert "learnt-v1" not in [row["version"] for row in planpatch.json("adapters", "list")]


def test_forgetting_that_was_cut_off_still_removes_the_adapters(planpatch: Desk) -> None:
    folder = adapter_of(planpatch, "learnt-v1", [planpatch.keep("secret.py")])
    pending = planpatch.home / "training" / "forget.json"
    choice = {"file": str(planpatch.folder / "secret.py"), "adapters": "yes"}
    pending.write_text(json.dumps(choice), encoding="utf-8")
    assert "it is ended now" in planpatch("train", "log", "status").err
    assert not folder.exists() and not pending.exists()
