"""Foreign data sets are mended, what cannot be is kept aside, and everything that was done is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import PathError, UsageError
from tests.secret_samples import plant
from training.sanitize import Mended, mend_file, outputs_of, write_mended

GOOD = {"instruction": "Add \U0001f40d", "input": "def f():\n\tpass\n", "output": "def f():\n\treturn 1\x0c\n"}


def mended(tmp_path: Path, data: bytes) -> Mended:
    file = tmp_path / "foreign.jsonl"
    file.write_bytes(data)
    return mend_file(file)


def line(**fields: Any) -> bytes:
    return json.dumps(GOOD | fields, ensure_ascii=False).encode() + b"\n"


def test_a_good_file_stays_as_it_is(tmp_path: Path) -> None:
    found = mended(tmp_path, line() + line(input=""))
    assert found.rows == [GOOD, GOOD | {"input": ""}]
    assert (found.counts, found.broken) == ({}, [])


@pytest.mark.parametrize(
    ("value", "text", "kind"),
    [
        (None, "", ""),
        (["a", "b"], "a\nb", "`input` was a list of texts"),
        ({"path": "m.py", "n": [1, None]}, '{"path": "m.py", "n": [1, null]}', "`input` was JSON"),
        ([{"é": 1}], '[{"é": 1}]', "`input` was JSON"),
        (7, "7", "`input` was JSON"),
        (False, "false", "`input` was JSON"),
        ("a\r\nb\rc", "a\nb\nc", "fields with CRLF"),
        ("\ufeffa\0b", "ab", "fields with a byte-order mark"),
        ("cafÃ© â€“ naÃ¯ve ðŸ˜€ Ã\xa0", "café – naïve 😀 à",
         "fields that were decoded wrongly"),
        ("CafÃƒÂ©", "Café", "fields that were decoded wrongly"),
        ("Ärger, Straße, «Ünïcödé», Ð и λ", "Ärger, Straße, «Ünïcödé», Ð и λ", ""),
    ],
)  # fmt: skip
def test_every_field_becomes_text(tmp_path: Path, value: object, text: str, kind: str) -> None:
    found = mended(tmp_path, line(input=value))
    assert [row["input"] for row in found.rows] == [text]
    assert kind in found.counts if kind else found.counts == {}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xef\xbb\xbf" + line(), "byte-order marks"),
        (b"\xff\xfe" + line().decode().encode("utf-16-le"), "UTF-16 instead of UTF-8"),
        (b"\xfe\xff" + line().decode().encode("utf-16-be"), "UTF-16 instead of UTF-8"),
        (line().replace(b"\n", b"\r\n"), "line ends that are not LF"),
        (b"\n\n" + line() + b"  \n", "blank lines"),
        (json.dumps([GOOD], indent=1).encode(), "a JSON array instead of lines"),
        (json.dumps({"prompt": GOOD["input"], "response": GOOD["output"], "instruction": GOOD["instruction"]}).encode(),
         "`prompt` for `input`"),
    ],
)  # fmt: skip
def test_files_in_other_shapes_are_read(tmp_path: Path, data: bytes, kind: str) -> None:
    found = mended(tmp_path, data)
    assert found.rows == [GOOD] and found.broken == []
    assert found.counts[kind] > 0


def test_windows_1252_is_read_line_by_line(tmp_path: Path) -> None:
    old = '{"input": "na\u00efve \u201cquoted\u201d", "output": "\u20ac"}\n'.encode("cp1252")
    found = mended(tmp_path, line() + old)
    assert found.rows[1] == {"instruction": "", "input": "naïve “quoted”", "output": "€"}
    assert found.counts == {"lines in Windows-1252": 1}


def test_broken_lines_are_counted_and_kept_aside_as_they_were(tmp_path: Path) -> None:
    broken = [b'{"input": "a", "output": ', b"[1, 2]", b'"text"', b'{"input": "a"}', b'{"output": "b"}', b"\x80\x81"]
    found = mended(tmp_path, line() + b"\n".join(broken) + b"\n" + line())
    assert len(found.rows) == 2
    assert [raw for raw, _ in found.broken] == broken
    assert found.to_json()["broken_because"] == {"no output": 1, "no question": 1, "not JSON": 2, "not an object": 2}
    usable, aside = write_mended(found)
    assert (usable, aside) == outputs_of(found.path)
    assert usable.name == "foreign.sanitized.jsonl" and aside.read_bytes() == b"\n".join(broken) + b"\n"
    assert [json.loads(text) for text in usable.read_text(encoding="utf-8").splitlines()] == found.rows
    with pytest.raises(UsageError, match="exists already"):
        write_mended(found)
    again = mend_file(usable)
    assert (again.rows, again.broken, again.counts) == (found.rows, [], {})


def test_secrets_are_masked_and_the_file_itself_is_not_touched(tmp_path: Path) -> None:
    planted = plant(num_each=2, seed=4)
    data = b"".join(line(instruction=one.prose, input=one.before, output=one.after) for one in planted)
    found = mended(tmp_path, data)
    usable, *_ = write_mended(found)
    text = usable.read_text(encoding="utf-8")
    assert [one for one in planted for needle in one.needles if needle in text] == []
    assert found.counts["secrets masked"] >= len(planted)
    assert found.path.read_bytes() == data


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"none\.jsonl cannot be read"):
        mend_file(tmp_path / "none.jsonl")
