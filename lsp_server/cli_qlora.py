"""`planpatch train qlora` and `train status`: from the data set to an adapter, with the servers' memory lent meanwhile.

`training` is imported inside the commands, and torch after the request was read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from engine.errors import EditorUnreachableError, EnvironmentFault, PlanPatchError, UsageError
from lsp_server import console
from lsp_server.cli_options import JsonOption, open_session
from lsp_server.model_host import other_holders
from lsp_server.process_marks import own_facts
from lsp_server.running import RunningServer, listeners
from lsp_server.session import Session

if TYPE_CHECKING:
    from training.qlora import Request
    from training.qlora_run import Progress

_LARGE_BYTES = 500_000_000
_RELEASE_S = 180.0  # what it generates may end, and a model that loads is waited for


def qlora(
    config: Annotated[
        Path, typer.Argument(help="A JSON file, or the name of one of ours: qlora_qwen3_8b.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option(help="Examples; else what planpatch train dataset made.", show_default=False)
    ] = None,
    val: Annotated[Path | None, typer.Option(help="Examples that are held out.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of versions; else qlora-out under the home.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Instead of the configuration's base.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="Spread over several GPUs.")] = 1,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Instead of the configuration's value.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was cut off.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the run that was cut off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train on fewer examples than are asked for.")] = False,
    keep_servers: Annotated[
        bool, typer.Option("--keep-servers", help="Do not ask running servers for their memory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on the edits that you kept: QLoRA on a GPU, LoRA in bf16 on a CPU.

    Running servers of this home lend their memory meanwhile and load their model again at the end. A run that is cut
    off, by whatever, goes on with --resume. Exit code 2: too few examples; 3: too little memory, or packages missing.
    """
    from training.qlora import check_data, check_packages, train

    if resume and discard:
        raise UsageError("--resume and --discard cannot be combined")
    session, request = _request(config, data, val, out, model, device, num_gpus, values or [], as_json)
    request = replace(request, resume=resume, discard=discard, force=force)
    check_packages(request)
    check_data(request)
    try:
        with _servers_released(session, not keep_servers), _Shown(as_json) as shown:
            folder = train(request, shown)
    except PlanPatchError as error:
        _name_holders(error, session, request.device == "cpu" or not _has_gpu())
        raise
    _say_result(folder, as_json)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _request(
    config: Path,
    data: Path | None,
    val: Path | None,
    out: Path | None,
    model: str | None,
    device: str,
    num_gpus: int,
    values: list[str],
    as_json: bool,
) -> tuple[Session, Request]:
    """The base from the store, the data set of this home where none is named."""
    from training.dataset import TRAIN_NAME, VAL_NAME
    from training.qlora import Request, with_values
    from training.qlora_config import find_config, read_config

    read = with_values(read_config(find_config(config)), values)
    session = open_session({"model": model or read.model}, None, as_json)
    with console.pull_progress() as progress:
        local = session.store.get(session.model_ref(), progress)
    ours = session.paths.training_data
    if data is None and val is None and (ours / VAL_NAME).is_file() and (ours / VAL_NAME).stat().st_size:
        val = ours / VAL_NAME
    return session, Request(
        config=read,
        model=local.folder.absolute(),
        model_name=local.hub_id or local.name,
        model_digest=local.digest,
        data=(data or ours / TRAIN_NAME).absolute(),
        val=None if val is None else val.absolute(),
        out=(out or session.paths.qlora_out).absolute(),
        device=device,
        num_gpus=num_gpus,
    )


def _name_holders(error: PlanPatchError, session: Session, on_cpu: bool) -> None:
    """Where memory is too little, say who has it."""
    if "needed_bytes" not in error.details:
        return
    holders = [*other_holders(session.paths.servers), *(_largest_processes() if on_cpu else _gpu_processes())]
    if holders:
        error.details["holders"] = holders
        error.hint = f"{error.hint} Now: {'; '.join(holders)}."


def _largest_processes() -> list[str]:
    import psutil

    found: list[tuple[int, str]] = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        facts: dict[str, Any] = process.info  # pyright: ignore[reportUnknownVariableType, reportAttributeAccessIssue]
        size = facts["memory_info"].rss if facts["memory_info"] else 0
        if size > _LARGE_BYTES and facts["pid"] != os.getpid():
            found.append((size, f"process {facts['pid']} ({facts['name']}) holds {size / 1e9:.1f} GB"))
    return [words for _, words in sorted(found, reverse=True)[:3]]


def _gpu_processes() -> list[str]:
    """By the driver's own program, where there is one."""
    program = shutil.which("nvidia-smi")
    if program is None or Path(program).parent == Path.cwd():
        return []
    query = [program, "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
        return [f"process {pid} ({Path(name).name}) holds {mib} MiB of the GPU" for pid, name, mib in rows]
    return []


def _say_result(folder: Path, as_json: bool) -> None:
    from training.qlora_run import MANIFEST, read_json

    manifest = read_json(folder / MANIFEST)
    if as_json:
        console.print_json({"ok": True, "folder": str(folder), "manifest": manifest})
        return
    held_out: dict[str, Any] = manifest.get("held_out") or {}
    if held_out:
        console.say(f"loss on what was held out: {held_out['loss_before']:.4f} → {held_out['loss_after']:.4f}")
    console.say(escape(f"planpatch train evaluate --adapter {_name_to_give(folder)} holds it against what is used now"))
    console.out.print(str(folder), markup=False)


def _name_to_give(folder: Path) -> str:
    """A version's name where it is among the others, else the folder."""
    return folder.name if folder.parent.name == "qlora-out" else str(folder)


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def _servers_released(session: Session, wanted: bool) -> Generator[None]:
    """Servers of this home without their models, which they load again at the end, or when this process has ended."""
    released: list[RunningServer] = []
    facts = own_facts()
    try:
        for server in listeners(session.paths.runtime_file) if wanted else ():
            if _release(server, facts):
                released.append(server)
        yield
    finally:
        for server in released:
            _resume(server, facts["pid"])


def _release(server: RunningServer, facts: dict[str, Any]) -> bool:
    try:
        status, answer = server.post("/release", {**facts, "purpose": "Training"}, _RELEASE_S)
    except EditorUnreachableError as error:
        console.warn(f"{error.message}; it may hold memory")
        return False
    if status == 200:
        console.say(escape(f"the server of process {server.pid} has released {answer.get('model') or 'its memory'}"))
        return True
    reason: Any = answer.get("error", {})
    message = str(reason.get("message", f"HTTP status {status}"))
    if status == 409:
        raise EnvironmentFault(f"The server of process {server.pid} cannot release its model: {message}")
    console.warn(f"the server of process {server.pid} keeps its model: {message}")
    return False


def _resume(server: RunningServer, pid: int) -> None:
    try:
        status, _ = server.post("/resume", {"pid": pid}, 10.0)
        if status == 200:
            console.say(f"the server of process {server.pid} loads its model again")
    except EditorUnreachableError:  # it has ended meanwhile, or sees that this process has
        console.say(f"the server of process {server.pid} does not answer; it loads its model again by itself")


# --- progress --------------------------------------------------------------------------------------------------------


class _Shown:
    """Progress on stderr: a live line on a terminal; else a line now and then.

    Args:
        as_json: Lines are JSON objects.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live = console.err.status("") if console.err.is_terminal and not as_json else None
        self._said_at = 0.0

    def __enter__(self) -> _Shown:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._live:
            self._live.update(escape(words_of(progress)))
            return
        is_step = progress.state == "training" and 0 < progress.step < progress.num_steps
        if is_step and time.monotonic() - self._said_at < 5:
            return
        self._said_at = time.monotonic()
        if self._as_json:
            console.err.print(json.dumps(progress.to_json()), markup=False, soft_wrap=True, highlight=False)
        else:
            console.say(escape(words_of(progress)))


def words_of(progress: Progress) -> str:
    """Progress in a line, such as `step 12 of 80, loss 0.412, 5310 tokens/s, 3 min left`.

    Args:
        progress: How far a run is.

    Returns:
        The line.
    """
    if progress.state != "training" or not progress.num_steps:
        return f"{progress.state} {progress.run}: {progress.message}".rstrip(": ")
    parts = [f"{progress.run}: step {progress.step} of {progress.num_steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tok_per_s is not None:
        parts.append(f"{progress.tok_per_s:.0f} tokens/s")
    if progress.left_s is not None:
        parts.append(f"{_time(progress.left_s)} left")
    return ", ".join([*parts, progress.message] if progress.message else parts)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def status(
    out: Annotated[Path | None, typer.Option(help="Folder of versions.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the runs of `train qlora`: going on, cut off, and done."""
    from training.qlora_run import Progress, runs

    session = open_session({}, None, as_json)
    found = runs((out or session.paths.qlora_out).absolute())
    if as_json:
        console.print_json(found)
        return
    for run in found:
        if run["state"] == "done":
            held_out: dict[str, Any] = run["manifest"].get("held_out") or {}
            losses = f", held out {held_out['loss_before']:.3f} → {held_out['loss_after']:.3f}" if held_out else ""
            text = f"{run['run']}: done, {run['manifest'].get('steps')} steps{losses}"
        else:
            progress = Progress(**run["progress"]) if run["progress"] else Progress(run=run["run"])
            hint = "" if run["state"] == "running" else "; --resume goes on with it"
            text = f"{words_of(progress)} ({run['state']}{hint})"
        console.out.print(text, markup=False, soft_wrap=True)
    if not found:
        console.say("no run yet; planpatch train qlora qlora_qwen3_8b begins one")
