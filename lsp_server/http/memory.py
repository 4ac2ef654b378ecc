"""Lending the model's memory to another process of the user's, such as training, and taking it back."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from lsp_server.http.bodies import Body, Whole, read
from lsp_server.http.documents import takes
from lsp_server.http.errors import HttpError
from lsp_server.http.models import service_of
from lsp_server.http.responses import Json
from lsp_server.process_marks import lives

router = APIRouter()


class ReleaseBody(Body):
    """Of `/release`: the process that wants the memory, and when it and the machine started, in seconds."""

    pid: Whole = Field(ge=1)
    started_at: float | None = None
    booted_at: float | None = None
    purpose: str = Field(default="Another program", max_length=100)


class ResumeBody(Body):
    """Of `/resume`: the process that had the memory."""

    pid: Whole = Field(ge=1)


@router.post("/release", **takes(ReleaseBody))
async def release(request: Request) -> Response:
    """Unload the model until `/resume`, or until the process has ended."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, ReleaseBody)
    times = {"started_at": body.started_at, "booted_at": body.booted_at}
    holder = {"pid": body.pid, **{name: value for name, value in times.items() if value is not None}}
    if not lives(holder):
        raise HttpError(409, f"process {body.pid} does not run", code="no_process")
    model = service.host.status.model
    if not await asyncio.to_thread(service.host.release, holder, body.purpose):
        raise HttpError(409, service.host.status.message, code="released", hint="Wait until that has ended.")
    return Json({"ok": True, "model": model, "state": service.host.status.state})


@router.post("/resume", **takes(ResumeBody))
async def resume(request: Request) -> Response:
    """Load the model again."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, ResumeBody)
    if not service.host.resume(body.pid):
        raise HttpError(409, f"process {body.pid} does not hold the model's memory", code="not_released")
    return Json({"ok": True, "state": service.host.status.state})
