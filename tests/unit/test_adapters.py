"""Adapter folders: read, refused, and held against a base."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import AdapterError
from engine.inference.adapters import check_fits, read_adapter

pytestmark = pytest.mark.unit

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 2}


class Base(torch.nn.Module):
    """A base of one layer `model.proj` with 6 inputs and 4 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 4)})


def write(
    folder: Path, *, inputs: int = 6, outputs: int = 4, layer: str = "model.proj", config: object = CONFIG
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    key = f"base_model.model.{layer}"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, inputs), f"{key}.lora_B.weight": torch.ones(outputs, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def weights(folder: Path, header: bytes, rest: bytes = b"") -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + rest)


def test_an_adapter_is_read_with_its_base_shapes_and_digest(tmp_path: Path) -> None:
    one = read_adapter(write(tmp_path / "ünï 🙂"))
    assert one.base_model == "some/base"
    assert one.shapes["base_model.model.model.proj.lora_A.weight"] == (2, 6)
    same, other = read_adapter(write(tmp_path / "b")), read_adapter(write(tmp_path / "c", config={**CONFIG, "r": 3}))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x01"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda folder: weights(folder, b"[]"), "cannot be read"),
        (lambda folder: weights(folder, b'{"a": {}}'), "cannot be read"),
        (lambda folder: weights(folder, b'{"a": 5}'), "cannot be read"),
        (lambda folder: weights(folder, b'{"a": {"data_offsets": [0], "shape": [1]}}'), "cannot be read"),
        (lambda folder: weights(folder, b'{"a": {"data_offsets": [0, 9], "shape": [1]}}'), "cut off"),
        (lambda folder: write(folder, config={"peft_type": "IA3"}), "of type IA3; only LORA"),
        (lambda folder: write(folder, config={}), "of type None; only LORA"),
    ],
)
def test_a_damaged_or_other_adapter_is_refused_by_its_folder(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = write(tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in caught.value.message


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="it is cut off"):
        read_adapter(folder)


def test_pickle_weights_are_never_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle weights, which are never loaded"):
        read_adapter(folder)


def test_a_folder_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(AdapterError, match=f"{name} does not exist"):
            read_adapter(tmp_path / name)


def test_an_adapter_that_fits_is_let_through(tmp_path: Path) -> None:
    check_fits(read_adapter(write(tmp_path / "a")), Base())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 8}, r"\(some/base\): it needs a layer model.proj with 8 inputs, and it has 6"),
        ({"outputs": 5}, "a layer model.proj with 5 outputs, and it has 4"),
        ({"layer": "model.gone"}, "a layer model.gone with 6 inputs, and there is none"),
        ({"layer": "model"}, "a layer model with 6 inputs, and it has None"),
    ],
)
def test_an_adapter_for_another_base_is_refused_with_the_layer(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    adapter = read_adapter(write(tmp_path / "a", **change))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=message):
        check_fits(adapter, Base())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("header", "rest", "message"),
    [
        (b"{}", b"", "holds no weights"),
        (
            b'{"model.proj.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            b"1234",
            "is no LoRA weight",
        ),
        (
            b'{"base_model.model.model.proj.lora_A.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
            b"1234",
            "with 0 inputs, and it has 6",
        ),
    ],
)
def test_weights_that_are_no_lora_are_refused(tmp_path: Path, header: bytes, rest: bytes, message: str) -> None:
    folder = write(tmp_path / "a")
    weights(folder, header, rest)
    with pytest.raises(AdapterError, match=message):
        check_fits(read_adapter(folder), Base())  # type: ignore[arg-type]
