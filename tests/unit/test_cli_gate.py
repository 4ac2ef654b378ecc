"""`planpatch train evaluate` and `promote` as a user types them: real files and gates, a scripted model."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.inference.catalogue import resolve
from engine.inference.protocol import EngineStatus, GenerationRequest
from engine.inference.store import ModelStore
from engine.patching.ledger import Ledger
from lsp_server import cli, cli_gate
from tests import house_style
from tests.command_line import Said
from tests.learning import accepted
from tests.scripted_engine import ScriptedEngine
from tests.tiny_model import tiny_model_files, write_files
from tests.unit.test_adapters import write

EDITS = {edit.name: edit for edit in house_style.fresh()[:8]}


class Model(ScriptedEngine):
    """Gives the function back as it is; with an adapter it writes the house style."""

    def __init__(self, digest: str) -> None:
        self._digest = digest
        super().__init__(lambda prompt: self._answer(prompt))

    def _answer(self, prompt: str) -> str:
        edit = next(edit for name, edit in EDITS.items() if f"def {name}(" in prompt)
        return edit.before if self._last.adapter == "__none__" else edit.after

    def submit(self, request: GenerationRequest) -> str:
        self._last = request
        return super().submit(request)

    def status(self) -> EngineStatus:
        return replace(super().status(), model_digest=self._digest)


class Desk:
    """A home with a model, an adapter and eight held-out edits."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.folder, self._capsys = folder / "home", folder, capsys
        model = write_files(folder / "tiny", tiny_model_files())
        monkeypatch.setenv("PLANPATCH_HOME", str(self.home))
        monkeypatch.setenv("PLANPATCH_MODEL", str(model))
        monkeypatch.chdir(folder)
        self.digest = ModelStore(self.home).get(resolve(str(model))).digest
        self.out = self.home / "training" / "qlora-out"
        write(self.out / "house-v1")
        self.data = house_style.write_edits(folder / "rows.jsonl", list(EDITS.values()))

        @contextmanager
        def engine(*_: object, **__: object) -> Generator[ScriptedEngine]:
            yield Model(self.digest)

        monkeypatch.setattr(cli_gate, "open_engine", engine)

    def __call__(self, *arguments: str) -> Said:
        self._capsys.readouterr()
        code = cli.main(list(arguments))
        said = self._capsys.readouterr()
        return Said(code, said.out, said.err)

    def manifest(self) -> Any:
        return json.loads((self.out / "house-v1" / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.setenv("COLUMNS", "200")
    return Desk(tmp_path, monkeypatch, capsys)


def test_an_adapter_that_was_never_evaluated_is_not_promoted(desk: Desk) -> None:
    said = desk("train", "promote")
    assert said.code == 1
    assert (
        said.err
        == "house-v1 does not pass: it was never evaluated\nnothing is changed; --insist uses it all the same\n"
    )
    assert not (desk.home / "adapters.json").exists()


def test_a_better_adapter_is_refused_until_its_general_ability_was_measured(desk: Desk) -> None:
    said = desk("train", "evaluate", "--data", "rows.jsonl", "--no-general", "--json")
    assert said.code == 1
    edits = said.json["edits"]
    assert (edits["base"]["right"], edits["candidate"]["right"], edits["rows"]) == (0, 8, 8)
    assert (edits["base"]["refused_by"], edits["base"]["edited"]) == ({"change": 8}, 0)
    assert edits["right"]["interval"][0] > 0
    assert said.json["gate"] == {
        "passed": False,
        "against": ["the general tasks were left out"],
        "why": said.json["gate"]["why"],
    }
    assert "0 of 8 without it, 8 with it" in said.json["gate"]["why"]
    assert desk.manifest()["evaluation"]["base_digest"] == desk.digest
    assert str(desk.folder) not in json.dumps(desk.manifest())


def test_one_that_passes_is_promoted_and_can_be_taken_back(desk: Desk) -> None:
    desk("train", "evaluate", "--data", "rows.jsonl", "--no-general")
    manifest = desk.manifest()
    passed = {"difference": 0.0, "interval": [-0.1, 0.1], "won": 0, "lost": 0, "p": 1.0}
    manifest["evaluation"]["general"] = {"tasks": 24, "base": 10, "candidate": 10, "passed": passed}
    (desk.out / "house-v1" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    said = desk("train", "promote", "house-v1", "--json")
    assert (said.code, said.json["adapter"], said.json["live_in"]) == (0, str(desk.out / "house-v1"), [])
    assert [one["insisted"] for one in desk.manifest()["promotions"]] == [False]
    assert desk("train", "promote").code == 0
    assert len(desk.manifest()["promotions"]) == 1, "it was in use already"
    (listed,) = desk("adapters", "list", "--json").json
    assert (listed["used"], listed["evaluation"]["edits"]["candidate"]["right"]) == ("yes", 8)
    shown = desk("adapters", "list").out
    assert "0 → 8 of 8" in shown and "10 → 10 of 24" in shown
    assert desk("adapters", "rollback", "--json").json["adapter"] == "__none__"


def test_whoever_insists_is_told_what_speaks_against_it(desk: Desk) -> None:
    said = desk("train", "promote", "--insist")
    assert said.code == 0
    assert "insisted, although it was never evaluated" in said.err
    assert desk.manifest()["promotions"][0]["against"] == ["it was never evaluated"]
    assert "used from now on" in said.err


def test_an_adapter_that_was_not_compared_with_the_one_in_use_is_refused(desk: Desk) -> None:
    write(desk.out / "other-v1", config={"peft_type": "LORA", "r": 5})
    assert desk("adapters", "use", "other-v1").code == 0
    options = ["--adapter", "house-v1", "--data", "rows.jsonl", "--no-general"]
    desk("train", "evaluate", *options, "--against", "__none__")
    refused = desk("train", "promote", "house-v1", "--json")
    assert refused.code == 1
    assert refused.json["gate"]["against"][-1].startswith("it was not compared with other-v1, which is used now: ")
    said = desk("train", "promote", "house-v1", "--insist")
    assert "insisted, although it was not compared with other-v1" in said.err
    desk("adapters", "rollback")
    compared = desk("train", "evaluate", *options, "--against", "other-v1", "--json")
    assert (compared.json["against"], compared.json["edits"]["right"]["won"]) == ("other-v1", 0)
    assert "was not compared" not in desk("train", "promote", "house-v1", "--insist").err


def test_an_adapter_is_compared_with_the_one_in_use(desk: Desk) -> None:
    write(desk.out / "other-v1", config={"peft_type": "LORA", "r": 5})
    options = ["--adapter", "house-v1", "--data", "rows.jsonl", "--no-general", "--json"]
    for used, against in (("other-v1", "other-v1"), ("house-v1", "__none__"), ("__none__", "__none__")):
        assert desk("adapters", "use", used).code == 0
        assert desk("train", "evaluate", *options).json["against"] == against
    desk("adapters", "use", "other-v1")
    assert desk("train", "evaluate", *options, "--against", "__none__").json["against"] == "__none__"


def test_figures_of_other_weights_do_not_count(desk: Desk) -> None:
    desk("train", "evaluate", "--data", "rows.jsonl", "--no-general")
    write(desk.out / "house-v1", config={"peft_type": "LORA", "r": 9})
    said = desk("train", "promote", "--json")
    assert said.json["gate"]["against"] == ["its weights are not those that were evaluated"]


def test_the_table_and_the_rows(desk: Desk) -> None:
    said = desk("train", "evaluate", "--data", "rows.jsonl", "--no-general", "--rows", "verdicts.jsonl")
    assert said.code == 1
    assert [line.split("  ")[0] for line in said.out.splitlines()[1:]] == [
        "as you kept them",
        "to the letter",
        "pass every gate",
        "change something",
        "tokens/s",
    ]
    assert "house-v1 does not pass: the general tasks were left out" in said.err
    rows = [json.loads(line) for line in (desk.folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(EDITS)
    assert {row["candidate"]["right"] for row in rows} == {True}


def test_edits_of_the_journal_are_judged_in_their_whole_files(desk: Desk) -> None:
    """The gate that refuses the base's answer is known, which a line of the data set alone would not tell."""
    with Ledger(desk.home / "ledger.sqlite3") as ledger:
        for name, edit in EDITS.items():
            tail = "\n\nTAIL = 1  # 🙂\n"
            file = desk.folder / "work" / f"{name}.py"
            accepted(ledger, file, edit.before + tail, edit.after + tail, name, house_style.INTENT)
    made = desk("train", "dataset", "--json").json
    assert made["val"] > 0
    edits = desk("train", "evaluate", "--no-general", "--json").json["edits"]
    assert (edits["data"], edits["rows"], edits["left_out"]) == ("val_from_logs.jsonl", made["val"], {})
    assert edits["base"]["refused_by"] == {"change": made["val"]}
    assert edits["candidate"]["exact"] == made["val"]
    train = desk.home / "training" / "data" / "train_from_logs.jsonl"
    said = desk("train", "evaluate", "--no-general", "--data", str(train))
    assert said.code == 2 and f"({made['train']} trained on)" in said.err


def test_without_held_out_edits_it_says_what_makes_them(desk: Desk) -> None:
    said = desk("train", "evaluate")
    assert said.code == 2 and "planpatch train dataset makes it, or give --data FILE" in said.err
    assert desk("train", "evaluate", "--adapter", "nobody-v1").code == 2
