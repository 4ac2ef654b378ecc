"""The command line as a user meets it: the installed launcher, the real 0.5B, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from engine.patching.ledger import Ledger
from tests.command_line import Said, count_bits, planpatch, start

MODEL = "qwen2.5-coder-0.5b-instruct"
INTENT = "The loop never ends: each turn must clear the lowest set bit of n, by & and not by ^."
BITCOUNT = """def bitcount(n):
    count = 0
    while n:
        n ^= n - 1
        count += 1
    return count
"""
# Emoji, CRLF, a form feed, tabs, a decorator, a nested function, and no final newline.
BITS = (
    (
        '"""Counting bits 😀."""\n\nimport functools\n\n\f\n@functools.lru_cache\n'
        + BITCOUNT
        + '\n\ndef outer():\n\tdef inner():\n\t\treturn "größer"\n\treturn inner'
    )
    .replace("\n", "\r\n")
    .encode()
)


@pytest.fixture
def workspace(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, a fresh home with the 0.5B, and settings that choose it."""
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    for stage in ("PLAN", "PATCH"):  # a busy machine is no fault of what is tested here
        monkeypatch.setenv(f"PLANPATCH_{stage}_MAX_TIME_CPU_S", "3600")
    folder = tmp_path / "a workspace 😀"
    (folder / "sub folder").mkdir(parents=True)
    (folder / "bits.py").write_bytes(BITS)
    return folder


def assert_mended(patched: bytes) -> None:
    """`bitcount` is right, and nothing else changed by a byte."""
    assert count_bits(patched.decode(), 127) == 7
    above, below = BITS.split(BITCOUNT.replace("\n", "\r\n").encode())
    assert patched.startswith(above)
    assert patched.endswith(below)
    assert patched.count(b"\n") == patched.count(b"\r\n")


def ledger_is_sound(home: Path) -> bool:
    with Ledger(home / "ledger.sqlite3") as ledger:
        return ledger.problems() == []


# --- the way a user goes ---------------------------------------------------------------------------------------------


def test_plan_patch_write_roll_back_redo_roll_back(workspace: Path, home: Path, model_folder_05b: Path) -> None:
    """From a subfolder and inside a root, so that names are relative to neither."""
    cwd, file = workspace / "sub folder", workspace / "bits.py"
    root = {"PLANPATCH_ROOT": str(workspace)}

    planned = planpatch("plan", "../bits.py", "-f", "bitcount", "-i", INTENT, "--json", cwd=cwd, **root)
    assert planned.code == 0, planned.err
    plan = planned.json["plan"]
    assert (plan["function"], plan["range"], plan["intent"]) == ("bitcount", {"start_line": 6, "end_line": 12}, INTENT)
    assert plan["steps"]
    assert file.read_bytes() == BITS

    written = planpatch("patch", "../bits.py", "--plan-id", plan["id"], "--write", cwd=cwd, **root)
    assert written.code == 0, written.err
    assert "-        n ^= n - 1" in written.out
    patched = file.read_bytes()
    assert_mended(patched)

    listed = planpatch("ledger", "list", "--json", cwd=cwd).json
    assert [(line["state"], Path(line["path"]).resolve(), line["scope"]) for line in listed] == [
        ("applied", file.resolve(), "bitcount")
    ]
    patch_id = listed[0]["id"]
    assert f"planpatch ledger rollback {patch_id} takes it back" in written.err
    assert "applied" in planpatch("ledger", "list", cwd=cwd).out
    shown = planpatch("ledger", "show", patch_id[:-2], cwd=cwd).out
    for part in (patch_id, INTENT, MODEL, "gate names", "-        n ^= n - 1"):
        assert part in shown

    for step, expected in (("rollback", BITS), ("redo", patched), ("rollback", BITS)):
        said = planpatch("ledger", step, patch_id, "--json", cwd=cwd)
        assert (said.code, said.json["ok"], said.json["operation"]) == (0, True, step)
        assert file.read_bytes() == expected

    again = planpatch("ledger", "rollback", patch_id, cwd=cwd)
    assert (again.code, "is not applied" in again.err) == (2, True), again.err
    assert ledger_is_sound(home)


@pytest.mark.slow
def test_a_patch_as_json_changes_nothing_and_is_applied_later_unless_the_file_changed(
    workspace: Path, model_folder_05b: Path
) -> None:
    file = workspace / "bits.py"
    command = ("patch", "bits.py", "-f", "bitcount", "-i", INTENT, "--json")
    said = planpatch(*command, cwd=workspace)
    assert said.code == 0, said.err
    patch = said.json
    assert {"ok", "patch_id", "edits", "diff", "patched", "gates", "timings"} <= set(patch)
    assert (patch["ok"], patch["known"], patch["written"]) == (True, False, False)
    patched = patch["patched"].encode()
    assert_mended(patched)
    edit = patch["edits"][0]
    assert set(edit) == {"path", "action", "start_line", "end_line", "pre", "new"}
    assert (edit["path"], edit["pre"]) == ("bits.py", "        n ^= n - 1")
    assert [gate["gate"] for gate in patch["gates"]] == (
        ["fresh", "schema", "anchors", "ast", "libcst", "scope", "names", "change", "layout"]
    )
    assert all(gate["ok"] for gate in patch["gates"])
    assert patch["timings"]["num_tokens"] > 0
    assert file.read_bytes() == BITS

    known = planpatch(*command, "--write", "--hunks", "99", cwd=workspace)
    message = f"--hunks names hunk 99, and {patch['patch_id']} has {len(patch['edits'])}"
    assert (known.code, known.json["error"]["message"]) == (2, message)
    assert file.read_bytes() == BITS

    file.write_bytes(BITS + b"\r\n# edited\r\n")
    stale = planpatch("ledger", "apply", patch["patch_id"], cwd=workspace)
    assert (stale.code, stale.first_error_line) == (
        1,
        f"stale_text: {file} changed since {patch['patch_id']} was proposed.",
    )
    assert file.read_bytes() == BITS + b"\r\n# edited\r\n"

    file.write_bytes(BITS)
    applied = planpatch("ledger", "apply", patch["patch_id"], cwd=workspace)
    assert (applied.code, file.read_bytes()) == (0, patched), applied.err
    file.write_bytes(b"# above\r\n" + patched + b"\r\n# below\r\n")
    taken_back = planpatch("ledger", "rollback", patch["patch_id"], cwd=workspace)
    assert (taken_back.code, file.read_bytes()) == (0, b"# above\r\n" + BITS + b"\r\n# below\r\n"), taken_back.err


@pytest.mark.slow
def test_a_function_whose_own_text_parses_is_patched_in_a_file_that_does_not(
    workspace: Path, model_folder_05b: Path
) -> None:
    broken = BITCOUNT + "\n\ndef broken(:\n    return 1\n"
    (workspace / "broken.py").write_text(broken, encoding="utf-8", newline="")
    said = planpatch("patch", "broken.py", "-f", "bitcount", "-i", INTENT, "--json", cwd=workspace)
    assert said.code == 0, said.err + said.out
    assert said.json["warnings"] == [
        "broken.py does not parse (line 9: invalid syntax); only `bitcount` itself was checked"
    ]
    mended, below, rest = said.json["patched"].partition("\n\n\ndef broken(:\n")
    assert (count_bits(mended, 127), below + rest) == (7, broken[len(BITCOUNT) - 1 :])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process alone")
def test_ctrl_c_while_the_model_writes_ends_it_and_leaves_everything_whole(
    workspace: Path, home: Path, model_folder_05b: Path
) -> None:
    command = ("patch", "bits.py", "-f", "bitcount", "-i", INTENT, "--plan", "Mend the loop.", "--write")
    with start(*command, cwd=workspace) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("plan: "):  # said when the model is loaded, before the patch is asked for
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    # A signal between a write and the reset of its buffer may have Python write the line again; nothing else may come.
    assert err.strip() in ("interrupted", "plan: Mend the loop.\ninterrupted")
    assert (workspace / "bits.py").read_bytes() == BITS
    assert planpatch("ledger", "list", "--json", cwd=workspace).json == []
    assert ledger_is_sound(home)


# --- what the model's side refuses -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_function_too_long_for_the_model_is_refused_with_both_numbers(
    workspace: Path, model_folder_05b: Path
) -> None:
    body = "".join(f"    value_{number} = {number}\n" for number in range(6000))
    (workspace / "long.py").write_text(f"def long():\n{body}    return 1\n", encoding="utf-8")
    said = planpatch("patch", "long.py", "-f", "long", "-i", "Return 2.", "--json", cwd=workspace)
    error = said.json["error"]
    assert (said.code, error["code"]) == (1, "context_length"), said.out
    assert error["message"].startswith("function long does not fit: The prompt (")
    assert error["message"].endswith("exceed the model's context of 32768 tokens")
    assert str(error["details"]["num_prompt_tokens"]) in error["message"]
    assert error["hint"] == "Select a smaller function, or a model with a longer context."


@pytest.mark.slow
def test_an_adapter_for_another_base_is_refused_by_name(workspace: Path, model_folder_05b: Path) -> None:
    folder = write_adapter(workspace / "other adapter", num_inputs=64)
    said = planpatch("patch", "bits.py", "-f", "bitcount", "-i", INTENT, "--adapter", str(folder), cwd=workspace)
    assert (said.code, said.first_error_line) == (
        3,
        f"adapter: The adapter in {folder} was made for another base model (someone/other-7b): it needs a layer "
        "model.layers.0.self_attn.q_proj with 64 inputs, and it has 896",
    )


def write_adapter(folder: Path, num_inputs: int) -> Path:
    """A LoRA of one layer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/other-7b", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.lora_A.weight": np.zeros((2, num_inputs), np.float32),
        f"{layer}.lora_B.weight": np.zeros((num_inputs, 2), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="a folder cannot be closed to this user by its mode")
def test_a_read_only_folder_refuses_the_write_and_keeps_the_proposal(workspace: Path, model_folder_05b: Path) -> None:
    workspace.chmod(0o555)
    try:
        said = planpatch("patch", "bits.py", "-f", "bitcount", "-i", INTENT, "--write", "--json", cwd=workspace)
    finally:
        workspace.chmod(0o755)
    assert (said.code, said.json["error"]["code"]) == (3, "write")
    assert str(workspace) in said.json["error"]["message"]
    assert (workspace / "bits.py").read_bytes() == BITS
    assert [line["state"] for line in planpatch("ledger", "list", "--json", cwd=workspace).json] == ["proposed"]


# --- bad input, told without a model ---------------------------------------------------------------------------------

TWICE = "class A:\n    def run(self):\n        return 1\n\n    def run(self, x):\n        return x\n"
BAD_FILES = {
    "twice.py": TWICE.encode(),
    "broken.py": b"def good():\n    return 1\n\ndef bad(:\n    return 1\n",
    "binary.py": b"def f():\n    return 1\n\0\1\2",
    "big.py": b"# " + b"x" * 20_000_000,
    "latin.py": "def f():\n    return 'größe'\n".encode("latin-1"),
    "declared.py": b"# -*- coding: latin-1 -*-\ndef f():\n    return 1\n",
    "wide.py": "def f():\n    return 1\n".encode("utf-16"),
}


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        ("bits.py -f bitcont", 2, "unknown_scope: bits.py has no function or class `bitcont`.", "Nearest: bitcount."),
        (
            "bits.py -f somewhere",
            2,
            "unknown_scope: bits.py has no function or class `somewhere`.",
            "It has: bitcount, outer, outer.inner.",
        ),
        (
            "twice.py -f A.run",
            2,
            "unknown_scope: twice.py has 2 definitions that `A.run` could mean: A.run@2, A.run@5.",
            "Say which one by its line, for instance `A.run@2`.",
        ),
        (
            "broken.py -f bad",
            2,
            "source: `bad` in broken.py does not parse: line 4: invalid syntax.",
            "Mend the syntax error, or name a function whose own text parses.",
        ),
        ("binary.py -f f", 2, "source: binary.py is binary: it has a NUL at offset 22.", "Name a Python source file."),
        (
            "big.py -f f",
            2,
            "source: big.py has 20,000,002 bytes or more; the limit is 2,000,000 bytes.",
            "Split the file, or name a smaller one.",
        ),
        ("latin.py -f f", 2, "source: latin.py is not UTF-8: byte 0xF6 at offset 23.", "Convert the file to UTF-8."),
        (
            "declared.py -f f",
            2,
            "source: declared.py declares the encoding 'latin-1'; PlanPatch edits UTF-8 files only.",
            "Convert the file to UTF-8 and remove the declaration from its first two lines.",
        ),
        (
            "wide.py -f f",
            2,
            "source: wide.py is UTF-16; PlanPatch edits UTF-8 files only.",
            "Convert the file to UTF-8.",
        ),
        ("missing.py -f f", 2, "path: missing.py does not exist.", "Check the path."),
        ("sub -f f", 2, "path: sub is a folder.", "Name one Python file."),
        (
            "bits.py",
            2,
            "usage: Which part of bits.py is meant?",
            "Give --function NAME, --line N or --module. It has: ",
        ),
        (
            "bits.py -f bitcount --format yaml",
            2,
            "usage: Invalid value for '--format': 'yaml' is not one of 'auto', 'rewrite', 'json_edits'.",
            "planpatch patch --help",
        ),
        (
            "bits.py -f bitcount --device tpu",
            2,
            "setting: command line: --device: 'tpu' cannot be used: expected auto, cpu, cuda or cuda:N.",
            "",
        ),
        (
            "bits.py -f bitcount --hunks 1,x --write",
            2,
            "usage: --hunks '1,x' is no list of hunk numbers",
            "Give numbers",
        ),
        ("bits.py -f bitcount --hunks 1", 2, "usage: --hunks says what --write writes", "Give both."),
        ("bits.py -f bitcount --module", 2, "usage: --module cannot be combined with --function or --line", ""),
        (
            "bits.py -f bitcount --plan x --plan-first",
            2,
            "usage: --plan-id, --plan and --plan-first exclude each other",
            "",
        ),
        ("bits.py --plan-id pl_none", 2, "usage: There is no plan 'pl_none' in ", "The ledger is empty."),
        (
            "bits.py -f bitcount --model qwen2.5-coder-0.6b",
            2,
            "unknown_model: There is no model named 'qwen2.5-coder-0.6b'",
            "Nearest names: qwen2.5-coder-0.5b-instruct",
        ),
        (
            "bits.py -f bitcount --model ./nowhere.gguf",
            3,
            "model: There is no GGUF file ",
            "Check the path; planpatch models list shows names.",
        ),
        (
            "bits.py -f bitcount --model qwen3-4b",
            3,
            "model: The model qwen3-4b is not on this machine (",
            "planpatch models pull qwen3-4b",
        ),
    ],
)
def test_bad_input_is_told_with_its_name_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, error: str, hint: str
) -> None:
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLANPATCH_MODEL", MODEL)
    name = arguments.split()[0]
    (tmp_path / "sub").mkdir()
    (tmp_path / "bits.py").write_bytes(BITS)
    if name in BAD_FILES:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    before = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b""
    intent = [] if "--plan-id" in arguments else ["-i", INTENT]

    said = planpatch("patch", *arguments.split(), *intent, cwd=tmp_path)
    lines = said.err.splitlines()
    assert (said.code, said.out) == (code, ""), said.err
    assert lines[0].startswith(error)
    assert len(lines) == (2 if hint else 1)
    assert lines[-1].strip().startswith(hint if hint else error[:10])
    assert before == ((tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b"")


def test_a_file_outside_the_root_is_refused_also_behind_a_link(tmp_path: Path, home: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.py"
    root.mkdir()
    outside.write_text(BITCOUNT, encoding="utf-8")
    names = ["../outside.py", str(outside)]
    if os.name != "nt":
        (root / "link.py").symlink_to(outside)
        names.append("link.py")
    for name in names:
        said = planpatch("patch", name, "-f", "bitcount", "-i", INTENT, cwd=root, PLANPATCH_ROOT=str(root))
        assert said.code == 2
        assert "is outside the root" in said.first_error_line
        assert Path(name).name in said.first_error_line


def test_a_root_that_is_not_there_is_named_not_the_file(workspace: Path) -> None:
    said = planpatch("patch", "bits.py", "-f", "bitcount", "-i", INTENT, cwd=workspace, PLANPATCH_ROOT="/no such root")
    assert (said.code, "environment variable PLANPATCH_ROOT" in said.first_error_line) == (2, True), said.err


def test_a_malformed_setting_is_named_and_the_default_stands(workspace: Path, home: Path) -> None:
    (home / "planpatch.toml").write_text('port = "eighty"\ndevise = "cpu"\n', encoding="utf-8")
    said = planpatch("models", "list", "--json", cwd=workspace, CTX_LIMIT="lots", GEN_PLAN="{not json")
    assert (said.code, any(model["name"] == MODEL for model in said.json)) == (0, True)
    assert [line.removeprefix("setting ignored: ") for line in sorted(said.err.splitlines())] == sorted(
        [
            f"{home / 'planpatch.toml'}: port: 'eighty' cannot be used: expected a number; the default stands.",
            f"{home / 'planpatch.toml'}: devise: there is no such setting; did you mean device?",
            "environment variable CTX_LIMIT: 'lots' cannot be used: expected a number; the default stands.",
            "environment variable GEN_PLAN: expected a JSON object (Expecting property name enclosed in double quotes:"
            " line 1 column 2 (char 1)); it is ignored.",
        ]
    )


def test_a_workspace_that_sets_the_model_is_told_that_it_may_not(workspace: Path) -> None:
    (workspace / "pyproject.toml").write_text('[tool.planpatch]\nmodel = "evil/model"\n', encoding="utf-8")
    said = planpatch("patch", "bits.py", "-f", "nothing", "-i", INTENT, cwd=workspace)
    assert said.first_error_line.endswith(
        "tool.planpatch.model: a workspace may not set this and it is ignored; it may set surroundings_chars, "
        "context_tokens, style, presets, training_log."
    )


@pytest.mark.parametrize("arguments", ["patch bits.py --wat", "nonsense", "ledger show", "ledger list --state gone"])
def test_wrong_options_are_an_error_object_for_programs(workspace: Path, arguments: str) -> None:
    said = planpatch(*arguments.split(), "--json", cwd=workspace)
    assert (said.code, said.json["ok"], said.json["error"]["code"]) == (2, False, "usage")
    assert said.json["error"]["hint"].endswith("--help")


def test_help_and_version_end_with_0(workspace: Path) -> None:
    assert planpatch("--version", cwd=workspace) == Said(0, "planpatch 0.1.0\n", "")
    helped = planpatch("patch", "--help", cwd=workspace)
    assert (helped.code, "--write" in helped.out) == (0, True)


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_the_shell_completes_commands(workspace: Path) -> None:
    said = planpatch(cwd=workspace, _PLANPATCH_COMPLETE="complete_bash", COMP_WORDS="planpatch led", COMP_CWORD="1")
    assert (said.code, said.out) == (0, "ledger\n")


def test_a_reader_that_goes_away_ends_it_quietly(workspace: Path) -> None:
    with start("models", "list", "--json", cwd=workspace) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_an_export_into_a_missing_folder_is_told(workspace: Path) -> None:
    said = planpatch("ledger", "export", "--out", "nowhere/ledger.jsonl", cwd=workspace)
    assert said.code == 3
    assert said.first_error_line.startswith(f"write: {Path('nowhere/ledger.jsonl')} cannot be written: ")
