"""Logits that tell near tokens apart.

A head in bf16 rounds a logit of 16 to 32 to steps of 0.125, so the two likeliest tokens are often the same number and
the rounding of another kernel decides between them. Here the leading tokens' logits are computed again in fp32, from
the same weights: 64 rows instead of the whole vocabulary, which costs next to nothing. Engine and reference share it.

Not covered: tokens that a grammar lifts from behind the leading ones keep their rounded logits; a head that
bitsandbytes quantized stays as it is.
"""

from __future__ import annotations

import torch
from torch import nn

NUM_EXACT = 64


def make_leading_logits_exact(head: nn.Module, num_exact: int = NUM_EXACT) -> bool:
    """Let a model's head give fp32 logits, computed in fp32 for the likeliest tokens of each row.

    Args:
        head: The output embeddings, a linear layer `[vocab_size, hidden_size]`.
        num_exact: How many tokens of a row.

    Returns:
        Whether the head takes it: a plain linear layer with bf16 or fp16 weights.
    """
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return False

    def refine(module: nn.Module, args: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        hidden, logits = args[0].float(), logits.float()
        leading = logits.topk(min(num_exact, logits.shape[-1])).indices
        rows = module.weight[leading].float()  # [..., num_exact, hidden_size]
        exact = (rows @ hidden[..., None])[..., 0]
        if module.bias is not None:
            exact = exact + module.bias[leading].float()
        return logits.scatter(-1, leading, exact)

    head.register_forward_hook(refine)
    return True
