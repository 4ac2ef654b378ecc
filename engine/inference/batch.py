"""Several sequences decoded as rows of one step.

A row costs little beside the weights that every step reads, so N requests at once take far less than N times one. Each
row keeps its own length: keys and values are written at the row's next place and attention sees no further. A sequence
brings its `KVCache` in and takes it out again, which is one copy each. Not covered: prefill, which runs row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from engine.inference.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE_TOKENS = 256


class _Rows(DynamicLayer):
    """One layer's keys and values, `[num_rows, num_kv_heads, capacity, head_dim]`; row i has `lengths[i]` tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> None:
        super().__init__()
        self.tensors = (keys, values)
        self.lengths = lengths
        self.is_initialized = True
        self.max_tokens = 0  # of the longest row before this step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row at the row's own place."""
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        keys, values = self.tensors
        keys[rows, :, self.lengths] = key_states[:, :, 0]
        values[rows, :, self.lengths] = value_states[:, :, 0]
        return keys[:, :, : self.max_tokens + 1], values[:, :, : self.max_tokens + 1]

    def get_seq_length(self) -> int:
        """Tokens of the longest row, as transformers asks."""
        return self.max_tokens


class DecodeBatch:
    """The KV caches of some sequences side by side, until one joins or leaves.

    Args:
        kv_caches: One a row; they stay as they are, their content is copied.
    """

    def __init__(self, kv_caches: Sequence[KVCache]) -> None:
        self._lengths = [kv_cache.num_tokens for kv_cache in kv_caches]
        self._device = kv_caches[0].kv_layers[0].tensors[0].device
        self._lengths_tensor = torch.tensor(self._lengths, device=self._device)
        self._capacity = max(self._lengths) + _SPARE_TOKENS
        columns = zip(*(kv_cache.kv_layers for kv_cache in kv_caches), strict=True)
        self._layers = [self._join([layer.tensors for layer in layers]) for layers in columns]
        self._cache = Cache(layers=list(self._layers))

    def _join(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Rows:
        keys, values = ([pair[index] for pair in pairs] for index in (0, 1))
        return _Rows(self._padded(keys), self._padded(values), self._lengths_tensor)

    def _padded(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        _, num_heads, _, head_dim = tensors[0].shape
        padded = tensors[0].new_zeros((len(tensors), num_heads, self._capacity, head_dim))
        for row, (tensor, length) in enumerate(zip(tensors, self._lengths, strict=True)):
            padded[row, :, :length] = tensor[0, :, :length]
        return padded

    @property
    def is_full(self) -> bool:
        """Whether the longest row has no place left; then the batch has to be made again."""
        return max(self._lengths) >= self._capacity

    def step(self, model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
        """One token a row.

        Args:
            model: The model.
            token_ids: Each row's last token, not computed yet.

        Returns:
            Logits `[num_rows, vocab_size]`.
        """
        longest = max(self._lengths)
        for layer in self._layers:
            layer.max_tokens = longest
        places = torch.arange(longest + 1, device=self._device)
        mask = (places[None] <= self._lengths_tensor[:, None])[:, None, None, :]
        output = model(
            input_ids=torch.tensor(token_ids, device=self._device)[:, None],
            attention_mask=mask,
            position_ids=self._lengths_tensor[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._lengths = [length + 1 for length in self._lengths]
        self._lengths_tensor.add_(1)
        return output.logits[:, -1]

    def take_out(self, row: int, kv_cache: KVCache) -> None:
        """Bring what a row gained back into the sequence's own cache.

        Args:
            row: Its index.
            kv_cache: The cache that was put in.
        """
        start, end = kv_cache.num_tokens, self._lengths[row]
        for own, layer in zip(kv_cache.kv_layers, self._layers, strict=True):
            keys, values = layer.tensors
            own.update(keys[row : row + 1, :, start:end], values[row : row + 1, :, start:end])
