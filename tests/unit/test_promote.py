"""Versioned folders of adapters, their manifests, and what the gate says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AdapterError, UsageError
from tests.unit.test_adapters import write
from training.paired import difference
from training.promote import (
    decide,
    find_version,
    list_versions,
    note_promotion,
    read_version,
    remove_version,
    write_evaluation,
)

pytestmark = pytest.mark.unit


def compared(base: int, candidate: int, rows: int) -> dict[str, Any]:
    return difference([n < base for n in range(rows)], [n < candidate for n in range(rows)]).to_json()


def figures(
    right: tuple[int, int] = (5, 35), valid: tuple[int, int] = (38, 39), general: tuple[int, int] | None = (12, 11)
) -> dict[str, Any]:
    return {
        "base_digest": "base",
        "edits": {
            "rows": 40,
            "base": {"right": right[0]},
            "candidate": {"right": right[1]},
            "right": compared(*right, 40),
            "valid": compared(*valid, 40),
        },
        "general": None
        if general is None
        else {"tasks": 24, "base": general[0], "candidate": general[1], "passed": compared(*general, 24)},
    }


def test_versions_are_listed_oldest_first_and_the_newest_is_found(tmp_path: Path) -> None:
    for number, name in enumerate(("b-v1", "a-v1", ".c-v1.partial")):
        folder = write(tmp_path / name)
        os.utime(folder / "adapter_config.json", (number, number))
    assert [one.folder.name for one in list_versions(tmp_path)] == ["b-v1", "a-v1"]
    assert find_version(tmp_path, None).folder.name == "a-v1"
    assert find_version(tmp_path, "b-v1").folder == tmp_path / "b-v1"
    assert find_version(tmp_path, str(tmp_path / "b-v1")).folder == tmp_path / "b-v1"
    with pytest.raises(UsageError, match="There is no adapter c-v1"):
        find_version(tmp_path, "c-v1")
    with pytest.raises(UsageError, match="There is no adapter in"):
        find_version(tmp_path / "none", None)


def test_a_damaged_adapter_is_listed_with_what_is_wrong_and_cannot_be_chosen(tmp_path: Path) -> None:
    (write(tmp_path / "a-v1") / "manifest.json").write_text("{", encoding="utf-8")
    (write(tmp_path / "b-v1") / "adapter_model.safetensors").write_bytes(b"x")
    faults = [one.fault for one in list_versions(tmp_path)]
    assert any("manifest.json is damaged" in fault for fault in faults)
    assert any("cannot be read" in fault for fault in faults)
    for name in ("a-v1", "b-v1"):
        with pytest.raises(AdapterError):
            find_version(tmp_path, name)


def test_figures_are_kept_beside_what_training_wrote_and_end_with_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "a-v1")
    (folder / "manifest.json").write_text(json.dumps({"name": "a", "base": {"name": "m", "digest": "d"}}))
    version = write_evaluation(read_version(folder), figures())
    assert (version.manifest["name"], version.base_digest) == ("a", "d")
    assert read_version(folder).base == "m"
    assert read_version(folder).evaluation["edits"]["rows"] == 40
    write(folder, config={"peft_type": "LORA", "r": 7})
    assert dict(read_version(folder).evaluation) == {}
    assert decide(read_version(folder), "base").against == ("its weights are not those that were evaluated",)
    with pytest.raises(AdapterError, match="changed meanwhile"):
        write_evaluation(version, figures())


@pytest.mark.parametrize(
    ("measured", "against"),
    [
        (figures(), ""),
        (figures(right=(5, 9)), "it is not shown to be better"),
        (figures(right=(20, 20)), "it is not shown to be better"),
        (figures(right=(30, 5)), "it is worse"),
        (figures(valid=(38, 30)), "it lost 8 and won 0 of 40 patches that the gates pass"),
        (figures(general=(12, 7)), "it lost 5 and won 0 of 24 general tasks"),
        (figures(general=None), "the general tasks were left out"),
    ],
)
def test_the_gate_says_what_speaks_against_an_adapter(tmp_path: Path, measured: dict[str, Any], against: str) -> None:
    version = write_evaluation(read_version(write(tmp_path / "a-v1")), measured)
    decision = decide(version, "base")
    assert decision.is_passed is (not against)
    assert (len(decision.against) == 1 and against in decision.against[0]) or not against
    assert decide(version, "other").against == ("it was evaluated on another base model than the one that is used",)


def test_an_adapter_without_figures_does_not_pass(tmp_path: Path) -> None:
    assert decide(read_version(write(tmp_path / "a-v1")), "base").against == ("it was never evaluated",)


def test_a_promotion_is_noted_with_what_spoke_against_it(tmp_path: Path) -> None:
    version = read_version(write(tmp_path / "a-v1"))
    version = note_promotion(version, decide(version, "base"), is_insisted=True)
    version = note_promotion(version, decide(version, "base"), is_insisted=True)
    promotions = read_version(version.folder).manifest["promotions"]
    assert [(one["insisted"], one["against"]) for one in promotions] == [(True, ["it was never evaluated"])] * 2


def test_an_adapter_is_removed_and_what_a_kill_left_of_another(tmp_path: Path) -> None:
    write(tmp_path / "b-v1")
    write(tmp_path / ".c-v1.removed")
    remove_version(write(tmp_path / "a-v1"))
    assert [path.name for path in tmp_path.iterdir()] == ["b-v1"]
