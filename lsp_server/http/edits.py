"""PLAN and PATCH over HTTP, and what belongs to them: health, apply, roll back, redo, feedback, the ledger.

PLAN and PATCH write nothing. What changes a file goes through the editor that has it open, whichever server of this
home that has; the disk is written where none does.
"""

from __future__ import annotations

import asyncio
import errno
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EditorError, PathError, SourceError, StaleTextError, UnknownScopeError, UsageError
from engine.inference.cancellable import CancellableEngine
from engine.inference.protocol import Engine
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Applied, Entry, Operation, PlanRecord
from engine.patching.parser_process import ParserProcess
from engine.patching.patcher import MAX_INTENT_CHARS, Patch, Patcher, Plan, check_intent
from engine.patching.prompts import Feedback
from engine.patching.scopes import Scope, find_scope, list_scopes
from engine.patching.source import MAX_SOURCE_BYTES, PASTED, Source
from lsp_server.http.bodies import Body, Whole, checked, read, read_json
from lsp_server.http.documents import takes
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import Call, unless_gone
from lsp_server.http.models import service_of
from lsp_server.http.responses import Json
from lsp_server.http.service import Service
from lsp_server.running import edit_in_editor
from lsp_server.session import patcher_options
from lsp_server.survival import accept

T = TypeVar("T")

router = APIRouter()

_CALLED = re.compile(r"`?([A-Za-z_][\w.]*)`?\s*\(")
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_MOST_FILES = 2000
_MOST_NAMED = 10
_ON_DISK: Mapping[Operation, Callable[[Ledger, str], Applied]] = {
    "apply": Ledger.apply,
    "rollback": Ledger.rollback,
    "redo": Ledger.redo,
}
_AFTER: Mapping[Operation, str] = {"apply": "applied", "rollback": "rolled_back", "redo": "redone"}


class PlanBody(Body):
    """Of `/plan`."""

    intent: str
    code_paste: str | None = None
    paths: list[str] = Field(default_factory=list[str])
    function: str | None = None


class PlanReference(Body):
    """A plan as `/plan` gave it; the client may have edited its steps."""

    id: str
    steps: list[str] | None = None


class FeedbackBody(Body):
    """What was wrong with an earlier patch."""

    hint: str = ""
    reason: str = ""


class PatchBody(Body):
    """Of `/patch_smart`."""

    plan: PlanReference
    feedback: FeedbackBody | None = None
    code_paste: str | None = None
    fresh: bool = False


class PatchIdBody(Body):
    """Of `/apply`, `/rollback` and `/redo`. `only_in_editor`: 404 unless this server's editor has the file open."""

    patch_id: str
    only_in_editor: bool = False


class VerdictBody(Body):
    """Of `/feedback`."""

    patch_id: str
    accepted: bool
    reason: str = ""


class LedgerQuery(Body):
    """Of `/ledger`."""

    limit: Whole = Field(default=50, ge=1, le=1000)


@router.get("/health")
async def health(request: Request) -> Response:
    """What the server holds and does."""
    service = service_of(request)
    host, engine, settings = service.host.status, service.host.engine_or_none, service.settings
    status = engine.status() if engine is not None else None
    has_failed = status is not None and status.state == "failed"
    generations = service.generations
    return Json(
        {
            "status": "failed" if has_failed else "ok" if status is not None else host.state,
            "message": "the engine failed; restart PlanPatch"
            if has_failed
            else host.message or (status.message if status is not None else ""),
            "hint": host.hint,
            "model_loaded": status is not None and not has_failed,
            "model": status.model if status is not None else host.model,
            "quantization": status.quantization if status is not None else settings.quantization,
            "use_4bit": (status.quantization if status is not None else settings.quantization) == "nf4",
            "adapter_path": status.adapter if status is not None else None,
            "adapter_version": status.adapter_digest if status is not None else "__none__",
            "adapter_setting": settings.adapter,
            "clean_response": settings.clean_response,
            "stop_think_default": False,
            "device": status.device if status is not None else settings.device,
            "memory_bytes": status.memory_bytes if status is not None else 0,
            "context_length": status.context_length if status is not None else 0,
            "queue": {
                "running": status.num_running if status is not None else 0,
                "waiting": (status.num_waiting if status is not None else 0) + generations.slots.num_waiting,
                "limit": generations.slots.max_running + generations.slots.max_waiting,
            },
            "version": service.version,
        }
    )


# --- plan and patch --------------------------------------------------------------------------------------------------


@router.post("/plan", **takes(PlanBody))
async def plan(request: Request) -> Response:
    """Say in a few words what would be changed."""
    service = service_of(request)
    body = await read(request, PlanBody)
    if not body.intent.strip():
        raise HttpError(400, "intent: say what is to be changed", param="intent")
    _check_length(body.intent)
    service.ready_engine()
    source, scope = await asyncio.to_thread(_find, service, body)

    def work(patcher: Patcher) -> Plan:
        return patcher.plan(source, scope, body.intent)

    async with service.generations.call("/plan") as call:
        made = await unless_gone(request, _generate(service, work, call))
        call.num_tokens = made.timings.num_tokens
    return Json({"plan": made.to_json(), "timings": made.timings.to_json()})


@router.post("/patch_smart", **takes(PatchBody))
async def patch_smart(request: Request) -> Response:
    """Write the patch of a plan and prove it."""
    service = service_of(request)
    body = checked(await read_json(request), PatchBody)
    engine = service.ready_engine()
    record = await _planned(service, body.plan.id)
    source, scope = await asyncio.to_thread(_as_planned, service, record, body.code_paste)
    steps = tuple(record.steps if body.plan.steps is None else body.plan.steps)
    planned = Plan(record.id, source.path, scope, source.sha256, record.intent, steps)
    feedback = Feedback(body.feedback.reason, body.feedback.hint) if body.feedback is not None else None
    del engine

    def work(patcher: Patcher) -> Patch:
        return patcher.patch(source, scope, record.intent, plan=planned, feedback=feedback, fresh=body.fresh)

    async with service.generations.call("/patch_smart") as call:
        made = await unless_gone(request, _generate(service, work, call))
        call.num_tokens = 0 if made.is_known else made.timings.num_tokens
    return Json(made.to_json())


async def _generate(service: Service, work: Callable[[Patcher], T], call: Call) -> T:
    """Run a patcher on a thread; it is stopped when this is cancelled."""
    engine: Engine = service.ready_engine()
    is_cancelled = threading.Event()
    mine = CancellableEngine(engine, is_cancelled)
    options = patcher_options(service.settings, "http", on_gpu=engine.status().device != "cpu")
    prove = service.parsers.cancellable(is_cancelled) if isinstance(service.parsers, ParserProcess) else None
    patcher = Patcher(mine, await service.records.ledger(), options, prove or service.parsers)

    def cancel() -> None:
        is_cancelled.set()
        mine.cancel_all()
        if prove is not None:
            prove.cancel()

    return await service.generations.edit(lambda: work(patcher), cancel, call)


async def _planned(service: Service, plan_id: str) -> PlanRecord:
    try:
        return await service.records.do(lambda ledger: ledger.get_plan(plan_id))
    except UsageError as error:
        raise HttpError(404, error.message, code="unknown_plan", hint="Plan again.", plan_id=plan_id) from None


def _as_planned(service: Service, record: PlanRecord, code_paste: str | None) -> tuple[Source, Scope]:
    """The source of a plan as it is now; edits elsewhere in a file do no harm.

    Raises:
        StaleTextError: The function is another now.
    """
    then = Source.from_bytes(record.base, PASTED if record.path is None else record.path.as_posix())
    if code_paste is not None:
        now = _pasted(code_paste, then.path)
    elif record.path is None:
        now = then
    else:
        now = _read_file(_inside(service, str(record.path)))
    name = record.scope or None
    scope = service.parsers(find_scope, now, name, record.start_line if name else None)
    planned = then.text_between(record.start_line, record.end_line)
    if now.text_between(scope.start_line, scope.end_line) != planned:
        raise StaleTextError(
            f"{record.scope or 'the code'} changed since the plan was made", hint="Plan again.", plan_id=record.id
        )
    return now, scope


# --- what is meant ---------------------------------------------------------------------------------------------------


def _check_length(intent: str) -> None:
    try:
        check_intent(intent)
    except UsageError as error:
        raise HttpError(
            413, error.message, code="too_large", hint=error.hint, param="intent", limit=MAX_INTENT_CHARS
        ) from None


def _pasted(code: str, path: str) -> Source:
    """Code that came with the request."""
    if len(code.encode()) > MAX_SOURCE_BYTES:
        raise HttpError(
            413,
            f"code_paste is larger than {MAX_SOURCE_BYTES:,} bytes",
            code="too_large",
            param="code_paste",
            limit=MAX_SOURCE_BYTES,
        )
    return Source.from_text(code, path)


def _find(service: Service, body: PlanBody) -> tuple[Source, Scope]:
    """The source and the scope that a request is about."""
    if body.code_paste is not None and body.code_paste.strip():
        source = _pasted(body.code_paste, PASTED)
        return source, _scope_in(service, source, body)
    if not body.paths:
        raise HttpError(400, "there is no code: give code_paste, or paths of files inside the root", param="code_paste")
    files = list(_files(service, body.paths))
    if len(files) == 1:
        source = _read_file(files[0])
        return source, _scope_in(service, source, body)
    return _search(service, files, body)


def _scope_in(service: Service, source: Source, body: PlanBody) -> Scope:
    """The function that is named, that the intent names, or the only one; else the whole text."""
    if body.function:
        return service.parsers(find_scope, source, body.function)
    scopes = service.parsers(list_scopes, source)
    for name in _names_in(body.intent):
        if name in {scope.qualname for scope in scopes} | {scope.name for scope in scopes}:
            try:
                return service.parsers(find_scope, source, name)
            except UnknownScopeError:
                continue  # several of that name
    outer = [scope for scope in scopes if "." not in scope.qualname]
    if len(outer) == 1:
        return outer[0]
    return service.parsers(find_scope, source)


def _names_in(intent: str) -> list[str]:
    """Words of an intent that may name a function, those written as calls first."""
    return list(dict.fromkeys([*_CALLED.findall(intent), *_WORD.findall(intent)]))


def _search(service: Service, files: list[Path], body: PlanBody) -> tuple[Source, Scope]:
    """The one function of a name in several files."""
    names = [body.function] if body.function else _names_in(body.intent)
    for name in names:
        found: list[tuple[Source, Scope]] = []
        for file in files:
            try:
                if name.rpartition(".")[2].encode() not in file.read_bytes():
                    continue
                source = _read_file(file)
                found.append((source, service.parsers(find_scope, source, name)))
            except (UnknownScopeError, SourceError, PathError, OSError):
                continue  # another file may have it
        if len(found) == 1:
            return found[0]
        if found:
            places = ", ".join(f"{source.path}:{scope.def_line}" for source, scope in found[:_MOST_NAMED])
            raise HttpError(400, f"several functions are called {name}: {places}", hint="Give one file in paths.")
    raise HttpError(400, "no function of these files is named", hint="Give function, or one file in paths.")


def _files(service: Service, paths: list[str]) -> Iterator[Path]:
    count = 0
    for text in paths:
        path = _inside(service, text)
        if not path.is_dir():
            yield path
            continue
        for file in sorted(path.rglob("*.py")):
            if any(part.startswith(".") for part in file.relative_to(path).parts) or not _is_readable(service, file):
                continue
            count += 1
            if count > _MOST_FILES:
                raise HttpError(
                    413, f"the paths hold more than {_MOST_FILES:,} files", code="too_large", limit=_MOST_FILES
                )
            yield file.resolve()


def _is_readable(service: Service, file: Path) -> bool:
    """Whether a file that was found in a folder is one to look into: a link out of the root is not."""
    try:
        found = _inside(service, str(file))
        return found.is_file() and found.stat().st_size <= MAX_SOURCE_BYTES
    except (PathError, HttpError, OSError):
        return False


def _inside(service: Service, text: str) -> Path:
    """A path inside the root, links resolved.

    Raises:
        PathError: There is no root, or the path is outside of it or missing.
    """
    if service.root is None:
        raise PathError("paths are read below a root only, and none is set", hint="Start with --root FOLDER.")
    root = service.root.resolve()
    if "\0" in text:
        raise PathError("a path holds a NUL character")
    try:
        path = (root / text).resolve()
        is_there = path.exists()
        is_loop = not is_there and _is_loop(root / text)
    except RuntimeError:  # pathlib's word for a loop, before Python 3.13
        is_there, is_loop, path = False, True, root
    except (OSError, ValueError) as fault:
        raise HttpError(400, f"paths: {getattr(fault, 'strerror', None) or 'it is no path'}", param="paths") from None
    if is_loop:
        raise HttpError(400, f"paths: {text!r} is a symbolic link that leads back to itself", param="paths")
    if not path.is_relative_to(root):
        raise PathError(f"{text!r} is outside of the root")
    if not is_there:
        raise HttpError(404, f"{text!r} does not exist", code="path")
    return path


def _is_loop(path: Path) -> bool:
    try:
        path.stat()
    except OSError as fault:
        return fault.errno == errno.ELOOP
    return False


def _read_file(file: Path) -> Source:
    try:
        if not file.is_file():
            raise PathError(f"{file.name} is no regular file")
        if file.stat().st_size > MAX_SOURCE_BYTES:
            raise HttpError(
                413, f"{file.name} is larger than {MAX_SOURCE_BYTES:,} bytes", code="too_large", limit=MAX_SOURCE_BYTES
            )
        return Source.from_bytes(file.read_bytes(), file.as_posix())
    except OSError as fault:
        raise PathError(f"{file.name} cannot be read: {fault.strerror or fault}") from None


# --- afterwards ------------------------------------------------------------------------------------------------------


@router.post("/rollback", **takes(PatchIdBody))
async def rollback(request: Request) -> Response:
    """Take an applied patch back: through the editor where it has the file open, else on disk."""
    return await _edit(request, "rollback")


@router.post("/redo", **takes(PatchIdBody))
async def redo(request: Request) -> Response:
    """Put a rolled back patch in again: through the editor where it has the file open, else on disk."""
    return await _edit(request, "redo")


@router.post("/apply", **takes(PatchIdBody))
async def apply(request: Request) -> Response:
    """Put a proposed patch into its file: through the editor where it has the file open, else on disk."""
    return await _edit(request, "apply")


async def _edit(request: Request, operation: Operation) -> Response:
    service = service_of(request)
    service.check_token(request)
    body = await read(request, PatchIdBody)
    entry = await _entry(service, body.patch_id)
    done = None if service.in_editor is None else await service.in_editor(operation, entry.id)
    if done is not None:
        return _edited(entry, operation, done)
    if body.only_in_editor:
        raise HttpError(404, f"the file of {entry.id} is open in no editor here", code="not_open", patch_id=entry.id)
    elsewhere = await asyncio.to_thread(edit_in_editor, service.session_of().paths, operation, entry.id)
    if elsewhere is not None:
        return Json(elsewhere)
    applied = await service.records.do(lambda ledger: _ON_DISK[operation](ledger, entry.id))
    return Json({**applied.to_json(), "state": _AFTER[operation], "via": "disk"})


def _edited(entry: Entry, operation: Operation, done: dict[str, Any]) -> Response:
    """What an editor did, or did not."""
    state = done["patchState"]
    if not done["ok"]:
        error = EditorError(done["reason"], hint="Look at the file in the editor.", patch_id=entry.id)
        return Json({**done, "patch_id": entry.id, "state": state, "error": error.to_json()}, 409)
    path, was_so_already = Path(entry.proposal.path or ""), done.get("wasSoAlready", False)
    applied = Applied(entry.id, path, operation, done["hunks"], done["sha256"], was_so_already=was_so_already)
    return Json({**done, **applied.to_json(), "state": state, "via": "editor"})


@router.post("/feedback", **takes(VerdictBody))
async def feedback(request: Request) -> Response:
    """Record what the user says of a patch."""
    service = service_of(request)
    service.check_token(request)
    body = await read(request, VerdictBody)
    await _entry(service, body.patch_id)
    judge = accept if body.accepted else Ledger.reject
    await service.records.do(lambda ledger: judge(ledger, body.patch_id, reason=body.reason))
    return Json({"ok": True, "patch_id": body.patch_id, "accepted": body.accepted})


@router.get("/ledger")
async def ledger(request: Request) -> Response:
    """The latest proposals, newest first."""
    service = service_of(request)
    service.check_token(request)
    query: dict[str, Any] = dict(request.query_params)
    if str(query.get("limit", "")).isdecimal():
        query["limit"] = int(query["limit"])
    wanted = checked(query, LedgerQuery)
    found = await service.records.do(lambda ledger: ledger.list_proposals(limit=wanted.limit))
    return Json({"proposals": [one.to_json() for one in found]})


async def _entry(service: Service, patch_id: str) -> Entry:
    try:
        return await service.records.get(patch_id)
    except UsageError as error:
        raise HttpError(404, error.message, code="unknown_patch", patch_id=patch_id) from None
