"""QLoRA: from the data set to an adapter of a model, by TRL and peft on a base in NF4 (Dettmers et al. 2023).

    examples ─▶ rows ─▶ fits in memory? ─▶ base, adapter ─▶ steps, checkpoints ─▶ losses on what was held out ─▶ NAME-vN

The base stays as it is: NF4 on a GPU, bf16 on a CPU. The adapter is trained in fp32 under autocast and kept in the
run's precision, which is what every forward pass used. The same request gives the same losses, also over a kill and a
resume.

Run without the rest of PlanPatch, on a machine with torch, transformers, peft, trl and datasets:

    python -m training.qlora CONFIG --model FOLDER --data TRAIN.jsonl [--val VAL.jsonl] --out FOLDER

Not covered: several machines, and models that do not fit one GPU.
"""

# the libraries that train are hardly typed
# pyright: basic

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import (
    CancelledError,
    EngineError,
    EnvironmentFault,
    ModelError,
    PlanPatchError,
    UsageError,
    error_of_json,
)
from engine.inference.loading import choose_device, free_memory_bytes, read_weights, set_runtime_defaults
from engine.inference.tokenizer import HFChatTokenizer
from training.qlora_config import QloraConfig, config_of, find_config, read_config
from training.qlora_data import IGNORED, Examples, Row, batches, check_rows_are_apart, collate, pack, read_examples
from training.qlora_memory import check_memory, read_shapes
from training.qlora_run import (
    LOSSES,
    PLOT,
    PROGRESS,
    Progress,
    ProgressFile,
    Run,
    mark_complete,
    open_run,
    publish,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl.trainer.sft_trainer import SFTTrainer

Tell = Callable[[Progress], None]

_PACKAGES = {"trl": "trl>=1.14,<2", "datasets": "datasets>=4.7", "peft": "peft>=0.18", "accelerate": "accelerate>=1.10"}
_OUR_ID = re.compile(r"p_\w+|base:\d+")  # ids of another's data set may be anything, also a secret
_VERSIONS_OF = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
_JOB, _FACTS, _LOG, _STOP = "job.json", "facts.json", "processes.log", "stop"
_POLL_S = 0.5
_HEAD_TOKENS = 512
_WARM_UP_STEPS = 2  # the first steps choose kernels and grow memory


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be trained.

    Args:
        config: Hyperparameters.
        model: Folder of the base.
        model_name: What the base is called, for the manifest.
        model_digest: sha256 that names its weights.
        data: Examples to train on.
        val: Examples that are held out; None: there are none.
        out: Folder of versions.
        device: `auto`, `cpu` or `cuda`, the first GPU that the process sees.
        num_gpus: How many of them; on a CPU, how many processes.
        resume: Go on with the run that was cut off.
        discard: Delete that run.
        force: Train on fewer examples than the configuration asks for.
    """

    config: QloraConfig
    model: Path
    model_name: str
    model_digest: str
    data: Path
    val: Path | None
    out: Path
    device: str = "auto"
    num_gpus: int = 1
    resume: bool = False
    discard: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request in which nothing is open any more, and what became of its data.

    Args:
        request: The request; its device is `cpu` or `cuda:N`.
        quantization: `nf4` or `none`.
        train: Examples to train on.
        val: Examples that are held out.
        rows: Rows of `train`.
        val_rows: Rows of `val`.
        needed_bytes: Memory that the run takes, estimated.
    """

    request: Request
    quantization: str
    train: Examples
    val: Examples
    rows: list[Row]
    val_rows: list[Row]
    needed_bytes: int


def train(request: Request, tell: Tell) -> Path:
    """Train an adapter.

    Args:
        request: What is to be trained.
        tell: Told how far it is, at every step.

    Returns:
        The adapter's folder.

    Raises:
        UsageError: Data or configuration cannot be used, examples are too few, or a run was cut off before.
        ModelError: The base is damaged or does not fit into memory.
        EnvironmentFault: A package is missing, or another process trains this adapter.
        EngineError: The loss is no number any more, or the device failed.
        CancelledError: It was stopped; it can be resumed.
        WriteError: Something cannot be written.
    """
    check_packages(request)
    job = plan_job(request)
    run = open_run(request.out, request.config.name, _identity(job), resume=request.resume, discard=request.discard)
    try:
        if request.num_gpus > 1:
            facts = _train_in_processes(job, run, tell)
        else:
            facts = train_here(job, run, tell)
        return publish(run, _manifest(job, run, facts))
    finally:
        run.close()


def plan_job(request: Request) -> Job:
    """Read the data, pack it into rows, and see that there is enough of it and that it fits into memory.

    Args:
        request: What is to be trained.

    Returns:
        The job.

    Raises:
        UsageError: Data or configuration cannot be used, or examples are too few.
        PathError: A file cannot be read.
        ModelError: The base is damaged or does not fit into memory.
    """
    device = _device_of(request)
    config = _for_device(request, device)
    quantization = "none" if device == "cpu" or config.quantization == "none" else "nf4"
    examples = check_data(request)
    tokenizer = HFChatTokenizer(request.model)
    held_out = read_examples(request.val, tokenizer, config.row_tokens) if request.val else Examples()
    shapes = read_shapes(request.model, config.target_modules)
    needed = check_memory(shapes, config, device, quantization, free_memory_bytes(device))
    return Job(
        request=replace(request, config=config, device=device),
        quantization=quantization,
        train=examples,
        val=held_out,
        rows=pack(examples.usable, config.row_tokens, packing=config.packing),
        val_rows=pack(held_out.usable, config.row_tokens, packing=config.packing),
        needed_bytes=needed,
    )


def check_data(request: Request) -> Examples:
    """Read the examples and see that there are enough of them; before servers are asked for their memory, too.

    Args:
        request: What is to be trained.

    Returns:
        The examples.

    Raises:
        UsageError: They cannot be used, or are too few.
        PathError: The file cannot be read.
    """
    examples = read_examples(request.data, HFChatTokenizer(request.model), request.config.row_tokens)
    if len(examples.usable) < (1 if request.force else request.config.min_examples):
        raise _too_few(examples, request.config)
    return examples


def _device_of(request: Request) -> str:
    name, _, number = request.device.partition(":")
    own = os.environ.get("LOCAL_RANK", "0")  # the GPU of one of several processes
    if name == "cuda" and number not in ("", own):  # transformers trains on the first GPU that it sees
        raise UsageError(
            f"Training takes the first GPU, not {request.device}",
            hint=f"Show it that one alone: CUDA_VISIBLE_DEVICES={number} planpatch train qlora … --device cuda",
        )
    device = choose_device(request.device)
    if request.num_gpus > 1 and device != "cpu":
        import torch

        if torch.cuda.device_count() < request.num_gpus:
            raise ModelError(f"{request.num_gpus} GPUs were asked for, and there are {torch.cuda.device_count()}")
    return device


def _for_device(request: Request, device: str) -> QloraConfig:
    """Rows at once such that whole forward passes make a step."""
    config = request.config
    per_gpu, rest = divmod(config.rows_per_step, request.num_gpus)
    if rest:
        raise UsageError(
            f"rows_per_step is {config.rows_per_step}, which {request.num_gpus} GPUs cannot share evenly",
            hint=f'Set "rows_per_step" to a multiple of {request.num_gpus}.',
        )
    at_once = min(config.rows_at_once, per_gpu)
    if per_gpu % at_once:
        raise UsageError(
            f"rows_per_step is {config.rows_per_step}, which is no multiple of {at_once} rows_at_once on "
            f"{request.num_gpus} GPU{'s' if request.num_gpus > 1 else ''}",
            hint='Set "rows_at_once" to 1, or to a divisor.',
        )
    return replace(config, rows_at_once=at_once)


def _too_few(examples: Examples, config: QloraConfig) -> UsageError:
    longer = (
        f"; {len(examples.too_long)} are longer than a row of {config.row_tokens} tokens" if examples.too_long else ""
    )
    return UsageError(
        f"{len(examples.usable)} examples are too few to train on: at least {config.min_examples} are needed{longer}",
        hint="Keep working with PlanPatch and run planpatch train dataset again, merge a data set of yours "
        "(planpatch train dataset --merge), or insist with --force."
        + (' Longer rows ("row_tokens") take those that were left out.' if examples.too_long else ""),
        num_examples=len(examples.usable),
        min_examples=config.min_examples,
        too_long=len(examples.too_long),
    )


def _identity(job: Job) -> dict[str, Any]:
    """What decides the losses of a run, by which a resumed run is known."""
    request = job.request
    return {
        "configuration": request.config.to_json(),
        "base": request.model_digest,
        "quantization": job.quantization,
        "data": job.train.sha256,
        "number of GPUs": request.num_gpus,
    }


# --- packages --------------------------------------------------------------------------------------------------------


def check_packages(request: Request) -> None:
    """See that what training needs is installed.

    Args:
        request: What is to be trained.

    Raises:
        EnvironmentFault: Something is missing; the hint is the command that installs it.
    """
    needed = dict(_PACKAGES)
    if request.config.quantization != "none" and choose_device(request.device) != "cpu":
        needed["bitsandbytes"] = "bitsandbytes>=0.49"
    missing = [wanted for name, wanted in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        quoted = " ".join(f'"{wanted}"' for wanted in missing)
        raise EnvironmentFault(
            f"Training needs packages that are not installed: {', '.join(missing)}",
            hint=f"{sys.executable} -m pip install {quoted}",
            missing=missing,
        )


# --- one process -----------------------------------------------------------------------------------------------------


def train_here(job: Job, run: Run, tell: Tell) -> dict[str, Any]:
    """Train in this process, alone or as one of several that share the rows.

    Args:
        job: The job.
        run: Where it is kept.
        tell: Told how far it is.

    Returns:
        What the manifest says of the run.

    Raises:
        ModelError: The base cannot be loaded.
        EngineError: The loss is no number any more, or the device failed.
        CancelledError: It was stopped.
    """
    import torch

    config = job.request.config
    reporter = _Reporter(job, run, tell)
    try:
        with _device_errors(job), quiet_libraries():
            reporter.say("preparing", f"loading {job.request.model_name}")
            base = load_base(job.request.model, job.request.device, job.quantization, config.precision)
            if config.packing:
                check_rows_are_apart(base, int(base.config.get_text_config().vocab_size))
            trainer = make_trainer(base, job.rows, config, run.checkpoints, job.request.num_gpus)
            reporter.watch(trainer)
            checkpoint = run.last_checkpoint()
            with casts_left_to_autocast(trainer):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            reporter.check_not_stopped()
            reporter.say("finishing", "measuring the losses on what was held out")
            held_out = held_out_losses(trainer, job.val_rows, config)
            facts = {**reporter.facts(), "held_out": held_out}
            if trainer.is_world_process_zero():
                shutil.rmtree(run.adapter, ignore_errors=True)  # what a kill left half written
                dtype = "bfloat16" if config.precision == "bf16" else "float32"  # as autocast rounds it in every pass
                save_adapter(trainer.model, run.adapter, dtype, job.request.model_name)
                write_losses(run.adapter, reporter.history, held_out)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except PlanPatchError as error:
        reporter.say("stopped" if isinstance(error, CancelledError) else "failed", error.message)
        raise
    finally:
        reporter.leave()
    reporter.say("done", "")
    return facts


def load_base(folder: Path, device: str, quantization: str, precision: str) -> PreTrainedModel:
    """The base on its device, frozen.

    Args:
        folder: Model folder.
        device: `cpu` or `cuda:N`.
        quantization: `nf4` or `none`.
        precision: `bf16` or `fp32`.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: It cannot be read.
    """
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    held = "nf4" if quantization == "nf4" else ("fp32" if precision == "fp32" else "bf16")
    try:
        return read_weights(folder, device, held, dtype, requantized_scales=True).eval()
    except (ValueError, OSError, ImportError) as fault:
        raise ModelError(f"{folder} cannot be loaded: {fault}", hint="planpatch models list says more.") from fault


def make_trainer(
    base: PreTrainedModel, rows: Sequence[Row], config: QloraConfig, checkpoints: Path, num_gpus: int = 1
) -> SFTTrainer:
    """TRL's trainer with our rows: it shuffles, steps, and keeps checkpoints; its head computes answer tokens alone.

    Args:
        base: The base; an adapter is put into it.
        rows: What to train on.
        config: Hyperparameters.
        checkpoints: Folder of checkpoints.
        num_gpus: Processes that share the rows of a step.

    Returns:
        The trainer, ready to train.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, set_seed
    from trl.trainer.sft_config import SFTConfig

    on_cpu = next(base.parameters()).device.type == "cpu"
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.rows_at_once,
        gradient_accumulation_steps=config.rows_per_step // (config.rows_at_once * num_gpus),
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=config.warmup_share,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=config.precision == "bf16",
        fp16=False,
        use_cpu=on_cpu,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_every_steps,
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        loss_type="chunked_nll",  # what TRL 1.14 calls its head for answer tokens; later versions have no other
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # of what it sees, this process uses one
        arguments._n_gpu = 1
    model = get_peft_model(base, lora)
    trainer = _trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
        data_collator=lambda items: collate([rows[item["row"]] for item in items]),
        processing_class=_no_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():  # TRL rounds them to bf16, in which small steps are lost
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _trainer_class() -> type[SFTTrainer]:
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    class RowTrainer(SFTTrainer):
        """With checkpoints that hold what a resume needs, and count only when they are whole."""

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None: the manifest says what an adapter is."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            save_adapter(self.model, Path(output_dir or str(self.args.output_dir)), "float32")

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # every process writes its own state of random numbers
            if self.args.should_save:
                mark_complete(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    return RowTrainer


def _no_tokenizer() -> Any:
    """TRL wants a tokenizer; our rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unknown = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({unknown: 0}, unk_token=unknown)))


@contextmanager
def casts_left_to_autocast(trainer: SFTTrainer) -> Generator[None]:
    """Without peft's cast of every layer's input to fp32 and autocast's back.

    Args:
        trainer: The trainer, whose model has the adapter.

    Yields:
        Nothing.
    """
    from peft.helpers import disable_input_dtype_casting

    model: Any = trainer.model
    with disable_input_dtype_casting(model) if trainer.args.bf16 else nullcontext():
        yield


def held_out_losses(trainer: SFTTrainer, rows: Sequence[Row], config: QloraConfig) -> dict[str, float | int]:
    """Mean loss over the answer tokens that were held out, without and with the adapter.

    Args:
        trainer: Its model has the adapter.
        rows: What was held out.
        config: For the rows at once.

    Returns:
        `answer_tokens`, `loss_before` and `loss_after`; empty if nothing was held out.
    """
    import torch

    if not rows:
        return {}
    model: Any = trainer.model
    found: dict[str, float | int] = {}
    model.eval()
    for name, without in (("loss_before", model.disable_adapter()), ("loss_after", nullcontext())):
        total, count = 0.0, 0
        with without, torch.no_grad(), trainer.accelerator.autocast(), casts_left_to_autocast(trainer):
            for batch in batches(rows, config.rows_at_once):
                loss, num_tokens = _summed_loss(model.get_base_model(), batch)
                total, count = total + loss, count + num_tokens
        found |= {name: total / count, "answer_tokens": count}
    return found


def _summed_loss(base: Any, batch: dict[str, Any]) -> tuple[float, int]:
    """Loss of the answer tokens of some rows, and how many they are; the head sees few of them at a time."""
    from torch.nn.functional import cross_entropy

    inputs = {name: value.to(base.device) for name, value in batch.items()}
    labels = inputs.pop("labels")[:, 1:]
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    is_answer = labels != IGNORED
    hidden, labels = hidden[is_answer], labels[is_answer]
    head = base.get_output_embeddings()
    total = 0.0
    for start in range(0, len(labels), _HEAD_TOKENS):
        part = slice(start, start + _HEAD_TOKENS)
        total += float(cross_entropy(head(hidden[part]).float(), labels[part], reduction="sum"))
    return total, len(labels)


def save_adapter(model: Any, folder: Path, dtype: str, base_name: str = "") -> None:
    """Write an adapter as peft does, which would ask the model hub about the base.

    Args:
        model: The base with the adapter.
        folder: Where to; made if it is not there.
        dtype: Of the weights, such as `bfloat16`.
        base_name: What the configuration calls the base.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    held = {name: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = copy(model.peft_config[model.active_adapter])
    lora.base_model_name_or_path, lora.inference_mode = base_name, True
    lora.save_pretrained(str(folder))


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Without what transformers and peft say of their own next versions.

    Yields:
        Nothing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _device_errors(job: Job) -> Generator[None]:
    """Memory that runs out all the same is told with what to change."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise ModelError(
            f"{job.request.device} ran out of memory; {job.needed_bytes / 1e9:.1f} GB were estimated",
            hint='Set "rows_at_once" to 1 or "row_tokens" lower, or end other programs that hold memory.',
        ) from fault


# --- progress --------------------------------------------------------------------------------------------------------


class _Reporter:
    """Tells of a run, keeps its losses, and stops it when the user wants that.

    Args:
        job: The job.
        run: Where it is kept.
        tell: Told how far it is.
    """

    def __init__(self, job: Job, run: Run, tell: Tell) -> None:
        self._job, self._tell = job, tell
        self._is_first = int(os.environ.get("RANK", "0")) == 0
        self._file = ProgressFile(run) if self._is_first else None
        self._progress = Progress(run=run.label)
        self._began = self._step_began = time.monotonic()
        self._step_s: list[float] = []
        self._first_step = 0
        self._is_stopped = False
        self._stop_file = run.folder / _STOP
        self._handlers: dict[int, Any] = {}
        self.history: list[dict[str, float]] = []

    def watch(self, trainer: SFTTrainer) -> None:
        """Follow a trainer; Ctrl-C and a request to end make it save and stop after the step that runs."""
        from transformers import TrainerCallback

        reporter = self

        class Follow(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                reporter.begin(state)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                reporter._step_began = time.monotonic()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                reporter._step_s.append(time.monotonic() - reporter._step_began)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                reporter.logged(state, logs or {})
                if reporter.is_stopped_anywhere():
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(Follow())
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread
                self._handlers[number] = signal.signal(number, self._stop)

    def is_stopped_anywhere(self) -> bool:
        """Whether any process of the run was asked to stop: all must stop at the same step."""
        import torch

        if torch.distributed.is_initialized():
            self._is_stopped = self._is_stopped or self._stop_file.exists()
            flag = torch.tensor([self._is_stopped], dtype=torch.int32, device=self._job.request.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self._is_stopped = bool(flag.item())
        return self._is_stopped

    def leave(self) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, *_: Any) -> None:
        self._is_stopped = True
        self.say("training", "stopping after this step")

    def begin(self, state: Any) -> None:
        """Training begins, or goes on from a checkpoint with the losses up to there."""
        self._began = time.monotonic()
        self._first_step = state.global_step
        self.history = [_of_step(entry) for entry in state.log_history if "loss" in entry]
        self._progress.step, self._progress.num_steps = state.global_step, state.max_steps
        resumed = f"going on from step {state.global_step}" if state.global_step else ""
        self.say("training", resumed)

    def logged(self, state: Any, logs: dict[str, Any]) -> None:
        """A step is done."""
        if "loss" not in logs:
            return
        self.history.append(_of_step({**logs, "step": state.global_step}))
        if not math.isfinite(logs["loss"]):
            raise EngineError(
                f"The loss is {logs['loss']} at step {state.global_step}",
                hint='Set "learning_rate" lower, such as to half, and begin anew with --discard.',
            )
        progress, config = self._progress, self._job.request.config
        progress.step, progress.loss = state.global_step, logs["loss"]
        step_s = self._typical_step_s()
        tokens = sum(map(len, self._job.train.usable)) / len(self._job.rows) * config.rows_per_step
        progress.tok_per_s = tokens / step_s if step_s else None
        progress.left_s = (progress.num_steps - progress.step) * step_s if step_s else None
        self.say("training", "stopping after this step" if self._is_stopped else "")

    def _typical_step_s(self) -> float:
        """Mean over the last steps, without the first ones where there are others."""
        settled = self._step_s[_WARM_UP_STEPS:] or self._step_s
        return sum(settled[-50:]) / len(settled[-50:]) if settled else 0.0

    def say(self, state: Any, message: str) -> None:
        """Tell of it now."""
        progress = self._progress
        progress.state, progress.message = state, message
        progress.elapsed_s = time.monotonic() - self._began
        if self._file is not None:
            is_over = state != "training" or progress.step == progress.num_steps
            self._file.write(progress, now=is_over)
            self._tell(replace(progress))

    def check_not_stopped(self) -> None:
        """Raise what a stop means."""
        if self._is_stopped:
            raise CancelledError(
                f"{self._progress.run} was stopped after step {self._progress.step} of {self._progress.num_steps}",
                hint="The same command with --resume goes on from there; --discard begins anew.",
            )

    def facts(self) -> dict[str, Any]:
        """Figures for the manifest."""
        losses = [entry["loss"] for entry in self.history]
        return {
            "steps": len(losses),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "resumed_at_step": self._first_step,
            "trained_s": round(time.monotonic() - self._began, 1),
            "tok_per_s": self._progress.tok_per_s,
            "peak_memory_bytes": _peak_memory_bytes(self._job.request.device),
            "device": _device_name(self._job.request.device),
        }


def _of_step(logs: dict[str, Any]) -> dict[str, float]:
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "mean_token_accuracy")
    return {name: logs[name] for name in names if name in logs}


def _peak_memory_bytes(device: str) -> int:
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import psutil

    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"CPU ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name()


def write_losses(folder: Path, history: Sequence[dict[str, float]], held_out: dict[str, Any]) -> None:
    """Write the losses as lines of JSON, and as a picture where matplotlib is installed.

    Args:
        folder: Where to.
        history: One entry a step.
        held_out: As `held_out_losses` gives it.
    """
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (folder / LOSSES).write_text(lines, encoding="utf-8", newline="")
    if importlib.util.find_spec("matplotlib") is None or not history:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [entry["step"] for entry in history], [entry["loss"] for entry in history]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(steps, losses, linewidth=0.8, alpha=0.5, label="training, each step")
    if len(losses) >= 10:
        half = max(1, len(losses) // 40)
        smooth = [
            sum(losses[max(0, place - half) : place + half + 1]) / len(losses[max(0, place - half) : place + half + 1])
            for place in range(len(losses))
        ]
        axes.plot(steps, smooth, linewidth=1.8, label=f"training, mean of {2 * half + 1} steps")
    if held_out:
        ends = [held_out["loss_before"], held_out["loss_after"]]
        axes.plot([steps[0], steps[-1]], ends, "o--", label=f"held out: {ends[0]:.3f} to {ends[1]:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of answer tokens")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / PLOT, dpi=120)
    pyplot.close(figure)


def _manifest(job: Job, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """What an adapter is and came from; no text, path or name of the user's files."""
    request = job.request
    installed = {}
    for package in _VERSIONS_OF:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return {
        "format": 1,
        "name": run.name,
        "version": run.version,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": {"name": request.model_name, "digest": request.model_digest, "quantization": job.quantization},
        "data": {"train": {**job.train.to_json(), "rows": len(job.rows)}, "val": job.val.to_json()},
        "row_ids": sorted(filter(_OUR_ID.fullmatch, job.train.ids)),  # forgetting an edit finds its adapters by them
        "hyperparameters": request.config.to_json(),
        "num_gpus": request.num_gpus,
        "estimated_memory_bytes": job.needed_bytes,
        **facts,
        "versions": {"python": platform.python_version(), **installed},
    }


# --- several processes -----------------------------------------------------------------------------------------------


def _train_in_processes(job: Job, run: Run, tell: Tell) -> dict[str, Any]:
    """One process a GPU, started by `accelerate launch`; each has the whole base and a share of every step's rows.

    Every process runs `python -I` in the run's folder, so nothing of the current folder is imported.
    """
    write_json(run.folder / _JOB, _job_to_json(job.request, run))
    python = [sys.executable, "-I", "-X", "utf8", "-m"]
    command = [
        *[*python, "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"],
        *["--num_processes", str(job.request.num_gpus), "--mixed_precision", "no", "--dynamo_backend", "no"],
        *["--main_process_port", "0", "--no_python", *python, "training.qlora", "--worker", str(run.folder)],
    ]
    for name in (_FACTS, _STOP):
        (run.folder / name).unlink(missing_ok=True)
    own_group: dict[str, Any] = (  # a terminal's Ctrl-C reaches this process alone
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        if sys.platform == "win32"
        else {"start_new_session": True}
    )
    with (run.folder / _LOG).open("wb") as log:
        process = subprocess.Popen(command, cwd=run.folder, stdout=log, stderr=subprocess.STDOUT, **own_group)
        try:
            _relay(process, run, tell)
        finally:
            _end(process)
    facts = read_json(run.folder / _FACTS)
    if "error" in facts:
        raise error_of_json(facts["error"])
    if process.returncode != 0 or not facts:
        tail = (run.folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise EngineError(
            f"Training on {job.request.num_gpus} GPUs ended with code {process.returncode}: " + "\n".join(tail),
            hint=f"The whole output is in {run.folder / _LOG}. --resume goes on from the last checkpoint.",
        )
    return facts


def _relay(process: subprocess.Popen[Any], run: Run, tell: Tell) -> None:
    """Tell what the first process writes of its progress, until all have ended. A stop is passed on by a file."""
    last: dict[str, Any] = {}

    def stop(*_: Any) -> None:
        (run.folder / _STOP).touch()

    handlers: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # not the main thread
            handlers[number] = signal.signal(number, stop)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            found = read_json(run.folder / PROGRESS)
            if found and found != last:
                last = found
                tell(Progress(**found))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _job_to_json(request: Request, run: Run) -> dict[str, Any]:
    paths = {"model": request.model, "data": request.data, "val": request.val, "out": run.out}
    return {
        **{name: None if path is None else str(path.absolute()) for name, path in paths.items()},
        "config": request.config.to_json(),
        "model_name": request.model_name,
        "model_digest": request.model_digest,
        "device": request.device,
        "num_gpus": request.num_gpus,
        "version": run.version,
        "parent": os.getpid(),
    }


def _work(folder: Path) -> None:
    """One of several processes. The first writes what became of it."""
    facts = read_json(folder / _JOB)
    is_first = int(os.environ.get("RANK", "0")) == 0
    threading.Thread(target=_end_with, args=(int(facts["parent"]),), name="planpatch-parent", daemon=True).start()
    try:
        job, run = _job_of_process(facts)
        found = train_here(job, run, lambda _: None)
    except PlanPatchError as error:
        write_json(folder / _FACTS, {"error": error.to_json()})  # the first that fails has the others ended
        if isinstance(error, CancelledError):
            return  # all stop at the same step, and none may end the others before they have saved
        raise
    if is_first:
        write_json(folder / _FACTS, found)


def _end_with(parent: int) -> None:
    """End when the command that started it has ended: it holds the lock, and the servers' memory is back."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        psutil.Process(parent).wait()
    os._exit(1)


def _job_of_process(facts: dict[str, Any]) -> tuple[Job, Run]:
    import torch

    device = str(facts["device"])
    if device != "cpu":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(torch.device(device))
    request = Request(
        config=config_of(facts["config"], str(facts["config"]["name"])),
        model=Path(facts["model"]),
        model_name=facts["model_name"],
        model_digest=facts["model_digest"],
        data=Path(facts["data"]),
        val=None if facts["val"] is None else Path(facts["val"]),
        out=Path(facts["out"]),
        device=device,
        num_gpus=facts["num_gpus"],
        force=True,
    )
    return plan_job(request), Run(request.out, request.config.name, facts["version"], {})


# --- without the rest of PlanPatch -----------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Train from a shell.

    Args:
        arguments: See `--help`.

    Returns:
        Exit code: 0 done, 1 stopped, 2 usage, 3 environment.
    """
    set_runtime_defaults()
    parser = argparse.ArgumentParser(prog="python -m training.qlora", description="Train an adapter.")
    parser.add_argument("config", type=Path, nargs="?", help="a JSON file, or the name of one of training/configs")
    parser.add_argument("--model", type=Path, help="folder of the base")
    parser.add_argument("--model-name", help="what the base is called; the folder's name when left out")
    parser.add_argument("--data", type=Path, help="examples to train on")
    parser.add_argument("--val", type=Path, help="examples that are held out")
    parser.add_argument("--out", type=Path, help="folder of versions")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="instead of the file's value")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--discard", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.worker is not None:
            _work(given.worker)
            return 0
        missing = [f"--{name}" for name in ("model", "data", "out") if getattr(given, name) is None]
        if given.config is None or missing:
            parser.error(f"needed: {', '.join(missing) or 'CONFIG'}")
        folder = train(_request_of(given), _print)
    except PlanPatchError as error:
        print(f"{error.message}\n  {error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


def _request_of(given: argparse.Namespace) -> Request:
    path = find_config(given.config)
    return Request(
        config=with_values(read_config(path), given.set),
        model=given.model,
        model_name=given.model_name or given.model.name,
        model_digest=digest_of(given.model),
        data=given.data,
        val=given.val,
        out=given.out.absolute(),
        device=given.device,
        num_gpus=given.num_gpus,
        resume=given.resume,
        discard=given.discard,
        force=given.force,
    )


def with_values(config: QloraConfig, given: Sequence[str]) -> QloraConfig:
    """A configuration with some other values.

    Args:
        config: The configuration.
        given: `FIELD=VALUE` each, the value as JSON or as plain text.

    Returns:
        The new one.

    Raises:
        UsageError: A value cannot be used.
    """
    values = config.to_json()
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} has no =", hint="Write it as FIELD=VALUE, such as lora_r=8.")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return config_of(values, "--set")


def digest_of(folder: Path) -> str:
    """The digest that names the weights of a folder, as the model store gives it.

    Args:
        folder: Model folder.

    Returns:
        sha256.

    Raises:
        ModelError: It holds no safetensors.
    """
    from engine.inference.store_files import check_model_folder, file_sha256, weights_digest

    return weights_digest({path.name: file_sha256(path) for path in check_model_folder(folder)})


def _print(progress: Progress) -> None:
    """A line on stderr for each step."""
    loss = "" if progress.loss is None else f"  loss {progress.loss:.4f}"
    rate = "" if progress.tok_per_s is None else f"  {progress.tok_per_s:.0f} tok/s"
    left = "" if progress.left_s is None else f"  {progress.left_s:.0f} s left"
    step = f"  step {progress.step}/{progress.num_steps}" if progress.num_steps else ""
    print(f"{progress.state}{step}{loss}{rate}{left}  {progress.message}".rstrip(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
