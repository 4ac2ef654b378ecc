"""`planpatch adapters`: which there are, which one is used, and whether the servers that run have taken it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from engine.errors import UsageError
from engine.inference.adapters import BASE
from engine.inference.catalogue import shipped_adapter, shipped_named
from lsp_server import console
from lsp_server.adapter_choice import AUTO, AdapterChoice
from lsp_server.cli_options import JsonOption, open_session
from lsp_server.running import listeners
from lsp_server.session import Session

if TYPE_CHECKING:
    from training.promote import AdapterVersion

adapters_app = typer.Typer(help="Adapters of the model.", no_args_is_help=True, rich_markup_mode=None)

_TAKEN_WITHIN_S = 15.0
_LOADS_AGAIN_WITHIN_S = 2.0  # a server looks twice a second
_SILENT = ""


@adapters_app.command("list")
def list_adapters(as_json: JsonOption = False) -> None:
    """Show the adapters under the home and the one that ships for the model, their figures, and which one is used."""
    from training.promote import list_versions

    session = open_session({}, None, as_json)
    current, shipped = session.adapter(), shipped_adapter(session.model_ref().hub_id or "")
    others = [folder for folder in (current, shipped and shipped.path) if folder is not None]
    versions = list_versions(session.paths.qlora_out, others)
    live = _live(session)
    rows = [_facts(version, current, live) for version in versions]
    if as_json:
        console.print_json(rows)
        return
    columns = ("adapter", "used", "live in", "made for", "edits", "general tasks", "state")
    console.print_table("", columns, [_cells(row) for row in rows])
    if current is None:
        console.say("the base model is used, without an adapter")


def _facts(version: AdapterVersion, current: Path | None, live: Mapping[int, _Live]) -> dict[str, Any]:
    figures = version.evaluation
    return {
        "folder": str(version.folder),
        "used": "yes" if version.folder == current else "",
        "base": version.base,
        "state": version.fault or "ok",
        "digest": version.digest,
        "version": version.folder.name,
        "live_in": [pid for pid, server in live.items() if server.folder == str(version.folder)],
        "base_digest": version.base_digest,
        "evaluation": dict(figures) or None,
        "measured": version.manifest.get("measured"),
        "promotions": version.manifest.get("promotions", []),
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures: Mapping[str, Any] = row["evaluation"] or {}
    edits: Mapping[str, Any] = figures.get("edits", {})
    general: Mapping[str, Any] = figures.get("general") or {}
    kept = f"{edits['base']['right']} → {edits['candidate']['right']} of {edits['rows']}" if edits else "not evaluated"
    tasks = f"{general['base']} → {general['candidate']} of {general['tasks']}" if general else ""
    if not figures and row["measured"]:  # the one that ships
        kept, tasks = row["measured"]["edits"], row["measured"]["general"]
    processes = ", ".join(f"process {pid}" for pid in row["live_in"])
    name = row["version"] if row["state"] == "ok" else row["folder"]
    return (name, row["used"], processes, row["base"], kept, tasks, row["state"])


@adapters_app.command()
def use(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Name in `adapters list`, adapter folder, __none__ for the base model, or auto for what ships.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Use an adapter from now on, until the next `use` or `rollback`, whatever the gate says. Servers take it."""
    session = open_session({}, None, as_json)
    folder = None if adapter in (BASE, AUTO) else _folder_of(session, adapter)
    if folder is not None and (other := session.made_for_another(folder)) is not None:
        raise UsageError(
            f"{folder.name} was made for {other}, and the model is {session.model_ref().name}",
            hint=f"planpatch adapters list shows what each was made for; PLANPATCH_MODEL={other} uses that model.",
        )
    AdapterChoice(session.paths.adapter_choice).use(AUTO if adapter == AUTO else folder)
    say_current(session, as_json)


def _folder_of(session: Session, name: str) -> Path:
    """A version's folder, that of an adapter which ships, or the folder of that name here."""
    here, version, shipped = Path(name).absolute(), session.paths.qlora_out / name, shipped_named(name)
    if Path(name).name != name or here.is_dir():
        return here
    return shipped.path if shipped is not None and not version.is_dir() else version if version.is_dir() else here


@adapters_app.command()
def rm(
    adapter: Annotated[str, typer.Argument(help="Version of an adapter under the home.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter. One that is used cannot be deleted: use another first."""
    from training.promote import remove_version

    session = open_session({}, None, as_json)
    folder = session.paths.qlora_out / adapter
    if Path(adapter).name != adapter or not (folder / "adapter_config.json").is_file():
        raise UsageError(f"There is no adapter {adapter} in {session.paths.qlora_out}", hint="planpatch adapters list")
    if session.adapter() == folder:
        raise UsageError(f"{adapter} is used", hint="planpatch adapters rollback, or planpatch adapters use __none__")
    remove_version(folder)
    if as_json:
        console.print_json({"ok": True, "removed": str(folder)})
        return
    console.say(escape(f"{adapter} is deleted"))


@adapters_app.command()
def rollback(as_json: JsonOption = False) -> None:
    """Go back to what was used before the last `use` or `promote`. Servers that run take it."""
    session = open_session({}, None, as_json)
    AdapterChoice(session.paths.adapter_choice).rollback()
    say_current(session, as_json)


def say_current(session: Session, as_json: bool, **facts: Any) -> None:
    """Say what is used from now on, once the servers that run have taken it.

    Args:
        session: Names the home.
        as_json: Whether stdout is for programs.
        **facts: More of them, for programs.
    """
    current = session.adapter()
    is_chosen = session.settings.adapter == "auto"
    wanted = str(current) if current else None
    live = _wait_until_taken(session, wanted) if is_chosen else {}
    failed = {pid: server.failure for pid, server in live.items() if server.failure}
    loading = [pid for pid, server in live.items() if server.is_loading]
    loaded = {pid: server for pid, server in live.items() if pid not in failed and pid not in loading}
    taken = [pid for pid, server in loaded.items() if server.folder == wanted]
    others = [pid for pid in loaded if pid not in taken]
    if as_json:
        known = {"adapter": wanted or BASE, "live_in": taken, "not_taken_by": others, "loading": loading}
        left = [{"pid": pid, "message": message} for pid, message in failed.items()]
        console.print_json({"ok": True, **known, "failed": left, **facts})
        return
    console.say(f"used from now on: {escape(str(current)) if current else 'the base model'}")
    for pid in taken:
        console.say(f"  the server of process {pid} has taken it")
    for pid in loading:
        console.say(f"  the server of process {pid} still loads its model, and takes it then")
    for pid in others:
        console.warn(f"the server of process {pid} has not taken it: it has an adapter of its own, or its log says why")
    for pid, message in failed.items():
        console.warn(f"the server of process {pid} still has no model: {message}")
    if not is_chosen:
        source = session.settings.source_of("adapter")
        console.say(f"[yellow]but[/] the setting adapter ({escape(source)}) names {escape(session.settings.adapter)}")


def _wait_until_taken(session: Session, wanted: str | None) -> dict[int, _Live]:
    """The servers once each has taken the choice, or after a while.

    One that loads its model is waited for: it may have failed a moment ago, and fail again. One that failed gets the
    time to begin anew. One whose own setting names an adapter will not take another.
    """
    began = loaded_at = time.monotonic()
    while True:
        live, now = _live(session), time.monotonic()
        if any(server.is_loading for server in live.values()):
            loaded_at = now
        is_over = all(_is_settled(server, wanted, now - loaded_at) for server in live.values())
        if is_over or now - began > _TAKEN_WITHIN_S:
            return live
        time.sleep(0.2)


def _is_settled(server: _Live, wanted: str | None, quiet_s: float) -> bool:
    if server.failure:
        return quiet_s >= _LOADS_AGAIN_WITHIN_S
    return not server.is_loading and (server.is_fixed or server.folder == wanted)


@dataclass(frozen=True, slots=True)
class _Live:
    """What a server runs with: the adapter's folder, empty where it did not answer; whether its own setting says so.

    One whose model could not be loaded has the reason of that as `failure`; one that loads its model has no folder yet.
    """

    folder: str | None
    is_fixed: bool = False
    failure: str = ""
    is_loading: bool = False


def _live(session: Session) -> dict[int, _Live]:
    """Each server of this home that has a model, loads it, or failed to. Servers without a listener are not asked."""
    found: dict[int, _Live] = {}
    for server in listeners(session.paths.runtime_file):
        answer = server.health()
        if answer is None:
            found[server.pid] = _Live(_SILENT)
        elif answer["model_loaded"]:
            found[server.pid] = _Live(answer["adapter_path"], answer.get("adapter_setting", "auto") != "auto")
        elif answer["status"] == "failed":
            said = ". ".join(text for text in (answer["message"], answer["hint"]) if text)
            found[server.pid] = _Live(_SILENT, failure=said or "it failed")
        elif answer["status"] == "loading":
            found[server.pid] = _Live(_SILENT, is_loading=True)
    return found
