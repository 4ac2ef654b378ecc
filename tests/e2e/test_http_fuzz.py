"""Schemathesis over the OpenAPI document, against the real 0.5B: nothing but documented refusals, and no hang."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.install import HERE, PYTHON, missing
from tests.conftest import LONG, TEST_HOME
from tests.http_server import MODEL, call, serve_05b

pytestmark = pytest.mark.slow

NUM_CASES = 5000 if LONG else 150
TIME_LIMIT_S = 3000 if LONG else 240


def test_no_request_makes_the_server_fail(
    tmp_path: Path, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    reason = missing()
    if reason and os.environ.get("CI") != "true":
        pytest.skip(f"{reason}: python tests/clients/install.py")
    assert not reason
    with serve_05b(TEST_HOME, tmp_path, "--root", str(tmp_path)) as url:
        call(f"{url}/api/generate", {"model": MODEL})
        with_bodies = json.dumps(call(f"{url}/openapi.json")[1]["paths"]).count('"requestBody"')
        assert with_bodies >= 15, "the document says what is taken"
        token = json.loads((tmp_path / "planpatch home" / "runtime.json").read_text())["token"]
        operations = sum(len(found) for found in call(f"{url}/openapi.json")[1]["paths"].values())
        command = [
            *(str(PYTHON), "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--checks", "documented_faults_only"),
            *(
                "--header",
                f"Authorization: Bearer {token}",
                "--max-examples",
                str(NUM_CASES // operations * 5 // 4 + 1),
            ),
            *(
                "--phases",
                "examples,coverage,fuzzing",
                "--request-timeout",
                "60",
                "--workers",
                "1",  # ast.parse of Python 3.11 fails now and then in several threads, and schemathesis uses it
                "--seed",
                "20261126",
            ),
            *("--exclude-path", "/api/pull", "--no-color"),  # a catalogue's model would be fetched
        ]
        hooks = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=hooks,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        found = re.search(r"([\d,]+) generated", done.stdout)
        assert found is not None, done.stdout[-2000:]
        num_cases = int(found[1].replace(",", ""))
        record_figure("requests by schemathesis", num_cases, "")
        assert num_cases >= NUM_CASES
        assert call(f"{url}/health")[1]["status"] == "ok"
