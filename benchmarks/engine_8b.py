"""`planpatch bench engine` on Qwen3-8B's shapes with random weights, where no 8B can be had; needs a CUDA GPU.

    python benchmarks/engine_8b.py TOKENIZER_FOLDER [--quantization int8|nf4|bf16] [--out FILE] [--edits N]

TOKENIZER_FOLDER has tokenizer.json and the files beside it of any Qwen2.5 model. Drafts are right and wrong as
recorded, so rates of the workloads are those of a model that writes these edits. Texts are not.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.loading import set_runtime_defaults

set_runtime_defaults()

import torch

from engine.inference.engine import EngineConfig
from engine.inference.random_model import qwen3_8b, random_model
from lsp_server.bench_engine import Figures, Sizes, copy_rate, measure, measure_llama
from lsp_server.bench_workload import read_workload


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--quantization", default="int8", choices=["int8", "nf4", "bf16"])
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--edits", type=int, help="of each workload; all without")
    parser.add_argument("--backends", default="planpatch", help="generate takes a minute an edit in 8 bit")
    parser.add_argument("--generate-edits", type=int, default=1, help="of each workload, for generate")
    parser.add_argument("--generate-repeats", type=int, default=1)
    parser.add_argument("--llama-cpp", type=Path, help="llama-bench, perhaps with llama-lookup beside it; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="its model, of random_gguf.py")
    parser.add_argument("--llama-edits", type=int, default=2, help="of each workload, for llama-lookup")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    workload = read_workload()
    beside: dict[str, Figures] = {}
    if given.llama_cpp is not None:  # first: the GPU's memory is its own
        beside = measure_llama(
            given.llama_cpp, given.gguf, workload, given.edits, given.llama_edits, given.tokenizer, on_gpu=True
        )
    loaded = random_model(qwen3_8b(), given.quantization, torch.float16)
    loaded = replace(loaded, folder=given.tokenizer, name="Qwen3-8B shapes, random weights")
    config = EngineConfig(kv_cache_tokens=given.kv_tokens)
    sizes = Sizes(num_recordings=given.edits, slow_recordings=given.generate_edits, slow_repeats=given.generate_repeats)
    found = measure(loaded, config, workload, sizes, given.backends.split(","), lambda text: print(text)) | beside
    facts = {
        "device": torch.cuda.get_device_name(),
        "model": loaded.name,
        "quantization": given.quantization,
        "copy_gb_per_s": copy_rate(loaded.device),
        "backends": {name: figures.to_json() for name, figures in found.items()},
    }
    if given.out is not None:
        given.out.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
