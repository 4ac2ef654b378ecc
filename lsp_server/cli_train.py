"""`planpatch train`: the journal of kept edits, the data set made from it, and forgetting.

`training` is imported inside the commands: no other command, and no server, loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from engine.errors import UsageError
from engine.patching.ledger import Forgettable, Ledger
from lsp_server import console
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.cli_journal import consent_of, journal, places_of
from lsp_server.cli_options import JsonOption, ModelOption, open_session
from lsp_server.session import Session
from lsp_server.settings import opts_out

if TYPE_CHECKING:
    from training.forget import Forgotten

train_app = typer.Typer(
    help="What PlanPatch learns from: edits that you kept, on this machine alone.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
log_app = typer.Typer(help="Keep accepted edits for training, or not.", no_args_is_help=True, rich_markup_mode=None)
train_app.add_typer(log_app, name="log")


@contextmanager
def _opened(as_json: bool) -> Generator[tuple[Session, Ledger]]:
    """A session and its ledger; a `forget` that was killed is ended first."""
    from training.forget import forget as forget_all
    from training.forget import unfinished

    session = open_session({}, None, as_json)
    with session.ledger() as ledger:
        which = unfinished(places_of(session))
        if which is not None:
            console.say("a run of planpatch train forget was interrupted; it is ended now")
            forget_all(places_of(session), ledger, which)
        yield session, ledger


# --- log -------------------------------------------------------------------------------------------------------------


@log_app.command("on")
def log_on(as_json: JsonOption = False) -> None:
    """Keep edits from now on. What was made while it was off stays out."""
    _turn(True, as_json)


@log_app.command("off")
def log_off(as_json: JsonOption = False) -> None:
    """Keep no edits from now on. What is in the journal stays; `planpatch train forget` removes it."""
    _turn(False, as_json)


def _turn(on: bool, as_json: bool) -> None:
    with _opened(as_json) as (session, ledger):
        switch = consent_of(session).switch
        if switch.is_on:
            journal(session, ledger)  # what was kept until now belongs to the time when it was on
        switch.turn(on)
    _show_status(as_json)


@log_app.command("status")
def log_status(
    file: Annotated[
        Path | None, typer.Option(help="Say also whether this file's workspace opted out.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the journal up to date and say what is in it."""
    _show_status(as_json, file)


def _show_status(as_json: bool, file: Path | None = None) -> None:
    from training.journal_file import JournalFile

    with _opened(as_json) as (session, ledger):
        consent = consent_of(session)
        made = journal(session, ledger)
        kinds = [kind for _, kind in JournalFile(session.paths.success_logs).heads().values()]
    facts: dict[str, Any] = {
        "on": consent.switch.is_on,
        "setting": consent.is_allowed,
        "setting_source": session.settings.source_of("training_log"),
        "journal": {kind: kinds.count(kind) for kind in ("edit", "preference", "withdrawn", "withheld")},
        "folder": str(session.paths.success_logs),
        **made.to_json(),
    }
    if file is not None:
        facts["opted_out_by"] = opts_out(file)
    if as_json:
        console.print_json(facts)
        return
    console.out.print(f"the training log is {'on' if facts['on'] and facts['setting'] else 'off'}", markup=False)
    if not facts["setting"]:
        console.say(escape(f"the setting training_log is off ({facts['setting_source']})"))
    counts = facts["journal"]
    console.say(
        f"{counts['edit']} kept edits, {counts['preference']} preference pairs, {counts['withheld']} withheld, in "
        f"{escape(facts['folder'])}"
    )
    for reason, count in facts["left_out"].items():
        console.say(f"{count} left out: {reason}")
    if facts.get("opted_out_by"):
        console.say(escape(f"{file} is left out: {facts['opted_out_by']} says so"))


# --- data sets -------------------------------------------------------------------------------------------------------


@train_app.command()
def dataset(
    include: Annotated[
        Literal["unreviewed"] | None,
        typer.Option("--include", help="Take also edits that nobody reviewed.", show_default=False),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge",
            metavar="BASE",
            help="Put this data set in front; what of it was used is kept as train_from_logs.base.jsonl.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make train_from_logs.jsonl and val_from_logs.jsonl from the journal.

    What is the same or nearly the same is left out, and 10 to 20% is held out in whole repositories or files. Says how
    many were left out, and why.
    """
    from training.dataset import REASONS, Options, build
    from training.journal_file import JournalFile

    with _opened(as_json) as (session, ledger):
        made = journal(session, ledger)
        kept = JournalFile(session.paths.success_logs)
        opted_out = consent_of(session).opted_out
        with kept.writing():
            records = list(kept.records())
            paths = {record["path"] for record in records if record.get("path")}
            refused = {path: opted_out(Path(path)) for path in paths}
            built = build(records, session.paths.training_data, Options(include == "unreviewed", merge), refused)
    if as_json:
        console.print_json({"ok": True, "journal": made.to_json(), **built.to_json()})
        return
    console.say(f"{built.num_train} to train on, {built.num_val} held out")
    if built.unit:
        console.say(f"held out in whole {_PLURAL[built.unit]}, of {built.num_groups}")
    elif built.num_train:
        console.say(f"nothing is held out: no choice of the {built.num_groups} files gives 10 to 20%")
    for reason, names in built.dropped.items():
        console.say(f"  {len(names)} left out: {REASONS[reason]}")
    if built.base is not None:
        _say_mended(built.base.to_json())
    for path in built.files.values():
        console.out.print(str(path), markup=False)


_PLURAL = {"repository": "repositories", "file": "files"}


@train_app.command()
def sanitize(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Data sets.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace files that were written before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Mend data sets that others made: encoding, line ends, fields that are no text, broken lines, secrets.

    Writes NAME.sanitized.jsonl beside each file, and NAME.broken.jsonl with the lines that could not be used. The file
    itself stays as it is. Exit code 1: a file has no usable line.
    """
    from training.sanitize import mend_file, write_mended

    facts: list[dict[str, Any]] = []
    for file in files:
        mended = mend_file(file)
        written = write_mended(mended, force=force)
        facts.append({**mended.to_json(), "written": [str(path) for path in written]})
    if as_json:
        console.print_json(facts)
    else:
        for one in facts:
            _say_mended(one)
    if not all(one["usable"] for one in facts):
        raise typer.Exit(1)


def _say_mended(facts: dict[str, Any]) -> None:
    console.say(escape(f"{facts['file']}: {facts['usable']} usable, {facts['broken']} broken"))
    for what, count in [*facts["mended"].items(), *facts["broken_because"].items()]:
        console.say(escape(f"  {count} × {what}"))
    for path in facts.get("written", ()):
        console.out.print(path, markup=False)


# --- forget ----------------------------------------------------------------------------------------------------------


@train_app.command()
def forget(
    file: Annotated[Path | None, typer.Option(help="Everything about this file.", show_default=False)] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Everything about files in this folder and below.", show_default=False)
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="DATE", help="Everything older, such as 2026-11-01; UTC without a zone.")
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Remove also the adapters that were trained on some of it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove texts, paths, intents, plans and diffs for good, from ledger, journal, data sets and plan documents.

    Of each proposal its id and times stay. It cannot be rolled back or redone afterwards; files are not changed.
    Adapters that learnt some of it are named, and removed with --adapters.
    """
    from training.forget import forget as forget_all
    from training.forget import preview

    which = _chosen(file, folder, before)
    with _opened(as_json) as (session, ledger):
        places = places_of(session)
        found = preview(places, ledger, which)
        if not yes:
            _ask(found, adapters, as_json)
        if adapters:
            _stop_using(session, found)
        done = forget_all(places, ledger, which, with_adapters=adapters)
    if as_json:
        console.print_json({"ok": True, **which.to_json(), **done.to_json()})
    else:
        console.say(f"forgotten: {_counts(done)}")
        for name in done.adapters[: done.num_adapters]:
            console.say(escape(f"the adapter {name} had learnt some of it and is removed"))
    for name in done.adapters[done.num_adapters :]:
        console.warn(f"the adapter {name} has learnt some of it: planpatch adapters rm {name} removes it")
    for name in done.maybe:
        console.warn(f"the adapter {name} does not say what it learnt; it may be some of it")
    for left in done.left:
        console.warn(f"{left} still names the path; remove it by hand if nothing needs it")


def _chosen(file: Path | None, folder: Path | None, before: str | None) -> Forgettable:
    if sum(choice is not None for choice in (file, folder, before)) != 1:
        raise UsageError("Exactly one of --file, --folder and --before is needed", hint="planpatch train forget --help")
    if before is None:
        return Forgettable(file=file, folder=folder)
    try:
        time = datetime.fromisoformat(before.strip().replace("Z", "+00:00"))
    except ValueError:
        raise UsageError(
            f"--before {before!r} is no date", hint="Write it as 2026-11-01 or 2026-11-01T12:00."
        ) from None
    return Forgettable(before=time if time.tzinfo else time.replace(tzinfo=timezone.utc))


def _stop_using(session: Session, found: Forgotten) -> None:
    """Go to the base model where an adapter that will be removed is used; servers that run take that."""
    folders = {session.paths.qlora_out / name for name in found.adapters}
    choice = AdapterChoice(session.paths.adapter_choice)
    if choice.is_made and choice.current in folders:
        choice.use(None)


def _ask(found: Forgotten, with_adapters: bool, as_json: bool) -> None:
    if as_json or not sys.stdin.isatty():
        raise UsageError(f"This would forget {_counts(found)}", hint="Give --yes to do it.", would=found.to_json())
    console.say(f"This forgets {_counts(found)}, for good; these patches cannot be rolled back afterwards.")
    if with_adapters and found.adapters:
        console.say(escape(f"It removes the adapters {', '.join(found.adapters)}."))
    typer.confirm("Forget?", abort=True, err=True)


def _counts(found: Forgotten) -> str:
    return (
        f"{found.num_proposals} proposals, {found.num_plans} plans, {found.num_documents} plan documents, "
        f"{found.num_journal_lines} journal lines, {found.num_data_lines} lines of data sets"
    )


# --- reversed edits --------------------------------------------------------------------------------------------------


@train_app.command("reversed-edits")
def reversed_edits(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the rows and the report.", show_default=False)],
    reference: Annotated[
        list[Path],
        typer.Option(
            help="What must not be learnt from: a file of tasks, a wheel or a folder of Python. May be repeated.",
            show_default=False,
        ),
    ],
    wheels: Annotated[Path, typer.Option(help="Where wheels lie; missing ones are fetched from PyPI.")],
    packages: Annotated[
        Path | None, typer.Option(help="Another list of packages than the one that comes with it.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses functions, edits and wordings.")] = 1,
    most_tokens: Annotated[int, typer.Option(min=1, help="Tokens of all rows together.")] = 12_000_000,
    processes: Annotated[int, typer.Option(min=1, help="Packages that are read at once.")] = 2,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make training data from the code of permissively licensed packages, by reversing edits."""
    from training.reversed_edits.build import Options, build
    from training.reversed_edits.sources import read_packages

    session = open_session({"model": model}, None, as_json)
    with console.pull_progress() as progress:
        tokenizer = session.local_model(session.model_ref(), progress, pull=False).folder
    report = build(
        out,
        wheels,
        reference,
        tokenizer,
        Options(seed=seed, most_tokens=most_tokens, num_processes=processes),
        packages=None if packages is None else read_packages(packages),
        say=lambda text: console.say(escape(text)),
    )
    if as_json:
        console.print_json(report)
    else:
        console.say(escape(f"{report['train']['rows']} rows to train on, {report['val']['rows']} held out, in {out}"))
