"""The bars of edit quality on a file of edit tasks whose tests are run: `bench cases`, then the tasks' own checker.

The tasks are no part of the repository. PLANPATCH_BENCH names the folder with `dev.jsonl` and `check.py`, and
PLANPATCH_BENCH_PYTHON a Python that has the packages their tests import (default: this one).

A CPU runs the 0.5B, without plans. What takes a GPU is run there with `bench cases --batch 54 --quantization bf16`, and
PLANPATCH_BENCH_RESULTS names a folder with its results, `15-rewrite-no-plan.jsonl`, the details beside it, and
`machine.txt`, which says what they were made with; these are judged here. So are the adapters that ship: the folder's
`adapters/` holds `15-base-no-plan.jsonl`, `15-base-plan.jsonl` and `15-adapter-no-plan.jsonl` over dev and mutants,
`human-15-base.jsonl` and `human-15-adapter.jsonl` of `benchmarks/humaneval.py` with its `HumanEval.jsonl.gz`, and
`digests.json`, the sha256 of the weights that answered.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import humaneval
from engine.inference.catalogue import catalogue
from lsp_server.cli import main
from tests.steering import BENCH, BENCH_PYTHON, BENCH_RESULTS

RecordFigure = Callable[[str, float | int | str, str], None]

pytestmark = pytest.mark.long

_MODELS = {"1.5B": "qwen2.5-coder-1.5b-instruct", "0.5B": "qwen2.5-coder-0.5b-instruct"}
_FORMATS = ("rewrite", "json_edits")
_ON_CPU = ["--device", "cpu", "--quantization", "bf16"]
# Shares of the tasks with a function, and of those with class or file scope: twice what naive prompting passes.
_BARS = {
    ("1.5B", "rewrite", "no-plan"): (0.31, 0.11),
    ("0.5B", "rewrite", "no-plan"): (0.14, 0.0),
}


@pytest.fixture(scope="module")
def bench() -> Path:
    if not BENCH:
        pytest.skip("PLANPATCH_BENCH names no folder with dev.jsonl and check.py")
    return Path(BENCH).resolve()


@pytest.fixture(scope="module")
def tasks(bench: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (bench / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """JSON lines by id."""
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def run_bench(cases: Path, out: Path, *options: str) -> None:
    """`planpatch bench cases` with the 0.5B on this CPU."""
    details = out.with_suffix(".details.jsonl")
    arguments = ["bench", "cases", str(cases), "--out", str(out), "--details", str(details), *options]
    assert main([*arguments, "--model", _MODELS["0.5B"], *_ON_CPU]) == 0


def score(bench: Path, out: Path, scored: Path, tasks: tuple[str, ...] = ("dev.jsonl",)) -> dict[str, dict[str, Any]]:
    """What the tasks' checker says of each result, by id."""
    python = BENCH_PYTHON or sys.executable
    command = [sys.executable, str(bench / "check.py"), str(out), "--tasks", *(str(bench / name) for name in tasks)]
    done = subprocess.run([*command, "--python", python, "--details", str(scored)], check=False)
    assert done.returncode == 0, f"{python} lacks packages that the tasks need: pip install -r requirements-bench.txt"
    return read_lines(scored)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("edit_format", _FORMATS)
def test_edit_quality_of_the_05b_here(
    edit_format: str, bench: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path, record_figure: RecordFigure
) -> None:
    out = tmp_path / "results.jsonl"
    run_bench(bench / "dev.jsonl", out, "--batch", "16", "--no-plan", "--format", edit_format)
    judge(("0.5B", edit_format, "no-plan"), "CPU, bf16, 16 at once", out, bench, tasks, tmp_path, record_figure)


@pytest.mark.parametrize("plan", ["no-plan", "plan"])
@pytest.mark.parametrize("edit_format", _FORMATS)
@pytest.mark.parametrize("model", _MODELS)
def test_edit_quality_of_results_made_on_a_gpu(
    model: str,
    edit_format: str,
    plan: str,
    bench: Path,
    tasks: dict[str, dict[str, Any]],
    tmp_path: Path,
    record_figure: RecordFigure,
) -> None:
    if not BENCH_RESULTS:
        pytest.skip("PLANPATCH_BENCH_RESULTS names no folder with results")
    out = Path(BENCH_RESULTS).resolve() / f"{model[0]}{model[2]}-{edit_format}-{plan}.jsonl"
    machine = (out.parent / "machine.txt").read_text(encoding="utf-8").strip()
    judge((model, edit_format, plan), machine, out, bench, tasks, tmp_path, record_figure)


@pytest.mark.parametrize("model", _MODELS)
def test_an_adapter_that_ships_solves_more_and_forgets_nothing(
    model: str, bench: Path, tmp_path: Path, record_figure: RecordFigure
) -> None:
    if not BENCH_RESULTS:
        pytest.skip("PLANPATCH_BENCH_RESULTS names no folder with results")
    folder, size = Path(BENCH_RESULTS).resolve() / "adapters", f"{model[0]}{model[2]}"
    ships = catalogue()[_MODELS[model]].adapter
    assert ships is not None
    weights = (ships.path / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == json.loads((folder / "digests.json").read_text())[size]
    passed: dict[str, dict[str, bool]] = {}
    for run in ("base-no-plan", "base-plan", "adapter-no-plan"):
        out, scored = folder / f"{size}-{run}.jsonl", tmp_path / f"{run}.scored.jsonl"
        rows = score(bench, out, scored, ("dev.jsonl", "mutants_dev.jsonl"))
        passed[run] = {name: row["outcome"] == "pass" for name, row in rows.items()}
        record_figure(f"{model}, {run}: passed", sum(passed[run].values()), f"of {len(rows)}")
    best = max((run for run in passed if run.startswith("base")), key=lambda run: sum(passed[run].values()))
    names = sorted(passed[best])
    assert names == sorted(passed["adapter-no-plan"])
    gained, low, high = paired_points([passed["adapter-no-plan"][name] - passed[best][name] for name in names])
    record_figure(f"{model}: gained over {best}", f"{gained:+.1f}", f"points, 95% from {low:+.1f} to {high:+.1f}")
    assert gained >= 7.0
    assert low > 0.0
    problems = {row["task_id"]: row for row in humaneval.read_problems(folder / "HumanEval.jsonl.gz")}
    right = {
        run: {
            name: humaneval.passes(problems[name], line["text"])
            for name, line in humaneval.read_answers(folder / f"human-{size}-{run}.jsonl").items()
        }
        for run in ("base", "adapter")
    }
    assert set(right["base"]) == set(right["adapter"]) == set(problems)
    kept, low, high = paired_points([right["adapter"][name] - right["base"][name] for name in problems])
    counts = f"{sum(right['base'].values())} to {sum(right['adapter'].values())} of {len(problems)}"
    record_figure(
        f"{model}: functions from docstrings, {counts}", f"{kept:+.1f}", f"95% from {low:+.1f} to {high:+.1f}"
    )
    assert kept >= -2.0


def paired_points(steps: list[int]) -> tuple[float, float, float]:
    """Mean difference in points of a hundred, and its 95% interval by bootstrap over the tasks."""
    rng = random.Random(1)
    means = sorted(100 * sum(rng.choices(steps, k=len(steps))) / len(steps) for _ in range(10_000))
    return 100 * sum(steps) / len(steps), means[250], means[9749]


def judge(
    run: tuple[str, str, str],
    machine: str,
    out: Path,
    bench: Path,
    tasks: dict[str, dict[str, Any]],
    tmp_path: Path,
    record_figure: RecordFigure,
) -> None:
    """What is offered parses, stays in its scope and changes something; JSON parses; the bars are reached."""
    results, details = read_lines(out), read_lines(out.with_suffix(".details.jsonl"))
    assert set(results) == set(tasks)
    scored = score(bench, out, tmp_path / "scored.jsonl")
    passed = {name for name, row in scored.items() if row["outcome"] == "pass"}
    with_function = {name for name, row in tasks.items() if row["function"]}
    others = set(tasks) - with_function
    reasons = Counter(line["reason"].partition(": ")[0] for line in results.values() if not line["ok"])
    num_bad_json = sum(row["num_bad_json"] for row in details.values())
    outside = [name for name, row in scored.items() if row["outside"] not in (None, "no")]
    title = f"{' '.join(run)}, {machine}"
    record_figure(f"{title}: passed, with a function", len(passed & with_function), f"of {len(with_function)}")
    record_figure(f"{title}: passed, class or file scope", len(passed & others), f"of {len(others)}")
    record_figure(f"{title}: offered", sum(line["ok"] for line in results.values()), f"of {len(tasks)}")
    record_figure(f"{title}: not offered", ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()), "")
    record_figure(f"{title}: JSON that does not parse or fit", num_bad_json, "")
    record_figure(f"{title}: changed outside the function", len(outside), "all by declared imports")
    record_figure(f"{title}: passed ids", " ".join(sorted(passed)), "")
    assert num_bad_json == 0
    assert [name for name in outside if not details[name]["imports"]] == []
    for name, line in results.items():
        if line["ok"]:
            assert ast.parse(line["edited"]) is not None
            assert line["edited"] != tasks[name]["before"]
    function_bar, other_bar = _BARS.get(run, (0.0, 0.0))
    assert len(passed & with_function) >= function_bar * len(with_function)
    assert len(passed & others) >= other_bar * len(others)


@pytest.mark.usefixtures("home")
def test_a_planted_solution_changes_no_output(bench: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    chosen = list(tasks.values())[::14]
    outputs: list[dict[str, Any]] = []
    for number, planted in enumerate(({}, {"after": "PLANTED = 1\n", "tests": "PLANTED", "failing_test": "PLANTED"})):
        cases, out = tmp_path / f"cases{number}.jsonl", tmp_path / f"out{number}.jsonl"
        cases.write_text("".join(json.dumps({**row, **planted}) + "\n" for row in chosen), encoding="utf-8")
        run_bench(cases, out, "--batch", "1", "--no-plan")
        lines = read_lines(out).items()
        outputs.append({name: (line["edited"], line["reason"], line["tokens"]) for name, line in lines})
    assert outputs[0] == outputs[1]
