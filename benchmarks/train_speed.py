"""Speed and memory of training: our trainer against a plain loop, an 8B on a 12 GB card, two GPUs against one.

    python benchmarks/train_speed.py speed            1.5B shapes, rows of 1,024 tokens, one GPU
    python benchmarks/train_speed.py memory           8B shapes in NF4, torch capped as on a 12 GB card
    python benchmarks/train_speed.py gpus --gpus 2    1.5B from disk through `accelerate launch`, on one GPU and on two
    python benchmarks/train_speed.py check            that all of this runs, with tiny shapes on the CPU

Random weights, real shapes. Prints a line of JSON for each case, with --out also into a file. `gpus` starts processes
with `python -I`: PlanPatch and its packages must be installed, not only on PYTHONPATH.

The plain loop is what one would write by hand: the base in bf16, peft's LoRA in bf16, transformers' own loss, AdamW,
the same rows, rank, layers and gradient checkpointing. Every row is full, so tokens are those that were worked on.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.loading import set_runtime_defaults

set_runtime_defaults()

import torch

from engine.inference.random_model import qwen3_8b, qwen25_coder_1_5b, random_model
from training import qlora
from training.qlora_config import QloraConfig
from training.qlora_data import Example, Row, collate
from training.qlora_memory import needed_bytes, shapes_of

WARM_UP_STEPS, STEPS = 3, 10
EXAMPLES_PER_ROW, ANSWER_SHARE = 4, 0.4
CARD_GIB, NOT_TORCHS_GIB = 12.0, 0.75  # of a 12 GB card, what CUDA itself and a desktop take


def main() -> None:
    """Run one part, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "memory", "gpus", "check"])
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, all at once")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = Report(given.out)
    parts = {"speed": speed, "memory": memory, "gpus": gpus, "check": check}
    parts[given.part](report, given)


class Report:
    """Prints figures as they come, and keeps them.

    Args:
        path: The file; None: no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        on_gpu = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if on_gpu else "CPU"

    def add(self, **facts: Any) -> None:
        """A line."""
        line = json.dumps({"device": self.device, "torch": torch.__version__, **facts})
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(report: Report, given: argparse.Namespace) -> None:
    """Tokens per second and peak memory: plain loop, our LoRA in bf16, our QLoRA."""
    config = QloraConfig("speed", "1.5b", row_tokens=1024, rows_per_step=given.rows, rows_at_once=given.rows)
    shapes = qwen25_coder_1_5b()
    compare(report, config, shapes, [("plain loop", "bf16"), ("ours", "bf16"), ("ours", "nf4")], "cuda")


def compare(report: Report, config: QloraConfig, shapes: Any, cases: list[tuple[str, str]], device: str) -> None:
    """Each case on a base of its own; the first one is what the others are compared with."""
    num_rows = config.rows_per_step * (WARM_UP_STEPS + STEPS)
    rows = make_rows(num_rows, config.row_tokens, shapes.vocab_size)
    first = 0.0
    for name, quantization in cases:
        base = make_base(shapes, quantization, device)
        _reset_peak()
        run = plain_loop if name == "plain loop" else our_steps
        step_s = run(base, rows, config)
        tok_per_s = config.rows_per_step * config.row_tokens / step_s
        first = first or tok_per_s
        report.add(
            part="speed",
            case=f"{name}, {quantization}",
            row_tokens=config.row_tokens,
            rows=config.rows_per_step,
            gradient_checkpointing=config.gradient_checkpointing,
            tok_per_s=round(tok_per_s),
            of_plain=round(tok_per_s / first, 3),
            step_s=round(step_s, 4),
            **_peak(),
            estimated_gb=round(_estimate(shapes, config, device, quantization) / 1e9, 2),
        )
        del base
        _free()


def our_steps(base: Any, rows: list[Row], config: QloraConfig) -> float:
    """Seconds of a step of our trainer."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _wait()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        quiet = replace(config, checkpoint_every_steps=1_000_000)
        with qlora.quiet_libraries():
            trainer = qlora.make_trainer(base, rows, quiet, Path(folder))
            trainer.add_callback(Clock())
            with qlora.casts_left_to_autocast(trainer):
                trainer.train()
    _undo(base, trainer)
    measured = ends[min(WARM_UP_STEPS, len(ends) - 1) - 1 :]
    return (measured[-1] - measured[0]) / (len(measured) - 1)


def plain_loop(base: Any, rows: list[Row], config: QloraConfig) -> float:
    """Seconds of a step of a loop written by hand."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    ends: list[float] = []
    for start in range(0, len(rows), config.rows_per_step):
        batch = collate(rows[start : start + config.rows_per_step])
        ids, labels = batch["input_ids"].to(base.device), batch["labels"].to(base.device)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        ends.append(time.perf_counter())
    measured = ends[WARM_UP_STEPS - 1 :]
    return (measured[-1] - measured[0]) / (len(measured) - 1)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(report: Report, given: argparse.Namespace) -> None:
    """Which rows of an 8B fit, and what the estimate said."""
    total = torch.cuda.mem_get_info()[1]
    cap = (CARD_GIB - NOT_TORCHS_GIB) * 2**30
    torch.cuda.set_per_process_memory_fraction(cap / total)
    shapes = qwen3_8b()
    base = make_base(shapes, "nf4", "cuda")
    for row_tokens, at_once in ((1024, 1), (1024, 2), (1024, 4), (1024, 6), (2048, 1), (4096, 1), (8192, 1)):
        config = QloraConfig("memory", "8b", row_tokens=row_tokens, rows_per_step=at_once, rows_at_once=at_once)
        rows = make_rows(3 * at_once, row_tokens, shapes.vocab_size)
        _reset_peak()
        try:
            step_s: float | None = our_steps(base, rows, config)
        except torch.OutOfMemoryError:
            step_s = None
            _undo(base, None)
        _free()
        report.add(
            part="memory",
            row_tokens=row_tokens,
            rows_at_once=at_once,
            fits=step_s is not None,
            cap_gb=round(cap / 1e9, 2),
            **_peak(),
            estimated_gb=round(_estimate(shapes, config, "cuda:0", "nf4") / 1e9, 2),
            tok_per_s=None if step_s is None else round(row_tokens * at_once / step_s),
        )


# --- several GPUs ----------------------------------------------------------------------------------------------------


def gpus(report: Report, given: argparse.Namespace) -> None:
    """The whole command from a model on disk, with as many rows a step on one GPU as on several."""
    from tests.tiny_model import CHATML, tiny_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_base(qwen25_coder_1_5b(), "bf16", "cuda")
        base.save_pretrained(folder / "base")
        del base
        _free()
        (folder / "base" / "tokenizer.json").write_text(tiny_tokenizer().to_str())
        facts = {"eos_token": "<|im_end|>", "chat_template": CHATML}
        (folder / "base" / "tokenizer_config.json").write_text(json.dumps(facts))
        rows_per_step = given.rows * given.gpus
        text = "".join(random.Random(0).choices("abcdefgh ", k=440))
        line = json.dumps({"input": text, "output": text[:500]})
        num_rows = rows_per_step * (WARM_UP_STEPS + 2 * STEPS)
        (folder / "train.jsonl").write_text(f"{line}\n" * num_rows)
        config = QloraConfig("gpus", "1.5b", row_tokens=1024, rows_per_step=rows_per_step, rows_at_once=given.rows)
        first = 0.0
        for num_gpus in (1, given.gpus):
            request = qlora.Request(
                config, folder / "base", "random", "", folder / "train.jsonl", None, folder / "out", num_gpus=num_gpus
            )
            adapter = qlora.train(request, lambda _: None)
            manifest = json.loads((adapter / "manifest.json").read_text())
            first = first or manifest["tok_per_s"]
            report.add(
                part="gpus",
                num_gpus=num_gpus,
                tok_per_s=round(manifest["tok_per_s"]),
                of_one=round(manifest["tok_per_s"] / first, 3),
                steps=manifest["steps"],
                trained_s=manifest["trained_s"],
                loss_last=manifest["loss_last"],
                peak_gb=round(manifest["peak_memory_bytes"] / 1e9, 2),
            )


def check(report: Report, given: argparse.Namespace) -> None:
    """The same code with tiny shapes."""
    shapes = qwen25_coder_1_5b()
    for name, value in {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}.items():
        setattr(shapes, name, value)
    shapes.layer_types = shapes.layer_types[:2]
    config = QloraConfig("check", "tiny", precision="fp32", row_tokens=64, rows_per_step=2, rows_at_once=2)
    compare(report, config, shapes, [("plain loop", "fp32"), ("ours", "fp32")], "cpu")


# --- parts -----------------------------------------------------------------------------------------------------------


def make_base(shapes: Any, quantization: str, device: str) -> Any:
    """A base with random weights."""
    if device == "cpu":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(shapes).requires_grad_(False)
    made: Any = random_model(shapes, quantization, torch.bfloat16, requantized_scales=True)  # type: ignore[arg-type]
    made.model.is_loaded_in_4bit = quantization == "nf4"  # what peft and TRL ask
    return made.model


def make_rows(num_rows: int, row_tokens: int, vocab_size: int) -> list[Row]:
    """Full rows of several examples each."""
    chooser = random.Random(0)
    length = row_tokens // EXAMPLES_PER_ROW
    num_prompt = int(length * (1 - ANSWER_SHARE))
    return [
        tuple(
            Example(tuple(chooser.choices(range(3, vocab_size), k=length)), num_prompt) for _ in range(EXAMPLES_PER_ROW)
        )
        for _ in range(num_rows)
    ]


def _undo(base: Any, trainer: Any) -> None:
    """The base as it was before an adapter was put into it."""
    if trainer is not None:
        trainer.model.unload()
    else:
        from peft.tuners.lora import LoraLayer

        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, last = name.rpartition(".")
                setattr(base.get_submodule(parent), last, module.get_base_layer())  # type: ignore[union-attr]
    base.__dict__.pop("forward", None)  # TRL's head


def _estimate(shapes: Any, config: QloraConfig, device: str, quantization: str) -> int:
    held = "nf4" if quantization == "nf4" else "none"
    return needed_bytes(shapes_of(shapes, config.target_modules), config, device, held)["total"]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
