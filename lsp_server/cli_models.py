"""`planpatch models` and `planpatch adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from engine.errors import AdapterError
from engine.inference.adapters import BASE, read_adapter
from engine.inference.catalogue import shipped_adapter
from lsp_server import console
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.cli_options import JsonOption, open_session
from lsp_server.session import Session
from lsp_server.settings import MODEL_NAMES

models_app = typer.Typer(help="Models on this machine.", no_args_is_help=True, rich_markup_mode=None)
adapters_app = typer.Typer(help="Adapters of the model.", no_args_is_help=True, rich_markup_mode=None)


def _not_empty(name: str) -> str:
    if not name.strip():
        raise typer.BadParameter(f"it is empty; expected {MODEL_NAMES}.")
    return name


NameArgument = Annotated[
    str,
    typer.Argument(help="Catalogue name, hub id, folder or .gguf file.", show_default=False, callback=_not_empty),
]


@models_app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """Show the catalogue and what is on this machine."""
    infos = open_session({}, None, as_json).store.list()
    if as_json:
        console.print_json([info.to_json() for info in infos])
        return
    rows = [
        (
            info.name,
            info.state,
            f"{info.bytes / 1e9:.1f} GB" if info.bytes else "",
            info.entry.use if info.entry else "",
        )
        for info in infos
    ]
    console.print_table("", ("model", "state", "on disk", "for"), rows)


@models_app.command()
def pull(
    name: NameArgument,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a model onto this machine; `auto` chooses by the machine."""
    session = open_session({"model": name}, None, as_json)
    with console.pull_progress() as progress:
        local = session.store.pull(session.model_ref(), progress, force=force)
    if as_json:
        console.print_json(
            {"name": local.name, "folder": str(local.folder), "digest": local.digest, "bytes": local.bytes}
        )
        return
    console.say(f"{local.name} is ready ({local.bytes / 1e9:.1f} GB, {local.licence or 'licence unknown'})")


@models_app.command()
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show what is known of a model."""
    facts = open_session({}, None, as_json).store.show(name).to_json()
    if as_json:
        console.print_json(facts)
        return
    console.print_table("", ("", ""), [(key, value) for key, value in facts.items() if value not in ("", None, {}, [])])


@models_app.command()
def rm(name: NameArgument, as_json: JsonOption = False) -> None:
    """Delete a model from this machine."""
    num_bytes = open_session({}, None, as_json).store.remove(name)
    if as_json:
        console.print_json({"removed": name, "bytes": num_bytes})
        return
    console.say(f"{name} is deleted, {num_bytes / 1e9:.1f} GB are free again")


@adapters_app.command("list")
def list_adapters(as_json: JsonOption = False) -> None:
    """Show the adapters under the home, the one that ships for the model, and which one is used."""
    session = open_session({}, None, as_json)
    current = session.adapter()
    folders = sorted(path.parent for path in session.paths.qlora_out.glob("*/adapter_config.json"))
    shipped = shipped_adapter(session.model_ref().hub_id or "")
    folders += [shipped.path] if shipped is not None else []
    if current is not None and current not in folders:
        folders.append(current)
    rows = [_adapter_facts(folder, current) for folder in folders]
    if as_json:
        console.print_json(rows)
        return
    console.print_table("", ("adapter", "used", "made for", "state"), [tuple(row.values())[:4] for row in rows])
    if current is None:
        console.say("the base model is used, without an adapter")


def _adapter_facts(folder: Path, current: Path | None) -> dict[str, str]:
    used = "yes" if current is not None and folder == current else ""
    try:
        files = read_adapter(folder)
    except AdapterError as error:
        return {"folder": str(folder), "used": used, "base": "", "state": error.message, "digest": ""}
    return {"folder": str(folder), "used": used, "base": files.base_model, "state": "ok", "digest": files.digest}


@adapters_app.command()
def use(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or __none__ for the base model.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Use an adapter from now on, until the next `use` or `rollback`."""
    session = open_session({}, None, as_json)
    folder = None if adapter == BASE else Path(adapter).absolute()
    if folder is not None:
        read_adapter(folder)
    AdapterChoice(session.paths.adapter_choice).use(folder)
    _say_current(session, as_json)


@adapters_app.command()
def rollback(as_json: JsonOption = False) -> None:
    """Go back to what was used before the last `use`."""
    session = open_session({}, None, as_json)
    AdapterChoice(session.paths.adapter_choice).rollback()
    _say_current(session, as_json)


def _say_current(session: Session, as_json: bool) -> None:
    current = session.adapter()
    if as_json:
        console.print_json({"adapter": str(current) if current else BASE})
        return
    console.say(f"used from now on: {escape(str(current)) if current else 'the base model'}")
    if session.settings.adapter != "auto":
        source = session.settings.source_of("adapter")
        console.say(f"[yellow]but[/] the setting adapter ({escape(source)}) names {escape(session.settings.adapter)}")
