"""Ollama's calls that change what is on this machine: pull, copy, create, delete. Each needs the runtime token.

Pull knows the catalogue's models. Copy and create give a model another name, create also a system prompt, a template,
first turns and options. Delete takes such a name away, or a model that PlanPatch pulled. Not covered: push and blobs.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.errors import CancelledError, PlanPatchError
from engine.inference.catalogue import ModelRef, catalogue, resolve
from engine.inference.store import Progress
from lsp_server.http.bodies import checked, read, read_json
from lsp_server.http.documents import takes
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import unless_gone
from lsp_server.http.models import names_of, service_of
from lsp_server.http.names import digest_of
from lsp_server.http.ollama_bodies import CopyBody, CreateBody, PullBody
from lsp_server.http.prompting import check_template, messages_of
from lsp_server.http.responses import Json
from lsp_server.http.sampling import Options
from lsp_server.http.service import Service

router = APIRouter()

_Status = dict[str, Any]
_NAME = re.compile(r"\w[\w./:-]{0,199}")


@router.post("/api/pull", **takes(PullBody))
async def pull(request: Request) -> Response:
    """Bring a model of the catalogue onto this machine, told of as it goes."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, PullBody)
    ref = _catalogue_ref(body.wanted)
    steps = _pull(service, ref)
    if body.stream is not False:
        return StreamingResponse(_lines(steps), media_type="application/x-ndjson")
    return Json(await unless_gone(request, _last(steps)))


def _catalogue_ref(name: str) -> ModelRef:
    """The catalogue's model of a name; a tag, if it is there, is `latest`."""
    plain = name.strip().removesuffix(":latest")
    known = {entry.name for entry in catalogue().values()} | {entry.hub_id.lower() for entry in catalogue().values()}
    if plain.lower() not in known:
        names = ", ".join(catalogue())
        raise HttpError(404, f"pull model manifest: '{name}' is not in the catalogue", hint=f"There are {names}.")
    return resolve(plain)


async def _pull(service: Service, ref: ModelRef) -> AsyncGenerator[_Status]:
    """Ollama's statuses of a pull; leaving early ends it, and what arrived is kept."""
    loop, steps = asyncio.get_running_loop(), asyncio.Queue[Progress | BaseException | None]()
    is_left = threading.Event()
    store = service.session_of().store

    def tell(step: Progress) -> None:
        if is_left.is_set():
            raise CancelledError("The client went away")
        loop.call_soon_threadsafe(steps.put_nowait, step)

    def work() -> None:
        end: BaseException | None = None
        try:
            store.pull(ref, tell)
        except Exception as error:  # the reader raises it
            end = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(steps.put_nowait, end)

    threading.Thread(target=work, name="planpatch-pull", daemon=True).start()
    try:
        yield {"status": "pulling manifest"}
        while (step := await steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield _status(ref, step)
        local = await asyncio.to_thread(store.get, ref)
        yield {"status": f"verifying sha256 digest {digest_of(local)[:12]}"}
        yield {"status": "success"}
    finally:
        is_left.set()


def _status(ref: ModelRef, step: Progress) -> _Status:
    if step.stage == "download" and step.unit == "bytes" and step.total:
        # Clients draw one bar for each digest.
        return {"status": f"pulling {ref.name}", "digest": ref.name, "total": step.total, "completed": step.done}
    return {"status": step.message}


@router.post("/api/copy", **takes(CopyBody))
async def copy(request: Request) -> Response:
    """Give a model another name."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, CopyBody)
    if not body.source or not body.destination:
        raise HttpError(400, "source and destination are required", param="source")
    names, loaded = names_of(service), service.host.local_or_none
    names.copy(names.find(body.source, loaded), _free_name(service, body.destination))
    return Response(status_code=200)


@router.post("/api/create", **takes(CreateBody))
async def create(request: Request) -> Response:
    """Make a model of another one with a system prompt, a template, first turns, options and licences."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, CreateBody)
    if not body.from_:
        raise HttpError(400, "neither 'from' or 'files' was specified", param="from")
    names, loaded = names_of(service), service.host.local_or_none
    source = names.find(body.from_, loaded)
    if body.quantize:
        message = f"quantize: {body.quantize} is not supported; models are kept as they are"
        raise HttpError(400, message, hint="PlanPatch's setting quantization says how they are held.", param="quantize")
    checked(body.parameters, Options)
    if body.template:
        check_template(body.template)
    if any(message.images for message in body.messages):
        raise HttpError(400, f'"{body.from_}" does not support vision', param="messages")
    messages_of(body.messages)
    changes: dict[str, object] = {"parameters": {**(source.parameters or {}), **body.parameters}}
    changes |= {key: value for key, value in (("system", body.system), ("template", body.template)) if value}
    if body.messages:
        changes["messages"] = [message.model_dump(exclude_defaults=True) for message in body.messages]
    given = [body.license] if isinstance(body.license, str) else body.license
    changes["licences"] = [*source.licences, *(text for text in given if text)]
    names.copy(source, _free_name(service, body.wanted), **changes)
    steps = [{"status": "using existing layer"}, {"status": "writing manifest"}, {"status": "success"}]
    if body.stream is not False:
        return StreamingResponse(_ready(steps), media_type="application/x-ndjson")
    return Json(steps[-1])


def _free_name(service: Service, name: str) -> str:
    """A name that hides no model of the store or the catalogue."""
    plain = name.removesuffix(":latest").lower()
    taken = {info.name.lower() for info in service.session_of().store.list()} | set(catalogue())
    if plain in taken or not _NAME.fullmatch(plain):
        raise HttpError(400, f"'{name}' is taken or is no name for a model", param="model")
    return name


@router.delete("/api/delete", **takes(PullBody))
async def delete(request: Request) -> Response:
    """Take a copied name away, or a model that PlanPatch pulled."""
    service = service_of(request)
    service.check_token(request)
    body = checked(await read_json(request), PullBody)
    names, loaded = names_of(service), service.host.local_or_none
    known = names.find(body.wanted, loaded)
    if known.is_alias:
        names.forget(known)
        return Response(status_code=200)
    if loaded is not None and known.local.name == loaded.name:
        raise HttpError(409, f"'{body.wanted}' is in memory", hint="Load another model first.")
    await asyncio.to_thread(service.session_of().store.remove, known.local.name)
    return Response(status_code=200)


@router.post("/api/push")
async def push(request: Request) -> Response:
    """Not there: nothing leaves the machine."""
    raise HttpError(400, "push is not supported: nothing leaves this machine")


@router.head("/api/blobs/{digest}", include_in_schema=False)
@router.post("/api/blobs/{digest}")
async def blobs(digest: str) -> Response:
    """Not there: models come from the catalogue."""
    raise HttpError(404, "blobs are not supported; models come from the catalogue")


async def _lines(steps: AsyncGenerator[_Status]) -> AsyncIterator[str]:
    try:
        async for step in steps:
            yield json.dumps(step) + "\n"
    except PlanPatchError as error:
        yield json.dumps(HttpError.of(error).to_json("ollama")) + "\n"
    finally:
        await steps.aclose()


async def _last(steps: AsyncGenerator[_Status]) -> _Status:
    last: _Status = {}
    try:
        async for step in steps:
            last = step
    finally:
        await steps.aclose()
    return last


def _ready(steps: list[_Status]) -> Iterator[str]:
    for step in steps:
        yield json.dumps(step) + "\n"
