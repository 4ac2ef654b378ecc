"""Keys and values of the tokens seen so far, which can go back by tokens, and the cache of prefixes across requests.

`KVCache` plugs into transformers' attention. Its buffers grow by doubling, so a decode step copies nothing, and going
back is setting a number. Not covered: sliding-window and linear attention, whose state cannot be cut back; models that
have it run on transformers' own cache without prefix reuse (`new_kv_cache` decides).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

_MIN_CAPACITY = 256


class SequenceCache(Protocol):
    """Keys and values of one sequence, whoever computes them."""

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory of its buffers."""
        ...

    @property
    def can_go_back(self) -> bool:
        """Whether `truncate` and `copy_prefix` work, and the cache can share a step with others."""
        ...

    def truncate(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens."""
        ...

    def copy_prefix(self, num_tokens: int) -> SequenceCache:
        """A cache of its own with the first `num_tokens` tokens of this one."""
        ...

    def release(self) -> None:
        """Give its memory back; it is of no use any more."""
        ...


class KVLayer(DynamicLayer):
    """One layer's keys and values, `[1, num_kv_heads, capacity, head_dim]`; the first `num_tokens` are in use."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of keys and values, once the layer holds tokens."""
        assert self.keys is not None and self.values is not None, "the layer holds no tokens"
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; returns all keys and values so far."""
        end = self.num_tokens + key_states.shape[-2]
        keys, values = self._reserve(end, key_states, value_states)
        keys[:, :, self.num_tokens : end] = key_states
        values[:, :, self.num_tokens : end] = value_states
        self.num_tokens = end
        return keys[:, :, :end], values[:, :, :end]

    def _reserve(
        self, num_tokens: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = self._grown(key_states, None, num_tokens)
            self.values = self._grown(value_states, None, num_tokens)
            self.is_initialized = True
        elif num_tokens > self.tensors[0].shape[-2]:
            self.keys = self._grown(key_states, self.keys, num_tokens)
            self.values = self._grown(value_states, self.values, num_tokens)
        return self.tensors

    def _grown(self, like: torch.Tensor, old: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        capacity = _MIN_CAPACITY
        while capacity < num_tokens:
            capacity *= 2
        grown = like.new_empty((*like.shape[:2], capacity, like.shape[3]))
        if old is not None:
            grown[:, :, : self.num_tokens] = old[:, :, : self.num_tokens]
        return grown

    def get_seq_length(self) -> int:
        """How many tokens it holds, as transformers asks."""
        return self.num_tokens

    def copy_prefix(self, num_tokens: int) -> KVLayer:
        """A layer of its own with the first tokens of this one."""
        copy = KVLayer()
        if num_tokens:
            keys, values = self.tensors
            copy.update(keys[:, :, :num_tokens], values[:, :, :num_tokens])
        return copy

    @property
    def num_bytes(self) -> int:
        """Memory of its buffers."""
        return sum(tensor.nbytes for tensor in self.tensors) if self.is_initialized else 0


class KVCache(Cache):
    """Keys and values of one sequence in every layer.

    Args:
        layers: One per decoder layer of the model.
    """

    def __init__(self, layers: Sequence[KVLayer]) -> None:
        super().__init__(layers=list(layers))
        self.kv_layers = tuple(layers)

    can_go_back = True

    @classmethod
    def empty(cls, num_layers: int) -> KVCache:
        """A cache of no tokens."""
        return cls([KVLayer() for _ in range(num_layers)])

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return self.kv_layers[0].num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of its buffers."""
        return sum(layer.num_bytes for layer in self.kv_layers)

    def truncate(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens; O(1)."""
        assert 0 <= num_tokens <= self.num_tokens, "a KV cache only goes back"
        for layer in self.kv_layers:
            layer.num_tokens = num_tokens

    def copy_prefix(self, num_tokens: int) -> KVCache:
        """A cache of its own with the first `num_tokens` tokens of this one."""
        return KVCache([layer.copy_prefix(num_tokens) for layer in self.kv_layers])

    def release(self) -> None:
        """Nothing to do: its buffers go with it."""


class ForwardCache(DynamicCache):
    """Transformers' own cache, which cannot go back."""

    can_go_back = False
    num_bytes = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds; 0 where only a state is kept."""
        try:
            return self.get_seq_length()
        except ValueError:  # no layer has attention
            return 0

    def truncate(self, num_tokens: int) -> None:
        """It cannot."""
        raise AssertionError("this cache cannot go back")

    def copy_prefix(self, num_tokens: int) -> SequenceCache:
        """It cannot."""
        raise AssertionError("this cache cannot go back")

    def release(self) -> None:
        """Nothing to do: its buffers go with it."""


def new_kv_cache(config: PretrainedConfig) -> KVCache | ForwardCache:
    """An empty cache for a model: ours where every layer has full attention, else transformers'.

    Args:
        config: The model's configuration.

    Returns:
        A `KVCache`, or a `ForwardCache` that cannot go back.
    """
    text_config = config.get_text_config(decoder=True)
    stock = ForwardCache(config=text_config)
    if turns_with_length(config):
        return stock
    num_layers = int(text_config.num_hidden_layers)
    if len(stock.layers) in (0, num_layers) and all(type(layer) is DynamicLayer for layer in stock.layers):
        return KVCache.empty(num_layers)
    return stock


def turns_with_length(config: PretrainedConfig) -> bool:
    """Whether keys are rotated by how long the text is when they are made: then a prompt is one step, and none is kept.

    Args:
        config: The model's configuration.

    Returns:
        Whether they are.
    """
    text_config = config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic")


@dataclass(slots=True)
class _Entry:
    token_ids: list[int]
    kv_cache: SequenceCache


class PrefixCache:
    """KV caches of ended requests, so that the next one with the same beginning skips that part of its prefill.

    The least recently used are dropped first. Not thread-safe: the engine's thread owns it.

    Args:
        max_bytes: Memory for all caches together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[str, _Entry]] = OrderedDict()
        self._next_key = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all caches."""
        return sum(entry.kv_cache.num_bytes for _, entry in self._entries.values())

    def take(self, adapter: str, token_ids: Sequence[int], longer_than: int = 0) -> SequenceCache | None:
        """A cache that holds the longest known prefix of `token_ids`, the last token never counted.

        Args:
            adapter: Digest of the adapter that computed it; others do not fit.
            token_ids: The prompt.
            longer_than: Tokens of the prefix that are to be had elsewhere.

        Returns:
            A cache that the caller owns, or None when no longer prefix is known.
        """
        best_key, best_length = None, longer_than
        for key, (entry_adapter, entry) in self._entries.items():
            length = min(num_common(entry.token_ids, token_ids), entry.kv_cache.num_tokens, len(token_ids) - 1)
            if entry_adapter == adapter and length > best_length:
                best_key, best_length = key, length
        if best_key is None:
            return None
        entry = self._entries[best_key][1]
        if best_length == entry.kv_cache.num_tokens:
            del self._entries[best_key]
            return entry.kv_cache
        self._entries.move_to_end(best_key)
        return entry.kv_cache.copy_prefix(best_length)

    def put(self, adapter: str, token_ids: Sequence[int], kv_cache: SequenceCache) -> None:
        """Keep `kv_cache`, which holds the first `kv_cache.num_tokens` of `token_ids`; it is released when dropped."""
        if kv_cache.num_tokens == 0 or kv_cache.num_bytes > self._max_bytes:
            return kv_cache.release()
        self._entries[self._next_key] = (adapter, _Entry(list(token_ids[: kv_cache.num_tokens]), kv_cache))
        self._next_key += 1
        while self.num_bytes > self._max_bytes:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Drop the cache that was used longest ago; returns whether there was one."""
        if not self._entries:
            return False
        self._entries.popitem(last=False)[1][1].kv_cache.release()
        return True

    def clear(self) -> None:
        """Drop everything."""
        while self.drop_oldest():
            pass


def num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
