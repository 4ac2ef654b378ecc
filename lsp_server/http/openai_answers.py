"""Answers in OpenAI's shapes: choices made of pieces, one object or server-sent events, usage and log-probabilities.

The choices of a request (`n`, several prompts) are generated one after the other: what a prompt has computed serves the
next choice, and one client takes one place.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import PlanPatchError
from engine.inference.protocol import Completion, Engine, FinishReason, Token
from engine.inference.tokenizer import HFChatTokenizer
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import Call
from lsp_server.http.prompting import Ask, request_of
from lsp_server.http.service import Service, tokenizer_of
from lsp_server.http.splitting import ThinkSplitter, ToolSplitter
from lsp_server.http.tool_calls import FoundCall

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, its log-probability, and what could have stood in its place, likeliest first."""

    text: str
    data: bytes
    logprob: float
    top: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes out at once of one choice.

    Args:
        index: The choice.
        text: Text of the answer.
        thought: Text of the thinking.
        calls: Calls of tools.
        scored: Tokens with their log-probabilities, if they were asked for.
        is_first: Whether the choice begins.
        finish_reason: Why it ends; empty before.
        completion: The end of its generation, on the last piece.
    """

    index: int = 0
    text: str = ""
    thought: str = ""
    calls: tuple[FoundCall, ...] = ()
    scored: tuple[Scored, ...] = ()
    is_first: bool = False
    finish_reason: str = ""
    completion: Completion | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a request; a prompt counts once, however many choices it has."""

    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0

    def add(self, completion: Completion, *, is_new_prompt: bool) -> None:
        """Count one choice."""
        self.num_generated += len(completion.token_ids)
        if is_new_prompt:
            self.num_prompt += completion.num_prompt_tokens
            self.num_cached += completion.num_cached_tokens

    def to_json(self) -> dict[str, Any]:
        """In OpenAI's words."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


# --- how the two kinds of answers are told ---------------------------------------------------------------------------


class Form:
    """How choices are written.

    Args:
        with_logprobs: Whether log-probabilities are told.
        num_top: How many alternatives of each token.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, with_logprobs: bool = False, num_top: int = 0) -> None:
        self.with_logprobs = with_logprobs
        self.num_top = num_top

    @abstractmethod
    def opening(self, piece: Piece) -> dict[str, Any] | None:
        """The first chunk of a choice; None for none."""

    @abstractmethod
    def chunk(self, piece: Piece, offset: int) -> dict[str, Any]:
        """A choice in a chunk.

        Args:
            piece: What is new.
            offset: Characters that the choice had before.

        Returns:
            The choice.
        """

    @abstractmethod
    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice in one object, from all its pieces put together."""


class ChatForm(Form):
    """Choices of `/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, piece: Piece) -> dict[str, Any] | None:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece, offset: int) -> dict[str, Any]:
        """A delta."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        delta |= {"reasoning": piece.thought} if piece.thought else {}
        calls = [{"index": place, **_call(one)} for place, one in enumerate(piece.calls)]
        delta |= {"tool_calls": calls} if calls else {}
        return self._choice(piece, {"delta": delta})

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A message."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        message |= {"reasoning": piece.thought} if piece.thought else {}
        if piece.calls:
            message |= {"content": piece.text or None, "tool_calls": [_call(one) for one in piece.calls]}
        return self._choice(piece, {"message": message})

    def _choice(self, piece: Piece, told: dict[str, Any]) -> dict[str, Any]:
        content = [self._scored(one, one.top[: self.num_top]) for one in piece.scored]
        logprobs = {"content": content, "refusal": None} if self.with_logprobs and content else None
        return {"index": piece.index, **told, "logprobs": logprobs, "finish_reason": piece.finish_reason or None}

    def _scored(self, one: Scored, top: Sequence[Scored] | None = None) -> dict[str, Any]:
        found = {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}
        return found if top is None else {**found, "top_logprobs": [self._scored(other) for other in top]}


class TextForm(Form):
    """Choices of `/v1/completions`.

    Args:
        echoes: What is put before each choice's text.
        with_logprobs: Whether log-probabilities are told.
        num_top: How many alternatives of each token.
    """

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, echoes: Sequence[str] = (), with_logprobs: bool = False, num_top: int = 0) -> None:
        super().__init__(with_logprobs, num_top)
        self._echoes = echoes

    def opening(self, piece: Piece) -> dict[str, Any] | None:
        """The prompt, if it is wanted."""
        echo = self._echo(piece)
        return self._choice(piece, echo, 0) if echo else None

    def chunk(self, piece: Piece, offset: int) -> dict[str, Any]:
        """Text."""
        return self._choice(piece, piece.text, offset)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The whole text."""
        return self._choice(piece, self._echo(piece) + piece.text, 0)

    def _echo(self, piece: Piece) -> str:
        return self._echoes[piece.index] if self._echoes else ""

    def _choice(self, piece: Piece, text: str, offset: int) -> dict[str, Any]:
        logprobs = self._logprobs(piece, offset) if self.with_logprobs and piece.scored else None
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason or None}

    def _logprobs(self, piece: Piece, offset: int) -> dict[str, Any]:
        offsets: list[int] = []
        for one in piece.scored:
            offsets.append(offset)
            offset += len(one.text)
        tops = [{other.text: other.logprob for other in one.top[: self.num_top]} for one in piece.scored]
        return {
            "tokens": [one.text for one in piece.scored],
            "token_logprobs": [one.logprob for one in piece.scored],
            "top_logprobs": tops if self.num_top else None,
            "text_offset": offsets,
        }


def _call(call: FoundCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


# --- generating ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """A request and how its answer is told.

    Args:
        name: The model, as the client wrote it.
        fingerprint: Names the weights.
        asks: What is asked, one for each choice.
        form: How choices are written.
        num_choices: How many choices each prompt has.
        tool_names: The tools that may be called.
        most_calls: How many calls one answer may have; None for any number.
        with_usage: Whether a stream ends with a count of the tokens.
        id: Names the answer.
        created: When it was asked for, seconds since the epoch.
    """

    name: str
    fingerprint: str
    asks: tuple[Ask, ...]
    form: Form
    num_choices: int = 1
    tool_names: tuple[str, ...] = ()
    most_calls: int | None = None
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of the answer begins with."""
        return {
            "id": f"{self.form.id_prefix}{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": self.fingerprint,
        }


async def events(service: Service, path: str, turn: Turn) -> AsyncIterator[str]:
    """The answer as server-sent events; a fault is the last one.

    Args:
        service: The service.
        path: What was called.
        turn: The request.

    Yields:
        Each event, `data: ` and an empty line included.
    """
    try:
        async with aclosing(_chunks(service, path, turn)) as chunks:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
    except PlanPatchError as error:
        yield f"data: {json.dumps(HttpError.of(error).to_json('openai'))}\n\n"
    except HttpError as error:
        yield f"data: {json.dumps(error.to_json('openai'))}\n\n"
    else:
        yield DONE


async def _chunks(service: Service, path: str, turn: Turn) -> AsyncGenerator[dict[str, Any]]:
    usage = Usage()
    lengths = [0] * len(turn.asks)
    head = turn.head(turn.form.chunk_object)
    more = {"usage": None} if turn.with_usage else {}
    async with aclosing(_pieces(service, path, turn, usage)) as pieces:
        async for piece in pieces:
            if piece.is_first:
                choice = turn.form.opening(piece)
            else:
                choice = turn.form.chunk(piece, lengths[piece.index])
                lengths[piece.index] += sum(len(one.text) for one in piece.scored)
            if choice is not None:
                yield {**head, "choices": [choice], **more}
    if turn.with_usage:
        yield {**head, "choices": [], "usage": usage.to_json()}


async def whole(service: Service, path: str, turn: Turn) -> dict[str, Any]:
    """The answer as one object.

    Args:
        service: The service.
        path: What was called.
        turn: The request.

    Returns:
        The object.

    Raises:
        HttpError: The prompt cannot be used, or too many requests wait.
        PlanPatchError: The engine refused or failed.
    """
    usage = Usage()
    found = [Piece(index) for index in range(len(turn.asks))]
    async with aclosing(_pieces(service, path, turn, usage)) as pieces:
        async for piece in pieces:
            found[piece.index] = _joined(found[piece.index], piece)
    choices = [turn.form.whole(piece) for piece in found]
    return {**turn.head(turn.form.whole_object), "choices": choices, "usage": usage.to_json()}


def _joined(before: Piece, after: Piece) -> Piece:
    return Piece(
        before.index,
        before.text + after.text,
        before.thought + after.thought,
        before.calls + after.calls,
        before.scored + after.scored,
        finish_reason=after.finish_reason,
    )


async def _pieces(service: Service, path: str, turn: Turn, usage: Usage) -> AsyncGenerator[Piece]:
    """The pieces of every choice, one choice after the other; each begins at once and ends with its reason."""
    async with service.generations.call(path) as call:
        for index, ask in enumerate(turn.asks):
            yield Piece(index, is_first=True)
            engine = await service.engine()
            async with aclosing(_pieces_of_one(service, engine, call, turn, ask)) as pieces:
                async for piece in pieces:
                    if piece.completion is not None:
                        usage.add(piece.completion, is_new_prompt=index % turn.num_choices == 0)
                    yield replace(piece, index=index)


async def _pieces_of_one(service: Service, engine: Engine, call: Call, turn: Turn, ask: Ask) -> AsyncGenerator[Piece]:
    asked = await asyncio.to_thread(request_of, engine, ask)
    if ask.options.num_predict == 0:
        nothing = Completion((), "", FinishReason.LENGTH, len(asked.prompt_token_ids), 0, 0.0, 0.0, 0.0)
        yield Piece(finish_reason="length", completion=nothing)
        return
    thinking, tools = ThinkSplitter(ask.thinking), ToolSplitter(turn.tool_names)
    scores = Scores(tokenizer_of(engine))
    completion: Completion | None = None
    async with aclosing(service.generations.stream(engine, asked, call)) as stream:
        async for event in stream:
            if isinstance(event, Completion):
                completion = event
                break
            scores.push(event)
            thought, text = thinking.push(event.text)
            text = tools.push(text)
            if thought or text:
                yield Piece(text=text, thought=thought, scored=scores.take())
    assert completion is not None
    thought, text = thinking.flush()
    rest, calls = _flush_tools(tools, text)
    scored = scores.take_last(completion)
    if thought or rest or calls or scored:
        yield Piece(text=rest, thought=thought, calls=tuple(calls[: turn.most_calls]), scored=scored)
    reason = "stop" if completion.finish_reason is FinishReason.STOP else "length"
    yield Piece(finish_reason="tool_calls" if calls else reason, completion=completion)


def _flush_tools(tools: ToolSplitter, text: str) -> tuple[str, list[FoundCall]]:
    before = tools.push(text)
    rest, calls = tools.flush()
    return before + rest, calls


class Scores:
    """Tokens with their log-probabilities, held back as long as their text is.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: HFChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: deque[tuple[int, Scored]] = deque()  # where each begins, in bytes
        self._end = 0
        self._num_out = 0

    def push(self, event: Token) -> None:
        """Take a token in, and the text that came with it."""
        self._num_out += len(event.text.encode())
        if event.logprob is None:
            return
        top = tuple(self._scored(other.token_id, other.logprob) for other in event.top_logprobs)
        one = self._scored(event.token_ids[0], event.logprob, top)
        self._held.append((self._end, one))
        self._end += len(one.data)

    def take(self) -> tuple[Scored, ...]:
        """The tokens whose text has begun to go out."""
        found: list[Scored] = []
        while self._held and self._held[0][0] < self._num_out:
            found.append(self._held.popleft()[1])
        return tuple(found)

    def take_last(self, completion: Completion) -> tuple[Scored, ...]:
        """The rest at the end; what a stop string cut off is left out."""
        if completion.text != self._tokenizer.decode(completion.token_ids):
            return self.take()
        found = tuple(one for _, one in self._held)
        self._held.clear()
        return found

    def _scored(self, token_id: int, logprob: float, top: tuple[Scored, ...] = ()) -> Scored:
        return Scored(self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id), logprob, top)
