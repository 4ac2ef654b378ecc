"""What every surface needs, made once: paths, settings, model store, engine, ledger, patcher."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from engine.errors import AdapterError, PlanPatchError
from engine.inference.adapters import BASE, read_adapter
from engine.inference.catalogue import DeviceFacts, ModelRef, base_named, device_facts, resolve, shipped_adapter
from engine.inference.engine import EngineConfig, InProcessEngine
from engine.inference.loading import (
    LoadedModel,
    Quantization,
    choose_device,
    choose_quantization,
    free_memory_bytes,
    load_model,
)
from engine.inference.protocol import Engine, Priority
from engine.inference.store import LocalModel, ModelStore, Progress, ProgressCallback
from engine.patching.disk import write_atomically
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Pruned, Surface
from engine.patching.patcher import Patcher, PatcherOptions, StageOptions
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.paths import Paths, find_paths, make_private_folder
from lsp_server.settings import SettingProblem, Settings, load_settings

log = logging.getLogger("planpatch")

Keep = Callable[["Session", Ledger], None]

_RETENTION_INTERVAL_S = 24 * 3600
_FOREVER_DAYS = 36_500
_NO_LIMIT_BYTES = 2**62
_FORKS_AT_ONCE_GPU = 8


class Session:
    """One process's view of a PLANPATCH_HOME. Nothing heavy is done before it is asked for.

    Args:
        paths: Where state is kept.
        settings: What holds.
        problems: Settings that could not be used.
        keep: Keeps what is learnt from before retention drops it; None: nothing is dropped unasked.
    """

    def __init__(
        self, paths: Paths, settings: Settings, problems: list[SettingProblem], keep: Keep | None = None
    ) -> None:
        self.paths = paths
        self.settings = settings
        self.problems = problems
        self.keep = keep
        self.store = ModelStore(paths.home)

    @classmethod
    def open(
        cls,
        environ: Mapping[str, str],
        options: Mapping[str, object] | None = None,
        workspace: Path | None = None,
        keep: Keep | None = None,
    ) -> Session:
        """Read the settings.

        Args:
            environ: Environment variables.
            options: Options of the command line by setting name; None is not set.
            workspace: Folder whose pyproject.toml may set presets, context and style.
            keep: Keeps what is learnt from before retention drops it.

        Returns:
            The session.

        Raises:
            PathError: PLANPATCH_HOME or PLANPATCH_CONFIG is not absolute.
            WriteError: The home cannot be made.
        """
        paths = find_paths(environ)
        settings, problems = load_settings(options, environ, paths.user_settings, workspace)
        make_private_folder(paths.home)
        return cls(paths, settings, problems, keep)

    def ledger(self) -> Ledger:
        """The ledger, opened; once a day what the retention settings no longer keep is dropped.

        Raises:
            LedgerError: It cannot be read or written.
        """
        ledger = Ledger(self.paths.ledger)
        if self._is_pruning_due():
            self._prune_for_today(ledger)
        return ledger

    def served_ledger(self) -> Ledger:
        """The ledger of a server, whose clients do not wait while old things are journaled and dropped.

        Raises:
            LedgerError: It cannot be read or written.
        """
        ledger = Ledger(self.paths.ledger)
        if self._is_pruning_due():
            threading.Thread(target=self._prune_beside, name="planpatch-retention", daemon=True).start()
        return ledger

    def _is_pruning_due(self) -> bool:
        mark = self.paths.retention_mark
        is_due = not mark.exists() or time.time() - mark.stat().st_mtime > _RETENTION_INTERVAL_S
        return is_due and self.keep is not None

    def _prune_beside(self) -> None:
        try:
            with Ledger(self.paths.ledger) as ledger:
                self._prune_for_today(ledger)
        except PlanPatchError as error:
            log.warning("the ledger is not pruned: %s", error.message)

    def _prune_for_today(self, ledger: Ledger) -> None:
        try:
            self.prune(ledger)
        except PlanPatchError as error:  # nothing was dropped, and this is no reason not to edit
            log.warning("the ledger is not pruned: %s", error.message)
            return
        write_atomically(self.paths.retention_mark, b"", expected_sha256=None, private=True)

    def prune(self, ledger: Ledger, *, days: float | None = None) -> Pruned:
        """Keep what is learnt from, then drop what the retention settings no longer keep; 0 keeps everything.

        Args:
            ledger: The ledger.
            days: Instead of the setting's.

        Returns:
            What was dropped.

        Raises:
            LedgerError: It cannot be written.
            WriteError: The journal cannot be written; nothing was dropped.
        """
        if self.keep is not None:
            self.keep(self, ledger)
        return prune_ledger(ledger, self.settings, days=days)

    def model_ref(self) -> ModelRef:
        """The model that the settings name; `auto` looks at this machine, a relative path stands under the home.

        Raises:
            UnknownModelError: There is no such model.
            ModelError: There is no such folder or file.
        """
        name = self.settings.model
        return resolve(name, self._device_facts() if name == "auto" else None, folder=self.paths.home)

    def _device_facts(self) -> DeviceFacts:
        return device_facts()

    def adapter(self, hub_id: str | None = None) -> Path | None:
        """The adapter folder that the settings name; None is the base model.

        What the user chose comes first, then the user's own default folder, then what ships for the model.

        Args:
            hub_id: The model's, empty for files of the user; the model that the settings name when left out.

        Returns:
            The folder.

        Raises:
            AdapterError: It was named and does not exist.
        """
        name = self.settings.adapter
        if name == BASE:
            return None
        if name == "auto":
            choice = AdapterChoice(self.paths.adapter_choice)
            if choice.is_made:
                return choice.current
            if self.paths.default_adapter.is_dir():
                return self.paths.default_adapter
            shipped = shipped_adapter((self.model_ref().hub_id or "") if hub_id is None else hub_id)
            return None if shipped is None else shipped.path
        folder = self.paths.resolve(name)
        if not folder.is_dir():
            raise AdapterError(
                f"The adapter folder {folder} does not exist ({self.settings.source_of('adapter')})",
                hint=f"Correct it, or use {BASE} for the base model.",
            )
        return folder

    def made_for_another(self, folder: Path) -> str | None:
        """The model of the catalogue that an adapter was made for, where the one that is used is another of it.

        Args:
            folder: The adapter's.

        Returns:
            Its name, or None: also where either is not in the catalogue, so that loading has to show whether they fit.

        Raises:
            AdapterError: The adapter cannot be read.
        """
        made_for, model = base_named(read_adapter(folder).base_model), self.model_ref().entry
        return None if made_for is None or model is None or made_for == model else made_for.name

    def placement(self) -> tuple[str, Quantization]:
        """The device and the quantization that the settings mean on this machine; imports torch.

        Raises:
            ModelError: The device is not there, or cannot hold weights that way.
        """
        settings = self.settings
        device = choose_device(settings.device)
        wants_fp32 = settings.dtype == "float32" and settings.quantization == "auto" and device == "cpu"
        return device, choose_quantization("fp32" if wants_fp32 else settings.quantization, device)

    def check_memory(self, ref: ModelRef) -> None:
        """Refuse a model that does not fit into the memory that is free now.

        Args:
            ref: The model.

        Raises:
            ModelError: It does not fit, or the device is not there.
        """
        device, quantization = self.placement()
        self.store.check_memory(ref, "bf16" if quantization == "fp16" else quantization, free_memory_bytes(device))

    def engine(self, local: LocalModel, ref: ModelRef) -> InProcessEngine:
        """An engine that loads `local` on its own thread.

        Args:
            local: The model's files.
            ref: How it was named.

        Returns:
            The engine, loading.

        Raises:
            ModelError: It does not fit into memory, or the device is not there.
            AdapterError: The adapter cannot be read.
        """
        adapter = self.adapter(local.hub_id)
        self.check_memory(ref)
        return InProcessEngine(
            local.name,
            local.folder,
            self.loading(local),
            digest=local.digest,
            adapter=adapter,
            config=self.engine_config(),
        )

    def engine_config(self) -> EngineConfig:
        """The engine's limits as the settings have them."""
        return EngineConfig(
            fast_path=self.settings.cuda_kernels,
            kv_cache_tokens=self.settings.kv_cache_tokens,
            tuning_path=self.paths.kernel_tuning,
        )

    def loading(self, local: LocalModel) -> Callable[[], LoadedModel]:
        """What reads a model's weights as the settings say.

        Args:
            local: The model's files.

        Returns:
            `load_model` with its arguments.

        Raises:
            ModelError: The device is not there, or cannot hold weights that way.
        """
        device, quantization = self.placement()
        return partial(
            load_model,
            local.name,
            local.digest,
            local.folder,
            device=device,
            quantization=quantization,
            dtype=self.settings.dtype,
            quantized=self._quantized_folder(local),
        )

    def _quantized_folder(self, local: LocalModel) -> Path | None:
        """Beside the model in the store; nothing is written into a folder of the user."""
        is_ours = local.folder.parent == self.store.root
        return local.folder / "quantized" if is_ours and self.settings.keep_quantized else None

    def local_model(self, ref: ModelRef, progress: ProgressCallback | None = None, *, pull: bool = False) -> LocalModel:
        """The model's files.

        Args:
            ref: The model.
            progress: Told how far a pull is.
            pull: Fetch it if it is not here.

        Returns:
            The files, whole.

        Raises:
            ModelError: It is absent (the hint says how to pull it) or damaged, or cannot be pulled.
        """
        told = progress or _untold
        return self.store.pull(ref, told) if pull else self.store.get(ref, told)

    def patcher(self, engine: Engine, ledger: Ledger | None, surface: Surface, **changes: object) -> Patcher:
        """A patcher with the settings' budgets.

        Args:
            engine: The model.
            ledger: Where proposals are kept.
            surface: Who asks.
            **changes: Fields of `PatcherOptions` to set otherwise.

        Returns:
            The patcher.
        """
        on_gpu = engine.status().device != "cpu"
        return Patcher(engine, ledger, patcher_options(self.settings, surface, on_gpu=on_gpu, **changes))


def _untold(_: Progress) -> None:
    """Progress that nobody watches."""


def prune_ledger(ledger: Ledger, settings: Settings, *, days: float | None = None) -> Pruned:
    """Drop what the retention settings no longer keep; 0 keeps everything.

    Args:
        ledger: The ledger.
        settings: Days and bytes to keep.
        days: Instead of the setting's.

    Returns:
        What was dropped.

    Raises:
        LedgerError: It cannot be written.
    """
    kept_days = settings.ledger_retention_days if days is None else days
    return ledger.prune(max_age_days=kept_days or _FOREVER_DAYS, max_bytes=settings.ledger_max_bytes or _NO_LIMIT_BYTES)


def patcher_options(settings: Settings, surface: Surface, *, on_gpu: bool, **changes: object) -> PatcherOptions:
    """The settings as the patcher takes them.

    Args:
        settings: What holds.
        surface: Who asks.
        on_gpu: Which time limits hold, and whether candidates decode side by side.
        **changes: Fields to set otherwise.

    Returns:
        The options.
    """
    plan = StageOptions(
        settings.plan_max_new_tokens,
        settings.plan_repetition_penalty,
        settings.plan_max_time_gpu_s if on_gpu else settings.plan_max_time_cpu_s,
        settings.plan_temperature,
        settings.plan_top_k,
        settings.plan_top_p,
    )
    patch = StageOptions(
        settings.patch_max_new_tokens,
        settings.patch_repetition_penalty,
        settings.patch_max_time_gpu_s if on_gpu else settings.patch_max_time_cpu_s,
        settings.patch_temperature,
        settings.patch_top_k,
        settings.patch_top_p,
    )
    fields: dict[str, object] = {
        "plan": plan,
        "patch": patch,
        "tokens_per_function_token": settings.patch_tokens_per_function_token,
        "extra_tokens": settings.patch_extra_tokens,
        "extra_tokens_class": settings.patch_extra_tokens_class,
        "edit_format": settings.format,
        "surroundings_chars": settings.surroundings_chars,
        "context_tokens": settings.context_tokens,
        "style": settings.style,
        "training_log": settings.training_log,
        "forks_at_once": _FORKS_AT_ONCE_GPU if on_gpu else 1,  # on a CPU one with drafts is as fast as several without
        "priority": Priority.BACKGROUND if surface == "bench" else Priority.INTERACTIVE,
        "surface": surface,
    }
    return PatcherOptions(**{**fields, **changes})  # type: ignore[arg-type]
