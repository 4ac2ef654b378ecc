"""Pages of the KV pool: who holds what, after forks, roll-backs and releases in any order."""

from __future__ import annotations

import random

import pytest

from engine.errors import EngineError
from engine.inference.cuda.paged_kv import PagedKV, PagePool

PAGE = 4


class Device:
    """Stands for the device: each place of each page holds the token that was written there."""

    def __init__(self, num_pages: int) -> None:
        self.places = [[-1] * PAGE for _ in range(num_pages + 1)]
        self.num_copies = 0
        self.pool = PagePool(num_pages, PAGE, 100, self._copy)

    def _copy(self, source: int, target: int) -> None:
        self.places[target] = list(self.places[source])
        self.num_copies += 1

    def write(self, kv: PagedKV, tokens: list[int]) -> None:
        for slot, token in zip(kv.append(len(tokens)).tolist(), tokens, strict=True):
            self.places[slot // PAGE][slot % PAGE] = token

    def read(self, kv: PagedKV) -> list[int]:
        return [token for page in kv.pages.tolist() for token in self.places[page]][: kv.num_tokens]


def test_tokens_fill_pages_in_order() -> None:
    device = Device(8)
    kv = PagedKV(device.pool)
    device.write(kv, [0, 1, 2])
    device.write(kv, [3, 4])
    assert (device.read(kv), kv.num_tokens, len(kv.pages), kv.num_bytes) == ([0, 1, 2, 3, 4], 5, 2, 200)
    assert device.pool.num_free_pages == 6
    assert 0 not in kv.pages


def test_going_back_gives_pages_back() -> None:
    device = Device(8)
    kv = PagedKV(device.pool)
    device.write(kv, list(range(11)))
    kv.truncate(4)
    assert (device.read(kv), device.pool.num_free_pages) == ([0, 1, 2, 3], 7)
    kv.release()
    assert (kv.num_tokens, device.pool.num_free_pages) == (0, 8)


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    device = Device(8)
    kv = PagedKV(device.pool)
    device.write(kv, list(range(10)))
    fork = kv.copy_prefix(9)
    assert fork.pages[:2].tolist() == kv.pages[:2].tolist()
    assert fork.pages[2] != kv.pages[2]
    device.write(kv, [100])
    device.write(fork, [200])
    assert device.read(kv) == [*range(10), 100]
    assert device.read(fork) == [*range(9), 200]


def test_one_that_went_back_into_a_shared_page_copies_it_before_it_writes() -> None:
    device = Device(8)
    kv = PagedKV(device.pool)
    device.write(kv, list(range(8)))
    fork = kv.copy_prefix(8)
    fork.truncate(6)
    assert (device.num_copies, fork.num_new_pages(1), fork.num_new_pages(3)) == (0, 1, 2)
    device.write(fork, [60, 61, 62])
    assert device.read(kv) == list(range(8))
    assert device.read(fork) == [0, 1, 2, 3, 4, 5, 60, 61, 62]


def test_a_full_pool_is_an_error_and_changes_nothing() -> None:
    device = Device(2)
    kv = PagedKV(device.pool)
    device.write(kv, list(range(6)))
    with pytest.raises(EngineError, match="The KV cache is full: 3 more tokens need 1 pages, 0 are free"):
        kv.append(3)
    with pytest.raises(EngineError, match="The KV cache is full"):
        kv.copy_prefix(5)
    assert device.read(kv) == list(range(6))
    device.write(kv, [6, 7])
    kv.release()
    assert device.pool.num_free_pages == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_reads_as_lists_would_and_loses_no_page(seed: int) -> None:
    chance = random.Random(seed)
    device = Device(24)
    pairs: list[tuple[PagedKV, list[int]]] = [(PagedKV(device.pool), [])]
    next_token = 0
    for _ in range(600):
        kv, model = chance.choice(pairs)
        action = chance.choice(["append", "append", "truncate", "fork", "release"])
        try:
            if action == "append":
                tokens = list(range(next_token, next_token + chance.randint(0, 9)))
                next_token += len(tokens)
                device.write(kv, tokens)
                model += tokens
            elif action == "truncate":
                length = chance.randint(0, len(model))
                kv.truncate(length)
                del model[length:]
            elif action == "fork":
                length = chance.randint(0, len(model))
                pairs.append((kv.copy_prefix(length), model[:length]))
            elif len(pairs) > 1:
                kv.release()
                pairs = [pair for pair in pairs if pair[0] is not kv]
        except EngineError:
            assert device.pool.num_free_pages < 4
        for one, expected in pairs:
            assert device.read(one) == expected
        held = {page for one, _ in pairs for page in one.pages.tolist()}
        assert device.pool.num_free_pages == 24 - len(held)
    for kv, _ in pairs:
        kv.release()
    assert device.pool.num_free_pages == 24
