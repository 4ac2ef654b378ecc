"""Who may call: the Host and Origin headers, and tokens.

A web page can reach a loopback port: through a name of its own that resolves to 127.0.0.1 (DNS rebinding: the Host
header gives it away), or by a POST that needs no permission (the Origin header gives it away). Both are refused with
403 before a route sees them. Nothing here protects against other programs of the same user: they can read the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsp_server.http.errors import HttpError
from lsp_server.http.shapes import shape_of

MAX_HEADER_BYTES = 32_000
_LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_LOOPBACK_SUFFIX = ".localhost"  # browsers resolve such names to loopback themselves (RFC 6761)
_APPLICATION_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_METHODS = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
_PREFLIGHT_S = 600
_STATUS_PAGE = "/status"  # a static file; a browser cannot send a token for it


class Guard:
    """ASGI middleware; see the module's docstring.

    Args:
        app: What it stands before.
        token: Token that every request but the bare status page needs; empty for none.
        runtime_token: Token of this run, which does as well.
        origins: More origins that may call, as OLLAMA_ORIGINS writes them: `https://a.example`, `*` in a place.
    """

    def __init__(self, app: ASGIApp, token: str, runtime_token: str, origins: Sequence[str]) -> None:
        self._app = app
        self._token = token
        self._runtime_token = runtime_token
        self._origins = tuple(origins)
        self._own_names = {name.lower() for name in (socket.gethostname(), socket.getfqdn()) if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        try:
            self._check(headers, origin)
        except HttpError as error:
            return await _refuse(error, scope, send, "")
        if scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
            return await _answer_preflight(headers, origin, send)
        is_open = not self._token or (scope["path"] == _STATUS_PAGE and scope["method"] in ("GET", "HEAD"))
        if not is_open and not has_token(headers, self._token, self._runtime_token):
            error = HttpError(401, "this listener asks for a token", hint="Send Authorization: Bearer TOKEN.")
            return await _refuse(error, scope, send, origin)

        async def send_for_origin(message: Message) -> None:
            if message["type"] == "http.response.start" and origin:
                _allow(MutableHeaders(scope=message), origin)
            await send(message)

        await self._app(scope, receive, send_for_origin)

    def _check(self, headers: Headers, origin: str) -> None:
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            raise HttpError(431, f"the headers are larger than {MAX_HEADER_BYTES:,} bytes", limit=MAX_HEADER_BYTES)
        host = headers.get("host", "")
        if not self._is_known_host(host):
            raise HttpError(403, f"the Host {host!r} is not this machine's")
        if origin and origin != f"http://{host}" and not self._is_known_origin(origin):
            raise HttpError(
                403, f"the Origin {origin!r} may not call", hint="Add it to the setting origins, if it is yours."
            )

    def _is_known_host(self, host: str) -> bool:
        if not host:
            return True  # no browser leaves it out
        name = "::1" if host == "::1" else _name_of(host)
        if name is None:
            return False
        if name in _LOCAL_NAMES or name in self._own_names or name.endswith(_LOCAL_SUFFIXES):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or address.is_private or address.is_unspecified

    def _is_known_origin(self, origin: str) -> bool:
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme in _APPLICATION_SCHEMES:
            return True
        if parts.scheme in ("http", "https") and (name in _LOCAL_NAMES or name.endswith(_LOOPBACK_SUFFIX)):
            return True
        return any(_matches(origin, allowed) for allowed in self._origins)


def has_token(headers: Headers, *tokens: str) -> bool:
    """Whether a request carries one of some tokens.

    Args:
        headers: Its headers: `Authorization: Bearer TOKEN` or `X-PlanPatch-Token: TOKEN`.
        *tokens: What counts; empty ones do not.

    Returns:
        Whether it does.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    found = [headers.get("x-planpatch-token", ""), given.strip() if scheme.lower() == "bearer" else ""]
    return any(hmac.compare_digest(one.encode(), token.encode()) for one in found if one for token in tokens if token)


def _name_of(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    name = (parts.hostname or "").rstrip(".").lower()
    return name if name and not parts.path and not parts.query and parts.username is None else None


def _matches(origin: str, allowed: str) -> bool:
    """Whether an origin is an allowed one; `*` stands for a part without a slash, but not for everything."""
    if allowed == "*":
        return False
    before, star, after = allowed.rstrip("/").partition("*")
    if not star:
        return origin == before
    middle = origin[len(before) : len(origin) - len(after)]
    fits = len(origin) >= len(before) + len(after) and origin.startswith(before) and origin.endswith(after)
    return fits and "/" not in middle


def _allow(headers: MutableHeaders, origin: str) -> None:
    headers["Access-Control-Allow-Origin"] = origin
    headers.add_vary_header("Origin")


async def _answer_preflight(asked: Headers, origin: str, send: Send) -> None:
    start: Message = {"type": "http.response.start", "status": 204, "headers": []}
    headers = MutableHeaders(scope=start)
    _allow(headers, origin)
    headers["Access-Control-Allow-Methods"] = _METHODS
    headers["Access-Control-Allow-Headers"] = asked.get("access-control-request-headers", "content-type")
    headers["Access-Control-Max-Age"] = str(_PREFLIGHT_S)
    await send(start)
    await send({"type": "http.response.body", "body": b""})


async def _refuse(error: HttpError, scope: Scope, send: Send, origin: str) -> None:
    body = json.dumps(error.to_json(shape_of(scope["path"]))).encode()
    start: Message = {"type": "http.response.start", "status": error.status, "headers": []}
    headers = MutableHeaders(scope=start)
    headers["Content-Type"] = "application/json"
    headers["Content-Length"] = str(len(body))
    headers.update(error.headers())
    if origin:
        _allow(headers, origin)
    await send(start)
    await send({"type": "http.response.body", "body": body})
