"""OpenAI's API with the real 0.5B, through `planpatch serve` and the real `openai` client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.http_server import MODEL, serve_05b

ADD = [{"role": "user", "content": "Write a Python function add(a, b). Only code."}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": CITY}}
    for name, description in (("get_weather", "The weather of a city"), ("get_time", "The time in a city"))
]
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"Tag": {"enum": ["a", "b"]}},
}


@pytest.fixture(scope="module")
def client(
    test_home: Path, model_folder_05b: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    with (
        serve_05b(test_home, tmp_path_factory.mktemp("http")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as client,
    ):
        yield client


def chat(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0, **options})


@pytest.mark.slow
def test_a_chat_streams_while_the_model_still_loads(client: openai.OpenAI) -> None:
    chunks = list(chat(client, ADD, stream=True, max_tokens=12, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "def add(" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)


@pytest.mark.slow
def test_streamed_or_not_greedy_answers_are_the_same_and_seeds_repeat(client: openai.OpenAI) -> None:
    whole = chat(client, ADD, max_tokens=40).choices[0].message.content
    chunks = list(chat(client, ADD, max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    told = [chat(client, ADD, temperature=1, seed=5, n=2, max_tokens=16) for _ in range(2)]
    first, again = ([choice.message.content for choice in answer.choices] for answer in told)
    assert first == again
    assert first[0] != first[1]


@pytest.mark.slow
def test_formats_are_kept_by_a_hot_model(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Describe Ada, 36 years old, tagged a and b, as JSON."}]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = chat(client, messages, response_format=schema, temperature=1.0, seed=seed, max_tokens=200)
        person = json.loads(answer.choices[0].message.content)
        assert set(person) == {"name", "age", "tags"}
        assert set(person["tags"]) <= {"a", "b"}
    answer = chat(client, messages, response_format={"type": "json_object"}, max_tokens=200)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("auto", "get_weather"),
        ("required", "get_weather"),
        ({"type": "function", "function": {"name": "get_time"}}, "get_time"),
    ],
)
def test_tools_are_called(client: openai.OpenAI, choice: Any, name: str) -> None:
    answer = chat(client, PARIS, tools=TOOLS, tool_choice=choice, max_tokens=60).choices[0]
    [call] = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name) == ("tool_calls", name)
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.slow
def test_an_answer_follows_a_tools_turn(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [
        *PARIS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 31 degrees"},
    ]
    answer = chat(client, turns, max_tokens=40)
    assert "31" in answer.choices[0].message.content


@pytest.mark.slow
def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = chat(client, ADD, logprobs=True, top_logprobs=3, max_tokens=10).choices[0]
    content = answer.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == answer.message.content
    for one in content:
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)  # greedy
        assert sum(math.exp(other.logprob) for other in one.top_logprobs) <= 1.0001
    told = client.completions.create(model=MODEL, prompt="1, 2, 3,", logprobs=1, stop="6", temperature=0).choices[0]
    assert told.logprobs is not None
    assert (told.text, told.finish_reason) == (" 4, 5, ", "stop")
    assert "".join(told.logprobs.tokens or []) == told.text


@pytest.mark.slow
def test_a_middle_is_filled_in(client: openai.OpenAI) -> None:
    told = client.completions.create(
        model=MODEL, prompt="def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))\n", temperature=0, max_tokens=8
    )
    assert told.choices[0].text.startswith("a + b")


@pytest.mark.slow
def test_embeddings_are_near_where_texts_are(client: openai.OpenAI) -> None:
    texts = ["a cat", "a kitten", "the stock market fell"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    cat, kitten, market = (one.embedding for one in answer.data)
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    assert plain == pytest.approx(cat, abs=1e-6)
    near, far = (sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, market))
    assert far < near < 1
    assert math.hypot(*cat) == pytest.approx(1, abs=1e-5)
