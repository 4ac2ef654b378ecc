"""Real Neovim, set up as docs/editors/neovim.md says, with the real server and the real 0.5B.

What the user does is in tests/editors/lua/, a script for each test; what the file and the ledger have become is looked at
here as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import installed_launcher, planpatch
from tests.editors.neovim import run_lua

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = (ROOT / "docs" / "editors" / "neovim.md").read_text(encoding="utf-8")
MODEL = "qwen2.5-coder-0.5b-instruct"
CLAMP = '''"""Numbers."""


def clamp(x, low, high):
    if x < low:
        return high
    return min(x, high)
'''
Script = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "a workspace"
    found.mkdir()
    return found


@pytest.fixture
def script(home: Path, folder: Path, tmp_path: Path, model_folder_05b: Path) -> Script:
    """Runs one script in the workspace; returns what it printed."""
    snippets = tmp_path / "guide"
    snippets.mkdir()
    for name, text in re.findall(r"<!-- ([\w-]+) -->\n```lua\n(.*?)```", GUIDE, re.DOTALL):
        (snippets / f"{name}.lua").write_text(text, encoding="utf-8")
    environment = {
        "PATH": f"{installed_launcher().parent}{os.pathsep}{os.environ['PATH']}",
        "PLANPATCH_MODEL": MODEL,
        "PLANPATCH_DEVICE": "cpu",
        "PLANPATCH_PLAN_MAX_TIME_CPU_S": "3600",  # a busy machine is no fault of what is tested here
        "PLANPATCH_PATCH_MAX_TIME_CPU_S": "3600",
    }

    def run(name: str) -> str:
        ran = run_lua(name, str(snippets), cwd=folder, environment=environment)
        print(ran.output)
        assert ran.code == 0 and "all ok" in ran.output, ran.output
        return ran.output

    return run


def write(file: Path, text: str) -> bytes:
    file.write_bytes(text.encode("utf-8"))
    return file.read_bytes()


def ledger(folder: Path) -> list[dict[str, Any]]:
    return planpatch("ledger", "list", "--json", cwd=folder).json


@pytest.mark.slow
def test_a_plan_is_edited_patched_applied_saved_and_rolled_back_after_a_restart(script: Script, folder: Path) -> None:
    file = folder / "clamp.py"
    write(file, CLAMP)
    script("plan_and_apply")
    print(file.read_text(), ledger(folder))
