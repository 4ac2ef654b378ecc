"""Which adapter is used, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import AdapterError, UsageError
from lsp_server.adapter_choice import AdapterChoice

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
