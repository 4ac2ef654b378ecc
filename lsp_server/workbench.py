"""The language server's work: plan, patch, apply, reject, roll back, redo, cancel, and what is offered where.

It knows an `Editor`, a `ModelHost`, a ledger and its open documents, and no JSON-RPC. Everything runs on the event loop;
what takes long (generation, gates, the ledger's disk) runs on other threads and comes back. No edit is sent without the
document being, at that moment, the very text that the patch was proved for; and no client is believed that it applied
one before the document says so.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from engine.errors import (
    CancelledError,
    GateError,
    PathError,
    PlanPatchError,
    SourceError,
    StaleTextError,
    UnknownScopeError,
    UsageError,
)
from engine.inference.protocol import Engine
from engine.patching.directives import directive_intent
from engine.patching.edits import Edit, replacements
from engine.patching.gates import run_gates
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import UNDONE, Entry, Label, State, source_of
from engine.patching.notices import notices
from engine.patching.patcher import Patch, Patcher, Plan
from engine.patching.prompts import Feedback
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import Source
from lsp_server.code_actions import ActionState, Offer, function_at
from lsp_server.documents import Document, Position
from lsp_server.edit_jobs import Job, JobEngine, Jobs, TokenReports
from lsp_server.editor import BufferEdit, Editor, EditorFault, Hunk, Note, Severity
from lsp_server.model_host import HostStatus
from lsp_server.paths import Paths, make_private_folder
from lsp_server.plan_documents import PlanDocuments
from lsp_server.session import patcher_options
from lsp_server.settings import Settings
from lsp_server.survival import KEPT_AT_SAVE_S, KEPT_S, Watch, normalised
from lsp_server.uris import path_of

T = TypeVar("T")

CHECK_S = 3.0  # how long after an edit the client's text is waited for
_SETTLE_S = 0.3  # quiet after a change before notes are drawn anew
_MOST_HUNKS_APART = 6  # more hunks than this are not looked for one by one
FROM_DOCUMENT = "document"
APPLY, SHOW_DIFF, REJECT = "Apply", "Show diff", "Reject"
TAKE_BACK, KEEP = "Take it back", "Keep it"


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
        """The engine, once it is ready."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a command is about.

    Args:
        uri: The document.
        source: Its text when the command came.
        scope: The function, class or file.
    """

    uri: str
    source: Source
    scope: Scope


@dataclass(slots=True)
class _Pending:
    """A patch that waits for the user."""

    entry: Entry
    offer: Offer
    base: str
    is_second_choice: bool


@dataclass(slots=True)
class _Search:
    """The texts that an edit may lead to, with the hunks that each has, and which of them was seen."""

    targets: Mapping[str, tuple[int, ...]]
    found: tuple[int, ...] | None = None

    def look(self, text: str) -> None:
        self.found = self.targets.get(text, self.found)


@dataclass(slots=True)
class _File:
    """What is known of one open document."""

    pending: dict[str, _Pending] = field(default_factory=dict[str, _Pending])
    refused: list[tuple[str, Offer]] = field(default_factory=list[tuple[str, Offer]])
    watches: dict[str, Watch] = field(default_factory=dict[str, Watch])
    late: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict[str, tuple[str, tuple[int, ...]]])
    applied: tuple[str, str] | None = None
    rolled_back: tuple[str, str] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    search: _Search | None = None  # while an edit is on its way
    save_is_manual: bool | None = None
    settle: asyncio.TimerHandle | None = None


class Workbench:
    """See the module's docstring.

    Args:
        editor: The client.
        model: The model's host.
        ledger: Opens the ledger, at the first use.
        paths: Where state is kept.
        settings_of: The settings that hold for a document's path; None for those of no workspace.
        clock: Seconds that only grow; for tests.
    """

    def __init__(
        self,
        editor: Editor,
        model: Model,
        ledger: Callable[[], Ledger],
        paths: Paths,
        settings_of: Callable[[Path | None], Settings],
        *,
        clock: Callable[[], float] = time.monotonic,
        check_s: float = CHECK_S,
    ) -> None:
        self.editor = editor
        self.model = model
        self.paths = paths
        self.settings_of = settings_of
        self.documents: dict[str, Document] = {}
        self.jobs = Jobs(self._job_changed)
        self.plans = PlanDocuments(paths.plans)
        self._open_ledger = ledger
        self._ledger: Ledger | None = None
        self._files: dict[str, _File] = {}
        self._clock = clock
        self._check_s = check_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._said: set[tuple[str, str]] = set()
        self.fatal = asyncio.Event()

    # --- documents --------------------------------------------------------------------------------------------------

    def did_open(self, uri: str, text: str, version: int, language_id: str) -> None:
        """Take in a document that the client opened."""
        encoding = self.editor.profile.encoding
        self.documents[uri] = Document(uri, text, version, language_id, encoding)
        self._files.setdefault(uri, _File())
        if self.is_python(uri):
            self._spawn(self._recall(uri))

    def did_change(self, uri: str) -> None:
        """React to a document's new text."""
        document, file = self.documents.get(uri), self._files.get(uri)
        if document is None or file is None:
            return
        text = normalised(document.text)
        if file.search is not None:
            file.search.look(text)
        file.changed.set()
        for patch_id, (target, hunks) in list(file.late.items()):
            if text == target:
                del file.late[patch_id]
                self._spawn(self._applied_late(uri, patch_id, hunks))
        if file.search is None:
            for watch in file.watches.values():
                finding = watch.turned(text)
                if finding is not None:
                    watch.is_undone = finding == "undone"
                    self._spawn(self._note_turned(uri, watch, finding))
        self._settle_later(uri, file)

    def will_save(self, uri: str, *, is_manual: bool) -> None:
        """Remember why the next save happens."""
        if (file := self._files.get(uri)) is not None:
            file.save_is_manual = is_manual

    def did_save(self, uri: str) -> None:
        """A save by hand may accept patches."""
        file = self._files.get(uri)
        if file is None:
            return
        is_manual = file.save_is_manual if file.save_is_manual is not None else not self._tells_why()
        file.save_is_manual = None
        if is_manual:
            self._spawn(self._judge(uri, KEPT_AT_SAVE_S, "kept at a save by hand"))

    def _tells_why(self) -> bool:
        return self.editor.profile.tells_save_reason

    def did_close(self, uri: str) -> None:
        """Forget a document; its jobs end."""
        for job in self.jobs.running(uri):
            self.jobs.cancel(job)
        file = self._files.pop(uri, None)
        if file is not None:
            file.changed.set()
            if file.settle is not None:
                file.settle.cancel()
            if file.pending or file.refused:
                self.editor.publish_notes(uri, None, [])
        self.documents.pop(uri, None)

    async def tick(self) -> None:
        """Accept what was kept long enough; called now and then."""
        for uri in list(self._files):
            await self._judge(uri, KEPT_S, "kept for 10 minutes")

    async def close(self) -> None:
        """End every job and close the ledger."""
        await self.jobs.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._ledger is not None:
            self._ledger.close()

    def is_python(self, uri: str) -> bool:
        """Whether a document is Python."""
        document = self.documents.get(uri)
        return document is not None and (document.language_id == "python" or uri.endswith((".py", ".pyi")))

    def source_of_document(self, uri: str) -> Source:
        """A document's text as the patcher takes it.

        Args:
            uri: The document.

        Returns:
            The text.

        Raises:
            UsageError: It is not open, or is not Python.
            SourceError: It cannot be edited, or may not be the client's text.
        """
        document = self.documents.get(uri)
        if document is None:
            raise UsageError(f"{uri} is not open", hint="Open the file in the editor first.")
        path = path_of(uri)
        if document.out_of_step:
            raise SourceError(
                f"The text of {path or uri} may not be the editor's: {document.out_of_step}",
                hint="Close the file and open it again.",
            )
        if not self.is_python(uri):
            raise UsageError(f"{path or uri} is not Python", hint="PlanPatch edits Python files.")
        return Source.from_text(document.text, path.as_posix() if path else uri)

    # --- what is offered --------------------------------------------------------------------------------------------

    def action_state(self, uri: str, line: int) -> ActionState:
        """What the menu at a line (0-based) of a document depends on; the ledger is not asked."""
        file, document, path = self._files.get(uri, _File()), self.documents[uri], path_of(uri)
        text = document.text
        plans: dict[str, str] = {}
        if path is not None:
            for name in {"", function_at(document, line)}:
                if (plan := self.plans.find(path, name)) is not None:
                    plans[name] = plan.function or path.name
        return ActionState(
            presets=self.settings_of(path).presets,
            is_loading=self.model.status.state in ("off", "loading"),
            jobs={job.id: job.title for job in self.jobs.running() if job.kind in ("plan", "patch", "pull")},
            pending=[pending.offer for pending in file.pending.values() if pending.base == text],
            refused=[offer for base, offer in file.refused if base == text],
            applied=file.applied,
            rolled_back=file.rolled_back,
            plans=plans,
        )

    def why_nothing(self, uri: str) -> str:
        """Why a document cannot be edited at all; empty if it can."""
        try:
            self.source_of_document(uri)
        except PlanPatchError as error:
            return f"{error.message}. {error.hint}".strip()
        return ""

    def tell_once(self, uri: str, message: str) -> None:
        """Show a message about a document, the same one once."""
        if (uri, message) not in self._said:
            self._said.add((uri, message))
            self.editor.show_message(f"PlanPatch: {message}", Severity.INFO)

    # --- commands ---------------------------------------------------------------------------------------------------

    def plan(self, argument: Mapping[str, Any]) -> Job:
        """Plan a change; the job is on its way when this returns.

        Args:
            argument: `uri`, `range` or `position`, and perhaps `intent`, `preset` or `diagnostic`.

        Returns:
            The job.

        Raises:
            UsageError: The argument is not complete, or the file is not open.
            SourceError: The file cannot be edited.
        """
        target = self.target(argument)
        intent, is_directive = self._intent(target, argument, None)
        name = target.scope.qualname
        if not intent:
            return self.jobs.start("plan", f"plan for {name}", partial(self._ask_for_intent, target), uri=target.uri)
        work = partial(self._plan, target, intent, is_directive)
        return self.jobs.start("plan", f"plan for {name}", work, uri=target.uri, function=name)

    def patch(self, argument: Mapping[str, Any]) -> Job:
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
        target = self.target(argument)
        plan, said = self._plan_of(target, argument)
        intent, is_directive = self._intent(target, argument, plan)
        intent = intent or said
        if not intent:
            raise UsageError(
                "There is nothing to do yet: no intent was given",
                hint="Write what you want as a comment in the function (# pp: …), or choose a plan first.",
            )
        name = target.scope.qualname
        work = partial(self._patch, target, intent, is_directive, plan, dict(argument))
        return self.jobs.start("patch", f"patch for {name}", work, uri=target.uri, function=name)

    def target(self, argument: Mapping[str, Any]) -> Target:
        """What a command is about.

        Args:
            argument: `uri` and `range` or `position`; `function` names it instead.

        Returns:
            The document's text and the scope.

        Raises:
            UsageError: `uri` or the place is missing or no such thing.
            UnknownScopeError: No such function.
            SourceError: The file cannot be edited.
        """
        uri = argument.get("uri")
        if not isinstance(uri, str) or not uri:
            raise UsageError("The argument has no `uri`", hint="Give {uri, range} or {uri, position}.")
        source = self.source_of_document(uri)
        if isinstance(name := argument.get("function"), str) and name:
            return Target(uri, source, find_scope(source, name))
        start, end = _place(argument)
        document = self.documents[uri]
        if start.line >= document.num_lines:
            raise UsageError(f"Line {start.line + 1} is behind the end of {source.path}")
        return Target(uri, source, _scope_at(source, document, start, end))

    def _plan_of(self, target: Target, argument: Mapping[str, Any]) -> tuple[Plan | None, str]:
        """The plan that was named, and an intent that the plan document holds."""
        plan_id = argument.get("planId")
        if not plan_id:
            return None, ""
        path = path_of(target.uri)
        function = "" if target.scope.kind == "module" else target.scope.qualname
        document = self.plans.find(path, function) if path is not None else None
        if document is not None and plan_id in (FROM_DOCUMENT, document.plan_id):
            text = self.plans.read(document)
            if not text.steps:
                return None, text.intent
            base, steps, intent = None, text.steps, text.intent
            plan_id = document.plan_id
            if plan_id:
                with suppress(UsageError):
                    base = self._the_ledger().get_plan(plan_id)
        elif plan_id == FROM_DOCUMENT:
            raise UsageError(f"There is no plan for {target.scope.qualname}", hint="Choose PlanPatch: plan a change.")
        else:
            base = self._the_ledger().get_plan(str(plan_id))
            steps, intent = tuple(base.steps), base.intent
        if base is not None:
            then = Source.from_bytes(base.base, target.source.path)
            if then.text_between(base.start_line, base.end_line) != _scope_text(target):
                raise StaleTextError(
                    f"{target.scope.qualname} changed since the plan was made", hint="Plan again.", plan_id=plan_id
                )
        plan = Plan(plan_id or f"plan_{uuid.uuid4().hex[:12]}", target.source.path, target.scope, "", intent, steps)
        return replace(plan, base_sha256=target.source.sha256), intent

    def _intent(self, target: Target, argument: Mapping[str, Any], plan: Plan | None) -> tuple[str, bool]:
        """What the user wants, and whether it stands in the code: command, preset, diagnostic, directive, document."""
        intent = argument.get("intent")
        if isinstance(intent, str) and intent.strip():
            return intent.strip(), False
        if name := argument.get("preset"):
            presets = self.settings_of(path_of(target.uri)).presets
            if name not in presets:
                raise UsageError(f"There is no preset {name!r}", hint=f"Presets: {', '.join(sorted(presets))}")
            return presets[name].intent, False
        if isinstance(diagnostic := argument.get("diagnostic"), Mapping):
            return _intent_of(cast("Mapping[str, Any]", diagnostic), target.source), False
        if plan is not None and plan.intent:
            return plan.intent, False
        if found := directive_intent(target.source, target.scope):
            return found, True
        path = path_of(target.uri)
        function = "" if target.scope.kind == "module" else target.scope.qualname
        document = self.plans.find(path, function) if path is not None else None
        if document is not None:
            with suppress(PlanPatchError):
                return self.plans.read(document).intent, False
        return "", False

    # --- planning and patching --------------------------------------------------------------------------------------

    async def _ask_for_intent(self, target: Target, job: Job) -> None:
        """No one said what to do: open a plan document that asks."""
        path = _path_on_disk(target.uri)
        function = "" if target.scope.kind == "module" else target.scope.qualname
        document = await asyncio.to_thread(self.plans.write, path, function, "", ())
        job.result |= {"planDocument": str(document.file)}
        await self._open(document.file, f"Write what you want below ## Intent in {document.file}, save, and plan again")

    async def _plan(self, target: Target, intent: str, is_directive: bool, job: Job) -> None:
        plan = await self._generate(
            job,
            target,
            lambda patcher, tell: patcher.plan(
                target.source, target.scope, intent, drop_directives=is_directive, listener=tell
            ),
        )
        job.result |= {"planId": plan.id, "plan": plan.to_json()}
        path = path_of(target.uri)
        if path is None:
            self.editor.show_message(f"PlanPatch plan for {target.scope.qualname}: {plan.text}", Severity.INFO)
            return
        function = "" if target.scope.kind == "module" else target.scope.qualname
        document = await asyncio.to_thread(self.plans.write, path, function, intent, plan.steps, plan.id)
        job.result |= {"planDocument": str(document.file)}
        what = f"plan for {target.scope.qualname}: {plan.text}"
        await self._open(document.file, f"{what} (edit it in {document.file})")

    async def _open(self, file: Path, message: str) -> None:
        if not (self.editor.profile.has_show_document and await self.editor.show_document(file)):
            self.editor.show_message(f"PlanPatch: {message}", Severity.INFO)

    async def _patch(
        self, target: Target, intent: str, is_directive: bool, plan: Plan | None, argument: dict[str, Any], job: Job
    ) -> None:
        preset = str(argument.get("preset") or "")
        try:
            patch = await self._generate(
                job,
                target,
                lambda patcher, tell: patcher.patch(
                    target.source,
                    target.scope,
                    intent,
                    plan=plan,
                    feedback=_feedback(argument.get("feedback")),
                    preset=preset,
                    fresh=bool(argument.get("fresh")),
                    drop_directives=is_directive,
                    listener=tell,
                ),
            )
        except PlanPatchError as error:
            if error.exit_code == 1 and not isinstance(error, CancelledError):
                self._note_refusal(target, intent, argument, error)
            raise
        job.result |= {"patchId": patch.id, "patch": patch.to_json()}
        self._spawn(self._offer(target, intent, patch, argument))

    async def _generate(self, job: Job, target: Target, work: Callable[[Patcher, Callable[[str, str], None]], T]) -> T:
        """Wait for the turn and the model, generate under progress, and give the turn on."""
        loop = asyncio.get_running_loop()
        tell = TokenReports(loop, partial(self._report, job))
        has_progress = await self._begin_progress(job)
        try:
            async with self.jobs.turn(job):
                if self.model.status.state in ("off", "loading"):
                    self.jobs.change(job, "loading")
                    self._progress(job, "the model is loading")
                engine = await asyncio.to_thread(self.model.wait, job.is_cancelled)
                settings = self.settings_of(path_of(target.uri))
                options = patcher_options(settings, "lsp", on_gpu=engine.status().device != "cpu")
                patcher = Patcher(JobEngine(engine, job), await self.ledger(), options)
                job.is_generating = True
                self.jobs.change(job, "running", "reading the code")
                self._progress(job, "reading the code")
                try:
                    return await self.jobs.on_worker(job, lambda: work(patcher, tell))
                finally:
                    job.is_generating = False
                    if engine.status().state == "failed":
                        self.fatal.set()
        finally:
            if has_progress:
                self.editor.end_progress(job.token, "")

    async def _begin_progress(self, job: Job) -> bool:
        ahead = len(self.jobs.running()) - 1
        message = f"{ahead} ahead in the queue" if ahead else ""
        if await self.editor.begin_progress(job.token, f"PlanPatch: {job.title}", message):
            return True
        self.editor.show_message(f"PlanPatch: {job.title} has begun", Severity.LOG)
        return False

    def _progress(self, job: Job, message: str) -> None:
        self.editor.report_progress(job.token, message)

    def _report(self, job: Job, stage: str, num_tokens: int, text: str) -> None:
        job.stage, job.num_tokens = stage, num_tokens
        if job.is_generating:
            self._progress(job, f"{stage.upper()}: {num_tokens} tokens")
            self.editor.notify("planpatch/job", {**job.to_json(), "text": text})

    def _job_changed(self, job: Job) -> None:
        self.editor.notify("planpatch/job", job.to_json())
        self.tell_status()
        if job.error is not None:
            self._tell_error(job)

    def _tell_error(self, job: Job) -> None:
        error = job.error
        assert error is not None
        severity = Severity.WARNING if job.state == "refused" else Severity.ERROR
        self.editor.show_message(f"PlanPatch: {error.message}. {error.hint}".strip(), severity)

    def tell_status(self) -> None:
        """Send `planpatch/status` to clients that asked for it."""
        self.editor.notify("planpatch/status", self.status())

    def status(self) -> dict[str, Any]:
        """What the server is doing, for programs."""
        host, engine = self.model.status, self.model.engine_or_none
        running = [{**job.to_json(), "position": self.jobs.position(job)} for job in self.jobs.running()]
        facts: dict[str, Any] = {"state": host.state, "model": host.model, "message": host.message, "hint": host.hint}
        if engine is not None:
            state = engine.status()
            facts |= {
                "device": state.device,
                "quantization": state.quantization,
                "adapter": state.adapter,
                "memoryBytes": state.memory_bytes,
                "contextLength": state.context_length,
            }
        return {**facts, "jobs": running, "pending": [one for file in self._files.values() for one in file.pending]}

    def _note_refusal(self, target: Target, intent: str, argument: Mapping[str, Any], error: PlanPatchError) -> None:
        """Show a refusal on its function, with a quick fix that tries again and says why."""
        file = self._files.get(target.uri)
        if file is None:
            return
        gate = str(error.details.get("gate") or error.details.get("budget") or error.code)
        scope = target.scope
        kept = {key: argument[key] for key in ("uri", "range", "position", "planId", "diagnostic") if key in argument}
        feedback = {"reason": error.message, "hint": "Mend exactly that."}
        retry = {**kept, "intent": intent, "feedback": feedback, "fresh": True}
        offer = Offer(
            patch_id=str(error.details.get("patch_id", "")),
            function=scope.qualname,
            start_line=scope.start_line - 1,
            end_line=scope.end_line - 1,
            intent=intent,
            gate=gate,
            reason=error.message,
            argument=retry,
        )
        file.refused = [(base, one) for base, one in file.refused if one.function != offer.function]
        file.refused.append((self.documents[target.uri].text, offer))
        self._draw(target.uri)

    async def _offer(self, target: Target, intent: str, patch: Patch, argument: Mapping[str, Any]) -> None:
        """Have the patch in the document, or ask, as the settings say."""
        file, document = self._files.get(target.uri), self.documents.get(target.uri)
        if file is None or document is None:
            return
        entry = await self._in_ledger(lambda ledger: ledger.get(patch.id))
        scope = target.scope
        offer = Offer(patch.id, scope.qualname, scope.start_line - 1, scope.end_line - 1, intent)
        text = target.source.text
        base = ("\ufeff" if target.source.bom else "") + text
        file.pending = {patch.id: _Pending(entry, offer, base, patch.is_second_choice)}
        file.refused = [(then, one) for then, one in file.refused if one.function != scope.qualname]
        self._draw(target.uri)
        self.tell_status()
        for warning in notices(patch.source, scope, patch.edits):
            self.editor.show_message(f"PlanPatch: {warning}", Severity.WARNING)
        hunks = argument.get("hunks")
        settings = self.settings_of(path_of(target.uri))
        if settings.apply == "direct" and not patch.is_second_choice:
            await self._told(self.apply_patch(patch.id, hunks))
        elif self.editor.profile.has_annotations:
            await self._told(self.apply_patch(patch.id, hunks, confirm=True))
        else:
            await self._ask(patch, offer, hunks)

    async def _ask(self, patch: Patch, offer: Offer, hunks: Any) -> None:
        seen = " It is the model's second choice: look at it first." if patch.is_second_choice else ""
        count = f"{len(patch.edits)} change{'s' if len(patch.edits) != 1 else ''}"
        question = f"PlanPatch has a patch for {offer.function}: {count}.{seen}"
        while True:
            answer = await self.editor.ask(question, [APPLY, SHOW_DIFF, REJECT])
            if answer == APPLY:
                await self._told(self.apply_patch(patch.id, hunks))
            elif answer == REJECT:
                await self._told(self.reject(patch.id))
            elif answer == SHOW_DIFF:
                await self._show_diff(patch.id, patch.diff)
                if self.editor.profile.has_show_document:
                    continue
            return

    async def _show_diff(self, patch_id: str, diff: str) -> None:
        folder = await asyncio.to_thread(make_private_folder, self.paths.plans)
        file = folder / f"{patch_id}.diff"
        await asyncio.to_thread(file.write_bytes, diff.encode("utf-8"))
        await self._open(file, f"the diff is in {file}")

    # --- applying and taking back -----------------------------------------------------------------------------------

    async def apply_patch(self, patch_id: str, hunks: Any = None, *, confirm: bool = False) -> dict[str, Any]:
        """Put a patch into its document, or into its file where no document is open.

        Args:
            patch_id: The proposal.
            hunks: Indices of its edits; None for all.
            confirm: Have the client show it first.

        Returns:
            `{ok, patchId, patchState}`.

        Raises:
            UsageError: No such proposal or hunks, or its state does not allow it.
            StaleTextError: The document is not the text that the patch was made for.
            GateError: These hunks alone do not pass the gates.
        """
        entry = await self._in_ledger(lambda ledger: ledger.get(patch_id))
        if entry.state in (State.REFUSED, State.REJECTED) or entry.standing.is_applied:
            raise UsageError(f"{entry.id} is {entry.state.value} and cannot be applied", hint="Ask for a new patch.")
        chosen = _hunk_indices(entry, hunks)
        uri = self._uri_of(entry)
        if uri is None:
            done = await self._in_ledger(lambda ledger: ledger.apply(entry.id, chosen))
            return {"ok": True, "patchId": entry.id, "patchState": "applied", "sha256": done.sha256}
        file = self._files[uri]
        async with file.lock:
            source = self.source_of_document(uri)
            base = source_of(entry.proposal.base, entry.proposal.path)
            if source.to_bytes() != base.to_bytes():
                raise StaleTextError(
                    f"{source.path} changed since {entry.id} was proposed",
                    hint="Ask for the patch again; it will be made for the new text.",
                    patch_id=entry.id,
                )
            edits = [entry.proposal.edits[index] for index in chosen]
            if len(edits) < len(entry.proposal.edits):
                await asyncio.to_thread(_check_subset, entry, base, edits)
                if self.source_of_document(uri).to_bytes() != base.to_bytes():  # the user typed meanwhile
                    raise StaleTextError(f"{source.path} changed just now", hint="Ask for the patch again.")
            targets = {normalised(entry.applied_text(chosen).text): chosen}
            if confirm:
                targets |= _subset_targets(entry, chosen)
            title = entry.proposal.intent or entry.proposal.scope
            edit = self._buffer_edit(uri, source, edits, f"PlanPatch: {title}", confirm=confirm)
            happened, found = await self._edit(uri, edit, targets)
            return await self._record_apply(uri, entry, happened, found or chosen, confirm=confirm)

    async def _record_apply(
        self, uri: str, entry: Entry, happened: str, hunks: tuple[int, ...], *, confirm: bool
    ) -> dict[str, Any]:
        if happened == "not applied":
            await self._in_ledger(
                lambda ledger: ledger.record(
                    entry.id, "apply_failed", hunks=hunks, reason="the editor did not apply it"
                )
            )
            if not confirm:
                self.editor.show_message("PlanPatch: the editor did not apply the patch", Severity.WARNING)
            return {"ok": False, "patchId": entry.id, "patchState": "proposed"}
        if happened == "applied":
            await self._in_ledger(lambda ledger: ledger.record(entry.id, "applied", hunks=hunks))
            await self._now_applied(uri, entry)
            if confirm and len(hunks) < len(entry.proposal.edits):
                await self._prove_what_was_chosen(entry, hunks)
            return {"ok": True, "patchId": entry.id, "patchState": "applied", "hunks": list(hunks)}
        await self._in_ledger(lambda ledger: ledger.record(entry.id, "diverged", hunks=hunks))
        file = self._files.get(uri)
        if file is not None:
            file.late[entry.id] = (normalised(entry.applied_text(hunks).text), hunks)
            file.pending.pop(entry.id, None)
            self._draw(uri)
        self._spawn(self._offer_inverse(uri, entry))
        return {"ok": False, "patchId": entry.id, "patchState": "diverged"}

    async def _prove_what_was_chosen(self, entry: Entry, hunks: tuple[int, ...]) -> None:
        """The client let the user leave hunks out: what is left is another patch, and must pass every gate."""
        base = source_of(entry.proposal.base, entry.proposal.path)
        try:
            await asyncio.to_thread(_check_subset, entry, base, [entry.proposal.edits[index] for index in hunks])
        except GateError as error:
            self.editor.show_message(f"PlanPatch: {error.message}. Rolling back is advised.", Severity.WARNING)

    async def _now_applied(self, uri: str, entry: Entry) -> None:
        file = self._files.get(uri)
        if file is None:
            return
        file.pending.pop(entry.id, None)
        entry = await self._in_ledger(lambda ledger: ledger.get(entry.id))
        file.watches[entry.id] = Watch.of(entry, self._clock())
        self._remember(file, entry)
        self._draw(uri)
        self.tell_status()

    async def _offer_inverse(self, uri: str, entry: Entry) -> None:
        document = self.documents.get(uri)
        is_untouched = document is not None and normalised(document.text) == normalised(_base_text(entry))
        if is_untouched:
            self.editor.show_message(
                "PlanPatch: the editor said that it applied the patch, but its text did not change", Severity.WARNING
            )
            return
        question = "PlanPatch: after applying, the text is not what the patch makes it."
        if await self.editor.ask(question, [TAKE_BACK, KEEP]) == TAKE_BACK:
            await self._told(self.turn("rollback", entry.id, None))

    async def _applied_late(self, uri: str, patch_id: str, hunks: tuple[int, ...]) -> None:
        """The text came after all."""
        await self._in_ledger(lambda ledger: ledger.record(patch_id, "applied", hunks=hunks, late=True))
        await self._now_applied(uri, await self._in_ledger(lambda ledger: ledger.get(patch_id)))

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
        await self._in_ledger(lambda ledger: ledger.reject(patch_id, reason=reason))
        for uri, file in self._files.items():
            for known in list(file.pending):
                if known == patch_id or known.removeprefix("p_") == patch_id:
                    del file.pending[known]
                    self._draw(uri)
        self.tell_status()
        return {"ok": True, "patchId": patch_id}

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
        await self._in_ledger(lambda ledger: ledger.accept(patch_id, reason=reason))
        return {"ok": True, "patchId": patch_id}

    async def turn(self, operation: str, patch_id: str | None, uri: str | None) -> dict[str, Any]:
        """Roll a patch back or redo it: through the editor where the file is open, else on disk.

        Args:
            operation: `rollback` or `redo`.
            patch_id: The proposal; None for the last one of the file.
            uri: The file, where no proposal is named.

        Returns:
            `{ok, patchId, patchState}`.

        Raises:
            UsageError: Nothing to do, or the proposal's state does not allow it.
            StaleTextError: A hunk was edited since; the diff that was shown has three sides.
        """
        entry = await self._entry_to_turn(operation, patch_id, uri)
        open_at = self._uri_of(entry)
        if open_at is None:
            turn = (
                (lambda ledger: ledger.rollback(entry.id))
                if operation == "rollback"
                else (lambda ledger: ledger.redo(entry.id))
            )
            await self._in_ledger(cast("Callable[[Ledger], Any]", turn))
            return {
                "ok": True,
                "patchId": entry.id,
                "patchState": "rolled_back" if operation == "rollback" else "applied",
            }
        file = self._files[open_at]
        async with file.lock:
            try:
                return await self._turn_in_editor(operation, entry, open_at, file)
            except StaleTextError as error:
                await self._show_conflict(entry, error)
                raise

    async def _turn_in_editor(self, operation: str, entry: Entry, uri: str, file: _File) -> dict[str, Any]:
        is_rollback = operation == "rollback"
        kind = "rolled_back" if is_rollback else "redone"
        source = self.source_of_document(uri)
        if is_rollback and entry.standing.is_applied and normalised(source.text) == normalised(_base_text(entry)):
            await self._in_ledger(lambda ledger: ledger.record(entry.id, kind, reason="the text was so already"))
            await self._after_turn(uri, file, entry.id, is_rollback=is_rollback)
            return {"ok": True, "patchId": entry.id, "patchState": kind}
        find = Ledger.plan_rollback if is_rollback else Ledger.plan_redo
        edits = await self._in_ledger(lambda ledger: find(ledger, entry.id, source))
        if self.source_of_document(uri).to_bytes() != source.to_bytes():
            raise StaleTextError(f"{source.path} changed just now", hint="Try again.")
        label = f"PlanPatch: {'roll back' if is_rollback else 'redo'}: {entry.proposal.intent or entry.proposal.scope}"
        edit = self._buffer_edit(uri, source, edits, label, confirm=False)
        target = _replaced_text(source, edits)
        happened, _ = await self._edit(uri, edit, {normalised(target): ()})
        if happened == "not applied":
            self.editor.show_message(f"PlanPatch: the editor did not {operation} the patch", Severity.WARNING)
            return {"ok": False, "patchId": entry.id, "patchState": entry.state.value}
        if happened == "diverged":
            message = f"PlanPatch: after the {operation} the text is not what was expected; look at it"
            self.editor.show_message(message, Severity.WARNING)
            return {"ok": False, "patchId": entry.id, "patchState": "diverged"}
        await self._in_ledger(lambda ledger: ledger.record(entry.id, kind))
        await self._after_turn(uri, file, entry.id, is_rollback=is_rollback)
        return {"ok": True, "patchId": entry.id, "patchState": kind}

    async def _after_turn(self, uri: str, file: _File, patch_id: str, *, is_rollback: bool) -> None:
        if is_rollback:
            file.watches.pop(patch_id, None)
            file.late.pop(patch_id, None)
            await self._recall_history(uri)
        else:
            await self._now_applied(uri, await self._in_ledger(lambda ledger: ledger.get(patch_id)))
            await self._recall_history(uri)
        self.tell_status()

    async def _entry_to_turn(self, operation: str, patch_id: str | None, uri: str | None) -> Entry:
        if patch_id:
            return await self._in_ledger(lambda ledger: ledger.get(patch_id))
        path = path_of(uri) if uri else None
        if path is None:
            raise UsageError("The argument has neither `patchId` nor the `uri` of a file")
        find = Ledger.last_applied if operation == "rollback" else Ledger.last_rolled_back
        entry = await self._in_ledger(lambda ledger: find(ledger, path))
        if entry is None:
            what = "applied patch to roll back" if operation == "rollback" else "rolled back patch to redo"
            raise UsageError(f"{path} has no {what}", hint="planpatch ledger list shows what there is.")
        return entry

    async def _show_conflict(self, entry: Entry, error: StaleTextError) -> None:
        """The hunks that were edited since, each three ways."""
        lines = [f"# {error.message}", "", error.hint, ""]
        for hunk in cast("Sequence[Mapping[str, Any]]", error.details.get("hunks") or ()):
            for name, value in hunk.items():
                lines += [f"## {name}", "", "```python", str(value).rstrip("\n"), "```", ""]
        folder = await asyncio.to_thread(make_private_folder, self.paths.plans)
        file = folder / f"{entry.id}.conflict.md"
        await asyncio.to_thread(file.write_bytes, "\n".join(lines).encode("utf-8"))
        await self._open(file, f"the lines were edited since; {file} shows them three ways")

    def cancel(self, job_id: str | None) -> dict[str, Any]:
        """Cancel a job, or the one that runs, or all that wait if none runs.

        Args:
            job_id: The job; None for the oldest that has not ended.

        Returns:
            `{cancelled: [ids]}`.

        Raises:
            UsageError: No such job.
        """
        if job_id is not None:
            job = self.jobs.get(job_id)
            if job is None:
                raise UsageError(f"There is no job {job_id!r}")
            chosen = [job]
        else:
            chosen = self.jobs.running()[:1]
        cancelled = [job.id for job in chosen if not job.has_ended]
        for job in chosen:
            self.jobs.cancel(job)
        return {"cancelled": cancelled}

    # --- editing a document -----------------------------------------------------------------------------------------

    def _buffer_edit(self, uri: str, source: Source, edits: Sequence[Edit], label: str, *, confirm: bool) -> BufferEdit:
        document = self.documents[uri]
        shift = 1 if source.bom else 0
        hunks = [
            Hunk(document.position(part.start + shift), document.position(part.end + shift), part.text, label)
            for part in replacements(source, edits)
        ]
        return BufferEdit(uri, document.version, hunks, label, confirm)

    async def _edit(
        self, uri: str, edit: BufferEdit, targets: Mapping[str, tuple[int, ...]]
    ) -> tuple[str, tuple[int, ...]]:
        """Send an edit and see what the document becomes.

        Returns `applied` with the hunks that were found, `not applied`, or `diverged`.
        """
        file = self._files[uri]
        before = normalised(self.documents[uri].text)
        file.search = search = _Search(targets)
        try:
            try:
                is_said_applied = await self.editor.apply_edit(edit)
            except EditorFault as fault:
                self.editor.show_message(f"PlanPatch: the editor refused the edit: {fault}", Severity.WARNING)
                is_said_applied = False
            wait_s = self._check_s if is_said_applied else 0.0
            deadline = time.monotonic() + wait_s
            while True:
                if search.found is not None:
                    return "applied", search.found
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._files.get(uri) is not file:
                    break
                file.changed.clear()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(file.changed.wait(), left_s)
            document = self.documents.get(uri)
            is_untouched = document is None or normalised(document.text) == before
            return ("not applied" if not is_said_applied and is_untouched else "diverged"), ()
        finally:
            file.search = None

    # --- notes ------------------------------------------------------------------------------------------------------

    def _settle_later(self, uri: str, file: _File) -> None:
        if not (file.pending or file.refused):
            return
        if file.settle is not None:
            file.settle.cancel()
        file.settle = asyncio.get_running_loop().call_later(_SETTLE_S, self._draw, uri)

    def _draw(self, uri: str) -> None:
        """Show what waits and what was refused, as far as it is for the text as it is now."""
        file, document = self._files.get(uri), self.documents.get(uri)
        if file is None or document is None:
            return
        notes: list[Note] = []
        for pending in file.pending.values():
            if pending.base == document.text:
                offer = pending.offer
                message = f"PlanPatch: a patch waits ({offer.intent}): apply or reject it"
                notes.append(self._note(document, offer, message, "patch"))
        for base, offer in file.refused:
            if base == document.text:
                notes.append(self._note(document, offer, f"PlanPatch: {offer.reason}", offer.gate))
        self.editor.publish_notes(uri, document.version, notes)

    def _note(self, document: Document, offer: Offer, message: str, code: str) -> Note:
        line = next(
            (
                number
                for number in range(offer.start_line, offer.end_line + 1)
                if not document.line_text(number).lstrip().startswith("@")
            ),
            offer.start_line,
        )
        end = Position(line, document.num_units_of_line(line))
        return Note(Position(line, 0), end, message, code, {"patchId": offer.patch_id})

    # --- labels -----------------------------------------------------------------------------------------------------

    async def _recall(self, uri: str) -> None:
        """What the ledger knows of a file that was opened: patches to watch and to roll back."""
        path = path_of(uri)
        if path is None:
            return
        try:
            summaries = await self._in_ledger(lambda ledger: ledger.list_proposals(path=path, limit=50))
            for summary in summaries:
                unsettled = summary.state is State.APPLIED and summary.label is Label.UNREVIEWED
                if unsettled and summary.surface == "lsp":
                    entry = await self._in_ledger(lambda ledger, name=summary.id: ledger.get(name))
                    file = self._files.get(uri)
                    if file is not None and entry.id not in file.watches:
                        file.watches[entry.id] = Watch.of(entry, self._clock())
            await self._recall_history(uri)
        except PlanPatchError as error:
            self.editor.show_message(f"PlanPatch: {error.message}", Severity.LOG)

    async def _recall_history(self, uri: str) -> None:
        path, file = path_of(uri), self._files.get(uri)
        if path is None or file is None:
            return
        applied = await self._in_ledger(lambda ledger: ledger.last_applied(path))
        rolled_back = await self._in_ledger(lambda ledger: ledger.last_rolled_back(path))
        file.applied = None if applied is None else (applied.id, applied.proposal.intent)
        file.rolled_back = None if rolled_back is None else (rolled_back.id, rolled_back.proposal.intent)

    def _remember(self, file: _File, entry: Entry) -> None:
        file.applied = (entry.id, entry.proposal.intent)

    async def _note_turned(self, uri: str, watch: Watch, finding: str) -> None:
        """The editor's own undo or redo; the ledger is told what is in the text."""
        kind = "rolled_back" if finding == "undone" else "redone"
        reason = UNDONE if finding == "undone" else "redone in the editor"
        await self._in_ledger(lambda ledger: ledger.record(watch.patch_id, kind, reason=reason))
        if finding == "redone":
            watch.applied_at = self._clock()
        await self._recall_history(uri)

    async def _judge(self, uri: str, least_s: float, reason: str) -> None:
        """Label the patches of a document that are old enough."""
        file = self._files.get(uri)
        if file is None or file.pending:
            return
        now = self._clock()
        due = [one for one in file.watches.values() if not one.is_undone and now - one.applied_at >= least_s]
        if not due:
            return
        try:
            source = self.source_of_document(uri)
        except PlanPatchError:
            return
        for watch in due:
            finding = await asyncio.to_thread(watch.judge, source)
            if finding in ("kept", "changed"):
                final = source.to_bytes() if finding == "changed" else None
                said = reason if finding == "kept" else f"{reason}, changed by the user"
                await self._in_ledger(
                    lambda ledger, one=watch, text=final, why=said: ledger.label(
                        one.patch_id, "accepted", reason=why, final_text=text
                    )
                )
                file.watches.pop(watch.patch_id, None)
            elif finding == "gone":
                file.watches.pop(watch.patch_id, None)

    # --- mechanics --------------------------------------------------------------------------------------------------

    async def ledger(self) -> Ledger:
        """The ledger, opened on a thread at its first use."""
        if self._ledger is None:
            self._ledger = await asyncio.to_thread(self._the_ledger)
        return self._ledger

    def _the_ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = self._open_ledger()
        return self._ledger

    async def _in_ledger(self, work: Callable[[Ledger], T]) -> T:
        ledger = await self.ledger()
        return await asyncio.to_thread(work, ledger)

    def _uri_of(self, entry: Entry) -> str | None:
        """The open document of a proposal's file."""
        path = entry.proposal.path
        return next((uri for uri in self.documents if path is not None and _same_file(path_of(uri), path)), None)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._told(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _told(self, work: Any) -> Any:
        """Await; an error of ours is shown, not raised."""
        try:
            return await work
        except CancelledError:
            return None
        except PlanPatchError as error:
            self.editor.show_message(f"PlanPatch: {error.message}. {error.hint}".strip(), Severity.WARNING)
            return None

    def run_command(self, kind: Any, title: str, work: Callable[[], Any], uri: str = "") -> Job:
        """Run something short as a job, so that the command can be answered at once.

        Args:
            kind: What it is.
            title: What progress calls it.
            work: Makes the coroutine; what it returns goes into the job's result.
            uri: The document it is about.

        Returns:
            The job.
        """

        async def run(job: Job) -> None:
            job.state = "running"
            job.result |= await work()

        return self.jobs.start(kind, title, run, uri=uri)


# --- arguments and texts -------------------------------------------------------------------------------------------


def _place(argument: Mapping[str, Any]) -> tuple[Position, Position]:
    place = argument.get("range") or argument.get("position")
    try:
        if isinstance(place, Mapping) and "line" in place:
            start = Position(int(place["line"]), int(place["character"]))
            return start, start
        first, last = place["start"], place["end"]  # type: ignore[index]
        return (
            Position(int(first["line"]), int(first["character"])),
            Position(int(last["line"]), int(last["character"])),
        )
    except (TypeError, KeyError, ValueError):
        raise UsageError(
            "The argument has neither a `range` nor a `position`", hint="Give {uri, position: {line, character}}."
        ) from None


def _scope_at(source: Source, document: Document, start: Position, end: Position) -> Scope:
    """The innermost function or class that holds the whole selection; a cursor means the innermost around it."""
    last_line = end.line - 1 if end.character == 0 and end.line > start.line else end.line
    line = start.line
    while line < last_line and not document.line_text(line).strip():
        line += 1
    while last_line > line and not document.line_text(last_line).strip():
        last_line -= 1
    scope = find_scope(source, None, line + 1)
    while scope.kind != "module" and not scope.contains(last_line + 1):
        outer = scope.qualname.rpartition(".")[0]
        try:
            scope = find_scope(source, outer, scope.start_line) if outer else find_scope(source)
        except UnknownScopeError:
            scope = find_scope(source)
    return scope


def _scope_text(target: Target) -> str:
    return target.source.text_between(target.scope.start_line, target.scope.end_line)


def _intent_of(diagnostic: Mapping[str, Any], source: Source) -> str:
    """A diagnostic of another server as an intent."""
    message = " ".join(str(diagnostic.get("message", "")).split())
    if not message:
        raise UsageError("The diagnostic has no message")
    by = f" reported by {diagnostic['source']}" if diagnostic.get("source") else ""
    code = diagnostic.get("code")
    rule = f" ({code})" if isinstance(code, (str, int)) and code != "" else ""
    with suppress(TypeError, KeyError, ValueError, IndexError):
        line = source.lines[int(diagnostic["range"]["start"]["line"])].strip()
        return f"Fix this problem{by}{rule}: {message}. It is at the line `{line}`."
    return f"Fix this problem{by}{rule}: {message}."


def _feedback(value: Any) -> Feedback | None:
    if not isinstance(value, Mapping):
        return None
    table = cast("Mapping[str, Any]", value)
    reason, hint = str(table.get("reason") or ""), str(table.get("hint") or "")
    return Feedback(reason, hint) if reason or hint else None


def _hunk_indices(entry: Entry, hunks: Any) -> tuple[int, ...]:
    count = len(entry.proposal.edits)
    if hunks is None:
        return tuple(range(count))
    is_list = isinstance(hunks, Sequence) and not isinstance(hunks, str)
    numbers = cast("Sequence[Any]", hunks) if is_list else ()
    if not numbers or not all(isinstance(one, int) and 0 <= one < count for one in numbers):
        raise UsageError(f"{hunks!r} are no hunks of {entry.id}", hint=f"Give indices from 0 to {count - 1}.")
    return tuple(sorted(set(numbers)))


def _check_subset(entry: Entry, base: Source, edits: Sequence[Edit]) -> None:
    """A part of a patch is another patch: every gate must pass it too."""
    proposal = entry.proposal
    scope = find_scope(base) if not proposal.scope else find_scope(base, proposal.scope, proposal.start_line)
    report = run_gates(base, scope, list(edits), imports=proposal.imports, expected_sha256=base.sha256)
    if report.refused is not None:
        raise GateError(
            f"These hunks alone were refused by the gate `{report.refused.gate}`: {report.refused.reason}",
            hint="Choose others, or apply the whole patch.",
            gate=report.refused.gate,
            gates=[verdict.to_json() for verdict in report.verdicts],
            patch_id=entry.id,
        )


def _subset_targets(entry: Entry, chosen: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The texts that a user may choose in a preview, hunk by hunk."""
    if len(chosen) > _MOST_HUNKS_APART:
        sizes = [1, len(chosen) - 1]
    else:
        sizes = range(1, len(chosen))
    parts = [part for size in sizes for part in combinations(chosen, size)]
    return {normalised(entry.applied_text(part).text): part for part in parts}


def _base_text(entry: Entry) -> str:
    return source_of(entry.proposal.base, entry.proposal.path).text


def _replaced_text(source: Source, edits: Sequence[Edit]) -> str:
    from engine.patching.edits import replaced

    return replaced(source.text, replacements(source, edits))


def _path_on_disk(uri: str) -> Path:
    path = path_of(uri)
    if path is None:
        raise PathError(f"{uri} is no file on disk", hint="Save it first.")
    return path


def _same_file(one: Path | None, other: Path) -> bool:
    from engine.patching.ledger_records import path_key

    return one is not None and path_key(one) == path_key(other)
