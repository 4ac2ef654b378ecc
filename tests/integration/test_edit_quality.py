"""The bars of edit quality on a file of edit tasks whose tests are run: `bench cases`, then the tasks' own checker.

The tasks are no part of the repository. PLANPATCH_BENCH names the folder with `dev.jsonl` and `check.py`, and
PLANPATCH_BENCH_PYTHON a Python that has the packages their tests import (default: this one). With a CUDA GPU every
format is run with and without a plan, and the 1.5B too; on a CPU the 0.5B, without plans. PLANPATCH_BENCH_MODEL_15B
and PLANPATCH_BENCH_MODEL_05B may name model folders; else the models are those of the tests' home.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lsp_server.cli import main

pytestmark = pytest.mark.long

_ON_GPU = torch.cuda.is_available()
_DEVICE = ["--device", "cuda", "--batch", "54"] if _ON_GPU else ["--device", "cpu", "--batch", "16"]
_MODELS = {"1.5B": "qwen2.5-coder-1.5b-instruct", "0.5B": "qwen2.5-coder-0.5b-instruct"}
_RUNS = [
    (model, edit_format, plan)
    for model in _MODELS
    for edit_format in ("rewrite", "json_edits")
    for plan in ("--no-plan", "--plan")
    if _ON_GPU or (model == "0.5B" and plan == "--no-plan")
]
# Shares of the tasks with a function, and of those with class or file scope: twice what naive prompting passes.
_BARS = {
    ("1.5B", "rewrite", "--no-plan"): (0.31, 0.11),
    ("0.5B", "rewrite", "--no-plan"): (0.14, 0.0),
}


@pytest.fixture(scope="module")
def bench() -> Path:
    folder = os.environ.get("PLANPATCH_BENCH")
    if not folder:
        pytest.skip("PLANPATCH_BENCH names no folder with dev.jsonl and check.py")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def tasks(bench: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (bench / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """JSON lines by id."""
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def run_bench(cases: Path, out: Path, model: str, *options: str) -> tuple[dict[str, dict[str, Any]], Path]:
    """`planpatch bench cases`: the results by id, and the file of details."""
    name = os.environ.get(f"PLANPATCH_BENCH_MODEL_{model.replace('.', '')}", _MODELS[model])
    details = out.with_suffix(".details.jsonl")
    arguments = ["bench", "cases", str(cases), "--out", str(out), "--details", str(details), "--model", name]
    assert main([*arguments, "--quantization", "bf16", *options]) == 0
    return read_lines(out), details


def score(bench: Path, out: Path) -> dict[str, dict[str, Any]]:
    """What the tasks' checker says of each result, by id."""
    scored = out.with_suffix(".scored.jsonl")
    python = os.environ.get("PLANPATCH_BENCH_PYTHON", sys.executable)
    command = [sys.executable, str(bench / "check.py"), str(out), "--tasks", str(bench / "dev.jsonl")]
    done = subprocess.run([*command, "--python", python, "--details", str(scored)], check=False)
    assert done.returncode == 0, f"{python} lacks packages that the tasks need: pip install -r requirements-bench.txt"
    return read_lines(scored)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("model", "edit_format", "plan"), _RUNS)
def test_edit_quality(
    model: str,
    edit_format: str,
    plan: str,
    bench: Path,
    tasks: dict[str, dict[str, Any]],
    tmp_path: Path,
    record_figure: Callable[[str, float | int | str, str], None],
) -> None:
    """What is offered parses, stays in its scope and changes something; JSON parses; the bars are reached."""
    out = tmp_path / "results.jsonl"
    results, details_file = run_bench(bench / "dev.jsonl", out, model, "--format", edit_format, plan, *_DEVICE)
    details = read_lines(details_file)
    assert set(results) == set(tasks)
    scored = score(bench, out)
    counts = Counter(line["reason"].partition(": ")[0] for line in results.values() if not line["ok"])
    passed = {name for name, row in scored.items() if row["outcome"] == "pass"}
    with_function = {name for name, row in tasks.items() if row["function"]}
    others = set(tasks) - with_function
    device = torch.cuda.get_device_name() if _ON_GPU else "CPU"
    title = f"{model} {edit_format} {plan.removeprefix('--')}, bf16, {device}"
    record_figure(f"{title}: passed, function", len(passed & with_function), f"of {len(with_function)}")
    record_figure(f"{title}: passed, class or file", len(passed & others), f"of {len(others)}")
    record_figure(f"{title}: offered", sum(line["ok"] for line in results.values()), f"of {len(tasks)}")
    record_figure(f"{title}: not offered", ", ".join(f"{reason} {n}" for reason, n in counts.most_common()), "")
    record_figure(f"{title}: JSON failures", sum(row["num_bad_json"] for row in details.values()), "")
    record_figure(f"{title}: passed ids", " ".join(sorted(passed)), "")
    assert sum(row["num_bad_json"] for row in details.values()) == 0
    for name, line in results.items():
        if line["ok"]:
            assert ast.parse(line["edited"]) is not None and line["edited"] != tasks[name]["before"]
            changed_outside = scored[name]["outside"] not in (None, "no")
            assert not changed_outside or details[name]["imports"], f"{name}: changed outside its function"
    function_bar, other_bar = _BARS.get((model, edit_format, plan), (0.0, 0.0))
    assert len(passed & with_function) >= function_bar * len(with_function)
    assert len(passed & others) >= other_bar * len(others)


@pytest.mark.usefixtures("home")
def test_a_planted_solution_changes_no_output(bench: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    chosen = list(tasks.values())[::14]
    one_by_one = ["--batch", "1", "--no-plan"]
    outputs: list[dict[str, Any]] = []
    for number, planted in enumerate(({}, {"after": "PLANTED = 1\n", "tests": "PLANTED", "failing_test": "PLANTED"})):
        cases = tmp_path / f"cases{number}.jsonl"
        cases.write_text("".join(json.dumps({**row, **planted}) + "\n" for row in chosen), encoding="utf-8")
        results, _ = run_bench(cases, tmp_path / f"out{number}.jsonl", "0.5B", *one_by_one, *_DEVICE[:2])
        outputs.append({name: (line["edited"], line["reason"], line["tokens"]) for name, line in results.items()})
    assert outputs[0] == outputs[1]
