"""What makes a model fast on a CPU gives what transformers' plain modules give."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    Gemma2Config,
    GPTJConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from engine.inference.batch import DecodeBatch
from engine.inference.cpu import PackedLinear, shares_steps, shorten_lora, speed_up
from engine.inference.head import make_leading_logits_exact
from engine.inference.kv_cache import KVCache, new_kv_cache, turns_with_length

pytestmark = pytest.mark.unit

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "grouped": Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "norms": Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32),
    "one head a group": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, attention_bias=True),
    "window": MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8),
    "values of another size": DeepseekV2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    ),
    "eager attention": Gemma2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    ),
}


def make(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def logits_of(model: Any, chunks: list[list[int]]) -> list[torch.Tensor]:
    """Logits of each chunk, computed one after the other with a cache."""
    found, kv_cache = list[torch.Tensor](), new_kv_cache(model.config)
    with torch.inference_mode():
        for chunk in chunks:
            output = model(input_ids=torch.tensor([chunk]), past_key_values=kv_cache, use_cache=True)
            found.append(output.logits[0])
    return found


CHUNKS = [list(range(20)), list(range(50, 63)), [7], [8], list(range(100, 116)), [9]]


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_chunks_drafts_and_single_tokens_give_the_plain_logits(name: str) -> None:
    plain, fast = make(CONFIGS[name]), make(CONFIGS[name])
    speed_up(fast)
    speed_up(fast)  # once more changes nothing
    assert any(type(module) is PackedLinear for module in fast.modules())
    for mine, wanted in zip(logits_of(fast, CHUNKS), logits_of(plain, CHUNKS), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_sequences_that_share_a_step_give_the_plain_logits() -> None:
    found: list[torch.Tensor] = []
    for is_fast in (False, True):
        model = make(CONFIGS["grouped"])
        if is_fast:
            speed_up(model)
        caches = [KVCache.empty(2), KVCache.empty(2)]
        with torch.inference_mode():
            for kv_cache, length in zip(caches, (5, 30), strict=True):
                model(input_ids=torch.arange(length)[None], past_key_values=kv_cache, use_cache=True)
            batch = DecodeBatch(caches)
            found.append(torch.stack([batch.step(model, [1, 2]), batch.step(model, [3, 4])]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_bf16_head_still_computes_the_leading_logits_exactly() -> None:
    plain, fast = make(CONFIGS["grouped"], torch.bfloat16), make(CONFIGS["grouped"], torch.bfloat16)
    for model in (plain, fast):
        assert make_leading_logits_exact(model.get_output_embeddings(), num_exact=8)
    speed_up(fast)
    for mine, wanted in zip(logits_of(fast, CHUNKS), logits_of(plain, CHUNKS), strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, wanted, rtol=0.02, atol=0.02)


def test_weights_are_held_once_but_for_a_head_that_is_indexed() -> None:
    model = make(CONFIGS["norms"])
    before = model.get_memory_footprint()
    speed_up(model)
    head = model.get_output_embeddings()
    assert model.get_memory_footprint() == before + head.weight.nbytes
    assert head.weight[3].shape == (64,)
    assert next(model.parameters()).dtype is torch.float32


def test_lora_beside_packed_weights_is_lora_beside_plain_ones() -> None:
    from peft import LoraConfig

    found: list[list[torch.Tensor]] = []
    for is_fast in (False, True):
        model = make(CONFIGS["grouped"])
        if is_fast:
            speed_up(model)
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True), "one")
        generator = torch.Generator().manual_seed(5)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator) / 5
        found.append(logits_of(model, CHUNKS))
        model.disable_adapters()
        found.append(logits_of(model, CHUNKS))
    for index in (0, 1):
        for mine, wanted in zip(found[2 + index], found[index], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "scaled", "dora"])
def test_a_lora_layer_made_short_gives_what_peft_s_own_gives(dtype: torch.dtype, options: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    model = make(CONFIGS["grouped"], dtype)
    if "use_dora" not in options:  # peft's DoRA reads a weight that cannot be read once it is packed
        speed_up(model)
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    model.add_adapter(config, "one")
    layers = [layer for layer in model.modules() if type(layer) is Linear]
    assert layers
    chunks = [*CHUNKS, list(range(200, 250))]  # of more rows than are narrow
    for name in ("one", None):
        if name is None:
            model.disable_adapters()
        shorten_lora(model, name)
        is_short = name is None or "use_dora" not in options
        assert all(("forward" in vars(layer)) == is_short for layer in layers)
        short = logits_of(model, chunks)
        for layer in layers:
            vars(layer).pop("forward", None)
        rtol, atol = (1e-4, 1e-5) if dtype is torch.float32 else (0.05, 0.05)
        for mine, wanted in zip(short, logits_of(model, chunks), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=rtol, atol=atol)


def test_without_onednn_the_weights_stay_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    caplog.set_level(logging.INFO, "planpatch.engine")
    model = make(CONFIGS["grouped"])
    speed_up(model)
    assert all(type(module) is not PackedLinear for module in model.modules())
    assert "this torch has no oneDNN" in caplog.text
    for mine, wanted in zip(logits_of(model, CHUNKS), logits_of(make(CONFIGS["grouped"]), CHUNKS), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_takes_any_number_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(48, 80, dtype=dtype)
    rows = [torch.randn(shape, dtype=dtype) for shape in ((48,), (1, 48), (2, 33, 48), (0, 48))]
    wanted = [linear(one) for one in rows]
    PackedLinear.pack(linear, keep_weight=False)
    for one, want in zip(rows, wanted, strict=True):
        torch.testing.assert_close(linear(one), want, rtol=1e-2, atol=1e-2)


def test_a_model_whose_own_code_reads_a_weight_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    config = JambaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
    )  # fmt: skip
    caplog.set_level(logging.INFO, "planpatch.engine")
    plain, model = make(config), make(config)
    speed_up(model)
    assert "the model was not made faster" in caplog.text
    assert all(type(module) is not PackedLinear for module in model.modules())
    weights = dict(plain.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for mine, wanted in zip(logits_of(model, CHUNKS[:2]), logits_of(plain, CHUNKS[:2]), strict=True):
        assert torch.equal(mine, wanted)


def test_only_models_whose_attention_takes_a_mask_of_rows_share_steps() -> None:
    assert all(shares_steps(make(CONFIGS[name])) for name in ("grouped", "norms", "window"))
    for config in (
        CONFIGS["eager attention"],
        BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4),
        GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=512),
    ):
        assert not shares_steps(make(config))


def test_keys_that_depend_on_the_text_s_length_are_made_in_one_step_and_not_kept() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 90
    config = Phi3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, rope_parameters=rope,
        original_max_position_embeddings=90,
    )  # fmt: skip
    assert turns_with_length(config) and not new_kv_cache(config).can_go_back
    assert not turns_with_length(CONFIGS["grouped"]) and new_kv_cache(CONFIGS["grouped"]).can_go_back
