"""From a real patch of the real 0.5B to a line of the data set, with the very prompt and answer of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer
from tests.command_line import planpatch
from tests.e2e.test_cli_real import BITS, INTENT, MODEL, assert_mended


@pytest.mark.slow
def test_a_kept_patch_of_the_real_model_is_learnt_with_its_very_prompt(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, model_folder_05b: Path
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    monkeypatch.setenv("PLANPATCH_PATCH_MAX_TIME_CPU_S", "3600")
    (tmp_path / "bits.py").write_bytes(BITS)
    made = planpatch("patch", "bits.py", "-f", "bitcount", "-i", INTENT, "--write", "--json", cwd=tmp_path).json
    assert_mended((tmp_path / "bits.py").read_bytes())
    assert planpatch("ledger", "accept", made["patch_id"], cwd=tmp_path).code == 0

    built = planpatch("train", "dataset", "--json", cwd=tmp_path).json
    assert (built["train"], built["dropped"], built["journal"]["masked"]) == (1, {}, {})
    (line,) = [json.loads(text) for text in Path(built["files"]["train"]).read_text(encoding="utf-8").splitlines()]
    assert line["id"] == made["patch_id"] and INTENT in line["input"]

    tokenizer = HFChatTokenizer(model_folder_05b)
    prompt = tokenizer.encode_chat([Message("user", line["input"])], prefill=line["prefill"])
    answer = tokenizer.encode(line["output"].removeprefix(line["prefill"]))
    assert len(prompt) == made["timings"]["num_prompt_tokens"]
    assert abs(len(answer) - made["timings"]["num_tokens"]) <= 3  # the fence's end and the end of the turn
