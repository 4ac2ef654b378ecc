"""What makes transformers' modules fast on a CPU: weights in oneDNN's own order, and attention by group of heads.

A decode step reads every weight once, so it goes as fast as memory is read. `aten::mm` on row-major bf16 weights
reaches a third of that; oneDNN reaches it when a weight is stored in the order that its kernel reads, which costs one
pass at load. Attention of grouped queries reads keys and values once a group instead of once a head. Both give what the
plain modules give, in another order of summing. A LoRA layer is its base and two small products. Figures are in
DECISIONS.md.

Not covered: processors for which torch has no oneDNN; there the modules stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.inference.kv_cache import new_kv_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("planpatch.engine")

_ATTENTION = "planpatch_grouped"
_NARROW_LORA_ROWS = 32


class PackedLinear(nn.Linear):
    """A linear layer with a copy of its weight in oneDNN's order, which can only be multiplied with.

    Made from an `nn.Linear` by `pack`, never constructed.
    """

    packed: torch.Tensor  # opaque, [out_features, in_features]

    @classmethod
    def pack(cls, linear: nn.Linear, *, keep_weight: bool) -> None:
        """Turn a layer into this one, in place.

        Args:
            linear: A plain layer, weight `[out_features, in_features]`.
            keep_weight: Whether `weight` stays beside the copy, to be indexed; else it becomes the copy.
        """
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        linear.register_buffer("packed", packed, persistent=False)
        if not keep_weight:
            del linear.weight
            linear.register_buffer("weight", packed, persistent=False)
        linear.__class__ = cls

    def unpack(self) -> None:
        """Be a plain layer again, bit for bit the one before."""
        if "weight" in self._buffers:
            weight = self.packed.to_dense()
            del self._buffers["weight"]
            self.weight = nn.Parameter(weight, requires_grad=False)
        del self._buffers["packed"]
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        rows = input.reshape(-1, self.in_features)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product.view(*input.shape[:-1], self.out_features)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in which the heads of a group are rows of one product.

    Args:
        module: transformers' attention layer.
        query: `[batch, num_heads, num_new, head_dim]`.
        key: `[batch, num_kv_heads, num_tokens, head_dim]`.
        value: The same, but for its own `head_dim`.
        attention_mask: From `grouped_mask`, or bool `[batch, 1, num_new, num_tokens]`; None where each new token sees
            all up to itself and there is one, or nothing before them.
        scaling: Factor of the scores; None for the root of `head_dim`.
        options: transformers' further arguments.

    Returns:
        `[batch, num_new, num_heads, head_dim]`, and no weights.
    """
    num_batch, num_heads, num_new, head_dim = query.shape
    num_groups = key.shape[1]
    num_alike = num_heads // num_groups
    is_whole_prompt = attention_mask is None and num_new > 1
    if is_whole_prompt or options.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = None if attention_mask is None else attention_mask[:, :, :num_new]
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    if attention_mask is not None and attention_mask.shape[2] == num_new:
        attention_mask = _for_each_of(num_alike, attention_mask)
    rows = query.reshape(num_batch, num_groups, num_alike * num_new, head_dim)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.view(num_batch, num_heads, num_new, value.shape[-1]).transpose(1, 2), None


def grouped_mask(config: Any, dtype: torch.dtype, **arguments: Any) -> torch.Tensor | None:
    """The mask of a step as transformers makes it, made ready for every layer at once.

    Args:
        config: The model's configuration.
        dtype: Of queries and keys.
        arguments: Those of transformers' `sdpa_mask`.

    Returns:
        To be added to scores, `[batch, 1, num_alike * num_new, num_tokens]`; None where none is needed.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(config=config, dtype=dtype, **arguments)
    if mask is None:
        return None
    config = config.get_text_config()
    num_heads: int = config.num_attention_heads
    num_alike = num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return _for_each_of(num_alike, added)


def _for_each_of(num_alike: int, mask: torch.Tensor) -> torch.Tensor:
    """Of `[batch, 1, num_new, num_tokens]` one for the new tokens of each head of a group, in their order."""
    return mask[:, :, None].expand(-1, -1, num_alike, -1, -1).flatten(2, 3)


def speed_up(model: PreTrainedModel) -> None:
    """Let a model on a CPU use both, as far as this processor and the model allow; once more changes nothing.

    A model whose logits change, or that no longer runs, is left as it was: its code reads weights, or shapes attention,
    in a way of its own.

    Args:
        model: The model, in eval mode.
    """
    if model.config._attn_implementation == _ATTENTION or any(type(one) is PackedLinear for one in model.modules()):
        return
    try:
        wanted = _few_logits(model)
    except Exception as fault:  # the request will say what is wrong with the model
        log.info("the model was not made faster: %s", _in_one_line(fault))
        return
    attention = model.config._attn_implementation
    _group_heads(model)
    _pack(model)
    try:
        found = _few_logits(model)
        reason = "" if _are_alike(found, wanted) else "its logits changed"
    except Exception as fault:  # as many kinds as there are models
        reason = _in_one_line(fault)
    if reason:
        log.info("the model was not made faster: %s", reason)
        model.set_attn_implementation(attention or "sdpa")
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.unpack()


def _pack(model: PreTrainedModel) -> None:
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not linears:
        return
    if reason := _why_not_packed(linears[0]):
        log.info("weights stay as they are stored: %s", reason)
        return
    head = model.get_output_embeddings()
    for linear in linears:
        PackedLinear.pack(linear, keep_weight=linear is head)


def _few_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits `[3, vocab_size]` of a beginning, of tokens after it, and of one more: each kind of step once."""
    kv_cache, found = new_kv_cache(model.config), list[torch.Tensor]()
    with torch.inference_mode():
        for token_ids in ([1, 2, 3, 4], [5, 6, 7], [8]):
            output: Any = model(input_ids=torch.tensor([token_ids]), past_key_values=kv_cache, use_cache=True)
            found.append(output.logits[0, -1].float())
    return torch.stack(found)


def _are_alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within what another order of summing changes in bf16."""
    return bool((found - wanted).abs().max() <= 0.05 * wanted.abs().max())


def _in_one_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"


def shares_steps(model: PreTrainedModel) -> bool:
    """Whether sequences of several lengths may be rows of one step: what `DecodeBatch` masks has to reach attention.

    Attention written out adds a mask to the scores, and ALiBi makes its biases from one; both take no mask of rows.

    Args:
        model: The model.

    Returns:
        Whether they may.
    """
    config = model.config.get_text_config()
    return model.config._attn_implementation in ("sdpa", _ATTENTION) and not getattr(config, "alibi", False)


def shorten_lora(model: PreTrainedModel, name: str | None) -> None:
    """Let peft's layers do no more than two small products, and nothing for the base.

    A step of one token goes through 168 such layers of a 0.5B; what peft checks and casts in each takes longer than the
    products. Layers that are more than plain LoRA stay peft's. Figures are in DECISIONS.md.

    Args:
        model: A model on a CPU with peft's layers in it.
        name: The adapter's name there, None: the base is used.
    """
    from peft.tuners.lora.layer import Linear

    layers: list[Any] = [layer for layer in model.modules() if type(layer) is Linear]
    for layer in layers:
        layer.__dict__.pop("forward", None)
        if name is None or name not in layer.lora_A:
            layer.forward = layer.base_layer.__call__
        elif name not in layer.lora_variant and layer.lora_B[name].bias is None:
            layer.forward = _plain_lora(layer, name)


def _plain_lora(layer: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """`[..., in_features]` to `[..., out_features]`: the base's product and the adapter's, without dropout."""
    down = layer.lora_A[name].weight.detach().float().t().contiguous()  # [in_features, rank]
    up = (layer.lora_B[name].weight.detach().float() * layer.scaling[name]).t().contiguous()  # [rank, out_features]
    base, dtype = layer.base_layer, layer.base_layer.weight.dtype
    down_wide, up_wide = down.to(dtype), up.to(dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        product = base(x)
        rows, results = x.reshape(-1, x.shape[-1]), product.view(-1, product.shape[-1])
        if len(rows) > _NARROW_LORA_ROWS:
            results.addmm_(torch.mm(rows, down_wide), up_wide)
        else:  # products this small take longer in bf16
            results.add_(torch.mm(torch.mm(rows.float(), down), up))
        return product

    return forward


def _group_heads(model: PreTrainedModel) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, grouped_attention)
        AttentionMaskInterface.register(_ATTENTION, grouped_mask)
        model.set_attn_implementation(_ATTENTION)


def _why_not_packed(linear: nn.Linear) -> str:
    """Asked of torch by a small product: what it says of itself differs from release to release."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    part = nn.Linear(linear.in_features, min(64, linear.out_features), bias=False)
    part.weight = nn.Parameter(linear.weight[: part.out_features].detach().clone(), requires_grad=False)
    rows = torch.linspace(-1, 1, 2 * part.in_features).to(linear.weight.dtype).view(2, -1)
    wanted = part(rows)
    try:
        PackedLinear.pack(part, keep_weight=False)
        if torch.allclose(part(rows), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            return ""
    except (RuntimeError, AttributeError) as fault:
        return f"oneDNN does not take them: {_in_one_line(fault)}"
    return "oneDNN multiplies them wrong"
