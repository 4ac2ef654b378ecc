"""How much memory a run takes, told before anything is loaded, and what to change where that is too much.

Weights and optimizer are counted exactly, from the shapes that config.json gives. Activations are what autograd keeps
of one layer, reckoned for the Qwen2 and Qwen3 families and not held to a GPU yet.

Not covered: what other programs take after the look.
"""

# the libraries that train are hardly typed
# pyright: basic

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.inference.mending import mending_hint
from training.qlora_config import QloraConfig

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, and scales that are quantized again (Dettmers et al. 2023)
_OPTIMIZED_BYTES = 4 + 4 + 8  # weight, gradient and AdamW's two moments in fp32
_RUNTIME_BYTES = {"cuda": 700_000_000, "cpu": 600_000_000}
_HEAD_TILE = (4096, 32_768)  # tokens and vocabulary of TRL's chunked head
_LAYER_BYTES_PER_HIDDEN, _LAYER_BYTES_PER_INNER = 40, 18
_SPARE = 1.05


@dataclass(frozen=True, slots=True)
class Shapes:
    """What of a model decides how much memory it takes.

    Args:
        num_linear: Weights of the layers that can be quantized.
        num_other: All other weights: embeddings, head, norms.
        num_lora_per_rank: Weights of an adapter of rank 1.
        largest_linear: Weights of the largest layer.
        num_layers: Decoder layers.
        hidden: Width of the residual stream.
        inner: Width inside the MLP.
        vocab: Rows of the head.
        num_target_layers: Layers that get an adapter.
    """

    num_linear: int
    num_other: int
    num_lora_per_rank: int
    largest_linear: int
    num_layers: int
    hidden: int
    inner: int
    vocab: int
    num_target_layers: int


def read_shapes(folder: Path, target_modules: tuple[str, ...]) -> Shapes:
    """The shapes of a model folder; no weight is read.

    Args:
        folder: Model folder.
        target_modules: Last parts of the names of the layers that get an adapter.

    Returns:
        The shapes.

    Raises:
        ModelError: config.json cannot be read, or no layer has such a name.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        return shapes_of(config, target_modules)
    except ModelError:
        raise
    except Exception as fault:  # a config.json with wrong values makes transformers fail in any way
        raise ModelError(f"The shapes of {folder} cannot be read: {fault}", hint=mending_hint(folder)) from fault


def shapes_of(config: Any, target_modules: tuple[str, ...]) -> Shapes:
    """The shapes of a configuration of transformers.

    Args:
        config: The configuration.
        target_modules: Last parts of the names of the layers that get an adapter.

    Returns:
        The shapes.

    Raises:
        ModelError: No layer has such a name.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    targets = [module for name, module in linear.items() if name.rpartition(".")[2] in target_modules]
    if not targets:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ModelError(
            f"The model has no layer named {' or '.join(target_modules)}", hint=f"Its layers: {names} (target_modules)."
        )
    text = config.get_text_config()
    num_linear = sum(module.weight.numel() for module in linear.values())
    return Shapes(
        num_linear=num_linear,
        num_other=sum(parameter.numel() for parameter in model.parameters()) - num_linear,
        num_lora_per_rank=sum(module.in_features + module.out_features for module in targets),
        largest_linear=max(module.weight.numel() for module in linear.values()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab=text.vocab_size,
        num_target_layers=len(targets),
    )


def needed_bytes(shapes: Shapes, config: QloraConfig, device: str, quantization: str) -> dict[str, int]:
    """Memory of a run by what takes it.

    Args:
        shapes: The base's.
        config: The run's.
        device: `cpu` or `cuda:N`.
        quantization: `nf4` or `none`.

    Returns:
        Bytes by name, and `total`.
    """
    width = 2 if config.precision == "bf16" else 4
    tokens = config.row_tokens * config.rows_at_once
    of_layer = tokens * (shapes.hidden * _LAYER_BYTES_PER_HIDDEN + shapes.inner * _LAYER_BYTES_PER_INNER)
    kept = tokens * shapes.hidden * width * shapes.num_layers
    tile = min(tokens, _HEAD_TILE[0]) * min(shapes.vocab, _HEAD_TILE[1])
    on_gpu = device != "cpu"
    parts = {
        "weights": round(shapes.num_linear * (_NF4_BYTES if quantization == "nf4" else width))
        + shapes.num_other * width,
        "adapter": shapes.num_lora_per_rank * config.lora_r * _OPTIMIZED_BYTES,
        "activations": kept + of_layer if config.gradient_checkpointing else of_layer * shapes.num_layers,
        "head": tile * (width if on_gpu else 12) + tokens * shapes.hidden * 8,
        "mask": config.rows_at_once * config.row_tokens**2 * 3,
        "dequantized": shapes.largest_linear * width if quantization == "nf4" else 0,
        "runtime": _RUNTIME_BYTES["cuda" if on_gpu else "cpu"],
    }
    return {**parts, "total": round(_SPARE * sum(parts.values()))}


def check_memory(shapes: Shapes, config: QloraConfig, device: str, quantization: str, free_bytes: int) -> int:
    """Refuse a run that does not fit.

    Args:
        shapes: The base's.
        config: The run's.
        device: `cpu` or `cuda:N`.
        quantization: `nf4` or `none`.
        free_bytes: Free memory of the device.

    Returns:
        Bytes that it takes.

    Raises:
        ModelError: It does not fit; says what to change. `details` has `needed_bytes` and `available_bytes`.
    """
    needed = needed_bytes(shapes, config, device, quantization)["total"]
    if needed <= free_bytes:
        return needed
    raise ModelError(
        f"Training {config.model} takes about {needed / 1e9:.1f} GB on {device}, {free_bytes / 1e9:.1f} GB are free",
        hint=_what_to_change(shapes, config, device, quantization, free_bytes),
        needed_bytes=needed,
        available_bytes=free_bytes,
    )


def _what_to_change(shapes: Shapes, config: QloraConfig, device: str, quantization: str, free_bytes: int) -> str:
    for words, changed, as_quantization in _smaller(config, device, quantization):
        needed = needed_bytes(shapes, changed, device, as_quantization)["total"]
        if needed <= free_bytes:
            return f"With {words} it takes {needed / 1e9:.1f} GB. Or end other programs that hold memory."
    return "Use a smaller model (planpatch models list), or end other programs that hold memory."


def _smaller(config: QloraConfig, device: str, quantization: str) -> Iterator[tuple[str, QloraConfig, str]]:
    """Changes that take less memory, each on top of those before, those that cost nothing but time first."""
    words: list[str] = []
    if not config.gradient_checkpointing:
        config = replace(config, gradient_checkpointing=True)
        words.append('"gradient_checkpointing": true')
        yield " and ".join(words), config, quantization
    if config.rows_at_once > 1:
        config = replace(config, rows_at_once=1)
        words.append('"rows_at_once": 1')
        yield " and ".join(words), config, quantization
    if device != "cpu" and quantization != "nf4":
        quantization = "nf4"
        words.append('"quantization": "nf4"')
        yield " and ".join(words), config, quantization
    if config.precision == "fp32":
        config = replace(config, precision="bf16")
        words.append('"precision": "bf16"')
        yield " and ".join(words), config, quantization
    for row_tokens in (2048, 1024, 768, 512):
        if row_tokens < config.row_tokens:
            shorter = replace(config, row_tokens=row_tokens)
            yield " and ".join([*words, f'"row_tokens": {row_tokens}']), shorter, quantization
