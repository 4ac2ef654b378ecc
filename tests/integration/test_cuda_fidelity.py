"""How near the CUDA path is to what a real model's weights say, teacher-forced over both recorded workloads.

Two questions at every place of every answer. Does our path choose what an fp32 forward pass over the same dequantized
weights chooses? And is it as near to the model that nobody quantized as bitsandbytes' own modules are? Skipped where
torch sees no GPU; PLANPATCH_TEST_MODEL names another model than the 0.5B.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.inference.loading import load_model
from lsp_server.bench_workload import Recording, WorkloadName, read_workload
from tests.integration.test_cuda_path import exact_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
    pytest.mark.long,
]
pytest.importorskip("triton")

LEAST_AGREEMENT = 0.995
STEP_TOKENS = 16


def modules_logits(model: Any, edit: Recording) -> torch.Tensor:
    """What transformers' modules say at each place of the answer, fp32 `[num_tokens, vocab_size]`."""
    text = torch.tensor([[*edit.prompt, *edit.answer]], device="cuda")
    places = torch.arange(len(edit.prompt) - 1, text.shape[1] - 1, device="cuda")
    return model(input_ids=text, use_cache=False, logits_to_keep=places).logits[0].float()


def our_logits(runner: Any, edit: Recording) -> torch.Tensor:
    """The same of our path: the prompt in a wide step, the answer in steps of 16 tokens."""
    text = [*edit.prompt, *edit.answer]
    first, end = len(edit.prompt) - 1, len(text) - 1
    kv = runner.new_kv()
    runner.prefill(kv, text[:first], want_logits=False)
    steps = [
        runner.decode([(kv, text[at : min(end, at + STEP_TOKENS)])]).float().clone()
        for at in range(first, end, STEP_TOKENS)
    ]
    kv.release()
    return torch.cat(steps)


def divergence(whole: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler divergence from the whole model's distributions, summed over the places."""
    left, right = whole.log_softmax(-1), other.log_softmax(-1)
    return float((left.exp() * (left - right)).sum())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_real_model_keeps_its_choices_and_is_no_further_from_the_whole_one_than_bitsandbytes(
    quantization: str, model_folder_05b: Path, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    from engine.inference.cuda.runner import CudaRunner

    def load(kind: str) -> Any:
        return load_model("model", "", model_folder_05b, device="cuda", quantization=kind)

    whole, theirs, loaded = load("fp32").model, load(quantization).model, load(quantization)
    exact = exact_model(loaded.model)
    runner = CudaRunner(loaded, num_kv_tokens=4096)
    names: tuple[WorkloadName, ...] = ("answers", "references")
    edits = [edit for name in names for edit in read_workload().of(name)]
    num_tokens = num_agreed = num_theirs_agreed = 0
    our_divergence = their_divergence = exact_divergence = 0.0
    with torch.inference_mode():
        for edit in edits:
            meant, ours = modules_logits(exact, edit), our_logits(runner, edit)
            their, reference = modules_logits(theirs, edit), modules_logits(whole, edit)
            num_tokens += len(edit.answer)
            num_agreed += int(ours.argmax(-1).eq(meant.argmax(-1)).sum())
            num_theirs_agreed += int(their.argmax(-1).eq(meant.argmax(-1)).sum())
            our_divergence += divergence(reference, ours)
            their_divergence += divergence(reference, their)
            exact_divergence += divergence(reference, meant)
    of = f"of {num_tokens} tokens, {quantization}, {loaded.folder.name}"
    record_figure("our choices that are the exact ones", round(num_agreed / num_tokens, 5), of)
    record_figure("bitsandbytes' choices that are", round(num_theirs_agreed / num_tokens, 5), of)
    record_figure("KL of ours to the whole model", round(our_divergence / num_tokens, 6), "nats a token")
    record_figure("KL of bitsandbytes' modules", round(their_divergence / num_tokens, 6), "nats a token")
    record_figure("KL of the exact forward pass", round(exact_divergence / num_tokens, 6), "nats a token")
    del runner, exact, theirs, whole, loaded
    gc.collect()
    torch.cuda.empty_cache()
    assert num_agreed >= LEAST_AGREEMENT * num_tokens
    assert our_divergence <= their_divergence * 1.001, "a thousandth is what two orders of summing differ by"
