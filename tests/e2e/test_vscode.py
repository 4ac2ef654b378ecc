"""Real VS Code with the packed extension, the real server and the real 0.5B, driven as a user types and clicks.

Pictures of what is seen go to the folder that PLANPATCH_PICTURES names, for the documents; else to the test's own.

Not covered: the desktop application's own window and its file dialogs, Remote-SSH and dev containers, other platforms.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import planpatch
from tests.e2e.conftest import EXTENSION, MODEL, Start
from tests.editors.vscode import Installed
from tests.steering import PICTURES
from tests.vscode import VSCode, wait_until

STATS = '''"""Numbers."""


def summary(values):
    total = 0
    count = 0
    for value in values:
        total = total + value
        count = count + 1

    largest = values[0]
    for value in values:
        if value > largest:
            largest = value

    return total, count, largest


EMPTY = (0, 0, None)  # Größe 0
'''
CLAMP = '''"""Numbers."""


def clamp(x, low, high):
    if x < low:
        return high
    return min(x, high)
'''
TOAST = ".notification-toast"
LENS = ".codelens-decoration a"
MARK = f"{LENS} .codicon-check"
STATUS = ".statusbar-item"
Picture = Callable[[VSCode, str], Path]
LONG_S = 300.0  # for what the model writes, on a machine that does other things too


@pytest.fixture
def code(start_code: Start, vsix: Path, model_folder_05b: Path) -> VSCode:
    """A VS Code that has the extension; the test starts it."""
    code = start_code()
    code.install(vsix)
    return code


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Keeps a picture of the window."""
    folder = Path(PICTURES) if PICTURES else tmp_path
    return lambda code, name: code.picture(folder / f"{name}.png")


def servers(code: VSCode) -> list[psutil.Process]:
    """The language servers that this VS Code started."""
    children = psutil.Process(code.process_id).children(recursive=True)
    return [child for child in children if child.is_running() and "lsp_server" in _command_line(child)]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def tokens(code: VSCode, stage: str) -> int:
    """How many tokens of a plan or a patch the status bar tells of; 0 for none."""
    found = re.search(rf"{stage}: (\d+) tokens", " ".join(code.texts(STATUS)))
    return int(found[1]) if found else 0


def ledger(folder: Path) -> list[dict[str, Any]]:
    return planpatch("ledger", "list", "--json", cwd=folder).json


def long_function() -> str:
    """A function whose rewriting takes a while."""
    branches = (f"    if x == {number}:\n        return table[{number}] + {number}\n" for number in range(60))
    return f"\n\ndef long(x, table):\n{''.join(branches)}    return None\n"


# --- what it weighs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_extension_is_small_and_brings_nothing_but_itself(vsix: Path, record_figure: Callable[..., None]) -> None:
    size = vsix.stat().st_size
    record_figure("vsix", size, "bytes")
    assert size < 1_000_000
    with zipfile.ZipFile(vsix) as archive:
        names = archive.namelist()
    assert "extension/out/extension.js" in names
    unwanted = ("node_modules", "/src/", "/test/", ".map", "package-lock", ".ts")
    assert [name for name in names if any(part in name for part in unwanted)] == []


# --- from an intent to a roll-back -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_function_is_planned_patched_by_hunk_undone_and_rolled_back_after_a_restart(
    start_code: Start, vsix: Path, workspace: Path, model_folder_05b: Path, picture: Picture, tmp_path: Path
) -> None:
    file = workspace / "stats.py"
    file.write_text(STATS, encoding="utf-8")
    code = start_code(settings={"breadcrumbs.enabled": False})
    with code:
        code.wait_for_extensions()
        code.run("Extensions: Install from VSIX")
        code.wait_for(
            ".quick-input-list .monaco-list-row", ".."
        )  # until its folder is listed it overwrites what is typed
        code.fill(str(vsix))
        code.wait_for(".quick-input-list .monaco-list-row", vsix.name)
        code.press("Enter")
        code.wait_for(TOAST, "Completed installing")
        assert servers(code) == []
        code.open("stats.py")
        code.run("Notifications: Clear All Notifications")

        code.go_to(7)
        code.press("Control+Alt+P")
        code.wait_for(".quick-input-widget", "plan a change to summary")
        code.type("use += in the first loop and return a dictionary")
        picture(code, "1-intent")
        code.press("Enter")
        write_plan(code, tmp_path, "Use += for total and count in the first loop.", "Return a dictionary, not a tuple.")
        picture(code, "2-plan")
        code.press("Control+Alt+Enter")
        code.wait_for(LENS, "Accept", LONG_S)
        code.wait_for(".tab.active", "(PlanPatch)")
        code.press("Control+1")
        code.go_to(7)
        picture(code, "3-review")
        assert "<<<<<<<" not in code.page.text() and code.editor_text() == STATS

        hunks = len(code.texts(LENS, "Accept"))
        for hunk in range(hunks):  # accept the first, and none of the others
            line = code.wait_for(STATUS, "Ln ")
            code.press("Control+Alt+]")
            wait_until(lambda before=line: code.wait_for(STATUS, "Ln ") != before, "the cursor stays")
            code.press("Control+Alt+N" if hunk else "Control+Alt+Y")
            wait_until(lambda n=hunk: len(code.texts(MARK)) > n or code.sees(TOAST, "applied"), "no mark on the hunk")
        code.wait_for(TOAST, "applied to summary")
        patched = code.wait_for_editor(lambda text: text != STATS)
        assert "total += value" in patched and "return total, count, largest" in patched
        picture(code, "4-applied")
        code.press("Control+Z")
        code.wait_for_editor(lambda text: text == STATS)
        code.press("Control+Y")
        code.wait_for_editor(lambda text: text == patched)
        code.press("Control+S")
        wait_until(lambda: file.read_text(encoding="utf-8") == patched, "not saved")
        assert code.log_of("PlanPatch").count("planpatch 0") == 1  # one server, though it was asked while it started
        assert "Traceback" not in code.log_of("PlanPatch")

    (entry,) = ledger(workspace)
    assert (entry["state"], entry["scope"]) == ("applied", "summary")
    shown = planpatch("ledger", "show", entry["id"], "--json", cwd=workspace).json
    assert "Return a dictionary, not a tuple." in shown["plan_text"] and shown["hunks"] == [0]

    with code:
        code.open("stats.py")
        code.wait_for_editor(lambda text: text == patched)
        code.run("PlanPatch: Roll Back the Last Patch of This File")
        code.wait_for_editor(lambda text: text == STATS)
        picture(code, "5-rolled-back")
        code.press("Control+S")
        wait_until(lambda: file.read_bytes() == STATS.encode(), "the file is not what it was")
        wait_until(lambda: ledger(workspace)[0]["state"] == "rolled_back", "the roll-back is not recorded")
    assert [entry["state"] for entry in ledger(workspace)] == ["rolled_back"]
    film(tmp_path if not PICTURES else Path(PICTURES))


def write_plan(code: VSCode, tmp_path: Path, *steps: str) -> None:
    """Wait for the plan, and write other steps over its own."""
    code.wait_for(LENS, "Patch from this plan", LONG_S)
    code.wait_for(STATUS, "Markdown")
    (plan,) = tmp_path.rglob("plans/*.md")
    lines = plan.read_text(encoding="utf-8").splitlines()
    code.go_to(1 + lines.index("## Plan") + 2)
    code.press("Control+Shift+End", "Delete")
    code.type("\n".join(f"- {step}" for step in steps))


def film(folder: Path) -> None:
    """The numbered pictures of a folder as one that moves."""
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("[0-9]-*.png"))]
    small = [
        one.resize((960, 600), Image.Resampling.LANCZOS).quantize(64, dither=Image.Dither.NONE) for one in pictures
    ]
    target = folder / "planpatch.gif"
    small[0].save(target, save_all=True, append_images=small[1:], duration=2500, loop=0, optimize=True)
    assert len(small) == 5 and target.stat().st_size < 1_000_000


@pytest.mark.long
def test_a_job_is_cancelled_while_the_model_writes(code: VSCode, workspace: Path, picture: Picture) -> None:
    file = workspace / "long.py"
    file.write_text(CLAMP + long_function(), encoding="utf-8")
    with code:
        code.open("long.py")
        code.go_to(12)
        code.run("PlanPatch: Make a Patch")
        code.wait_for(".quick-input-widget", "make a patch")
        code.answer("rename x to value")
        code.wait_for(STATUS, "PATCH", LONG_S)
        wait_until(lambda: tokens(code, "PATCH") > 9, "no tokens", LONG_S)
        picture(code, "generating")
        code.run("PlanPatch: Cancel a Running Job")
        code.wait_until_gone(STATUS, "PATCH")
        assert file.read_text(encoding="utf-8") == CLAMP + long_function()

        code.go_to(5)  # what comes next is served at once
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(LENS, "Patch from this plan", LONG_S)
    assert [entry for entry in ledger(workspace) if entry["scope"] == "long"] == []


@pytest.mark.long
def test_a_diagnostic_of_a_linter_is_fixed_from_the_lightbulb(
    code: VSCode, vscode_installed: Installed, workspace: Path, tmp_path: Path, picture: Picture
) -> None:
    code.install(a_linter(vscode_installed, tmp_path / "linter"))
    old = "def area(width, height):\n    return widht * height\n"
    (workspace / "shapes.py").write_text(old, encoding="utf-8")
    with code:
        code.open("shapes.py")
        code.wait_for(".squiggly-error, .squiggly-warning")
        code.go_to(2, 13)
        code.choose_code_action("PlanPatch: fix: Undefined name `widht`", then=lambda: picture(code, "lightbulb"))
        code.wait_for(LENS, "Accept", LONG_S)
        code.click(LENS, "Accept")
        code.wait_for_editor("return width * height")
        code.wait_until_gone(".squiggly-error, .squiggly-warning")


def a_linter(installed: Installed, folder: Path) -> Path:
    """An extension that is nothing but ruff's own language server, so that diagnostics come from elsewhere."""
    shutil.copytree(EXTENSION.parent / "tests" / "data" / "vscode-ruff", folder)
    modules = folder / "node_modules"
    modules.symlink_to(EXTENSION / "node_modules")
    text = (
        (folder / "extension.js").read_text(encoding="utf-8").replace("RUFF", str(Path(sys.executable).parent / "ruff"))
    )
    (folder / "extension.js").write_text(text, encoding="utf-8")
    bundle = "require('esbuild').buildSync({entryPoints: ['extension.js'], bundle: true, platform: 'node',"
    bundle += " external: ['vscode'], outfile: 'out.js'})"
    node = str(installed.node)
    vsce = [node, "node_modules/@vscode/vsce/vsce", "package", "--no-dependencies", "--allow-missing-repository"]
    for command in ([node, "-e", bundle], [*vsce, "--skip-license", "--out", "linter.vsix"]):
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "linter.vsix"


@pytest.mark.long
def test_a_refused_patch_says_why_and_is_tried_again(
    start_code: Start, vsix: Path, workspace: Path, model_folder_05b: Path, picture: Picture
) -> None:
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    too_few = {"planpatch.patchMaxNewTokens": 1, "planpatch.patchTokensPerFunctionToken": 1}
    code = start_code(settings={**too_few, "planpatch.patchExtraTokens": 0})
    code.install(vsix)
    with code:
        code.open("clamp.py")
        code.go_to(4)
        code.run("PlanPatch: Make a Patch")
        code.wait_for(".quick-input-widget", "make a patch")
        code.answer("add type hints and a long docstring")
        said = code.wait_for(TOAST, "limit of", LONG_S)
        picture(code, "refused")
        assert "tokens" in said and code.editor_text() == CLAMP
        assert code.sees(".squiggly-info")

        code.set({})
        code.click(f"{TOAST} .monaco-button", "Retry with Feedback")
        code.answer("add type hints only")
        code.wait_for(LENS, "Accept", LONG_S)
        code.press("Control+1")
        wait_until(lambda: code.editor_text() == CLAMP, "the text is another already")
        code.press("Control+Alt+Enter")
        code.wait_for_editor(lambda text: text != CLAMP)
        code.wait_until_gone(".squiggly-info")
    assert [entry["state"] for entry in ledger(workspace)] == ["applied", "refused"]


@pytest.mark.long
def test_the_views_show_model_and_ledger_and_roll_back(code: VSCode, workspace: Path, picture: Picture) -> None:
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    with code:
        code.open("clamp.py")
        code.go_to(5)
        code.run("PlanPatch: Make a Patch")
        code.wait_for(".quick-input-widget", "make a patch")
        code.answer("return low when x is too small")
        code.wait_for(LENS, "Accept", LONG_S)
        code.press("Control+1", "Control+Alt+Enter")
        code.wait_for_editor(lambda text: text != CLAMP)
        code.run("PlanPatch: Open Ledger")
        code.wait_for(".pane-body .monaco-list-row", MODEL)
        code.click(".pane-body .monaco-list-row", "clamp.py")
        code.press("ArrowRight")
        code.wait_for(".pane-body .monaco-list-row", "return low")
        picture(code, "views")
        code.click(f"{TOAST} .monaco-button", "Roll Back")
        code.wait_for_editor(lambda text: text == CLAMP)
    (entry,) = ledger(workspace)
    assert entry["state"] == "rolled_back"


# --- when something is not there -------------------------------------------------------------------------------------


@pytest.mark.long
def test_nothing_starts_before_a_python_file_is_open_and_a_server_that_is_killed_comes_back(
    code: VSCode, workspace: Path
) -> None:
    (workspace / "notes.md").write_text("# Notes\n", encoding="utf-8")
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    with code:
        code.open("notes.md")
        code.wait_for_extensions()
        assert servers(code) == []

        code.open("clamp.py")
        wait_until(lambda: "planpatch 0" in code.log_of("PlanPatch"), "no server was started")
        (first,) = servers(code)
        first.kill()
        (second,) = wait_until(lambda: [one for one in servers(code) if one.pid != first.pid], "no server came back")
        assert second.pid != first.pid

        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(".tab", "clamp-clamp.md", 120)


@pytest.mark.long
def test_a_model_that_is_not_there_is_told_and_one_click_gets_it(
    start_code: Start,
    vsix: Path,
    workspace: Path,
    home: Path,
    tmp_path: Path,
    model_folder_05b: Path,
    picture: Picture,
) -> None:
    (home / "models").unlink()
    cache = a_hub_cache(tmp_path / "hub", model_folder_05b)
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    code = start_code({"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    code.install(vsix)
    with code:
        code.open("clamp.py")
        said = code.wait_for(TOAST, "not on this machine")
        picture(code, "model-missing")
        assert MODEL in said
        assert len(code.texts(TOAST, "not on this machine")) == 1
        code.click(f"{TOAST} .monaco-button", "Download Model")
        wait_until(lambda: (home / "models" / MODEL / "model.safetensors").is_file(), "no model came", 120)
        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(".tab", "clamp-clamp.md", 120)


def a_hub_cache(folder: Path, model: Path) -> Path:
    """The cache that the hub's own library would have after fetching the model: what "pull" takes first."""
    from engine.inference.catalogue import resolve

    known = resolve(MODEL)
    assert known.hub_id is not None and known.revision is not None
    snapshot = folder / f"models--{known.hub_id.replace('/', '--')}" / "snapshots" / known.revision
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != "planpatch-model.json":
            (snapshot / file.name).symlink_to(file)
    return folder
