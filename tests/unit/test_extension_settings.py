"""The settings that the VS Code extension offers are the server's own, and it validates them as the server does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lsp_server.settings import _FIELDS, SETTING_NAMES, load_settings  # pyright: ignore[reportPrivateUsage]

EXTENSION = Path(__file__).resolve().parent.parent.parent / "vscode-extension"
MANIFEST = json.loads((EXTENSION / "package.json").read_text(encoding="utf-8"))
SETTINGS: dict[str, Any] = {
    name.removeprefix("planpatch."): schema
    for group in MANIFEST["contributes"]["configuration"]
    for name, schema in group["properties"].items()
}
DESCRIPTIONS = json.loads((EXTENSION / "package.nls.json").read_text(encoding="utf-8"))
OWN = re.search(r"OWN_SETTINGS = \[(.*?)\]", (EXTENSION / "src" / "settings.ts").read_text(encoding="utf-8"), re.DOTALL)
assert OWN is not None
SERVERS = [name for name in SETTINGS if f'"{name}"' not in OWN[1]]


def setting_of(name: str) -> str:
    """`planMaxNewTokens` as the server calls it."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def test_every_setting_of_the_server_is_offered_and_no_other() -> None:
    assert sorted(setting_of(name) for name in SERVERS) == sorted(SETTING_NAMES)


def test_what_a_workspace_may_not_set_is_the_machines() -> None:
    scopes = {setting_of(name): SETTINGS[name]["scope"] for name in SERVERS}
    may = {name for name in SETTING_NAMES if _FIELDS[name].metadata["workspace"] and name != "training_log"}
    assert {name for name, scope in scopes.items() if scope != "machine"} == may


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_takes_what_the_editor_lets_through(name: str) -> None:
    schema = SETTINGS[name]
    values = [value for value in schema.get("enum", ()) if value is not None]
    values += [schema[end] for end in ("minimum", "maximum") if end in schema and "string" not in schema["type"]]
    values += [True, False] if "boolean" in schema["type"] else []
    assert values or "pattern" in schema or name in ("presets", "origins"), "nothing is validated"
    for value in values:
        settings, problems = load_settings(lsp={name: value})
        assert problems == []
        assert getattr(settings, setting_of(name)) == value


@pytest.mark.parametrize("name", SERVERS)
def test_what_the_description_calls_the_default_is_the_servers(name: str) -> None:
    default = getattr(load_settings()[0], setting_of(name))
    said = re.search(r"Not set: `?([^`.,;]*(?:\.\d+)*)", DESCRIPTIONS[f"setting.{name}"])
    if name == "presets":
        return
    assert said is not None, DESCRIPTIONS[f"setting.{name}"]
    word = said[1].strip()
    if isinstance(default, bool):
        assert word == ("on" if default else "off")
    elif isinstance(default, (int, float)):
        assert float(word.replace("MB", "e6")) == default
    else:
        assert word == (default or "none") or (name, word) == ("logFile", "the output channel")
