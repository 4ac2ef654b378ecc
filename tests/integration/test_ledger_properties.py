"""Whatever is edited elsewhere: a roll-back gives the exact bytes of the hunks, or it is refused; so does a redo."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.errors import StaleTextError
from engine.patching.edits import Edit, apply_edits
from engine.patching.ledger import Ledger, Proposal
from engine.patching.relocate import Change, hunks_of, replant
from engine.patching.source import Source

LONG = os.environ.get("PLANPATCH_LONG") == "1"

POOL: tuple[str, ...] = (
    "",
    "def f(a):",
    "def g(a):",
    "class C:",
    "@decorated",
    "    def inner(b):",
    "        return b",
    "    return a",
    "\treturn a",
    "    pass",
    "\x0c",
    "    s = '🐍 é'",
    "x = 1\x0b\u2028",
    "# note",
)

lines: st.SearchStrategy[str] = st.sampled_from(POOL)
blocks: st.SearchStrategy[list[str]] = st.lists(lines, max_size=4)


@dataclass(frozen=True)
class Piece:
    """A run of lines around hunks, as it was and as the user left it; or a hunk, before and after the patch."""

    is_hunk: bool
    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class Case:
    """A file, a patch of it, and later edits outside the patch's hunks."""

    pieces: list[Piece]
    newline: str
    bom: bool
    final_newline: bool

    def text(self, *, patched: bool, edited: bool) -> bytes:
        """The file before or after the patch, without or with the user's edits."""
        chosen = [piece.after if (patched if piece.is_hunk else edited) else piece.before for piece in self.pieces]
        body = [line for piece in chosen for line in piece]
        text = self.newline.join(body) + (self.newline if self.final_newline and body else "")
        return ("\ufeff" * self.bom + text).encode("utf-8")

    def edits(self) -> list[Edit]:
        """The patch's hunks as edits of the base."""
        made: list[Edit] = []
        line = 1
        for piece in self.pieces:
            stop = line + len(piece.before)
            if piece.is_hunk:
                action = "insert" if not piece.before else "delete" if not piece.after else "replace"
                pre, new = self.newline.join(piece.before), self.newline.join(piece.after)
                made.append(Edit("m.py", action, line, stop - 1, pre, new))
            line = stop
        return made


@st.composite
def edited_runs(draw: st.DrawFn, *, unique: bool) -> Piece:
    """Lines around hunks: each may be kept, removed or replaced later, and new ones may be written anywhere."""
    before = draw(st.lists(lines, min_size=1, max_size=6))
    after: list[str] = []
    for number, line in enumerate(before):
        what = draw(st.sampled_from(("keep", "keep", "keep", "keep", "remove", "replace", "insert")))
        fresh = f"            🦎🦎{draw(st.integers(0, 10**9))}🦎🦎"
        edge = unique and number in (0, len(before) - 1)  # the neighbours of a gap are what it is found by
        if edge or what in ("keep", "insert"):
            after += [line, fresh] if what == "insert" and not edge else [line]
        elif what == "replace":
            after.append(fresh)
    return Piece(False, before, after)


@st.composite
def cases(draw: st.DrawFn, *, unique: bool) -> Case:
    """Files made of few different lines; with `unique`, what a hunk is found by is in the file once."""
    num_hunks = draw(st.integers(1, 3))
    pieces = [draw(edited_runs(unique=unique))]
    for number in range(num_hunks):
        before, after = draw(blocks), draw(blocks)
        if unique:
            before = [*before, f"    old({number})"] if before else before
            after = [*after, f"    new({number})"] if after or not before else after
            pieces[-1] = marked(pieces[-1], f"above({number})", at_end=True)
        elif before == after:
            after = [*after, "    changed"]
        pieces.append(Piece(True, before, after))
        pieces.append(draw(edited_runs(unique=unique)))
        if unique:
            pieces[-1] = marked(pieces[-1], f"below({number})", at_end=False)
    newline = draw(st.sampled_from(("\n", "\r\n", "\r")))
    final_newline = draw(st.booleans()) or any("" in (*piece.before[-1:], *piece.after[-1:]) for piece in pieces)
    return Case(pieces, newline, draw(st.booleans()), final_newline)


def marked(piece: Piece, line: str, *, at_end: bool) -> Piece:
    """A run with a line of its own next to the hunk."""
    if at_end:
        return Piece(False, [*piece.before, line], [*piece.after, line])
    return Piece(False, [line, *piece.before], [line, *piece.after])


def source(data: bytes) -> Source:
    return Source.from_bytes(data, "m.py")


def turned(case: Case, now: bytes, *, back: bool) -> bytes | None:
    """The text after a roll-back (or redo) of every hunk; None if it is refused."""
    base = source(case.text(patched=False, edited=False))
    patched = apply_edits(base, case.edits())
    assert patched.to_bytes() == case.text(patched=True, edited=False)
    hunks = hunks_of(case.edits())
    try:
        if back:
            changes = [Change(hunk.index, hunk.patched, hunk.base) for hunk in hunks]
            return replant(patched, base, changes, source(now)).source.to_bytes()
        changes = [Change(hunk.index, hunk.base, hunk.patched) for hunk in hunks]
        return replant(base, patched, changes, source(now)).source.to_bytes()
    except StaleTextError:
        return None


# The same cases in every run: among few different lines two histories can, very rarely, end in one text.
@settings(max_examples=12_000 if LONG else 1_000, deadline=None, derandomize=True)
@given(cases(unique=False))
def test_a_hunk_is_never_put_in_a_wrong_place(case: Case) -> None:
    for back in (True, False):
        result = turned(case, case.text(patched=back, edited=True), back=back)
        event("refused" if result is None else "found")
        assert result in (None, case.text(patched=not back, edited=True))


@settings(max_examples=12_000 if LONG else 1_000, deadline=None)
@given(cases(unique=True))
def test_edits_elsewhere_never_block(case: Case) -> None:
    for back in (True, False):
        assert turned(case, case.text(patched=back, edited=True), back=back) == case.text(patched=not back, edited=True)


@settings(max_examples=1_000 if LONG else 50, deadline=None)
@given(cases(unique=True))
def test_a_roll_back_works_after_restart_and_can_be_undone_any_number_of_times(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, path = Path(folder) / "ledger.sqlite3", Path(folder) / "m.py"
        path.write_bytes(case.text(patched=False, edited=False))
        with Ledger(home) as ledger:
            patch_id = ledger.propose(proposal(case, path))
            ledger.apply(patch_id)
        assert path.read_bytes() == case.text(patched=True, edited=False)
        path.write_bytes(case.text(patched=True, edited=True))
        for _ in range(2):
            with Ledger(home) as ledger:
                ledger.rollback(patch_id)
            assert path.read_bytes() == case.text(patched=False, edited=True)
            with Ledger(home) as ledger:
                ledger.redo(patch_id)
            assert path.read_bytes() == case.text(patched=True, edited=True)


def proposal(case: Case, path: Path) -> Proposal:
    """The case's patch as a proposal."""
    return Proposal(
        key="key",
        path=path,
        scope="",
        scope_kind="module",
        start_line=1,
        end_line=1,
        base=case.text(patched=False, edited=False),
        patched=case.text(patched=True, edited=False),
        edits=tuple(case.edits()),
        surface="cli",
    )
