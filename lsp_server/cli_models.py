"""`planpatch models`."""

from __future__ import annotations

from typing import Annotated

import typer

from lsp_server import console
from lsp_server.cli_options import JsonOption, open_session
from lsp_server.settings import MODEL_NAMES

models_app = typer.Typer(help="Models on this machine.", no_args_is_help=True, rich_markup_mode=None)


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
