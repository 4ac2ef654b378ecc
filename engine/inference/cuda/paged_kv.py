"""Which pages of the KV pool hold the tokens of which sequence. Bookkeeping alone: no torch, no device.

Pages are shared by reference count (Kwon et al. 2023, PagedAttention). A sequence writes only into pages that are its
own: `copy_prefix` copies the partial last page, and one that went back into a shared page copies it before it goes on.
Not thread-safe: the engine's thread owns pool and sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.errors import EngineError

SCRATCH_PAGE = 0  # rows that only fill a step up write here


class PagePool:
    """The pages of one device.

    Args:
        num_pages: How many there are, without the scratch page.
        page_tokens: Tokens of a page.
        page_bytes: Memory of a page in all layers.
        copy_page: Called as `copy_page(source, target)`; copies keys and values of all layers.
    """

    def __init__(
        self, num_pages: int, page_tokens: int, page_bytes: int, copy_page: Callable[[int, int], None]
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.page_bytes = page_bytes
        self.copy_page = copy_page
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))
        self._num_users = [0] * (num_pages + 1)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds `page`."""
        return self._num_users[page] > 1

    def take(self) -> int:
        """A free page, held once from now on.

        Raises:
            EngineError: There is none.
        """
        if not self._free:
            raise EngineError(
                f"The KV cache is full: all {self.num_pages * self.page_tokens} tokens are in use",
                hint="Wait for other requests to end, or make the KV cache larger.",
            )
        page = self._free.pop()
        self._num_users[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds `page`."""
        self._num_users[page] += 1

    def drop(self, page: int) -> None:
        """One sequence less holds `page`."""
        self._num_users[page] -= 1
        assert self._num_users[page] >= 0, "a page is dropped once by each holder"
        if self._num_users[page] == 0:
            self._free.append(page)


class PagedKV:
    """Keys and values of one sequence, as a list of pages.

    Args:
        pool: Where the pages come from.
    """

    can_go_back = True

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []
        self._table = np.zeros(8, dtype=np.int32)
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return self._num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of its pages; a shared page counts for each holder."""
        return len(self._pages) * self._pool.page_bytes

    @property
    def pages(self) -> np.ndarray:
        """Its pages in order, int32 `[num_pages]`; a view that the next change may outdate."""
        return self._table[: len(self._pages)]

    def num_new_pages(self, num_tokens: int) -> int:
        """How many free pages `append(num_tokens)` takes."""
        if not num_tokens:
            return 0
        grown = -(-(self._num_tokens + num_tokens) // self._pool.page_tokens) - len(self._pages)
        return grown + self._writes_into_shared()

    def append(self, num_tokens: int) -> np.ndarray:
        """Make room for further tokens; all or none.

        Args:
            num_tokens: How many.

        Returns:
            Where they go, int32 `[num_tokens]`: page times tokens of a page, plus the place in the page.

        Raises:
            EngineError: There are too few free pages.
        """
        if self.num_new_pages(num_tokens) > self._pool.num_free_pages:
            raise EngineError(
                f"The KV cache is full: {num_tokens} more tokens need {self.num_new_pages(num_tokens)} pages, "
                f"{self._pool.num_free_pages} are free",
                hint="Wait for other requests to end, or make the KV cache larger.",
            )
        size = self._pool.page_tokens
        if num_tokens and self._writes_into_shared():
            self._own_last_page()
        while len(self._pages) * size < self._num_tokens + num_tokens:
            self._push(self._pool.take())
        places = np.arange(self._num_tokens, self._num_tokens + num_tokens, dtype=np.int32)
        self._num_tokens += num_tokens
        return self._table[places // size] * np.int32(size) + places % size

    def truncate(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens; pages behind them are given back."""
        assert 0 <= num_tokens <= self._num_tokens, "a KV cache only goes back"
        self._num_tokens = num_tokens
        while len(self._pages) > -(-num_tokens // self._pool.page_tokens):
            self._pool.drop(self._pages.pop())

    def copy_prefix(self, num_tokens: int) -> PagedKV:
        """A sequence of its own with the first `num_tokens` tokens of this one.

        Args:
            num_tokens: How many; full pages are shared, a partial last one is copied.

        Returns:
            The new sequence.

        Raises:
            EngineError: A page has to be copied and none is free.
        """
        assert 0 <= num_tokens <= self._num_tokens, "a fork has no more tokens than its origin"
        num_full, rest = divmod(num_tokens, self._pool.page_tokens)
        other = PagedKV(self._pool)
        copied = self._pool.take() if rest else None
        for page in self._pages[:num_full]:
            self._pool.hold(page)
            other._push(page)
        if copied is not None:
            self._pool.copy_page(self._pages[num_full], copied)
            other._push(copied)
        other._num_tokens = num_tokens
        return other

    def release(self) -> None:
        """Give all pages back; it holds no tokens then."""
        self.truncate(0)

    def _writes_into_shared(self) -> bool:
        is_partial = self._num_tokens % self._pool.page_tokens != 0
        return is_partial and self._pool.is_shared(self._pages[-1])

    def _own_last_page(self) -> None:
        shared, own = self._pages[-1], self._pool.take()
        self._pool.copy_page(shared, own)
        self._pool.drop(shared)
        self._pages[-1] = self._table[len(self._pages) - 1] = own

    def _push(self, page: int) -> None:
        if len(self._pages) == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        self._table[len(self._pages)] = page
        self._pages.append(page)
