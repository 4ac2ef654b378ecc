"""Ollama's API: discovery, generate, chat and embeddings, as its clients use them.

Not covered: templates of Go beyond simple fields, images, blobs, and keeping several models in memory: one model
answers, and `keep_alive` is taken and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from engine.errors import PlanPatchError
from engine.inference.protocol import Completion, FinishReason, GenerationRequest, Message
from lsp_server.http.bodies import checked, read, read_json
from lsp_server.http.cleaning import cleaned
from lsp_server.http.documents import takes
from lsp_server.http.embedding import embeddings
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import unless_gone
from lsp_server.http.models import model_of, names_of, service_of
from lsp_server.http.names import Known, abilities, capabilities, details, model_info, rfc3339, summary, template_of
from lsp_server.http.ollama_bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    ShowBody,
    keep_alive_s,
    thinking_of,
)
from lsp_server.http.prompting import Ask, check_template, in_rounds, messages_of, own_messages, request_of
from lsp_server.http.responses import Json
from lsp_server.http.sampling import Options, grammar_of
from lsp_server.http.service import OLLAMA_VERSION, Service
from lsp_server.http.splitting import ThinkSplitter, ToolSplitter
from lsp_server.http.tool_calls import checked_tools

router = APIRouter()

NO_THINK_SYSTEM = "Answer directly and briefly, without explanation and without thinking aloud. /no_think"
_ORIGINAL_CONTEXT_CHARS = 2000
_ORIGINAL_NUM_PREDICT = 24
_ORIGINAL_MAX_TIME_S = 20.0
_FOREVER = "2318-01-01T00:00:00Z"


# --- discovery -------------------------------------------------------------------------------------------------------


@router.get("/", response_class=PlainTextResponse)
async def root() -> Response:
    """Say that somebody is there, in the words that clients look for."""
    return PlainTextResponse("Ollama is running")


@router.get("/api/version")
async def version() -> Response:
    """The version of Ollama's API that this follows."""
    return Json({"version": OLLAMA_VERSION})


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """The models of this machine, the one in memory first."""
    service = service_of(request)
    known = names_of(service).all(service.host.local_or_none)
    level = _quantization(service)
    return Json({"models": [{**summary(one, level), "capabilities": abilities(one)} for one in known]})


@router.get("/api/ps")
async def ps(request: Request) -> Response:
    """The model in memory."""
    service = service_of(request)
    local, engine = service.host.local_or_none, service.host.engine_or_none
    if local is None or engine is None:
        return Json({"models": []})
    status = engine.status()
    line = summary(Known(f"{local.name}:latest", local), status.quantization)
    del line["modified_at"]
    size = status.memory_bytes or line["size"]
    on_gpu = size if status.device != "cpu" else 0
    more = {"expires_at": _FOREVER, "size": size, "size_vram": on_gpu, "context_length": status.context_length}
    return Json({"models": [{**line, **more}]})


@router.post("/api/show", **takes(ShowBody))
async def show(request: Request) -> Response:
    """What a model is and can do."""
    service = service_of(request)
    body = await read(request, ShowBody)
    known = names_of(service).find(body.wanted, service.host.local_or_none)
    basename = body.wanted if request.headers.get("user-agent", "").startswith("GitHubCopilotChat/") else ""
    parameters = _parameters(known)
    template = known.template or template_of(known.local)
    found: dict[str, Any] = {
        "license": "\n".join(_licences(known)),
        "modelfile": _modelfile(known, template, parameters),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters),
        "template": template,
        "details": details(known, _quantization(service)),
        "model_info": model_info(known, basename=basename),
        "capabilities": list(abilities(known)),
        "modified_at": summary(known)["modified_at"],
    }
    found |= {"system": known.system} if known.system else {}
    found |= {"messages": list(known.messages)} if known.messages else {}
    return Json(found)


def _parameters(known: Known) -> list[tuple[str, str]]:
    """Each option's name and value; one that has several values, as `stop` may, is there once for each."""
    found: list[tuple[str, str]] = []
    for name, value in (known.parameters or {}).items():
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        found += [(name, json.dumps(one, ensure_ascii=False)) for one in values]
    return found


def _licences(known: Known) -> list[str]:
    return [text for text in (known.local.licence, *known.licences) if text]


def _modelfile(known: Known, template: str, parameters: Sequence[tuple[str, str]]) -> str:
    lines = [f"FROM {known.local.name}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{known.system}"""'] if known.system else []
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    lines += [f'MESSAGE {one["role"]} """{one.get("content", "")}"""' for one in known.messages]
    lines += [f'LICENSE """{text}"""' for text in _licences(known)]
    return "\n".join(lines) + "\n"


def _quantization(service: Service) -> str:
    engine = service.host.engine_or_none
    return engine.status().quantization if engine is not None else "bf16"


# --- generate and chat -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """A generation and how its answer is told.

    Args:
        name: The model, as the client wrote it.
        ask: What is asked.
        tell: Makes the changing part of a chunk: text, thinking, calls.
        is_streamed: Whether chunks are sent as they come.
        clean: Whether the whole answer is cleaned.
        tool_names: The tools that may be called.
        with_context: Whether the last chunk carries the token ids.
        prepared: The engine's request, where it was made already.
    """

    name: str
    ask: Ask
    tell: Callable[[str, str, Sequence[Mapping[str, Any]]], dict[str, Any]]
    is_streamed: bool
    clean: bool = False
    tool_names: Sequence[str] = ()
    with_context: bool = False
    prepared: GenerationRequest | None = None


@router.post("/api/generate", **takes(GenerateBody))
async def generate(request: Request) -> Response:
    """Continue a prompt, or fill in a middle."""
    service = service_of(request)
    body = checked(await read_json(request), GenerateBody)
    keep_alive = keep_alive_s(body.keep_alive)
    name, known, options = _model_and_options(service, body.model, body)
    thinking = _thinking(name, known, thinking_of(body.think))
    if body.images:
        raise HttpError(400, f'"{name}" does not support vision', param="images")
    if body.raw and (body.system or body.template or body.context):
        raise HttpError(400, "raw mode does not support template, system, or context")
    if body.suffix and "insert" not in capabilities(known.local):
        raise HttpError(400, f'"{name}" does not support insert', param="suffix")
    grammar = grammar_of(body.format)
    if body.template:
        check_template(body.template)
    if not body.prompt and not body.suffix:
        return await _load(service, name, keep_alive, {"response": ""})
    ask = Ask(options, context=tuple(body.context), thinking=thinking, grammar=grammar)
    is_original = body.model is None
    system = known.system if body.system is None else body.system
    template = body.template if "{{" in body.template else known.own_template
    if body.suffix:
        ask = replace(ask, before=body.prompt, after=body.suffix, context=())
    elif body.raw:
        ask = replace(ask, raw=body.prompt)
    else:
        prompt = body.prompt[-_context_chars(service) :] if is_original else body.prompt
        system = system or (NO_THINK_SYSTEM if is_original else "")
        turns = [Message("system", system)] if system else []
        turns += own_messages(known) if not body.context else ()
        ask = replace(ask, messages=(*turns, Message("user", prompt)))
        ask = ask if is_original else _in_template(ask, template)

    def tell(text: str, thought: str, _: object) -> dict[str, Any]:
        return {"response": text, **({"thinking": thought} if thought else {})}

    is_streamed = not is_original if body.stream is None else body.stream
    clean = _cleans(service, body.clean, is_original) and not (body.raw or body.suffix or grammar or is_streamed)
    turn = Turn(name, ask, tell, is_streamed, clean, with_context=not (body.raw or body.suffix))
    return await _answer(service, request, turn)


@router.post("/api/chat", **takes(ChatBody))
async def chat(request: Request) -> Response:
    """The next turn of a chat."""
    service = service_of(request)
    body = checked(await read_json(request), ChatBody)
    keep_alive = keep_alive_s(body.keep_alive)
    name, known, options = _model_and_options(service, body.model, body)
    thinking = _thinking(name, known, thinking_of(body.think))
    if any(message.images for message in body.messages):
        raise HttpError(400, f'"{name}" does not support vision', param="messages")
    if body.tools and "tools" not in abilities(known):
        raise HttpError(400, f'"{name}" does not support tools', param="tools")
    tools = checked_tools(body.tools)
    grammar = grammar_of(body.format)
    messages = messages_of(body.messages)
    if not messages:
        return await _load(service, name, keep_alive, {"message": {"role": "assistant", "content": ""}})
    is_original = body.model is None
    system = known.system or (NO_THINK_SYSTEM if is_original else "")
    has_system = any(message.role == "system" for message in messages)
    messages = (*own_messages(known), *messages)
    if system and not has_system:
        messages = (Message("system", system), *messages)
    if is_original:
        messages = (*messages[:-1], replace(messages[-1], content=messages[-1].content[-_context_chars(service) :]))
    is_streamed = not is_original if body.stream is None else body.stream
    clean = _cleans(service, body.clean, is_original) and not (tools or grammar or is_streamed)
    ask = Ask(options, messages=messages, tools=tools, thinking=thinking, grammar=grammar, continues=True)
    ask = _in_template(ask, known.own_template)
    tool_names = [str(tool["function"]["name"]) for tool in body.tools]
    return await _answer(service, request, Turn(name, ask, _tell_message, is_streamed, clean, tool_names))


def _in_template(ask: Ask, template: str) -> Ask:
    """A chat in a template of the client's or of a created model; what is wrong with that is told by a status."""
    if template:
        in_rounds(template, ask.messages)
    return replace(ask, template=template)


def _tell_message(text: str, thought: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    message |= {"thinking": thought} if thought else {}
    message |= {"tool_calls": [{"function": dict(call)} for call in calls]} if calls else {}
    return {"message": message}


def _model_and_options(
    service: Service, wanted: str | None, body: GenerateBody | ChatBody
) -> tuple[str, Known, Options]:
    """The model that is meant, and the options; without a model the original service's defaults hold."""
    if wanted is None:
        name = service.host.status.model
        known = names_of(service).find(name, service.host.local_or_none) if name else None
        if known is None:
            raise HttpError(503, service.host.status.message or "the model is loading", code="loading")
        given = body.options.model_dump(exclude_unset=True)
        top = {"num_predict": body.num_predict, "max_time": body.max_time}
        given |= {key: value for key, value in top.items() if value is not None}
        defaults: dict[str, Any] = {"num_predict": _ORIGINAL_NUM_PREDICT, "max_time": _ORIGINAL_MAX_TIME_S}
        options = checked({**defaults, "temperature": 0.0, **given}, Options)
        if body.stop_think:
            options = options.model_copy(update={"stop": [*options.stop_strings, "</think>"]})
        return name, known, options
    known = model_of(service, wanted)
    if not known.parameters:
        return wanted, known, body.options
    given = body.options.model_dump(exclude_unset=True)
    return wanted, known, checked({**known.parameters, **given}, Options)


def _thinking(name: str, known: Known, wanted: bool | None) -> bool:
    if wanted and "thinking" not in abilities(known):
        raise HttpError(400, f'"{name}" does not support thinking', param="think")
    return bool(wanted)


def _context_chars(service: Service) -> int:
    """OLLAMA_CTX_CHARS, if the environment sets it."""
    settings = service.settings
    is_set = "OLLAMA_CTX_CHARS" in settings.source_of("surroundings_chars")
    return max(1, settings.surroundings_chars) if is_set else _ORIGINAL_CONTEXT_CHARS


def _cleans(service: Service, asked: bool | None, is_original: bool) -> bool:
    """Whether an answer is cleaned: as the request says, else as the user says, else for the original's requests."""
    if asked is not None:
        return asked
    settings = service.settings
    return settings.clean_response and (is_original or settings.source_of("clean_response") != "default")


async def _load(service: Service, name: str, keep_alive: float | None, empty: dict[str, Any]) -> Response:
    """An empty prompt asks that the model be loaded, or given up, which this server does not do for a client."""
    if keep_alive != 0:
        await service.engine()
    reason = "unload" if keep_alive == 0 else "load"
    end = {"done": True, "done_reason": reason}
    return Json({"model": name, "created_at": rfc3339(time.time()), **empty, **end})


async def _answer(service: Service, request: Request, turn: Turn) -> Response:
    service.generations.slots.check_room()
    engine = service.engine_now()
    if engine is not None:  # what is wrong with the prompt is told by a status
        turn = replace(turn, prepared=await asyncio.to_thread(request_of, engine, turn.ask))
    if turn.is_streamed:
        return StreamingResponse(_lines(service, request, turn), media_type="application/x-ndjson")
    return Json(await unless_gone(request, _whole(service, request.url.path, turn)))


async def _lines(service: Service, request: Request, turn: Turn) -> AsyncIterator[str]:
    """The chunks as lines; a fault is the last one."""
    try:
        async for chunk in _chunks(service, request.url.path, turn):
            yield json.dumps(chunk) + "\n"
    except PlanPatchError as error:
        yield json.dumps(HttpError.of(error).to_json("ollama")) + "\n"
    except HttpError as error:
        yield json.dumps(error.to_json("ollama")) + "\n"


async def _whole(service: Service, path: str, turn: Turn) -> dict[str, Any]:
    """The chunks as one object."""
    text, thought, calls, last = "", "", list[Mapping[str, Any]](), dict[str, Any]()
    async for chunk in _chunks(service, path, turn):
        part = chunk.get("message") or chunk
        text += part.get("content", part.get("response", ""))
        thought += part.get("thinking", "")
        calls += [call["function"] for call in part.get("tool_calls", [])]
        last = chunk
    return {**last, **turn.tell(cleaned(text) if turn.clean else text, thought, calls)}


@dataclass(slots=True)
class _Clock:
    """Times of one answer, in nanoseconds."""

    started_at: int = field(default_factory=time.perf_counter_ns)
    loaded_at: int = 0

    def final(self, completion: Completion, num_tokens: int) -> dict[str, int]:
        return {
            "total_duration": time.perf_counter_ns() - self.started_at,
            "load_duration": self.loaded_at - self.started_at,
            "prompt_eval_count": completion.num_prompt_tokens,
            "prompt_eval_duration": max(1, int(completion.prefill_s * 1e9)),
            "eval_count": num_tokens,
            "eval_duration": max(1, int(completion.decode_s * 1e9)),
        }


async def _chunks(service: Service, path: str, turn: Turn) -> AsyncGenerator[dict[str, Any]]:
    """One object for each piece of the answer, and the final one, whose text is empty."""
    clock = _Clock()
    thinking, tools = ThinkSplitter(turn.ask.thinking), ToolSplitter(turn.tool_names)

    def chunk(text: str, thought: str = "", calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        told = turn.tell(text, thought, calls)
        return {"model": turn.name, "created_at": rfc3339(time.time()), **told, "done": False}

    async with service.generations.call(path) as call:
        engine = await service.engine()
        clock.loaded_at = time.perf_counter_ns()
        asked = turn.prepared or await asyncio.to_thread(request_of, engine, turn.ask)
        completion: Completion | None = None
        stream = service.generations.stream(engine, asked, call)
        try:
            async for event in stream:
                if isinstance(event, Completion):
                    completion = event
                    break
                thought, text = thinking.push(event.text)
                text = tools.push(text)
                if (thought or text) and turn.ask.options.num_predict != 0:
                    yield chunk(text, thought)
        finally:
            await stream.aclose()
        thought, text = thinking.flush()
        text = tools.push(text)
        rest, calls = tools.flush()
        if (thought or text or rest or calls) and turn.ask.options.num_predict != 0:
            found = [{"name": one.name, "arguments": one.arguments} for one in calls]
            yield chunk(text + rest, thought, found)
        assert completion is not None
        token_ids = completion.token_ids if turn.ask.options.num_predict != 0 else ()  # the engine writes one at least
        end = {"done": True, "done_reason": _reason(completion), **clock.final(completion, len(token_ids))}
        ids = {"context": [*asked.prompt_token_ids, *token_ids]} if turn.with_context else {}
        yield {**chunk(""), **end, **ids}


def _reason(completion: Completion) -> str:
    return "stop" if completion.finish_reason is FinishReason.STOP else "length"


# --- embeddings ------------------------------------------------------------------------------------------------------


@router.post("/api/embed", **takes(EmbedBody))
async def embed(request: Request) -> Response:
    """A vector of length 1 for each text: the mean of the last hidden states."""
    service = service_of(request)
    body = await read(request, EmbedBody)
    keep_alive_s(body.keep_alive)
    started_at = time.perf_counter_ns()
    model_of(service, body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    loaded_at = time.perf_counter_ns()
    vectors, count = await unless_gone(
        request, embeddings(service, texts, "/api/embed", truncate=body.truncate, dimensions=body.dimensions)
    )
    times = {"total_duration": time.perf_counter_ns() - started_at, "load_duration": loaded_at - started_at}
    return Json({"model": body.model, "embeddings": vectors, **times, "prompt_eval_count": count})


@router.post("/api/embeddings", **takes(EmbeddingsBody))
async def older_embeddings(request: Request) -> Response:
    """One vector, for clients of the older call."""
    service = service_of(request)
    body = await read(request, EmbeddingsBody)
    keep_alive_s(body.keep_alive)
    model_of(service, body.model)
    texts = [body.prompt] if body.prompt else []
    vectors, _ = await unless_gone(request, embeddings(service, texts, "/api/embeddings"))
    return Json({"embedding": vectors[0] if vectors else []})
