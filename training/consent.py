"""Whether what a user keeps may be learnt from: the user's switch, and the workspaces that opted out.

The switch is a file that remembers when it was turned, so that what happened while it was off stays out for ever. A
workspace can only opt out, by `training_log = false` in its pyproject.toml; any pyproject.toml above the file counts.

Not covered: a workspace that was deleted before its edits were journaled, unless it had opted out when they were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from engine.errors import LedgerError
from engine.patching.disk import write_atomically
from engine.patching.ledger_records import iso_utc


class LogSwitch:
    """The user's switch, on until it is turned off.

    Args:
        file: `training/log.json`.
        clock: Tells the time; for tests.
    """

    def __init__(self, file: Path, *, clock: Callable[[], datetime] | None = None) -> None:
        self._file = file
        self._clock = clock or (lambda: datetime.now(timezone.utc))

    @property
    def is_on(self) -> bool:
        """Whether it is on now.

        Raises:
            LedgerError: The file is damaged.
        """
        return self.was_on("9999")

    def was_on(self, at: str) -> bool:
        """Whether it was on at a time.

        Args:
            at: UTC in ISO 8601.

        Returns:
            Whether it was.

        Raises:
            LedgerError: The file is damaged.
        """
        turns = [turn for turn in self._turns() if turn["at"] <= at]
        return turns[-1]["on"] if turns else True

    def turn(self, on: bool) -> None:
        """Turn it.

        Args:
            on: Whether edits are to be kept from now on.

        Raises:
            LedgerError: The file is damaged.
            WriteError: It cannot be written.
        """
        turns = self._turns()
        if self.is_on is on:
            return
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = json.dumps({"turns": [*turns, {"at": iso_utc(self._clock()), "on": on}]}, indent=1)
        write_atomically(self._file, data.encode("ascii"), expected_sha256=None, private=True)

    def _turns(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            turns = cast("list[dict[str, Any]]", found["turns"])
            if all(isinstance(turn["at"], str) and isinstance(turn["on"], bool) for turn in turns):
                return turns
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise LedgerError(
            f"{self._file} is damaged, so it is not known whether edits may be kept; none are.",
            hint="Remove the file, and turn the log on or off: planpatch train log on|off.",
            path=str(self._file),
        )


@dataclass(frozen=True, slots=True)
class Consent:
    """What may be learnt from.

    Args:
        switch: The user's switch.
        is_allowed: The user's setting `training_log`.
        opted_out: Why a file's workspace is left out; empty if it is not.
    """

    switch: LogSwitch
    is_allowed: bool = True
    opted_out: Callable[[Path], str] = field(default=lambda _: "")

    def refusal(self, path: Path | None, settings: Mapping[str, Any], times: Sequence[str]) -> str:
        """Why an edit is not to be learnt from.

        Args:
            path: Its file; None for code that was pasted.
            settings: What the ledger has of the settings when it was made.
            times: When it was made and kept; UTC in ISO 8601.

        Returns:
            `log_off`, `setting_off` or `opted_out`; empty if it may be.

        Raises:
            LedgerError: The switch cannot be read.
        """
        if not all(self.switch.was_on(time) for time in times):
            return "log_off"
        if not self.is_allowed:
            return "setting_off"
        if settings.get("training_log") is False or (path is not None and self.opted_out(path)):
            return "opted_out"
        return ""
