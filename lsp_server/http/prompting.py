"""From what a client asks to the engine's request: the chat template, the middle to fill in, and what fits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import ModelError
from engine.inference.protocol import Engine, GenerationRequest, Grammar, Message, Priority, ToolCall
from lsp_server.http.errors import HttpError
from lsp_server.http.ollama_bodies import MessageBody
from lsp_server.http.sampling import Options, params_of, room
from lsp_server.http.service import tokenizer_of
from lsp_server.http.tool_calls import check_call_name

_FIELD = re.compile(r"\{\{-?\s*\.(Prompt|System|Response|Suffix)\s*-?\}\}")
_IF = re.compile(r"\{\{-?\s*if\s+\.(Prompt|System|Response|Suffix)\s*-?\}\}(.*?)\{\{-?\s*end\s*-?\}\}", re.DOTALL)
_LEAST_ANSWER = 1


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of the model, by whichever API.

    Args:
        options: Sampling and limits.
        messages: The chat; empty for a raw prompt.
        raw: A prompt that is taken as it is; None for a chat.
        before: What stands before the middle that is to be filled in; None if none is.
        after: What stands behind it.
        context: Token ids that come first.
        tools: Definitions of tools, as JSON text.
        thinking: Whether the model shall think.
        grammar: Constraint on the answer.
        top_logprobs: How many likeliest tokens to report.
        may_shorten: Whether the oldest turns of a chat, or the beginning of a raw prompt, are left out where all does
            not fit; else it is refused.
    """

    options: Options
    messages: tuple[Message, ...] = ()
    raw: str | None = None
    before: str | None = None
    after: str = ""
    context: tuple[int, ...] = ()
    tools: tuple[str, ...] = ()
    thinking: bool = False
    grammar: Grammar | None = None
    top_logprobs: int = 0
    may_shorten: bool = True


def request_of(engine: Engine, ask: Ask) -> GenerationRequest:
    """The engine's request; an older part of the chat, or the beginning of a raw prompt, is left out if it must be.

    Args:
        engine: The model.
        ask: What is asked.

    Returns:
        The request, behind interactive ones.

    Raises:
        HttpError: 400: the chat cannot be put into the model's template, or its last turn does not fit.
    """
    limit = room(ask.options, engine.status().context_length)
    try:
        token_ids = _token_ids(engine, ask, limit)
    except ModelError as error:
        raise HttpError(400, error.message, hint=error.hint) from None
    stop_token_ids = tokenizer_of(engine).fim_end_token_ids if ask.before is not None else ()
    params = params_of(
        ask.options,
        num_left=max(_LEAST_ANSWER, limit - len(token_ids)),
        grammar=ask.grammar,
        stop_token_ids=stop_token_ids,
        top_logprobs=ask.top_logprobs,
    )
    return GenerationRequest(tuple(token_ids), params, Priority.BACKGROUND)


def _token_ids(engine: Engine, ask: Ask, limit: int) -> list[int]:
    tokenizer = tokenizer_of(engine)
    most = max(1, limit - _LEAST_ANSWER)
    if ask.before is not None:
        before, after = ask.before, ask.after
        while len(token_ids := tokenizer.encode_fim(before, after)) > most and (before or after):
            before, after = before[len(before) // 4 + 1 :], after[: len(after) * 3 // 4]  # what is near counts most
        return token_ids
    if ask.raw is not None:
        token_ids = [*ask.context, *tokenizer.encode_raw(ask.raw)]
        if len(token_ids) > most and not ask.may_shorten:
            raise _too_long(len(token_ids), limit, "prompt")
        return token_ids[-most:]
    messages = list(ask.messages)
    while True:
        token_ids = [
            *ask.context,
            *tokenizer.encode_chat(messages, tools=ask.tools, thinking=ask.thinking),
        ]
        if len(token_ids) <= most:
            return token_ids
        if not ask.may_shorten:
            raise _too_long(len(token_ids), limit, "messages")
        oldest = next((place for place, one in enumerate(messages[:-1]) if one.role != "system"), None)
        if oldest is None:
            if ask.context:
                ask = replace(ask, context=())
                continue
            raise _too_long(len(token_ids), limit, "messages")
        del messages[oldest]
        while messages[:-1] and oldest < len(messages) - 1 and messages[oldest].role == "tool":
            del messages[oldest]  # an answer without its question


def _too_long(num_prompt_tokens: int, limit: int, param: str) -> HttpError:
    return HttpError(
        400,
        f"the prompt has {num_prompt_tokens} tokens; the model's context, or num_ctx, is {limit}",
        code="context_length_exceeded",
        param=param,
        num_prompt_tokens=num_prompt_tokens,
        limit=limit,
    )


def messages_of(bodies: Sequence[MessageBody]) -> tuple[Message, ...]:
    """A chat as the engine takes it.

    Args:
        bodies: The turns, as the client gave them.

    Returns:
        The turns.

    Raises:
        HttpError: 400: an unknown role, or a tool's name that cannot be shown.
    """
    found: list[Message] = []
    for body in bodies:
        role = {"developer": "system", "function": "tool"}.get(body.role, body.role)
        if role not in ("system", "user", "assistant", "tool"):
            raise HttpError(
                400, f'invalid role: "{body.role}"; must be one of system, user, assistant, tool', param="messages"
            )
        calls: list[ToolCall] = []
        for call in body.tool_calls:
            check_call_name(call.function.name)
            arguments = call.function.arguments
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(call.function.name, _json_object(text)))
        found.append(Message(role, body.content, tuple(calls)))
    return tuple(found)


def _json_object(text: str) -> str:
    try:
        if isinstance(json.loads(text or "{}"), dict):
            return text or "{}"
    except ValueError:
        pass
    raise HttpError(400, "the arguments of a tool call are a JSON object", param="messages")


def filled(template: str, **fields: str) -> str:
    """A prompt by a simple template of Ollama's: `{{ .System }}`, `{{ .Prompt }}`, and `{{ if .System }}…{{ end }}`.

    Args:
        template: The template.
        **fields: Text of each field.

    Returns:
        The prompt.

    Raises:
        HttpError: 400: it needs more of Go's templates than that.
    """
    values = {"Prompt": "", "System": "", "Response": "", "Suffix": "", **fields}
    text = _IF.sub(lambda match: match[2] if values[match[1]] else "", template)
    if "{{" in _FIELD.sub("", text):
        raise HttpError(400, "the template uses more than .System, .Prompt, .Suffix and if", param="template")
    return _FIELD.sub(lambda match: values[match[1]], text)
