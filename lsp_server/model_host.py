"""The model of a language server: loaded behind `initialize`, on a thread of its own, and told of as it goes.

Nothing here imports torch before `start`. A model that is not on this machine is not fetched unasked; one that does not
fit into memory is not loaded, and whoever holds the memory is named. Everything but generation works meanwhile.

Not covered: memory that a process takes between the check and the load; torch's own out-of-memory error covers that.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.errors import CancelledError, EngineError, ModelError, PlanPatchError
from engine.inference.catalogue import ModelRef
from engine.inference.engine import InProcessEngine
from engine.inference.protocol import Engine
from engine.inference.store import LocalModel, Progress
from engine.patching.disk import write_atomically
from lsp_server.paths import make_private_folder
from lsp_server.process_marks import facts_of_living, lives, own_facts
from lsp_server.session import Session

HostState = Literal["off", "loading", "ready", "absent", "failed", "released"]

log = logging.getLogger("planpatch.model")

_DRAIN_S = 30.0  # what is generated when the model is asked for may end
_LOAD_END_S = 120.0
_PULL_END_S = 2.0  # its child process is killed
_WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Where the model is.

    Args:
        state: `off` before `start`; `absent` when it has to be pulled first; `released` while another process of the
            user's has its memory.
        model: Its name, once known.
        message: Progress, or what went wrong.
        hint: What to do about that.
        reason: Why it failed, where a client has an answer to it: `memory`, or `held` if another server holds that;
            why it is absent: `cancelled` if the user ended the pull.
        is_pull: It is being fetched, and `cancel_pull` ends that.
    """

    state: HostState = "off"
    model: str = ""
    message: str = ""
    hint: str = ""
    reason: Literal["", "memory", "held", "cancelled"] = ""
    is_pull: bool = False


class ModelHost:
    """Loads, replaces and gives up the engine. Its methods may be called from any thread.

    Args:
        on_change: Called, on whatever thread, when the status changes.
    """

    def __init__(self, on_change: Callable[[HostStatus], None]) -> None:
        self._on_change = on_change
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # memory for one; and two threads cannot import transformers at once
        self._status = HostStatus()
        self._engine: InProcessEngine | None = None
        self._local: LocalModel | None = None
        self._generation = 0
        self._session: Session | None = None
        self._loading: threading.Thread | None = None
        self._holder: dict[str, Any] | None = None
        self._is_pull_wanted = False

    @property
    def status(self) -> HostStatus:
        """Where the model is now."""
        return self._status

    @property
    def engine_or_none(self) -> Engine | None:
        """The engine, if it is ready."""
        return self._engine if self._status.state == "ready" else None

    @property
    def local_or_none(self) -> LocalModel | None:
        """The files of the model that is ready, or being loaded once they are found."""
        return self._local if self._status.state in ("loading", "ready") else None

    def start(self, session: Session, *, pull: bool = False) -> None:
        """Load the model that the settings name, instead of what is loaded or fetched now.

        Args:
            session: Settings and store.
            pull: Fetch it if it is not here.
        """
        with self._changed:
            self._session, self._is_pull_wanted = session, pull
            if self._holder is not None:
                return  # loaded when the memory comes back
            self._generation += 1
            old, self._engine, self._local = self._engine, None, None
            self._status = HostStatus("loading", message="looking for the model", is_pull=pull)
            work = (self._generation, session, old, pull, self._status)
            self._loading = threading.Thread(target=self._load, args=work, name="planpatch-load", daemon=True)
            self._loading.start()

    def retry(self, session: Session) -> bool:
        """Load again what could not be loaded, since what stood in its way may have changed.

        Args:
            session: Settings and store.

        Returns:
            Whether it does; False where nothing failed, or another load began meanwhile.
        """
        with self._changed:
            if self._status.state != "failed" or self._session is None:
                return False
            self.start(session)
            return True

    def cancel_pull(self) -> bool:
        """End the pull that goes on. Pieces and files that arrived whole are kept for the next one.

        Returns:
            Whether one went on.
        """
        with self._changed:
            if not self._status.is_pull:
                return False
            self._generation += 1
            generation, name = self._generation, self._status.model
        message = f"The download of {name or 'the model'} was cancelled; what arrived whole is kept"
        self._tell(generation, HostStatus("absent", name, message, "Pull it again for the rest.", "cancelled"))
        return True

    def release(self, holder: Mapping[str, Any], purpose: str) -> bool:
        """Give the memory of the model to another process, until `resume` or until that process has ended.

        What is generated now may end; what is asked for meanwhile is refused.

        Args:
            holder: The process, as `process_marks.own_facts` tells it.
            purpose: What it does, in a word or two.

        Returns:
            Whether it has it; False: another process has it already.
        """
        facts = dict(holder)
        with self._changed:
            if self._holder is not None:
                return self._holder["pid"] == facts["pid"]
            self._holder = facts
            self._generation += 1
            generation = self._generation
            engine, self._engine, self._local = self._engine, None, None
        message = f"{purpose} holds the model's memory (process {facts['pid']})"
        self._tell(
            generation, HostStatus("released", self._status.model, message, "It comes back when that has ended.")
        )
        if self._loading is not None:
            self._loading.join(_LOAD_END_S)  # it sees that its model is not wanted any more
        if engine is not None:
            _drain(engine)
            engine.close()
        threading.Thread(target=self._watch, args=(facts,), name="planpatch-released", daemon=True).start()
        return True

    def resume(self, pid: int) -> bool:
        """Load the model again.

        Args:
            pid: The process that had its memory.

        Returns:
            Whether that process had it.
        """
        with self._changed:
            if self._holder is None or self._holder["pid"] != pid:
                return False
            self._holder, session = None, self._session
            if session is None:
                self._status = HostStatus()
        if session is not None:
            self.start(session, pull=self._is_pull_wanted)
        return True

    def _watch(self, holder: dict[str, Any]) -> None:
        """A process that was killed says nothing: its memory is free, and the model comes back."""
        while self._holder is holder and lives(holder):
            time.sleep(_WATCH_S)
        if self._holder is holder:
            self.resume(holder["pid"])

    def wait(self, is_cancelled: threading.Event) -> Engine:
        """The engine, once it is ready.

        Args:
            is_cancelled: Ends the wait.

        Returns:
            The engine.

        Raises:
            ModelError: The model is not here, or cannot be loaded.
            EngineError: The server closes.
            CancelledError: The wait was ended.
        """
        with self._changed:
            while self._status.state in ("off", "loading"):
                self._changed.wait(0.1)
                if is_cancelled.is_set():
                    raise CancelledError("Cancelled while the model was loading")
            status, engine = self._status, self._engine
        if status.state != "ready" or engine is None:
            raise ModelError(status.message or "There is no model", hint=status.hint)
        state = engine.status()
        if state.state == "failed":
            raise EngineError(state.message or "The engine failed", hint="Restart the language server.", fatal=True)
        return engine

    def close(self) -> None:
        """Give the model up."""
        with self._changed:
            self._generation += 1
            self._session = self._holder = None
            engine, self._engine = self._engine, None
            pulling = self._loading if self._status.is_pull else None
            self._status = HostStatus("failed", message="The server is closing")
            self._changed.notify_all()
        if pulling is not None:
            pulling.join(_PULL_END_S)
        if engine is not None:
            engine.close()

    def _load(
        self, generation: int, session: Session, old: InProcessEngine | None, pull: bool, begun: HostStatus
    ) -> None:
        self._tell(generation, begun)
        failed: HostStatus | None = None
        try:
            if old is not None:
                old.close()  # its memory is needed
            ref = session.model_ref()
            told = HostStatus("loading", ref.name, is_pull=pull)

            def progress(step: Progress) -> None:
                if generation != self._generation:
                    raise CancelledError("The model is not wanted any more")  # ends a pull at once
                percent = f" ({100 * step.done // step.total}%)" if step.total else ""
                self._tell(generation, replace(told, message=f"{step.message}{percent}"))

            local = session.local_model(ref, progress, pull=pull)
            self._found(generation, local)
            with self._reading:
                self._read(generation, session, local, ref)
        except CancelledError:
            log.info("the model is not fetched any further")  # whoever ended that has told what is now
        except PlanPatchError as error:
            state: HostState = "absent" if error.details.get("absent") else "failed"
            holders = other_holders(session.paths.servers) if "needed_bytes" in error.details else []
            reason = "held" if holders else "memory" if "needed_bytes" in error.details else ""
            if state == "failed":
                log.error("%s", " ".join(f"{error.message}. {error.hint}".split()))
            message = "; ".join([error.message, *([", ".join(holders)] if holders else [])])
            failed = HostStatus(state, self._status.model, message, error.hint, reason)
        except Exception as fault:  # a library failed: generation is off, the server stays
            log.exception("the model cannot be loaded")
            message = f"The model cannot be loaded: {type(fault).__name__}: {fault}"
            failed = HostStatus("failed", self._status.model, message, "planpatch doctor says more.")
        if failed is not None:
            _free_memory()
            self._tell(generation, failed)

    def _read(self, generation: int, session: Session, local: LocalModel, ref: ModelRef) -> None:
        """Have the engine, unless another model was asked for meanwhile; called by one thread at a time."""
        if generation != self._generation:
            return
        engine = session.engine(local, ref)
        try:
            engine.wait_until_ready()
        except BaseException:
            engine.close()  # its thread has ended before another load may begin
            raise
        with self._changed:
            is_current = generation == self._generation
            if is_current:
                self._engine = engine
        if is_current:
            self._tell(generation, HostStatus("ready", local.name))
        else:
            engine.close()

    def _found(self, generation: int, local: LocalModel) -> None:
        with self._changed:
            if generation == self._generation:
                self._local, self._is_pull_wanted = local, False
        self._tell(generation, HostStatus("loading", local.name, "loading the weights"))

    def _tell(self, generation: int, status: HostStatus) -> None:
        with self._changed:
            if generation != self._generation:
                return
            self._status = status
            if status.state in ("ready", "absent", "failed"):
                self._is_pull_wanted = False
            self._changed.notify_all()
        self._on_change(status)


def _free_memory() -> None:
    """Give back what a load that failed took: its error held frames, and those the weights."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _drain(engine: InProcessEngine) -> None:
    """Let what is generated end."""
    deadline = time.monotonic() + _DRAIN_S
    while time.monotonic() < deadline:
        status = engine.status()
        if status.state != "ready" or status.num_running + status.num_waiting == 0:
            return
        time.sleep(0.05)


# --- who else holds memory -------------------------------------------------------------------------------------------


class ServerMark:
    """A file that tells other servers of this one: its process, its editor, its folder and what it holds.

    Args:
        folder: `servers` under PLANPATCH_HOME.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"{os.getpid()}.json"

    def write(self, client: str, workspace: str, model: str) -> None:
        """Write it anew; a full disk is no reason to stop."""
        facts = {**own_facts(), "client": client, "workspace": workspace, "model": model}
        with suppress(PlanPatchError):
            make_private_folder(self._file.parent)
            write_atomically(self._file, json.dumps(facts).encode(), expected_sha256=None, private=True)

    def remove(self) -> None:
        """Take it away."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)


def other_holders(folder: Path) -> list[str]:
    """Other servers that hold a model, in words; marks of processes that are gone are removed.

    Args:
        folder: `servers` under PLANPATCH_HOME.

    Returns:
        One phrase each, such as `process 4711 (Neovim, /work/app) holds qwen3-8b, 9.6 GB`.
    """
    import psutil

    found: list[str] = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        facts = facts_of_living(file)
        if facts is None:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        elif facts["pid"] != os.getpid() and facts.get("model"):
            where = ", ".join(str(facts[name]) for name in ("client", "workspace") if facts.get(name))
            with suppress(psutil.Error):
                size = psutil.Process(facts["pid"]).memory_info().rss / 1e9
                found.append(f"process {facts['pid']} ({where}) holds {facts['model']}, {size:.1f} GB")
    return found
