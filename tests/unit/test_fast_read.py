"""Tensors of a safetensors file read by threads: the same bytes, and a file cut short is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.inference import fast_read
from engine.inference.fast_read import FastReader

CPU = torch.device("cpu")


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(fast_read, "_BUFFER_BYTES", 1000)
    made = {
        "int8": torch.randint(-128, 127, (37, 129), dtype=torch.int8),
        "fp16": torch.randn(250, 4).half(),
        "bf16": torch.randn(3).bfloat16(),
        "fp32": torch.randn(33, 7),
        "one number": torch.tensor(3, dtype=torch.uint8),
        "nothing": torch.empty(0, 5),
        "yes or no": torch.tensor([True, False]),
    }
    save_file(made, tmp_path / "a file 🐍.safetensors")
    return made


def reader_of(tmp_path: Path) -> FastReader:
    return FastReader(tmp_path / "a file 🐍.safetensors", CPU)


def test_every_tensor_is_what_was_saved(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        lazy = reader.tensors[name]
        assert lazy.get_shape() == list(tensor.shape)
        assert torch.equal(lazy[...], tensor) and lazy.get_dtype()
    reader.close()


def test_what_nobody_takes_is_given_up(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    assert torch.equal(reader.tensors["fp32"][...], tensors["fp32"])
    reader.close()
    assert reader._read == {}


@pytest.mark.parametrize("num_bytes", [1, 3000])
def test_a_file_that_is_cut_short_is_an_error(tensors: dict[str, torch.Tensor], tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "a file 🐍.safetensors"
    path.write_bytes(path.read_bytes()[:-num_bytes])
    reader = reader_of(tmp_path)
    with pytest.raises(ValueError, match="cut short"):
        for lazy in reader.tensors.values():
            _ = lazy[...]
    reader.close()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short"):
        reader_of(tmp_path)
