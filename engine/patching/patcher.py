"""From source text and an intent to a plan, and from there to a proved patch.

    context ─▶ PLAN ─▶ PATCH ─▶ gates ─▶ ledger: proposed or refused
                                 ├─ nothing changed: on from the second choices (divergence.py)
                                 └─ refused: one repair attempt that names the gate

Not covered: applying a patch (ledger.py) and everything a surface does.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from engine.errors import (
    BudgetError,
    CancelledError,
    ContextLengthError,
    GateError,
    RefusedError,
    StaleTextError,
    UsageError,
)
from engine.inference.protocol import (
    Completion,
    Engine,
    FinishReason,
    GenerationRequest,
    Message,
    Priority,
    SamplingParams,
    check_length,
)
from engine.inference.text_stop import StopText
from engine.patching.context import Context, build_context, prompt_source
from engine.patching.directives import without_directives
from engine.patching.divergence import Fork, likeliest_forks
from engine.patching.edits import Edit, apply_edits, unified_diff
from engine.patching.formats import FORMATS, EditFormat, FormatName, strip_thinking
from engine.patching.gates import GateReport, Verdict
from engine.patching.ledger import Ledger, request_key
from engine.patching.ledger_records import Entry, PlanRecord, Proposal, Surface
from engine.patching.parser_process import Call, in_this_process
from engine.patching.prompts import PROMPT_VERSION, Feedback, Task, plan_messages, repair_turns
from engine.patching.proof import Proof, Question, prove
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import PASTED, Source

Stage = Literal["plan", "patch", "repair", "prove"]
Listener = Callable[[Stage, str], None]

MAX_INTENT_CHARS = 20_000
_LEAST_SECOND_CHOICE = 0.02  # a model that is surer than this that nothing should change is believed
# Ledgers hold this sentence, and a stored patch is known by it: whoever rewords it keeps the old one known.
SECOND_CHOICE = (
    "The model's likeliest answer left the code as it is; this one goes on from a second choice. Look at it closely."
)


@dataclass(frozen=True, slots=True)
class StageOptions:
    """Budgets and sampling of PLAN or PATCH; the defaults of DECISIONS.md.

    Args:
        max_new_tokens: Token budget; for `rewrite` its lower bound.
        repetition_penalty: transformers' meaning.
        max_time_s: Wall clock from leaving the queue; None for no limit.
        temperature: 0 is greedy.
        top_k: For sampling.
        top_p: For sampling.
        seed: For sampling.
    """

    max_new_tokens: int
    repetition_penalty: float
    max_time_s: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def params(self, max_new_tokens: int, **more: Any) -> SamplingParams:
        """Sampling parameters with a token budget."""
        sampling = {"top_k": self.top_k, "top_p": self.top_p, "seed": self.seed} if self.temperature > 0 else {}
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            max_time_s=self.max_time_s,
            temperature=self.temperature,
            repetition_penalty=self.repetition_penalty,
            **sampling,
            **more,
        )


@dataclass(frozen=True, slots=True)
class PatcherOptions:
    """How plans and patches are made.

    Args:
        plan: Budgets of PLAN.
        patch: Budgets of PATCH.
        tokens_per_function_token: For `rewrite`: budget per token of the function.
        extra_tokens: For `rewrite` of a function: added to that.
        extra_tokens_class: For `rewrite` of a class or file, which may gain whole functions: added to that.
        edit_format: `rewrite` or `json_edits`; `auto` is what the bench says.
        surroundings_chars: Characters of surroundings, the function not counted.
        context_tokens: Tokens of surroundings, the function not counted.
        style: A sentence on code style.
        num_repairs: Repair attempts after a gate refused.
        num_forks: Second choices that are followed when an answer changes nothing.
        forks_at_once: How many of them decode beside each other, as rows of one step; the result is the same.
        priority: Of every request.
        surface: Who asks, for the ledger.
        training_log: Whether what is kept of these proposals may be learnt from.
    """

    plan: StageOptions = StageOptions(16, 1.10, 60.0)
    patch: StageOptions = StageOptions(192, 1.03, 180.0)
    tokens_per_function_token: float = 1.3
    extra_tokens: int = 64
    extra_tokens_class: int = 384
    edit_format: Literal["auto", "rewrite", "json_edits"] = "auto"
    surroundings_chars: int = 1200
    context_tokens: int = 1024
    style: str = ""
    num_repairs: int = 1
    num_forks: int = 8
    forks_at_once: int = 1
    priority: Priority = Priority.INTERACTIVE
    surface: Surface = "cli"
    training_log: bool = True


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went.

    Args:
        queue_s: Seconds in the queue.
        prefill_s: Seconds of prefill.
        decode_s: Seconds of decode.
        total_s: Seconds from asking to having it.
        num_prompt_tokens: Prompt tokens, cached ones included.
        num_cached_tokens: Prompt tokens that the prefix cache held.
        num_tokens: Generated tokens.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0

    def plus(self, completion: Completion) -> Timings:
        """With one more generation."""
        return Timings(
            self.queue_s + completion.queue_s,
            self.prefill_s + completion.prefill_s,
            self.decode_s + completion.decode_s,
            self.total_s,
            self.num_prompt_tokens + completion.num_prompt_tokens,
            self.num_cached_tokens + completion.num_cached_tokens,
            self.num_tokens + len(completion.token_ids),
        )

    @property
    def generation_s(self) -> float:
        """Seconds of prefill and decode."""
        return self.prefill_s + self.decode_s

    def to_json(self) -> dict[str, float | int]:
        """The timings for programs."""
        seconds = {name: round(getattr(self, name), 4) for name in ("queue_s", "prefill_s", "decode_s", "total_s")}
        return {
            **seconds,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_tokens": self.num_tokens,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to a function, in a few words. The model writes the steps only.

    Args:
        id: Names the plan in the ledger.
        path: The file.
        scope: What is to be changed.
        base_sha256: sha256 of the file's bytes that it was made for.
        intent: What the user asked for.
        steps: What the model wrote, or what the user made of it.
        truncated: Whether the token limit ended it.
        dropped: Surroundings that did not fit, in words.
        timings: Where the time went.
    """

    id: str
    path: str
    scope: Scope
    base_sha256: str
    intent: str
    steps: tuple[str, ...]
    truncated: bool = False
    dropped: tuple[str, ...] = ()
    timings: Timings = Timings()

    @property
    def text(self) -> str:
        """The steps as lines."""
        return "\n".join(self.steps)

    def to_json(self) -> dict[str, Any]:
        """The plan as `/plan` returns it."""
        scope = self.scope
        return {
            "id": self.id,
            "function": scope.qualname,
            "kind": scope.kind,
            "path": self.path,
            "range": {"start_line": scope.start_line, "end_line": scope.end_line},
            "hash": self.base_sha256,
            "intent": self.intent,
            "steps": list(self.steps),
            "truncated": self.truncated,
            "dropped": list(self.dropped),
        }


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch that every gate passed.

    Args:
        id: Names it in the ledger; empty without one.
        source: The file before.
        patched: The file after.
        scope: What was changed.
        edits: Minimal hunks in the coordinates of `source`.
        imports: Imports that it declares.
        report: Every gate's verdict.
        diff: Unified diff.
        timings: Where the time went.
        num_attempts: Answers that were judged: 1, or more after a repair or second choices.
        is_known: Whether the ledger had it already.
    """

    id: str
    source: Source
    patched: Source
    scope: Scope
    edits: tuple[Edit, ...]
    imports: tuple[str, ...]
    report: GateReport | None
    diff: str
    timings: Timings
    num_attempts: int = 1
    is_known: bool = False
    gates: Sequence[Any] = ()
    repairs: Sequence[Any] = ()

    @property
    def is_second_choice(self) -> bool:
        """Whether the model's likeliest answer changed nothing, so that nobody should apply this one unseen."""
        return SECOND_CHOICE in self.repairs

    def to_json(self) -> dict[str, Any]:
        """The patch as `/patch_smart` returns it."""
        return {
            "ok": True,
            "patch_id": self.id,
            "path": self.source.path,
            "function": self.scope.qualname,
            "edits": [edit.to_json() for edit in self.edits],
            "imports": list(self.imports),
            "diff": self.diff,
            "patched": self.patched.text,
            "gates": list(self.gates),
            "repairs": list(self.repairs),
            "timings": self.timings.to_json(),
            "attempts": self.num_attempts,
            "second_choice": self.is_second_choice,
            "known": self.is_known,
        }


@dataclass(slots=True)
class _Attempt:
    """One answer of the model and what the gates said."""

    request: GenerationRequest
    completion: Completion
    text: str
    proof: Proof
    notes: tuple[str, ...] = ()

    @property
    def report(self) -> GateReport:
        return self.proof.report


@dataclass(slots=True)
class _Job:
    """One PATCH on its way; the model is shown `view`, which is `source` unless directives were left out of it."""

    source: Source
    scope: Scope
    view: Source
    view_scope: Scope
    task: Task
    plan_text: str
    edit_format: EditFormat
    key: str
    max_chars: int
    started_at: float
    timings: Timings = field(default_factory=Timings)
    gates_seen: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    num_attempts: int = 0


def check_intent(intent: str) -> None:
    """Refuse a text that is no intent.

    Args:
        intent: What the user wants.

    Raises:
        UsageError: It is longer than `MAX_INTENT_CHARS`.
    """
    if len(intent) > MAX_INTENT_CHARS:
        raise UsageError(
            f"The intent has {len(intent):,} characters; {MAX_INTENT_CHARS:,} are possible",
            hint="Say in a few sentences what is to be changed.",
        )


class Patcher:
    """Plans and patches with one engine and one ledger. Thread-safe as they are.

    Args:
        engine: The model.
        ledger: Where proposals are kept; None keeps none (then ids are empty).
        options: Budgets and formats.
        call: Where Python is read and patches are proved; a `ParserProcess` where this process has others to serve.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger | None,
        options: PatcherOptions | None = None,
        call: Call = in_this_process,
    ) -> None:
        self.engine = engine
        self.ledger = ledger
        self.options = options or PatcherOptions()
        self._call = call

    # --- plan -----------------------------------------------------------------------------------------------------

    def plan(
        self,
        source: Source,
        scope: Scope,
        intent: str,
        *,
        drop_directives: bool = False,
        listener: Listener | None = None,
    ) -> Plan:
        """Write a plan.

        Args:
            source: The file.
            scope: What to change.
            intent: What the user wants.
            drop_directives: The intent came from the scope's directives, so the model is not shown them.
            listener: Called with `plan` and each piece of text.

        Returns:
            The plan, in the ledger if there is one.

        Raises:
            BudgetError: Time ran out.
            ContextLengthError: The function does not fit.
            CancelledError: The request was cancelled.
        """
        started_at = time.monotonic()
        job = self._job(source, scope, intent, None, None, "", drop_directives)
        self._check_patch_fits(job)
        context = job.task.context
        messages = plan_messages(job.task)
        params = self.options.plan.params(self.options.plan.max_new_tokens, stop=("\n\n", "```"))
        completion = self._generate(self._request(messages, "", params), scope, "plan", listener)
        _check_ended(completion, "PLAN", is_plan=True)
        truncated = completion.finish_reason is FinishReason.LENGTH
        plan = Plan(
            id=f"plan_{uuid.uuid4().hex[:12]}",
            path=source.path,
            scope=scope,
            base_sha256=source.sha256,
            intent=intent,
            steps=_steps(strip_thinking(completion.text), truncated),
            truncated=truncated,
            dropped=context.dropped,
            timings=replace(Timings().plus(completion), total_s=time.monotonic() - started_at),
        )
        return replace(plan, id=self._keep_plan(plan, source)) if self.ledger else plan

    def _keep_plan(self, plan: Plan, source: Source) -> str:
        assert self.ledger is not None
        scope = plan.scope
        record = PlanRecord(
            path=_absolute(source.path),
            scope="" if scope.kind == "module" else scope.qualname,
            scope_kind=scope.kind,
            start_line=scope.start_line,
            end_line=scope.end_line,
            base=source.to_bytes(),
            steps=plan.steps,
            intent=plan.intent,
            truncated=plan.truncated,
            model=self.engine.status().model,
            timings=plan.timings.to_json(),
        )
        return self.ledger.add_plan(record)

    # --- patch ----------------------------------------------------------------------------------------------------

    def patch(
        self,
        source: Source,
        scope: Scope,
        intent: str,
        *,
        plan: Plan | None = None,
        feedback: Feedback | None = None,
        preset: str = "",
        fresh: bool = False,
        drop_directives: bool = False,
        listener: Listener | None = None,
    ) -> Patch:
        """Write a patch and prove it.

        Args:
            source: The file as it is now.
            scope: What to change.
            intent: What the user wants.
            plan: The plan to follow; its text must be for this very source.
            feedback: On an earlier patch.
            preset: Name of the preset that the intent came from.
            fresh: Do not return what the ledger has for the same request.
            drop_directives: Remove the scope's directives (`# pp: …`), which the intent came from.
            listener: Called with `patch` or `repair` and each piece of text, and with `prove` and none.

        Returns:
            A patch that every gate passed, in the ledger as proposed.

        Raises:
            GateError: No attempt passed the gates; the verdicts are in its details, the ledger has it as refused.
            StaleTextError: The source is not the plan's.
            BudgetError: Tokens or time ran out.
            ContextLengthError: The function does not fit.
            CancelledError: The request was cancelled.
        """
        if plan is not None and plan.base_sha256 != source.sha256:
            raise StaleTextError(f"{source.path} changed since the plan was made", hint="Plan again.", plan_id=plan.id)
        job = self._job(source, scope, intent, plan, feedback, preset, drop_directives)
        if not fresh and (known := self._known(job)) is not None:
            return known
        try:
            attempt = self._attempts(job, listener)
        except RefusedError as error:
            self._keep_refusal(job, plan, preset, error)
            raise
        patch = self._proved(job, attempt)
        return replace(patch, id=self._keep(job, plan, preset, patch)) if self.ledger else patch

    def _job(
        self,
        source: Source,
        scope: Scope,
        intent: str,
        plan: Plan | None,
        feedback: Feedback | None,
        preset: str,
        drop_directives: bool,
    ) -> _Job:
        check_intent(intent)
        view, view_scope = self._call(without_directives, source, scope) if drop_directives else (source, scope)
        context, max_chars = self._fitting_context(view, view_scope)
        task = Task(context, intent, self.options.style, feedback)
        plan_text = plan.text if plan else ""
        edit_format = FORMATS[self._format_name(scope)]
        status = self.engine.status()
        key = request_key(
            scope_text=task.context.function,
            context=task.context.sha256,
            intent=intent,
            plan_text=plan_text,
            feedback=feedback.to_json() if feedback else None,
            preset=preset,
            model_digest=status.model_digest,
            adapter_digest=status.adapter_digest,
            edit_format=edit_format.name,
            prompt_version=PROMPT_VERSION,
            settings=self._key_settings(),
        )
        return _Job(source, scope, view, view_scope, task, plan_text, edit_format, key, max_chars, time.monotonic())

    def _key_settings(self) -> dict[str, Any]:
        patch = self.options.patch
        return {
            "max_new_tokens": patch.max_new_tokens,
            "repetition_penalty": patch.repetition_penalty,
            "temperature": patch.temperature,
            "top_k": patch.top_k,
            "top_p": patch.top_p,
            "seed": patch.seed,
            "tokens_per_function_token": self.options.tokens_per_function_token,
            "extra_tokens": self.options.extra_tokens,
            "extra_tokens_class": self.options.extra_tokens_class,
            "style": self.options.style,
            "num_repairs": self.options.num_repairs,
            "num_forks": self.options.num_forks,
            "quantization": self.engine.status().quantization,
        }

    def _format_name(self, scope: Scope) -> FormatName:
        return "rewrite" if self.options.edit_format == "auto" else self.options.edit_format

    def _attempts(self, job: _Job, listener: Listener | None) -> _Attempt:
        """Ask and prove; where nothing changed follow second choices, else ask again with the gate's reason."""
        messages = job.edit_format.messages(job.view, job.view_scope, job.task, job.plan_text)
        attempt = self._attempt(job, messages, "patch", listener)
        num_repairs = 0
        while (refused := attempt.report.refused) is not None:
            job.gates_seen = [verdict.to_json() for verdict in attempt.report.verdicts]
            if refused.gate == "change" and (changing := self._second_choice(job, attempt, listener)) is not None:
                return changing
            if num_repairs == self.options.num_repairs:
                raise _refusal(refused, job.gates_seen)
            written = job.edit_format.prefill(job.task) + attempt.text + "".join(job.edit_format.stop(job.task))
            wants_json = job.edit_format.name == "json_edits"
            messages = [*messages, *repair_turns(written, refused.gate, refused.reason, wants_json=wants_json)]
            try:
                attempt = self._attempt(job, messages, "repair", listener)
            except ContextLengthError:  # the function fits; only the question with its answer does not
                raise _refusal(refused, job.gates_seen) from None
            num_repairs += 1
        return attempt

    def _attempt(self, job: _Job, messages: Sequence[Message], stage: Stage, listener: Listener | None) -> _Attempt:
        grammar = job.edit_format.grammar(job.view, job.view_scope)
        params = self.options.patch.params(
            self._patch_budget(job),
            stop=job.edit_format.stop(job.task),
            grammar=grammar,
            top_logprobs=2 if self.options.num_forks and grammar is None else 0,
        )
        request = self._request(messages, job.edit_format.prefill(job.task), params)
        completion = self._generate(request, job.scope, stage, listener)
        job.timings = job.timings.plus(completion)
        _check_ended(completion, "PATCH", is_plan=False)
        return self._judged(job, request, completion, completion.text, listener)

    def _judged(
        self, job: _Job, request: GenerationRequest, completion: Completion, text: str, listener: Listener | None
    ) -> _Attempt:
        job.num_attempts += 1
        if listener is not None:
            listener("prove", "")
        question = Question(job.source, job.scope, job.view, job.view_scope, job.edit_format.name)
        return _Attempt(request, completion, text, self._call(prove, question, text))

    def _second_choice(self, job: _Job, unchanged: _Attempt, listener: Listener | None) -> _Attempt | None:
        """On from the likeliest second choices of an answer, until one gives a patch; None if none does.

        One that changes comments alone is taken only if no other is found, one after which a function returns nothing
        any more never. All of them together stay within the time of one answer.
        """
        completion, found = unchanged.completion, None
        if not completion.top_logprobs:
            return None
        deadline_s = job.timings.generation_s + (self.options.patch.max_time_s or math.inf)
        forks = likeliest_forks(
            completion.token_ids,
            completion.top_logprobs,
            self.options.num_forks,
            min_probability=_LEAST_SECOND_CHOICE,
            excluded=self.engine.tokenizer.eos_token_ids,
        )
        for start in range(0, len(forks), self.options.forks_at_once):
            if (left_s := deadline_s - job.timings.generation_s) <= 0:
                break
            group = forks[start : start + self.options.forks_at_once]
            with closing(self._follow(job, unchanged, group, left_s, listener)) as attempts:
                for attempt in attempts:
                    if not attempt.report.ok or attempt.proof.loses_its_value:
                        continue
                    found = found or replace(attempt, notes=(SECOND_CHOICE,))
                    if attempt.report.changes_program:
                        return replace(attempt, notes=(SECOND_CHOICE,))
        return found

    def _follow(
        self, job: _Job, unchanged: _Attempt, forks: Sequence[Fork], left_s: float, listener: Listener | None
    ) -> Generator[_Attempt]:
        """The answers that go on from second choices, in their order; not those that do not end within the budget.

        All are in the engine at once and share the prompt's keys and values. Who closes this early cancels the rest.
        """
        params, asked = unchanged.request.params, deque[tuple[str, GenerationRequest, tuple[int, ...]]]()
        max_time_s = None if left_s == math.inf else left_s
        try:
            for fork in forks:
                head = (*unchanged.completion.token_ids[: fork.position], fork.token_id)
                if (left := params.max_new_tokens - len(head)) < 1:
                    continue
                request = replace(
                    unchanged.request,
                    prompt_token_ids=(*unchanged.request.prompt_token_ids, *head),
                    params=replace(params, max_new_tokens=left, max_time_s=max_time_s, top_logprobs=0),
                )
                asked.append((self._submit(request, job.scope), request, head))
            while asked:
                request_id, request, head = asked.popleft()
                completion = self._stream(request_id, "repair", listener)
                job.timings = job.timings.plus(completion)
                if completion.finish_reason is FinishReason.CANCELLED:
                    _check_ended(completion, "PATCH", is_plan=False)
                answer = StopText(params.stop)  # a stop string may begin in the head
                answer.push(self.engine.tokenizer.decode((*head, *completion.token_ids)))
                if completion.finish_reason is FinishReason.STOP or answer.is_stopped:
                    yield self._judged(job, request, completion, answer.text, listener)
        finally:
            for request_id, _, _ in asked:
                self.engine.cancel(request_id)

    def _check_patch_fits(self, job: _Job) -> None:
        """Refuse a function that PATCH could not write, before PLAN has read it for minutes."""
        messages = job.edit_format.messages(job.view, job.view_scope, job.task, job.plan_text)
        num_tokens = len(self.engine.tokenizer.encode_chat(messages, prefill=job.edit_format.prefill(job.task)))
        with _named(job.scope):
            check_length(num_tokens, self._patch_budget(job), self.engine.status().context_length)

    def _patch_budget(self, job: _Job) -> int:
        least = self.options.patch.max_new_tokens
        if job.edit_format.name == "json_edits":
            return least
        num_function_tokens = len(self.engine.tokenizer.encode(job.task.context.function))
        extra = self.options.extra_tokens if job.scope.kind == "function" else self.options.extra_tokens_class
        return max(least, int(self.options.tokens_per_function_token * num_function_tokens) + extra)

    def _proved(self, job: _Job, attempt: _Attempt) -> Patch:
        report = attempt.report
        assert report.patched is not None
        return Patch(
            id="",
            source=job.source,
            patched=report.patched,
            scope=job.scope,
            edits=report.edits,
            imports=attempt.proof.imports,
            report=report,
            diff=attempt.proof.diff,
            timings=replace(job.timings, total_s=time.monotonic() - job.started_at),
            num_attempts=job.num_attempts,
            gates=[verdict.to_json() for verdict in report.verdicts],
            repairs=[*report.repairs, *attempt.notes],
        )

    # --- ledger ---------------------------------------------------------------------------------------------------

    def _known(self, job: _Job) -> Patch | None:
        """What the ledger offers for the same request on the same text."""
        if self.ledger is None:
            return None
        entry: Entry | None = self.ledger.find(job.key, path=_absolute(job.source.path), base_sha256=job.source.sha256)
        if entry is None:
            return None
        edits = tuple(entry.proposal.edits)
        patched = apply_edits(job.source, edits)
        return Patch(
            id=entry.id,
            source=job.source,
            patched=patched,
            scope=job.scope,
            edits=edits,
            imports=tuple(entry.proposal.imports),
            report=None,
            diff=unified_diff(job.source, edits),
            timings=Timings(total_s=time.monotonic() - job.started_at),
            is_known=True,
            gates=list(entry.proposal.gates),
            repairs=list(entry.proposal.repairs),
        )

    def _keep(self, job: _Job, plan: Plan | None, preset: str, patch: Patch) -> str:
        assert self.ledger is not None
        return self.ledger.propose(
            replace(
                self._proposal(job, plan, preset),
                patched=patch.patched.to_bytes(),
                edits=patch.edits,
                imports=patch.imports,
                gates=patch.gates,
                repairs=patch.repairs,
                diff=patch.diff,
                timings=patch.timings.to_json(),
            )
        )

    def _keep_refusal(self, job: _Job, plan: Plan | None, preset: str, error: RefusedError) -> None:
        if self.ledger is None or isinstance(error, CancelledError):
            return
        timings = replace(job.timings, total_s=time.monotonic() - job.started_at).to_json()
        proposal = self._proposal(job, plan, preset)
        error.details["patch_id"] = self.ledger.propose(
            replace(proposal, outcome="refused", error=error.to_json(), gates=job.gates_seen, timings=timings)
        )

    def _proposal(self, job: _Job, plan: Plan | None, preset: str) -> Proposal:
        status, scope = self.engine.status(), job.scope
        return Proposal(
            key=job.key,
            path=_absolute(job.source.path),
            scope="" if scope.kind == "module" else scope.qualname,
            scope_kind=scope.kind,
            start_line=scope.start_line,
            end_line=scope.end_line,
            base=job.source.to_bytes(),
            patched=None,
            edits=(),
            surface=self.options.surface,
            intent=job.task.intent,
            plan_id=plan.id if plan else None,
            plan_text=job.plan_text,
            feedback=job.task.feedback.to_json() if job.task.feedback else {},
            preset=preset,
            model=status.model,
            model_digest=status.model_digest,
            adapter_digest=status.adapter_digest,
            edit_format=job.edit_format.name,
            prompt_version=PROMPT_VERSION,
            settings=self._key_settings() | self._prompt_settings(job),
        )

    def _prompt_settings(self, job: _Job) -> dict[str, Any]:
        """What the prompt is made from besides the ledger's columns (`training_task`), and who may learn from it."""
        made_from = {"surroundings_chars": job.max_chars, "without_directives": job.view != job.source}
        return made_from if self.options.training_log else made_from | {"training_log": False}

    # --- generation -----------------------------------------------------------------------------------------------

    def _fitting_context(self, source: Source, scope: Scope) -> tuple[Context, int]:
        """Surroundings within both budgets, and the characters that were asked for; the function is never cut.

        The file is shown by its name alone, so that the answer does not depend on the folder it lies in.
        """
        named = prompt_source(source)
        max_chars = self.options.surroundings_chars
        while True:
            context = self._call(build_context, named, scope, max_chars=max_chars)
            around = context.imports + context.class_header + context.signatures + context.before + context.after
            if max_chars == 0 or len(self.engine.tokenizer.encode(around)) <= self.options.context_tokens:
                return context, max_chars
            max_chars = max_chars * 3 // 4

    def _request(self, messages: Sequence[Message], prefill: str, params: SamplingParams) -> GenerationRequest:
        token_ids = tuple(self.engine.tokenizer.encode_chat(messages, prefill=prefill))
        return GenerationRequest(token_ids, params, self.options.priority)

    def _generate(
        self, request: GenerationRequest, scope: Scope, stage: Stage, listener: Listener | None
    ) -> Completion:
        return self._stream(self._submit(request, scope), stage, listener)

    def _submit(self, request: GenerationRequest, scope: Scope) -> str:
        with _named(scope):
            return self.engine.submit(request)

    def _stream(self, request_id: str, stage: Stage, listener: Listener | None) -> Completion:
        for event in self.engine.stream(request_id):
            if isinstance(event, Completion):
                return event
            if event.text and listener is not None:
                listener(stage, event.text)
        raise AssertionError("a stream ends with a Completion")


@contextmanager
def _named(scope: Scope) -> Generator[None]:
    """A request that does not fit names the function."""
    try:
        yield
    except ContextLengthError as error:
        where = "the file" if scope.kind == "module" else f"{scope.kind} {scope.qualname}"
        raise ContextLengthError(f"{where} does not fit: {error.message}", hint=error.hint, **error.details) from None


def _refusal(refused: Verdict, gates: list[dict[str, Any]]) -> GateError:
    return GateError(
        f"The patch was refused by the gate `{refused.gate}`: {refused.reason}",
        hint="Say the change in other words, or give a plan that names the lines.",
        gate=refused.gate,
        gates=gates,
    )


def _check_ended(completion: Completion, what: str, *, is_plan: bool) -> None:
    reason = completion.finish_reason
    if reason is FinishReason.CANCELLED:
        raise CancelledError(f"The {what} was cancelled")
    if reason is FinishReason.TIME:
        seconds = completion.prefill_s + completion.decode_s
        raise BudgetError(
            f"The {what} ran out of time after {seconds:.0f} s and {len(completion.token_ids)} tokens",
            hint=f"Raise {what.lower()}_max_time_cpu_s or {what.lower()}_max_time_gpu_s, or select a smaller function.",
            budget="time",
        )
    if reason is FinishReason.LENGTH and not is_plan:
        raise BudgetError(
            f"The {what} reached its limit of {len(completion.token_ids)} tokens before it was complete",
            hint="Raise patch_max_new_tokens, or select a smaller function.",
            budget="tokens",
        )


def _steps(text: str, truncated: bool) -> tuple[str, ...]:
    """Lines without list marks; a plan that was cut ends at its last complete word."""
    if truncated:
        text = re.sub(r"\s*\S+\Z", "", text) or text
    lines = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line).strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def _absolute(path: str) -> Path | None:
    return Path(path).absolute() if path and path != PASTED else None


__all__ = ["Patch", "Patcher", "PatcherOptions", "Plan", "StageOptions", "Timings", "find_scope"]
