"""`planpatch bench`: edit tasks, and one edit repeated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from engine.errors import UsageError
from lsp_server import console
from lsp_server.bench_cases import (
    Case,
    CaseResult,
    CaseRunner,
    LineLog,
    RunTotals,
    Selection,
    read_cases,
    read_ids,
    run_cases,
    summarise,
)
from lsp_server.bench_record import keep_or_compare, run_options
from lsp_server.bench_repeat import (
    HISTORY_NAME,
    PLOT_NAME,
    RESULTS_NAME,
    HistoryLine,
    RepeatTask,
    Repetition,
    ResultsCsv,
    append_history,
    check_history,
    history_line,
    plot_history,
    repeat_edit,
)
from lsp_server.cli_journal import journal
from lsp_server.cli_options import (
    AdapterOption,
    DeviceOption,
    FunctionOption,
    JsonOption,
    ModelOption,
    QuantizationOption,
    find_target,
    open_engine,
    open_session,
)

if TYPE_CHECKING:
    from training.journal import Journaled

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

FormatOption = Annotated[
    Literal["auto", "rewrite", "json_edits"] | None, typer.Option("--format", help="What the model writes.")
]
PlanOption = Annotated[bool, typer.Option("--plan/--no-plan", help="Whether to plan first and follow that plan.")]

_SECONDS_BETWEEN_LINES = 10.0
_MAX_BATCH = 64  # the engine's queue


@bench_app.callback(invoke_without_command=True)
def repeat(
    context: typer.Context,
    number: Annotated[int, typer.Option("-N", "--number", min=1, help="How often the edit is made.")] = 20,
    path: Annotated[Path | None, typer.Option("--path", help="A Python file; it is not changed.")] = None,
    function: FunctionOption = None,
    intent: Annotated[str | None, typer.Option("--intent", "-i", help="What to change, in your words.")] = None,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Apply nothing; keep the proposals in ledger and training log.")
    ] = False,
    csv_dir: Annotated[Path, typer.Option(help="Folder of the CSV files and the plot.")] = Path("."),
    edit_format: FormatOption = None,
    with_plan: PlanOption = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one edit N times from the same bytes, or run a file of cases with `cases`."""
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    if path is None or not intent or not intent.strip():
        missing = "--path" if path is None else "--intent"
        raise UsageError(
            f"{missing} is missing", hint="planpatch bench -N 20 --path FILE --function NAME --intent TEXT"
        )
    options = {
        "model": model,
        "adapter": adapter,
        "device": device,
        "quantization": quantization,
        "format": edit_format,
    }
    session = open_session(options, path, as_json)
    source, scope = find_target(session, path, function, None, False)
    task = RepeatTask(source, scope, intent, with_plan)
    check_history(csv_dir / HISTORY_NAME)
    with open_engine(session, as_json) as engine, session.ledger() if log_only else nullcontext() as ledger:
        made = session.patcher(engine, ledger, "bench").options
        with ResultsCsv(csv_dir / RESULTS_NAME) as results:

            def show(row: Repetition) -> None:
                results.add(row)
                _say_row(row, number)

            rows = repeat_edit(engine, made, task, number, ledger=ledger, on_row=show)
        journaled = journal(session, ledger) if ledger is not None else None
        summary = history_line(rows, task, engine.status(), made)
    append_history(csv_dir / HISTORY_NAME, summary)
    is_plotted = plot_history(csv_dir / HISTORY_NAME, csv_dir / PLOT_NAME)
    _report(rows, summary, csv_dir, journaled, is_plotted=is_plotted, as_json=as_json)


def _refuse_options_before(context: typer.Context) -> None:
    """Options before `cases` would belong to the repeated edit, and be lost."""
    given = [
        name
        for name in context.params
        if (where := context.get_parameter_source(name)) is not None and where.name == "COMMANDLINE"
    ]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} stands before `{context.invoked_subcommand}`",
            hint=f"Put it behind: planpatch bench {context.invoked_subcommand} …",
        )


def _say_row(row: Repetition, number: int) -> None:
    result = f"{row.edits} edits" if row.ok else f"[red]failed:[/] {escape(row.reason)}"
    console.say(f"{row.n} of {number}: {result}, {row.plan_ms + row.patch_ms:.0f} ms, {row.tokens} tokens")


def _report(
    rows: Sequence[Repetition],
    summary: HistoryLine,
    csv_dir: Path,
    journaled: Journaled | None,
    *,
    is_plotted: bool,
    as_json: bool,
) -> None:
    if as_json:
        files = {"results": csv_dir / RESULTS_NAME, "history": csv_dir / HISTORY_NAME, "plot": csv_dir / PLOT_NAME}
        console.print_json(
            {
                "summary": asdict(summary),
                "runs": [asdict(row) for row in rows],
                "files": {name: str(file) for name, file in files.items() if name != "plot" or is_plotted},
                "journal": None if journaled is None else journaled.to_json(),
            }
        )
    else:
        num_texts = len({row.sha256 for row in rows if row.sha256})
        facts = [
            ("model", f"{summary.model} on {summary.device} ({summary.quantization}), {summary.format}"),
            ("runs", f"{summary.n}, {summary.errors} failed, {num_texts} different patched texts"),
            ("JSON failures", summary.json_failures),
            ("p50, p95", f"{summary.p50_ms:.0f} ms, {summary.p95_ms:.0f} ms"),
            ("tokens/s", summary.tok_per_s),
        ]
        console.print_table("", ("", ""), facts)
    empty = [row.n for row in rows if not row.edits]
    if empty:
        console.say(f"edits=[] in run {', '.join(map(str, empty))}: counted as failed")
    if journaled is not None:
        _say_journaled(journaled)
    plot = f", {PLOT_NAME}" if is_plotted else ""
    console.say(escape(f"written to {csv_dir}: {RESULTS_NAME}, {HISTORY_NAME}{plot}"))
    if not is_plotted:
        console.say(escape('a plot of the history needs matplotlib: pip install "planpatch[plot]"'))


def _say_journaled(journaled: Journaled) -> None:
    console.say(f"{journaled.num_written['edit']} edits went to the training log, as unreviewed")
    for reason, count in journaled.num_left_out.items():
        console.say(f"{count} were left out: {reason}")


@bench_app.command()
def cases(
    file: Annotated[Path, typer.Argument(metavar="CASES.jsonl", help="One case a line.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Results, one line a case.", show_default=False)],
    details: Annotated[
        Path | None, typer.Option(help="Plans, answers and verdicts, one line a case.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip cases that have a result.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, max=_MAX_BATCH, help="Cases in flight at once.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    ids: Annotated[Path | None, typer.Option(help="Only these ids, one a line.", show_default=False)] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Every Nth of the chosen cases, from the Ith on.")] = "1/1",
    edit_format: FormatOption = None,
    with_plan: PlanOption = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run edit tasks under token budgets alone; each result is written at once, in the order of completion.

    Reads id, file_name, before, function, scope and intent of a row and nothing else. The options are kept beside the
    results as RESULTS.jsonl.run.json, and --resume takes no other ones. Without --resume an older RESULTS.jsonl is kept
    as RESULTS.jsonl.old.
    """
    chosen = Selection(read_ids(ids) if ids else None, limit, _shard(shard)).of(read_cases(file))
    options = {
        "model": model,
        "adapter": adapter,
        "device": device,
        "quantization": quantization,
        "format": edit_format,
    }
    _check_files_differ(file, out, details)
    session = open_session(options, None, as_json)
    made_with = run_options(session, with_plan=with_plan)
    with LineLog(out, resume=resume) as results, _details_log(details, resume=resume) as log:
        keep_or_compare(out, made_with, has_lines=bool(results.lines))
        done = {line["id"] for line in results.lines}
        waiting = [case for case in chosen if case.id not in done]
        totals = RunTotals()
        if waiting:
            with open_engine(session, as_json) as engine:
                made = session.patcher(engine, None, "bench").options
                runner = CaseRunner(engine, made, with_plan=with_plan)
                totals = _run(runner, waiting, results, log, batch, len(chosen))
        ids_chosen = {case.id for case in chosen}
        summary = summarise([line for line in results.lines if line["id"] in ids_chosen], totals)
    _report_cases(summary, as_json=as_json)


def _run(
    runner: CaseRunner, waiting: Sequence[Case], results: LineLog, details: LineLog | None, batch: int, total: int
) -> RunTotals:
    progress = _Progress(len(waiting), total)
    try:
        with progress:
            return run_cases(
                runner, waiting, results, details, num_workers=min(batch, len(waiting)), on_result=progress
            )
    except KeyboardInterrupt:
        console.say(escape(f"{results.path} has every case that was done; --resume goes on from there"))
        raise


def _details_log(path: Path | None, *, resume: bool) -> LineLog | nullcontext[None]:
    return LineLog(path, resume=resume) if path else nullcontext()


def _check_files_differ(file: Path, out: Path, details: Path | None) -> None:
    names = [path.resolve() for path in (file, out, details) if path is not None]
    if len(set(names)) < len(names):
        raise UsageError("CASES, --out and --details must be different files")


def _shard(text: str) -> tuple[int, int]:
    index, slash, num_shards = text.partition("/")
    if not (slash and index.isdecimal() and num_shards.isdecimal() and 1 <= int(index) <= int(num_shards)):
        raise UsageError(f"--shard {text!r} is not I/N", hint="Give a number of shards and which one, such as 1/4.")
    return int(index), int(num_shards)


class _Progress:
    """`37 of 108, 20 offered, 5:12 left`: live on a terminal, else a line now and then."""

    def __init__(self, num_waiting: int, total: int) -> None:
        self._status = console.err.status("") if console.err.is_terminal else None
        self._total = total
        self._num_waiting = num_waiting
        self._num_done = self._num_offered = 0
        self._started_at = self._said_at = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._status:
            self._status.start()
        self._say(f"{self._num_waiting} of {self._total} cases to run")
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, result: CaseResult) -> None:
        self._num_done += 1
        self._num_offered += result.outcome.ok
        num_left = self._num_waiting - self._num_done
        now = time.monotonic()
        minutes, seconds = divmod(round((now - self._started_at) / self._num_done * num_left), 60)
        if self._status or now - self._said_at >= _SECONDS_BETWEEN_LINES or not num_left:
            self._said_at = now
            done = self._total - num_left
            self._say(f"{done} of {self._total}, {self._num_offered} offered, {minutes}:{seconds:02} left")

    def _say(self, text: str) -> None:
        if self._status:
            self._status.update(text)
        else:
            console.say(text)


def _report_cases(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.print_json(summary)
        return
    run = summary["this_run"]
    console.say(f"\n{summary['offered']} of {summary['cases']} offered")
    for reason, count in summary["refused"].items():
        console.say(f"  {count} {escape(reason)}")
    if summary["cases"]:
        console.say(f"p50 {summary['p50_ms']:.0f} ms, p95 {summary['p95_ms']:.0f} ms a case")
    if run["cases"]:
        console.say(
            f"this run: {run['cases']} cases in {run['elapsed_s']} s, {run['tokens']} tokens, "
            f"{run['tok_per_s']} tokens/s, {run['json_failures']} JSON failures"
        )


@bench_app.command()
def engine(
    workload: Annotated[
        Path | None, typer.Option(help="Recorded edits (.jsonl.gz); without it those that come with PlanPatch.")
    ] = None,
    backends: Annotated[
        str, typer.Option(help="Which of planpatch, generate and generate_lookup, with commas between.")
    ] = "planpatch,generate,generate_lookup",
    edits: Annotated[
        int | None,
        typer.Option(
            min=1, help="Edits of each workload; all on a GPU, but 2 for generate; 6 on CPU.", show_default=False
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="The llama-bench of llama.cpp, to be run too; needs --gguf.", show_default=False)
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="The model's file for it.", show_default=False)] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill, decode at several widths, recorded edits and memory, beside `generate` and llama.cpp.

    The last line on stdout is one JSON object.
    """
    from lsp_server.bench_engine import bench_engine
    from lsp_server.bench_workload import DEFAULT_FILE, read_workload

    if (llama_cpp is None) != (gguf is None):
        raise UsageError("--llama-cpp and --gguf belong together")
    wanted = [name.strip() for name in backends.split(",") if name.strip()]
    if unknown := set(wanted) - {"planpatch", "generate", "generate_lookup"}:
        raise UsageError(f"There is no backend {min(unknown)!r}", hint="planpatch, generate or generate_lookup.")
    if not wanted and llama_cpp is None:
        raise UsageError("--backends names nothing to measure", hint="planpatch, generate or generate_lookup.")
    recorded = read_workload(workload or DEFAULT_FILE)
    session = open_session({"model": model, "device": device, "quantization": quantization}, None, as_json)
    bench_engine(session, recorded, wanted, edits, llama_cpp, gguf, as_json=as_json)
