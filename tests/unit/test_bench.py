"""`planpatch bench` on a scripted engine: what goes in, what is written, and what is kept when a run ends early."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.inference.protocol import FinishReason, Grammar, Priority
from engine.patching.ledger import Ledger
from lsp_server import cli_bench
from lsp_server.bench_edit import percentile
from lsp_server.bench_repeat import HISTORY_COLUMNS, RESULT_COLUMNS
from lsp_server.cli import main
from tests.scripted_engine import Answer, Reply, ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
ADD = "def add(a, b):\n    return a - b\n"
ADD_MENDED = "def add(a, b):\n    return a + b\n"


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A case whose function is to be mended."""
    case = {"id": name, "file_name": "m.py", "before": ADD, "function": "add", "scope": "function", "intent": "Mend."}
    return {**case, **changes}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if not key.endswith("_ms")} for item in rows]


def answering(code: Answer | Callable[[str], Answer]) -> Callable[[str], Answer]:
    """A script that plans `- mend it` and patches with `code`."""

    def script(prompt: str) -> Answer:
        if prompt.endswith("<assistant>") and "Say in one short sentence" in prompt:
            return "- mend it"
        return code(prompt) if callable(code) else code

    return script


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run(engine, "bench cases …")` is the command line with the engine in place of a model."""
    monkeypatch.chdir(tmp_path)

    def run(engine: ScriptedEngine, command: str, *more: str) -> int:
        @contextmanager
        def open_engine(*_: object) -> Generator[ScriptedEngine]:
            yield engine

        monkeypatch.setattr(cli_bench, "open_engine", open_engine)
        return main([*command.split(), *more])

    return run


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    return tmp_path / "cases.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_line_of_results_says_what_was_offered_or_why_nothing_was(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("mended"), row("unchanged", intent="Change nothing."))
    engine = ScriptedEngine(answering(lambda prompt: ADD if "Change nothing" in prompt else ADD_MENDED))
    assert run(engine, "bench cases cases.jsonl --out results.jsonl --plan") == 0
    assert without_times(read_rows(out)) == [
        {"id": "mended", "edited": ADD_MENDED, "ok": True, "reason": None, "tokens": 41},
        {"id": "unchanged", "edited": None, "ok": False, "reason": "gate:change", "tokens": 73},
    ]
    assert list(read_rows(out)[0]) == ["id", "edited", "ok", "reason", "plan_ms", "patch_ms", "tokens"]


def test_a_planted_solution_reaches_neither_the_model_nor_the_results(run: Run, cases: Path, tmp_path: Path) -> None:
    planted = {"after": "PLANTED", "tests": "PLANTED", "edited": "PLANTED", "spec": "PLANTED", "failing_test": {}}
    seen: list[tuple[list[str], list[dict[str, Any]]]] = []
    for name, extra in (("plain", {}), ("planted", planted)):
        write_rows(cases, row("one", **extra), row("two", scope="file", function=None, **extra))
        engine = ScriptedEngine(answering(ADD_MENDED))
        assert run(engine, f"bench cases cases.jsonl --out {name}.jsonl --plan") == 0
        seen.append((engine.prompts, without_times(read_rows(tmp_path / f"{name}.jsonl"))))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 4 and "PLANTED" not in "".join(seen[1][0])


@pytest.mark.parametrize(
    ("before", "answer", "edited"),
    [
        (
            "# 😀\r\ndef add(a, b):\r\n    return a - b\r\n",
            ADD_MENDED,
            "# 😀\r\ndef add(a, b):\r\n    return a + b\r\n",
        ),
        ("def add(a, b):\n    return a - b", ADD_MENDED, "def add(a, b):\n    return a + b"),
        ("\ufeffdef add(a, b):\n    return a - b\n", ADD_MENDED, "\ufeffdef add(a, b):\n    return a + b\n"),
        (
            "\f\nclass A:\n\t@p\n\tdef add(a, b):\n\t\tdef f(): pass\n\t\treturn a - b\n",
            "@p\ndef add(a, b):\n\tdef f(): pass\n\treturn a + b\n",
            "\f\nclass A:\n\t@p\n\tdef add(a, b):\n\t\tdef f(): pass\n\t\treturn a + b\n",
        ),
    ],
    ids=["emoji and CRLF", "no final newline", "byte-order mark", "form feed, tabs, decorator, nested function"],
)
def test_the_edited_text_is_the_whole_file_as_it_was_but_for_the_edit(
    run: Run, cases: Path, out: Path, before: str, answer: str, edited: str
) -> None:
    write_rows(cases, row("one", before=before))
    assert run(ScriptedEngine(answering(answer)), "bench cases cases.jsonl --out results.jsonl") == 0
    assert read_rows(out)[0]["edited"] == edited


@pytest.mark.parametrize(
    ("case", "answer", "reason"),
    [
        (row("a"), "def sub(a, b):\n    return a + b\n", "gate:scope"),
        (row("a"), "def add(a, b):\n    return a +\n", "gate:ast"),
        (row("a"), Reply(ADD, FinishReason.LENGTH), "budget:tokens"),
        (row("a", before=ADD + "#" * 3000, scope="file"), ADD, "context_length"),
        (row("a", function="sub"), ADD, "scope:m.py has no function or class `sub`."),
        (row("a", before="def f(:\n", scope="file"), ADD, "source:m.py does not parse: line 1: invalid syntax."),
        (row("a", before="\0"), ADD, "source:m.py is binary: it has a NUL at offset 0."),
    ],
)
def test_a_reason_names_the_gate_the_budget_or_what_is_wrong_with_the_text(
    run: Run, cases: Path, out: Path, case: dict[str, Any], answer: Answer, reason: str
) -> None:
    write_rows(cases, case)
    engine = ScriptedEngine(answering(answer), context_length=3000)
    assert run(engine, "bench cases cases.jsonl --out results.jsonl") == 0
    line = read_rows(out)[0]
    assert (line["edited"], line["ok"], line["reason"]) == (None, False, reason)


@pytest.mark.parametrize(
    ("function", "scope", "shown"),
    [
        ("f", "function", "def f(self):\n        return 1"),
        ("B.f", "function", "def f(self):\n        return 2"),
        (None, "class:B", "class B:\n    def f(self):\n        return 2"),
        (None, "file", "class A:\n    def f(self):\n        return 1\n\n\nclass B:"),
    ],
)
def test_a_bare_name_of_several_means_the_first_and_class_and_file_are_scopes(
    run: Run, cases: Path, function: str | None, scope: str, shown: str
) -> None:
    before = "class A:\n    def f(self):\n        return 1\n\n\nclass B:\n    def f(self):\n        return 2\n"
    write_rows(cases, row("one", before=before, function=function, scope=scope))
    engine = ScriptedEngine(answering("no code"))
    run(engine, "bench cases cases.jsonl --out results.jsonl")
    code = re.search(r"## Code Before:\n```python\n(.*?)```", engine.prompts[0], re.DOTALL)
    assert code is not None and code.group(1).strip().startswith(shown)


def test_only_token_budgets_hold_and_no_ledger_is_made(
    run: Run, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    write_rows(cases, row("one"))
    engine = ScriptedEngine(answering(ADD_MENDED))
    run(engine, "bench cases cases.jsonl --out results.jsonl --plan")
    plan, patch = (request.params for request in engine.requests)
    assert (plan.max_time_s, patch.max_time_s) == (None, None)
    assert (plan.max_new_tokens, patch.max_new_tokens) == (16, 192)
    assert {request.priority for request in engine.requests} == {Priority.BACKGROUND}
    assert not (tmp_path / "home" / "ledger.sqlite3").exists()


def test_no_plan_and_the_format_reach_the_model(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("one"))
    edit = {"path": "m.py", "action": "replace", "start_line": 2, "end_line": 2}
    answer = json.dumps([{**edit, "pre": "    return a - b", "new": "    return a + b"}])
    engine = ScriptedEngine([answer])
    run(engine, "bench cases cases.jsonl --out results.jsonl --no-plan --format json_edits")
    assert [type(request.params.grammar) for request in engine.requests] == [Grammar]
    assert read_rows(out)[0]["edited"] == ADD_MENDED


def test_details_hold_plan_answers_and_verdicts_of_each_case(run: Run, cases: Path, tmp_path: Path) -> None:
    write_rows(cases, row("one"))
    answers = iter([ADD, ADD_MENDED])
    engine = ScriptedEngine(answering(lambda _: next(answers)))
    run(engine, "bench cases cases.jsonl --out results.jsonl --details details.jsonl --plan")
    details = read_rows(tmp_path / "details.jsonl")[0]
    assert (details["id"], details["plan"], details["num_attempts"]) == ("one", "mend it", 2)
    assert details["answers"] == [ADD, ADD_MENDED]
    assert {gate["gate"]: gate["ok"] for gate in details["gates"]}["change"] is True


def test_the_summary_counts_offers_refusals_and_bad_json(
    run: Run, cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(cases, row("prose"), row("cut"), row("known", function="sub"))
    answers = iter(["no json", "{}", Reply("[{", FinishReason.LENGTH)])
    engine = ScriptedEngine(lambda _: next(answers))
    run(engine, "bench cases cases.jsonl --out results.jsonl --no-plan --format json_edits --json")
    said = json.loads(capsys.readouterr().out)
    assert (said["cases"], said["offered"]) == (3, 0)
    assert said["refused"] == {"gate:schema": 1, "budget:tokens": 1, "scope": 1}
    assert (said["this_run"]["cases"], said["this_run"]["json_failures"], said["this_run"]["tokens"]) == (3, 2, 11)
    assert said["p50_ms"] <= said["p95_ms"]


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile(range(1, 21), share) for share in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([], 0.5) is None


# --- which cases, and how many at once ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ("--limit 2", "ab"),
        ("--shard 1/2", "ace"),
        ("--shard 2/2", "bd"),
        ("--ids ids.txt", "bd"),
        ("--ids ids.txt --limit 1", "b"),
        ("--limit 4 --shard 2/2", "bd"),
    ],
)
def test_cases_are_chosen_by_ids_then_limit_then_shard(
    run: Run, cases: Path, out: Path, tmp_path: Path, options: str, chosen: str
) -> None:
    write_rows(cases, *(row(name) for name in "abcde"))
    (tmp_path / "ids.txt").write_text("d\r\n\r\nb\n")
    assert run(ScriptedEngine(answering(ADD_MENDED)), f"bench cases cases.jsonl --out results.jsonl {options}") == 0
    assert [line["id"] for line in read_rows(out)] == list(chosen)


def test_cases_in_flight_meet_and_results_are_those_of_one_at_a_time(run: Run, cases: Path, tmp_path: Path) -> None:
    write_rows(cases, *(row(name, intent=f"Return a + b + {number}.") for number, name in enumerate("abcd")))

    def mended(prompt: str) -> str:
        number = re.findall(r"Return a \+ b \+ (\d)", prompt)[-1]
        return f"def add(a, b):\n    return a + b + {number}\n"

    together = threading.Barrier(4, timeout=30)

    def mended_together(prompt: str) -> str:
        together.wait()
        return mended(prompt)

    assert run(ScriptedEngine(answering(mended)), "bench cases cases.jsonl --out 1.jsonl") == 0
    assert run(ScriptedEngine(answering(mended_together)), "bench cases cases.jsonl --out 4.jsonl --batch 4") == 0
    one, four = (without_times(read_rows(tmp_path / name)) for name in ("1.jsonl", "4.jsonl"))
    assert sorted(four, key=lambda line: line["id"]) == one
    assert one[2]["edited"] == "def add(a, b):\n    return a + b + 2\n"


# --- a run that ends early ----------------------------------------------------------------------------------------


def test_resume_drops_a_torn_line_and_runs_only_what_has_no_line(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("a"), row("b"), row("c"))
    first = (
        b'{"id": "b", "edited": null, "ok": false, "reason": "gate:ast", "plan_ms": 1, "patch_ms": 2, "tokens": 3}\n'
    )
    out.write_bytes(first + '{"id": "c", "edited": "é'.encode()[:-1])
    engine = ScriptedEngine(answering(ADD_MENDED))
    assert run(engine, "bench cases cases.jsonl --out results.jsonl --resume --plan") == 0
    assert out.read_bytes().startswith(first)
    assert [(line["id"], line["ok"]) for line in read_rows(out)] == [("b", False), ("a", True), ("c", True)]
    assert len(engine.requests) == 4


def test_resume_with_nothing_left_to_do_loads_no_model(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("a"))
    run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl")
    before = out.read_bytes()
    engine = ScriptedEngine([])
    assert run(engine, "bench cases cases.jsonl --out results.jsonl --resume") == 0
    assert (engine.requests, out.read_bytes()) == ([], before)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--plan", "plan was False and is True"),
        ("--format json_edits", "format was 'auto' and is 'json_edits'"),
        ("-m qwen3-8b", "model was 'auto' and is 'qwen3-8b'"),
        ("--quantization fp32", "quantization was 'auto' and is 'fp32'"),
        ("--adapter .", "adapter was '"),
    ],
)
def test_resume_with_other_options_is_refused(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    write_rows(cases, row("a"), row("b"))
    run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl --limit 1")
    before = out.read_bytes()
    engine = ScriptedEngine([])
    assert run(engine, f"bench cases cases.jsonl --out results.jsonl --resume {more}") == 2
    assert f"These results were made with other options: {said}" in capsys.readouterr().err
    assert (engine.requests, out.read_bytes()) == ([], before)

    assert run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl --resume") == 0
    assert [line["id"] for line in read_rows(out)] == ["a", "b"]


def test_results_without_a_record_of_their_options_are_gone_on_with(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("a"), row("b"))
    run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl --limit 1")
    out.with_name("results.jsonl.run.json").unlink()
    command = "bench cases cases.jsonl --out results.jsonl --resume --plan"
    assert run(ScriptedEngine(answering(ADD_MENDED)), command) == 0
    assert [line["id"] for line in read_rows(out)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cases.jsonl has no cases"),
        (b"\xef\xbb\xbf\r\n\n", "cases.jsonl has no cases"),
        (b'\n{"id": "\xff"}\n', "cases.jsonl:2 is not UTF-8 (byte 9 of the line)"),
        ('{"id": "a"}'.encode("utf-16"), "cases.jsonl:1 is not UTF-8 (byte 1 of the line)"),
    ],
)
def test_a_file_of_cases_that_is_empty_or_not_utf_8_is_told(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    cases.write_bytes(content)
    assert run(ScriptedEngine([]), "bench cases cases.jsonl --out results.jsonl") == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_last_line_that_lost_only_its_newline_is_run_again(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("a"))
    run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl")
    out.write_bytes(out.read_bytes().removesuffix(b"\n"))
    run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl --resume")
    assert [line["id"] for line in read_rows(out)] == ["a"]


def test_damage_before_the_last_line_is_named_and_nothing_is_changed(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(cases, row("a"))
    out.write_bytes(b'{"id": "x"}\nnonsense\n{"id": "y"}\n')
    assert run(ScriptedEngine([]), "bench cases cases.jsonl --out results.jsonl --resume") == 2
    assert "results.jsonl:2 is damaged" in capsys.readouterr().err
    assert out.read_bytes() == b'{"id": "x"}\nnonsense\n{"id": "y"}\n'


def test_older_results_are_kept_beside_new_ones(run: Run, cases: Path, out: Path) -> None:
    write_rows(cases, row("a"))
    out.write_bytes(b"hours of work\n")
    assert run(ScriptedEngine(answering(ADD_MENDED)), "bench cases cases.jsonl --out results.jsonl") == 0
    assert out.with_name("results.jsonl.old").read_bytes() == b"hours of work\n"
    assert [line["id"] for line in read_rows(out)] == ["a"]


def test_ctrl_c_stops_the_case_in_flight_and_keeps_what_is_written(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(cases, row("a"), row("b", intent="Take long."), row("c"))

    def interrupted(prompt: str) -> Answer:
        if "Take long" in prompt:
            while not out.read_bytes():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)  # Python delivers it to the main thread
            assert engine.was_cancelled.wait(30)
        return ADD_MENDED

    engine = ScriptedEngine(answering(interrupted))
    assert run(engine, "bench cases cases.jsonl --out results.jsonl") == 130
    assert [line["id"] for line in read_rows(out)] == ["a"]
    assert "results.jsonl has every case that was done; --resume goes on from there" in capsys.readouterr().err


def test_an_engine_that_fails_for_good_ends_the_run_with_what_is_written(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(cases, row("a"), row("b", intent="Fail."), row("c"))

    def failing(prompt: str) -> Answer:
        if "Fail" in prompt:
            engine.fail("CUDA error: an illegal memory access was encountered")
        return ADD_MENDED

    engine = ScriptedEngine(answering(failing))
    assert run(engine, "bench cases cases.jsonl --out results.jsonl") == 3
    assert "illegal memory access" in capsys.readouterr().err
    assert [line["id"] for line in read_rows(out)] == ["a"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EngineError("Out of memory on cuda:0"), "engine:Out of memory on cuda:0"),
        (ZeroDivisionError("a bug"), "crash:ZeroDivisionError: a bug"),
    ],
)
def test_a_fault_in_one_case_is_named_and_the_others_go_on(
    run: Run, cases: Path, out: Path, fault: Exception, reason: str
) -> None:
    write_rows(cases, row("a", intent="Fail."), row("b"))

    def failing(prompt: str) -> Answer:
        if "Fail" in prompt:
            raise fault
        return ADD_MENDED

    assert run(ScriptedEngine(answering(failing)), "bench cases cases.jsonl --out results.jsonl") == 0
    assert [(line["id"], line["reason"]) for line in read_rows(out)] == [("a", reason), ("b", None)]


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "cases.jsonl:2 is not JSON"),
        ("[]", "cases.jsonl:2 is not a JSON object"),
        (json.dumps({**row("x"), "intent": 5}), "cases.jsonl:2: `intent` is int 5"),
        (json.dumps({**row("x"), "before": None}), "cases.jsonl:2: `before` is missing"),
        (json.dumps(row("x", function=None)), "cases.jsonl:2: the scope is `function`, but `function` is missing"),
        (json.dumps(row("x", scope="class:")), "cases.jsonl:2: `scope` is 'class:'"),
        (json.dumps(row("a")), "cases.jsonl has several cases with the id 'a'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line_before_anything_runs(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    cases.write_text(json.dumps(row("a")) + "\n" + line + "\n", encoding="utf-8")
    assert run(ScriptedEngine([]), "bench cases cases.jsonl --out results.jsonl") == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench cases missing.jsonl --out r.jsonl", "missing.jsonl cannot be read"),
        ("bench cases cases.jsonl --out r.jsonl --shard 3/2", "--shard '3/2' is not I/N"),
        ("bench cases cases.jsonl --out r.jsonl --ids ids.txt", "There is no case with the id 'nope'"),
        ("bench cases cases.jsonl --out cases.jsonl", "must be different files"),
        ("bench --path m.py cases cases.jsonl --out r.jsonl", "--path stands before `cases`"),
        ("bench -N 2", "--path is missing"),
        ("bench -N 2 --path m.py --function add", "--intent is missing"),
    ],
)
def test_bad_options_are_named(
    run: Run, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    write_rows(cases, row("a"))
    (tmp_path / "ids.txt").write_text("nope\n")
    assert run(ScriptedEngine([]), command) == 2
    assert said in capsys.readouterr().err


def test_a_folder_in_place_of_the_results_is_named(
    run: Run, cases: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(cases, row("a"))
    out.mkdir()
    assert run(ScriptedEngine([]), "bench cases cases.jsonl --out results.jsonl") == 3
    assert "results.jsonl cannot be written" in capsys.readouterr().err


def test_the_bench_runs_where_only_what_the_model_needs_is_installed() -> None:
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pygls", "lsprotocol", "fastapi", "matplotlib", "gguf", "bitsandbytes"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(ROOT)!r})
from lsp_server.cli import main
sys.exit(main(["bench", "cases", "missing.jsonl", "--out", "results.jsonl"]))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2, done.stderr
    assert "missing.jsonl cannot be read" in done.stderr


# --- one edit repeated --------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my code.py"
    path.write_bytes("# 😀\r\ndef add(a, b):\r\n\treturn a - b".encode())
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def repeat(run: Run, engine: ScriptedEngine, file: Path, *more: str) -> int:
    return run(engine, "bench -N 2 --function add --intent Mend. --csv-dir bench --path", str(file), *more)


def test_each_repetition_starts_from_the_same_bytes_and_the_users_file_stays(
    run: Run, file: Path, tmp_path: Path
) -> None:
    before = file.read_bytes()
    engine = ScriptedEngine(answering("def add(a, b):\n\treturn a + b\n"))
    assert repeat(run, engine, file) == 0
    assert file.read_bytes() == before
    assert len(engine.prompts) == 2 and engine.prompts[0] == engine.prompts[1]
    rows = read_csv(tmp_path / "bench" / "bench_results.csv")
    assert tuple(rows[0]) == RESULT_COLUMNS
    shown = [{key: item[key] for key in ("n", "ok", "reason", "edits", "tokens", "json_failures")} for item in rows]
    common = {"ok": "True", "reason": "", "edits": "1", "tokens": "29", "json_failures": "0"}
    assert shown == [{"n": "1", **common}, {"n": "2", **common}]
    patched = "# 😀\r\ndef add(a, b):\r\n\treturn a + b".encode()
    assert {item["sha256"] for item in rows} == {hashlib.sha256(patched).hexdigest()}


@pytest.mark.parametrize(
    ("answer", "more", "reason"),
    [
        ("def add(a, b):\n\treturn a - b\n", [], "gate:change"),
        ("[]", ["--format", "json_edits"], "gate:change"),
    ],
)
def test_a_run_without_edits_is_a_failed_run(
    run: Run,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    more: list[str],
    reason: str,
) -> None:
    assert repeat(run, ScriptedEngine(answering(answer)), file, *more) == 0
    rows = read_csv(tmp_path / "bench" / "bench_results.csv")
    assert [(item["ok"], item["edits"], item["reason"], item["sha256"]) for item in rows] == [
        ("False", "0", reason, "")
    ] * 2
    assert read_csv(tmp_path / "bench" / "bench_history.csv")[0]["errors"] == "2"
    assert "edits=[] in run 1, 2: counted as failed" in capsys.readouterr().err


def test_the_history_grows_by_one_line_a_bench(run: Run, file: Path, tmp_path: Path) -> None:
    history = tmp_path / "bench" / "bench_history.csv"
    for _ in range(2):
        assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file) == 0
    rows = read_csv(history)
    assert [tuple(item) for item in rows] == [HISTORY_COLUMNS] * 2
    facts = {key: rows[1][key] for key in ("model", "device", "quantization", "adapter", "target", "n", "errors")}
    assert facts == {
        "model": "scripted",
        "device": "cpu",
        "quantization": "fp32",
        "adapter": "__none__",
        "target": "my code.py:add",
        "n": "2",
        "errors": "0",
    }
    assert len(read_csv(tmp_path / "bench" / "bench_results.csv")) == 2


def test_a_history_with_other_columns_is_refused_before_anything_runs(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "bench" / "bench_history.csv"
    history.parent.mkdir()
    history.write_text("date,ms\n1,2\n")
    engine = ScriptedEngine([])
    assert repeat(run, engine, file) == 2
    assert "has other columns" in capsys.readouterr().err
    assert (engine.requests, history.read_text()) == ([], "date,ms\n1,2\n")


def test_a_line_of_history_that_was_cut_off_spoils_neither_the_next_nor_the_plot(
    run: Run, file: Path, tmp_path: Path
) -> None:
    history = tmp_path / "bench" / "bench_history.csv"
    for _ in range(2):
        repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file)
    history.write_bytes(history.read_bytes()[:-60])
    assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file) == 0
    assert [item["n"] for item in read_csv(history)][0::2] == ["2", "2"]


def test_the_history_is_drawn_where_matplotlib_is_installed(run: Run, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file)
    assert (tmp_path / "bench" / "bench_history.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_bench_says_how_to_get_the_plot(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file) == 0
    assert 'pip install "planpatch[plot]"' in capsys.readouterr().err
    assert not (tmp_path / "bench" / "bench_history.png").exists()


def test_log_only_keeps_proposals_of_the_users_file_and_applies_nothing(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    before = file.read_bytes()
    assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file, "--log-only") == 0
    with Ledger(tmp_path / "home" / "ledger.sqlite3") as ledger:
        lines = ledger.list_proposals(limit=10)
        entries = [ledger.get(line.id) for line in lines]
    assert [(entry.proposal.surface, entry.proposal.path, entry.state.value) for entry in entries] == [
        ("bench", file, "proposed")
    ] * 2
    assert file.read_bytes() == before


def test_without_log_only_nothing_reaches_the_ledger(
    run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file) == 0
    assert not (tmp_path / "home" / "ledger.sqlite3").exists()


def test_json_of_a_repeated_edit_holds_the_summary_and_every_run(
    run: Run, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeat(run, ScriptedEngine(answering(ADD_MENDED.replace("    ", "\t"))), file, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["summary"]["n"], said["summary"]["errors"], [item["n"] for item in said["runs"]]) == (2, 0, [1, 2])
    assert set(said["files"]) >= {"results", "history"}
