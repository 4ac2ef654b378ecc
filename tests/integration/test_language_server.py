"""The language server's process over stdio and TCP, with a scripted model: what it sends, and what it does not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import LedgerError
from lsp_server import language_server
from tests.hub_server import Hub, environment_of, serve
from tests.learning import refuse_many
from tests.lsp_client import CAPABILITIES, LspClient, LspError, edited
from tests.training_model import make_base

SERVER = Path(__file__).resolve().parent.parent / "scripted_server.py"
TEXT = "# 🙂\nimport os\n\n\ndef add(a, b):\n    return a - b\n\n\nclass Box:\n    def area(self):\n        return 0\n"
FIXED = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "answer.txt"
    file.write_text(FIXED, encoding="utf-8")
    return file


@pytest.fixture
def start(tmp_path: Path, script: Path) -> Iterator[Callable[..., LspClient]]:
    clients: list[LspClient] = []

    def start(*options: str, **arguments: Any) -> LspClient:
        env = {"SCRIPT": str(script), **arguments.pop("env", {})}
        command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "lsp", *options]
        client = LspClient(tmp_path / "home", command=command, env=env, **arguments)
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.kill()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "my workspace 🙂"
    folder.mkdir()
    (folder / "math_box.py").write_text(TEXT, encoding="utf-8", newline="")
    return folder


def opened(client: LspClient, workspace: Path, text: str = TEXT, **arguments: Any) -> str:
    client.initialize(workspace, **arguments)
    uri = (workspace / "math_box.py").as_uri()
    client.open(uri, text)
    return uri


def ask_for_patch(client: LspClient, uri: str, **more: Any) -> dict[str, Any]:
    argument = {"uri": uri, "position": {"line": 5, "character": 0}, "intent": "add them", **more}
    return client.job(client.command("planpatch.patch", argument))


def choose(title: str) -> Callable[[Any], Any]:
    return lambda params: {"title": title} if title in [one["title"] for one in params["actions"]] else None


# --- the flow --------------------------------------------------------------------------------------------------------


def test_a_patch_is_asked_for_applied_and_rolled_back_after_a_restart(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    client.answers["window/showMessageRequest"] = choose("Apply")
    job = ask_for_patch(client, uri)
    assert job["state"] == "done"
    client.wait_for(lambda: client.text(uri) == TEXT.replace("a - b", "a + b"))
    (edit,) = client.seen("workspace/applyEdit")
    assert edit["edit"]["documentChanges"][0]["textDocument"] == {"uri": uri, "version": 1}
    client.wait_for(lambda: "PlanPatch: roll back: add them in `add`" in client.titles(uri, 5))
    assert client.stop() == 0

    client = start()
    uri = opened(client, workspace, TEXT.replace("a - b", "a + b"))
    client.wait_for(lambda: "PlanPatch: roll back: add them in `add`" in client.titles(uri, 0))
    rolled = client.job(client.command("planpatch.rollback", {"uri": uri}))
    assert (rolled["state"], rolled["patchState"]) == ("done", "rolled_back")
    assert client.text(uri) == TEXT
    redone = client.job(client.command("planpatch.redo", {"uri": uri}))
    assert redone["patchState"] == "redone"
    assert client.text(uri) == TEXT.replace("a - b", "a + b")


def test_a_command_is_answered_before_its_work_is_done(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    argument = {"uri": uri, "position": {"line": 5, "character": 0}, "intent": "add them"}
    answers = [client.command("planpatch.patch", argument) for _ in range(3)]
    assert [answer["position"] for answer in answers] == [0, 1, 2] or answers[0]["position"] == 0
    assert len({answer["jobId"] for answer in answers}) == 3
    assert {client.job(answer)["state"] for answer in answers} == {"done"}


def test_a_plan_document_is_edited_and_its_saved_text_counts(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    script.write_text("add, do not", encoding="utf-8")
    argument = {"uri": uri, "position": {"line": 5, "character": 0}, "intent": "add them"}
    planned = client.job(client.command("planpatch.plan", argument))
    document = Path(planned["planDocument"])
    shown = client.wait_for(lambda: client.seen("window/showDocument"))
    assert shown[0]["uri"] == document.as_uri()
    text = document.read_text(encoding="utf-8")
    assert "## Intent\n\nadd them\n" in text
    assert "- add, do not\n" in text
    document.write_text(text.replace("- add, do not", "1. use plus\n2. nothing else"), encoding="utf-8")
    script.write_text(FIXED, encoding="utf-8")
    (action,) = [one for one in client.actions(uri, 5) if "patch from plan" in one["title"]]
    job = client.job(client.request("workspace/executeCommand", action["command"]))
    entry = client.command("planpatch.ledger", {"patchId": job["patchId"]})
    assert entry["plan_text"] == "use plus\nnothing else"
    assert entry["intent"] == "add them"


def test_without_an_intent_a_plan_document_asks_for_one(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    argument = {"uri": uri, "position": {"line": 5, "character": 0}}
    with pytest.raises(LspError, match="no intent was given"):
        client.command("planpatch.patch", argument)
    document = Path(client.job(client.command("planpatch.plan", argument))["planDocument"])
    text = document.read_text(encoding="utf-8")
    document.write_text(text.replace("## Intent\n", "## Intent\n\nadd them please\n"), encoding="utf-8")
    job = client.job(client.command("planpatch.patch", {**argument, "planId": "document"}))
    assert client.command("planpatch.ledger", {"patchId": job["patchId"]})["intent"] == "add them please"


def test_a_directive_in_the_code_is_the_intent_and_the_patch_removes_it(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    text = TEXT.replace("    return a - b", "    # pp: add them\n    return a - b")
    uri = opened(client, workspace, text)
    client.answers["window/showMessageRequest"] = choose("Apply")
    job = client.job(client.command("planpatch.patch", {"uri": uri, "position": {"line": 5, "character": 0}}))
    assert job["state"] == "done", job
    client.wait_for(lambda: client.text(uri) == TEXT.replace("a - b", "a + b"))
    assert client.command("planpatch.ledger", {"patchId": job["patchId"]})["intent"] == "add them"


def test_a_refused_patch_is_noted_on_its_function_and_can_be_tried_again(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    script.write_text("def add(a, b):\n    return nowhere(a)\n", encoding="utf-8")
    job = ask_for_patch(client, uri)
    assert (job["state"], job["error"]["details"]["gate"]) == ("refused", "names")
    published = client.wait_for(lambda: client.seen("textDocument/publishDiagnostics"))
    (note,) = published[-1]["diagnostics"]
    assert (note["severity"], note["source"], note["code"]) == (3, "planpatch", "names")
    assert note["range"]["start"] == {"line": 4, "character": 0}
    (retry,) = [one for one in client.actions(uri, 5, diagnostics=[note]) if "retry with this error" in one["title"]]
    assert retry["kind"] == "quickfix"
    assert retry["diagnostics"] == [note]
    script.write_text(FIXED, encoding="utf-8")
    again = client.job(client.request("workspace/executeCommand", retry["command"]))
    assert again["state"] == "done"
    client.wait_for(
        lambda: [one["code"] for one in client.seen("textDocument/publishDiagnostics")[-1]["diagnostics"]] == ["patch"]
    )


def test_a_diagnostic_of_another_server_can_be_fixed(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    place = {"start": {"line": 5, "character": 11}, "end": {"line": 5, "character": 16}}
    found = {"range": place, "message": "minus is\nwrong", "source": "linter", "code": "X1", "severity": 2}
    actions = client.actions(uri, 5, diagnostics=[found], triggerKind=2, only=["quickfix"])
    assert [one["title"] for one in actions] == ["PlanPatch: fix: minus is wrong"]
    assert actions[0]["diagnostics"] == [found]
    job = client.job(client.request("workspace/executeCommand", actions[0]["command"]))
    intent = client.command("planpatch.ledger", {"patchId": job["patchId"]})["intent"]
    assert intent == "Fix this problem reported by linter (X1): minus is wrong. It is at the line `return a - b`."


# --- applying --------------------------------------------------------------------------------------------------------


def test_a_client_with_annotations_is_sent_an_edit_that_needs_confirmation(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    capabilities = json.loads(json.dumps(CAPABILITIES))
    capabilities["workspace"]["workspaceEdit"]["changeAnnotationSupport"] = {"groupsOnLabel": True}
    client = start()
    uri = opened(client, workspace, capabilities=capabilities)
    ask_for_patch(client, uri)
    (sent,) = client.wait_for(lambda: client.seen("workspace/applyEdit"))
    (change,) = sent["edit"]["documentChanges"]
    (annotation,) = sent["edit"]["changeAnnotations"].values()
    assert annotation["needsConfirmation"] is True
    assert annotation["label"] == "PlanPatch: add them (1 of 1)"
    assert [edit["annotationId"] for edit in change["edits"]] == list(sent["edit"]["changeAnnotations"])
    assert client.seen("window/showMessageRequest") == []
    client.wait_for(lambda: client.text(uri) != TEXT)


def test_hunks_that_the_user_left_out_in_the_preview_are_known(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    text = "def f(a):\n    b = 1\n    c = 2\n    d = 3\n    return a\n"
    script.write_text("def f(a):\n    b = 10\n    c = 2\n    d = 30\n    return a\n", encoding="utf-8")
    capabilities = json.loads(json.dumps(CAPABILITIES))
    capabilities["workspace"]["workspaceEdit"]["changeAnnotationSupport"] = {}
    client = start()
    client.initialize(workspace, capabilities=capabilities)
    uri = (workspace / "math_box.py").as_uri()
    client.open(uri, text)

    def apply_second(params: Any) -> Any:
        (change,) = params["edit"]["documentChanges"]
        assert len(change["edits"]) == 2
        client.set_text(uri, edited(text, change["edits"][1:]))
        return {"applied": True}

    client.answers["workspace/applyEdit"] = apply_second
    argument = {"uri": uri, "position": {"line": 1, "character": 0}, "intent": "tens"}
    job = client.job(client.command("planpatch.patch", argument))
    entry = client.wait_for(
        lambda: (found := client.command("planpatch.ledger", {"patchId": job["patchId"]}))["is_applied"] and found
    )
    assert entry["state"] == "applied"
    assert entry["hunks"] == [1]


@pytest.mark.parametrize("edit_kind", ["documentChanges", "changes"])
def test_a_client_that_says_it_applied_and_did_not_is_not_believed(
    edit_kind: str, start: Callable[..., LspClient], workspace: Path
) -> None:
    capabilities = json.loads(json.dumps(CAPABILITIES))
    capabilities["workspace"]["workspaceEdit"] = {"documentChanges": edit_kind == "documentChanges"}
    client = start(settings={"apply": "direct"})
    uri = opened(client, workspace, capabilities=capabilities)
    client.answers["workspace/applyEdit"] = lambda params: {"applied": True}
    job = ask_for_patch(client, uri)
    (sent,) = client.wait_for(lambda: client.seen("workspace/applyEdit"))
    assert edit_kind in sent["edit"]
    entry = client.wait_for(
        lambda: (
            (found := client.command("planpatch.ledger", {"patchId": job["patchId"]}))["state"] == "diverged" and found
        )
    )
    assert entry["label"] == "unreviewed"
    client.set_text(uri, TEXT.replace("a - b", "a + b"))  # it came after all
    client.wait_for(lambda: client.command("planpatch.ledger", {"patchId": job["patchId"]})["state"] == "applied")


def test_what_diverged_can_be_taken_back(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start(settings={"apply": "direct"})
    uri = opened(client, workspace)
    honest = client.apply_edit

    def apply_something_else(params: Any) -> Any:
        client.answers["workspace/applyEdit"] = honest
        text = edited(client.text(uri), params["edit"]["documentChanges"][0]["edits"])
        client.set_text(uri, text + "# formatted\n")
        return {"applied": True}

    client.answers["workspace/applyEdit"] = apply_something_else
    client.answers["window/showMessageRequest"] = choose("Take it back")
    job = ask_for_patch(client, uri)
    client.wait_for(lambda: client.text(uri) == TEXT + "# formatted\n")
    client.wait_for(lambda: client.command("planpatch.ledger", {"patchId": job["patchId"]})["state"] == "rolled_back")


def test_a_patch_of_an_older_text_is_refused(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    job = ask_for_patch(client, uri)
    client.set_text(uri, TEXT + "# typed\n")
    assert [title for title in client.titles(uri, 5) if "Apply" in title] == []
    refused = client.job(client.command("planpatch.apply", {"patchId": job["patchId"]}))
    assert (refused["state"], refused["error"]["code"]) == ("refused", "stale_text")
    client.set_text(uri, TEXT)
    assert "PlanPatch: Apply: add them" in client.titles(uri, 5)
    assert client.job(client.command("planpatch.apply", {"patchId": job["patchId"]}))["patchState"] == "applied"


def test_a_patch_that_waits_is_offered_again_after_a_restart(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    job = ask_for_patch(client, opened(client, workspace))
    client.stop()
    client = start()
    uri = opened(client, workspace)
    (action,) = client.wait_for(lambda: [one for one in client.actions(uri, 5) if "Apply: add them" in one["title"]])
    assert action["command"]["arguments"] == [{"patchId": job["patchId"]}]
    assert client.job(client.request("workspace/executeCommand", action["command"]))["patchState"] == "applied"
    assert client.text(uri) == TEXT.replace("a - b", "a + b")


def test_undo_is_a_reject_and_redo_takes_that_back(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start(settings={"apply": "direct"})
    uri = opened(client, workspace)
    job = ask_for_patch(client, uri)
    client.wait_for(lambda: "PlanPatch: roll back: add them in `add`" in client.titles(uri, 5))
    patched = client.text(uri)

    def entry() -> Any:
        return client.command("planpatch.ledger", {"patchId": job["patchId"]})

    client.set_text(uri, TEXT)
    client.wait_for(lambda: entry()["label"] == "rejected")
    assert entry()["is_applied"] is False
    client.set_text(uri, patched)
    client.wait_for(lambda: entry()["is_applied"])
    assert entry()["label"] == "unreviewed"


def test_a_patch_of_a_closed_file_is_applied_and_rolled_back_on_disk(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    job = ask_for_patch(client, uri)
    client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    assert client.job(client.command("planpatch.apply", {"patchId": job["patchId"]}))["state"] == "done"
    file = workspace / "math_box.py"
    assert file.read_text(encoding="utf-8") == TEXT.replace("a - b", "a + b")
    assert client.job(client.command("planpatch.rollback", {"patchId": job["patchId"]}))["state"] == "done"
    assert file.read_text(encoding="utf-8") == TEXT


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_positions_and_lines_are_the_clients_in_every_encoding(
    encoding: str, newline: str, start: Callable[..., LspClient], workspace: Path
) -> None:
    odd = "s = '🙂 한 \u2028 \x0c \x85 \x1c'\n\x0c\n"
    text = (odd + TEXT).replace("\n", newline)
    capabilities = json.loads(json.dumps(CAPABILITIES))
    capabilities["general"]["positionEncodings"] = [encoding]
    client = start(settings={"apply": "direct"})
    result = client.initialize(workspace, capabilities=capabilities)
    assert result["capabilities"]["positionEncoding"] == encoding
    uri = (workspace / "math_box.py").as_uri()
    client.open(uri, text)
    column = len("s = '🙂".encode({"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}[encoding]))
    column //= {"utf-8": 1, "utf-16": 2, "utf-32": 4}[encoding]
    place = {"line": 0, "character": column}
    change = {"range": {"start": place, "end": place}, "text": "!"}
    document = {"uri": uri, "version": 2}
    client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
    text = text.replace("🙂 한", "🙂! 한")
    client.texts[uri] = (2, text)
    units = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}[encoding]

    def apply(params: Any) -> Any:
        (change,) = params["edit"]["documentChanges"]
        client.set_text(uri, edited(client.text(uri), change["edits"], units))
        return {"applied": True}

    client.answers["workspace/applyEdit"] = apply
    argument = {"uri": uri, "position": {"line": 7, "character": 4}, "intent": "add them"}
    job = client.job(client.command("planpatch.patch", argument))
    assert job["state"] == "done", job
    client.wait_for(lambda: client.text(uri) == text.replace("a - b", "a + b"))


def test_a_change_that_cannot_be_placed_stops_every_offer_until_the_whole_text_comes(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    inside = {"line": 0, "character": 3}  # between the two halves of the emoji
    change = {"range": {"start": inside, "end": inside}, "text": "x"}
    document = {"uri": uri, "version": 2}
    client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
    assert client.titles(uri, 5) == []
    assert "may not be the editor's" in client.wait_for(client.messages)[-1]
    with pytest.raises(LspError, match="may not be the editor's"):
        client.command("planpatch.patch", {"uri": uri, "position": {"line": 5, "character": 0}, "intent": "x"})
    client.texts[uri] = (2, TEXT)
    client.set_text(uri, TEXT)
    assert client.titles(uri, 5) != []


def test_a_document_that_cannot_be_edited_says_why_when_the_menu_is_opened(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    client.initialize(workspace)
    untitled = "untitled:Untitled-1"
    client.open(untitled, TEXT)
    assert client.titles(untitled, 5, triggerKind=2) == []
    assert client.titles(untitled, 5) == []
    assert client.wait_for(client.messages) == ["PlanPatch: untitled:Untitled-1 is no file yet. Save it first."]
    latin = (workspace / "latin.py").as_uri()
    client.open(latin, "# -*- coding: latin-1 -*-\ndef f():\n    return 1\n")
    assert client.titles(latin, 1) == []
    client.wait_for(lambda: any("declares the encoding" in message for message in client.messages()))
    markdown = (workspace / "README.md").as_uri()
    client.open(markdown, "# no Python\n", "markdown")
    assert client.titles(markdown, 0) == []


# --- protocol --------------------------------------------------------------------------------------------------------


def test_initialize_is_answered_before_any_model_library_is_imported() -> None:
    code = (
        "import sys\nfrom lsp_server.language_server import PlanPatchServer\nimport os\n"
        "PlanPatchServer(os.environ, {})\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_clock_goes_on_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked ledger or a dead process ended it for good: nothing was accepted after ten minutes any more."""
    monkeypatch.setattr(language_server, "_TICK_S", 0.01)
    calls: list[int] = []

    class Labels:
        async def tick(self) -> None:
            calls.append(1)
            raise LedgerError("the ledger is locked")

    class Bench:
        labels = Labels()

    async def run() -> None:
        server = language_server.PlanPatchServer(os.environ, {})
        server._bench = Bench()  # type: ignore[assignment]
        ticking = asyncio.ensure_future(server._tick())
        await asyncio.sleep(0.3)
        assert not ticking.done()
        ticking.cancel()

    asyncio.run(run())
    assert len(calls) > 2


def test_every_request_gets_an_answer(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    early = client.request_raw("textDocument/codeAction", {"textDocument": {"uri": "file:///a.py"}})
    assert early["error"]["code"] == -32002
    client.initialize(workspace)
    assert client.request_raw("initialize", {"processId": None, "capabilities": {}})["error"]["code"] == -32600
    assert client.request_raw("textDocument/codeAction", {"nonsense": 1})["error"]["code"] == -32602
    assert client.request_raw("no/such/method", {})["error"]["code"] == -32601
    for command, arguments, said in [
        ("planpatch.nothing", [], "no command"),
        ("planpatch.plan", [1], "takes one object"),
        ("planpatch.plan", [{}], "no `uri`"),
        ("planpatch.plan", [{"uri": "file:///nowhere.py", "position": {"line": 0, "character": 0}}], "is not open"),
        ("planpatch.apply", [{"patchId": 3}], "`patchId` is text"),
        ("planpatch.cancel", [{"jobId": "j99"}], "no job"),
        ("planpatch.rollback", [{}], "neither `patchId` nor `uri`"),
        ("planpatch.feedback", [{"patchId": "p_1"}], "does not say `accepted`"),
    ]:
        error = client.request_raw("workspace/executeCommand", {"command": command, "arguments": arguments})["error"]
        assert said in error["message"]
        assert error["code"] == -32602
    client.send([1, 2])  # type: ignore[arg-type]
    client.send_body(b"{nonsense")
    client.notify("$/unknown", {"x": 1})
    assert client.command("planpatch.status")["state"] == "ready"
    assert client.request_raw("shutdown", None)["result"] is None
    assert client.request_raw("textDocument/codeAction", {})["error"]["code"] == -32600
    client.notify("exit", None)
    assert client.process.wait(20) == 0


def test_a_proof_that_takes_long_is_cancelled_at_once_and_keeps_no_one_waiting(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    many = "".join(f"def f{number}(a, b):\n    c = a + b\n    return c\n\n\n" for number in range(6000))
    uri = opened(client, workspace, many + TEXT, options={"notifications": ["planpatch/job"]})
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")
    position = {"line": 30_000 + 5, "character": 0}
    answer = client.command("planpatch.patch", {"uri": uri, "position": position, "intent": "add them"})
    client.wait_for(lambda: [one for one in client.seen("planpatch/job") if one["stage"] == "prove"], 60)
    other = (workspace / "other.py").as_uri()
    client.open(other, TEXT)
    started_at = time.monotonic()
    waiting = client.command("planpatch.plan", {"uri": other, "position": {"line": 5, "character": 0}, "intent": "x"})
    assert client.command("planpatch.cancel", {"jobId": answer["jobId"]}) == {"cancelled": [answer["jobId"]]}
    assert client.job(answer)["state"] == "cancelled"
    assert time.monotonic() - started_at < 3
    assert client.job(waiting)["state"] == "done"


def test_half_an_emoji_in_an_intent_is_no_bug(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    assert ask_for_patch(client, uri, intent="add them \ud83d", feedback={"reason": "\udc00"})["state"] == "done"


def test_our_notifications_go_only_to_clients_that_asked(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    ask_for_patch(client, uri)
    assert client.seen("planpatch/job") == client.seen("planpatch/status") == []
    asking = start()
    uri = opened(asking, workspace, options={"notifications": ["planpatch/job", "planpatch/status"]})
    ask_for_patch(asking, uri, fresh=True)
    states = [params["state"] for params in asking.seen("planpatch/job")]
    assert states[-1] == "done"
    assert "".join(params.get("text", "") for params in asking.seen("planpatch/job")) == FIXED
    assert asking.seen("planpatch/status")[-1]["state"] == "ready"


PRESENTING = {"notifications": True, "presents": True}


def test_a_client_that_presents_patches_itself_is_not_asked_and_hears_of_each(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    client = start()
    uri = opened(client, workspace, options=PRESENTING)
    job = ask_for_patch(client, uri)
    client.wait_for(lambda: client.seen("planpatch/status")[-1]["pending"] == [job["patchId"]])
    assert client.seen("window/showMessageRequest") == client.seen("workspace/applyEdit") == []
    assert job["patch"]["warnings"] == []
    assert client.seen("planpatch/status")[-1]["last"]["patch"]["numTokens"] == len(FIXED)
    script.write_text("def add(a, b):\n    return nowhere(a)\n", encoding="utf-8")
    assert ask_for_patch(client, uri, fresh=True)["state"] == "refused"
    assert client.messages() == []
    client.stop()

    client = start()
    opened(client, workspace, options=PRESENTING)
    client.wait_for(lambda: [told for told in client.seen("planpatch/status") if told["pending"] == [job["patchId"]]])
    assert client.job(client.command("planpatch.apply", {"patchId": job["patchId"], "hunks": [0]}))["ok"] is True
    assert client.seen("planpatch/status")[-1]["pending"] == []


def test_a_patch_is_previewed_when_the_client_asks_for_that(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    edits = {"documentChanges": True, "changeAnnotationSupport": {}}
    capabilities = {**CAPABILITIES, "workspace": {**CAPABILITIES["workspace"], "workspaceEdit": edits}}
    uri = opened(client, workspace, options=PRESENTING, capabilities=capabilities)
    job = ask_for_patch(client, uri)
    assert client.job(client.command("planpatch.apply", {"patchId": job["patchId"], "confirm": True}))["ok"] is True
    (edit,) = client.seen("workspace/applyEdit")
    assert [note["needsConfirmation"] for note in edit["edit"]["changeAnnotations"].values()] == [True]


def test_the_status_of_a_file_names_its_presets_and_plans(
    start: Callable[..., LspClient], workspace: Path, script: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    script.write_text("add, do not", encoding="utf-8")
    argument = {"uri": uri, "position": {"line": 5, "character": 0}, "intent": "add them"}
    planned = client.job(client.command("planpatch.plan", argument))
    status = client.command("planpatch.status", {"uri": uri})
    assert status["plans"] == [{"function": "add", "file": planned["planDocument"], "intent": "add them"}]
    assert status["presets"]["simplify"] == "Simplify"
    assert status["last"]["plan"]["numTokens"] == len("add, do not")
    text = Path(planned["planDocument"]).read_text(encoding="utf-8")
    assert "Lines 5 to 6; context: " in text
    assert "left out: nothing.\n\n    def add(a, b):\n        return a - b\n\n## Intent\n" in text


def test_the_ledger_is_listed_with_models_and_times_as_far_as_asked(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start()
    uri = opened(client, workspace)
    made = [ask_for_patch(client, uri, fresh=True)["patchId"] for _ in range(2)]
    (latest,) = client.command("planpatch.ledger", {"limit": 1})["proposals"]
    assert (latest["id"], latest["model"]) == (made[1], "scripted")
    assert latest["total_s"] > 0
    with pytest.raises(LspError, match="`limit` is a number from 1 to 1000"):
        client.command("planpatch.ledger", {"limit": 0})


def test_settings_come_from_the_client_and_a_bad_one_is_named(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start(settings={"apply": "perhaps", "plan": {"maxNewTokens": 20}, "style": None, "nonsense": 1})
    client.initialize(workspace)
    messages = client.wait_for(lambda: len(client.messages()) >= 2 and client.messages())
    assert any("planpatch.apply" in message and "expected one of ask, direct" in message for message in messages)
    assert any("planpatch.nonsense: there is no such setting" in message for message in messages)
    assert client.command("planpatch.status")["apply"] == "ask"
    client.settings = {"apply": "direct"}
    client.notify("workspace/didChangeConfiguration", {"settings": None})
    client.wait_for(lambda: client.command("planpatch.status")["apply"] == "direct")
    client.notify("workspace/didChangeConfiguration", {"settings": {"planpatch": {"apply": "ask"}}})
    assert client.command("planpatch.status")["apply"] == "direct", "a client that answers is asked"


def test_a_client_that_tells_of_its_settings_at_once_has_the_model_loaded_once(
    start: Callable[..., LspClient], workspace: Path
) -> None:
    client = start(settings={"model": "qwen2.5-coder-0.5b-instruct"})

    def tell(_params: Any) -> None:
        for _ in range(3):
            client.notify("workspace/didChangeConfiguration", {"settings": None})

    def answer_late(params: Any) -> list[Any]:
        time.sleep(0.1)
        return [client.settings for _ in params["items"]]

    client.answers |= {"client/registerCapability": tell, "workspace/configuration": answer_late}
    opened(client, workspace, options={"settings": client.settings})
    client.wait_for(lambda: "loads the model" in client.errors())
    time.sleep(0.6)
    assert client.errors().count("loads the model") == 1, client.errors()


def test_what_would_be_changed_at_a_place_is_told(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)

    def target(line: int) -> Any:
        return client.command("planpatch.status", {"uri": uri, "position": {"line": line, "character": 0}})["target"]

    lines = TEXT.splitlines()
    inside = next(number for number, line in enumerate(lines) if line.startswith("    return"))
    found = [target(number) for number in range(len(lines))]
    assert {"function": "", "title": "the whole file"} in found
    assert found[inside]["function"] == found[inside]["title"] != ""
    assert client.command("planpatch.status", {"uri": uri}).keys().isdisjoint({"target"})
    nowhere = {"uri": "file:///not/open.py", "position": {"line": 0, "character": 0}}
    assert client.command("planpatch.status", nowhere)["target"] is None


def test_each_workspace_folder_has_its_own_presets_and_folders_come_and_go(
    start: Callable[..., LspClient], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "one/inner", "two")]
    for folder in folders:
        folder.mkdir()
        name = folder.name
        (folder / "pyproject.toml").write_text(f"[tool.planpatch.presets]\n{name} = 'Do {name}.'\n")
    client = start()
    listed = [{"uri": folder.as_uri(), "name": folder.name} for folder in folders]
    client.initialize(params={"workspaceFolders": listed[:2]})
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")

    def presets(folder: Path) -> set[str]:
        uri = (folder / "a.py").as_uri()
        if uri not in client.texts:
            client.open(uri, TEXT)
        titles = {title.removeprefix("PlanPatch: ") for title in client.titles(uri, 5)}
        return titles & {folder.name for folder in folders}

    assert [presets(folder) for folder in folders] == [{"one"}, {"inner"}, set()]
    event = {"added": listed[2:], "removed": listed[1:2]}
    client.notify("workspace/didChangeWorkspaceFolders", {"event": event})
    assert [presets(folder) for folder in folders] == [{"one"}, {"one"}, {"two"}]


def test_a_model_that_is_not_here_is_offered_to_be_pulled_and_all_else_works(tmp_path: Path, workspace: Path) -> None:
    with LspClient(tmp_path / "home", "--model", "qwen2.5-coder-0.5b-instruct") as client:
        uri = opened(client, workspace)
        (asked,) = client.wait_for(lambda: client.seen("window/showMessageRequest"))
        assert "is not on this machine" in asked["message"]
        assert [one["title"] for one in asked["actions"]] == ["Pull it", "Not now"]
        assert client.command("planpatch.status")["state"] == "absent"
        assert client.titles(uri, 5) != []
        job = ask_for_patch(client, uri)
        assert (job["state"], job["error"]["code"]) == ("failed", "model")
        assert "planpatch models pull qwen2.5-coder-0.5b-instruct" in job["error"]["hint"]
        assert client.command("planpatch.ledger", {"uri": uri}) == {"proposals": [], "more": False}
        with pytest.raises(LspError, match="no-such-model"):
            client.command("planpatch.model", {"name": "no-such-model"})
        assert client.command("planpatch.model")["state"] == "absent"
        assert client.stop() == 0
    with LspClient(tmp_path / "home", "--model", "qwen2.5-coder-0.5b-instruct") as client:
        opened(client, workspace, options=PRESENTING)
        client.wait_for(lambda: [told for told in client.seen("planpatch/status") if told["state"] == "absent"])
        client.command("planpatch.status")
        assert client.seen("window/showMessageRequest") == []


def test_the_ledger_is_told_page_by_page_and_filtered_as_a_whole(
    start: Callable[..., LspClient], tmp_path: Path, workspace: Path
) -> None:
    client = start()
    opened(client, workspace)
    client.command("planpatch.ledger")
    refuse_many(tmp_path / "home" / "ledger.sqlite3", workspace / "math_box.py", 25)

    def wishes(**argument: Any) -> tuple[list[str], bool]:
        told = client.command("planpatch.ledger", argument)
        return [one["intent"].removeprefix("wish no") for one in told["proposals"]], told["more"]

    first = client.command("planpatch.ledger", {"limit": 20})
    assert (first["proposals"][0]["intent"], len(first["proposals"]), first["more"]) == ("wish no24", 20, True)
    assert wishes(limit=20, before=first["proposals"][-1]["id"]) == (["4", "3", "2", "1", "0"], False)
    assert wishes(limit=2, text="PARSE Wish NO1") == (["19", "18"], True)
    assert wishes(text="clamp math_box no17", states=["refused", "applied"]) == (["17"], False)
    assert wishes(text="no17", states=["applied"]) == ([], False)
    with pytest.raises(LspError, match="`states` are some of accepted, applied"):
        wishes(states=["no such state"])


def test_a_download_that_is_cancelled_ends_at_once_and_the_next_one_fetches_the_rest(
    tmp_path: Path, workspace: Path
) -> None:
    base = make_base(tmp_path / "base", hidden_size=1024, shards="30MB")
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    first, second = sorted(name for name in files if name.endswith(".safetensors"))
    with serve(Hub({"org/tiny": files}, pause_s=0.2, slow=second)) as hub:
        env = environment_of(hub, tmp_path / "cache")
        with LspClient(tmp_path / "home", "--model", "org/tiny", "--device", "cpu", env=env) as client:
            uri = opened(client, workspace, options=PRESENTING)
            client.wait_for(lambda: client.command("planpatch.status")["state"] == "absent")
            client.command("planpatch.pull")
            partial = tmp_path / "home" / "models" / ".org--tiny.partial" / "hub"
            client.wait_for(lambda: (partial / first).is_file() and hub.sent_bytes > 0, 60)
            before = client.command("planpatch.status")
            assert (before["state"], before["isPulling"]) == ("loading", True)
            assert "Fetching org/tiny from the hub (" in before["message"]
            (worker,) = [one for one in _children(client) if "store_worker.py" in " ".join(one.cmdline())]
            (cancel,) = [title for title in client.titles(uri, 5) if "cancel" in title]
            assert cancel == "PlanPatch: cancel download of org--tiny"

            assert client.command("planpatch.cancel", {"jobId": "pull"}) == {"cancelled": ["pull"]}
            worker.wait(10)
            after = client.command("planpatch.status")
            assert (after["state"], after["reason"], after["isPulling"]) == ("absent", "cancelled", False)
            assert after["message"] == "The download of org--tiny was cancelled; what arrived whole is kept"
            assert client.command("planpatch.cancel", {"jobId": "pull"}) == {"cancelled": []}
            (info,) = [one for one in client.command("planpatch.model")["models"] if one["name"] == "org--tiny"]
            assert info["state"] == "partial" and info["bytes"] >= len(files[first])

            hub.pause_s = 0.0
            client.command("planpatch.pull")
            client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready", 60)
            assert sorted(hub.sent) == [first, second, second]
            assert client.stop() == 0


def _children(client: LspClient) -> list[psutil.Process]:
    return psutil.Process(client.process.pid).children(recursive=True)


@pytest.mark.parametrize("how", ["progress", "another model", "the end"])
def test_a_download_ends_with_its_progress_with_another_model_and_with_the_server(
    tmp_path: Path, workspace: Path, how: str
) -> None:
    base = make_base(tmp_path / "base", hidden_size=1024)
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    with serve(Hub({"org/tiny": files}, pause_s=0.2)) as hub:
        env = environment_of(hub, tmp_path / "cache")
        with LspClient(tmp_path / "home", "--model", "org/tiny", "--device", "cpu", env=env) as client:
            opened(client, workspace, options=PRESENTING)
            client.wait_for(lambda: client.command("planpatch.status")["state"] == "absent")
            client.command("planpatch.pull")
            client.wait_for(lambda: hub.sent_bytes > 0, 60)
            (worker,) = [one for one in _children(client) if "store_worker.py" in " ".join(one.cmdline())]
            shown = [one for one in client.seen("$/progress") if one["value"].get("cancellable")]
            assert [one["value"]["title"] for one in shown] == ["PlanPatch: downloading the model"]
            if how == "progress":
                client.notify("window/workDoneProgress/cancel", {"token": shown[0]["token"]})
                client.wait_for(lambda: client.command("planpatch.status")["reason"] == "cancelled")
            elif how == "another model":
                client.command("planpatch.model", {"name": "qwen2.5-coder-0.5b-instruct"})
                client.wait_for(lambda: client.command("planpatch.status")["state"] == "absent")
            else:
                assert client.stop() == 0
            worker.wait(10)


@pytest.mark.slow
def test_a_library_that_writes_to_stdout_leaves_the_protocol_alone(
    start: Callable[..., LspClient], workspace: Path, long_run: bool
) -> None:
    megabytes = 100 if long_run else 20
    client = start(env={"NOISE": str(megabytes)})
    uri = opened(client, workspace)
    assert ask_for_patch(client, uri)["state"] == "done"
    client.wait_for(lambda: len(client.stderr) > megabytes * 1_000_000, 120)
    assert client.titles(uri, 5) != []
    seen = bytes(client.stderr[:20_000_000])
    assert seen.count(b"Content-Length: 5\r\n\r\nhello") == 2
    assert b"from C" in client.stderr
    assert client.stop() == 0


def test_a_client_that_went_away_ends_the_server(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    opened(client, workspace)
    assert client.process.stdin is not None
    client.process.stdin.close()
    assert client.process.wait(20) == 1


# --- TCP -------------------------------------------------------------------------------------------------------------


def tcp_port(client: LspClient) -> int:
    return int(client.wait_for(lambda: b"listening on" in client.stderr and client.errors()).rsplit(":", 1)[1])


def test_one_client_is_served_on_a_loopback_port(start: Callable[..., LspClient]) -> None:
    client = start("--tcp", "--port", "0")
    with socket.create_connection(("127.0.0.1", tcp_port(client)), timeout=20) as connection:
        body = json.dumps(
            {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"processId": None, "capabilities": {}}}
        ).encode()
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b'"planpatch"' in connection.recv(100_000)
    assert client.process.wait(20) == 1


def test_a_web_page_cannot_post_to_the_port(start: Callable[..., LspClient]) -> None:
    client = start("--tcp", "--port", "0")
    body = b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"processId":null,"capabilities":{}}}'
    with socket.create_connection(("127.0.0.1", tcp_port(client)), timeout=20) as connection:
        head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        assert connection.recv(1000) == b""
    assert client.process.wait(20) == 1


def test_another_address_than_loopback_is_refused(start: Callable[..., LspClient]) -> None:
    client = start("--tcp", "--host", "0.0.0.0")
    assert client.process.wait(30) == 2
    client.wait_for(lambda: "0.0.0.0 is not a loopback address" in client.errors())


def test_a_port_without_tcp_is_refused(start: Callable[..., LspClient]) -> None:
    client = start("--port", "7000")
    assert client.process.wait(30) == 2
    client.wait_for(lambda: "--host and --port need --tcp" in client.errors())


# --- hostile workspaces ----------------------------------------------------------------------------------------------


def test_a_hostile_workspace_runs_no_code_and_changes_no_protected_setting(
    start: Callable[..., LspClient], workspace: Path, tmp_path: Path
) -> None:
    trap = f"open({str(tmp_path / 'trapped')!r}, 'a').write('x')\n"
    for name in ("torch.py", "sitecustomize.py", "usercustomize.py", "pygls.py", "json.py", "conftest.py"):
        (workspace / name).write_text(trap)
    for name in ("engine", "lsp_server", "training"):
        (workspace / name).mkdir()
        (workspace / name / "__init__.py").write_text(trap)
    (workspace / "pyproject.toml").write_text(
        "[tool.planpatch]\nmodel = './evil'\nadapter = './evil'\nhost = '0.0.0.0'\napply = 'direct'\ntoken = 'x'\n"
        "log_file = '/tmp/evil'\nstyle = 'short'\n[tool.planpatch.presets]\nours = 'Do ours.'\n"
    )
    client = start(env={"PYTHONPATH": ".", "PYTHONSTARTUP": str(workspace / "torch.py")}, cwd=workspace)
    uri = opened(client, workspace)
    client.wait_for(lambda: "PlanPatch: ours" in client.titles(uri, 5))
    assert client.command("planpatch.status", {"uri": uri})["apply"] == "ask"
    messages = client.messages()
    for name in ("model", "adapter", "host", "apply", "token", "log_file"):
        assert any(f"tool.planpatch.{name}: a workspace may not set this" in message for message in messages), name
    assert ask_for_patch(client, uri)["state"] == "done"
    assert not (tmp_path / "trapped").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_place_of_a_file_of_settings_stops_nobody(start: Callable[..., LspClient], workspace: Path) -> None:
    os.mkfifo(workspace / "pyproject.toml")
    client = start()
    uri = opened(client, workspace)
    assert client.titles(uri, 5) != []
    assert any("it is no regular file" in message for message in client.messages())


def test_a_file_outside_of_the_root_is_refused(
    start: Callable[..., LspClient], workspace: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.py").symlink_to(workspace / "math_box.py")
    client = start(settings={"root": str(root)})
    uri = opened(client, workspace)
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")
    for outside in (uri, (root / "link.py").as_uri()):
        client.open(outside, TEXT)
        assert client.titles(outside, 5) == []
        with pytest.raises(LspError, match="is outside of the root"):
            client.command("planpatch.patch", {"uri": outside, "position": {"line": 5, "character": 0}, "intent": "x"})
    inside = (root / "inside.py").as_uri()
    client.open(inside, TEXT)
    assert client.titles(inside, 5) != []


def test_a_link_and_its_target_are_two_documents(start: Callable[..., LspClient], workspace: Path) -> None:
    (workspace / "link.py").symlink_to(workspace / "math_box.py")
    client = start(settings={"apply": "direct"})
    uri, link = opened(client, workspace), (workspace / "link.py").as_uri()
    client.open(link, TEXT)
    ask_for_patch(client, link)
    client.wait_for(lambda: client.text(link) != TEXT)
    assert client.text(uri) == TEXT


def test_a_bad_adapter_or_model_is_told_and_not_kept(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    opened(client, workspace)
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")
    before = client.command("planpatch.adapter")
    assert before["setting"] == "auto"
    with pytest.raises(LspError, match="/nope does not exist"):
        client.command("planpatch.adapter", {"name": "/nope"})
    assert client.command("planpatch.adapter") == before
    client.settings = {"model": "nope"}
    client.notify("workspace/didChangeConfiguration", {"settings": None})
    client.wait_for(
        lambda: any(text.startswith("PlanPatch: editor setting planpatch.model: ") for text in client.messages())
    )
    assert client.command("planpatch.status")["state"] == "ready"


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_server_leaves_a_ledger_that_knows_what_is_in_the_text(
    start: Callable[..., LspClient], workspace: Path, script: Path, long_run: bool
) -> None:
    text = TEXT
    for number in range(30 if long_run else 4):
        script.write_text(f"def add(a, b):\n    return a + b + {number}\n", encoding="utf-8")
        client = start(settings={"apply": "direct"})
        uri = opened(client, workspace, text)
        argument = {"uri": uri, "position": {"line": 5, "character": 0}, "intent": f"n{number}"}
        client.command("planpatch.patch", argument)
        time.sleep(0.02 * (number % 8))
        client.process.kill()
        client.process.wait(20)
        text = client.text(uri)
    client = start()
    uri = opened(client, workspace, text)
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")
    proposals = client.command("planpatch.ledger", {"uri": uri})["proposals"]
    entries = [client.command("planpatch.ledger", {"patchId": one["id"]}) for one in proposals]
    for entry in entries:
        if entry["is_applied"] and entry["state"] == "applied":
            assert entry["base"] != text
        if entry["patched"] == text:
            assert entry["is_applied"] or entry["state"] in ("proposed", "diverged"), entry["events"]
    assert os.path.getsize(client_ledger(workspace)) > 0


def client_ledger(workspace: Path) -> Path:
    return workspace.parent / "home" / "ledger.sqlite3"
