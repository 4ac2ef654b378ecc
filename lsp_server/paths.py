"""Where PlanPatch keeps its state: nothing is ever looked for in a workspace or in the current folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from engine.errors import PathError, WriteError

_APPLICATION = "planpatch"


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders and files of one PLANPATCH_HOME.

    Args:
        home: Folder of all state; absolute.
        user_settings: The user's `planpatch.toml`; need not exist.
    """

    home: Path
    user_settings: Path

    @property
    def ledger(self) -> Path:
        """The SQLite ledger."""
        return self.home / "ledger.sqlite3"

    @property
    def retention_mark(self) -> Path:
        """An empty file whose time says when the ledger was last pruned."""
        return self.home / "ledger.pruned"

    @property
    def models(self) -> Path:
        """Pulled and converted models."""
        return self.home / "models"

    @property
    def plans(self) -> Path:
        """Plan documents and saved plans."""
        return self.home / "plans"

    @property
    def adapter_choice(self) -> Path:
        """Which adapter `planpatch adapters use` chose, and what was used before."""
        return self.home / "adapters.json"

    @property
    def runtime_file(self) -> Path:
        """Pid, port and token of a running server."""
        return self.home / "runtime.json"

    @property
    def kernel_tuning(self) -> Path:
        """Measured tile sizes of the CUDA kernels; `benchmarks/cuda_step.py --tune` measures them."""
        return self.home / "kernel-tuning.json"

    @property
    def servers(self) -> Path:
        """One small file for each running language server."""
        return self.home / "servers"

    @property
    def training(self) -> Path:
        """Everything that training reads and writes."""
        return self.home / "training"

    @property
    def success_logs(self) -> Path:
        """The journal of accepted edits."""
        return self.training / "success_logs"

    @property
    def training_data(self) -> Path:
        """Data sets made from the journal."""
        return self.training / "data"

    @property
    def qlora_out(self) -> Path:
        """Output of the training run."""
        return self.training / "qlora-out"

    @property
    def default_adapter(self) -> Path:
        """The adapter that is used if it exists and no other is asked for."""
        return self.qlora_out / "adapter"

    def resolve(self, text: str) -> Path:
        """The path that a setting names: `~` is the user's folder, a relative path stands under the home.

        Args:
            text: The setting's value.

        Returns:
            An absolute path; it need not exist.

        Raises:
            PathError: `~` names a user without a folder.
        """
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:  # ~somebody who is not there
            raise PathError(f"{text!r} names no path: {error}", hint="Write the path in full.") from error
        return path if path.is_absolute() else self.home / path


def find_paths(environ: Mapping[str, str]) -> Paths:
    """The paths that the environment names: PLANPATCH_HOME and PLANPATCH_CONFIG, else the platform's user folders.

    Args:
        environ: Environment variables.

    Returns:
        The paths; nothing is created.

    Raises:
        PathError: A variable holds a relative path.
    """
    home = _absolute(environ, "PLANPATCH_HOME")
    settings = _absolute(environ, "PLANPATCH_CONFIG")
    return Paths(
        home=home or platformdirs.user_data_path(_APPLICATION, appauthor=False),
        user_settings=settings or platformdirs.user_config_path(_APPLICATION, appauthor=False) / "planpatch.toml",
    )


def _absolute(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(
            f"{name} is {text!r}: {error}", hint=f"Set {name} to an absolute path.", variable=name
        ) from error
    if not path.is_absolute():
        raise PathError(
            f"{name} is {text!r}, a relative path; it would mean another place in every folder.",
            hint=f"Set {name} to an absolute path.",
            variable=name,
        )
    return path


def make_private_folder(path: Path) -> Path:
    """Make `path` and its missing parents readable by this user alone; a folder that exists keeps its permissions.

    On Windows permissions come from the parent, and the user's own folders are private already.

    Args:
        path: The folder.

    Returns:
        `path`.

    Raises:
        WriteError: It cannot be made, or a file is in its place.
    """
    missing = [path, *path.parents]
    missing = missing[: next((number for number, folder in enumerate(missing) if folder.exists()), len(missing))]
    try:
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chmod(folder, 0o700)  # mkdir's mode is cut by the umask
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is a file")
    except OSError as error:
        raise WriteError(
            f"The folder {path} cannot be made: {error.strerror or error}.",
            hint="Give this user write access there, free disk space, or set PLANPATCH_HOME to another folder.",
            path=str(path),
        ) from error
    return path
