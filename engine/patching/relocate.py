"""Finding hunks again in a text that was edited since, and putting their other side there.

A block of lines is found at a place when some longest common subsequence of the old and the new text keeps the whole
block there, unbroken. When that holds for several places, those under the same functions and classes as before are
preferred, and a place under others is never taken while the old ones still exist. One place must be left, or all that
are left must give the same text; and seen from the new text the old place must be as clear. Otherwise the block counts
as not found: nothing is decided by luck. A block that moved past others is found by its exact text with up to three
lines of context on each side, once in each text.

A gap (where lines were deleted, or where an insertion is to be redone) is found by the lines next to it. They must
still be next to each other, but for neighbours that were removed or edited line by line, and for lines written below
the last line of a function that the gap was in. A gap that moved past others is not found.

Not covered: two texts that a reader could not tell apart either, such as a function pasted twice under one name (that
is refused); lines are compared without their terminators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, NamedTuple

from engine.errors import StaleTextError
from engine.patching.edits import Edit, new_lines
from engine.patching.source import Source

_HEADER = re.compile(r"[ \t\f]*(?:async[ \t]+def|def|class)[ \t]+(\w+)")
_NUM_CONTEXT_LINES = 3
_MIN_SIMILARITY = 0.6
_OTHER_SCOPE = 3
_MOST_LISTED = 8


class Range(NamedTuple):
    """Lines `start` to `stop` of a text, 0-based, `stop` not included; empty between two lines."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Hunk:
    """One edit's place before and after all the edits.

    Args:
        index: Its place in the list of edits.
        base: Lines of the text before.
        patched: Lines of the text after.
    """

    index: int
    base: Range
    patched: Range


@dataclass(frozen=True, slots=True)
class Change:
    """What to turn back (or forward) again: lines of one text stand for lines of the other.

    Args:
        hunk: Index of the hunk that it comes from.
        old: Lines of the text that was in the file.
        new: Lines of the text that shall stand there instead.
    """

    hunk: int
    old: Range
    new: Range


@dataclass(frozen=True, slots=True)
class Replanted:
    """The result of `replant`.

    Args:
        source: The current text with every change made, terminators and final newline included.
        edits: The same as edits of the current text, for an editor.
    """

    source: Source
    edits: list[Edit]


def hunks_of(edits: Sequence[Edit], chosen: Iterable[int] | None = None) -> list[Hunk]:
    """Where edits lie before and after they are applied together.

    Args:
        edits: Edits of one file in the coordinates of its base.
        chosen: Indices of those that are applied; None for all.

    Returns:
        The hunks from top to bottom.
    """
    indices = range(len(edits)) if chosen is None else sorted(set(chosen))
    hunks: list[Hunk] = []
    shift = 0
    for index in sorted(indices, key=lambda i: (edits[i].start_line, edits[i].end_line)):
        edit = edits[index]
        base = Range(edit.start_line - 1, edit.end_line)
        num_new = len(new_lines(edit))
        hunks.append(Hunk(index, base, Range(base.start + shift, base.start + shift + num_new)))
        shift += num_new - (base.stop - base.start)
    return hunks


def replant(old: Source, new: Source, changes: Sequence[Change], current: Source) -> Replanted:
    """Find each change's old lines in the current text and put its new lines there.

    Args:
        old: The text that was in the file when the changes were made or turned back.
        new: The text that has the lines to be put there.
        changes: The changes, from top to bottom.
        current: The text that is in the file now.

    Returns:
        The current text with the changes. Nothing else in it changes, and when it is `old` the result is `new`.

    Raises:
        StaleTextError: A change's lines were edited or cannot be told from others; `details["hunks"]` says for each
            hunk whether it was found, and shows all three texts.
    """
    replacements = [new.lines[change.new.start : change.new.stop] for change in changes]
    places = relocate(old.lines, current.lines, [change.old for change in changes], replacements)
    found = [place for place in places if place is not None]
    if len(found) < len(changes):
        raise _not_found(old, new, changes, current, places)
    placed = sorted(zip(found, changes, strict=True), key=lambda pair: pair[0])
    edits = [_edit(old, new, change, current, place) for place, change in placed]
    return Replanted(_splice(old, new, placed, current), edits)


def relocate(
    old_lines: Sequence[str],
    new_lines: Sequence[str],
    ranges: Sequence[Range],
    replacements: Sequence[Sequence[str]] | None = None,
) -> list[Range | None]:
    """Where blocks of the old text are in the new text.

    Method: longest common subsequences with the block kept whole, by Hyyrö's bit-parallel row update ("Bit-parallel
    LCS-length computation revisited", 2004); 10,000 lines take some hundredths of a second a block.

    Args:
        old_lines: The old text, without terminators.
        new_lines: The new text, without terminators.
        ranges: Blocks of the old text; an empty one is the gap before its line.
        replacements: Lines that shall stand in place of each block. Where given, places that lead to the same text
            count as one.

    Returns:
        For each block the same lines in the new text, or None if they were edited or cannot be told from others. No
        two blocks found overlap.
    """
    if list(old_lines) == list(new_lines):
        return list(ranges)
    search = _Search(_Text.of(old_lines), _Text.of(new_lines))
    wanted: Sequence[Sequence[str] | None] = [None] * len(ranges) if replacements is None else replacements
    places = [
        search.gap(block.start, lines) if block.start == block.stop else search.block(block, lines)
        for block, lines in zip(ranges, wanted, strict=True)
    ]
    return _without_overlaps(places)


@dataclass(frozen=True)
class _Text:
    """Lines, and for each one the functions and classes around it."""

    lines: tuple[str, ...]
    scopes: tuple[tuple[str, ...], ...]
    all_scopes: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, lines: Sequence[str]) -> _Text:
        scopes, all_scopes = _scopes(lines)
        return cls(tuple(lines), scopes, all_scopes)

    def scope_of(self, block: Range) -> tuple[str, ...]:
        """What is around a block's first line that is not blank."""
        for index in range(block.start, block.stop):
            if self.lines[index].strip():
                return self.scopes[index]
        return ()

    def is_inside(self, line: int, scope: tuple[str, ...]) -> bool:
        """Whether a line is in this function or class, or in one inside it."""
        return line >= 0 and self.scopes[line][: len(scope)] == scope

    def starts_of(self, block: tuple[str, ...]) -> list[int]:
        """Every place where these lines stand."""
        last = len(self.lines) - len(block)
        return [i for i in range(last + 1) if self.lines[i] == block[0] and self.lines[i : i + len(block)] == block]


class _Search:
    """Where blocks of one text are in another."""

    def __init__(self, old: _Text, new: _Text) -> None:
        self._old = old
        self._new = new
        self._num_common = _num_common_lines(old.lines, new.lines)

    def block(self, block: Range, replacement: Sequence[str] | None = None) -> Range | None:
        """The place of a block that is not empty."""
        starts = _in_best_scope(self._old, self._new, block, self._aligned_places(self._old, self._new, block))
        if not starts:
            return self._moved(block)
        place = Range(starts[0], starts[0] + block.stop - block.start)
        if not _same_result(self._new.lines, place, starts, replacement):
            return None
        origins = self._aligned_places(self._new, self._old, place)
        if len(origins) > 1:
            origins = _in_best_scope(self._new, self._old, place, origins)
        if block.start not in origins or not _same_result(self._old.lines, block, origins, replacement):
            return None
        return place

    def gap(self, line: int, restored: Sequence[str] | None = None) -> Range | None:
        """The place of the gap before a line, found by its neighbours."""
        last = len(self._old.lines)
        both = self.block(Range(line - 1, line + 1)) if 0 < line < last else None
        if both is not None:
            above, below = Range(both.start, both.start + 1), Range(both.start + 1, both.stop)
            if above == self._only_place(Range(line - 1, line)) or below == self._only_place(Range(line, line + 1)):
                return Range(above.stop, above.stop)
        above, top = self._nearest(range(line - 1, max(line - 1 - _NUM_CONTEXT_LINES, -1), -1), Range(0, 0), -1)
        below, bottom = self._nearest(
            range(line, min(line + _NUM_CONTEXT_LINES, last)), Range(*[len(self._new.lines)] * 2), last
        )
        if above is None or below is None or above.stop > below.start:
            return None
        written = Range(above.stop, below.start)
        place = self._place_among(written, Range(top + 1, line), Range(line, bottom), restored)
        return None if place is None else Range(place, place)

    def _nearest(self, candidates: range, edge: Range, edge_line: int) -> tuple[Range | None, int]:
        """The first of the lines that is found, and its old index; the edge of the text if the lines reach it."""
        for index in candidates:
            place = self._only_place(Range(index, index + 1))
            if place is not None:
                return place, index
        reached = (candidates.stop == edge_line) if candidates else True
        return (edge if reached else None), edge_line

    def _only_place(self, line: Range) -> Range | None:
        """The place of a line that no alignment sees elsewhere: stricter than a block, where the text itself helps."""
        starts = self._aligned_places(self._old, self._new, line)
        if len(starts) != 1:
            return None
        place = Range(starts[0], starts[0] + 1)
        return place if self._aligned_places(self._new, self._old, place) == [line.start] else None

    def _place_among(self, written: Range, above: Range, below: Range, restored: Sequence[str] | None) -> int | None:
        """Where the gap is among lines that are new between the old lines around it."""
        lines = self._new.lines[written.start : written.stop]
        if not lines:
            return written.start
        gone = self._old.lines[above.start : below.stop]
        if len(lines) == len(gone) and all(_is_similar(one, other) for one, other in zip(gone, lines, strict=True)):
            return written.start + above.stop - above.start
        scope = self._scope_of_restored(above.stop, restored or ())
        ends_here = scope and self._new.is_inside(written.start - 1, scope)
        goes_on = any(self._new.is_inside(line, scope) for line in range(*written) if self._new.lines[line].strip())
        return written.start if ends_here and not goes_on and not gone else None

    def _scope_of_restored(self, line: int, restored: Sequence[str]) -> tuple[str, ...]:
        """What was around the lines that come back."""
        whole = _Text.of([*self._old.lines[:line], *restored])
        return whole.scope_of(Range(line, len(whole.lines)))

    def _aligned_places(self, old: _Text, new: _Text, block: Range) -> list[int]:
        """Starts of the places where a longest common subsequence keeps the block."""
        size = block.stop - block.start
        starts = new.starts_of(old.lines[block.start : block.stop])
        if not starts:
            return []
        above = _lcs_lengths(old.lines[: block.start], new.lines, starts)
        ends = [len(new.lines) - start - size for start in reversed(starts)]
        below = _lcs_lengths(old.lines[block.stop :][::-1], new.lines[::-1], ends)[::-1]
        sums = zip(starts, above, below, strict=True)
        return [start for start, num_above, num_below in sums if num_above + size + num_below == self._num_common]

    def _moved(self, block: Range) -> Range | None:
        """The place of a block that was carried past others, found with the lines around it in its function."""
        old, new = self._old, self._new
        window = _with_context(old, block)
        lines = old.lines[window.start : window.stop]
        if sum(1 for line in lines if line.strip()) < _NUM_CONTEXT_LINES:
            return None
        starts = new.starts_of(lines)
        if len(starts) != 1 or len(old.starts_of(lines)) != 1:
            return None
        start = starts[0] + block.start - window.start
        if not _in_best_scope(old, new, block, [start]):
            return None
        return Range(start, start + block.stop - block.start)


def _with_context(text: _Text, block: Range) -> Range:
    """The block with up to three lines before and after it, as far as they are in the same function."""
    scope = text.scope_of(block)
    start, stop = block
    while start > 0 and block.start - start < _NUM_CONTEXT_LINES and text.scopes[start - 1] == scope:
        start -= 1
    while stop < len(text.lines) and stop - block.stop < _NUM_CONTEXT_LINES and text.scopes[stop] == scope:
        stop += 1
    return Range(start, stop)


def _num_common_lines(old: tuple[str, ...], new: tuple[str, ...]) -> int:
    """Length of a longest common subsequence."""
    head = _num_equal(old, new)
    tail = _num_equal(old[head:][::-1], new[head:][::-1])
    middle = new[head : len(new) - tail]
    return head + tail + _lcs_lengths(old[head : len(old) - tail], middle, [len(middle)])[0]


def _lcs_lengths(rows: tuple[str, ...], columns: tuple[str, ...], stops: list[int]) -> list[int]:
    """Length of a longest common subsequence of `rows` and `columns[:stop]` for every stop; stops ascend."""
    head = min(_num_equal(rows, columns), stops[0])
    bits: dict[str, int] = {}
    for index, line in enumerate(rows[head:]):
        bits[line] = bits.get(line, 0) | 1 << index
    every_row = (1 << (len(rows) - head)) - 1
    free = every_row  # a row's bit is cleared where the length grows
    lengths: list[int] = []
    at = head
    for stop in stops:
        for line in columns[at:stop]:
            if matching := bits.get(line):
                usable = free & matching
                free = ((free + usable) | (free - usable)) & every_row
        at = stop
        lengths.append(head + (every_row ^ free).bit_count())
    return lengths


def _num_equal(left: Sequence[str], right: Sequence[str]) -> int:
    """How many lines are equal before the first difference."""
    for index, (one, other) in enumerate(zip(left, right)):  # noqa: B905 - the shorter one ends the comparison
        if one != other:
            return index
    return min(len(left), len(right))


def _in_best_scope(old: _Text, new: _Text, block: Range, starts: list[int]) -> list[int]:
    """The places under the same functions and classes as before; else those that cannot be said to be under others."""
    before = old.scope_of(block)
    size = block.stop - block.start
    ranks = {start: _scope_rank(before, new.scope_of(Range(start, start + size)), new) for start in starts}
    best = min(ranks.values(), default=_OTHER_SCOPE)
    return [] if best == _OTHER_SCOPE else [start for start in starts if ranks[start] == best]


def _scope_rank(before: tuple[str, ...], after: tuple[str, ...], new: _Text) -> int:
    if before == after:
        return 0
    num_shared = min(len(before), len(after))
    if before[:num_shared] == after[:num_shared]:  # dedented text in a string hides the rest
        return 1
    return _OTHER_SCOPE if before in new.all_scopes else 2  # it may have been renamed


def _same_result(lines: tuple[str, ...], place: Range, starts: list[int], replacement: Sequence[str] | None) -> bool:
    """Whether replacing the block at any of the starts gives the same text as at `place`."""
    others = [start for start in starts if start != place.start]
    if not others or replacement is None:
        return not others
    size, put = place.stop - place.start, tuple(replacement)
    pairs = [(min(place.start, other), max(place.start, other)) for other in others]
    return all(put + lines[one + size : other + size] == lines[one:other] + put for one, other in pairs)


def _is_similar(old: str, new: str) -> bool:
    """Whether a line looks like another one edited."""
    return SequenceMatcher(None, old, new).ratio() >= _MIN_SIMILARITY


def _without_overlaps(places: list[Range | None]) -> list[Range | None]:
    """Two blocks in one place are both not found."""
    taken = sorted((place, index) for index, place in enumerate(places) if place is not None)
    clashing = {index for (one, i), (other, j) in pairwise(taken) if other.start < one.stop for index in (i, j)}
    return [None if index in clashing else place for index, place in enumerate(places)]


def _scopes(lines: Sequence[str]) -> tuple[tuple[tuple[str, ...], ...], frozenset[tuple[str, ...]]]:
    """The names of the functions and classes around each line, read from indentation alone: the text may not parse."""
    open_headers: list[tuple[int, str]] = []
    scopes: list[tuple[str, ...]] = []
    seen: set[tuple[str, ...]] = set()
    for line in lines:
        code = line.strip()
        indentation = len(line.expandtabs()) - len(line.expandtabs().lstrip())
        if code and not code.startswith(("#", ")", "]", "}")):
            open_headers = [header for header in open_headers if header[0] < indentation]
        scopes.append(tuple(name for column, name in open_headers if column < indentation or not code))
        if match := _HEADER.match(line):
            open_headers.append((indentation, match.group(1)))
            seen.add(tuple(name for _, name in open_headers))
    return tuple(scopes), frozenset(seen)


def _splice(old: Source, new: Source, placed: Sequence[tuple[Range, Change]], current: Source) -> Source:
    """The current text with new lines at the given places."""
    bom = new.bom if current.bom == old.bom else current.bom
    if (current.lines, current.eols) == (old.lines, old.eols):
        return Source(current.path, new.lines, new.eols, bom)
    lines: list[str] = []
    eols: list[str] = []
    at = 0
    for place, change in placed:
        lines += [*current.lines[at : place.start], *new.lines[change.new.start : change.new.stop]]
        eols += [*current.eols[at : place.start], *_eols(old, new, change, current, place)]
        at = place.stop
    lines += current.lines[at:]
    eols += current.eols[at:]
    as_before = current.final_newline == old.final_newline or not current.lines
    final_newline = new.final_newline if as_before else current.final_newline
    return Source(current.path, tuple(lines), _terminated(eols, _newline(old, current), final_newline), bom)


def _newline(old: Source, current: Source) -> str:
    """The file's usual terminator; what it was when none is left."""
    return current.newline if any(current.eols) else old.newline


def _eols(old: Source, new: Source, change: Change, current: Source, place: Range) -> Sequence[str]:
    """Terminators of the new lines: their own, unless the file was converted since."""
    newline = _newline(old, current)
    then = old.eols[change.old.start : change.old.stop] or (old.newline,)
    now = current.eols[place.start : place.stop] or (newline,)
    own = new.eols[change.new.start : change.new.stop]
    kept = all(one == other for one, other in zip(then, now, strict=True) if one and other)
    return own if kept else [newline] * len(own)


def _terminated(eols: list[str], newline: str, final_newline: bool) -> tuple[str, ...]:
    """Every line terminated, the last one as asked."""
    filled = [eol or newline for eol in eols]
    if filled and not final_newline:
        filled[-1] = ""
    return tuple(filled)


def _edit(old: Source, new: Source, change: Change, current: Source, place: Range) -> Edit:
    """One change as an edit of the current text; `new` has the terminators that the lines shall get."""
    lines = new.lines[change.new.start : change.new.stop]
    eols = [eol or _newline(old, current) for eol in _eols(old, new, change, current, place)]
    return Edit(
        path=current.path,
        action="insert" if place.start == place.stop else "replace" if lines else "delete",
        start_line=place.start + 1,
        end_line=place.stop,
        pre=current.text_between(place.start + 1, place.stop),
        new="".join(line + eol for line, eol in zip(lines, [*eols[:-1], ""], strict=False)),
    )


def _not_found(
    old: Source, new: Source, changes: Sequence[Change], current: Source, places: Sequence[Range | None]
) -> StaleTextError:
    regions = _regions_now(old, current, changes)
    hunks: list[dict[str, Any]] = []
    for change, place, region in zip(changes, places, regions, strict=True):
        copies = _copies(old.lines[change.old.start : change.old.stop], current.lines) if place is None else []
        is_ambiguous = len(copies) > 1
        view = _copies_view(old, new, change, copies) if is_ambiguous else None
        hunks.append(
            {
                "hunk": change.hunk,
                "found": place is not None,
                "start_line": (place or region).start + 1,
                "copies": copies if is_ambiguous else [],
                "view": view or _three_way_view(old, new, change, current, place or region),
            }
        )
    missing = [hunk for hunk in hunks if not hunk["found"]]
    repeated = [hunk for hunk in missing if hunk["copies"]]
    if repeated == missing:
        told = "; ".join(f"{len(hunk['copies'])} times, at lines {_listed(hunk['copies'])}" for hunk in repeated)
        return StaleTextError(
            f"In {current.path} the lines of {len(missing)} of {len(changes)} hunks occur more than once ({told}), "
            "and nothing tells which are meant.",
            hint="Change them by hand at the right place, or make the others differ and try again.",
            path=current.path,
            hunks=hunks,
        )
    near = ", ".join(str(hunk["start_line"]) for hunk in missing)
    return StaleTextError(
        f"{current.path} was edited inside {len(missing)} of {len(changes)} hunks (near line {near}), "
        "or their lines cannot be told from others.",
        hint="Change those lines by hand with the three texts shown, or undo your edits to them and try again.",
        path=current.path,
        hunks=hunks,
    )


def _copies(block: Sequence[str], lines: Sequence[str]) -> list[int]:
    """The lines, from 1, at which a block begins."""
    if not block:
        return []
    return [start + 1 for start in range(len(lines) - len(block) + 1) if lines[start : start + len(block)] == block]


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > _MOST_LISTED:
        return f"{', '.join(map(str, numbers[:_MOST_LISTED]))} and {len(numbers) - _MOST_LISTED} more"
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _copies_view(old: Source, new: Source, change: Change, copies: Sequence[int]) -> str:
    parts = (
        (f"<<<<<<< is in the file {len(copies)} times, at lines {_listed(copies)}", change.old, old),
        ("======= would be put in its place", change.new, new),
    )
    shown = [line for title, at, text in parts for line in (title, *text.lines[at.start : at.stop])]
    return "\n".join([*shown, ">>>>>>>"])


def _regions_now(old: Source, current: Source, changes: Sequence[Change]) -> list[Range]:
    """About where each change's lines are now; good enough to be shown, not to be edited."""
    blocks = SequenceMatcher(None, old.lines, current.lines).get_opcodes()

    def image(line: int, *, at_end: bool) -> int:
        for tag, old_start, old_stop, new_start, new_stop in reversed(blocks) if not at_end else blocks:
            if old_start <= line <= old_stop:
                offset = line - old_start
                return new_start + offset if tag == "equal" else new_stop if at_end else new_start
        return 0

    regions: list[Range] = []
    for change in changes:
        start = image(change.old.start, at_end=False)
        regions.append(Range(start, max(start, image(change.old.stop, at_end=True))))
    return regions


def _three_way_view(old: Source, new: Source, change: Change, current: Source, now: Range) -> str:
    parts = (
        ("<<<<<<< now in the file", current.lines[now.start : now.stop]),
        ("||||||| was expected there", old.lines[change.old.start : change.old.stop]),
        ("======= would be put there", new.lines[change.new.start : change.new.stop]),
    )
    return "\n".join([*(line for title, lines in parts for line in (title, *lines)), ">>>>>>>"])
