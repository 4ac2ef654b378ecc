"""An `Engine` that writes what a test tells it to, so that patcher and surfaces are tested without a model.

    engine = ScriptedEngine(["- use &= here", "def f():\\n    return 2"])     answers in the order of the requests
    engine = ScriptedEngine(lambda prompt: "pass" if "def f" in prompt else Reply("", FinishReason.TIME))

What it keeps of a real engine: text is cut before a stop string, generation ends at `max_new_tokens`, a prompt that
does not fit is refused and so is a folder without an adapter, a cancelled request ends as CANCELLED, each request is
streamed once, all from any thread.
A token is one byte of UTF-8, so a PLAN of 16 tokens has 16 characters of ASCII. Second choices are those of the
script. Not kept: grammars, penalties, sampling and time; a script that breaks a grammar is how tests see what the gates
do about it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import EngineError, PlanPatchError
from engine.inference.adapters import BASE, AdapterFiles, read_adapter
from engine.inference.protocol import (
    Completion,
    EngineStatus,
    Event,
    FinishReason,
    GenerationRequest,
    Message,
    Token,
    TokenLogprob,
    check_length,
)

END_OF_TURN = 256


class ByteTokenizer:
    """One token for each byte of UTF-8; 256 ends a turn. A message is shown as `<role>content` and a line end."""

    eos_token_ids: frozenset[int] = frozenset({END_OF_TURN})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in token_ids if token_id != END_OF_TURN).decode("utf-8", "replace")

    def encode_chat(
        self, messages: Sequence[Message], *, prefill: str = "", tools: Sequence[str] = (), thinking: bool = False
    ) -> list[int]:
        turns = "".join(f"<{message.role}>{message.content}\n" for message in messages)
        return self.encode(f"{turns}<assistant>{prefill}")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose end is not the usual one, or that has second choices.

    Args:
        text: What is written.
        finish_reason: Why it ends.
        second_choices: Index of a token, then the byte that could stand there and its log-probability.
    """

    text: str
    finish_reason: FinishReason = FinishReason.STOP
    second_choices: tuple[tuple[int, str, float], ...] = ()


Answer = str | Reply | PlanPatchError
Script = Sequence[Answer] | Callable[[str], Answer]


class ScriptedEngine:
    """See the module's docstring.

    `prompts` and `requests` hold what was asked, in order; `was_cancelled` is set by the first cancel. An error in
    place of an answer is raised while streaming; after `fail()` the engine is one whose device failed.
    """

    def __init__(self, script: Script, *, context_length: int = 1_000_000) -> None:
        self._script = script
        self._tokenizer = ByteTokenizer()
        self._context_length = context_length
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[GenerationRequest, Answer | None]] = {}
        self._cancelled: set[str] = set()
        self._failure: EngineError | None = None
        self._adapter: AdapterFiles | None = None
        self._is_closed = False
        self.requests: list[GenerationRequest] = []
        self.was_cancelled = threading.Event()
        self.most_waiting: int | None = None

    @property
    def num_cancelled(self) -> int:
        return len(self._cancelled)

    @property
    def tokenizer(self) -> ByteTokenizer:
        return self._tokenizer

    @property
    def prompts(self) -> list[str]:
        return [self._tokenizer.decode(request.prompt_token_ids) for request in self.requests]

    def submit(self, request: GenerationRequest) -> str:
        self._check_open()
        check_length(len(request.prompt_token_ids), request.params.max_new_tokens, self._context_length)
        with self._lock:
            if self.most_waiting is not None and len(self._waiting) >= self.most_waiting:
                raise EngineError("The engine's queue is full", queue_full=True)
            number = next(self._numbers)
            self.requests.append(request)
            answer = None if callable(self._script) else self._script[number]
            self._waiting[f"g{number}"] = (request, answer)
        return f"g{number}"

    def stream(self, request_id: str) -> Iterator[Event]:
        with self._lock:
            if request_id not in self._waiting:
                raise EngineError(f"There is no request {request_id}, or it was streamed before")
            request, answer = self._waiting.pop(request_id)
        if answer is None:
            assert callable(self._script)
            answer = self._script(self._tokenizer.decode(request.prompt_token_ids))
        self._check_open()
        if isinstance(answer, PlanPatchError):
            raise answer
        reply = answer if isinstance(answer, Reply) else Reply(answer)
        completion = self._completion(request_id, request, reply)
        if completion.text:
            yield Token(completion.token_ids, completion.text)
        yield completion

    def _completion(self, request_id: str, request: GenerationRequest, reply: Reply) -> Completion:
        ends = [place for stop in request.params.stop if (place := reply.text.find(stop)) >= 0]
        text = reply.text[: min(ends)] if ends else reply.text
        token_ids = self._tokenizer.encode(text)
        reason = reply.finish_reason
        if len(token_ids) > request.params.max_new_tokens:
            token_ids = token_ids[: request.params.max_new_tokens]
            text, reason = self._tokenizer.decode(token_ids), FinishReason.LENGTH
        if request_id in self._cancelled:
            reason = FinishReason.CANCELLED
        num_prompt = len(request.prompt_token_ids)
        completion = Completion(tuple(token_ids), text, reason, num_prompt, 0, 0.0, 0.0, 0.5)
        if not request.params.top_logprobs:
            return completion
        tops = [[TokenLogprob(token_id, -0.01)] for token_id in token_ids]
        for place, byte, logprob in reply.second_choices:
            tops[place].append(TokenLogprob(ord(byte), logprob))
        return replace(completion, top_logprobs=tuple(tuple(top) for top in tops))

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._cancelled.add(request_id)
        self.was_cancelled.set()

    def status(self) -> EngineStatus:
        state = "failed" if self._failure else "closed" if self._is_closed else "ready"
        return EngineStatus(
            state,
            "scripted",
            model_digest="0" * 64,
            quantization="fp32",
            context_length=self._context_length,
            adapter=str(self._adapter.folder) if self._adapter else None,
            adapter_digest=self._adapter.digest if self._adapter else BASE,
            message=self._failure.message if self._failure else "",
        )

    def use_adapter(self, path: str | None) -> None:
        self._check_open()
        self._adapter = None if path in (None, BASE) else read_adapter(Path(path))

    def fail(self, message: str = "The device failed") -> None:
        self._failure = EngineError(message)

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise EngineError("The engine is closed")
