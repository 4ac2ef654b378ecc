"""How the cost of a step grows: with the context, with the tokens of a step, and what drafts of each length give.

    python benchmarks/growth.py measure MODEL_FOLDER [--device cpu] [--out FILE.json]
    python benchmarks/growth.py measure TOKENIZER_FOLDER --shapes qwen3-8b [--quantization nf4] [--out FILE.json]
    python benchmarks/growth.py plot FILE.json… --out PICTURE.svg

With `--shapes` the weights are random; the folder needs a tokenizer alone. Steps go through the engine's runner, edits
through submit and stream. Not covered: prefill, which `planpatch bench engine` measures.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.loading import LoadedModel, load_model, set_runtime_defaults

set_runtime_defaults()

import torch

from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.random_model import qwen3_8b, random_model
from engine.inference.runner import Row, Runner, make_runner
from lsp_server.bench_engine import PATCH_PENALTY, EngineBackend, copy_rate, median_ms, replay_rates
from lsp_server.bench_workload import read_workload

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
DRAFTS = (0, 1, 3, 7, 15, 31)
ROWS_CONTEXT = 1024


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--shapes", choices=["qwen3-8b"])
    measuring.add_argument("--device", default="auto")
    measuring.add_argument("--quantization", default="auto")
    measuring.add_argument("--edits", type=int, default=12, help="of each workload")
    measuring.add_argument("--most-context", type=int, default=CONTEXTS[-1])
    measuring.add_argument("--repeats", type=int, default=5)
    measuring.add_argument("--out", type=Path)
    measuring.set_defaults(run=measure)
    plotting = commands.add_parser("plot")
    plotting.add_argument("files", type=Path, nargs="+")
    plotting.add_argument("--out", type=Path, required=True)
    plotting.set_defaults(run=plot)
    given = parser.parse_args()
    given.run(given)


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> None:
    """Measure one model and print one line of JSON."""
    loaded = _loaded(given)
    on_gpu = loaded.device.type == "cuda"
    contexts = [length for length in CONTEXTS if length <= given.most_context]
    config = EngineConfig(kv_cache_tokens=max(18 * ROWS_CONTEXT, contexts[-1] + 512) if on_gpu else 0)
    runner = make_runner(loaded, replace(config, max_draft_tokens=WIDTHS[-1] - 1))
    with torch.inference_mode():
        by_context = {
            str(width): {str(length): _step_ms(runner, loaded, length, width, given.repeats) for length in contexts}
            for width in (1, 16)
        }
        by_drafts = {
            str(width): _step_ms(runner, loaded, ROWS_CONTEXT, width, given.repeats)
            for width in WIDTHS
            if width - 1 <= runner.most_drafts(1)
        }
        by_sequences = _sequences_ms(runner, loaded, given.repeats)
    del runner
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "model": loaded.name,
        "quantization": loaded.quantization,
        "copy_gb_per_s": round(copy_rate(loaded.device), 1),
        "rows_context": ROWS_CONTEXT,
        "step_ms_by_context": by_context,
        "step_ms_by_drafts": by_drafts,
        "step_ms_by_sequences": by_sequences,
        "edits_by_most_drafts": {str(most): _edits(loaded, config, most, given.edits) for most in DRAFTS},
    }
    line = json.dumps(facts)
    if given.out is not None:
        given.out.write_text(line + "\n", encoding="utf-8")
    print(line)


def _loaded(given: argparse.Namespace) -> LoadedModel:
    if given.shapes is None:
        return load_model(given.folder.name, "", given.folder, device=given.device, quantization=given.quantization)
    quantization = "int8" if given.quantization == "auto" else given.quantization
    loaded = random_model(qwen3_8b(), quantization, torch.float16)
    return replace(loaded, folder=given.folder, name="Qwen3-8B shapes, random weights")


def _step_ms(runner: Runner, loaded: LoadedModel, num_tokens: int, width: int, repeats: int) -> float:
    """One step of `width` tokens of one sequence after `num_tokens`, in milliseconds."""
    kv_cache = runner.new_kv_cache()
    for start in range(0, num_tokens, runner.chunk_tokens):
        chunk = [100 + place % 1000 for place in range(start, min(num_tokens, start + runner.chunk_tokens))]
        runner.run([Row(kv_cache, chunk, 0)])

    def step() -> None:
        runner.run([Row(kv_cache, range(100, 100 + width), width)])
        kv_cache.truncate(num_tokens)

    time_ms = median_ms(step, loaded.device, repeats)
    kv_cache.release()
    print(f"context {num_tokens}, {width} tokens: {time_ms:.2f} ms", file=sys.stderr)
    return round(time_ms, 3)


def _sequences_ms(runner: Runner, loaded: LoadedModel, repeats: int) -> dict[str, float]:
    """One step of one token of each of some sequences, in milliseconds by their number."""
    found: dict[str, float] = {}
    first = runner.new_kv_cache()
    for start in range(0, ROWS_CONTEXT, runner.chunk_tokens):
        runner.run([Row(first, range(start, min(ROWS_CONTEXT, start + runner.chunk_tokens)), 0)])
    for width in WIDTHS:
        if width > runner.max_rows or not runner.has_room([(runner.new_kv_cache(), 128)] * width):
            break
        caches = [first.copy_prefix(ROWS_CONTEXT) for _ in range(width)]

        def step(caches: list[Any] = caches) -> None:
            runner.run([Row(kv_cache, [100], 1) for kv_cache in caches])

        found[str(width)] = round(median_ms(step, loaded.device, repeats), 3)
        runner.settle()
        for kv_cache in caches:
            kv_cache.release()
    first.release()
    return found


def _edits(loaded: LoadedModel, config: EngineConfig, most_drafts: int, num_edits: int) -> dict[str, float]:
    """What drafts of at most so many tokens give on the recorded edits."""
    with InProcessEngine(
        loaded.name, loaded.folder, lambda: loaded, config=replace(config, max_draft_tokens=most_drafts)
    ) as engine:
        engine.wait_until_ready()
        backend = EngineBackend(engine)
        workload = read_workload()
        edits = [one for name in ("answers", "references") for one in workload.of(name, num_edits)]
        replays = [backend.replay(one.prompt, one.answer, PATCH_PENALTY) for one in edits]
    found = {name: round(value, 3) for name, value in replay_rates(replays).items()}
    print(f"at most {most_drafts} drafts: {found['tok_per_s']:.1f} tokens/s", file=sys.stderr)
    return found


# --- drawing ---------------------------------------------------------------------------------------------------------


def plot(given: argparse.Namespace) -> None:
    """Draw files of one machine beside each other: a step by context, by its tokens, and edits by length of draft."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "planpatch"
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in given.files]
    for index, facts in enumerate(measured):
        name, colour = facts["quantization"], f"C{index}"
        for width, dash in (("1", "-"), ("16", "--")):
            points = facts["step_ms_by_context"][width]
            left.plot(*_numbers(points), dash, marker="o", color=colour, label=f"{name}, {width} tokens")
        middle.plot(*_numbers(facts["step_ms_by_drafts"]), "-", marker="o", color=colour, label=f"{name}, one sequence")
        points = facts["step_ms_by_sequences"]
        middle.plot(*_numbers(points), "--", marker="o", color=colour, label=f"{name}, as many sequences")
        points = {most: found["tok_per_s"] for most, found in facts["edits_by_most_drafts"].items()}
        right.plot(*_numbers(points), "-", marker="o", color=colour, label=name)
    for axes, what, unit in (
        (left, "tokens of context", "ms a step"),
        (middle, f"tokens of a step, {ROWS_CONTEXT:,} of context", "ms a step"),
        (right, "most draft tokens", "tokens/s, recorded edits"),
    ):
        axes.set(xlabel=what, ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_xscale("log", base=2)
    left.set_xticks(CONTEXTS, [f"{length:,}" for length in CONTEXTS])
    middle.set_xscale("log", base=2)
    middle.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    right.set_xticks(DRAFTS, [str(most) for most in DRAFTS])
    figure.suptitle(f"{measured[0]['model']}, {measured[0]['device']}", fontsize=11)
    figure.savefig(given.out, metadata={"Date": None})
    print(given.out)


def _numbers(points: dict[str, float]) -> tuple[list[int], list[float]]:
    return [int(place) for place in points], list(points.values())


if __name__ == "__main__":
    main()
