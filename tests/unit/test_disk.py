"""A file is replaced whole or left alone, and whoever was killed leaves nothing behind for long."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import PathError, StaleTextError, WriteError
from engine.patching import disk
from engine.patching.disk import read_bytes, remove_leftovers, replace_checked, sha256_hex, write_atomically

OLD = "def f():\r\n\treturn '🐍'\x0c".encode()
NEW = "def f():\r\n\treturn '🦎'\x0c\r\n".encode()

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="mode bits, links and limits as POSIX has them")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "code 🐍.py"
    path.write_bytes(OLD)
    return path


def write(path: Path, data: bytes = NEW) -> None:
    write_atomically(path, data, expected_sha256=sha256_hex(OLD))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_bytes_take_the_place_of_the_old_ones(file: Path) -> None:
    write(file)
    assert file.read_bytes() == NEW
    assert names(file.parent) == ["code 🐍.py"]


def test_an_empty_file_can_be_written(file: Path) -> None:
    write(file, b"")
    assert file.read_bytes() == b""


def test_a_file_that_changed_is_left_alone(file: Path) -> None:
    file.write_bytes(OLD + b"# mine")
    with pytest.raises(StaleTextError, match=r"code 🐍\.py changed") as caught:
        write(file)
    assert caught.value.hint
    assert file.read_bytes() == OLD + b"# mine"
    assert names(file.parent) == ["code 🐍.py"]


def test_a_file_that_is_gone_is_not_made_again(file: Path) -> None:
    file.unlink()
    with pytest.raises(StaleTextError, match="does not exist any more"):
        write(file)
    assert names(file.parent) == []


def test_a_new_file_is_made_when_nothing_is_expected(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new.py", NEW, expected_sha256=None)
    assert (tmp_path / "new.py").read_bytes() == NEW


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"the folder .*nowhere does not exist") as caught:
        write_atomically(tmp_path / "nowhere" / "new.py", NEW, expected_sha256=None)
    assert caught.value.hint == "Create the folder, or check the path."


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="is not a regular file"):
        write_atomically(tmp_path, NEW, expected_sha256=None)


def test_a_missing_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"gone\.py cannot be read: No such file"):
        read_bytes(tmp_path / "gone.py")


@posix_only
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o664])
def test_mode_bits_are_kept(file: Path, mode: int) -> None:
    file.chmod(mode)
    write(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_is_kept(file: Path) -> None:
    os.chown(file, 65534, 65533)
    write(file)
    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65533)


@posix_only
def test_a_symbolic_link_is_followed_and_kept(file: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.py"
    link.symlink_to(Path("..") / file.name)
    write(link)
    assert link.is_symlink()
    assert file.read_bytes() == NEW
    assert names(link.parent) == ["link.py"]


@posix_only
@pytest.mark.parametrize("num_other_names", [0, 1, 2])
def test_other_names_of_the_file_keep_the_old_bytes_and_are_counted(
    file: Path, tmp_path: Path, num_other_names: int
) -> None:
    others = [tmp_path / f"other {number}.py" for number in range(num_other_names)]
    for other in others:
        other.hardlink_to(file)
    assert write_atomically(file, NEW, expected_sha256=sha256_hex(OLD)) == num_other_names
    assert file.read_bytes() == NEW
    assert [other.read_bytes() for other in others] == [OLD] * num_other_names
    assert write_atomically(file, OLD, expected_sha256=sha256_hex(NEW)) == 0


@posix_only
def test_a_private_file_is_closed_to_others_whatever_its_mode_was(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for data in (OLD, NEW):
        assert write_atomically(path, data, expected_sha256=None, private=True) == 0
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (data, 0o600)
        path.chmod(0o644)


@posix_only
def test_a_loop_of_links_is_an_error_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(WriteError, match="was not written"):
        write_atomically(tmp_path / "a", NEW, expected_sha256=None)


@posix_only
def test_a_read_only_file_is_respected_even_by_root(file: Path) -> None:
    file.chmod(0o444)
    with pytest.raises(WriteError, match=r"code 🐍\.py is read-only"):
        write(file)
    assert file.read_bytes() == OLD


@contextmanager
def unprivileged() -> Generator[None, None, None]:
    """Root ignores permissions; for the length of a test it becomes somebody who does not."""
    if sys.platform == "win32" or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="planpatch-test-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@posix_only
def test_a_read_only_folder_is_named_and_nothing_changes(open_folder: Path) -> None:
    file = open_folder / "code.py"
    file.write_bytes(OLD)
    file.chmod(0o666)
    open_folder.chmod(0o555)
    with unprivileged(), pytest.raises(WriteError, match="read-only or locked") as caught:
        write(file)
    assert str(open_folder) in caught.value.message
    assert "writable" in caught.value.hint
    assert file.read_bytes() == OLD
    assert names(open_folder) == ["code.py"]


@posix_only
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(file: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WriteError, match="is full") as caught:
            write(file, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space" in caught.value.hint
    assert file.read_bytes() == OLD
    assert names(file.parent) == ["code 🐍.py"]


def abandoned(folder: Path) -> Path:
    temp = folder / ".planpatch-0123456789abcdef.tmp"
    temp.write_bytes(b"half a fi")
    return temp


def test_a_temporary_file_of_a_killed_process_is_removed_by_the_next_write(file: Path) -> None:
    abandoned(file.parent)
    write(file)
    assert names(file.parent) == ["code 🐍.py"]


def test_files_that_only_look_alike_are_left_alone(tmp_path: Path) -> None:
    others = [".planpatch-notes.tmp", ".planpatch-0123456789abcdef.tmp.bak", "planpatch-0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).write_text("mine")
    temp = abandoned(tmp_path)
    assert remove_leftovers(tmp_path) == [temp]
    assert names(tmp_path) == sorted(others)
    assert remove_leftovers(tmp_path / "nowhere") == []


LOCK_AND_WAIT = """
import os, sys
from pathlib import Path
from engine.patching import disk
with disk._locked_temp_file(Path(sys.argv[1]), None) as (temp, file):
    print(temp.name, flush=True)
    sys.stdin.read()
"""


def test_the_temporary_file_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    root = Path(disk.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_AND_WAIT, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        name = writer.stdout.readline().strip()
        assert remove_leftovers(tmp_path) == []
        assert names(tmp_path) == [name]
        writer.kill()
    assert remove_leftovers(tmp_path) == [tmp_path / name]


def failing(
    times: int, error: OSError, done: Callable[[Path, Path], None] = os.replace
) -> tuple[list[Path], disk.Replace]:
    """A rename that fails a few times, as it does on Windows while a virus scanner has the file open."""
    calls: list[Path] = []

    def replace(temp: Path, target: Path) -> None:
        calls.append(temp)
        if len(calls) <= times:
            raise error
        done(temp, target)

    return calls, replace


def test_a_locked_file_is_tried_again(file: Path, tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    temp.write_bytes(NEW)
    calls, replace = failing(2, PermissionError(13, "sharing violation"))
    replace_checked(temp, file, sha256_hex(OLD), replace=replace, retry_delays_s=(0.0, 0.0, 0.0))
    assert len(calls) == 3
    assert file.read_bytes() == NEW


def test_a_file_that_stays_locked_is_given_up(file: Path, tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    temp.write_bytes(NEW)
    calls, replace = failing(9, PermissionError(13, "sharing violation"))
    with pytest.raises(PermissionError):
        replace_checked(temp, file, sha256_hex(OLD), replace=replace, retry_delays_s=(0.0, 0.0))
    assert len(calls) == 3
    assert file.read_bytes() == OLD


def test_a_file_that_changes_between_two_tries_is_left_alone(file: Path, tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    temp.write_bytes(NEW)

    def replace(source: Path, target: Path) -> None:
        target.write_bytes(b"saved by the editor that held it")
        raise PermissionError(13, "sharing violation")

    with pytest.raises(StaleTextError):
        replace_checked(temp, file, sha256_hex(OLD), replace=replace, retry_delays_s=(0.0, 0.0))
    assert file.read_bytes() == b"saved by the editor that held it"
