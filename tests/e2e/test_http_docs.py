"""The examples of docs/http.md, executed as they stand: curl's by a shell, PowerShell's by what it would send."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TEST_HOME
from tests.http_server import call, serve_05b

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- http -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
ADDRESS = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_05b(TEST_HOME, tmp_path_factory.mktemp("serve")) as url:
        call(f"{url}/api/generate", {"model": "qwen2.5-coder-0.5b-instruct"})
        yield url


def is_good(path: str, answer: dict[str, Any]) -> bool:
    if path == "/plan":
        return answer["plan"]["steps"] != []
    if path == "/patch_smart":
        return answer["ok"] is True and answer["edits"][0]["pre"] == "def add(a,b): return a+b"
    text = answer["response"] if path == "/api/generate" else answer["message"]["content"]
    return bool(text.strip()) and answer["done"] is True


def test_the_page_has_the_examples() -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "powershell", "sh", "powershell"]


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="no curl or bash here")
@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "sh"])
def test_curls_examples(text: str, url: str, tmp_path: Path) -> None:
    lines = [line for line in text.replace(ADDRESS, url).splitlines() if line.strip()]
    for line in lines:  # one shell for each, as somebody would paste them
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        path = next(path for path in ("/patch_smart", "/plan", "/api/generate", "/api/chat") if f"{url}{path}" in line)
        answer = json.loads(done.stdout or (tmp_path / "plan.json").read_text(encoding="utf-8"))
        assert is_good(path, answer), answer


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "powershell"])
def test_powershells_examples(text: str, url: str) -> None:
    """Each here-string goes as UTF-8 bytes to the address below it; the hash table as ConvertTo-Json writes it."""
    plan: Any = None
    for part in text.replace(ADDRESS, url).split("$body = ")[1:]:
        found = re.search(
            r"-Uri (\S+) -ContentType '(application/json; charset=utf-8)' -Body \(\[Text.Encoding\]::UTF8", part
        )
        assert found is not None
        if part.startswith("@'\n"):
            body = json.loads(part[3 : part.index("\n'@\n")])
        else:
            table = re.search(r"@\{ plan = \$plan\.plan; feedback = @\{ hint = '(.*?)'; reason = '(.*?)' \} \}", part)
            assert table is not None and plan is not None
            body = {"plan": plan["plan"], "feedback": {"hint": table[1], "reason": table[2]}}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8")
        status, answer = call(found[1], data, {"Content-Type": found[2]})
        assert status == 200 and is_good(found[1].removeprefix(url), answer), answer
        plan = answer if found[1].endswith("/plan") else plan
