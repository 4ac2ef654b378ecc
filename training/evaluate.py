"""The A/B gate's measurement: two adapters of one model on the same held-out edits and the same general tasks.

    rows ─▶ without those trained on ─▶ for each: the exact prompt, both greedy answers ─▶ judged by gates and by tree
         ─▶ rates, paired difference with its interval, speed ─▶ the general tasks, so that forgetting is seen

One answer a row is judged, as the model gave it: no repair, no second choice. Rows are lines of a data set (`input` and
`output`), or edits: what `planpatch bench cases` reads, and `after`. A line of a data set whose edit is in the journal
is judged in its whole file; of another only the answer is.

Not covered: whether an edit that differs from the kept one is right all the same. It counts as wrong, for both.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from engine.errors import ContextLengthError, EngineError, PlanPatchError, UsageError
from engine.inference.adapters import BASE
from engine.inference.protocol import Completion, Engine, FinishReason, GenerationRequest, Message, Priority
from engine.patching.context import build_context, prompt_source
from engine.patching.directives import without_directives
from engine.patching.disk import read_bytes
from engine.patching.formats import FORMATS
from engine.patching.patcher import PatcherOptions
from engine.patching.prompts import Task
from engine.patching.proof import Question, prove
from engine.patching.scopes import ParseFault, Scope, find_scope, parse_text
from engine.patching.source import PASTED, Source
from training.general import TASKS, GeneralTask, passes, request_of
from training.paired import Difference, difference
from training.samples import DEFAULT_FORMAT

_FENCED = "python\n"
OnStep = Callable[[int, int, str], None]


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One held-out edit.

    Args:
        id: Its name.
        messages: The chat that asks for it.
        prefill: The given beginning of the answer.
        stop: What ends the answer.
        expected: The file after it; the answer alone where there is no question.
        question: What the answer is about; None where the file is not known.
    """

    id: str
    messages: tuple[Message, ...]
    prefill: str
    stop: tuple[str, ...]
    expected: str
    question: Question | None

    @property
    def digest(self) -> str:
        """Names the question, as `trained_on` does."""
        return _digest("\n".join(message.content for message in self.messages))


@dataclass(slots=True)
class HeldOut:
    """What is judged.

    Args:
        rows: The rows.
        name: The file's name.
        sha256: Of the file.
        left_out: Lines that are not used, by reason.
    """

    rows: list[Row]
    name: str
    sha256: str
    left_out: Counter[str] = field(default_factory=Counter[str])


def read_held_out(
    path: Path,
    journal: Iterable[Mapping[str, Any]],
    options: PatcherOptions,
    seen: frozenset[str] = frozenset(),
    seen_ids: frozenset[str] = frozenset(),
) -> HeldOut:
    """Read held-out edits, without those that were trained on.

    Args:
        path: `val_from_logs.jsonl`, or a file of edits.
        journal: The journal's records, which have the files of its lines.
        options: The budget of surroundings and the style, for edits.
        seen: Digests of the questions that were trained on.
        seen_ids: Ids of the edits that were trained on.

    Returns:
        The rows.

    Raises:
        PathError: The file cannot be read.
        UsageError: A line is malformed, or no row is left.
    """
    data = read_bytes(path)
    held_out = HeldOut([], path.name, hashlib.sha256(data).hexdigest())
    records = {record["id"]: record for record in journal if record["kind"] == "edit"}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        row = _row(line, f"{path}:{number}", records, options)
        if row.digest in seen or row.id in seen_ids:
            held_out.left_out["trained on"] += 1
        elif row.question is not None and row.question.source.text == row.expected:
            held_out.left_out["nothing changes"] += 1
        else:
            held_out.rows.append(row)
    if not held_out.rows:
        why = ", ".join(f"{count} {reason}" for reason, count in held_out.left_out.items())
        raise UsageError(
            f"{path} has no row to judge by{f' ({why})' if why else ''}",
            hint="Keep more edits and run planpatch train dataset, or give --data FILE with edits of your own.",
        )
    return held_out


def trained_on(path: Path) -> frozenset[str]:
    """Digests of the questions of a data set.

    Args:
        path: `train_from_logs.jsonl`; need not exist.

    Returns:
        One digest for each question.

    Raises:
        PathError: It cannot be read.
        UsageError: A line is malformed.
    """
    if not path.exists():
        return frozenset()
    lines = enumerate(read_bytes(path).split(b"\n"), 1)
    return frozenset(
        _digest(_question_text(_object(line, f"{path}:{number}"))) for number, line in lines if line.strip()
    )


def _row(line: bytes, where: str, records: Mapping[str, Mapping[str, Any]], options: PatcherOptions) -> Row:
    value = _object(line, where)
    try:
        if "before" in value and "after" in value:
            return _edit_row(value, options)
        if "input" in value and "output" in value:
            return _data_row(value, records.get(str(value.get("id"))))
    except KeyError as missing:
        raise UsageError(f"{where} has no {missing}", hint="See docs/learning.md for what a line must have.") from None
    except PlanPatchError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None
    raise UsageError(f"{where} has neither input and output nor before and after", hint="docs/learning.md has both.")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value: object = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}", hint="Each line must be one whole JSON object.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object", hint="Each line must be one whole JSON object.")
    return cast("dict[str, Any]", value)


def _edit_row(value: Mapping[str, Any], options: PatcherOptions) -> Row:
    source = Source.from_text(str(value["before"]), str(value["file_name"]))
    scope = _scope_of(source, str(value.get("scope", "function")), value.get("function"))
    context = build_context(prompt_source(source), scope, max_chars=options.surroundings_chars)
    task, edit_format = Task(context, str(value["intent"]), options.style), FORMATS[DEFAULT_FORMAT]
    return Row(
        id=str(value["id"]),
        messages=tuple(edit_format.messages(source, scope, task, "")),
        prefill=edit_format.prefill(task),
        stop=edit_format.stop(task),
        expected=Source.from_text(str(value["after"]), source.path).text,
        question=Question(source, scope, source, scope, DEFAULT_FORMAT),
    )


def _scope_of(source: Source, scope: str, function: object) -> Scope:
    if scope == "file":
        return find_scope(source)
    return find_scope(source, scope.removeprefix("class:") if scope.startswith("class:") else str(function or ""))


def _data_row(value: Mapping[str, Any], record: Mapping[str, Any] | None) -> Row:
    prefill = str(value.get("prefill") or "")
    stop = (f"\n{prefill.removesuffix(_FENCED)}",) if prefill.endswith(_FENCED) else ()
    answer = str(value["output"]).removeprefix(prefill).removesuffix("".join(stop))
    question = None if record is None else _question_of(record)
    patched = None if question is None else prove(question, answer).report.patched
    return Row(
        id=str(value.get("id", "")),
        messages=(Message("user", _question_text(value)),),
        prefill=prefill,
        stop=stop,
        expected=answer if patched is None else patched.text,
        question=None if patched is None else question,
    )


def _question_text(value: Mapping[str, Any]) -> str:
    return "\n\n".join(text for text in (str(value.get("instruction") or ""), str(value["input"])) if text)


def _question_of(record: Mapping[str, Any]) -> Question:
    source = Source.from_text(str(record["base"]), str(record["path"] or PASTED))
    scope = find_scope(source, record["scope"], record["start_line"]) if record["scope"] else find_scope(source)
    drops = bool(record["settings"].get("without_directives"))
    view, view_scope = without_directives(source, scope) if drops else (source, scope)
    return Question(source, scope, view, view_scope, DEFAULT_FORMAT)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer.

    Args:
        text: What the model wrote.
        is_right: Whether the result has the kept text's syntax tree.
        is_exact: Whether it is the kept text.
        is_valid: Whether every gate passed.
        is_edited: Whether anything changed.
        gate: The gate that refused it, `tokens` where it did not end; empty if none did.
        num_tokens: Tokens of the answer.
    """

    text: str
    is_right: bool = False
    is_exact: bool = False
    is_valid: bool = False
    is_edited: bool = False
    gate: str = ""
    num_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The verdict for programs, without the text."""
        return {
            "right": self.is_right,
            "exact": self.is_exact,
            "valid": self.is_valid,
            "edited": self.is_edited,
            "gate": self.gate,
            "tokens": self.num_tokens,
        }


@dataclass(slots=True)
class Side:
    """All answers of one adapter.

    Args:
        adapter: Its folder, `__none__` for the base model.
        judged: Its answers, row by row.
        passed: Which general tasks it passed.
        seconds: Wall clock of its answers to the rows.
    """

    adapter: str
    judged: list[Judged] = field(default_factory=list[Judged])
    passed: list[bool] = field(default_factory=list[bool])
    seconds: float = 0.0

    def rates(self) -> dict[str, Any]:
        """Counts and speed for programs."""
        num_tokens = sum(one.num_tokens for one in self.judged)
        return {
            "right": sum(one.is_right for one in self.judged),
            "exact": sum(one.is_exact for one in self.judged),
            "valid": sum(one.is_valid for one in self.judged),
            "edited": sum(one.is_edited for one in self.judged),
            "refused_by": dict(Counter(one.gate for one in self.judged if one.gate)),
            "tokens": num_tokens,
            "seconds": round(self.seconds, 1),
            "tok_per_s": round(num_tokens / self.seconds, 1) if self.seconds else None,
        }


@dataclass(slots=True)
class Evaluation:
    """Base and candidate, side by side.

    Args:
        held_out: What was judged.
        base: Answers of what is compared with.
        candidate: Answers of the adapter.
        tasks: The general tasks; none if they were left out.
    """

    held_out: HeldOut
    base: Side
    candidate: Side
    tasks: Sequence[GeneralTask]

    @property
    def right(self) -> Difference:
        """Edits whose result is the kept one."""
        return self._of(lambda one: one.is_right)

    @property
    def valid(self) -> Difference:
        """Edits that every gate passed."""
        return self._of(lambda one: one.is_valid)

    @property
    def general(self) -> Difference:
        """General tasks that passed their checks."""
        return difference(self.base.passed, self.candidate.passed)

    def _of(self, holds: Callable[[Judged], bool]) -> Difference:
        return difference(list(map(holds, self.base.judged)), list(map(holds, self.candidate.judged)))

    def to_json(self) -> dict[str, Any]:
        """The figures, without a text or a path of the user's."""
        return {
            "edits": {
                "data": self.held_out.name,
                "data_sha256": self.held_out.sha256,
                "rows": len(self.held_out.rows),
                "left_out": dict(self.held_out.left_out),
                "base": self.base.rates(),
                "candidate": self.candidate.rates(),
                "right": self.right.to_json(),
                "valid": self.valid.to_json(),
            },
            "general": {
                "tasks": len(self.tasks),
                "base": sum(self.base.passed),
                "candidate": sum(self.candidate.passed),
                "passed": self.general.to_json(),
            }
            if self.tasks
            else None,
        }

    def rows_to_json(self) -> list[dict[str, Any]]:
        """Each row's verdicts, for programs."""
        pairs = zip(self.held_out.rows, self.base.judged, self.candidate.judged, strict=True)
        return [{"id": row.id, "base": one.to_json(), "candidate": other.to_json()} for row, one, other in pairs]


def evaluate(
    engine: Engine,
    held_out: HeldOut,
    candidate: str,
    options: PatcherOptions,
    *,
    against: str = BASE,
    tasks: Sequence[GeneralTask] = TASKS,
    num_together: int = 1,
    on_step: OnStep | None = None,
) -> Evaluation:
    """Answer every row and task with both, and judge the answers.

    Both answer a few rows in turn, so that a machine that slows down slows both.

    Args:
        engine: The model, ready.
        held_out: The rows.
        candidate: The adapter's folder.
        options: Budgets of PATCH; time limits do not count.
        against: What it is compared with: `__none__` for the base model, or another adapter's folder.
        tasks: General tasks; none leaves them out.
        num_together: Rows that are decoded together.
        on_step: Told how many of how many answers are there, and what is done.

    Returns:
        All verdicts.

    Raises:
        AdapterError: An adapter does not fit.
        EngineError: The engine failed.
    """
    base, other = Side(against), Side(candidate)
    num_steps = 2 * (len(held_out.rows) + len(tasks))
    num_done = 0

    def note(what: str, count: int) -> None:
        nonlocal num_done
        num_done += count
        if on_step is not None:
            on_step(num_done, num_steps, what)

    note("edits", 0)
    for number, rows in enumerate(_chunks(held_out.rows, num_together)):
        for side in (base, other) if number % 2 == 0 else (other, base):
            _answer_rows(engine, side, rows, options)
            note("edits", len(rows))
    for tasks_together in _chunks(tasks, num_together):
        for side in (base, other):
            requests = [request_of(task, engine.tokenizer, side.adapter) for task in tasks_together]
            answers = _complete(engine, requests)
            side.passed += [
                one is not None and passes(task, one.text) for task, one in zip(tasks_together, answers, strict=True)
            ]
            note("general tasks", len(tasks_together))
    return Evaluation(held_out, base, other, tasks)


def _answer_rows(engine: Engine, side: Side, rows: Sequence[Row], options: PatcherOptions) -> None:
    started_at = time.monotonic()
    answers = _complete(engine, [_request(engine, row, options, side.adapter) for row in rows])
    side.seconds += time.monotonic() - started_at
    side.judged += [judge(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _request(engine: Engine, row: Row, options: PatcherOptions, adapter: str) -> GenerationRequest:
    tokenizer = engine.tokenizer
    function = row.expected if row.question is None else _function_of(row.question)
    budget = int(options.tokens_per_function_token * len(tokenizer.encode(function))) + options.extra_tokens
    params = options.patch.params(max(options.patch.max_new_tokens, budget), stop=row.stop)
    prompt = tokenizer.encode_chat(row.messages, prefill=row.prefill)
    return GenerationRequest(tuple(prompt), params, Priority.BACKGROUND, adapter)


def _function_of(question: Question) -> str:
    return question.view.plain_text(question.view_scope.start_line, question.view_scope.end_line)


def _complete(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Completion | None]:
    """Completions of requests that are decoded together; None for one that does not fit the model's context."""
    ids: list[str | None] = []
    try:
        for request in requests:
            try:
                ids.append(engine.submit(request))
            except ContextLengthError:
                ids.append(None)
        return [None if one is None else _completion(engine, one) for one in ids]
    finally:
        for one in ids:
            if one is not None:
                engine.cancel(one)


def _completion(engine: Engine, request_id: str) -> Completion:
    for event in engine.stream(request_id):
        if isinstance(event, Completion):
            return event
    raise EngineError("The stream ended without a completion")


def judge(row: Row, answer: Completion | None) -> Judged:
    """Judge one answer.

    Args:
        row: What was asked.
        answer: What the model wrote; None if the question did not fit.

    Returns:
        The verdict.
    """
    if answer is None:
        return Judged("", gate="context")
    num_tokens = len(answer.token_ids)
    if answer.finish_reason is not FinishReason.STOP:
        return Judged(answer.text, is_edited=True, gate="tokens", num_tokens=num_tokens)
    if row.question is None:
        is_valid = _tree(row.expected) is None or _tree(answer.text) is not None
        return Judged(
            text=answer.text,
            is_right=_is_same_code(answer.text, row.expected),
            is_exact=answer.text.strip() == row.expected.strip(),
            is_valid=is_valid,
            is_edited=bool(answer.text.strip()),
            gate="" if is_valid else "ast",
            num_tokens=num_tokens,
        )
    report = prove(row.question, answer.text).report
    gate = "" if report.refused is None else report.refused.gate
    if report.patched is None:
        return Judged(answer.text, is_edited=gate != "change", gate=gate, num_tokens=num_tokens)
    return Judged(
        text=answer.text,
        is_right=_is_same_code(report.patched.text, row.expected),
        is_exact=report.patched.text == row.expected,
        is_valid=True,
        is_edited=True,
        num_tokens=num_tokens,
    )


def _is_same_code(one: str, other: str) -> bool:
    """Whether two texts have one syntax tree, layout and comments not counted; where one has none, one text."""
    trees = _tree(one), _tree(other)
    return one.strip() == other.strip() if None in trees else trees[0] == trees[1]


def _tree(text: str) -> str | None:
    try:
        return ast.dump(parse_text(text))
    except ParseFault:
        return None


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
