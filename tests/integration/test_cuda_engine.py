"""The engine on the CUDA path beside the engine on transformers' modules: drafts, prefixes, grammars, many at once.

Skipped where torch sees no GPU or Triton is missing. The model is small and random; only a tokenizer is read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import LoadedModel
from engine.inference.protocol import Completion, GenerationRequest, Grammar, Priority, SamplingParams, complete

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
pytest.importorskip("triton")

NUMBERS = random.Random(1)


def some(num_tokens: int) -> tuple[int, ...]:
    return tuple(NUMBERS.randrange(1000, 9000) for _ in range(num_tokens))


@pytest.fixture(scope="module")
def loaded(model_folder_05b: Path) -> LoadedModel:
    from engine.inference.random_model import random_model

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    made = replace(random_model(config, "fp16", torch.float16), folder=model_folder_05b, name="small")
    made.model.lm_head.weight.data.mul_(8)  # leads that rounding does not turn
    return made


def engine_of(loaded: LoadedModel, *, fast: bool = True, kv_cache_tokens: int = 4096, **more: int) -> InProcessEngine:
    limits: Any = {"serve_while_compiling": False, "kv_cache_tokens": kv_cache_tokens, **more}
    config = EngineConfig(fast_path=fast, **limits)
    engine = InProcessEngine("small", loaded.folder, lambda: loaded, config=config)
    engine.wait_until_ready(600)
    assert (engine._runner.name == "transformers") is not fast
    return engine


@pytest.fixture(scope="module")
def fast(loaded: LoadedModel) -> Iterator[InProcessEngine]:
    with engine_of(loaded) as engine:
        yield engine


@pytest.fixture(scope="module")
def slow(loaded: LoadedModel) -> Iterator[InProcessEngine]:
    with engine_of(loaded, fast=False) as engine:
        yield engine


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = list(zip(one, other, strict=False))
    return next((place for place, (left, right) in enumerate(pairs) if left != right), len(pairs))


@pytest.mark.parametrize("num_prompt_tokens", [5, 63, 64, 65, 300, 1500])
def test_it_gives_the_tokens_of_the_plain_modules(
    fast: InProcessEngine, slow: InProcessEngine, num_prompt_tokens: int
) -> None:
    """In 16 bit, since bitsandbytes rounds activations to 8 bit and we do not; a near tie may part them late."""
    request = GenerationRequest(some(num_prompt_tokens), SamplingParams(24, repetition_penalty=1.05, top_logprobs=2))
    ours, theirs = complete(fast, request), complete(slow, request)
    place = num_equal(ours.token_ids, theirs.token_ids)
    if place < 24:
        first, second = theirs.top_logprobs[place]
        assert first.logprob - second.logprob < 0.5, "they part at a near tie alone"
        assert ours.token_ids[place] == second.token_id
    assert ours.top_logprobs[0][0].logprob == pytest.approx(theirs.top_logprobs[0][0].logprob, abs=0.3)
    assert len(ours.top_logprobs) == len(ours.token_ids) == 24


def test_drafts_change_no_token(fast: InProcessEngine) -> None:
    prompt = some(200)
    replayed = (*prompt[50:80], *some(10), *prompt[90:110])
    request = GenerationRequest(prompt, SamplingParams(len(replayed), replay_token_ids=replayed))
    assert complete(fast, request).num_accepted_tokens > 30
    onward = GenerationRequest((*prompt, *replayed), SamplingParams(16, repetition_penalty=1.03))
    drafted = complete(fast, onward)
    plain = complete(fast, replace(onward, params=replace(onward.params, speculation=False)))
    assert drafted.num_cached_tokens >= len(prompt) + len(replayed) - 1
    assert drafted.token_ids == plain.token_ids


def test_a_prefix_is_shared_and_the_tokens_are_those_of_a_fresh_prompt(loaded: LoadedModel) -> None:
    prompt, ends = some(500), [some(20), some(30)]
    with engine_of(loaded) as engine:
        fresh = [complete(engine, GenerationRequest((*prompt, *end), SamplingParams(12))) for end in ends]
        again = [complete(engine, GenerationRequest((*prompt, *end), SamplingParams(12))) for end in ends]
    assert fresh[0].num_cached_tokens == 0
    assert [one.num_cached_tokens >= 500 for one in (fresh[1], *again)] == [True] * 3
    assert [one.token_ids for one in again] == [one.token_ids for one in fresh]


def test_a_grammar_holds(fast: InProcessEngine) -> None:
    grammar = Grammar("json_schema", '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}')
    completion = complete(fast, GenerationRequest(some(50), SamplingParams(60, grammar=grammar)))
    assert completion.text.startswith('{"a": ')


def test_more_at_once_than_the_cache_holds_end_as_each_would_alone(loaded: LoadedModel) -> None:
    requests = [
        GenerationRequest(some(600), SamplingParams(40), Priority.BACKGROUND if number % 2 else Priority.INTERACTIVE)
        for number in range(10)
    ]
    with engine_of(loaded, kv_cache_tokens=2048) as engine:
        ids = [engine.submit(request) for request in requests]
        together = [list(engine.stream(one))[-1] for one in ids]
        alone = [complete(engine, request) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Completion)
        assert num_equal(one.token_ids, other.token_ids) >= 1
        assert len(one.token_ids) == 40


def test_an_embedding_is_that_of_the_plain_modules(fast: InProcessEngine, slow: InProcessEngine) -> None:
    request = GenerationRequest(some(100), SamplingParams(1), embed=True)
    ours, theirs = (torch.tensor(complete(engine, request).embedding) for engine in (fast, slow))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
