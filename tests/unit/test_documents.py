"""Documents against a plain model: code units cut and joined, lines ended by line feeds and carriage returns alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_server.documents import Change, Document, Encoding, Position, PositionFault

pytestmark = pytest.mark.unit

CODECS: dict[Encoding, tuple[str, int]] = {
    "utf-8": ("utf-8", 1),
    "utf-16": ("utf-16-le", 2),
    "utf-32": ("utf-32-le", 4),
}
ENCODINGS = list(CODECS)
ODD = "a\x0cb\u2028c\x0bd\x85e\x1cf\u2029g"  # one line; str.splitlines makes seven of it
PIECES = ["a", " ", "é", "한", "😀", "\t", "\n", "\r\n", "\r", "\x0c", "\u2028", "\x85", "\x1d"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def units(text: str, encoding: Encoding) -> list[bytes]:
    """The code units of a text."""
    codec, size = CODECS[encoding]
    data = text.encode(codec)
    return [data[index : index + size] for index in range(0, len(data), size)]


def places(text: str, encoding: Encoding) -> list[tuple[Position, int]]:
    """Every position between two characters of a line, with its index into the text."""
    found: list[tuple[Position, int]] = []
    start = 0
    for number, line in enumerate(re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)):
        content = line.rstrip("\r\n") if not line.endswith("\r\n") else line[:-2]
        for length in range(len(content) + 1):
            found.append((Position(number, len(units(content[:length], encoding))), start + length))
        start += len(line)
    return found


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(ENCODINGS))
def test_positions_and_indexes_belong_together(text: str, encoding: Encoding) -> None:
    document = Document("file:///a.py", text, 1, encoding=encoding)
    for position, offset in places(text, encoding):
        assert document.offset(position) == offset
        assert document.position(offset) == position


@settings(max_examples=300, deadline=None)
@given(st.data(), TEXTS, st.sampled_from(ENCODINGS))
def test_any_sequence_of_changes_gives_the_clients_text(data: st.DataObject, text: str, encoding: Encoding) -> None:
    document = Document("file:///a.py", text, 1, encoding=encoding)
    for version in range(2, 6):
        (start, first), (end, last) = sorted(
            data.draw(st.tuples(*[st.sampled_from(places(text, encoding))] * 2)), key=lambda place: place[1]
        )
        new = data.draw(TEXTS)
        text = text[:first] + new + text[last:]
        document.change([Change(new, start, end)], version)
        assert (document.text, document.version, document.out_of_step) == (text, version, "")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_form_feed_and_its_kin_end_no_line(encoding: Encoding) -> None:
    document = Document("file:///a.py", f"{ODD}\nx = 1\n", 1, encoding=encoding)
    assert document.num_lines == 3
    document.change([Change("2", Position(1, 4), Position(1, 5))], 2)
    assert document.text == f"{ODD}\nx = 2\n"


def test_changes_of_one_notification_build_on_each_other() -> None:
    document = Document("file:///a.py", "one\ntwo\n", 1)
    document.change([Change("zero\n", Position(0, 0), Position(0, 0)), Change("2", Position(2, 0), Position(2, 3))], 2)
    assert document.text == "zero\none\n2\n"


@pytest.mark.parametrize(
    ("position", "offset"), [(Position(0, 99), 3), (Position(1, 99), 8), (Position(2, 0), 9), (Position(7, 5), 9)]
)
def test_what_lies_behind_an_end_means_that_end(position: Position, offset: int) -> None:
    assert Document("file:///a.py", "one\rfour\n", 1).offset(position) == offset


@pytest.mark.parametrize(
    ("encoding", "start", "end", "why"),
    [
        ("utf-16", Position(0, 2), Position(0, 3), "inside a character"),
        ("utf-8", Position(0, 3), Position(0, 5), "inside a character"),
        ("utf-16", Position(0, 3), Position(0, 1), "before it starts"),
        ("utf-16", Position(-1, 0), Position(0, 1), "negative"),
    ],
)
def test_a_change_that_cannot_be_placed_puts_the_document_out_of_step_until_its_whole_text_comes(
    encoding: Encoding, start: Position, end: Position, why: str
) -> None:
    document = Document("file:///a.py", "a😀b\n", 1, encoding=encoding)
    document.change([Change("x", start, end)], 2)
    assert why in document.out_of_step
    assert (document.text, document.version) == ("a😀b\n", 2)
    document.change([Change("y", Position(0, 0), Position(0, 1))], 3)
    assert document.text == "a😀b\n"
    document.change([Change("whole\n")], 4)
    assert (document.text, document.out_of_step) == ("whole\n", "")


def test_a_position_inside_a_character_is_no_place() -> None:
    with pytest.raises(PositionFault):
        Document("file:///a.py", "😀", 1).offset(Position(0, 1))


def test_half_a_surrogate_pair_from_a_client_is_kept_as_it_is() -> None:
    document = Document("file:///a.py", "x = '\ud83d'\n", 1)
    document.change([Change("y", Position(0, 0), Position(0, 1))], 2)
    assert document.text == "y = '\ud83d'\n"
    assert document.position(6) == Position(0, 6)


TEXTS = st.text(alphabet=["a", "\r", "\n", "\x0c", "\u2028", "🙂"], max_size=12)


@given(text=TEXTS, changes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), TEXTS), max_size=4))
def test_lines_after_a_change_are_those_of_the_text_read_anew(text: str, changes: list[tuple[int, int, str]]) -> None:
    document = Document("file:///a.py", text, 1, encoding="utf-32")
    for place, length, new in changes:
        start, end = (document.position(min(offset, len(document.text))) for offset in (place, place + length))
        document.change([Change(new, start, end)], 2)
        anew = Document("file:///a.py", document.text, 1, encoding="utf-32")
        assert document.num_lines == anew.num_lines
        assert [document.line_text(line) for line in range(9)] == [anew.line_text(line) for line in range(9)]
