"""How the engine's thread reaches the model: tokens of some sequences in, logits out. Knows no requests.

`ReferenceRunner` runs transformers' own modules, on any device. It keeps sequences that decode together in one batch
until one joins or leaves, so their KV caches are up to date only after `settle`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.inference.adapters import AdapterFiles, AdapterSwitch
from engine.inference.batch import DecodeBatch
from engine.inference.cpu import shares_steps, speed_up
from engine.inference.kv_cache import KVCache, SequenceCache, new_kv_cache, turns_with_length
from engine.inference.loading import LoadedModel

if TYPE_CHECKING:
    from engine.inference.cuda.verify import GreedyKernel
    from engine.inference.engine import EngineConfig


log = logging.getLogger("planpatch.engine")


@dataclass(frozen=True, slots=True)
class Row:
    """What one step computes of one sequence.

    Args:
        kv_cache: Holds all tokens before; it gains `token_ids`.
        token_ids: The next tokens, draft tokens last.
        num_logits: For how many of the last of them logits are wanted.
    """

    kv_cache: SequenceCache
    token_ids: Sequence[int]
    num_logits: int


class Runner(Protocol):
    """One model on one device. Everything is called by the engine's thread."""

    @property
    def name(self) -> str:
        """What runs the model, for people."""
        ...

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one prefill step; a cancel waits for at most this many."""
        ...

    @property
    def max_rows(self) -> int:
        """Sequences that decode together."""
        ...

    @property
    def num_kv_tokens(self) -> int | None:
        """Tokens that all caches together can hold; None: as many as memory has room for."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether `run` returns while the device still computes, so that there is time for other work."""
        ...

    @property
    def greedy(self) -> GreedyKernel | None:
        """What chooses greedily in one go, if there is such a kernel."""
        ...

    @property
    def least_drafts(self) -> int:
        """So many draft tokens cost next to nothing, however seldom they are right."""
        ...

    @property
    def when_idle(self) -> Iterator[str] | None:
        """Preparations for moments when nobody waits, in small pieces; says what it does."""
        ...

    def has_room(self, needs: Sequence[tuple[SequenceCache, int]]) -> bool:
        """Whether caches can gain so many tokens each."""
        ...

    def new_kv_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        ...

    def most_drafts(self, num_rows: int) -> int:
        """How many draft tokens each of `num_rows` sequences may bring into one decode step."""
        ...

    def run(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Compute the tokens of each row.

        Args:
            rows: One, or several that were through their prompts before.

        Returns:
            For each row logits `[num_logits, vocab_size]`.
        """
        ...

    def hidden_sum(self, kv_cache: SequenceCache, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute tokens; returns the sum of their last hidden states, fp32 `[hidden_size]`."""
        ...

    def settle(self, kv_cache: SequenceCache | None = None) -> None:
        """Bring the caches of all rows (or nothing, if `kv_cache` is not among them) up to date, to be cut or kept."""
        ...

    def abandon(self) -> list[SequenceCache]:
        """Give the rows of a failed step up; returns the caches that are of no use any more."""
        ...

    def activate(self, adapter: AdapterFiles | None) -> None:
        """Run with an adapter from now on, None for the base.

        Raises:
            AdapterError: It does not fit the base, or cannot be loaded.
        """
        ...


class ReferenceRunner:
    """See the module's docstring.

    Args:
        loaded: The model.
        config: The engine's limits.
    """

    name = "transformers"
    num_kv_tokens = None
    greedy = None
    when_idle = None
    least_drafts = 1
    is_asynchronous = False

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        on_gpu = loaded.device.type != "cpu"
        self.chunk_tokens = config.prefill_chunk_tokens_gpu if on_gpu else config.prefill_chunk_tokens
        self.max_rows = config.max_rows_gpu if on_gpu else config.max_rows
        if turns_with_length(loaded.model.config):
            self.chunk_tokens = loaded.context_length
        if not shares_steps(loaded.model):
            self.max_rows = 1
        self._loaded = loaded
        self._max_draft_tokens = config.max_draft_tokens
        self._switch = AdapterSwitch(loaded.model)
        self._batch: DecodeBatch | None = None
        self._batch_caches: list[KVCache] = []

    def new_kv_cache(self) -> SequenceCache:
        """See `Runner`."""
        return new_kv_cache(self._loaded.model.config)

    def has_room(self, needs: Sequence[tuple[SequenceCache, int]]) -> bool:
        """See `Runner`."""
        return True

    def most_drafts(self, num_rows: int) -> int:
        """See `Runner`. Rows side by side take one token each."""
        return self._max_draft_tokens if num_rows == 1 else 0

    def run(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See `Runner`."""
        if len(rows) > 1:
            return list(self._run_batch(rows)[:, None])
        (row,) = rows
        self.settle()
        if not row.num_logits:
            self._forward(self._loaded.model.base_model, row)
            return [torch.empty((0, self._loaded.vocab_size))]
        # by index, not as a slice: torch multiplies a slice of longer rows by a copy of the whole head
        wanted = torch.arange(len(row.token_ids) - row.num_logits, len(row.token_ids), device=self._loaded.device)
        return [self._forward(self._loaded.model, row, logits_to_keep=wanted).logits[0]]

    def hidden_sum(self, kv_cache: SequenceCache, token_ids: Sequence[int]) -> torch.Tensor:
        """See `Runner`."""
        self.settle()
        output = self._forward(self._loaded.model.base_model, Row(kv_cache, token_ids, 0), output_hidden_states=True)
        hidden = getattr(output, "last_hidden_state", None)
        return (output.hidden_states[-1] if hidden is None else hidden)[0].float().sum(0)

    def settle(self, kv_cache: SequenceCache | None = None) -> None:
        """See `Runner`."""
        if self._batch is None or (kv_cache is not None and all(kv_cache is not one for one in self._batch_caches)):
            return
        for row, one in enumerate(self._batch_caches):
            self._batch.take_out(row, one)
        self.abandon()

    def abandon(self) -> list[SequenceCache]:
        """See `Runner`."""
        caches, self._batch, self._batch_caches = self._batch_caches, None, []
        return list(caches)

    def activate(self, adapter: AdapterFiles | None) -> None:
        """See `Runner`."""
        self._switch.activate(adapter)

    def _forward(self, module: Any, row: Row, **arguments: object) -> Any:
        token_ids = torch.tensor([list(row.token_ids)], device=self._loaded.device)
        return module(input_ids=token_ids, past_key_values=row.kv_cache, use_cache=True, **arguments)

    def _run_batch(self, rows: Sequence[Row]) -> torch.Tensor:
        caches = [row.kv_cache for row in rows]
        is_same = len(caches) == len(self._batch_caches) and all(
            one is other for one, other in zip(caches, self._batch_caches, strict=True)
        )
        if self._batch is None or not is_same or self._batch.is_full:
            self.settle()
            self._batch_caches = [cache for cache in caches if isinstance(cache, KVCache)]
            assert len(self._batch_caches) == len(caches), "caches that cannot go back do not share a step"
            self._batch = DecodeBatch(self._batch_caches)
        return self._batch.step(self._loaded.model, [row.token_ids[0] for row in rows])


class FasterRunner(Protocol):
    """A runner whose kernels another process compiles; the engine's thread goes over to it when that is done."""

    @property
    def message(self) -> str:
        """What is going on, for people."""
        ...

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that all its caches together will hold."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the compiling has ended, well or not."""
        ...

    def make(self, say: Callable[[str], None]) -> Runner:
        """The runner; what others hold of the model's keys and values must be released before.

        Raises:
            EngineError: The kernels could not be compiled.
        """
        ...

    def close(self) -> None:
        """End the compiling."""
        ...


def make_runner(loaded: LoadedModel, config: EngineConfig, say: Callable[[str], None] = lambda _: None) -> Runner:
    """The fastest way to run a model that there is for it.

    Args:
        loaded: The model.
        config: The engine's limits.
        say: Called with what is being prepared.

    Returns:
        Its runner.
    """
    if not _runs_fast(loaded, config):
        if loaded.device.type == "cpu":
            speed_up(loaded.model)
        return ReferenceRunner(loaded, config)
    from engine.inference.cuda.rows import FusedRunner

    return FusedRunner(loaded, config, say)


def make_faster_runner(
    loaded: LoadedModel, config: EngineConfig, on_done: Callable[[], None], lora_rank: int = 0
) -> FasterRunner | None:
    """What `make_runner` would give, if its kernels have to be compiled first; that has begun then.

    Args:
        loaded: The model, which runs on a `ReferenceRunner` meanwhile.
        config: The engine's limits.
        on_done: Called on another thread when the compiling has ended.
        lora_rank: Of the adapter that it will run with; 0 for none.

    Returns:
        The runner to come, or None if there is nothing to wait for.
    """
    if not config.serve_while_compiling or not _runs_fast(loaded, config, is_told=False):
        return None
    from engine.inference.cuda.precompile import can_describe
    from engine.inference.cuda.rows import CompilingRunner

    if not can_describe():
        return None
    coming = CompilingRunner(loaded, config, lora_rank)
    return coming if coming.begin(on_done) else None


def _runs_fast(loaded: LoadedModel, config: EngineConfig, *, is_told: bool = True) -> bool:
    if loaded.device.type != "cuda" or not config.fast_path:
        return False
    reason = _why_not_fast(loaded)
    if reason and is_told:
        log.warning("the model runs on transformers, not on the fast path: %s", reason)
    return not reason


def _why_not_fast(loaded: LoadedModel) -> str:
    from engine.inference.cuda import why_no_triton

    if reason := why_no_triton():
        return reason
    from engine.inference.cuda.runner import CudaRunner

    return CudaRunner.why_not(loaded)
