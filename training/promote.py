"""Adapters as versioned folders, and the gate: which of them may take the place of what runs.

An adapter is promoted when its evaluation says that it is better on held-out edits, is no worse at giving patches that
the gates pass, and has forgotten nothing that the general tasks would show. The figures stand in its manifest, beside
the digests of the very weights and base that they were measured with.

Not covered: whether the held-out edits are like those to come.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from engine.errors import AdapterError, PathError, PlanPatchError, UsageError, WriteError
from engine.inference.adapters import read_adapter
from engine.inference.catalogue import shipped_named
from engine.patching.disk import read_bytes, write_atomically
from engine.patching.ledger_records import iso_utc

MANIFEST = "manifest.json"
_CONFIG = "adapter_config.json"
_FIGURES = frozenset({"adapter_digest", "base_digest", "edits", "general"})
_MOST_LOST = 0.10  # of the general tasks or of the valid patches; fewer are within the noise of so few tasks


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An adapter's folder and what is known of it.

    Args:
        folder: Absolute.
        manifest: What training and evaluation wrote; empty where there is none.
        digest: sha256 of configuration and weights; empty where they cannot be read.
        base: What it says it was trained on.
        fault: Why it cannot be used; empty if it can.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])
    digest: str = ""
    base: str = ""
    fault: str = ""

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Its figures, if it was evaluated with these very weights; else empty."""
        found: object = self.manifest.get("evaluation")
        figures = cast("dict[str, Any]", found) if isinstance(found, dict) else dict[str, Any]()
        is_whole = figures.keys() >= _FIGURES
        return figures if is_whole and figures["adapter_digest"] == self.digest else {}

    @property
    def base_digest(self) -> str | None:
        """sha256 of the model that it was trained on, or else evaluated on; None if neither is known."""
        base: object = self.manifest.get("base")
        trained_on = cast("dict[str, Any]", base).get("digest") if isinstance(base, dict) else None
        return trained_on or self.evaluation.get("base_digest")

    @property
    def rows(self) -> frozenset[str]:
        """Ids of the edits that it was trained on, as far as its manifest says."""
        found: object = self.manifest.get("row_ids")
        return frozenset(map(str, cast("list[object]", found))) if isinstance(found, list) else frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate says.

    Args:
        against: Every reason not to promote; none if the adapter passed.
        why: What speaks for it, in words.
    """

    against: tuple[str, ...]
    why: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.against

    def to_json(self) -> dict[str, Any]:
        """The decision for programs."""
        return {"passed": self.is_passed, "against": list(self.against), "why": self.why}


# --- folders ---------------------------------------------------------------------------------------------------------


def list_versions(out: Path, more: Iterable[Path] = ()) -> list[AdapterVersion]:
    """The adapters of a folder, and others that are named; the newest last.

    Args:
        out: `training/qlora-out`; need not exist. What is being trained there is left out.
        more: Further adapter folders.

    Returns:
        One each.
    """
    folders = [config.parent for config in out.glob(f"*/{_CONFIG}") if not config.parent.name.startswith(".")]
    folders = list(dict.fromkeys([*folders, *more]))
    return [read_version(folder) for folder in sorted(folders, key=_age)]


def _age(folder: Path) -> tuple[float, str]:
    config = folder / _CONFIG
    return (config.stat().st_mtime if config.exists() else 0.0, folder.name)


def read_version(folder: Path) -> AdapterVersion:
    """An adapter's folder.

    Args:
        folder: The folder.

    Returns:
        What is known of it; `fault` says what is wrong with it.
    """
    try:
        manifest = _read_manifest(folder)
        files = read_adapter(folder)
    except PlanPatchError as error:
        return AdapterVersion(folder, fault=error.message)
    base: object = manifest.get("base")
    name = str(cast("dict[str, Any]", base).get("name", "")) if isinstance(base, dict) else ""
    return AdapterVersion(folder, manifest, files.digest, name or files.base_model)


def find_version(out: Path, name: str | None) -> AdapterVersion:
    """The adapter that a user names.

    Args:
        out: `training/qlora-out`.
        name: A version's name, or a folder; None for the newest.

    Returns:
        The adapter.

    Raises:
        UsageError: There is none of that name.
        AdapterError: It cannot be used.
    """
    if name is None:
        versions = [one for one in list_versions(out) if not one.fault]
        if not versions:
            raise UsageError(f"There is no adapter in {out}", hint="planpatch train qlora makes one.")
        return versions[-1]
    if shipped_named(name) is not None and not (out / name).is_dir():
        raise UsageError(
            f"{name} ships with PlanPatch; it was measured before",
            hint="planpatch adapters use auto goes back to it.",
        )
    inside = out / name
    folder = inside if Path(name).name == name and inside.is_dir() else Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"There is no adapter {name} in {out}, and no such folder", hint="planpatch adapters list")
    version = read_version(folder)
    if version.fault:
        raise AdapterError(version.fault, hint="Train it again.")
    return version


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        value: object = json.loads(read_bytes(folder / MANIFEST))
    except PathError:
        if (folder / MANIFEST).exists():
            raise
        return {}
    except ValueError as error:
        raise AdapterError(f"{folder / MANIFEST} is damaged: {error}", hint="Remove it; the figures go.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{folder / MANIFEST} is damaged: it is no JSON object", hint="Remove it; the figures go.")
    return cast("dict[str, Any]", value)


def write_evaluation(version: AdapterVersion, figures: Mapping[str, Any]) -> AdapterVersion:
    """Keep an evaluation in an adapter's manifest, in place of an older one.

    Args:
        version: The adapter, as it was evaluated.
        figures: What was measured; `adapter_digest` and `evaluated_at` are added.

    Returns:
        The adapter with it.

    Raises:
        WriteError: The manifest cannot be written.
        AdapterError: The folder changed meanwhile.
    """
    facts = {**figures, "adapter_digest": version.digest, "evaluated_at": _now()}
    return _rewrite(version, {"evaluation": facts})


def note_promotion(version: AdapterVersion, decision: Decision, *, is_insisted: bool) -> AdapterVersion:
    """Write into an adapter's manifest that it was promoted, and what spoke against that.

    Args:
        version: The adapter.
        decision: What the gate said.
        is_insisted: Whether the user wanted it all the same.

    Returns:
        The adapter with it.

    Raises:
        WriteError: The manifest cannot be written.
        AdapterError: The folder changed meanwhile.
    """
    earlier: object = version.manifest.get("promotions")
    promotions = list(cast("list[Any]", earlier)) if isinstance(earlier, list) else []
    promotion = {"at": _now(), "insisted": is_insisted, **decision.to_json()}
    return _rewrite(version, {"promotions": [*promotions, promotion]})


def _rewrite(version: AdapterVersion, changes: Mapping[str, Any]) -> AdapterVersion:
    if read_adapter(version.folder).digest != version.digest:
        raise AdapterError(f"{version.folder} changed meanwhile", hint="Evaluate it again.")
    manifest = {**_read_manifest(version.folder), **changes}
    data = (json.dumps(manifest, indent=1) + "\n").encode()
    write_atomically(version.folder / MANIFEST, data, expected_sha256=None, private=True)
    return AdapterVersion(version.folder, manifest, version.digest, version.base)


def _now() -> str:
    return iso_utc(datetime.now(timezone.utc))


# --- the gate --------------------------------------------------------------------------------------------------------


def decide(version: AdapterVersion, base_digest: str) -> Decision:
    """Whether an adapter may be promoted.

    Args:
        version: The adapter, with its evaluation.
        base_digest: sha256 of the model that it is to run on.

    Returns:
        The decision, with every reason against it.
    """
    figures = version.evaluation
    if not figures:
        measured_before = "evaluation" in version.manifest
        return Decision(
            ("its weights are not those that were evaluated" if measured_before else "it was never evaluated",)
        )
    if figures.get("base_digest") != base_digest:
        return Decision(("it was evaluated on another base model than the one that is used",))
    edits, general = figures["edits"], figures["general"]
    against = [
        *_not_better(edits),
        *_worse("patches that the gates pass", edits["valid"], edits["rows"]),
        *(
            ["the general tasks were left out"]
            if general is None
            else _worse("general tasks", general["passed"], general["tasks"])
        ),
    ]
    return Decision(tuple(against), _said("edits as you kept them", edits))


def _not_better(edits: Mapping[str, Any]) -> list[str]:
    right = edits["right"]
    low, high = right["interval"]
    if low > 0 and right["p"] < 0.05:
        return []
    if high < 0:
        return [f"it is worse: {_said('edits as you kept them', edits)}"]
    few = "" if low <= 0 else f" and the exact test gives p = {right['p']:.2f}: there are too few edits"
    return [f"it is not shown to be better: {_said('edits as you kept them', edits)}{few or ', which holds zero'}"]


def _worse(what: str, compared: Mapping[str, Any], num_rows: int) -> list[str]:
    if compared["difference"] >= -_MOST_LOST and compared["interval"][1] >= 0:
        return []
    return [f"it lost {compared['lost']} and won {compared['won']} of {num_rows} {what}"]


def _said(what: str, edits: Mapping[str, Any]) -> str:
    low, high = edits["right"]["interval"]
    rows = edits["rows"]
    return (
        f"{what}: {edits['base']['right']} of {rows} without it, {edits['candidate']['right']} with it; "
        f"the difference's 95% interval is {low:+.0%} to {high:+.0%}"
    )


# --- removing --------------------------------------------------------------------------------------------------------


def remove_version(folder: Path) -> None:
    """Delete an adapter's folder. It loses its name first, so that a kill leaves nothing that can be loaded.

    Args:
        folder: The adapter's.

    Raises:
        WriteError: It cannot be deleted.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    try:
        for leftover in folder.parent.glob(".*.removed"):
            with suppress(OSError):  # another's; the next removal tries again
                _delete(leftover)
        folder.replace(doomed)
        _delete(doomed)
    except OSError as fault:
        raise WriteError(
            f"{folder} cannot be deleted: {fault.strerror or fault}", hint="Close what holds it and try again."
        ) from fault


def _delete(folder: Path) -> None:
    """A folder with what is in it; of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
