"""From what a client asks to the engine's request: the chat template, the middle to fill in, and what fits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ModelError
from engine.inference.protocol import Engine, GenerationRequest, Grammar, Message, Priority, ToolCall
from engine.inference.tokenizer import HFChatTokenizer
from lsp_server.http.errors import HttpError
from lsp_server.http.ollama_bodies import MessageBody
from lsp_server.http.sampling import Options, params_of, room
from lsp_server.http.service import tokenizer_of
from lsp_server.http.tool_calls import check_call_name

_FIELD = re.compile(r"\{\{-?\s*\.(Prompt|System|Response|Suffix)\s*-?\}\}")
_IF = re.compile(r"\{\{-?\s*if\s+\.(Prompt|System|Response|Suffix)\s*-?\}\}(.*?)\{\{-?\s*end\s*-?\}\}", re.DOTALL)
_LEAST_ANSWER = 1
_ROLES = "system, developer, user, assistant, tool, function"


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
        continues: Whether an answer at the end of the chat is gone on with, as Ollama does.
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
    continues: bool = False


def request_of(engine: Engine, ask: Ask) -> GenerationRequest:
    """The engine's request; an older part of the chat, or the beginning of a raw prompt, is left out if it must be.

    Takes as long as tokenizing does, so it is for a thread.

    Args:
        engine: The model.
        ask: What is asked.

    Returns:
        The request, behind interactive ones.

    Raises:
        HttpError: 400: the chat cannot be put into the model's template, or does not fit the model's context.
    """
    context_length = engine.status().context_length
    limit = room(ask.options, context_length)
    try:
        token_ids = _token_ids(engine, ask, limit, context_length)
    except ModelError as error:
        raise HttpError(400, error.message.replace(str(tokenizer_of(engine).folder), "the model's folder")) from None
    limit = max(limit, min(context_length, len(token_ids) + _LEAST_ANSWER))
    stop_token_ids = tokenizer_of(engine).fim_end_token_ids if ask.before is not None else ()
    params = params_of(
        ask.options,
        num_left=max(_LEAST_ANSWER, limit - len(token_ids)),
        grammar=ask.grammar,
        stop_token_ids=stop_token_ids,
        top_logprobs=ask.top_logprobs,
    )
    return GenerationRequest(tuple(token_ids), params, Priority.BACKGROUND)


def _token_ids(engine: Engine, ask: Ask, limit: int, context_length: int) -> list[int]:
    tokenizer = tokenizer_of(engine)
    most = max(1, limit - _LEAST_ANSWER)
    if ask.before is not None:
        before, after = ask.before[-4 * context_length :], ask.after[: 4 * context_length]
        while len(token_ids := tokenizer.encode_fim(before, after)) > most and (before or after):
            before, after = before[len(before) // 4 + 1 :], after[: len(after) * 3 // 4]  # what is near counts most
        return token_ids
    if ask.raw is not None:
        token_ids = [*ask.context, *tokenizer.encode_raw(ask.raw)]
        if len(token_ids) > most and not ask.may_shorten:
            raise _too_long(len(token_ids), limit, "prompt")
        return token_ids[-most:]
    token_ids = [*ask.context, *_encoded(tokenizer, ask, ask.messages)]
    if len(token_ids) <= most:
        return token_ids
    if not ask.may_shorten:
        raise _too_long(len(token_ids), limit, "messages")
    return _shortened(tokenizer, ask, most, context_length)


def _encoded(tokenizer: HFChatTokenizer, ask: Ask, messages: Sequence[Message]) -> list[int]:
    """The chat; with `continues` an answer at its end is gone on with."""
    last = messages[-1] if messages else None
    if ask.continues and last is not None and last.role == "assistant" and len(messages) > 1 and not last.tool_calls:
        return tokenizer.encode_chat(messages[:-1], prefill=last.content, tools=ask.tools, thinking=ask.thinking)
    return tokenizer.encode_chat(messages, tools=ask.tools, thinking=ask.thinking)


def _shortened(tokenizer: HFChatTokenizer, ask: Ask, most: int, context_length: int) -> list[int]:
    """The chat without its oldest turns; the system's stay, and so does the last, where the model's context takes it.

    How many have to go is estimated from each turn's own length first: encoding a long chat again and again takes long.
    """
    messages = list(ask.messages)
    older = [place for place, one in enumerate(messages[:-1]) if one.role != "system"]
    lengths = [len(tokenizer.encode(one.content)) for one in messages]
    num_over = sum(lengths) - most
    num_gone = 0
    while num_gone < len(older) and num_over > 0:
        num_over -= lengths[older[num_gone]]
        num_gone += 1
    while True:
        while num_gone < len(older) and messages[older[num_gone]].role == "tool":
            num_gone += 1  # an answer without its question
        gone = set(older[:num_gone])
        token_ids = _encoded(tokenizer, ask, [one for place, one in enumerate(messages) if place not in gone])
        if len(token_ids) <= most:
            return token_ids
        if num_gone == len(older):
            break
        num_gone += max(1, (len(older) - num_gone) // 8)
    if len(token_ids) >= context_length:
        raise _too_long(len(token_ids), context_length, "messages")
    return token_ids  # num_ctx is a wish; the last turn is needed


def _too_long(num_prompt_tokens: int, limit: int, param: str) -> HttpError:
    return HttpError(
        400,
        f"the prompt has {num_prompt_tokens} tokens; the model's context has {limit}",
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
            raise HttpError(400, f'invalid role: "{body.role}"; must be one of {_ROLES}', param="messages")
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
