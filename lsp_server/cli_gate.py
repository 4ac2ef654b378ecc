"""The gate: `planpatch train evaluate` measures an adapter, `planpatch train promote` lets it through.

`training` is imported inside the commands: no other command, and no server, loads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from engine.errors import UsageError
from engine.inference.adapters import BASE
from engine.inference.store import Progress
from engine.patching.disk import write_atomically
from lsp_server import console
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.bench_edit import without_time_limits
from lsp_server.cli_adapters import say_current
from lsp_server.cli_options import DeviceOption, JsonOption, ModelOption, QuantizationOption, open_engine, open_session
from lsp_server.session import Session, patcher_options

if TYPE_CHECKING:
    from training.evaluate import Evaluation, HeldOut
    from training.promote import AdapterVersion, Decision

_ROWS_AT_ONCE_GPU = 8


def evaluate(
    adapter: Annotated[
        str | None, typer.Option(help="Version or folder of the adapter; without it the newest.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out edits, JSON lines; without it val_from_logs.jsonl.", show_default=False),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="ADAPTER",
            help="Compare with this adapter; __none__ is the base model, auto is what is used now.",
        ),
    ] = "auto",
    general: Annotated[bool, typer.Option(help="Look also for what it forgot, by small functions to write.")] = True,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each row's verdicts, as JSON lines.", show_default=False)
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an adapter with what is used now on the same held-out edits, and keep the figures in its manifest.

    Exit code 1: the gate would not let it pass; it says why.
    """
    from training.promote import decide, find_version, write_evaluation

    options = {"model": model, "device": device, "quantization": quantization, "adapter": BASE}
    session = open_session(options, None, as_json)
    version = find_version(session.paths.qlora_out, adapter)
    if against == "auto":
        used = open_session({"model": model}, None, as_json).adapter()
        against = BASE if used in (None, version.folder) else str(used)
    other = None if against == BASE else find_version(session.paths.qlora_out, against)
    held_out = _held_out(session, data, [version, *([other] if other else [])])
    evaluation, facts = _measure(session, held_out, version, other, general, as_json)
    if rows is not None:
        _write_rows(rows, evaluation)
    version = write_evaluation(version, {**facts, **evaluation.to_json()})
    decision = decide(version, facts["base_digest"])
    if as_json:
        console.print_json(
            {"ok": True, "adapter": version.folder.name, **version.evaluation, "gate": decision.to_json()}
        )
    else:
        _show(version, evaluation)
        _say_decision(version, decision)
    if not decision.is_passed:
        raise typer.Exit(1)


def _held_out(session: Session, data: Path | None, versions: Sequence[AdapterVersion]) -> HeldOut:
    from training.dataset import TRAIN_NAME, VAL_NAME
    from training.evaluate import read_held_out, trained_on
    from training.journal_file import JournalFile

    folder = session.paths.training_data
    path = folder / VAL_NAME if data is None else data
    if data is None and not path.exists():
        raise UsageError(f"There is no {path}", hint="planpatch train dataset makes it, or give --data FILE.")
    records = JournalFile(session.paths.success_logs).records()
    seen = frozenset[str]().union(*(version.rows for version in versions))
    options = patcher_options(session.settings, "bench", on_gpu=False)
    return read_held_out(path, records, options, trained_on(folder / TRAIN_NAME), seen)


def _measure(
    session: Session,
    held_out: HeldOut,
    version: AdapterVersion,
    other: AdapterVersion | None,
    general: bool,
    as_json: bool,
) -> tuple[Evaluation, dict[str, Any]]:
    """Both sides' answers, and what they were given by."""
    from training.evaluate import evaluate as measure
    from training.general import TASKS

    with open_engine(session, as_json) as engine, console.pull_progress() as progress:
        status = engine.status()
        on_gpu = status.device != "cpu"

        def step(done: int, total: int, what: str) -> None:
            progress(Progress("verify", done, total, "answers", f"{version.folder.name} and {name}: {what}"))

        name = other.folder.name if other else "the base model"
        options = without_time_limits(patcher_options(session.settings, "bench", on_gpu=on_gpu))
        evaluation = measure(
            engine,
            held_out,
            str(version.folder),
            options,
            against=str(other.folder) if other else BASE,
            tasks=TASKS if general else (),
            num_together=_ROWS_AT_ONCE_GPU if on_gpu else 1,
            on_step=step,
        )
    facts = {
        "base": status.model,
        "base_digest": status.model_digest,
        "against": other.folder.name if other else BASE,
        "device": status.device.partition(":")[0],
        "quantization": status.quantization,
    }
    return evaluation, facts


def _write_rows(file: Path, evaluation: Evaluation) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in evaluation.rows_to_json())
    write_atomically(file.absolute(), text.encode(), expected_sha256=None, private=True)


def _show(version: AdapterVersion, evaluation: Evaluation) -> None:
    figures = evaluation.to_json()
    edits, general = figures["edits"], figures["general"]
    base, candidate, count = edits["base"], edits["candidate"], edits["rows"]
    against = version.evaluation["against"]
    rows = [
        (
            "as you kept them",
            f"{base['right']} of {count}",
            f"{candidate['right']} of {count}",
            _spread(edits["right"]),
        ),
        ("to the letter", f"{base['exact']} of {count}", f"{candidate['exact']} of {count}", ""),
        ("pass every gate", f"{base['valid']} of {count}", f"{candidate['valid']} of {count}", _spread(edits["valid"])),
        ("change something", f"{base['edited']} of {count}", f"{candidate['edited']} of {count}", ""),
        ("tokens/s", str(base["tok_per_s"]), str(candidate["tok_per_s"]), ""),
    ]
    if general is not None:
        tasks = general["tasks"]
        passed = f"{general['base']} of {tasks}", f"{general['candidate']} of {tasks}"
        rows.append(("general tasks", *passed, _spread(general["passed"])))
    names = "base model" if against == BASE else against, version.folder.name
    console.print_table("", ("", *names, "difference, 95% interval"), rows)
    for reason, number in edits["left_out"].items():
        console.say(f"{number} left out: {reason}")


def _spread(compared: Mapping[str, Any]) -> str:
    low, high = compared["interval"]
    return f"{compared['difference']:+.0%} ({low:+.0%} to {high:+.0%})"


def _say_decision(version: AdapterVersion, decision: Decision) -> None:
    if decision.is_passed:
        console.say(f"{escape(version.folder.name)} passes: planpatch train promote {escape(version.folder.name)}")
    for reason in decision.against:
        console.say(f"[yellow]{escape(version.folder.name)} does not pass:[/] {escape(reason)}")


def promote(
    adapter: Annotated[
        str | None, typer.Argument(help="Version or folder; without it the newest.", show_default=False)
    ] = None,
    insist: Annotated[bool, typer.Option("--insist", help="Use it although the gate says no.")] = False,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Use an adapter from now on, if its evaluation says that it is better and has forgotten nothing.

    Servers that run take it within a second. `planpatch adapters rollback` goes back. Exit code 1: the gate says no.
    """
    from training.promote import decide, find_version, note_promotion

    session = open_session({"model": model}, None, as_json)
    version = find_version(session.paths.qlora_out, adapter)
    decision = decide(version, session.local_model(session.model_ref()).digest)
    if version.evaluation and (missed := _not_compared(version, session.adapter())):
        decision = replace(decision, against=(*decision.against, missed))
    if not decision.is_passed and not insist:
        if as_json:
            console.print_json({"ok": False, "adapter": str(version.folder), "gate": decision.to_json()})
        else:
            _say_decision(version, decision)
            console.say("nothing is changed; --insist uses it all the same")
        raise typer.Exit(1)
    for reason in decision.against:
        console.warn(f"insisted, although {reason}")
    if decision.why:
        console.say(escape(decision.why))
    choice = AdapterChoice(session.paths.adapter_choice)
    if not (choice.is_made and choice.current == version.folder):
        note_promotion(version, decision, is_insisted=not decision.is_passed)
        choice.use(version.folder)
    else:
        choice.renew()
    say_current(session, as_json, gate=decision.to_json())


def _not_compared(version: AdapterVersion, current: Path | None) -> str:
    """It was compared with what was used then, or with what it was told; what is used now may be something better."""
    if current is None or current == version.folder or version.evaluation.get("against") == current.name:
        return ""
    return (
        f"it was not compared with {current.name}, which is used now: "
        f"planpatch train evaluate --adapter {version.folder.name}"
    )


def register(app: typer.Typer) -> None:
    """Add the commands.

    Args:
        app: `planpatch train`.
    """
    app.command()(evaluate)
    app.command()(promote)
