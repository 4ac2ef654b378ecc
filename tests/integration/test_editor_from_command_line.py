"""The command line beside a running `planpatch lsp`: what the editor has open is changed there, and the disk is not."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import (
    EditorError,
    LedgerError,
    PlanPatchError,
    SourceError,
    StaleTextError,
    UsageError,
    WriteError,
    error_of_json,
)
from lsp_server import running
from lsp_server.process_marks import own_facts
from tests.command_line import Said
from tests.integration.test_http_beside import call, url_of
from tests.integration.test_language_server import FIXED, SERVER, TEXT, ask_for_patch, opened
from tests.lsp_client import LspClient

PATCHED = TEXT.replace("a - b", "a + b")
ROOT = SERVER.parent.parent


class Desk:
    """A home, a workspace, language servers of that home, and its command line."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.workspace = folder / "my workspace 🙂"
        self.workspace.mkdir()
        self.file = self.workspace / "math_box.py"
        self.file.write_text(TEXT, encoding="utf-8", newline="")
        self.script = folder / "answer.txt"
        self.script.write_text(FIXED, encoding="utf-8")
        self.clients: list[LspClient] = []

    def editor(self, *, http: bool = True, port: int = 0, apply: str = "direct") -> LspClient:
        command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "lsp"]
        env = {"SCRIPT": str(self.script), "PLANPATCH_HTTP": str(http).lower(), "PLANPATCH_PORT": str(port)}
        client = LspClient(self.home, command=command, env=env, settings={"apply": apply})
        self.clients.append(client)
        return client

    def __call__(self, *arguments: str) -> Said:
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lsp_server.cli import main; sys.exit(main())"
        environ = {**os.environ, "PLANPATCH_HOME": str(self.home), "COLUMNS": "200", "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", "-c", start, *arguments], env=environ, capture_output=True, timeout=120
        )
        said = Said(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in said.err, said.err
        return said

    def ledger(self, *arguments: str) -> Said:
        return self("ledger", *arguments)

    def on_disk(self) -> str:
        return self.file.read_bytes().decode()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    for client in made.clients:
        client.kill()


def applied(desk: Desk, client: LspClient) -> tuple[str, str]:
    """An open document with an applied patch: URI and patch id."""
    uri = opened(client, desk.workspace)
    patch_id = ask_for_patch(client, uri)["patchId"]
    client.wait_for(lambda: client.command("planpatch.ledger", {"patchId": patch_id})["state"] == "applied")
    assert client.text(uri) == PATCHED
    return uri, patch_id


def stand_in(desk: Desk, **facts: Any) -> Path:
    """The runtime file of a language server that lives."""
    desk.home.mkdir(exist_ok=True)
    file = desk.home / "runtime-1.json"
    of_one = {"pid": os.getpid(), "host": "127.0.0.1", "port": 1, "token": "t0ken", "has_editor": True}
    file.write_text(json.dumps({**of_one, **facts}))
    return file


def written(desk: Desk) -> str:
    """A patch that no editor knows of, in the file: its id."""
    client = desk.editor(http=False)
    _, patch_id = applied(desk, client)
    assert client.stop() == 0
    desk.file.write_bytes(PATCHED.encode())
    return patch_id


def test_an_open_file_is_rolled_back_and_redone_by_its_editor(desk: Desk) -> None:
    """It was written on disk behind the editor's back."""
    client = desk.editor()
    uri, patch_id = applied(desk, client)
    url_of(client)

    said = desk.ledger("rollback", patch_id)
    assert (said.code, said.out) == (0, "")
    assert said.err == f"{patch_id} taken back in {desk.file}, in the editor that has it open; save it there\n"
    assert (client.text(uri), desk.on_disk()) == (TEXT, TEXT)
    assert len(client.seen("workspace/applyEdit")) == 2

    said = desk.ledger("redo", patch_id[:-2], "--json")
    assert said.code == 0, said.err
    assert (client.text(uri), desk.on_disk()) == (PATCHED, TEXT)
    assert said.json == {
        "ok": True,
        "patch_id": patch_id,
        "operation": "redo",
        "path": str(desk.file),
        "hunks": [0],
        "sha256": hashlib.sha256(PATCHED.encode()).hexdigest(),
        "warnings": [],
        "via": "editor",
    }
    events = desk.ledger("show", patch_id, "--json").json["events"]
    assert [event["kind"] for event in events] == ["proposed", "applied", "rolled_back", "redone"]
    again = desk.ledger("redo", patch_id, "--json")
    assert (again.code, again.json["error"]["code"]) == (2, "usage")


@pytest.mark.slow
def test_a_proposed_patch_is_applied_by_the_editor_that_has_the_file_open(desk: Desk) -> None:
    client = desk.editor(apply="ask")
    uri = opened(client, desk.workspace)
    patch_id = ask_for_patch(client, uri)["patchId"]
    url_of(client)
    said = desk.ledger("apply", patch_id, "--json")
    assert (said.code, said.json["via"], said.json["hunks"]) == (0, "editor", [0])
    assert (client.text(uri), desk.on_disk()) == (PATCHED, TEXT)


def test_a_file_that_is_closed_or_whose_editor_has_ended_is_written_on_disk(desk: Desk) -> None:
    client = desk.editor()
    uri, patch_id = applied(desk, client)
    url_of(client)
    desk.file.write_bytes(PATCHED.encode())
    client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    said = desk.ledger("rollback", patch_id, "--json")
    assert (said.code, said.json["via"], desk.on_disk()) == (0, "disk", TEXT)
    assert client.stop() == 0
    assert not list(desk.home.glob("runtime*.json")) and not list((desk.home / "servers").iterdir())
    said = desk.ledger("redo", patch_id)
    assert (said.code, desk.on_disk()) == (0, PATCHED)
    assert said.err == f"{patch_id} put again into {desk.file}\n"


@pytest.mark.slow
def test_of_two_editors_the_one_that_has_the_file_open_is_asked(desk: Desk) -> None:
    """The second had no listener at all, since the first one has the port."""
    first = desk.editor()
    first.initialize(desk.workspace)
    port = int(url_of(first).rpartition(":")[2])
    second = desk.editor(port=port)
    uri, patch_id = applied(desk, second)
    url_of(second)
    assert desk.ledger("rollback", patch_id, "--json").json["via"] == "editor"
    assert (second.text(uri), desk.on_disk()) == (TEXT, TEXT)
    assert not first.seen("workspace/applyEdit")

    runtime = json.loads((desk.home / "runtime.json").read_text())
    status, done = call(f"{runtime['url']}/redo", {"patch_id": patch_id}, runtime["token"])
    assert (status, done["via"], done["state"]) == (200, "editor", "redone")
    assert (second.text(uri), desk.on_disk()) == (PATCHED, TEXT)


@pytest.mark.slow
def test_what_the_editor_has_applied_is_applied_already_as_on_disk(desk: Desk) -> None:
    """It was `stale_text`: "Ask for the patch again"."""
    client = desk.editor()
    uri, patch_id = applied(desk, client)
    url_of(client)
    in_editor = desk.ledger("apply", patch_id)
    expected = f"usage: {patch_id} is in its file already: it is applied.\n  Roll it back first to apply it anew.\n"
    assert (in_editor.code, in_editor.err) == (2, expected)
    assert (client.text(uri), desk.on_disk()) == (PATCHED, TEXT)
    client.set_text(uri, "# above\n" + PATCHED)
    assert desk.ledger("apply", patch_id).err == expected
    desk.file.write_bytes(PATCHED.encode())
    on_disk = desk.ledger("apply", patch_id, "--disk")
    assert (on_disk.code, on_disk.err) == (2, expected)
    client.set_text(uri, PATCHED.replace("a + b", "b + a"))
    assert desk.ledger("apply", patch_id, "--json").json["error"]["code"] == "stale_text"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lines_that_were_edited_are_shown_three_ways_and_nothing_changes(desk: Desk) -> None:
    client = desk.editor()
    uri, patch_id = applied(desk, client)
    url_of(client)
    edited = PATCHED.replace("a + b", "a + b + 1")
    client.set_text(uri, edited)
    said = desk.ledger("rollback", patch_id)
    assert (said.code, client.text(uri), desk.on_disk()) == (1, edited, TEXT)
    assert "<<<<<<< now in the file\n    return a + b + 1\n" in said.err
    error = desk.ledger("rollback", patch_id, "--json")
    assert (error.code, error.json["ok"], error.json["error"]["code"]) == (1, False, "stale_text")
    assert error.json["error"]["details"]["patch_id"] == patch_id


@pytest.mark.slow
def test_an_editor_that_refuses_is_a_refusal(desk: Desk) -> None:
    client = desk.editor()
    uri, patch_id = applied(desk, client)
    url_of(client)
    client.answers["workspace/applyEdit"] = lambda params: {"applied": False}
    said = desk.ledger("rollback", patch_id)
    assert (said.code, client.text(uri), desk.on_disk()) == (1, PATCHED, TEXT)
    assert said.err == "editor: the editor did not roll back the patch\n  Look at the file in the editor.\n"
    error = desk.ledger("rollback", patch_id, "--json").json["error"]
    assert (error["code"], error["details"]) == ("editor", {"patch_id": patch_id})


def test_where_an_editor_cannot_be_asked_the_disk_is_written_with_disk_alone(desk: Desk) -> None:
    patch_id = written(desk)
    client = desk.editor(http=False)
    client.initialize(desk.workspace)
    client.wait_for(lambda: list((desk.home / "servers").glob("*.json")))
    said = desk.ledger("rollback", patch_id)
    assert (said.code, desk.on_disk()) == (3, PATCHED)
    lines = said.err.splitlines()
    assert lines[0].startswith(f"editor_unreachable: the language server of process {client.process.pid} (test, ")
    assert lines[0].endswith(") may have the file open, and cannot be asked: it has no HTTP listener")
    anyway = f"planpatch ledger rollback {patch_id} --disk writes the file without asking."
    assert lines[1] == f"  Close the file there, or end it. {anyway}"
    assert desk.ledger("rollback", patch_id, "--json").json["error"]["code"] == "editor_unreachable"
    assert desk.ledger("rollback", patch_id, "--disk").code == 0
    assert desk.on_disk() == TEXT


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "localhost.example", ""])
def test_no_other_host_and_no_closed_port_is_waited_for(desk: Desk, host: str) -> None:
    patch_id = written(desk)
    file = stand_in(desk, host=host)
    started_at = time.monotonic()
    said = desk.ledger("rollback", patch_id, "--json")
    assert (said.code, said.json["error"]["code"], desk.on_disk()) == (3, "editor_unreachable", PATCHED)
    assert time.monotonic() - started_at < 30
    file.unlink()
    assert desk.ledger("rollback", patch_id).code == 0


def test_files_that_ended_or_other_processes_left_behind_are_passed_over(desk: Desk) -> None:
    patch_id = written(desk)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stand_in(desk, pid=gone.pid)
    (desk.home / "runtime.json").write_text("{")
    (desk.home / "runtime-2.json").write_text("[1]")
    younger = desk.home / "runtime-3.json"  # the number was given to another process since
    younger.write_text(json.dumps({"pid": os.getpid(), "port": 1, "has_editor": True}))
    before = psutil.Process().create_time() - 60
    os.utime(younger, (before, before))
    said = desk.ledger("rollback", patch_id)
    assert (said.code, desk.on_disk()) == (0, TEXT)


def test_a_number_that_another_program_has_now_and_a_zombie_are_no_server(desk: Desk) -> None:
    """They blocked roll-back for good: "Close the file there, or end it"."""
    patch_id = written(desk)
    facts = own_facts()
    taken = stand_in(desk, **{**facts, "started_at": facts["started_at"] - 60})
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    mark = desk.home / "servers" / f"{zombie.pid}.json"
    mark.write_text(json.dumps({"pid": zombie.pid, "client": "test"}))
    deadline = time.monotonic() + 20
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    said = desk.ledger("rollback", patch_id)
    zombie.wait()
    assert (said.code, desk.on_disk()) == (0, TEXT), said.err
    assert not taken.exists() and not mark.exists()


def test_a_server_without_an_editor_is_not_asked(desk: Desk) -> None:
    patch_id = written(desk)
    stand_in(desk, has_editor=False)
    assert desk.ledger("rollback", patch_id).code == 0
    assert desk.on_disk() == TEXT


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = running.RunningServer(7, "127.0.0.1", silent.getsockname()[1], "t", True)
        with pytest.raises(running.EditorUnreachableError, match="did not answer within 0 s") as caught:
            server.edit("rollback", "p_1")
    assert caught.value.details["is_sent"] is True
    assert "Look at the file there: it may still do it" in caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://192.0.2.1/rollback\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 33\r\n\r\n{"error": {"code":"unauthorized"}}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0\r\n\r\n",
    ],
)
def test_a_port_that_another_program_has_is_no_editor(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        server = running.RunningServer(7, "127.0.0.1", other.getsockname()[1], "t", True)
        with pytest.raises(running.EditorUnreachableError):
            server.edit("rollback", "p_1")
        thread.join()


@pytest.mark.parametrize("kind", [StaleTextError, UsageError, EditorError, WriteError, LedgerError, SourceError])
def test_an_error_of_a_server_becomes_the_command_s_own(kind: type[PlanPatchError]) -> None:
    error = kind("It is so", hint="Do this.", hunks=[{"view": "<<<"}])
    again = error_of_json(json.loads(json.dumps(error.to_json())))
    assert (type(again), again.to_json(), again.exit_code) == (kind, error.to_json(), kind.exit_code)


def test_an_error_that_is_no_error_of_ours_is_a_fault_of_the_environment() -> None:
    again = error_of_json({"code": "error of tomorrow", "message": "It is so", "details": {"hint": 1, "message": 2}})
    assert (again.exit_code, again.message, again.details) == (3, "It is so", {"hint": 1, "message": 2})
    assert error_of_json({}).message == "The server failed"


# --- without an editor -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_serve_alone_applies_rolls_back_and_redoes_on_disk_and_so_does_the_command_line_beside_it(desk: Desk) -> None:
    command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "serve", "--port", "0", "--root", str(desk.workspace)]
    environ = {**os.environ, "PLANPATCH_HOME": str(desk.home), "SCRIPT": str(desk.script)}
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, env=environ, text=True) as server:
        try:
            assert server.stdout is not None
            lines = ""
            while not lines.rstrip().endswith("}"):
                lines += (line := server.stdout.readline())
                assert line
            url = json.loads(lines)["url"]
            runtime = json.loads((desk.home / "runtime.json").read_text())
            assert runtime["has_editor"] is False
            body = {"intent": "add them", "paths": ["math_box.py"], "function": "add"}
            plan = call(f"{url}/plan", body)[1]["plan"]
            patch_id = call(f"{url}/patch_smart", {"plan": plan})[1]["patch_id"]
            steps = [("apply", "applied", PATCHED), ("rollback", "rolled_back", TEXT), ("redo", "redone", PATCHED)]
            for operation, state, text in steps:
                only = {"patch_id": patch_id, "only_in_editor": True}
                status, refused = call(f"{url}/{operation}", only, runtime["token"])
                assert (status, refused["error"]["code"]) == (404, "not_open")
                status, done = call(f"{url}/{operation}", {"patch_id": patch_id[:-1]}, runtime["token"])
                assert (status, done["patch_id"], done["state"], done["via"]) == (200, patch_id, state, "disk")
                assert desk.on_disk() == text
            status, refused = call(f"{url}/redo", {"patch_id": patch_id}, runtime["token"])
            assert (status, refused["error"]["code"]) == (400, "usage")
            said = desk.ledger("rollback", patch_id, "--json")
            assert (said.code, said.json["via"], desk.on_disk()) == (0, "disk", TEXT)

            client = desk.editor(port=runtime["port"])  # its port is taken, and still it is asked
            uri = opened(client, desk.workspace)
            url_of(client)
            status, done = call(f"{url}/redo", {"patch_id": patch_id}, runtime["token"])
            assert (status, done["via"], client.text(uri), desk.on_disk()) == (200, "editor", PATCHED, TEXT)
            client.answers["workspace/applyEdit"] = lambda params: {"applied": False}
            status, refused = call(f"{url}/rollback", {"patch_id": patch_id}, runtime["token"])
            assert (status, refused["error"]["code"]) == (409, "editor")
            client.process.kill()
            client.process.wait()
            desk.file.write_bytes(PATCHED.encode())
            status, done = call(f"{url}/rollback", {"patch_id": patch_id}, runtime["token"])
            assert (status, done["via"], desk.on_disk()) == (200, "disk", TEXT)
        finally:
            server.terminate()
            server.wait(30)
