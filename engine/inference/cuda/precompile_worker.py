"""A script of its own: compiles the kernels that a line of JSON on its input describes, and ends when the input does.

It loads no torch and opens no GPU. Its last line of output is JSON with the files that it made, or the error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any


class NoDriver:
    """What Triton asks a driver while it compiles.

    Args:
        target: A `GPUTarget`.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target


def compile_kernels(descriptions: list[str], target: tuple[str, Any, int]) -> list[str]:
    """Compile kernels of `kernels.py` into Triton's cache.

    Args:
        descriptions: Triton's own.
        target: Backend, architecture and threads of a warp.

    Returns:
        For each kernel the file in the cache that is written last.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    triton.runtime.driver.set_active(NoDriver(GPUTarget(*target)))
    from engine.inference.cuda import kernels

    by_name = {f"{value.fn.__module__}.{value.fn.__qualname__}": value for value in _jit_functions(triton, kernels)}
    pairs = [(by_name[json.loads(one)["name"]], one) for one in descriptions]
    for kernel in by_name.values():
        _ = kernel.device_caches[0]  # made once, not by each thread
    make_launcher = _launcher_maker()

    def compile_one(pair: tuple[Any, str]) -> str:
        compiled = pair[0].preload(pair[1])
        make_launcher(compiled)
        return next(file for name, file in compiled.metadata_group.items() if name.endswith(".json"))

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        return list(pool.map(compile_one, pairs))


def _jit_functions(triton: Any, module: Any) -> list[Any]:
    return [value for value in vars(module).values() if isinstance(value, triton.JITFunction)]


def _launcher_maker() -> Any:
    """What builds the C function that starts a kernel; without it the first launch does."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils  # pyright: ignore[reportMissingImports]

        CudaUtils()
    except Exception:  # no driver here, or another Triton
        return lambda compiled: None

    def make(compiled: Any) -> None:
        with suppress(Exception):
            CudaLauncher(compiled.src, compiled.metadata)

    return make


def _end_with_input() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when Python ends
        pass
    os._exit(3)


def main() -> int:
    """Read the job, do it and say how it went.

    Returns:
        0, or 1 after an error.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1 << 16)
        if not byte:
            return 3
        line += byte
    job = json.loads(line)
    threading.Thread(target=_end_with_input, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(5)  # the engine serves meanwhile
    try:
        files = compile_kernels(job["kernels"], tuple(job["target"]))
    except Exception as fault:  # every failure is the parent's to explain
        print(f"{type(fault).__name__}: {' '.join(str(fault).split())[:500]}", flush=True)
        return 1
    print(json.dumps({"files": files}), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
