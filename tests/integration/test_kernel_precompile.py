"""Kernels compiled ahead: the list covers every launch, and the engine goes over to them while it serves.

The list is checked on any machine with Triton, as far as it goes without a GPU; what is launched, on a GPU. Each check
has a process and a cache of its own, since Triton keeps kernels in memory too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

COMMON = """
import collections, gc, json, logging, sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch, triton
from transformers import Qwen2Config, Qwen3Config
from engine.inference.cuda import precompile
from engine.inference.cuda.precompile import KernelBuild, kernels_of

SIZES = dict(
    vocab_size=151936, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, max_position_embeddings=8192
)
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, num_attention_heads=8, num_key_value_heads=2, head_dim=64),
    "qwen2": Qwen2Config(**SIZES, num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True),
}
missed = []
def listen(**facts):
    if not facts["cache_hit"]:
        missed.append(facts["src"].name)
def compiled(wanted):
    done = threading.Event()
    build = KernelBuild(wanted, done.set)
    assert done.wait(300) and not build.error, build.error
    assert wanted.is_compiled()
"""


def answer_of(script: str, cache: Path, *arguments: str) -> Any:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-c", COMMON + script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


WITHOUT_GPU = """
import types
from torch import nn
from transformers import AutoModelForCausalLM
from engine.inference.cuda.precompile_worker import NoDriver
from engine.inference.loading import LoadedModel
from triton.backends.compiler import GPUTarget

torch.cuda.get_device_properties = lambda d: types.SimpleNamespace(name="GPU", major=9, multi_processor_count=132)
torch.cuda.get_device_capability = lambda d=None: (9, 0)
triton.runtime.driver.set_active(NoDriver(GPUTarget("cuda", 90, 32)))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], dtype=torch.float16)
loaded = LoadedModel("x", "", Path(), model.eval(), torch.device("cuda", 0), "fp16", 8192, 151936)
wanted = kernels_of(loaded, num_kv_tokens=4096, tuning_path=None)
was_there = wanted.is_compiled()
compiled(wanted)
more = kernels_of(loaded, num_kv_tokens=60000, tuning_path=None)
triton.knobs.compilation.listener = listen
precompile._described = lambda target: __import__("contextlib").nullcontext({})  # compile as a launch would
kernels_of(loaded, num_kv_tokens=9000, tuning_path=None)
broken = replace(wanted, descriptions=(wanted.descriptions[0].replace("norm_kernel", "no_kernel"),))
done = threading.Event()
build = KernelBuild(broken, done.set)
done.wait(100)
print(json.dumps([was_there, more == wanted, len(wanted.descriptions), missed, build.error, broken.is_compiled()]))
"""


def test_what_another_process_compiled_is_what_a_launch_looks_for(tmp_path: Path) -> None:
    was_there, is_same, num_kernels, missed, error, is_stamped = answer_of(WITHOUT_GPU, tmp_path)
    assert not was_there and num_kernels > 25
    assert is_same, "how large the KV cache is changes no kernel"
    assert missed == []
    assert "KeyError" in error and not is_stamped, "a failure is told and leaves no stamp"


ON_GPU = """
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.protocol import GenerationRequest, Grammar, SamplingParams, complete
from engine.inference.random_model import random_model

name, quantization, folder = sys.argv[1:]
loaded = replace(random_model(CONFIGS[name], quantization, torch.float16), folder=Path(folder), name="small")
logging.basicConfig(level=logging.INFO)
config = EngineConfig(kv_cache_tokens=4096)
def memory():
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
at_first = memory()
prompt = tuple(1000 + 7 * index % 5000 for index in range(901))
grammar = Grammar("json_schema", '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}')
said = {}
with InProcessEngine("small", loaded.folder, lambda: loaded, config=config) as engine:
    engine.wait_until_ready(100)
    said["first"] = [engine._runner.name, engine.status().message]
    stream = engine.stream(engine.submit(GenerationRequest(prompt, SamplingParams(3000, speculation=False))))
    tokens = 0
    for event in stream:
        tokens += len(getattr(event, "token_ids", ())) if type(event).__name__ == "Token" else 0
        if engine._runner.name != "transformers" and tokens > 50:
            break
    stream.close()
    said["then"] = [engine._runner.name, engine.status().message]
    said["tokens"] = tokens
    triton.knobs.compilation.listener = listen
del engine, stream, event
said["memory"] = memory() / at_first
with InProcessEngine("small", loaded.folder, lambda: loaded, config=config) as engine:
    engine.wait_until_ready(100)
    said["again"] = [engine._runner.name, engine.status().message]
    for length in (1, 5, 63, 300, 901, 902, 1500):
        plan = GenerationRequest(prompt[:length] * (1 + length // 901), SamplingParams(16, repetition_penalty=1.1))
        complete(engine, plan)
    for params in (
        SamplingParams(40), SamplingParams(40, repetition_penalty=1.03, grammar=grammar),
        SamplingParams(40, grammar=grammar),
        SamplingParams(20, replay_token_ids=prompt[40:60], repetition_penalty=1.03),
        SamplingParams(4, top_logprobs=2), SamplingParams(4, temperature=1.0),
    ):
        complete(engine, GenerationRequest(prompt, params))
        complete(engine, GenerationRequest(prompt[:77], params))
    complete(engine, GenerationRequest(prompt, SamplingParams(1), embed=True))
    names = [engine.submit(GenerationRequest(prompt[start:], SamplingParams(20))) for start in range(5)]
    for one in names:
        list(engine.stream(one))
said["missed"] = missed
print(json.dumps(said))
"""


@needs_gpu
@pytest.mark.parametrize(("name", "quantization"), [("qwen3", "int8"), ("qwen2", "nf4")])
def test_the_engine_serves_at_once_goes_over_and_compiles_nothing_itself(
    name: str, quantization: str, tmp_path: Path, model_folder_05b: Path
) -> None:
    said = answer_of(ON_GPU, tmp_path, name, quantization, str(model_folder_05b))
    assert said["first"] == ["transformers", "Compiling kernels; slower until then"]
    assert said["then"] == ["fused CUDA kernels", ""] and said["tokens"] > 50
    assert said["again"] == ["fused CUDA kernels", ""], "with kernels in the cache it begins on the fast path"
    assert said["missed"] == []
    assert said["memory"] < 1.02, "there is one copy of the weights after the switch, too"
