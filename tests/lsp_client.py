"""A small LSP client for tests: a real process at the other end, messages as plain JSON, a document that is edited.

It answers what a server asks in the ways that tests choose, and keeps everything it saw.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]
CAPABILITIES: Json = {
    "general": {"positionEncodings": ["utf-16"]},
    "workspace": {
        "applyEdit": True,
        "configuration": True,
        "workspaceEdit": {"documentChanges": True},
        "didChangeConfiguration": {"dynamicRegistration": True},
    },
    "window": {"workDoneProgress": True, "showDocument": {"support": True}},
    "textDocument": {"synchronization": {"willSave": True, "didSave": True}},
}


class LspClient:
    """See the module's docstring.

    Args:
        home: PLANPATCH_HOME.
        options: Options of `planpatch lsp`.
        settings: What `workspace/configuration` answers for the section `planpatch`.
        env: More environment.
    """

    def __init__(
        self,
        home: Path,
        *options: str,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        command: list[str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.home = home
        self.settings = dict(settings or {})
        self.texts: dict[str, tuple[int, str]] = {}
        self.notifications: list[Json] = []
        self.requests: list[Json] = []
        self.answers: dict[str, Callable[[Any], Any]] = {
            "workspace/configuration": lambda params: [self.settings for _ in params["items"]],
            "workspace/applyEdit": self.apply_edit,
            "window/workDoneProgress/create": lambda params: None,
            "window/showDocument": lambda params: {"success": True},
            "window/showMessageRequest": lambda params: None,
            "client/registerCapability": lambda params: None,
        }
        self._responses: dict[int, queue.SimpleQueue[Json]] = {}
        self._next_id = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        environ = {**os.environ, "PLANPATCH_HOME": str(home), "PLANPATCH_HTTP": "false", **(env or {})}
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            command or [sys.executable, "-I", "-X", "utf8", "-m", "lsp_server", "lsp", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            cwd=cwd,
        )
        self.stderr = bytearray()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    # --- messages ---------------------------------------------------------------------------------------------------

    def request(self, method: str, params: Any, timeout_s: float = 60) -> Any:
        """Send a request and return its result; an error is raised as `LspError`."""
        response = self.request_raw(method, params, timeout_s)
        if "error" in response:
            raise LspError(response["error"])
        return response["result"]

    def request_raw(self, method: str, params: Any, timeout_s: float = 60) -> Json:
        with self._lock:
            self._next_id += 1
            message_id = self._next_id
            self._responses[message_id] = queue.SimpleQueue()
        self.send({"jsonrpc": "2.0", "id": message_id, "method": method, "params": params})
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                return self._responses[message_id].get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None:
                    raise ConnectionError(f"the server ended: {self.errors()}") from None
        raise TimeoutError(f"{method} was not answered in {timeout_s} s: {self.errors()}")

    def notify(self, method: str, params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def send(self, message: Json) -> None:
        self.send_body(json.dumps(message).encode())

    def send_body(self, body: bytes) -> None:
        assert self.process.stdin is not None
        with self._lock:
            self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.process.stdin.flush()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while True:
            length = 0
            while (line := stream.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                assert name.lower() in (b"content-length", b"content-type"), line
                length = int(value) if name.lower() == b"content-length" else length
            if not length:
                return
            self._handle(json.loads(stream.read(length)))

    def _handle(self, message: Json) -> None:
        if "method" not in message:
            self._responses[message["id"]].put(message)
            return
        message["at"] = time.monotonic()
        with self._changed:
            (self.requests if "id" in message else self.notifications).append(message)
            self._changed.notify_all()
        if "id" in message:
            threading.Thread(target=self._answer, args=(message,), daemon=True).start()

    def _answer(self, message: Json) -> None:
        answer = self.answers.get(message["method"])
        reply: Json = {"jsonrpc": "2.0", "id": message["id"]}
        if answer is None:
            reply["error"] = {"code": -32601, "message": f"no {message['method']}"}
        else:
            reply["result"] = answer(message["params"])
        with suppress(OSError, ValueError):  # the server, or the test, has ended
            self.send(reply)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        while chunk := os.read(self.process.stderr.fileno(), 65536):
            self.stderr += chunk

    def errors(self) -> str:
        return self.stderr[-4000:].decode("utf-8", "replace")

    # --- life -------------------------------------------------------------------------------------------------------

    def initialize(
        self,
        root: Path | None = None,
        *,
        name: str = "test",
        capabilities: Json | None = None,
        options: Any = None,
        params: Json | None = None,
    ) -> Json:
        uri = root.as_uri() if root else None
        asked = {
            "processId": os.getpid(),
            "clientInfo": {"name": name},
            "rootUri": uri,
            "workspaceFolders": [{"uri": uri, "name": "ws"}] if uri else None,
            "capabilities": CAPABILITIES if capabilities is None else capabilities,
            "initializationOptions": options,
            **(params or {}),
        }
        result = self.request("initialize", asked)
        self.notify("initialized", {})
        return result

    def stop(self) -> int:
        if self.process.poll() is None:
            self.request("shutdown", None)
            self.notify("exit", None)
        return self.process.wait(20)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass

    def __enter__(self) -> LspClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- documents --------------------------------------------------------------------------------------------------

    def open(self, uri: str, text: str, language: str = "python") -> None:
        self.texts[uri] = (1, text)
        item = {"uri": uri, "languageId": language, "version": 1, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def text(self, uri: str) -> str:
        return self.texts[uri][1]

    def set_text(self, uri: str, text: str) -> None:
        """Replace the whole text, as a user's edit."""
        version = self.texts[uri][0] + 1
        self.texts[uri] = (version, text)
        document = {"uri": uri, "version": version}
        self.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [{"text": text}]})

    def apply_edit(self, params: Any) -> Json:
        """As a good client: versions are checked, the text changes, and the server is told."""
        edit = params["edit"]
        changes = {change["textDocument"]["uri"]: change for change in edit.get("documentChanges", [])}
        plain = edit.get("changes", {})
        for uri, change in changes.items():
            if change["textDocument"]["version"] != self.texts[uri][0]:
                return {"applied": False, "failureReason": "another version"}
            plain = {**plain, uri: change["edits"]}
        for uri, edits in plain.items():
            self.set_text(uri, edited(self.texts[uri][1], edits))
        return {"applied": True}

    # --- waiting ----------------------------------------------------------------------------------------------------

    def command(self, name: str, argument: Any = None) -> Any:
        arguments = [] if argument is None else [argument]
        return self.request("workspace/executeCommand", {"command": name, "arguments": arguments})

    def job(self, answer: Json, timeout_s: float = 120) -> Json:
        """Wait until a job has ended and return it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.command("planpatch.status", {"jobId": answer["jobId"]})
            if status["state"] not in ("waiting", "loading", "running"):
                return status
            time.sleep(0.05)
        raise TimeoutError(f"{status}; {self.errors()}")

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 30) -> Any:
        """Wait until a condition over what was seen is true, and return its value."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"it did not become true; stderr: {self.errors()}")
            with self._changed:
                self._changed.wait(min(0.05, left_s))

    def seen(self, method: str) -> list[Any]:
        """Parameters of every notification and request of a method."""
        return [one["params"] for one in (*self.notifications, *self.requests) if one["method"] == method]

    def messages(self) -> list[str]:
        return [params["message"] for params in self.seen("window/showMessage")]

    def actions(self, uri: str, line: int, character: int = 0, **context: Any) -> list[Json]:
        place = {"line": line, "character": character}
        asked = {
            "textDocument": {"uri": uri},
            "range": {"start": place, "end": place},
            "context": {"diagnostics": [], **context},
        }
        return self.request("textDocument/codeAction", asked) or []

    def titles(self, uri: str, line: int, **context: Any) -> list[str]:
        return [action["title"] for action in self.actions(uri, line, **context)]


class LspError(Exception):
    """A response with an error."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.error = error


def edited(text: str, edits: list[Json], units: str = "utf-16-le") -> str:
    """A text after text edits, done in its code units, last edit first."""
    lines = _lines(text)
    data = text.encode(units, "surrogatepass")
    size = {"utf-16-le": 2, "utf-8": 1, "utf-32-le": 4}[units]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode(units, "surrogatepass")))

    def offset(place: Json) -> int:
        if place["line"] >= len(lines):
            return len(data)
        content = lines[place["line"]].rstrip("\r\n").encode(units, "surrogatepass")
        return starts[place["line"]] + min(place["character"] * size, len(content))

    places = [(offset(edit["range"]["start"]), offset(edit["range"]["end"]), edit["newText"]) for edit in edits]
    for start, end, new in sorted(places, key=lambda place: place[0], reverse=True):
        data = data[:start] + new.encode(units, "surrogatepass") + data[end:]
    return data.decode(units, "surrogatepass")


def _lines(text: str) -> list[str]:
    import re

    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)
