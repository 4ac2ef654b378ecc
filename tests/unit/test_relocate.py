"""Hunks are found again after edits elsewhere, and are never found by luck."""

from __future__ import annotations

import pytest

from engine.errors import StaleTextError
from engine.patching.edits import Edit, apply_edits
from engine.patching.relocate import Change, Range, hunks_of, relocate, replant
from engine.patching.source import Source


def found(old: str, new: str, block: str, *, replacement: str | None = None, occurrence: int = 0) -> str | None:
    """The lines found, with the number of the first one, for a block named by its text."""
    old_lines, new_lines, wanted = old.split("\n"), new.split("\n"), block.split("\n")
    starts = [i for i in range(len(old_lines)) if old_lines[i : i + len(wanted)] == wanted]
    start = starts[occurrence]
    replacements = None if replacement is None else [replacement.split("\n") if replacement else []]
    place = relocate(old_lines, new_lines, [Range(start, start + len(wanted))], replacements)[0]
    return None if place is None else f"{place.start + 1}: " + "\n".join(new_lines[place.start : place.stop])


def gap(old: str, new: str, line: int, restored: str = "restored") -> int | None:
    """The line of the new text that stands right below a gap of the old one; both 1-based."""
    place = relocate(old.split("\n"), new.split("\n"), [Range(line - 1, line - 1)], [[restored]])[0]
    return None if place is None else place.start + 1


TWO_FUNCTIONS = """\
def first(a):
    total = a
    return total

def second(a):
    total = a
    return total
"""


def test_a_block_is_found_after_lines_were_added_above() -> None:
    assert found("a\nhunk\nb", "new\nnew 🐍\na\nhunk\nb", "hunk") == "4: hunk"


def test_a_block_is_found_after_lines_were_removed_above_and_changed_below() -> None:
    assert found("a\nb\nc\nhunk\nd\ne", "c\nhunk\nd\nE", "hunk") == "2: hunk"


def test_a_block_is_found_when_the_lines_next_to_it_were_changed() -> None:
    assert found("a\nhunk\nb", "A\nhunk\nB", "hunk") == "2: hunk"


def test_a_block_is_found_when_its_function_was_renamed() -> None:
    assert found(TWO_FUNCTIONS, TWO_FUNCTIONS.replace("second", "renamed"), "    total = a", occurrence=1) == (
        "6:     total = a"
    )


def test_a_changed_block_is_not_found() -> None:
    assert found("a\nhunk 1\nhunk 2\nb", "a\nhunk 1\nhunk two\nb", "hunk 1\nhunk 2") is None


def test_a_block_with_a_line_written_into_it_is_not_found() -> None:
    assert found("a\nhunk 1\nhunk 2\nb", "a\nhunk 1\nmore\nhunk 2\nb", "hunk 1\nhunk 2") is None


def test_a_changed_block_is_not_found_in_another_function_with_the_same_lines() -> None:
    edited = TWO_FUNCTIONS.replace("def second(a):\n    total = a", "def second(a):\n    total = a + 1")
    assert found(TWO_FUNCTIONS, edited, "    total = a", occurrence=1) is None
    assert found(TWO_FUNCTIONS, edited, "    total = a", occurrence=0) == "2:     total = a"


def test_a_changed_block_is_not_found_in_a_copy_of_its_function() -> None:
    old = "def f(a):\n    b = a\n    hunk(b)\n    return b\n"
    copied = old.replace("hunk(b)", "edited(b)") + "\n" + old.replace("def f", "def g")
    assert found(old, copied, "    hunk(b)") is None


def test_a_block_is_found_in_the_original_and_not_in_a_renamed_copy() -> None:
    old = "def f(a):\n    b = a\n    hunk(b)\n    return b\n"
    copy = old.replace("def f", "def g")
    assert found(old, old + "\n" + copy, "    hunk(b)") == "3:     hunk(b)"
    assert found(old, copy + "\n" + old, "    hunk(b)") == "8:     hunk(b)"


def test_a_function_pasted_twice_under_one_name_is_not_told_apart() -> None:
    old = "above = 1\ndef f(a):\n    hunk(a)\nbelow = 2"
    pasted = "above = 1\ndef f(a):\n    hunk(a)\ndef f(a):\n    hunk(a)\nbelow = 2"
    assert found(old, pasted, "    hunk(a)") is None


def test_one_of_two_equal_functions_removed_is_not_told_apart() -> None:
    twice = "above = 1\ndef f(a):\n    hunk(a)\ndef f(a):\n    hunk(a)\nbelow = 2"
    once = "above = 1\ndef f(a):\n    hunk(a)\nbelow = 2"
    assert found(twice, once, "    hunk(a)", occurrence=0) is None
    assert found(twice, once, "    hunk(a)", occurrence=1) is None


def test_the_second_of_two_equal_functions_is_found_after_edits_between_them() -> None:
    twice = "@first\ndef f(a):\n    hunk(a)\n\n@second\ndef f(a):\n    hunk(a)\n"
    edited = "import os\n@first\ndef f(a):\n    hunk(a)\n    more()\n\n# note\n@second\ndef f(a):\n    hunk(a)\n"
    assert found(twice, edited, "    hunk(a)", occurrence=1) == "10:     hunk(a)"
    assert found(twice, edited, "    hunk(a)", occurrence=0) == "4:     hunk(a)"


def test_a_line_doubled_next_to_itself_counts_as_one_place_only_if_the_result_is_the_same() -> None:
    assert found("a\n\nb", "a\n\n\nb", "", replacement="") == "2: "
    assert found("a\nx\nb", "a\nx\nx\nb", "x", replacement="y") is None


def test_a_block_that_moved_past_others_is_found_by_its_text() -> None:
    small = "def small(a):\n    x = a\n    hunk(x)\n    return x\n\n"
    large = "def large(a):\n" + "".join(f"    step_{i}(a)\n" for i in range(9)) + "    return a\n\n"
    assert found(small + large, large + small, "    hunk(x)") == "15:     hunk(x)"


def test_two_blocks_are_never_found_in_one_place() -> None:
    places = relocate(["x", "a", "x"], ["q", "x", "r"], [Range(0, 1), Range(2, 3)])
    assert places == [None, None]


def test_unchanged_text_gives_back_every_range() -> None:
    lines = ["x", "x", "x", ""]
    assert relocate(lines, lines, [Range(1, 2), Range(3, 3)]) == [Range(1, 2), Range(3, 3)]


def test_a_gap_is_found_between_its_neighbours() -> None:
    assert gap("a\nb\nc\nd", "new\na\nb\nc\nD", 3) == 4


def test_a_gap_is_found_when_a_neighbour_was_removed() -> None:
    assert gap("a\nb\nc\nd", "a\nb\nd", 3) == 3
    assert gap("a\nb\nc\nd", "a\nc\nd", 3) == 2
    assert gap("a\nb", "b", 1) == 1


def test_a_gap_is_found_when_a_neighbour_was_edited() -> None:
    assert gap("a\nvalue = 1\nc\nd", "a\nvalue = 2\nc\nd", 3) == 3
    assert gap("a\nb\nvalue = 1\nd", "a\nb\nvalue = 2\nd", 3) == 3
    assert gap("a\nvalue = 1\nreturn 1\nd", "a\nvalue = 2\nreturn 2\nd", 3) == 3


def test_a_gap_is_not_found_when_a_neighbour_gave_way_to_another_line() -> None:
    assert gap("a\nvalue = 1\nc\nd", "a\nimport os\nc\nd", 3) is None


def test_a_gap_with_lines_written_into_it_is_not_found() -> None:
    assert gap("a\nb\nc\nd", "a\nb\nnew\nc\nd", 3) is None
    assert gap("a\nb", "new\na\nb", 1) is None
    assert gap("a\nb", "restored\na\nb", 1) is None


def test_a_gap_at_the_end_of_a_function_stays_in_it_when_another_is_written_below() -> None:
    f, g = "def f(a):\n    b = a\n", "\n\ndef g(a):\n    return a\n"
    assert gap(f, f + g, 3, "    return b") == 3
    assert gap(f + "x = 1", f + g + "x = 1", 3, "    return b") == 3
    assert gap(f, f + "    more()\n" + g, 3, "    return b") is None


def test_a_large_file_is_searched_whole() -> None:
    old = [line for i in range(2_000) for line in (f"def f{i % 700}(a):", "    x = a", "    return x", "", "")]
    new = ["import os", *old[:4_000], "inserted", *old[4_010:]]
    blocks = [Range(i * 5 + 1, i * 5 + 2) for i in range(100, 2_000, 400)]
    places = relocate(old, new, blocks)
    assert [place and place.start for place in places] == [502, 2502, 4493, 6493, 8493]


def source(data: bytes) -> Source:
    return Source.from_bytes(data, "m.py")


def patched(base: bytes, *edits: tuple[int, int, str | None]) -> tuple[Source, Source, list[Edit]]:
    """The base, the patched text, and edits given as (start_line, end_line, new or None to delete)."""
    before = source(base)
    made = [
        Edit(
            "m.py",
            "delete" if new is None else "insert" if end < start else "replace",
            start,
            end,
            before.text_between(start, end),
            new or "",
        )
        for start, end, new in edits
    ]
    return before, apply_edits(before, made), made


def rolled_back(before: Source, after: Source, edits: list[Edit], now: bytes) -> bytes:
    changes = [Change(hunk.index, hunk.patched, hunk.base) for hunk in hunks_of(edits)]
    replanted = replant(after, before, changes, source(now))
    by_edits = apply_edits(source(now), replanted.edits, keep_newlines=True)
    assert by_edits.lines == replanted.source.lines
    return replanted.source.to_bytes()


def test_hunks_know_their_lines_before_and_after() -> None:
    _, after, edits = patched(b"a\nb\nc\nd\n", (1, 0, "top"), (2, 2, None), (3, 3, "C\nCC"), (5, 4, "end"))
    assert after.text == "top\na\nC\nCC\nd\nend\n"
    assert [(hunk.base, hunk.patched) for hunk in hunks_of(edits)] == [
        ((0, 0), (0, 1)),
        ((1, 2), (2, 2)),
        ((2, 3), (2, 4)),
        ((4, 4), (5, 6)),
    ]
    assert [(hunk.index, hunk.patched) for hunk in hunks_of(edits, [2])] == [(2, (2, 4))]


@pytest.mark.parametrize(
    ("base", "edits", "edit_elsewhere", "expected"),
    [
        (b"a\r\nb\r\nc\r\n", [(2, 2, "B\r\nBB")], (b"c\r\n", b"c\r\nnew\r\n"), b"a\r\nb\r\nc\r\nnew\r\n"),
        (b"\xef\xbb\xbfa\nb\nc", [(3, 3, None)], (b"a\n", b"a2\n"), b"\xef\xbb\xbfa2\nb\nc"),
        (b"a\r\nb\nc\r\nd\n", [(2, 3, "X\nY")], (b"d\n", b"d\ne\n"), b"a\r\nb\nc\r\nd\ne\n"),
        (b"\tdef f():\n\t\tpass\x0c\n# \xf0\x9f\x90\x8d", [(2, 2, None)], (b"\xf0", b"now \xf0"), None),
        (b"a\n\x0cb\nc\n", [(2, 1, "n"), (2, 2, "\x0cB")], (b"c\n", b"c\nlast"), b"a\n\x0cb\nc\nlast"),
    ],
    ids=["CRLF", "BOM and no final newline", "mixed terminators", "tabs and emoji", "form feed"],
)
def test_the_exact_bytes_come_back_after_edits_elsewhere(
    base: bytes, edits: list[tuple[int, int, str | None]], edit_elsewhere: tuple[bytes, bytes], expected: bytes | None
) -> None:
    before, after, made = patched(base, *edits)
    now = after.to_bytes().replace(*edit_elsewhere)
    assert now != after.to_bytes()
    assert rolled_back(before, after, made, now) == (expected or base.replace(*edit_elsewhere))
    assert rolled_back(before, after, made, after.to_bytes()) == base


def test_a_file_converted_to_crlf_since_gets_crlf_lines_back() -> None:
    before, after, made = patched(b"a\nb\nc\n", (2, 2, "B"))
    assert rolled_back(before, after, made, b"a\r\nB\r\nc\r\n") == b"a\r\nb\r\nc\r\n"


def test_a_final_newline_added_since_is_kept() -> None:
    before, after, made = patched(b"a\nb", (2, 2, "B"))
    assert after.to_bytes() == b"a\nB"
    assert rolled_back(before, after, made, b"a\nB\n") == b"a\nb\n"


def test_lines_that_occur_twice_are_told_as_such() -> None:
    """The three-way view showed the same lines twice, with nothing that differs."""
    before, after, made = patched("a\r\n\tx = 1  # 🐍\r\nb\r\n".encode(), (2, 2, "\tx = 2  # 🐍"))
    now = "a\r\n\tx = 2  # 🐍\r\nb\r\na\r\n\tx = 2  # 🐍\r\nb\r\n".encode()
    with pytest.raises(StaleTextError) as caught:
        rolled_back(before, after, made, now)
    assert caught.value.message == (
        "In m.py the lines of 1 of 1 hunks occur more than once (2 times, at lines 2 and 5), "
        "and nothing tells which are meant."
    )
    (hunk,) = caught.value.details["hunks"]
    assert hunk["copies"] == [2, 5]
    assert hunk["view"] == (
        "<<<<<<< is in the file 2 times, at lines 2 and 5\n\tx = 2  # 🐍\n"
        "======= would be put in its place\n\tx = 1  # 🐍\n>>>>>>>"
    )


def test_a_hunk_edited_since_is_refused_and_shown_three_ways() -> None:
    before, after, made = patched(b"a\nb\nc\nd\ne\n", (2, 2, "B"), (4, 4, "D"))
    with pytest.raises(StaleTextError) as caught:
        rolled_back(before, after, made, b"a\nB\nc\nmine\ne\n")
    first, second = caught.value.details["hunks"]
    assert (first["found"], second["found"]) == (True, False)
    assert second["start_line"] == 4
    assert second["view"] == (
        "<<<<<<< now in the file\nmine\n||||||| was expected there\nD\n======= would be put there\nd\n>>>>>>>"
    )
    assert "m.py was edited inside 1 of 2 hunks (near line 4)" in caught.value.message
