"""Free memory of the C heap, given back to the system.

KV caches are many middle-sized blocks that come and go. glibc keeps the pages between those that stay, so that a server
comes to hold a gigabyte of nothing. Where the C library is another one, nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

_INTERVAL_S = 10.0


def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return None


class HeapTrimmer:
    """Trims the heap now and then. `malloc_trim` (glibc 2.8 and later) walks all arenas: milliseconds a gigabyte."""

    def __init__(self) -> None:
        self._malloc_trim = _malloc_trim()
        self._trimmed_at = time.monotonic()

    def trim(self) -> None:
        """Give back what is free, unless that was done a moment ago."""
        if self._malloc_trim is not None and time.monotonic() - self._trimmed_at >= _INTERVAL_S:
            self._malloc_trim(0)
            self._trimmed_at = time.monotonic()
