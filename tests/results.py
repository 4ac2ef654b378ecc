"""The dated summary of a long run: what ran where, how long it took, and the figures that tests recorded.

It names no host, user or folder, so that it can be committed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "planpatch",
    "torch",
    "transformers",
    "peft",
    "llguidance",
    "libcst",
    "bitsandbytes",
    "hypothesis",
    "pytest",
)


@dataclass(frozen=True)
class Figure:
    """Something a test measured."""

    test: str
    name: str
    value: float | int | str
    unit: str


@dataclass(frozen=True)
class TestResult:
    """One test's outcome and its time with set-up and tear-down."""

    __test__ = False

    test: str
    outcome: str
    duration_s: float


@dataclass
class Run:
    """A test run as it goes."""

    arguments: list[str]
    results: dict[str, TestResult] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def add(self, test: str, outcome: str, duration_s: float) -> None:
        """Add a phase of a test: times add up, the worst outcome stays."""
        order = ["passed", "skipped", "failed"]
        before = self.results.get(test, TestResult(test, "passed", 0.0))
        worst = max(before.outcome, outcome, key=order.index)
        self.results[test] = TestResult(test, worst, round(before.duration_s + duration_s, 3))


def write_summary(run: Run, folder: Path, duration_s: float) -> Path:
    """Write the run as JSON and as short text.

    Args:
        run: The run.
        folder: Where to; made if missing.
        duration_s: Of the whole run.

    Returns:
        The text file.
    """
    summary = _summary(run, duration_s)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{summary['date'].replace(':', '')}-{summary['commit'][:7]}"
    (folder / f"{stem}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = folder / f"{stem}.txt"
    text.write_text(_as_text(summary), encoding="utf-8")
    return text


def _summary(run: Run, duration_s: float) -> dict:
    results = sorted(run.results.values(), key=lambda result: result.test)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "pytest_arguments": run.arguments,
        "machine": machine(),
        "versions": versions(),
        "duration_s": round(duration_s, 1),
        "counts": dict(Counter(result.outcome for result in results)),
        "figures": [asdict(figure) for figure in run.figures],
        "tests": [asdict(result) for result in results],
    }


def _as_text(summary: dict) -> str:
    host = summary["machine"]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(summary["counts"].items()))
    lines = [
        f"{summary['date']}  commit {summary['commit'][:12]}{' with changes' * summary['uncommitted_changes']}",
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, {host['gpu'] or 'no GPU'}, {host['system']}",
        ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        f"{counts} in {summary['duration_s']:.0f} s" + (" (a selection)" if summary["pytest_arguments"] else ""),
    ]
    lines += [""] if summary["figures"] else []
    lines += [
        f"{f['name']}: {f['value']}{' ' + f['unit'] if f['unit'] else ''}    ({f['test']})" for f in summary["figures"]
    ]
    failed = [result["test"] for result in summary["tests"] if result["outcome"] == "failed"]
    lines += ["", "failed:", *failed] if failed else []
    slowest = sorted(summary["tests"], key=lambda result: -result["duration_s"])[:10]
    lines += ["", "slowest:", *(f"{result['duration_s']:8.1f} s  {result['test']}" for result in slowest)]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str | int | float]:
    """The machine in the words that a benchmark needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python and the packages whose version changes a figure."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()
