"""The fast path as the engine's thread sees it: the `Runner` of runner.py, on a `CudaRunner`."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.errors import EngineError
from engine.inference.adapters import BASE, AdapterFiles, check_fits
from engine.inference.cuda.paged_kv import PagedKV
from engine.inference.cuda.precompile import KernelBuild, kernels_of
from engine.inference.cuda.runner import CudaRunner
from engine.inference.cuda.verify import GreedyKernel
from engine.inference.cuda.weights import LoraWeights, read_lora
from engine.inference.kv_cache import SequenceCache
from engine.inference.runner import Row, log

if TYPE_CHECKING:
    from engine.inference.engine import EngineConfig
    from engine.inference.loading import LoadedModel

LEAST_KV_TOKENS = 4096
_MOST_KV_TOKENS = 65_536
_FEWEST_KV_TOKENS = 1024  # a smaller cache would hold no prompt
_SHARE_OF_FREE_MEMORY = 0.8
_FIRST_WIDTHS = (
    8,
)  # that the first steps of a PLAN have; the others are captured when first used, or before, when idle
_MAX_ADAPTERS = 2  # kept on the CPU, so that an A/B run reads no files


class FusedRunner:
    """See the module's docstring.

    Args:
        loaded: The model; `CudaRunner.why_not` says that it can be run.
        config: The engine's limits.
        say: Called with what is being prepared.
    """

    name = "fused CUDA kernels"
    max_rows = CudaRunner.max_decode_tokens
    chunk_tokens = CudaRunner.chunk_tokens
    least_drafts = 7
    is_asynchronous = True

    def __init__(self, loaded: LoadedModel, config: EngineConfig, say: Callable[[str], None]) -> None:
        self._loaded = loaded
        self._max_draft_tokens = config.max_draft_tokens
        self.num_kv_tokens = _num_kv_tokens(loaded, config)
        self._cuda = CudaRunner(loaded, num_kv_tokens=self.num_kv_tokens, tuning_path=config.tuning_path)
        self.when_idle: Iterator[str] | None = None
        if config.serve_while_compiling:
            self._cuda.warm_up(say, widths=_FIRST_WIDTHS)
            self.when_idle = self._cuda.capturing()
        else:
            self._cuda.warm_up(say)
        self.greedy = GreedyKernel(loaded.vocab_size, loaded.device)
        self._adapters: OrderedDict[str, LoraWeights] = OrderedDict()
        self._active = BASE

    def new_kv_cache(self) -> PagedKV:
        """See `Runner`."""
        return self._cuda.new_kv()

    def has_room(self, needs: Sequence[tuple[SequenceCache, int]]) -> bool:
        """See `Runner`. One page more, for a prefix that is forked."""
        pages = sum(_paged(kv_cache).num_new_pages(num_tokens) for kv_cache, num_tokens in needs)
        return pages + 1 <= self._cuda.num_free_pages

    def most_drafts(self, num_rows: int) -> int:
        """See `Runner`."""
        return min(self._max_draft_tokens, max(0, self.max_rows // num_rows - 1))

    def run(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See `Runner`. What of a prompt no logits are wanted for is computed as a wide step."""
        num_tokens = sum(len(row.token_ids) for row in rows)
        if len(rows) == 1 and (rows[0].num_logits == 0 or num_tokens > self.max_rows):
            return [self._prefill(rows[0])]
        logits = self._cuda.decode([(_paged(row.kv_cache), row.token_ids) for row in rows])
        each: list[torch.Tensor] = []
        end = 0
        for row in rows:
            end += len(row.token_ids)
            each.append(logits[end - row.num_logits : end])
        return each

    def _prefill(self, row: Row) -> torch.Tensor:
        kv, token_ids, num_logits = _paged(row.kv_cache), row.token_ids, row.num_logits
        if num_logits <= 1:
            logits = self._cuda.prefill(kv, token_ids, want_logits=bool(num_logits))
            return torch.empty(0, self._cuda.vocab_size) if logits is None else logits[None]
        self._cuda.prefill(kv, token_ids[:-num_logits], want_logits=False)
        return self._cuda.decode([(kv, token_ids[-num_logits:])])

    def hidden_sum(self, kv_cache: SequenceCache, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Runner`."""
        return self._cuda.hidden(_paged(kv_cache), token_ids).float().sum(0)

    def settle(self, kv_cache: SequenceCache | None = None) -> None:
        """See `Runner`. Caches are always up to date."""

    def abandon(self) -> list[SequenceCache]:
        """See `Runner`."""
        return []

    def activate(self, adapter: AdapterFiles | None) -> None:
        """See `Runner`."""
        digest = adapter.digest if adapter else BASE
        if digest == self._active:
            return
        if adapter is not None and digest not in self._adapters:
            check_fits(adapter, self._loaded.model)
            self._adapters[digest] = read_lora(adapter)
            while len(self._adapters) > _MAX_ADAPTERS:
                self._adapters.popitem(last=False)
        self._cuda.use_adapter(None if adapter is None else self._adapters[digest])
        self._active = digest


class CompilingRunner:
    """The `FasterRunner` of runner.py: a `FusedRunner` once another process has compiled its kernels.

    Args:
        loaded: The model; `CudaRunner.why_not` says that it can be run.
        config: The engine's limits.
        lora_rank: Of the adapter that it will run with; 0 for none.
    """

    message = "Compiling kernels; slower until then"

    def __init__(self, loaded: LoadedModel, config: EngineConfig, lora_rank: int) -> None:
        self._loaded = loaded
        self._began_at = time.monotonic()
        self._build: KernelBuild | None = None
        self.num_kv_tokens = _num_kv_tokens(loaded, config)
        self._config = replace(config, kv_cache_tokens=self.num_kv_tokens)
        self._wanted = kernels_of(
            loaded, num_kv_tokens=self.num_kv_tokens, tuning_path=config.tuning_path, lora_rank=lora_rank
        )

    def begin(self, on_done: Callable[[], None]) -> bool:
        """Start the compiling; returns whether there is anything to compile."""
        if self._wanted.is_compiled():
            return False
        self._build = KernelBuild(self._wanted, on_done)
        return True

    @property
    def is_done(self) -> bool:
        """See `FasterRunner`."""
        return self._build is not None and self._build.is_done

    def make(self, say: Callable[[str], None]) -> FusedRunner:
        """See `FasterRunner`."""
        assert self._build is not None and self._build.is_done, "the kernels are compiled first"
        if self._build.error:
            raise EngineError(f"The kernels could not be compiled: {self._build.error}")
        log.info("%d kernels compiled in %.1f s", len(self._wanted.descriptions), time.monotonic() - self._began_at)
        return FusedRunner(self._loaded, self._config, say)

    def close(self) -> None:
        """See `FasterRunner`."""
        if self._build is not None:
            self._build.close()


def _paged(kv_cache: SequenceCache) -> PagedKV:
    assert isinstance(kv_cache, PagedKV), "every cache is one of ours"
    return kv_cache


def _num_kv_tokens(loaded: LoadedModel, config: EngineConfig) -> int:
    if config.kv_cache_tokens:
        return max(_FEWEST_KV_TOKENS, config.kv_cache_tokens)
    return kv_tokens_of(loaded)


def kv_tokens_of(loaded: LoadedModel) -> int:
    """How many tokens of keys and values the memory that is free now has room for, some left for the rest.

    Args:
        loaded: The model, its weights on the device.

    Returns:
        At least 4,096, at most 65,536 and four times the model's context.
    """
    config = loaded.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
    free = torch.cuda.mem_get_info(loaded.device)[0]
    fitting = int(_SHARE_OF_FREE_MEMORY * free) // per_token
    return max(LEAST_KV_TOKENS, min(fitting, _MOST_KV_TOKENS, 4 * loaded.context_length))
