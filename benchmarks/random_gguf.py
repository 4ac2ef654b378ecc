"""A GGUF file of Qwen3-8B's shapes with random Q8_0 weights, to measure llama.cpp where no 8B can be had.

    python benchmarks/random_gguf.py ANY_QWEN2.5_OR_QWEN3.gguf OUT.gguf [--layers 36]

Vocabulary and merges come from the first file. Speed is that of a real model, texts are not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 12288, 32, 8, 128, 151936
_BLOCK_BYTES = 34  # fp16 scale and 32 int8
_TOKENIZER = (
    ("tokenizer.ggml.model", "add_tokenizer_model"),
    ("tokenizer.ggml.pre", "add_tokenizer_pre"),
    ("tokenizer.ggml.tokens", "add_token_list"),
    ("tokenizer.ggml.token_type", "add_token_types"),
    ("tokenizer.ggml.merges", "add_token_merges"),
)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    given = parser.parse_args()
    reader = GGUFReader(given.tokenizer)
    writer = GGUFWriter(given.out, "qwen3")
    writer.add_block_count(given.layers)
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    for name, method in _TOKENIZER:
        getattr(writer, method)(_contents(reader, name))
    writer.add_eos_token_id(151645)
    random = np.random.default_rng(0)
    for name, shape in _shapes(given.layers):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            writer.add_tensor(name, _weights(random, *shape), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _contents(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, f"the file has no {name}"
    return field.contents()


def _shapes(num_layers: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (VOCAB, HIDDEN)),
        ("output.weight", (VOCAB, HIDDEN)),
        ("output_norm.weight", (HIDDEN,)),
    ]
    for layer in range(num_layers):
        block = f"blk.{layer}."
        shapes += [
            (f"{block}attn_norm.weight", (HIDDEN,)),
            (f"{block}attn_q.weight", (HEADS * HEAD_DIM, HIDDEN)),
            (f"{block}attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (f"{block}attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (f"{block}attn_output.weight", (HIDDEN, HEADS * HEAD_DIM)),
            (f"{block}attn_q_norm.weight", (HEAD_DIM,)),
            (f"{block}attn_k_norm.weight", (HEAD_DIM,)),
            (f"{block}ffn_norm.weight", (HIDDEN,)),
            (f"{block}ffn_gate.weight", (INNER, HIDDEN)),
            (f"{block}ffn_up.weight", (INNER, HIDDEN)),
            (f"{block}ffn_down.weight", (HIDDEN, INNER)),
        ]
    return shapes


def _weights(random: np.random.Generator, num_rows: int, num_columns: int) -> np.ndarray:
    """Rows of Q8_0 blocks, uint8 `[num_rows, num_columns / 32 * 34]`: some random rows, again and again."""
    few = min(num_rows, 64)
    blocks = random.integers(0, 256, (few, num_columns // 32, _BLOCK_BYTES), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.02 / 127).tobytes(), dtype=np.uint8)
    blocks[:, :, :2] = scale
    rows = blocks.reshape(few, -1)
    return np.tile(rows, (-(-num_rows // few), 1))[:num_rows]


if __name__ == "__main__":
    main()
