"""The engine goes over to a faster runner while it serves: no token is lost or doubled, and a failure costs nothing.

Both runners compute in fp32 on the CPU, so that a text is the same whoever computed which part of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import EngineError
from engine.inference import runner as runners
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import LoadedModel, load_model
from engine.inference.protocol import Completion, GenerationRequest, SamplingParams, Token, complete
from engine.inference.runner import ReferenceRunner, Row, Runner
from tests.tiny_model import tiny_model_files

PROMPT = tuple(range(10, 90))
MESSAGE = "Compiling kernels; slower until then"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    for name, content in tiny_model_files().items():
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[2] = 0  # it never ends by itself
    model.save_pretrained(folder)
    return load_model("tiny", "digest", folder, device="cpu", quantization="fp32")


class Fast(ReferenceRunner):
    """The runner that is gone over to."""

    name = "fast"
    num_kv_tokens = None


class Coming:
    """A `FasterRunner` that is done when the test says so."""

    message = MESSAGE
    num_kv_tokens = 1500

    def __init__(self, loaded: LoadedModel, config: EngineConfig, on_done: Callable[[], None]) -> None:
        self._loaded, self._config, self._on_done = loaded, config, on_done
        self.is_done = self.is_closed = False
        self.fault: Exception | None = None
        self.made = threading.Event()

    def finish(self, fault: Exception | None = None) -> None:
        self.fault, self.is_done = fault, True
        self._on_done()

    def make(self, say: Callable[[str], None]) -> Runner:
        self.made.set()
        if self.fault is not None:
            raise self.fault
        return Fast(self._loaded, self._config)

    def close(self) -> None:
        self.is_closed = True


class Switching:
    """An engine and the runner that it waits for."""

    def __init__(self, engine: InProcessEngine, coming: list[Coming]) -> None:
        self.engine = engine
        engine.wait_until_ready()
        self.coming = coming[0]

    @property
    def runner(self) -> str:
        return self.engine._runner.name


@pytest.fixture
def switching(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Switching]:
    made: list[Coming] = []

    def make(loaded: LoadedModel, config: EngineConfig, on_done: Callable[[], None], rank: int) -> Coming:
        made.append(Coming(loaded, config, on_done))
        return made[0]

    monkeypatch.setattr(runners, "make_faster_runner", make)
    config = EngineConfig(prefill_chunk_tokens=32)
    with InProcessEngine("tiny", loaded.folder, lambda: loaded, config=config) as engine:
        yield Switching(engine, made)


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> Iterator[InProcessEngine]:
    with InProcessEngine("tiny", loaded.folder, lambda: loaded, config=EngineConfig(prefill_chunk_tokens=32)) as engine:
        engine.wait_until_ready()
        yield engine


def finish_after(monkeypatch: pytest.MonkeyPatch, coming: Coming, num_steps: int) -> None:
    """The kernels are compiled while the reference runner's n-th step goes on."""
    left = [num_steps]
    run, hidden_sum = ReferenceRunner.run, ReferenceRunner.hidden_sum

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            coming.finish()

    def counted(self: ReferenceRunner, rows: Sequence[Row]) -> list[torch.Tensor]:
        count()
        return run(self, rows)

    def counted_hidden(self: ReferenceRunner, *arguments: Any) -> torch.Tensor:
        count()
        return hidden_sum(self, *arguments)

    monkeypatch.setattr(ReferenceRunner, "run", counted)
    monkeypatch.setattr(ReferenceRunner, "hidden_sum", counted_hidden)


def wanted(shift: int = 0, **more: Any) -> GenerationRequest:
    prompt = tuple(10 + (token_id + shift) % 200 for token_id in PROMPT)
    return GenerationRequest(prompt, SamplingParams(40, repetition_penalty=1.3, **more))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 12, 30])
def test_a_text_under_way_goes_on_and_no_token_is_lost_or_doubled(
    switching: Switching, plain: InProcessEngine, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    expected = complete(plain, wanted())
    finish_after(monkeypatch, switching.coming, num_steps)
    events = list(switching.engine.stream(switching.engine.submit(wanted())))
    completion = events[-1]
    assert isinstance(completion, Completion) and switching.runner == "fast"
    assert completion.token_ids == expected.token_ids and completion.text == expected.text
    streamed = [one for event in events if isinstance(event, Token) for one in event.token_ids]
    assert tuple(streamed) == expected.token_ids


def test_texts_that_decode_together_all_go_on(
    switching: Switching, plain: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [complete(plain, wanted(shift, speculation=False)).token_ids for shift in range(3)]
    finish_after(monkeypatch, switching.coming, 20)
    names = [switching.engine.submit(wanted(shift, speculation=False)) for shift in range(3)]
    ends = [list(switching.engine.stream(name))[-1] for name in names]
    assert [end.token_ids for end in ends if isinstance(end, Completion)] == expected
    assert switching.runner == "fast"


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_an_embedding_under_way_counts_no_token_twice(
    switching: Switching, plain: InProcessEngine, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    request = GenerationRequest(PROMPT, SamplingParams(1), embed=True)
    expected = complete(plain, request).embedding
    finish_after(monkeypatch, switching.coming, num_steps)
    assert complete(switching.engine, request).embedding == pytest.approx(expected, abs=1e-5)


def test_the_status_says_what_goes_on_until_it_is_over(switching: Switching) -> None:
    status = switching.engine.status()
    assert (status.state, status.message, switching.runner) == ("ready", MESSAGE, "transformers")
    assert status.context_length == 1500 - EngineConfig().max_draft_tokens, "what will fit is accepted from the start"
    switching.coming.finish()  # nobody asks for anything meanwhile
    assert switching.coming.made.wait(10)
    complete(switching.engine, wanted())
    assert (switching.engine.status().message, switching.runner) == ("", "fast")


def test_what_was_computed_before_serves_no_later_prompt(switching: Switching, plain: InProcessEngine) -> None:
    assert complete(switching.engine, wanted()).num_cached_tokens == 0
    assert complete(switching.engine, wanted()).num_cached_tokens > 0
    switching.coming.finish()
    again = complete(switching.engine, wanted())
    assert again.num_cached_tokens == 0 and switching.runner == "fast"
    assert again.token_ids == complete(plain, wanted()).token_ids
    assert complete(switching.engine, wanted()).num_cached_tokens > 0


@pytest.mark.parametrize("fault", [EngineError("no compiler"), torch.OutOfMemoryError("too little")])
def test_a_failure_leaves_the_engine_as_it_is_and_is_logged(
    switching: Switching, plain: InProcessEngine, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    expected = complete(plain, wanted())
    stream = switching.engine.stream(switching.engine.submit(wanted()))
    next(stream)
    switching.coming.finish(fault)
    end = list(stream)[-1]
    assert isinstance(end, Completion) and end.token_ids == expected.token_ids
    assert switching.coming.made.wait(10)
    complete(switching.engine, wanted())
    assert (switching.engine.status().message, switching.runner) == ("", "transformers")
    assert str(fault) in caplog.text


def test_closing_ends_the_compiling(switching: Switching) -> None:
    switching.engine.close()
    assert switching.coming.is_closed
