"""Trains the adapters that ship with PlanPatch: a plain LoRA loop in bf16 on one GPU (or slowly, on a CPU).

    python benchmarks/own_answers.py MODEL_FOLDER TRAIN.jsonl HELD.jsonl
    python benchmarks/first_adapter.py MODEL_FOLDER TRAIN.jsonl VAL.jsonl --out FOLDER --held HELD.jsonl [--seconds 240]

Rows are `training/reversed_edits`'. Questions are tokenized by the code that asks a model, so a row's tokens are those
of a request. The loss counts the answer and its end token alone. Rows of like length make a batch and are padded on the
right, where a causal model cannot see them: no mask, no packing. The adapter is trained in bf16 with fp32 copies of its
weights in AdamW, and written in fp16. The learning rate is probed: a short run with each, the lowest loss on held-out
packages wins. The run ends within its time: the rate follows a cosine over time, or over the rows if they end first.

Rows of the stage `general` are no examples. With `--held`, the base model's own answers (own_answers.py) take their
place, and on these the adapter is held to the base (KL divergence over their tokens, base first), so that it learns to
mend and forgets little else. `--hold 0` learns general rows as the other rows.

A small model's own plans are often wrong, and an adapter that saw right ones alone follows them. So most rows with
a plan, and `--own-plans` of the rows without one, wait until 0.4 of the run is over; then the model plans for them
itself, and learns the right answer beside that.

Not covered: resuming, several GPUs, quantized bases; `planpatch train qlora` has those.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERAL = "general"
_WINDOW = 2048  # rows that are sorted by length together
_LOSS_CHUNK = 2048  # positions whose logits are in memory at once
_PLAN, _AFTER_PLAN = "## Plan:\n", "## Code After:\n"
_PLAN_QUESTION = "Say in one short sentence which lines must change, and how. No code block.\n"
_WITH_PLAN, _WITHOUT_PLAN = "patch with plan", "patch"
_OWN_PLANS_AT = 0.4  # of the run
_PLAN_TOKENS = 16  # of a plan, as in the product
_PLANS_AT_ONCE = 192
_TOLD_SHARE = 0.4  # of the rows with a plan that keep the right one, as a user's own would be


def main() -> None:
    """Probe learning rates, train with the best, write the adapter and what was measured."""
    args = _arguments()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = HFChatTokenizer(args.model)
    texts = _rows(args.train)[: args.limit or None]
    rng = random.Random(args.seed)
    planned = [row for row in texts if row["stage"] == _WITH_PLAN and rng.random() >= _TOLD_SHARE]
    plain = [row for row in texts if row["stage"] == _WITHOUT_PLAN]
    planned += rng.sample(plain, min(args.own_plans, len(plain)))
    later = {id(row) for row in planned}
    train = _encoded([row for row in texts if id(row) not in later], tokenizer, args.max_tokens)
    val = _encoded(_rows(args.val)[: max(8, args.limit // 8) if args.limit else None], tokenizer, args.max_tokens)
    print(f"{len(train)} rows, {sum(len(row[0]) for row in train):,} tokens; {len(val)} held out", flush=True)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    base.requires_grad_(False)
    base.config.use_cache = False
    record: dict[str, Any] = {
        "rank": args.rank,
        "alpha": args.alpha,
        "seed": args.seed,
        "targets": TARGETS,
        "hold": args.hold,
        "own_plans": args.own_plans,
        "probes": [],
    }
    record["val_loss_base"] = _val_loss(base, val, args.batch_tokens)
    print(f"held out, base: {record['val_loss_base']:.4f}", flush=True)
    if args.held is not None:
        held = _encoded(_rows(args.held), tokenizer, args.max_tokens)
        train = [row for row in train if row[2] != GENERAL] + held[: args.limit or None]
    rates = args.rates
    if len(rates) > 1:
        for rate in rates:
            model = _with_lora(base, args)
            _train(model, train, args, rate, most_seconds=args.probe_seconds)
            loss = _val_loss(model, val, args.batch_tokens)
            record["probes"].append({"rate": rate, "val_loss": loss})
            print(f"probe: rate {rate:g}, held out {loss:.4f}", flush=True)
            base = model.unload()
        rates = [min(record["probes"], key=lambda probe: probe["val_loss"])["rate"]]
    model = _with_lora(base, args)

    def own_plans() -> list[Row]:
        return _encoded(_with_own_plans(model, tokenizer, planned, args), tokenizer, args.max_tokens)

    record |= {"rate": rates[0], **_train(model, train, args, rates[0], most_seconds=args.seconds, later=own_plans)}
    record["val_loss"] = _val_loss(model, val, args.batch_tokens)
    record["val_loss_by_stage"] = {
        stage: _val_loss(model, [row for row in val if row[2] == stage], args.batch_tokens)
        for stage in sorted({row[2] for row in val})
    }
    if device == "cuda":
        record["device"] = torch.cuda.get_device_name()
        record["most_memory_bytes"] = torch.cuda.max_memory_allocated()
    _save(model, args.out, args.base_name)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key != "losses"}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-name", default="", help="What the adapter's configuration calls its base.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4])
    parser.add_argument("--batch-tokens", type=int, default=8192, help="Padded tokens of one forward pass.")
    parser.add_argument("--passes-a-step", type=int, default=2)
    parser.add_argument("--held", type=Path, help="The base's own answers, of own_answers.py, for the general rows.")
    parser.add_argument("--hold", type=float, default=1.0, help="Weight of the divergence on general rows.")
    parser.add_argument("--hold-every", type=int, default=1, help="Steps between two batches of general rows.")
    parser.add_argument("--hold-tokens", type=int, default=4096, help="Padded tokens of such a batch.")
    parser.add_argument("--own-plans", type=int, default=0, help="Rows without a plan that get one of the model's own.")
    parser.add_argument("--max-tokens", type=int, default=1536)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--probe-seconds", type=float, default=20.0)
    parser.add_argument("--limit", type=int, default=0, help="Only so many rows, to try the script.")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


# --- data ------------------------------------------------------------------------------------------------------------

Row = tuple[list[int], int, str]  # token ids, how many of them are the question, the stage


def _rows(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _encoded(rows: Sequence[dict[str, Any]], tokenizer: HFChatTokenizer, most: int) -> list[Row]:
    """Question with the given beginning of the answer, the rest of the answer, the end of a turn."""
    end = [token for token in [tokenizer.token_id("<|im_end|>")] if token is not None]
    encoded: list[Row] = []
    for row in rows:
        asked = tokenizer.encode_chat([Message("user", row["input"])], prefill=row["prefill"])
        answer = tokenizer.encode(row["output"].removeprefix(row["prefill"]))
        if len(asked) + len(answer) + 1 <= most:
            ends = [] if row.get("is_cut") else end
            encoded.append(([*asked, *answer, *ends], len(asked), row.get("stage", "")))
    return encoded


@torch.no_grad()
def _with_own_plans(
    model: PeftModel, tokenizer: HFChatTokenizer, rows: Sequence[dict[str, Any]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows with the plan that the model makes for them now, in place of the right one."""
    end = tokenizer.token_id("<|im_end|>") or 0
    parts = [
        (row, row["input"][: row["input"].rindex(_PLAN if row["stage"] == _WITH_PLAN else _AFTER_PLAN)]) for row in rows
    ]
    asked = [
        (row, head, tokenizer.encode_chat([Message("user", head + _PLAN + _PLAN_QUESTION)])) for row, head in parts
    ]
    asked = sorted((one for one in asked if len(one[2]) <= args.max_tokens), key=lambda one: len(one[2]))
    started_at, made = time.monotonic(), list[dict[str, Any]]()
    model.eval()
    for start in range(0, len(asked), _PLANS_AT_ONCE):
        group = asked[start : start + _PLANS_AT_ONCE]
        longest = len(group[-1][2])
        device = next(model.parameters()).device
        ids = torch.tensor([[end] * (longest - len(one)) + one for _, _, one in group], device=device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for _, _, one in group], device=device)
        options = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        answers = model.generate(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            max_new_tokens=_PLAN_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
            **options,
        )
        for (row, head, _), answer in zip(group, answers[:, longest:].tolist(), strict=True):
            text = tokenizer.decode(answer[: answer.index(end)] if end in answer else answer)
            plan = text.strip().split("\n")[0]
            made.append({**row, "input": head + (f"{_PLAN}{plan}\n" if plan else "") + _AFTER_PLAN})
    model.train()
    print(f"{len(made)} plans of its own, {time.monotonic() - started_at:.0f} s, such as:", flush=True)
    for row in made[:: max(1, len(made) // 8)]:
        print("  " + row["input"].rsplit(_PLAN, 1)[-1].split("\n")[0], flush=True)
    return made


def _batches(rows: Sequence[Row], batch_tokens: int, rng: random.Random | None) -> list[list[Row]]:
    """Rows of like length together; without a generator in a fixed order."""
    order = list(rows)
    if rng is not None:
        rng.shuffle(order)
    batches: list[list[Row]] = []
    for start in range(0, len(order), _WINDOW):
        window = sorted(order[start : start + _WINDOW], key=lambda row: len(row[0]))
        batch: list[Row] = []
        for row in window:
            if batch and (len(batch) + 1) * len(row[0]) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _tensors(batch: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both `[rows, longest]`; labels are -100 on questions and padding."""
    longest = max(len(row[0]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100, dtype=torch.long)
    for number, (tokens, num_asked, _) in enumerate(batch):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        labels[number, num_asked : len(tokens)] = torch.tensor(tokens[num_asked:])
    return ids.to(device), labels.to(device)


# --- training --------------------------------------------------------------------------------------------------------


def _with_lora(base: Any, args: argparse.Namespace) -> PeftModel:
    config = LoraConfig(
        r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    torch.manual_seed(args.seed)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def _train(
    model: PeftModel,
    rows: Sequence[Row],
    args: argparse.Namespace,
    rate: float,
    *,
    most_seconds: float,
    later: Callable[[], list[Row]] | None = None,
) -> dict[str, Any]:
    """One pass over the rows at most; warm-up, then a cosine to a tenth of the rate at the end of time or rows."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copies = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(copies, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    held = [row for row in rows if args.hold and row[2] == GENERAL]
    held_batches = itertools.cycle(_batches(held, args.hold_tokens, random.Random(args.seed)) or [[]])
    taught = [row for row in rows if not (args.hold and row[2] == GENERAL)]
    rng = random.Random(args.seed)
    batches = _batches(taught, args.batch_tokens, rng)
    num_steps = len(batches) // args.passes_a_step
    device = parameters[0].device
    model.train()
    losses: list[float] = []
    divergences: list[float] = []
    num_tokens, started_at = 0, time.monotonic()
    for step in itertools.count():
        share = max(step / num_steps, (time.monotonic() - started_at) / most_seconds)  # of the run that is over
        if later is not None and share >= _OWN_PLANS_AT:
            done = step * args.passes_a_step
            coming = [*batches[done:], *_batches(later(), args.batch_tokens, rng)]
            rng.shuffle(coming)
            batches[done:], later = coming, None
            num_steps = len(batches) // args.passes_a_step
        if share >= 1 or step >= num_steps:
            break
        group = batches[step * args.passes_a_step : (step + 1) * args.passes_a_step]
        num_labels = sum(len(tokens) - num_asked for batch in group for tokens, num_asked, _ in batch)
        loss_sum = 0.0
        for batch in group:
            ids, labels = _tensors(batch, device)
            loss = _loss(model, ids, labels) / num_labels
            loss.backward()
            loss_sum += float(loss.detach())
            num_tokens += sum(len(tokens) for tokens, _, _ in batch)
        if held and step % args.hold_every == 0:
            batch = next(held_batches)
            ids, labels = _tensors(batch, device)
            divergence = _divergence(model, ids, labels) / sum(len(tokens) - asked for tokens, asked, _ in batch)
            (args.hold * divergence).backward()
            divergences.append(round(float(divergence.detach()), 5))
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        warm = min(1.0, (step + 1) / 20)
        for group_of in optimizer.param_groups:
            group_of["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(copies, parameters, strict=True):
                parameter.copy_(copy)
        losses.append(loss_sum)
        if not math.isfinite(loss_sum):
            raise SystemExit(f"the loss is {loss_sum} at step {step}")
        if step % 20 == 0:
            taken = time.monotonic() - started_at
            print(f"step {step}: loss {loss_sum:.4f}, {num_tokens / taken:,.0f} tokens/s", flush=True)
    with torch.no_grad():  # what is written is the fp32 copy
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.data = copy.to(parameter.dtype)
    taken = time.monotonic() - started_at
    return {
        "steps": len(losses),
        "tokens": num_tokens,
        "seconds": taken,
        "tokens_per_s": num_tokens / taken,
        "losses": [round(loss, 4) for loss in losses],
        "divergences": divergences,
    }


def _answer_states(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The head, the states `[answer tokens, hidden]` that precede answer tokens, and those tokens."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    is_answer = labels[:, 1:] != -100
    return inner.lm_head, hidden[is_answer], labels[:, 1:][is_answer]


def _divergence(model: PeftModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over answer tokens of KL(base, adapted), in nats."""
    with torch.no_grad(), model.disable_adapter():
        _, meant, _ = _answer_states(model, ids, labels)
    head, states, _ = _answer_states(model, ids, labels)
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(states), _LOSS_CHUNK):
        piece = states[start : start + _LOSS_CHUNK], meant[start : start + _LOSS_CHUNK]
        total = total + torch.utils.checkpoint.checkpoint(_chunk_divergence, head, *piece, use_reentrant=False)
    return total


def _chunk_divergence(head: torch.nn.Module, states: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
    found, base = (torch.nn.functional.log_softmax(head(one).float(), dim=-1) for one in (states, meant))
    return torch.nn.functional.kl_div(found, base, reduction="sum", log_target=True)


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the answer tokens' cross entropy; logits are made for them alone, some thousands at a time."""
    head, states, targets = _answer_states(model, ids, labels)
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), _LOSS_CHUNK):
        piece = states[start : start + _LOSS_CHUNK], targets[start : start + _LOSS_CHUNK]
        total = total + torch.utils.checkpoint.checkpoint(_chunk_loss, head, *piece, use_reentrant=False)
    return total


def _chunk_loss(head: torch.nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")


@torch.no_grad()
def _val_loss(model: Any, rows: Sequence[Row], batch_tokens: int) -> float:
    model.eval()
    device = next(model.parameters()).device
    total, num_labels = 0.0, 0
    for batch in _batches(rows, batch_tokens, None):
        if batch:
            total += float(_loss(model, *_tensors(batch, device)))
            num_labels += sum(len(tokens) - num_asked for tokens, num_asked, _ in batch)
    return total / max(1, num_labels)


def _save(model: PeftModel, folder: Path, base_name: str) -> None:
    """A folder that `planpatch adapters use` takes: safetensors in fp16 and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
