"""`planpatch adapters` with the adapters that ship: their names, another base, damage, and links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AdapterError
from engine.inference import catalogue
from engine.inference.adapters import read_adapter
from lsp_server import cli
from tests.unit.test_adapters import write

SMALL, LARGE = "qwen2.5-coder-0.5b-edits-v2", "qwen2.5-coder-1.5b-edits-v1"


class Desk:
    """A home whose model is the 0.5B, without its files."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self._capsys = home / "training" / "qlora-out", capsys

    def __call__(self, *arguments: str) -> tuple[int, Any]:
        self._capsys.readouterr()
        code = cli.main([*arguments, "--json"])
        return code, json.loads(self._capsys.readouterr().out)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path / "home", capsys)


def used(desk: Desk) -> list[str]:
    return [row["version"] for row in desk("adapters", "list")[1] if row["used"]]


def test_an_adapter_that_ships_goes_by_its_name_and_auto_goes_back_to_it(desk: Desk) -> None:
    assert used(desk) == [SMALL]
    assert desk("adapters", "use", "__none__")[0] == 0
    assert used(desk) == []
    assert desk("adapters", "use", SMALL)[0] == 0
    assert used(desk) == [SMALL]
    write(desk.out / "house-v1")
    assert desk("adapters", "use", "house-v1")[0] == 0
    code, said = desk("adapters", "use", "auto")
    assert (code, Path(said["adapter"]).name) == (0, SMALL)
    assert desk("adapters", "rollback")[0] == 0
    assert used(desk) == ["house-v1"]


def test_an_adapter_of_another_model_is_refused_and_doctor_sees_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = desk("adapters", "use", LARGE)
    assert code == 2
    assert said["error"]["message"] == (
        f"{LARGE} was made for qwen2.5-coder-1.5b-instruct, and the model is qwen2.5-coder-0.5b-instruct"
    )
    assert used(desk) == [SMALL]
    monkeypatch.setenv("PLANPATCH_ADAPTER", str(catalogue.shipped_named(LARGE).path))  # type: ignore[union-attr]
    (check,) = [one for one in desk("doctor")[1]["checks"] if one["name"] == "adapter"]
    assert check["level"] == "problem"
    assert "was made for qwen2.5-coder-1.5b-instruct" in check["detail"]


def test_what_ships_is_neither_evaluated_nor_promoted(desk: Desk) -> None:
    code, said = desk("train", "promote", SMALL)
    assert (code, said["error"]["hint"]) == (2, "planpatch adapters use auto goes back to it.")


@pytest.mark.parametrize("damage", ["other weights", "cut off", "a pointer"])
def test_damage_to_what_ships_is_told_with_what_to_do(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shipped" / SMALL
    shutil.copytree(catalogue.shipped_named(SMALL).path, folder)  # type: ignore[union-attr]
    monkeypatch.setattr(catalogue, "_SHIPPED", tmp_path / "shipped")
    assert read_adapter(folder).rank == 5
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(
        {
            "other weights": data[:-4000] + bytes(4000),
            "cut off": data[:-1],
            "a pointer": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    expected = "is not the one that came with PlanPatch" if damage == "other weights" else "cannot be read"
    with pytest.raises(AdapterError, match=expected) as caught:
        read_adapter(folder)
    assert caught.value.hint == ("Install PlanPatch again; until then planpatch adapters use __none__ goes without it.")


def test_of_a_link_the_link_is_deleted_and_leftovers_do_not_matter(desk: Desk, tmp_path: Path) -> None:
    for name in ("one-v1", "two-v1"):
        write(desk.out / name)
    elsewhere = write(tmp_path / "elsewhere")
    (desk.out / "linked-v1").symlink_to(elsewhere)
    (desk.out / ".old-v1.removed").write_text("no folder")
    assert desk("adapters", "rm", "linked-v1")[0] == 0
    assert not (desk.out / "linked-v1").is_symlink()
    assert (elsewhere / "adapter_config.json").is_file()
    assert desk("adapters", "rm", "one-v1")[0] == 0
    assert sorted(path.name for path in desk.out.glob("*-v1")) == ["two-v1"]
