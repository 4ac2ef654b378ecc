"""Runs a child process of a pull: watched, killed when the pull ends early, its output kept out of ours."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.inference.store_files import DISK_FULL, write_error, writing

_POLL_S = 0.1


def run_child(
    command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str], watch: Callable[[], None]
) -> int:
    """Run a command until it ends or `watch` raises; then it is killed.

    Args:
        command: The command.
        log: File for its output and errors.
        folder: Its working folder and place for temporary files.
        environment: Variables set besides this process's own.
        watch: Called ten times a second.

    Returns:
        Its exit code, negative for a signal.

    Raises:
        WriteError: The log cannot be written.
    """
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    flags = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
    with writing(log), log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **temporary, **environment},
            creationflags=flags,
        )
    with child:
        try:
            while True:
                watch()
                try:
                    return child.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.kill()


class Worker:
    """A job of `store_worker.py`.

    Args:
        folder: Folder for its files, on the disk of the result.
        job: `convert` or `download`.
        arguments: The job's own.
    """

    def __init__(self, folder: Path, job: str, *arguments: str) -> None:
        self._folder = folder
        self._events = folder / f"{job}.events"
        self._log = folder / f"{job}.log"
        script = Path(__file__).with_name("store_worker.py")
        self._command = [sys.executable, "-I", str(script), str(self._events), job, *arguments]
        self.facts: dict[str, Any] = {}

    def run(self, watch: Callable[[], None], **environment: str) -> int:
        """Do the job.

        Args:
            watch: Called ten times a second, with `facts` up to date.
            environment: Variables to set.

        Returns:
            The exit code; after a failure `facts["error"]` may say why.

        Raises:
            WriteError: Its files cannot be written, or the disk filled up.
        """
        with writing(self._events):
            self._events.write_bytes(b"")

        def read_and_watch() -> None:
            self._read_events()
            watch()

        code = run_child(
            self._command, log=self._log, folder=self._folder, environment=environment, watch=read_and_watch
        )
        self._read_events()
        if code != 0 and self._disk_was_full():
            raise write_error(self._folder, OSError(errno.ENOSPC, ""))
        return code

    def last_words(self) -> str:
        """The last line of its output."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _disk_was_full(self) -> bool:
        """Libraries wrap the system's error; then its words are all that is left."""
        words = str(self.facts.get("error", "")).lower()
        said = ("no space left", "not enough space", "file too large", "quota exceeded")
        return self.facts.get("errno") in DISK_FULL or any(phrase in words for phrase in said)

    def _read_events(self) -> None:
        for line in self._events.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                self.facts.update(json.loads(line))
