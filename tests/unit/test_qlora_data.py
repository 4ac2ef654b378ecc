"""From lines to rows of token ids, and what a configuration may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import PathError, UsageError
from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer
from tests.tiny_model import tiny_model_files, write_files
from tests.training_model import SMALL, row, write_config, write_rows
from training.qlora_config import CONFIGS, QloraConfig, find_config, read_config
from training.qlora_data import IGNORED, Example, collate, pack, read_examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFChatTokenizer:
    return HFChatTokenizer(write_files(tmp_path_factory.mktemp("model"), tiny_model_files()))


# --- examples --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_what_the_engine_asks_and_only_the_answer_has_a_loss(
    tokenizer: HFChatTokenizer, tmp_path: Path
) -> None:
    line = row(1)
    examples = read_examples(write_rows(tmp_path / "d.jsonl", [line]), tokenizer, 4096)
    (example,) = examples.usable
    asked = tokenizer.encode_chat([Message("user", line["input"])], prefill="```python\n")
    assert list(example.token_ids[: example.num_prompt]) == asked
    answer = example.token_ids[example.num_prompt :]
    assert tokenizer.decode(answer) == "def f1():\n    return 1 * 2\n```"
    assert answer[-1] == tokenizer.token_id("<|im_end|>")
    labels = collate([(example,)])["labels"][0].tolist()
    assert labels == [*[IGNORED] * example.num_prompt, *answer]


def test_text_that_looks_like_a_special_token_stays_text(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    line = {**row(1), "input": "x = '<|im_end|>'", "output": "```python\nx = '<|im_end|>'\n```"}
    (example,) = read_examples(write_rows(tmp_path / "d.jsonl", [line]), tokenizer, 4096).usable
    end = tokenizer.token_id("<|im_end|>")
    assert example.token_ids[example.num_prompt :].count(end) == 1  # the end of the answer alone


def test_an_instruction_of_another_data_set_stands_before_the_input(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    line = {"instruction": "Do it.", "input": "x = 1", "output": "x = 2"}
    (example,) = read_examples(write_rows(tmp_path / "d.jsonl", [line]), tokenizer, 4096).usable
    assert list(example.token_ids[: example.num_prompt]) == tokenizer.encode_chat([Message("user", "Do it.\n\nx = 1")])


def test_what_is_longer_than_a_row_is_left_out_and_named_never_cut(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [row(1), row(2, 900), {**row(3, 900), "id": ""}])
    examples = read_examples(data, tokenizer, 256)
    assert len(examples.usable) == 1
    assert examples.too_long == ["row 2", "line 3"]
    assert examples.num_lines == 3


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "Line 2 .* is not JSON"),
        ("[1]", "Line 2 .* is no JSON object"),
        ('{"input": "a"}', "Line 2 .* has no field output"),
        ('{"input": "a", "output": ["b"]}', "Line 2 .* has a field output that is no text"),
        ('{"input": "a", "output": "b", "prefill": "c"}', "Line 2 .* does not begin with its prefill"),
        ('{"input": "a", "output": "b", "prefill": "b"}', "Line 2 .* has an empty answer"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tokenizer: HFChatTokenizer, tmp_path: Path, line: str, what: str) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(f"{json.dumps(row(1))}\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=what) as caught:
        read_examples(data, tokenizer, 4096)
    assert caught.value.details["line"] == 2


def test_a_missing_data_set_says_what_makes_it(tokenizer: HFChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(PathError) as caught:
        read_examples(tmp_path / "d.jsonl", tokenizer, 4096)
    assert "planpatch train dataset" in caught.value.hint


# --- rows ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 64), max_size=60))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    examples = [Example(tuple([number] * length), 0) for number, length in enumerate(lengths)]
    rows = pack(examples, 64)
    assert sorted(example.token_ids for row in rows for example in row) == sorted(one.token_ids for one in examples)
    assert all(sum(map(len, row)) <= 64 for row in rows)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // 64))  # at most one row is less than half full
    assert pack(examples, 64) == rows


def test_each_example_counts_from_zero_and_so_does_what_fills_the_row_up() -> None:
    tensors = collate([(Example((5, 6, 7), 1), Example((8, 9), 1))], pad_to=7)
    assert tensors["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert tensors["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert tensors["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED]]


# --- configurations --------------------------------------------------------------------------------------------------


def test_our_own_configurations_can_be_read_and_keep_the_guards() -> None:
    files = sorted(CONFIGS.glob("*.json"))
    assert [file.name for file in files] == ["lora_0.5b_cpu.json", "lora_1.5b.json", "qlora_qwen3_8b.json"]
    for file in files:
        config = read_config(file)
        assert 8 <= config.lora_r <= 16
        assert (config.lora_dropout, config.num_epochs) == (0.1, 1)
        assert config.packing and config.gradient_checkpointing


def test_a_configuration_is_found_by_name_from_any_folder() -> None:
    for name in ("qlora_qwen3_8b", "qlora_qwen3_8b.json", "training/configs/qlora_qwen3_8b.json"):
        assert find_config(Path("/nowhere") / name) == CONFIGS / "qlora_qwen3_8b.json"
    with pytest.raises(PathError, match="There is no configuration") as caught:
        find_config(Path("qlora_other"))
    assert "qlora_qwen3_8b.json" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "what", "hint"),
    [
        ({"lora_rank": 8}, "no field 'lora_rank'", "lora_r"),
        ({"lora_r": 0}, "lora_r is 0", "whole number from 1 to 256"),
        ({"lora_r": 8.5}, "lora_r is 8.5", "whole number"),
        ({"lora_r": True}, "lora_r is true", "whole number"),
        ({"lora_dropout": 1}, "lora_dropout is 1", "number from 0 to 0.9"),
        ({"learning_rate": "0.1"}, "learning_rate is", "number from"),
        ({"quantization": "int8"}, 'quantization is "int8"', "auto, nf4, none"),
        ({"packing": 1}, "packing is 1", "true or false"),
        ({"target_modules": []}, "target_modules is", "list of names"),
        ({"name": "../x"}, "name is", "Letters, digits"),
        ({"name": ".x"}, "name is", "Letters, digits"),
        ({"model": " "}, "model is", "A text"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_wanted(
    tmp_path: Path, values: dict[str, object], what: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(write_config(tmp_path / "c.json", **values))
    assert what in caught.value.message
    assert hint in caught.value.hint


def test_a_configuration_survives_being_written_and_read(tmp_path: Path) -> None:
    config = QloraConfig("a", "b", lora_r=8, target_modules=("q_proj",))
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config.to_json()), encoding="utf-8")
    assert read_config(path) == config
    assert set(SMALL) <= set(config.to_json())
