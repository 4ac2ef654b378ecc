"""Kernels compiled ahead by another process, so that the engine serves on the reference path meanwhile.

Which kernels a model needs follows from its shapes. The runner's own launches are gone through dry, on tensors without
memory, and Triton describes each kernel instead of compiling it; a child process that knows neither the model nor the
GPU compiles what was described, into Triton's cache on disk. A stamp in that cache names the files, so that a later
start sees at once that nothing is left to compile.

Not covered: kernels of adapters that are chosen after the start; those are compiled when they are first used.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

from engine.inference.cuda import kernels as triton_kernels
from engine.inference.cuda.precompile_worker import NoDriver
from engine.inference.cuda.runner import CudaRunner
from engine.inference.cuda.verify import GreedyKernel

if TYPE_CHECKING:
    from engine.inference.loading import LoadedModel

_WORKER = Path(__file__).with_name("precompile_worker.py")
_SOURCES = (Path(__file__), _WORKER, Path(triton_kernels.__file__))


@dataclass(frozen=True, slots=True)
class KernelList:
    """The kernels of one model on one kind of GPU.

    Args:
        descriptions: One of Triton's own (`JITFunction.preload` reads them) a kernel.
        target: Backend, architecture and threads of a warp.
    """

    descriptions: tuple[str, ...]
    target: tuple[str, Any, int]

    @property
    def stamp(self) -> Path:
        """The file in Triton's cache that names the compiled ones."""
        digest = hashlib.sha256(json.dumps([self.descriptions, self.target, triton.__version__]).encode())
        for source in _SOURCES:
            digest.update(source.read_bytes())
        return Path(triton.knobs.cache.dir) / f"planpatch-{digest.hexdigest()[:32]}.json"

    def is_compiled(self) -> bool:
        """Whether all of them are in Triton's cache."""
        try:
            files = json.loads(self.stamp.read_text(encoding="utf-8"))["files"]
            return all(os.path.exists(file) for file in files)
        except (OSError, ValueError, LookupError, TypeError):
            return False


def can_describe() -> bool:
    """Whether this Triton describes kernels without compiling them (3.4 and later)."""
    return hasattr(triton, "knobs") and hasattr(triton.JITFunction, "preload") and torch.version.hip is None


def kernels_of(loaded: LoadedModel, *, num_kv_tokens: int, tuning_path: Path | None, lora_rank: int = 0) -> KernelList:
    """Every kernel that a `FusedRunner` of a model launches; compiles none.

    Args:
        loaded: The model; it stays as it is.
        num_kv_tokens: Tokens that the KV pool will hold.
        tuning_path: File of measured tile sizes.
        lora_rank: Of the adapter that it will run with besides the base; 0 for none.

    Returns:
        The list.
    """
    major, minor = torch.cuda.get_device_capability(loaded.device)
    target = GPUTarget("cuda", 10 * major + minor, 32)
    with _described(target) as found:
        dry = _DryKernels()
        runner = CudaRunner(loaded, num_kv_tokens=num_kv_tokens, tuning_path=tuning_path, dry=dry)
        runner.dry_run(lora_rank)
        _choose_dry(GreedyKernel(loaded.vocab_size, torch.device("meta"), kernels=dry), loaded.vocab_size)
    return KernelList(tuple(found), (target.backend, target.arch, target.warp_size))


def _choose_dry(greedy: GreedyKernel, vocab_size: int) -> None:
    logits = torch.empty((1, vocab_size), dtype=torch.float32, device="meta")
    allowed = torch.empty((1, vocab_size), dtype=torch.bool, device="meta")
    for seen in (None, allowed[0]):
        for mask in (None, allowed):
            greedy.launch(logits, 0, 1.0, seen, mask)


class _DryKernels:
    """The kernels' module, whose kernels are described when they are launched."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(triton_kernels, name)
        return _DryKernel(value) if isinstance(value, triton.JITFunction) else value


@dataclass(frozen=True, slots=True)
class _DryKernel:
    kernel: Any

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


@contextmanager
def _described(target: GPUTarget) -> Iterator[dict[str, None]]:
    """What Triton is about to compile is put down instead; its driver, which it builds at first use, is not asked."""
    found: dict[str, None] = {}

    def put_down(**facts: Any) -> bool:
        found[facts["compile"]["specialization_data"]] = None
        return True

    runtime, driver = triton.knobs.runtime, triton.runtime.driver
    active = getattr(driver, "_active", None)  # None: Triton finds its own when it needs one
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, put_down
    known = {kernel: kernel.device_caches for kernel in _jit_functions()}
    try:
        driver.set_active(NoDriver(target))
        for kernel in known:  # what this process has compiled or loaded is described too
            kernel.device_caches = defaultdict(kernel.create_binder)
        yield found
    finally:
        driver.set_active(active)
        runtime.jit_cache_hook = before
        for kernel, caches in known.items():
            kernel.device_caches = caches


def _jit_functions() -> list[Any]:
    return [value for value in vars(triton_kernels).values() if isinstance(value, triton.JITFunction)]


class KernelBuild:
    """A child process that compiles kernels. It touches no GPU, and ends with this process.

    Args:
        wanted: The kernels.
        on_end: Called on another thread when it has ended, well or not.
    """

    def __init__(self, wanted: KernelList, on_end: Callable[[], None]) -> None:
        self._wanted = wanted
        self._on_end = on_end
        self.is_done = False
        self.error = ""
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=_WORKER.parent,
            env={**os.environ, "TRITON_CACHE_DIR": str(triton.knobs.cache.dir)},
            creationflags=subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0,
        )
        threading.Thread(target=self._watch, name="planpatch-kernels", daemon=True).start()

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._child.kill()

    def _watch(self) -> None:
        try:
            self.error = self._talk()
        except (OSError, ValueError) as fault:
            self.error = str(fault)
        finally:
            self.is_done = True
            self._on_end()

    def _talk(self) -> str:
        """Give the job, wait, and write the stamp; returns what went wrong."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        job = {"kernels": self._wanted.descriptions, "target": self._wanted.target}
        with stdin, stdout:
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.flush()
            lines = stdout.read().decode("utf-8", "replace").strip().splitlines()
        code = self._child.wait()
        if code != 0:
            return lines[-1] if lines else f"the compiling process ended with {code}"
        files = json.loads(lines[-1])["files"]
        if len(files) < len(self._wanted.descriptions):
            return "the compiling process left kernels out"
        _write_stamp(self._wanted.stamp, files)
        return ""


def _write_stamp(stamp: Path, files: Sequence[str]) -> None:
    temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"files": files}), encoding="utf-8")
    os.replace(temporary, stamp)
