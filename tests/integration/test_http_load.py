"""HTTP under load with the real 0.5B: eight clients beside one, a PLAN among them, random schemas, vanishing clients.

Figures go to the dated summary; nothing here fails because a machine is slow, but for ratios of one run.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jsonschema
import psutil
import pytest

from tests.conftest import TEST_HOME
from tests.http_server import MODEL, call, serve_05b

pytestmark = pytest.mark.long
RecordFigure = Callable[[str, float | int | str, str], None]
NUM_CLIENTS = 8
NUM_TOKENS = 128


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_05b(TEST_HOME, tmp_path_factory.mktemp("serve")) as url:
        call(f"{url}/api/generate", {"model": MODEL})
        yield url


def generate(url: str, prompt: str, num_tokens: int, **more: Any) -> dict[str, Any]:
    options = {"temperature": 0, "num_predict": num_tokens, **more.pop("options", {})}
    body = {"model": MODEL, "prompt": prompt, "raw": True, "stream": False, "options": options, **more}
    status, answer = call(f"{url}/api/generate", body)
    assert status == 200, answer
    return answer


def rate(url: str, num_clients: int) -> float:
    """Tokens a second of several clients together, each with a text of its own that does not end."""
    prompts = [
        f"# The numbers from {number}00 on, one on each line:\n{number}00\n{number}01\n" for number in range(1, 9)
    ]
    with ThreadPoolExecutor(num_clients) as clients:
        started_at = time.monotonic()
        answers = list(clients.map(lambda prompt: generate(url, prompt, NUM_TOKENS), prompts[:num_clients]))
        elapsed_s = time.monotonic() - started_at
    num_tokens = sum(answer["eval_count"] for answer in answers)
    assert num_tokens > 0.9 * num_clients * NUM_TOKENS, "the texts are meant not to end"
    return num_tokens / elapsed_s


def test_eight_clients_decode_together(url: str, record_figure: RecordFigure) -> None:
    rate(url, 1)
    alone, together = [], []
    for _ in range(3):
        alone.append(rate(url, 1))
        together.append(rate(url, NUM_CLIENTS))
    ratio = statistics.median(both / one for both, one in zip(together, alone, strict=True))
    record_figure("HTTP, one client", round(statistics.median(alone), 1), "tokens/s")
    record_figure("HTTP, eight clients together", round(statistics.median(together), 1), "tokens/s")
    record_figure("HTTP, eight clients against one", round(ratio, 2), "times")
    assert ratio >= 2.5


def first_token_s(url: str, number: int) -> float:
    """From asking for a PLAN to its first token: queue and prefill, as the plan's timings say."""
    code = f"def area_{number}(width, height):\n    total = width + height + {number}\n    return total\n"
    status, made = call(f"{url}/plan", {"intent": f"multiply them, case {number}", "code_paste": code})
    assert status == 200, made
    return made["timings"]["queue_s"] + made["timings"]["prefill_s"]


def test_a_plan_begins_soon_under_that_load(url: str, record_figure: RecordFigure) -> None:
    first_token_s(url, 0)
    idle = [first_token_s(url, number) for number in range(1, 6)]
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            generate(url, f"# Numbers of list {number}:\n1\n2\n", NUM_TOKENS)

    clients = [threading.Thread(target=load, args=(number,)) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    while call(f"{url}/health")[1]["queue"]["running"] < NUM_CLIENTS:
        time.sleep(0.1)
    time.sleep(2)
    busy = [first_token_s(url, number) for number in range(6, 11)]
    stop.set()
    for client in clients:
        client.join()
    ratio = statistics.median(busy) / statistics.median(idle)
    record_figure("first token of a PLAN, idle", round(statistics.median(idle), 2), "s")
    record_figure(
        "first token of a PLAN beside eight clients", round(statistics.median(busy), 2), f"s ({ratio:.2f} times)"
    )
    assert ratio <= 2


# --- schemas ---------------------------------------------------------------------------------------------------------


def random_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the kinds that clients send; texts and lists are short, so that an answer ends within its budget."""
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "null or"]
    kinds += ["object", "array", "object"] if depth < 3 else []
    kind = source.choice(kinds) if depth else source.choice(["object", "array", "object"])
    if kind == "string":
        return {"type": "string", "maxLength": source.randint(3, 12)}
    if kind == "integer":
        least = source.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + source.randint(0, 100)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 10}
    if kind == "enum":
        return {"enum": source.sample(["red", "green", "blue", 1, 2.5, None, True], 3)}
    if kind == "const":
        return {"const": source.choice(["fixed", 7, True])}
    if kind == "null or":
        return {"anyOf": [random_schema(source, depth + 1), {"type": "null"}]}
    if kind == "array":
        return {
            "type": "array",
            "items": random_schema(source, depth + 1),
            "minItems": source.randint(0, 2),
            "maxItems": 3,
        }
    if kind == "object":
        names = source.sample(["name", "size", "tags", "next", "is_new", "한국어", "a b"], source.randint(1, 4))
        properties = {name: random_schema(source, depth + 1) for name in names}
        required = source.sample(names, source.randint(0, len(names)))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def whole_schema(source: random.Random) -> dict[str, Any]:
    if source.random() < 0.3:  # a definition that is referred to
        inner = random_schema(source, 2)
        properties = {"one": {"$ref": "#/$defs/Part"}, "more": {"type": "array", "items": {"$ref": "#/$defs/Part"}}}
        properties["more"]["maxItems"] = 2
        return {
            "$defs": {"Part": inner},
            "type": "object",
            "properties": properties,
            "required": ["one"],
            "additionalProperties": False,
        }
    return random_schema(source)


def test_two_hundred_random_schemas_hold(url: str, record_figure: RecordFigure) -> None:
    source = random.Random(20261126)
    schemas = [whole_schema(source) for _ in range(200)]

    def fault_of(numbered: tuple[int, dict[str, Any]]) -> str:
        number, schema = numbered
        options = {"temperature": 1.0 if number % 2 else 0.0, "seed": number}
        prompt = f"An example of this JSON schema: {json.dumps(schema, ensure_ascii=False)}\n"
        answer = generate(url, prompt, 600, format=schema, options=options)
        try:
            jsonschema.validate(json.loads(answer["response"]), schema)
        except (ValueError, jsonschema.ValidationError) as fault:
            return f"{schema}: {answer['response']!r} ({answer['done_reason']}): {fault}"
        return ""

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        faults = [fault for fault in clients.map(fault_of, enumerate(schemas)) if fault]
    record_figure("random JSON schemas that held", len(schemas) - len(faults), f"of {len(schemas)}")
    assert faults == []


# --- clients that vanish, and time -----------------------------------------------------------------------------------


def test_two_hundred_clients_that_vanish_leave_no_slot_taken(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    source = random.Random(7)
    for number in range(200):
        body = {"model": MODEL, "prompt": f"Count from {number}", "stream": source.random() < 0.7}
        data = json.dumps({**body, "options": {"num_predict": 500}}).encode()
        path = "/v1/chat/completions" if source.random() < 0.3 else "/api/generate"
        if path == "/v1/chat/completions":
            turns = [{"role": "user", "content": "Count"}]
            data = json.dumps({"model": MODEL, "messages": turns, "stream": body["stream"]}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            whole = head + data
            connection.sendall(whole[: source.randint(10, len(whole))] if source.random() < 0.2 else whole)
            if source.random() < 0.3:
                connection.settimeout(1)
                try:
                    connection.recv(source.randint(1, 2000))
                except OSError:
                    pass
    started_at = time.monotonic()
    while (queue := call(f"{url}/health")[1]["queue"])["running"] or queue["waiting"]:
        assert time.monotonic() - started_at < 60, queue
        time.sleep(0.1)
    started_at = time.monotonic()
    generate(url, "hi", 2)
    assert time.monotonic() - started_at < 10


def test_memory_stays_where_it_is_under_mixed_load(url: str, record_figure: RecordFigure) -> None:
    port = int(url.rpartition(":")[2])
    (server,) = {
        one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and cast(Any, one.laddr).port == port
    }
    process = psutil.Process(server)
    source = random.Random(3)
    minutes, warm_up = 30, 5
    end_at = time.monotonic() + 60 * minutes
    used: list[tuple[float, int]] = []
    faults: list[str] = []

    def client(number: int) -> None:
        mine = random.Random(number)
        while time.monotonic() < end_at:
            try:
                _one_of_many(url, mine)
            except Exception as fault:
                faults.append(repr(fault))

    clients = [threading.Thread(target=client, args=(source.random(),)) for _ in range(6)]
    for one in clients:
        one.start()
    while time.monotonic() < end_at:
        time.sleep(5)
        used.append((time.monotonic(), process.memory_info().rss))
    for one in clients:
        one.join()
    warm = [rss for at, rss in used if end_at - 60 * (minutes - warm_up) <= at <= end_at - 60 * (minutes - warm_up - 3)]
    last = [rss for at, rss in used if at >= end_at - 180]
    growth = statistics.median(last) / statistics.median(warm) - 1
    record_figure("memory after warm-up", round(statistics.median(warm) / 1e6), "MB")
    record_figure("memory after 30 minutes of mixed load", round(100 * growth, 1), "% more than after warm-up")
    assert faults == []
    assert abs(growth) <= 0.03 or growth < 0


def _one_of_many(url: str, source: random.Random) -> None:
    kind = source.randrange(6)
    prompt = "word " * source.randint(1, 300)
    if kind == 0:
        generate(url, prompt, source.randint(1, 60))
    elif kind == 1:
        turns = [{"role": "user", "content": prompt}]
        body = {"model": MODEL, "messages": turns, "options": {"num_predict": 30, "temperature": 1}}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/chat", json.dumps(body).encode())) as response:
            response.read(None if source.random() < 0.7 else 200)
    elif kind == 2:
        assert call(f"{url}/api/embed", {"model": MODEL, "input": [prompt]})[0] == 200
    elif kind == 3:
        assert call(f"{url}/api/tags")[0] == 200
        assert call(f"{url}/api/generate", {"model": "nope", "prompt": "x"})[0] == 404
    elif kind == 4:
        generate(url, "An object: ", 40, format={"type": "object"})
    else:
        body = {"intent": "add them", "code_paste": f"def f{source.randrange(10**6)}(a, b):\n    return a - b\n"}
        status, made = call(f"{url}/plan", body)
        assert status == 200
        assert call(f"{url}/patch_smart", {"plan": made["plan"]})[0] in (200, 422)
