"""The servers of this home that run now, and how an edit reaches the editor that has the file open.

A listener says its process, address and token in a runtime file that this user alone can read; a language server leaves
a mark besides. Before a file is written on disk, each language server is asked over loopback to make the edit in its
editor, if that has the file open. One that cannot be asked may have it open: then nothing is written. What a process
left behind that has ended is removed (`process_marks.py`).

Not covered: an editor that opens the file between the answers and the write, and one that runs no language server.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.errors import EditorUnreachableError, PlanPatchError, error_of_json
from engine.patching.ledger_records import Operation
from lsp_server.paths import Paths
from lsp_server.process_marks import facts_of_living

CONNECT_S = 2.0
ANSWER_S = 30.0  # an edit is answered at once unless another one, or a question to the user, is on its way
_FOR_ALL = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A process that serves this home.

    Args:
        pid: Its process id.
        host: Address of its listener; empty where it has none.
        port: Port of its listener.
        token: Token of its listener.
        has_editor: Whether it is a language server.
        name: What else is known of it, for people.
    """

    pid: int
    host: str = ""
    port: int = 0
    token: str = ""
    has_editor: bool = False
    name: str = ""

    @property
    def url(self) -> str:
        """URL of its listener."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __str__(self) -> str:
        return f"the language server of process {self.pid}{self.name and f' ({self.name})'}"

    def edit(self, operation: Operation, patch_id: str) -> dict[str, Any] | None:
        """Have its editor apply a patch, roll it back or redo it.

        Args:
            operation: What to do.
            patch_id: The proposal.

        Returns:
            What the server answers; None: the file is not open there.

        Raises:
            EditorUnreachableError: It cannot be asked, or does not answer; `details["is_sent"]` says which.
            PlanPatchError: It, or its editor, refuses; the error is the server's.
        """
        is_sent = False
        try:
            connection = http.client.HTTPConnection(self._loopback(), self.port, timeout=CONNECT_S)  # knows no proxy
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER_S)
                headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
                body = json.dumps({"patch_id": patch_id, "only_in_editor": True})
                is_sent = True
                connection.request("POST", f"/{operation}", body, headers)
                response = connection.getresponse()
                answer: Any = json.loads(response.read())
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as fault:
            why = f"did not answer within {ANSWER_S:.0f} s" if isinstance(fault, TimeoutError) and is_sent else ""
            raise self._unreachable(why or f"cannot be asked: {fault}", operation, patch_id, is_sent) from None
        return self._checked(response.status, answer, operation, patch_id)

    def health(self) -> dict[str, Any] | None:
        """What it holds, by its own words.

        Returns:
            The answer of `/health`; None where it cannot be asked.
        """
        try:
            connection = http.client.HTTPConnection(self._loopback(), self.port, timeout=CONNECT_S)
            try:
                connection.request("GET", "/health", headers={"Authorization": f"Bearer {self.token}"})
                response = connection.getresponse()
                answer: Any = json.loads(response.read())
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            return None
        return cast("dict[str, Any]", answer) if response.status == 200 and isinstance(answer, dict) else None

    def _loopback(self) -> str:
        """The address to connect to.

        Raises:
            ValueError: It is not on this machine for certain.
        """
        host = _FOR_ALL.get(self.host, self.host)
        if not self.port or not host:
            raise ValueError("it has no HTTP listener")
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"it listens on {host} alone")
        return host

    def _checked(self, status: int, answer: Any, operation: Operation, patch_id: str) -> dict[str, Any] | None:
        """An answer, its errors raised as ours."""
        facts = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
        error: Any = facts.get("error")
        if status == 200 and facts.get("ok") is True:
            return facts
        code = cast("Mapping[str, Any]", error).get("code") if isinstance(error, dict) else None
        if code == "not_open":
            return None
        if code is None or code in ("unauthorized", "forbidden", "not_found", "method_not_allowed"):
            raise self._unreachable(f"cannot be asked: HTTP status {status}", operation, patch_id, False)
        raise error_of_json(cast("Mapping[str, Any]", error))

    def _unreachable(self, why: str, operation: Operation, patch_id: str, is_sent: bool) -> PlanPatchError:
        doubt = "Look at the file there: it may still do it" if is_sent else "Close the file there, or end it"
        return EditorUnreachableError(
            f"{self} may have the file open, and {why}",
            hint=f"{doubt}. planpatch ledger {operation} {patch_id} --disk writes the file without asking.",
            pid=self.pid,
            patch_id=patch_id,
            is_sent=is_sent,
        )


def edit_in_editor(paths: Paths, operation: Operation, patch_id: str) -> dict[str, Any] | None:
    """Apply a patch, roll it back or redo it in the editor that has its file open, whichever server of the home it has.

    Args:
        paths: The home.
        operation: What to do.
        patch_id: The proposal.

    Returns:
        What the server answers; None: no editor has the file open, so that it may be written on disk.

    Raises:
        EditorUnreachableError: An editor may have it open, and its server cannot be asked.
        PlanPatchError: A server, or its editor, refuses.
    """
    unreachable: EditorUnreachableError | None = None
    for server in language_servers(paths):
        try:
            answer = server.edit(operation, patch_id)
        except EditorUnreachableError as error:
            if error.details["is_sent"]:
                raise
            unreachable = unreachable or error
            continue
        if answer is not None:
            return answer
    if unreachable is not None:
        raise unreachable
    return None


def language_servers(paths: Paths) -> list[RunningServer]:
    """The language servers of a home that run now, but for this process; those without a listener have no port.

    Args:
        paths: The home.

    Returns:
        One each.
    """
    listening = {server.pid: server for server in listeners(paths.runtime_file) if server.has_editor}
    found: dict[int, RunningServer] = dict(listening)
    for file in sorted(paths.servers.glob("*.json")):
        facts = facts_of_living(file)
        if facts is not None and facts["pid"] not in listening:
            name = ", ".join(str(facts[key]) for key in ("client", "workspace") if facts.get(key))
            found[facts["pid"]] = RunningServer(facts["pid"], has_editor=True, name=name)
    return [server for server in found.values() if server.pid != os.getpid()]


def listeners(runtime_file: Path) -> list[RunningServer]:
    """The listeners of a home that run now.

    Args:
        runtime_file: `runtime.json` of the home; others have their port in the name.

    Returns:
        One each.
    """
    found: list[RunningServer] = []
    for file in (runtime_file, *sorted(runtime_file.parent.glob(f"{runtime_file.stem}-*{runtime_file.suffix}"))):
        facts = facts_of_living(file)
        port = None if facts is None else facts.get("port")
        if facts is not None and isinstance(port, int):
            host, token = str(facts.get("host") or ""), str(facts.get("token") or "")
            found.append(RunningServer(facts["pid"], host, port, token, facts.get("has_editor") is True))
    return found
