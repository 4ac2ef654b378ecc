"""Real Emacs, without a display, with `planpatch lsp` and the real 0.5B: what docs/editors/emacs.md promises.

Each flow is Emacs Lisp over emacs_driver.el; Emacs is set up by the very blocks of the guide. `python
tests/editors/install_emacs.py` installs Emacs on Debian.

Not covered: Emacs with a display, its mouse menus, and a person's timing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import installed_launcher, planpatch
from tests.editors.install_emacs import missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "editors" / "emacs.md"
DRIVER = Path(__file__).with_name("emacs_driver.el")
LIMIT_S = 600
CLAMP = '''\
"""Keeping numbers in their bounds 🙂."""

import os


def clamp(x, low, high):
    if x < low:
        return high
    return min(x, high)


def after():
    return os.name
'''
DIRECTIVE = "    # pp: return low when x is too small\n"
INTENT = "return low when x is too small"

Emacs = Callable[..., dict[str, Any]]


def guide_blocks(heading: str) -> str:
    """The Emacs Lisp that the guide shows below a heading."""
    section = re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{heading}\n")]
    return "\n".join(re.findall(r"```elisp\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="session")
def installed() -> None:
    """Skip where there is no Emacs; where CI is set it has to be there."""
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}: python tests/editors/install_emacs.py", pytrace=False)
    if reason:
        pytest.skip(f"{reason}: python tests/editors/install_emacs.py installs it")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "a workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def emacs(
    installed: None,
    workspace: Path,
    tmp_path: Path,
    home: Path,
    model_folder_05b: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Emacs:
    """`emacs(flow)` runs Emacs until the flow's end and returns what it said."""
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    for stage in ("PLAN", "PATCH"):  # a busy machine is no fault of what is tested here
        monkeypatch.setenv(f"PLANPATCH_{stage}_MAX_TIME_CPU_S", "3600")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("PATH", str(installed_launcher().parent), prepend=os.pathsep)

    def run(flow: str, *, client: str = "Eglot", settings: str = "") -> dict[str, Any]:
        files = {"configuration.el": f"{guide_blocks(client)}\n{settings}", "flow.el": f"{flow}\n(drive-end)"}
        command = ["emacs", "-Q", "--batch", "-l", str(DRIVER)]
        for name, text in files.items():
            (tmp_path / name).write_text(f";; -*- lexical-binding: t; -*-\n{text}\n", encoding="utf-8")
            command += ["-l", str(tmp_path / name)]
        done = subprocess.run(
            command, cwd=workspace, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=LIMIT_S
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
        said = {line["name"]: line["value"] for line in lines}
        seen = "\n".join(map(str, said.get("failed", [done.stdout, done.stderr])))
        assert done.returncode == 0, f"Emacs ended with {done.returncode}\n{seen}\n{done.stderr[-3000:]}"
        return said

    return run


def ledger(workspace: Path) -> list[dict[str, Any]]:
    """Every proposal, newest first."""
    said = planpatch("ledger", "list", "--json", cwd=workspace)
    assert said.code == 0, said.err
    return said.json


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def assert_only_clamp_changed(before: str, after: str) -> None:
    """`clamp` is another, still a function of the same name, and nothing around it changed."""
    above, rest = before.split("def clamp", 1)
    below = rest[rest.index("\n\n\ndef after") :]
    assert after != before
    assert after.startswith(above + "def clamp(")
    assert after.endswith(below)
    assert after.count("def after") == 1
    compile(after, "<patched>", "exec")


def test_plan_edited_patched_saved_and_rolled_back_in_another_emacs(emacs: Emacs, workspace: Path) -> None:
    written = CLAMP.replace("    if x < low", DIRECTIVE + "    if x < low")
    file = write(workspace / "clamp.py", written)
    said = emacs(
        """
        (drive-open "clamp.py")
        (drive-goto "if x < low")
        (drive-choose "PlanPatch: plan a change to .clamp.")
        (let ((plan (drive-message "edit it in \\\\(.*[.]md\\\\))")))
          (drive-say "plan" plan)
          (with-current-buffer (find-file-noselect plan)
            (goto-char (point-max))
            (insert "- leave everything else as it is\\n")
            (save-buffer)))
        (drive-expect "PlanPatch has a patch for clamp" "Apply")
        (drive-changing (drive-choose "PlanPatch: patch from plan: "))
        (drive-rest)
        (drive-say "modified" (buffer-modified-p))
        (drive-say "text" (drive-text))
        (save-buffer)
        """
    )
    plan = Path(said["plan"]).read_text(encoding="utf-8")
    assert f"## Intent\n\n{INTENT}\n" in plan
    assert plan.endswith("- leave everything else as it is\n")
    assert said["modified"] is True
    assert "# pp:" not in said["text"]
    assert_only_clamp_changed(written, said["text"])
    assert file.read_text(encoding="utf-8") == said["text"]
    (patch,) = ledger(workspace)
    assert (patch["state"], patch["is_applied"], patch["surface"]) == ("applied", True, "lsp")
    shown = planpatch("ledger", "show", patch["id"], "--json", cwd=workspace).json
    assert "leave everything else as it is" in json.dumps(shown)

    said = emacs(
        """
        (drive-open "clamp.py")
        (drive-goto "def clamp")
        (drive-changing (drive-choose "PlanPatch: roll back: "))
        (drive-rest)
        (drive-wait-until "redo in the menu" (cl-find-if (lambda (one) (string-match-p ": redo: " one)) (drive-menu)))
        (drive-say "text" (drive-text))
        (save-buffer)
        """
    )
    assert said["text"] == written
    assert file.read_text(encoding="utf-8") == written
    (patch,) = ledger(workspace)
    assert (patch["state"], patch["label"], patch["is_applied"]) == ("rolled_back", "rolled_back", False)


@pytest.mark.long
def test_a_question_put_off_an_edit_declined_then_applied_and_undone(emacs: Emacs, workspace: Path) -> None:
    """C-g answers nothing at all: eglot sends no response then, and the patch must still be offered."""
    file = write(workspace / "clamp.py", CLAMP)
    said = emacs(
        f"""
        (drive-open "clamp.py")
        (drive-goto "def clamp")
        (drive-expect "PlanPatch has a patch for clamp" 'quit)
        (planpatch-patch "{INTENT}")
        (drive-asked "PlanPatch has a patch for clamp")
        (drive-rest)
        (drive-say "put-off" (drive-text))
        (drive-say "note" (drive-note "patch waits"))

        (setq eglot-confirm-server-initiated-edits 'confirm)
        (drive-expect "Server wants to edit" "no")
        (drive-choose "PlanPatch: Apply: ")
        (drive-message "User cancelled server edit")
        (drive-rest)
        (drive-say "declined" (drive-text))

        (drive-expect "Server wants to edit" "yes")
        (drive-changing (drive-choose "PlanPatch: Apply: "))
        (drive-wait-until "the note's end" (not (drive-notes)))
        (drive-rest)
        (drive-say "applied" (drive-text))
        (drive-idle 1)
        (shell-command "planpatch ledger list --json > applied.json")

        (drive-undo)
        (drive-say "undone" (drive-text))
        (drive-wait-until "redo in the menu" (cl-find-if (lambda (one) (string-match-p ": redo: " one)) (drive-menu)))
        """
    )
    assert said["put-off"] == said["declined"] == said["undone"] == CLAMP
    assert INTENT in said["note"]
    assert_only_clamp_changed(CLAMP, said["applied"])
    (patch,) = json.loads((workspace / "applied.json").read_text(encoding="utf-8"))
    assert (patch["state"], patch["is_applied"]) == ("applied", True)
    (patch,) = ledger(workspace)
    assert (patch["label"], patch["is_applied"]) == ("rejected", False)
    assert file.read_text(encoding="utf-8") == CLAMP


@pytest.mark.long
def test_a_job_is_cancelled_from_the_menu_while_emacs_stays_usable(emacs: Emacs, workspace: Path) -> None:
    lines = "".join(f'    if name == "key {number}":\n        return {number} * x + low\n' for number in range(60))
    text = f"def table(name, x, low):\n{lines}    return None\n\n\ndef after():\n    return 1\n"
    file = write(workspace / "table.py", text)
    said = emacs(
        """
        (drive-open "table.py")
        (drive-goto "def table")
        (drive-choose "PlanPatch: add or mend the docstring")
        (let (job)
          (drive-wait-until "the first token"
                            (let ((jobs (plist-get (drive-status) :jobs)))
                              (unless (= 1 (length jobs)) (drive-fail "one job should run: %S" jobs))
                              (setq job (aref jobs 0))
                              (< 0 (plist-get job :numTokens))))
          (drive-goto "def after")
          (insert "# typed while the model generates\\n")
          (drive-idle 0.1)
          (drive-choose "PlanPatch: cancel patch for table")
          (drive-rest)
          (drive-say "state" (plist-get (planpatch-command "status" :jobId (plist-get job :jobId)) :state)))
        (drive-say "menu" (vconcat (drive-menu)))
        (drive-say "text" (drive-text))
        (planpatch-cancel)
        """
    )
    assert said["state"] == "cancelled"
    assert not [title for title in said["menu"] if "cancel" in title or "Apply" in title]
    assert said["text"] == text.replace("def after", "# typed while the model generates\ndef after")
    assert file.read_text(encoding="utf-8") == text
    assert not [patch for patch in ledger(workspace) if patch["is_applied"]]


@pytest.mark.long
def test_a_refused_patch_is_a_note_and_is_retried(emacs: Emacs, workspace: Path) -> None:
    """One token is no patch; with the settings changed back, the retry has room."""
    file = write(workspace / "clamp.py", CLAMP)
    said = emacs(
        f"""
        (drive-open "clamp.py")
        (drive-goto "def clamp")
        (planpatch-patch "{INTENT}")
        (drive-say "note" (drive-note "PATCH reached its limit"))
        (drive-say "menu" (vconcat (drive-menu)))
        (drive-say "refused" (drive-text))
        (drive-rest)
        (setq-default eglot-workspace-configuration '((planpatch . (:apply "ask"))))
        (eglot-signal-didChangeConfiguration (eglot-current-server))
        (drive-expect "PlanPatch has a patch for clamp" "Apply")
        (drive-changing (drive-choose "PlanPatch: retry with this error"))
        (drive-wait-until "the note's end" (not (drive-notes)))
        (drive-rest)
        (drive-say "text" (drive-text))
        """,
        settings="""
        (setq-default eglot-workspace-configuration
                      '((planpatch . (:format "json_edits" :patch_max_new_tokens 1))))
        """,
    )
    assert "planpatch [" in said["note"]
    assert said["refused"] == CLAMP
    assert [title for title in said["menu"] if title.startswith("PlanPatch: retry with this error: ")]
    assert not [title for title in said["menu"] if "Apply" in title]
    assert_only_clamp_changed(CLAMP, said["text"])
    newest, oldest = ledger(workspace)
    assert (oldest["state"], oldest["is_applied"]) == ("refused", False)
    assert (newest["state"], newest["is_applied"]) == ("applied", True)
    assert file.read_text(encoding="utf-8") == CLAMP


@pytest.mark.long
def test_emoji_tabs_and_crlf_stay_byte_for_byte(emacs: Emacs, workspace: Path) -> None:
    """Positions count UTF-16; the user types behind an emoji, so that server and editor must agree on where that is."""
    tabs = "\n\ndef tabs():\n\tdef inner():\n\t\treturn '🙂\t🚀'\n\treturn inner  # 𝒳\n"
    text = (CLAMP + tabs).replace("\n", "\r\n")
    file = write(workspace / "clamp.py", text)
    typed = text.replace("🚀", "🚀!").replace("bounds 🙂", "bounds 🙂🙂")
    emacs(
        f"""
        (drive-open "clamp.py")
        (drive-say "coding" (symbol-name buffer-file-coding-system))
        (drive-goto "🚀") (forward-char) (insert "!")
        (drive-goto "🙂") (insert "🙂")
        (drive-goto "if x < low")
        (drive-expect "PlanPatch has a patch for clamp" "Apply")
        (drive-changing (planpatch-patch "{INTENT}"))
        (drive-rest)
        (save-buffer)
        """
    )
    patched = file.read_bytes().decode("utf-8")
    assert_only_clamp_changed(typed.replace("\r\n", "\n"), patched.replace("\r\n", "\n"))
    assert patched.count("\r\n") == patched.count("\n")
    assert ledger(workspace)[0]["is_applied"] is True
    emacs(
        """
        (drive-open "clamp.py")
        (drive-goto "clamp(")
        (drive-changing (drive-choose "PlanPatch: roll back: "))
        (drive-rest)
        (save-buffer)
        """
    )
    assert file.read_bytes().decode("utf-8") == typed
    assert ledger(workspace)[0]["is_applied"] is False


def test_lsp_mode_plans_patches_applies_and_rolls_back(emacs: Emacs, workspace: Path) -> None:
    written = CLAMP.replace("    if x < low", DIRECTIVE + "    if x < low")
    write(workspace / "clamp.py", written)
    said = emacs(
        """
        (setq lsp-auto-guess-root t lsp-enable-file-watchers nil lsp-keep-workspace-alive t)
        (drive-open "clamp.py")
        (drive-goto "if x < low")
        (drive-choose "PlanPatch: plan a change to .clamp.")
        (drive-message "edit it in \\\\(.*[.]md\\\\))")
        (drive-expect "PlanPatch has a patch for clamp" "Apply")
        (drive-changing (drive-choose "PlanPatch: patch from plan: "))
        (drive-say "patched" (drive-text))
        (drive-changing (drive-choose "PlanPatch: roll back: "))
        (drive-wait-until "redo in the menu" (cl-find-if (lambda (one) (string-match-p ": redo: " one)) (drive-menu)))
        (drive-say "text" (drive-text))
        """,
        client="lsp-mode",
    )
    assert "# pp:" not in said["patched"]
    assert_only_clamp_changed(written, said["patched"])
    assert said["text"] == written
    (patch,) = ledger(workspace)
    assert (patch["label"], patch["is_applied"]) == ("rolled_back", False)
