"""Options and steps that several commands share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from engine.errors import PathError, SettingError, UnknownScopeError, UsageError
from engine.inference.adapters import BASE
from engine.inference.catalogue import looks_like_path, shipped_named
from engine.inference.engine import InProcessEngine
from engine.patching.scopes import Scope, find_scope, list_scopes
from engine.patching.source import Source, read_source
from lsp_server import console
from lsp_server.cli_journal import keep_journal
from lsp_server.session import Session

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
FunctionOption = Annotated[
    str | None,
    typer.Option(
        "--function", "-f", help="Function, method or class: NAME, Class.NAME, NAME@LINE.", show_default=False
    ),
]
LineOption = Annotated[int | None, typer.Option("--line", "-l", min=1, help="The function that holds this line.")]
ModuleOption = Annotated[bool, typer.Option("--module", help="Edit the whole file.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model name, hub id, folder or .gguf file.", show_default=False)
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Adapter folder, one that ships, or __none__.", show_default=False)
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default=False)]
QuantizationOption = Annotated[
    Literal["auto", "int8", "nf4", "bf16", "fp32"] | None, typer.Option("--quantization", help="How weights are held.")
]


def open_session(options: Mapping[str, object], file: Path | None, as_json: bool) -> Session:
    """The session of one command; settings that cannot be used are named on stderr.

    Args:
        options: Options of the command line by setting name.
        file: A file of the workspace, whose pyproject.toml may set presets and style.
        as_json: Whether stdout is for programs; warnings go to stderr all the same.

    Returns:
        The session.

    Raises:
        PathError: PLANPATCH_HOME or PLANPATCH_CONFIG is not absolute.
        WriteError: The home cannot be made.
        SettingError: An option has a value that cannot be used.
    """
    options = {
        **options,
        "adapter": _adapter_from_here(options.get("adapter")),
        "model": _model_from_here(options.get("model")),
    }
    session = Session.open(os.environ, options, _workspace_of(file), keep_journal)
    for problem in session.problems:
        if problem.source.startswith("command line:"):
            raise SettingError(f"{str(problem).rpartition('; ')[0]}.")
        console.say(f"[yellow]setting ignored:[/] {escape(str(problem))}")
    return session


def _adapter_from_here(option: object) -> object:
    """An option's relative folder starts at the current folder if it is one there or begins with a dot.

    An adapter that ships goes by its name. Any other is a setting's value as well: it stands under PLANPATCH_HOME.
    """
    if not isinstance(option, str) or option.strip() in ("", "auto", BASE):
        return option
    if option.startswith(".") or os.path.isdir(option):
        return str(Path(option).absolute())
    shipped = shipped_named(option)
    return option if shipped is None else str(shipped.path)


def _model_from_here(option: object) -> object:
    """An option's relative path starts at the current folder, a setting's under PLANPATCH_HOME."""
    if not isinstance(option, str) or not looks_like_path(option) or option.startswith("~"):
        return option
    return str(Path(option).absolute())


def _workspace_of(file: Path | None) -> Path | None:
    """The nearest folder above the file that has a pyproject.toml."""
    if file is None:
        return None
    folders = file.absolute().parents
    return next((folder for folder in folders if (folder / "pyproject.toml").is_file()), None)


def find_target(
    session: Session, file: Path, function: str | None, line: int | None, module: bool
) -> tuple[Source, Scope]:
    """The file and the part of it that is to be edited.

    Args:
        session: For the root that files must lie in.
        file: The file.
        function: Its function, method or class.
        line: A line of it.
        module: Whether the whole file is meant.

    Returns:
        The text and the scope.

    Raises:
        UsageError: The options do not name one scope.
        PathError: The file is missing or outside the root.
        SourceError: The file cannot be edited.
        UnknownScopeError: There is no such function, or several.
    """
    if module and (function or line):
        raise UsageError("--module cannot be combined with --function or --line")
    source = _read_inside_root(session, file)
    if not (module or function or line):
        names = _names_to_type(list_scopes(source))
        listed = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        raise UsageError(
            f"Which part of {file} is meant?",
            hint=f"Give --function NAME, --line N or --module. It has: {listed or 'no function'}",
        )
    scope = find_scope(source, function, line)
    if line and scope.kind == "module":
        raise UnknownScopeError(
            f"Line {line} of {file} is in no function or class", hint="Give --function NAME, or --module for the file."
        )
    if line and not scope.contains(line):
        raise UnknownScopeError(
            f"Line {line} of {file} is not in {scope.qualname} (lines {scope.start_line} to {scope.end_line})",
            hint="Leave --line or --function out, or give a line of it.",
        )
    return source, scope


def _names_to_type(scopes: Sequence[Scope]) -> list[str]:
    """What --function takes for each scope: NAME@LINE where a name is there twice."""
    counts = Counter(scope.qualname for scope in scopes)
    return [f"{s.qualname}@{s.def_line}" if counts[s.qualname] > 1 else s.qualname for s in scopes]


def _read_inside_root(session: Session, file: Path) -> Source:
    """The file, named as the user named it; a relative name starts at the current folder, also where a root is set."""
    if not session.settings.root:
        return read_source(file)
    root = session.paths.resolve(session.settings.root)
    if not root.is_dir():
        raise PathError(
            f"The root {root} is not a folder ({session.settings.source_of('root')})", hint="Correct the setting root."
        )
    return replace(read_source(file.absolute(), root), path=file.as_posix())


@contextmanager
def open_engine(session: Session, as_json: bool, *, pull: bool = False) -> Generator[InProcessEngine]:
    """The engine of one command, ready; closed at the end.

    Args:
        session: Names model, adapter and device.
        as_json: Whether stdout is for programs.
        pull: Fetch the model if it is not here.

    Yields:
        The engine.

    Raises:
        ModelError: The model is missing, damaged or does not fit.
        AdapterError: The adapter does not fit it.
    """
    ref = session.model_ref()
    with console.pull_progress() as progress:
        local = session.local_model(ref, progress, pull=pull)
    with session.engine(local, ref) as engine:
        with console.TokenCounter() as counter:
            counter.note(f"loading {local.name}")
            engine.wait_until_ready()
        yield engine
