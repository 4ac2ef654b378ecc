"""Where an answer that changes nothing could have gone another way.

A small model asked for an edit often writes the code out as it is: at every token the old text is a little likelier
than the change, also where it knows the change. Asking again does not help; going back to the tokens at which it
hesitated most, and on from its second choice, does (figures in DECISIONS.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.inference.protocol import TokenLogprob


@dataclass(frozen=True, slots=True)
class Fork:
    """A second choice.

    Args:
        position: Index of the generated token that it replaces.
        token_id: The token in its place.
        logprob: Its log-probability there.
    """

    position: int
    token_id: int
    logprob: float


def likeliest_forks(
    token_ids: Sequence[int],
    top_logprobs: Sequence[Sequence[TokenLogprob]],
    limit: int,
    *,
    min_probability: float = 0.0,
    excluded: Collection[int] = (),
) -> list[Fork]:
    """The second choices of an answer, likeliest first.

    Args:
        token_ids: The answer.
        top_logprobs: For each of its tokens the likeliest tokens there.
        limit: At most so many.
        min_probability: Less likely ones are no choice.
        excluded: Tokens that are no choice, such as end tokens.

    Returns:
        At most one for each position; of equally likely ones the earlier.
    """
    forks: list[Fork] = []
    for position, (token_id, likeliest) in enumerate(zip(token_ids, top_logprobs, strict=True)):
        others = [other for other in likeliest if other.token_id != token_id and other.token_id not in excluded]
        if others:
            second = max(others, key=lambda other: other.logprob)
            if math.exp(second.logprob) >= min_probability:
                forks.append(Fork(position, second.token_id, second.logprob))
    return sorted(forks, key=lambda fork: -fork.logprob)[:limit]
