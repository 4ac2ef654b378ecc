"""Seconds from the start of a process to the first streamed token of a PLAN, cold and warm; needs a CUDA GPU.

    python benchmarks/first_token.py FOLDER [--quantization int8|nf4] [--make TOKENIZER_FOLDER] [--warm N] [--keep DIR]

FOLDER is a model folder with 16-bit safetensors; --make writes one there first, of Qwen3-8B's shapes with random
weights (16 GB) and the tokenizer of TOKENIZER_FOLDER. The first start finds neither compiled kernels nor quantized
weights; when it has made both, N more starts find them, and their files in the page cache. The last line is JSON.
Packages that PlanPatch does not install and transformers imports where it finds them (scikit-learn) are hidden from it.
Not measured: looking for the model and its digests, which a start through `planpatch` adds, and reading from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED_AT = float(os.environ.get("FIRST_TOKEN_STARTED_AT") or time.time())
_ENTERED_AT = time.time()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_NUM_PROMPT_TOKENS = 900
_TIMEOUT_S = 300


# --- one start, in a process of its own ------------------------------------------------------------------------------


def start(folder: Path, quantization: str, quantized: Path, *, wait: bool) -> dict[str, Any]:
    """Load, ask for a PLAN, and say when what was done.

    Args:
        folder: The model.
        quantization: `int8` or `nf4`.
        quantized: Folder for quantized weights.
        wait: Whether to stay until kernels are compiled and weights are kept.

    Returns:
        Seconds since the process was started, and seconds of single parts.
    """
    marks: dict[str, Any] = {"python": _ENTERED_AT - STARTED_AT}

    def mark(name: str) -> None:
        marks[name] = round(time.time() - STARTED_AT, 2)

    from engine.inference.loading import load_model, set_runtime_defaults

    sys.modules["sklearn"] = None  # type: ignore[assignment]
    set_runtime_defaults()
    import torch

    mark("torch imported")
    from engine.inference.engine import EngineConfig, InProcessEngine
    from engine.inference.protocol import Completion, GenerationRequest, SamplingParams, Token

    mark("engine imported")
    parts: dict[str, float] = {}
    compiled: list[str] = []
    _watch_loading(parts)

    def load() -> Any:
        loaded = load_model("8b", "digest" * 8, folder, device="cuda", quantization=quantization, quantized=quantized)
        torch.cuda.synchronize()
        mark("loaded")
        _watch_start(parts, compiled)  # not before: it imports what is imported while weights are read
        return loaded

    with InProcessEngine("8b", folder, load, config=EngineConfig()) as engine:
        mark("tokenizer read")
        prompt = tuple(1000 + 7 * index % 9000 for index in range(_NUM_PROMPT_TOKENS))
        request = GenerationRequest(prompt, SamplingParams(16, repetition_penalty=1.10))
        stream = engine.stream(engine.submit(request))
        engine.wait_until_ready(_TIMEOUT_S)
        mark("ready")
        marks["message"] = engine.status().message
        marks["runner"] = engine._runner.name
        for event in stream:
            if isinstance(event, Token) and "first token" not in marks:
                mark("first token")
            if isinstance(event, Completion):
                marks["prefill"] = round(event.prefill_s, 3)
                mark("plan")
        if wait:
            _wait(lambda: engine._runner.name != "transformers")
            mark("switched")
            again = [event for event in engine.stream(engine.submit(request)) if isinstance(event, Completion)]
            marks["plan after the switch"] = round(again[0].prefill_s + again[0].decode_s, 3)
            _wait(lambda: any(quantized.glob("[!.]*")))
            mark("weights kept")
        marks["peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return {**marks, "parts": {name: round(seconds, 2) for name, seconds in parts.items()}, "compiled": compiled}


def _watch_loading(parts: dict[str, float]) -> None:
    """Time what loading consists of."""
    from engine.inference import loading

    loading._import_bitsandbytes = _timed(parts, "import bitsandbytes", loading._import_bitsandbytes)
    loading.read_weights = _timed(parts, "read and quantize", loading.read_weights)
    loading._read_kept = _timed(parts, "read kept, and imports", loading._read_kept)


def _watch_start(parts: dict[str, float], compiled: list[str]) -> None:
    """Time what the fast path's start consists of; `compiled` fills with kernels compiled in this process."""
    import triton  # pyright: ignore[reportMissingImports]

    from engine.inference.cuda import precompile, rows
    from engine.inference.cuda.runner import CudaRunner

    def told(**facts: Any) -> None:
        if not facts["cache_hit"]:
            compiled.append(facts["src"].name)

    CudaRunner.__init__ = _timed(parts, "fuse", CudaRunner.__init__)
    CudaRunner.warm_up = _timed(parts, "graphs", CudaRunner.warm_up)
    rows.kernels_of = _timed(parts, "list kernels", rows.kernels_of)
    precompile.KernelList.is_compiled = _timed(parts, "look into the cache", precompile.KernelList.is_compiled)
    triton.knobs.compilation.listener = told


def _timed(parts: dict[str, float], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        started_at = time.perf_counter()
        result = work(*arguments, **named)
        parts[name] = parts.get(name, 0) + time.perf_counter() - started_at
        return result

    return run


def _wait(is_done: Callable[[], bool]) -> None:
    deadline = time.time() + _TIMEOUT_S
    while not is_done() and time.time() < deadline:
        time.sleep(0.05)


# --- all starts ------------------------------------------------------------------------------------------------------


def measure(folder: Path, quantization: str, num_warm: int, keep: Path | None) -> dict[str, Any]:
    """One cold start and some warm ones.

    Args:
        folder: The model.
        quantization: `int8` or `nf4`.
        num_warm: How many warm ones.
        keep: Folder for caches, which may be warm already; None for a new one.

    Returns:
        What each start said.
    """
    caches = keep or Path(tempfile.mkdtemp(prefix="first-token-"))
    try:
        starts: list[dict[str, Any]] = []
        for index in range(1 + num_warm):
            environment = {
                **os.environ,
                "TRITON_CACHE_DIR": str(caches / "triton"),
                "FIRST_TOKEN_STARTED_AT": str(time.time()),
            }
            command = [sys.executable, __file__, str(folder), "--quantization", quantization, "--child", str(caches)]
            answer = subprocess.run(command + ["--wait"] * (index == 0), env=environment, stdout=subprocess.PIPE)
            if answer.returncode != 0:
                raise SystemExit(f"a start failed with {answer.returncode}")
            starts.append(json.loads(answer.stdout.splitlines()[-1]))
            print(json.dumps(starts[-1]), file=sys.stderr, flush=True)
    finally:
        if keep is None:
            shutil.rmtree(caches, ignore_errors=True)
    return {"cold": starts[0], "warm": starts[1:]}


def make_model(folder: Path, tokenizer: Path) -> None:
    """Qwen3-8B's shapes with random weights in bf16, in files of at most 4 GB.

    Args:
        folder: Where to.
        tokenizer: Folder with tokenizer files of any Qwen model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from engine.inference.random_model import qwen3_8b

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = qwen3_8b()
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and not path.name.startswith(("config", "model", "planpatch")):
            shutil.copy(path, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    for place, (name, shape) in enumerate(shapes.items(), 1):
        value = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        value = value.fill_(1) if len(shape) == 1 else value.normal_(std=shape[-1] ** -0.5)
        shard[name] = value.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > 3_000_000_000 or place == len(shapes):
            file = f"model-{len(set(index.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization", default="int8", choices=["int8", "nf4"])
    parser.add_argument("--make", type=Path, metavar="TOKENIZER_FOLDER")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(start(given.folder, given.quantization, given.child / "quantized", wait=given.wait)))
        return
    if given.make is not None:
        make_model(given.folder, given.make)
    found = measure(given.folder, given.quantization, given.warm, given.keep)
    import torch

    print(json.dumps({"device": torch.cuda.get_device_name(), "quantization": given.quantization, **found}))


if __name__ == "__main__":
    main()
