"""`planpatch lsp` over stdio in a process of its own, with an engine that writes what a test says.

    python scripted_server.py '{"plan": "- use low", "patch": "def f():\\n    return 1"}'

Everything but the model is real. A PLAN is answered with `plan`, a PATCH with `patch`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.protocol import Engine
from lsp_server import language_server
from lsp_server.model_host import HostStatus
from lsp_server.session import Session
from tests.scripted_engine import ScriptedEngine

_ONLY_IN_PLAN = "Say in one short sentence"


class ScriptedHost:
    """A model's host whose model is there at once."""

    def __init__(self, on_change: Callable[[HostStatus], None]) -> None:
        texts = json.loads(sys.argv[1])
        self._on_change = on_change
        self._engine = ScriptedEngine(lambda prompt: texts["plan" if _ONLY_IN_PLAN in prompt else "patch"])
        self.status = HostStatus()

    @property
    def engine_or_none(self) -> Engine | None:
        return self._engine if self.status.state == "ready" else None

    def start(self, session: Session, *, pull: bool = False) -> None:
        for state in ("loading", "ready"):
            self.status = HostStatus(state, "scripted", state)
            self._on_change(self.status)

    def wait(self, is_cancelled: threading.Event) -> Engine:
        return self._engine

    def close(self) -> None:
        self._engine.close()


if __name__ == "__main__":
    language_server.ModelHost = ScriptedHost  # type: ignore[misc, assignment]
    sys.exit(language_server.serve_stdio(os.environ, {}))
