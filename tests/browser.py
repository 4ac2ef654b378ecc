"""A browser for tests: Chromium without a display, driven over the pipe that `--remote-debugging-pipe` opens.

    with Chromium(program, tmp_path) as browser:
        page = browser.open("http://127.0.0.1:8765/status")
        page.wait_for("document.title === 'PlanPatch'")
        page.click("button")
        assert page.problems == []

The pipe carries the DevTools protocol: JSON objects, each ended by a NUL byte, on the file descriptors 3 and 4. It
needs no port and no websocket, and Chromium ends when it is closed. Linux alone; used from one thread.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_S = 60.0
_LAUNCH = """
import fcntl, os, sys
reading, writing = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # the tests may run as root, in a container; the page is our own
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-sync",
    "--lang=en-GB",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
_TELL_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) => console.error("policy: " + event.effectiveDirective));
"""
_KEYS = {
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
    " ": 32,
    "Backspace": 8,
    "Delete": 46,
    ".": 190,
    "/": 191,
    ";": 186,
    "[": 219,
    "]": 221,
}
_KEYS |= {name: 33 + number for number, name in enumerate(("PageUp", "PageDown", "End", "Home"))}
_KEYS |= {f"Arrow{name}": 37 + number for number, name in enumerate(("Left", "Up", "Right", "Down"))}
_KEYS |= {f"F{number}": 111 + number for number in range(1, 13)} | {
    letter: ord(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
}
_CODES = {" ": "Space", ".": "Period", "/": "Slash", ";": "Semicolon", "[": "BracketLeft", "]": "BracketRight"}
_MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}


class Chromium:
    """See the module's docstring.

    Args:
        program: Chromium.
        folder: Where its profile and its log are kept.
    """

    def __init__(self, program: str, folder: Path) -> None:
        to_read, self._writing = os.pipe()
        self._reading, to_write = os.pipe()
        profile = folder / "chromium"
        profile.mkdir()
        flags = [*_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LAUNCH, str(to_read), str(to_write), program, *flags],
                pass_fds=(to_read, to_write),
                env={**os.environ, "HOME": str(profile), "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(to_read)
        os.close(to_write)
        self._log = folder / "chromium.log"
        self._held = b""
        self._number = 0
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._writing)
        os.close(self._reading)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, url: str, *, width: int = 1000, height: int = 900, script: str = "") -> Page:
        """A new tab at an address; what goes wrong from its first request on is noted.

        Args:
            url: The address.
            width: Of the page.
            height: Of the page.
            script: JavaScript that runs before the page's own.

        Returns:
            The tab.
        """
        target = self.command("Target.createTarget", {"url": "about:blank", "newWindow": True})
        attached = self.command("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            page.command(f"{domain}.enable")
        page.command("Page.addScriptToEvaluateOnNewDocument", {"source": _TELL_VIOLATIONS + script})
        page.look(width=width, height=height)
        page.go(url)
        return page

    def close_pages(self) -> None:
        """Close every tab that was opened, with what it stored for its time."""
        while self._pages:
            _, page = self._pages.popitem()
            page.command("Page.close")

    def command(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        """Do something and return what it gives; events that come meanwhile go to their pages."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + LIMIT_S
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                if "navigated or closed" in str(answer.get("error")):
                    raise PageLeft(f"{method}: {answer['error']}")
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None and "method" in answer:
                page.note(answer["method"], answer["params"])

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            poll = select.poll()  # select() takes no descriptor above 1023
            poll.register(self._reading, select.POLLIN)
            ready = poll.poll(1000 * max(0.0, until - time.monotonic()))
            more = os.read(self._reading, 1 << 20) if ready else b""
            assert more, f"Chromium {'ended' if ready else 'does not answer'}\n{self._log.read_text()[-3000:]}"
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


class PageLeft(AssertionError):
    """A page was left, for another or for itself anew, while it was asked something."""


class Page:
    """A tab.

    `problems` holds errors and warnings of its console, uncaught exceptions, failed loads, and violations of its
    policy, in words; `requests` the address of each request.
    """

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def command(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        return self._browser.command(method, parameters or {}, self._session)

    def note(self, method: str, facts: dict[str, Any]) -> None:
        """Take an event in."""
        match method:
            case "Runtime.consoleAPICalled" if facts["type"] in ("error", "warning", "assert"):
                self.problems.append(f"console: {[argument.get('value') for argument in facts['args']]}")
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {facts['exceptionDetails']}")
            case "Log.entryAdded" if facts["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{facts['entry']['source']}: {facts['entry']['text']}")
            case "Audits.issueAdded":
                self.problems.append(f"issue: {facts['issue']}")
            case "Network.requestWillBeSent":
                self.requests.append(facts["request"]["url"])
            case _:
                pass

    def go(self, url: str) -> None:
        """Navigate, and wait until the page is loaded."""
        told = self.command("Page.navigate", {"url": url})
        assert not told.get("errorText"), told
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str, *, may_throw: bool = False) -> Any:
        """The value of an expression of JavaScript, under the page's policy; a promise is awaited."""
        wanted = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        wanted |= {"allowUnsafeEvalBlockedByCSP": False}
        told = self.command("Runtime.evaluate", wanted)
        assert may_throw or "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str, limit_s: float = LIMIT_S) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + limit_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < until, f"not within {limit_s:g} s: {expression}\n{self.text()}\n{self.problems}"
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """What a person reads in an element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does: what covers it gets the click."""
        where = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView({{block:"
            " 'center'}); const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2, box.width]; })()"
        )
        assert where[2], f"{selector} is not shown"
        for kind in ("mousePressed", "mouseReleased"):
            facts = {"type": kind, "x": where[0], "y": where[1], "button": "left", "clickCount": 1}
            self.command("Input.dispatchMouseEvent", facts)

    def press(self, chord: str) -> None:
        """Press and release a key, with others held down or without: `Enter`, `Control+Alt+P`, a space."""
        *held, key = chord.split("+")
        modifiers = sum(_MODIFIERS[name] for name in held)
        code = _CODES.get(key) or (
            f"Key{key}" if key.isalpha() and len(key) == 1 else f"Digit{key}" if key.isdigit() else key
        )
        facts = {"key": key.lower() if len(key) == 1 and "Shift" not in held else key, "code": code}
        facts |= {"windowsVirtualKeyCode": _KEYS[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key) if not modifiers & ~_MODIFIERS["Shift"] else None
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.command("Input.dispatchKeyEvent", {**facts, **down})
        self.command("Input.dispatchKeyEvent", {**facts, "type": "keyUp"})

    def type_keys(self, text: str) -> None:
        """Type a text key by key, so that what listens to keys, as an editor does, hears each."""
        for letter in text:
            if letter == "\n":
                self.press("Enter")
                continue
            known = letter.upper() in _KEYS and letter.isalnum()
            facts = {"key": letter, "windowsVirtualKeyCode": _KEYS[letter.upper()] if known else 0}
            self.command("Input.dispatchKeyEvent", {**facts, "type": "keyDown", "text": letter})
            self.command("Input.dispatchKeyEvent", {**facts, "type": "keyUp"})

    def type(self, text: str) -> None:
        """Put text where the focus is."""
        self.command("Input.insertText", {"text": text})

    def look(self, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        """Give the window a size, and the system a dark or a light look."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        wanted = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        told = self.command("Page.captureScreenshot", wanted)
        path.write_bytes(base64.b64decode(told["data"]))
        return path
