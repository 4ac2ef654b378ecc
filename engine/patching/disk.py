"""Writing a file so that every reader finds the old bytes or the new ones, whole.

The new bytes go to a temporary file in the same folder, are flushed, and take the old file's place in one rename.
Symbolic links are followed and kept; mode bits are kept, the owner where the system allows it.

A process that is killed may leave its temporary file behind. It is named `.planpatch-….tmp` and is locked while its
writer lives (on Windows it is open, which locks it), so that the next write in the folder can remove it safely.

A hard link cannot be kept this way: the name that was written gets a file of its own, and the other names keep the old
bytes. Writing in place would keep the link and could leave half a file, so the caller is told how many names there are.

Not covered: a writer that changes the file in the microseconds between the last look at its bytes and the rename;
access control lists, extended attributes and creation times; a filesystem whose rename is not atomic.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from engine.errors import PathError, StaleTextError, WriteError

_TEMP_NAME = re.compile(r"\.planpatch-[0-9a-f]{16}\.tmp")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_FOLDER_CANNOT_BE_FLUSHED = frozenset({errno.EINVAL, getattr(errno, "ENOTSUP", errno.EINVAL), errno.EBADF})
_IS_WINDOWS = sys.platform == "win32"
_REPLACE_RETRY_DELAYS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8) if _IS_WINDOWS else ()
_MAX_TEMP_FILES = 3

Replace = Callable[[Path, Path], None]


def sha256_hex(data: bytes) -> str:
    """Hex digest of `data`.

    Args:
        data: Any bytes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path) -> bytes:
    """All bytes of a file.

    Args:
        path: The file; symbolic links are followed.

    Returns:
        Its bytes.

    Raises:
        PathError: Missing, a folder, or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathError(
            f"{path} cannot be read: {_reason(error)}.", hint="Check the path and its permissions.", path=str(path)
        ) from error


def write_atomically(path: Path, data: bytes, *, expected_sha256: str | None, private: bool = False) -> int:
    """Replace the whole file, or nothing.

    Args:
        path: The file; symbolic links are followed and kept.
        data: Its new bytes.
        expected_sha256: Digest that the file's bytes must have right before they are replaced; None writes whatever
            is there, also a new file.
        private: Whether only its owner may read it, whatever its mode was.

    Returns:
        Number of other names (hard links) that the file had; they keep the old bytes.

    Raises:
        StaleTextError: The file is gone or its bytes are others than expected.
        WriteError: Full disk, read-only or missing folder, read-only or locked file, or not a regular file.
    """
    target = _resolved(path)
    status = _status_to_keep(target, expected_sha256)
    remove_leftovers(target.parent)
    with _errors_named(target):
        for attempt in range(_MAX_TEMP_FILES):
            try:
                _write_and_replace(target, data, status, expected_sha256, private=private)
                break
            except _TempFileLost:
                # Another process's clean-up saw the file in the moment before it was locked.
                if attempt == _MAX_TEMP_FILES - 1:
                    raise WriteError(
                        f"{target} was not written: its temporary file kept disappearing.",
                        hint="Something removes .planpatch-*.tmp files from that folder; stop it and try again.",
                        path=str(target),
                    ) from None
    return 0 if status is None else max(0, status.st_nlink - 1)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files whose writer was killed.

    Args:
        folder: Where to look; its subfolders are left alone.

    Returns:
        The files removed. One that cannot be removed, or whose writer lives, stays.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _TEMP_NAME.fullmatch(entry.name)]
    except OSError:  # the write that follows says what is wrong with the folder
        return []
    return [folder / name for name in names if _remove_if_abandoned(folder / name)]


class _TempFileLost(Exception):
    """The temporary file was removed by somebody else."""


def _resolved(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise WriteError(f"{path} cannot be written: {error}.", hint="Check the path.", path=str(path)) from error


def _status_to_keep(target: Path, expected_sha256: str | None) -> os.stat_result | None:
    """The status of the file to be replaced; None for a new file."""
    try:
        status = target.stat()
    except FileNotFoundError:
        if expected_sha256 is not None:
            raise _gone(target) from None
        return None
    except OSError as error:
        raise _write_error(target, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise WriteError(f"{target} is not a regular file.", hint="Name a file.", path=str(target))
    # A file without write bits was made read-only on purpose; the rename alone would not notice, nor would root.
    if not status.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise WriteError(f"{target} is read-only.", hint="Make the file writable and try again.", path=str(target))
    return status


def _write_and_replace(
    target: Path, data: bytes, status: os.stat_result | None, expected_sha256: str | None, *, private: bool
) -> None:
    with _locked_temp_file(target.parent, status, private=private) as (temp, file):
        _write_all(file, data)
        os.fsync(file.fileno())
        if _IS_WINDOWS:  # an open file cannot be renamed there
            file.close()
        replace_checked(temp, target, expected_sha256)
    _flush_folder(target)


@contextmanager
def _locked_temp_file(
    folder: Path, status: os.stat_result | None, *, private: bool = False
) -> Generator[tuple[Path, FileIO], None, None]:
    temp = folder / f".planpatch-{secrets.token_hex(8)}.tmp"
    mode = 0o600 if private else 0o666 if status is None else stat.S_IMODE(status.st_mode) & 0o777
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = FileIO(os.open(temp, flags, mode), "wb")
    try:
        _lock(file.fileno())
        _keep_owner_and_mode(file.fileno(), status, private=private)
        yield temp, file
    finally:
        if _IS_WINDOWS:  # an open file cannot be removed there
            file.close()
        _remove_if_present(temp)
        file.close()


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # a clean-up looks at the file now and will remove it
        raise _TempFileLost from None
    except OSError as error:  # without locks a clean-up leaves every temporary file alone
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _keep_owner_and_mode(descriptor: int, status: os.stat_result | None, *, private: bool) -> None:
    if sys.platform == "win32" or status is None:
        return
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
        try:
            os.fchown(descriptor, status.st_uid, status.st_gid)
        except PermissionError:  # only root gives files away; the content matters more
            pass
    os.fchmod(descriptor, 0o600 if private else stat.S_IMODE(status.st_mode))


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def replace_checked(
    temp: Path,
    target: Path,
    expected_sha256: str | None,
    *,
    replace: Replace = os.replace,
    retry_delays_s: tuple[float, ...] = _REPLACE_RETRY_DELAYS_S,
) -> None:
    """Rename `temp` over `target` if the target's bytes are still the expected ones.

    On Windows a virus scanner or an editor holds a file open for moments, so a refusal is tried again; the bytes are
    looked at before every try.

    Args:
        temp: The new file.
        target: The file to be replaced.
        expected_sha256: Digest that the target's bytes must have; None for any, also no file.
        replace: `os.replace`, or what a test puts in its place.
        retry_delays_s: Seconds before each further try.

    Raises:
        StaleTextError: The target is gone or its bytes are others than expected.
        PermissionError: The target stayed locked.
    """
    for delay_s in (*retry_delays_s, None):
        _check_unchanged(target, expected_sha256)
        try:
            replace(temp, target)
            return
        except FileNotFoundError:
            if temp.exists() or not target.parent.exists():
                raise
            raise _TempFileLost from None
        except PermissionError:
            if delay_s is None:
                raise
            time.sleep(delay_s)


def _check_unchanged(target: Path, expected_sha256: str | None) -> None:
    if expected_sha256 is None:
        return
    try:
        found = sha256_hex(target.read_bytes())
    except FileNotFoundError:
        raise _gone(target) from None
    if found != expected_sha256:
        raise StaleTextError(
            f"{target} changed: its text is not the text that this patch was made for.",
            hint="Save or undo your edits and ask for the patch again.",
            path=str(target),
            expected_sha256=expected_sha256,
            found_sha256=found,
        )


def _gone(target: Path) -> StaleTextError:
    return StaleTextError(
        f"{target} does not exist any more.", hint="Restore the file, or ask for a new patch.", path=str(target)
    )


def _flush_folder(target: Path) -> None:
    """Make the rename survive a power failure."""
    if sys.platform == "win32":
        return
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_CANNOT_BE_FLUSHED:
            raise WriteError(
                f"{target} was written, but its folder could not be flushed to the disk: {_reason(error)}.",
                hint="Check the disk; after a power failure the old text may be back.",
                path=str(target),
            ) from error
    finally:
        os.close(descriptor)


def _remove_if_abandoned(temp: Path) -> bool:
    if sys.platform == "win32":
        return _remove_if_present(temp)  # fails while its writer has it open
    import fcntl

    try:
        descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_if_present(temp)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _remove_if_present(temp: Path) -> bool:
    try:
        temp.unlink()
        return True
    except OSError:  # renamed into place, or held open on Windows: the next write removes it
        return False


@contextmanager
def _errors_named(target: Path) -> Generator[None, None, None]:
    """Turn what the system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise _write_error(target, error) from error


def _write_error(target: Path, error: OSError) -> WriteError:
    folder = target.parent
    if error.errno in _DISK_FULL:
        return WriteError(
            f"{target} was not written: the disk or quota of {folder} is full.",
            hint="Free some space and try again; the file is as it was.",
            path=str(target),
        )
    if not folder.is_dir():
        return WriteError(
            f"{target} was not written: the folder {folder} does not exist.",
            hint="Create the folder, or check the path.",
            path=str(target),
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return WriteError(
            f"{target} was not written: the file or its folder {folder} is read-only or locked ({_reason(error)}).",
            hint="Make both writable, or close the program that holds the file, and try again.",
            path=str(target),
        )
    return WriteError(
        f"{target} was not written: {_reason(error)}.", hint="The file is as it was; try again.", path=str(target)
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
