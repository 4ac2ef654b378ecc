"""LoRA adapters on a loaded model: checked against the base, switched without a reload, dropped again.

Adapters are read from safetensors only. Not covered: other methods than LoRA, and adapters that resize embeddings.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import AdapterError
from engine.inference.catalogue import is_shipped, shipped_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "__none__"

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_MEND_SHIPPED = "Install PlanPatch again; until then planpatch adapters use __none__ goes without it."
_PREFIX = "base_model.model."
_MAX_LOADED = 2  # current and previous, so that an A/B run switches without reading files


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder that was read but not loaded.

    Args:
        folder: The folder.
        digest: sha256 of its configuration and weights.
        base_model: What its configuration says it was trained on; may be empty or a path of another machine.
        shapes: Shape of each tensor, by name.
    """

    folder: Path
    digest: str
    base_model: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max((shape[0] for name, shape in self.shapes.items() if ".lora_A" in name and shape), default=0)


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter folder's configuration and tensor shapes.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        What it holds.

    Raises:
        AdapterError: A file is missing or damaged, or it is no LoRA adapter.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"The adapter folder {folder} does not exist", hint="planpatch adapters list shows which do."
        )
    config_path, weights_path = folder / _CONFIG, folder / _WEIGHTS
    if not weights_path.is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(f"{folder} holds pickle weights, which are never loaded", hint=f"Save it as {_WEIGHTS}.")
    try:
        config_bytes = config_path.read_bytes()
        config: dict[str, Any] = json.loads(config_bytes)
        shapes = _tensor_shapes(weights_path)
        digest = hashlib.sha256(config_bytes + hashlib.sha256(weights_path.read_bytes()).digest()).hexdigest()
        adapter_type = config.get("peft_type")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error) as fault:
        raise AdapterError(
            f"The adapter in {folder} cannot be read: {fault}",
            hint=_MEND_SHIPPED if is_shipped(str(folder)) else "Train or copy it again.",
        ) from fault
    shipped = shipped_named(folder.name) if is_shipped(str(folder)) else None
    if shipped is not None and digest != shipped.digest:
        raise AdapterError(
            f"The adapter in {folder} is not the one that came with PlanPatch (sha256 {digest[:12]}…)",
            hint=_MEND_SHIPPED,
        )
    if adapter_type != "LORA":
        raise AdapterError(f"The adapter in {folder} is of type {adapter_type}; only LORA is supported")
    return AdapterFiles(folder, digest, str(config.get("base_model_name_or_path") or ""), shapes)


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from a safetensors header (an 8-byte little-endian length, then JSON), checked against the file's size."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100_000_000:
            raise ValueError(f"{path.name} is not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {8 + length + end}: it is cut off")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def check_fits(adapter: AdapterFiles, model: PreTrainedModel) -> None:
    """Check every tensor of an adapter against the layer of the base that it changes.

    Args:
        adapter: The adapter.
        model: The base, without adapters or with some.

    Raises:
        AdapterError: It was made for another base.
    """
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    num_found = 0
    for name, shape in adapter.shapes.items():
        layer_name, mark, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not mark:
            raise AdapterError(
                f"{adapter.folder}: the tensor {name} is no LoRA weight", hint="Train it again with peft."
            )
        layer = modules.get(layer_name)
        fits = getattr(layer, "in_features" if kind.startswith("A") else "out_features", None)
        wanted = (shape[-1] if kind.startswith("A") else shape[0]) if shape else 0
        if fits is None or fits != wanted:
            needs = f"{wanted} inputs" if kind.startswith("A") else f"{wanted} outputs"
            has = "there is none" if layer is None else f"it has {fits}"
            raise AdapterError(
                f"The adapter in {adapter.folder} was made for another base model"
                f"{f' ({adapter.base_model})' if adapter.base_model else ''}: "
                f"it needs a layer {layer_name} with {needs}, and {has}",
                hint="Use an adapter that was trained on this model, or planpatch adapters use __none__.",
            )
        num_found += 1
    if num_found == 0:
        raise AdapterError(f"The adapter in {adapter.folder} holds no weights", hint="Train it again.")


class AdapterSwitch:
    """Which adapter a model runs with. The engine's thread owns it.

    Args:
        model: The base model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._loaded: OrderedDict[str, Path] = OrderedDict()
        self.active = BASE

    def activate(self, adapter: AdapterFiles | None) -> None:
        """Run with `adapter` from now on, None for the base alone.

        Raises:
            AdapterError: It does not fit the base, or cannot be loaded.
        """
        from engine.inference.cpu import shorten_lora

        digest = adapter.digest if adapter else BASE
        if digest == self.active:
            return
        if adapter is None:
            self._model.disable_adapters()
        else:
            self._load(adapter)
            self._model.set_adapter(_peft_name(digest))
            self._model.enable_adapters()
        if self._model.device.type == "cpu":
            shorten_lora(self._model, None if adapter is None else _peft_name(digest))
        self.active = digest

    def _load(self, adapter: AdapterFiles) -> None:
        if adapter.digest in self._loaded:
            self._loaded.move_to_end(adapter.digest)
            return
        from engine.inference.loading import quiet_transformers

        check_fits(adapter, self._model)
        try:
            with quiet_transformers():
                self._model.load_adapter(str(adapter.folder), adapter_name=_peft_name(adapter.digest))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as fault:
            raise AdapterError(f"The adapter in {adapter.folder} cannot be loaded: {fault}") from fault
        self._loaded[adapter.digest] = adapter.folder
        while len(self._loaded) > _MAX_LOADED:
            dropped, _ = self._loaded.popitem(last=False)
            self._model.delete_adapter(_peft_name(dropped))


def _peft_name(digest: str) -> str:
    return f"adapter_{digest[:16]}"
