"""A running server takes the adapter that was chosen elsewhere, within a second, without loading its model again.

Not covered: an adapter whose files are replaced in place. Versions are folders of their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from engine.errors import PlanPatchError
from lsp_server.model_host import ModelHost
from lsp_server.session import Session

_LOOK_EVERY_S = 0.5


class AdapterFollower:
    """Watches the file of choices, on a thread of its own.

    Args:
        host: The model's host.
        session_of: The session as the settings are now.
        tell: Told in a sentence what was taken or cannot be; the second argument says which.
    """

    def __init__(self, host: ModelHost, session_of: Callable[[], Session], tell: Callable[[str, bool], None]) -> None:
        self._host = host
        self._session_of = session_of
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="planpatch-adapter", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        seen: object = None
        while not self._stop.wait(_LOOK_EVERY_S):
            seen = self._look(seen)

    def _look(self, seen: object) -> object:
        """What was seen now. The engine is not held between two looks: its memory may be asked for."""
        engine = self._host.engine_or_none
        now = (id(engine), self._stamp())
        if engine is None or now == seen:
            return seen
        try:
            local = self._host.local_or_none
            folder = self._session_of().adapter(None if local is None else local.hub_id)
            name = str(folder) if folder else None
            if name != engine.status().adapter:
                engine.use_adapter(name)
                self._tell(f"the adapter {folder.name} is used from now on" if folder else _WITHOUT, True)
        except PlanPatchError as error:
            self._tell(f"the adapter stays as it is: {error.message}", False)
        return now  # also where it failed: that is told once

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs once the file was written anew; None where there is none."""
        try:
            status = os.stat(self._session_of().paths.adapter_choice)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


_WITHOUT = "no adapter is used from now on"
