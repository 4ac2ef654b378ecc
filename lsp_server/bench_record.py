"""With which options a file of results was made, kept beside it, so that `--resume` does not mix two measurements.

Not covered: a model folder whose files changed meanwhile, or `auto` on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from engine.errors import UsageError
from engine.inference.adapters import BASE
from engine.patching.disk import write_atomically
from lsp_server.session import Session

_COMPARED = (
    "model",
    "quantization",
    "dtype",
    "format",
    "plan_max_new_tokens",
    "plan_repetition_penalty",
    "plan_temperature",
    "plan_top_k",
    "plan_top_p",
    "patch_max_new_tokens",
    "patch_tokens_per_function_token",
    "patch_extra_tokens",
    "patch_extra_tokens_class",
    "patch_repetition_penalty",
    "patch_temperature",
    "patch_top_k",
    "patch_top_p",
    "surroundings_chars",
    "context_tokens",
    "style",
)


def run_options(session: Session, *, with_plan: bool) -> dict[str, Any]:
    """What changes the answers of a run.

    Args:
        session: The settings.
        with_plan: Whether each case is planned first.

    Returns:
        Option or setting by name.

    Raises:
        AdapterError: The adapter that is named does not exist.
    """
    settings = {name: getattr(session.settings, name) for name in _COMPARED}
    return {**settings, "adapter": str(session.adapter() or BASE), "plan": with_plan}


def keep_or_compare(results: Path, options: Mapping[str, Any], *, has_lines: bool) -> None:
    """Record the options of a new run; refuse to go on with a run that had other ones.

    Args:
        results: The file of results.
        options: What `run_options` gave.
        has_lines: Whether it has results; those without a record are gone on with as they are.

    Raises:
        UsageError: The run was made with other options; the message names them.
        WriteError: The record cannot be written.
    """
    path = results.with_name(results.name + ".run.json")
    if has_lines:
        _compare(path, options)
    elif results.is_file():
        write_atomically(path, json.dumps(options, indent=2).encode("ascii") + b"\n", expected_sha256=None)


def _compare(path: Path, options: Mapping[str, Any]) -> None:
    try:
        recorded: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", hint="Remove it, or start over without --resume."
        ) from error
    known = cast("dict[str, Any]", recorded) if isinstance(recorded, dict) else {}
    differing = [name for name in options if name in known and known[name] != options[name]]
    if differing:
        told = "; ".join(f"{name} was {known[name]!r} and is {options[name]!r}" for name in differing)
        raise UsageError(
            f"These results were made with other options: {told}",
            hint="Give the same options, another --out, or start over without --resume.",
            differing=differing,
        )
