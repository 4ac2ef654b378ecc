"""What a training run is told: a JSON file of a few plain values, every one of them checked.

The defaults are the guards that kept small data sets from being learnt by heart: rank 8 to 16, dropout 0.1, one epoch.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import PathError, UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
CONFIGS = Path(__file__).with_name("configs")

_CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": ("auto", "nf4", "none"),
    "precision": ("bf16", "fp32"),
    "schedule": ("cosine", "linear", "constant"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "lora_r": (1, 256),
    "lora_alpha": (1, 1024),
    "lora_dropout": (0.0, 0.9),
    "num_epochs": (1, 100),
    "learning_rate": (1e-7, 1e-1),
    "warmup_share": (0.0, 0.5),
    "weight_decay": (0.0, 1.0),
    "max_grad_norm": (0.0, 1000.0),
    "row_tokens": (16, 131_072),
    "rows_per_step": (1, 4096),
    "rows_at_once": (1, 4096),
    "checkpoint_every_steps": (1, 1_000_000),
    "min_examples": (1, 1_000_000),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True, slots=True)
class QloraConfig:
    """Hyperparameters of a run.

    Args:
        name: Adapters are kept as NAME-v1, NAME-v2, …
        model: Name of the base in the model store; a folder given with the command takes its place.
        quantization: How the base is held: `nf4`, `none` (in `precision`), or `auto`: nf4 on a GPU, none on a CPU.
        precision: Of activations and of what is not quantized; the adapter itself is trained in fp32.
        lora_r: Rank.
        lora_alpha: The adapter's output is scaled by alpha / r.
        lora_dropout: Share of the adapter's inputs that are dropped while training.
        target_modules: Last parts of the names of the layers that get an adapter.
        num_epochs: How often each example is seen.
        learning_rate: AdamW's, at its highest.
        schedule: How it falls after the warm-up.
        warmup_share: Share of the steps in which it rises.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are cut to this norm; 0: never.
        row_tokens: Tokens of a row; an example that is longer is left out, never cut.
        packing: Whether a row holds several examples, which do not see each other.
        rows_per_step: Rows of one optimizer step, over all GPUs.
        rows_at_once: Rows in one forward pass on one GPU; fewer take less memory and give the same steps.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        checkpoint_every_steps: After how many steps the run can be resumed from.
        min_examples: Fewer examples are refused.
        seed: Of the adapter's first weights, the order of rows, and dropout.
    """

    name: str
    model: str
    quantization: Literal["auto", "nf4", "none"] = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    num_epochs: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    row_tokens: int = 1024
    packing: bool = True
    rows_per_step: int = 8
    rows_at_once: int = 1
    gradient_checkpointing: bool = True
    checkpoint_every_steps: int = 25
    min_examples: int = 30
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return {**asdict(self), "target_modules": list(self.target_modules)}


def find_config(argument: Path) -> Path:
    """The file that a command names: one that is there, else one of ours by its name.

    Args:
        argument: A path, or the name of a file of `training/configs`, with or without `.json`.

    Returns:
        The file.

    Raises:
        PathError: There is none.
    """
    if argument.is_file():
        return argument
    ours = CONFIGS / argument.name
    for file in (ours, ours.with_name(f"{ours.name}.json")):
        if file.is_file():
            return file
    names = ", ".join(sorted(file.name for file in CONFIGS.glob("*.json")))
    raise PathError(f"There is no configuration {argument}", hint=f"Give a file, or one of these names: {names}.")


def read_config(path: Path) -> QloraConfig:
    """Read a configuration.

    Args:
        path: A JSON object with the fields of `QloraConfig`.

    Returns:
        The configuration.

    Raises:
        PathError: The file cannot be read.
        UsageError: It is no JSON object, or a value cannot be used; names the field.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise PathError(f"{path} cannot be read: {fault.strerror or fault}", hint="Check the path.") from fault
    except (ValueError, RecursionError) as fault:
        raise UsageError(f"{path} is not JSON: {fault}", hint=f"Start from a file in {CONFIGS}.") from fault
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no JSON object", hint=f"Start from a file in {CONFIGS}.")
    return config_of(cast("dict[str, Any]", values), str(path))


def config_of(values: dict[str, Any], source: str) -> QloraConfig:
    """Check values and make a configuration of them.

    Args:
        values: By field name; a field that is left out has its default.
        source: Where they are from, for messages.

    Returns:
        The configuration.

    Raises:
        UsageError: A value cannot be used, or a name is unknown.
    """
    known = {field.name: field for field in fields(QloraConfig)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{source}: there is no field {name!r}",
                hint=f"Is {near[0]} meant?" if near else f"Fields: {', '.join(known)}.",
            )
    for name in ("name", "model"):
        if name not in values:
            raise UsageError(f"{source}: the field {name} is missing", hint=f"Start from a file in {CONFIGS}.")
    return QloraConfig(**{name: _checked(name, known[name].type, value, source) for name, value in values.items()})


def _checked(name: str, kind: Any, value: Any, source: str) -> Any:
    wrong = UsageError(f"{source}: {name} is {json.dumps(value)}", hint=_wanted(name, str(kind)))
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise wrong
    elif name == "target_modules":
        names = cast("list[object]", value) if isinstance(value, list) else []
        if not names or not all(isinstance(one, str) and one for one in names):
            raise wrong
        return tuple(cast("list[str]", names))
    elif name in _RANGES:
        low, high = _RANGES[name]
        is_whole = "int" in str(kind)
        if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
            raise wrong
        if not low <= value <= high:
            raise wrong
        return value if is_whole else float(value)
    elif str(kind) == "bool":
        if not isinstance(value, bool):
            raise wrong
    elif not isinstance(value, str) or not (_NAME.fullmatch(value) if name == "name" else value.strip()):
        raise wrong
    return value


def _wanted(name: str, kind: str) -> str:
    if name in _CHOICES:
        return f"One of {', '.join(_CHOICES[name])} is needed."
    if name in _RANGES:
        low, high = _RANGES[name]
        return f"A {'whole ' if 'int' in kind else ''}number from {low:g} to {high:g} is needed."
    if name == "target_modules":
        return 'A list of names of layers is needed, such as ["q_proj", "v_proj"].'
    if name == "name":
        return "Letters, digits, -, _ and . are allowed, no . first: it becomes the name of a folder."
    return "true or false is needed." if kind == "bool" else "A text is needed."
