"""The engine against the plain reference loop, on the real 0.5B (invariant 7).

In fp32 on CPU every token must be equal. In bf16 two ways of computing may differ in the last bit, so at the first
difference the reference's own lead must be a tie: at most 0.25 between its first and second logit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from engine.errors import RefusedError
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.grammar import GrammarCompiler, GrammarMatcher
from engine.inference.loading import LoadedModel, load_model
from engine.inference.protocol import (
    Completion,
    Engine,
    FinishReason,
    GenerationRequest,
    Grammar,
    Message,
    Priority,
    SamplingParams,
    Token,
    complete,
)
from engine.inference.reference import reference_check, reference_generate, reference_step
from engine.patching.patcher import Patcher, PatcherOptions
from engine.patching.scopes import find_scope
from engine.patching.source import Source

LONG = os.environ.get("PLANPATCH_LONG") == "1"
MAX_TIE = 0.25
FUNCTION = "def clamp(x, low, high):\n    if x < low:\n        return high\n    return min(x, high)\n"
TEXTS = [
    f"Fix the bug:\n```python\n{FUNCTION}```",
    "Write a Python function that adds two numbers. 🙂",
    "한국어로 한 문장으로 파이썬을 설명해 줘.",
]
EDITS = [  # function, intent
    (FUNCTION, "return low when x is too small"),
    (
        """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
""",
        "return 0.0 for an empty list",
    ),
    (
        """def parse_pairs(text):
    pairs = {}
    for line in text.splitlines():
        key, value = line.split('=')
        pairs[key] = value
    return pairs
""",
        "strip whitespace around key and value and skip blank lines",
    ),
    (
        """def retry(action, times):
    for attempt in range(times):
        try:
            return action()
        except Exception:
            pass
""",
        "raise the last exception when every attempt failed",
    ),
    ("def greet(name):\n    return 'Hello ' + name + '! 🙂'\n", "add type hints and a docstring, and use an f-string"),
    (
        """def unique(items):
    found = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
""",
        "use a set for the lookup so that it is linear",
    ),
]


class Bench:
    """One model, loaded for the engine, which changes its modules, and once more for the reference."""

    def __init__(self, folder: Path, quantization: str) -> None:
        self.loaded: LoadedModel = load_model("0.5b", "digest", folder, device="cpu", quantization=quantization)
        self.plain: LoadedModel = load_model("0.5b", "digest", folder, device="cpu", quantization=quantization)
        config = EngineConfig(prefill_chunk_tokens=32)
        self.engine = InProcessEngine("0.5b", folder, lambda: self.loaded, config=config)
        self.engine.wait_until_ready()

    def prompt(self, text: str, *more: Message) -> tuple[int, ...]:
        return tuple(self.engine.tokenizer.encode_chat([Message("user", text), *more]))

    def generate(self, prompt: Sequence[int], params: SamplingParams, **request: object) -> Completion:
        return complete(self.engine, GenerationRequest(tuple(prompt), params, **request))  # type: ignore[arg-type]

    def matcher(self, params: SamplingParams) -> GrammarMatcher | None:
        if params.grammar is None:
            return None
        eos = min(self.engine.tokenizer.eos_token_ids)
        return GrammarCompiler(self.loaded.folder, self.loaded.vocab_size, eos).compile(params.grammar)

    def reference(self, prompt: Sequence[int], params: SamplingParams) -> list:
        return reference_generate(
            self.plain.model,
            prompt,
            params.max_new_tokens,
            eos_token_ids=self.engine.tokenizer.eos_token_ids,
            repetition_penalty=params.repetition_penalty,
            matcher=self.matcher(params),
        )


@pytest.fixture(scope="module")
def fp32(model_folder_05b: Path) -> Iterator[Bench]:
    bench = Bench(model_folder_05b, "fp32")
    yield bench
    bench.engine.close()


def check_equal(bench: Bench, prompt: Sequence[int], params: SamplingParams, completion: Completion) -> None:
    """Every token is the reference's: in a long run by the loop, else by one pass over the whole text."""
    generated, end = completion.token_ids, bench.engine.tokenizer.eos_token_ids
    if LONG:
        expected = [step.token_id for step in bench.reference(prompt, params)]
    else:
        penalty, matcher = params.repetition_penalty, bench.matcher(params)
        steps = reference_check(bench.plain.model, prompt, generated, repetition_penalty=penalty, matcher=matcher)
        expected = [step.token_id for step in steps]
        if len(expected) > len(generated):  # a grammar has not ended the text
            assert (expected.pop() in end) or completion.finish_reason is not FinishReason.STOP, completion.text
    assert list(generated) == expected, (completion.text, bench.engine.tokenizer.decode(expected))
    assert len(generated) == params.max_new_tokens or completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("text", [TEXTS[0], *(pytest.param(text, marks=pytest.mark.slow) for text in TEXTS[1:])])
def test_chunked_prefill_and_cached_decode_equal_the_reference(
    fp32: Bench, text: str, length: Callable[[int, int], int]
) -> None:
    params = SamplingParams(max_new_tokens=length(12, 64), repetition_penalty=1.1)
    prompt = fp32.prompt(text)
    completion = fp32.generate(prompt, params)
    assert completion.num_prompt_tokens > 20
    check_equal(fp32, prompt, params, completion)


def test_a_reused_prefix_gives_the_tokens_of_a_fresh_prefill(fp32: Bench, length: Callable[[int, int], int]) -> None:
    params = SamplingParams(max_new_tokens=length(10, 48))
    first = fp32.prompt(TEXTS[0] + "\nSay what is wrong.")
    plan = fp32.generate(first, params)
    second = fp32.prompt(TEXTS[0] + "\nSay what is wrong.", Message("assistant", plan.text), Message("user", "Fix it."))
    patch = fp32.generate(second, params)
    assert patch.num_cached_tokens >= len(first)
    check_equal(fp32, second, params, patch)
    again = fp32.prompt(TEXTS[0] + "\nWrite it shorter.")
    branch = fp32.generate(again, params)
    assert 20 < branch.num_cached_tokens < len(first)
    check_equal(fp32, again, params, branch)


def test_equal_prompts_at_once_share_their_prefill(fp32: Bench, length: Callable[[int, int], int]) -> None:
    params = SamplingParams(max_new_tokens=length(8, 32), repetition_penalty=1.03)
    prompt = fp32.prompt(TEXTS[0] + "\nSay it in other words.")
    asked = [fp32.engine.submit(GenerationRequest(prompt, params)) for _ in range(3)]
    completions = [next(e for e in fp32.engine.stream(one) if isinstance(e, Completion)) for one in asked]
    assert [one.num_cached_tokens for one in completions[1:]] == [len(prompt) - 1] * 2
    assert len({one.token_ids for one in completions}) == 1
    check_equal(fp32, prompt, params, completions[0])


def test_the_likeliest_tokens_and_what_follows_a_second_choice_equal_the_reference(
    fp32: Bench, length: Callable[[int, int], int]
) -> None:
    params = SamplingParams(max_new_tokens=length(8, 32), repetition_penalty=1.1, top_logprobs=2)
    prompt = fp32.prompt(TEXTS[0])
    completion = fp32.generate(prompt, params)
    check_equal(fp32, prompt, params, completion)
    steps = reference_check(fp32.plain.model, prompt, completion.token_ids, repetition_penalty=1.1)[
        : params.max_new_tokens
    ]
    assert [top[0].token_id for top in completion.top_logprobs] == [step.token_id for step in steps]
    leads = [first.logprob - second.logprob for first, second in completion.top_logprobs]
    assert leads == pytest.approx([step.gap for step in steps], abs=1e-3)
    head = (*prompt, *completion.token_ids[:5], completion.top_logprobs[5][1].token_id)
    onward = fp32.generate(head, params)
    assert onward.num_cached_tokens >= len(prompt) + 5
    check_equal(fp32, head, params, onward)


def test_a_grammar_gives_the_reference_tokens_and_valid_json(fp32: Bench) -> None:
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"line": {"type": "integer"}, "new": {"enum": ["x", 'return "é\\n"']}},
            "required": ["line", "new"],
            "additionalProperties": False,
        },
        "minItems": 1,
        "maxItems": 2,
    }
    params = SamplingParams(max_new_tokens=40, grammar=Grammar("json_schema", json.dumps(schema)))
    prompt = fp32.prompt(TEXTS[0])
    completion = fp32.generate(prompt, params)
    assert completion.finish_reason is FinishReason.STOP
    assert [set(item) for item in json.loads(completion.text)] == [{"line", "new"}] * len(json.loads(completion.text))
    check_equal(fp32, prompt, params, completion)


def test_speculation_gives_the_reference_tokens_in_fewer_steps(fp32: Bench, length: Callable[[int, int], int]) -> None:
    prompt = fp32.prompt(
        f"Write this out again, with `low` in the place of `high` in line 3:\n```python\n{FUNCTION}```"
    )
    params = SamplingParams(max_new_tokens=length(24, 64), repetition_penalty=1.03, top_logprobs=2)
    completion = fp32.generate(prompt, params)
    check_equal(fp32, prompt, params, completion)
    assert len(completion.top_logprobs) == len(completion.token_ids)
    assert completion.num_accepted_tokens > 8
    assert completion.num_steps < 0.7 * len(completion.token_ids)
    assert completion.num_steps + completion.num_accepted_tokens in range(len(completion.token_ids), 999)
    again = fp32.generate([*prompt, *completion.token_ids[:18]], SamplingParams(4, repetition_penalty=1.03))
    assert again.token_ids == completion.token_ids[18:22], "rejected drafts left nothing in the cache"


@pytest.mark.slow
def test_a_grammar_s_own_text_is_drafted_and_the_tokens_are_the_reference_s(fp32: Bench) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a_name_that_is_long_enough": {"enum": ["one and only value", "another"]},
            "n": {"type": "integer"},
        },
        "required": ["a_name_that_is_long_enough", "n"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        max_new_tokens=60, grammar=Grammar("json_schema", json.dumps(schema)), repetition_penalty=1.1
    )
    prompt = fp32.prompt("Answer with JSON.")
    completion = fp32.generate(prompt, params)
    assert completion.finish_reason is FinishReason.STOP
    assert json.loads(completion.text)["a_name_that_is_long_enough"] in ("one and only value", "another")
    assert completion.num_accepted_tokens > 8
    check_equal(fp32, prompt, params, completion)


@pytest.mark.slow
def test_a_sampled_text_is_the_same_with_drafts_and_without(fp32: Bench) -> None:
    prompt = fp32.prompt(f"Write this out again:\n```python\n{FUNCTION}```")
    params = SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.95, seed=11, repetition_penalty=1.05)
    drafted = fp32.generate(prompt, params)
    config = EngineConfig(max_draft_tokens=0)
    with InProcessEngine("plain", fp32.loaded.folder, lambda: fp32.loaded, config=config) as plain:
        plain.wait_until_ready()
        alone = complete(plain, GenerationRequest(tuple(prompt), params))
    assert alone.num_draft_tokens == 0 < drafted.num_accepted_tokens
    assert drafted.token_ids == alone.token_ids


def test_after_a_cancel_the_next_generation_is_as_if_nothing_had_been(fp32: Bench) -> None:
    prompt = fp32.prompt(TEXTS[0])
    params = SamplingParams(max_new_tokens=200)
    request_id = fp32.engine.submit(GenerationRequest(prompt, params))
    events = fp32.engine.stream(request_id)
    seen = [next(events) for _ in range(3)]
    fp32.engine.cancel(request_id)
    rest = list(events)
    assert all(isinstance(event, Token) for event in seen)
    assert isinstance(rest[-1], Completion)
    assert rest[-1].finish_reason is FinishReason.CANCELLED
    most = 1 + EngineConfig().max_draft_tokens
    assert len(rest[-1].token_ids) <= 3 + 2 * most, "a cancel waits for one step at most"
    short = SamplingParams(max_new_tokens=8)
    completion = fp32.generate(prompt, short)
    assert completion.num_cached_tokens > 0
    check_equal(fp32, prompt, short, completion)


def test_a_cancel_during_prefill_leaves_a_right_cache(fp32: Bench) -> None:
    prompt = fp32.prompt("# a long comment\n" * 60 + FUNCTION)
    request_id = fp32.engine.submit(GenerationRequest(prompt, SamplingParams(max_new_tokens=4)))
    fp32.engine.cancel(request_id)
    (*_, last) = fp32.engine.stream(request_id)
    assert isinstance(last, Completion)
    assert last.finish_reason is FinishReason.CANCELLED
    params = SamplingParams(max_new_tokens=3)
    check_equal(fp32, prompt, params, fp32.generate(prompt, params))


def test_an_interactive_request_pauses_a_background_one_and_both_equal_the_reference(fp32: Bench) -> None:
    slow_params, quick_params = SamplingParams(max_new_tokens=16), SamplingParams(max_new_tokens=4)
    slow, quick = fp32.prompt(TEXTS[1]), fp32.prompt(TEXTS[2])
    background = fp32.engine.stream(fp32.engine.submit(GenerationRequest(slow, slow_params, Priority.BACKGROUND)))
    next(background)
    interactive = fp32.generate(quick, quick_params)
    status = fp32.engine.status()
    assert status.num_running == 1, "the background request is still there, paused"
    (*_, last) = background
    assert isinstance(last, Completion)
    check_equal(fp32, quick, quick_params, interactive)
    check_equal(fp32, slow, slow_params, last)


def test_rows_decoded_together_equal_the_reference_each(fp32: Bench, length: Callable[[int, int], int]) -> None:
    longest = length(8, 40)
    params = [SamplingParams(max_new_tokens=longest - 2 * index, repetition_penalty=1.05) for index in range(3)]
    prompts = [fp32.prompt(text) for text in TEXTS]
    ids = [fp32.engine.submit(GenerationRequest(*pair)) for pair in zip(prompts, params, strict=True)]
    streams = [list(fp32.engine.stream(request_id)) for request_id in ids]
    for prompt, one, events in zip(prompts, params, streams, strict=True):
        assert isinstance(events[-1], Completion)
        check_equal(fp32, prompt, one, events[-1])
    follow_up = fp32.generate([*prompts[2], *streams[2][-1].token_ids], SamplingParams(max_new_tokens=3))  # type: ignore[union-attr]
    assert follow_up.num_cached_tokens >= len(prompts[2]) + len(streams[2][-1].token_ids) - 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_an_adapter_switched_on_and_off_leaves_the_base_as_it_was(fp32: Bench, tmp_path: Path) -> None:
    prompt = fp32.prompt(TEXTS[0])
    params = SamplingParams(max_new_tokens=8)
    base = fp32.generate(prompt, params)
    adapter = make_adapter(fp32.loaded, tmp_path / "adapter")
    with_adapter = fp32.generate(prompt, params, adapter=str(adapter))
    assert with_adapter.token_ids != base.token_ids, "the adapter changes something"
    assert with_adapter.num_cached_tokens == 0, "a prefix of the base does not serve the adapter"
    fp32.engine.use_adapter(str(adapter))
    assert fp32.engine.status().adapter == str(adapter)
    assert fp32.generate(prompt, params).token_ids == with_adapter.token_ids
    fp32.engine.use_adapter(None)
    off = fp32.generate(prompt, params)
    assert off.token_ids == base.token_ids
    check_equal(fp32, prompt, params, off)


def test_an_adapter_for_another_base_is_refused_by_name(fp32: Bench, tmp_path: Path) -> None:
    from engine.errors import AdapterError

    adapter = make_adapter(fp32.loaded, tmp_path / "adapter", rows_missing=8)
    with pytest.raises(AdapterError, match=r"made for another base model.*q_proj with 888 inputs, and it has 896"):
        fp32.engine.use_adapter(str(adapter))
    with pytest.raises(AdapterError, match="does not exist"):
        fp32.engine.use_adapter(str(tmp_path / "nowhere"))
    assert fp32.engine.status().adapter is None


@dataclass
class RecordingEngine:
    """An engine that keeps every request with its completion."""

    engine: InProcessEngine
    generations: list[tuple[GenerationRequest, Completion]] = field(default_factory=list)
    requests: dict[str, GenerationRequest] = field(default_factory=dict)

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def submit(self, request: GenerationRequest) -> str:
        request_id = self.engine.submit(request)
        self.requests[request_id] = request
        return request_id

    def stream(self, request_id: str) -> Iterator[Token | Completion]:
        for event in self.engine.stream(request_id):
            if isinstance(event, Completion):
                self.generations.append((self.requests[request_id], event))
            yield event


@pytest.mark.long
def test_bf16_differs_from_its_reference_only_at_ties(
    model_folder_05b: Path, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    """Every token of PLANs and PATCHes as the product makes them, and of three chats, each against its own prefix."""
    bench = Bench(model_folder_05b, "bf16")
    engine = RecordingEngine(bench.engine)
    patcher = Patcher(cast(Engine, engine), None, PatcherOptions(num_repairs=0, num_forks=0))
    for function, intent in EDITS:
        source = Source.from_text(function, path="edit.py")
        scope = find_scope(source, name=function.split("(")[0].removeprefix("def "))
        plan = patcher.plan(source, scope, intent)
        with suppress(RefusedError):
            patcher.patch(source, scope, intent, plan=plan)
        with suppress(RefusedError):
            patcher.patch(source, scope, intent)
    for text in TEXTS:
        request = GenerationRequest(bench.prompt(text), SamplingParams(max_new_tokens=64, repetition_penalty=1.03))
        engine.generations.append((request, complete(bench.engine, request)))
    num_tokens, ties = 0, []
    for request, completion in engine.generations:
        for index, token_id in enumerate(completion.token_ids):
            before = [*request.prompt_token_ids, *completion.token_ids[:index]]
            penalty = request.params.repetition_penalty
            step = reference_step(bench.plain.model, before, repetition_penalty=penalty)
            num_tokens += 1
            if step.token_id != token_id:
                ties.append((bench.engine.tokenizer.decode(before[-8:]), index, step.gap))
    bench.engine.close()
    record_figure("bf16 tokens that differ from the reference", len(ties), f"of {num_tokens}")
    record_figure("their leads in the reference", ", ".join(f"{gap:.3f}" for *_, gap in ties), "logits")
    print(ties)
    assert num_tokens > 600
    assert all(gap <= MAX_TIE for *_, gap in ties), ties
    assert len(ties) <= 0.005 * num_tokens, ties


def make_adapter(loaded: LoadedModel, folder: Path, *, rows_missing: int = 0) -> Path:
    """A LoRA adapter with random weights on the attention of the first two layers, written as peft writes it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            module = loaded.model.get_submodule(f"model.layers.{layer}.self_attn.{name}")
            base = cast(torch.nn.Linear, getattr(module, "base_layer", module))
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, base.in_features - rows_missing)
            tensors[f"{key}.lora_B.weight"] = torch.randn(base.out_features, 4) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/other-base" if rows_missing else "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 1],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def length(long_run: bool) -> Callable[[int, int], int]:
    """How many tokens: few in a quick run, more in a long one."""
    return lambda quick, long: long if long_run else quick
