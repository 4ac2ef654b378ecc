"""What an editor shows of learning: the adapters, with the A/B gate's figures, and the training run that goes on.

`training` writes it: `manifest.json` in an adapter's folder, `progress.json` in that of a run, `.NAME-vN.partial`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from engine.errors import AdapterError
from engine.inference.adapters import read_adapter

_TOLERANCE_S = 2.0


def known_adapters(trained: Path, current: Path | None) -> list[dict[str, Any]]:
    """The adapters that training made, and the current one wherever it lies.

    Args:
        trained: Folder of adapter folders.
        current: The adapter that is used; None for the base model.

    Returns:
        `{folder, used, base, state, evaluation}` each: `state` is `ok` or why it cannot be used, `evaluation` the
        figures of the A/B gate, None where there are none.
    """
    folders = sorted(path.parent for path in trained.glob("*/adapter_config.json"))
    if current is not None and current not in folders:
        folders.append(current)
    return [_facts(folder, is_used=folder == current) for folder in folders]


def training_run(trained: Path) -> dict[str, Any] | None:
    """How far the training run is that goes on now.

    Args:
        trained: Folder of adapter folders.

    Returns:
        `{run, step, numSteps, leftS}`, `leftS` None while it is not known; None if nothing is trained.
    """
    for file in sorted(trained.glob(".*.partial/progress.json")) if trained.is_dir() else ():
        progress = _progress_of(file)
        if progress.get("state") not in ("done", "failed", "stopped") and _lives(progress):
            run = re.sub(r"\A\.|\.partial\Z", "", file.parent.name)
            step, num_steps, left_s = (progress.get(name) for name in ("step", "num_steps", "left_s"))
            return {"run": run, "step": step or 0, "numSteps": num_steps or 0, "leftS": left_s}
    return None


def training_end(trained: Path, run: str) -> dict[str, Any]:
    """What became of a run that does not go on any more.

    Args:
        trained: Folder of adapter folders.
        run: Its name and version.

    Returns:
        `{run, state, message}`: `done` when its adapter is there, `failed` or `stopped` with what it said last,
        `cut off` when it said nothing, as after a kill.
    """
    if (trained / run / "manifest.json").is_file():
        return {"run": run, "state": "done", "message": ""}
    progress = _progress_of(trained / f".{run}.partial" / "progress.json")
    if progress.get("state") in ("failed", "stopped"):
        return {"run": run, "state": progress["state"], "message": str(progress.get("message") or "")}
    return {"run": run, "state": "cut off", "message": ""}


def _progress_of(file: Path) -> Mapping[str, Any]:
    """What a run says; nothing where it is being written, or ended just now."""
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("Mapping[str, Any]", found if isinstance(found, dict) else {})


def _lives(progress: Mapping[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(progress["pid"]))
        is_it = abs(process.create_time() - float(progress["started_at"])) < _TOLERANCE_S
        return is_it and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _facts(folder: Path, *, is_used: bool) -> dict[str, Any]:
    try:
        base, state = read_adapter(folder).base_model, "ok"
        evaluation = _evaluation(folder / "manifest.json")
    except (AdapterError, OSError, ValueError) as fault:
        base, state, evaluation = "", str(fault), None
    return {"folder": str(folder), "used": is_used, "base": base, "state": state, "evaluation": evaluation}


def _evaluation(manifest: Path) -> object:
    """Raises OSError or ValueError where there is a manifest that cannot be read."""
    if not manifest.is_file():
        return None
    found: object = json.loads(manifest.read_text(encoding="utf-8"))
    return cast("Mapping[str, object]", found).get("evaluation") if isinstance(found, Mapping) else None
