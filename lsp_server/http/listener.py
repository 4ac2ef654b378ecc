"""The listener: uvicorn on a thread and event loop of its own, so that no client of it makes the editor wait."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.errors import EnvironmentFault, PlanPatchError, UsageError
from engine.patching.disk import write_atomically
from lsp_server.http.service import Service
from lsp_server.process_marks import facts_of_living, own_facts
from lsp_server.running import listeners

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("planpatch.http")

_KEEP_ALIVE_S = 75
_BACKLOG = 256
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens.

    Args:
        host: The address.
        port: The port.
    """

    host: str
    port: int

    @property
    def url(self) -> str:
        """Its URL."""
        return _url(self.host, self.port)

    @property
    def local_url(self) -> str:
        """The URL for a browser on this machine; not every browser opens 0.0.0.0."""
        return _url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class TakenError(EnvironmentFault):
    """The port is taken, or may not be bound."""

    code = "port_taken"


def new_token() -> str:
    """A token for one run."""
    return secrets.token_urlsafe(32)


def bind(host: str, port: int, *, has_token: bool, runtime_file: Path) -> socket.socket:
    """Bind the listener's socket.

    Args:
        host: Address.
        port: Port; 0 takes a free one.
        has_token: Whether the user's settings name a token, without which only loopback is bound.
        runtime_file: Where another server of this home says its port.

    Returns:
        The socket, listening.

    Raises:
        UsageError: The address is not loopback and there is no token, or it is none.
        TakenError: The port is taken; the message says by whom, as far as that can be found.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as fault:
        raise UsageError(f"{host!r} is no address: {fault}", hint="Set host to 127.0.0.1.") from None
    if not _is_loopback(str(where[0])) and not has_token:
        raise UsageError(
            f"{host} is not a loopback address, so others could reach it",
            hint="Set a token too, or set host to 127.0.0.1.",
        )
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # on Windows the option would let two servers share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(_BACKLOG)
    except OSError as fault:
        bound.close()
        pid, holder = _holder(port, runtime_file)
        raise TakenError(
            f"HTTP cannot listen on {host}:{port}: {fault.strerror or fault}{holder and f'; {holder} holds it'}",
            hint="Give another port (setting port, or --port), or end the other program.",
            port=port,
            holder=pid,
            holder_is_planpatch=holder.startswith("the PlanPatch server"),
        ) from None
    bound.setblocking(False)
    return bound


def _is_loopback(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _holder(port: int, runtime_file: Path) -> tuple[int | None, str]:
    """Who holds a port: process id, and words; empty where that cannot be found."""
    import psutil

    for server in listeners(runtime_file):
        if server.port == port:
            return server.pid, f"the PlanPatch server of process {server.pid}"
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            is_it = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if is_it and connection.pid:
                return connection.pid, f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return None, ""


def _own_runtime_file(runtime_file: Path, port: int) -> Path:
    """The home's runtime file, or one with the port in its name while another server that lives has that one."""
    facts = facts_of_living(runtime_file)
    if facts is not None and facts["pid"] != os.getpid():
        return runtime_file.with_name(f"{runtime_file.stem}-{port}{runtime_file.suffix}")
    return runtime_file


class Listener:
    """Serves one application until it is closed.

    Args:
        service: What the routes share.
        bound: The socket.
        runtime_file: Where pid, port and token are written for the command line; readable by this user alone.
    """

    def __init__(self, service: Service, bound: socket.socket, runtime_file: Path) -> None:
        host, port = bound.getsockname()[:2]
        self.address = Address(host, port)
        self._service = service
        self._socket = bound
        self._runtime_file = _own_runtime_file(runtime_file, port)
        service.runtime_name = self._runtime_file.name
        self._server: uvicorn.Server | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="planpatch-http", daemon=True)

    def start(self) -> None:
        """Begin to serve; requests are answered soon, and those that come earlier wait in the socket."""
        self._thread.start()
        self._write_runtime_file()

    def close(self) -> None:
        """End every connection and give the port back."""
        self._is_closing = True  # before the server is looked at: it may not be there yet
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(_END_S)
        self._socket.close()
        self._remove_runtime_file()

    def _run(self) -> None:
        import uvicorn

        from lsp_server.http.app import make_app
        from lsp_server.http.connection import TimedProtocol

        config = uvicorn.Config(
            make_app(self._service),
            http=TimedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._server.should_exit = self._is_closing
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except Exception:
            log.exception("HTTP ended")
        finally:
            self._service.generations.close()

    def _write_runtime_file(self) -> None:
        facts = {
            **own_facts(),
            "host": self.address.host,
            "port": self.address.port,
            "token": self._service.token,
            "has_editor": self._service.in_editor is not None,
            "url": self.address.url,
        }
        try:
            write_atomically(self._runtime_file, json.dumps(facts).encode(), expected_sha256=None, private=True)
        except PlanPatchError as error:
            log.warning("the runtime file cannot be written: %s", error.message)

    def _remove_runtime_file(self) -> None:
        with suppress(OSError, ValueError):
            facts = cast("Mapping[str, Any]", json.loads(self._runtime_file.read_text(encoding="utf-8")))
            if facts.get("pid") == os.getpid():
                self._runtime_file.unlink()
