"""The journal: what the user kept, one JSON line an edit, made from the ledger and masked.

The ledger is the truth. `bring_up_to_date` compares the number of each proposal's last event with the journal's and
writes a line for each that moved on, so it may run at any time, be killed at any moment, and run again: nothing that
was accepted is lost, nothing is there twice. Kinds of lines:

    edit         accepted, or not yet reviewed but kept: prompt, answer, texts, model, gates, times
    preference   rolled back or rejected, with what took its place: one prompt, two answers
    withdrawn    journaled once and taken back since; no texts
    withheld     kept, but not to be learnt from: its secrets could not be masked, or its function is gone; no texts

Every text of a line went through masking.py together. Not covered: a roll-back that the user replaced by hand (the
ledger does not see it), and events that the ledger's retention dropped before the journal was brought up to date; the
command line and the server do that before they let retention drop anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from engine.errors import PlanPatchError
from engine.patching.ledger import Entry, Label, Ledger, State, Summary
from engine.patching.ledger_records import path_key
from engine.patching.masking import mask_together
from training.consent import Consent
from training.journal_file import JournalFile
from training.samples import DEFAULT_FORMAT, Sample, final_source, sample_of

SCHEMA = 1
_REPOSITORY_MARKS = (".git", ".hg", ".svn", ".jj")
_NOT_TEXT = frozenset(
    {
        *(
            "kind",
            "id",
            "seq",
            "schema",
            "created_at",
            "kept_at",
            "applied_at",
            "path",
            "repository",
            "function_sha256",
        ),
        *(
            "model",
            "model_digest",
            "adapter_digest",
            "prompt_version",
            "edit_format",
            "format",
            "scope_kind",
            "surface",
        ),
        *("chosen_id", "rejected_id", "label", "state"),
    }
)


@dataclass(slots=True)
class Journaled:
    """What bringing the journal up to date did.

    Args:
        num_written: Lines written, by kind.
        num_left_out: Edits that may not be learnt from, by reason.
        num_masked: Masked places of the lines written, by kind of secret.
    """

    num_written: Counter[str] = field(default_factory=Counter[str])
    num_left_out: Counter[str] = field(default_factory=Counter[str])
    num_masked: Counter[str] = field(default_factory=Counter[str])

    def to_json(self) -> dict[str, dict[str, int]]:
        """The counts, for programs."""
        return {
            "written": dict(sorted(self.num_written.items())),
            "left_out": dict(sorted(self.num_left_out.items())),
            "masked": dict(sorted(self.num_masked.items())),
        }


def bring_up_to_date(
    journal: JournalFile, ledger: Ledger, consent: Consent, *, on_line: Callable[[], None] | None = None
) -> Journaled:
    """Write what the ledger has and the journal lacks.

    Args:
        journal: The journal.
        ledger: The ledger.
        consent: What may be learnt from.
        on_line: Called after each line; for tests.

    Returns:
        What was written and what was left out.

    Raises:
        LedgerError: The ledger or the switch cannot be read, or another process writes the journal for too long.
        WriteError: The journal cannot be written.
    """
    done = Journaled()
    with journal.writing():
        known = journal.heads()
        for record in _news(ledger, known, consent, done):
            journal.append(record)
            done.num_written[record["kind"]] += 1
            done.num_masked.update(record.get("masked", {}))
            if on_line is not None:
                on_line()
    return done


def _news(
    ledger: Ledger, known: Mapping[str, tuple[int, str]], consent: Consent, done: Journaled
) -> Iterator[dict[str, Any]]:
    last_events = ledger.last_events()
    summaries = [one for one in reversed(ledger.list_proposals(limit=None)) if one.id in last_events]
    for summary in summaries:
        if _is_unwelcome(summary):
            later = (one for one in summaries if one.id > summary.id and _replaces(one, summary))
            yield from _pair(ledger, summary, later, known, consent)
        seq, (old_seq, old_kind) = last_events[summary.id], known.get(summary.id, (-1, ""))
        if old_seq >= seq:
            continue
        if not _is_kept(summary):
            if old_kind == "edit":
                yield _bare("withdrawn", ledger.get(summary.id), seq)
            continue
        entry = ledger.get(summary.id)
        refusal = consent.refusal(entry.proposal.path, entry.proposal.settings, _times(entry))
        if refusal:
            done.num_left_out[refusal] += 1
            continue
        if entry.final_text is not None and f"{entry.id}+own" not in known:
            yield from _own_correction(entry, seq)
        yield _edit(entry, seq)


def _is_kept(summary: Summary) -> bool:
    """Whether an edit is kept: accepted; or unreviewed, and in its file or made to be logged.

    In an editor a verdict comes by itself, so there an unreviewed one is waited for.
    """
    if summary.label is not Label.UNREVIEWED:
        return summary.label is Label.ACCEPTED
    is_logged = summary.surface == "bench" and summary.state is State.PROPOSED
    return is_logged or (summary.surface != "lsp" and summary.state is State.APPLIED)


def _is_unwelcome(summary: Summary) -> bool:
    return summary.label in (Label.REJECTED, Label.ROLLED_BACK)


def _replaces(summary: Summary, earlier: Summary) -> bool:
    """Whether an accepted proposal is for the same function as an earlier one."""
    is_same = summary.scope == earlier.scope and summary.path == earlier.path and summary.path is not None
    return is_same and summary.label is Label.ACCEPTED


def _times(entry: Entry) -> list[str]:
    """When it was made, and when the user last said or showed something about it."""
    return [entry.created_at, entry.events[-1].at]


# --- lines -----------------------------------------------------------------------------------------------------------


def _edit(entry: Entry, seq: int) -> dict[str, Any]:
    try:
        final = final_source(entry)
        sample = sample_of(entry, final)
    except PlanPatchError as error:
        return _bare("withheld", entry, seq, reason=error.code)
    proposal = entry.proposal
    record = {
        **_head("edit", entry.id, seq, entry),
        **_about(entry),
        "label": entry.label.value,
        "label_reason": _label_reason(entry),
        "final_is_users": entry.final_text is not None,
        "kept_at": entry.events[-1].at,
        "applied_at": next((event.at for event in reversed(entry.events) if event.kind in ("applied", "redone")), None),
        **_said(entry),
        "context": sample.context,
        "base": proposal.base.decode("utf-8"),
        "final": final.to_bytes().decode("utf-8"),
        **_lesson(sample),
        "gates": list(proposal.gates),
        "repairs": list(proposal.repairs),
        "timings": dict(proposal.timings),
    }
    return _masked(record) or _bare("withheld", entry, seq, reason="secrets")


def _pair(
    ledger: Ledger, summary: Summary, later: Iterator[Summary], known: Mapping[str, tuple[int, str]], consent: Consent
) -> Iterator[dict[str, Any]]:
    """A proposal that was taken back, and the first accepted one after it that was made for the same function text."""
    for replacement in later:
        name = f"{summary.id}+{replacement.id}"
        if name in known:
            return
        entry, chosen = ledger.get(summary.id), ledger.get(replacement.id)
        settings = {**entry.proposal.settings, **chosen.proposal.settings}
        if consent.refusal(entry.proposal.path, settings, [*_times(entry), *_times(chosen)]):
            return
        try:
            worse, better = sample_of(entry, entry.applied_text()), sample_of(chosen, final_source(chosen))
        except PlanPatchError:
            continue
        if worse.function == better.function and worse.kept != better.kept:
            seq = max(entry.events[-1].seq, chosen.events[-1].seq)
            yield from _preference(name, seq, entry, worse, better, entry.label.value, chosen.id)
            return


def _own_correction(entry: Entry, seq: int) -> Iterator[dict[str, Any]]:
    """A patch that the user changed before keeping it: the user's text is preferred to the model's."""
    try:
        worse, better = sample_of(entry, entry.applied_text()), sample_of(entry, final_source(entry))
    except PlanPatchError:
        return
    if worse.kept != better.kept:
        yield from _preference(f"{entry.id}+own", seq, entry, worse, better, "changed_by_user", entry.id)


def _preference(
    name: str, seq: int, entry: Entry, worse: Sample, better: Sample, why: str, chosen_id: str
) -> Iterator[dict[str, Any]]:
    record = {
        **_head("preference", name, seq, entry),
        **_about(entry),
        "chosen_id": chosen_id,
        "rejected_id": entry.id,
        "why": why,
        **_said(entry),
        **_lesson(worse),
        "chosen": better.answer,
        "rejected": worse.answer,
        "is_exact": better.is_exact and worse.is_exact,
    }
    record.pop("answer")
    if (masked := _masked(record)) is not None:
        yield masked


def _head(kind: str, name: str, seq: int, entry: Entry) -> dict[str, Any]:
    return {"kind": kind, "id": name, "seq": seq, "schema": SCHEMA, "created_at": entry.created_at}


def _bare(kind: str, entry: Entry, seq: int, **facts: str) -> dict[str, Any]:
    path = entry.proposal.path
    return {**_head(kind, entry.id, seq, entry), "path": None if path is None else str(path), **facts}


def _about(entry: Entry) -> dict[str, Any]:
    proposal = entry.proposal
    return {
        "path": None if proposal.path is None else str(proposal.path),
        "repository": _repository(proposal.path),
        "scope": proposal.scope,
        "scope_kind": proposal.scope_kind,
        "start_line": proposal.start_line,
        "end_line": proposal.end_line,
        "surface": proposal.surface,
        "model": proposal.model,
        "model_digest": proposal.model_digest,
        "adapter_digest": proposal.adapter_digest,
        "edit_format": proposal.edit_format,
        "prompt_version": proposal.prompt_version,
        "settings": dict(proposal.settings),
    }


def _said(entry: Entry) -> dict[str, Any]:
    proposal = entry.proposal
    return {
        "intent": proposal.intent,
        "plan": proposal.plan_text,
        "feedback": dict(proposal.feedback),
        "preset": proposal.preset,
    }


def _lesson(sample: Sample) -> dict[str, Any]:
    return {
        "format": DEFAULT_FORMAT,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "prefill": sample.prefill,
        "answer": sample.answer,
        "function": sample.function,
        "kept": sample.kept,
        "is_same_prompt": sample.is_same_prompt,
        "is_exact": sample.is_exact,
    }


def _label_reason(entry: Entry) -> str:
    reasons = (event.data.get("reason") for event in reversed(entry.events) if event.kind in ("accepted", "label"))
    return next((str(reason) for reason in reasons if reason), "")


def _repository(path: Path | None) -> str | None:
    """The folder of the nearest version control above a file; None where there is none."""
    if path is None:
        return None
    found = (folder for folder in path.parents if any((folder / mark).exists() for mark in _REPOSITORY_MARKS))
    return path_key(next(found, None))


# --- masking ---------------------------------------------------------------------------------------------------------


def _masked(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record with every text in it masked together; None where that would break code."""
    texts: list[str] = []
    _walk(record, lambda text: texts.append(text) or text)
    masked = mask_together(texts)
    if not masked.is_sound:
        return None
    given = iter(masked.texts)
    return cast("dict[str, Any]", _walk(record, lambda _: next(given))) | {"masked": dict(masked.counts)}


def _walk(value: Any, change: Callable[[str], str], name: str = "") -> Any:
    """A copy of a JSON value with its texts changed, in a fixed order."""
    if isinstance(value, str):
        return value if name in _NOT_TEXT else change(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: _walk(inner, change, key) for key, inner in items}
    if isinstance(value, (list, tuple)):
        return [_walk(inner, change, name) for inner in cast("list[Any]", value)]
    return value
