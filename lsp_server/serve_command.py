"""`planpatch serve`: the HTTP listener alone, until it is stopped."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.markup import escape

from engine.errors import EngineError, PathError
from engine.patching.parser_process import ParserProcess
from lsp_server import console
from lsp_server.adapter_follower import AdapterFollower
from lsp_server.http.listener import Listener, TakenError, bind, new_token
from lsp_server.http.service import Service
from lsp_server.model_host import HostStatus, ModelHost
from lsp_server.records import Records
from lsp_server.running import listeners
from lsp_server.session import Session

# They run no script, and take the terminal over.
_TEXT_BROWSERS = ("elinks", "links", "links2", "lynx", "w3m", "www-browser")


def serve(session: Session, *, open_page: bool = False, as_json: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Where a server of this home has the port already, its status page is opened.

    Args:
        session: Settings and store.
        open_page: Open the status page in the user's browser.
        as_json: Say where it listens as one JSON object on stdout.

    Raises:
        UsageError: The address may not be bound.
        TakenError: The port is taken.
        PathError: The root is no folder.
    """
    settings, paths = session.settings, session.paths
    root = root_of(session)
    try:
        bound = bind(settings.host, settings.port, has_token=bool(settings.token), runtime_file=paths.runtime_file)
    except TakenError as error:
        if not (open_page and error.details.get("holder_is_planpatch")):
            raise
        other = next((one for one in listeners(paths.runtime_file) if one.port == settings.port), None)
        if other is None:  # it ended just now
            raise
        console.say(f"a PlanPatch server already listens on {escape(other.url)} (process {other.pid})")
        _open_page(other.url, other.token, paths.runtime_file)
        return
    host = ModelHost(_told())
    parsers = ParserProcess()
    records = Records(session.served_ledger)
    service = Service(host, lambda: session, records, new_token(), parsers=parsers, root=root)
    listener = Listener(service, bound, paths.runtime_file)
    follower = AdapterFollower(host, lambda: session, _tell_of_adapter)
    stop = threading.Event()

    def end(_signal: int, _frame: object) -> None:
        stop.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, end)
    follower.start()
    host.start(session)
    listener.start()
    _say_where(listener, root, as_json)
    if open_page:
        arguments = (listener.address.local_url, service.token, paths.runtime_file)
        threading.Thread(target=_open_page, args=arguments, daemon=True).start()
    try:
        while not stop.wait(0.5):
            engine = host.engine_or_none
            if engine is not None and engine.status().state == "failed":
                raise EngineError(engine.status().message or "The engine failed", hint="Start the server again.")
    finally:
        console.say("ending")
        follower.close()
        host.close()
        listener.close()
        parsers.close()
        records.close()


def _open_page(url: str, token: str, runtime_file: Path) -> None:
    """Open the status page; on a thread of its own, since some browsers are waited for. The token is never printed."""
    import webbrowser

    url = f"{url}/status"
    with suppress(webbrowser.Error, OSError):
        browser = webbrowser.get()
        if Path(str(getattr(browser, "name", ""))).name not in _TEXT_BROWSERS and browser.open(f"{url}#{token}"):
            return
    console.say(f"no browser could be opened: open {url}, and paste the token from {escape(str(runtime_file))}")


def root_of(session: Session) -> Path | None:
    """The folder that paths over HTTP must lie in.

    Args:
        session: Settings.

    Returns:
        The folder; None if the settings name none.

    Raises:
        PathError: It is no folder.
    """
    if not session.settings.root:
        return None
    root = session.paths.resolve(session.settings.root)
    if not root.is_dir():
        raise PathError(f"The root {root} is no folder ({session.settings.source_of('root')})", hint="Correct it.")
    return root.resolve()


def _say_where(listener: Listener, root: Path | None, as_json: bool) -> None:
    address = listener.address
    facts: Mapping[str, Any] = {"url": address.url, "host": address.host, "port": address.port}
    if as_json:
        console.print_json({**facts, "root": None if root is None else str(root)})
        sys.stdout.flush()
        return
    console.say(f"listening on {address.url}; Ollama's API under /api, OpenAI's under /v1; Ctrl-C ends it")
    if root is not None:
        console.say(f"paths are read below {escape(str(root))}")


def _tell_of_adapter(message: str, is_done: bool) -> None:
    console.say(escape(message)) if is_done else console.warn(message)


def _told():
    """Tells each new state of the model once on stderr."""
    said: list[str] = []

    def tell(status: HostStatus) -> None:
        text = {"ready": f"{status.model} is ready", "loading": f"loading {status.model}".rstrip()}.get(
            status.state, f"{status.message}. {status.hint}".strip(". ")
        )
        if said[-1:] != [text]:
            said.append(text)
            console.say(escape(text))

    return tell
