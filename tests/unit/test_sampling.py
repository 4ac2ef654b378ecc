"""The next token: held to transformers' own processors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import EngineError
from engine.inference.protocol import SamplingParams
from engine.inference.sampling import Choice, Sampler

pytestmark = pytest.mark.unit

VOCAB_SIZE = 40
PROMPT = (3, 7, 7, 11)
CPU = torch.device("cpu")


def logits_of(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def sampler(prompt: tuple[int, ...] = PROMPT, **params: object) -> Sampler:
    return Sampler(SamplingParams(max_new_tokens=1, **params), prompt, VOCAB_SIZE, CPU)  # type: ignore[arg-type]


def choose(one: Sampler, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> Choice:
    (choice,) = one.verify(logits[None], (), None if allowed is None else allowed[None])
    return choice


def draws(logits: torch.Tensor, num: int = 400, **params: object) -> Counter[int]:
    one = sampler(temperature=params.pop("temperature", 1.0), seed=5, **params)  # type: ignore[arg-type]
    return Counter(choose(one, logits).token_id for _ in range(num))


def test_greedy_takes_the_likeliest_whatever_the_other_parameters_say() -> None:
    for seed in range(20):
        logits = logits_of(seed)
        one = sampler(top_k=1000, top_p=0.1, min_p=1.0, seed=3)
        assert choose(one, logits).token_id == int(logits.argmax())


def test_top_k_of_one_is_greedy() -> None:
    for seed in range(20):
        assert choose(sampler(temperature=2.0, top_k=1, seed=seed), logits_of(seed)).token_id == int(
            logits_of(seed).argmax()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.03, 1.5, 0.7])
def test_the_repetition_penalty_is_transformers_and_counts_the_prompt(penalty: float, dtype: torch.dtype) -> None:
    one = sampler(repetition_penalty=penalty)
    seen: list[int] = list(PROMPT)
    for seed in range(30):
        logits = logits_of(seed, dtype)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits.float()[None])  # type: ignore[arg-type]
        expected = int(scores[0].argmax())
        assert choose(one, logits).token_id == expected
        seen.append(expected)


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_only_tokens_that_transformers_would_keep_are_drawn_and_as_often(params: dict, warpers: list) -> None:
    for seed in range(4):
        logits = logits_of(seed)
        scores = logits[None]
        for warper in warpers:
            scores = warper(torch.tensor([[0]]), scores)
        expected = scores[0].softmax(-1)
        counts = draws(logits, **dict(params))
        assert set(counts) <= set(expected.nonzero().flatten().tolist())
        for token_id, probability in enumerate(expected.tolist()):
            assert abs(counts[token_id] / 400 - probability) < 0.12, (token_id, probability)


def test_a_top_p_of_zero_keeps_the_likeliest() -> None:
    assert set(draws(logits_of(1), num=20, top_p=0.0)) == {int(logits_of(1).argmax())}


def test_equal_logits_all_stay_in_top_k() -> None:
    assert set(draws(torch.zeros(VOCAB_SIZE), top_k=2)) == set(range(VOCAB_SIZE))


def test_a_seed_repeats_and_another_one_differs() -> None:
    flat = torch.zeros(VOCAB_SIZE)
    first, again, other = (sampler(temperature=1.0, seed=seed) for seed in (1, 1, 2))
    runs = [[choose(one, flat).token_id for _ in range(20)] for one in (first, again, other)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 5
    unseeded = [[choose(sampler(temperature=1.0), flat).token_id for _ in range(8)] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_a_grammar_allows_is_chosen(temperature: float) -> None:
    allowed = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    allowed[[5, 9]] = True
    one = sampler(temperature=temperature, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    assert {choose(one, logits_of(seed), allowed).token_id for seed in range(40)} == {5, 9}


def test_the_logits_are_left_as_they_were() -> None:
    logits = logits_of(0)
    kept = logits.clone()
    choose(sampler(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.3), logits)
    assert logits.equal(kept)


def test_the_likeliest_tokens_are_told_with_what_the_choice_was_made_from() -> None:
    logits = logits_of(3)
    allowed = torch.zeros(len(logits), dtype=torch.bool)
    allowed[[2, 5, 9]] = True
    penalised = torch.where(logits > 0, logits / 1.3, logits * 1.3)[[2, 5, 9]].log_softmax(-1)
    prompt = tuple(range(len(logits)))
    params = SamplingParams(1, repetition_penalty=1.3, top_logprobs=2)
    choice = choose(Sampler(params, prompt, len(logits), torch.device("cpu")), logits, allowed)
    expected = sorted(zip(penalised.tolist(), (2, 5, 9), strict=True), reverse=True)[:2]
    assert [top.token_id for top in choice.top_logprobs] == [token_id for _, token_id in expected]
    assert [top.logprob for top in choice.top_logprobs] == pytest.approx([logprob for logprob, _ in expected])
    assert choice.token_id == expected[0][1]
    assert choose(sampler(), logits).top_logprobs == ()


def drafted(logits: torch.Tensor, draft: list[int], allowed: torch.Tensor | None = None, **params: Any) -> list[int]:
    return [choice.token_id for choice in sampler(**params).verify(logits, draft, allowed)]


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.4}, {"temperature": 1.3, "seed": 3, "top_k": 7}])
def test_verifying_a_draft_gives_what_choosing_one_by_one_gives(params: dict[str, Any]) -> None:
    for seed in range(40):
        rows = torch.stack([logits_of(100 * seed + place) for place in range(6)])
        one = sampler(**params)
        expected = [choose(one, row).token_id for row in rows]
        for num_right in range(6):
            draft = [*expected[:num_right], *((token_id + 1) % VOCAB_SIZE for token_id in expected[num_right:5])]
            assert drafted(rows, draft, **params) == expected[: num_right + 1]


def test_a_drafted_token_counts_as_seen_for_the_next_one_even_twice() -> None:
    rows = torch.zeros(4, VOCAB_SIZE)
    rows[:, 20], rows[:, 21] = 2.0, 1.9
    assert drafted(rows, [20, 21, 20], repetition_penalty=1.2) == [20, 21, 20, 20]
    rows[1:, 21] = 2.1
    rows[2:, 22] = 1.95
    assert drafted(rows, [20, 21, 22], repetition_penalty=1.2) == [20, 21, 22, 21]


def test_a_draft_that_a_grammar_forbids_is_not_chosen() -> None:
    rows = torch.stack([logits_of(1), logits_of(2)])
    allowed = torch.zeros(2, VOCAB_SIZE, dtype=torch.bool)
    allowed[0, 5] = allowed[1, 9] = True
    assert drafted(rows, [5], allowed) == [5, 9]
    assert drafted(rows, [6], allowed) == [5]


def test_logprobs_of_a_verified_draft_are_those_of_each_place() -> None:
    rows = torch.stack([logits_of(seed) for seed in range(3)])
    draft = [int(row.argmax()) for row in rows[:2]]
    choices = sampler(top_logprobs=2).verify(rows, draft)
    for choice, row in zip(choices, rows, strict=True):
        assert choice.logprob == pytest.approx(float(row.log_softmax(-1)[choice.token_id]))
        assert [one.token_id for one in choice.top_logprobs] == row.topk(2).indices.tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-320])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_a_temperature_near_nothing_is_greedy(temperature: float, penalty: float) -> None:
    rows = torch.stack([logits_of(seed) for seed in range(4)]) * 1e3
    cold = sampler(temperature=temperature, seed=1, repetition_penalty=penalty)
    greedy = sampler(repetition_penalty=penalty)
    assert [choose(cold, row) for row in rows] == [choose(greedy, row) for row in rows]


def test_a_small_temperature_with_large_logits_overflows_nowhere() -> None:
    assert choose(sampler(temperature=2e-5, seed=1), torch.linspace(-1e30, 1e30, VOCAB_SIZE)).token_id == VOCAB_SIZE - 1


def test_a_top_p_of_nothing_keeps_the_likeliest() -> None:
    assert set(draws(logits_of(3), top_p=0.0, temperature=5.0)) == {int(logits_of(3).argmax())}


def test_logits_that_are_no_numbers_are_an_error_of_that_request() -> None:
    with pytest.raises(EngineError, match="not numbers"):
        choose(sampler(temperature=1.0), torch.full((VOCAB_SIZE,), float("nan")))
