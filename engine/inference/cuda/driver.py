"""What Triton and torch's allocator do not ask of CUDA's driver by themselves."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWING = "expandable_segments:True"


def allow_shared_memory(compiled: Any) -> None:
    """Let a kernel be launched with more than 48 kB of shared memory, what its assembly declares included.

    Triton asks for it by what it allocates itself; the driver counts both.

    Args:
        compiled: What `kernel.warmup` returns.

    Raises:
        OSError: There is no CUDA driver.
        RuntimeError: The device has less.
    """
    compiled._init_handles()
    function = ctypes.c_void_p(compiled.function)
    status = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, compiled.metadata.shared)
    if status != 0:
        raise RuntimeError(f"{compiled.metadata.shared} bytes of shared memory were refused: CUDA error {status}")


@contextmanager
def whole_segments() -> Iterator[None]:
    """Allocations of more than 10 MB made in here are segments of their own, not parts of one that grows by 20 MB.

    A growing segment keeps what is left of 20 MB at both ends of each hole. Torch then takes no growing segment's
    memory for new tensors. Without effect where segments do not grow, or torch cannot change its mind.
    """
    settings = next((os.environ[name] for name in _SETTINGS if name in os.environ), "")
    is_changed = _GROWING in settings and _change_allocator(settings.replace(_GROWING, "expandable_segments:False"))
    try:
        yield
    finally:
        if is_changed:
            _change_allocator(settings)


def _change_allocator(settings: str) -> bool:
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is None:
        return False
    try:
        change(settings)
    except RuntimeError:  # then a little more memory is taken
        return False
    return True


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
