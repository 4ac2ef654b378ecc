"""Python read for the event loop: on threads of its own, so that a slow file keeps nothing else waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from engine.patching.parser_process import Call

P = ParamSpec("P")
T = TypeVar("T")

_NUM_THREADS = 4


class Reader:
    """Awaits calls of functions that parse.

    Args:
        call: Where they are made.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "planpatch-read")

    async def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function.

        Args:
            work: The function.
            *args: Its arguments.
            **kwargs: More of them.

        Returns:
            What it returns.

        Raises:
            EngineError: The process that reads Python failed, or is closed.
        """
        call = partial(self._call, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """Give the threads up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
