"""The application: every API behind one guard, and errors in the shape of the API that was called."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import PlanPatchError
from lsp_server.http import edits, memory, ollama, ollama_store, openai_api, status_page
from lsp_server.http.documents import describe
from lsp_server.http.errors import HttpError
from lsp_server.http.guard import Guard
from lsp_server.http.responses import Json
from lsp_server.http.service import Service
from lsp_server.http.shapes import shape_of

log = logging.getLogger("planpatch.http")


class HeadAsGet:
    """ASGI middleware: a HEAD for which there is no route is answered as the GET; uvicorn leaves the body out.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["method"] == "HEAD" and not _has_route(scope):
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _has_route(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].router.routes)


def make_app(service: Service) -> FastAPI:
    """The application of one service.

    Args:
        service: What the routes share.

    Returns:
        The application.
    """
    app = FastAPI(
        title="PlanPatch",
        version=service.version,
        description="PLAN and PATCH, and the APIs of Ollama and OpenAI, on a local model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(edits.router, tags=["planpatch"])
    app.include_router(memory.router, tags=["planpatch"])
    app.include_router(ollama.router, tags=["ollama"])
    app.include_router(ollama_store.router, tags=["ollama"])
    app.include_router(openai_api.router, tags=["openai"])
    app.include_router(status_page.router, tags=["planpatch"])
    settings = service.settings
    app.add_middleware(HeadAsGet)
    app.add_middleware(Guard, token=settings.token, runtime_token=service.token, origins=settings.origins)
    app.add_exception_handler(HttpError, _http_error)
    app.add_exception_handler(PlanPatchError, _our_error)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    describe(app)
    return app


def _answer(request: Request, error: HttpError) -> Response:
    return Json(error.to_json(shape_of(request.url.path)), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return _answer(request, error)


async def _our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PlanPatchError)
    return _answer(request, HttpError.of(error))


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "404 page not found", 405: "method not allowed"}.get(error.status_code, str(error.detail))
    return _answer(request, HttpError(error.status_code, message))


async def _validation_error(request: Request, error: Exception) -> Response:
    return _answer(request, HttpError(400, str(error)))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(
        request, HttpError(500, f"this is a bug in PlanPatch: {type(error).__name__}", hint="Please report it.")
    )
