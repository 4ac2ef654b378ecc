"""Which adapter is used, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import AdapterError, UsageError
from engine.inference.catalogue import ShippedAdapter, catalogue
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.session import Session

pytestmark = pytest.mark.unit


def test_choices_are_kept_and_taken_back_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "ünï 🙂" / "choice.json"
    path.parent.mkdir()
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert not AdapterChoice(path).is_made
    for folder in (first, second, None):
        AdapterChoice(path).use(folder)
        assert AdapterChoice(path).current == folder
        assert AdapterChoice(path).is_made
    for folder in (second, first, None):
        AdapterChoice(path).rollback()
        assert AdapterChoice(path).current == folder
    assert not AdapterChoice(path).is_made
    with pytest.raises(UsageError, match="No adapter was ever chosen"):
        AdapterChoice(path).rollback()


def test_a_chosen_folder_that_is_gone_is_named_and_can_be_taken_back(tmp_path: Path) -> None:
    path, folder = tmp_path / "choice.json", tmp_path / "adapter"
    folder.mkdir()
    AdapterChoice(path).use(None)
    AdapterChoice(path).use(folder)
    folder.rmdir()
    with pytest.raises(AdapterError, match="adapter, chosen with planpatch adapters use, does not exist any more"):
        _ = AdapterChoice(path).current
    AdapterChoice(path).rollback()
    assert AdapterChoice(path).current is None


def test_only_the_last_fifty_choices_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    for _ in range(60):
        AdapterChoice(path).use(None)
    choice = AdapterChoice(path)
    for _ in range(50):
        choice.rollback()
    assert not choice.is_made


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"history": 5}', b'{"history": "abc"}', b'{"history": {"a": 1}}', b"\xff\xfe", b"5", b""]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "choice.json"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"choice\.json cannot be read") as caught:
        AdapterChoice(path)
    assert "Delete it" in caught.value.hint


# --- the adapter that ships ------------------------------------------------------------------------------------------

SMALL = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model's entry, with an adapter whatever the catalogue says today."""
    adapter = ShippedAdapter("edits-v0", "", "0" * 64, 0, "Apache-2.0")
    entries = {**catalogue(), SMALL: replace(catalogue()[SMALL], adapter=adapter)}
    monkeypatch.setattr("engine.inference.catalogue.catalogue", lambda: entries)
    return adapter.path


def opened(home: Path, **settings: str) -> Session:
    return Session.open({"PLANPATCH_HOME": str(home)}, {"model": SMALL, **settings})


def test_auto_is_the_shipped_adapter_until_the_user_chooses(tmp_path: Path, shipped: Path) -> None:
    session, mine = opened(tmp_path), tmp_path / "mine"
    mine.mkdir()
    choice = AdapterChoice(session.paths.adapter_choice)
    assert session.adapter() == shipped
    choice.use(mine)
    assert session.adapter() == mine
    choice.use(None)
    assert session.adapter() is None
    choice.rollback()
    choice.rollback()
    assert session.adapter() == shipped
    session.paths.default_adapter.mkdir(parents=True)
    assert session.adapter() == session.paths.default_adapter


def test_a_setting_switches_the_shipped_adapter_off(tmp_path: Path, shipped: Path) -> None:
    assert opened(tmp_path, adapter="__none__").adapter() is None
    assert opened(tmp_path, adapter="auto").adapter() == shipped


def test_a_shipped_adapter_is_for_its_own_model_alone(tmp_path: Path, shipped: Path) -> None:
    """A folder of the user may hold any weights, whatever it is called."""
    session = opened(tmp_path)
    assert session.adapter("") is None
    assert session.adapter("Qwen/Qwen3-8B") is None
    assert session.adapter("qwen/qwen2.5-coder-0.5b-instruct") == shipped
    folder = tmp_path / SMALL
    folder.mkdir()
    assert opened(tmp_path, model=str(folder)).adapter() is None
