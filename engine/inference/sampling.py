"""From logits to the next token: repetition penalty, grammar mask, then greedy or temperature, top-k, top-p, min-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.errors import EngineError
from engine.inference.protocol import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from engine.inference.cuda.verify import GreedyKernel

_MAX_RECENT = 128
_LEAST_TEMPERATURE = 1e-5  # below, a likelier token wins by any lead that fp32 can tell, and quotients overflow


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token; its log-probability and the likeliest tokens at its place if they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses tokens for one sequence.

    Args:
        params: How to choose.
        prompt_token_ids: The prompt; it counts for the repetition penalty, as in transformers.
        vocab_size: Length of a row of logits.
        device: Where the logits are.
        greedy: Chooses greedily in one go, where there is such a kernel.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: tuple[int, ...],
        vocab_size: int,
        device: torch.device,
        greedy: GreedyKernel | None = None,
    ) -> None:
        self._params = params
        is_greedy = params.temperature < _LEAST_TEMPERATURE
        self._greedy = greedy if is_greedy and params.top_logprobs <= 2 else None
        self._recent: list[int] = []  # seen, but not in the mask yet
        self._num_chosen = 0
        self._generator: torch.Generator | None = None
        if not is_greedy:
            self._generator = torch.Generator()
            self._generator.seed() if params.seed is None else self._generator.manual_seed(params.seed)
        self._seen: torch.Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_token_ids, device=device)] = True

    def verify(
        self, logits: torch.Tensor, draft_token_ids: Sequence[int] = (), allowed: torch.Tensor | None = None
    ) -> list[Choice]:
        """Choose after the sequence's last token, and after each draft token as long as the choice was that very token.

        A draft token is a guess with no probability of its own, so taking the choice where both agree and stopping
        where they do not is speculative decoding's acceptance rule (Leviathan et al. 2023, section 2.3), and a sampled
        text is the same, number by number of its generator, with drafts and without.

        Args:
            logits: `[1 + num_draft_tokens, vocab_size]`, any float dtype.
            draft_token_ids: The draft.
            allowed: The tokens that the grammar allows at each place, bool of the shape of `logits`.

        Returns:
            The tokens, at least one; they count as seen from now on.

        Raises:
            EngineError: There is nothing to sample from.
        """
        if self._greedy is not None:
            return self._verify_at_once(self._greedy, logits, draft_token_ids, allowed)
        logits = self._penalised(logits.float(), draft_token_ids)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        likeliest = logits.argmax(-1).tolist() if self._generator is None else None
        token_ids: list[int] = []
        for row, draft_token_id in enumerate((*draft_token_ids, None)):
            token_id = likeliest[row] if likeliest is not None else self._sample(logits[row].cpu())
            token_id = self._replayed(self._num_chosen + row, token_id)
            token_ids.append(token_id)
            if token_id != draft_token_id:
                break
        self._num_chosen += len(token_ids)
        if self._seen is not None:
            self._seen[torch.tensor(token_ids, device=self._seen.device)] = True
        return self._with_logprobs(token_ids, logits)

    def _verify_at_once(
        self, greedy: GreedyKernel, logits: torch.Tensor, draft_token_ids: Sequence[int], allowed: torch.Tensor | None
    ) -> list[Choice]:
        """`verify` with one wait for the device."""
        more_seen = [(token_id, 0) for token_id in self._recent]
        more_seen += [(token_id, row) for row, token_id in enumerate(draft_token_ids, 1)]
        rows = greedy(
            logits,
            penalty=self._params.repetition_penalty,
            seen=self._seen,
            more_seen=more_seen if self._seen is not None else (),
            allowed=allowed,
        )
        choices: list[Choice] = []
        for row, draft_token_id in zip(rows, (*draft_token_ids, None), strict=True):
            token_id = self._replayed(self._num_chosen + len(choices), row.token_id)
            pairs = ((row.token_id, row.logprob), (row.second_token_id, row.second_logprob))
            top = tuple(TokenLogprob(*pair) for pair in pairs[: self._params.top_logprobs])
            choices.append(Choice(token_id, row.logprob if top else None, top))
            if token_id != draft_token_id:
                break
        self._num_chosen += len(choices)
        if self._seen is not None:
            self._recent += [choice.token_id for choice in choices]
            if len(self._recent) > _MAX_RECENT:
                self._seen[torch.tensor(self._recent, device=self._seen.device)] = True
                self._recent.clear()
        return choices

    def _replayed(self, place: int, token_id: int) -> int:
        replay = self._params.replay_token_ids
        return replay[place] if place < len(replay) else token_id

    def _with_logprobs(self, token_ids: list[int], logits: torch.Tensor) -> list[Choice]:
        if not self._params.top_logprobs:
            return [Choice(token_id) for token_id in token_ids]
        logits = logits[: len(token_ids)]
        total = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(min(self._params.top_logprobs, logits.shape[-1]))
        places = torch.tensor(token_ids, device=logits.device)[:, None]
        chosen = (logits.gather(1, places) - total)[:, 0].tolist()
        choices: list[Choice] = []
        for token_id, logprob, ids, values in zip(
            token_ids, chosen, top.indices.tolist(), (top.values - total).tolist(), strict=True
        ):
            pairs = zip(ids, values, strict=True)
            choices.append(Choice(token_id, logprob, tuple(TokenLogprob(*pair) for pair in pairs)))
        return choices

    def _penalised(self, logits: torch.Tensor, draft_token_ids: Sequence[int]) -> torch.Tensor:
        """Keskar et al. 2019 (CTRL), section 4.1, in transformers' form: seen logits shrink towards minus infinity.

        After a draft token it has been seen too. Only the logits of seen tokens are looked at.
        """
        if self._seen is None:
            return logits
        penalty, token_ids = self._params.repetition_penalty, self._seen.nonzero()[:, 0]
        is_seen = torch.ones(len(logits), len(token_ids), dtype=torch.bool, device=logits.device)
        if draft_token_ids:
            first_at = {token_id: place for place, token_id in reversed(list(enumerate(draft_token_ids)))}
            drafted = torch.tensor(list(first_at.items()), device=logits.device)
            drafted = drafted[~self._seen[drafted[:, 0]]]  # [num_fresh, (token_id, place)]
            token_ids = torch.cat([token_ids, drafted[:, 0]])
            rows = torch.arange(len(logits), device=logits.device)
            is_seen = torch.cat([is_seen, rows[:, None] > drafted[:, 1]], dim=1)
        known = logits[:, token_ids]
        changed = torch.where(known > 0, known / penalty, known * penalty)
        return logits.index_copy(1, token_ids, torch.where(is_seen, changed, known))

    def _sample(self, logits: torch.Tensor) -> int:
        params = self._params
        logits = (logits - logits.max()) / params.temperature
        if 0 < params.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], float("-inf"))
        if params.top_p < 1:
            logits = _keep_top_p(logits, params.top_p)
        probabilities = logits.softmax(-1)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
        if not torch.isfinite(probabilities).all():
            raise EngineError("The model's probabilities are not numbers here", hint="Use other sampling options.")
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): the likeliest tokens whose probability together reaches `top_p`."""
    ordered, indices = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    is_outside = probabilities.cumsum(-1) - probabilities >= top_p
    is_outside[0] = False
    return logits.masked_fill(torch.zeros_like(is_outside).scatter(0, indices, is_outside), float("-inf"))
