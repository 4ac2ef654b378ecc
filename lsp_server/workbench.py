"""The language server's work: plans and patches as jobs, what is offered where, and what becomes of it.

It knows an `Editor`, a model's host, a ledger and the open documents, and no JSON-RPC. Everything here runs on the
event loop; generation, gates and the ledger's disk run on other threads. applying.py changes documents, labels.py
watches what the user does afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from engine.errors import CancelledError, PathError, PlanPatchError, StaleTextError, UsageError
from engine.inference.cancellable import CancellableEngine
from engine.inference.protocol import Engine
from engine.patching.directives import directive_intent
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import State
from engine.patching.notices import notices
from engine.patching.parser_process import Call, ParserProcess, in_this_process
from engine.patching.patcher import Patch, Patcher, Plan, Timings, check_intent
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from lsp_server.applying import CHECK_S, Applier
from lsp_server.code_actions import ActionState, Offer, function_at, short
from lsp_server.documents import Document, Position
from lsp_server.edit_jobs import Job, JobKind, Jobs, TokenReports, unexpected
from lsp_server.editor import Editor, Note, Severity
from lsp_server.labels import Labels
from lsp_server.model_host import HostStatus
from lsp_server.open_files import OpenFile, OpenFiles, Pending
from lsp_server.paths import Paths
from lsp_server.plan_documents import PlanDocument, PlanDocuments, shown_context
from lsp_server.reading import Reader
from lsp_server.records import Records
from lsp_server.session import patcher_options
from lsp_server.settings import Settings
from lsp_server.targets import (
    Target,
    feedback_argument,
    intent_of_diagnostic,
    place_argument,
    scope_at,
    text_argument,
)
from lsp_server.uris import path_of

log = logging.getLogger("planpatch.lsp")

T = TypeVar("T")
Listen = Callable[[str, str], None]

PULL_ID = "pull"  # the download of a model, where a job is named: there is one at most
FROM_DOCUMENT = "document"  # as planId: what the plan document says now
APPLY, SHOW_DIFF, REJECT = "Apply", "Show diff", "Reject"
_MOST_QUESTIONS = 5  # a client that answers "Show diff" by itself is not asked for ever
_SETTLE_S = 0.3  # quiet after a change before notes are drawn anew
_MOST_PENDING = 8


class Model(Protocol):
    """What is needed of the model's host."""

    @property
    def status(self) -> HostStatus:
        """Where the model is."""
        ...

    @property
    def engine_or_none(self) -> Engine | None:
        """The engine, if it is ready."""
        ...

    def wait(self, is_cancelled: Any) -> Engine:
        """The engine, once it is ready; `is_cancelled` is an event that ends the wait."""
        ...


class Workbench:
    """See the module's docstring.

    Args:
        editor: The client.
        model: The model's host.
        open_ledger: Opens the ledger, at the first use.
        paths: Where state is kept.
        settings_of: The settings that hold for a file; None for those of no workspace.
        call: Where Python is read.
        prover: Where patches are proved; None: on the job's thread.
        clock: Seconds that only grow; for tests.
        check_s: How long after an edit the client's text is waited for.
        begin_after_s: How long a job waits before it begins.
        server_facts: What the status says of the server besides the model and the jobs.
    """

    def __init__(
        self,
        editor: Editor,
        model: Model,
        open_ledger: Callable[[], Ledger],
        paths: Paths,
        settings_of: Callable[[Path | None], Settings],
        *,
        call: Call = in_this_process,
        prover: ParserProcess | None = None,
        clock: Callable[[], float] = time.monotonic,
        check_s: float = CHECK_S,
        begin_after_s: float = 0.0,
        server_facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.editor = editor
        self.model = model
        self.settings_of = settings_of
        self._paths = paths
        self._read = Reader(call)
        self._prover = prover
        self.files = OpenFiles(editor.profile.encoding)
        self.records = Records(open_ledger)
        self.jobs = Jobs(self._job_changed, begin_after_s)
        self.plans = PlanDocuments(paths.plans)
        self.labels = Labels(
            self.files,
            self.records,
            clock,
            self._spawn,
            tells_save_reason=editor.profile.tells_save_reason,
            read=self._read,
        )
        self.applier = Applier(
            editor,
            self.files,
            self.records,
            self.labels,
            paths.plans,
            self._draw,
            self._spawn,
            read=self._read,
            check_s=check_s,
        )
        self.has_failed = asyncio.Event()
        self._server_facts = server_facts
        self._last: dict[str, dict[str, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._said: set[tuple[str, str]] = set()

    async def close(self) -> None:
        """End every job and close the ledger; of what a document shows already, the ledger is told first."""
        await self.labels.settle()
        await self.applier.settle()
        await self.jobs.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._read.close()
        self.records.close()

    # --- documents --------------------------------------------------------------------------------------------------

    def did_open(self, uri: str, text: str, version: int, language_id: str) -> None:
        """Take in a document that the client opened."""
        file = self.files.open(uri, text, version, language_id)
        if file.is_python:
            self._spawn(self._recall(file))

    async def _recall(self, file: OpenFile) -> None:
        """What the ledger knows of a file that was opened: patches in it, and patches that still wait for this text."""
        await self.labels.recall(file)
        path, text = file.path, file.document.text
        if path is None:
            return
        waiting = await self.records.do(
            lambda ledger: ledger.list_proposals(path=path, state=State.PROPOSED, limit=_MOST_PENDING)
        )
        async with file.lock:  # no apply is under way: what the ledger says of a patch now is so
            for summary in reversed(waiting):
                entry = await self.records.get(summary.id)
                proposal = entry.proposal
                is_mine = summary.surface == "lsp" and proposal.base == text.encode("utf-8", "surrogatepass")
                if is_mine and entry.state is State.PROPOSED:
                    first, last = proposal.start_line - 1, proposal.end_line - 1
                    file.wait_for_user(
                        Pending(entry, Offer(entry.id, proposal.scope, first, last, proposal.intent), text)
                    )
        if file.pending:
            self._draw(file)
            self.tell_status()

    def did_change(self, file: OpenFile) -> None:
        """React to a document's new text."""
        is_ours = file.search is not None  # an edit of ours is on its way: no undo by the user
        self.applier.did_change(file)
        if not is_ours:
            self.labels.did_change(file)
        if file.pending or file.refused:
            if file.settle is not None:
                file.settle.cancel()
            file.settle = asyncio.get_running_loop().call_later(_SETTLE_S, self._draw, file)

    def did_close(self, uri: str) -> None:
        """Forget a document; its jobs end."""
        file = self.files.close(uri)
        if file is None:
            return
        for job in self.jobs.running(uri):
            self.jobs.cancel(job)
        file.changed.set()
        if file.settle is not None:
            file.settle.cancel()
        if file.pending or file.refused:
            self.editor.publish_notes(uri, None, [])

    # --- what is offered --------------------------------------------------------------------------------------------

    def action_state(self, file: OpenFile, line: int) -> ActionState:
        """What the menu at a line (0-based) of a document depends on; neither file nor ledger is read."""
        plans = {name: self._plan_document(file.path, name) for name in {"", function_at(file.document, line)}}
        jobs = {job.id: job.title for job in self.jobs.running() if job.kind in ("plan", "patch")}
        if self.model.status.is_pull:
            jobs[PULL_ID] = f"download of {self.model.status.model or 'the model'}"
        return ActionState(
            presets=self.settings_of(file.path).presets,
            is_loading=self.model.status.state in ("off", "loading"),
            jobs=jobs,
            pending=[pending.offer for pending in file.offered()],
            refused=file.refusals(),
            applied=file.applied,
            rolled_back=file.rolled_back,
            plans={name: plan.intent or plan.function for name, plan in plans.items() if plan is not None},
        )

    def _plan_document(self, path: Path | None, function: str) -> PlanDocument | None:
        return None if path is None else self.plans.find(path, function)

    def tell_once(self, uri: str, message: str) -> None:
        """Show a message about a document, the same one once."""
        if (uri, message) not in self._said:
            self._said.add((uri, message))
            self.editor.show_message(f"PlanPatch: {message}", Severity.INFO)

    def _draw(self, file: OpenFile) -> None:
        """Show what waits and what was refused, as far as it is for the text as it is now."""
        document = file.document
        if self.files.get(document.uri) is not file:
            return
        notes = [
            _note(document, offer, f"PlanPatch: a patch waits ({short(offer.intent)}): apply or reject it", "patch")
            for offer in (pending.offer for pending in file.offered())
        ]
        notes += [_note(document, offer, f"PlanPatch: {offer.reason}", offer.gate) for offer in file.refusals()]
        self.editor.publish_notes(document.uri, document.version, notes)

    # --- commands ---------------------------------------------------------------------------------------------------

    async def plan(self, argument: Mapping[str, Any]) -> Job:
        """Plan a change; the job is on its way when this returns.

        Args:
            argument: `uri`, `range` or `position`, and perhaps `intent`, `preset` or `diagnostic`.

        Returns:
            The job.

        Raises:
            UsageError: The argument is not complete, or the file is not open.
            SourceError: The file cannot be edited.
        """
        target = await self._target(argument)
        intent, is_directive = await self._intent(target, argument, None)
        work = partial(self._plan, target, intent, is_directive) if intent else partial(self._ask_for_intent, target)
        return self.jobs.start("plan", f"plan for {target.title}", work, uri=target.uri, function=target.function)

    async def patch(self, argument: Mapping[str, Any]) -> Job:
        """Make a patch; the job is on its way when this returns.

        Args:
            argument: `uri`, `range` or `position`, what to do (`planId`, `intent`, `preset`, `diagnostic`, or a
                directive in the code), and perhaps `feedback`, `hunks`, `fresh`.

        Returns:
            The job.

        Raises:
            UsageError: The argument is not complete, or the file is not open.
            SourceError: The file cannot be edited.
            StaleTextError: The function is not the plan's any more.
        """
        target = await self._target(argument)
        plan = await self._named_plan(target, argument)
        intent, is_directive = await self._intent(target, argument, plan)
        if not intent:
            raise UsageError(
                "There is nothing to do yet: no intent was given",
                hint="Write what you want as a comment in the function (# pp: …), or choose PlanPatch: plan a change.",
            )
        work = partial(self._patch, target, intent, is_directive, plan, dict(argument))
        return self.jobs.start("patch", f"patch for {target.title}", work, uri=target.uri, function=target.function)

    async def target_of(self, argument: Mapping[str, Any]) -> dict[str, str] | None:
        """What a plan or a patch with this argument would change.

        Args:
            argument: `uri` and `range` or `position`.

        Returns:
            `{function, title}`, the function empty for the whole file; None where nothing can be changed.
        """
        try:
            target = await self._target(argument)
        except PlanPatchError:
            return None  # why not, the command itself says
        return {"function": target.function, "title": target.title}

    async def _target(self, argument: Mapping[str, Any]) -> Target:
        """The document's text as it is now, and the scope that is meant."""
        uri = text_argument(argument, "uri")
        if uri is None:
            raise UsageError("The argument has no `uri`", hint="Give {uri, range} or {uri, position}.")
        file = self.files[uri]
        source, text = file.source(), file.document.text
        self.check_root(file.path)
        if (name := text_argument(argument, "function")) is not None:
            scope = await self._read(find_scope, source, name)
        else:
            scope = await self._read(scope_at, source, *place_argument(argument))
        return Target(uri, text, source, scope)

    def check_root(self, path: Path | None) -> None:
        """Refuse a file outside of the folder that the user's setting `root` names, links resolved.

        Args:
            path: The file.

        Raises:
            PathError: It lies outside.
        """
        settings = self.settings_of(None)
        if not settings.root or path is None:
            return
        root = self._paths.resolve(settings.root)
        if not path.resolve().is_relative_to(root.resolve()):
            raise PathError(
                f"{path} is outside of the root {root} ({settings.source_of('root')})",
                hint="Correct the setting root, or edit a file below it.",
            )

    async def _named_plan(self, target: Target, argument: Mapping[str, Any]) -> Plan | None:
        """The plan that was named; a plan document counts as it is saved now. None where it has no steps."""
        plan_id = text_argument(argument, "planId")
        if plan_id is None:
            return None
        document = self._plan_document(path_of(target.uri), target.function)
        if document is not None and plan_id in (FROM_DOCUMENT, document.plan_id):
            written = await asyncio.to_thread(self.plans.read, document)
            steps, intent, plan_id = written.steps, written.intent, document.plan_id
        elif plan_id == FROM_DOCUMENT:
            raise UsageError(f"There is no plan for {target.title}", hint="Choose PlanPatch: plan a change.")
        else:
            record = await self.records.do(lambda ledger: ledger.get_plan(plan_id))
            steps, intent = tuple(record.steps), record.intent
        if plan_id:
            await self._check_plan_fits(target, plan_id)
        if not steps:
            return None
        name = plan_id or f"plan_{uuid.uuid4().hex[:12]}"
        return Plan(name, target.source.path, target.scope, target.source.sha256, intent, steps)

    async def _check_plan_fits(self, target: Target, plan_id: str) -> None:
        """Edits elsewhere in the file do no harm; the function has to be the one that was planned for."""
        try:
            record = await self.records.do(lambda ledger: ledger.get_plan(plan_id))
        except UsageError:
            return  # it was pruned; the document says all there is
        then = Source.from_bytes(record.base, target.source.path)
        if then.text_between(record.start_line, record.end_line) != target.scope_text:
            raise StaleTextError(f"{target.title} changed since the plan was made", hint="Plan again.", plan_id=plan_id)

    async def _intent(self, target: Target, argument: Mapping[str, Any], plan: Plan | None) -> tuple[str, bool]:
        """What the user wants, and whether it stands in the code.

        In this order: the command, a preset, a diagnostic, the plan, a directive in the code, the plan document.
        """
        found = await self._read(directive_intent, target.source, target.scope)
        if intent := (text_argument(argument, "intent") or "").strip():
            check_intent(intent)
            return intent, bool(found) and (plan is not None or intent == found)  # a retry says it again
        if name := text_argument(argument, "preset"):
            presets = self.settings_of(path_of(target.uri)).presets
            if name not in presets:
                raise UsageError(f"There is no preset {name!r}", hint=f"Presets: {', '.join(sorted(presets))}")
            return presets[name].intent, False
        if isinstance(diagnostic := argument.get("diagnostic"), Mapping):
            return intent_of_diagnostic(cast("Mapping[str, Any]", diagnostic), target.source), False
        if plan is not None and plan.intent:
            return plan.intent, bool(found)
        if found:
            return found, True
        document = self._plan_document(path_of(target.uri), target.function)
        if document is not None:
            with suppress(PlanPatchError):
                return (await asyncio.to_thread(self.plans.read, document)).intent, False
        return "", False

    async def reject(self, patch_id: str, reason: str = "") -> dict[str, Any]:
        """Record that the user does not want a patch.

        Args:
            patch_id: The proposal.
            reason: Why, if they said.

        Returns:
            `{ok, patchId}`.

        Raises:
            UsageError: No such proposal, or it was never offered.
        """
        entry = await self.records.get(patch_id)
        await self.records.do(lambda ledger: ledger.reject(entry.id, reason=reason))
        for file in self.files:
            if file.pending.pop(entry.id, None) is not None:
                self._draw(file)
        self.tell_status()
        return {"ok": True, "patchId": entry.id}

    async def feedback(self, patch_id: str, accepted: bool, reason: str = "") -> dict[str, Any]:
        """Record the user's verdict.

        Args:
            patch_id: The proposal.
            accepted: What they say.
            reason: Why.

        Returns:
            `{ok, patchId}`.

        Raises:
            UsageError: No such proposal, or its state does not allow it.
        """
        if not accepted:
            return await self.reject(patch_id, reason)
        await self.labels.accept(patch_id, reason)
        return {"ok": True, "patchId": patch_id}

    def cancel(self, job_id: str | None) -> dict[str, Any]:
        """Cancel a job.

        Args:
            job_id: The job; None for the oldest that has not ended.

        Returns:
            `{cancelled: [ids]}`.

        Raises:
            UsageError: No such job.
        """
        running = [job for job in self.jobs.running() if not job.is_cancelled.is_set()]
        chosen = running[:1] if job_id is None else [self.jobs.get(job_id)]
        jobs = [job for job in chosen if job is not None]
        if len(jobs) < len(chosen):
            raise UsageError(f"There is no job {job_id!r}")
        cancelled = [job.id for job in jobs if not job.has_ended]
        for job in jobs:
            self.jobs.cancel(job)
        return {"cancelled": cancelled}

    def run_as_job(self, kind: JobKind, title: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> Job:
        """Run something short as a job, so that the command that asks for it is answered at once.

        Args:
            kind: What it is.
            title: What progress calls it.
            work: Makes the coroutine; what it returns goes into the job's result.

        Returns:
            The job.
        """

        async def run(job: Job) -> None:
            self.jobs.change(job, "running")
            job.result |= await work()

        return self.jobs.start(kind, title, run)

    # --- planning and patching --------------------------------------------------------------------------------------

    async def _ask_for_intent(self, target: Target, job: Job) -> None:
        """No one said what to do: open a plan document that asks."""
        path = Path(target.source.path)
        document = await asyncio.to_thread(self.plans.write, path, target.function, "", ())
        job.result |= {"planDocument": str(document.file)}
        await self._open(document.file, f"write what you want below ## Intent in {document.file}, save, and plan again")

    async def _plan(self, target: Target, intent: str, is_directive: bool, job: Job) -> None:
        def work(patcher: Patcher, listen: Listen) -> Plan:
            return patcher.plan(target.source, target.scope, intent, drop_directives=is_directive, listener=listen)

        plan = await self._generate(job, target, work)
        self._note_time("plan", plan.timings)
        job.result |= {"planId": plan.id, "plan": plan.to_json()}
        path = Path(target.source.path)
        about = shown_context(plan, target.scope_text, self._context_length())
        document = await asyncio.to_thread(self.plans.write, path, target.function, intent, plan.steps, plan.id, about)
        job.result |= {"planDocument": str(document.file)}
        await self._open(document.file, f"plan for {target.title}: {plan.text} (edit it in {document.file})")

    async def _open(self, file: Path, message: str) -> None:
        if not (self.editor.profile.has_show_document and await self.editor.show_document(file)):
            self.editor.show_message(f"PlanPatch: {message}", Severity.INFO)

    async def _patch(
        self, target: Target, intent: str, is_directive: bool, plan: Plan | None, argument: dict[str, Any], job: Job
    ) -> None:
        def work(patcher: Patcher, listen: Listen) -> Patch:
            return patcher.patch(
                target.source,
                target.scope,
                intent,
                plan=plan,
                feedback=feedback_argument(argument.get("feedback")),
                preset=text_argument(argument, "preset") or "",
                fresh=bool(argument.get("fresh")),
                drop_directives=is_directive,
                listener=listen,
            )

        try:
            patch = await self._generate(job, target, work)
        except PlanPatchError as error:
            if error.exit_code == 1 and not isinstance(error, CancelledError):
                self._note_refusal(target, intent, argument, error)
            raise
        self._note_time("patch", patch.timings)
        warnings = await self._read(notices, patch.source, target.scope, patch.edits)
        job.result |= {"patchId": patch.id, "patch": {**patch.to_json(), "warnings": warnings}}
        self._spawn(self._offer(target, intent, patch, warnings, argument.get("hunks")))

    def _note_time(self, kind: str, timings: Timings) -> None:
        if timings.num_tokens:  # a proposal that the ledger had already took none
            self._last[kind] = {"totalS": round(timings.total_s, 3), "numTokens": timings.num_tokens}

    def _context_length(self) -> int:
        engine = self.model.engine_or_none
        return engine.status().context_length if engine is not None else 0

    async def _generate(self, job: Job, target: Target, work: Callable[[Patcher, Listen], T]) -> T:
        """Wait for the turn and the model, generate under progress, and give the turn on."""
        reports = TokenReports(asyncio.get_running_loop(), partial(self._report, job))
        has_progress = await self._begin_progress(job)
        try:
            async with self.jobs.turn(job):
                if self.model.status.state in ("off", "loading"):
                    self.jobs.change(job, "loading")
                    self.editor.report_progress(job.token, "the model is loading")
                engine = await asyncio.to_thread(self.model.wait, job.is_cancelled)
                settings = self.settings_of(path_of(target.uri))
                options = patcher_options(settings, "lsp", on_gpu=engine.status().device != "cpu")
                mine = CancellableEngine(engine, job.is_cancelled)
                prove = self._prover.cancellable(job.is_cancelled) if self._prover is not None else None

                def cancel() -> None:
                    mine.cancel_all()
                    if prove is not None:
                        prove.cancel()

                job.on_cancel = cancel
                patcher = Patcher(mine, await self.records.ledger(), options, prove or in_this_process)
                job.is_generating = True
                self.jobs.change(job, "running", "reading the code")
                self.editor.report_progress(job.token, "reading the code")
                try:
                    return await self.jobs.on_worker(job, lambda: work(patcher, reports))
                finally:
                    job.is_generating = False
                    if engine.status().state == "failed":
                        self.has_failed.set()
        finally:
            if has_progress:
                self.editor.end_progress(job.token, "")

    async def _begin_progress(self, job: Job) -> bool:
        ahead = len(self.jobs.running()) - 1
        message = f"{ahead} ahead in the queue" if ahead else ""
        if await self.editor.begin_progress(job.token, f"PlanPatch: {job.title}", message):
            return True
        self.editor.show_message(f"PlanPatch: {job.title} has begun", Severity.INFO)
        return False

    def _report(self, job: Job, stage: str, num_tokens: int, text: str) -> None:
        if job.is_generating:
            job.stage, job.num_tokens = stage, num_tokens
            message = "checking the patch" if stage == "prove" else f"{stage.upper()}: {num_tokens} tokens"
            self.editor.report_progress(job.token, message)
            self.editor.notify("planpatch/job", {**job.to_json(), "text": text})

    def _job_changed(self, job: Job) -> None:
        self.editor.notify("planpatch/job", job.to_json())
        self.tell_status()
        if job.error is not None and not self.editor.profile.presents:
            self._show_error(job.error)

    def _show_error(self, error: PlanPatchError) -> None:
        severity = Severity.WARNING if error.exit_code == 1 else Severity.ERROR
        self.editor.show_message(f"PlanPatch: {said(error)}", severity)

    def tell_status(self) -> None:
        """Send `planpatch/status` to clients that asked for it."""
        self.editor.notify("planpatch/status", self.status())

    def status(self) -> dict[str, Any]:
        """What the server is doing, for programs."""
        host, engine = self.model.status, self.model.engine_or_none
        facts: dict[str, Any] = {"state": host.state, "model": host.model, "message": host.message, "hint": host.hint}
        facts |= {"reason": host.reason, "isPulling": host.is_pull, **self._server_facts()}
        if engine is not None:
            now = engine.status()
            facts |= {
                "message": host.message or now.message,
                "device": now.device,
                "quantization": now.quantization,
                "adapter": now.adapter,
                "memoryBytes": now.memory_bytes,
                "contextLength": now.context_length,
            }
        return {
            **facts,
            "jobs": [{**job.to_json(), "position": self.jobs.position(job)} for job in self.jobs.running()],
            "pending": [patch_id for file in self.files for patch_id in file.pending],
            "last": dict(self._last),
        }

    def _note_refusal(self, target: Target, intent: str, argument: Mapping[str, Any], error: PlanPatchError) -> None:
        """Show a refusal on its function, with a quick fix that tries again and says why."""
        file = self.files.get(target.uri)
        if file is None:
            return
        kept = {key: argument[key] for key in ("uri", "range", "position", "planId") if key in argument}
        feedback = {"reason": error.message, "hint": "Mend exactly that."}
        offer = Offer(
            patch_id=str(error.details.get("patch_id", "")),
            function=target.function,
            start_line=target.scope.start_line - 1,
            end_line=target.scope.end_line - 1,
            intent=intent,
            gate=str(error.details.get("gate") or error.details.get("budget") or error.code),
            reason=error.message,
            argument={**kept, "intent": intent, "feedback": feedback, "fresh": True},
        )
        file.refused[target.function] = (target.text, offer)
        self._draw(file)

    async def _offer(self, target: Target, intent: str, patch: Patch, warnings: Sequence[str], hunks: object) -> None:
        """Have the patch in the document, or ask, as the settings say."""
        file = self.files.get(target.uri)
        if file is None:
            return
        scope = target.scope
        offer = Offer(patch.id, target.function, scope.start_line - 1, scope.end_line - 1, intent)
        file.wait_for_user(Pending(await self.records.get(patch.id), offer, target.text))
        file.refused.pop(target.function, None)
        self._draw(file)
        self.tell_status()
        asks = self.settings_of(file.path).apply == "ask" or patch.is_second_choice
        if asks and self.editor.profile.presents:
            return
        if not asks or self.editor.profile.has_annotations:  # else they are in the question
            for warning in warnings:
                self.editor.show_message(f"PlanPatch: {warning}", Severity.WARNING)
        if file.document.text != target.text:
            self.editor.show_message(
                f"PlanPatch: {target.title} has a patch, but the text changed while it was written: ask again",
                Severity.INFO,
            )
        elif self.settings_of(file.path).apply == "direct" and not patch.is_second_choice:
            await self.applier.apply(patch.id, hunks)
        elif self.editor.profile.has_annotations:
            await self.applier.apply(patch.id, hunks, confirm=True)
        else:
            await self._ask(patch, target, warnings, hunks)

    async def _ask(self, patch: Patch, target: Target, warnings: Sequence[str], hunks: object) -> None:
        count = f"{len(patch.edits)} change{'' if len(patch.edits) == 1 else 's'}"
        doubt = " It is the model's second choice: look at it first." if patch.is_second_choice else ""
        doubt += "".join(f" Mind: {warning}." for warning in warnings)
        question = f"PlanPatch has a patch for {target.title}: {count}.{doubt}"
        answer = SHOW_DIFF
        for _ in range(_MOST_QUESTIONS):
            if answer != SHOW_DIFF:
                break
            answer = await self.editor.ask(question, [APPLY, SHOW_DIFF, REJECT])
            if answer == APPLY:
                await self.applier.apply(patch.id, hunks)
            elif answer == REJECT:
                await self.reject(patch.id)
            elif answer == SHOW_DIFF:
                shown = await self.applier.show(f"{patch.id}.diff", patch.diff)
                if not self.editor.profile.has_show_document:
                    self.editor.show_message(f"PlanPatch: the diff is in {shown}", Severity.INFO)

    # --- mechanics --------------------------------------------------------------------------------------------------

    def _spawn(self, work: object) -> None:
        """Run a coroutine on the event loop; its error, if it is ours, is shown."""
        coroutine = cast("Coroutine[Any, Any, object]", work)
        task = asyncio.get_running_loop().create_task(self._shown(coroutine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: coroutine.close())  # one that is cancelled before it starts

    async def _shown(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except CancelledError:
            pass  # by the user, who knows
        except PlanPatchError as error:
            self._show_error(error)
        except Exception as fault:
            log.exception("something went wrong in the background")
            self._show_error(unexpected(fault))


def said(error: PlanPatchError) -> str:
    """An error as a message shows it: what was wrong, and what to do."""
    message = error.message.rstrip(".")
    return f"{message}. {error.hint}" if error.hint else message


def _note(document: Document, offer: Offer, message: str, code: str) -> Note:
    """On the line of `def`, below decorators."""
    lines = range(offer.start_line, offer.end_line + 1)
    is_decorator = (document.line_text(line).lstrip().startswith("@") for line in lines)
    line = next((number for number, skip in zip(lines, is_decorator, strict=True) if not skip), offer.start_line)
    end = Position(line, document.num_units_of_line(line))
    return Note(Position(line, 0), end, message, code, {"patchId": offer.patch_id})
