"""Mending a data set that others made: JSON lines with instruction, input and output.

Taken as they come: any encoding that is UTF-8, UTF-16 or Windows-1252, with a byte-order mark or without, text that was
decoded wrongly once (`Ã©` for `é`), any line ends, a JSON array instead of lines, and fields that are lists, objects,
numbers or null. What cannot be read is kept aside and counted, never dropped unseen. Secrets are masked.

Not covered: text that was decoded wrongly and lost characters by that, and whether an example is any good.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from engine.errors import UsageError
from engine.patching.disk import read_bytes, write_atomically
from engine.patching.masking import mask_together

FIELDS = ("instruction", "input", "output")
_OTHER_NAMES = {
    "prompt": "input",
    "question": "input",
    "completion": "output",
    "response": "output",
    "answer": "output",
}
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_UNDECODABLE_1252 = "\x81\x8d\x8f\x90\x9d"  # bytes that Windows-1252 has no character for; programs let them through
_NEXT = "[\x80-\xbf" + bytes(set(range(0x80, 0xA0)) - set(_UNDECODABLE_1252.encode("latin-1"))).decode("cp1252") + "]"
_WRONGLY_DECODED = re.compile(f"[\u00c2-\u00df]{_NEXT}|[\u00e0-\u00ef]{_NEXT}{{2}}|[\u00f0-\u00f4]{_NEXT}{{3}}")


@dataclass(slots=True)
class Mended:
    """What became of a file.

    Args:
        path: The file.
        rows: Usable examples; every field a text.
        broken: Lines that could not be used, as they were, each with the reason.
        counts: What was mended, by kind.
    """

    path: Path
    rows: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    broken: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])
    counts: Counter[str] = field(default_factory=Counter[str])

    def to_json(self) -> dict[str, Any]:
        """The counts, for programs."""
        return {
            "file": str(self.path),
            "usable": len(self.rows),
            "broken": len(self.broken),
            "broken_because": dict(sorted(Counter(reason for _, reason in self.broken).items())),
            "mended": dict(sorted(self.counts.items())),
        }


def mend_file(path: Path) -> Mended:
    """Read a file and mend it in memory.

    Args:
        path: A data set.

    Returns:
        Its examples, and what was wrong.

    Raises:
        PathError: It cannot be read.
    """
    mended = Mended(path)
    for raw, value in _values(read_bytes(path), mended):
        _take(raw, value, mended)
    return mended


def outputs_of(path: Path) -> tuple[Path, Path]:
    """Where a mended file and its broken lines go.

    Args:
        path: The file.

    Returns:
        `NAME.sanitized.jsonl` and `NAME.broken.jsonl` beside it.
    """
    stem = path.name.removesuffix(".jsonl").removesuffix(".json")
    return path.with_name(f"{stem}.sanitized.jsonl"), path.with_name(f"{stem}.broken.jsonl")


def write_mended(mended: Mended, *, force: bool = False) -> list[Path]:
    """Write the examples and, if there are any, the broken lines; the file itself stays as it is.

    Args:
        mended: What to write.
        force: Replace files that exist.

    Returns:
        The files written.

    Raises:
        UsageError: A file exists already.
        WriteError: It cannot be written.
    """
    usable, broken = outputs_of(mended.path)
    taken = [file for file in (usable, broken) if file.exists()]
    if taken and not force:
        raise UsageError(f"{taken[0]} exists already", hint="Move it away, or give --force to replace it.")
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mended.rows)
    write_atomically(usable, data.encode("utf-8", "backslashreplace"), expected_sha256=None, private=True)
    if not mended.broken:
        broken.unlink(missing_ok=True)
        return [usable]
    write_atomically(broken, b"".join(raw + b"\n" for raw, _ in mended.broken), expected_sha256=None, private=True)
    return [usable, broken]


# --- lines -----------------------------------------------------------------------------------------------------------


def _values(data: bytes, mended: Mended) -> Iterator[tuple[bytes, Any]]:
    """Each line with what it holds; the exception for one that is no JSON."""
    data, encoding = _without_bom(data, mended)
    if b"\r" in data:
        mended.counts["line ends that are not LF"] += data.count(b"\r\n") or data.count(b"\r")
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    whole = _array(data)
    if whole is not None:
        mended.counts["a JSON array instead of lines"] += 1
        yield from (
            (json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace"), value) for value in whole
        )
        return
    lines = data.split(b"\n")
    for line in lines if lines[-1] else lines[:-1]:
        if not line.strip(b" \t\0\x0c\x1a"):
            mended.counts["blank lines"] += 1
            continue
        try:
            yield line, json.loads(_decoded(line, encoding, mended))
        except (ValueError, RecursionError) as error:
            yield line, error


def _without_bom(data: bytes, mended: Mended) -> tuple[bytes, str]:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            mended.counts["byte-order marks"] += 1
            data = data.removeprefix(mark)
            if encoding == "utf-8":
                return data, encoding
            mended.counts["UTF-16 instead of UTF-8"] += 1
            return data.decode(encoding, "replace").encode("utf-8", "replace"), "utf-8"
    return data, "utf-8"


def _array(data: bytes) -> list[Any] | None:
    if not data.lstrip().startswith(b"["):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("list[Any]", value) if isinstance(value, list) else None


def _decoded(line: bytes, encoding: str, mended: Mended) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError:
        mended.counts["lines in Windows-1252"] += 1
        return "".join(chr(byte) if chr(byte) in _UNDECODABLE_1252 else bytes([byte]).decode("cp1252") for byte in line)


def _take(raw: bytes, value: Any, mended: Mended) -> None:
    if isinstance(value, Exception):
        mended.broken.append((raw, "not JSON"))
        return
    if not isinstance(value, dict):
        mended.broken.append((raw, "not an object"))
        return
    found = cast("dict[str, Any]", value)
    for name, field_name in _OTHER_NAMES.items():
        if name in found and field_name not in found:
            found = {**found, field_name: found[name]}
            mended.counts[f"`{name}` for `{field_name}`"] += 1
    row = {name: _as_text(found.get(name), mended.counts, name) for name in FIELDS}
    if not row["output"].strip() or not (row["input"].strip() or row["instruction"].strip()):
        mended.broken.append((raw, "no question" if row["output"].strip() else "no output"))
        return
    masked = mask_together(list(row.values()))
    if masked.counts:
        mended.counts["secrets masked"] += sum(masked.counts.values())
    mended.rows.append(dict(zip(FIELDS, masked.texts, strict=True)))


# --- fields ----------------------------------------------------------------------------------------------------------


def _as_text(value: Any, counts: Counter[str], name: str) -> str:
    if value is None:
        text = ""
    elif isinstance(value, str):
        text = value
    elif isinstance(value, list) and all(isinstance(item, str) for item in cast("list[Any]", value)):
        counts[f"`{name}` was a list of texts"] += 1
        text = "\n".join(cast("list[str]", value))
    else:
        counts[f"`{name}` was JSON"] += 1
        text = json.dumps(value, ensure_ascii=False)
    return _mended_text(text, counts)


def _mended_text(text: str, counts: Counter[str]) -> str:
    for what, mend in _MENDS:
        changed = mend(text)
        if changed != text:
            counts[what] += 1
            text = changed
    return text


def _decoded_rightly(text: str) -> str:
    """`Ã©` as `é`, as often as it was done; only runs of characters that are UTF-8 when taken as bytes."""
    for _ in range(3):
        changed = _WRONGLY_DECODED.sub(_as_utf8, text)
        if changed == text:
            break
        text = changed
    return text


def _as_utf8(match: re.Match[str]) -> str:
    try:
        data = b"".join(bytes([ord(c)]) if ord(c) < 0x100 else c.encode("cp1252") for c in match[0])
        return data.decode("utf-8")
    except ValueError:
        return match[0]


def _without_lone_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_MENDS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("fields with a byte-order mark", lambda text: text.removeprefix("\ufeff")),
    ("fields with CRLF", lambda text: text.replace("\r\n", "\n").replace("\r", "\n")),
    ("fields with NUL", lambda text: text.replace("\0", "")),
    ("fields that were decoded wrongly", _decoded_rightly),
    ("fields with lone surrogates", _without_lone_surrogates),
)
