"""What the engine gains on a CPU, as ratios within one run of `planpatch bench engine` on the real 0.5B.

PLANPATCH_LLAMA_BENCH and PLANPATCH_LLAMA_GGUF name a `llama-bench` built for this machine and the model's Q4_K_M file;
without them llama.cpp is not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.steering import LLAMA_BENCH, LLAMA_GGUF

LEAST_GAIN, LEAST_GAIN_OVER_LOOKUP, MOST_OF_LLAMA_CPP = 2.0, 1.2, 1.5


@pytest.mark.long
def test_recorded_edits_are_faster_than_generate_with_and_without_lookup(
    home: Path, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    command = [str(Path(sys.executable).parent / "planpatch"), "bench", "engine", "--json", "--device", "cpu"]
    command += ["--model", "qwen2.5-coder-0.5b-instruct"]
    if LLAMA_BENCH:
        command += ["--llama-cpp", LLAMA_BENCH, "--gguf", LLAMA_GGUF]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    ours, plain, lookup = (facts["backends"][name] for name in ("planpatch", "generate", "generate_lookup"))
    for name, found in facts["backends"].items():
        record_figure(f"{name}: PATCH workloads, the slower", found["patch_tok_per_s"], "tokens/s")
        record_figure(f"{name}: prefill of 900 tokens", found["prefill_ms"], "ms")
        record_figure(f"{name}: PLAN and PATCH, p50", f"{found['plan_p50_ms']}, {found['patch_p50_ms']}", "ms")
    for name in ours["workloads"]:
        rate = ours["workloads"][name]["tok_per_s"]
        over_plain = rate / plain["workloads"][name]["tok_per_s"]
        over_lookup = rate / lookup["workloads"][name]["tok_per_s"]
        record_figure(f"{name}: over generate, over generate with lookup", f"{over_plain:.2f}, {over_lookup:.2f}", "")
        assert over_plain >= LEAST_GAIN
        assert over_lookup >= LEAST_GAIN_OVER_LOOKUP
    if LLAMA_BENCH:
        llama = facts["backends"]["llama.cpp"]
        mine, theirs = (one["plan_p50_ms"] + one["patch_p50_ms"] for one in (ours, llama))
        record_figure("PLAN then PATCH, of llama.cpp's time", round(mine / theirs, 3), "")
        assert mine <= MOST_OF_LLAMA_CPP * theirs
