"""Model folders that are damaged: each is named with what mends it, whoever keeps the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import ModelError
from engine.inference.catalogue import resolve
from engine.inference.loading import load_model
from engine.inference.mending import mending_hint
from engine.inference.store import ModelStore
from engine.inference.tokenizer import HFChatTokenizer
from tests.tiny_model import tiny_model_files

SIZES: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model of two layers, with a tokenizer."""
    folder = tmp_path_factory.mktemp("whole model 🐍")
    for name, content in tiny_model_files().items():
        (folder / name).write_bytes(content)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a model"))


def _config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")

    return change


def _hint(folder: Path) -> str:
    return (
        f"Check that {folder} is a whole model folder (config.json, safetensors, tokenizer.json), "
        "or name another model."
    )


def test_a_whole_folder_loads(folder: Path) -> None:
    assert load_model("tiny", "digest", folder, device="cpu").vocab_size == 280


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_config(num_hidden_layers=3), "its weights lack 9 tensors, such as model.layers.2."),
        (_config(num_hidden_layers=1), "config.json leaves out 9 tensors of its layers, such as model.layers.1."),
        (_config(vocab_size=100), "2 of its tensors have another shape than config.json says: lm_head.weight, …"),
        (_config(hidden_size=15), "is not a multiple of the number of attention heads"),
        (_config(hidden_size="16"), "Field 'hidden_size' expected int"),
        (_config(hidden_act="none such"), "KeyError: 'none such'"),
        (_config(num_attention_heads=0), "ZeroDivisionError"),
        (lambda folder: (folder / "config.json").write_text('{"model_type'), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "Error while deserializing header"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_folder_s_weights_or_configuration_is_told(
    folder: Path, change: Callable[[Path], None], said: str
) -> None:
    change(folder)
    with pytest.raises(ModelError) as caught:
        load_model("tiny", "digest", folder, device="cpu")
    assert caught.value.message.startswith(f"tiny cannot be loaded from {folder}: ")
    assert said in caught.value.message
    assert "above report" not in caught.value.message
    assert caught.value.hint == _hint(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is damaged: Expecting property name"),
        ("[]", "is damaged: 'list' object has no attribute 'get'"),
        ('{"num_attention_heads": 0, "hidden_size": 4}', "is damaged: integer division or modulo by zero"),
        ("{}", "does not say how large the model is: 'num_attention_heads' is missing"),
        ("\udcff", "is damaged: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_damaged_configuration_is_told_when_memory_is_checked(
    folder: Path, tmp_path: Path, text: str, said: str
) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError) as caught:
        ModelStore(tmp_path / "home").check_memory(resolve(str(folder)), "bf16", 10**12)
    assert caught.value.message.startswith(f"{folder / 'config.json'} {said}")
    assert caught.value.hint == _hint(folder)


@pytest.mark.parametrize("content", [b"", b"RUBBISH", b"\xff" * 16])
def test_damaged_weights_are_told_when_a_folder_is_opened(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as caught:
        ModelStore(tmp_path / "home").get(resolve(str(folder)))
    assert caught.value.hint == _hint(folder)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"added_tokens": 1}', '{"added_tokens": [1], "model": {}}', '{"model": [], "added_tokens": []}'],
)
def test_a_damaged_tokenizer_is_told(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        HFChatTokenizer(folder)
    assert str(folder) in caught.value.message
    assert caught.value.hint == _hint(folder)


def test_a_model_of_the_store_is_fetched_again_by_its_name(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    assert mending_hint(models / "qwen3-8b") == _hint(models / "qwen3-8b")
    (models / ".digests.json").touch()
    assert mending_hint(models / "qwen3-8b") == "planpatch models pull qwen3-8b --force"
    assert mending_hint(models / "org--Name-1") == "planpatch models pull org/Name-1 --force"
    assert mending_hint(models / "gguf-0123") == (
        "planpatch models rm gguf-0123, check the GGUF file that it was made from, and name it again."
    )
