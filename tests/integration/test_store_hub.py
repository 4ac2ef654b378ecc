"""Pulling from the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.inference.catalogue import resolve
from engine.inference.store import ModelStore, Progress
from tests.hub_server import COMMIT, Hub, serve
from tests.tiny_model import safetensors_bytes, sha256, tiny_model_files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve(Hub()) as hub:
        use_endpoint(monkeypatch, hub.endpoint, tmp_path)
        yield hub


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    """For this process, whose library has read its settings, and for the one that downloads."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


def big_model() -> dict[str, bytes]:
    files = tiny_model_files()
    return {**files, "model.safetensors": safetensors_bytes(bytes(range(256)) * 8000)}


def test_a_model_of_the_hub_is_pulled_with_its_commit_and_licence(hub: Hub, store: ModelStore) -> None:
    files = tiny_model_files()
    hub.repositories["org/tiny"] = {**files, "pytorch_model.bin": b"pickle", "modeling.py": b"x", "onnx/a.json": b"{}"}
    seen: list[Progress] = []
    model = store.pull(resolve("org/tiny"), seen.append)
    assert (model.name, model.source, model.licence, model.hub_id) == ("org--tiny", "hub", "mit", "org/tiny")
    assert sorted(path.name for path in model.folder.iterdir()) == sorted(
        [*files, "LICENSE.txt", "planpatch-model.json"]
    )
    assert (model.folder / "LICENSE.txt").read_text(encoding="utf-8") == (
        f"Licence: mit\nModel: org/tiny on the hub, revision {COMMIT}\n"
    )
    assert not [line for line in hub.log if "pytorch_model.bin" in line or "modeling.py" in line]
    assert [progress.message for progress in seen if "trying" in progress.message] == [
        "local copy: no copy of org/tiny on this machine; trying hub"
    ]
    assert store.get(resolve("org/tiny")) == model


def test_the_commit_of_the_catalogue_is_asked_for(hub: Hub, store: ModelStore) -> None:
    hub.repositories["Qwen/Qwen3-4B"] = tiny_model_files()
    model = store.pull(resolve("qwen3-4b"))
    assert (model.name, model.licence) == ("qwen3-4b", "Apache-2.0")
    revision = resolve("qwen3-4b").revision
    assert f"/api/models/Qwen/Qwen3-4B/revision/{revision}?" in hub.log[0].replace(f"{revision} ", f"{revision}? ")


def test_bytes_that_are_not_what_the_hub_says_are_refused(hub: Hub, store: ModelStore) -> None:
    files = hub.repositories["org/tiny"] = tiny_model_files()
    hub.digests["model.safetensors"] = "0" * 64
    with pytest.raises(ModelError) as caught:
        store.pull(resolve("org/tiny"), sources=["hub"])
    assert (
        f"model.safetensors of org/tiny is not what the hub says: sha256 {sha256(files['model.safetensors'])}, "
        f"expected {'0' * 64}"
    ) in caught.value.message
    assert len([line for line in hub.log if line.startswith('"GET /org/tiny/resolve') and "safetensors" in line]) == 2
    assert not (store.root / "org--tiny").exists()
    hub.digests.clear()
    assert store.pull(resolve("org/tiny"))


@pytest.mark.slow
def test_a_download_that_breaks_off_ends_whole_or_not_at_all(hub: Hub, store: ModelStore) -> None:
    hub.repositories["org/big"] = big_model()
    hub.broken_downloads = 1000
    with pytest.raises(ModelError, match="the download of org/big broke off"):
        store.pull(resolve("org/big"), sources=["hub"])
    assert not (store.root / "org--big").exists()
    assert store.show("org/big").state == "partial"
    hub.broken_downloads = 0
    model = store.pull(resolve("org/big"), sources=["hub"])
    assert (model.folder / "model.safetensors").read_bytes() == hub.repositories["org/big"]["model.safetensors"]


@pytest.mark.parametrize(
    ("hub_id", "message"),
    [
        ("org/none", "hub: the hub has no model org/none, or it is private"),
        ("org/gated", "hub: the hub gives org/gated only to users who accepted its terms"),
        ("org/pickles", "hub: org/pickles has no safetensors weights on the hub; others can run code when loaded"),
        ("org/words", "tokenizer.json is missing"),
    ],
)
def test_what_the_hub_cannot_give_is_said(hub: Hub, store: ModelStore, hub_id: str, message: str) -> None:
    files = tiny_model_files()
    hub.repositories["org/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    hub.repositories["org/words"] = {name: files[name] for name in files if name != "tokenizer.json"}
    with pytest.raises(ModelError) as caught:
        store.pull(resolve(hub_id))
    assert message in caught.value.message


def test_too_small_a_disk_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/big"] = big_model()
    store = ModelStore(tmp_path / "home", free_bytes=lambda folder: 1_000_000)
    with pytest.raises(ModelError, match=r"org/big needs 2 MB of disk space at .*, and 1 MB are free"):
        store.pull(resolve("org/big"))
    assert not [line for line in hub.log if "safetensors" in line]


def test_a_hub_that_does_not_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: ModelStore
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        monkeypatch.setattr("engine.inference.store_hub._TIMEOUT_S", 0.2)
        with pytest.raises(ModelError, match=r"hub: the hub is out of reach \(ReadTimeout"):
            store.pull(resolve("org/tiny"))
