"""Weights as bitsandbytes quantized them, kept beside the model so that a later start reads half the bytes, or less.

    MODEL/quantized/
        int8-float16-0.50.2-1f00c0ffee00/     quantization, other weights, bitsandbytes, digest of the source
            model.safetensors, config.json    as transformers' save_pretrained would write them
            planpatch-quantized.json          what they were made from; written last
        .….partial-4711/                      being written by process 4711

They are written in pieces while nobody waits for the model (`QuantizedFiles.saving`), and appear by one rename. What
was made from other weights or by another bitsandbytes is not read, and goes when new ones are written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import PlanPatchError, WriteError
from engine.inference.store_files import (
    delete_folder,
    disk_free_bytes,
    gigabytes,
    nearest_existing,
    rename,
    sync_file,
    writing,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("planpatch.engine")

WEIGHTS = "model.safetensors"
_FACTS = "planpatch-quantized.json"
_FORMAT = 1
_PIECE_BYTES = 32_000_000  # a request waits for at most so much
_SPARE_BYTES = 2_000_000_000  # that stay free on the disk
_WORDS = {"int8": "8-bit", "nf4": "4-bit"}
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class QuantizedFiles:
    """One model's quantized weights on disk, there or not.

    Args:
        root: Folder for all quantizations of the model.
        digest: sha256 that names the source's weights.
        quantization: `int8` or `nf4`.
        dtype: Of the other weights, such as `float16`.
    """

    def __init__(self, root: Path, digest: str, quantization: str, dtype: str) -> None:
        try:
            bitsandbytes = version("bitsandbytes")
        except PackageNotFoundError:
            bitsandbytes = "none"
        self._facts = {
            "format": _FORMAT, "digest": digest, "quantization": quantization, "dtype": dtype,
            "bitsandbytes": bitsandbytes,
        }  # fmt: skip
        self._root = root
        self._what = f"the {_WORDS[quantization]} weights"
        self.folder = root / f"{quantization}-{dtype}-{bitsandbytes}-{digest[:12]}"

    def are_there(self) -> bool:
        """Whether they are whole and were made from this source, this way."""
        try:
            facts = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
            return facts.pop("bytes") == (self.folder / WEIGHTS).stat().st_size and facts == self._facts
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def remove(self) -> None:
        """Delete what cannot be read."""
        delete_folder(self.folder)

    def saving(self, model: PreTrainedModel) -> Iterator[str]:
        """Write a model's weights piece by piece; a failure is logged and ends it, and what was written goes.

        Args:
            model: Quantized; the thread that owns it takes the steps.

        Yields:
            What is going on, for people, after each piece of at most 32 MB.
        """
        partial = self._root / f".{self.folder.name}.partial-{os.getpid()}"
        is_whole = False
        try:
            self._delete_old()
            tensors = _tensors_of(model)
            total = sum(tensor.nbytes for _, tensor in tensors)
            if (free := disk_free_bytes(nearest_existing(self._root))) < total + _SPARE_BYTES:
                log.warning(
                    "%s are not kept for faster starts: they take %s, and %s are free (keep_quantized=false ends this)",
                    self._what, gigabytes(total), gigabytes(free),
                )  # fmt: skip
                return
            with writing(partial):
                partial.mkdir(parents=True, exist_ok=True)
                model.config.save_pretrained(partial)
                with (partial / WEIGHTS).open("wb") as file:
                    file.write(_header(tensors))
                    done = 0
                    for piece in _pieces(tensors):
                        file.write(piece)
                        done += len(piece)
                        yield f"Keeping {self._what} for faster starts: {100 * done // total}% of {gigabytes(total)}"
                facts = {**self._facts, "bytes": (partial / WEIGHTS).stat().st_size}
                (partial / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            is_whole = True
        except (WriteError, OSError) as fault:
            log.warning("%s are not kept for faster starts: %s", self._what, fault)
        finally:
            if not is_whole:
                delete_folder(partial)
        threading.Thread(target=self._finish, args=(partial,), name="planpatch-quantized", daemon=True).start()

    def _finish(self, partial: Path) -> None:
        """The disk may take seconds for this, and the model is not needed."""
        try:
            sync_file(partial / WEIGHTS)
            with writing(self.folder):
                if self.folder.exists():  # damaged, or another process was faster
                    delete_folder(self.folder)
                rename(partial, self.folder)
            log.info("%s are kept for faster starts: %s", self._what, self.folder)
        except (PlanPatchError, OSError) as fault:
            log.warning("%s are not kept for faster starts: %s", self._what, fault)
            delete_folder(partial)

    def _delete_old(self) -> None:
        import psutil

        prefix = f"{self._facts['quantization']}-{self._facts['dtype']}-"
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            name, mark, process = folder.name.removeprefix(".").partition(".partial-")
            is_lost = mark and not (process.isdigit() and psutil.pid_exists(int(process)))
            if is_lost or (not mark and name.startswith(prefix)):
                shutil.rmtree(folder, ignore_errors=True)


def _tensors_of(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """What is saved, by name: without adapters, tied weights once, wide elements first as safetensors wants it."""
    found: dict[str, torch.Tensor] = {}
    places: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if "lora_" in name or (tensor.numel() > 1 and place in places):
            continue
        places.add(place)
        found[name.replace(".base_layer.", ".")] = tensor
    return sorted(found.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: list[tuple[str, torch.Tensor]]) -> bytes:
    """Length and JSON at the beginning of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    import torch

    for _, tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(data), _PIECE_BYTES):
            yield memoryview(data[start : start + _PIECE_BYTES].cpu().numpy().data)
