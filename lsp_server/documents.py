"""Open documents as the client has them: text, version, and positions in the client's units.

Lines end at LF, CRLF or CR and nowhere else, as the protocol says; a form feed or U+2028 is a character like any other.
A change that cannot be placed without a guess puts the document out of step, and it stays so until the client
sends its whole text again: nothing is offered on a text that may not be the client's.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Encoding = Literal["utf-8", "utf-16", "utf-32"]

_LINE_END = re.compile(r"\r\n|\r|\n")
_UNIT_BYTES = {"utf-8": 1, "utf-16": 2, "utf-32": 4}
_CODEC = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a document, 0-based; `character` counts code units of the encoding that was agreed on."""

    line: int
    character: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a client changed: the text between two positions, or the whole text where `start` is None."""

    text: str
    start: Position | None = None
    end: Position | None = None


class PositionFault(ValueError):
    """A position that is in no document the server knows."""


@dataclass(slots=True)
class Document:
    """One open document.

    Args:
        uri: As the client writes it.
        text: The whole text.
        version: The client's.
        language_id: The client's, such as `python`.
        encoding: What positions count.
        out_of_step: Why the text may not be the client's; empty while it is.
    """

    uri: str
    text: str
    version: int
    language_id: str = "python"
    encoding: Encoding = "utf-16"
    out_of_step: str = ""
    _starts: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self._set_text(self.text)

    def change(self, changes: Sequence[Change], version: int) -> None:
        """Take in what the client changed, in order.

        Args:
            changes: The changes of one notification; each counts from the text that those before it left.
            version: The document's after them.
        """
        for change in changes:
            if change.start is None or change.end is None:
                self._set_text(change.text)
                self.out_of_step = ""
            elif not self.out_of_step:
                self._replace(change.start, change.end, change.text)
        self.version = version

    def _replace(self, start: Position, end: Position, text: str) -> None:
        try:
            first, last = self.offset(start), self.offset(end)
        except PositionFault as fault:
            self.out_of_step = str(fault)
            return
        if first > last:
            self.out_of_step = f"a change ends at {end.line}:{end.character}, before it starts"
            return
        first_line, last_line = (min(place.line, self.num_lines - 1) for place in (start, end))
        self._splice(first, last, text, first_line, last_line)

    def _set_text(self, text: str) -> None:
        self.text = text
        self._starts = [0, *(match.end() for match in _LINE_END.finditer(text))]

    def _splice(self, first: int, last: int, text: str, first_line: int, last_line: int) -> None:
        r"""Put text in place of a part, and find line starts anew around it alone.

        From the line above to the line below: \r and \n of different lines may have met.
        """
        above, below = max(0, first_line - 1), last_line + 2
        start = self._starts[above]
        end = self._starts[below] if below < self.num_lines else len(self.text)
        grown = len(text) - (last - first)
        self.text = self.text[:first] + text + self.text[last:]
        found = [match.end() for match in _LINE_END.finditer(self.text, start, end + grown)]
        self._starts = [*self._starts[: above + 1], *found, *(place + grown for place in self._starts[below + 1 :])]

    @property
    def num_lines(self) -> int:
        """Lines, an empty last one included."""
        return len(self._starts)

    def line_text(self, line: int) -> str:
        """A line without its end.

        Args:
            line: 0-based.

        Returns:
            Its text; empty behind the last one.
        """
        return self._line(line)[1] if 0 <= line < self.num_lines else ""

    def num_units_of_line(self, line: int) -> int:
        """Length of a line in the client's units, its end left out.

        Args:
            line: 0-based.

        Returns:
            Code units.
        """
        return self._num_units(self.line_text(line))

    def offset(self, position: Position) -> int:
        """Index into `text` of a position; what lies behind a line's or the document's end means that end.

        Args:
            position: In the client's units.

        Returns:
            Code points before it.

        Raises:
            PositionFault: It is negative, or lies inside a character.
        """
        if position.line < 0 or position.character < 0:
            raise PositionFault(f"the position {position.line}:{position.character} is negative")
        if position.line >= self.num_lines:
            return len(self.text)
        start, line = self._line(position.line)
        return start + self._num_code_points(line, position)

    def position(self, offset: int) -> Position:
        """The position of an index into `text`.

        Args:
            offset: Code points before it.

        Returns:
            In the client's units; of an index between CR and LF the end of the line.
        """
        line = bisect_right(self._starts, offset) - 1
        start, content = self._line(line)
        return Position(line, self._num_units(content[: offset - start]))

    def _line(self, line: int) -> tuple[int, str]:
        """Start and content of a line, its end left out."""
        start = self._starts[line]
        end = self._starts[line + 1] if line + 1 < self.num_lines else len(self.text)
        content = self.text[start:end]
        return start, content[:-2] if content.endswith("\r\n") else content.rstrip("\r\n")

    def _num_units(self, text: str) -> int:
        if self.encoding == "utf-32" or text.isascii():
            return len(text)
        return len(text.encode(_CODEC[self.encoding], "surrogatepass")) // _UNIT_BYTES[self.encoding]

    def _num_code_points(self, line: str, position: Position) -> int:
        if self.encoding == "utf-32" or line.isascii():
            return min(position.character, len(line))
        data = line.encode(_CODEC[self.encoding], "surrogatepass")
        data = data[: position.character * _UNIT_BYTES[self.encoding]]
        try:
            before = data.decode(_CODEC[self.encoding], "surrogatepass")
        except UnicodeDecodeError:
            before = ""
        if self._num_units(before) * _UNIT_BYTES[self.encoding] != len(data) or not line.startswith(before):
            raise PositionFault(f"the position {position.line}:{position.character} lies inside a character")
        return len(before)
