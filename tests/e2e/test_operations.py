"""docs/operations.md: its commands are run in order, and each row of its table of problems is shown to be so.

Blocks to run stand after `<!-- runs -->`; one that may also end with exit code 1, because the gate says no, after
`<!-- runs: 0 1 -->`. The server of the block after `<!-- serve -->` runs meanwhile. The edits that the page's fifth
step is about are made beforehand: by the real patcher and ledger, with the answers of a scripted model.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.patching.ledger import Ledger
from engine.patching.patcher import StageOptions
from lsp_server.demo import BROKEN
from tests import house_style
from tests.command_line import planpatch, start
from tests.conftest import ROOT
from tests.learning import accepted

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- runs(: 0 1)? -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [(line, bool(may_refuse)) for may_refuse, block in BLOCKS for line in block.splitlines()]
ADDRESS = "http://127.0.0.1:8765"
MODEL = "qwen2.5-coder-0.5b-instruct"


@contextmanager
def serving(command: str, cwd: Path) -> Iterator[str]:
    """The page's server, on a free port."""
    program, *arguments = shlex.split(command)
    assert program == "planpatch"
    with start(*arguments, "--port", "0", "--json", cwd=cwd) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not said.rstrip().endswith("}"):
                said += (line := process.stdout.readline())
                assert line, "the server ended"
            yield json.loads(said)["url"]
        finally:
            process.terminate()
            process.communicate(timeout=60)


def keep_edits(home: Path, folder: Path, number: int) -> None:
    """Edits that the user accepted, each in a file of its own."""
    with Ledger(home / "ledger.sqlite3") as ledger:
        for edit in house_style.lessons()[:number]:
            file = folder / "work" / f"{edit.name}.py"
            accepted(ledger, file, edit.before, edit.after, edit.name, house_style.INTENT)


def test_the_page_runs_what_a_day_needs() -> None:
    words = [" ".join(shlex.split(command)[:3]) for command, _ in COMMANDS]
    for wanted in (
        *("curl -s", "planpatch doctor", "planpatch patch bits.py", "planpatch bench -N", "planpatch train log"),
        *("planpatch train dataset", "planpatch train qlora", "planpatch train evaluate", "planpatch train promote"),
        "planpatch adapters rollback",
    ):
        assert any(word.startswith(wanted) for word in words), wanted


@pytest.mark.long
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_every_command_of_the_page_works_in_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder_05b: Path
) -> None:
    pytest.importorskip("trl", reason="training is not installed")
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    for stage in ("PLAN", "PATCH"):  # a busy machine is no fault of what is tested here
        monkeypatch.setenv(f"PLANPATCH_{stage}_MAX_TIME_CPU_S", "3600")
    (tmp_path / "bits.py").write_text(BROKEN, encoding="utf-8", newline="\n")
    keep_edits(home, tmp_path, 40)
    (server,) = re.findall(r"<!-- serve -->\n```sh\n(.*?)\n```", PAGE, re.DOTALL)
    said: dict[str, str] = {}
    with serving(server, tmp_path) as url:
        while not health(url)["model_loaded"]:
            assert health(url)["status"] in ("loading", "off", "released")
        for command, may_refuse in COMMANDS:
            said[command] = run(command.replace(ADDRESS, url), may_refuse, tmp_path)
    healths = [json.loads(text) for command, text in said.items() if command.endswith("/health")]
    assert healths[-1]["adapter_path"].endswith("qwen2.5-coder-0.5b-v1")
    assert json.loads(said[next(command for command in said if "/plan" in command)])["plan"]["steps"]
    (before, after) = [(tmp_path / name / "bench_history.csv").read_text() for name in ("before", "after")]
    assert ",__none__," in before and ",__none__," not in after
    assert "as you kept them" in said["planpatch train evaluate"]


def health(url: str) -> Any:
    return json.loads(run(f"curl -s {url}/health", False, Path.cwd()))


def run(command: str, may_refuse: bool, cwd: Path) -> str:
    """What a command prints on stdout; it must end well, or by the gate where it may."""
    arguments = shlex.split(command)
    if arguments[0] == "curl":
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout
    said = planpatch(*arguments[1:], cwd=cwd)
    assert said.code == 0 or (may_refuse and said.code == 1), f"{command}\n{said.out}\n{said.err}"
    return said.out


# --- the table of problems -------------------------------------------------------------------------------------------


def test_every_problem_has_a_cause_and_a_mend() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows[0] == ("problem", "cause", "mend") and len(rows) == 9


@pytest.mark.slow
def test_a_time_out_names_the_setting_and_bench_counts_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder_05b: Path
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    monkeypatch.setenv("PLANPATCH_PATCH_MAX_TIME_CPU_S", "0.1")
    (tmp_path / "bits.py").write_text(BROKEN, encoding="utf-8", newline="\n")
    options = ["-f", "bitcount", "-i", "explain every line in a comment"]
    said = planpatch("patch", "bits.py", *options, cwd=tmp_path)
    assert said.code == 1 and "ran out of time" in said.err and "patch_max_time_cpu_s" in said.err
    bench = planpatch("bench", "-N", "2", "--path", "bits.py", *options, "--json", cwd=tmp_path).json
    assert (bench["summary"]["errors"], bench["summary"]["json_failures"]) == (2, 0)
    assert bench["summary"]["p50_ms"] > 0, "a run that fails takes its time, too"


def test_greedy_decoding_is_given_no_sampling_flags() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = StageOptions(16, 1.1, temperature=0.0, top_k=50, top_p=0.9, seed=1).params(16)
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.0, 0, 1.0, None)


def test_a_data_set_has_one_type_a_field_and_others_are_mended(home: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.json", reason="training is not installed")
    keep_edits(home, tmp_path, 12)
    made = planpatch("train", "dataset", "--json", cwd=tmp_path).json
    train = Path(made["files"]["train"])
    table = pyarrow.read_json(train)
    assert {str(table.schema.field(name).type) for name in ("input", "output", "instruction")} == {"string"}

    mixed = tmp_path / "mixed.jsonl"
    rows = [{"input": "a", "output": ["x", "y"]}, {"input": {"k": 1}, "output": "안녕"}, {"input": 5, "output": "é"}]
    mixed.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    with pytest.raises(Exception, match="changed from"):
        pyarrow.read_json(mixed)
    said = planpatch("train", "sanitize", "mixed.jsonl", "--json", cwd=tmp_path)
    assert said.code == 0
    mended = pyarrow.read_json(tmp_path / "mixed.sanitized.jsonl")
    assert {str(field.type) for field in mended.schema} == {"string"}
    assert mended.num_rows == 3


def test_text_that_came_broken_is_mended(tmp_path: Path) -> None:
    wrong = "é 안녕".encode().decode("cp1252", "ignore")
    row = {"input": wrong.split(" ")[0], "output": "café".encode().decode("latin-1")}
    file = tmp_path / "moji.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert planpatch("train", "sanitize", "moji.jsonl", cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "moji.sanitized.jsonl").read_text(encoding="utf-8")) == {
        "instruction": "",
        "input": "é",
        "output": "café",
    }


def test_too_few_examples_are_refused_with_what_to_do(home: Path, tmp_path: Path, model_folder_05b: Path) -> None:
    keep_edits(home, tmp_path, 3)
    assert planpatch("train", "dataset", cwd=tmp_path).code == 0
    pytest.importorskip("trl", reason="training is not installed")
    said = planpatch("train", "qlora", "lora_0.5b_cpu.json", cwd=tmp_path)
    assert said.code == 2 and "too few to train on" in said.err and "--force" in said.err
