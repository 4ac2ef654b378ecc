"""Quantized weights kept on disk: whole or absent, read only where they fit, never in the way.

bitsandbytes is not asked for: a tiny model stands for one that it quantized, since only its tensors matter here.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.inference import loading, quantized
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import LoadedModel, load_model
from engine.inference.protocol import GenerationRequest, SamplingParams, complete
from engine.inference.quantized import QuantizedFiles
from tests.tiny_model import tiny_model_files

DIGEST = "0123456789abcdef" * 4
SIZES: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model() -> LlamaForCausalLM:
    made: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).half()
    return made


@pytest.fixture
def folder(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    folder = tmp_path / "a model 🐍"
    folder.mkdir()
    for name, content in tiny_model_files().items():
        (folder / name).write_bytes(content)
    model.save_pretrained(folder)
    return folder


def files_in(root: Path, digest: str = DIGEST, quantization: str = "int8", dtype: str = "float16") -> QuantizedFiles:
    return QuantizedFiles(root / "quantized", digest, quantization, dtype)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def save(files: QuantizedFiles, model: Any) -> list[str]:
    messages = list(files.saving(model))
    wait_for(files.are_there)
    return messages


def test_what_is_kept_are_the_same_bytes_and_appears_whole(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_PIECE_BYTES", 1000)
    files = files_in(tmp_path)
    steps = files.saving(model)
    first = next(steps)
    assert first.startswith("Keeping the 8-bit weights for faster starts: ") and not files.are_there()
    messages = [first, *steps]
    wait_for(files.are_there)
    assert messages[-1].startswith("Keeping the 8-bit weights for faster starts: 100% of ")
    kept, state = load_file(files.folder / "model.safetensors"), model.state_dict()
    assert kept.keys() == state.keys() - {"lm_head.weight"}, "tied weights are kept once"
    assert all(torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype for name, tensor in kept.items())
    assert [path.name for path in (tmp_path / "quantized").iterdir()] == [files.folder.name]


@pytest.mark.parametrize(
    "changed",
    [{"digest": "f" * 64}, {"quantization": "nf4"}, {"dtype": "bfloat16"}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_was_made_otherwise_is_not_read(model: Any, tmp_path: Path, changed: dict[str, str]) -> None:
    save(files_in(tmp_path), model)
    assert not files_in(tmp_path, **changed).are_there()


def test_another_bitsandbytes_or_a_file_cut_short_is_not_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(files := files_in(tmp_path), model)
    monkeypatch.setattr(quantized, "version", lambda name: "99.0")
    assert not files_in(tmp_path).are_there()
    monkeypatch.undo()
    weights = files.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not files.are_there()
    (files.folder / "planpatch-quantized.json").write_text("[]")
    assert not files.are_there()


def test_new_weights_take_the_place_of_old_ones_and_of_what_dead_processes_left(model: Any, tmp_path: Path) -> None:
    save(old := files_in(tmp_path, digest="f" * 64), model)
    save(other := files_in(tmp_path, quantization="nf4"), model)
    dead = old.folder.with_name(f".{old.folder.name}.partial-999999999")
    alive = old.folder.with_name(f".{old.folder.name}.partial-{os.getppid()}")
    dead.mkdir()
    alive.mkdir()
    save(files := files_in(tmp_path), model)
    assert {path.name for path in (tmp_path / "quantized").iterdir()} == {
        files.folder.name, other.folder.name, alive.name
    }  # fmt: skip


def test_a_disk_without_room_is_told_and_nothing_is_left(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quantized, "disk_free_bytes", lambda folder: 1_000_000)
    assert list(files_in(tmp_path).saving(model)) == []
    assert "the 8-bit weights are not kept for faster starts: they take" in caplog.text
    assert "keep_quantized=false" in caplog.text and not (tmp_path / "quantized").exists()


def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_left(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pieces(tensors: Any) -> Any:
        yield memoryview(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantized, "_pieces", pieces)
    assert len(list(files_in(tmp_path).saving(model))) == 1
    assert "The disk is full" in caplog.text and list((tmp_path / "quantized").iterdir()) == []


def test_what_is_given_up_half_way_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_PIECE_BYTES", 1000)
    steps = files_in(tmp_path).saving(model)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "quantized").iterdir()) == []


# --- through the loader and the engine -------------------------------------------------------------------------------


@pytest.fixture
def as_if_quantized(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """int8 on the CPU without bitsandbytes; returns the folders that weights are read from."""
    read = loading.read_weights
    folders: list[Path] = []

    def read_plain(folder: Path, device: str, quantization: Any, dtype: str) -> Any:
        folders.append(folder)
        return read(folder, device, "fp16", dtype)

    def read_kept(folder: Path, device: str, dtype: str) -> Any:
        folders.append(folder)
        return kept(folder, device, dtype)

    kept = loading._read_kept
    monkeypatch.setattr(loading, "read_weights", read_plain)
    monkeypatch.setattr(loading, "_read_kept", read_kept)
    monkeypatch.setattr(loading, "_import_bitsandbytes", lambda: None)
    monkeypatch.setattr(loading, "choose_quantization", lambda wanted, device: wanted)
    return folders


def load(folder: Path, quantized: Path | None, digest: str = DIGEST) -> LoadedModel:
    return load_model("tiny", digest, folder, device="cpu", quantization="int8", quantized=quantized)


def test_the_engine_keeps_them_when_it_has_nothing_to_do_and_the_next_start_reads_them(
    folder: Path, as_if_quantized: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_PIECE_BYTES", 500)
    caplog.set_level(logging.INFO)
    root = folder / "quantized"
    request = GenerationRequest(tuple(range(10, 60)), SamplingParams(20))
    with InProcessEngine("tiny", folder, lambda: load(folder, root), config=EngineConfig()) as engine:
        first = complete(engine, request)
        wait_for(lambda: any(root.glob("[!.]*")))
        wait_for(lambda: engine.status().message == "")
        assert complete(engine, request).token_ids == first.token_ids
    assert "the 8-bit weights are kept for faster starts" in caplog.text
    with InProcessEngine("tiny", folder, lambda: load(folder, root), config=EngineConfig()) as engine:
        assert complete(engine, request).token_ids == first.token_ids
    assert as_if_quantized == [folder, next(root.iterdir())]


def test_an_engine_that_is_closed_meanwhile_leaves_nothing(
    folder: Path, as_if_quantized: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_PIECE_BYTES", 10)
    root = folder / "quantized"
    with InProcessEngine("tiny", folder, lambda: load(folder, root), config=EngineConfig()) as engine:
        wait_for(lambda: "Keeping" in engine.status().message)
    assert list(root.iterdir()) == []


def test_kept_weights_that_cannot_be_read_are_made_again(
    folder: Path, as_if_quantized: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = folder / "quantized"
    files = QuantizedFiles(root, DIGEST, "int8", "float16")
    save(files, load(folder, None).model)
    weights = files.folder / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    loaded = load(folder, root)  # from the source
    assert loaded.when_idle is not None and "cannot be read, and are made again" in caplog.text
    assert not files.folder.exists()


def test_nothing_is_kept_without_a_digest_or_a_place(folder: Path, as_if_quantized: list[Path]) -> None:
    assert load(folder, None).when_idle is None
    assert load(folder, folder / "quantized", digest="").when_idle is None


def test_the_facts_name_what_they_were_made_from(model: Any, tmp_path: Path) -> None:
    save(files := files_in(tmp_path), model)
    facts = json.loads((files.folder / "planpatch-quantized.json").read_text())
    assert facts["digest"] == DIGEST and facts["quantization"] == "int8" and facts["format"] == 1
