"""Models of the hub: from the local copy that other programs keep, and from the hub itself.

Only safetensors, JSON, tokenizer, chat template and licence files are taken; pickles and code never.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.inference.catalogue import ModelRef
from engine.inference.store_files import (
    DigestCache,
    Progress,
    ProgressCallback,
    check_disk,
    check_model_folder,
    delete_folder,
    folder_bytes,
    writing,
)
from engine.inference.store_process import Worker

_TIMEOUT_S = 5.0
_ATTEMPTS = 2
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICEN[CS]E*", "NOTICE*")
_UNWANTED = ("adapter_*", "consolidated*", "training_args*", "optimizer*")


@dataclass(frozen=True, slots=True)
class _HubFile:
    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """A model folder that came from the hub.

    Args:
        folder: The folder.
        revision: Commit.
        licence: What the hub says of its licence; empty if it is not known.
    """

    folder: Path
    revision: str
    licence: str


def copy_from_cache(ref: ModelRef, folder: Path, progress: ProgressCallback, digests: DigestCache) -> HubSnapshot:
    """Take a model from the cache that the hub's own library keeps on this machine.

    Args:
        ref: A model with a hub id.
        folder: Where to make the copy; files are linked where the disk allows it.
        progress: Told how far it is.
        digests: Computes sha256.

    Returns:
        The copy.

    Raises:
        ModelError: There is no whole copy, or it is damaged.
        WriteError: The folder cannot be written.
    """
    from huggingface_hub import snapshot_download

    assert ref.hub_id is not None, "only hub models have a cache"
    try:
        cached = Path(snapshot_download(ref.hub_id, revision=ref.revision, local_files_only=True))
    except Exception as error:  # the library raises many kinds
        raise ModelError(f"no copy of {ref.hub_id} on this machine") from error
    check_model_folder(cached)
    target = folder / "copy"
    delete_folder(target)
    with writing(target):
        target.mkdir(parents=True)
    names = wanted_names([path.name for path in cached.iterdir() if path.is_file()])
    for index, name in enumerate(names):
        progress(Progress("download", index, len(names), "files", f"Copying {ref.hub_id} from {cached}"))
        _take_from_cache(cached / name, target / name, progress, digests)
    return HubSnapshot(target, cached.name, "")


def fetch_from_hub(
    ref: ModelRef,
    folder: Path,
    progress: ProgressCallback,
    digests: DigestCache,
    free_bytes: Callable[[Path], int],
) -> HubSnapshot:
    """Fetch a model from the hub; after an earlier fetch that was cut off, the files that it lacks.

    Args:
        ref: A model with a hub id.
        folder: Folder that holds the files while they arrive.
        progress: Told how far it is.
        digests: Computes sha256.
        free_bytes: Free space of the file system that holds a path.

    Returns:
        The files, every digest that the hub names checked.

    Raises:
        ModelError: The hub is out of reach, has no such model, or serves wrong bytes twice; the weights are pickles; or
            the disk is too small.
        WriteError: The folder cannot be written.
    """
    assert ref.hub_id is not None, "only hub models can be fetched from it"
    progress(Progress("download", 0, 0, "bytes", f"Asking the hub for {ref.hub_id}"))
    info = _model_info(ref)
    files = _wanted_files(ref.hub_id, info)
    total = sum(file.bytes for file in files)
    target = folder / "hub"
    _delete_leftovers(target)
    check_disk(folder, total - folder_bytes(target), free_bytes, ref.hub_id)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        _download(ref.hub_id, info.sha, files, target, total, progress)
        wrong = _wrong_files(files, target, progress, digests)
        if not wrong:
            break
        for file, _ in wrong:
            (target / file.name).unlink(missing_ok=True)
        if attempt == _ATTEMPTS - 1:
            file, actual = wrong[0]
            raise ModelError(
                f"{file.name} of {ref.hub_id} is not what the hub says: sha256 {actual}, expected {file.sha256}",
                hint="A proxy or mirror may change files; pull again over another network.",
            )
    delete_folder(target / ".cache")
    return HubSnapshot(target, info.sha, _licence(info))


def _delete_leftovers(target: Path) -> None:
    """What a fetch that was killed left of single files: the hub's library goes on with none of it."""
    for leftover in target.glob(".cache/huggingface/download/*.incomplete"):
        leftover.unlink(missing_ok=True)


def wanted_names(names: Sequence[str]) -> list[str]:
    """Files of a repository that are taken.

    Args:
        names: All its files.

    Returns:
        Those that a model is loaded from, and its licence.
    """
    wanted = [
        name
        for name in sorted(names)
        if "/" not in name
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in _WANTED)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNWANTED)
    ]
    own_weights = [name for name in wanted if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    return [name for name in wanted if not own_weights or not name.endswith(".safetensors") or name in own_weights]


def _model_info(ref: ModelRef) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    assert ref.hub_id is not None, "only hub models are asked for"
    try:
        return HfApi().model_info(ref.hub_id, revision=ref.revision, files_metadata=True, timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelError(
            f"the hub gives {ref.hub_id} only to users who accepted its terms",
            hint="Accept them on the model's page and sign in: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the hub has no revision {ref.revision} of {ref.hub_id}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {ref.hub_id}, or it is private", hint="Check the name, or sign in: hf auth login"
        ) from error
    except Exception as error:  # the library passes on what its HTTP client raises
        raise ModelError(
            f"the hub is out of reach ({type(error).__name__}: {_first_line(error)})",
            hint="Check the network, or name a model folder or GGUF file on this machine.",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _wanted_files(hub_id: str, info: Any) -> list[_HubFile]:
    by_name = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = wanted_names(list(by_name))
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{hub_id} has no safetensors weights on the hub; others can run code when loaded and are refused",
            hint="Use a model with safetensors files or a GGUF file.",
        )
    files = [by_name[name] for name in names]
    return [_HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None) for file in files]


def _download(
    hub_id: str, revision: str, files: Sequence[_HubFile], target: Path, total: int, progress: ProgressCallback
) -> None:
    def watch() -> None:
        done = min(folder_bytes(target), total)
        progress(Progress("download", done, total, "bytes", f"Fetching {hub_id} from the hub"))

    worker = Worker(target.parent, "download", hub_id, revision, str(target), *(file.name for file in files))
    code = worker.run(watch, HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_SYMLINKS_WARNING="1")
    if code != 0:
        reason = str(worker.facts.get("error") or worker.last_words()).partition("\n")[0]
        raise ModelError(
            f"the download of {hub_id} broke off: {reason}",
            hint="Pull again; it goes on where it stopped.",
        )


def _wrong_files(
    files: Sequence[_HubFile], target: Path, progress: ProgressCallback, digests: DigestCache
) -> list[tuple[_HubFile, str]]:
    wrong: list[tuple[_HubFile, str]] = []
    for file in files:
        if file.sha256 is None:
            continue
        actual = digests.sha256(target / file.name, progress)
        if actual != file.sha256:
            wrong.append((file, actual))
    return wrong


def _licence(info: Any) -> str:
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return tags[0] if tags else ""


def _take_from_cache(cached: Path, target: Path, progress: ProgressCallback, digests: DigestCache) -> None:
    """Link or copy a file; the cache names its large files by their sha256, which is checked."""
    source = cached.resolve()
    with writing(target):
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(source, target)
    if re.fullmatch("[0-9a-f]{64}", source.name) and digests.sha256(target, progress) != source.name:
        raise ModelError(f"the copy of {cached.name} on this machine is damaged ({source})")
