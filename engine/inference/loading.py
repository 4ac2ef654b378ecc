"""From a model folder to weights on a device.

8-bit (bitsandbytes) on CUDA by default, NF4 by choice, bf16 or fp32 without quantization. Weights are read from
safetensors only and no code of the model's author is run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from engine.errors import ModelError
from engine.inference.mending import mending_hint
from engine.inference.quantized import WEIGHTS, QuantizedFiles
from engine.inference.tokenizer import HFChatTokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger("planpatch.engine")

Quantization = Literal["int8", "nf4", "bf16", "fp16", "fp32"]

_OF_A_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_INSTALL_CUDA = "Install planpatch[cuda], or choose the quantization bf16"


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run; owned by the engine's thread.

    Args:
        name: What the user called it.
        digest: sha256 that names the weights.
        folder: Where it was read from.
        model: The module, in eval mode on `device`.
        device: Where it is.
        quantization: How the weights are held.
        context_length: Most tokens of prompt and output together.
        vocab_size: Length of a row of logits.
        when_idle: Work for moments when nobody waits for the model, in small pieces; says what it does.
    """

    name: str
    digest: str
    folder: Path
    model: PreTrainedModel
    device: torch.device
    quantization: Quantization
    context_length: int
    vocab_size: int
    when_idle: Iterator[str] | None = None

    @property
    def tokenizer(self) -> HFChatTokenizer:
        """Its tokenizer, read anew."""
        return HFChatTokenizer(self.folder)


def context_length_of(folder: Path) -> int:
    """Most tokens that a model takes, from its config.json; reads no weights.

    Args:
        folder: Model folder.

    Returns:
        `max_position_embeddings`, or 4096 where the file does not say.

    Raises:
        ModelError: config.json cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text_config = config.get("text_config") or config
        return int(text_config.get("max_position_embeddings") or 4096)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
        raise ModelError(f"{folder / 'config.json'} is damaged: {fault}", hint=mending_hint(folder)) from fault


def set_runtime_defaults() -> None:
    """Set what torch's libraries read from the environment once, unless the user did. Call before torch is imported.

    CUDA's allocator grows segments. OpenMP's threads spin for some 10 µs when they wait, then sleep: where other
    programs use the cores, a spinning thread keeps its own partner from running (DECISIONS.md has the figures).
    oneDNN keeps few compiled shapes: by default a thousand, one for each length of text, at a megabyte each.
    """
    if "torch" in sys.modules:
        return
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp heeds it before the policy
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def choose_device(wanted: str) -> str:
    """`auto` made concrete: the first CUDA GPU that torch can use, else the CPU.

    Args:
        wanted: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        ModelError: A GPU was asked for and torch sees none.
    """
    set_runtime_defaults()
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ModelError(
            f"device {wanted} was asked for, but this torch ({torch.__version__}) sees no CUDA GPU",
            hint="planpatch doctor says what to install; device=cpu works now.",
        )
    index = int(wanted.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ModelError(f"device {wanted} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return f"cuda:{index}"


def free_memory_bytes(device: str) -> int:
    """Free memory of a device.

    Args:
        device: `cpu` or `cuda:N`.

    Returns:
        Bytes; for the CPU what the system can give without swapping.
    """
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info(int(device.partition(":")[2] or 0))[0])


def choose_quantization(wanted: str, device: str) -> Quantization:
    """`auto` made concrete: int8 on CUDA, bf16 on CPU.

    Args:
        wanted: `auto`, `int8`, `nf4`, `bf16`, `fp16` or `fp32`.
        device: `cpu` or `cuda:N`.

    Returns:
        The quantization.

    Raises:
        ModelError: The device cannot hold weights that way.
    """
    chosen = wanted if wanted != "auto" else ("int8" if device != "cpu" else "bf16")
    if device == "cpu" and chosen in ("int8", "nf4"):
        raise ModelError(
            f"quantization {chosen} needs a CUDA GPU; on CPU it decodes 1–2 tokens/s",
            hint="Leave the quantization at auto: bf16 on CPU.",
        )
    return chosen  # type: ignore[return-value]


def load_model(
    name: str,
    digest: str,
    folder: Path,
    *,
    device: str = "auto",
    quantization: str = "auto",
    dtype: str = "auto",
    quantized: Path | None = None,
) -> LoadedModel:
    """Read a model folder onto a device.

    Args:
        name: What the user called the model.
        digest: sha256 that names the weights.
        folder: Folder with config.json, safetensors and a tokenizer.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quantization: `auto`, `int8`, `nf4`, `bf16`, `fp16` or `fp32`.
        dtype: Of weights that are not quantized and of activations: `auto`, `bfloat16`, `float16` or `float32`.
        quantized: Folder for weights as bitsandbytes quantized them: read from there, or written when the engine has
            nothing to do; None for neither.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: It cannot be read, or does not fit into memory.
    """
    device = choose_device(device)
    chosen = choose_quantization(quantization, device)
    import torch

    from engine.inference.head import make_leading_logits_exact

    try:
        model, when_idle = _read_model(folder, digest, device, chosen, dtype, quantized)
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise ModelError(
            f"{name} does not fit into the memory of {device} as {chosen}",
            hint="Choose a smaller model (planpatch models list) or the quantization nf4, or free the GPU.",
        ) from fault
    except ImportError as fault:
        hint = _INSTALL_CUDA if chosen in ("int8", "nf4") else "planpatch doctor says what is installed."
        raise ModelError(f"{name} cannot be loaded as {chosen}: {fault}", hint=hint) from fault
    except Exception as fault:  # a config.json with wrong values makes transformers fail in any way
        raise ModelError(
            f"{name} cannot be loaded from {folder}: {_reason(fault)}", hint=mending_hint(folder)
        ) from fault
    head = _head(model)
    make_leading_logits_exact(head)
    return LoadedModel(
        name=name,
        digest=digest,
        folder=folder,
        model=model.eval(),
        device=torch.device(device),
        quantization=chosen,
        context_length=context_length_of(folder),
        vocab_size=int(head.weight.shape[0]),
        when_idle=when_idle,
    )


def _reason(fault: Exception) -> str:
    """In one line; an error without words of its own is named by its kind."""
    words = " ".join(str(fault).split())
    return words if isinstance(fault, (OSError, ValueError, RuntimeError)) else f"{type(fault).__name__}: {words}"


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    return cast("nn.Linear", head)


def _read_model(
    folder: Path, digest: str, device: str, quantization: Quantization, dtype: str, quantized: Path | None
) -> tuple[PreTrainedModel, Iterator[str] | None]:
    """Quantized weights that were kept, if they are there; else the folder's own, and what keeps them."""
    plain = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = dtype if dtype != "auto" else plain.get(quantization, "float16")
    if quantized is None or not digest or quantization not in ("int8", "nf4"):
        return read_weights(folder, device, quantization, dtype), None
    kept = QuantizedFiles(quantized, digest, quantization, dtype)
    if kept.are_there():
        try:
            return _read_kept(kept.folder, device, dtype), None
        except (MemoryError, _out_of_memory()):
            raise
        except Exception as fault:  # safetensors, transformers and bitsandbytes fail in any way
            log.warning("the weights kept in %s cannot be read, and are made again: %s", kept.folder, _reason(fault))
            kept.remove()
    _import_bitsandbytes()
    model = read_weights(folder, device, quantization, dtype)
    return model, kept.saving(model)


def _out_of_memory() -> type[Exception]:
    import torch

    return torch.OutOfMemoryError


def _import_bitsandbytes() -> None:
    """Without what torch.compile imports for functions of bitsandbytes that only a CPU runs: 1 to 2 seconds."""
    import torch

    compile, torch.compile = torch.compile, lambda model=None, **_: model if model is not None else (lambda it: it)
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports, reportUnusedImport]  # noqa: F401
    finally:
        torch.compile = compile


def _read_kept(folder: Path, device: str, dtype: str) -> PreTrainedModel:
    """Weights that are quantized already: one file, read while transformers is imported, which takes longer."""
    import torch

    from engine.inference.fast_read import FastReader

    reader = FastReader(folder / WEIGHTS, torch.device(device))
    try:
        _import_bitsandbytes()
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        arguments: dict[str, Any] = {"config": config, "state_dict": reader.tensors, "dtype": getattr(torch, dtype)}
        if device != "cpu":
            arguments["device_map"] = {"": int(device.partition(":")[2] or 0)}
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with quiet_transformers(), _nothing_allocated_ahead():
            model, read = architecture.from_pretrained(None, output_loading_info=True, **arguments)
    finally:
        reader.close()
    _check_complete(read["missing_keys"], read["mismatched_keys"], ())
    model.requires_grad_(False)
    return model


@contextmanager
def _nothing_allocated_ahead() -> Iterator[None]:
    """Transformers allocates all memory of a model at first, beside the tensors that are on the device already."""
    from transformers import modeling_utils

    before = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = before


def read_weights(
    folder: Path, device: str, quantization: Quantization, dtype: str, *, requantized_scales: bool = False
) -> PreTrainedModel:
    """The module alone, frozen, as transformers reads it.

    Args:
        folder: Folder with config.json and safetensors.
        device: `cpu` or `cuda:N`.
        quantization: How the weights are held.
        dtype: Of weights that are not quantized and of activations: `bfloat16`, `float16` or `float32`.
        requantized_scales: Whether NF4's scales are quantized again, which takes less memory.

    Returns:
        The model.

    Raises:
        ValueError: Weights are missing, or have other shapes than config.json says.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    weights_dtype = getattr(torch, dtype)
    arguments: dict[str, Any] = {"dtype": weights_dtype, "use_safetensors": True, "local_files_only": True}
    if quantization == "int8":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=weights_dtype,
            bnb_4bit_use_double_quant=requantized_scales,
        )
    if device != "cpu":
        arguments["device_map"] = {"": int(device.partition(":")[2] or 0)}
    arguments["ignore_mismatched_sizes"] = True  # so that they are told below, by name
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    model, read = loaded
    num_layers = model.config.get_text_config().num_hidden_layers
    further = [
        name for name in read["unexpected_keys"] if (of := _OF_A_LAYER.search(name)) and int(of[1]) >= num_layers
    ]
    _check_complete(read["missing_keys"], read["mismatched_keys"], further)
    model.requires_grad_(False)
    return model


def _check_complete(missing: Iterable[str], mismatched: Iterable[Any], further: Iterable[str]) -> None:
    """Transformers would fill what is missing or of another shape with noise, and leave further layers out."""
    if lacking := sorted(missing):
        raise ValueError(f"its weights lack {len(lacking)} tensors, such as {lacking[0]}")
    if differing := sorted(entry[0] for entry in mismatched):
        raise ValueError(f"{len(differing)} of its tensors have another shape than config.json says: {differing[0]}, …")
    if left_out := sorted(further):
        raise ValueError(f"config.json leaves out {len(left_out)} tensors of its layers, such as {left_out[0]}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers on the terminal while weights load."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
