"""The model's weights as the kernels read them: layers that share an input fused, still one copy in memory.

The modules' parameters become views into the fused tensors, so transformers' own forward pass goes on working on the
same bytes. Covered: plain linear layers in 16 bit, bitsandbytes' Linear8bitLt (`CB`, `SCB`) and Linear4bit with NF4.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import AdapterError
from engine.inference.cuda import kernels

if TYPE_CHECKING:
    from engine.inference.adapters import AdapterFiles

PLAIN, INT8, NF4 = (kind.value for kind in (kernels.KIND_16BIT, kernels.KIND_INT8, kernels.KIND_NF4))
_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 256
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(slots=True)
class FusedLinear:
    """One or more linear layers of the same input, as one.

    Args:
        name: What it is tuned as: qkv, o, gate_up, down or head.
        kind: PLAIN, INT8 or NF4.
        weight: 16 bit or int8 `[num_outputs, num_inputs]`, or uint8 `[num_outputs, num_inputs // 2]`.
        scale: fp32 `[num_outputs]` for INT8, `[num_outputs, num_inputs // 64]` for NF4, else None.
        row_scale: For NF4 the largest scale of each row, fp32 `[num_outputs]`, else None.
        packed_scale: For NF4 the scales as shares of the row's largest, in 16 bit, two an int32, as narrow steps read
            them: `[num_inputs // 128, num_outputs]`; else None.
        bias: 16 bit `[num_outputs]`, or None.
        sizes: Outputs of each layer in it.
        num_inputs: Length of an input row.
    """

    name: str
    kind: int
    weight: torch.Tensor
    scale: torch.Tensor | None
    row_scale: torch.Tensor | None
    packed_scale: torch.Tensor | None
    bias: torch.Tensor | None
    sizes: tuple[int, ...]
    num_inputs: int

    @property
    def words(self) -> torch.Tensor:
        """The weights in the units that the kernels load: four at a time, but for 16 bit."""
        if self.kind == PLAIN:
            return self.weight
        return self.weight.view(torch.int32 if self.kind == INT8 else torch.int16)

    @property
    def num_outputs(self) -> int:
        """Length of an output row."""
        return sum(self.sizes)


def base_of(module: nn.Module) -> nn.Module:
    """The linear layer inside a peft wrapper, or the module itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def kind_of(module: nn.Module) -> int | None:
    """How a layer's weights are held, or None if the kernels cannot read them."""
    module = base_of(module)
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    name = type(module).__name__
    if name == "Linear8bitLt":
        return INT8 if weight.data.dtype == torch.int8 and _int8_state(module)[1] is not None else None
    if name == "Linear4bit":
        state = getattr(weight, "quant_state", None)
        is_ours = (
            state is not None
            and state.quant_type == "nf4"
            and state.blocksize == kernels.NF4_BLOCK
            and weight.data.dtype == torch.uint8
            and state.shape[1] % (2 * kernels.NF4_BLOCK) == 0
        )
        return NF4 if is_ours else None
    return PLAIN if type(module) is nn.Linear and weight.dtype in _DTYPES else None


class Arena:
    """One stretch of memory for all linear layers of a decoder layer.

    Moved there together, what they leave is one stretch too, in which the next layer's weights find room; moved one by
    one, they leave holes in which nothing fits.

    Args:
        modules: The layers whose weights it has room for.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        weights = [_weight_of(base_of(module)) for module in modules]
        num_bytes = sum(-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights)
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=weights[0].device)
        self._used = 0

    def joined(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copies of some tensors, behind one another along their first dimension."""
        start, size = self._used, sum(tensor.nbytes for tensor in tensors)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        out = self._memory[start : start + size].view(tensors[0].dtype).view(shape)
        return torch.cat(list(tensors), out=out)


def fuse(
    name: str, modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device, arena: Arena | None = None
) -> FusedLinear:
    """Put layers of the same input behind one another; their parameters become views of the result.

    Args:
        name: What it is tuned as.
        modules: Layers of one kind and one input length.
        dtype: Of activations.
        device: Theirs; or meta for shapes alone, which leaves the layers as they are.
        arena: Where their weights go; without it a single layer's stay where they are.

    Returns:
        The fused layer.
    """
    layers = [base_of(module) for module in modules]
    kind = kind_of(layers[0])
    assert kind is not None and all(kind_of(layer) == kind for layer in layers), "layers of one kind are fused"
    sizes = tuple(int(layer.out_features) for layer in layers)  # pyright: ignore[reportArgumentType]
    num_inputs = int(layers[0].in_features)  # pyright: ignore[reportArgumentType]
    weights, scales = zip(*(_parts(layer, kind, device) for layer in layers), strict=True)
    weight = _joined(weights) if arena is None else arena.joined(weights)
    scale = None if scales[0] is None else _joined(scales)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    if (len(layers) > 1 or arena is not None) and device.type != "meta":
        for layer, start, size in zip(layers, starts, sizes, strict=True):
            _point(layer, kind, weight[start : start + size], None if scale is None else scale[start : start + size])
    biases = [getattr(layer, "bias", None) for layer in layers]
    bias = None
    if any(one is not None for one in biases):
        like = next(one for one in biases if one is not None)
        each = [one.data if one is not None else like.new_zeros(size) for one, size in zip(biases, sizes, strict=True)]
        bias = torch.cat([one.to(device) for one in each])
    row_scale = packed_scale = None
    if kind == NF4 and scale is not None:
        row_scale = scale.amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        shares = (scale / row_scale[:, None]).to(dtype)
        packed_scale = shares.view(torch.int32).T.contiguous()
    return FusedLinear(name, kind, weight, scale, row_scale, packed_scale, bias, sizes, num_inputs)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors))


def _int8_state(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and scales, which bitsandbytes keeps at the weight until the first forward pass."""
    values = next(one for one in (layer.state.CB, layer.weight.CB, layer.weight.data) if one is not None)
    return values, layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB


def _weight_of(layer: Any) -> torch.Tensor:
    return _int8_state(layer)[0] if kind_of(layer) == INT8 else layer.weight.data


def _parts(layer: Any, kind: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == PLAIN:
        return layer.weight.data.to(device), None
    if kind == INT8:
        values, scale = _int8_state(layer)
        assert scale is not None
        return values.to(device), scale.to(device).float().reshape(-1)
    state = layer.weight.quant_state
    rows, num_inputs = state.shape
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise  # pyright: ignore[reportMissingImports]

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return layer.weight.data.to(device).reshape(rows, num_inputs // 2), absmax.to(device).float().reshape(rows, -1)


def _point(layer: Any, kind: int, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Let a layer read its weights from the fused tensors."""
    parameter = layer.weight
    if kind == PLAIN:
        parameter.data = weight
    elif kind == INT8:
        for holder in (parameter, layer.state):
            if holder.CB is not None:
                holder.CB = weight
            if holder.SCB is not None:
                holder.SCB = scale
        parameter.data = weight
    else:
        parameter.data = weight.reshape(parameter.data.shape)
        if not parameter.quant_state.nested:
            assert scale is not None
            parameter.quant_state.absmax = scale.reshape(-1)


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What LoRA adds to one layer: `scaling * b @ a`.

    Args:
        a: `[rank, num_inputs]`.
        b: `[num_outputs, rank]`.
        scaling: Usually alpha / rank.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


LoraWeights = Mapping[str, LoraPair]
"""By the layer's name in the model, such as `model.layers.0.self_attn.q_proj`."""


def read_lora(adapter: AdapterFiles) -> dict[str, LoraPair]:
    """An adapter's weights, on the CPU.

    Args:
        adapter: A folder that was read and checked against the base.

    Returns:
        A pair for each layer that it changes.

    Raises:
        AdapterError: It uses what the kernels do not do (DoRA, trained biases, trained embeddings).
    """
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise AdapterError(f"The adapter in {adapter.folder} is more than LoRA on linear layers")
    tensors = load_file(adapter.folder / _ADAPTER_WEIGHTS)
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    pairs: dict[str, LoraPair] = {}
    for name in sorted(names):
        a = tensors.get(f"base_model.model.{name}.lora_A.weight")
        b = tensors.get(f"base_model.model.{name}.lora_B.weight")
        if a is None or b is None:
            raise AdapterError(f"The adapter in {adapter.folder} is more than LoRA on linear layers: {name}")
        rank = a.shape[0]
        alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha") or rank)
        pairs[name] = LoraPair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return pairs


def _of_pattern(patterns: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    """The value of the first pattern that fits, by peft's rule: each is the end of a layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise
