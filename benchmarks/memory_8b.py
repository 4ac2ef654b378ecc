"""Most memory that an 8B takes on a CUDA GPU, from the start of the process through load, PLAN and PATCH.

    python benchmarks/memory_8b.py TOKENIZER_FOLDER [--quantization int8|nf4|bf16] [--disk FOLDER] [--cap-gb 11]

Qwen3-8B's shapes, random weights, 4,096 tokens of KV cache. Made layer by layer, or with --disk written to FOLDER as a
checkpoint (16 GB, kept) and read as any model is. torch may take no more than the cap. Prints one line of JSON, in
10⁹ bytes: `reserved_gb` is the figure to watch; `device_gb` is the driver's for the whole device, which counts CUDA's
own memory and other processes too.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.loading import load_model, set_runtime_defaults

set_runtime_defaults()

import torch

from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import LoadedModel
from engine.inference.random_model import qwen3_8b, random_model
from lsp_server.bench_engine import EngineBackend
from lsp_server.bench_workload import read_workload

PROMPT_TOKENS = 3000
PLAN_TOKENS = 16


def main() -> None:
    """Load, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--quantization", default="int8", choices=["int8", "nf4", "bf16"])
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--disk", type=Path, metavar="FOLDER")
    parser.add_argument("--cap-gb", type=float, default=11.0)
    given = parser.parse_args()
    if given.disk is not None and not (given.disk / "config.json").is_file():
        write_checkpoint(given.disk, given.tokenizer)
    torch.cuda.set_per_process_memory_fraction(given.cap_gb * 1e9 / torch.cuda.mem_get_info()[1])
    after_load: dict[str, float] = {}

    def load() -> LoadedModel:
        loaded = (
            load_model("8B", "", given.disk, device="cuda", quantization=given.quantization)
            if given.disk is not None
            else random_model(qwen3_8b(), given.quantization, torch.float16)
        )
        after_load.update(load_reserved_gb=torch.cuda.max_memory_reserved() / 1e9)
        return replace(loaded, folder=given.tokenizer)

    config = EngineConfig(kv_cache_tokens=given.kv_tokens)
    started_at = time.perf_counter()
    with InProcessEngine("8B", given.tokenizer, load, config=config) as engine:
        engine.wait_until_ready(1800)
        start_s = time.perf_counter() - started_at
        ready_gb = torch.cuda.max_memory_reserved() / 1e9
        answer_all(EngineBackend(engine))
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "quantization": given.quantization,
        "from_disk": given.disk is not None,
        "cap_gb": given.cap_gb,
        "start_s": round(start_s, 1),
        **after_load,
        "ready_reserved_gb": ready_gb,
        "reserved_gb": stats["reserved_bytes.all.peak"] / 1e9,
        "allocated_gb": stats["allocated_bytes.all.peak"] / 1e9,
        "reserved_at_end_gb": stats["reserved_bytes.all.current"] / 1e9,
        "device_gb": (total - free) / 1e9,
    }
    print(json.dumps({name: round(fact, 3) if isinstance(fact, float) else fact for name, fact in facts.items()}))


def answer_all(backend: EngineBackend) -> None:
    """PLANs and PATCHes of a few recorded edits, behind as long a prompt as leaves room for them."""
    recordings = [one for one in read_workload().recordings if one.workload == "references"]
    filler = [token_id for one in recordings for token_id in one.prompt]
    for place, recording in enumerate(recordings[:4]):
        prompt = [*filler[place * 997 :][:PROMPT_TOKENS], *recording.prompt[-200:]]
        backend.replay([*prompt, 100], filler[:PLAN_TOKENS], 1.10)
        backend.replay([*prompt, 101], recording.answer[:400], 1.03)


def write_checkpoint(folder: Path, tokenizer: Path) -> None:
    """A checkpoint of the shapes in fp16, one file a layer; all layers hold the same random numbers."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_8b()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    files: dict[str, dict[str, torch.Tensor]] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        layer, _, last = name.removeprefix("model.layers.").partition(".") if ".layers." in name else ("", "", name)
        if last not in numbers:
            values = torch.empty(parameter.shape, dtype=torch.float16)
            numbers[last] = values.uniform_(0.5, 1.5) if parameter.ndim == 1 else values.normal_(std=0.02)
        files.setdefault(f"model-{layer or 'rest'}.safetensors", {})[name] = numbers[last]
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for path in (*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja")):
        shutil.copy(path, folder)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
