"""VS Code as a user has it: its window in a browser, its extension host with what is installed, keys and clicks.

    with VSCode(installed, chromium, tmp_path, workspace, environment) as code:
        code.open("clamp.py")
        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for_text(".notification-toast", "planned")

What is on the screen is looked for by CSS class and text, and only what is visible counts. Linux alone, one thread.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from tests.browser import Chromium, Page, PageLeft
from tests.editors.vscode import Installed

LIMIT_S = 60.0
SETTINGS: dict[str, Any] = {
    "chat.disableAIFeatures": True,
    "editor.accessibilitySupport": "off",
    "editor.minimap.enabled": False,
    "extensions.autoCheckUpdates": False,
    "extensions.autoUpdate": False,
    "extensions.ignoreRecommendations": True,
    "files.autoSave": "off",
    "files.simpleDialog.enable": True,
    "git.enabled": False,
    "remote.autoForwardPorts": False,
    "telemetry.telemetryLevel": "off",
    "update.mode": "none",
    "workbench.enableExperiments": False,
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "workbench.startupEditor": "none",
}
_FIND = """
(selector, text) => [...document.querySelectorAll(selector)].filter((node) => {
    const box = node.getBoundingClientRect();
    const said = (node.innerText + " " + (node.getAttribute("aria-label") ?? "")).replaceAll("\\u00a0", " ");
    return box.width > 0 && box.height > 0 && said.includes(text) &&
        node.checkVisibility({opacityProperty: true, visibilityProperty: true});
})
"""
# VS Code's window calls these for a suite in its extension host; elsewhere nobody does.
_KEEP_WHAT_A_SUITE_SAYS = """
window.saidBySuite = [];
window.codeAutomationLog = (kind, told) => {
    const said = told.map(String).join(" ");
    if (said.startsWith("suite: ")) window.saidBySuite.push(said.slice("suite: ".length));
};
window.codeAutomationExit = (code) => { window.codeOfSuite = code; };
"""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Ran:
    """How a suite inside the extension host ended, and what it printed."""

    code: int
    output: str


class VSCode:
    """See the module's docstring.

    Args:
        installed: Where VS Code is.
        chromium: The browser that shows its window.
        folder: Where profile, extensions, logs and pictures of failures are kept.
        workspace: The folder that is opened.
        environment: More environment for the extension host and the servers that it starts.
        settings: The user's settings, besides `SETTINGS`.
        payload: What VS Code's window is told besides, for a suite inside its extension host.
        asks_trust: Whether it asks if the workspace is trusted; else every workspace is.
    """

    def __init__(
        self,
        installed: Installed,
        chromium: str,
        folder: Path,
        workspace: Path,
        environment: Mapping[str, str],
        *,
        settings: Mapping[str, Any] | None = None,
        payload: Mapping[str, str] | None = None,
        asks_trust: bool = False,
        size: tuple[int, int] = (1280, 800),
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._installed = installed
        self._chromium = chromium
        self._workspace = workspace
        self._environment = environment
        self._payload = payload or {}
        self._asks_trust = asks_trust
        self._size = size
        self.set(settings or {})
        self._number = 0

    def __enter__(self) -> VSCode:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.picture(self.folder / "failed.png")
            print(f"VS Code's window when it failed: {self.folder / 'failed.png'}\n{self.page.text()[:4000]}")
            print(f"{self.log_of('PlanPatch')[-4000:]}\n{self.log_of('remoteexthost')[-1000:]}")
        self.stop()

    def set(self, settings: Mapping[str, Any]) -> None:
        """Have these settings, besides `SETTINGS`; a VS Code that runs takes them in."""
        own = {name: value for name, value in settings.items() if name.startswith("planpatch.")}
        trust = {"security.workspace.trust.enabled": self._asks_trust}
        others = {name: value for name, value in settings.items() if name not in own}
        for scope, table in (("User", {**SETTINGS, **trust, **others}), ("Machine", own)):  # our own are the machine's
            file = self.folder / "user" / scope / "settings.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(table, indent=1), encoding="utf-8")

    # --- its processes -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server and open the window."""
        self._number += 1
        self._port = _free_port()
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(exist_ok=True)
        with (self.folder / f"server-{self._number}.log").open("wb") as log:
            self._server = subprocess.Popen(
                [*self._command(), "--host", "127.0.0.1", "--port", str(self._port), "--without-connection-token"],
                env=self._server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, "VS Code's server does not answer")
        profile = self.folder / f"browser-{self._number}"
        profile.mkdir()
        self._browser = Chromium(self._chromium, profile)
        self.page = self._show()

    def _show(self) -> Page:
        """Open a window on the workspace; the file tree in it is shown."""
        scheme = f"vscode-remote://127.0.0.1:{self._port}"
        payload = json.dumps([[name, value.replace("vscode-remote:", scheme)] for name, value in self._payload.items()])
        url = f"http://127.0.0.1:{self._port}/?folder={quote(str(self._workspace))}&payload={quote(payload)}"
        width, height = self._size
        self.page = page = self._browser.open(url, width=width, height=height, script=_KEEP_WHAT_A_SUITE_SAYS)
        page.command("Emulation.setFocusEmulationEnabled", {"enabled": True})  # messages wait for a window in focus
        if "extensionTestsPath" not in self._payload:
            self.wait_for(".explorer-folders-view .monaco-list-row")
        return page

    def run_suite(self, limit_s: float) -> Ran:
        """Wait for the suite that the payload named.

        Args:
            limit_s: Ends a suite that hangs.

        Returns:
            Its exit code, 0 if it passed, and what it printed.
        """
        wait_until(lambda: self.page.evaluate("window.codeOfSuite !== undefined"), "the suite has no end", limit_s)
        said = "\n".join(self.page.evaluate("window.saidBySuite"))
        return Ran(self.page.evaluate("window.codeOfSuite"), said)

    def stop(self) -> None:
        """End the window, the server, its extension hosts and what these started."""
        self._browser.__exit__()
        if self._server.poll() is None:
            self._server.terminate()
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        try:
            os.killpg(self._server.pid, signal.SIGKILL)  # an extension host outlives its server by seconds
        except ProcessLookupError:
            pass

    def reload(self) -> None:
        """Load the window anew; a new extension host starts."""
        self.page.go(self.page.evaluate("location.href"))
        self.wait_for(".explorer-folders-view .monaco-list-row")

    def install(self, vsix: Path) -> None:
        """Install an extension from its file, as `code --install-extension` does."""
        command = [*self._command(), "--install-extension", str(vsix)]
        done = subprocess.run(
            command,
            env=self._server_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "successfully installed" in done.stdout, done.stdout + done.stderr

    def _command(self) -> list[str]:
        user, extensions = self.folder / "user", self.folder / "extensions"
        return [
            *(str(self._installed.node), str(self._installed.server)),
            *("--accept-server-license-terms", "--telemetry-level", "off"),
            *([] if self._asks_trust else ["--disable-workspace-trust"]),
            *("--server-data-dir", str(self.folder / "server"), "--user-data-dir", str(user)),
            *("--extensions-dir", str(extensions)),
            *(["--enable-smoke-test-driver"] if "extensionTestsPath" in self._payload else []),  # it shows no messages
        ]

    def _server_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VSCODE_", "npm_"))}
        own = {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "EXTENSIONS_GALLERY": '{"serviceUrl":""}',  # no marketplace is asked
            "VSCODE_CLI": "1",  # else the extension host's environment is a login shell's
        }
        return {**kept, **own, **self._environment}

    def _answers(self) -> bool:
        assert self._server.poll() is None, (self.folder / f"server-{self._number}.log").read_text()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/version")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @property
    def process_id(self) -> int:
        """Of the server, whose descendants the extension host and the language servers are."""
        return self._server.pid

    # --- what is seen ------------------------------------------------------------------------------------------------

    def texts(self, selector: str, text: str = "") -> list[str]:
        """What the visible elements of a class that hold a text say, in order."""
        found = f"({_FIND})({json.dumps(selector)}, {json.dumps(text)})"
        said = "(node.innerText || node.getAttribute('aria-label') || '')"
        return self.page.evaluate(f"{found}.map((node) => {said}.replaceAll('\\u00a0', ' ').trim())")

    def sees(self, selector: str, text: str = "") -> bool:
        """Whether such an element is visible."""
        return bool(self.texts(selector, text))

    def wait_for(self, selector: str, text: str = "", limit_s: float = LIMIT_S) -> str:
        """Wait until such an element is visible, and return what it says; the window may reload meanwhile."""

        def look() -> list[str]:
            try:
                return self.texts(selector, text)
            except PageLeft:
                return []

        return wait_until(look, f"no {selector} {text!r}", limit_s)[0]

    def wait_until_gone(self, selector: str, text: str = "", limit_s: float = LIMIT_S) -> None:
        """Wait until no such element is visible."""
        wait_until(lambda: not self.sees(selector, text), f"still {selector} {text!r}", limit_s)

    def editor_text(self, editor: str = ".editor-group-container.active .editor-instance") -> str:
        """The lines of the editor that are on the screen, as they are read from top to bottom."""
        lines = f"[...document.querySelectorAll({json.dumps(editor + ' .view-line')})]"
        placed = f"{lines}.map((line) => [parseFloat(line.style.top), line.textContent])"
        rows = sorted(self.page.evaluate(placed))
        return "\n".join(row[1] for row in rows).replace("\u00a0", " ").replace("\u00b7", " ")

    def wait_for_editor(self, holds: Callable[[str], bool] | str, limit_s: float = LIMIT_S) -> str:
        """Wait until the text of the editor holds something, and return it."""
        check = (lambda text: holds in text) if isinstance(holds, str) else holds

        def looked() -> str:
            text = self.editor_text()
            return text if check(text) else ""

        return wait_until(looked, f"the editor lacks {holds!r}", limit_s)

    def picture(self, path: Path) -> Path:
        """The window as a PNG, once what slides in has come to rest."""
        time.sleep(0.5)
        told = self.page.command("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(told["data"]))
        return path

    def log_of(self, name: str) -> str:
        """What was logged under a name: `remoteexthost` is the extension host, `PlanPatch` the extension's own."""
        logs = sorted(self.folder.glob(f"[us]*/**/*{name}.log"))
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)

    def wait_for_extensions(self) -> None:
        """Wait until the extension host has started what starts with it."""
        wait_until(lambda: "Eager extensions activated" in self.log_of("remoteexthost"), "no extension host")

    # --- what a user does --------------------------------------------------------------------------------------------

    def press(self, *chords: str) -> None:
        """Press keys, one chord after the other: `Control+Alt+P`."""
        for chord in chords:
            self.page.press(chord)

    def type(self, text: str) -> None:
        """Type where the focus is."""
        self.page.type_keys(text)

    def click(self, selector: str, text: str = "", *, button: str = "left") -> None:
        """Wait for the first such element, and until it has come to rest, and click in its middle."""
        self.wait_for(selector, text)
        found = f"({_FIND})({json.dumps(selector)}, {json.dumps(text)})[0]"

        def middle() -> list[float] | None:
            return self.page.evaluate(
                f"(() => {{ const node = {found}; if (!node) return null; node.scrollIntoViewIfNeeded();"
                " const box = node.getBoundingClientRect();"
                " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )

        def at_rest() -> list[float] | None:
            before = middle()
            time.sleep(0.1)  # messages slide in
            return before if before == middle() else None

        box = wait_until(at_rest, f"{selector} {text!r} went away")
        assert box
        self.page.command("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": box[0], "y": box[1]})
        for kind in ("mousePressed", "mouseReleased"):
            facts = {"type": kind, "x": box[0], "y": box[1], "button": button, "clickCount": 1}
            self.page.command("Input.dispatchMouseEvent", facts)

    def open(self, name: str) -> None:
        """Open a file of the workspace by its name."""
        self.press("Control+P")
        self.fill(name)
        self.click(".quick-input-list .monaco-list-row", name)
        self.wait_for(".tab.active", name)
        self.wait_for(".editor-instance .view-lines")
        self.wait_until_gone(".quick-input-widget")

    def run(self, title: str, *, tries: int = 20) -> None:
        """Run a command from the palette; it is opened again until an extension has told of the command."""
        row = ".quick-input-list .monaco-list-row"
        for left in reversed(range(tries)):
            self.press("F1")
            self.fill(f">{title}")
            try:
                self.wait_for(row, title, 2)
                break
            except AssertionError:
                if left == 0:
                    raise
                self.press("Escape")
        self.click(row, title)

    def answer(self, text: str, *, among: bool = False) -> None:
        """Fill in the input box that is open, or choose the entry of a list, and press Enter."""
        self.fill(text)
        if among:
            self.click(".quick-input-list .monaco-list-row", text)
        else:
            self.press("Enter")

    def fill(self, text: str) -> None:
        """Write into the input box that is open, in place of what it holds."""
        self.wait_for(".quick-input-widget .quick-input-box input")
        wait_until(
            lambda: self.page.evaluate("document.activeElement?.closest('.quick-input-widget') !== null"), "no focus"
        )
        self.press("Control+A")
        self.page.type(text)

    def go_to(self, line: int, column: int = 1) -> None:
        """Put the cursor somewhere."""
        self.press("Control+G")
        self.fill(f":{line}:{column}")
        self.press("Enter")
        self.wait_for(".statusbar-item", f"Ln {line}, Col {column}")
        self.wait_until_gone(".quick-input-widget")

    def choose_code_action(self, title: str, *, tries: int = 10, then: Callable[[], object] | None = None) -> None:
        """Open the lightbulb's menu at the cursor, and choose an entry; the menu is opened again until it is there."""
        entry = ".action-widget .monaco-list-row"
        for left in reversed(range(tries)):
            self.press("Control+.")
            try:
                self.wait_for(entry, title, 3)
                break
            except AssertionError:
                if left == 0:
                    raise
                self.press("Escape")
        if then is not None:
            then()
        self.click(entry, title)


def wait_until(look: Callable[[], _Value], what: str, limit_s: float = LIMIT_S) -> _Value:
    """Look until there is something to see.

    Args:
        look: What it returns counts when it is true.
        what: Said when nothing comes.
        limit_s: How long to look.

    Returns:
        What was seen.
    """
    until = time.monotonic() + limit_s
    while True:
        value = look()
        if value:
            return value
        assert time.monotonic() < until, f"{what} within {limit_s:g} s"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
