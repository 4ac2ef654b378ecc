"""Models as Ollama's clients name them: `name:tag`, without regard to case, `:latest` left out or not; and copies."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from engine.inference.loading import context_length_of
from engine.inference.store import LocalModel, ModelStore
from engine.patching.disk import write_atomically
from lsp_server.http.errors import HttpError

_FIM_MARKS = (b'"<|fim_middle|>"', b'"<fim_middle>"', b'"<|fim_end|>"')
_LEVELS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "Q8_0", "nf4": "NF4"}


@dataclass(frozen=True, slots=True)
class Known:
    """A model that can be named.

    Args:
        name: Its name with tag.
        local: Its files.
        system: System prompt of a model that `create` made.
        template: Its template, as text.
        parameters: Its options.
        messages: Turns that come before a chat's own, as `create` was given them.
        licences: Licences that `create` added to the model's own.
        is_alias: Whether `copy` or `create` made the name.
    """

    name: str
    local: LocalModel
    system: str = ""
    template: str = ""
    parameters: Mapping[str, Any] | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    licences: Sequence[str] = ()
    is_alias: bool = False

    @property
    def own_template(self) -> str:
        """The template that its chats are written in, if it is not the model's own; one without fields is none."""
        return self.template if self.is_alias and "{{" in self.template else ""


class Names:
    """Every name of a home: the store's models, and the copies under `http-models.json`.

    Args:
        store: The models.
        file: Where copies are kept.
    """

    def __init__(self, store: ModelStore, file: Path) -> None:
        self._store = store
        self._file = file

    def all(self, loaded: LocalModel | None = None) -> list[Known]:
        """Every model that can be named; the one in memory first.

        Args:
            loaded: The one in memory.

        Returns:
            The models.
        """
        locals_ = [info.local for info in self._store.list() if info.local is not None]
        if loaded is not None:
            locals_ = [loaded, *(local for local in locals_ if local.name != loaded.name)]
        known = [Known(_tagged(local.name), local) for local in locals_]
        by_name = {one.name: one for one in known}
        for name, copy in self._copies().items():
            origin = by_name.get(str(copy.get("from", "")))
            if origin is not None and name not in by_name:
                known.append(
                    replace(
                        origin,
                        name=name,
                        system=str(copy.get("system") or ""),
                        template=str(copy.get("template") or ""),
                        parameters=cast("Mapping[str, Any] | None", copy.get("parameters")),
                        messages=cast("Sequence[Mapping[str, Any]]", copy.get("messages") or ()),
                        licences=cast("Sequence[str]", copy.get("licences") or ()),
                        is_alias=True,
                    )
                )
        return known

    def find(self, name: str, loaded: LocalModel | None = None) -> Known:
        """The model that a name means.

        Args:
            name: As the client wrote it.
            loaded: The one in memory.

        Returns:
            The model.

        Raises:
            HttpError: 404 in Ollama's words.
        """
        wanted = _tagged(name).lower()
        for known in self.all(loaded):
            if known.name.lower() == wanted:
                return known
        raise HttpError(404, f"model '{name}' not found", code="unknown_model", param="model")

    def copy(self, source: Known, name: str, **changes: object) -> None:
        """Give a model another name, and perhaps a system prompt and options.

        Args:
            source: The model.
            name: The new name.
            **changes: `system`, `template`, `parameters`, `messages`, `licences`.
        """
        origin = _tagged(source.local.name)
        kept: dict[str, object] = {"system": source.system, "template": source.template}
        kept |= {"parameters": source.parameters or {}}
        kept |= {"messages": list(source.messages), "licences": list(source.licences)}
        self._save({**self._copies(), _tagged(name): {"from": origin, **kept, **changes}})

    def forget(self, known: Known) -> None:
        """Take a name away that `copy` made."""
        copies = self._copies()
        copies.pop(known.name, None)
        self._save(copies)

    def _copies(self) -> dict[str, dict[str, object]]:
        try:
            found: object = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as fault:
            raise HttpError(500, f"{self._file} cannot be read: {fault}", hint="Mend it or remove it.") from None
        if not isinstance(found, dict):
            raise HttpError(500, f"{self._file} holds no JSON object", hint="Mend it or remove it.")
        table = cast("dict[str, object]", found)
        return {name: cast("dict[str, object]", copy) for name, copy in table.items() if isinstance(copy, dict)}

    def _save(self, copies: Mapping[str, object]) -> None:
        text = json.dumps(copies, indent=2) + "\n"
        write_atomically(self._file, text.encode(), expected_sha256=None, private=True)


def summary(known: Known, quantization: str = "bf16") -> dict[str, Any]:
    """A line of `/api/tags`.

    Args:
        known: The model.
        quantization: How its weights are held.

    Returns:
        The line.
    """
    return {
        "name": known.name,
        "model": known.name,
        "modified_at": modified_at(known.local.folder),
        "size": max(1, known.local.bytes),
        "digest": digest_of(known.local),
        "details": details(known, quantization),
    }


def details(known: Known, quantization: str) -> dict[str, Any]:
    """Format, family and size of a model."""
    family = str(config_of(known.local.folder).get("model_type", "")) or "unknown"
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": parameter_size(known.local),
        "quantization_level": _LEVELS.get(quantization, quantization.upper()),
    }


def digest_of(local: LocalModel) -> str:
    """64 hex digits that name the weights."""
    digest = local.digest.rpartition(":")[2].lower()
    return digest if len(digest) == 64 else digest.ljust(64, "0")[:64]


def parameter_size(local: LocalModel) -> str:
    """Parameters in words, such as `494.03M`, from the weights' bytes."""
    count = parameter_count(local.folder)
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def parameter_count(folder: Path) -> int:
    """Number of parameters of a model folder, read from the heads of its safetensors files."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head: dict[str, Any] = json.loads(stream.read(length))
        for name, tensor in head.items():
            if name != "__metadata__":
                size = 1
                for dimension in tensor["shape"]:
                    size *= int(dimension)
                count += size
    return count


def config_of(folder: Path) -> dict[str, Any]:
    """The model's `config.json`; empty if it cannot be read."""
    try:
        found: object = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def model_info(known: Known, *, basename: str = "") -> dict[str, Any]:
    """`model_info` of `/api/show`: GGUF's keys, the architecture's own context length the only one."""
    config = config_of(known.local.folder)
    architecture = str(config.get("model_type", "unknown"))
    found: dict[str, Any] = {
        "general.architecture": architecture,
        "general.basename": basename or known.name.partition(":")[0],
        "general.file_type": 32,
        "general.parameter_count": parameter_count(known.local.folder),
        f"{architecture}.context_length": context_length_of(known.local.folder),
    }
    for ours, theirs in (
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        if isinstance(config.get(theirs), int):
            found[f"{architecture}.{ours}"] = config[theirs]
    return found


def modified_at(folder: Path) -> str:
    """When a folder changed, RFC 3339 with zone."""
    try:
        seconds = folder.stat().st_mtime
    except OSError:
        seconds = time.time()
    return rfc3339(seconds)


def rfc3339(seconds: float) -> str:
    """A time as Ollama writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _tagged(name: str) -> str:
    """A name with its tag; a slash in the last part is no tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@lru_cache(maxsize=16)
def _capabilities(folder: Path, _changed_at: float) -> tuple[str, ...]:
    template = "".join(
        file.read_text(encoding="utf-8", errors="replace")
        for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json")
        if file.is_file()
    )
    tokens = (folder / "tokenizer.json").read_bytes() if (folder / "tokenizer.json").is_file() else b""
    found = ["completion"]
    found += ["tools"] if re.search(r"\btools\b", template) else []
    found += ["insert"] if any(mark in tokens for mark in _FIM_MARKS) else []
    found += ["thinking"] if "enable_thinking" in template else []
    return (*found, "embedding")


def capabilities(local: LocalModel) -> tuple[str, ...]:
    """What a model can do, in Ollama's words, from its tokenizer's files.

    Args:
        local: The model.

    Returns:
        `completion`, and perhaps `tools`, `insert`, `thinking`, `embedding`.
    """
    file = local.folder / "tokenizer.json"
    return _capabilities(local.folder, file.stat().st_mtime if file.is_file() else 0.0)


def abilities(known: Known) -> tuple[str, ...]:
    """What a named model can do; a template of its own has no place for tools and thinking.

    Args:
        known: The model.

    Returns:
        Ollama's words; see `capabilities`.
    """
    found = capabilities(known.local)
    return tuple(one for one in found if one not in ("tools", "thinking")) if known.own_template else found


def template_of(local: LocalModel) -> str:
    """The chat template, as text; one that can fill in the middle names `.Suffix`, as clients look for it."""
    file = local.folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return f"{{{{/* fill in the middle: .Prompt .Suffix */}}}}{text}" if "insert" in capabilities(local) else text
