"""From a proposal of the ledger to what a model is trained on: the very prompt of PATCH, and the answer it should give.

The prompt is built anew from the ledger by the code that built it then, and the request's key says whether it is the
same: the key is a hash over everything that the prompt was made of. The answer is written in the default format and
read back by the code that reads a model's answers: it must turn the base into the text that the user kept.

Not covered: prompts of repair attempts (the first question is what is learnt), and proposals that were made before the
ledger kept the budget of surroundings, of which only those with the default budget can be told to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import PlanPatchError
from engine.inference.protocol import Message
from engine.patching.context import DEFAULT_MAX_CHARS, Context, build_context, prompt_source
from engine.patching.directives import without_directives
from engine.patching.formats import FORMATS, FormatName
from engine.patching.ledger import Entry, request_key
from engine.patching.ledger_records import source_of
from engine.patching.names import import_edit
from engine.patching.prompts import Feedback, Task
from engine.patching.proof import Question, prove
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import PASTED, Source

DEFAULT_FORMAT: FormatName = "rewrite"
_BESIDE_THE_KEY = ("surroundings_chars", "without_directives", "training_log")


@dataclass(frozen=True, slots=True)
class Sample:
    """What is learnt from one proposal.

    Args:
        messages: The chat that asks for the edit.
        prefill: The given beginning of the answer.
        answer: What the model should write after it, its end included.
        context: The parts of the prompt by name.
        function: The function's text before.
        kept: The function's text after.
        is_same_prompt: Whether the prompt is proved to be the one that the model was given.
        is_exact: Whether the answer, read as a model's, gives the kept text.
    """

    messages: tuple[Message, ...]
    prefill: str
    answer: str
    context: dict[str, str]
    function: str
    kept: str
    is_same_prompt: bool
    is_exact: bool


def sample_of(entry: Entry, final: Source) -> Sample:
    """The training sample of a proposal.

    Args:
        entry: The proposal.
        final: The file as it is to be after the edit: the patch's text, or the user's.

    Returns:
        The sample.

    Raises:
        PlanPatchError: The function is not in the text before, or not in the final text.
    """
    source = _source_before(entry)
    scope = _scope_before(entry, source)
    view, view_scope, context, is_same = _view(entry, source, scope)
    task = Task(context, entry.proposal.intent, str(entry.proposal.settings.get("style", "")), _feedback(entry))
    edit_format = FORMATS[DEFAULT_FORMAT]
    kept = _kept_text(entry, source, final)
    answer, is_exact = _answer(entry, Question(source, scope, view, view_scope, DEFAULT_FORMAT), final, kept)
    return Sample(
        messages=tuple(edit_format.messages(view, view_scope, task, entry.proposal.plan_text)),
        prefill=edit_format.prefill(task),
        answer=answer.rstrip("\n") + "".join(edit_format.stop(task)),
        context={
            name: str(getattr(context, name)) for name in ("imports", "class_header", "signatures", "before", "after")
        },
        function=context.function,
        kept=kept,
        is_same_prompt=is_same,
        is_exact=is_exact,
    )


def _source_before(entry: Entry) -> Source:
    path = entry.proposal.path
    return Source.from_bytes(entry.proposal.base, PASTED if path is None else path.as_posix())


def _scope_before(entry: Entry, source: Source) -> Scope:
    proposal = entry.proposal
    return find_scope(source, proposal.scope, proposal.start_line) if proposal.scope else find_scope(source)


def _feedback(entry: Entry) -> Feedback | None:
    found = entry.proposal.feedback
    return Feedback(found.get("reason", ""), found.get("hint", "")) if found else None


def _view(entry: Entry, source: Source, scope: Scope) -> tuple[Source, Scope, Context, bool]:
    """The file as the model was shown it, and whether the request's key proves that."""
    made: tuple[Source, Scope, Context] | None = None
    for max_chars, drops in _ways(entry.proposal.settings):
        view, view_scope = without_directives(source, scope) if drops else (source, scope)
        context = build_context(prompt_source(view), view_scope, max_chars=max_chars)
        if _key(entry, context) == entry.proposal.key:
            return view, view_scope, context, True
        made = made or (view, view_scope, context)
    assert made is not None
    return (*made, False)


def _ways(settings: Any) -> Iterator[tuple[int, bool]]:
    """Budgets of surroundings, and whether directives were left out: as recorded, else what it may have been."""
    if "surroundings_chars" in settings:
        yield int(settings["surroundings_chars"]), bool(settings.get("without_directives"))
        return
    yield DEFAULT_MAX_CHARS, False
    yield DEFAULT_MAX_CHARS, True


def _key(entry: Entry, context: Context) -> str:
    proposal = entry.proposal
    return request_key(
        scope_text=context.function,
        context=context.sha256,
        intent=proposal.intent,
        plan_text=proposal.plan_text,
        feedback=proposal.feedback,
        preset=proposal.preset,
        model_digest=proposal.model_digest,
        adapter_digest=proposal.adapter_digest,
        edit_format=proposal.edit_format,
        prompt_version=proposal.prompt_version,
        settings={name: value for name, value in proposal.settings.items() if name not in _BESIDE_THE_KEY},
    )


def _kept_text(entry: Entry, source: Source, final: Source) -> str:
    if not entry.proposal.scope:
        return final.plain_text()
    found = _scope_after(entry, source, final)
    return final.plain_text(found.start_line, found.end_line)


def _scope_after(entry: Entry, source: Source, final: Source) -> Scope:
    """The function in the final text; of several of its name the one that is the same number of lines from the end."""
    try:
        return find_scope(final, entry.proposal.scope)
    except PlanPatchError:
        return find_scope(final, entry.proposal.scope, entry.proposal.end_line + final.num_lines - source.num_lines)


def _answer(entry: Entry, question: Question, final: Source, kept: str) -> tuple[str, bool]:
    """The kept function, below the imports that it needs and does not get by itself."""
    imports = [text for text in entry.proposal.imports if import_edit(final, [text]) is None]
    alone = kept
    beside = "".join(f"{text}\n" for text in imports) + ("\n\n" if imports else "") + kept
    for answer in dict.fromkeys([alone, beside]):
        if _gives(entry, question, answer, kept, imports):
            return answer, True
    return alone, False


def _gives(entry: Entry, question: Question, answer: str, kept: str, imports: list[str]) -> bool:
    patched = prove(question, answer).report.patched
    if patched is None:
        return False
    try:
        return _kept_text(entry, question.source, patched) == kept and all(
            import_edit(patched, [text]) is None for text in imports
        )
    except PlanPatchError:
        return False


def final_source(entry: Entry) -> Source:
    """The file as the user kept it: the text that a label has, else what was applied, else the whole patch.

    Args:
        entry: The proposal.

    Returns:
        The text.

    Raises:
        PlanPatchError: There is none: the proposal was refused.
    """
    if entry.final_text is not None:
        return source_of(entry.final_text, entry.proposal.path)
    return entry.applied_text(entry.standing.hunks or None)
