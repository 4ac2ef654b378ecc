"""The greedy choice of a step's rows in two kernels and one copy: repetition penalty, grammar mask, the two likeliest.

By torch's own operations that takes a dozen kernels and four waits for the device, a quarter of a decode step.
Not covered: sampling, and more than two likeliest tokens, which `sampling.py` does by torch.
"""

# pyright: reportUnreachable=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportOptionalOperand=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_MAX_ROWS = 64
_MAX_TOKENS = 256  # that count as seen besides the mask


@triton.jit
def _blocks_kernel(
    logits, seen, allowed, tokens, partial, num_tokens, stride, penalty,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_ALLOWED: tl.constexpr, MAX_TOKENS: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: largest, its place, second largest, its place, sum of exponentials."""
    row, block = tl.program_id(0), tl.program_id(1)
    places = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < V
    values = tl.load(logits + row * stride + places, mask=is_inside, other=float("-inf")).to(tl.float32)
    if HAS_SEEN:
        is_seen = tl.load(seen + places, mask=is_inside, other=0) != 0
        for index in range(num_tokens):
            token_id = tl.load(tokens + index)
            from_row = tl.load(tokens + MAX_TOKENS + index)
            is_seen = is_seen | ((places == token_id) & (row >= from_row))
        values = tl.where(is_seen, tl.where(values > 0, tl.div_rn(values, penalty), values * penalty), values)
    if HAS_ALLOWED:
        is_allowed = tl.load(allowed + row.to(tl.int64) * V + places, mask=is_inside, other=0) != 0
        values = tl.where(is_allowed, values, float("-inf"))
    first, first_at = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    others = tl.where(tl.arange(0, BLOCK) == first_at, float("-inf"), values)
    second, second_at = tl.max(others, 0, return_indices=True, return_indices_tie_break_left=True)
    shift = tl.where(first == float("-inf"), 0.0, first)
    to = partial + (row * tl.num_programs(1) + block) * 5
    tl.store(to, first)
    tl.store(to + 1, (block * BLOCK + first_at).to(tl.float32))
    tl.store(to + 2, second)
    tl.store(to + 3, (block * BLOCK + second_at).to(tl.float32))
    tl.store(to + 4, tl.sum(tl.exp(values - shift), 0))


@triton.jit
def _rows_kernel(partial, out, num_blocks, BLOCKS: tl.constexpr):
    """Of one row: the two likeliest tokens and their log-probabilities."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCKS)
    at = partial + (row * num_blocks + lanes) * 5
    is_inside = lanes < num_blocks
    first = tl.load(at, mask=is_inside, other=float("-inf"))
    first_at = tl.load(at + 1, mask=is_inside, other=0.0)
    second = tl.load(at + 2, mask=is_inside, other=float("-inf"))
    second_at = tl.load(at + 3, mask=is_inside, other=0.0)
    sums = tl.load(at + 4, mask=is_inside, other=0.0)
    best, winner = tl.max(first, 0, return_indices=True, return_indices_tie_break_left=True)
    log_sum = best + tl.log(tl.sum(tl.where(first == float("-inf"), 0.0, sums * tl.exp(first - best)), 0))
    is_winner = lanes == winner
    rest = tl.where(is_winner, second, first)
    rest_at = tl.where(is_winner, second_at, first_at)
    runner_up, place = tl.max(rest, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row * 4, tl.sum(tl.where(is_winner, first_at, 0.0), 0))
    tl.store(out + row * 4 + 1, best - log_sum)
    tl.store(out + row * 4 + 2, tl.sum(tl.where(lanes == place, rest_at, 0.0), 0))
    tl.store(out + row * 4 + 3, runner_up - log_sum)


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
        device: A CUDA device.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        assert vocab_size < 2**24, "token ids go through fp32"
        self._vocab_size = vocab_size
        self._num_blocks = -(-vocab_size // _BLOCK)
        self._partial = torch.empty(_MAX_ROWS * self._num_blocks * 5, dtype=torch.float32, device=device)
        self._out = torch.empty(_MAX_ROWS, 4, dtype=torch.float32, device=device)
        self._out_host = torch.empty(_MAX_ROWS, 4, dtype=torch.float32).pin_memory()
        self._tokens = torch.zeros(2 * _MAX_TOKENS, dtype=torch.int32, device=device)
        self._tokens_host = torch.zeros(2 * _MAX_TOKENS, dtype=torch.int32).pin_memory()
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
        _blocks_kernel[(num_rows, self._num_blocks)](
            logits, self._none if seen is None else seen, self._none if allowed is None else allowed, self._tokens,
            self._partial, num_tokens, logits.stride(0), float(penalty), V=self._vocab_size, BLOCK=_BLOCK,
            HAS_SEEN=seen is not None, HAS_ALLOWED=allowed is not None, MAX_TOKENS=_MAX_TOKENS, num_warps=4,
        )  # fmt: skip
        _rows_kernel[(num_rows,)](
            self._partial, self._out, self._num_blocks, BLOCKS=triton.next_power_of_2(self._num_blocks), num_warps=1
        )
        self._out_host[:num_rows].copy_(self._out[:num_rows], non_blocking=True)
        torch.cuda.current_stream(logits.device).synchronize()
        rows = self._out_host[:num_rows].tolist()
        return [Likeliest(int(one), logprob, int(two), other) for one, logprob, two, other in rows]
