"""A base of a few thousand weights with a real tokenizer, and a data set for it: for tests of the trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny_model import CHATML, tiny_tokenizer

SMALL = {
    "name": "tiny",
    "model": "tiny",
    "quantization": "none",
    "precision": "fp32",
    "lora_r": 4,
    "lora_alpha": 8,
    "learning_rate": 0.01,
    "row_tokens": 256,
    "rows_per_step": 2,
    "checkpoint_every_steps": 2,
}


def make_base(folder: Path, family: str = "qwen2", hidden_size: int = 64, shards: str = "5GB") -> Path:
    """A model folder that transformers, the trainer and the engine can load."""
    import torch
    import transformers

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
    kind: Any = getattr(transformers, f"{names[family]}Config")
    config = kind(
        vocab_size=288,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{names[family]}ForCausalLM")(config).save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str(), encoding="utf-8")
    facts = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def row(number: int, length: int = 20) -> dict[str, str]:
    """A line of a data set."""
    body = "".join(random.Random(number).choices("abcdefgh ", k=length))
    return {
        "id": f"row {number}",
        "instruction": "",
        "input": f"def f{number}(): {body}\n## Code After:\n",
        "output": f"```python\ndef f{number}():\n    return {number} * 2\n```",
        "prefill": "```python\n",
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def write_config(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps({**SMALL, **values}), encoding="utf-8")
    return path
