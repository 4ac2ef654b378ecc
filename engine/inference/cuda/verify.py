"""The greedy choice of a step's rows in two kernels and one copy: repetition penalty, grammar mask, the two likeliest.

By torch's own operations that takes a dozen kernels and four waits for the device, a quarter of a decode step.
Not covered: sampling, and more than two likeliest tokens, which `sampling.py` does by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.inference.cuda import kernels as triton_kernels

_BLOCK = 4096
_MAX_ROWS = 64
_MAX_TOKENS = 256  # that count as seen besides the mask


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The two likeliest tokens of a row, and their log-probabilities."""

    token_id: int
    logprob: float
    second_token_id: int
    second_logprob: float


class GreedyKernel:
    """Buffers and launches, for one device and vocabulary.

    Args:
        vocab_size: Length of a row of logits.
        device: A CUDA device, or meta for `launch` with kernels that are not run.
        kernels: What is launched.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, kernels: Any = triton_kernels) -> None:
        assert vocab_size < 2**24, "token ids go through fp32"
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._num_blocks = -(-vocab_size // _BLOCK)
        self._partial = torch.empty(_MAX_ROWS * self._num_blocks * 5, dtype=torch.float32, device=device)
        self._out = torch.empty(_MAX_ROWS, 4, dtype=torch.float32, device=device)
        is_real = device.type == "cuda"
        self._out_host = torch.empty(_MAX_ROWS, 4, dtype=torch.float32, pin_memory=is_real)
        self._tokens = torch.zeros(2 * _MAX_TOKENS, dtype=torch.int32, device=device)
        self._tokens_host = torch.zeros(2 * _MAX_TOKENS, dtype=torch.int32, pin_memory=is_real)
        self._none = torch.zeros(1, dtype=torch.bool, device=device)

    def __call__(
        self,
        logits: torch.Tensor,
        *,
        penalty: float = 1.0,
        seen: torch.Tensor | None = None,
        more_seen: Sequence[tuple[int, int]] = (),
        allowed: torch.Tensor | None = None,
    ) -> list[Likeliest]:
        """Look at each row.

        Args:
            logits: `[num_rows, vocab_size]`, at most 64 rows.
            penalty: Repetition penalty; 1.0 is off.
            seen: The tokens that it is for, bool `[vocab_size]`.
            more_seen: More of them, each with the row from which on it counts; at most 256.
            allowed: The tokens that a grammar allows, bool `[num_rows, vocab_size]`.

        Returns:
            For each row its likeliest tokens, the lower id first where two are equal.
        """
        num_rows, num_tokens = len(logits), len(more_seen)
        assert num_rows <= _MAX_ROWS and num_tokens <= _MAX_TOKENS and logits.stride(1) == 1
        if num_tokens:
            host = self._tokens_host.numpy()
            host[:num_tokens] = [token_id for token_id, _ in more_seen]
            host[_MAX_TOKENS : _MAX_TOKENS + num_tokens] = [row for _, row in more_seen]
            self._tokens.copy_(self._tokens_host, non_blocking=True)
        self.launch(logits, num_tokens, penalty, seen, allowed)
        self._out_host[:num_rows].copy_(self._out[:num_rows], non_blocking=True)
        torch.cuda.current_stream(logits.device).synchronize()
        rows = self._out_host[:num_rows].tolist()
        return [Likeliest(int(one), logprob, int(two), other) for one, logprob, two, other in rows]

    def launch(
        self,
        logits: torch.Tensor,
        num_tokens: int,
        penalty: float,
        seen: torch.Tensor | None,
        allowed: torch.Tensor | None,
    ) -> None:
        """Both kernels, for tokens that were copied to the device.

        Args:
            logits: `[num_rows, vocab_size]`, at most 64 rows.
            num_tokens: How many count as seen besides the mask.
            penalty: Repetition penalty.
            seen: bool `[vocab_size]`.
            allowed: bool `[num_rows, vocab_size]`.
        """
        num_rows = len(logits)
        self._kernels.likeliest_of_blocks_kernel[(num_rows, self._num_blocks)](
            logits, self._none if seen is None else seen, self._none if allowed is None else allowed, self._tokens,
            self._partial, num_tokens, logits.stride(0), float(penalty), V=self._vocab_size, BLOCK=_BLOCK,
            HAS_SEEN=seen is not None, HAS_ALLOWED=allowed is not None, MAX_TOKENS=_MAX_TOKENS, num_warps=4,
        )  # fmt: skip
        self._kernels.likeliest_of_rows_kernel[(num_rows,)](
            self._partial, self._out, self._num_blocks, BLOCKS=1 << (self._num_blocks - 1).bit_length(), num_warps=1
        )
