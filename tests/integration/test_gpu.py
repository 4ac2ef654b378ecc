"""What runs only on a CUDA GPU: 8 bit and NF4 by bitsandbytes, adapters on them, too little memory, full-size speed.

Skipped where torch sees no GPU. PLANPATCH_TEST_MODEL may name a folder of the 0.5B where nothing can be pulled.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import ModelError
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import choose_device, choose_quantization, load_model
from engine.inference.protocol import (
    Completion,
    GenerationRequest,
    Grammar,
    Message,
    SamplingParams,
    complete,
)
from engine.inference.reference import reference_step
from lsp_server.doctor_machine import bitsandbytes_checks, torch_checks
from tests.tiny_model import tiny_model_files

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

QUESTION = "Write a Python function that adds two numbers."
BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5, "bf16": 2.0}


@pytest.fixture(autouse=True)
def _empty_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


class Model:
    """A model on the GPU."""

    def __init__(self, folder: Path, quantization: str) -> None:
        self.loaded = load_model("model", "digest", folder, device="cuda", quantization=quantization)
        config = EngineConfig(serve_while_compiling=False)
        self.engine = InProcessEngine("model", folder, lambda: self.loaded, config=config)
        self.engine.wait_until_ready()

    def prompt(self, text: str = QUESTION) -> tuple[int, ...]:
        return tuple(self.engine.tokenizer.encode_chat([Message("user", text)]))

    def generate(self, max_new_tokens: int, text: str = QUESTION, **params: object) -> Completion:
        wanted = SamplingParams(max_new_tokens, **params)  # type: ignore[arg-type]
        return complete(self.engine, GenerationRequest(self.prompt(text), wanted))


@pytest.fixture(params=["int8", "nf4", "bf16"])
def model(request: pytest.FixtureRequest, model_folder_05b: Path) -> Iterator[Model]:
    model = Model(model_folder_05b, request.param)
    yield model
    model.engine.close()


def test_8_bit_is_the_default() -> None:
    assert choose_device("auto") == "cuda:0"
    assert choose_quantization("auto", "cuda:0") == "int8"


def test_the_doctor_finds_torch_and_bitsandbytes_in_order() -> None:
    assert [(check.name, check.level) for check in (*torch_checks(), *bitsandbytes_checks())] == [
        ("torch", "ok"),
        ("gpu", "ok"),
        ("bitsandbytes", "ok"),
    ]


def test_weights_are_held_as_asked_on_one_gpu(model: Model) -> None:
    status = model.engine.status()
    layers = model.loaded.model.get_submodule("model.layers")
    num_weights = sum(p.numel() for p in layers.parameters()) * (2 if status.quantization == "nf4" else 1)
    num_bytes = sum(p.numel() * p.element_size() for p in layers.parameters())
    assert num_bytes == pytest.approx(BYTES_PER_WEIGHT[status.quantization] * num_weights, rel=0.05)
    assert {str(p.device) for p in model.loaded.model.parameters()} == {"cuda:0"}
    assert status.device == "cuda:0"


def test_it_writes_sense_with_cache_grammar_and_rows(model: Model) -> None:
    first = model.generate(40)
    assert "def " in first.text
    again = model.generate(40)
    assert again.num_cached_tokens == first.num_prompt_tokens - 1
    assert model.generate(30, grammar=Grammar("regex", "yes|no")).text in ("yes", "no")
    prompts = [model.prompt(f"{QUESTION} {number}") for number in range(4)]
    ids = [model.engine.submit(GenerationRequest(prompt, SamplingParams(12))) for prompt in prompts]
    ends = [list(model.engine.stream(request_id))[-1] for request_id in ids]
    assert [len(end.token_ids) for end in ends if isinstance(end, Completion)] == [12] * 4


def test_bf16_differs_from_its_reference_only_at_ties(model_folder_05b: Path) -> None:
    model = Model(model_folder_05b, "bf16")
    prompt, generated = model.prompt(), model.generate(48, repetition_penalty=1.03).token_ids
    steps = [
        (token_id, reference_step(model.loaded.model, [*prompt, *generated[:index]], repetition_penalty=1.03))
        for index, token_id in enumerate(generated)
    ]
    model.engine.close()
    assert [step.gap for token_id, step in steps if step.token_id != token_id and step.gap > 0.25] == []


def test_an_adapter_goes_on_and_off(model: Model, model_folder_05b: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = load_model("plain", "", model_folder_05b, device="cpu", quantization="bf16").model
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(plain, config).save_pretrained(str(tmp_path))
    before = model.generate(12).token_ids
    model.engine.use_adapter(str(tmp_path))
    assert model.generate(12).token_ids != before
    model.engine.use_adapter(None)
    assert model.generate(12).token_ids == before


@pytest.mark.parametrize("quantization", ["int8", "bf16"])
def test_too_little_memory_is_a_model_error(model_folder_05b: Path, quantization: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 300_000_000, dtype=torch.uint8, device="cuda")
    with pytest.raises(ModelError, match=f"does not fit into the memory of cuda:0 as {quantization}"):
        load_model("model", "", model_folder_05b, device="cuda", quantization=quantization)
    del taken


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["int8", "nf4", "bf16"])
def test_full_size(
    quantization: str,
    model_folder_05b: Path,
    tmp_path_factory: pytest.TempPathFactory,
    record_figure: Callable[[str, float | int | str, str], None],
) -> None:
    """Qwen3-8B's shapes with random weights."""
    folder = tmp_path_factory.getbasetemp() / "qwen3-8b-shapes"
    if not folder.exists():
        make_8b(folder, model_folder_05b)
    torch.cuda.reset_peak_memory_stats()
    started_at = time.monotonic()
    load = partial(load_model, "8b", "", folder, device="cuda", quantization=quantization)
    with InProcessEngine("8b", folder, load, config=EngineConfig(serve_while_compiling=False)) as engine:
        engine.wait_until_ready()
        load_s = time.monotonic() - started_at
        prompt = tuple(engine.tokenizer.encode("def add(a, b):\n    return a + b\n" * 100))[:900]
        for params in (SamplingParams(2), SamplingParams(32)):  # the first is a warm-up
            completion = complete(engine, GenerationRequest(prompt[:: 1 if params.max_new_tokens > 2 else -1], params))
    device = torch.cuda.get_device_name()
    title = f"Qwen3-8B shapes, {quantization}, {device}, plain engine"
    record_figure(f"{title}: load", round(load_s, 1), "s")
    record_figure(f"{title}: most memory", round(torch.cuda.max_memory_allocated() / 1e9, 2), "GB")
    record_figure(f"{title}: prefill of 900 tokens", round(1000 * completion.prefill_s, 1), "ms")
    record_figure(
        f"{title}: decode", round(1000 * completion.decode_s / (len(completion.token_ids) - 1), 1), "ms/token"
    )
    assert len(completion.token_ids) == 32


def make_8b(folder: Path, tokenizer_from: Path) -> None:
    """A model folder of Qwen3-8B's shapes with random weights, and a tokenizer that fits them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (tokenizer_from / name).exists():
            shutil.copy(tokenizer_from / name, folder)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_that_were_kept_give_the_same_bits(quantization: str, tmp_path: Path) -> None:
    for name, content in tiny_model_files().items():
        (tmp_path / name).write_bytes(content)
    config: Any = LlamaConfig(
        vocab_size=280, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    load = partial(
        load_model,
        "tiny",
        "0123456789ab",
        tmp_path,
        device="cuda",
        quantization=quantization,
        quantized=tmp_path / "kept",
    )
    token_ids = torch.arange(3, 103, device="cuda")[None]
    first = load()
    assert first.when_idle is not None
    with torch.inference_mode():
        logits = first.model(token_ids).logits
        assert list(first.when_idle)[-1].startswith("Keeping the ")
        deadline = time.monotonic() + 20
        while not list((tmp_path / "kept").glob("[!.]*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        again = load()
        assert again.when_idle is None, "the kept ones were read"
        assert torch.equal(again.model(token_ids).logits, logits)
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    prompt = GenerationRequest(tuple(range(3, 103)), SamplingParams(30, repetition_penalty=1.1))
    texts: list[tuple[int, ...]] = []
    for loaded in (first, again):
        limits = EngineConfig(serve_while_compiling=False, kv_cache_tokens=1024)
        with InProcessEngine("tiny", tmp_path, lambda loaded=loaded: loaded, config=limits) as engine:
            texts.append(complete(engine, prompt).token_ids)
    assert texts[0] == texts[1]
