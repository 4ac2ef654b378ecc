"""The engine in this process: one thread owns the model, everyone else queues a request and awaits it.

One step advances one request by a prefill chunk, or several by a token each and by what was drafted for them and proved
right. Before each step the scheduler picks what matters most: an interactive request pauses a background one at the
next step, and a cancelled one stops there.
"""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError, PlanPatchError, UsageError
from engine.inference.adapters import BASE, AdapterFiles, read_adapter
from engine.inference.drafting import DraftLength, PromptLookup
from engine.inference.heap import HeapTrimmer
from engine.inference.loading import LoadedModel, context_length_of
from engine.inference.protocol import (
    Completion,
    EngineStatus,
    Event,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Token,
    TokenLogprob,
    check_length,
)
from engine.inference.text_stop import StopText
from engine.inference.tokenizer import Detokenizer, HFChatTokenizer

if TYPE_CHECKING:
    import torch

    from engine.inference.grammar import GrammarCompiler, GrammarMatcher
    from engine.inference.kv_cache import PrefixCache, SequenceCache
    from engine.inference.runner import FasterRunner, Runner
    from engine.inference.sampling import Choice, Sampler


log = logging.getLogger("planpatch.engine")

_SLACK_TOKENS = 128  # of a sequence in the KV cache: drafts, and pages that are not full


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the engine.

    Args:
        max_waiting: Requests in the queue; one more is refused.
        max_unstreamed: Ended requests whose events are kept for someone to stream them; the oldest go first.
        prefill_chunk_tokens: Tokens of one prefill step on CPU; a cancel waits for at most this many.
        prefill_chunk_tokens_gpu: The same on a GPU.
        prefix_cache_bytes: Memory for KV caches of ended requests.
        max_rows: Requests of one priority that are decoded together on CPU.
        max_rows_gpu: The same on a GPU.
        max_draft_tokens: Most tokens drafted for one step of a request; 0 for no speculation.
        kv_cache_tokens: Tokens that the fast path's KV cache holds; 0 for what memory has room for.
        fast_path: Whether our own kernels run a model on a GPU where they can.
        serve_while_compiling: Whether transformers runs it until they are compiled; else the engine is ready later.
        tuning_path: File of the fast path's measured tile sizes; None for sizes by rule.
    """

    max_waiting: int = 64
    max_unstreamed: int = 256
    prefill_chunk_tokens: int = 128
    prefill_chunk_tokens_gpu: int = 2048
    prefix_cache_bytes: int = 512 * 1024 * 1024
    max_rows: int = 16
    max_rows_gpu: int = 64
    max_draft_tokens: int = 31
    kv_cache_tokens: int = 0
    fast_path: bool = True
    serve_while_compiling: bool = True
    tuning_path: Path | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """Tokens that may come next, and what a grammar allows before, between and after them."""

    token_ids: Sequence[int] = ()
    allowed: torch.Tensor | None = None  # bool [1 + num_draft_tokens, vocab_size]


@dataclass(eq=False, slots=True)
class _Sequence:
    """One request on its way through the engine; `token_ids` is the prompt and what was generated."""

    id: str
    order: int
    request: GenerationRequest
    adapter: AdapterFiles | None
    submitted_at: float
    token_ids: list[int]
    detokenizer: Detokenizer
    stop_text: StopText
    lookup: PromptLookup
    events: queue.SimpleQueue[list[Event] | PlanPatchError] = field(default_factory=queue.SimpleQueue)
    is_cancelled: bool = False
    is_admitted: bool = False
    kv_cache: SequenceCache | None = None
    sampler: Sampler | None = None
    matcher: GrammarMatcher | None = None
    draft_length: DraftLength = field(default_factory=lambda: DraftLength(0, 0))
    top_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    hidden_sum: torch.Tensor | None = None  # of an embed request: [hidden_size], fp32
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_computed: int = 0
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def adapter_digest(self) -> str:
        return self.adapter.digest if self.adapter else BASE

    @property
    def is_decoding(self) -> bool:
        return self.num_generated > 0

    @property
    def is_caught_up(self) -> bool:
        """Whether only its last token is not computed yet."""
        return self.is_decoding and self.num_computed == len(self.token_ids) - 1

    @property
    def rank(self) -> tuple[int, int]:
        return self.request.priority, self.order


class InProcessEngine:
    """The `Engine` of protocol.py, with the model in this process.

    Args:
        name: What the user called the model.
        folder: Model folder; its tokenizer is read at once, its weights by `load` on the engine's thread.
        load: Reads the weights.
        digest: sha256 that names the weights.
        adapter: Adapter folder to start with, None for the base.
        config: Limits.

    Raises:
        ModelError: The folder's tokenizer or configuration cannot be read.
        AdapterError: The adapter cannot be read.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        load: Callable[[], LoadedModel],
        *,
        digest: str = "",
        adapter: Path | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self._config = config or EngineConfig()
        self._tokenizer = HFChatTokenizer(folder)
        self._context_length = context_length_of(folder)
        self._load = load
        self._sequences: dict[str, _Sequence] = {}  # not ended
        self._unstreamed: dict[str, _Sequence] = {}  # ended or not, nobody has asked for the events yet
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._adapter = read_adapter(adapter) if adapter else None
        self._status = EngineStatus("loading", name, model_digest=digest, context_length=self._context_length)
        self._is_closing = False
        self._heap = HeapTrimmer()
        self._loaded: LoadedModel | None = None
        self._idle_work: deque[Iterator[str]] = deque()
        self._undelivered: list[tuple[_Sequence, list[Choice]]] = []  # tokens whose text is not sent out yet
        self._thread = threading.Thread(target=self._run, name="planpatch-engine", daemon=True)
        self._thread.start()

    # --- what everyone else sees ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> HFChatTokenizer:
        """The model's tokenizer, usable while the model loads."""
        return self._tokenizer

    def submit(self, request: GenerationRequest) -> str:
        """Queue a request and return its id.

        Args:
            request: What to generate.

        Returns:
            The id for `stream` and `cancel`.

        Raises:
            EngineError: The queue is full, or the engine is closed or failed.
            ContextLengthError: Prompt and `max_new_tokens` exceed the model's context.
            UsageError: A sampling parameter is out of its range.
        """
        self._check_length(request)
        _check_params(request.params)
        adapter = self._adapter_of(request)
        with self._changed:
            self._check_open()
            num_waiting = sum(not sequence.is_admitted for sequence in self._sequences.values())
            if num_waiting >= self._config.max_waiting:
                raise EngineError(
                    f"The engine's queue is full ({num_waiting} requests are waiting)",
                    hint="Try again in a few seconds.",
                    queue_full=True,
                )
            order = next(self._order)
            sequence = _Sequence(
                id=f"g{order}",
                order=order,
                request=request,
                adapter=adapter,
                submitted_at=time.monotonic(),
                token_ids=list(request.prompt_token_ids),
                detokenizer=Detokenizer(self._tokenizer),
                stop_text=StopText(request.params.stop),
                lookup=PromptLookup(request.prompt_token_ids),
            )
            self._sequences[sequence.id] = self._unstreamed[sequence.id] = sequence
            self._changed.notify_all()
        return sequence.id

    def stream(self, request_id: str) -> Iterator[Event]:
        """Yield `Token` events, then one `Completion`; leaving early cancels the request.

        Args:
            request_id: What `submit` returned; each request can be streamed once.

        Yields:
            The events.

        Raises:
            EngineError: The id is unknown, or the engine failed.
        """
        with self._changed:
            sequence = self._unstreamed.pop(request_id, None)
        if sequence is None:
            raise EngineError(f"There is no request {request_id}, or it was streamed before")
        try:
            while True:
                events = sequence.events.get()
                if isinstance(events, PlanPatchError):
                    raise events
                yield from events
                if isinstance(events[-1], Completion):
                    return
        finally:
            self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; of one that has ended the events are dropped, unknown ids are ignored."""
        with self._changed:
            sequence = self._sequences.get(request_id)
            if sequence is None:
                self._unstreamed.pop(request_id, None)
            else:
                sequence.is_cancelled = True
                self._changed.notify_all()

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        with self._changed:
            running = sum(sequence.is_admitted for sequence in self._sequences.values())
            return replace(
                self._status,
                num_running=running,
                num_waiting=len(self._sequences) - running,
                adapter=str(self._adapter.folder) if self._adapter else None,
                adapter_digest=self._adapter.digest if self._adapter else BASE,
            )

    def use_adapter(self, path: str | None) -> None:
        """Make an adapter folder (None or `__none__`: the base) the current one for requests submitted from now on.

        Args:
            path: The folder.

        Raises:
            AdapterError: Missing, damaged, or made for another base.
        """
        adapter = read_adapter(Path(path)) if path and path != BASE else None
        if adapter is not None and self._loaded is not None:
            from engine.inference.adapters import check_fits

            check_fits(adapter, self._loaded.model)
        with self._changed:
            self._adapter = adapter

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait for the weights.

        Args:
            timeout_s: Longest wait; None waits for ever.

        Raises:
            EngineError: Loading took longer, or the engine was closed.
            ModelError: Loading failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._status.state != "loading", timeout_s):
                raise EngineError(f"{self._status.model} is still loading after {timeout_s} s")
            self._check_open()

    def close(self) -> None:
        """Cancel everything and free the model."""
        with self._changed:
            self._is_closing = True
            for sequence in self._sequences.values():
                sequence.is_cancelled = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_length(self, request: GenerationRequest) -> None:
        num_prompt, num_new = len(request.prompt_token_ids), request.params.max_new_tokens
        if num_prompt == 0 or num_new < 1:
            raise EngineError("A request needs a prompt and at least one new token")
        check_length(num_prompt, num_new, self._context_length)

    def _adapter_of(self, request: GenerationRequest) -> AdapterFiles | None:
        if request.adapter is None:
            return self._adapter
        return None if request.adapter == BASE else read_adapter(Path(request.adapter))

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closing:
            raise EngineError("The engine is closed")

    # --- the engine's thread --------------------------------------------------------------------------------------

    _failure: PlanPatchError | None = None
    _faster: FasterRunner | None = None

    def _run(self) -> None:
        try:
            import torch

            self._start()
            with torch.inference_mode():  # tensors made in this mode may only be written in it, KV caches included
                while self._wait_for_work():
                    if self._is_faster_ready():
                        self._switch_runner()
                    elif sequences := self._schedule():
                        self._step(sequences)
                    else:
                        self._use_idle_moment()
        except PlanPatchError as error:
            self._fail(error)
        except Exception as fault:
            self._fail(EngineError(f"The engine failed: {type(fault).__name__}: {fault}", hint="Restart PlanPatch."))
        finally:
            self._stop()

    def _start(self) -> None:
        loaded = self._load()  # it reads weights while it imports transformers, which runners import too
        from engine.inference.runner import ReferenceRunner, make_faster_runner, make_runner

        rank = self._adapter.rank if self._adapter else 0
        self._faster = make_faster_runner(loaded, self._config, self._wake, rank)
        if self._faster is None:
            self._use(make_runner(loaded, self._config, self._say))
        else:
            self._use(ReferenceRunner(loaded, self._config))
            self._limit_context(self._faster.num_kv_tokens)
        self._runner.activate(self._adapter)
        self._grammar_compiler: GrammarCompiler | None = None
        self._weights_bytes = int(loaded.model.get_memory_footprint())
        if loaded.when_idle is not None:
            self._idle_work.append(loaded.when_idle)
            loaded.when_idle = None
        with self._changed:
            self._loaded = loaded
            self._status = replace(
                self._status,
                state="ready",
                model_digest=loaded.digest,
                device=str(loaded.device),
                quantization=loaded.quantization,
                context_length=self._context_length,
                memory_bytes=self._weights_bytes,
                message=self._faster.message if self._faster is not None else "",
            )
            self._changed.notify_all()

    def _use(self, runner: Runner) -> None:
        from engine.inference.kv_cache import PrefixCache

        self._runner = runner
        if runner.when_idle is not None:
            self._idle_work.appendleft(runner.when_idle)
        self._max_rows, self._chunk_tokens = runner.max_rows, runner.chunk_tokens
        num_kv_tokens = runner.num_kv_tokens  # a cache of fixed size drops prefixes when it needs the room
        prefix_bytes = self._config.prefix_cache_bytes if num_kv_tokens is None else sys.maxsize
        self._prefix_cache: PrefixCache = PrefixCache(prefix_bytes)
        if num_kv_tokens is not None:
            self._limit_context(num_kv_tokens)

    def _limit_context(self, num_kv_tokens: int) -> None:
        self._context_length = min(self._context_length, num_kv_tokens - self._config.max_draft_tokens)

    def _wake(self) -> None:
        """Called by whatever thread, when there may be something else to do than requests."""
        with self._changed:
            self._changed.notify_all()

    def _is_faster_ready(self) -> bool:
        return self._faster is not None and self._faster.is_done

    def _switch_runner(self) -> None:
        """Go over to the runner that was being compiled. What is under way computes its text again, so that no token is
        lost; it is late by that and by the seconds that the switch takes, a cancel too.
        """
        import torch

        assert self._faster is not None and self._loaded is not None
        faster, self._faster = self._faster, None
        self._runner.activate(None)
        self._runner.abandon()
        self._prefix_cache.clear()
        with self._changed:
            running = [sequence for sequence in self._sequences.values() if sequence.kv_cache is not None]
        for sequence in running:
            self._give_up_cache(sequence)
        torch.cuda.empty_cache()
        try:
            with torch.inference_mode(False):
                self._use(faster.make(self._say))
        except (PlanPatchError, torch.OutOfMemoryError) as fault:
            log.warning("the model stays on transformers, not on the fast path: %s", fault)
            torch.cuda.empty_cache()
        for sequence in running:
            sequence.kv_cache = self._runner.new_kv_cache()
        self._say("")

    def _give_up_cache(self, sequence: _Sequence) -> None:
        """It computes its text again; what it was to get is not lost, only late."""
        assert sequence.kv_cache is not None
        sequence.kv_cache.release()
        sequence.kv_cache = sequence.hidden_sum = None
        sequence.num_computed = 0

    def _say(self, message: str) -> None:
        """What is being prepared, for `status`."""
        with self._changed:
            self._status = replace(self._status, message=message)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False when the engine closes."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closing or self._sequences or self._is_faster_ready() or self._has_idle_work()
            )
            return not self._is_closing

    def _has_idle_work(self) -> bool:
        """It waits for the switch of runners, which moves the weights."""
        return bool(self._idle_work) and self._faster is None

    def _use_idle_moment(self) -> None:
        import torch

        try:
            message = next(self._idle_work[0], None)
        except torch.OutOfMemoryError as fault:  # it can wait for a need
            log.warning("something for idle moments is left out: %s", fault)
            message = None
        if message is None:
            self._idle_work.popleft()
        self._say(message or "")

    def _schedule(self) -> list[_Sequence]:
        """What to advance next: one sequence, or several that decode together.

        A cancelled sequence goes first, then the highest priority; within it prefill goes before decode, so that
        sequences meet in one batch. Empty when nobody waits for the model.
        """
        with self._changed:
            if not self._sequences:
                return []
            waiting = sorted(self._sequences.values(), key=lambda sequence: sequence.rank)
            cancelled = next((sequence for sequence in waiting if sequence.is_cancelled), None)
            if cancelled is not None:
                return [cancelled]
            fitting = self._fitting(waiting)
            equals = [one for one in fitting if one.request.priority == fitting[0].request.priority]
            decoding = [sequence for sequence in equals if sequence.is_caught_up]
            joining = [sequence for sequence in equals if not sequence.is_caught_up]
            if joining and len(decoding) < self._max_rows:
                return joining[:1]
            return self._batchable(decoding)[: self._max_rows]

    def _fitting(self, waiting: list[_Sequence]) -> list[_Sequence]:
        """Those, in order, whose texts fit into the KV cache beside each other from beginning to end."""
        num_left = self._runner.num_kv_tokens
        if num_left is None:
            return waiting
        fitting: list[_Sequence] = []
        for sequence in waiting:
            num_left -= sequence.num_prompt_tokens + sequence.request.params.max_new_tokens + _SLACK_TOKENS
            if fitting and num_left < 0:
                break
            fitting.append(sequence)
        return fitting

    def _make_room(self, sequences: list[_Sequence]) -> None:
        """Drop prefixes that nobody uses, then what those computed that do not fit beside these; they compute it again.

        Whoever comes first by rank keeps what it has.
        """
        needs = [
            (
                one.kv_cache,
                min(len(one.token_ids) - one.num_computed, self._chunk_tokens) + self._config.max_draft_tokens,
            )
            for one in sequences
            if one.kv_cache is not None
        ]
        while not self._runner.has_room(needs) and self._prefix_cache.drop_oldest():
            pass
        others = [one for one in list(self._sequences.values()) if one not in sequences and one.num_computed]
        for other in sorted(others, key=lambda one: one.rank, reverse=True):
            if self._runner.has_room(needs):
                return
            self._runner.settle(other.kv_cache)
            self._give_up_cache(other)
            other.kv_cache = self._runner.new_kv_cache()

    def _batchable(self, decoding: list[_Sequence]) -> list[_Sequence]:
        """Those that can share a step with the first: the same adapter, and caches of ours."""
        kv_cache = decoding[0].kv_cache
        if kv_cache is None or not kv_cache.can_go_back:
            return decoding[:1]
        return [sequence for sequence in decoding if sequence.adapter_digest == decoding[0].adapter_digest]

    def _step(self, sequences: list[_Sequence]) -> None:
        """Admit if new, draft, run the model, send out the text of the step before, verify; end what is over."""
        if sequences[0].is_cancelled:
            self._deliver()
            return self._finish(sequences[0], FinishReason.CANCELLED) if self._is_running(sequences[0]) else None
        started_at = time.monotonic()
        try:
            if not sequences[0].is_admitted:
                self._admit(sequences[0])
            self._runner.activate(sequences[0].adapter)
            self._make_room(sequences)
            drafts = self._drafts(sequences)
            if not drafts:
                return None
            logits = self._run_model(drafts)
            self._deliver()  # while the device computes
            choices = {
                sequence: self._verified(sequence, draft, rows)
                for (sequence, draft), rows in zip(drafts.items(), logits, strict=True)
                if self._is_running(sequence)
            }
        except PlanPatchError as error:
            self._deliver()
            return self._refuse([one for one in sequences if self._is_running(one)], error)
        except Exception as fault:
            self._deliver()
            return self._refuse_or_fail([one for one in sequences if self._is_running(one)], fault)
        elapsed_s = time.monotonic() - started_at
        for sequence, chosen in choices.items():
            if isinstance(chosen, PlanPatchError):
                self._refuse([sequence], chosen)
            else:
                self._advance(sequence, chosen, elapsed_s)

    def _advance(self, sequence: _Sequence, choices: list[Choice], elapsed_s: float) -> None:
        """Take in what one step gave one sequence."""
        if sequence.is_decoding:
            sequence.decode_s += elapsed_s
        else:
            sequence.prefill_s += elapsed_s
        try:
            taken, reason = self._take_in(sequence, choices)
        except UsageError as error:  # its grammar's; the others go on
            return self._refuse([sequence], error)
        if reason is None and self._runner.is_asynchronous and sequence.matcher is None:
            self._undelivered.append((sequence, taken))
        else:
            self._send_out(sequence, taken, reason)

    def _admit(self, sequence: _Sequence) -> None:
        from engine.inference.sampling import Sampler

        assert self._loaded is not None
        request, loaded = sequence.request, self._loaded
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < loaded.vocab_size:
            raise UsageError(
                f"The prompt holds token ids that {loaded.name} does not have (0 to {loaded.vocab_size - 1})"
            )
        sequence.is_admitted = True
        sequence.queue_s = time.monotonic() - sequence.submitted_at
        sequence.sampler = Sampler(
            request.params, request.prompt_token_ids, loaded.vocab_size, loaded.device, self._runner.greedy
        )
        sequence.draft_length = DraftLength(self._runner.least_drafts, self._config.max_draft_tokens)
        if request.params.grammar is not None:
            sequence.matcher = self._compiler().compile(request.params.grammar)
        if not request.embed:  # an embedding needs every hidden state
            sequence.kv_cache = self._known_prefix(sequence)
        if sequence.kv_cache is None:
            sequence.kv_cache = self._runner.new_kv_cache()
        sequence.num_computed = sequence.num_cached_tokens = sequence.kv_cache.num_tokens

    def _known_prefix(self, sequence: _Sequence) -> SequenceCache | None:
        """The longest beginning of its prompt that a running request has computed, or an ended one left."""
        from engine.inference.kv_cache import num_common

        digest, token_ids = sequence.adapter_digest, sequence.token_ids
        nearest, longest = None, 0
        for other in list(self._sequences.values()):  # others submit meanwhile
            kv_cache = other.kv_cache
            if other is sequence or other.adapter_digest != digest or kv_cache is None or not kv_cache.can_go_back:
                continue
            length = min(num_common(other.token_ids, token_ids), kv_cache.num_tokens, len(token_ids) - 1)
            if length > longest:
                nearest, longest = kv_cache, length
        with suppress(EngineError):  # no page is free for the copy, and there will be by the time it computes
            taken = self._prefix_cache.take(digest, token_ids, longer_than=longest)
            return nearest.copy_prefix(longest) if taken is None and nearest is not None else taken
        return None

    def _compiler(self) -> GrammarCompiler:
        from engine.inference.grammar import GrammarCompiler

        assert self._loaded is not None
        if self._grammar_compiler is None:
            eos = min(self._tokenizer.eos_token_ids)
            self._grammar_compiler = GrammarCompiler(self._loaded.folder, self._loaded.vocab_size, eos)
        return self._grammar_compiler

    def _drafts(self, sequences: list[_Sequence]) -> dict[_Sequence, _Draft]:
        """What is drafted for each; one whose grammar cannot be followed is refused, and the others go on."""
        drafts: dict[_Sequence, _Draft] = {}
        for sequence in sequences:
            try:
                drafts[sequence] = self._draft(sequence, self._num_drafts(sequence, len(sequences)))
            except UsageError as error:
                self._refuse([sequence], error)
        return drafts

    def _num_drafts(self, sequence: _Sequence, num_rows: int) -> int:
        """Most draft tokens that this step can take for one of its sequences."""
        assert sequence.kv_cache is not None
        num_left = len(sequence.token_ids) - sequence.num_computed
        wants_drafts = sequence.request.params.speculation and not sequence.request.embed
        if num_left > self._chunk_tokens or not wants_drafts or not sequence.kv_cache.can_go_back:
            return 0
        return min(
            sequence.draft_length.num_tokens,
            self._runner.most_drafts(num_rows),
            self._chunk_tokens - num_left,
            sequence.request.params.max_new_tokens - sequence.num_generated - 1,
        )

    def _draft(self, sequence: _Sequence, num_tokens: int) -> _Draft:
        """Guess what comes next, and ask the grammar what it allows all along the guess."""
        matcher = sequence.matcher
        if matcher is None:
            return _Draft(sequence.lookup.draft(num_tokens) if num_tokens > 0 else ())
        if len(sequence.token_ids) - sequence.num_computed > self._chunk_tokens:
            return _Draft()
        return self._draft_in_grammar(sequence.lookup, matcher, max(0, num_tokens))

    def _draft_in_grammar(self, lookup: PromptLookup, matcher: GrammarMatcher, num_tokens: int) -> _Draft:
        """Where the grammar leaves no choice its own text is drafted, elsewhere what the lookup finds and it allows."""
        import torch

        ahead, token_ids, allowed = matcher.copy(), list[int](), [matcher.allowed()]
        with suppress(UsageError):  # states that only the draft leads to
            while len(token_ids) < num_tokens:
                more = ahead.forced_token_ids() or lookup.draft(num_tokens - len(token_ids), token_ids)
                for num_taken, token_id in enumerate(more[: num_tokens - len(token_ids)]):
                    if not allowed[-1][token_id] or token_id in self._tokenizer.eos_token_ids:
                        more = more[:num_taken]
                        break
                    ahead.advance(token_id)
                    if ahead.is_complete:
                        more = ()
                        break
                    allowed.append(ahead.allowed())
                    token_ids.append(token_id)
                if not more:
                    break
        return _Draft(token_ids, torch.stack(allowed))

    def _run_model(self, drafts: dict[_Sequence, _Draft]) -> list[torch.Tensor]:
        """Logits `[1 + num_draft_tokens, vocab_size]` of each sequence; none while its prompt is not through."""
        from engine.inference.runner import Row

        rows: list[Row] = []
        for sequence, draft in drafts.items():
            assert sequence.kv_cache is not None
            end = min(len(sequence.token_ids), sequence.num_computed + self._chunk_tokens)
            token_ids = sequence.token_ids[sequence.num_computed : end]
            sequence.num_computed = end
            if sequence.request.embed:
                hidden = self._runner.hidden_sum(sequence.kv_cache, token_ids)
                sequence.hidden_sum = hidden if sequence.hidden_sum is None else sequence.hidden_sum + hidden
                return [hidden[:0, None]]
            is_through = end == len(sequence.token_ids)
            rows.append(Row(sequence.kv_cache, [*token_ids, *draft.token_ids], is_through + len(draft.token_ids)))
        return self._runner.run(rows)

    def _verified(self, sequence: _Sequence, draft: _Draft, logits: torch.Tensor) -> list[Choice] | PlanPatchError:
        """`_verify`, or why this sequence alone cannot go on."""
        try:
            return self._verify(sequence, draft, logits)
        except PlanPatchError as error:
            return error

    def _verify(self, sequence: _Sequence, draft: _Draft, logits: torch.Tensor) -> list[Choice]:
        """The next tokens, as far as the draft was right and one more; none while the prompt is not through."""
        if not len(logits):
            return []
        assert sequence.sampler is not None and sequence.kv_cache is not None
        allowed = None if draft.allowed is None else draft.allowed.to(logits.device)
        choices = sequence.sampler.verify(logits, draft.token_ids, allowed)
        num_accepted = len(choices) - 1
        sequence.num_steps += 1
        sequence.num_draft_tokens += len(draft.token_ids)
        sequence.num_accepted_tokens += num_accepted
        if draft.token_ids:
            sequence.draft_length.learn(len(draft.token_ids), num_accepted)
            sequence.num_computed += num_accepted
            self._runner.settle(sequence.kv_cache)
            sequence.kv_cache.truncate(sequence.num_computed)
        return choices

    def _take_in(self, sequence: _Sequence, choices: list[Choice]) -> tuple[list[Choice], FinishReason | None]:
        """Add the new tokens up to one that ends it; returns them, and why it is over if they or the time say so."""
        params = sequence.request.params
        taken: list[Choice] = []
        for choice in choices:
            if choice.token_id in self._tokenizer.eos_token_ids or choice.token_id in params.stop_token_ids:
                return taken, FinishReason.STOP
            taken.append(choice)
            sequence.token_ids.append(choice.token_id)
            sequence.lookup.extend((choice.token_id,))
            if sequence.matcher is not None:
                sequence.matcher.advance(choice.token_id)
                if sequence.matcher.is_complete:
                    return taken, FinishReason.STOP
            if sequence.num_generated >= params.max_new_tokens:
                return taken, FinishReason.LENGTH
        if sequence.request.embed and sequence.num_computed == sequence.num_prompt_tokens:
            return taken, FinishReason.STOP
        if params.max_time_s is not None and sequence.prefill_s + sequence.decode_s >= params.max_time_s:
            return taken, FinishReason.TIME
        return taken, None

    def _deliver(self) -> None:
        """Send out the text of the step before, which waited until the device had its next step."""
        undelivered, self._undelivered = self._undelivered, []
        for sequence, taken in undelivered:
            self._send_out(sequence, taken, None)

    def _send_out(self, sequence: _Sequence, taken: list[Choice], reason: FinishReason | None) -> None:
        """Send the text of new tokens, and end the sequence if it is over or a stop string says so.

        What comes after the stop string in the same step was never generated.
        """
        params, events = sequence.request.params, list[Event]()
        for num_sent, choice in enumerate(taken, start=1):
            text = sequence.stop_text.push(sequence.detokenizer.push([choice.token_id]))
            events.append(Token((choice.token_id,), text, choice.logprob, choice.top_logprobs))
            if params.top_logprobs:
                sequence.top_logprobs.append(choice.top_logprobs)
            if sequence.stop_text.is_stopped:
                reason = FinishReason.STOP
                del sequence.token_ids[len(sequence.token_ids) - (len(taken) - num_sent) :]
                break
        if events:
            sequence.events.put(events)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        rest = sequence.stop_text.flush()  # bytes of a character that was cut are nobody's text
        hidden = sequence.hidden_sum
        self._keep_prefix(sequence)
        self._forget(sequence)
        end: list[Event] = [Token((), rest)] if rest else []
        end.append(
            Completion(
                token_ids=tuple(sequence.token_ids[sequence.num_prompt_tokens :]),
                text=sequence.stop_text.text,
                finish_reason=reason,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=sequence.num_cached_tokens,
                queue_s=sequence.queue_s if sequence.is_admitted else time.monotonic() - sequence.submitted_at,
                prefill_s=sequence.prefill_s,
                decode_s=sequence.decode_s,
                adapter=sequence.adapter_digest,
                top_logprobs=tuple(sequence.top_logprobs),
                embedding=() if hidden is None else tuple((hidden / sequence.num_computed).tolist()),
                num_draft_tokens=sequence.num_draft_tokens,
                num_accepted_tokens=sequence.num_accepted_tokens,
                num_steps=sequence.num_steps,
            )
        )
        sequence.events.put(end)

    def _keep_prefix(self, sequence: _Sequence) -> None:
        """What was computed serves the next request with the same beginning."""
        kv_cache, sequence.kv_cache = sequence.kv_cache, None
        if kv_cache is None:
            return
        self._runner.settle(kv_cache)
        if kv_cache.can_go_back and not sequence.request.embed:
            kv_cache.truncate(min(sequence.num_computed, len(sequence.token_ids), kv_cache.num_tokens))
            self._prefix_cache.put(sequence.adapter_digest, sequence.token_ids, kv_cache)
        else:
            kv_cache.release()

    def _refuse(self, sequences: list[_Sequence], error: PlanPatchError) -> None:
        self._runner.settle()
        for sequence in sequences:
            self._forget(sequence)
            sequence.events.put(error)

    def _refuse_or_fail(self, sequences: list[_Sequence], fault: Exception) -> None:
        """What a GPU has no memory for, or a model on a CPU cannot do, ends the requests of the step, and those whose
        keys and values it left in the batch. Any other fault of a GPU is sticky and ends the engine.
        """
        import torch

        assert self._loaded is not None
        on_cpu = self._loaded.device.type == "cpu"
        if not on_cpu and not isinstance(fault, torch.OutOfMemoryError):
            raise fault
        lost = [id(kv_cache) for kv_cache in self._runner.abandon()]
        others = [sequence for sequence in list(self._sequences.values()) if id(sequence.kv_cache) in lost]
        sequences = list({sequence.id: sequence for sequence in (*sequences, *others)}.values())
        self._prefix_cache.clear()
        if on_cpu:
            log.error("the model failed", exc_info=fault)
            message = f"{self._loaded.name} failed: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
            return self._refuse(
                sequences, EngineError(message, hint="Choose another model; planpatch models lists some.")
            )
        torch.cuda.empty_cache()
        message = f"Out of memory on {self._status.device}"
        self._refuse(sequences, EngineError(message, hint="Select a smaller function."))

    def _is_running(self, sequence: _Sequence) -> bool:
        return sequence.id in self._sequences

    def _forget(self, sequence: _Sequence) -> None:
        """It has ended: only its events stay until they are streamed, and not those of everyone who never asks."""
        if sequence.kv_cache is not None:
            sequence.kv_cache.release()
        sequence.kv_cache = sequence.sampler = sequence.matcher = None
        self._heap.trim()
        with self._changed:
            self._sequences.pop(sequence.id, None)
            ended = [name for name in self._unstreamed if name not in self._sequences]
            for name in ended[: -self._config.max_unstreamed]:
                del self._unstreamed[name]
            self._status = replace(self._status, memory_bytes=self._weights_bytes + self._prefix_cache.num_bytes)
            self._changed.notify_all()

    def _fail(self, error: PlanPatchError) -> None:
        with self._changed:
            self._failure = error
            self._status = replace(self._status, state="failed", message=error.message)
            self._changed.notify_all()

    def _stop(self) -> None:
        with self._changed:
            left, self._sequences = list(self._sequences.values()), {}
            if self._failure is None:
                self._status = replace(self._status, state="closed")
            self._changed.notify_all()
        self._loaded = None
        for work in self._idle_work:
            if isinstance(work, Generator):
                work.close()
        if self._faster is not None:
            self._faster.close()
            self._faster = None
        for name in ("_runner", "_prefix_cache"):  # who still holds the engine does not hold the model's memory
            vars(self).pop(name, None)
        for sequence in left:
            sequence.events.put(self._failure or EngineError("The engine was closed"))


def _check_params(params: SamplingParams) -> None:
    """Refuse what would leave nothing to choose from, before it reaches the device."""
    ranges: dict[str, tuple[float, float, float]] = {
        "temperature": (params.temperature, 0, 1e6),
        "top_k": (params.top_k, 0, 2**31),
        "top_p": (params.top_p, 0, 1),
        "min_p": (params.min_p, 0, 1),
        "repetition_penalty": (params.repetition_penalty, 0.001, 1000),
        "seed": (params.seed or 0, -(2**63), 2**63),
        "top_logprobs": (params.top_logprobs, 0, 1000),
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise UsageError(f"{name} is a number from {least:g} to {most:g}, not {value}")
