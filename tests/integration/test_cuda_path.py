"""The CUDA path against plain forward passes in fp32 over the same dequantized weights, and against itself.

Skipped where torch sees no GPU or Triton is missing. Models are small and random but for the last test, which takes the
real 0.5B.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
pytest.importorskip("triton")
if torch.cuda.is_available():
    from engine.inference.cuda import kernels
    from engine.inference.cuda.runner import CudaRunner
    from engine.inference.cuda.weights import LoraPair, base_of
    from engine.inference.random_model import random_model

VOCAB = 1000
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=896, num_hidden_layers=3, max_position_embeddings=8192
)
ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0,
    original_max_position_embeddings=256,
)  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2, 7 queries a key": Qwen2Config(
        **{**SIZES, "hidden_size": 896}, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen3, 4 queries a key": Qwen3Config(**SIZES, num_attention_heads=8, num_key_value_heads=2, head_dim=128),
    "llama, 1 query a key": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, rope_parameters=ROPE),
}
KINDS = [(kind, dtype) for kind in ("int8", "nf4") for dtype in ("float16", "bfloat16")]
KINDS += [("bf16", "bfloat16"), ("fp16", "float16")]
TOLERANCE = {torch.float16: 0.004, torch.bfloat16: 0.03}


@pytest.fixture(autouse=True)
def _empty_gpu() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


class Pair:
    """A runner, and the same model in fp32."""

    def __init__(
        self, name: str, quantization: Any = "int8", dtype: str = "float16", num_kv_tokens: int = 4096
    ) -> None:
        self.loaded = random_model(copy.deepcopy(CONFIGS[name]), quantization, getattr(torch, dtype))
        self.model = exact_model(self.loaded.model)
        self.runner = CudaRunner(self.loaded, num_kv_tokens=num_kv_tokens)
        self.tolerance = TOLERANCE[getattr(torch, dtype)]

    def exact(self, token_ids: list[int]) -> torch.Tensor:
        """Logits after each token, fp32."""
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids], device="cuda")).logits[0]

    def error(self, logits: torch.Tensor, exact: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())


def exact_model(model: Any) -> Any:
    """A copy in fp32 of what the weights mean."""
    exact = copy.deepcopy(model)
    for name, module in list(exact.named_modules()):
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="cuda")
            plain.weight.data = meaning(module)
            if module.bias is not None:
                plain.bias.data = module.bias.data.float()
            parent, _, last = name.rpartition(".")
            setattr(exact.get_submodule(parent), last, plain)
    return nn.Module.float(exact).eval()  # transformers refuses it for what was quantized


def meaning(module: Any) -> torch.Tensor:
    if type(module).__name__ == "Linear8bitLt":
        return module.weight.data.float() * module.weight.SCB[:, None] / 127
    state, packed = module.weight.quant_state, module.weight.data.reshape(-1).long()
    values = torch.stack([state.code[packed >> 4], state.code[packed & 15]], 1).float()
    return (values.reshape(-1, 64) * state.absmax[:, None]).reshape(state.shape)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_an_exact_forward_pass(name: str, quantization: str, dtype: str) -> None:
    pair = Pair(name, quantization, dtype)
    ids = tokens(850)
    exact = pair.exact(ids)
    kv = pair.runner.new_kv()
    logits = pair.runner.prefill(kv, ids[:300], want_logits=True)
    assert logits is not None and pair.error(logits, exact[299]) < pair.tolerance
    logits = pair.runner.prefill(kv, ids[300:347], want_logits=True)  # a narrow step
    assert logits is not None and pair.error(logits, exact[346]) < pair.tolerance
    logits = pair.runner.prefill(kv, ids[347:480], want_logits=True)  # three narrow ones
    assert logits is not None and pair.error(logits, exact[479]) < pair.tolerance
    logits = pair.runner.prefill(kv, ids[480:750], want_logits=True)  # a wide one with tokens before it
    assert logits is not None and pair.error(logits, exact[749]) < pair.tolerance
    at = 750
    for width in (1, 2, 3, 16, 17, 33):
        logits = pair.runner.decode([(kv, ids[at : at + width])])
        assert pair.error(logits, exact[at : at + width]) < pair.tolerance
        best, chosen = exact[at : at + width].max(-1).values, logits.argmax(-1, keepdim=True)
        lead = best - exact[at : at + width].gather(-1, chosen)[:, 0]
        assert float(lead.max()) < 4 * pair.tolerance * float(exact.std()), "the likeliest token is, up to rounding"
        at += width
    assert kv.num_tokens == at


@pytest.mark.parametrize("quantization", ["int8", "nf4", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_has_the_same_bits_whatever_goes_with_it(name: str, quantization: str) -> None:
    pair = Pair(name, quantization, "bfloat16" if quantization == "bf16" else "float16")
    runner, ids = pair.runner, tokens(200, 1)
    kv, other = runner.new_kv(), runner.new_kv()
    runner.prefill(kv, ids[:123], want_logits=False)  # drafts cross a page's and a segment's border
    runner.prefill(other, tokens(70, 2), want_logits=False)
    alone: list[torch.Tensor] = []
    for token_id in ids[123:139]:
        alone.append(runner.decode([(kv, [token_id])])[0].clone())
    for width in range(2, 17):
        kv.truncate(123)
        logits = runner.decode([(kv, ids[123 : 123 + width])])
        assert torch.equal(logits, torch.stack(alone[:width])), f"{width} rows"
    for width in range(1, 16):
        kv.truncate(123)
        beside = [(other, tokens(16 - width, width))]
        rows = [(kv, ids[123 : 123 + width])]
        logits = runner.decode([*beside, *rows])[16 - width :]
        assert torch.equal(logits, torch.stack(alone[:width])), f"{width} rows behind another sequence"
        kv.truncate(123)
        other.truncate(70)
        logits = runner.decode([*rows, *beside])[:width]
        assert torch.equal(logits, torch.stack(alone[:width])), f"{width} rows before another sequence"
        other.truncate(70)


def test_after_going_back_a_sequence_is_as_if_it_had_never_gone_on() -> None:
    pair = Pair("qwen3, 4 queries a key")
    runner, ids = pair.runner, tokens(160, 3)
    plain = runner.new_kv()
    runner.prefill(plain, ids[:126], want_logits=False)
    expected = [runner.decode([(plain, [token_id])])[0].clone() for token_id in ids[126:140]]
    kv = runner.new_kv()
    runner.prefill(kv, ids[:126], want_logits=False)
    at = 126
    while at < 140:
        runner.decode([(kv, [ids[at], *tokens(9, at)])])  # wrong drafts
        kv.truncate(at)
        logits = runner.decode([(kv, [ids[at]])])
        assert torch.equal(logits[0], expected[at - 126])
        at += 1


def test_a_fork_goes_its_own_way() -> None:
    pair = Pair("qwen3, 4 queries a key")
    runner, ids = pair.runner, tokens(160, 4)
    kv = runner.new_kv()
    runner.prefill(kv, ids[:140], want_logits=False)
    forks = [kv.copy_prefix(140) for _ in range(3)]
    before = runner.num_free_pages
    texts = [tokens(20, seed) for seed in range(3)]
    for step in range(20):
        logits = runner.decode([(fork, [text[step]]) for fork, text in zip(forks, texts, strict=True)])
    for row, (fork, text) in enumerate(zip(forks, texts, strict=True)):
        exact = pair.exact([*ids[:140], *text])
        assert pair.error(logits[row], exact[-1]) < pair.tolerance
        assert fork.num_tokens == 160
    assert before == runner.num_free_pages  # 140 and 160 tokens are three pages
    again = runner.decode([(kv, [texts[0][0]])])
    assert pair.error(again[0], pair.exact([*ids[:140], texts[0][0]])[-1]) < pair.tolerance


def test_contexts_across_far_segments() -> None:
    pair = Pair("qwen3, 4 queries a key", num_kv_tokens=6144)
    runner, ids = pair.runner, tokens(5200, 5)
    exact = pair.exact(ids)
    kv = runner.new_kv()
    for end in (4090, 4700, 5190):
        runner.prefill(kv, ids[kv.num_tokens : end - 1], want_logits=False)
        alone = runner.decode([(kv, ids[end - 1 : end])])[0].clone()
        assert pair.error(alone, exact[end - 1]) < pair.tolerance
        kv.truncate(end - 1)
        together = runner.decode([(kv, ids[end - 1 : end + 9])])
        assert torch.equal(together[0], alone)
        assert pair.error(together, exact[end - 1 : end + 9]) < pair.tolerance
        kv.truncate(end)


def test_64_rows_of_many_sequences() -> None:
    pair = Pair("qwen3, 4 queries a key")
    runner = pair.runner
    texts = [tokens(30 + 9 * index, index) for index in range(13)]
    kvs = [runner.new_kv() for _ in texts]
    for kv, text in zip(kvs, texts, strict=True):
        runner.prefill(kv, text[:-5], want_logits=False)
    assert sum(5 for _ in texts) > 64
    logits = runner.decode([(kv, text[-5:]) for kv, text in zip(kvs[:12], texts[:12], strict=True)])
    for row, text in enumerate(texts[:12]):
        assert pair.error(logits[5 * row : 5 * row + 5], pair.exact(text)[-5:]) < pair.tolerance


def test_hidden_states() -> None:
    pair = Pair("llama, 1 query a key")
    ids = tokens(150, 6)
    with torch.inference_mode():
        exact = pair.model.model(torch.tensor([ids], device="cuda")).last_hidden_state[0]
    hidden = pair.runner.hidden(pair.runner.new_kv(), ids)
    assert pair.error(hidden.float(), exact) < pair.tolerance


def test_a_full_pool_is_an_error_and_the_next_step_is_right() -> None:
    from engine.errors import EngineError

    pair = Pair("qwen3, 4 queries a key", num_kv_tokens=256)
    runner, ids = pair.runner, tokens(200, 7)
    first, second = runner.new_kv(), runner.new_kv()
    runner.prefill(first, ids[:190], want_logits=False)
    runner.prefill(second, ids[:60], want_logits=False)
    with pytest.raises(EngineError, match="The KV cache is full"):
        runner.decode([(first, ids[190:192]), (second, tokens(8))])
    assert (first.num_tokens, second.num_tokens) == (190, 60)
    logits = runner.decode([(first, ids[190:192])])
    assert pair.error(logits, pair.exact(ids[:192])[-2:]) < pair.tolerance


@pytest.mark.parametrize("quantization", ["int8", "nf4", "bf16"])
def test_the_plain_path_runs_on_the_same_weights(quantization: Any) -> None:
    """The modules' parameters are views of the fused tensors: transformers' forward pass is as before."""
    dtype = torch.bfloat16 if quantization == "bf16" else torch.float16
    loaded = random_model(copy.deepcopy(CONFIGS["qwen3, 4 queries a key"]), quantization, dtype)
    ids = torch.tensor([tokens(50, 8)], device="cuda")
    with torch.inference_mode():
        before = loaded.model(ids).logits
        held = torch.cuda.memory_allocated()
        runner = CudaRunner(loaded, num_kv_tokens=64)
        assert torch.equal(loaded.model(ids).logits, before)
        assert runner.prefill(runner.new_kv(), tokens(50, 8), want_logits=True) is not None
        layer: Any = loaded.model.get_submodule("model.layers.1")
        assert layer.self_attn.k_proj.weight.data_ptr() - layer.self_attn.q_proj.weight.data_ptr() > 0
        assert torch.equal(loaded.model(ids).logits, before)
    assert held > 0


@pytest.mark.parametrize("quantization", ["int8", "nf4", "bf16"])
def test_an_adapter_goes_on_and_off_and_over_to_another(quantization: Any) -> None:
    pair = Pair("qwen2, 7 queries a key", quantization, "bfloat16" if quantization == "bf16" else "float16")
    runner, ids = pair.runner, tokens(120, 9)

    def logits_of(runner: CudaRunner) -> tuple[torch.Tensor, torch.Tensor]:
        kv = runner.new_kv()
        wide = runner.prefill(kv, ids[:100], want_logits=True)
        assert wide is not None
        wide = wide.clone()
        narrow = runner.decode([(kv, ids[100:108])]).clone()
        kv.release()
        return wide, narrow

    base = logits_of(runner)
    small = adapter(pair.model, 8, ["self_attn.q_proj", "self_attn.v_proj"], 1)
    others = ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    large = adapter(pair.model, 24, others, 2)
    for weights in (small, large, small):
        runner.use_adapter(weights)
        exact = with_adapter(pair.model, weights)(torch.tensor([ids], device="cuda")).logits[0]
        wide, narrow = logits_of(runner)
        assert pair.error(wide, exact[99]) < pair.tolerance
        assert pair.error(narrow, exact[100:108]) < pair.tolerance
        assert pair.error(base[0], exact[99]) > 2 * pair.tolerance
    runner.use_adapter(None)
    assert all(torch.equal(one, two) for one, two in zip(base, logits_of(runner), strict=True))


def adapter(model: Any, rank: int, names: list[str], seed: int) -> dict[str, LoraPair]:
    torch.manual_seed(seed)
    weights: dict[str, LoraPair] = {}
    for index in range(len(model.model.layers)):
        for name in names:
            module: Any = base_of(model.get_submodule(f"model.layers.{index}.{name}"))
            a = torch.randn(rank, module.in_features) * module.in_features**-0.5
            weights[f"model.layers.{index}.{name}"] = LoraPair(a, torch.randn(module.out_features, rank) * 0.1, 2.0)
    return weights


def with_adapter(model: Any, weights: dict[str, LoraPair]) -> Any:
    changed = copy.deepcopy(model)
    for name, pair in weights.items():
        changed.get_submodule(name).weight.data += (pair.b @ pair.a * pair.scaling).cuda()
    return torch.inference_mode()(changed)


def test_adapter_files_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from engine.inference.adapters import read_adapter
    from engine.inference.cuda.weights import read_lora

    loaded = random_model(copy.deepcopy(CONFIGS["qwen3, 4 queries a key"]), "bf16", torch.bfloat16)
    runner = CudaRunner(loaded, num_kv_tokens=256)
    ids = tokens(80, 10)
    exact = exact_model(loaded.model)
    config = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 4},
        alpha_pattern={"down_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    peft_model: Any = get_peft_model(exact, config)
    peft_model.save_pretrained(str(tmp_path))
    with torch.inference_mode():
        expected = peft_model(torch.tensor([ids], device="cuda")).logits[0, -1]
    runner.use_adapter(read_lora(read_adapter(tmp_path)))
    logits = runner.prefill(runner.new_kv(), ids, want_logits=True)
    assert logits is not None and (logits - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]


def test_what_it_cannot_run_is_said_in_words() -> None:
    from transformers import GPT2Config

    loaded = random_model(copy.deepcopy(CONFIGS["qwen3, 4 queries a key"]), "bf16", torch.bfloat16)
    assert CudaRunner.why_not(loaded) == ""
    loaded.model.config.hidden_act = "gelu"
    assert "gelu" in CudaRunner.why_not(loaded)
    loaded.model.config = GPT2Config()  # type: ignore[assignment]
    assert "gpt2" in CudaRunner.why_not(loaded)


def test_segments_count_as_the_kernels_count() -> None:
    assert [kernels.num_segments(n) for n in (1, 64, 65, 2048, 2049, 2304, 2305)] == [1, 1, 2, 32, 33, 33, 34]


@pytest.mark.parametrize("quantization", ["int8", "nf4", "bf16"])
def test_the_real_model_agrees_with_an_exact_forward_pass(quantization: Any, model_folder_05b: Path) -> None:
    from engine.inference.loading import load_model

    loaded = load_model("model", "", model_folder_05b, device="cuda", quantization=quantization)
    exact = exact_model(loaded.model)
    runner = CudaRunner(loaded, num_kv_tokens=2048)
    text = Path(__file__).read_text(encoding="utf-8")
    ids = loaded.tokenizer.encode(text)[:1500]
    with torch.inference_mode():
        expected = exact(torch.tensor([ids], device="cuda")).logits[0]
    kv = runner.new_kv()
    runner.prefill(kv, ids[:300], want_logits=False)
    agreed: list[bool] = []
    for start in range(300, 1500, 16):
        logits = runner.decode([(kv, ids[start : start + 16])])
        agreed += logits.argmax(-1).eq(expected[start : start + 16].argmax(-1)).tolist()
    assert sum(agreed) / len(agreed) > (0.97 if quantization == "bf16" else 0.99)
