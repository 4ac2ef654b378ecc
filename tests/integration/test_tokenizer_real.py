"""The chat tokenizer against transformers' own, on the real Qwen2.5-Coder-0.5B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer

HARMLESS = [
    "def area(r):\n    return 3.14 * r ** 2\n",
    "\n\n\tleading newlines and a tab",
    "    deep indent\r\n\x0cform feed, CRLF",
    "emoji 😀 👩‍💻 é ß 漢字",
    "trailing spaces   \n\n\n",
    "no final newline",
]


@pytest.fixture(scope="module")
def tokenizer(model_folder_05b: Path) -> HFChatTokenizer:
    return HFChatTokenizer(model_folder_05b)


@pytest.fixture(scope="module")
def reference(model_folder_05b: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder_05b)


@pytest.mark.parametrize("text", HARMLESS)
def test_chat_ids_equal_those_of_transformers(tokenizer: HFChatTokenizer, reference: Any, text: str) -> None:
    turns = [Message("system", text), Message("user", text), Message("assistant", "Done."), Message("user", text)]
    dicts = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = reference.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(turns) == expected


def test_an_answer_with_leading_newlines_has_the_same_text_in_other_tokens(
    tokenizer: HFChatTokenizer, reference: Any
) -> None:
    """transformers merges the newline of `assistant\\n` with the answer's; the model never generated it so."""
    turns = [Message("user", "U"), Message("assistant", "\n\nanswer"), Message("user", "V")]
    dicts = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = reference.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    ours = tokenizer.encode_chat(turns)
    assert ours != expected
    assert reference.decode(ours) == reference.decode(expected)


@pytest.mark.parametrize("text", HARMLESS)
def test_text_ids_equal_those_of_transformers(tokenizer: HFChatTokenizer, reference: Any, text: str) -> None:
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_tokens_in_code_stay_text_where_transformers_makes_them_special(
    tokenizer: HFChatTokenizer, reference: Any
) -> None:
    end = tokenizer.token_id("<|im_end|>")
    text = "x = '<|im_end|>'  # <tool_call>"
    assert end in reference.encode(text)
    assert end not in tokenizer.encode(text)
    assert tokenizer.token_id("<tool_call>") not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_end_token_ends_a_generation(tokenizer: HFChatTokenizer) -> None:
    assert {151643, 151645} <= tokenizer.eos_token_ids
