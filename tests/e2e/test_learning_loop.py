"""The whole loop on the real 0.5B: a user's corrections become an adapter that makes the next edits as the user would.

A scripted user asks a running server for edits, corrects each in its file by an oracle (the house style of the tests),
and keeps it. From that: journal, data set, training, the gate, promotion into the server that still runs, and the way
back. The long form shows that the adapter is better on fresh edits; the short one that every part hands on to the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import house_style
from tests.command_line import Said, planpatch, start
from tests.house_style import INTENT, Edit, write_edits
from tests.http_server import call

RecordFigure = Callable[[str, float | int | str, str], None]

MODEL = "qwen2.5-coder-0.5b-instruct"
CONFIG = {
    "name": "house",
    "model": MODEL,
    "quantization": "none",
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 2e-4,
    "row_tokens": 256,
    "rows_per_step": 2,
    "gradient_checkpointing": False,
    "min_examples": 1,
}


# --- the scripted user -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A running `planpatch serve`, and the user who works with it."""

    process: subprocess.Popen[str]
    url: str
    token: str
    workspace: Path

    def health(self) -> Any:
        status, answer = call(f"{self.url}/health")
        assert status == 200
        return answer

    def wait_until_ready(self) -> None:
        while not self.health()["model_loaded"]:
            assert self.process.poll() is None and self.health()["status"] in ("loading", "off", "released")
            time.sleep(0.5)

    def patch(self, edit: Edit, *, fresh: bool = False) -> tuple[int, Any]:
        """Write the function's file, and have it planned and patched."""
        file = self.workspace / f"{edit.name}.py"
        file.write_text(edit.before, encoding="utf-8")
        body = {"intent": INTENT, "paths": [file.name], "function": edit.name}
        status, planned = call(f"{self.url}/plan", body)
        assert status == 200, planned
        return call(f"{self.url}/patch_smart", {"plan": planned["plan"], "fresh": fresh})

    def keep(self, edit: Edit) -> bool:
        """Have it patched, correct the file as the house has it, and accept it; False if no patch is offered."""
        status, patch = self.patch(edit)
        if status != 200:
            assert (status, patch["error"]["code"]) == (422, "gate"), patch
            return False
        headers = {"Authorization": f"Bearer {self.token}"}
        assert call(f"{self.url}/apply", {"patch_id": patch["patch_id"]}, headers)[0] == 200
        (self.workspace / f"{edit.name}.py").write_text(edit.after, encoding="utf-8")
        said = {"patch_id": patch["patch_id"], "accepted": True}
        assert call(f"{self.url}/feedback", said, headers)[0] == 200
        return True


@contextmanager
def serving(home: Path, workspace: Path) -> Iterator[Server]:
    workspace.mkdir()
    with start("serve", "--port", "0", "--root", str(workspace), "--json", cwd=workspace) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not said.rstrip().endswith("}"):
                said += (line := process.stdout.readline())
                assert line, "the server ended"
            token = json.loads((home / "runtime.json").read_text(encoding="utf-8"))["token"]
            server = Server(process, json.loads(said)["url"], token, workspace)
            server.wait_until_ready()
            yield server
        finally:
            process.terminate()
            _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err


def train(home: Path, folder: Path, model: Path, **changes: Any) -> Path:
    """Train on the data set of the home; returns the adapter's folder."""
    (folder / "house.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    data = home / "training" / "data"
    command = [sys.executable, "-I", "-X", "utf8", "-m", "training.qlora", "house.json", "--device", "cpu"]
    options = ["--model", str(model), "--model-name", MODEL, "--out", str(home / "training" / "qlora-out")]
    files = ["--data", str(data / "train_from_logs.jsonl"), "--val", str(data / "val_from_logs.jsonl")]
    done = subprocess.run([*command, *options, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Loop:
    """What one turn of the loop gave."""

    num_offered: int
    dataset: Any
    evaluated: Said
    seconds: dict[str, float]


def run_loop(
    home: Path,
    folder: Path,
    model: Path,
    lessons: Sequence[Edit],
    fresh: Sequence[Edit],
    num_kept: int,
    *,
    general: bool,
    num_epochs: int,
    must_pass: bool,
) -> Loop:
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started_at = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started_at, 1)

    with serving(home, folder / "workspace") as server:
        with timed("edits"):
            kept = 0
            for num_asked, edit in enumerate(lessons, 1):  # noqa: B007
                kept += server.keep(edit)
                if kept == num_kept:
                    break
            assert kept == num_kept, f"only {kept} patches were offered"

        made = planpatch("train", "dataset", "--json", cwd=folder).json
        assert made["journal"]["written"]["edit"] == num_kept
        learnt = "".join(Path(made["files"][name]).read_text(encoding="utf-8") for name in ("train", "val"))
        assert learnt.count("-> object:") == made["train"] + made["val"], "what is learnt is the user's text"

        with timed("training"):
            adapter = train(home, folder, model, num_epochs=num_epochs)
        server.wait_until_ready()
        before = server.health()
        assert before["adapter_path"] is None

        held_out = write_edits(folder / "fresh.jsonl", fresh)
        options = ["--general" if general else "--no-general", "--data", str(held_out), "--json"]
        with timed("gate"):
            evaluated = planpatch("train", "evaluate", "--adapter", adapter.name, *options, cwd=folder)
        assert evaluated.code == (0 if must_pass else 1), evaluated.err

        refused = planpatch("train", "promote", adapter.name, "--json", cwd=folder)
        assert refused.code == evaluated.code
        if not must_pass:
            assert refused.json["gate"]["against"] and server.health()["adapter_path"] is None
            promoted = planpatch("train", "promote", adapter.name, "--insist", "--json", cwd=folder)
            assert promoted.code == 0
            assert promoted.json["live_in"] == [server.process.pid]
        else:
            assert refused.json["live_in"] == [server.process.pid]

        now = server.health()
        assert (now["adapter_path"], now["adapter_version"]) == (str(adapter), evaluated.json["adapter_digest"])
        (listed,) = planpatch("adapters", "list", "--json", cwd=folder).json
        assert (listed["version"], listed["used"], listed["live_in"]) == ("house-v1", "yes", [server.process.pid])
        assert listed["evaluation"]["edits"]["rows"] == len(fresh)
        if must_pass:
            status, patch = server.patch(fresh[0], fresh=True)
            assert (status, patch["patched"]) == (200, fresh[0].after), "the running server makes it as the user would"

        back = planpatch("adapters", "rollback", "--json", cwd=folder).json
        assert (back["adapter"], back["live_in"]) == ("__none__", [server.process.pid])
        assert server.health()["adapter_path"] is None
        assert server.process.poll() is None, "all that time it was one server"
    return Loop(num_asked, made, evaluated, seconds)


@pytest.fixture(autouse=True)
def _real_model(home: Path, monkeypatch: pytest.MonkeyPatch, model_folder_05b: Path) -> None:
    pytest.importorskip("trl", reason="training is not installed")
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    for stage in ("PLAN", "PATCH"):  # a busy machine is no fault of what is tested here
        monkeypatch.setenv(f"PLANPATCH_{stage}_MAX_TIME_CPU_S", "3600")


@pytest.mark.slow
def test_every_part_of_the_loop_hands_on_to_the_next(home: Path, tmp_path: Path, model_folder_05b: Path) -> None:
    lessons, fresh = house_style.lessons(), house_style.fresh()[:2]
    loop = run_loop(home, tmp_path, model_folder_05b, lessons, fresh, 4, general=False, num_epochs=1, must_pass=False)
    edits = loop.evaluated.json["edits"]
    assert edits["rows"] == edits["right"]["won"] + edits["right"]["lost"] + _alike(edits)
    against = " ".join(loop.evaluated.json["gate"]["against"])
    assert "it is not shown to be better" in against and "the general tasks were left out" in against


def _alike(edits: Any) -> int:
    """Rows on which both are right, or neither is."""
    won, lost = edits["right"]["won"], edits["right"]["lost"]
    assert edits["candidate"]["right"] - edits["base"]["right"] == won - lost
    return edits["rows"] - won - lost


@pytest.mark.long
def test_forty_kept_edits_make_an_adapter_that_is_better_on_forty_fresh_ones(
    home: Path, tmp_path: Path, model_folder_05b: Path, record_figure: RecordFigure
) -> None:
    started_at = time.monotonic()
    lessons, fresh = house_style.lessons(), house_style.fresh()[:40]
    loop = run_loop(home, tmp_path, model_folder_05b, lessons, fresh, 40, general=True, num_epochs=2, must_pass=True)
    figures = loop.evaluated.json
    edits, general = figures["edits"], figures["general"]
    record_figure("patches asked for until 40 were kept", loop.num_offered, "")
    record_figure("lines to train on, held out", f"{loop.dataset['train']}, {loop.dataset['val']}", "")
    for name in ("right", "exact", "valid", "edited", "tok_per_s"):
        record_figure(f"{name}: base, candidate", f"{edits['base'][name]}, {edits['candidate'][name]}", "of 40")
    low, high = edits["right"]["interval"]
    record_figure("difference of right edits, 95% interval", f"{low} to {high}", "")
    record_figure("general tasks: base, candidate", f"{general['base']}, {general['candidate']}", "of 24")
    for name, taken in loop.seconds.items():
        record_figure(f"{name}, on {sys.platform}", taken, "s")
    record_figure("the whole loop", round(time.monotonic() - started_at), "s")
    assert low > 0 and edits["right"]["p"] < 0.05
