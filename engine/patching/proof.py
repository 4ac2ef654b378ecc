"""From what the model wrote to the verdict of every gate: pure functions, which a `ParserProcess` can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import GateError, SourceError, UnknownScopeError
from engine.patching.directives import without_directives
from engine.patching.edits import Edit, apply_edits, diff_edits, edits_from_json, resolve_anchors, unified_diff
from engine.patching.formats import FORMATS, Answer, FormatName
from engine.patching.gates import GateReport, run_gates
from engine.patching.names import import_edit, suggest_imports
from engine.patching.notices import no_longer_returning
from engine.patching.scopes import Scope, find_scope, standalone_text
from engine.patching.source import Source


@dataclass(frozen=True, slots=True)
class Question:
    """What an answer is about.

    Args:
        source: The file as it is.
        scope: What is to be changed.
        view: The file as the model was shown it: `source`, or without the directives of its scope.
        view_scope: The scope in it.
        format_name: The edit format.
    """

    source: Source
    scope: Scope
    view: Source
    view_scope: Scope
    format_name: FormatName


@dataclass(frozen=True, slots=True)
class Proof:
    """What became of an answer.

    Args:
        report: Every gate's verdict.
        imports: Imports that the patch declares.
        diff: Unified diff; empty unless every gate passed.
        loses_its_value: Whether a function that returned something never does after it; known once every gate passed.
    """

    report: GateReport
    imports: tuple[str, ...] = ()
    diff: str = ""
    loses_its_value: bool = False


def prove(question: Question, text: str) -> Proof:
    """Make edits of an answer and judge them.

    Args:
        question: What it is about.
        text: What the model wrote.

    Returns:
        The verdicts; the edits are in the coordinates of `source` once every gate passed.
    """
    source, scope, view, view_scope = question.source, question.scope, question.view, question.view_scope
    answer = FORMATS[question.format_name].read(text, view, view_scope)
    edits, imports = _with_imports(view, view_scope, answer)
    report = run_gates(view, view_scope, edits, imports=imports, expected_sha256=view.sha256)
    if report.patched is not None and view != source:
        after = _cleaned(report.patched, view_scope)  # a neighbour's directive may have been copied
        edits = diff_edits(source, after.lines, (1, source.num_lines))
        report = run_gates(source, scope, edits, imports=imports, expected_sha256=source.sha256)
    if report.patched is None:
        return Proof(report, imports)
    loses_its_value = _loses_its_value(source, scope, report.patched)
    return Proof(report, imports, unified_diff(source, report.edits), loses_its_value)


def check_hunks(source: Source, scope: Scope, edits: Sequence[Edit], imports: Sequence[str], patch_id: str) -> None:
    """A part of a patch is another patch: every gate must pass it too.

    Args:
        source: The text that the patch was made for.
        scope: What it changes.
        edits: Some of its edits.
        imports: Imports that it declares.
        patch_id: Names it in the error.

    Raises:
        GateError: A gate refused these edits alone.
    """
    report = run_gates(source, scope, edits, imports=imports, expected_sha256=source.sha256)
    if report.refused is not None:
        raise GateError(
            f"These hunks alone were refused by the gate `{report.refused.gate}`: {report.refused.reason}",
            hint="Choose others, or the whole patch.",
            gate=report.refused.gate,
            gates=[verdict.to_json() for verdict in report.verdicts],
            patch_id=patch_id,
        )


def _loses_its_value(source: Source, scope: Scope, after: Source) -> bool:
    texts = [one.plain_text() for one in (source, after)]
    if not scope.parses:  # the scope alone was judged, and is what parses
        end_line = scope.end_line + after.num_lines - source.num_lines
        ends = (source, scope.end_line), (after, end_line)
        texts = [standalone_text(one.lines[scope.start_line - 1 : end], scope.indent) for one, end in ends]
    return bool(no_longer_returning(*texts))


def _cleaned(patched: Source, scope: Scope) -> Source:
    """A patched text without directives in its scope; as it is where the scope is not found again."""
    try:
        found = find_scope(patched, None if scope.kind == "module" else scope.qualname)
        return without_directives(patched, found)[0]
    except (UnknownScopeError, SourceError):
        return patched


def _with_imports(source: Source, scope: Scope, answer: Answer) -> tuple[Sequence[Any], tuple[str, ...]]:
    """The answer's edits and one more that declares the imports it wrote or forgot; unchanged if it is not valid."""
    edits = _tentative(source, scope, answer)
    if edits is None:
        return answer.edits, ()
    imports = list(answer.imports)
    patched = apply_edits(source, edits)
    imports += [text for text in suggest_imports(source, scope, patched) if text not in imports]
    edit = import_edit(source, imports)
    return ([edit, *edits], tuple(imports)) if edit else (answer.edits, ())


def _tentative(source: Source, scope: Scope, answer: Answer) -> list[Edit] | None:
    """The edits where they would go; None if a gate will refuse them anyway."""
    try:
        edits = [edit if isinstance(edit, Edit) else None for edit in answer.edits]
        known = [edit for edit in edits if edit is not None]
        if len(known) < len(edits):
            known = edits_from_json(list(answer.edits))
        return resolve_anchors(source, scope, known)[0]
    except ValueError:
        return None
