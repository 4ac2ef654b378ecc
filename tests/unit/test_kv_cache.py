"""KV caches that grow and go back, and the cache of prefixes."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, Qwen2Config

from engine.inference.batch import DecodeBatch
from engine.inference.kv_cache import KVCache, PrefixCache, new_kv_cache

pytestmark = pytest.mark.unit

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 3, 4


def states(token_ids: list[int], layer: int) -> torch.Tensor:
    """Keys that say which token and layer they belong to."""
    values = torch.tensor(token_ids, dtype=torch.float32) + layer / 10
    return values[None, None, :, None].expand(1, NUM_HEADS, -1, HEAD_DIM).contiguous()


def add(kv_cache: KVCache, token_ids: list[int]) -> None:
    for layer in range(NUM_LAYERS):
        keys, values = kv_cache.update(states(token_ids, layer), -states(token_ids, layer), layer)
        assert keys.shape == values.shape == (1, NUM_HEADS, kv_cache.kv_layers[layer].num_tokens, HEAD_DIM)


def cache_of(token_ids: list[int]) -> KVCache:
    kv_cache = KVCache.empty(NUM_LAYERS)
    add(kv_cache, token_ids)
    return kv_cache


def content(kv_cache: KVCache) -> list[int]:
    """The tokens whose keys and values it holds, checked in every layer and head."""
    if kv_cache.num_tokens == 0:
        return []
    keys, _ = kv_cache.kv_layers[0].tensors
    token_ids = [round(value) for value in keys[0, 0, : kv_cache.num_tokens, 0].tolist()]
    for number, layer in enumerate(kv_cache.kv_layers):
        keys, values = (tensor[:, :, : layer.num_tokens] for tensor in layer.tensors)
        assert keys.equal(states(token_ids, number))
        assert values.equal(-states(token_ids, number))
    return token_ids


def test_tokens_are_added_in_chunks_and_buffers_double() -> None:
    kv_cache = KVCache.empty(NUM_LAYERS)
    assert (kv_cache.num_tokens, kv_cache.num_bytes, kv_cache.get_seq_length()) == (0, 0, 0)
    token_ids = list(range(600))
    sizes = set()
    for start in range(0, 600, 100):
        add(kv_cache, token_ids[start : start + 100])
        sizes.add(kv_cache.kv_layers[0].tensors[0].shape[-2])
        assert content(kv_cache) == token_ids[: start + 100]
    assert sizes == {256, 512, 1024}
    assert kv_cache.num_bytes == NUM_LAYERS * 2 * NUM_HEADS * 1024 * HEAD_DIM * 4


def test_going_back_forgets_and_what_comes_next_overwrites() -> None:
    kv_cache = cache_of([1, 2, 3, 4])
    kv_cache.truncate(2)
    assert content(kv_cache) == [1, 2]
    add(kv_cache, [7, 8, 9])
    assert content(kv_cache) == [1, 2, 7, 8, 9]
    kv_cache.truncate(0)
    assert content(kv_cache) == []
    add(kv_cache, [5])
    assert content(kv_cache) == [5]
    with pytest.raises(AssertionError, match="only goes back"):
        kv_cache.truncate(2)


def test_going_back_past_a_growth_keeps_the_tokens_before() -> None:
    kv_cache = cache_of(list(range(255)))
    add(kv_cache, [255, 256, 257])
    kv_cache.truncate(256)
    add(kv_cache, [1, 2])
    assert content(kv_cache) == [*range(256), 1, 2]


def test_a_copied_prefix_and_its_origin_do_not_see_each_other() -> None:
    origin = cache_of([1, 2, 3, 4])
    copy = origin.copy_prefix(2)
    add(copy, [9])
    origin.truncate(1)
    add(origin, [8])
    assert (content(copy), content(origin)) == ([1, 2, 9], [1, 8])
    assert content(origin.copy_prefix(0)) == []


def test_rows_decoded_together_go_back_into_their_own_caches() -> None:
    long, short = cache_of([1, 2, 3, 4, 5]), cache_of([6, 7])
    batch = DecodeBatch([long, short])
    for step in range(3):
        for number, layer in enumerate(batch._layers):
            layer.max_tokens = 5 + step
            new = torch.cat([states([10 + step], number), states([20 + step], number)])
            keys, _ = layer.update(new, -new)
            assert keys.shape[-2] == 6 + step
        batch._lengths = [length + 1 for length in batch._lengths]
        batch._lengths_tensor.add_(1)
    batch.take_out(1, short)
    batch.take_out(0, long)
    assert content(long) == [1, 2, 3, 4, 5, 10, 11, 12]
    assert content(short) == [6, 7, 20, 21, 22]


def test_a_model_with_sliding_windows_gets_a_cache_that_does_not_go_back() -> None:
    full = Qwen2Config(num_hidden_layers=2)
    assert isinstance(new_kv_cache(full), KVCache)
    assert not isinstance(new_kv_cache(GptOssConfig(num_hidden_layers=2)), KVCache)


# prefixes


def test_the_longest_known_beginning_is_taken_and_the_last_token_always_computed() -> None:
    prefixes = PrefixCache(10**9)
    prefixes.put("a", [1, 2, 3], cache_of([1, 2, 3]))
    prefixes.put("a", [1, 2, 3, 4, 5], cache_of([1, 2, 3, 4, 5]))
    prefixes.put("a", [1, 9], cache_of([1, 9]))
    for prompt, known in (([1, 2, 3, 4, 9], [1, 2, 3, 4]), ([1, 9], [1]), ([7, 1], None), ([1], None), ([], None)):
        taken = prefixes.take("a", prompt)
        assert (content(taken) if isinstance(taken, KVCache) else taken) == known


def test_a_prefix_of_one_adapter_does_not_serve_another() -> None:
    prefixes = PrefixCache(10**9)
    prefixes.put("a", [1, 2, 3], cache_of([1, 2, 3]))
    assert prefixes.take("b", [1, 2, 3, 4]) is None
    assert prefixes.take("a", [1, 2, 3, 4]) is not None


def test_a_cache_that_goes_on_whole_is_handed_over_and_a_part_is_copied() -> None:
    prefixes = PrefixCache(10**9)
    donor = cache_of([1, 2, 3])
    prefixes.put("a", [1, 2, 3, 4], donor)
    part = prefixes.take("a", [1, 2, 9])
    assert isinstance(part, KVCache)
    add(part, [9])
    assert (content(part), content(donor)) == ([1, 2, 9], [1, 2, 3])
    assert prefixes.take("a", [1, 2, 3, 4, 5]) is donor
    assert prefixes.num_bytes == 0
    assert prefixes.take("a", [1, 2, 3, 4, 5]) is None


def test_the_least_recently_used_goes_first_when_memory_is_full() -> None:
    one = cache_of([1]).num_bytes
    prefixes = PrefixCache(2 * one)
    prefixes.put("a", [1, 1], cache_of([1, 1]))
    prefixes.put("a", [2, 2], cache_of([2, 2]))
    assert prefixes.take("a", [1, 5]) is not None, "used, so it is the younger one now"
    prefixes.put("a", [3, 3], cache_of([3, 3]))
    assert prefixes.num_bytes == 2 * one
    assert prefixes.take("a", [2, 5]) is None
    assert prefixes.take("a", [1, 5]) is not None
    assert prefixes.take("a", [3, 5]) is not None
    prefixes.clear()
    assert prefixes.take("a", [3, 5]) is None


def test_a_cache_larger_than_all_memory_or_of_no_tokens_is_not_kept() -> None:
    prefixes = PrefixCache(100)
    prefixes.put("a", [1, 2], cache_of([1, 2]))
    assert prefixes.num_bytes == 0
    PrefixCache(10**9).put("a", [], KVCache.empty(NUM_LAYERS))
    assert prefixes.take("a", [1, 2, 3]) is None
