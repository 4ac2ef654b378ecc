"""Tensors of a safetensors file as transformers' loader takes them, read through pinned memory by a few threads: a page
cache gives many gigabytes a second that way, and a mapped file about one. They read while Python imports transformers.

Nobody else touches the device meanwhile: the engine's thread owns the model from the moment that it is loaded.
"""

from __future__ import annotations

import json
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_BUFFER_BYTES = 16_000_000
_NUM_THREADS = 4


class FastReader:
    """One file.

    Args:
        path: A safetensors file.
        device: Where tensors go.

    Raises:
        OSError: It cannot be read.
        ValueError: It is cut short.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        self._own = threading.local()
        self._read: dict[str, Future[torch.Tensor]] = {}
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"{path} is cut short")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.tensors = {
            name: LazyTensor(self, name, facts["dtype"], tuple(facts["shape"]), 8 + length + facts["data_offsets"][0])
            for name, facts in header.items()
        }
        pool = ThreadPoolExecutor(_NUM_THREADS, "planpatch-read")
        for one in sorted(self.tensors.values(), key=lambda one: one.start):
            self._read[one.name] = pool.submit(self._read_one, one)
        pool.shutdown(wait=False)

    def take(self, name: str) -> torch.Tensor:
        """A tensor on the device, once it is read; the reader keeps no hold of it.

        Raises:
            ValueError: The file is cut short.
        """
        return self._read.pop(name).result()

    def close(self) -> None:
        """Read nothing more, and wait for what is being read."""
        left = list(self._read.values())
        self._read.clear()
        for future in left:
            future.cancel()
        for future in left:
            if not future.cancelled():
                future.exception()

    def _read_one(self, one: LazyTensor) -> torch.Tensor:
        tensor = torch.empty(one.shape, dtype=_DTYPES[one.get_dtype()], device=self._device)
        target = tensor.reshape(-1).view(torch.uint8)
        buffers = self._buffers()
        with self._path.open("rb", buffering=0) as file:
            file.seek(one.start)
            for place, at in enumerate(range(0, len(target), _BUFFER_BYTES)):
                buffer, event = buffers[place % len(buffers)]
                part = target[at : at + _BUFFER_BYTES]
                if event is not None:
                    event.synchronize()
                _fill(file, memoryview(buffer[: len(part)].numpy().data))
                part.copy_(buffer[: len(part)], non_blocking=True)
                if event is not None:
                    event.record(torch.cuda.current_stream(self._device))
        for _, event in buffers:
            if event is not None:
                event.synchronize()
        return tensor

    def _buffers(self) -> list[tuple[torch.Tensor, Any]]:
        """This thread's."""
        if not hasattr(self._own, "buffers"):
            is_cuda = self._device.type == "cuda"
            self._own.buffers = [
                (
                    torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=is_cuda),
                    torch.cuda.Event() if is_cuda else None,
                )
                for _ in range(2)
            ]
        return self._own.buffers


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """What stands for a tensor until transformers takes it, with the methods of safetensors' slices.

    Args:
        name: Of the tensor.
        shape: Its shape.
        start: Of its bytes in the file.
    """

    _reader: FastReader
    name: str
    _dtype: str
    shape: tuple[int, ...]
    start: int

    def get_dtype(self) -> str:
        """Its dtype in safetensors' words."""
        return self._dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def __getitem__(self, key: object) -> torch.Tensor:
        """The whole of it, on the device; nothing asks for less."""
        assert key is Ellipsis, "a tensor is read as a whole"
        return self._reader.take(self.name)


def _fill(file: Any, view: memoryview) -> None:
    while len(view):
        num_read = file.readinto(view)
        if not num_read:
            raise ValueError("the file is cut short")
        view = view[num_read:]
