"""The suite in vscode-extension/test/inhost: inside real VS Code's extension host, with the packed extension, the real
server and the real 0.5B.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import EXTENSION, Start
from tests.editors.vscode import Installed

SUITE = EXTENSION / "test" / "inhost" / "run.cjs"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run_suite(
    start_code: Start,
    unpacked: Path,
    vscode_installed: Installed,
    workspace: Path,
    model_folder_05b: Path,
    record_figure: Callable[..., None],
) -> Run:
    """Runs files of the suite; returns the figures that they told."""

    def run(*files: str, limit_s: float, apply: str = "direct", **wanted: Any) -> dict[str, Any]:
        options = {"mocha": str(vscode_installed.mocha), "files": files, "workspace": str(workspace), **wanted}
        payload = {
            "extensionDevelopmentPath": f"vscode-remote:{unpacked}",
            "extensionTestsPath": f"vscode-remote:{SUITE}",
            "skipWelcome": "true",
        }
        environment = {"PLANPATCH_INHOST": json.dumps(options), "PLANPATCH_APPLY": apply}
        with start_code(environment, payload=payload) as code:
            ran = code.run_suite(limit_s)
            print(ran.output)
            own_ms = float(re.findall(r"activated in ([\d.]+) ms", code.log_of("PlanPatch"))[0])
            record_figure("vscode: activation's own code", own_ms, "ms")
            assert own_ms < 1000  # generous: the figure is what counts, and the machine may be busy
            assert ran.code == 0 and re.search(r"[1-9]\d* passed, 0 failed", ran.output), ran.output
        figures: dict[str, Any] = {}
        for line in re.findall(r"^figures (.*)$", ran.output, re.MULTILINE):
            figures |= json.loads(line)
        for name, value in figures.items():
            record_figure(f"vscode in-host: {name}", value)
        return figures

    return run


@pytest.mark.slow
def test_activation_is_quick_and_no_patch_lands_on_text_it_was_not_made_for(run_suite: Run, long_run: bool) -> None:
    sequences, seed = (200, random.randrange(2**31)) if long_run else (10, 1)
    print(f"seed {seed}")
    told = run_suite("activation.cjs", "never_wrong.cjs", limit_s=60 + 60 * sequences, seed=seed, sequences=sequences)
    assert told["landed"] + told["kept_out"] + told["refused"] + told["cancelled"] == sequences
    assert told["landed"] and told["kept_out"]
