r"""A Python file's text, kept so exactly that its bytes can be given back.

Lines end at \n, \r\n and \r and nowhere else, so that line numbers agree with `ast`: a form feed, U+2028 or U+0085 is
an ordinary character. Only UTF-8 is edited, with or without a byte-order mark.

Not covered: encodings other than UTF-8 (refused), and files that change while they are read.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.errors import PathError, SourceError

MAX_SOURCE_BYTES = 2_000_000
PASTED = "<code_paste>"  # the path of code that is in no file

_LINE_END = re.compile(r"\r\n|\n|\r")
_CODING_COOKIE = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_BLANK_OR_COMMENT = re.compile(r"[ \t\f]*(?:#.*)?")
_BOM = "\ufeff"


@dataclass(frozen=True)
class Source:
    """The exact text of one file.

    Args:
        path: How the file is named in edits and messages; forward slashes.
        lines: Each line's text without its terminator.
        eols: Each line's terminator; empty only for a last line without final newline.
        bom: Whether the bytes start with a UTF-8 byte-order mark.
    """

    path: str
    lines: tuple[str, ...]
    eols: tuple[str, ...]
    bom: bool = False

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Source:
        """Read the bytes of a file.

        Args:
            data: The whole file.
            path: Its name for edits and messages.

        Returns:
            The source; `to_bytes()` gives `data` back.

        Raises:
            SourceError: Binary, larger than `MAX_SOURCE_BYTES`, not UTF-8, or declared to be in another encoding.
        """
        _check_size(len(data), path)
        _check_not_binary(data, path)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(data, error, path) from None
        return cls.from_text(text, path)

    @classmethod
    def from_text(cls, text: str, path: str) -> Source:
        """Read text that is already decoded, such as an editor's buffer.

        Args:
            text: The whole file; a leading U+FEFF is the byte-order mark.
            path: Its name for edits and messages.

        Returns:
            The source.

        Raises:
            SourceError: The text holds NUL characters or lone surrogates, is larger than `MAX_SOURCE_BYTES`, or
                declares another encoding than UTF-8.
        """
        if "\0" in text:
            raise _binary(path, text.index("\0"))
        try:
            _check_size(len(text.encode("utf-8")), path)
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{path} has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
                "so it cannot be written as UTF-8.",
                hint="Remove that character.",
                path=path,
            ) from None
        bom = text.startswith(_BOM)
        lines, eols = split_lines(text[1:] if bom else text)
        cookie = coding_cookie(lines)
        if cookie is not None and not _names_utf8(cookie):
            raise SourceError(
                f"{path} declares the encoding {cookie!r}; PlanPatch edits UTF-8 files only.",
                hint="Convert the file to UTF-8 and remove the declaration from its first two lines.",
                path=path,
                cookie=cookie,
            )
        return cls(path, lines, eols, bom)

    @cached_property
    def text(self) -> str:
        """The exact text without the byte-order mark."""
        return "".join(line + eol for line, eol in zip(self.lines, self.eols, strict=True))

    def to_bytes(self) -> bytes:
        """The exact bytes of the file.

        Returns:
            UTF-8, with the byte-order mark if there was one.

        Raises:
            UnicodeEncodeError: A line holds a lone surrogate; no source read by this module does.
        """
        return ((_BOM if self.bom else "") + self.text).encode("utf-8")

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the exact bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def newline(self) -> str:
        r"""The terminator of most lines, the first seen on a tie; "\n" if there is none."""
        counts = Counter(eol for eol in self.eols if eol)
        return counts.most_common(1)[0][0] if counts else "\n"

    @property
    def final_newline(self) -> bool:
        """Whether the last line is terminated; true of an empty file."""
        return not self.eols or self.eols[-1] != ""

    @property
    def num_lines(self) -> int:
        """How many lines there are; a final newline does not start another."""
        return len(self.lines)

    def text_between(self, start_line: int, end_line: int) -> str:
        """Exact text of whole lines, the last one's terminator left out.

        Args:
            start_line: First line, 1-based.
            end_line: Last line, inclusive; `start_line - 1` for no lines.

        Returns:
            The text.
        """
        pairs = zip(self.lines[start_line - 1 : end_line], self.eols[start_line - 1 : end_line], strict=True)
        text = "".join(line + eol for line, eol in pairs)
        return text[: len(text) - len(self.eols[end_line - 1])] if end_line >= start_line else ""

    def plain_text(self, start_line: int = 1, end_line: int | None = None) -> str:
        r"""Whole lines joined and ended by "\n": what parsers and models are given.

        Args:
            start_line: First line, 1-based.
            end_line: Last line, inclusive; None for the last of the file.

        Returns:
            The text; its line numbers are those of the file, less `start_line - 1`.
        """
        return "".join(line + "\n" for line in self.lines[start_line - 1 : end_line])


def read_source(path: Path, root: Path | None = None) -> Source:
    """Read a file that is to be edited.

    Args:
        path: The file; a relative path starts at `root` if there is one.
        root: The folder that the file must be in, symbolic links resolved; None for no limit.

    Returns:
        The source; its `path` is relative to `root` if there is one.

    Raises:
        PathError: Missing, not a regular file, unreadable, or outside `root`.
        SourceError: Binary, larger than `MAX_SOURCE_BYTES`, not UTF-8, or declared to be in another encoding.
    """
    resolved, name = _resolve(path, root)
    try:
        status = resolved.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise PathError(f"{name} is {what}.", hint="Name one Python file.", path=name)
        _check_size(status.st_size, name)
        with resolved.open("rb") as file:
            data = file.read(MAX_SOURCE_BYTES + 1)
    except OSError as error:
        raise PathError(
            f"{name} cannot be read: {error.strerror or error}.", hint="Check the path and its permissions.", path=name
        ) from error
    return Source.from_bytes(data, name)


def split_lines(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    r"""Split at \n, \r\n and \r only.

    Args:
        text: Any text.

    Returns:
        The lines, and each one's terminator ("" for an unterminated last line).
    """
    lines: list[str] = []
    eols: list[str] = []
    start = 0
    for match in _LINE_END.finditer(text):
        lines.append(text[start : match.start()])
        eols.append(match.group())
        start = match.end()
    if start < len(text):
        lines.append(text[start:])
        eols.append("")
    return tuple(lines), tuple(eols)


def coding_cookie(lines: Sequence[str]) -> str | None:
    """The encoding declared in the first two lines.

    Method: PEP 263.

    Args:
        lines: The file's lines.

    Returns:
        The name as written, or None.
    """
    for line in lines[:2]:
        match = _CODING_COOKIE.match(line)
        if match:
            return match.group(1)
        if not _BLANK_OR_COMMENT.fullmatch(line):
            return None
    return None


def declares_other_encoding(lines: Sequence[str]) -> bool:
    """Whether the first two lines declare another encoding than UTF-8.

    Args:
        lines: The file's lines.

    Returns:
        True if Python would not read the file as UTF-8.
    """
    cookie = coding_cookie(lines)
    return cookie is not None and not _names_utf8(cookie)


def _names_utf8(cookie: str) -> bool:
    try:
        return codecs.lookup(cookie).name in ("utf-8", "utf-8-sig")
    except LookupError:
        return False


def _resolve(path: Path, root: Path | None) -> tuple[Path, str]:
    """The real path, and the name to call it by."""
    try:
        if root is None:
            return path.resolve(strict=True), path.as_posix()
        real_root = root.resolve(strict=True)
        resolved = (real_root / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: NUL in the path
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be used: {error}"
        raise PathError(f"{path.as_posix()} {reason}.", hint="Check the path.", path=path.as_posix()) from error
    if not resolved.is_relative_to(real_root):
        raise PathError(
            f"{path.as_posix()} is outside the root {real_root.as_posix()} once links are resolved.",
            hint="Name a file inside the root, or choose another root.",
            path=path.as_posix(),
        )
    return resolved, resolved.relative_to(real_root).as_posix()


def _check_size(size: int, path: str) -> None:
    if size > MAX_SOURCE_BYTES:
        raise SourceError(
            f"{path} has {size:,} bytes or more; the limit is {MAX_SOURCE_BYTES:,} bytes.",
            hint="Split the file, or name a smaller one.",
            path=path,
            size_bytes=size,
            limit_bytes=MAX_SOURCE_BYTES,
        )


def _check_not_binary(data: bytes, path: str) -> None:
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(mark):
            raise SourceError(
                f"{path} is {name}; PlanPatch edits UTF-8 files only.",
                hint="Convert the file to UTF-8.",
                path=path,
            )
    if b"\0" in data:
        raise _binary(path, data.index(b"\0"))


def _binary(path: str, offset: int) -> SourceError:
    return SourceError(
        f"{path} is binary: it has a NUL at offset {offset}.",
        hint="Name a Python source file.",
        path=path,
        offset=offset,
    )


def _not_utf8(data: bytes, error: UnicodeDecodeError, path: str) -> SourceError:
    head, _ = split_lines(data[:1000].decode("latin-1"))
    cookie = coding_cookie(head)
    declared = f"; it declares the encoding {cookie!r}" if cookie else ""
    return SourceError(
        f"{path} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start}{declared}.",
        hint="Convert the file to UTF-8.",
        path=path,
        offset=error.start,
        cookie=cookie,
    )
