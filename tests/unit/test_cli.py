"""Commands in this process, with an engine that writes what a test tells it to; files, ledger and gates are real."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import PathError
from lsp_server import cli, patch_command
from lsp_server.cli_options import open_session
from tests.command_line import Said
from tests.scripted_engine import Reply, Script, ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
BITS = (
    '"""Bits 🐍."""\r\n\r\n\x0c\r\n@cache  # for a day\r\ndef ones(n):\r\n\t"""Count ones."""\r\n\t# Zero has none.\r\n'
    "\tdef bit():\r\n\t\treturn n & 1\r\n\treturn bit()\r\n\r\n\r\ndef zeros(n):\r\n\treturn 0"
).encode()
ONES = '@cache  # for a day\ndef ones(n):\n\t"""Count ones."""\n\t# Zero has none.\n\tdef bit():\n\t\treturn n & 1\n'
NEW_ONES = f"{ONES}\treturn n.bit_count()\n"
PATCHED = BITS.replace(b"return bit()", b"return n.bit_count()")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="links and modes as POSIX has them")


class Desk:
    """A home, a current folder with `bits.py`, and the commands."""

    def __init__(self, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.home = home
        self.folder = folder
        self.file = folder / "bits.py"
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, script: Script = ()) -> Said:
        @contextmanager
        def engine(*_: object, **__: object) -> Generator[ScriptedEngine]:
            yield ScriptedEngine(script)

        self._monkeypatch.setattr(patch_command, "open_engine", engine)
        self._capsys.readouterr()
        code = cli.main(list(arguments))
        said = self._capsys.readouterr()
        return Said(code, said.out, said.err)

    def patch(self, *options: str, answer: str = NEW_ONES, function: str = "ones", file: str = "bits.py") -> Said:
        return self("patch", file, "-f", function, "-i", "Count all ones.", *options, script=[answer])


@pytest.fixture
def planpatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    home, folder = tmp_path / "state" / "home", tmp_path / "a workspace 🐍"
    folder.mkdir()
    (folder / "bits.py").write_bytes(BITS)
    monkeypatch.setenv("PLANPATCH_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(folder)
    return Desk(home, folder, monkeypatch, capsys)


# --- links and modes -------------------------------------------------------------------------------------------------


@posix_only
def test_other_names_of_a_file_keep_the_old_text_and_the_user_is_told(planpatch: Desk) -> None:
    other = planpatch.folder / "other.py"
    other.hardlink_to(planpatch.file)
    told = f"{planpatch.file} had another name (a hard link), where the old text stays"
    assert planpatch.patch("--json").json["warnings"] == []

    said = planpatch.patch("--write")
    assert (said.code, planpatch.file.read_bytes(), other.read_bytes()) == (0, PATCHED, BITS)
    assert f"warning: {told}\n" in said.err

    patch_id = planpatch("ledger", "list", "--json").json[0]["id"]
    for step, warnings in (("rollback", []), ("redo", [told])):
        assert planpatch("ledger", step, patch_id, "--json").json["warnings"] == warnings
        other.unlink()
        other.hardlink_to(planpatch.file)
    assert f"warning: {told}\n" in planpatch("ledger", "rollback", patch_id).err


@posix_only
def test_a_symbolic_link_stays_one_and_its_target_is_written(planpatch: Desk) -> None:
    link = planpatch.folder / "link.py"
    link.symlink_to("bits.py")
    said = planpatch.patch("--write", "--json", file="link.py")
    assert (said.code, link.is_symlink(), os.readlink(link), said.json["warnings"]) == (0, True, "bits.py", [])
    assert planpatch.file.read_bytes() == PATCHED
    for name in ("link.py", "bits.py"):  # one file under both names
        assert len(planpatch("ledger", "list", "--file", name, "--json").json) == 1
    assert planpatch("ledger", "rollback", said.json["patch_id"]).code == 0
    assert (link.is_symlink(), planpatch.file.read_bytes()) == (True, BITS)


@posix_only
def test_everything_that_may_hold_the_user_s_code_is_closed_to_others(planpatch: Desk) -> None:
    mask = os.umask(0)
    try:
        with open_session({}, None, False).ledger() as ledger:  # beside it lie -wal and -shm while it is open
            assert planpatch.patch("--write").code == 0
            assert planpatch("adapters", "use", "__none__").code == 0
            assert ledger.problems() == []
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in planpatch.home.iterdir()}
        exported = planpatch.folder / "ledger.jsonl"
        exported.touch(0o644)
        assert planpatch("ledger", "export", "-o", "new.jsonl").code == 0
        assert planpatch("ledger", "export", "-o", "ledger.jsonl", "--force").code == 0
    finally:
        os.umask(mask)
    names = {"adapters.json", "ledger.pruned", *(f"ledger.sqlite3{end}" for end in ("", "-wal", "-shm", ".lock"))}
    assert modes == dict.fromkeys(names, 0o600)
    for folder in (planpatch.home, planpatch.home.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (planpatch.folder / "new.jsonl", exported):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text(encoding="utf-8"))["patched"].encode() == PATCHED


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there is no /dev/null here")
def test_an_export_to_a_device_leaves_its_mode_alone(planpatch: Desk) -> None:
    mode = os.stat("/dev/null").st_mode
    assert planpatch("ledger", "export", "-o", "/dev/null", "--force").code == 0
    assert os.stat("/dev/null").st_mode == mode


# --- second choices --------------------------------------------------------------------------------------------------

SAME = f"{ONES}\treturn bit()\n"
HESITANT = Reply(SAME, second_choices=((SAME.rindex("bit()"), "n", -1.0),))


def test_a_second_choice_is_shown_and_never_written_unseen(planpatch: Desk) -> None:
    """`--write` wrote a guess after the model had answered that nothing was to be changed."""
    ask = ("patch", "bits.py", "-f", "ones", "-i", "Count all ones.")
    said = planpatch(*ask, "--write", script=[HESITANT, ".bit_count()\n"])
    assert (said.code, planpatch.file.read_bytes()) == (1, BITS)
    assert "+\treturn n.bit_count()" in said.out
    assert "warning: The model's likeliest answer left the code as it is" in said.err
    patch_id = said.err.rpartition("planpatch ledger apply ")[2].split()[0]
    again = planpatch(*ask, "--write", "--json")
    assert (again.code, again.json["second_choice"], again.json["written"]) == (1, True, False)
    assert (again.json["known"], again.json["patch_id"]) == (True, patch_id)
    assert planpatch(*ask, script=[HESITANT, ".bit_count()\n"]).code == 0
    assert planpatch("ledger", "apply", patch_id).code == 0
    assert planpatch.file.read_bytes() == PATCHED


@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_that_changes_while_the_model_writes_keeps_its_text_and_the_patch_is_shown(
    planpatch: Desk, as_json: bool
) -> None:
    def write(_: str) -> str:
        planpatch.file.write_bytes(BITS + b"\r\n# edited\r\n")
        return NEW_ONES

    options = ["--json"] if as_json else []
    said = planpatch("patch", "bits.py", "-f", "ones", "-i", "Count all ones.", "--write", *options, script=write)
    assert (said.code, planpatch.file.read_bytes()) == (1, BITS + b"\r\n# edited\r\n")
    error = said.json["error"] if as_json else {"code": "stale_text", "hint": said.err, "details": {}}
    assert error["code"] == "stale_text"
    assert "The patch is kept: planpatch ledger show p_" in error["hint"]
    assert "patch_id" in error["details"] if as_json else "+\treturn n.bit_count()" in said.out


def test_an_intent_of_a_book_is_refused_before_the_model_loads(planpatch: Desk) -> None:
    said = planpatch("patch", "bits.py", "-f", "ones", "-i", "x" * 20_001)
    assert (said.code, said.err.splitlines()[0]) == (
        2,
        "usage: The intent has 20,001 characters; 20,000 are possible",
    )


# --- warnings --------------------------------------------------------------------------------------------------------


def test_comments_and_a_docstring_that_a_patch_drops_are_told_after_the_diff(planpatch: Desk) -> None:
    bare = "@cache\ndef ones(n):\n\treturn n.bit_count()\n"
    said = planpatch.patch(answer=bare)
    assert said.code == 0, said.err
    assert "warning: the patch removes 2 comments and the docstring\n" in said.err
    known = planpatch.patch("--json", answer="is not asked for")
    assert (known.json["known"], known.json["warnings"]) == (True, ["the patch removes 2 comments and the docstring"])


def test_only_the_hunks_that_are_written_are_looked_at_for_what_they_drop(planpatch: Desk) -> None:
    answer = NEW_ONES.replace("  # for a day", "")
    assert planpatch.patch("--json", answer=answer).json["warnings"] == ["the patch removes 1 comment"]
    written = planpatch.patch("--json", "--write", "--hunks", "2", answer=answer).json
    assert (written["warnings"], planpatch.file.read_bytes()) == ([], PATCHED)


def test_a_file_that_does_not_parse_elsewhere_is_patched_with_a_warning_that_names_the_line(planpatch: Desk) -> None:
    broken = BITS + b"\r\n\r\ndef broken(:\r\n\tpass\r\n"
    planpatch.file.write_bytes(broken)
    warning = "bits.py does not parse (line 16: invalid syntax); only `ones` itself was checked"
    assert planpatch.patch("--json").json["warnings"] == [warning]
    said = planpatch.patch("--write")
    assert (said.code, f"warning: {warning}\n" in said.err) == (0, True)
    assert planpatch.file.read_bytes() == broken.replace(b"return bit()", b"return n.bit_count()")


def test_a_name_with_brackets_is_shown_as_it_is(planpatch: Desk) -> None:
    """`[bold]` in a file's name was read as markup and left out."""
    (planpatch.folder / "a [bold] name.py").write_bytes(BITS)
    said = planpatch.patch("--write", file="a [bold] name.py")
    assert (said.code, "written to a [bold] name.py; planpatch ledger rollback" in said.err) == (0, True)


# --- what was asked for is not clear ---------------------------------------------------------------------------------


def test_of_several_functions_of_one_name_each_is_listed_as_it_can_be_typed(planpatch: Desk) -> None:
    twice = (
        "class A:\n    def run(self):\n        return 1\n\n    def run(self, x):\n        return x\n\n\ndef f(): pass\n"
    )
    planpatch.file.write_text(twice, encoding="utf-8")
    said = planpatch("patch", "bits.py", "-i", "x")
    assert (said.code, said.err) == (
        2,
        "usage: Which part of bits.py is meant?\n"
        "  Give --function NAME, --line N or --module. It has: A, A.run@2, A.run@5, f\n",
    )
    answer = "    def run(self, x):\n        return -x\n"
    assert planpatch.patch("--write", function="A.run@5", answer=answer).code == 0
    assert planpatch.file.read_text(encoding="utf-8") == twice.replace("return x", "return -x")


EMPTY = "it is empty; expected auto, a name of `planpatch models list`, organisation/name"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("patch bits.py -f f -i x --model", "setting: command line: --model: '' cannot be used: expected auto, a name"),
        ("patch bits.py -f f -i x --adapter", "setting: command line: --adapter: '' cannot be used: expected an adapt"),
        ("models pull", f"usage: Invalid value for 'name': {EMPTY}"),
        ("models rm", f"usage: Invalid value for 'name': {EMPTY}"),
        ("models show", f"usage: Invalid value for 'name': {EMPTY}"),
    ],
)
def test_an_empty_name_is_named_with_what_is_possible(
    planpatch: Desk, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen3-4b")  # it does not stand where an option is wrong
    told = planpatch(*arguments.split(), "")
    assert (told.code, told.err[: len(said)]) == (2, said)
    assert "stands" not in told.err
    assert "./model.gguf" in told.err or "__none__" in told.err


def test_a_settings_file_that_is_named_and_missing_is_told(planpatch: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = planpatch.folder / "nowhere.toml"
    monkeypatch.setenv("PLANPATCH_CONFIG", str(missing))
    said = planpatch("ledger", "list", "--json")
    assert (said.code, said.json) == (0, [])
    assert said.err == (
        f"setting ignored: environment variable PLANPATCH_CONFIG: the file {missing} does not exist;"
        " the defaults stand.\n"
    )


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_option_s_adapter_is_looked_for_in_the_current_folder_first(planpatch: Desk) -> None:
    """It stood under PLANPATCH_HOME, so that `--adapter ./mine` named a folder that nobody meant."""
    here, there = planpatch.folder / "mine 🐍", planpatch.home / "training" / "mine"
    for folder in (here, there):
        folder.mkdir(parents=True)

    def adapter(text: str) -> Path | None:
        return open_session({"adapter": text}, None, False).adapter()

    assert adapter("./mine 🐍") == adapter("mine 🐍") == adapter(str(here)) == here
    assert adapter("training/mine") == there
    assert adapter("__none__") is None
    with pytest.raises(PathError, match="'~nobody of that name/x' names no path"):
        adapter("~nobody of that name/x")


def test_a_setting_s_adapter_stands_under_the_home(planpatch: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (planpatch.folder / "mine").mkdir()
    (planpatch.home / "mine").mkdir(parents=True)
    for variable in ("ADAPTER_PATH", "PLANPATCH_ADAPTER"):
        monkeypatch.setenv(variable, "./mine")
        assert open_session({}, None, False).adapter() == planpatch.home / "mine"


def test_a_model_s_path_starts_where_it_was_named(planpatch: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting's `./mine` was looked for in the current folder, where a workspace could put weights of its own."""
    here, there = planpatch.folder / "mine 🐍", planpatch.home / "mine 🐍"
    for folder in (here, there):
        folder.mkdir(parents=True)
    assert open_session({"model": "./mine 🐍"}, None, False).model_ref().path == here
    assert open_session({"model": str(here)}, None, False).model_ref().path == here
    monkeypatch.setenv("PLANPATCH_MODEL", "./mine 🐍")
    assert open_session({}, None, False).model_ref().path == there


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_an_empty_ledger_is_an_empty_list(planpatch: Desk) -> None:
    assert planpatch("ledger", "list", "--json") == Said(0, "[]\n", "")
    assert planpatch("ledger", "list") == Said(0, "", "no patch yet; planpatch patch makes one\n")
    assert planpatch("ledger", "list", "--file", "bits.py") == Said(0, "", "no such patch\n")
    assert planpatch("ledger", "export") == Said(0, "", "")
    ledger = planpatch.home / "ledger.sqlite3"
    assert planpatch("ledger", "show", "p_none") == Said(
        2, "", f"usage: There is no patch 'p_none' in {ledger}.\n  The ledger is empty.\n"
    )


def test_an_id_is_told_apart_from_unknown_and_ambiguous_ones(planpatch: Desk) -> None:
    first = planpatch.patch("--json").json["patch_id"]
    second = planpatch.patch("--json", answer="def zeros(n):\n\treturn n - n\n", function="zeros").json["patch_id"]
    common = first[: next(index for index in range(len(first)) if first[index] != second[index])]
    said = planpatch("ledger", "show", common)
    assert (said.code, said.err.splitlines()[1]) == (2, f"  Name one of them in full: {first}, {second}.")
    error = planpatch("ledger", "show", "nothing", "--json").json["error"]
    assert (error["code"], error["details"]["latest"]) == ("usage", [second, first])
    assert first in planpatch("ledger", "show", first[: len(common) + 1]).out


def test_patches_of_one_file_are_taken_back_and_put_in_again_in_any_order_that_fits(planpatch: Desk) -> None:
    answers = [
        ("ones", NEW_ONES),
        ("zeros", "def zeros(n):\n\treturn n.bit_length() - ones(n)\n"),
        ("ones", NEW_ONES.replace("n.bit", "int(n).bit")),
    ]
    texts, ids = [BITS], []
    for function, answer in answers:
        ids.append(planpatch.patch("--write", "--json", answer=answer, function=function).json["patch_id"])
        texts.append(planpatch.file.read_bytes())
    first, other, on_top = ids

    blocked = planpatch("ledger", "rollback", first)
    assert (blocked.code, planpatch.file.read_bytes()) == (1, texts[3])
    assert "<<<<<<< now in the file\n\treturn int(n).bit_count()\n" in blocked.err
    assert f"{on_top} was applied to this file later: roll it back first" in blocked.err
    for patch_id in (on_top, first, other):
        assert planpatch("ledger", "rollback", patch_id).code == 0
    assert planpatch.file.read_bytes() == BITS

    blocked = planpatch("ledger", "redo", on_top)
    assert (blocked.code, planpatch.file.read_bytes()) == (1, BITS)
    assert f"This patch was made on top of {first}, {other}: redo them first, in this order" in blocked.err
    for patch_id in (first, on_top, other):
        assert planpatch("ledger", "redo", patch_id).code == 0
    assert planpatch.file.read_bytes() == texts[3]


def test_a_patch_of_a_file_that_was_deleted_or_restored_is_not_lost(planpatch: Desk) -> None:
    patch_id = planpatch.patch("--write", "--json").json["patch_id"]
    planpatch.file.unlink()
    said = planpatch("ledger", "rollback", patch_id)
    assert (said.code, said.err) == (
        2,
        f"path: {planpatch.file}, the file of {patch_id}, does not exist any more.\n"
        f"  Put it back; planpatch ledger show {patch_id} --json has its `base` and `patched` text.\n",
    )
    planpatch.file.write_bytes(planpatch("ledger", "show", patch_id, "--json").json["base"].encode())

    said = planpatch("ledger", "rollback", patch_id)
    assert said == Said(0, "", f"warning: {planpatch.file} was without the patch already; nothing was written\n")
    assert planpatch("ledger", "redo", patch_id).code == 0
    assert planpatch.file.read_bytes() == PATCHED


@pytest.mark.skipif(sys.platform == "win32", reason="a read-only file there is tried again for two seconds")
def test_a_patch_that_cannot_be_written_is_kept_and_the_user_is_told_its_id(planpatch: Desk) -> None:
    planpatch.file.chmod(0o444)
    said = planpatch.patch("--write")
    patch_id = planpatch("ledger", "list", "--json").json[0]["id"]
    assert (said.code, said.err) == (
        3,
        f"write: {planpatch.file} is read-only.\n"
        f"  Make the file writable and try again. The patch is kept: planpatch ledger apply {patch_id} writes it.\n",
    )
    assert planpatch.patch("--write", "--json").json["error"]["details"]["patch_id"] == patch_id
    planpatch.file.chmod(0o644)
    assert (planpatch("ledger", "apply", patch_id).code, planpatch.file.read_bytes()) == (0, PATCHED)


def test_a_rejected_patch_stays_in_its_file_until_it_is_rolled_back(planpatch: Desk) -> None:
    patch_id = planpatch.patch("--write", "--json").json["patch_id"]
    said = planpatch("ledger", "reject", patch_id, "--reason", "too clever")
    assert f"it is still in its file; planpatch ledger rollback {patch_id} takes it out" in said.err
    assert planpatch.file.read_bytes() == PATCHED
    assert planpatch("ledger", "rollback", patch_id).code == 0
    assert planpatch.file.read_bytes() == BITS


# --- models and shells -----------------------------------------------------------------------------------------------


def test_a_model_that_is_unknown_or_not_here_cannot_be_removed(planpatch: Desk) -> None:
    said = planpatch("models", "rm", "qwen3-40b")
    assert (said.code, said.err.splitlines()[0]) == (2, "unknown_model: There is no model named 'qwen3-40b'")
    assert "qwen3-4b" in said.err.splitlines()[1]
    error = planpatch("models", "rm", "qwen3-4b", "--json").json["error"]
    assert (error["code"], error["message"].split(" (")[0]) == ("model", "The model qwen3-4b is not on this machine")


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_the_shell_s_script_completes_commands_options_and_choices(tmp_path: Path) -> None:
    """Both are asked as bash asks; which shell it is, is for the environment to say."""
    start = "import sys; from lsp_server.__main__ import _run; sys.exit(_run())"
    command = [sys.executable, "-X", "utf8", "-c", start]

    def ask(**environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PLANPATCH_HOME": str(tmp_path), **environment}
        named = [*command[:-1], command[-1].replace("import sys;", "import sys; sys.argv = ['planpatch'];", 1)]
        return subprocess.run(named, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")

    script = ask(_PLANPATCH_COMPLETE="source_bash")
    assert (script.returncode, "complete -o default -F _planpatch_completion planpatch" in script.stdout) == (0, True)
    for words, completed in (
        ("planpatch led", ["ledger"]),
        ("planpatch ledger r", ["rollback", "redo", "reject"]),
        ("planpatch patch --mod", ["--module", "--model"]),
        ("planpatch ledger list --state ro", ["rolled_back"]),
    ):
        last = str(len(words.split()) - 1)
        said = ask(_PLANPATCH_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=last)
        assert (said.returncode, said.stdout.split(), said.stderr) == (0, completed, "")
