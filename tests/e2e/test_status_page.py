"""The status page in a real browser, Chromium: what it shows, what it rolls back, and what hostile text does to it.

Each test has the real listener with a real ledger and a real file; no model is loaded, so health says `absent`. `python
tests/editors/chromium.py` installs Chromium on Debian.

Not covered: other browsers, screen readers, and how it looks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StaleTextError
from engine.patching.disk import sha256_hex
from engine.patching.edits import Edit, apply_edits
from engine.patching.ledger import Ledger, Proposal, State
from engine.patching.source import Source
from lsp_server.http.generation import Call
from lsp_server.http.listener import Listener, bind, new_token
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost
from lsp_server.records import Records
from lsp_server.session import Session
from tests.browser import Chromium
from tests.command_line import start

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="tests/browser.py is for Linux")]

MODEL = "smollm2-135m-instruct"  # never pulled here
BASE = (
    b"\xef\xbb\xbfimport os\r\n\r\n\x0c\r\n@decorated\r\ndef greet(name):\r\n\tdef inner():\r\n\t\treturn name\r\n"
    b"\treturn 'hi ' + inner()\r\n\r\n\r\ndef other(name):\r\n\treturn '\xf0\x9f\x90\x8d' + name"
)
INTENT = "strip the name 🐍"
HOSTILE = (
    """<img src=x onerror="document.title='owned'">""",
    "<script>document.title = 'owned'</script>",
    """"><svg onload="document.title='owned'">'`</li><iframe srcdoc="<script>top.document.title='owned'</script>">""",
    "javascript:document.title='owned'//${document.title='owned'}{{constructor.constructor('1')()}}&lt;b&gt;&amp;",
    "right to left \u202egnp.exe\u202c, \u2067isolated\u2069, one\u2028two, e\u0301\u0301\u0301, \ufeff",
    "a" * 3000 + "\n" * 40 + "<b>the end</b>",
)


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_chromium(chromium_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(chromium_program, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def chromium(one_chromium: Chromium) -> Iterator[Chromium]:
    yield one_chromium
    one_chromium.close_pages()


@dataclass
class Served:
    """A listener in this process, and the ledger that it shows."""

    session: Session
    ledger: Ledger
    folder: Path
    service: Service = field(init=False)
    listener: Listener = field(init=False)
    host: ModelHost = field(init=False)

    def start(self, port: int = 0) -> None:
        """Listen; each start has a token of its own."""
        self.host = ModelHost(lambda _: None)
        self.service = Service(self.host, lambda: self.session, Records(self.session.ledger), new_token())
        bound = bind("127.0.0.1", port, has_token=False, runtime_file=self.session.paths.runtime_file)
        self.listener = Listener(self.service, bound, self.session.paths.runtime_file)
        self.host.start(self.session)
        self.listener.start()

    def stop(self) -> None:
        self.listener.close()
        self.host.close()
        self.service.records.close()

    @property
    def page(self) -> str:
        return f"{self.listener.address.url}/status"

    @property
    def page_with_token(self) -> str:
        return f"{self.page}#{self.service.token}"

    def apply(self, intent: str = INTENT, name: str = "greet 🐍.py", scope: str = "greet") -> tuple[str, Path]:
        """A patch that is in a file: its id, and the file."""
        file = self.folder / name
        file.write_bytes(BASE)
        patch_id = self.ledger.propose(proposal(file, intent, scope))
        self.ledger.apply(patch_id)
        assert file.read_bytes() != BASE
        return patch_id, file


def proposal(file: Path | None, intent: str, scope: str = "greet") -> Proposal:
    before = Source.from_bytes(BASE, "m.py")
    edits = [
        Edit("m.py", "replace", line, line, before.text_between(line, line), text)
        for line, text in ((7, "\t\treturn name.strip()"), (12, "\treturn f'🐍 {name}'"))
    ]
    return Proposal(
        key=intent,
        path=file,
        scope=scope,
        scope_kind="function",
        start_line=4,
        end_line=8,
        base=BASE,
        patched=apply_edits(before, edits).to_bytes(),
        edits=tuple(edits),
        surface="lsp",
        intent=intent,
    )


@pytest.fixture
def served(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    folder = tmp_path / "a workspace"
    folder.mkdir()
    session = Session.open(os.environ, {"model": MODEL, "device": "cpu"})
    with session.ledger() as ledger:
        made = Served(session, ledger, folder)
        made.start()
        yield made
        made.stop()


ENTRY = "#entries li"
ROLL_BACK = f"{ENTRY} button"


def is_shown(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})?.checkVisibility()"


def says(selector: str, text: str) -> str:
    return f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"


def is_in_entry(text: str) -> str:
    return says(ENTRY, text)


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_without_a_token_it_shows_health_and_says_how_to_get_the_rest(chromium: Chromium, served: Served) -> None:
    served.apply()
    page = chromium.open(served.page)
    page.wait_for("document.getElementById('state').innerText === 'absent'")
    text = page.text()
    assert MODEL in text
    assert f"planpatch models pull {MODEL}" in text
    assert "0 running, 0 waiting, room for 40" in text
    assert "planpatch serve --open" in text
    assert "Adapter\nnone" in text
    assert INTENT not in text
    assert not page.evaluate(is_shown("#ledger")) and not page.evaluate(is_shown("#requests"))
    assert {url.rpartition("/")[2] for url in page.requests if url.startswith("http")} == {"status", "health"}
    assert page.problems == []


def test_the_token_leaves_the_address_bar_and_survives_a_reload_of_the_tab(chromium: Chromium, served: Served) -> None:
    served.apply()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_in_entry(INTENT))
    page.go("about:blank")
    page.go(served.page)
    page.wait_for(is_in_entry(INTENT))
    assert page.evaluate("location.href") == served.page
    assert page.evaluate("performance.getEntriesByType('navigation')[0].name") == served.page
    assert not [url for url in page.requests if served.service.token in url]
    assert served.service.token not in page.evaluate("document.documentElement.outerHTML")
    assert page.problems == []


def test_an_entry_shows_time_file_function_intent_state_and_label(chromium: Chromium, served: Served) -> None:
    _, file = served.apply()
    served.ledger.propose(proposal(None, "of pasted code", scope=""))
    page = chromium.open(served.page_with_token)
    page.wait_for(is_in_entry("of pasted code"))
    newest, oldest = page.evaluate(f"[...document.querySelectorAll('{ENTRY}')].map((entry) => entry.innerText)")
    assert all(part in oldest for part in (INTENT, "greet", str(file), "applied", "label: unreviewed", "Roll back"))
    assert all(part in newest for part in ("module", "pasted code", "proposed", "label: unreviewed"))
    assert "Roll back" not in newest
    made_at = served.ledger.list_proposals()[1].created_at
    assert page.evaluate(f"[...document.querySelectorAll('{ENTRY} time')].at(-1).dateTime") == made_at
    assert page.problems == []


def test_requests_show_their_times_newest_first(chromium: Chromium, served: Served) -> None:
    recent = served.service.generations.recent
    recent.append(Call(1, "/plan", time.time() - 30, "done", 1.234, 16))
    recent.append(Call(2, "/api/chat", time.time() - 20, "failed", 0.5, 0))
    recent.append(Call(3, "/patch_smart", time.time() - 10, "running"))
    page = chromium.open(served.page_with_token)
    page.wait_for(says("#requests-table tbody", "/plan"))
    rows: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('#requests-table tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    assert [row[:2] for row in rows] == [["/patch_smart", "running"], ["/api/chat", "failed"], ["/plan", "done"]]
    assert 10 <= float(rows[0][3]) < 60  # a running one's seconds are those until now
    assert [row[3:] for row in rows[1:]] == [["0.50", "–"], ["1.23", "16"]]
    recent.clear()
    page.wait_for(says("#requests", "None since the server started."))
    assert page.problems == []


def test_it_shows_what_changes_without_a_reload(chromium: Chromium, served: Served) -> None:
    page = chromium.open(served.page_with_token)
    page.wait_for(says("#ledger", "No patch was proposed yet."))
    patch_id, _ = served.apply()
    page.wait_for(is_in_entry("applied"))
    page.evaluate(f"document.querySelector('{ROLL_BACK}').focus()")
    served.apply("another", "another.py")
    page.wait_for(is_in_entry("another"))
    assert page.evaluate("document.activeElement.closest('li').innerText.includes('strip the name')")
    served.ledger.rollback(patch_id)  # by other means: the focus stays in its row
    page.wait_for("[...document.querySelectorAll('#entries li')].at(-1).innerText.includes('rolled back')")
    assert page.evaluate("document.activeElement.closest('li').innerText.includes('strip the name')")
    assert page.problems == []


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1000, True), (400, False), (320, True)])
def test_nothing_is_wider_than_the_window(chromium: Chromium, served: Served, width: int, dark: bool) -> None:
    for number, intent in enumerate(HOSTILE):
        served.apply(intent, f"{'a long name ' * 12}{number}.py")
    served.service.generations.recent.append(Call(1, "/v1/chat/completions", time.time() - 999, "running"))
    page = chromium.open(served.page_with_token, width=width)
    page.look(width=width, dark=dark)
    page.wait_for(is_in_entry("the end"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click(ROLL_BACK)
    page.wait_for("document.getElementById('ask').open")
    box = page.evaluate(
        "(() => { const b = document.getElementById('ask').getBoundingClientRect();"
        " return [b.left, b.right, b.top, b.bottom]; })()"
    )
    assert box[0] >= 0 and box[1] <= width and box[2] >= 0 and box[3] <= 900
    assert page.problems == []


# --- rolling back ----------------------------------------------------------------------------------------------------


def test_roll_back_gives_the_file_back_byte_for_byte(chromium: Chromium, served: Served) -> None:
    patch_id, file = served.apply()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    page.click(ROLL_BACK)
    page.wait_for("document.getElementById('ask').open")
    assert INTENT in page.text("#ask") and str(file) in page.text("#ask")
    page.click("#ask-yes")
    page.wait_for(is_in_entry("rolled back"))
    assert file.read_bytes() == BASE
    entry = served.ledger.get(patch_id)
    assert entry.state is State.ROLLED_BACK
    assert entry.events[-1].kind == "rolled_back"
    assert entry.events[-1].data["sha256"] == sha256_hex(BASE)
    assert not page.evaluate(is_shown(ROLL_BACK))
    assert "greet was rolled back" in page.text("#done")
    assert page.problems == []


def test_keep_it_and_escape_change_nothing(chromium: Chromium, served: Served) -> None:
    patch_id, file = served.apply()
    patched = file.read_bytes()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    for leave in (lambda: page.click("#ask-no"), lambda: page.press("Escape")):
        page.click(ROLL_BACK)
        page.wait_for("document.getElementById('ask').open")
        leave()
        page.wait_for("!document.getElementById('ask').open")
    assert file.read_bytes() == patched
    assert served.ledger.get(patch_id).state is State.APPLIED
    assert not [url for url in page.requests if url.endswith("/rollback")]


def test_the_keyboard_is_enough(chromium: Chromium, served: Served) -> None:
    _, file = served.apply()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    for _ in range(10):
        page.press("Tab")
        if page.evaluate(f"document.activeElement === document.querySelector('{ROLL_BACK}')"):
            break
    assert "Roll back greet: strip the name" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.press(" ")
    page.wait_for("document.activeElement.id === 'ask-no'")  # the one that does no harm has the focus
    page.press("Tab")
    page.press("Enter")
    page.wait_for(is_in_entry("rolled back"))
    assert file.read_bytes() == BASE
    page.wait_for(f"document.activeElement.closest('li') === document.querySelector('{ENTRY}')")
    assert page.problems == []


def test_a_roll_back_that_is_refused_says_why_and_what_to_do(chromium: Chromium, served: Served) -> None:
    patch_id, file = served.apply()
    edited = file.read_bytes().replace(b"name.strip()", b"name.lstrip()")
    file.write_bytes(edited)
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    page.click(ROLL_BACK)
    page.click("#ask-yes")
    page.wait_for(is_shown(f"{ENTRY} [role=alert]"))
    told = page.text(f"{ENTRY} [role=alert]")
    with pytest.raises(StaleTextError) as refused:
        served.ledger.rollback(patch_id)
    assert refused.value.message.rstrip(".") in told
    assert refused.value.hint.rstrip(".") in told
    assert file.read_bytes() == edited
    assert page.evaluate(is_shown(ROLL_BACK))
    assert page.evaluate(f"document.activeElement === document.querySelector('{ROLL_BACK}')")
    time.sleep(2.5)  # a poll later it still says so
    assert page.text(f"{ENTRY} [role=alert]") == told


def test_an_editor_that_does_not_make_the_change_is_told(chromium: Chromium, served: Served) -> None:
    async def in_editor(operation: str, patch_id: str) -> dict[str, Any]:
        return {
            "ok": False,
            "patchId": patch_id,
            "patchState": "applied",
            "reason": f"The editor refused the {operation}",
        }

    served.service.in_editor = in_editor
    _, file = served.apply()
    patched = file.read_bytes()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    page.click(ROLL_BACK)
    page.click("#ask-yes")
    page.wait_for(says(ENTRY, "The editor refused the rollback"))
    assert file.read_bytes() == patched


# --- what is hostile, wrong or gone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text(chromium: Chromium, served: Served, hostile: str) -> None:
    name = """"><img src=x onerror=document.title='owned'>.py"""
    patch_id, file = served.apply(hostile, name, scope="<b>f</b><script>document.title='owned'</script>")
    edited = file.read_bytes()
    file.write_bytes(edited.replace(b"name.strip()", b"<img src=x onerror=alert(1)>"))
    page = chromium.open(served.page_with_token)
    page.wait_for(is_shown(ROLL_BACK))
    assert page.evaluate(f"document.querySelector('{ENTRY} .intent').textContent") == hostile
    page.click(ROLL_BACK)
    page.wait_for("document.getElementById('ask').open")
    assert page.evaluate("document.getElementById('ask-intent').textContent") == hostile
    assert page.evaluate("document.getElementById('ask-path').textContent") == str(file)
    page.click("#ask-yes")  # the refusal's message is text too
    page.wait_for(is_shown(f"{ENTRY} [role=alert]"))
    file.write_bytes(edited)
    page.click(ROLL_BACK)
    page.click("#ask-yes")
    page.wait_for(is_in_entry("rolled back"))
    assert served.ledger.get(patch_id).state is State.ROLLED_BACK
    inside = (
        "document.querySelectorAll('main :is(img, script, svg, iframe, b), dialog :is(img, script, svg, iframe, b)')"
    )
    assert page.evaluate(f"{inside}.length") == 0
    assert page.evaluate("document.title") == "PlanPatch"
    assert [problem for problem in page.problems if "status of 409" not in problem] == []


@pytest.mark.parametrize(
    ("directive", "attempt"),
    [
        ("require-trusted-types-for", "document.body.innerHTML = '<img src=x>'"),
        ("require-trusted-types-for", "new Function('document.title = \\'owned\\'')()"),
        ("require-trusted-types-for", "document.createElement('script').text = 'document.title = \\'owned\\''"),
        ("require-trusted-types-for", "document.body.append(add('script', {}, 'document.title = \\'owned\\''))"),
        ("style-src-elem", "document.body.append(add('style', {}, 'body { display: none }'))"),
        ("style-src-attr", "document.body.setAttribute('style', 'display: none')"),
        ("require-trusted-types-for", "document.body.append(add('b', {onclick: 'document.title = 1'}, ''))"),
        ("connect-src", "fetch('http://localhost:1/health')"),
        ("img-src", "document.body.append(add('img', {src: '/picture.png'}, ''))"),
        (
            "form-action",
            "document.getElementById('asks-form').onsubmit = null; document.querySelector('form').submit()",
        ),
    ],
)
def test_the_policy_stops_what_a_mistake_would_let_in(
    chromium: Chromium, served: Served, directive: str, attempt: str
) -> None:
    page = chromium.open(served.page)
    page.wait_for("document.getElementById('state').innerText === 'absent'")
    assert page.problems == []
    add = """const add = (tag, attributes, text) => {
        const node = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
        node.append(text);
        return node;
    };"""
    page.evaluate(f"(() => {{ {add} {attempt}; }})()", may_throw=True)
    wait_until(lambda: page.evaluate("1") == 1 and f"console: ['policy: {directive}']" in page.problems, 10)
    assert page.evaluate("document.title") == "PlanPatch"
    assert page.evaluate("document.body.checkVisibility()")


def test_it_cannot_be_framed(chromium: Chromium, served: Served) -> None:
    page = chromium.open(f"{served.listener.address.url}/health")
    page.evaluate(f"document.body.append(Object.assign(document.createElement('iframe'), {{src: '{served.page}'}}))")
    page.wait_for("document.querySelector('iframe').contentDocument === null", 10)
    assert any("frame" in problem.lower() for problem in page.problems)


def test_a_wrong_token_is_told_and_the_right_one_can_be_pasted(chromium: Chromium, served: Served) -> None:
    served.apply()
    page = chromium.open(f"{served.page}#wrong")
    page.wait_for(says("#asks", "The token is not that of the running server"))
    assert not page.evaluate(is_shown("#ledger"))
    assert page.evaluate("sessionStorage.length") == 0
    page.click("#asks-token")
    page.type("wröng ☠")
    page.press("Enter")
    page.wait_for(says("#asks", "The token is not that of the running server"))
    page.click("#asks-token")
    page.type(served.service.token)
    page.press("Enter")
    page.wait_for(is_in_entry(INTENT))
    assert not page.evaluate(is_shown("#asks"))
    assert page.evaluate("document.getElementById('asks-token').value") == ""


def test_a_server_that_is_gone_is_told_and_found_again(chromium: Chromium, served: Served) -> None:
    served.apply()
    page = chromium.open(served.page_with_token)
    page.wait_for(is_in_entry(INTENT))
    port = served.listener.address.port
    served.stop()
    page.wait_for(is_shown("#gone"))
    assert "The server has not answered since" in page.text("#gone")
    assert page.text("#state") == "no answer"
    assert INTENT in page.text("#ledger")
    served.start(port)
    page.wait_for(f"!{is_shown('#gone')}")
    page.wait_for(says("#asks", "started anew"))  # another run has another token
    page.evaluate(f"location.hash = {json.dumps(served.service.token)}")
    page.wait_for(is_in_entry(INTENT))
    assert page.evaluate("location.href") == served.page


def test_another_program_at_its_address_is_told(chromium: Chromium, served: Served) -> None:
    page = chromium.open(served.page)
    page.wait_for("document.getElementById('state').innerText === 'absent'")
    port = served.listener.address.port
    served.stop()
    with socket.create_server(("127.0.0.1", port)) as other:
        other.settimeout(20)
        connection, _ = other.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
            page.wait_for(says("#health-told", "no JSON of PlanPatch"))
    assert page.text("#state") == "unknown"
    served.start(port)
    page.wait_for("document.getElementById('state').innerText === 'absent'")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "another workspace"
    folder.mkdir()
    return folder


def test_serve_opens_the_page_in_the_browser_that_rolls_back(
    chromium: Chromium, workspace: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = workspace / "seen.txt"
    browser = workspace / "browser"
    browser.write_text(f"#!{sys.executable}\nimport sys\nopen({str(seen)!r}, 'w').write(sys.argv[1])\n")
    browser.chmod(0o755)
    file = workspace / "greet.py"
    file.write_bytes(BASE)
    with Ledger(home / "ledger.sqlite3") as ledger:
        patch_id = ledger.propose(proposal(file, INTENT))
        ledger.apply(patch_id)
        with serving("--open", "--json", cwd=workspace, BROWSER=str(browser)) as (said, server):
            wait_until(lambda: seen.exists() and "#" in seen.read_text())
            url, _, token = seen.read_text().partition("#")
            assert url == f"{said['url']}/status"
            assert token == json.loads((home / "runtime.json").read_text())["token"]
            assert set(said) == {"url", "host", "port", "root"}
            page = chromium.open(f"{url}#{token}")
            page.wait_for(is_shown(ROLL_BACK))
            page.click(ROLL_BACK)
            page.click("#ask-yes")
            page.wait_for(is_in_entry("rolled back"))
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=60)
            page.wait_for(is_shown("#gone"))
        assert file.read_bytes() == BASE
        assert ledger.get(patch_id).state is State.ROLLED_BACK
    assert token not in out + err + json.dumps(said)
    assert page.problems and all("ERR_CONNECTION_REFUSED" in problem for problem in page.problems)


@pytest.mark.parametrize("browser", ["", "w3m", "a-browser-that-is-not-there"])
def test_where_no_browser_can_be_opened_it_says_where_the_page_is(workspace: Path, home: Path, browser: str) -> None:
    nothing = workspace / "nothing"
    nothing.mkdir()
    with serving("--open", "--json", cwd=workspace, BROWSER=browser, PATH=str(nothing), DISPLAY="") as (said, server):
        lines: list[str] = []
        assert server.stderr is not None
        while not any("no browser" in line for line in lines):
            lines.append(server.stderr.readline())
            assert lines[-1], lines
        token = json.loads((home / "runtime.json").read_text())["token"]
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    told = next(line for line in lines if "no browser" in line)
    assert f"{said['url']}/status," in told
    assert str(home / "runtime.json") in told
    assert token not in "".join(lines) + out + err


class serving:
    """`planpatch serve` on a free port, with what it said as JSON; ended at the end."""

    def __init__(self, *arguments: str, cwd: Path, **environment: str) -> None:
        options = ("serve", "--port", "0", "--model", MODEL, "--device", "cpu", *arguments)
        self._server = start(*options, cwd=cwd, **environment)

    def __enter__(self) -> tuple[dict[str, Any], Any]:
        text = ""
        assert self._server.stdout is not None
        while not text.endswith("}\n"):
            line = self._server.stdout.readline()
            assert line, text
            text += line
        return json.loads(text), self._server

    def __exit__(self, *_: object) -> None:
        if self._server.poll() is None:
            self._server.kill()
        self._server.communicate()


def wait_until(is_so: Callable[[], bool], limit_s: float = 60) -> None:
    until = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)
