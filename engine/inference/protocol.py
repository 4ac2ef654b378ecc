"""What the rest of PlanPatch sees of the engine: submit, stream, cancel, status.

Everything here can be sent to another process: requests and events hold only numbers, strings and tuples. Nothing here
imports torch, so that a language server can answer before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal, Protocol

from engine.errors import ContextLengthError


class Priority(IntEnum):
    """Who goes first; an interactive request also pauses a background one that is running."""

    INTERACTIVE = 0
    BACKGROUND = 1


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"  # end token, stop string, or the grammar is complete
    LENGTH = "length"  # max_new_tokens
    TIME = "time"  # max_time_s
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text.

    Args:
        kind: `json_schema` (text is a JSON schema), `lark` or `regex`.
        text: The grammar itself.
    """

    kind: Literal["json_schema", "lark", "regex"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. Greedy when `temperature` is 0; then top_k, top_p and min_p play no part.

    Args:
        max_new_tokens: Token budget.
        max_time_s: Wall clock in seconds from leaving the queue, time spent paused not counted; None for no limit.
        temperature: 0 for greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        min_p: Drop tokens less likely than this share of the likeliest.
        seed: Makes sampling repeat; None draws one.
        repetition_penalty: transformers' meaning, the prompt counts; 1.0 is off.
        stop: Text is cut before the first of these and generation ends.
        stop_token_ids: End tokens besides the model's own.
        grammar: Constraint on the text.
        top_logprobs: How many of the likeliest tokens to report at each generated one; 0 for none.
        speculation: Whether tokens may be drafted; the text is the same but for near ties in 16 bit.
        replay_token_ids: For benchmarks: the tokens that are chosen, whatever the model would choose; all is computed
            as if they were its own.
    """

    max_new_tokens: int
    max_time_s: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    top_logprobs: int = 0
    speculation: bool = True
    replay_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation.

    Args:
        prompt_token_ids: The whole prompt, chat template applied.
        params: How to generate.
        priority: Interactive before background.
        adapter: Adapter folder, `__none__` for the base model, or None for the engine's current one.
        embed: Generate nothing; the completion carries the mean of the prompt's last hidden states instead.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: Priority = Priority.INTERACTIVE
    adapter: str | None = None
    embed: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability, after repetition penalty and grammar and before temperature."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """Newly generated tokens and the text they add (empty while a character or stop string is incomplete).

    Args:
        token_ids: The ids; none where only held back text comes out.
        text: The text.
        logprob: Log-probability of the one token, if `top_logprobs` was asked for.
        top_logprobs: The likeliest tokens at its place, if they were asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a generation; always the last event of a stream.

    Args:
        token_ids: Generated ids, the end token left out.
        text: Their text, cut before a stop string.
        finish_reason: Why it ended.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: How many of them came from the prefix cache.
        queue_s: Seconds in the queue.
        prefill_s: Seconds of prefill.
        decode_s: Seconds of decode.
        adapter: Digest of the adapter used, `__none__` for the base.
        top_logprobs: For each of `token_ids` the likeliest tokens there, as many as were asked for, likeliest first.
        embedding: For an `embed` request, `hidden_size` numbers.
        num_draft_tokens: Tokens that were drafted and verified.
        num_accepted_tokens: How many of them were right.
        num_steps: Steps that gave tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    adapter: str = "__none__"
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    embedding: tuple[float, ...] = ()
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0


Event = Token | Completion


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing.

    Args:
        state: `loading`, `ready`, `failed` or `closed`.
        model: Model id.
        model_digest: sha256 that names the weights.
        device: `cpu` or `cuda:N`.
        quantization: `bf16`, `fp32`, `int8` or `nf4`.
        adapter: Folder of the current adapter, None for the base.
        adapter_digest: sha256 of the current adapter's weights, `__none__` for the base.
        num_waiting: Requests in the queue.
        num_running: Requests being generated, paused ones included.
        context_length: Most tokens of prompt and output together.
        memory_bytes: Bytes held by weights and KV caches.
        message: Progress or the reason of a failure.
    """

    state: Literal["loading", "ready", "failed", "closed"]
    model: str
    model_digest: str = ""
    device: str = "cpu"
    quantization: str = "bf16"
    adapter: str | None = None
    adapter_digest: str = "__none__"
    num_waiting: int = 0
    num_running: int = 0
    context_length: int = 0
    memory_bytes: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; everything in it is data and cannot form template tokens."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


class ChatTokenizer(Protocol):
    """Text to token ids and back. Needs no model, only the tokenizer's files."""

    eos_token_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as data: text that looks like a special token stays text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        ...

    def encode_chat(
        self, messages: Sequence[Message], *, prefill: str = "", tools: Sequence[str] = (), thinking: bool = False
    ) -> list[int]:
        """Prompt of a chat, ending where the assistant's answer starts (after `prefill`, its given beginning)."""
        ...


class Engine(Protocol):
    """The one way to the model. Thread-safe."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer."""
        ...

    def submit(self, request: GenerationRequest) -> str:
        """Queue a request and return its id.

        Raises:
            EngineError: The queue is full or the engine is closed.
            ContextLengthError: Prompt and `max_new_tokens` exceed the model's context.
        """
        ...

    def stream(self, request_id: str) -> Iterator[Event]:
        """Yield `Token` events, then one `Completion`. Leaving the iterator early cancels the request.

        Raises:
            EngineError: The id is unknown, or the engine failed.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request within one decode step or prefill chunk; unknown or finished ids are ignored."""
        ...

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        ...

    def use_adapter(self, path: str | None) -> None:
        """Make an adapter folder (None: the base model) the current one, between two requests.

        Raises:
            AdapterError: Missing, damaged, or made for another base.
        """
        ...

    def close(self) -> None:
        """Cancel everything and free the model."""
        ...


@dataclass(slots=True)
class StreamResult:
    """Collects a stream: `text` grows, `completion` is set by the last event."""

    text: str = ""
    completion: Completion | None = None
    token_ids: list[int] = field(default_factory=list)


def check_length(num_prompt_tokens: int, max_new_tokens: int, context_length: int) -> None:
    """Refuse a request that no step could bring to its end.

    Args:
        num_prompt_tokens: Length of the prompt.
        max_new_tokens: The expected output.
        context_length: Most tokens of both together.

    Raises:
        ContextLengthError: They do not fit; the message has all three numbers.
    """
    if num_prompt_tokens + max_new_tokens > context_length:
        raise ContextLengthError(
            f"The prompt ({num_prompt_tokens} tokens) and the expected output ({max_new_tokens}) exceed the model's "
            f"context of {context_length} tokens",
            hint="Select a smaller function, or a model with a longer context.",
            num_prompt_tokens=num_prompt_tokens,
            max_new_tokens=max_new_tokens,
            context_length=context_length,
        )


def complete(engine: Engine, request: GenerationRequest) -> Completion:
    """Submit `request` and wait for its completion.

    Args:
        engine: The engine.
        request: What to generate.

    Returns:
        The last event of the stream.

    Raises:
        EngineError: The queue is full, the engine is closed or failed.
    """
    for event in engine.stream(engine.submit(request)):
        if isinstance(event, Completion):
            return event
    raise AssertionError("a stream ends with a Completion")
