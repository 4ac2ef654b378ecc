"""The adapters that an editor offers, with what training and the A/B gate wrote of each into its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from engine.errors import AdapterError
from engine.inference.adapters import read_adapter


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
