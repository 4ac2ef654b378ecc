"""`planpatch bench engine`: how fast the engine is beside transformers' `generate` and llama.cpp, on the same weights.

Every backend replays the same recorded edits token by token, so drafts are right and wrong where they were for the
model that wrote them, whatever the weights measured here. Times are wall clock, the device idle before and after.

Not covered: quality, which `bench cases` measures; llama.cpp's times of PLAN and PATCH, which are reckoned from its own
rates of prefill and decode, prompt reuse counted in its favour.
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import EnvironmentFault, UsageError
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.protocol import Completion, GenerationRequest, SamplingParams, Token
from lsp_server import console
from lsp_server.bench_workload import Recording, Workload, WorkloadName

if TYPE_CHECKING:
    import torch

    from engine.inference.loading import LoadedModel
    from lsp_server.session import Session

CONTEXT_TOKENS = 900
PLAN_TOKENS = 16
DECODE_TOKENS = 192
WORKLOADS: tuple[WorkloadName, ...] = ("answers", "references")
PLAN_PENALTY, PATCH_PENALTY = 1.10, 1.03
_TAIL_TOKENS = 12  # what differs between the prompts of a PLAN and its PATCH
_GENERATE = {"generate": 0, "generate_lookup": 10}  # prompt_lookup_num_tokens

_DECODED = re.compile(r"decoded +(\d+) tokens in +([0-9.]+) seconds")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Args:
        num_recordings: Recordings of each workload; None for all.
        num_repeats: Repeats of what is measured alone.
        widths: Rows of one step.
        decode_tokens: Tokens of the one-row rate.
        slow_recordings: Recordings of each workload for `generate`, which takes minutes for one in 8 bit.
        slow_repeats: Its repeats.
    """

    num_recordings: int | None = None
    num_repeats: int = 5
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    decode_tokens: int = DECODE_TOKENS
    slow_recordings: int = 2
    slow_repeats: int = 2

    def of_generate(self) -> Sizes:
        """What of it is measured of `generate`."""
        num_recordings = min(self.slow_recordings, self.num_recordings or self.slow_recordings)
        return replace(self, num_recordings=num_recordings, num_repeats=min(self.num_repeats, self.slow_repeats))


CPU_SIZES = Sizes(
    num_recordings=6, num_repeats=3, widths=(1, 2, 4, 8, 16, 32), decode_tokens=48, slow_recordings=6, slow_repeats=3
)


@dataclass(frozen=True, slots=True)
class Replay:
    """One generation, timed.

    Args:
        num_tokens: Tokens that came.
        prefill_s: Seconds until the first.
        decode_s: Seconds from there on.
        num_draft_tokens: Tokens that were drafted, where that is known.
        num_accepted_tokens: How many of them were right.
        num_steps: Steps that gave tokens.
    """

    num_tokens: int
    prefill_s: float
    decode_s: float
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0

    @property
    def total_s(self) -> float:
        """Seconds from the request to its last token."""
        return self.prefill_s + self.decode_s


class Backend(Protocol):
    """One way to generate."""

    name: str

    def replay(
        self, prompt: Sequence[int], answer: Sequence[int], penalty: float, *, speculation: bool = True
    ) -> Replay:
        """Generate `answer` after `prompt`, whatever the model would say."""
        ...


@dataclass(slots=True)
class Figures:
    """What was measured of one backend; times in milliseconds, None where it cannot be measured."""

    prefill_ms: float | None = None
    decode_ms: dict[str, float] = field(default_factory=dict[str, float])
    decode_sequences_ms: dict[str, float] = field(default_factory=dict[str, float])
    decode_tok_per_s: float | None = None
    bandwidth_share: float | None = None
    patch_tok_per_s: float | None = None
    workloads: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    plan_p50_ms: float | None = None
    patch_p50_ms: float | None = None
    ttft_ms: float | None = None
    peak_memory_gb: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures for programs, rounded."""
        return {name: _rounded(getattr(self, name)) for name in self.__dataclass_fields__}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return round(value, 3) if isinstance(value, float) else value


# --- backends --------------------------------------------------------------------------------------------------------


class EngineBackend:
    """PlanPatch's engine, through submit and stream, every text delivered."""

    name = "planpatch"

    def __init__(self, engine: InProcessEngine) -> None:
        self._engine = engine

    def replay(
        self, prompt: Sequence[int], answer: Sequence[int], penalty: float, *, speculation: bool = True
    ) -> Replay:
        """See `Backend`."""
        params = SamplingParams(
            len(answer),
            repetition_penalty=penalty,
            top_logprobs=2,
            speculation=speculation,
            replay_token_ids=tuple(answer),
        )
        started_at, first_at = time.perf_counter(), 0.0
        for event in self._engine.stream(self._engine.submit(GenerationRequest(tuple(prompt), params))):
            first_at = first_at or time.perf_counter()
            if isinstance(event, Completion):
                ended_at = time.perf_counter()
                return Replay(
                    len(event.token_ids),
                    first_at - started_at,
                    ended_at - first_at,
                    event.num_draft_tokens,
                    event.num_accepted_tokens,
                    event.num_steps,
                )
            assert isinstance(event, Token)
        raise AssertionError("a stream ends with a Completion")


class GenerateBackend:
    """Transformers' `generate` on the same weights, greedy, with PATCH's penalty.

    Args:
        loaded: The model.
        lookup_tokens: `prompt_lookup_num_tokens`; 0 for plain decoding.
    """

    def __init__(self, loaded: LoadedModel, lookup_tokens: int = 0) -> None:
        self.name = "generate_lookup" if lookup_tokens else "generate"
        self._loaded = loaded
        self._lookup_tokens = lookup_tokens

    def replay(
        self, prompt: Sequence[int], answer: Sequence[int], penalty: float, *, speculation: bool = True
    ) -> Replay:
        """See `Backend`."""
        first = self._generate(prompt, answer[:1], penalty, 0)
        whole = self._generate(prompt, answer, penalty, self._lookup_tokens if speculation else 0)
        return Replay(len(answer), first, max(1e-9, whole - first))

    def _generate(self, prompt: Sequence[int], answer: Sequence[int], penalty: float, lookup_tokens: int) -> float:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        config = GenerationConfig(
            max_new_tokens=len(answer),
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
            **({"prompt_lookup_num_tokens": lookup_tokens} if lookup_tokens and len(answer) > 1 else {}),
        )
        given = torch.tensor([list(prompt)], device=self._loaded.device)
        processors = LogitsProcessorList([_forcing(len(prompt), answer)])
        model: Any = self._loaded.model
        with torch.inference_mode(), _own_head(model):
            _synchronize(self._loaded.device)
            started_at = time.perf_counter()
            found = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                logits_processor=processors,
                eos_token_id=None,
            )
            _synchronize(self._loaded.device)
            elapsed_s = time.perf_counter() - started_at
        assert found[0, len(prompt) :].tolist() == list(answer), "the answer is replayed token by token"
        return elapsed_s


def _forcing(num_prompt_tokens: int, answer: Sequence[int]) -> Any:
    from transformers import LogitsProcessor

    class Forcing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = input_ids.shape[1] - num_prompt_tokens
            if place < len(answer):
                scores[:, answer[place]] = float("inf")
            return scores

    return Forcing()


@contextmanager
def _own_head(model: Any) -> Generator[None]:
    """The model's head without our exact logits, which `generate` does not have."""
    head = model.get_output_embeddings()
    hooks = dict(head._forward_hooks)
    head._forward_hooks.clear()
    try:
        yield
    finally:
        head._forward_hooks.update(hooks)


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    loaded: LoadedModel, config: EngineConfig, workload: Workload, sizes: Sizes, backends: Sequence[str], say: Say
) -> dict[str, Figures]:
    """Measure our engine and `generate` on one model.

    Args:
        loaded: The model.
        config: The engine's limits.
        workload: The recorded edits.
        sizes: How much to measure.
        backends: `planpatch`, `generate` and `generate_lookup`, as far as they are wanted.
        say: Called with what is measured next.

    Returns:
        The figures by backend.
    """
    config = replace(config, serve_while_compiling=False)
    found: dict[str, Figures] = {name: Figures() for name in ("planpatch", *_GENERATE) if name in backends}
    copy_gb_per_s = copy_rate(loaded.device)

    def measure_generate() -> None:
        for name in _GENERATE.keys() & found.keys():
            _reset_peak(loaded.device)
            backend = GenerateBackend(loaded, _GENERATE[name])
            found[name] = _measure_backend(backend, workload, sizes.of_generate(), say)
            found[name].peak_memory_gb = _peak_memory_gb(loaded.device)

    if loaded.device.type == "cpu":
        measure_generate()  # before the engine changes the model's modules
    if "planpatch" in found:
        _reset_peak(loaded.device)
        with InProcessEngine(loaded.name, loaded.folder, lambda: loaded, digest=loaded.digest, config=config) as engine:
            engine.wait_until_ready()
            figures = found["planpatch"] = _measure_backend(EngineBackend(engine), workload, sizes, say)
        figures.peak_memory_gb = _peak_memory_gb(loaded.device)
        del engine
        _reset_peak(loaded.device)
        say("planpatch: decode by width")
        figures.decode_ms, figures.decode_sequences_ms = measure_widths(loaded, config, sizes)
    if loaded.device.type != "cpu":
        measure_generate()
    num_bytes = step_bytes(loaded, CONTEXT_TOKENS + sizes.decode_tokens // 2)
    for figures in found.values():
        if figures.decode_tok_per_s:
            figures.bandwidth_share = num_bytes * figures.decode_tok_per_s / (1e9 * copy_gb_per_s)
            figures.decode_ms.setdefault("1", 1000 / figures.decode_tok_per_s)
    return found


def _measure_backend(backend: Backend, workload: Workload, sizes: Sizes, say: Say) -> Figures:
    figures = Figures()
    prompts = _Prompts([one for one in workload.recordings if one.workload == "references"])
    backend.replay(prompts.next(), prompts.some_tokens(4), PATCH_PENALTY)  # warm-up
    say(f"{backend.name}: prefill of {CONTEXT_TOKENS} tokens and decode of {sizes.decode_tokens}")
    alone = [
        backend.replay(prompts.next(), prompts.some_tokens(sizes.decode_tokens), PATCH_PENALTY, speculation=False)
        for _ in range(sizes.num_repeats)
    ]
    figures.prefill_ms = figures.ttft_ms = 1000 * statistics.median(one.prefill_s for one in alone)
    figures.decode_tok_per_s = statistics.median((one.num_tokens - 1) / one.decode_s for one in alone)
    plans: list[float] = []
    patches: list[float] = []
    for name in WORKLOADS:
        recordings = workload.of(name, sizes.num_recordings)
        say(f"{backend.name}: {len(recordings)} edits of the workload {name}")
        replays = [_plan_and_patch(backend, prompts, one, plans, patches) for one in recordings]
        if replays:
            figures.workloads[name] = replay_rates(replays)
    rates = [one["tok_per_s"] for one in figures.workloads.values()]
    figures.patch_tok_per_s = min(rates, default=None)  # type: ignore[type-var]
    figures.plan_p50_ms = 1000 * statistics.median(plans) if plans else None
    figures.patch_p50_ms = 1000 * statistics.median(patches) if patches else None
    return figures


def _plan_and_patch(
    backend: Backend, prompts: _Prompts, recording: Recording, plans: list[float], patches: list[float]
) -> Replay:
    """A PLAN, then the PATCH whose prompt begins with the same tokens."""
    prompt = prompts.next(recording.prompt)
    plan_prompt = (*prompt[:-_TAIL_TOKENS], *prompts.some_tokens(_TAIL_TOKENS))
    plans.append(backend.replay(plan_prompt, prompts.some_tokens(PLAN_TOKENS), PLAN_PENALTY).total_s)
    patch = backend.replay(prompt, recording.answer, PATCH_PENALTY)
    patches.append(patch.total_s)
    return patch


def replay_rates(replays: Sequence[Replay]) -> dict[str, float]:
    """Of some replays together.

    Args:
        replays: At least one.

    Returns:
        Their number, tokens, output tokens a second after the first token, and what drafts gave where there were any.
    """
    num_tokens = sum(one.num_tokens - 1 for one in replays)
    num_drafted, num_steps = sum(one.num_draft_tokens for one in replays), sum(one.num_steps for one in replays)
    rates = {
        "edits": len(replays),
        "tokens": sum(one.num_tokens for one in replays),
        "tok_per_s": num_tokens / sum(one.decode_s for one in replays),
    }
    if num_steps:
        rates["tokens_per_step"] = rates["tokens"] / num_steps
        rates["acceptance"] = sum(one.num_accepted_tokens for one in replays) / max(1, num_drafted)
    return rates


class _Prompts:
    """Prompts of `CONTEXT_TOKENS` tokens, each with a beginning of its own, so that none is in a cache already."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._filler = [token_id for one in recordings for token_id in one.prompt]
        self._place = 0

    def some_tokens(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens of other prompts."""
        self._place = (self._place + 7919) % (len(self._filler) - num_tokens)
        return tuple(self._filler[self._place : self._place + num_tokens])

    def next(self, end: Sequence[int] = ()) -> tuple[int, ...]:
        """A prompt that ends with `end`, which is cut if it is longer."""
        end = tuple(end)[-CONTEXT_TOKENS:]
        return (*self.some_tokens(CONTEXT_TOKENS - len(end)), *end)


def measure_widths(
    loaded: LoadedModel, config: EngineConfig, sizes: Sizes
) -> tuple[dict[str, float], dict[str, float]]:
    """Time of one decode step by its number of tokens.

    Args:
        loaded: The model.
        config: The engine's limits.
        sizes: Widths and repeats.

    Returns:
        Milliseconds of a step of N tokens of one sequence, and of one token of each of N sequences, by N.
    """
    import torch

    from engine.inference.runner import Row, make_runner

    runner = make_runner(loaded, replace(config, max_draft_tokens=max(sizes.widths)))
    drafts: dict[str, float] = {}
    sequences: dict[str, float] = {}
    with torch.inference_mode():
        first = runner.new_kv_cache()
        runner.run([Row(first, [100 + place % 1000 for place in range(CONTEXT_TOKENS)], 1)])
        if not first.can_go_back:
            return {}, {}
        for width in sizes.widths:

            def step(width: int = width) -> None:
                runner.run([Row(first, list(range(100, 100 + width)), width)])
                first.truncate(CONTEXT_TOKENS)

            if runner.most_drafts(1) >= width - 1:
                drafts[str(width)] = median_ms(step, loaded.device, sizes.num_repeats)
        for width in sizes.widths:
            if width > runner.max_rows or not runner.has_room([(runner.new_kv_cache(), 128)] * width):
                break  # a page of its own each, and drafts
            caches = [first.copy_prefix(CONTEXT_TOKENS) for _ in range(width)]

            def step_all(caches: Sequence[Any] = caches) -> None:
                runner.run([Row(cache, [100], 1) for cache in caches])

            sequences[str(width)] = median_ms(step_all, loaded.device, sizes.num_repeats)
            runner.settle()
            for cache in caches:
                cache.release()
        first.release()
    return drafts, sequences


def median_ms(step: Callable[[], None], device: torch.device, num_repeats: int) -> float:
    """Time of one call, the device idle before and after.

    Args:
        step: What is timed.
        device: Where it runs.
        num_repeats: Half of how often it is timed, after two calls that are not.

    Returns:
        The median, in milliseconds.
    """
    times: list[float] = []
    for _ in range(2 + 2 * num_repeats):
        _synchronize(device)
        started_at = time.perf_counter()
        step()
        _synchronize(device)
        times.append(1000 * (time.perf_counter() - started_at))
    return statistics.median(times[2:])


def copy_rate(device: torch.device) -> float:
    """Gigabytes (10⁹) a second that a large copy reads and writes.

    Args:
        device: Where.

    Returns:
        The rate.
    """
    import torch

    num_bytes = 2**31 if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 1e9
    for _ in range(10):
        _synchronize(device)
        started_at = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - started_at)
    return 2 * num_bytes / best / 1e9


def step_bytes(loaded: LoadedModel, num_tokens: int) -> int:
    """Bytes that a decode step of one row has to read: every weight but the embeddings', keys and values.

    Args:
        loaded: The model.
        num_tokens: Tokens in its cache.

    Returns:
        The bytes as they are stored.
    """
    model: Any = loaded.model
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * num_kv_heads * head_dim * model.dtype.itemsize
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embedding.data_ptr() == head.data_ptr() else embedding.nbytes
    return int(model.get_memory_footprint()) - unread + num_tokens * per_token


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_gb(device: torch.device) -> float:
    """Most memory reserved on a GPU; on a CPU the most that this process ever held."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    import psutil

    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return memory.peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def measure_llama(
    program: Path,
    gguf: Path,
    workload: Workload,
    num_edits: int | None,
    num_lookup_edits: int | None,
    tokenizer: Path,
    *,
    on_gpu: bool,
) -> dict[str, Figures]:
    """llama.cpp's plain decoding, and its own lookup decoding where `llama-lookup` lies beside `llama-bench`.

    Args:
        program: The `llama-bench` of a build.
        gguf: The model's file.
        workload: The recorded edits.
        num_edits: Edits of each workload, for the length of answers; all if None.
        num_lookup_edits: Edits of each workload that `llama-lookup` writes, each in a process of its own.
        tokenizer: The folder with the tokenizer of the recordings.
        on_gpu: Whether all layers go to the GPU.

    Returns:
        Figures by the backend's name.

    Raises:
        EnvironmentFault: A program cannot be run, or prints something else.
    """
    import torch

    threads = torch.get_num_threads()
    edits = [one for name in WORKLOADS for one in workload.of(name, num_edits)]
    console.say("llama.cpp")
    found = {"llama.cpp": measure_llama_cpp(program, gguf, edits, threads, on_gpu=on_gpu)}
    lookup = program.with_name(program.name.replace("llama-bench", "llama-lookup"))
    if lookup != program and os.access(lookup, os.X_OK):
        console.say("llama.cpp with lookup")
        few = [one for name in WORKLOADS for one in workload.of(name, num_lookup_edits)]
        texts = [(one, _whole_text(tokenizer, one.prompt)) for one in few]
        found["llama.cpp_lookup"] = measure_llama_lookup(lookup, gguf, texts, threads, on_gpu=on_gpu)
    return found


def measure_llama_cpp(
    program: Path, gguf: Path, edits: Sequence[Recording], num_threads: int, *, on_gpu: bool
) -> Figures:
    """Run `llama-bench` and reckon PLAN and PATCH from its rates.

    Args:
        program: The `llama-bench` of a build.
        gguf: The model's file.
        edits: Those that the other backends replay, for the length of answers.
        num_threads: Threads on CPU.
        on_gpu: Whether all layers go to the GPU.

    Returns:
        The figures; the prompt of a PATCH counts as cached but for its last tokens.

    Raises:
        EnvironmentFault: It cannot be run, or prints something else.
    """
    command = [str(program), "-m", str(gguf), "-p", str(CONTEXT_TOKENS), "-n", "0", "-r", "3", "-o", "json"]
    command += ["-t", str(num_threads), "-ngl", "99" if on_gpu else "0", "-fa", "1"]
    decode = [*command]
    decode[decode.index("-p") + 1], decode[decode.index("-n") + 1] = "0", str(DECODE_TOKENS)
    rates: list[float] = []
    for one in (command, [*decode, "-d", str(CONTEXT_TOKENS)]):
        printed, _ = _run_llama(one)
        try:
            rates.append(float(json.loads(printed)[-1]["avg_ts"]))
        except (ValueError, LookupError, TypeError) as fault:
            raise EnvironmentFault(
                f"{program} failed: {fault}", hint="Give the llama-bench of a recent build."
            ) from None
    prefill_rate, decode_rate = rates
    lengths = [len(one.answer) for one in edits]
    prefill_s = CONTEXT_TOKENS / prefill_rate
    return Figures(
        prefill_ms=1000 * prefill_s,
        decode_ms={"1": 1000 / decode_rate},
        decode_tok_per_s=decode_rate,
        patch_tok_per_s=decode_rate,
        plan_p50_ms=1000 * (prefill_s + (PLAN_TOKENS - 1) / decode_rate),
        patch_p50_ms=1000 * (_TAIL_TOKENS / prefill_rate + (statistics.median(lengths) - 1) / decode_rate),
        ttft_ms=1000 * prefill_s,
    )


def measure_llama_lookup(
    program: Path, gguf: Path, edits: Sequence[tuple[Recording, str]], num_threads: int, *, on_gpu: bool
) -> Figures:
    """Run llama.cpp's own lookup decoding. It writes what its model says, as many tokens as the recorded answers have.

    Args:
        program: The `llama-lookup` of a build.
        gguf: The model's file.
        edits: Recordings, and their prompts as text.
        num_threads: Threads on CPU.
        on_gpu: Whether all layers go to the GPU.

    Returns:
        Rates of the workloads.

    Raises:
        EnvironmentFault: It cannot be run, or prints something else.
    """
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        cache = str(Path(folder) / "none")
        for name in WORKLOADS:
            num_tokens, elapsed_s = 0, 0.0
            chosen = [(edit, text) for edit, text in edits if edit.workload == name]
            for edit, text in chosen:
                prompt.write_text(text, encoding="utf-8", newline="")
                command = [str(program), "-m", str(gguf), "-f", str(prompt), "-n", str(len(edit.answer))]
                command += ["-c", "8192", "--draft-max", "16", "--temp", "0", "--repeat-penalty", str(PATCH_PENALTY)]
                command += ["-t", str(num_threads), "-ngl", "99" if on_gpu else "0", "-lcd", cache]
                printed, logged = _run_llama(command)
                found = _DECODED.search(logged) or _DECODED.search(printed.removeprefix(text))
                if found is None:
                    raise EnvironmentFault(f"{program} said no rate: {logged.strip()[-300:]}")
                num_tokens += int(found[1])
                elapsed_s += float(found[2])
            if elapsed_s:
                rate = num_tokens / elapsed_s
                figures.workloads[name] = {"edits": len(chosen), "tokens": num_tokens, "tok_per_s": rate}
    figures.patch_tok_per_s = min((one["tok_per_s"] for one in figures.workloads.values()), default=None)
    return figures


def _run_llama(command: Sequence[str]) -> tuple[str, str]:
    """What it prints, and what it logs."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=1800,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as fault:
        reason = str(getattr(fault, "stderr", "") or fault).strip()[-300:]
        raise EnvironmentFault(f"{command[0]} failed: {reason}", hint="Give programs of a recent build.") from None
    return done.stdout, done.stderr


# --- the command -----------------------------------------------------------------------------------------------------

_ROWS: tuple[tuple[str, str, str], ...] = (
    ("prefill of 900 tokens", "prefill_ms", "ms"),
    ("first token", "ttft_ms", "ms"),
    ("decode, one row", "decode_tok_per_s", "tokens/s"),
    ("share of a copy's bandwidth", "bandwidth_share", ""),
    ("PATCH workloads, the slower", "patch_tok_per_s", "tokens/s"),
    ("PLAN, p50", "plan_p50_ms", "ms"),
    ("PATCH, p50", "patch_p50_ms", "ms"),
    ("most memory", "peak_memory_gb", "GB"),
)


def bench_engine(
    session: Session,
    workload: Workload,
    backends: Sequence[str],
    num_edits: int | None,
    llama_cpp: Path | None,
    gguf: Path | None,
    *,
    as_json: bool,
) -> None:
    """Load the model that the settings name, measure, and print a table and one line of JSON.

    Args:
        session: Settings and store.
        workload: The recorded edits.
        backends: What to measure of ours and transformers'.
        num_edits: Edits of each workload.
        llama_cpp: `llama-bench`, to be measured too.
        gguf: Its model.
        as_json: Print the JSON line alone.

    Raises:
        UsageError: The workload's tokens are not the model's.
        ModelError: The model cannot be loaded.
        EnvironmentFault: llama.cpp cannot be run.
    """
    import torch

    _check_files(llama_cpp, gguf)
    ref = session.model_ref()
    local = session.local_model(ref, lambda step: console.say(step.message))
    session.check_memory(ref)
    console.say(f"loading {ref.name}")
    loaded = session.loading(local)()
    on_gpu = loaded.device.type == "cuda"
    highest = max((max(*one.prompt, *one.answer) for one in workload.recordings), default=0)
    if highest >= loaded.vocab_size:
        raise UsageError(
            f"The recorded edits hold token {highest}, and {ref.name} has {loaded.vocab_size}",
            hint="Record the edits with this model's tokenizer (benchmarks/record_workload.py), and give --workload.",
        )
    sizes = Sizes() if on_gpu else CPU_SIZES
    if num_edits is not None:
        sizes = replace(sizes, num_recordings=num_edits, slow_recordings=num_edits)
    beside: dict[str, Figures] = {}
    if llama_cpp is not None and gguf is not None:  # first: it is soon done, and may fail
        beside = measure_llama(
            llama_cpp, gguf, workload, sizes.num_recordings, sizes.num_recordings, loaded.folder, on_gpu=on_gpu
        )
    found = measure(loaded, session.engine_config(), workload, sizes, backends, console.say) | beside
    device = torch.cuda.get_device_name(loaded.device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    facts = {
        "device": device,
        "model": ref.name,
        "quantization": loaded.quantization,
        "copy_gb_per_s": round(copy_rate(loaded.device), 1),
        "context_tokens": CONTEXT_TOKENS,
        "left_out": workload.left_out,
        "backends": {name: figures.to_json() for name, figures in found.items()},
    }
    if not as_json:
        _print_table(facts, found)
    print(json.dumps(facts), flush=True)


def _whole_text(folder: Path, token_ids: Sequence[int]) -> str:
    """Text with the chat template's tokens in it, as llama.cpp reads them from a file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(token_ids), skip_special_tokens=False)


def _check_files(llama_cpp: Path | None, gguf: Path | None) -> None:
    """Before minutes are spent on measuring the rest."""
    if llama_cpp is not None and not os.access(llama_cpp, os.X_OK):
        raise UsageError(f"{llama_cpp} is no program", hint="Give the llama-bench of a build of llama.cpp.")
    if gguf is not None and not gguf.is_file():
        raise UsageError(f"{gguf} is no file", hint="Give the model's GGUF file.")


def _print_table(facts: Mapping[str, Any], found: Mapping[str, Figures]) -> None:
    head = f"{facts['model']}, {facts['quantization']}, {facts['device']}; a copy: {facts['copy_gb_per_s']} GB/s"
    rows = [(words, *(_cell(getattr(one, name), unit) for one in found.values())) for words, name, unit in _ROWS]
    for kind, name in (("of one sequence", "decode_ms"), ("of as many sequences", "decode_sequences_ms")):
        for width in sorted({int(width) for one in found.values() for width in getattr(one, name)}):
            cells = (_cell(getattr(one, name).get(str(width)), "ms") for one in found.values())
            rows.append((f"step, {width} tokens {kind}", *cells))
    for name in WORKLOADS:
        for figure in ("edits", "tok_per_s", "tokens_per_step", "acceptance"):
            cells = (_cell(one.workloads.get(name, {}).get(figure), "") for one in found.values())
            rows.append((f"{name}: {figure.replace('_', ' ')}", *cells))
    console.print_table(head, ("", *found), rows)


def _cell(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.3g} {unit}".strip() if value < 1000 else f"{value:,.0f} {unit}".strip()
