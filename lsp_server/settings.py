"""Settings and where each value came from.

Later ones win: built-in defaults, the user's `planpatch.toml`, the workspace's `pyproject.toml` (`[tool.planpatch]`:
presets, context and style only), environment, command line, the editor's `planpatch` section. A value that cannot be
used is reported with its source, and the value below it stands. `training_log` is the one that any source, a workspace
too, can turn off and none can turn on again. Nothing here is global: `load_settings` returns a
frozen object, and whoever needs it is handed it.

Names may be written flat or in tables (`plan_max_new_tokens`, `[plan] max_new_tokens`, `plan.maxNewTokens`); the
variable is `PLANPATCH_` and the flat name in capitals.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lsp_server import setting_values as values
from lsp_server.setting_values import DEFAULT_PRESETS, Parser, Preset

T = TypeVar("T")

# Variables with the prefix that are not settings: they say where things are, or belong to the tests.
_NOT_SETTINGS = {"home", "config", "test_home", "long", "results"}
_MAX_SUGGESTIONS = 3
_MAX_TOML_BYTES = 1_000_000

MODEL_NAMES = (
    "auto, a name of `planpatch models list`, organisation/name of a hub model, or a path such as ./model.gguf"
)


# --- the settings ----------------------------------------------------------------------------------------------------


def _setting(
    default: T,
    parse: Parser,
    *,
    variable: str = "",
    workspace: bool = False,
    secret: bool = False,
    merge: bool = False,
    off_wins: bool = False,
) -> T:
    """A field of Settings.

    `variable` is the original's environment variable, `workspace` lets a workspace set it, `secret` keeps it out of
    reports, `merge` adds a table to the one below it instead of replacing it, `off_wins` keeps what was turned off off.
    """
    metadata = {"parse": parse, "variable": variable, "workspace": workspace, "secret": secret, "merge": merge}
    metadata["off_wins"] = off_wins
    return field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, at its default where nothing set it. Lengths are in tokens or characters, times in seconds.

    Args:
        model: Catalogue name, hub id, folder or GGUF file; `auto` chooses by the machine.
        adapter: Adapter folder, `__none__` for none, `auto` for `training/qlora-out/adapter` if it exists.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quantization: `auto` is int8 on a GPU and bf16 on CPU.
        dtype: Of weights that are not quantized and of activations.
        keep_quantized: Whether weights quantized for a GPU are kept on disk beside the model, for faster starts.
        cuda_kernels: Whether our own kernels run the model on a GPU, where they can; else transformers does.
        kv_cache_tokens: Tokens of all prompts and answers that they hold at once; 0 for what memory has room for.
        format: What the model writes; `auto` chooses by the function's length.
        plan_max_new_tokens: Token budget of a plan.
        plan_repetition_penalty: Of a plan.
        plan_max_time_gpu_s: Time limit of a plan on a GPU, from leaving the queue.
        plan_max_time_cpu_s: The same on CPU.
        plan_temperature: 0 is greedy.
        plan_top_k: Of a sampled plan; 0 keeps all.
        plan_top_p: Of a sampled plan.
        patch_max_new_tokens: Token budget of a patch; for `rewrite` its lower bound.
        patch_tokens_per_function_token: For `rewrite`: budget per token of the function.
        patch_extra_tokens: For `rewrite` of a function: added to that.
        patch_extra_tokens_class: For `rewrite` of a class or file: added to that.
        patch_repetition_penalty: Of a patch.
        patch_max_time_gpu_s: Time limit of a patch on a GPU, from leaving the queue.
        patch_max_time_cpu_s: The same on CPU.
        patch_temperature: 0 is greedy.
        patch_top_k: Of a sampled patch; 0 keeps all.
        patch_top_p: Of a sampled patch.
        surroundings_chars: Characters of surroundings, the function not counted.
        context_tokens: Tokens of surroundings, the function not counted.
        style: A sentence on code style that is added to every intent; may be empty.
        presets: Intents by name.
        clean_response: Cut everything but the answer from what the model wrote.
        ledger_retention_days: Events older than this are dropped; 0 keeps all.
        ledger_max_bytes: Oldest events are dropped above this size; 0 is no limit.
        training_log: Whether edits that are kept go to the journal that training reads; off from any source is off.
        apply: `ask` before a buffer changes, or `direct`.
        http: Whether the language server listens for HTTP too.
        host: Address that HTTP binds.
        port: Port that HTTP binds; 0 takes a free one.
        root: Folder that HTTP paths must lie in; empty for none.
        token: Token that HTTP asks for; empty for none.
        origins: Web origins that may call HTTP.
        log_level: Least level that is logged.
        log_file: File that is logged to, under the home if relative; empty for stderr.
        sources: Where each value came from, by setting name; a name that is absent has its default.
    """

    model: str = _setting("auto", values.named(MODEL_NAMES))
    adapter: str = _setting("auto", values.named("an adapter folder, auto or __none__"), variable="ADAPTER_PATH")
    device: str = _setting("auto", values.device)
    quantization: str = _setting("auto", values.choice("auto", "int8", "nf4", "bf16", "fp32"))
    dtype: str = _setting("auto", values.dtype, variable="TORCH_DTYPE")
    keep_quantized: bool = _setting(True, values.boolean)
    cuda_kernels: bool = _setting(True, values.boolean)
    kv_cache_tokens: int = _setting(0, values.integer(0, 10_000_000))
    format: str = _setting("auto", values.choice("auto", "rewrite", "json_edits"))
    plan_max_new_tokens: int = _setting(16, values.integer(1, 4096))
    plan_repetition_penalty: float = _setting(1.10, values.real(0.5, 3))
    plan_max_time_gpu_s: float = _setting(12.0, values.real(0.1, 86400))
    plan_max_time_cpu_s: float = _setting(60.0, values.real(0.1, 86400))
    plan_temperature: float = _setting(0.0, values.real(0, 5))
    plan_top_k: int = _setting(0, values.integer(0, 1_000_000))
    plan_top_p: float = _setting(1.0, values.real(0, 1))
    patch_max_new_tokens: int = _setting(192, values.integer(1, 131_072))
    patch_tokens_per_function_token: float = _setting(1.3, values.real(1, 10))
    patch_extra_tokens: int = _setting(64, values.integer(0, 131_072))
    patch_extra_tokens_class: int = _setting(384, values.integer(0, 131_072))
    patch_repetition_penalty: float = _setting(1.03, values.real(0.5, 3))
    patch_max_time_gpu_s: float = _setting(25.0, values.real(0.1, 86400))
    patch_max_time_cpu_s: float = _setting(180.0, values.real(0.1, 86400))
    patch_temperature: float = _setting(0.0, values.real(0, 5))
    patch_top_k: int = _setting(0, values.integer(0, 1_000_000))
    patch_top_p: float = _setting(1.0, values.real(0, 1))
    surroundings_chars: int = _setting(1200, values.integer(0, 1_000_000), variable="OLLAMA_CTX_CHARS", workspace=True)
    context_tokens: int = _setting(1024, values.integer(0, 131_072), variable="CTX_LIMIT", workspace=True)
    style: str = _setting("", values.prompt_text, workspace=True)
    presets: Mapping[str, Preset] = _setting(DEFAULT_PRESETS, values.presets, workspace=True, merge=True)
    clean_response: bool = _setting(True, values.boolean, variable="CLEAN_RESP")
    ledger_retention_days: int = _setting(30, values.integer(0, 36_500))
    ledger_max_bytes: int = _setting(500_000_000, values.size_bytes)
    training_log: bool = _setting(True, values.boolean, workspace=True, off_wins=True)
    apply: str = _setting("ask", values.choice("ask", "direct"))
    http: bool = _setting(True, values.boolean)
    host: str = _setting("127.0.0.1", values.text)
    port: int = _setting(8765, values.integer(0, 65_535))
    root: str = _setting("", values.text)
    token: str = _setting("", values.text, secret=True)
    origins: tuple[str, ...] = _setting((), values.origins, variable="OLLAMA_ORIGINS")
    log_level: str = _setting("warning", values.choice("error", "warning", "info", "debug"))
    log_file: str = _setting("", values.text)
    sources: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)

    def source_of(self, name: str) -> str:
        """Where the value of `name` came from, for people."""
        return self.sources.get(name, "default")

    def report(self) -> list[dict[str, Any]]:
        """Every setting as `{name, value, source}`, secrets hidden; what `planpatch doctor` shows."""
        return [{"name": name, "value": self._shown(name), "source": self.source_of(name)} for name in _FIELDS]

    def _shown(self, name: str) -> Any:
        value = getattr(self, name)
        if _FIELDS[name].metadata["secret"]:
            return "(set)" if value else ""
        if name == "presets":
            return {preset.name: preset.intent for preset in self.presets.values()}
        return list(self.origins) if name == "origins" else value


_FIELDS = {entry.name: entry for entry in dataclasses.fields(Settings) if entry.metadata}
SETTING_NAMES: tuple[str, ...] = tuple(_FIELDS)


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """A value that was not used; the value below it stands.

    Args:
        source: File and key, variable, option or editor setting.
        message: What is wrong with it and what to write instead.
    """

    source: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value as found: setting name, raw value, and the source to name in a problem."""

    name: str
    value: object
    source: str


def load_settings(
    cli: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    user_toml: Path | None = None,
    workspace: Path | None = None,
    lsp: Mapping[str, object] | None = None,
) -> tuple[Settings, list[SettingProblem]]:
    """The settings that hold, and what could not be used.

    Args:
        cli: Options of the command line by setting name; None is not set.
        env: Environment variables.
        user_toml: The user's `planpatch.toml`; need not exist, unless `PLANPATCH_CONFIG` names it.
        workspace: Folder whose `pyproject.toml` may set presets, context and style.
        lsp: The editor's `planpatch` section; null is not set.

    Returns:
        The settings and the problems, in the order of the sources.
    """
    problems: list[SettingProblem] = []
    entries = [
        *_user_entries(user_toml, env or {}, problems),
        *_workspace_entries(workspace, problems),
        *_environment_entries(env or {}, problems),
        *_table_entries(cli or {}, "command line: --", _as_option),
        *_table_entries(lsp or {}, "editor setting planpatch."),
    ]
    return _merge(entries, problems), problems


def _merge(entries: Sequence[_Entry], problems: list[SettingProblem]) -> Settings:
    """Let later entries win, leaving out those that cannot be used."""
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for entry in _one_by_one(entries):
        if entry.name not in _FIELDS:
            problems.append(SettingProblem(entry.source, f"there is no such setting{_nearest(entry.name)}"))
            continue
        metadata = _FIELDS[entry.name].metadata
        value: Any
        try:
            value = metadata["parse"](entry.value)
        except values.PartlyUsable as error:
            stands = "the others stand" if error.rest else _standing(sources.get(entry.name))
            problems.append(SettingProblem(entry.source, f"{error}; {stands}."))
            if not error.rest:
                continue
            value = error.rest
        except ValueError as error:
            shown = "" if metadata["secret"] else f"{entry.value!r} cannot be used: "
            stands = "it is left out" if metadata["merge"] else _standing(sources.get(entry.name))
            problems.append(SettingProblem(entry.source, f"{shown}{error}; {stands}."))
            continue
        if metadata["off_wins"] and chosen.get(entry.name) is False:
            continue
        if metadata["merge"]:
            value = {**chosen.get(entry.name, DEFAULT_PRESETS), **value}
        chosen[entry.name] = value
        sources[entry.name] = entry.source
    return Settings(**chosen, sources=sources)


def _standing(source: str | None) -> str:
    return f"{source} stands" if source is not None else "the default stands"


def _one_by_one(entries: Iterable[_Entry]) -> Iterator[_Entry]:
    """Tables that add to the one below, entry by entry, so that one that cannot be used takes no other with it."""
    for entry in entries:
        is_table = entry.name in _FIELDS and _FIELDS[entry.name].metadata["merge"]
        for value in values.members(entry.value) if is_table else [entry.value]:
            yield dataclasses.replace(entry, value=value)


def _nearest(name: str) -> str:
    """Settings with all words of the name, unless there are many; else one that is spelt almost so."""
    words = set(name.split("_"))
    fuller = [known for known in SETTING_NAMES if words <= set(known.split("_"))]
    near = fuller if 0 < len(fuller) <= _MAX_SUGGESTIONS else difflib.get_close_matches(name, SETTING_NAMES, 1, 0.8)
    return f"; did you mean {' or '.join(near)}?" if near else "."


# --- sources ---------------------------------------------------------------------------------------------------------


def _user_entries(path: Path | None, env: Mapping[str, str], problems: list[SettingProblem]) -> Iterator[_Entry]:
    source = "environment variable PLANPATCH_CONFIG" if env.get("PLANPATCH_CONFIG", "").strip() else ""
    table = _read_toml(path, problems, named_by=source) if path is not None else {}
    return _table_entries(table, f"{path}: ")


def _workspace_entries(workspace: Path | None, problems: list[SettingProblem]) -> Iterator[_Entry]:
    """What a workspace may set; the rest is named and left out."""
    path = workspace / "pyproject.toml" if workspace is not None else None
    table = _read_toml(path, problems) if path is not None else {}
    for key in ("tool", "planpatch"):
        inner = table.get(key)
        table = cast("dict[str, object]", inner) if isinstance(inner, dict) else {}
    for entry in _table_entries(table, f"{path}: tool.planpatch."):
        if entry.name in _FIELDS and not _FIELDS[entry.name].metadata["workspace"]:
            allowed = ", ".join(name for name in _FIELDS if _FIELDS[name].metadata["workspace"])
            problems.append(
                SettingProblem(entry.source, f"a workspace may not set this and it is ignored; it may set {allowed}.")
            )
        elif entry.name in _FIELDS and _FIELDS[entry.name].metadata["off_wins"] and not _is_off(entry):
            problems.append(SettingProblem(entry.source, "a workspace may only turn this off; it is ignored."))
        else:
            yield entry


def _is_off(entry: _Entry) -> bool:
    """Whether a switch is turned off; a value that cannot be read counts as off: it was meant to be written."""
    try:
        return not values.boolean(entry.value)
    except ValueError:
        return True


def opts_out(path: Path) -> str:
    """Whether a workspace does not want its edits to be learnt from; every pyproject.toml above the file counts.

    Args:
        path: A file; need not exist.

    Returns:
        The pyproject.toml that says so, or that cannot be read; empty if there is none.
    """
    for folder in path.absolute().parents:
        file = folder / "pyproject.toml"
        if file.is_file():
            settings, problems = load_settings(workspace=folder)
            is_unclear = any(
                problem.source in (str(file), f"{file}: tool.planpatch.training_log") for problem in problems
            )
            if not settings.training_log or is_unclear:
                return str(file)
    return ""


def _read_toml(path: Path, problems: list[SettingProblem], *, named_by: str = "") -> dict[str, object]:
    """The file's table; one that is missing is empty, and a problem if the user named it."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read without end
            problems.append(SettingProblem(str(path), "the file cannot be read: it is no regular file."))
            return {}
        if path.is_file() and path.stat().st_size > _MAX_TOML_BYTES:
            problems.append(SettingProblem(str(path), "the file is larger than 1 MB; nothing in it is used."))
            return {}
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if named_by:
            problems.append(SettingProblem(named_by, f"the file {path} does not exist; the defaults stand."))
    except OSError as error:
        problems.append(SettingProblem(str(path), f"the file cannot be read: {error.strerror or error}."))
    except UnicodeDecodeError as error:
        problems.append(
            SettingProblem(str(path), f"the file is not UTF-8 (byte {error.start}); nothing in it is used.")
        )
    except tomllib.TOMLDecodeError as error:
        problems.append(SettingProblem(str(path), f"the file is not TOML: {error}; nothing in it is used."))
    return {}


def _environment_entries(env: Mapping[str, str], problems: list[SettingProblem]) -> Iterator[_Entry]:
    """The original's variables, then PLANPATCH_<NAME>; an empty variable is not set."""
    held = {name: text.strip() for name, text in env.items() if text.strip()}
    for name, entry in _FIELDS.items():
        variable = cast(str, entry.metadata["variable"])
        if variable in held:
            yield _Entry(name, held[variable], f"environment variable {variable}")
    yield from _quantization_entries(held, problems)
    yield from _generation_entries(held, problems)
    for variable in sorted(held):
        name = variable.removeprefix("PLANPATCH_").lower()
        if variable.startswith("PLANPATCH_") and name not in _NOT_SETTINGS:
            yield _Entry(name, held[variable], f"environment variable {variable}")


def _quantization_entries(held: Mapping[str, str], problems: list[SettingProblem]) -> Iterator[_Entry]:
    """QWEN_8BIT and QWEN_4BIT; when both are on, 4-bit is meant. 8-bit switched off is bf16."""
    for variable, when_on, when_off in (("QWEN_8BIT", "int8", "bf16"), ("QWEN_4BIT", "nf4", None)):
        if variable not in held:
            continue
        source = f"environment variable {variable}"
        try:
            value = when_on if values.boolean(held[variable]) else when_off
        except ValueError as error:
            problems.append(SettingProblem(source, f"{held[variable]!r} cannot be used: {error}."))
            continue
        if value is not None:
            yield _Entry("quantization", value, source)


def _generation_entries(held: Mapping[str, str], problems: list[SettingProblem]) -> Iterator[_Entry]:
    """GEN_PLAN and GEN_PATCH: a JSON object with the argument names of transformers' `generate`."""
    for variable, prefix in (("GEN_PLAN", "plan_"), ("GEN_PATCH", "patch_")):
        if variable not in held:
            continue
        source = f"environment variable {variable}"
        try:
            found: object = json.loads(held[variable])
        except ValueError as error:
            found = error
        if not isinstance(found, dict):
            why = f" ({found})" if isinstance(found, ValueError) else ""
            problems.append(SettingProblem(source, f"expected a JSON object{why}; it is ignored."))
            continue
        for key, name, value in _generate_arguments(cast("dict[str, object]", found)):
            yield _Entry(prefix + name, value, f"{source}: {key}")


def _generate_arguments(arguments: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Arguments of `generate` as `(argument, setting, value)`; greedy drops the sampling ones."""
    sampling = {"temperature", "top_k", "top_p"}
    greedy = arguments.get("do_sample") is False
    for key, value in arguments.items():
        if value is None or key == "do_sample" or (greedy and key in sampling):
            continue
        for name in ("max_time_gpu_s", "max_time_cpu_s") if key == "max_time" else (key,):
            yield key, name, value
    if greedy:
        yield "do_sample", "temperature", 0
    elif arguments.get("do_sample") is True and "temperature" not in arguments:
        yield "do_sample", "temperature", 1.0


def _table_entries(
    table: Mapping[str, object], source: str, spell: Callable[[str], str] = lambda key: key
) -> Iterator[_Entry]:
    """Entries of a table; inner tables are flattened into names, null is not set."""
    for key, value in table.items():
        name = _flat_name(key)
        if value is None:
            continue
        if name not in _FIELDS and isinstance(value, Mapping):
            inner = cast("Mapping[str, object]", value)
            for entry in _table_entries(inner, f"{source}{spell(key)}."):
                yield dataclasses.replace(entry, name=f"{name}_{entry.name}")
        else:
            yield _Entry(name, value, f"{source}{spell(key)}")


def _flat_name(key: str) -> str:
    """`maxNewTokens`, `max-new-tokens` and `plan.max_new_tokens` as setting names."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").replace(".", "_").lower()


def _as_option(name: str) -> str:
    return name.replace("_", "-")
