"""The plain reference loop that every fast path is held to (invariant 7). Slow on purpose.

No KV cache, no chunks, no prefix reuse, no batching: each token is computed from the whole text, and the choice is made
by transformers' own logits processors. `reference_check` computes all tokens of a finished text in one such pass.
Not covered: adapters switched between tokens, stop strings, budgets of time.
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
    logits = _logits(model, token_ids, [len(token_ids) - 1])
    return _choice(logits, token_ids, repetition_penalty, allowed)


def reference_check(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    generated: Sequence[int],
    *,
    repetition_penalty: float = 1.0,
    matcher: GrammarMatcher | None = None,
) -> list[ReferenceStep]:
    """The greedy choice before each generated token and after the last, all from one pass over the whole text.

    Where every choice is the token that was generated, the plain loop gives the same text: each of its steps sees the
    same tokens. Much faster than the loop; the sums of one long pass differ from its own in the last bits.

    Args:
        model: The model, in eval mode.
        prompt_token_ids: The prompt.
        generated: What is checked.
        repetition_penalty: transformers' meaning.
        matcher: A grammar's matcher at its start; where the grammar ends, so does the list.

    Returns:
        The steps: one more than there are tokens, or as many as the grammar takes.
    """
    text, num_prompt = [*prompt_token_ids, *generated], len(prompt_token_ids)
    logits = _logits(model, text, range(num_prompt - 1, len(text)))
    steps: list[ReferenceStep] = []
    for place, row in enumerate(logits):
        if matcher is not None and matcher.is_complete:
            break
        before = text[: num_prompt + place]
        steps.append(_choice(row[None], before, repetition_penalty, matcher.allowed() if matcher else None))
        if matcher is not None and place < len(generated):
            matcher.advance(generated[place])
    return steps


def _logits(model: PreTrainedModel, token_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """float32 `[len(places), vocab_size]`: what follows each of these places, computed from scratch."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    kept = torch.tensor(list(places), device=model.device)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0].float()


def _choice(
    logits: torch.Tensor, before: Sequence[int], repetition_penalty: float, allowed: torch.Tensor | None
) -> ReferenceStep:
    """The greedy choice from float32 `[1, vocab_size]` after these tokens."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    ids = torch.tensor([list(before)], device=logits.device)
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
