"""The installed `planpatch` command in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def first_error_line(self) -> str:
        """The first line on stderr that is no progress."""
        lines = [line for line in self.err.splitlines() if line and not line.startswith("Checking ")]
        return lines[0] if lines else ""


def installed_launcher() -> Path:
    """The `planpatch` command of the environment that runs the tests."""
    launcher = Path(sys.executable).parent / ("planpatch.cmd" if os.name == "nt" else "planpatch")
    assert launcher.exists(), f"{launcher} is missing: PlanPatch is not installed here; use `python run.py test`"
    return launcher


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command; its process is the leader of a group of its own, so that it can be interrupted alone."""
    return subprocess.Popen(
        [str(installed_launcher()), *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=os.name != "nt",
    )


def planpatch(*arguments: str, cwd: Path, **environment: str) -> Said:
    """Run the command to its end; whatever it does, it never shows a traceback."""
    with start(*arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate()
    said = Said(process.returncode, out, err)
    assert "Traceback" not in out + err, err
    return said


def count_bits(text: str, number: int) -> int:
    """What `bitcount`, as it stands in `text`, says of a number; a patch may be written in more than one way."""
    names: dict[str, Any] = {}
    exec(compile(text, "<patched>", "exec"), names)
    return names["bitcount"](number)
