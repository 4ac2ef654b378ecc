"""What the README shows is what happens: its commands are run, its settings read, its tables and links checked.

Blocks to run stand after the comment `<!-- runs -->`; they run in order, in one folder that holds the README's own
`bits.py`. `PLAN_ID` and `PATCH_ID` stand for the newest plan and patch of the ledger.
"""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest

from engine.errors import PlanPatchError
from engine.inference.catalogue import catalogue
from lsp_server.console import READER_GONE
from lsp_server.demo import BROKEN, INTENT
from lsp_server.settings import load_settings
from tests.command_line import count_bits, planpatch

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "qwen2.5-coder-0.5b-instruct"
LEDGER = ("ledger list", "ledger rollback", "ledger accept", "ledger prune", "ledger export")


def blocks(mark: str) -> list[str]:
    """The fenced blocks that follow `<!-- mark -->`."""
    return re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("runs") for line in block.splitlines()]


def newest_ids(folder: Path) -> dict[str, str]:
    """What PLAN_ID and PATCH_ID stand for now."""
    patches = planpatch("ledger", "list", "--json", cwd=folder).json
    return {"PATCH_ID": patches[0]["id"]} if patches else {}


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder_05b: Path
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    for stage in ("PLAN", "PATCH"):  # a busy machine is no fault of what is tested here
        monkeypatch.setenv(f"PLANPATCH_{stage}_MAX_TIME_CPU_S", "3600")
    (broken,) = blocks("file: bits.py")
    file = tmp_path / "bits.py"
    file.write_text(broken, encoding="utf-8", newline="\n")

    ids: dict[str, str] = {}
    texts: dict[str, str] = {}
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "planpatch", command
        said = planpatch(*(ids.get(argument, argument) for argument in arguments), cwd=tmp_path)
        assert said.code == 0, f"{command}\n{said.out}\n{said.err}"
        ids |= newest_ids(tmp_path)
        if plan := re.search(r"\bpl_\w+", said.err):
            ids["PLAN_ID"] = plan.group()
        texts[command] = file.read_text(encoding="utf-8")

    written = next(text for command, text in texts.items() if command.endswith("--write"))
    assert count_bits(written, 127) == 7
    assert texts["planpatch ledger rollback PATCH_ID"] == broken
    assert texts["planpatch ledger redo PATCH_ID"] == written
    assert texts[COMMANDS[0]] == broken


def test_the_commands_cover_what_the_readme_promises() -> None:
    subcommands = {command.split()[1] for command in COMMANDS}
    assert {"plan", "patch", "ledger", "models", "doctor"} <= subcommands
    assert {command.split()[2] for command in COMMANDS if " ledger " in command} == (
        {"list", "show", "rollback", "redo", "reject"}
    )


def test_every_option_that_the_readme_names_exists(tmp_path: Path) -> None:
    helped = "".join(
        planpatch(*command.split(), "--help", cwd=tmp_path).out
        for command in ("", "plan", "patch", "lsp", "serve", "demo", "doctor", "bench", "bench cases", *LEDGER)
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"pip install [^\n]*", "", README)))
    assert {option for option in named if option not in helped} == set()


def test_the_settings_of_the_readme_can_be_used(tmp_path: Path) -> None:
    (text,) = blocks("settings")
    (tmp_path / "planpatch.toml").write_text(text, encoding="utf-8")
    settings, problems = load_settings(user_toml=tmp_path / "planpatch.toml")
    assert problems == []
    assert (settings.plan_max_new_tokens, settings.patch_max_time_cpu_s) == (24, 300)
    assert set(settings.presets) == {"docstring", "type-hints", "error-handling", "simplify", "logging"}


def test_every_variable_that_the_readme_names_is_read() -> None:
    environment = {
        "PLANPATCH_MODEL": MODEL,
        "PLANPATCH_PATCH_MAX_TIME_CPU_S": "9",
        "PLANPATCH_ROOT": "/code",
        "QWEN_4BIT": "1",
        "QWEN_8BIT": "1",
        "TORCH_DTYPE": "bf16",
        "ADAPTER_PATH": "__none__",
        "CTX_LIMIT": "7",
        "OLLAMA_CTX_CHARS": "8",
        "GEN_PLAN": '{"max_new_tokens": 5}',
        "GEN_PATCH": '{"max_new_tokens": 6}',
    }
    assert [name for name in environment if f"`{name}`" not in README] == []
    settings, problems = load_settings(env=environment)
    assert problems == []
    values = (settings.model, settings.patch_max_time_cpu_s, settings.root, settings.quantization, settings.dtype)
    assert values == (MODEL, 9, "/code", "nf4", "bfloat16")
    assert (settings.adapter, settings.context_tokens, settings.surroundings_chars) == ("__none__", 7, 8)
    assert (settings.plan_max_new_tokens, settings.patch_max_new_tokens) == (5, 6)


def test_the_table_of_models_is_the_catalogue_s() -> None:
    rows = re.findall(
        r"^\| `([\w.-]+)` \| [^|]+ \| ([\d.]+) GB( in 8 bit)? \| [^|]+ \| ([^|]+) \|", README, re.MULTILINE
    )
    shown = {name: (float(memory), quantized, sources.strip()) for name, memory, quantized, sources in rows}
    words = {"hub": "hub", "pypi": "PyPI"}
    expected = {
        entry.name: (
            round(entry.memory_bytes["int8" if shown.get(entry.name, ("", ""))[1] else "bf16"] / 1e9, 1),
            shown.get(entry.name, ("", ""))[1],
            ", ".join(words[source] for source in entry.sources if source in words),
        )
        for entry in catalogue().values()
    }
    assert shown == expected
    assert {entry.licence for entry in catalogue().values()} == {"Apache-2.0"}


def test_the_table_of_exit_codes_holds_every_code_of_an_error() -> None:
    def kinds(error: type[PlanPatchError]) -> set[int]:
        return {error.exit_code}.union(*(kinds(child) for child in error.__subclasses__()))

    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert shown == {0, 130, READER_GONE} | kinds(PlanPatchError)


def test_files_that_the_readme_links_to_exist() -> None:
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    folders = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.MULTILINE)) - set(catalogue())
    assert {name for name in links | folders if not (ROOT / name).exists()} == set()
    assert "docs/demo.svg" in links
    assert (ROOT / "docs" / "demo.svg").stat().st_size < 200_000


def test_the_recorded_session_shows_the_demo_of_today() -> None:
    (session,) = blocks("recorded")
    assert BROKEN.rstrip() in session
    assert f"What we want: {INTENT}" in session
    assert "byte for byte" in session
    picture = html.unescape((ROOT / "docs" / "demo.svg").read_text(encoding="utf-8")).replace("\xa0", " ")
    assert INTENT in picture
    assert "byte for byte" in picture
