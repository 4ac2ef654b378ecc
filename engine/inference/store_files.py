"""Files of the model store: digests, manifests, the check of a model folder, moves that a crash cannot tear.

A digest is trusted while a file's size and modification time stay the same; somebody who changes a file and sets its
time back is not caught.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import ModelError, WriteError

MANIFEST = "planpatch-model.json"
_MANIFEST_FORMAT = 1
_CHUNK_BYTES = 1 << 20
_PROGRESS_EVERY_BYTES = 8 << 20
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
_RENAME_ATTEMPTS = 20
_WINDOWS = sys.platform == "win32"
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is.

    Args:
        stage: What is being done; `wait` while another process pulls the same model.
        done: Units done.
        total: Units in all, 0 while unknown.
        unit: What is counted.
        message: A sentence for the user.
    """

    stage: Literal["download", "verify", "convert", "wait"]
    done: int
    total: int
    unit: str
    message: str


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and digest of a file of a model."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `planpatch-model.json` in a model's folder says.

    Args:
        name: Name in the store.
        digest: sha256 that names the weights.
        licence: SPDX id, or what the hub says.
        hub_id: Hub id, empty for files of the user.
        revision: Commit on the hub, empty if none.
        source: `local`, `hub`, `pypi` or `gguf`.
        files: Size and sha256 of each file, by name.
    """

    name: str
    digest: str
    licence: str
    hub_id: str
    revision: str
    source: str
    files: Mapping[str, FileRecord]

    @property
    def bytes(self) -> int:
        """Disk space of all files."""
        return sum(record.bytes for record in self.files.values())


class DigestCache:
    """Remembers sha256 digests by path, size and modification time, in one small JSON file.

    Several processes may write it: the last one wins, and a lost entry is computed again. A store that cannot be
    written works without it.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def sha256(self, path: Path, progress: ProgressCallback | None = None) -> str:
        """Digest of a file, computed only if it changed.

        Args:
            path: The file.
            progress: Told while the file is read.

        Returns:
            sha256 in hexadecimal.

        Raises:
            ModelError: The file cannot be read.
        """
        known = self._read().get(str(path))
        stamp = file_stamp(path)
        if known is not None and known[:2] == stamp:
            return known[2]
        digest = file_sha256(path, progress)
        self.remember({path: digest})
        return digest

    def remember(self, digests: Mapping[Path, str]) -> None:
        """Note digests that are known to be right now.

        Args:
            digests: sha256 by file.
        """
        entries = {path: entry for path, entry in self._read().items() if os.path.exists(path)}
        entries.update({str(path): [*file_stamp(path), digest] for path, digest in digests.items()})
        with contextlib.suppress(WriteError, OSError):  # only time is lost
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(entries, indent=0))

    def _read(self) -> dict[str, list[Any]]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}


def file_stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds, which change when a file does.

    Args:
        path: The file.

    Returns:
        The two numbers.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="Check the file and its permissions."
        ) from error
    return [facts.st_size, facts.st_mtime_ns]


def file_sha256(path: Path, progress: ProgressCallback | None = None) -> str:
    """Digest of a file.

    Args:
        path: The file.
        progress: Told while the file is read.

    Returns:
        sha256 in hexadecimal.

    Raises:
        ModelError: The file cannot be read.
    """
    digest = hashlib.sha256()
    done = reported = 0
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None and done - reported >= _PROGRESS_EVERY_BYTES:
                    reported = done
                    progress(Progress("verify", done, total, "bytes", f"Checking {path.name}"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="Check the file and its permissions."
        ) from error
    return digest.hexdigest()


def weights_digest(sha256_by_name: Mapping[str, str]) -> str:
    """One digest that names the weights of a folder.

    Args:
        sha256_by_name: sha256 of each safetensors file.

    Returns:
        sha256 over the files' names and digests.
    """
    lines = "".join(f"{name} {sha256_by_name[name]}\n" for name in sorted(sha256_by_name))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a model folder's manifest.

    Args:
        folder: The folder.

    Returns:
        The manifest.

    Raises:
        ModelError: It is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("format") != _MANIFEST_FORMAT:
            raise ValueError("it was written by another version of PlanPatch")
        files = {name: FileRecord(**record) for name, record in facts.pop("files").items()}
        return Manifest(**facts, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a model folder's manifest; it is the last file written.

    Args:
        folder: The folder.
        manifest: What to write.

    Raises:
        WriteError: The folder cannot be written.
    """
    write_atomically(folder / MANIFEST, json.dumps({"format": _MANIFEST_FORMAT, **asdict(manifest)}, indent=1))


def check_files(folder: Path, manifest: Manifest, digest: Callable[[Path], str] | None) -> None:
    """Check a folder against its manifest.

    Args:
        folder: The folder.
        manifest: What its files should be.
        digest: Gives a file's sha256; None to check sizes only.

    Raises:
        ModelError: A file is missing or not what it was.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        size = path.stat().st_size
        if size != record.bytes:
            raise ModelError(f"{path} has {size} bytes and should have {record.bytes}")
        if digest is not None and (actual := digest(path)) != record.sha256:
            raise ModelError(f"{path} has the sha256 {actual} and should have {record.sha256}")


def check_model_folder(folder: Path) -> list[Path]:
    """Check that a folder holds a whole model that loads without running code of its own.

    Args:
        folder: The folder.

    Returns:
        Its safetensors files.

    Raises:
        ModelError: A file is missing or truncated, or the weights are pickles.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no complete model: {name} is missing")
    files = _safetensors_files(folder)
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when loaded",
                hint="Use a model with safetensors files or a GGUF file.",
            )
        raise ModelError(f"{folder} is no complete model: there is no safetensors file")
    for path in files:
        safetensors_header(path)
    return files


def safetensors_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file and check that the file is as long as it says.

    Args:
        path: The file.

    Returns:
        By tensor name: `dtype`, `shape` and `data_offsets`.

    Raises:
        ModelError: The file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((facts["data_offsets"][1] for facts in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if end != size:
        raise ModelError(f"{path} is damaged: it has {size} bytes and should have {end}")
    return header


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} is no complete model: {', '.join(missing)} is missing")
    return [folder / name for name in names]


def check_disk(folder: Path, needed_bytes: int, free_bytes: Callable[[Path], int], what: str) -> None:
    """Refuse what does not fit on the disk.

    Args:
        folder: Where it will be written; it need not exist yet.
        needed_bytes: Space it takes.
        free_bytes: Free space of the file system that holds a path.
        what: What is to be written.

    Raises:
        ModelError: There is too little room; names both numbers.
    """
    free = free_bytes(nearest_existing(folder))
    if free < needed_bytes:
        raise ModelError(
            f"{what} needs {gigabytes(needed_bytes)} of disk space at {folder}, and {gigabytes(free)} are free",
            hint="Free some space, or set PLANPATCH_HOME to a folder on another disk.",
            needed_bytes=needed_bytes,
            free_bytes=free,
        )


def disk_free_bytes(folder: Path) -> int:
    """Free space for this user on the file system of `folder`.

    Args:
        folder: An existing folder.

    Returns:
        Bytes.
    """
    return shutil.disk_usage(folder).free


def nearest_existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists.

    Args:
        path: Any path.

    Returns:
        A path that exists.
    """
    return next(folder for folder in (path, *path.parents) if folder.exists())


def gigabytes(number: int) -> str:
    """A size for people.

    Args:
        number: Bytes.

    Returns:
        `1.2 GB` or `98 MB`.
    """
    return f"{number / 1e9:.1f} GB" if number >= 10**9 else f"{number / 1e6:.0f} MB"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing `path` into a `WriteError` that names it.

    Args:
        path: What is being written.

    Yields:
        Nothing.

    Raises:
        WriteError: The disk is full, or the place is read-only or locked.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> WriteError:
    """The error for a file or folder that cannot be written.

    Args:
        path: The file or folder.
        error: What the operating system said.

    Returns:
        The error, with a hint that fits.
    """
    if error.errno in DISK_FULL:
        return WriteError(
            f"The disk is full: {path} cannot be written",
            hint="Free some space, or set PLANPATCH_HOME to a folder on another disk.",
        )
    return WriteError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="Check its permissions and whether another program holds it, or set PLANPATCH_HOME to another folder.",
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old text or the new.

    Args:
        path: The file.
        text: Its new text.

    Raises:
        WriteError: It cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """`os.replace`, tried again for two seconds while Windows holds a file (a virus scanner, an indexer).

    Args:
        source: What to rename.
        target: Its new name.

    Raises:
        OSError: It did not work.
    """
    for attempt in range(_RENAME_ATTEMPTS):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _WINDOWS or attempt == _RENAME_ATTEMPTS - 1:
                raise
            time.sleep(0.1)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a complete folder to its place; an old one there is moved aside first and then deleted.

    Args:
        folder: The complete new folder, on the same file system.
        target: Its place.

    Raises:
        WriteError: The place cannot be written, or a program holds the old folder open.
    """
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    with writing(target):
        if target.exists():
            rename(target, aside)
        rename(folder, target)
        sync_folder(target.parent)
    delete_folder(aside)


def sync_file(path: Path) -> None:
    """Make a file's content last over a power cut.

    Args:
        path: The file.

    Raises:
        WriteError: The disk does not take it.
    """
    with writing(path), path.open("rb+" if _WINDOWS else "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last over a power cut, where the platform can.

    Args:
        folder: The folder.
    """
    if _WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_folder(folder: Path) -> None:
    """Delete a folder that nobody needs; what is still held open stays for the next time.

    Args:
        folder: The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Disk space of all files under a folder, which may change meanwhile.

    Args:
        folder: The folder.

    Returns:
        Bytes; 0 if it does not exist.
    """
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
