"""`planpatch lsp` or `serve` with a scripted model in place of the real one, for tests of the process.

    python -I -X utf8 tests/scripted_server.py lsp [OPTIONS]

The file that SCRIPT names holds the model's next answer, or `FAIL`: then the device fails. `NOISE=20` has libraries
write to stdout in every way there is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import EngineError
from lsp_server import language_server, model_host, serve_command
from lsp_server.model_host import HostStatus
from tests.scripted_engine import ScriptedEngine


class ScriptedHost:
    """A model's host that is ready at once."""

    def __init__(self, on_change: Any) -> None:
        self._on_change = on_change
        self.status = HostStatus()
        self.engine_or_none: Any = None
        self.local_or_none: Any = None

    def start(self, session: Any, *, pull: bool = False) -> None:
        print("loads the model", session.settings.model, file=sys.stderr, flush=True)
        self.engine_or_none = ScriptedEngine(self._answer)
        self.status = HostStatus("ready", "scripted")
        threading.Thread(target=self._on_change, args=(self.status,), daemon=True).start()
        if os.environ.get("NOISE"):
            threading.Thread(target=make_noise, daemon=True).start()

    def _answer(self, prompt: str) -> str:
        text = Path(os.environ["SCRIPT"]).read_text(encoding="utf-8")
        if text == "FAIL":
            self.engine_or_none.fail("The device failed: CUDA error: an illegal memory access was encountered")
            raise EngineError("The device failed")
        return text

    def wait(self, is_cancelled: Any) -> Any:
        while self.engine_or_none is None:
            time.sleep(0.01)
        return self.engine_or_none

    def close(self) -> None:
        pass


def make_noise() -> None:
    """What libraries do: print, write to descriptor 1, call C's puts, warn, and log as many MB as NOISE says."""
    print("Content-Length: 5\r\n\r\nhello")
    sys.stdout.flush()
    os.write(1, b"Content-Length: 5\r\n\r\nhello")
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    warnings.warn("a warning", stacklevel=1)
    logger = logging.getLogger("some.library")
    for _ in range(int(os.environ["NOISE"])):
        logger.error("x" * 1_000_000)


if __name__ == "__main__":
    model_host.ModelHost = ScriptedHost  # type: ignore[misc,assignment]
    language_server.ModelHost = ScriptedHost  # type: ignore[misc,assignment]
    serve_command.ModelHost = ScriptedHost  # type: ignore[misc,assignment]
    from lsp_server.cli import main

    sys.exit(main())
