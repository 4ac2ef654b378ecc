"""Real VS Code with the packed extension, the real server and the real 0.5B, driven as a user types and clicks.

Pictures of what is seen go to the folder that PLANPATCH_PICTURES names, for the documents; else to the test's own.

Not covered: the desktop application's own window and its file dialogs, Remote-SSH and dev containers, other platforms.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import planpatch, start
from tests.e2e.conftest import EXTENSION, MODEL, Start
from tests.editors.vscode import Installed
from tests.hub_server import Hub, environment_of, serve
from tests.learning import refuse_many
from tests.steering import PICTURES
from tests.training_model import make_base, row, write_config, write_rows
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
DATA = EXTENSION.parent / "tests" / "data"
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
        install_in_window(code, vsix)
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


def install_in_window(code: VSCode, vsix: Path) -> None:
    """Install an extension as a user does; the dialog overwrites what is typed while it lists a folder."""
    dialog, line = ".quick-input-widget", ".quick-input-list .monaco-list-row"
    code.run("Extensions: Install from VSIX")
    for _ in range(5):
        with suppress(AssertionError):
            code.wait_for(line, "..", 20)
            code.fill(str(vsix))
            code.wait_for(line, vsix.name, 10)
            code.press("Enter")
            code.wait_until_gone(dialog, limit_s=10)
        if not code.sees(dialog):
            break
    code.wait_for(TOAST, "Completed installing")


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
    shutil.copytree(DATA / "vscode-ruff", folder)
    (folder / "node_modules").symlink_to(EXTENSION / "node_modules")
    text = (
        (folder / "extension.js").read_text(encoding="utf-8").replace("RUFF", str(Path(sys.executable).parent / "ruff"))
    )
    (folder / "extension.js").write_text(text, encoding="utf-8")
    bundle = "require('esbuild').buildSync({entryPoints: ['extension.js'], bundle: true, platform: 'node',"
    bundle += " external: ['vscode'], outfile: 'out.js'})"
    run_node(installed, folder, "-e", bundle)
    return packed(installed, folder)


def an_extension(installed: Installed, name: str, folder: Path) -> Path:
    """An extension of the tests' own, from `tests/data`."""
    shutil.copytree(DATA / name, folder)
    (folder / "node_modules").symlink_to(EXTENSION / "node_modules")
    return packed(installed, folder)


def packed(installed: Installed, folder: Path) -> Path:
    """The .vsix of an extension's folder."""
    vsce = ["node_modules/@vscode/vsce/vsce", "package", "--no-dependencies", "--allow-missing-repository"]
    run_node(installed, folder, *vsce, "--skip-license", "--out", "packed.vsix")
    return folder / "packed.vsix"


def run_node(installed: Installed, folder: Path, *arguments: str) -> None:
    """Run Node.js in a folder."""
    command = [str(installed.node), *arguments]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.mark.long
def test_what_is_left_ticked_in_the_refactor_preview_is_applied(
    code: VSCode, workspace: Path, tmp_path: Path, picture: Picture
) -> None:
    file = workspace / "stats.py"
    file.write_text(STATS, encoding="utf-8")
    with code:
        code.open("stats.py")
        code.go_to(7)
        code.press("Control+Alt+P")
        code.answer("use += in the first loop and return a dictionary")
        write_plan(code, tmp_path, "Use += for total and count in the first loop.", "Return a dictionary, not a tuple.")
        code.press("Control+Alt+Enter")
        code.wait_for(LENS, "Accept", LONG_S)
        code.press("Control+1")
        assert len(code.texts(LENS, "Accept")) == 2
        code.run("PlanPatch: Apply Patch with Refactor Preview")
        line = ".bulk-edit-panel .monaco-list-row"
        code.wait_for(line, "return total, count, largest")
        wait_until(lambda: len(ticks(code)) == 3, "no boxes")  # the file's, and one for each hunk
        code.click(f"{line}[data-index='0'] .edit-checkbox")
        wait_until(lambda: ticks(code) == [True, True, True], "not all are ticked")
        code.click(f"{line}[data-index='2'] .edit-checkbox")
        wait_until(lambda: ticks(code)[1:] == [True, False], "the second hunk is still ticked")
        picture(code, "preview")
        assert code.editor_text() == STATS
        code.click(".bulk-edit-panel .monaco-button", "Apply")
        code.wait_for(TOAST, "applied to summary")
        patched = code.wait_for_editor(lambda text: text != STATS)
        first = STATS.replace("total = total + value", "total += value").replace("count = count + 1", "count += 1")
        assert patched == first
        picture(code, "preview-applied")
        code.press("Control+S")
        wait_until(lambda: file.read_text(encoding="utf-8") == first, "not saved")
    (entry,) = ledger(workspace)
    shown = planpatch("ledger", "show", entry["id"], "--json", cwd=workspace).json
    assert (entry["state"], len(shown["edits"]), shown["hunks"]) == ("applied", 2, [0])


def ticks(code: VSCode) -> list[bool]:
    """Which boxes of the refactor preview are ticked, from top to bottom."""
    rows = "[...document.querySelectorAll('.bulk-edit-panel .monaco-list-row')]"
    placed = f"{rows}.sort((one, other) => one.dataset.index - other.dataset.index)"
    return code.page.evaluate(f"{placed}.map((row) => row.querySelector('.edit-checkbox').matches('.checked'))")


@pytest.mark.long
def test_the_status_bar_follows_a_training_run_and_says_that_it_ended(
    code: VSCode, workspace: Path, tmp_path: Path, picture: Picture
) -> None:
    base = make_base(tmp_path / "tiny")
    config = write_config(tmp_path / "config.json", num_epochs=4, checkpoint_every_steps=1000)
    rows = write_rows(tmp_path / "train.jsonl", [row(number) for number in range(300)])
    val = write_rows(tmp_path / "val.jsonl", [row(number) for number in range(1000, 1006)])
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    with code:
        code.open("clamp.py")
        code.wait_for(STATUS, MODEL, LONG_S)
        code.run("PlanPatch: Show Status")
        arguments = (str(config), "--model", str(base), "--data", str(rows), "--val", str(val), "--device", "cpu")
        with start("train", "qlora", *arguments, cwd=tmp_path) as training:
            first = code.wait_for(STATUS, "training tiny-v1: step", LONG_S)
            code.wait_for(".pane-body .monaco-list-row", "training tiny-v1: step")
            code.wait_for(".pane-body .monaco-list-row", "Training holds the model's memory")
            picture(code, "training")
            wait_until(lambda: code.wait_for(STATUS, "training tiny-v1: step") != first, "it does not go on")
            said = training.communicate(timeout=LONG_S)
            assert training.returncode == 0, said
        code.wait_for(TOAST, "training tiny-v1 is done")
        code.wait_for(".pane-body .monaco-list-row", "training tiny-v1 is done")
        code.wait_for(STATUS, MODEL, LONG_S)  # its memory came back
        picture(code, "training-done")


@pytest.mark.long
def test_a_user_who_reads_korean_is_spoken_to_in_korean(
    code: VSCode, vscode_installed: Installed, workspace: Path, tmp_path: Path, picture: Picture
) -> None:
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    language_pack = an_extension(vscode_installed, "vscode-korean", tmp_path / "korean")
    with code:
        code.wait_for_extensions()
        install_in_window(code, language_pack)
        code.run("Configure Display Language")
        code.click(".quick-input-list .monaco-list-row", "한국어")
        code.click(".monaco-dialog-box .monaco-button", "Restart")
        code.wait_for(".composite.title", "탐색기")
        code.open("clamp.py")
        code.run("PlanPatch: 실행 중인 작업 취소")
        code.wait_for(TOAST, "실행 중인 작업이 없습니다.")
        picture(code, "korean")
        code.go_to(5)
        code.press("Control+Alt+P")
        code.wait_for(".quick-input-widget", "변경 계획 세우기")
        code.answer("return low when x is too small")
        code.wait_for(LENS, "이 계획으로 패치 만들기", LONG_S)
        code.run("PlanPatch: 상태 보기")
        code.wait_for(".pane-header", "기록부")
        code.wait_for(".pane-body .monaco-list-row", "모델")
        picture(code, "korean-plan")


@pytest.mark.long
def test_the_ledger_view_shows_more_on_demand_and_its_filter_looks_at_all(
    code: VSCode, workspace: Path, home: Path, picture: Picture
) -> None:
    file = workspace / "clamp.py"
    file.write_text(CLAMP, encoding="utf-8")
    refuse_many(home / "ledger.sqlite3", file, 501)  # one more than the view asks for at once
    line = ".pane-body .monaco-list-row"
    with code:
        code.open("clamp.py")
        code.run("PlanPatch: Open Ledger")
        code.click(line, "wish no500,")
        to_the_end(code, line)
        code.wait_for(line, "Show more")
        assert code.sees(line, "wish no1,") and not code.sees(line, "wish no0,")
        picture(code, "ledger-more")

        code.run("PlanPatch: Filter Ledger")
        code.answer("WISH no0")
        code.wait_for(".quick-input-list .monaco-list-row", "diverged")
        code.press("Enter")
        code.wait_for(line, "wish no0,")
        assert not code.sees(line, "wish no1,") and not code.sees(line, "Show more")
        picture(code, "ledger-filtered")

        code.run("PlanPatch: Clear Ledger Filter")
        code.click(line, "wish no499,")
        to_the_end(code, line)
        code.click(line, "Show more")
        code.wait_until_gone(line, "Show more")
        to_the_end(code, line)
        code.wait_for(line, "wish no0,")


def to_the_end(code: VSCode, line: str) -> None:
    """Go to the last line of the tree in focus, also while what was opened in it still grows."""

    def is_there() -> bool:
        before = code.texts(line)
        code.press("End")
        time.sleep(0.5)
        return code.texts(line) == before

    wait_until(is_there, "the tree does not come to rest")


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
def test_in_an_untrusted_workspace_nothing_starts_and_commands_say_why_until_trust_is_granted(
    start_code: Start,
    vsix: Path,
    vscode_installed: Installed,
    workspace: Path,
    home: Path,
    tmp_path: Path,
    model_folder_05b: Path,
    picture: Picture,
) -> None:
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    interpreter, ran = workspace / ".venv" / "bin" / "python", tmp_path / "ran"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f"#!/bin/sh\necho ran >>'{ran}'\nexec '{sys.executable}' \"$@\"\n", encoding="utf-8")
    interpreter.chmod(0o755)
    chosen = {"planpatch.useInterpreter": True}
    code = start_code({"PATH": os.environ["PATH"]}, settings=chosen, asks_trust=True)  # on PATH there is no planpatch
    code.install(vsix)
    code.install(an_extension(vscode_installed, "vscode-interpreter", tmp_path / "chooser"))
    held = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    with code:
        code.wait_for(STATUS, "Restricted Mode")
        code.open("clamp.py")
        wait_until(lambda: "activated in" in code.log_of("PlanPatch"), "the extension is not active")
        code.go_to(5)
        for ask in (
            lambda: code.press("Control+Alt+P"),
            lambda: code.run("PlanPatch: Make a Patch"),
            lambda: code.run("PlanPatch: Roll Back the Last Patch of This File"),
            lambda: code.run("PlanPatch: Restart Server"),
        ):
            ask()
            assert "until you trust it, nothing is planned" in code.wait_for(TOAST, "not trusted")
            code.wait_until_gone(".quick-input-widget")  # the palette; nothing is asked for
            picture(code, "untrusted")
            code.run("Notifications: Clear All Notifications")
            code.wait_until_gone(TOAST)
        code.run("PlanPatch: Show Status")
        code.wait_for(".welcome-view-content", "not trusted")
        picture(code, "untrusted-views")
        assert servers(code) == [] and not ran.exists()
        assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == held
        assert not (home / "ledger.sqlite3").exists()

        code.click(".welcome-view-content .monaco-button", "Manage Workspace Trust")
        code.click(".workspace-trust-editor .monaco-button", "Trust")
        wait_until(lambda: f"from {interpreter} (interpreter)" in code.log_of("PlanPatch"), "no server was started")
        assert ran.exists() and len(servers(code)) == 1
        code.open("clamp.py")
        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(".tab", "clamp-clamp.md", LONG_S)
        code.wait_for(LENS, "Patch from this plan", LONG_S)


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


@pytest.mark.long
def test_a_download_is_cancelled_and_the_rest_comes_later(
    start_code: Start, vsix: Path, workspace: Path, home: Path, tmp_path: Path, picture: Picture
) -> None:
    (home / "models").unlink()
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    base = make_base(tmp_path / "base", hidden_size=1024, shards="30MB")
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    first, second = sorted(name for name in files if name.endswith(".safetensors"))
    with serve(Hub({"org/tiny": files}, pause_s=1.0, slow=second)) as hub:
        own = {"PLANPATCH_MODEL": "org/tiny", "PLANPATCH_HTTP": "false"}  # a message about a port moves the buttons
        code = start_code({**own, **environment_of(hub, tmp_path / "cache")})
        code.install(vsix)
        with code:
            code.open("clamp.py")
            code.wait_for(TOAST, "not on this machine")
            code.click(f"{TOAST} .monaco-button", "Download Model")
            code.run("PlanPatch: Show Status")
            code.wait_for(STATUS, "Fetching org/tiny from the hub (")
            code.wait_for(".pane-body .monaco-list-row", "Fetching org/tiny from the hub (")
            partial = home / "models" / ".org--tiny.partial" / "hub" / first
            wait_until(lambda: partial.is_file() and hub.sent_bytes > 0, "it does not arrive")
            picture(code, "download")
            code.run("PlanPatch: Cancel a Running Job")
            code.wait_for(STATUS, "no model yet")
            code.wait_for(".pane-body .monaco-list-row", "what arrived whole is kept")
            wait_until(lambda: not workers(code), "the download goes on", 10)
            assert not code.sees(TOAST, "not on this machine")
            picture(code, "download-cancelled")

            hub.pause_s = 0.0
            code.run("PlanPatch: Download a Model")
            code.click(".quick-input-list .monaco-list-row", "org--tiny")
            wait_until(lambda: (home / "models" / "org--tiny" / second).is_file(), "no model came")
            code.wait_for(STATUS, "org--tiny")
            assert sorted(hub.sent) == [first, second, second]


def workers(code: VSCode) -> list[psutil.Process]:
    """The processes that fetch a model."""
    children = psutil.Process(code.process_id).children(recursive=True)
    return [child for child in children if "store_worker.py" in " ".join(_command_line(child))]


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
