"""The plain reference loop that every fast path is held to (invariant 7). Slow on purpose.

No KV cache, no chunks, no prefix reuse, no batching: each token is computed from the whole text, and the choice is made
by transformers' own logits processors. Not covered: adapters switched between tokens, stop strings, budgets of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.inference.grammar import GrammarMatcher


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One token of the reference.

    Args:
        token_id: The likeliest token, penalty and grammar applied.
        gap: Its logit minus the runner-up's.
    """

    token_id: int
    gap: float


def reference_step(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    repetition_penalty: float = 1.0,
    allowed: torch.Tensor | None = None,
) -> ReferenceStep:
    """The greedy choice after `token_ids`, computed from scratch.

    Args:
        model: The model, in eval mode.
        token_ids: Prompt and what was generated.
        repetition_penalty: transformers' meaning.
        allowed: The tokens that the grammar allows, bool `[vocab_size]`.

    Returns:
        The token and its lead.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    with torch.inference_mode():
        last = torch.tensor([len(token_ids) - 1], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[:, -1].float()
        processors = LogitsProcessorList()
        if repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        scores = processors(ids, logits)[0]  # pyright: ignore[reportArgumentType]
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
    top = scores.topk(2)
    return ReferenceStep(int(top.indices[0]), float(top.values[0] - top.values[1]))


def reference_generate(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    repetition_penalty: float = 1.0,
    matcher: GrammarMatcher | None = None,
) -> list[ReferenceStep]:
    """Greedy decoding, token by token, each from scratch.

    Args:
        model: The model, in eval mode.
        prompt_token_ids: The prompt.
        max_new_tokens: Most tokens.
        eos_token_ids: End tokens; they end the list and are not in it.
        repetition_penalty: transformers' meaning.
        matcher: A grammar's matcher at its start.

    Returns:
        The steps.
    """
    steps: list[ReferenceStep] = []
    while len(steps) < max_new_tokens and not (matcher is not None and matcher.is_complete):
        step = reference_step(
            model,
            [*prompt_token_ids, *(step.token_id for step in steps)],
            repetition_penalty=repetition_penalty,
            allowed=matcher.allowed() if matcher else None,
        )
        if step.token_id in eos_token_ids:
            break
        steps.append(step)
        if matcher is not None:
            matcher.advance(step.token_id)
    return steps
