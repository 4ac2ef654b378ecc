"""What Triton does not ask of CUDA's driver."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute


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


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
