"""The language server with the real 0.5B: how soon it answers, that it is never in the way, and that it can be stopped.

PLANPATCH_LSP_DEVICE=cuda runs it on a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lsp_client import LspClient
from tests.steering import LSP_DEVICE, TEST_MODEL

RecordFigure = Callable[[str, float | int | str, str], None]

pytestmark = pytest.mark.slow

FUNCTION = '''def collect_{n}(rows, key, default=None):
    """Group rows by a key."""
    groups = {{}}
    for row in rows:
        value = row.get(key, default)
        if value not in groups:
            groups[value] = []
        groups[value].append(row)
    names = sorted(groups, key=str)
    result = []
    for name in names:
        total = 0
        for row in groups[name]:
            total = total - row.get("amount", 0)
        result.append((name, total, len(groups[name])))
    return result


'''
INTENT = "the total must add the amounts; also add type hints and a docstring with Args and Returns"


@pytest.fixture
def client(home: Path) -> Iterator[LspClient]:
    with start(home) as client:
        yield client


def start(home: Path) -> LspClient:
    model = TEST_MODEL or "qwen2.5-coder-0.5b-instruct"
    return LspClient(home, "--model", model, "--device", LSP_DEVICE or "cpu", "--quantization", "bf16")


def long_file(num_lines: int) -> str:
    text, number = "", 0
    while text.count("\n") < num_lines:
        text += FUNCTION.format(n=number)
        number += 1
    return text


def begin_generating(client: LspClient, tmp_path: Path, text: str) -> tuple[str, dict[str, Any]]:
    """Wait for the model, open a file, ask for a patch, and return when its first tokens have come."""
    client.initialize(tmp_path, options={"notifications": ["planpatch/job"]})
    client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready", 120)
    uri = (tmp_path / "long.py").as_uri()
    client.open(uri, text)
    argument = {"uri": uri, "position": {"line": 3, "character": 0}, "intent": INTENT, "fresh": True}
    answer = client.command("planpatch.patch", argument)
    client.wait_for(lambda: num_tokens(client, answer) >= 3, 120)
    return uri, answer


def num_tokens(client: LspClient, answer: dict[str, Any]) -> int:
    jobs = [one for one in client.seen("planpatch/job") if one["jobId"] == answer["jobId"] and one["stage"] == "patch"]
    return jobs[-1]["numTokens"] if jobs else 0


def is_on_its_way(client: LspClient, answer: dict[str, Any]) -> bool:
    """Whether a job has not ended; how it ends is no matter here."""
    told = [one for one in client.seen("planpatch/job") if one["jobId"] == answer["jobId"]]
    return not told or told[-1]["state"] in ("waiting", "loading", "running")


def wait_until_idle(client: LspClient) -> float:
    started_at = time.monotonic()
    client.wait_for(lambda: not client.command("planpatch.status")["jobs"], 60)
    return time.monotonic() - started_at


# --- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["progress", *(pytest.param(way, marks=pytest.mark.long) for way in ("command", "any", "close"))]
)
def test_a_generation_stops_at_once_and_the_next_one_works(
    way: str, client: LspClient, tmp_path: Path, record_figure: RecordFigure
) -> None:
    text = long_file(60)
    uri, answer = begin_generating(client, tmp_path, text)
    if way == "progress":
        (token,) = {one["token"] for one in client.seen("$/progress") if one["token"].startswith("planpatch/j")}
        client.notify("window/workDoneProgress/cancel", {"token": token})
    elif way == "close":
        client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    else:
        argument = {"jobId": answer["jobId"]} if way == "command" else {}
        assert client.command("planpatch.cancel", argument) == {"cancelled": [answer["jobId"]]}
    record_figure(f"from cancel by {way} to idle", round(wait_until_idle(client), 2), "s")
    assert client.command("planpatch.status", {"jobId": answer["jobId"]})["state"] == "cancelled"
    ends = [one for one in client.seen("$/progress") if one["value"]["kind"] == "end"]
    assert any(one["token"] == f"planpatch/{answer['jobId']}" for one in ends)
    if way == "close":
        client.open(uri, text)
    argument = {"uri": uri, "position": {"line": 3, "character": 0}, "intent": "say what it does"}
    assert client.job(client.command("planpatch.plan", argument))["state"] == "done"
    assert client.command("planpatch.ledger")["proposals"] == [], "a cancelled patch leaves nothing"


def test_a_job_that_waits_is_cancelled_without_its_turn(client: LspClient, tmp_path: Path) -> None:
    uri, running = begin_generating(client, tmp_path, long_file(60))
    argument = {"uri": uri, "position": {"line": 25, "character": 0}, "intent": "x"}
    waiting = client.command("planpatch.patch", argument)
    assert waiting["position"] == 1
    titles = client.titles(uri, 3)
    assert "PlanPatch: cancel patch for collect_1" in titles
    client.command("planpatch.cancel", {"jobId": waiting["jobId"]})
    assert client.job(waiting)["state"] == "cancelled"
    assert client.command("planpatch.status", {"jobId": running["jobId"]})["state"] == "running"
    client.command("planpatch.cancel")
    assert client.job(running)["state"] == "cancelled"


def test_a_dead_client_stops_the_generation_and_the_process(client: LspClient, tmp_path: Path) -> None:
    begin_generating(client, tmp_path, long_file(60))
    assert client.process.stdin is not None
    client.process.stdin.close()
    assert client.process.wait(20) == 1


# --- never in the way ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_initialize_is_answered_soon(home: Path, record_figure: RecordFigure) -> None:
    whole, request = [], []
    for _ in range(7):
        with start(home) as client:
            client.request_raw("textDocument/codeAction", {})  # refused: `initialize` comes first; the process is up
            asked_at = time.monotonic()
            client.initialize()
            request.append(time.monotonic() - asked_at)
        with start(home) as client:
            client.initialize()
            whole.append(time.monotonic() - client.started_at)
    record_figure("initialize, from process start", round(max(whole), 2), "s (largest of 7)")
    record_figure(
        "initialize, from its request in a process that is up", round(1000 * max(request)), "ms (largest of 7)"
    )
    assert max(whole) < 1.5
    assert max(request) < 0.1


@pytest.mark.long
def test_menus_open_while_the_model_writes_and_the_user_types(
    home: Path, tmp_path: Path, record_figure: RecordFigure
) -> None:
    times: list[float] = []
    quiet: list[float] = []
    loaded: list[float] = []
    with start(home) as client:
        uri, answer = begin_generating(client, tmp_path, long_file(2000))
        client.job(answer)
        while len(quiet) < 3 or len(times) < 1000:
            quiet.append(rate_of_decode(client, uri, None))
            loaded.append(rate_of_decode(client, uri, times))
        quiet.append(rate_of_decode(client, uri, None))
    times.sort()
    p99_ms = 1000 * times[int(0.99 * len(times))]
    # Each loaded patch is compared with the quiet ones beside it: machines become faster and slower within a minute.
    beside = [(before + after) / 2 for before, after in itertools.pairwise(quiet)]
    share = statistics.median(under / alone for under, alone in zip(loaded, beside, strict=True))
    record_figure(
        "code actions asked for during generation, 2,000 lines, 20 a second beside 20 changes a second", len(times), ""
    )
    record_figure("code action p50", round(1000 * times[len(times) // 2], 1), "ms")
    record_figure("code action p99", round(p99_ms, 1), "ms")
    record_figure("code action, slowest", round(1000 * times[-1], 1), "ms")
    record_figure("decode, quiet", round(statistics.median(quiet), 2), f"tokens/s (median of {len(quiet)})")
    unit = f"tokens/s ({100 * share:.0f}% of the quiet ones beside)"
    record_figure("decode, under that load", round(statistics.median(loaded), 2), unit)
    assert len(times) >= 1000
    assert p99_ms <= (20 if LSP_DEVICE == "cuda" else 50)
    if LSP_DEVICE == "cuda":
        assert share >= 0.9


def rate_of_decode(client: LspClient, uri: str, times: list[float] | None) -> float:
    """Tokens a second of one patch; with `times`, menus are asked for, one for each key the user types."""
    argument = {"uri": uri, "position": {"line": 3, "character": 0}, "intent": INTENT, "fresh": True}
    answer = client.command("planpatch.patch", argument)
    if times is None:
        client.job(answer)
    else:
        stop = threading.Event()
        typing = threading.Thread(target=type_on, args=(client, uri, stop))
        typing.start()
        times += menus_during(client, uri, answer)
        stop.set()
        typing.join()
    told = [one for one in client.notifications if one["method"] == "planpatch/job"]
    mine = [one for one in told if one["params"]["jobId"] == answer["jobId"] and one["params"]["stage"] == "patch"]
    writing = [one for one in mine if one["params"].get("text")]
    num_decoded = writing[-1]["params"]["numTokens"] - writing[0]["params"]["numTokens"]
    return num_decoded / (writing[-1]["at"] - writing[0]["at"])


def menus_during(client: LspClient, uri: str, answer: dict[str, Any]) -> list[float]:
    """Seconds that each menu took, asked for 20 times a second while a job is on its way."""
    times: list[float] = []
    while is_on_its_way(client, answer):
        for _ in range(5):
            asked_at = time.monotonic()
            assert client.actions(uri, 1200)
            times.append(time.monotonic() - asked_at)
            time.sleep(max(0.0, 0.05 - times[-1]))
    return times


def type_on(client: LspClient, uri: str, stop: threading.Event) -> None:
    """20 changes a second at the end of the file."""
    while not stop.wait(0.05):
        version, text = client.texts[uri]
        client.texts[uri] = (version + 1, text + "# x\n")
        place = {"line": text.count("\n"), "character": 0}
        change = {"range": {"start": place, "end": place}, "text": "# x\n"}
        document = {"uri": uri, "version": version + 1}
        client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
