"""The fast path on one CUDA device. Importing this package loads neither torch nor Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys


def why_no_triton() -> str:
    """Why Triton cannot run on this machine; empty if it can. Ask before `engine.inference.cuda.runner` is imported.

    Returns:
        The reason, in words for the user.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed" + (" (triton-windows)" if sys.platform == "win32" else "")
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    if sys.platform != "win32" and not any(shutil.which(name) for name in compilers if name):
        return "Triton needs a C compiler, and there is neither gcc nor clang"
    return ""
