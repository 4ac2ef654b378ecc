"""The `planpatch` command.

Exit codes: 0 done, 1 refused by a gate, 2 usage, 3 environment, 130 interrupted, 141 nobody reads its output any more.

Commands are thin: they read options, open a `Session`, call, and print for people or, with --json, for programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.markup import escape

from engine.errors import PlanPatchError, UsageError, WriteError
from engine.inference.loading import set_runtime_defaults
from engine.patching.ledger_records import path_key
from lsp_server import console
from lsp_server.argument_text import refuse_undecodable
from lsp_server.cli_adapters import adapters_app
from lsp_server.cli_journal import keep_journal
from lsp_server.cli_ledger import ledger_app
from lsp_server.cli_models import models_app
from lsp_server.cli_options import (
    AdapterOption,
    DeviceOption,
    FunctionOption,
    JsonOption,
    LineOption,
    ModelOption,
    ModuleOption,
    QuantizationOption,
    find_target,
    open_engine,
    open_session,
)

app = typer.Typer(
    name="planpatch",
    help="Plan and patch Python functions with a local model. Nothing leaves this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(ledger_app, name="ledger")

IntentOption = Annotated[str | None, typer.Option("--intent", "-i", help="What to change, in your words.")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="A named intent, such as docstring or simplify.")]
FormatOption = Annotated[
    Literal["auto", "rewrite", "json_edits"] | None, typer.Option("--format", help="What the model writes.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"planpatch {version('planpatch')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Plan and patch Python functions with a local model. Nothing leaves this machine."""


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A Python file.", show_default=False)],
    function: FunctionOption = None,
    intent: IntentOption = None,
    line: LineOption = None,
    module: ModuleOption = False,
    preset: PresetOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in a few words what would be changed. Nothing is written but the ledger."""
    options = {"model": model, "adapter": adapter, "device": device, "quantization": quantization}
    path_key(file)  # the ledger refuses a name that is not UTF-8: better now than after the plan
    session = open_session(options, file, as_json)
    source, scope = find_target(session, file, function, line, module)
    wanted = _intent(session, intent, preset)
    with open_engine(session, as_json) as engine, session.ledger() as ledger, console.TokenCounter() as counter:
        made = session.patcher(engine, ledger, "cli").plan(source, scope, wanted, listener=counter)
    if as_json:
        console.print_json({"plan": made.to_json(), "timings": made.timings.to_json()})
        return
    console.out.print(made.text, markup=False)
    cut = " (cut at the token limit)" if made.truncated else ""
    console.say(f"\n{made.id}{cut} · planpatch patch {escape(str(file))} --plan-id {made.id} patches from it")
    for part in made.dropped:
        console.say(f"left out of the context: {escape(part)}")


@app.command()
def patch(
    file: Annotated[Path, typer.Argument(help="A Python file.", show_default=False)],
    function: FunctionOption = None,
    intent: IntentOption = None,
    write: Annotated[bool, typer.Option("--write", "-w", help="Write the patch to the file.")] = False,
    line: LineOption = None,
    module: ModuleOption = False,
    preset: PresetOption = None,
    plan_id: Annotated[str | None, typer.Option(help="Patch from this plan.", show_default=False)] = None,
    plan_text: Annotated[str | None, typer.Option("--plan", help="Patch from a plan of your own.")] = None,
    plan_first: Annotated[bool, typer.Option("--plan-first", help="Make a plan, show it and follow it.")] = False,
    reason: Annotated[str, typer.Option(help="What was wrong with an earlier patch.", show_default=False)] = "",
    hint: Annotated[str, typer.Option(help="What to do about it.", show_default=False)] = "",
    hunks: Annotated[str | None, typer.Option(help="With --write: only these hunks, such as 1,3.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not reuse an earlier answer.")] = False,
    edit_format: FormatOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Patch one function and print the diff. The file changes only with --write, and can be rolled back."""
    from lsp_server.patch_command import PatchRequest, run_patch

    options = {
        "model": model,
        "adapter": adapter,
        "device": device,
        "quantization": quantization,
        "format": edit_format,
    }
    path_key(file)
    session = open_session(options, file, as_json)
    request = PatchRequest(
        file=file,
        function=function,
        line=line,
        module=module,
        intent=None if plan_id else _intent(session, intent, preset),
        preset=preset or "",
        plan_id=plan_id,
        plan_text=plan_text,
        plan_first=plan_first,
        reason=reason,
        hint=hint,
        write=write,
        hunks=_hunk_indexes(hunks),
        fresh=fresh,
    )
    run_patch(session, request, as_json=as_json)


@app.command()
def demo(
    model: ModelOption = None,
    device: DeviceOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's folder.")] = False,
) -> None:
    """Plan and patch a broken function with a real model, show the diff, write it, and take it back."""
    from lsp_server.demo import run_demo

    run_demo(open_session({"model": model or "qwen2.5-coder-0.5b-instruct", "device": device}, None, False), keep=keep)


@app.command()
def lsp(
    tcp: Annotated[bool, typer.Option("--tcp", help="Serve one client on a loopback port instead of stdio.")] = False,
    host: Annotated[str | None, typer.Option(help="With --tcp: a loopback address; else 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(help="With --tcp: the port; without it, or with 0, a free one.", min=0, max=65535)
    ] = None,
    stdio: Annotated[bool, typer.Option("--stdio", help="Serve on stdin and stdout (the default).")] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
) -> None:
    """Run the language server. An editor starts this; docs/editors.md says how."""
    from lsp_server.language_server import serve_stdio, serve_tcp

    if tcp and stdio:
        raise UsageError("--tcp and --stdio exclude each other")
    if not tcp and (host is not None or port is not None):
        raise UsageError("--host and --port need --tcp", hint="Give --tcp, or leave them out to serve on stdio.")
    options = {"model": model, "adapter": adapter, "device": device, "quantization": quantization}
    if tcp:
        raise typer.Exit(serve_tcp(os.environ, options, host or "127.0.0.1", port or 0, keep_journal))
    raise typer.Exit(serve_stdio(os.environ, options, keep_journal))


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="The port; 0 takes a free one. 8765 if nothing is set.")] = None,
    host: Annotated[str | None, typer.Option(help="The address; another than loopback needs a token.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that paths in requests must lie in.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the status page in the browser.")] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve HTTP alone: PLAN and PATCH, and the APIs of Ollama and OpenAI."""
    from lsp_server.serve_command import serve as run

    options: dict[str, object] = {
        "port": port,
        "host": host,
        "root": None if root is None else str(root.absolute()),
        "model": model,
        "adapter": adapter,
        "device": device,
        "quantization": quantization,
    }
    run(open_session(options, None, as_json), open_page=open_page, as_json=as_json)


def _intent(session: Any, intent: str | None, preset: str | None) -> str:
    if intent and preset:
        raise UsageError("--intent and --preset cannot both be given")
    if preset:
        known = session.settings.presets
        if preset not in known:
            raise UsageError(f"There is no preset {preset!r}", hint=f"Presets: {', '.join(sorted(known))}")
        return known[preset].intent
    if not intent or not intent.strip():
        raise UsageError("--intent is missing", hint='Say what to change, such as --intent "return 0 for n < 0".')
    from engine.patching.patcher import check_intent

    check_intent(intent)
    return intent


def _hunk_indexes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(
            f"--hunks {text!r} is no list of hunk numbers", hint="Give numbers from 1, such as --hunks 1,3."
        )
    return tuple(number - 1 for number in numbers)


def _register_later_commands() -> None:
    """Commands with modules of their own, imported here so that a broken one cannot hide the rest."""
    from lsp_server import cli_gate
    from lsp_server.cli_bench import bench_app
    from lsp_server.cli_train import train_app
    from lsp_server.doctor import doctor

    cli_gate.register(train_app)
    app.add_typer(bench_app, name="bench")
    app.add_typer(train_app, name="train")
    app.command()(doctor)
    refuse_undecodable(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None takes sys.argv.

    Returns:
        The exit code.

    Raises:
        SystemExit: What reads its output went away; or the shell asked for a completion.
    """
    console.guard_streams()
    set_runtime_defaults()
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    try:
        code = _run(lambda: app(args=arguments, prog_name="planpatch", standalone_mode=False))
        if code == 130:
            return _interrupted(as_json)
        sys.stdout.flush()  # here, where what goes wrong is told
        code = code if isinstance(code, int) else 0
        is_completion = any("-completion" in argument for argument in arguments)
        return 2 if code == 1 and is_completion else code  # a shell that the option parser has no completion for
    except PlanPatchError as error:
        return _report(error, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)


def _report(error: PlanPatchError, *, as_json: bool) -> int:
    """An error that cannot be printed on stdout is told on stderr; if that is full as well, the exit code is left."""
    try:
        console.print_error(error, as_json=as_json and "is_output" not in error.details)
    except WriteError:
        with suppress(WriteError):
            console.print_error(error, as_json=False)
    return error.exit_code


def _interrupted(as_json: bool) -> int:
    if as_json:
        console.print_json({"ok": False, "error": {"code": "interrupted", "message": "Interrupted", "hint": ""}})
    else:
        console.say("interrupted")
    return 130


def _run(call: Callable[[], Any]) -> Any:
    """Errors of the option parser become ours; typer may carry a click of its own, so they are known by a method."""
    try:
        return call()
    except Exception as fault:
        tell = cast("Callable[[], str] | None", getattr(fault, "format_message", None))
        if tell is None:
            raise
        if type(fault).__name__ == "NoArgsIsHelpError":
            console.err.print(tell(), markup=False)
            return 2
        command = cast("str", getattr(getattr(fault, "ctx", None), "command_path", "planpatch"))
        raise UsageError(tell().replace("Value error, ", ""), hint=f"{command} --help") from None


_register_later_commands()
