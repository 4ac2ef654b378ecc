"""The engine's queue, budgets, streams and failures, on the real 0.5B with few tokens."""

from __future__ import annotations

import random
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ContextLengthError, EngineError, ModelError, PlanPatchError, UsageError
from engine.inference.engine import _SLACK_TOKENS, EngineConfig, InProcessEngine
from engine.inference.kv_cache import SequenceCache
from engine.inference.loading import LoadedModel, load_model
from engine.inference.protocol import (
    Completion,
    Event,
    FinishReason,
    GenerationRequest,
    Grammar,
    Message,
    Priority,
    SamplingParams,
    Token,
    complete,
)
from engine.inference.runner import ReferenceRunner

PROMPT = "Count from one to twenty in words."
LONG_PROMPT = "Write a long poem about the sea. " * 10


@pytest.fixture(scope="module")
def loaded(model_folder_05b: Path) -> LoadedModel:
    return load_model("0.5b", "digest", model_folder_05b, device="cpu", quantization="bf16")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[InProcessEngine]:
    """Shared by the tests that leave it as it was."""
    with engine_of(loaded) as engine:
        engine.wait_until_ready()
        yield engine


def engine_of(loaded: LoadedModel, gate: threading.Event | None = None, **limits: Any) -> InProcessEngine:
    """An engine on the loaded weights; with a gate it is loading until that is set."""

    def load() -> LoadedModel:
        if gate is not None:
            gate.wait()
        return loaded

    return InProcessEngine("0.5b", loaded.folder, load, digest="digest", config=EngineConfig(**limits))


def request(
    engine: InProcessEngine, text: str = PROMPT, priority: Priority = Priority.INTERACTIVE, **params: object
) -> GenerationRequest:
    token_ids = tuple(engine.tokenizer.encode_chat([Message("user", text)]))
    sampling = SamplingParams(**{"max_new_tokens": 4, **params})  # type: ignore[arg-type]
    return GenerationRequest(token_ids, sampling, priority)


def warm(engine: InProcessEngine, text: str = PROMPT) -> None:
    """Bring the prompt into the prefix cache: in bf16 only equal ways of computing give equal text."""
    complete(engine, request(engine, text, max_new_tokens=1))


def wait_for(condition, timeout_s: float = 30) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "it did not happen"
        time.sleep(0.01)


def parts(events: list[Event]) -> tuple[str, list[int], Completion]:
    """Streamed text, streamed ids, and the end."""
    *tokens, last = events
    assert isinstance(last, Completion)
    assert all(isinstance(token, Token) for token in tokens)
    text = "".join(token.text for token in tokens if isinstance(token, Token))
    return text, [i for token in tokens if isinstance(token, Token) for i in token.token_ids], last


# queue


def test_one_request_more_than_the_queue_holds_is_refused_and_the_rest_go_on(loaded: LoadedModel) -> None:
    gate = threading.Event()
    with engine_of(loaded, gate, max_waiting=2) as engine:
        ids = [engine.submit(request(engine)) for _ in range(2)]
        with pytest.raises(EngineError, match=r"queue is full \(2 requests are waiting\)") as caught:
            engine.submit(request(engine))
        assert caught.value.details["queue_full"] is True
        assert (engine.status().state, engine.status().num_waiting) == ("loading", 2)
        gate.set()
        assert [parts(list(engine.stream(name)))[2].finish_reason for name in ids] == [FinishReason.LENGTH] * 2
        assert engine.status().num_waiting == engine.status().num_running == 0


def test_interactive_goes_before_background_and_within_each_the_first_comes_first(loaded: LoadedModel) -> None:
    gate = threading.Event()
    ended: list[int] = []
    with engine_of(loaded, gate, max_rows=1) as engine:
        order = [Priority.BACKGROUND, Priority.BACKGROUND, Priority.INTERACTIVE, Priority.INTERACTIVE]
        ids = [engine.submit(request(engine, priority=priority, max_new_tokens=2)) for priority in order]

        def follow(number: int) -> None:
            list(engine.stream(ids[number]))
            ended.append(number)

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join(60)
    assert set(ended[:2]) == {2, 3}
    assert set(ended[2:]) == {0, 1}


def test_two_threads_at_once_get_their_own_tokens_only(engine: InProcessEngine) -> None:
    texts = ["Say only the word: apple", "Say only the number: 12345"]
    alone = [complete(engine, request(engine, text, max_new_tokens=6)) for text in texts]
    results: dict[int, list[Event]] = {}

    def follow(number: int) -> None:
        results[number] = list(engine.stream(engine.submit(request(engine, texts[number], max_new_tokens=6))))

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, one in enumerate(alone):
        text, token_ids, last = parts(results[number])
        assert text == last.text == engine.tokenizer.decode(last.token_ids)
        assert tuple(token_ids) == last.token_ids
        assert last.text[:3] == one.text[:3]


# ends


def test_time_that_runs_out_ends_a_request_as_time(engine: InProcessEngine) -> None:
    completion = complete(engine, request(engine, max_new_tokens=200, max_time_s=0.001))
    assert completion.finish_reason is FinishReason.TIME
    assert len(completion.token_ids) <= 1
    assert completion.prefill_s > 0.001


def test_time_in_the_queue_does_not_count(loaded: LoadedModel) -> None:
    gate = threading.Event()
    with engine_of(loaded, gate) as engine:
        name = engine.submit(request(engine, max_new_tokens=1, max_time_s=30))
        time.sleep(0.2)
        gate.set()
        _, _, last = parts(list(engine.stream(name)))
    assert last.finish_reason is FinishReason.LENGTH
    assert last.queue_s >= 0.2


def test_a_stop_string_is_never_sent_and_the_text_ends_before_it(engine: InProcessEngine) -> None:
    warm(engine)
    free = complete(engine, request(engine, max_new_tokens=12)).text
    assert len(free) > 20, f"the model says too little: {free!r}"
    for stop in ((free[5:7],), (free[3:20],), (free[9:18], "zzz"), (free[6:20] + "X", free[8:10])):
        text, _, last = parts(list(engine.stream(engine.submit(request(engine, max_new_tokens=12, stop=stop)))))
        assert last.finish_reason is FinishReason.STOP
        assert text == last.text == free[: min(free.index(word) for word in stop if word in free)]


REPEATED = "Repeat this line three times: the quick brown fox jumps over the lazy dog"


@pytest.mark.slow
def test_text_that_waits_until_the_device_has_its_next_step_is_the_same_text(
    loaded: LoadedModel, engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's runner returns at once, and what the step before said is sent out meanwhile; a stop string in it ends a
    request whose next step is under way.
    """
    free = [complete(engine, request(engine, text, max_new_tokens=24)).text for text in (PROMPT, REPEATED)]
    stops = [(), (free[0][9:14],), (free[1][-30:-20], free[1][-8:-3]), (free[1][4:9],)]
    asked = [{"stop": stop, "max_new_tokens": 24} for stop in stops] + [{"max_new_tokens": 24, "top_logprobs": 2}]
    texts = [PROMPT, PROMPT, REPEATED, REPEATED, REPEATED]

    def answers(engine: InProcessEngine) -> list[tuple[str, list[int], str, FinishReason, int]]:
        found: list[tuple[str, list[int], str, FinishReason, int]] = []
        for text, params in zip(texts, asked, strict=True):
            warm(engine, text)
            said, ids, last = parts(list(engine.stream(engine.submit(request(engine, text, **params)))))
            assert list(last.token_ids) == ids
            assert said == last.text
            assert len(last.top_logprobs) == (len(ids) if "top_logprobs" in params else 0)
            found.append((said, ids, last.text, last.finish_reason, last.num_accepted_tokens))
        return found

    meant = answers(engine)
    assert {reason for *_, reason, _ in meant} == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(num_accepted > 3 for *_, num_accepted in meant), "no step gave several tokens"
    monkeypatch.setattr(ReferenceRunner, "is_asynchronous", True)
    with engine_of(loaded) as later:
        assert answers(later) == meant
        together = [later.submit(request(later, text, **params)) for text, params in zip(texts, asked, strict=True)]
        for name in together:
            text, ids, last = parts(list(later.stream(name)))
            assert (text, tuple(ids)) == (last.text, last.token_ids)
        name = later.submit(request(later, LONG_PROMPT, max_new_tokens=400))
        for number, _ in enumerate(later.stream(name)):
            if number == 3:
                later.cancel(name)
        wait_for(lambda: later.status().num_running == 0)
        assert complete(later, request(later, texts[0], **asked[0])).text == meant[0][2]


def test_a_token_to_stop_at_is_left_out(engine: InProcessEngine) -> None:
    warm(engine)
    free = complete(engine, request(engine, max_new_tokens=6))
    completion = complete(engine, request(engine, max_new_tokens=6, stop_token_ids=(free.token_ids[3],)))
    assert completion.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3])]
    assert completion.finish_reason is FinishReason.STOP


def test_a_seed_repeats_others_differ_and_top_k_of_one_is_greedy(engine: InProcessEngine) -> None:
    def text(**params: object) -> tuple[int, ...]:
        return complete(engine, request(engine, "Invent a name.", max_new_tokens=8, **params)).token_ids  # type: ignore[arg-type]

    warm(engine, "Invent a name.")
    assert text(temperature=1.0, seed=7) == text(temperature=1.0, seed=7)
    assert len({text(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert text(temperature=1.0, top_k=1, seed=1) == text()


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p"),
        ({"temperature": 1.0, "seed": 2**70}, "seed"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name_and_the_engine_goes_on(
    engine: InProcessEngine, params: dict[str, object], name: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} is a number from"):
        engine.submit(request(engine, **params))  # type: ignore[arg-type]
    assert engine.status().state == "ready"


def test_seeds_at_the_edge_of_their_range_work(engine: InProcessEngine) -> None:
    for seed in (0, 2**63, -(2**63)):
        assert complete(engine, request(engine, max_new_tokens=1, temperature=1.0, seed=seed)).token_ids


def test_a_request_that_cannot_fit_or_has_no_such_tokens_is_refused(engine: InProcessEngine) -> None:
    with pytest.raises(ContextLengthError) as caught:
        engine.submit(request(engine, max_new_tokens=10**6))
    assert caught.value.details["max_new_tokens"] == 10**6
    for token_ids in ((10**7,), (-1, 5)):
        with pytest.raises(UsageError, match="does not have"):
            complete(engine, GenerationRequest(token_ids, SamplingParams(max_new_tokens=1)))
    assert complete(engine, request(engine)).finish_reason is FinishReason.LENGTH


# grammars


def test_a_grammar_that_cannot_be_compiled_ends_that_request_alone(engine: InProcessEngine) -> None:
    good = engine.submit(request(engine))
    for grammar in (Grammar("lark", "start: /(/"), Grammar("json_schema", "{"), Grammar("regex", "(")):
        with pytest.raises(UsageError):
            complete(engine, request(engine, grammar=grammar))
    assert parts(list(engine.stream(good)))[2].finish_reason is FinishReason.LENGTH
    assert engine.status().state == "ready"


def test_a_grammar_that_grows_too_complex_is_an_error_and_no_complete_text(engine: InProcessEngine) -> None:
    compiler = engine._compiler()
    matcher = compiler.compile(Grammar("regex", "(.*a.{300}b.*)&(.*b.{300}c.*)"))
    chosen = random.Random(1)
    with pytest.raises(UsageError, match="cannot be followed any further"):
        for _ in range(300):
            (token_id,) = engine.tokenizer.encode(chosen.choice("ab"))
            assert matcher.allowed()[token_id]
            matcher.advance(token_id)
    assert not matcher.is_complete


# cancelling


def test_a_stream_that_is_dropped_cancels_its_request(engine: InProcessEngine) -> None:
    events = engine.stream(engine.submit(request(engine, LONG_PROMPT, max_new_tokens=2000)))
    next(events)
    assert engine.status().num_running == 1
    del events
    wait_for(lambda: engine.status().num_running == 0)


def test_cancelling_what_has_ended_or_never_was_is_nothing(engine: InProcessEngine) -> None:
    name = engine.submit(request(engine))
    list(engine.stream(name))
    engine.cancel(name)
    engine.cancel("g999999")
    for unknown in (name, "g999999"):
        with pytest.raises(EngineError, match=f"no request {unknown}"):
            next(engine.stream(unknown))


def test_requests_that_nobody_streams_do_not_pile_up(loaded: LoadedModel) -> None:
    with engine_of(loaded, max_unstreamed=3) as engine:
        ids = [engine.submit(request(engine, max_new_tokens=1)) for _ in range(6)]
        for name in ids[::2]:
            engine.cancel(name)
        wait_for(lambda: engine.status().num_running + engine.status().num_waiting == 0)
        assert len(engine._unstreamed) <= 3
        assert all(sequence.kv_cache is None for sequence in engine._unstreamed.values())
        for name in list(engine._unstreamed):
            assert parts(list(engine.stream(name)))[2].finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
        assert engine._unstreamed == {}


@pytest.mark.parametrize(
    "schema",
    [
        '{"$ref": "#"}',
        '{"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}',
        '{"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"}',
        '{"type": "array", "items": {"$ref": "#/items"}, "minItems": 1}',
    ],
)
def test_a_grammar_that_cannot_begin_ends_its_request_alone(engine: InProcessEngine, schema: str) -> None:
    with pytest.raises(UsageError, match="grammar"):
        complete(engine, request(engine, max_new_tokens=60, grammar=Grammar("json_schema", schema)))
    assert complete(engine, request(engine)).finish_reason is FinishReason.LENGTH


def test_a_character_that_the_limit_cuts_is_no_text(engine: InProcessEngine) -> None:
    cut = request(engine, "Print only this: 𓀀", max_new_tokens=3)
    token_ids = tuple(engine.tokenizer.encode("a𓀀"))[:2]
    replayed = replace(cut, params=SamplingParams(2, replay_token_ids=token_ids))
    text, _, completion = parts(list(engine.stream(engine.submit(replayed))))
    assert (text, completion.text, completion.token_ids) == ("a", "a", token_ids)


# a KV cache of fixed size


class SmallRunner(ReferenceRunner):
    """Caches of 80 tokens all together, as on a GPU with little memory."""

    num_kv_tokens = 80 + 31

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most_used = 0

    def new_kv_cache(self) -> SequenceCache:
        cache = super().new_kv_cache()
        self.caches.add(cache)
        return cache

    def has_room(self, needs: Sequence[tuple[SequenceCache, int]]) -> bool:
        used = sum(cache.num_tokens for cache in self.caches)
        self.most_used = max(self.most_used, used)
        return used + sum(num_tokens for _, num_tokens in needs) <= self.num_kv_tokens + _SLACK_TOKENS


def test_a_kv_cache_of_fixed_size_is_given_by_rank_and_what_lost_its_place_is_computed_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.inference.runner.ReferenceRunner", SmallRunner)
    words = "The numbers from one to ten, in words: one, two, three,"
    with engine_of(loaded) as engine:
        engine.wait_until_ready()
        assert engine.status().context_length == 80
        slow = request(engine, words, Priority.BACKGROUND, max_new_tokens=24)
        quick = request(engine, "Say hello.", max_new_tokens=8)
        assert len(slow.prompt_token_ids) + 24 < 80
        alone = complete(engine, slow)
        assert alone.num_accepted_tokens > 0
        background = engine.stream(engine.submit(slow))
        first = next(background)
        assert complete(engine, quick).finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        rest = parts([first, *background])[2]
        assert rest.token_ids == alone.token_ids
        assert engine._runner.most_used <= 80 + 31 + _SLACK_TOKENS  # type: ignore[attr-defined]
        together = [engine.submit(slow) for _ in range(2)]
        assert {parts(list(engine.stream(one)))[2].token_ids for one in together} == {alone.token_ids}
        with pytest.raises(ContextLengthError, match="80"):
            engine.submit(request(engine, words, max_new_tokens=120))


# loading, closing, failing


def test_the_status_says_what_the_engine_is(engine: InProcessEngine) -> None:
    before = engine.status()
    assert (before.state, before.model, before.model_digest) == ("ready", "0.5b", "digest")
    assert (before.device, before.quantization, before.adapter, before.adapter_digest) == (
        "cpu",
        "bf16",
        None,
        "__none__",
    )
    assert before.context_length == 32768
    assert before.memory_bytes > 900_000_000
    complete(engine, request(engine, "Something that no test asked before: marmalade.", max_new_tokens=1))
    assert engine.status().memory_bytes > 900_000_000
    assert engine._prefix_cache.num_bytes > 0


def test_closing_ends_running_and_waiting_requests_with_an_error(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    running = engine.stream(engine.submit(request(engine, LONG_PROMPT, max_new_tokens=2000)))
    next(running)
    waiting = engine.submit(request(engine, LONG_PROMPT, Priority.BACKGROUND, max_new_tokens=2000))
    engine.close()
    for events in (running, engine.stream(waiting)):
        with pytest.raises(EngineError, match="closed"):
            list(events)
    assert engine.status().state == "closed"
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request(engine))
    with pytest.raises(EngineError, match="closed"):
        engine.wait_until_ready()
    engine.close()


def test_weights_that_are_missing_are_a_model_error_wherever_one_asks(model_folder_05b: Path, tmp_path: Path) -> None:
    folder = copy_without_weights(model_folder_05b, tmp_path / "model")
    check_load_fails(folder, "cannot be loaded")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b'\x50\0\0\0\0\0\0\0{"a": 1'])
def test_weights_that_are_damaged_are_a_model_error(model_folder_05b: Path, tmp_path: Path, content: bytes) -> None:
    folder = copy_without_weights(model_folder_05b, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    check_load_fails(folder, "cannot be loaded")


def copy_without_weights(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(path, folder)
    return folder


def check_load_fails(folder: Path, message: str) -> None:
    engine = InProcessEngine("0.5b", folder, lambda: load_model("0.5b", "", folder, device="cpu", quantization="bf16"))
    with pytest.raises(ModelError, match=message) as caught:
        engine.wait_until_ready()
    assert caught.value.hint
    with pytest.raises(ModelError, match=message):
        engine.submit(request(engine))
    assert (engine.status().state, engine.status().message) == ("failed", caught.value.message)
    engine.close()


def test_a_request_that_waits_when_loading_fails_gets_the_reason(loaded: LoadedModel) -> None:
    gate = threading.Event()

    def load() -> LoadedModel:
        gate.wait()
        raise ModelError("no such weights")

    engine = InProcessEngine("0.5b", loaded.folder, load)
    name = engine.submit(request(engine))
    gate.set()
    with pytest.raises(ModelError, match="no such weights"):
        list(engine.stream(name))
    engine.close()


def test_a_device_that_fails_ends_the_engine_and_every_request_with_a_typed_error(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    engine.wait_until_ready()
    running = engine.stream(engine.submit(request(engine, max_new_tokens=2000)))
    next(running)
    engine._loaded = replace(loaded, device=torch.device("cuda"))
    engine._runner._loaded = replace(loaded, model=None)  # type: ignore  # what a lost device looks like from here
    with pytest.raises(PlanPatchError, match="The engine failed"):
        list(running)
    with pytest.raises(EngineError, match="The engine failed"):
        engine.submit(request(engine))
    assert engine.status().state == "failed"
    engine.close()


def test_a_model_that_fails_on_a_cpu_fails_its_requests_and_the_engine_goes_on(loaded: LoadedModel) -> None:
    with engine_of(loaded) as engine:
        engine.wait_until_ready()
        alone = complete(engine, request(engine))
        engine._runner._loaded = replace(loaded, model=None)  # type: ignore  # code of a model that does not work
        with pytest.raises(EngineError, match=r"0\.5b failed: TypeError"):
            complete(engine, request(engine, "Something else."))
        engine._runner._loaded = loaded  # type: ignore
        assert complete(engine, request(engine)).token_ids == alone.token_ids
        assert engine.status().state == "ready"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(
            "json_schema",
            '{"$defs":{"N":{"type":"object","properties":{"c":{"$ref":"#/$defs/N"}},"required":["c"]}},"$ref":"#/$defs/N"}',
        ),
        Grammar("json_schema", '{"type":"string","pattern":"^(a{1000}){1000}$"}'),
    ],
)
def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(grammar: Grammar, engine: InProcessEngine) -> None:
    """It ended the engine, and with it everybody's requests, until PlanPatch was started again."""
    token_ids = tuple(engine.tokenizer.encode_chat([Message("user", "hi")]))
    with pytest.raises(UsageError) as found:
        complete(engine, GenerationRequest(token_ids, SamplingParams(40, grammar=grammar)))
    assert "Use a simpler grammar" in found.value.hint and "$defs" not in found.value.message
    assert engine.status().state == "ready"
    assert complete(engine, GenerationRequest(token_ids, SamplingParams(2))).token_ids != ()
