"""From what a client asks to the engine's request: the chat template, the middle to fill in, and what fits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import ModelError
from engine.inference.adapters import BASE
from engine.inference.catalogue import is_shipped
from engine.inference.protocol import Engine, GenerationRequest, Grammar, Message, Priority, ToolCall
from engine.inference.tokenizer import HFChatTokenizer
from lsp_server.http.bodies import checked
from lsp_server.http.errors import HttpError
from lsp_server.http.names import Known
from lsp_server.http.ollama_bodies import MessageBody
from lsp_server.http.sampling import Options, params_of, room
from lsp_server.http.service import tokenizer_of
from lsp_server.http.tool_calls import check_call_name

_FIELD = re.compile(r"\{\{\s*\.(Prompt|System|Response|Suffix)\s*\}\}")
_IF = re.compile(r"\{\{\s*if\s+\.(Prompt|System|Response|Suffix)\s*\}\}(.*?)\{\{\s*end\s*\}\}", re.DOTALL)
_COMMENT = re.compile(r"(?:\s*\{\{-\s+|\{\{)/\*.*?\*/(?:\s+-\}\}\s*|\}\})", re.DOTALL)
_ORDER = {"System": 0, "Prompt": 1, "Response": 2}
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
        template: Ollama's template that the chat is written in; empty for the model's own.
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
    template: str = ""


def request_of(engine: Engine, ask: Ask) -> GenerationRequest:
    """The engine's request; an older part of the chat, or the beginning of a raw prompt, is left out if it must be.

    An adapter that ships was trained for edits, so that these questions go to the base model.

    Takes as long as tokenizing does, so it is for a thread.

    Args:
        engine: The model.
        ask: What is asked.

    Returns:
        The request, behind interactive ones.

    Raises:
        HttpError: 400: the chat cannot be put into the model's template, or does not fit the model's context.
    """
    status = engine.status()
    context_length, adapter = status.context_length, BASE if is_shipped(status.adapter) else None
    limit = room(ask.options, context_length)
    try:
        token_ids = _token_ids(engine, ask, limit, context_length)
    except ModelError as error:
        raise HttpError(400, error.message.replace(str(tokenizer_of(engine).folder), "the model's folder")) from None
    if not token_ids:
        raise _nothing_to_go_on()
    limit = max(limit, min(context_length, len(token_ids) + _LEAST_ANSWER))
    stop_token_ids = tokenizer_of(engine).fim_end_token_ids if ask.before is not None else ()
    params = params_of(
        ask.options,
        num_left=max(_LEAST_ANSWER, limit - len(token_ids)),
        grammar=ask.grammar,
        stop_token_ids=stop_token_ids,
        top_logprobs=ask.top_logprobs,
    )
    return GenerationRequest(tuple(token_ids), params, Priority.BACKGROUND, adapter=adapter)


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
    if ask.template:
        return tokenizer.encode_parts(in_rounds(ask.template, messages))
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


def _nothing_to_go_on() -> HttpError:
    return HttpError(400, "the prompt is empty once it is in the template", param="template")


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


def own_messages(known: Known) -> tuple[Message, ...]:
    """The turns that a created model puts before a chat's own.

    Args:
        known: The model.

    Returns:
        The turns.

    Raises:
        HttpError: 400: they cannot be read; the file that keeps them was edited.
    """
    return messages_of([checked(dict(message), MessageBody) for message in known.messages])


# --- Ollama's templates ----------------------------------------------------------------------------------------------


def check_template(template: str) -> None:
    """Refuse a template that needs more of Go's templates than simple fields.

    Args:
        template: The template.

    Raises:
        HttpError: 400.
    """
    if "{{" in _FIELD.sub("", _IF.sub(lambda match: match[2], _plain(template))):
        message = "the template uses more than .System, .Prompt, .Response, .Suffix and if"
        raise HttpError(400, message, param="template")


def in_rounds(template: str, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """A chat by a simple template of Ollama's, once for each round of `.System`, `.Prompt` and `.Response`.

    As Ollama does (`template.go`): turns of one role that follow each other are one, and what stands behind
    `.Response` is left out of the last round, where the model goes on.

    Args:
        template: `{{ .System }}`, `{{ .Prompt }}`, `{{ .Response }}`, and `{{ if .System }}…{{ end }}`.
        messages: The turns; a tool's is taken as the user's.

    Returns:
        The prompt in parts: text of the template, or of a turn, which is data (`True`).

    Raises:
        HttpError: 400: the template needs more than that, or nothing comes of it.
    """
    check_template(template)
    template = _plain(template)
    if not any(match[1] == "Response" for match in _FIELD.finditer(template)):
        template += "{{ .Response }}"
    rounds: list[dict[str, str]] = [{}]
    for field, text in _joined(messages):
        if any(_ORDER[field] <= _ORDER[earlier] for earlier in rounds[-1]):
            rounds.append({})
        rounds[-1][field] = text
    parts = [part for one in rounds[:-1] for part in _filled(template, one)]
    parts += _filled(template, rounds[-1], is_last=True)
    if not any(text for text, _ in parts):
        raise _nothing_to_go_on()
    return parts


def _joined(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Each turn's field and text, those that follow each other in one field put together."""
    found: list[tuple[str, str]] = []
    for message in messages:
        field = {"system": "System", "assistant": "Response"}.get(message.role, "Prompt")
        if found and found[-1][0] == field:
            found[-1] = (field, f"{found[-1][1]}\n\n{message.content}")
        else:
            found.append((field, message.content))
    return found


def _filled(template: str, values: Mapping[str, str], *, is_last: bool = False) -> list[tuple[str, bool]]:
    text = _IF.sub(lambda match: match[2] if values.get(match[1]) else "", template)
    if is_last:
        end = next((match.end() for match in _FIELD.finditer(text) if match[1] == "Response"), len(text))
        text = text[:end]
    pieces = _FIELD.split(text)  # every other one is the name of a field
    return [(values.get(piece, ""), True) if place % 2 else (piece, False) for place, piece in enumerate(pieces)]


def _plain(template: str) -> str:
    """A template without comments, and with the white space gone that `{{-` and `-}}` take away."""
    text = _COMMENT.sub("", template)
    return re.sub(r"\s-\}\}\s*", " }}", re.sub(r"\s*\{\{-\s", "{{ ", text))
