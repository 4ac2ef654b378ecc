"""Which adapter the user chose with `planpatch adapters use`, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from engine.errors import AdapterError, UsageError
from engine.inference.adapters import BASE
from engine.patching.disk import write_atomically

AUTO = "auto"  # what ships for the model
_MAX_HISTORY = 50


class AdapterChoice:
    """The choices made so far, newest last, in a small JSON file.

    Args:
        path: The file; need not exist.

    Raises:
        AdapterError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            history: object = content.get("history", [])
            if not isinstance(history, list):
                raise ValueError("`history` is not a list")
            self._history = [str(item) for item in cast("list[object]", history)]
        except (OSError, ValueError, AttributeError) as fault:
            raise AdapterError(
                f"{path} cannot be read: {fault}", hint="Delete it to use the default adapter."
            ) from fault

    @property
    def is_made(self) -> bool:
        """Whether the user chose, and not `auto` last."""
        return bool(self._history) and self._history[-1] != AUTO

    @property
    def current(self) -> Path | None:
        """The chosen folder, None for the base model.

        Raises:
            AdapterError: It does not exist any more.
        """
        if not self._history or self._history[-1] in (BASE, AUTO):
            return None
        folder = Path(self._history[-1])
        if not folder.is_dir():
            raise AdapterError(
                f"The adapter folder {folder}, chosen with planpatch adapters use, does not exist any more",
                hint="planpatch adapters rollback, or planpatch adapters use __none__",
            )
        return folder

    def use(self, folder: Path | str | None) -> None:
        """Choose a folder, None for the base model.

        Args:
            folder: Absolute path, or `auto` for what is used where nothing is chosen.

        Raises:
            WriteError: The choice cannot be kept.
        """
        self._save([*self._history, BASE if folder is None else str(folder)][-_MAX_HISTORY:])

    def renew(self) -> None:
        """Write the same choices anew, which servers whose model could not be loaded take as a reason to try again.

        Raises:
            WriteError: They cannot be kept.
        """
        self._save(self._history)

    def rollback(self) -> None:
        """Go back to the choice before the last one.

        Raises:
            UsageError: There was none.
            WriteError: The choice cannot be kept.
        """
        if not self._history:
            raise UsageError("No adapter was ever chosen", hint="planpatch adapters use FOLDER")
        self._save(self._history[:-1])

    def _save(self, history: list[str]) -> None:
        self._history = history
        text = json.dumps({"history": history}, indent=2) + "\n"
        write_atomically(self._path, text.encode("utf-8"), expected_sha256=None, private=True)
