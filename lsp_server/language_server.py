"""`planpatch lsp`: the language server over stdio or loopback TCP.

Handlers convert, call the workbench, and convert back. `initialize` is answered before torch is imported; the model
loads behind it. A command is answered at once, with a job's id where there is work to do.

Documents are kept by `documents.py` and not by pygls, whose lines end where the protocol's do not.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from io import RawIOBase
from pathlib import Path
from typing import Any, cast, get_args

import attrs
from lsprotocol import types
from pygls.lsp.server import LanguageServer
from pygls.protocol import default_converter

from engine.errors import PlanPatchError, UsageError
from engine.inference.catalogue import resolve
from engine.patching.ledger_records import Operation
from engine.patching.parser_process import ParserProcess
from lsp_server import code_actions
from lsp_server.adapter_follower import AdapterFollower
from lsp_server.applying import Turn
from lsp_server.documents import Encoding
from lsp_server.editor import ClientProfile, Severity
from lsp_server.http_host import HttpHost
from lsp_server.learning_reports import known_adapters, training_end, training_run
from lsp_server.log_masking import mask_log
from lsp_server.lsp_editor import LspEditor, action_request, code_action
from lsp_server.lsp_protocol import Protocol
from lsp_server.model_host import HostStatus, ModelHost, ServerMark
from lsp_server.session import Keep, Session
from lsp_server.settings import SettingProblem, Settings, load_settings
from lsp_server.targets import ledger_filter, text_argument
from lsp_server.transport import Writer, read_messages, take_stdio
from lsp_server.uris import path_of
from lsp_server.workbench import PULL_ID, Workbench, said

COMMANDS = (
    *("planpatch.plan", "planpatch.patch", "planpatch.apply", "planpatch.reject", "planpatch.rollback"),
    *("planpatch.redo", "planpatch.cancel", "planpatch.status", "planpatch.feedback", "planpatch.model"),
    *("planpatch.adapter", "planpatch.pull", "planpatch.ledger"),
)
MODEL_SETTINGS = ("model", "device", "quantization", "dtype", "keep_quantized", "cuda_kernels", "kv_cache_tokens")

_TICK_S = 5.0
_LEDGER_LINES, _MOST_LEDGER_LINES = 50, 1000
_FATAL_EXIT_CODE = 3
_BEGIN_AFTER_S = 0.1  # Emacs drops, or leaves unread, what comes in one read with an answer that it waits for

log = logging.getLogger("planpatch.lsp")


class PlanPatchServer(LanguageServer):
    """One connection's server.

    Args:
        environ: Environment variables.
        options: Options of the command line by setting name.
        keep: Keeps what is learnt from before the ledger's retention drops it.
    """

    def __init__(self, environ: Mapping[str, str], options: Mapping[str, object], keep: Keep | None = None) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            "planpatch", version("planpatch"), protocol_cls=Protocol, converter_factory=default_converter, max_workers=2
        )
        self._environ = dict(environ)
        self._options = dict(options)
        self._bench: Workbench | None = None
        self._editor_settings: Mapping[str, object] = {}
        self._has_begun = asyncio.Event()
        self._settings: dict[Path | None, Settings] = {}
        self._problems_told: set[str] = set()
        self._folders: list[Path] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[int] | None = None
        self._host = ModelHost(self._model_changed)
        self._parsers, self._prover = ParserProcess(), ParserProcess()  # a long proof keeps no command waiting
        self._http = HttpHost(self._host, lambda: self._session, self._edit_for_http, self._tell_of_http)
        self._follower = AdapterFollower(self._host, lambda: self._session, self._tell_of_adapter)
        self._host_progress = ""
        self._is_pull_shown: bool = False
        self._training: dict[str, Any] | None = None
        self._training_end: dict[str, Any] | None = None
        self._numbers = itertools.count(1)
        self._showing_model = asyncio.Lock()
        self._client_process: int | None = None
        self._session = Session.open(self._environ, self._options, keep=keep)
        self._mark = ServerMark(self._session.paths.servers)
        self._background: set[asyncio.Task[None]] = set()
        _register(self)
        self._warm_up()

    def _warm_up(self) -> None:
        """Have cattrs make its converters now: it does so at the first message of a kind, which is `initialize`."""
        message = {"jsonrpc": "2.0", "id": 0, "method": types.INITIALIZE}
        self.protocol.structure_message({**message, "params": {"processId": None, "capabilities": {}}})
        for kind in _classes_in(types.ClientCapabilities):
            self.protocol._converter.get_structure_hook(kind)  # pyright: ignore[reportPrivateUsage]
        folders = types.WorkspaceOptions(types.WorkspaceFoldersServerCapabilities())
        capabilities = types.ServerCapabilities(
            text_document_sync=types.TextDocumentSyncOptions(save=types.SaveOptions()),
            code_action_provider=types.CodeActionOptions(),
            execute_command_provider=types.ExecuteCommandOptions([]),
            workspace=folders,
        )
        self._as_json(types.ResponseError(0, ""))
        self._as_json(types.InitializeResult(capabilities, types.ServerInfo("")))

    @property
    def bench_or_none(self) -> Workbench | None:
        """The workbench, once `initialize` came."""
        return self._bench

    @property
    def bench(self) -> Workbench:
        """The workbench.

        Raises:
            UsageError: `initialize` did not come yet.
        """
        if self._bench is None:
            raise UsageError("initialize comes first")
        return self._bench

    @property
    def editor(self) -> LspEditor:
        """The connected client."""
        return cast(LspEditor, self.bench.editor)

    # --- life -------------------------------------------------------------------------------------------------------

    async def serve(self, start: Callable[[PlanPatchServer], Awaitable[None] | None]) -> int:
        """Serve one connection until it ends.

        Args:
            start: Joins the connection: sets the writer and lets messages come to `receive`.

        Returns:
            The process's exit code.
        """
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        with suppress(NotImplementedError, RuntimeError):  # Windows, or not the main thread
            self._loop.add_signal_handler(signal.SIGTERM, self.end, 143)
        started = start(self)
        if started is not None:
            await started
        ticker = self._loop.create_task(self._tick())
        try:
            return await self._ended
        finally:
            ticker.cancel()
            for process in (self._parsers, self._prover):
                await asyncio.to_thread(process.close)
            if self._bench is not None:
                await self._bench.close()
            await asyncio.to_thread(self._follower.close)
            await asyncio.to_thread(self._http.close)
            await asyncio.to_thread(self._host.close)
            self._mark.remove()

    def end(self, code: int) -> None:
        """Stop serving; from the loop's thread."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(code)

    def end_from_thread(self) -> None:
        """The client is gone, noticed on another thread."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.end, 1)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if self._bench is None:
                continue
            if self._client_process is not None and not _is_alive(self._client_process):
                log.warning("the client's process %d is gone", self._client_process)
                self.end(1)
            try:
                await self._tell_training()
                await self._bench.labels.tick()
            except Exception as fault:  # a locked ledger, a process that was ended: the next tick tries again
                log.warning("labels could not be looked at: %s", fault)

    async def _tell_training(self) -> None:
        trained, before = self._session.paths.qlora_out, self._training
        now = await asyncio.to_thread(training_run, trained)
        if now == before:
            return
        if before is not None and (now is None or now["run"] != before["run"]):
            self._training_end = await asyncio.to_thread(training_end, trained, before["run"])
        self._training = now
        self.bench.tell_status()

    async def _end_with_engine(self) -> None:
        """A failed device stays failed in this process: say so and end, so that the client starts a new one."""
        await self.bench.has_failed.wait()
        engine = self._host.engine_or_none
        reason = engine.status().message if engine is not None else "The engine failed"
        self.editor.show_message(f"PlanPatch: {reason}. The server ends; it has to be started again.", Severity.ERROR)
        await asyncio.sleep(0.2)
        self.end(_FATAL_EXIT_CODE)

    # --- start ------------------------------------------------------------------------------------------------------

    def initialize(self, params: types.InitializeParams) -> None:
        """Learn what the client can do and where it works."""
        capabilities = cast(Protocol, self.protocol).client_capabilities_json or self._as_json(params.capabilities)
        options = params.initialization_options
        options = cast("dict[str, Any]", options) if isinstance(options, dict) else {}
        found: Any = self.protocol.workspace.position_encoding  # a name, or pygls' enumeration of them
        encoding = str(getattr(found, "value", found))
        name = params.client_info.name if params.client_info else ""
        profile = ClientProfile.of(name, capabilities, cast("Encoding", encoding), options)
        folders = [folder.uri for folder in params.workspace_folders or []] or [params.root_uri or ""]
        self._folders = [path for uri in folders if (path := path_of(uri)) is not None]
        settings = options.get("settings") or options.get("planpatch")
        self._editor_settings = cast("dict[str, object]", settings) if isinstance(settings, dict) else {}
        process = params.process_id
        self._client_process = process if process is not None and process > 0 and _is_alive(process) else None
        self._bench = Workbench(
            LspEditor(self.protocol, profile),
            self._host,
            lambda: self._session.served_ledger(),
            self._session.paths,
            self.settings_of,
            call=self._parsers,
            prover=self._prover,
            begin_after_s=_BEGIN_AFTER_S,
            server_facts=self._facts,
        )
        self._spawn(self._end_with_engine())

    def initialized(self, _params: types.InitializedParams) -> None:
        """The client is ready: ask it for settings, then load the model."""
        self._spawn(self._begin())

    async def _begin(self) -> None:
        await self._leave_mark("")
        dynamic = self.client_capabilities.workspace and self.client_capabilities.workspace.did_change_configuration
        if dynamic and dynamic.dynamic_registration:
            options = types.DidChangeConfigurationRegistrationOptions(section="planpatch")
            await self.editor.register(types.WORKSPACE_DID_CHANGE_CONFIGURATION, options)
        found = await self.editor.configuration("planpatch")
        if isinstance(found, dict):
            self._editor_settings = {**self._editor_settings, **cast("dict[str, object]", found)}
        self._read_settings()
        self._follower.start()
        self._host.start(self._session)
        self._has_begun.set()
        self._http.start()
        for process in (self._parsers, self._prover):
            await asyncio.to_thread(process.start)

    async def _edit_for_http(self, operation: Operation, patch_id: str) -> dict[str, Any] | None:
        """An edit that HTTP asks for, on this loop, if the editor has the file open; called on another loop."""
        assert self._loop is not None
        work = self.bench.applier.edit_if_open(operation, patch_id)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _tell_from_thread(self, message: str, severity: Severity) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.editor.show_message, f"PlanPatch: {message}", severity)

    def _tell_of_http(self, message: str, severity: Severity) -> None:
        if not self.editor.profile.presents:
            self._tell_from_thread(message, severity)
        elif self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.bench.tell_status)

    def _facts(self) -> dict[str, Any]:
        """What the status says of this server."""
        facts = {"version": self.version, "http": self._http.url, "httpProblem": self._http.problem}
        return {**facts, "training": self._training, "trainingEnd": self._training_end}

    def _tell_of_adapter(self, message: str, is_done: bool) -> None:
        self._tell_from_thread(message, Severity.INFO if is_done else Severity.WARNING)
        if self._loop is not None and is_done:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.bench.tell_status)

    # --- settings ---------------------------------------------------------------------------------------------------

    def _read_settings(self) -> None:
        self._settings.clear()
        settings, problems = self._load_settings(None)
        self._session = Session(self._session.paths, settings, problems, self._session.keep)
        self._settings[None] = settings
        _set_log(settings, self._session.paths.resolve)
        self._tell_problems(problems)
        for folder in self._folders:
            self.settings_of(folder / "any.py")

    def _load_settings(self, workspace: Path | None) -> tuple[Settings, list[SettingProblem]]:
        paths = self._session.paths
        return load_settings(self._options, self._environ, paths.user_settings, workspace, self._editor_settings)

    def settings_of(self, path: Path | None) -> Settings:
        """The settings that hold for a file: its workspace folder may add presets, context and style.

        Args:
            path: The file; None for none.

        Returns:
            The settings.
        """
        holding = [folder for folder in self._folders if path is not None and folder in path.parents]
        folder = max(holding, key=lambda one: len(one.parts), default=None)
        if folder not in self._settings:
            self._settings[folder], problems = self._load_settings(folder)
            self._tell_problems(problems)
        return self._settings[folder]

    def _tell_problems(self, problems: Sequence[SettingProblem]) -> None:
        for problem in map(str, problems):
            if problem not in self._problems_told and self._bench is not None:
                self._problems_told.add(problem)
                self.editor.show_message(f"PlanPatch: {problem}", Severity.WARNING)

    async def change_configuration(self, params: types.DidChangeConfigurationParams) -> None:
        """Take in the client's settings; what the model depends on loads it anew, a new adapter is swapped in.

        Args:
            params: The notification; its settings count where the client does not answer `workspace/configuration`.
        """
        await self._has_begun.wait()  # VS Code tells of a change as soon as it is asked to tell of changes
        found = await self.editor.configuration("planpatch")
        settings: Any = params.settings
        if found is None and isinstance(settings, dict):
            table = cast("dict[str, Any]", settings)
            found = table.get("planpatch", table)
        if not isinstance(found, dict):
            return
        before = self._session.settings
        self._editor_settings = cast("dict[str, object]", found)
        self._read_settings()
        after = self._session.settings
        try:
            if any(getattr(before, name) != getattr(after, name) for name in MODEL_SETTINGS):
                self._session.model_ref()  # an unknown name is told, and what is loaded stays
                self._host.start(self._session)
            elif before.adapter != after.adapter:
                await self._use_adapter()
        except PlanPatchError as error:
            source = after.source_of("model" if before.model != after.model else "adapter")
            self.editor.show_message(f"PlanPatch: {source}: {said(error)}", Severity.ERROR)

    def will_save(self, params: types.WillSaveTextDocumentParams) -> None:
        """Remember why the next save happens."""
        if (file := self.bench.files.get(params.text_document.uri)) is not None:
            self.bench.labels.will_save(file, is_manual=params.reason == types.TextDocumentSaveReason.Manual)

    def did_save(self, params: types.DidSaveTextDocumentParams) -> None:
        """A save by hand may accept patches."""
        if (file := self.bench.files.get(params.text_document.uri)) is not None:
            self.bench.labels.did_save(file)

    def change_folders(self, params: types.DidChangeWorkspaceFoldersParams) -> None:
        """Add and remove workspace folders."""
        gone = {path_of(folder.uri) for folder in params.event.removed}
        come = [path for folder in params.event.added if (path := path_of(folder.uri)) is not None]
        self._folders = [folder for folder in self._folders if folder not in gone] + come
        self._settings.clear()
        self._settings[None] = self._session.settings

    # --- the model --------------------------------------------------------------------------------------------------

    def _model_changed(self, status: HostStatus) -> None:
        """Called on the loading thread."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(lambda: self._spawn(self._show_model(status)))

    async def _show_model(self, status: HostStatus) -> None:
        """Progress while it loads; a message when it cannot; the choice to pull it when it is absent."""
        if self._bench is None:
            return
        self._bench.tell_status()
        async with self._showing_model:  # a client takes its time to create progress
            await self._show_progress(status)
        if status.state == "ready":
            await self._leave_mark(status.model)
        elif self.editor.profile.presents:
            return
        elif status.state == "absent" and status.reason != "cancelled":
            pull = "Pull it"
            question = f"PlanPatch: {status.message}. Pull it now? It stays on this machine."
            if await self.editor.ask(question, [pull, "Not now"]) == pull:
                self._host.start(self._session, pull=True)
        elif status.state == "released":
            await self._leave_mark("")
            self.editor.show_message(f"PlanPatch: {status.message}. {status.hint}", Severity.INFO)
        elif status.state == "failed" and self._host.status is status:
            self.editor.show_message(f"PlanPatch: {status.message}. {status.hint}".strip(), Severity.ERROR)

    async def _leave_mark(self, model: str) -> None:
        """Tell others of this server, and of the model that it holds."""
        workspace = str(self._folders[0]) if self._folders else ""
        await asyncio.to_thread(self._mark.write, self.editor.profile.name, workspace, model)

    async def _show_progress(self, status: HostStatus) -> None:
        """A download is progress of its own: it can be cancelled, and loading what is here cannot."""
        message = f"{status.model}: {status.message}" if status.model else status.message
        if self._host_progress and (status.state != "loading" or status.is_pull != self._is_pull_shown):
            self.editor.end_progress(self._host_progress, message or "ready")
            self._host_progress = ""
        if self._host_progress:
            self.editor.report_progress(self._host_progress, message)
        elif status.state == self._host.status.state == "loading":
            token = f"planpatch/model-{next(self._numbers)}"
            title = "PlanPatch: downloading the model" if status.is_pull else "PlanPatch: loading the model"
            if await self.editor.begin_progress(token, title, message, can_cancel=status.is_pull):
                self._host_progress = token
                self._is_pull_shown = status.is_pull

    def cancel_progress(self, token: str) -> None:
        """End what the client shows under a token of ours, if it can be ended.

        Args:
            token: The progress's.
        """
        job = self.bench.jobs.get(token.removeprefix("planpatch/"))
        if job is not None:
            self.bench.jobs.cancel(job)
        elif token == self._host_progress:
            self._host.cancel_pull()

    def _adapter_folder(self) -> Path | None:
        """The adapter of the model that is loaded, or would be."""
        local = self._host.local_or_none
        return self._session.adapter(None if local is None else local.hub_id)

    async def _use_adapter(self) -> None:
        engine = self._host.engine_or_none
        if engine is not None:
            folder = self._adapter_folder()
            await asyncio.to_thread(engine.use_adapter, str(folder) if folder else None)
            self.bench.tell_status()

    # --- commands ---------------------------------------------------------------------------------------------------

    async def execute(self, command: str, arguments: Sequence[Any]) -> Any:
        """Run a command.

        Args:
            command: One of `COMMANDS`.
            arguments: One object, or nothing.

        Returns:
            `{jobId, position}` where work goes on, else what was asked for.

        Raises:
            UsageError: No such command, or the argument is wrong.
            PlanPatchError: It cannot be done.
        """
        handler = self._handlers().get(command)
        if handler is None:
            raise UsageError(f"There is no command {command!r}", hint=f"Commands: {', '.join(COMMANDS)}")
        argument: Any = (arguments[0] if arguments else None) or {}
        if not isinstance(argument, Mapping) or len(arguments) > 1:
            raise UsageError(f"{command} takes one object", hint="Such as {uri, position, intent}.")
        result: Any = handler(cast("Mapping[str, Any]", argument))
        return await result if asyncio.iscoroutine(result) else result

    def _handlers(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        return {
            "planpatch.plan": self._plan,
            "planpatch.patch": self._patch,
            "planpatch.apply": self._apply,
            "planpatch.reject": lambda argument: self.bench.reject(_patch_id(argument), _reason(argument)),
            "planpatch.rollback": lambda argument: self._turn("rollback", argument),
            "planpatch.redo": lambda argument: self._turn("redo", argument),
            "planpatch.cancel": self._cancel,
            "planpatch.status": lambda argument: self._status(argument),
            "planpatch.feedback": self._feedback,
            "planpatch.model": self._model,
            "planpatch.adapter": self._adapter,
            "planpatch.pull": self._pull,
            "planpatch.ledger": self._ledger,
        }

    def _answer(self, job: Any) -> dict[str, Any]:
        return {"jobId": job.id, "position": len(self.bench.jobs.running()) - 1}

    async def _plan(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer(await self.bench.plan(argument))

    async def _patch(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer(await self.bench.patch(argument))

    def _apply(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        patch_id, hunks = _patch_id(argument), argument.get("hunks")
        work = partial(self.bench.applier.apply, patch_id, hunks, confirm=argument.get("confirm") is True)
        return self._answer(self.bench.run_as_job("apply", f"apply {patch_id}", work))

    def _turn(self, turn: Turn, argument: Mapping[str, Any]) -> dict[str, Any]:
        patch_id, uri = text_argument(argument, "patchId"), text_argument(argument, "uri")
        if patch_id is None and uri is None:
            raise UsageError("The argument has neither `patchId` nor `uri`")
        work = partial(self.bench.applier.turn, turn, patch_id, path_of(uri) if uri else None)
        return self._answer(self.bench.run_as_job(turn, f"{turn} {patch_id or uri}", work))

    def _cancel(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        """A job, or the download of a model, which goes by the id `pull`; without an id what began first."""
        job_id = text_argument(argument, "jobId")
        if job_id == PULL_ID or (job_id is None and not self.bench.jobs.running()):
            return {"cancelled": [PULL_ID] if self._host.cancel_pull() else []}
        return self.bench.cancel(job_id)

    async def _status(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        if (job_id := text_argument(argument, "jobId")) is not None:
            job = self.bench.jobs.get(job_id)
            if job is None:
                raise UsageError(f"There is no job {job_id!r}")
            return {**job.to_json(), "position": self.bench.jobs.position(job)}
        path = path_of(text_argument(argument, "uri") or "")
        settings = self.settings_of(path)
        plans = [] if path is None else await asyncio.to_thread(self.bench.plans.of, path)
        return {
            **self.bench.status(),
            **({"target": await self.bench.target_of(argument)} if argument.keys() & {"position", "range"} else {}),
            "apply": settings.apply,
            "presets": {preset.name: preset.title for preset in settings.presets.values()},
            "plans": [{"function": one.function, "file": str(one.file), "intent": one.intent} for one in plans],
        }

    async def _feedback(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        found = argument.get("feedback")
        table = cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else argument
        accepted = table.get("accepted")
        if not isinstance(accepted, bool):
            raise UsageError("The argument does not say `accepted`", hint="Give {patchId, feedback: {accepted: true}}.")
        return await self.bench.feedback(_patch_id(argument), accepted, _reason(table))

    async def _model(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        name = text_argument(argument, "name") or text_argument(argument, "model")
        if name is not None:
            self._choose_model(name)
            self._host.start(self._session)
        infos = await asyncio.to_thread(self._session.store.list)
        return {**self.bench.status(), "models": [info.to_json() for info in infos]}

    def _choose_model(self, name: str) -> None:
        """Use a model from now on; an unknown name is refused before anything is given up."""
        if name != "auto":
            resolve(name, None, folder=self._session.paths.home)
        self._options["model"] = name
        self._read_settings()

    async def _adapter(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        name = text_argument(argument, "name") or text_argument(argument, "adapter")
        if name is not None:
            before = self._options.get("adapter")
            self._options["adapter"] = name
            self._read_settings()
            try:
                await self._use_adapter()
            except PlanPatchError:
                self._options["adapter"] = before
                self._read_settings()
                raise
        folder = await asyncio.to_thread(self._adapter_folder)  # without a model, `auto` imports torch to look
        known = await asyncio.to_thread(known_adapters, self._session.paths.qlora_out, folder)
        return {
            "adapter": str(folder) if folder else None,
            "setting": self._session.settings.adapter,
            "adapters": known,
        }

    def _pull(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        if (name := text_argument(argument, "name") or text_argument(argument, "model")) is not None:
            self._choose_model(name)
        self._session.model_ref()
        self._host.start(self._session, pull=True)
        return {"state": self._host.status.state}

    async def _ledger(self, argument: Mapping[str, Any]) -> dict[str, Any]:
        ledger = await self.bench.records.ledger()
        if (patch_id := text_argument(argument, "patchId")) is not None:
            return (await asyncio.to_thread(ledger.get, patch_id)).to_json()
        path, limit = path_of(text_argument(argument, "uri") or ""), argument.get("limit", _LEDGER_LINES)
        if not isinstance(limit, int) or not 0 < limit <= _MOST_LEDGER_LINES:
            raise UsageError(f"`limit` is a number from 1 to {_MOST_LEDGER_LINES}, not {limit!r}")
        is_wanted = ledger_filter(text_argument(argument, "text") or "", argument.get("states") or ())
        before = text_argument(argument, "before")
        listed = partial(ledger.list_proposals, path=path, limit=limit + 1, before=before, is_wanted=is_wanted)
        found = await asyncio.to_thread(listed)
        return {"proposals": [summary.to_json() for summary in found[:limit]], "more": len(found) > limit}

    # --- menus ------------------------------------------------------------------------------------------------------

    def code_actions(self, params: types.CodeActionParams) -> list[types.CodeAction]:
        """The menu at a place.

        Args:
            params: The request.

        Returns:
            Actions with commands.
        """
        bench, file = self.bench, self.bench.files.get(params.text_document.uri)
        if file is None or not file.is_python:
            return []
        diagnostics = params.context.diagnostics
        request = action_request(params, [self._as_json(one) for one in diagnostics])
        try:
            file.check()
            bench.check_root(file.path)
        except PlanPatchError as error:
            if not request.is_automatic:
                bench.tell_once(file.document.uri, said(error))
            return []
        host = self._host.status
        if not request.is_automatic and host.state in ("absent", "failed", "released"):
            bench.tell_once(file.document.uri, f"{host.message}. {host.hint}")
        found = code_actions.actions(file.document, request, bench.action_state(file, request.start.line))
        return [code_action(action, diagnostics, self.editor.profile) for action in found]

    def _as_json(self, value: object) -> dict[str, Any]:
        return cast("dict[str, Any]", self.protocol._converter.unstructure(value))  # pyright: ignore[reportPrivateUsage]

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _logged(self, work: Any) -> None:
        try:
            await work
        except PlanPatchError as error:
            self.editor.show_message(f"PlanPatch: {said(error)}", Severity.ERROR)
        except Exception:
            log.exception("something went wrong in the background")


def _register(server: PlanPatchServer) -> None:
    """Join features to the server; their names in pygls' registry become capabilities."""
    feature = server.feature
    feature(types.INITIALIZE)(partial(server.initialize))
    feature(types.INITIALIZED)(partial(server.initialized))
    options = types.CodeActionOptions(code_action_kinds=list(code_actions.KINDS), resolve_provider=False)
    feature(types.TEXT_DOCUMENT_CODE_ACTION, options)(partial(server.code_actions))
    feature(types.TEXT_DOCUMENT_WILL_SAVE)(partial(server.will_save))
    feature(types.TEXT_DOCUMENT_DID_SAVE)(partial(server.did_save))
    feature(types.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS)(partial(server.change_folders))
    feature(types.WORKSPACE_DID_CHANGE_CONFIGURATION)(partial(server.change_configuration))
    for name in COMMANDS:
        server.command(name)(lambda: None)  # the capability; `Protocol` runs them


# --- arguments -------------------------------------------------------------------------------------------------------


def _patch_id(argument: Mapping[str, Any]) -> str:
    patch_id = text_argument(argument, "patchId")
    if patch_id is None:
        raise UsageError("The argument has no `patchId`", hint="planpatch.ledger lists them.")
    return patch_id


def _reason(argument: Mapping[str, Any]) -> str:
    found = argument.get("feedback", argument)
    return str(cast("Mapping[str, Any]", found).get("reason") or "") if isinstance(found, Mapping) else ""


def _classes_in(kind: type) -> list[type]:
    """An attrs class and those that its fields are made of."""
    found: dict[type, None] = {}
    waiting: list[Any] = [kind]
    while waiting:
        one = waiting.pop()
        if attrs.has(one) and one not in found:
            found[one] = None
            waiting += [field.type for field in attrs.fields(attrs.resolve_types(one))]
        waiting += get_args(one)
    return list(found)


def _is_alive(process_id: int) -> bool:
    import psutil

    return psutil.pid_exists(process_id)


def _set_log(settings: Settings, resolve: Callable[[str], Path]) -> None:
    """Log to stderr or a file. pygls logs whole messages, and so the user's code: only its errors are wanted."""
    target: dict[str, Any] = {"stream": sys.stderr}
    if settings.log_file:
        target = {"filename": str(resolve(settings.log_file)), "encoding": "utf-8"}
    with suppress(OSError):
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(name)s %(levelname)s %(message)s",
            force=True,
            **target,
        )
    mask_log()
    logging.getLogger("pygls").setLevel(logging.CRITICAL)


# --- connections -----------------------------------------------------------------------------------------------------


def serve_stdio(environ: Mapping[str, str], options: Mapping[str, object], keep: Keep | None = None) -> int:
    """Serve the client at stdin and stdout.

    Args:
        environ: Environment variables.
        options: Options of the command line by setting name.
        keep: Keeps what is learnt from before the ledger's retention drops it.

    Returns:
        The process's exit code.
    """
    stdin, stdout = take_stdio()

    return _run(environ, options, keep, stdin, stdout)


def serve_tcp(
    environ: Mapping[str, str], options: Mapping[str, object], host: str, port: int, keep: Keep | None = None
) -> int:
    """Serve the first client that connects to a loopback port.

    Args:
        environ: Environment variables.
        options: Options of the command line by setting name.
        host: A loopback address.
        port: 0 takes a free one; it is printed on stderr.
        keep: Keeps what is learnt from before the ledger's retention drops it.

    Returns:
        The process's exit code.

    Raises:
        UsageError: The address is not loopback, or the port is taken.
    """
    import socket

    if host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(f"{host} is not a loopback address", hint="Use 127.0.0.1: anyone could edit your files else.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    if os.name == "posix":  # a port that was just used is free at once; on Windows this would share one in use
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UsageError(f"{host}:{port} cannot be bound: {error.strerror or error}", hint="Use --port 0.") from error
    listener.listen(1)
    print(f"planpatch lsp: listening on {host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    connection, _ = listener.accept()
    listener.close()
    stream = socket.SocketIO(connection, "rwb")
    try:
        return _run(environ, options, keep, stream, stream)
    finally:
        connection.close()


def _ended(server: PlanPatchServer, reason: str) -> None:
    if reason:
        log.error("the connection is closed: %s", reason)
    server.end(0 if cast(Any, server.protocol)._shutdown and not reason else 1)


def _run(
    environ: Mapping[str, str],
    options: Mapping[str, object],
    keep: Keep | None,
    incoming: RawIOBase,
    outgoing: RawIOBase,
) -> int:
    def start(server: PlanPatchServer) -> None:
        server.protocol.set_writer(Writer(outgoing, server.end_from_thread))
        receive = cast(Protocol, server.protocol).receive
        read_messages(incoming, asyncio.get_running_loop(), receive, lambda reason: _ended(server, reason))

    server = PlanPatchServer(environ, options, keep)
    _set_log(load_settings(options, environ)[0], Path)
    code = asyncio.run(server.serve(start))
    writer: Any = server.protocol.writer
    writer.close()
    sys.stderr.flush()
    os._exit(code)  # threads of torch and of a pull that hangs must not keep a dead server
