"""What a user can do about a damaged model folder."""

from __future__ import annotations

from pathlib import Path


def mending_hint(folder: Path) -> str:
    """How a model folder becomes whole again.

    Args:
        folder: The folder; one of the store is known by the digests that the store keeps beside it.

    Returns:
        For a model of the store the command that fetches it again, for a folder of the user what belongs into it.
    """
    if not (folder.parent.name == "models" and (folder.parent / ".digests.json").is_file()):
        return (
            f"Check that {folder} is a whole model folder (config.json, safetensors, tokenizer.json), "
            "or name another model."
        )
    if folder.name.startswith("gguf-"):
        return f"planpatch models rm {folder.name}, check the GGUF file that it was made from, and name it again."
    return f"planpatch models pull {folder.name.replace('--', '/', 1)} --force"
