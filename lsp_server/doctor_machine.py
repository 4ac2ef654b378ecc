"""What `planpatch doctor` finds out about the machine: Python, packages, torch, GPUs, CPU.

Facts are read by one function and judged by another, so that the judgement can be tested without the machine. Not
covered: GPUs of other makers than NVIDIA, and whether a library that imports is also fast.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil

from engine.inference.catalogue import catalogue, memory_need_bytes
from engine.inference.cuda import why_no_triton
from engine.inference.loading import free_memory_bytes, set_runtime_defaults
from engine.inference.store_files import gigabytes

Level = Literal["ok", "warning", "problem"]

CUDA_INDEX = "https://download.pytorch.org/whl/cu128"
_GPU_MODEL = "qwen3-8b"
_LOW_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What it is, in a word or two.
        level: `ok`; `warning`: something works less well or not yet; `problem`: something needed is broken.
        detail: What was found.
        fix: What to do about it; empty when there is nothing to do.
    """

    name: str
    level: Level
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The check for programs; `ok` is false for warnings and problems."""
        return {
            "name": self.name,
            "ok": self.level == "ok",
            "level": self.level,
            "detail": self.detail,
            "fix": self.fix,
        }


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """The torch of this environment.

    Args:
        version: Its version.
        cuda: CUDA version that it was built with; None for a build without CUDA.
        gpus: Name, free and total bytes of each GPU that it can use.
        cuda_error: Why it cannot use a GPU although it was built with CUDA.
    """

    version: str
    cuda: str | None
    gpus: tuple[tuple[str, int, int], ...] = ()
    cuda_error: str = ""


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What NVIDIA's driver says; the driver's own library is asked, no program of PATH is run.

    Args:
        gpus: Name and bytes of each GPU.
        cuda: Newest CUDA version that it runs; empty if it did not say.
        error: Why it cannot be used; empty if it can.
    """

    gpus: tuple[tuple[str, int], ...] = ()
    cuda: str = ""
    error: str = ""


def pip_install(*arguments: str) -> str:
    """The command that installs into this environment.

    Args:
        *arguments: What follows `pip install`.

    Returns:
        The command, ready for a shell.
    """
    return f"{_pip()} install {' '.join(arguments)}"


def _pip() -> str:
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -I -m pip"


# --- Python and packages ---------------------------------------------------------------------------------------------


def python_checks() -> list[Check]:
    """Python, PlanPatch and how this process was started.

    Returns:
        The checks.
    """
    bits = 64 if sys.maxsize > 2**32 else 32
    found = (
        f"Python {platform.python_version()}, {bits} bit, {platform.system()} {platform.machine()}, {sys.executable}"
    )
    bad = bits == 32 or sys.version_info < (3, 10)
    fix = "Install PlanPatch with a 64-bit Python 3.10 or newer." if bad else ""
    return [Check("python", "problem" if bad else "ok", found, fix), _installed(), isolation_check(sys.flags.isolated)]


def _installed() -> Check:
    try:
        return Check("planpatch", "ok", f"planpatch {version('planpatch')}")
    except PackageNotFoundError:
        fix = "Install it in an environment of its own; python run.py demo does that in a checkout."
        return Check("planpatch", "warning", "run from its source, not installed as a package", fix)


def isolation_check(isolated: int) -> Check:
    """Whether a workspace could slip its own modules in.

    Args:
        isolated: `sys.flags.isolated`.

    Returns:
        The check.
    """
    if isolated:
        return Check("isolation", "ok", "started with -I: nothing of the current folder or PYTHONPATH is imported")
    return Check(
        "isolation",
        "warning",
        "started without -I: modules of the current folder or PYTHONPATH could be imported in place of PlanPatch's own",
        "Start it with the planpatch command, or with python -I -m lsp_server.",
    )


def package_checks() -> list[Check]:
    """Whether every package that PlanPatch needs is installed in a version that it works with.

    Returns:
        One check; none when PlanPatch itself is not installed.
    """
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires("planpatch") or ()]
    except PackageNotFoundError:
        return []  # the check above says that PlanPatch is not installed
    wanted = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [(one, found) for one in wanted if (found := _wrong_version(one.name, one.specifier)) is not None]
    if not wrong:
        return [Check("packages", "ok", f"all {len(wanted)} packages that PlanPatch needs are installed")]
    detail = ", ".join(f"{one.name} {found} (needs {one.specifier})" for one, found in wrong)
    return [Check("packages", "problem", detail, pip_install(*(f'"{one.name}{one.specifier}"' for one, _ in wrong)))]


def _wrong_version(name: str, specifier: Any) -> str | None:
    """What is installed, if that does not do."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return "is missing"
    return None if specifier.contains(found, prereleases=True) else found


# --- torch and GPUs --------------------------------------------------------------------------------------------------


def torch_checks() -> list[Check]:
    """torch, the GPUs, and whether torch can use them; importing torch takes seconds.

    Returns:
        The checks.
    """
    return judge_torch(read_torch(), read_driver(), is_windows=sys.platform == "win32")


def read_torch() -> TorchFacts:
    """Import torch and ask it.

    Returns:
        What it says.

    Raises:
        ImportError: torch is missing or one of its libraries is; on Windows also OSError.
    """
    set_runtime_defaults()
    torch: Any = importlib.import_module("torch")
    built_with = torch.version.cuda
    if not torch.cuda.is_available():
        return TorchFacts(torch.__version__, built_with, cuda_error=_cuda_error(torch) if built_with else "")
    gpus = [(torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index)) for index in range(_num_gpus(torch))]
    return TorchFacts(torch.__version__, built_with, tuple(gpus))


def _num_gpus(torch: Any) -> int:
    return int(torch.cuda.device_count())


def _cuda_error(torch: Any) -> str:
    """What torch says when it is made to use the GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as fault:
        return str(fault).strip().partition("\n")[0]
    return "torch sees no GPU"


def read_driver() -> DriverFacts | None:
    """Ask NVIDIA's driver.

    Returns:
        What it says; None when there is neither a driver nor an NVIDIA GPU on the PCI bus.
    """
    try:
        library: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return DriverFacts(error="no driver is installed") if _has_nvidia_pci_device() else None
    code = library.cuInit(0)
    if code != 0:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"").decode("utf-8", "replace")
        # CUDA_ERROR_NO_DEVICE is what a machine says that has the library and no GPU.
        return DriverFacts(error=f"the driver says: {said or f'error {code}'}") if _has_nvidia_pci_device() else None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return DriverFacts(tuple(_gpus_of(library)), cuda)


def _gpus_of(library: Any) -> list[tuple[str, int]]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    found: list[tuple[str, int]] = []
    for index in range(count.value):
        device, name, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append((name.value.decode("utf-8", "replace"), size.value))
    return found


def _has_nvidia_pci_device() -> bool:
    """Linux: a display controller of NVIDIA on the PCI bus."""
    folders = Path("/sys/bus/pci/devices")
    if not folders.is_dir():
        return False
    for folder in folders.iterdir():
        try:
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def judge_torch(torch: TorchFacts, driver: DriverFacts | None, *, is_windows: bool) -> list[Check]:
    """What torch and driver mean together.

    Args:
        torch: What torch says.
        driver: What the driver says; None without an NVIDIA GPU.
        is_windows: Whether commands are for Windows.

    Returns:
        A check of torch, one of the GPU, and one of each GPU's memory.
    """
    build = f"built with CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    found = f"torch {torch.version}, {build}"
    if torch.gpus:
        return [Check("torch", "ok", found), *(_memory_check(*gpu) for gpu in torch.gpus)]
    if driver is None:
        return [Check("torch", "ok", found), Check("gpu", "ok", "no NVIDIA GPU was found: models run on the CPU")]
    if not driver.gpus:
        fix = "Install or update NVIDIA's driver. Until then models run on the CPU."
        return [Check("torch", "ok", found), Check("gpu", "warning", f"an NVIDIA GPU is here, but {driver.error}", fix)]
    gpus = ", ".join(f"{name} ({gigabytes(size)})" for name, size in driver.gpus)
    if torch.cuda is None:
        return [
            Check("torch", "warning", f"{found}, but {gpus} is here", install_cuda_torch(is_windows=is_windows)),
            Check("gpu", "ok", f"{gpus}; its driver runs CUDA {driver.cuda}"),
        ]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    fix = (
        "Unset CUDA_VISIBLE_DEVICES, or name a GPU in it."
        if hidden is not None
        else f"Update NVIDIA's driver to one for CUDA {torch.cuda} or newer (this one is for {driver.cuda}), "
        f"or install another torch:\n{install_cuda_torch(is_windows=is_windows)}"
    )
    reason = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else torch.cuda_error
    return [
        Check("torch", "ok", found),
        Check("gpu", "warning", f"{gpus} is here, but torch cannot use it: {reason}", fix),
    ]


def install_cuda_torch(*, is_windows: bool) -> str:
    """The commands that replace a torch without CUDA; the public index of PyTorch has the builds.

    Args:
        is_windows: Whether Triton is a package of its own, which PyPI's torch for Windows does not bring.

    Returns:
        Commands, one a line.
    """
    extra = ['"bitsandbytes>=0.49"', *(['"triton-windows>=3.2"'] if is_windows else [])]
    return "\n".join(
        [f"{_pip()} uninstall -y torch", pip_install("torch", "--index-url", CUDA_INDEX), pip_install(*extra)]
    )


def _memory_check(name: str, free: int, total: int) -> Check:
    need = memory_need_bytes(catalogue()[_GPU_MODEL], "int8")
    found = f"{name}: {gigabytes(free)} of {gigabytes(total)} free; {_GPU_MODEL} in int8 needs {gigabytes(need)}"
    if free >= need:
        return Check("gpu", "ok", f"{found}, which fits")
    if total >= need:
        fix = "Close programs that use the GPU (nvidia-smi names them), or use --quantization nf4 or a smaller model."
        return Check("gpu", "warning", f"{found}, which does not fit now", fix)
    return Check("gpu", "ok", f"{found}, which does not fit: use a smaller model or --quantization nf4")


def bitsandbytes_checks() -> list[Check]:
    """Whether weights can be held in 8 bit on the GPU: one layer is run.

    Returns:
        One check.
    """
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return [Check("bitsandbytes", "ok", "not needed: models on the CPU are not quantized")]
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cuda")
        output = layer(torch.ones(1, 64, dtype=torch.float16, device="cuda"))
        bad = "" if bool(output.isfinite().all()) else "it computes values that are no numbers"
        found = f"bitsandbytes {version('bitsandbytes')}"
    except Exception as fault:  # it is a wrapper of native libraries and raises many kinds
        bad, found = f"{type(fault).__name__}: {fault}", "bitsandbytes"
    if not bad:
        return [Check("bitsandbytes", "ok", f"{found} holds weights in 8 bit on the GPU")]
    fix = f"{pip_install('--upgrade', 'bitsandbytes')}\nor use --quantization bf16 with a model that fits."
    return [Check("bitsandbytes", "problem", f"{found} cannot be used on the GPU: {bad}", fix)]


def kernel_checks() -> list[Check]:
    """Whether our own CUDA kernels can run, which need Triton.

    Returns:
        One check on a machine with a CUDA GPU, else none.
    """
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return []
    if torch.cuda.get_device_capability() < (8, 0):
        return [Check("kernels", "ok", "the GPU is older than our kernels: models run on transformers' modules")]
    reason = why_no_triton()
    if reason:
        detail = f"{reason}: models run on transformers' modules, many times slower"
        fix = pip_install("triton-windows" if os.name == "nt" else "triton") if "not installed" in reason else ""
        return [Check("kernels", "warning", detail, fix or "Install a C compiler (gcc or clang).")]
    return [Check("kernels", "ok", f"Triton {version('triton')} compiles the fast path's kernels")]


# --- CPU and memory --------------------------------------------------------------------------------------------------


def cpu_checks() -> list[Check]:
    """Cores, bf16 instructions and free memory.

    Returns:
        The checks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = sorted(_bf16_flags())
    bf16 = f"bf16 in hardware ({', '.join(flags)})" if flags else "no bf16 in hardware: bf16 works, but more slowly"
    free, total = free_memory_bytes("cpu"), int(psutil.virtual_memory().total)
    memory = f"{gigabytes(free)} of {gigabytes(total)} memory free"
    need = memory_need_bytes(min(catalogue().values(), key=lambda entry: entry.parameters), "bf16")
    low = free < max(need, _LOW_MEMORY_BYTES)
    return [
        Check("cpu", "ok", f"{cores} cores, {bf16}"),
        Check(
            "memory", "warning" if low else "ok", memory, "Close other programs before a model loads." if low else ""
        ),
    ]


def _bf16_flags() -> set[str]:
    """Of avx512_bf16, amx_bf16 and the ARM bf16, those that this CPU has, as torch or Linux tell."""
    names = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}
    torch: Any = importlib.import_module("torch")
    tell: Any = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return {name for name, has in tell().items() if name in names and has}
    cpuinfo = Path("/proc/cpuinfo")
    return names & set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()) if cpuinfo.exists() else set()
