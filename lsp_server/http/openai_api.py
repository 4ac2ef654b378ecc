"""OpenAI's API: models, chat completions, completions and embeddings, as its clients use them.

Not covered: images and audio, penalties, logit_bias and best_of, `echo` with log-probabilities, and keeping several
models in memory. A chat that does not fit is refused, where Ollama's API leaves its oldest turns out.
"""

from __future__ import annotations

import array
import asyncio
import base64
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.inference.protocol import Message
from lsp_server.http.bodies import read
from lsp_server.http.documents import takes
from lsp_server.http.embedding import embeddings
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import unless_gone
from lsp_server.http.models import model_of, names_of, service_of
from lsp_server.http.names import Known, abilities, capabilities, digest_of
from lsp_server.http.openai_answers import ChatForm, TextForm, Turn, events, whole
from lsp_server.http.openai_bodies import (
    MOST_CHOICES,
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    chat_of,
    check_supported,
    options_of,
    shape_of_answer,
    texts_or_ids,
    thinks,
)
from lsp_server.http.prompting import Ask, in_rounds, own_messages, request_of
from lsp_server.http.responses import Json
from lsp_server.http.service import Service, tokenizer_of

router = APIRouter(prefix="/v1")


# --- models ----------------------------------------------------------------------------------------------------------


@router.get("/models")
async def models(request: Request) -> Response:
    """The models of this machine, the one in memory first."""
    service = service_of(request)
    known = names_of(service).all(service.host.local_or_none)
    return Json({"object": "list", "data": [_model(one.name, one) for one in known]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    service = service_of(request)
    return Json(_model(name, names_of(service).find(name, service.host.local_or_none)))


def _model(name: str, known: Known) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _created(known), "owned_by": "planpatch"}


def _created(known: Known) -> int:
    try:
        return int(known.local.folder.stat().st_mtime)
    except OSError:
        return 0


# --- chat and completions --------------------------------------------------------------------------------------------


@router.post("/chat/completions", **takes(ChatCompletionBody))
async def chat_completions(request: Request) -> Response:
    """The next turn of a chat."""
    service = service_of(request)
    body = await read(request, ChatCompletionBody)
    check_supported(body)
    known = model_of(service, body.model)
    options, messages, shape = options_of(body, known), chat_of(body), shape_of_answer(body)
    able = abilities(known)
    if shape.tools and "tools" not in able:
        raise HttpError(400, f'"{body.model}" does not support tools', param="tools")
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    has_system = any(message.role == "system" for message in messages)
    messages = (*own_messages(known), *messages)
    if known.system and not has_system:
        messages = (Message("system", known.system), *messages)
    if known.own_template:
        in_rounds(known.own_template, messages)  # what is wrong with it is told by a status
    num_top = body.top_logprobs or 0
    ask = Ask(
        options,
        messages=messages,
        tools=shape.tools,
        thinking=thinks(body) and "thinking" in able and shape.grammar is None,
        grammar=shape.grammar,
        top_logprobs=max(1, num_top) if body.logprobs else 0,
        may_shorten=False,
        template=known.own_template,
    )
    turn = Turn(
        body.model,
        _fingerprint(known),
        _choices([ask], body.n),
        ChatForm(body.logprobs, num_top),
        num_choices=body.n,
        tool_names=shape.tool_names,
        most_calls=None if body.parallel_tool_calls else 1,
        with_usage=body.with_usage,
    )
    return await _answer(service, request, turn, body.stream)


@router.post("/completions", **takes(CompletionBody))
async def completions(request: Request) -> Response:
    """Continue prompts, or fill in a middle."""
    service = service_of(request)
    body = await read(request, CompletionBody)
    check_supported(body)
    known = model_of(service, body.model)
    if body.suffix and "insert" not in capabilities(known.local):
        raise HttpError(400, f'"{body.model}" does not support insert', param="suffix")
    if body.echo and body.logprobs is not None:
        raise HttpError(400, "logprobs: not together with echo", param="logprobs")
    with_logprobs, num_top = body.logprobs is not None, body.logprobs or 0
    ask = Ask(options_of(body, known), top_logprobs=max(1, num_top) if with_logprobs else 0, may_shorten=False)
    if body.suffix and (body.prompt is None or isinstance(body.prompt, str)):
        prompts: list[str | list[int]] = [body.prompt or ""]
    else:
        prompts = texts_or_ids(body.prompt, "prompt")
    asks = _choices([_ask_of(ask, prompt, body.suffix) for prompt in prompts], body.n)
    if len(asks) > MOST_CHOICES:
        raise HttpError(400, f"prompt: {len(asks)} choices; {MOST_CHOICES} are possible at once", param="prompt")
    echoes = await _echoes(service, prompts, body.n) if body.echo else []
    form = TextForm(echoes, with_logprobs, num_top)
    turn = Turn(body.model, _fingerprint(known), asks, form, num_choices=body.n, with_usage=body.with_usage)
    return await _answer(service, request, turn, body.stream)


def _ask_of(ask: Ask, prompt: str | list[int], suffix: str | None) -> Ask:
    """What one prompt of `/v1/completions` asks; it is taken as it is, without a chat template."""
    if suffix:
        if not isinstance(prompt, str):
            raise HttpError(400, "suffix: the prompt before it is a string", param="suffix")
        return replace(ask, before=prompt, after=suffix)
    return replace(ask, raw=prompt) if isinstance(prompt, str) else replace(ask, raw="", context=tuple(prompt))


async def _echoes(service: Service, prompts: Sequence[str | list[int]], num_choices: int) -> list[str]:
    """The text of each choice's prompt; token ids need the tokenizer."""
    texts: list[str] = []
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else tokenizer_of(await service.engine()).decode(prompt)
        texts += [text] * num_choices
    return texts


def _choices(asks: Sequence[Ask], num_choices: int) -> tuple[Ask, ...]:
    """Every choice of every prompt; with a seed each choice of a prompt has the next one."""
    found: list[Ask] = []
    for ask in asks:
        seed = ask.options.seed
        for number in range(num_choices):
            options = ask.options if seed < 0 else ask.options.model_copy(update={"seed": (seed + number) % 2**63})
            found.append(replace(ask, options=options))
    return tuple(found)


def _fingerprint(known: Known) -> str:
    return f"fp_{digest_of(known.local)[:10]}"


async def _answer(service: Service, request: Request, turn: Turn, is_streamed: bool) -> Response:
    service.generations.slots.check_room()
    engine = service.engine_now()
    if engine is not None:  # what is wrong with a prompt is told by a status
        for ask in turn.asks[:: turn.num_choices]:
            await asyncio.to_thread(request_of, engine, ask)
    path = request.url.path
    if is_streamed:
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(events(service, path, turn), headers=headers, media_type="text/event-stream")
    return Json(await unless_gone(request, whole(service, path, turn)))


# --- embeddings ------------------------------------------------------------------------------------------------------


@router.post("/embeddings", **takes(EmbeddingBody))
async def embed(request: Request) -> Response:
    """A vector of length 1 for each input."""
    service = service_of(request)
    body = await read(request, EmbeddingBody)
    model_of(service, body.model)
    texts = texts_or_ids(body.input, "input")
    work = embeddings(service, texts, request.url.path, truncate=False, dimensions=body.dimensions)
    vectors, count = await unless_gone(request, work)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "data": data, "model": body.model, "usage": usage})


def _encoded(vector: Sequence[float], encoding: str) -> list[float] | str:
    """A vector as numbers, or as base64 of its little-endian fp32."""
    if encoding == "float":
        return list(vector)
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
