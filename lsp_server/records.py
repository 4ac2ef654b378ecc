"""The ledger as the event loop uses it: opened at the first use, asked on other threads, closed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Entry

T = TypeVar("T")


class Records:
    """See the module's docstring.

    Args:
        open_ledger: Opens it.
    """

    def __init__(self, open_ledger: Callable[[], Ledger]) -> None:
        self._open = open_ledger
        self._ledger: Ledger | None = None
        self._opening = asyncio.Lock()

    async def ledger(self) -> Ledger:
        """The ledger.

        Returns:
            The same one each time.

        Raises:
            LedgerError: It cannot be opened.
        """
        async with self._opening:
            if self._ledger is None:
                self._ledger = await asyncio.to_thread(self._open)
        return self._ledger

    async def do(self, work: Callable[[Ledger], T]) -> T:
        """Do something with the ledger, not on the event loop's thread.

        Args:
            work: What to do.

        Returns:
            What it returns.

        Raises:
            LedgerError: The ledger cannot be read or written.
            UsageError: There is no such proposal or plan.
        """
        ledger = await self.ledger()
        return await asyncio.to_thread(work, ledger)

    async def get(self, patch_id: str) -> Entry:
        """A proposal.

        Args:
            patch_id: Its id, or the beginning of it.

        Returns:
            The proposal.

        Raises:
            UsageError: There is no such proposal.
        """
        return await self.do(lambda ledger: ledger.get(patch_id))

    def close(self) -> None:
        """Close it, if it was opened."""
        if self._ledger is not None:
            self._ledger.close()
