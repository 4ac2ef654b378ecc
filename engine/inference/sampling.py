"""From logits to the next token: repetition penalty, grammar mask, then greedy or temperature, top-k, top-p, min-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.inference.protocol import SamplingParams, TokenLogprob


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
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: tuple[int, ...], vocab_size: int, device: torch.device
    ) -> None:
        self._params = params
        self._generator: torch.Generator | None = None
        if params.temperature > 0:
            self._generator = torch.Generator()
            self._generator.seed() if params.seed is None else self._generator.manual_seed(params.seed)
        self._seen: torch.Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_token_ids, device=device)] = True

    def choose(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> Choice:
        """The next token.

        Args:
            logits: One row, `[vocab_size]`, any float dtype.
            allowed: The tokens that the grammar allows, bool `[vocab_size]`.

        Returns:
            The token. It counts as seen from now on.
        """
        logits = self._penalised(logits.float())
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        token_id = int(logits.argmax()) if self._generator is None else self._sample(logits.cpu(), self._generator)
        if self._seen is not None:
            self._seen[token_id] = True
        return self._with_logprobs(token_id, logits)

    def _with_logprobs(self, token_id: int, logits: torch.Tensor) -> Choice:
        if not self._params.top_logprobs:
            return Choice(token_id)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self._params.top_logprobs, logits.shape[-1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Choice(token_id, float(logprobs[token_id]), tuple(TokenLogprob(*pair) for pair in pairs))

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Keskar et al. 2019 (CTRL), section 4.1, in transformers' form: seen logits shrink towards minus infinity."""
        if self._seen is None:
            return logits
        penalty = self._params.repetition_penalty
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _sample(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        params = self._params
        logits = logits / params.temperature
        if 0 < params.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], float("-inf"))
        if params.top_p < 1:
            logits = _keep_top_p(logits, params.top_p)
        probabilities = logits.softmax(-1)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def _keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): the likeliest tokens whose probability together reaches `top_p`."""
    ordered, indices = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    is_outside = probabilities.cumsum(-1) - probabilities >= top_p
    is_outside[0] = False
    return logits.masked_fill(torch.zeros_like(is_outside).scatter(0, indices, is_outside), float("-inf"))
