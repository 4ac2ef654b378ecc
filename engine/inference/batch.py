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

    def __init__(self, lengths: torch.Tensor) -> None:
        super().__init__()
        self.lengths = lengths

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.keys[rows, :, self.lengths] = key_states[:, :, 0]
        self.values[rows, :, self.lengths] = value_states[:, :, 0]
        end = int(self.max_tokens) + 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    max_tokens = 0  # longest row before this step

    def get_seq_length(self) -> int:
        return self.max_tokens


class DecodeBatch:
    """The KV caches of some sequences side by side, until one joins or leaves.

    Args:
        kv_caches: One a row; they stay as they are, their content is copied.
    """

    def __init__(self, kv_caches: Sequence[KVCache]) -> None:
        self._lengths = [kv_cache.num_tokens for kv_cache in kv_caches]
        first = kv_caches[0].layers[0].keys
        self._device = first.device
        self._lengths_tensor = torch.tensor(self._lengths, device=self._device)
        self._layers = [self._join([cache.layers[index] for cache in kv_caches]) for index in range(len(kv_caches[0]))]
        self._cache = Cache(layers=list(self._layers))

    def _join(self, layers: Sequence[DynamicLayer]) -> _Rows:
        joined = _Rows(self._lengths_tensor)
        capacity = max(self._lengths) + _SPARE_TOKENS
        joined.keys = self._padded([layer.keys for layer in layers], capacity)
        joined.values = self._padded([layer.values for layer in layers], capacity)
        joined.is_initialized = True
        return joined

    def _padded(self, tensors: Sequence[torch.Tensor], capacity: int) -> torch.Tensor:
        _, num_heads, _, head_dim = tensors[0].shape
        padded = tensors[0].new_zeros((len(tensors), num_heads, capacity, head_dim))
        for row, (tensor, length) in enumerate(zip(tensors, self._lengths, strict=True)):
            padded[row, :, :length] = tensor[0, :, :length]
        return padded

    @property
    def is_full(self) -> bool:
        """Whether the longest row has no place left; then the batch has to be made again."""
        return max(self._lengths) >= self._layers[0].keys.shape[2]

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
        for index, layer in enumerate(self._layers):
            kv_cache.layers[index].update(
                layer.keys[row : row + 1, :, start:end], layer.values[row : row + 1, :, start:end]
            )
