"""A running server takes the adapter that was chosen elsewhere, within a second, without loading its model again.

Where the model could not be loaded, which may be the adapter's fault, each choice has it loaded once more.

Not covered: an adapter whose files are replaced in place while a model runs with it. Versions are folders of their own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.errors import PlanPatchError
from engine.inference.protocol import Engine
from lsp_server.model_host import ModelHost
from lsp_server.session import Session

_LOOK_EVERY_S = 0.5

log = logging.getLogger("planpatch.adapter")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look found: the engine, the setting, and what differs once the file of choices was written anew."""

    engine: int
    setting: str
    stamp: tuple[int, int, int] | None


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
        """Begin to watch; called before the host's `start`, so that no choice is missed."""
        self._seen = self._now(None)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            try:
                self._seen = self._look(self._seen)
            except Exception:  # it has to be there for the next choice
                log.exception("the chosen adapter could not be looked at")

    def _look(self, seen: _Seen) -> _Seen:
        """What was seen now. The engine is not held between two looks: its memory may be asked for.

        While a model loads, what was seen before stands: a choice that came meanwhile may have come too late for it.
        """
        engine = self._host.engine_or_none
        now = self._now(engine)
        if engine is None:
            is_chosen = (now.setting, now.stamp) != (seen.setting, seen.stamp)
            return now if is_chosen and self._host.retry(self._session_of()) else seen
        if (now.engine, now.stamp) == (seen.engine, seen.stamp):
            return replace(seen, setting=now.setting)
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

    def _now(self, engine: Engine | None) -> _Seen:
        session = self._session_of()
        try:
            status = os.stat(session.paths.adapter_choice)
        except OSError:
            return _Seen(id(engine), session.settings.adapter, None)
        return _Seen(id(engine), session.settings.adapter, (status.st_mtime_ns, status.st_size, status.st_ino))


_WITHOUT = "no adapter is used from now on"
