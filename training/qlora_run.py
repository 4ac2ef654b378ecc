"""Where a training run keeps itself: folders of versions, checkpoints, the manifest, and what is told of its progress.

    OUT/
        NAME-v1/              a finished adapter: adapter_config.json, adapter_model.safetensors, manifest.json,
                              losses.jsonl, loss.png
        .NAME-v2.partial/     a run that goes on or was cut off: run.json, progress.json, checkpoints/, adapter/

A finished adapter appears under its name by one rename, so a kill at any moment leaves it whole or absent. A checkpoint
counts once `complete.json` stands in it, which is written last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout

from engine.errors import EnvironmentFault, UsageError, WriteError
from engine.patching.disk import write_atomically

State = Literal["preparing", "training", "finishing", "done", "failed", "stopped"]

RUN, PROGRESS, MANIFEST, LOSSES, PLOT = "run.json", "progress.json", "manifest.json", "losses.jsonl", "loss.png"
COMPLETE = "complete.json"

_VERSION = re.compile(r"\.?(?P<name>[^.].*)-v(?P<version>\d+)(?P<partial>\.partial)?")
_LOCK = ".lock"
_WRITE_EVERY_S = 0.5


@dataclass(slots=True)
class Progress:
    """How far a run is, for people and programs.

    Args:
        state: What it does.
        run: Name and version.
        message: In words.
        step: Optimizer steps done.
        num_steps: All of them.
        loss: Of the last step, mean over answer tokens.
        tok_per_s: Tokens of rows in a second, all GPUs together.
        elapsed_s: Since this process began to train.
        left_s: Time left; None while it is not known.
        pid: Process that trains.
        started_at: When that process started, seconds since the epoch.
        updated_at: When this was written.
    """

    state: State = "preparing"
    run: str = ""
    message: str = ""
    step: int = 0
    num_steps: int = 0
    loss: float | None = None
    tok_per_s: float | None = None
    elapsed_s: float = 0.0
    left_s: float | None = None
    pid: int = field(default_factory=os.getpid)
    started_at: float = 0.0
    updated_at: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


@dataclass(slots=True)
class Run:
    """One version of an adapter, while it is made.

    Args:
        out: Folder of versions.
        name: The adapter's name.
        version: Its number.
        request: What the run was asked for: it can only be resumed with the same.
    """

    out: Path
    name: str
    version: int
    request: Mapping[str, Any]
    _lock: FileLock | None = None

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.name}-v{self.version}"

    @property
    def folder(self) -> Path:
        """Where it is made."""
        return self.out / f".{self.label}.partial"

    @property
    def finished(self) -> Path:
        """Where it will be."""
        return self.out / self.label

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where what becomes `finished` is put together."""
        return self.folder / "adapter"

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; what a kill left half written is removed."""
        found: list[tuple[int, Path]] = []
        for folder in self.checkpoints.glob("checkpoint-*") if self.checkpoints.is_dir() else ():
            if (folder / COMPLETE).is_file():
                found.append((int(folder.name.rpartition("-")[2]), folder))
            else:
                shutil.rmtree(folder)
        return max(found)[1] if found else None

    def close(self) -> None:
        """Let another process work at it."""
        if self._lock is not None:
            self._lock.release()


def open_run(out: Path, name: str, request: Mapping[str, Any], *, resume: bool = False, discard: bool = False) -> Run:
    """Begin a new version, or go on with the one that was cut off. Nobody else can work at it until it is closed.

    Args:
        out: Folder of versions.
        name: The adapter's name.
        request: What decides its losses: configuration, base, data.
        resume: Go on with the run that was cut off.
        discard: Delete that run and begin anew.

    Returns:
        The run, its folder made.

    Raises:
        UsageError: A run was cut off and neither is wanted, or there is none to resume, or it was another run.
        EnvironmentFault: Another process works at it.
        WriteError: The folder cannot be made.
    """
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        versions = _versions(out, name)
        cut_off = max((number for number, is_partial in versions if is_partial), default=None)
        if cut_off is None and resume:
            raise UsageError(f"There is no run of {name} to resume in {out}", hint="Leave --resume out.")
        version = cut_off if cut_off is not None else 1 + max((number for number, _ in versions), default=0)
        run = Run(out, name, version, request)
        run.folder.mkdir(mode=0o700, exist_ok=True)
        run._lock = _locked(run)  # pyright: ignore[reportPrivateUsage]
        if not discard and run.checkpoints.is_dir():
            _check_is_resumed(run, resume)
        if not resume:
            _clear(run.folder)
        write_json(run.folder / RUN, {"name": name, "version": version, **request})
    except OSError as fault:
        raise WriteError(
            f"The run cannot be kept in {out}: {fault.strerror or fault}", hint="Free disk space, or give --out."
        ) from fault
    return run


def _versions(out: Path, name: str) -> list[tuple[int, bool]]:
    """Numbers of versions, and whether each is unfinished; what a kill left beside a finished one is removed."""
    found: list[tuple[int, bool]] = []
    for path in out.iterdir():
        match = _VERSION.fullmatch(path.name)
        if match is None or match["name"] != name:
            continue
        if match["partial"] and (out / path.name[1:].removesuffix(".partial")).is_dir():
            shutil.rmtree(path)
            continue
        found.append((int(match["version"]), match["partial"] is not None))
    return found


def _locked(run: Run) -> FileLock:
    lock = FileLock(run.folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EnvironmentFault(
            f"Another process trains {run.label} now", hint="planpatch train status shows how far it is."
        ) from None
    return lock


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_is_resumed(run: Run, resume: bool) -> None:
    before = read_json(run.folder / RUN)
    differing = [key for key in run.request if before.get(key) != run.request[key]]
    if resume and not differing:
        return
    run.close()
    if not resume:
        raise UsageError(
            f"A run of {run.label} was cut off", hint="--resume goes on with it, --discard deletes it and begins anew."
        )
    raise UsageError(
        f"The run of {run.label} that was cut off had another {' and another '.join(differing)}",
        hint="Give the same configuration, model and data, or --discard to begin anew.",
        differing=differing,
    )


def publish(run: Run, manifest: Mapping[str, Any]) -> Path:
    """Give the adapter of a run that has ended its place, and remove what else the run kept.

    Args:
        run: Its adapter is whole.
        manifest: What is written of it.

    Returns:
        The adapter's folder.

    Raises:
        WriteError: It cannot be written.
    """
    write_json(run.adapter / MANIFEST, manifest)
    try:
        for path in run.adapter.iterdir():
            sync(path)
        os.replace(run.adapter, run.finished)
        run.close()
        shutil.rmtree(run.folder)
    except OSError as fault:
        raise WriteError(
            f"{run.finished} cannot be made: {fault.strerror or fault}", hint="The same command with --resume ends it."
        ) from fault
    return run.finished


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of ours.

    Args:
        path: The file.

    Returns:
        The object; empty if it is missing or damaged.
    """
    with suppress(OSError, ValueError):
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
    return {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all.

    Args:
        path: The file.
        value: The object.

    Raises:
        WriteError: It cannot be written.
    """
    data = (json.dumps(value, indent=1) + "\n").encode()
    write_atomically(path, data, expected_sha256=None, private=True)


def sync(path: Path) -> None:
    """Have a file on the disk, also over a power cut.

    Args:
        path: The file.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def mark_complete(checkpoint: Path) -> None:
    """Say that every file of a checkpoint is written and on the disk.

    Args:
        checkpoint: Its folder.
    """
    sizes: dict[str, int] = {}
    for path in sorted(checkpoint.iterdir()):
        sync(path)
        sizes[path.name] = path.stat().st_size
    write_json(checkpoint / COMPLETE, sizes)


# --- progress --------------------------------------------------------------------------------------------------------


class ProgressFile:
    """`progress.json` of a run: written anew as it goes, at most twice a second.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        import psutil

        self._path = run.folder / PROGRESS
        self._started_at = psutil.Process().create_time()
        self._written_at = 0.0

    def write(self, progress: Progress, *, now: bool = False) -> None:
        """Keep it, if the last writing was long enough ago.

        Args:
            progress: How far the run is.
            now: Write in any case.
        """
        if not now and time.monotonic() - self._written_at < _WRITE_EVERY_S:
            return
        self._written_at = time.monotonic()
        progress.started_at, progress.updated_at = self._started_at, time.time()
        write_json(self._path, progress.to_json())


def runs(out: Path) -> list[dict[str, Any]]:
    """All runs, finished or not, for `planpatch train status`.

    Args:
        out: Folder of versions.

    Returns:
        One object each: `run`, `state` (`running`, `cut off` or `done`), `folder`, and progress or manifest.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(out.iterdir(), key=_order) if out.is_dir() else ():
        match = _VERSION.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        label = f"{match['name']}-v{match['version']}"
        if match["partial"]:
            progress = read_json(path / PROGRESS)
            has_ended = progress.get("state") in ("done", "failed", "stopped")
            state = "running" if not has_ended and _lives(progress) else "cut off"
            found.append({"run": label, "state": state, "folder": str(path), "progress": progress})
        elif manifest := read_json(path / MANIFEST):
            found.append({"run": label, "state": "done", "folder": str(path), "manifest": manifest})
    return found


def _order(path: Path) -> tuple[str, int]:
    match = _VERSION.fullmatch(path.name)
    return (match["name"], int(match["version"])) if match else (path.name, 0)


def _lives(progress: Mapping[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(progress["pid"]))
        is_it = abs(process.create_time() - float(progress["started_at"])) < 2.0
        return is_it and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False
