"""Bodies of Ollama's API."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field

from lsp_server.http.bodies import Body, Whole
from lsp_server.http.errors import HttpError
from lsp_server.http.sampling import Options

_DURATION = re.compile(r"([+-]?)((?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class FunctionCall(Body):
    """A call in a chat's history."""

    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict[str, Any])


class ToolCallBody(Body):
    """See `FunctionCall`."""

    function: FunctionCall


class MessageBody(Body):
    """A turn of a chat."""

    role: str
    content: str = ""
    thinking: str = ""
    images: list[str] = Field(default_factory=list[str])
    tool_calls: list[ToolCallBody] = Field(default_factory=list[ToolCallBody])
    tool_name: str = ""


class Named(Body):
    """A body that names a model, under one of two keys."""

    model: str = ""
    name: str = ""

    @property
    def wanted(self) -> str:
        """The model that is meant.

        Raises:
            HttpError: 400: none.
        """
        if not (self.model or self.name):
            raise HttpError(400, "model is required", param="model")
        return self.model or self.name


class ShowBody(Named):
    """Of `/api/show`."""

    verbose: bool = False


class GenerateBody(Body):
    """Of `/api/generate`; without `model` it is the original service's request."""

    model: str | None = None
    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    template: str = ""
    context: list[Whole] = Field(default_factory=list[int])
    stream: bool | None = None
    raw: bool = False
    format: Any = None
    images: list[str] = Field(default_factory=list[str])
    options: Options = Field(default_factory=Options)
    keep_alive: float | str | None = None
    think: Any = None
    clean: bool | None = None
    num_predict: float | None = None
    max_time: float | None = None
    stop_think: bool | None = None


class ChatBody(Body):
    """Of `/api/chat`; without `model` it is the original service's request."""

    model: str | None = None
    messages: list[MessageBody] = Field(default_factory=list[MessageBody])
    tools: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    stream: bool | None = None
    format: Any = None
    options: Options = Field(default_factory=Options)
    keep_alive: float | str | None = None
    think: Any = None
    clean: bool | None = None
    num_predict: float | None = None
    max_time: float | None = None
    stop_think: bool | None = None


class EmbedBody(Body):
    """Of `/api/embed`."""

    model: str = ""
    input: list[str] | str | None = None
    truncate: bool = True
    dimensions: int | None = None
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    keep_alive: float | str | None = None


class EmbeddingsBody(Body):
    """Of `/api/embeddings`, the older one."""

    model: str = ""
    prompt: str = ""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    keep_alive: float | str | None = None


class PullBody(Named):
    """Of `/api/pull`."""

    stream: bool | None = None
    insecure: bool = False


class CopyBody(Body):
    """Of `/api/copy`."""

    source: str = ""
    destination: str = ""


class CreateBody(Named):
    """Of `/api/create`: another name for a model, with a system prompt, first turns and options."""

    from_: str = Field(default="", alias="from")
    system: str = ""
    template: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict[str, Any])
    messages: list[MessageBody] = Field(default_factory=list[MessageBody])
    license: list[str] | str = Field(default_factory=list[str])
    quantize: str = ""
    stream: bool | None = None


Thinking = Literal["off", "on"]


def thinking_of(think: object) -> bool | None:
    """Whether the model shall think; None where the client does not say.

    Args:
        think: What the client gave.

    Returns:
        The answer.

    Raises:
        HttpError: 400: something else than Ollama's words.
    """
    if think is None or isinstance(think, bool):
        return think
    if think in ("low", "medium", "high", "max"):
        return True
    said = json.dumps(think, ensure_ascii=False)
    raise HttpError(
        400, f'invalid think value: {said} (must be "high", "medium", "low", "max", true, or false)', param="think"
    )


def keep_alive_s(keep_alive: float | str | None) -> float | None:
    """Seconds that a model shall stay; negative for ever; None where the client does not say.

    Args:
        keep_alive: Seconds, or a duration as Go writes it.

    Returns:
        The seconds.

    Raises:
        HttpError: 400: no duration.
    """
    if keep_alive is None or isinstance(keep_alive, (int, float)):
        return None if keep_alive is None else float(keep_alive)
    if keep_alive in ("0", "-0", "+0"):
        return 0.0
    match = _DURATION.fullmatch(keep_alive)
    if match is None:
        raise HttpError(400, f'time: invalid duration "{keep_alive}"', param="keep_alive")
    seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(keep_alive))
    return -seconds if match[1] == "-" else seconds
