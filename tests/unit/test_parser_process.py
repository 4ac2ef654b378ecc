"""Python is read in a child process: the same answers and errors, and a child that dies or hangs takes only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from engine.errors import CancelledError, EngineError, GateError, UnknownScopeError
from engine.patching.context import build_context
from engine.patching.edits import Edit
from engine.patching.parser_process import ParserProcess, in_this_process
from engine.patching.proof import Question, check_hunks, prove
from engine.patching.scopes import find_scope
from engine.patching.source import Source

TEXT = "import os\n\n\ndef add(a, b):\n    return a - b\n\n\ndef name():\n    return os.getcwd()\n"
SOURCE = Source.from_text(TEXT, "a.py")


@pytest.fixture(scope="module")
def parsers() -> Iterator[ParserProcess]:
    process = ParserProcess()
    yield process
    process.close()


@pytest.fixture
def own() -> Iterator[ParserProcess]:
    """One that may be broken."""
    process = ParserProcess(time_limit_s=2.0)
    yield process
    process.close()


def test_the_answers_are_those_of_this_process(parsers: ParserProcess) -> None:
    scope = parsers(find_scope, SOURCE, "add")
    assert scope == in_this_process(find_scope, SOURCE, "add")
    assert parsers(build_context, SOURCE, scope, max_chars=300) == build_context(SOURCE, scope, max_chars=300)
    question = Question(SOURCE, scope, SOURCE, scope, "rewrite")
    answer = "def add(a, b):\n    return a + b\n"
    proof = parsers(prove, question, answer)
    assert proof == prove(question, answer)
    assert proof.report.patched is not None
    assert proof.report.patched.text == TEXT.replace("a - b", "a + b")
    assert "+    return a + b" in proof.diff


def test_errors_come_over_with_their_hints_and_details(parsers: ParserProcess) -> None:
    with pytest.raises(UnknownScopeError) as found:
        parsers(find_scope, SOURCE, "ad")
    with pytest.raises(UnknownScopeError) as expected:
        find_scope(SOURCE, "ad")
    assert found.value.to_json() == expected.value.to_json()
    scope = find_scope(SOURCE, "add")
    broken = [Edit("a.py", "replace", 5, 5, "    return a - b", "    return (")]
    with pytest.raises(GateError) as refused:
        parsers(check_hunks, SOURCE, scope, broken, (), "patch_1")
    assert refused.value.details["gate"] == "ast"
    assert refused.value.hint


def test_other_errors_come_over_too(parsers: ParserProcess) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parsers(int, "x")
    with pytest.raises(RuntimeError, match="cannot be sent"):
        parsers(threading.Lock)
    assert parsers(len, "abc") == 3


def test_what_prints_in_the_child_is_no_answer(parsers: ParserProcess) -> None:
    parsers(print, "hello")
    parsers(os.write, 1, b"hello\n")
    parsers(os.system, "echo hello")
    assert parsers(os.read, 0, 1) == b""
    assert parsers(len, "abc") == 3


def test_a_child_that_dies_takes_only_its_call(own: ParserProcess) -> None:
    with pytest.raises(EngineError, match=r"ended with code 3 \(in _exit\)"):
        own(os._exit, 3)
    assert own(len, "abc") == 3
    os.kill(own(os.getpid), signal.SIGTERM)  # between two calls
    assert own(len, "abcd") == 4


def test_a_call_whose_child_was_killed_is_made_again(own: ParserProcess) -> None:
    """The work is pure, and what it works on took the model seconds to write."""
    own(len, "")
    pid = own.pid
    assert pid is not None
    threading.Timer(0.3, os.kill, (pid, signal.SIGTERM)).start()
    own(time.sleep, 1)
    assert own.pid not in (None, pid)


def test_a_call_that_does_not_end_is_ended(own: ParserProcess) -> None:
    own(len, "")
    with pytest.raises(EngineError, match="took longer than 2 s"):
        own(time.sleep, 60)
    assert own(len, "abc") == 3


def test_a_cancelled_call_ends_at_once_and_no_other_does(own: ParserProcess) -> None:
    own(len, "")
    is_cancelled = threading.Event()
    call = own.cancellable(is_cancelled)
    assert call(len, "abc") == 3
    call.cancel()  # nothing is under way
    assert own(len, "abc") == 3

    def cancel() -> None:
        is_cancelled.set()
        call.cancel()

    threading.Timer(0.3, cancel).start()
    started_at = time.monotonic()
    with pytest.raises(CancelledError):
        call(time.sleep, 60)
    assert time.monotonic() - started_at < 1.5
    with pytest.raises(CancelledError):
        call(len, "abc")
    assert own(len, "abc") == 3


def test_close_ends_the_call_that_is_under_way(own: ParserProcess) -> None:
    own(len, "")
    pid = own.pid
    assert pid is not None
    threading.Timer(0.3, own.close).start()
    with pytest.raises(EngineError, match="closing"):
        own(time.sleep, 60)
    with pytest.raises(EngineError, match="closing"):
        own(len, "abc")
    assert not psutil.pid_exists(pid)


def test_calls_of_several_threads_do_not_mix(parsers: ParserProcess) -> None:
    found: dict[int, int] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            found[number] = parsers(len, "x" * number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(8)}


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
@pytest.mark.parametrize(
    "work", ["p(len, '')", "threading.Thread(target=p, args=(time.sleep, 60), daemon=True).start()"]
)
def test_no_child_is_left_when_the_parent_is_killed(work: str) -> None:
    script = (
        "import threading, time; from engine.patching.parser_process import ParserProcess; p = ParserProcess(1.0);"
        f"p(len, ''); {work}; time.sleep(0.3); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone and not alive


def test_it_imports_neither_torch_nor_pygls(parsers: ParserProcess) -> None:
    parsers.start()
    modules: set[str] = parsers(eval, "set(__import__('sys').modules)")
    assert "libcst" in modules
    assert modules & {"torch", "transformers", "pygls", "fastapi"} == set()
