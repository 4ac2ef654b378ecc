"""Bodies of OpenAI's API, and what their fields ask of the engine.

Not covered, and ignored where a client sends it: penalties, user, store, metadata, service_tier. Refused: logit_bias,
best_of, and functions with function_call, which tools and tool_choice have replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field

from engine.inference.protocol import Grammar, Message
from lsp_server.http.bodies import Body, Whole, checked
from lsp_server.http.errors import HttpError
from lsp_server.http.names import Known
from lsp_server.http.ollama_bodies import FunctionCall, MessageBody, ToolCallBody
from lsp_server.http.prompting import messages_of
from lsp_server.http.sampling import Options, checked_grammar, grammar_of
from lsp_server.http.tool_calls import checked_tools

MOST_CHOICES = 128
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
_ORIGINAL_MAX_TOKENS = 16
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool = False


class ChatMessage(Body):
    """A turn of a chat; `content` is a string or a list of parts."""

    role: str
    content: list[dict[str, Any]] | str = ""
    tool_calls: list[ToolCallBody] = Field(default_factory=list[ToolCallBody])
    function_call: FunctionCall | None = None


class SamplingBody(Body):
    """What chats and completions have in common."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    max_tokens: Whole | None = None
    n: Whole = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: Whole | None = None
    stop: Any = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    logit_bias: dict[str, Any] = Field(default_factory=dict[str, Any])

    @property
    def with_usage(self) -> bool:
        """Whether the last chunk of a stream counts the tokens."""
        return self.stream_options.include_usage


class ChatCompletionBody(SamplingBody):
    """Of `/v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    tool_choice: dict[str, Any] | str | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    functions: list[Any] = Field(default_factory=list[Any])
    function_call: Any = None


class CompletionBody(SamplingBody):
    """Of `/v1/completions`."""

    prompt: Any = None
    suffix: str | None = None
    echo: bool = False
    best_of: Whole = 1
    logprobs: Whole | None = Field(default=None, ge=0, le=20)


class EmbeddingBody(Body):
    """Of `/v1/embeddings`."""

    model: str = ""
    input: Any = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = Field(default=None, ge=1)


# --- what is refused -------------------------------------------------------------------------------------------------


def check_supported(body: ChatCompletionBody | CompletionBody) -> None:
    """Refuse what would change the answer and is not done here.

    Args:
        body: The body.

    Raises:
        HttpError: 400: it names one of these fields.
    """
    if body.logit_bias:
        raise HttpError(400, "logit_bias: is not supported; leave it out", param="logit_bias")
    if isinstance(body, CompletionBody):
        if body.best_of > 1:
            raise HttpError(400, "best_of: is not supported; n gives several choices", param="best_of")
        return
    if body.functions:
        raise HttpError(400, "functions: is not supported; use tools", param="functions")
    if body.function_call not in (None, "none", "auto"):
        raise HttpError(400, "function_call: is not supported; use tools and tool_choice", param="function_call")


# --- limits and sampling ---------------------------------------------------------------------------------------------


def options_of(body: SamplingBody, known: Known) -> Options:
    """The options of a generation: as the body says, else as the model's maker says, else OpenAI's defaults.

    Args:
        body: The body.
        known: The model.

    Returns:
        The options.

    Raises:
        HttpError: 400: a limit or a stop string is none.
    """
    most, param = body.max_tokens, "max_tokens"
    if isinstance(body, ChatCompletionBody) and body.max_completion_tokens is not None:
        most, param = body.max_completion_tokens, "max_completion_tokens"
    if isinstance(body, CompletionBody):
        most = _ORIGINAL_MAX_TOKENS if most is None else most
    elif most == 0:
        raise HttpError(400, f"{param}: at least 1", param=param)
    given = {
        "num_predict": most,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": None if body.seed is None else body.seed % 2**63,
        "stop": _stop(body.stop),
    }
    said = {name: value for name, value in given.items() if value is not None}
    return checked({**_DEFAULTS, **(known.parameters or {}), **said}, Options)


def _stop(stop: object) -> list[str] | None:
    if stop is None:
        return None
    texts = cast("list[object]", stop) if isinstance(stop, list) else [stop]
    if not all(isinstance(text, str) for text in texts):
        raise HttpError(400, "stop: a string, or a list of strings", param="stop")
    return cast("list[str]", texts)


def texts_or_ids(value: object, name: str) -> list[str | list[int]]:
    """Prompts or inputs: one string, a list of strings, token ids, or a list of lists of them.

    Args:
        value: What the client gave.
        name: The field.

    Returns:
        Each as text or token ids.

    Raises:
        HttpError: 400: it is nothing of these, or one is empty.
    """
    if isinstance(value, str):
        return [_not_empty(value, name)]
    items = cast("list[object]", value) if isinstance(value, list) else []
    if items and all(isinstance(item, str) for item in items):
        return [_not_empty(cast(str, item), f"{name}.{place}") for place, item in enumerate(items)]
    if items and all(isinstance(item, list) for item in items):
        return [_ids(cast("list[object]", item), f"{name}.{place}") for place, item in enumerate(items)]
    if items:
        return [_ids(items, name)]
    raise HttpError(400, f"{name}: a string, a list of strings, or token ids; not empty", param=name)


def _not_empty(text: str, name: str) -> str:
    if not text:
        raise HttpError(400, f"{name}: is empty", param=name)
    return text


def _ids(items: Sequence[object], name: str) -> list[int]:
    found = [token_id for item in items if (token_id := _whole(item)) is not None and token_id >= 0]
    if not items or len(found) != len(items):
        raise HttpError(400, f"{name}: a string, a list of strings, or token ids; not empty", param=name)
    return found


def _whole(item: object) -> int | None:
    if isinstance(item, float) and item.is_integer():
        return int(item)
    return item if isinstance(item, int) and not isinstance(item, bool) else None


def thinks(body: ChatCompletionBody) -> bool:
    """Whether a model that can think shall do so; it costs time, so only where the client asks for it."""
    return body.reasoning_effort not in (None, "none", "minimal")


# --- messages --------------------------------------------------------------------------------------------------------


def chat_of(body: ChatCompletionBody) -> tuple[Message, ...]:
    """The turns as the engine takes them.

    Args:
        body: The body.

    Returns:
        The turns.

    Raises:
        HttpError: 400: there are none, or one cannot be shown to the model.
    """
    if not body.messages:
        raise HttpError(400, "messages: there are none; at least one is needed", param="messages")
    turns = [
        MessageBody(
            role=message.role,
            content=_text_of(message.content, f"messages.{place}.content"),
            tool_calls=[_shown_call(call) for call in _calls_of(message)],
        )
        for place, message in enumerate(body.messages)
    ]
    return messages_of(turns)


def _calls_of(message: ChatMessage) -> list[ToolCallBody]:
    """The calls of a turn; an older client writes a single one as `function_call`."""
    older = [ToolCallBody(function=message.function_call)] if message.function_call is not None else []
    return message.tool_calls or older


def _shown_call(call: ToolCallBody) -> ToolCallBody:
    """A call whose arguments may be an empty string, as some clients write no arguments."""
    return ToolCallBody(function=FunctionCall(name=call.function.name, arguments=call.function.arguments or {}))


def _text_of(content: Sequence[Mapping[str, Any]] | str, name: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for place, part in enumerate(content):
        kind, param = part.get("type"), f"{name}.{place}"
        if kind not in _TEXT_PARTS:
            raise HttpError(
                400, f"{param}: parts of type {json.dumps(kind)} are not supported; the model reads text", param=param
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise HttpError(400, f"{param}: a part of type {json.dumps(kind)} has a string {kind}", param=param)
        texts.append(text)
    return "".join(texts)


# --- tools and formats -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """What the answer of a chat may be.

    Args:
        tools: Definitions that the model is shown, as JSON text.
        tool_names: The tools that it may call.
        grammar: Constraint on the answer.
    """

    tools: tuple[str, ...] = ()
    tool_names: tuple[str, ...] = ()
    grammar: Grammar | None = None


def shape_of_answer(body: ChatCompletionBody) -> Shape:
    """What the answer may be, from `tools`, `tool_choice` and `response_format`.

    Args:
        body: The body.

    Returns:
        The shape. With `required` or a named tool the answer is one call; with a format and tools it is either.

    Raises:
        HttpError: 400: one of them cannot be used.
    """
    schema = _format_schema(body.response_format)
    shown = [_shown_tool(tool, f"tools.{place}") for place, tool in enumerate(body.tools)]
    names = [str(tool["function"]["name"]) for tool in shown]
    allowed, is_forced = _allowed(body.tool_choice, names)
    if not allowed:
        return Shape(grammar=None if schema is None else grammar_of(schema, "response_format"))
    callable_ = [tool["function"] for tool in shown if tool["function"]["name"] in allowed]
    grammar: Grammar | None = None
    if is_forced or schema is not None:
        grammar = checked_grammar(answer_schema(callable_, None if is_forced else schema), "tools")
    return Shape(checked_tools(shown), tuple(allowed), grammar)


def _format_schema(wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a `response_format`; None for text."""
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        message = 'response_format: its type is "text", "json_object" or "json_schema"'
        raise HttpError(400, message, param="response_format.type")
    described: object = wanted.get("json_schema")
    schema = cast("Mapping[str, object]", described).get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        param = "response_format.json_schema"
        raise HttpError(400, f"{param}: an object with a schema", param=param)
    found = cast("dict[str, Any]", schema)
    grammar_of(found, "response_format")
    return found


def _shown_tool(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool as the model is shown it: name, description and parameters alone."""
    checked_tools([dict(tool)])
    function: Mapping[str, Any] = tool["function"]
    parameters: object = function.get("parameters")
    if parameters is not None:
        kind = cast("Mapping[str, object]", parameters).get("type", "object") if isinstance(parameters, dict) else None
        if kind != "object":
            param = f"{name}.function.parameters"
            raise HttpError(400, f"{param}: a JSON schema of type object", param=param)
    shown = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return {"type": "function", "function": shown}


def _allowed(choice: Mapping[str, Any] | str | None, names: Sequence[str]) -> tuple[list[str], bool]:
    """The tools that may be called, and whether one of them must be."""
    if choice is None or choice == "auto":
        return list(names), False
    if choice == "none":
        return [], False
    if choice == "required" and names:
        return list(names), True
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function: object = choice.get("function")
        name = cast("Mapping[str, object]", function).get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name in names:
            return [name], True
        raise HttpError(400, f"tool_choice: tools has no function {json.dumps(name)}", param="tool_choice")
    if choice == "required":
        raise HttpError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    message = 'tool_choice: "auto", "none", "required" or {"type": "function", "function": {"name": …}}'
    raise HttpError(400, message, param="tool_choice")


def answer_schema(functions: Sequence[Mapping[str, Any]], other: Mapping[str, Any] | None) -> dict[str, Any]:
    """A JSON schema of a call of one of some functions, or of another object.

    Args:
        functions: `name`, and perhaps `parameters`, of each.
        other: Schema of what may stand in place of a call; None for nothing.

    Returns:
        The schema; every schema in it has a place of its own, and its references point there.
    """
    places: dict[str, object] = {}
    ways: list[dict[str, Any]] = []
    for number, function in enumerate(functions):
        place = f"arguments{number}"
        places[place] = _moved(function.get("parameters") or {"type": "object"}, place)
        ways.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    if other is not None:
        places["answer"] = _moved(other, "answer")
        ways.append({"$ref": "#/$defs/answer"})
    return {"anyOf": ways, "$defs": places}


def _moved(schema: object, place: str) -> object:
    """A schema whose references hold when it stands at a place under `$defs`."""
    if isinstance(schema, dict):
        return {key: _moved_item(key, item, place) for key, item in cast("dict[str, object]", schema).items()}
    return [_moved(item, place) for item in cast("list[object]", schema)] if isinstance(schema, list) else schema


def _moved_item(key: str, item: object, place: str) -> object:
    if key == "$ref" and isinstance(item, str) and item.startswith("#"):
        return f"#/$defs/{place}{item[1:]}"
    return _moved(item, place)
