"""`planpatch bench` with the real Qwen2.5-Coder-0.5B on three tiny cases and a few tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lsp_server.cli import main

MODEL = ["--model", "qwen2.5-coder-0.5b-instruct", "--device", "cpu"]
CASES = [
    {
        "id": "emoji and CRLF",
        "file_name": "add.py",
        "before": "# 😀\r\ndef add(a, b):\r\n    return a - b\r\n",
        "function": "add",
        "scope": "function",
        "intent": "Return a + b.",
    },
    {
        "id": "no final newline",
        "file_name": "double.py",
        "before": "def double(x):\n    return x * 3",
        "function": "double",
        "scope": "function",
        "intent": "Return x * 2.",
    },
    {
        "id": "class, tabs, form feed",
        "file_name": "greeter.py",
        "before": "\f\nclass Greeter:\n\tdef greet(self):\n\t\treturn 'hi'\n",
        "function": None,
        "scope": "class:Greeter",
        "intent": "Return 'hello'.",
    },
]


@pytest.fixture(autouse=True)
def _few_tokens(home: Path, model_folder_05b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANPATCH_PLAN_MAX_NEW_TOKENS", "4")
    monkeypatch.setenv("PLANPATCH_PATCH_MAX_NEW_TOKENS", "32")
    monkeypatch.chdir(tmp_path)


def bench_cases(tmp_path: Path, name: str, *more: str) -> dict[str, dict[str, Any]]:
    """The result lines of a run, by id, without their times."""
    out = tmp_path / name
    assert main(["bench", "cases", "cases.jsonl", "--out", str(out), *MODEL, *more]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {line["id"]: {key: line[key] for key in ("edited", "ok", "reason", "tokens")} for line in lines}


@pytest.mark.slow
def test_results_are_the_same_one_by_one_all_at_once_and_with_a_planted_solution(tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text("".join(json.dumps(case) + "\n" for case in CASES), encoding="utf-8")
    alone = bench_cases(tmp_path, "1.jsonl")
    planted = [{**case, "after": "PLANTED", "tests": "PLANTED"} for case in CASES]
    cases.write_text("".join(json.dumps(case) + "\n" for case in planted), encoding="utf-8")
    together = bench_cases(tmp_path, "3.jsonl", "--batch", "3")
    assert together == alone
    assert {name: line["edited"] for name, line in alone.items()} == {
        "emoji and CRLF": "# 😀\r\ndef add(a, b):\r\n    return a + b\r\n",
        "no final newline": "def double(x):\n    return x * 2",
        "class, tabs, form feed": "\f\nclass Greeter:\n\tdef greet(self):\n\t\treturn 'hello'\n",
    }


def test_a_repeated_edit_gives_the_same_text_and_leaves_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "add.py"
    file.write_bytes(CASES[0]["before"].encode())
    edit = ["--path", str(file), "--function", "add", "--intent", "Return a + b.", "--json"]
    assert main(["bench", "-N", "2", *edit, *MODEL]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["summary"]["errors"], said["summary"]["model"]) == (0, "qwen2.5-coder-0.5b-instruct")
    assert len({run["sha256"] for run in said["runs"]}) == 1
    with (tmp_path / "bench_results.csv").open(encoding="utf-8", newline="") as rows:
        assert [row["edits"] for row in csv.DictReader(rows)] == ["1", "1"]
    assert file.read_bytes() == CASES[0]["before"].encode()


@pytest.mark.long
def test_the_engine_is_measured_on_recorded_edits_and_the_last_line_is_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lsp_server import bench_engine

    sizes = bench_engine.Sizes(num_repeats=1, widths=(1, 4), decode_tokens=6)
    monkeypatch.setattr(bench_engine, "CPU_SIZES", sizes)
    monkeypatch.setattr(bench_engine, "CONTEXT_TOKENS", 120)
    assert main(["bench", "engine", "--edits", "1", *MODEL]) == 0
    out = capfd.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["device"].startswith("cpu")
    assert set(found["backends"]) == {"planpatch", "generate", "generate_lookup"}
    ours = found["backends"]["planpatch"]
    assert set(ours["decode_ms"]) == {"1", "4"}
    assert ours["workloads"]["references"]["acceptance"] > 0
    for figures in found["backends"].values():
        assert all(figures[name] > 0 for name in ("prefill_ms", "ttft_ms", "patch_tok_per_s", "plan_p50_ms"))
    assert any("prefill" in line for line in out[:-1])
