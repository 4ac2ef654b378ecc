"""Every token of both recorded workloads, with drafts, against one plain forward pass of transformers (invariant 7).

The recorded edits are replayed through submit and stream on the real 0.5B. What the engine would have chosen at each
place, after drafts, chunks, prefixes and penalty, is held to what the plain modules say of the same text in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from engine.inference.engine import InProcessEngine
from engine.inference.loading import load_model
from engine.inference.protocol import GenerationRequest, SamplingParams, complete
from lsp_server.bench_workload import Recording, WorkloadName, read_workload

PENALTY = 1.03
MAX_TIE = 0.25


def plain_choices(model: Any, edit: Recording) -> list[tuple[int, float]]:
    """At each place of the answer the plain model's choice, the penalty applied, and its lead in logits."""
    text = torch.tensor([[*edit.prompt, *edit.answer]])
    places = torch.arange(len(edit.prompt) - 1, text.shape[1] - 1)
    with torch.inference_mode():
        logits = model(input_ids=text, use_cache=False, logits_to_keep=places).logits[0].float()
        found: list[tuple[int, float]] = []
        penalise = RepetitionPenaltyLogitsProcessor(PENALTY)
        for place, row in zip(places.tolist(), logits, strict=True):
            scores = penalise(text[:, : place + 1], row[None].clone())[0]  # pyright: ignore[reportArgumentType]
            top = scores.topk(2)
            found.append((int(top.indices[0]), float(top.values[0] - top.values[1])))
    return found


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["answers", "references"])
def test_every_token_of_a_workload_is_the_plain_model_s(
    model_folder_05b: Path,
    name: WorkloadName,
    quantization: str,
    record_figure: Callable[[str, float | int | str, str], None],
) -> None:
    loaded = load_model("0.5b", "digest", model_folder_05b, device="cpu", quantization=quantization)
    plain = load_model("0.5b", "digest", model_folder_05b, device="cpu", quantization=quantization).model
    edits, ties = read_workload().of(name), list[tuple[str, int, float]]()
    num_tokens = num_steps = num_drafted = num_accepted = 0
    with InProcessEngine("0.5b", model_folder_05b, lambda: loaded) as engine:
        engine.wait_until_ready()
        for edit in edits:
            params = SamplingParams(
                len(edit.answer), repetition_penalty=PENALTY, top_logprobs=2, replay_token_ids=edit.answer
            )
            completion = complete(engine, GenerationRequest(edit.prompt, params))
            assert completion.token_ids == edit.answer
            num_tokens += len(edit.answer)
            num_steps += completion.num_steps
            num_drafted += completion.num_draft_tokens
            num_accepted += completion.num_accepted_tokens
            chosen = [top[0].token_id for top in completion.top_logprobs]
            for place, (mine, (wanted, lead)) in enumerate(zip(chosen, plain_choices(plain, edit), strict=True)):
                if mine != wanted:
                    ties.append((edit.id, place, round(lead, 4)))
    what = f"{name}, {quantization}"
    record_figure(f"{what}: tokens unlike the plain model's", len(ties), f"of {num_tokens} in {len(edits)} edits")
    record_figure(f"{what}: their leads there", ", ".join(f"{lead:.3f}" for *_, lead in ties), "logits")
    record_figure(f"{what}: tokens a step", round(num_tokens / num_steps, 2), "")
    record_figure(f"{what}: drafts that were right", round(num_accepted / num_drafted, 3), "")
    print(ties)
    assert num_accepted > num_tokens / 3, "drafts had their part in it"
    if quantization == "fp32":
        assert not ties
    assert all(lead <= MAX_TIE for *_, lead in ties), ties
    assert len(ties) <= 0.005 * num_tokens, ties
