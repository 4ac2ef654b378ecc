"""Models of any shape with random weights, quantized by bitsandbytes layer by layer; none is ever whole in 16 bit.

For benchmarks and tests: shapes and memory are real, texts are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from engine.inference.loading import LoadedModel, Quantization


def random_model(
    config: PreTrainedConfig,
    quantization: Quantization,
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 0,
    requantized_scales: bool = False,
) -> LoadedModel:
    """A causal language model on the GPU, without a tokenizer.

    Args:
        config: Its shapes.
        quantization: `int8`, `nf4`, or what says 16 bit.
        dtype: Of weights that are not quantized and of activations.
        seed: Of the weights.
        requantized_scales: Whether NF4's scales are quantized again, as for training.

    Returns:
        The model in eval mode.
    """
    device = torch.device("cuda", 0)
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                last,
                _random_linear(module, quantization, dtype, device, requantized_scales),
            )
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            shape = parameter.shape
            value = torch.empty(shape, dtype=dtype, device=device)
            value = value.uniform_(0.5, 1.5) if parameter.ndim == 1 else value.normal_(std=0.02)
            setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.tie_weights()
    return LoadedModel(
        name="random", digest="", folder=Path(), model=model.eval(), device=device,
        quantization=quantization, context_length=config.max_position_embeddings, vocab_size=config.vocab_size,
    )  # fmt: skip


def _random_linear(
    like: nn.Linear, quantization: str, dtype: torch.dtype, device: torch.device, requantized_scales: bool
) -> nn.Module:
    num_outputs, num_inputs = like.out_features, like.in_features
    weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device).normal_(std=num_inputs**-0.5)
    made: Any
    if quantization == "int8":
        import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

        made = bnb.nn.Linear8bitLt(num_inputs, num_outputs, bias=False, has_fp16_weights=False, device="meta")
        values, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        made.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scale)
    elif quantization == "nf4":
        import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

        made = bnb.nn.Linear4bit(num_inputs, num_outputs, bias=False, compute_dtype=dtype, device="meta")
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=requantized_scales, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        made.quant_state = state
    else:
        made = nn.Linear(num_inputs, num_outputs, bias=False, device="meta", dtype=dtype)
        made.weight = nn.Parameter(weight, requires_grad=False)
    if like.bias is not None:
        made.bias = nn.Parameter((torch.randn(num_outputs, device=device) * 0.1).to(dtype), requires_grad=False)
    return made


def qwen25_coder_1_5b() -> PreTrainedConfig:
    """Shapes of Qwen2.5-Coder-1.5B."""
    from transformers import Qwen2Config

    return cast("Any", Qwen2Config)(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def qwen3_8b() -> PreTrainedConfig:
    """Shapes of Qwen3-8B."""
    from transformers import Qwen3Config

    return cast("Any", Qwen3Config)(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
