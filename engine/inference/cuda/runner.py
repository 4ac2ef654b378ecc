"""Qwen2, Qwen3 and Llama on one CUDA device.

A step is narrow or wide. Narrow: up to 64 rows (last and draft tokens of some sequences), a CUDA graph of our kernels,
bound by reading the weights. Wide: a chunk of a prompt, weights widened to 16 bit one layer at a time and multiplied by
cuBLAS, bound by arithmetic. Both keep the residual in fp32 and keys and values in one pool of pages.

Not thread-safe: the engine's thread owns it. Not covered: sliding windows, rotary embeddings that depend on the
context's length, several devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import nn

from engine.errors import AdapterError
from engine.inference.cuda import kernels as triton_kernels
from engine.inference.cuda.driver import allow_shared_memory, whole_segments
from engine.inference.cuda.paged_kv import SCRATCH_PAGE, PagedKV, PagePool
from engine.inference.cuda.tuning import MOST_SPLITS, Kind, Tiles, TuningFile, candidate_tiles, default_tiles
from engine.inference.cuda.weights import INT8, NF4, PLAIN, Arena, FusedLinear, LoraWeights, base_of, fuse, kind_of

if TYPE_CHECKING:
    from engine.inference.loading import LoadedModel

kernels: Any = triton_kernels  # a kernel is launched as `kernel[grid](...)`, which its type does not know

_Launch = tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_KIND_NAMES: dict[int, Kind] = {PLAIN: "plain", INT8: "int8", NF4: "nf4"}
_LORA_SPLITS = 4
_NARROW_PROMPT = 256  # tokens up to which narrow steps, launched as graphs, are faster than a wide one
_NORM_WARPS = 32
_ATTENTION_WARPS = 4
_COMBINE_WARPS = 1
_COMBINE_SEGMENTS = 32
_NUM_STAGING = 4


@dataclass(slots=True)
class _Layer:
    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    kv: torch.Tensor  # keys, then values: [2, num_pages, num_kv_heads, page_tokens, head_dim]

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(slots=True)
class _Lora:
    """Static buffers of one fused layer's adapter: `a` `[parts * rank, num_inputs]`, also in the order of the kernel's
    inputs; `b` `[num_outputs, rank]`.
    """

    a: torch.Tensor
    a_in_order: torch.Tensor
    b: torch.Tensor


class CudaRunner:
    """A model's fused weights, KV pool and CUDA graphs.

    Args:
        loaded: The model; its layers' parameters become views into fused tensors.
        num_kv_tokens: Tokens that the KV pool holds.
        page_tokens: Tokens of a page, a power of two.
        tuning_path: File for measured tile sizes; None keeps nothing.
        dry: Called for kernels instead of launching them (`precompile.py`). Then all is made of shapes without memory,
            the model stays as it is, and only `dry_run` may be called.
    """

    max_decode_tokens = kernels.MAX_ROWS
    chunk_tokens = 1024

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_kv_tokens: int,
        page_tokens: int = 64,
        tuning_path: Path | None = None,
        dry: Any = None,
    ) -> None:
        assert not (reason := self.why_not(loaded)), reason
        self._kernels: Any = dry or kernels
        model: Any = loaded.model
        config = model.config.get_text_config()
        self.device = torch.device("meta") if dry else loaded.device
        self.vocab_size = loaded.vocab_size
        self._hidden_size = int(config.hidden_size)
        self._num_heads = int(config.num_attention_heads)
        self._num_kv_heads = int(config.num_key_value_heads)
        self._head_dim = _head_dim(config)
        self._inner_size = int(config.intermediate_size)
        self._eps = float(config.rms_norm_eps)
        facts = torch.cuda.get_device_properties(loaded.device)
        self._device_name, self._can_pdl, self._num_programs = (
            facts.name,
            facts.major >= 9,
            2 * facts.multi_processor_count,
        )
        self._tuning = TuningFile(tuning_path)
        self._dtype = model.get_input_embeddings().weight.dtype
        self._embeddings = model.get_input_embeddings().weight.data
        self._final_norm = model.model.norm.weight.data
        self._head = fuse("head", [model.get_output_embeddings()], self._dtype, self.device)
        num_pages = -(-num_kv_tokens // page_tokens)
        layers = _different_layers(model) if dry else list(model.model.layers)
        shape = (len(layers), 2, num_pages + 1, self._num_kv_heads, page_tokens, self._head_dim)
        with torch.inference_mode(False), torch.no_grad():
            self._layers: list[_Layer] = []
            with nullcontext() if dry else whole_segments():
                for layer in layers:
                    self._give_memory_back()  # what the layer before has left
                    self._layers.append(_read_layer(layer, self._dtype, self.device))
                self._give_memory_back()
                self._kv = torch.zeros(shape, dtype=self._dtype, device=self.device)  # last: it fits into no hole
            for layer, kv in zip(self._layers, self._kv, strict=True):
                layer.kv = kv
            self._cos, self._sin = _rotary_table(model, num_pages * page_tokens, self.device)
        page_bytes = self._kv[:, :, 0].numel() * self._kv.element_size()
        self._pool = PagePool(num_pages, page_tokens, page_bytes, self._copy_page)
        self._page_tokens = page_tokens
        self._make_buffers(num_pages * page_tokens)
        self._tiles: dict[tuple[str, int], Tiles] = {}
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        self._graph_pool: Any = None
        self._lora_rank = 0
        self._lora: list[tuple[_Lora, ...]] = []
        self._lora_is_on = False

    def _make_buffers(self, max_context: int) -> None:
        """What the graphs read and write; made once, so that their addresses stay."""
        rows, fp32 = kernels.MAX_ROWS, torch.float32
        new = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=self.device)  # noqa: E731
        self._table_width = -(-max_context // self._page_tokens)
        self._max_segments = kernels.num_segments(max_context)
        step_size = kernels.PAGE_TABLE + rows * self._table_width
        self._step = new(step_size, dtype=torch.int32)
        if self.device.type == "cuda":
            self._staging = [torch.zeros(step_size, dtype=torch.int32).pin_memory() for _ in range(_NUM_STAGING)]
            self._staging_events = [torch.cuda.Event() for _ in range(_NUM_STAGING)]
        self._next_staging = 0
        width = self._num_heads * self._head_dim
        self._residual = new(rows, self._hidden_size, dtype=fp32)
        self._normed = new(rows, self._hidden_size, dtype=self._dtype)
        self._final = new(rows, self._hidden_size, dtype=self._dtype)
        self._q = new(rows, width, dtype=self._dtype)
        self._attended = new(rows, width, dtype=self._dtype)
        self._inner = new(rows, self._inner_size, dtype=self._dtype)
        self._sums = new(rows * self._num_heads * self._max_segments * 2, dtype=fp32)
        self._logits = new(rows, self.vocab_size, dtype=fp32)
        self._sums_of = {  # splits of a layer's output
            "qkv": new(MOST_SPLITS * rows * self._layers[0].qkv.num_outputs, dtype=fp32),
            "o": new(MOST_SPLITS * rows * self._hidden_size, dtype=fp32),
            "down": new(MOST_SPLITS * rows * self._hidden_size, dtype=fp32),
        }
        values = torch.tensor(kernels.NF4_VALUES, dtype=fp32)
        self._values = values.to(self.device)
        patterns = values.to(self._dtype).view(torch.int16).tolist()
        self._table = torch.tensor(kernels.nf4_table(patterns), dtype=torch.int32, device=self.device)
        needs_scratch = any(linear.kind != PLAIN for layer in self._layers for linear in layer.linears)
        num_widened = max(
            linear.num_outputs * linear.num_inputs // (2 if linear.name == "gate_up" else 1)
            for linear in self._layers[0].linears
        )
        num_widened = num_widened if needs_scratch else 0
        num_parts = rows * self._num_heads * self._max_segments * self._head_dim
        shared = new(max(num_parts * 4, num_widened * 2), dtype=torch.uint8)
        self._parts = shared[: num_parts * 4].view(fp32)  # narrow steps
        self._scratch = shared[: num_widened * 2].view(self._dtype)  # wide steps
        self._give_memory_back()

    def _give_memory_back(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- what it can run ---------------------------------------------------------------------------------------------

    @classmethod
    def why_not(cls, loaded: LoadedModel) -> str:
        """Why this model cannot run here; empty if it can.

        Args:
            loaded: The model.

        Returns:
            The reason, in words for the user.
        """
        model: Any = loaded.model
        config = model.config.get_text_config()
        if loaded.device.type != "cuda":
            return f"the device is {loaded.device}, not CUDA"
        if torch.cuda.get_device_capability(loaded.device) < (8, 0):
            return "the GPU is older than NVIDIA's Ampere generation"
        if config.model_type not in _MODEL_TYPES:
            return f"models of type {config.model_type} run on the plain path"
        if config.hidden_act not in ("silu", "swish"):
            return f"the activation {config.hidden_act} runs on the plain path"
        if any("full" not in kind for kind in getattr(config, "layer_types", None) or []) or (
            getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        ):
            return "sliding-window attention runs on the plain path"
        if (getattr(model.model.rotary_emb, "rope_type", "default")) in ("dynamic", "longrope"):
            return "its rotary embedding depends on the context's length"
        head_dim = _head_dim(config)
        if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
            return f"heads of {head_dim} elements run on the plain path"
        modules = [module for layer in model.model.layers for group in _groups(layer) for module in group]
        kinds = [kind_of(module) for module in modules]
        if None in kinds or kind_of(model.get_output_embeddings()) != PLAIN:
            odd = next((module for module, kind in zip(modules, kinds, strict=True) if kind is None), "its head")
            return (
                f"weights held as {odd if isinstance(odd, str) else type(base_of(odd)).__name__} run on the plain path"
            )
        if any(int(base_of(module).in_features) % 32 for module in modules):  # pyright: ignore[reportArgumentType]
            return "a layer's inputs are no multiple of 32"
        if any(
            len({kind_of(module) for module in group}) > 1 for layer in model.model.layers for group in _groups(layer)
        ):
            return "layers of the same input are held in different ways"
        return ""

    # --- KV cache ----------------------------------------------------------------------------------------------------

    def new_kv(self) -> PagedKV:
        """An empty sequence."""
        return PagedKV(self._pool)

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self._page_tokens

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._pool.num_free_pages

    @property
    def free_tokens(self) -> int:
        """Tokens of all free pages."""
        return self._pool.num_free_pages * self._page_tokens

    def _copy_page(self, source: int, target: int) -> None:
        self._kv[:, :, target].copy_(self._kv[:, :, source])

    # --- narrow steps ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, rows: Sequence[tuple[PagedKV, Sequence[int]]]) -> torch.Tensor:
        """One step of several sequences; all tokens are added to their caches.

        Args:
            rows: For each sequence its cache and its next tokens: the last one and drafts. 1 to 64 tokens together.

        Returns:
            Logits after each token, fp32 `[num_tokens, vocab_size]`; a view that the next call overwrites. A row's bits
            are the same whatever else is in a step of up to 16 tokens.

        Raises:
            EngineError: The KV pool is full; no cache has changed.
        """
        num_tokens = self._run_narrow(rows, with_head=True)
        return self._logits[:num_tokens]

    def _run_narrow(self, rows: Sequence[tuple[PagedKV, Sequence[int]]], *, with_head: bool) -> int:
        num_tokens = sum(len(token_ids) for _, token_ids in rows)
        assert 0 < num_tokens <= self.max_decode_tokens, "a step has 1 to 64 tokens"
        width = next(width for width in WIDTHS if width >= num_tokens)
        graph = self._graph(width, with_head)
        self._send_step(rows, width)
        graph.replay()
        return num_tokens

    def _send_step(self, rows: Sequence[tuple[PagedKV, Sequence[int]]], width: int) -> None:
        """Make room in the caches and copy the step's description to the device."""
        index = self._next_staging
        self._next_staging = (index + 1) % _NUM_STAGING
        self._staging_events[index].synchronize()
        host = self._staging[index].numpy()
        lengths = [kv.num_tokens for kv, _ in rows]
        slots: list[np.ndarray] = []
        try:
            for kv, token_ids in rows:
                slots.append(kv.append(len(token_ids)))
        except BaseException:
            for (kv, _), length in zip(rows[: len(slots)], lengths, strict=False):
                kv.truncate(length)
            raise
        num_tokens = num_blocks = longest = 0
        for line, ((kv, token_ids), start, places) in enumerate(zip(rows, lengths, slots, strict=True)):
            end = num_tokens + len(token_ids)
            host[kernels.TOKEN_IDS + num_tokens : kernels.TOKEN_IDS + end] = token_ids
            host[kernels.POSITIONS + num_tokens : kernels.POSITIONS + end] = range(start, start + len(token_ids))
            host[kernels.SLOTS + num_tokens : kernels.SLOTS + end] = places
            for offset in range(0, len(token_ids), kernels.QUERY_TOKENS):
                host[kernels.BLOCK_FIRST + num_blocks] = num_tokens + offset
                host[kernels.BLOCK_ROWS + num_blocks] = min(kernels.QUERY_TOKENS, len(token_ids) - offset)
                host[kernels.BLOCK_POSITION + num_blocks] = start + offset
                host[kernels.BLOCK_LINE + num_blocks] = line
                host[kernels.BLOCK_OLD + num_blocks] = start
                num_blocks += 1
            at = kernels.PAGE_TABLE + line * self._table_width
            host[at : at + len(kv.pages)] = kv.pages
            longest = max(longest, kv.num_tokens)
            num_tokens = end
        for start in (kernels.TOKEN_IDS, kernels.POSITIONS):
            host[start + num_tokens : start + width] = 0
        host[kernels.SLOTS + num_tokens : kernels.SLOTS + width] = SCRATCH_PAGE * self._page_tokens
        host[0], host[1] = num_blocks, kernels.num_segments(longest)
        used = kernels.PAGE_TABLE + len(rows) * self._table_width
        self._step[:used].copy_(self._staging[index][:used], non_blocking=True)
        self._staging_events[index].record()

    def _graph(self, width: int, with_head: bool) -> torch.cuda.CUDAGraph:
        key = (width, with_head, self._lora_is_on)
        if key not in self._graphs:
            self._graphs[key] = self._capture(width, with_head)
        return self._graphs[key]

    def _capture(self, width: int, with_head: bool) -> torch.cuda.CUDAGraph:
        self._step.zero_()  # no query blocks: the kernels are compiled and touch only the scratch page
        self._forward_narrow(width, with_head=with_head)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
            self._forward_narrow(width, with_head=with_head)
        self._graph_pool = self._graph_pool or graph.pool()
        return graph

    def _forward_narrow(self, width: int, *, with_head: bool) -> None:
        step = self._step
        positions = step[kernels.POSITIONS :]
        added: torch.Tensor | None = None
        splits = 0
        for index, layer in enumerate(self._layers):
            lora = self._lora[index] if self._lora_is_on else (None,) * 4
            self._norm(width, layer.input_norm, added, splits, self._normed, layer.qkv.kind)
            splits = self._linear(layer.qkv, self._normed, self._sums_of["qkv"], width, lora[0])
            self._rope(
                layer, self._sums_of["qkv"], splits, self._q, positions, step[kernels.SLOTS :], width, self._can_pdl
            )
            self._attend_narrow(layer, positions, width)
            splits = self._linear(layer.o, self._attended, self._sums_of["o"], width, lora[1])
            self._norm(width, layer.post_norm, self._sums_of["o"], splits, self._normed, layer.gate_up.kind)
            self._linear(layer.gate_up, self._normed, self._inner, width, lora[2], layer.down.kind)
            splits = self._linear(layer.down, self._inner, self._sums_of["down"], width, lora[3])
            added = self._sums_of["down"]
        self._norm(width, self._final_norm, added, splits, self._final, PLAIN)
        if with_head:
            self._linear(self._head, self._final, self._logits, width, None)

    def _norm(
        self, width: int, gain: torch.Tensor, added: torch.Tensor | None, splits: int, out: torch.Tensor, order: int
    ) -> None:
        """Of the static residual; without `added` it starts from the embeddings."""
        self._kernels.norm_kernel[(width,)](
            self._residual, added if added is not None else self._residual, self._embeddings,
            self._step[kernels.TOKEN_IDS :], gain, out, width, self._eps,
            H=self._hidden_size, BLOCK=_power_of_2(self._hidden_size), SPLITS=splits, EMBED=added is None,
            ORDER=order, PDL=self._can_pdl, num_warps=_NORM_WARPS, launch_pdl=self._can_pdl,
        )  # fmt: skip

    def _linear(
        self,
        linear: FusedLinear,
        x: torch.Tensor,
        out: torch.Tensor,
        width: int,
        lora: _Lora | None,
        order: int = PLAIN,
    ) -> int:
        """Launch one layer of a narrow step; returns in how many splits its output lies."""
        block_rows = max(16, width)
        tiles = self._tiles_of(linear, block_rows)
        if lora is not None:
            self._lora_a(linear, x, lora, width)
        self._start(self._launch(linear, x, out, width, tiles, lora, order))
        return tiles.splits

    def _start(self, launch: _Launch) -> None:
        grid, arguments, options = launch
        if options["KIND"] == NF4 and options["ASM"] and self.device.type == "cuda":
            allow_shared_memory(kernels.linear_kernel.warmup(*arguments, grid=grid, **options))
        self._kernels.linear_kernel[grid](*arguments, **options)

    def _launch(
        self, linear: FusedLinear, x: torch.Tensor, out: torch.Tensor, width: int, tiles: Tiles,
        lora: _Lora | None = None, order: int = PLAIN,
    ) -> _Launch:  # fmt: skip
        """Grid, arguments and options of the kernel for one layer."""
        silu = linear.name == "gate_up"
        ends = [sum(linear.sizes[: index + 1]) for index in range(len(linear.sizes))]
        num_cols = linear.num_outputs // 2 if silu else linear.num_outputs
        arguments = (
            x, linear.words, next(one for one in (linear.packed_scale, linear.scale, self._values) if one is not None),
            linear.row_scale if linear.row_scale is not None else self._values,
            linear.bias if linear.bias is not None else x, self._lora_t if lora is not None else self._values,
            lora.b if lora is not None else x, self._table, out, width, tiles.prefetch,
        )  # fmt: skip
        options = dict(
            N=linear.num_outputs, K=linear.num_inputs, BN=tiles.cols, BK=tiles.inputs, BM=_tile_rows(linear, width),
            KIND=linear.kind, SILU=silu, HAS_BIAS=linear.bias is not None,
            RANK=self._lora_rank if lora is not None else 0, LORA_PARTS=len(linear.sizes),
            LORA_SPLITS=_lora_splits(linear), LORA_END_0=ends[0], LORA_END_1=ends[min(1, len(ends) - 1)],
            ORDER=order, STAGES=tiles.num_stages, THREADS=32 * tiles.num_warps,
            PDL=self._can_pdl, ASM=kernels.USE_ASM,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, launch_pdl=self._can_pdl,
        )  # fmt: skip
        return (-(-num_cols // (tiles.cols // 2 if silu else tiles.cols)), tiles.splits), arguments, options

    def _lora_a(self, linear: FusedLinear, x: torch.Tensor, lora: _Lora, width: int) -> None:
        """The first factor for all layers of a fused one: `[_LORA_SPLITS, width, parts * rank]`."""
        weight = lora.a_in_order
        block = next(size for size in (128, 64, 32) if linear.num_inputs % (size * _lora_splits(linear)) == 0)
        tiles = Tiles(cols=16, inputs=block, splits=_lora_splits(linear), num_warps=2)
        factor = FusedLinear("lora", PLAIN, weight, None, None, None, None, (len(weight),), linear.num_inputs)
        self._start(self._launch(factor, x, self._lora_t, width, tiles))

    def _rope(
        self, layer: _Layer, qkv: torch.Tensor, splits: int, q: torch.Tensor, positions: torch.Tensor,
        slots: torch.Tensor, width: int, pdl: bool,
    ) -> None:  # fmt: skip
        self._kernels.rope_kernel[(width, self._num_heads + 2 * self._num_kv_heads)](
            qkv, q, layer.kv, self._cos, self._sin, layer.q_norm if layer.q_norm is not None else self._cos,
            layer.k_norm if layer.k_norm is not None else self._cos, positions, slots, width, layer.kv[0].numel(),
            self._eps, NH=self._num_heads, NKV=self._num_kv_heads, HD=self._head_dim, PAGE=self._page_tokens,
            SPLITS=splits, HAS_NORM=layer.q_norm is not None, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip

    def _attend_narrow(self, layer: _Layer, positions: torch.Tensor, width: int) -> None:
        group = _power_of_2(self._num_heads // self._num_kv_heads)
        self._kernels.decode_attention_kernel[(self._num_programs,)](
            self._q, layer.kv, self._step, self._parts, self._sums, layer.kv[0].numel(), self._softmax_factor,
            self._table_width, self._max_segments, NH=self._num_heads, NKV=self._num_kv_heads, GP=group,
            HD=self._head_dim, PAGE=self._page_tokens, PDL=self._can_pdl,
            num_warps=_ATTENTION_WARPS, num_stages=1, launch_pdl=self._can_pdl,
        )  # fmt: skip
        self._kernels.combine_kernel[(width, self._num_heads)](
            self._parts, self._sums, positions, self._attended, self._max_segments, NH=self._num_heads,
            HD=self._head_dim, CHUNK=_COMBINE_SEGMENTS, ORDER=layer.o.kind, PDL=self._can_pdl, num_warps=_COMBINE_WARPS,
            launch_pdl=self._can_pdl,
        )  # fmt: skip

    @property
    def _softmax_factor(self) -> float:
        return self._head_dim**-0.5 * 1.4426950408889634  # exp2 instead of exp

    # --- tiles -------------------------------------------------------------------------------------------------------

    def _tiles_of(self, linear: FusedLinear, block_rows: int) -> Tiles:
        key = (linear.name, block_rows)
        if key not in self._tiles:
            self._tiles[key] = self._tuning.get(self._tuning_key(linear, block_rows)) or default_tiles(
                linear.num_outputs, linear.num_inputs, kind=_KIND_NAMES[linear.kind],
                can_split=linear.name in self._sums_of, block_rows=block_rows,
            )  # fmt: skip
        return self._tiles[key]

    def _tuning_key(self, linear: FusedLinear, block_rows: int) -> str:
        silu = " silu" if linear.name == "gate_up" else ""
        shape = f"{linear.num_outputs}x{linear.num_inputs} {_KIND_NAMES[linear.kind]}{silu}"
        return f"{self._device_name}, {shape}, {self._dtype}, {block_rows} rows"

    def warm_up(
        self, progress: Callable[[str], None] = lambda message: None, *, tune: bool = False,
        widths: Sequence[int] = WIDTHS,
    ) -> None:  # fmt: skip
        """Compile the kernels and capture a graph for each width. Compiled kernels stay in Triton's cache on disk.

        Args:
            progress: Called with what is being done, in words.
            tune: Measure tile sizes that the tuning file lacks; takes about a minute a model on a large machine.
            widths: Of steps that are prepared now; others are when they are first used.
        """
        with torch.inference_mode():
            if tune:
                self.tune(progress)
            for width in widths:
                progress(f"preparing steps of {width} tokens")
                self._graph(width, with_head=True)
            if kernels.MAX_ROWS in widths:
                self._graph(kernels.MAX_ROWS, with_head=False)
            progress("preparing prompts")
            kv = self.new_kv()
            self.prefill(kv, [0] * min(self.chunk_tokens, self.free_tokens), want_logits=True)
            kv.release()
            torch.cuda.synchronize(self.device)

    def capturing(self) -> Iterator[str]:
        """Capture a graph for each width that has none yet.

        Yields:
            Nothing to be told, after each.
        """
        for width in WIDTHS:
            with torch.inference_mode():
                self._graph(width, with_head=True)
            yield ""
        with torch.inference_mode():
            self._graph(kernels.MAX_ROWS, with_head=False)

    @torch.inference_mode()
    def dry_run(self, lora_rank: int = 0) -> None:
        """Go through every launch of any step and prompt; made with `dry`.

        Args:
            lora_rank: Of an adapter that it runs with besides the base; 0 for none.
        """
        for width in WIDTHS:
            self._forward_narrow(width, with_head=True)
        self._run_wide(self.new_kv(), [0] * min(self.chunk_tokens, self.free_tokens), last_only=True)
        if lora_rank:
            self._make_lora_buffers(_padded_rank(lora_rank))
            self._lora_is_on = True
            for width in WIDTHS:
                self._forward_narrow(width, with_head=True)

    @torch.inference_mode()
    def tune(
        self, progress: Callable[[str], None] = lambda message: None, *, block_rows: Sequence[int] = (16, 32, 64),
        candidates: Callable[..., list[Tiles]] = candidate_tiles,
    ) -> dict[str, list[tuple[float, Tiles]]]:  # fmt: skip
        """Measure tiles for each layer shape and keep the fastest in the tuning file.

        Args:
            progress: Called with what is being done, in words.
            block_rows: For which heights of a step, of 16, 32 and 64.
            candidates: Makes the tiles to try, from the arguments of `candidate_tiles`.

        Returns:
            By shape: microseconds a launch and tiles, fastest first; shapes that were known are left out.
        """
        measured: dict[str, list[tuple[float, Tiles]]] = {}
        for rows in block_rows:
            for index in range(len(_PART_NAMES) + 1):
                linears = [self._head] if index == len(_PART_NAMES) else [one.linears[index] for one in self._layers]
                key = self._tuning_key(linears[0], rows)
                if self._tuning.get(key) is None:
                    progress(f"measuring {linears[0].name} for {rows} rows")
                    measured[key] = self._measure(linears, rows, candidates)
                    self._tuning.put([(key, measured[key][0][1])])
        self._tiles.clear()
        self._graphs.clear()
        return measured

    def _measure(
        self, linears: Sequence[FusedLinear], rows: int, candidates: Callable[..., list[Tiles]]
    ) -> list[tuple[float, Tiles]]:
        linear = linears[0]
        tried = candidates(
            linear.num_outputs, linear.num_inputs, kind=_KIND_NAMES[linear.kind],
            can_split=linear.name in self._sums_of, block_rows=rows,
        )  # fmt: skip
        x = torch.randn(rows, linear.num_inputs, dtype=self._dtype, device=self.device)
        out = {"gate_up": self._inner, "head": self._logits}.get(linear.name)
        out = self._sums_of[linear.name] if out is None else out

        def compile_one(tiles: Tiles) -> None:
            grid, arguments, options = self._launch(linear, x, out, rows, tiles)
            try:
                kernels.linear_kernel.warmup(*arguments, grid=grid, **options)
            except Exception:  # too much shared memory or too many registers: it is no candidate
                return

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, tried))
        results: list[tuple[float, Tiles]] = []
        for tiles in tried:
            try:
                results.append((self._time(linears, x, out, rows, tiles), tiles))
            except triton.runtime.errors.OutOfResources:
                continue
        return sorted(results, key=lambda result: result[0])

    def _time(
        self, linears: Sequence[FusedLinear], x: torch.Tensor, out: torch.Tensor, rows: int, tiles: Tiles
    ) -> float:
        """Microseconds a launch, over all layers in turn so that the L2 cache holds none of their weights."""
        launches = [self._launch(linear, x, out, rows, tiles) for linear in linears]

        def run() -> None:
            for launch in launches:
                self._start(launch)

        return self._replayed(run) / len(linears)

    # --- what it costs -----------------------------------------------------------------------------------------------

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of weights and scales that a step reads, the head included."""
        linears = [linear for layer in self._layers for linear in layer.linears]
        return sum(_num_bytes(linear) for linear in (*linears, self._head))

    @property
    def num_kv_bytes_of_a_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return self._pool.page_bytes // self._page_tokens

    @torch.inference_mode()
    def time_kernels(self, rows: int = 1) -> dict[str, tuple[float, int]]:
        """Time of each kernel of a narrow step, back to back over all layers.

        Args:
            rows: Of the step.

        Returns:
            By name: microseconds a launch, and the bytes that it must read.
        """
        kv = self.new_kv()
        self.prefill(kv, [0] * min(1024, self.free_tokens - rows), want_logits=False)
        self._send_step([(kv, [0] * rows)], rows)
        step = self._step
        positions, slots = step[kernels.POSITIONS :], step[kernels.SLOTS :]
        first = self._layers[0]
        outputs = (self._sums_of["qkv"], self._sums_of["o"], self._inner, self._sums_of["down"])
        inputs = (self._normed, self._attended, self._normed, self._inner)
        runs: dict[str, tuple[Callable[[_Layer], object], int]] = {}
        for index, linear in enumerate(first.linears):

            def run(layer: _Layer, index: int = index) -> None:
                self._linear(layer.linears[index], inputs[index], outputs[index], rows, None)

            runs[linear.name] = run, _num_bytes(linear)
        splits = self._tiles_of(first.o, max(16, rows)).splits
        runs["norm"] = (
            lambda layer: self._norm(
                rows, layer.post_norm, self._sums_of["o"], splits, self._normed, layer.gate_up.kind
            ),
            self._hidden_size * 4 * (1 + splits) * rows,
        )
        qkv_splits = self._tiles_of(first.qkv, max(16, rows)).splits
        runs["rope"] = (
            lambda layer: self._rope(layer, outputs[0], qkv_splits, self._q, positions, slots, rows, self._can_pdl),
            first.qkv.num_outputs * 4 * qkv_splits * rows,
        )
        runs["attention"] = (
            lambda layer: self._attend_narrow(layer, positions, rows),
            kv.num_tokens * self.num_kv_bytes_of_a_token // len(self._layers),
        )
        times: dict[str, tuple[float, int]] = {}
        for name, (run_one, num_bytes) in runs.items():
            us = self._replayed(lambda run_one=run_one: [run_one(layer) for layer in self._layers])
            times[name] = us / len(self._layers), num_bytes
        head = self._replayed(
            lambda: [self._linear(self._head, self._final, self._logits, rows, None) for _ in range(8)]
        )
        times["head"] = head / 8, _num_bytes(self._head)
        kv.release()
        return times

    def _replayed(self, run: Callable[[], object]) -> float:
        """Microseconds of what `run` launches, as a graph."""
        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        times: list[float] = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
        return min(times)

    # --- wide steps --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, kv: PagedKV, token_ids: Sequence[int], *, want_logits: bool) -> torch.Tensor | None:
        """Add a prompt's tokens, or the next chunk of them, to a sequence.

        Args:
            kv: The sequence's cache.
            token_ids: At least one; more than `chunk_tokens` are computed in chunks, with no return in between.
            want_logits: Whether the last token's logits are asked for.

        Returns:
            Logits after the last token, fp32 `[vocab_size]`, a view that the next call overwrites; or None.

        Raises:
            EngineError: The KV pool is full; what was added stays.
        """
        last: torch.Tensor | None = None
        size = self.chunk_tokens if len(token_ids) > _NARROW_PROMPT else self.max_decode_tokens
        for start in range(0, len(token_ids), size):
            chunk = token_ids[start : start + size]
            if len(chunk) <= self.max_decode_tokens:
                self._run_narrow([(kv, chunk)], with_head=False)
                last = self._final[len(chunk) - 1 : len(chunk)]
            else:
                last = self._run_wide(kv, chunk, last_only=True)
        assert last is not None, "a prompt has at least one token"
        if not want_logits:
            return None
        self._linear(self._head, last.contiguous(), self._logits, 1, None)
        return self._logits[0]

    @torch.inference_mode()
    def hidden(self, kv: PagedKV, token_ids: Sequence[int]) -> torch.Tensor:
        """Hidden states after the final norm, as embeddings need them; the tokens are added to the sequence.

        Args:
            kv: The sequence's cache.
            token_ids: At least one.

        Returns:
            16 bit `[num_tokens, hidden_size]`.

        Raises:
            EngineError: The KV pool is full; what was added stays.
        """
        chunks = range(0, len(token_ids), self.chunk_tokens)
        return torch.cat([self._run_wide(kv, token_ids[at : at + self.chunk_tokens], last_only=False) for at in chunks])

    def _run_wide(self, kv: PagedKV, token_ids: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """A chunk of one sequence; returns hidden states after the final norm, `[1 or num_tokens, hidden_size]`."""
        num_rows, start = len(token_ids), kv.num_tokens
        slots = kv.append(num_rows)
        ids = np.asarray(token_ids, dtype=np.int32)
        places = np.arange(start, start + num_rows, dtype=np.int32)
        inputs = torch.from_numpy(np.concatenate([ids, places, slots, kv.pages])).to(self.device)
        positions, slots_there, table = inputs[num_rows:], inputs[2 * num_rows :], inputs[3 * num_rows :]
        new = lambda width, dtype=self._dtype: torch.empty((num_rows, width), dtype=dtype, device=self.device)  # noqa: E731
        residual, normed = new(self._hidden_size, torch.float32), new(self._hidden_size)
        q, attended = new(self._q.shape[1]), new(self._q.shape[1])
        inner = new(self._inner_size)
        added: torch.Tensor | None = None
        with _full_precision_sums():
            for index, layer in enumerate(self._layers):
                lora = self._lora[index] if self._lora_is_on else (None,) * 4
                self._norm_wide(residual, added, inputs, layer.input_norm, normed)
                qkv = self._multiply(layer.qkv, normed, lora[0])
                self._rope(layer, qkv, 1, q, positions, slots_there, num_rows, False)
                self._attend_wide(layer, q, table, attended, start)
                self._norm_wide(residual, self._multiply(layer.o, attended, lora[1]), inputs, layer.post_norm, normed)
                self._multiply_gated(layer.gate_up, normed, inner, lora[2])
                added = self._multiply(layer.down, inner, lora[3])
        self._norm_wide(residual, added, inputs, self._final_norm, normed)
        return normed[-1:] if last_only else normed

    def _norm_wide(
        self, residual: torch.Tensor, added: torch.Tensor | None, token_ids: torch.Tensor, gain: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        self._kernels.norm_kernel[(len(residual),)](
            residual, added if added is not None else residual, self._embeddings, token_ids, gain, out, len(residual),
            self._eps, H=self._hidden_size, BLOCK=_power_of_2(self._hidden_size), SPLITS=int(added is not None),
            EMBED=added is None, ORDER=PLAIN, PDL=False, num_warps=8,
        )  # fmt: skip

    def _attend_wide(
        self, layer: _Layer, q: torch.Tensor, table: torch.Tensor, out: torch.Tensor, position: int
    ) -> None:
        block = 64 if self._head_dim > 128 else 128
        self._kernels.prefill_attention_kernel[(-(-len(q) // block), self._num_heads)](
            q, layer.kv, table, out, len(q), position, layer.kv[0].numel(), self._softmax_factor, NH=self._num_heads,
            NKV=self._num_kv_heads, HD=self._head_dim, PAGE=self._page_tokens, BQ=block, BLOCK=64,
            num_warps=8 if block == 128 else 4, num_stages=3,
        )  # fmt: skip

    def _multiply(self, linear: FusedLinear, x: torch.Tensor, lora: _Lora | None) -> torch.Tensor:
        """`[num_rows, num_outputs]`, 16 bit."""
        weight = self._widened(linear, 0, linear.num_outputs)
        y = x @ weight.T if linear.bias is None else torch.addmm(linear.bias, x, weight.T)
        if lora is not None:
            start = 0
            for part, size in enumerate(linear.sizes):
                self._add_lora(y[:, start : start + size], x, lora, part, start, start + size)
                start += size
        return y

    def _multiply_gated(self, linear: FusedLinear, x: torch.Tensor, out: torch.Tensor, lora: _Lora | None) -> None:
        """Gate, up and activation, for so many columns at a time as the scratch holds."""
        inner, num_rows = self._inner_size, len(x)
        num_cols = inner
        if linear.kind != PLAIN:
            num_cols = min(inner, self._scratch.numel() // linear.num_inputs // 2)
        for start in range(0, inner, num_cols):
            end = min(start + num_cols, inner)
            gate_up = torch.empty((num_rows, 2 * (end - start)), dtype=x.dtype, device=x.device)
            for part, half in enumerate(gate_up.split(end - start, dim=1)):
                first, last = part * inner + start, part * inner + end
                weight = self._widened(linear, first, last)
                torch.mm(x, weight.T, out=half)
                if linear.bias is not None:
                    half += linear.bias[first:last]
                if lora is not None:
                    self._add_lora(half, x, lora, part, first, last)
            self._kernels.silu_kernel[(num_rows, -(-(end - start) // 1024))](
                gate_up, out[:, start:], inner, INNER=end - start, BLOCK=1024
            )

    def _add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: _Lora, part: int, start: int, end: int) -> None:
        rank = self._lora_rank
        y.addmm_(x @ lora.a[part * rank : (part + 1) * rank].T, lora.b[start:end].T)

    def _widened(self, linear: FusedLinear, start: int, end: int) -> torch.Tensor:
        """Some of a layer's rows in 16 bit: the weights themselves, or a copy in the scratch until the next call."""
        if linear.kind == PLAIN:
            return linear.weight[start:end]
        assert linear.scale is not None
        num_rows, num_inputs = end - start, linear.num_inputs
        out = self._scratch[: num_rows * num_inputs].view(num_rows, num_inputs)
        weight, scale = linear.weight[start:end], linear.scale[start:end]
        if linear.kind == INT8:
            self._kernels.dequantize_int8_kernel[(num_rows,)](weight, scale, out, K=num_inputs, BLOCK=4096, num_warps=8)
        else:
            num_bytes = weight.numel()
            self._kernels.dequantize_nf4_kernel[(-(-num_bytes // 2048),)](
                weight, scale, self._values, out, num_bytes, BLOCK=2048, num_warps=8
            )
        return out

    # --- adapters ----------------------------------------------------------------------------------------------------

    def use_adapter(self, weights: LoraWeights | None) -> None:
        """Run with an adapter from now on. Caches computed with another one are no longer right; that is the caller's.

        Args:
            weights: Its pairs by layer name, None for the base alone.

        Raises:
            AdapterError: It changes a layer that the fast path does not change.
        """
        if weights is None:
            self._lora_is_on = False
            return
        rank = _padded_rank(max(pair.a.shape[0] for pair in weights.values()))
        if rank > self._lora_rank:
            self._make_lora_buffers(rank)
        left = dict(weights)
        for index, (layer, buffers) in enumerate(zip(self._layers, self._lora, strict=True)):
            for linear, lora, names in zip(layer.linears, buffers, _PART_NAMES, strict=True):
                pairs = [left.pop(f"model.layers.{index}.{name}", None) for name in names]
                _fill_lora(linear, lora, pairs, self._lora_rank)
        if left:
            raise AdapterError(
                f"The adapter changes {len(left)} layers that cannot be changed here, such as {min(left)}"
            )
        self._lora_is_on = True

    def _make_lora_buffers(self, rank: int) -> None:
        self._lora_rank = rank
        self._graphs = {key: graph for key, graph in self._graphs.items() if not key[2]}
        new = lambda *shape: torch.zeros(shape, dtype=self._dtype, device=self.device)  # noqa: E731
        self._lora = []
        for layer in self._layers:
            made: list[_Lora] = []
            for linear in layer.linears:
                a = new(len(linear.sizes) * rank, linear.num_inputs)
                in_order = torch.zeros_like(a) if linear.kind != PLAIN else a
                made.append(_Lora(a, in_order, new(linear.num_outputs, rank)))
            self._lora.append(tuple(made))
        self._lora_t = torch.zeros(_LORA_SPLITS * kernels.MAX_ROWS * 3 * rank, dtype=torch.float32, device=self.device)


_PART_NAMES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def _groups(layer: nn.Module) -> Iterator[list[nn.Module]]:
    """A decoder layer's linear layers, those of the same input together."""
    for names in _PART_NAMES:
        yield [layer.get_submodule(name) for name in names]


def _read_layer(layer: Any, dtype: torch.dtype, device: torch.device) -> _Layer:
    names, groups = ("qkv", "o", "gate_up", "down"), list(_groups(layer))
    arena = None if device.type == "meta" else Arena([module for group in groups for module in group])
    qkv, o, gate_up, down = (
        fuse(name, modules, dtype, device, arena) for name, modules in zip(names, groups, strict=True)
    )
    norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight.data for norm in norms)
    input_norm, post_norm = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
    no_kv = torch.empty(0, dtype=dtype)  # the pool is made when all layers have been read
    return _Layer(qkv, o, gate_up, down, input_norm, post_norm, q_norm, k_norm, no_kv)


def _different_layers(model: Any) -> list[Any]:
    """One decoder layer of each make; twice, since the first one starts from the embeddings."""
    made: dict[Any, Any] = {}
    for layer in model.model.layers:
        bases = [base_of(module) for group in _groups(layer) for module in group]
        make = tuple((kind_of(one), tuple(one.weight.shape), getattr(one, "bias", None) is None) for one in bases)  # pyright: ignore[reportCallIssue, reportArgumentType]
        made.setdefault((make, getattr(layer.self_attn, "q_norm", None) is None), layer)
    return list(made.values()) * 2


def _rotary_table(model: Any, num_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of cos and sin by the model's own rotary module, fp32 `[num_positions, head_dim // 2]`."""
    if device.type == "meta":
        half = _head_dim(model.config.get_text_config()) // 2
        empty = torch.empty((num_positions, half), dtype=torch.float32, device=device)
        return empty, empty
    positions = torch.arange(num_positions, device=device)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, device=device), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _fill_lora(linear: FusedLinear, lora: _Lora, pairs: Sequence[Any], rank: int) -> None:
    lora.a.zero_()
    lora.b.zero_()
    start = 0
    for part, (pair, size) in enumerate(zip(pairs, linear.sizes, strict=True)):
        if pair is not None:
            own = pair.a.shape[0]
            lora.a[part * rank : part * rank + own] = pair.a.to(lora.a)
            lora.b[start : start + size, :own] = (pair.b.float() * pair.scaling).to(lora.b)
        start += size
    if lora.a_in_order is not lora.a:
        places = kernels.places_of(linear.kind, linear.num_inputs)
        lora.a_in_order[:, torch.tensor(places, device=lora.a.device)] = lora.a


def _tile_rows(linear: FusedLinear, width: int) -> int:
    """Rows that a program computes. The tensor cores' instruction takes 8; a row's bits are the same in one or two."""
    return 8 if linear.kind == NF4 and width <= 8 else max(16, width)


def _padded_rank(rank: int) -> int:
    return max(16, _power_of_2(rank))


def _lora_splits(linear: FusedLinear) -> int:
    return _LORA_SPLITS if linear.num_inputs % (32 * _LORA_SPLITS) == 0 else 1


def _num_bytes(linear: FusedLinear) -> int:
    scale = linear.packed_scale if linear.packed_scale is not None else linear.scale
    return linear.weight.nbytes + (0 if scale is None else scale.nbytes)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@contextmanager
def _full_precision_sums() -> Iterator[None]:
    """Otherwise cuBLAS may add partial sums of 16-bit products in 16 bit."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction = before
