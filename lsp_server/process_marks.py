"""Files in which a process says of itself that it runs, and whether the one that wrote a file still does.

A process id alone says little: the number is given to another program later, and a process that has ended keeps it as
a zombie until it is waited for. So the time when the process started stands beside it, and the machine's start too,
since a clock that is set moves both alike.

Not covered: a file that a process of another container wrote, whose numbers mean nothing here.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

_TOLERANCE_S = 2.0


def own_facts() -> dict[str, Any]:
    """What this process writes of itself: `pid`, `started_at` and `booted_at`, seconds since the epoch."""
    import psutil

    facts: dict[str, Any] = {"pid": os.getpid()}
    with suppress(psutil.Error, OSError):
        facts |= {"booted_at": psutil.boot_time(), "started_at": psutil.Process().create_time()}
    return facts


def facts_of_living(file: Path) -> dict[str, Any] | None:
    """What a process said of itself in a file; the file is removed where that process has ended.

    Args:
        file: The file; one without `started_at` is an older version's and its own age is looked at.

    Returns:
        The facts; None: the process is gone, or it is no such file, which is left where it is.
    """
    try:
        changed_at = file.stat().st_mtime
        facts: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = cast("dict[str, Any]", facts) if isinstance(facts, dict) else {}
    if not isinstance(found.get("pid"), int):
        return None
    if _lives(found, changed_at):
        return found
    with suppress(OSError):
        if file.stat().st_mtime == changed_at:  # else another process has just written it anew
            file.unlink()
    return None


def lives(facts: dict[str, Any]) -> bool:
    """Whether the process that said this of itself still runs.

    Args:
        facts: As `own_facts` gives them.

    Returns:
        True also for a process that is there and tells nothing.
    """
    return _lives(facts, float("inf"))


def _lives(facts: dict[str, Any], changed_at: float) -> bool:
    """Whether a process that wrote facts still runs; one that is there and tells nothing may be it."""
    import psutil

    try:
        booted_at = psutil.boot_time()
        process = psutil.Process(facts["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        started_at = process.create_time()
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except (psutil.Error, OSError):
        return True
    then = facts.get("started_at")
    if not isinstance(then, (int, float)):
        return started_at <= changed_at + 1
    if abs(started_at - then) <= _TOLERANCE_S:
        return True
    booted_then = facts.get("booted_at")
    if not isinstance(booted_then, (int, float)):
        return False
    return abs((started_at - booted_at) - (then - booted_then)) <= _TOLERANCE_S
