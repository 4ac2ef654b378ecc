"""Five real clients' `initialize`, and Helix's, replayed: nothing is sent that the client did not say it takes.

The server is a real process over stdio; the model is scripted. The client behaves as the named one does where that is
known: which answer it gives to a question, what its positions count, which edits it takes.

Not covered: what an editor does with what it is sent; tests/e2e drives real ones.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lsp_client import Json, LspClient, edited

pytestmark = pytest.mark.integration

CLIENTS = Path(__file__).resolve().parents[1] / "data" / "clients"
SERVER = Path(__file__).resolve().parents[1] / "scripted_server.py"
UNITS = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
DIRECTIVE = "    # pp: return low when x is too small\n"
CLAMP = '''\
def clamp(x, low, high):
    """Keep 🙂 in bounds."""; high = high  # 🚀
    if x < low: return high  # 🙂
    return min(x, high)
'''
FILE = f"import os  # 🙂\n\n\n{CLAMP}\n\ndef after():\n    return os.name\n"
TYPED = CLAMP.replace("# 🚀", "# 🚀!")  # what the user makes of it first
PATCHED = TYPED.replace("return high", "return low")


@dataclass(frozen=True, slots=True)
class Profile:
    """What a client is known to do.

    Args:
        file: Its `initialize`.
        encoding: What has to be agreed on.
        edit: The form of edits that it takes.
        asks: Whether it shows a question; one that does not answers with an error.
    """

    file: str
    encoding: str
    edit: str = "documentChanges"
    asks: bool = True


PROFILES = {
    "neovim 0.11": Profile("neovim_0.11.4.json", "utf-8"),
    "neovim 0.7": Profile("neovim_0.7.2.json", "utf-16"),
    "code-server": Profile("code-server_1.139.1.json", "utf-16"),
    "eglot": Profile("eglot_1.9.json", "utf-16"),
    "lsp-mode": Profile("lsp-mode_8.0.0.json", "utf-16"),
    "helix": Profile("helix_25.01.json", "utf-8"),
    "helix that knows no questions": Profile("helix_25.01.json", "utf-8", asks=False),
    "one that says nothing": Profile("", "utf-16", edit="changes"),
}
OFTEN = ("neovim 0.11", "eglot", "helix", "one that says nothing")  # each pair of encodings and ways of editing once


class Client(LspClient):
    """The client of a profile; what it was sent against its word is kept in `faults`."""

    def __init__(self, home: Path, profile: Profile) -> None:
        self.script = home / "answer.txt"
        self.script.write_text("return low", encoding="utf-8")
        command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "lsp"]
        super().__init__(home, command=command, env={"SCRIPT": str(self.script)})
        self.profile = profile
        asked = json.loads((CLIENTS / profile.file).read_text(encoding="utf-8")) if profile.file else {}
        self.asked: Json = {"capabilities": {"workspace": {"applyEdit": True}}, **asked}
        self.edits: list[Json] = []
        if profile.asks:
            self.answers["window/showMessageRequest"] = self._answer_question
        else:
            del self.answers["window/showMessageRequest"]
        self.choice = "Apply"

    def __enter__(self) -> Client:
        return self

    def has(self, path: str) -> bool:
        value: Any = self.asked["capabilities"]
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return bool(value) or isinstance(value, dict)

    def connect(self, root: Path) -> Json:
        place: Json = {"processId": os.getpid(), "rootPath": str(root), "rootUri": root.as_uri()}
        if self.has("workspace.workspaceFolders") and "workspaceFolders" not in self.asked:
            place["workspaceFolders"] = [{"uri": root.as_uri(), "name": root.name}]
        result = self.request("initialize", {**place, **self.asked})
        self.notify("initialized", {})
        return result

    def _answer_question(self, params: Json) -> Json | None:
        titles = [action["title"] for action in params["actions"]]
        return {"title": self.choice} if self.choice in titles else None

    def apply_edit(self, params: Any) -> Json:
        edit = params["edit"]
        self.edits.append(edit)
        for change in edit.get("documentChanges", []):
            self._change(change["textDocument"]["uri"], change["edits"], change["textDocument"]["version"])
        for uri, edits in edit.get("changes", {}).items():
            self._change(uri, edits, self.texts[uri][0])
        return {"applied": True}

    def _change(self, uri: str, edits: list[Json], version: int) -> None:
        known, text = self.texts[uri]
        assert version == known
        self.set_text(uri, edited(text, edits, UNITS[self.profile.encoding]))

    def type(self, uri: str, before: str, typed: str) -> None:
        """Type in front of a text, as one incremental change in the client's units."""
        version, text = self.texts[uri]
        offset = text.index(before)
        line = text[:offset].rpartition("\n")[2].encode(UNITS[self.profile.encoding])
        size = {"utf-8": 1, "utf-16": 2, "utf-32": 4}[self.profile.encoding]
        place = {"line": text[:offset].count("\n"), "character": len(line) // size}
        self.texts[uri] = (version + 1, text[:offset] + typed + text[offset:])
        change = {"range": {"start": place, "end": place}, "text": typed}
        document = {"uri": uri, "version": version + 1}
        self.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})

    def choose(self, uri: str, line: int, title: str) -> Json:
        """Run the one action whose title begins so, as a client runs a plain code action: by its command alone."""

        def found() -> list[Json]:
            return [action for action in self.actions(uri, line) if action["title"].startswith(title)]

        (action,) = self.wait_for(found)
        command = action["command"]
        return self.command(command["command"], *command["arguments"])


def faults(client: Client) -> list[str]:
    """What was sent that the client did not say it takes."""
    wrong: list[str] = []
    needs = {
        "workspace/applyEdit": "workspace.applyEdit",
        "workspace/configuration": "workspace.configuration",
        "window/workDoneProgress/create": "window.workDoneProgress",
        "window/showDocument": "window.showDocument.support",
        "$/progress": "window.workDoneProgress",
    }
    plain = {"window/showMessage", "window/logMessage", "window/showMessageRequest", "textDocument/publishDiagnostics"}
    for message in (*client.requests, *client.notifications):
        method = message["method"]
        if method == "client/registerCapability":
            for one in message["params"]["registrations"]:
                path = one["method"].replace("/", ".")
                if not client.has(f"{path}.dynamicRegistration"):
                    wrong.append(f"{method} of {one['method']}")
        elif method not in plain and not (method in needs and client.has(needs[method])):
            wrong.append(method)
    return wrong + progress_faults(client)


def progress_faults(client: Client) -> list[str]:
    """Progress that was not created, or goes on after its end, or never ends."""
    created = [params["token"] for params in client.seen("window/workDoneProgress/create")]
    wrong = [f"{token} was created twice" for token in set(created) if created.count(token) > 1]
    state = {token: "created" for token in created}
    follows = {"begin": ("created",), "report": ("begin", "report"), "end": ("begin", "report")}
    for params in client.seen("$/progress"):
        token, kind = params["token"], params["value"]["kind"]
        if state.get(token) not in follows[kind]:
            wrong.append(f"{kind} of {token} after {state.get(token)}")
        state[token] = kind
    return wrong + [f"{token} is left at {last}" for token, last in state.items() if last != "end"]


def assert_plain(actions: list[Json], client: Client) -> None:
    """Commands and no edits, of kinds that the client knows, and nothing that it does not."""
    support = client.asked["capabilities"].get("textDocument", {}).get("codeAction", {})
    kinds = support.get("codeActionLiteralSupport", {}).get("codeActionKind", {}).get("valueSet", [""])
    assert actions
    for action in actions:
        assert set(action) <= {"title", "kind", "diagnostics", "command"} | ({"disabled"} if support else set())
        assert action["title"].startswith("PlanPatch: ")
        assert any(kind == "" or action["kind"] == kind or action["kind"].startswith(f"{kind}.") for kind in kinds)
        command = action["command"]
        assert command["command"].startswith("planpatch.")
        assert len(command["arguments"]) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in PROFILES]
)
def test_a_client_is_sent_only_what_it_takes(name: str, home: Path, tmp_path: Path) -> None:
    """Plan, edit the plan, patch from it, apply, roll back; the directive is in the code, then gone, then back."""
    profile = PROFILES[name]
    root = tmp_path / "ws"
    root.mkdir()
    written = FILE.replace("    if x < low", DIRECTIVE + "    if x < low")
    file = root / "clamp 🙂.py"
    file.write_text(written, encoding="utf-8")
    uri = file.as_uri()
    with Client(home, profile) as client:
        answer = client.connect(root)
        assert answer["capabilities"].get("positionEncoding", "utf-16") == profile.encoding
        client.open(uri, written)
        client.type(uri, "\n    # pp:", "!")  # behind an emoji: server and client must agree on where that is
        written = client.text(uri)
        assert TYPED.splitlines()[1] in written
        line = written[: written.index("if x < low")].count("\n")
        assert_plain(client.actions(uri, line), client)

        job = client.job(client.choose(uri, line, "PlanPatch: plan a change to `clamp`"))
        plan = Path(job["planDocument"])
        if client.has("window.showDocument.support"):
            assert [params["uri"] for params in client.seen("window/showDocument")] == [plan.as_uri()]
        else:
            client.wait_for(lambda: [text for text in client.messages() if str(plan) in text])
        plan.write_text(plan.read_text(encoding="utf-8") + "- and no more\n", encoding="utf-8")

        client.script.write_text(PATCHED, encoding="utf-8")
        job = client.job(client.choose(uri, line, "PlanPatch: patch from plan: "))
        assert job["state"] == "done", job
        if not profile.asks:
            client.wait_for(lambda: [text for text in client.messages() if "has a patch for clamp" in text])
            assert_plain(client.actions(uri, line), client)
            client.job(client.choose(uri, line, "PlanPatch: Apply: "))
        client.wait_for(lambda: client.text(uri) != written)
        assert client.text(uri) == FILE.replace(CLAMP, PATCHED)
        assert_edit(client.edits[-1], client)

        client.job(client.choose(uri, 3, "PlanPatch: roll back: "))
        client.wait_for(lambda: client.text(uri) == written)
        assert_edit(client.edits[-1], client, asks=False)
        client.wait_for(lambda: [title for title in client.titles(uri, 3) if title.startswith("PlanPatch: redo: ")])
        (proposal,) = client.command("planpatch.ledger", {"uri": uri})["proposals"]
        assert (proposal["state"], proposal["is_applied"]) == ("rolled_back", False)
        assert client.stop() == 0
        assert faults(client) == []


def assert_edit(edit: Json, client: Client, *, asks: bool = True) -> None:
    """The form that the client takes; annotated only where it shows annotations and is to ask."""
    assert set(edit) - {"changeAnnotations"} == {client.profile.edit}
    annotated = asks and client.has("workspace.workspaceEdit.changeAnnotationSupport")
    assert ("changeAnnotations" in edit) is annotated
    for change in edit.get("documentChanges", []):
        for one in change["edits"]:
            assert ("annotationId" in one) is annotated
            assert not annotated or edit["changeAnnotations"][one["annotationId"]]["needsConfirmation"] is True


@pytest.mark.parametrize("name", ["code-server", "eglot", "helix"])
def test_what_the_client_asks_for_by_kind_is_all_it_gets(name: str, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "clamp.py"
    with Client(home, PROFILES[name]) as client:
        client.connect(tmp_path)
        client.open(file.as_uri(), FILE)
        for only, wanted in [("refactor", True), ("refactor.rewrite", True), ("source", False), ("quickfix", False)]:
            found = client.actions(file.as_uri(), 4, only=[only])
            assert bool(found) is wanted
            assert all(action["kind"].startswith(f"{only}.") for action in found)
        assert client.actions(file.as_uri(), 4, triggerKind=2) == []  # nothing selected, nothing wrong, nothing waits
