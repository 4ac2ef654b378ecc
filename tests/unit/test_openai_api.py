"""OpenAI's API through the real listener and the real `openai` client, with a scripted model."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.errors import EngineError
from engine.inference.catalogue import shipped_adapter
from engine.inference.grammar import grammar_fault
from engine.inference.protocol import FinishReason, Grammar
from lsp_server.http.openai_bodies import answer_schema
from lsp_server.http.splitting import ThinkSplitter
from lsp_server.http.tool_calls import find_calls
from tests.http_server import SCRIPTED, ScriptedChat, call, events, listen
from tests.scripted_engine import Reply, Script
from tests.unit.test_adapters import write

HI = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": SCRIPTED, "messages": HI}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": None,
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🌦"}}\n</tool_call>'


class Server:
    def __init__(self, engine: ScriptedChat, url: str, client: openai.OpenAI) -> None:
        self.engine, self.url, self.client = engine, url, client

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return call(f"{self.url}/v1/{path}", body)

    def fault(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        status, answer = self.post(path, **body)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]["param"], answer["error"]["message"]

    def stream(self, path: str, **body: Any) -> list[Any]:
        *chunks, done = events(f"{self.url}/v1/{path}", {**body, "stream": True})
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    @property
    def params(self) -> Any:
        return self.engine.requests[-1].params


def start(stack: ExitStack, folder: Path, script: Script, context_length: int = 1_000_000, **options: Any) -> Server:
    engine = ScriptedChat(script, folder, context_length=context_length)
    url = stack.enter_context(listen(engine, folder, **options))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="whatever", max_retries=0, timeout=30)
    return Server(engine, url, stack.enter_context(client))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield partial(start, stack, tmp_path)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model is never asked."""
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("home"), [])


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_found_and_not_found(serve: Callable[..., Server]) -> None:
    server = serve([])
    assert [model.id for model in server.client.models.list()] == ["scripted:latest"]
    found = server.client.models.retrieve("Scripted")
    assert (found.id, found.object, found.owned_by) == ("Scripted", "model", "planpatch")
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("gpt-4/o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_errors_take_openais_shape(silent: Server) -> None:
    server = silent
    assert server.fault("chat/completions", **{**CHAT, "model": "gpt-4"}) == (404, "model", "model 'gpt-4' not found")
    assert server.fault("nothing") == (404, None, "404 page not found")
    assert call(f"{server.url}/v1/nothing")[1]["error"]["code"] == "not_found"
    assert call(f"{server.url}/v1/chat/completions")[0] == 405
    assert call(f"{server.url}/v1/chat/completions", b"{")[1]["error"]["type"] == "invalid_request_error"


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered(serve: Callable[..., Server]) -> None:
    server = serve(["Grüezi 🙂"])
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]
    answer = server.client.chat.completions.create(
        model="Scripted",
        messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}],  # type: ignore
        extra_body={"unheard_of": 1, "stop": None, "n": None, "max_tokens": 50.0},
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Grüezi 🙂", "stop")
    assert (answer.model, answer.object, answer.system_fingerprint) == ("Scripted", "chat.completion", "fp_ababababab")
    assert answer.id.startswith("chatcmpl-")
    request = server.engine.requests[0]
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(request.prompt_token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.completion_tokens > 0
    assert server.engine.prompts == ["system\nBe kind.\nuser\nSay hello\nassistant\n"]
    assert (request.params.temperature, request.params.top_p, request.params.top_k) == (1.0, 1.0, 0)
    assert (request.params.max_new_tokens, request.params.seed, request.params.grammar) == (50, None, None)


def test_a_stream_has_one_id_a_role_first_and_one_reason(serve: Callable[..., Server]) -> None:
    server = serve(["naïve\u2028🙂"] * 2)
    chunks = server.stream("chat/completions", **CHAT)
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "naïve\u2028🙂"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)

    *chunks, last = server.stream("chat/completions", **CHAT, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert last["id"] == chunks[0]["id"]


def test_limits_stops_and_seeds_reach_the_engine(serve: Callable[..., Server]) -> None:
    server = serve(["one two END three"] * 4)
    _, answer = server.post("chat/completions", **CHAT, stop="END", seed=-1, temperature=0, top_p=0.5)
    assert answer["choices"][0]["message"]["content"] == "one two "
    assert server.params.seed == 2**63 - 1
    assert (server.params.temperature, server.params.top_p, server.params.stop) == (0.0, 0.5, ("END",))
    _, answer = server.post("chat/completions", **CHAT, max_tokens=9, max_completion_tokens=3, stop=["", "END"])
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "one"},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert server.params.stop == ("END",)
    server.post("chat/completions", **CHAT, max_tokens=-1)
    assert server.params.max_new_tokens > 900_000


def test_several_choices_have_seeds_that_follow(serve: Callable[..., Server]) -> None:
    server = serve(["a", "b", "c", "d"])
    _, answer = server.post("chat/completions", **CHAT, n=2, seed=7)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b"]
    assert [request.params.seed for request in server.engine.requests] == [7, 8]
    assert answer["usage"]["prompt_tokens"] == len(server.engine.requests[0].prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 2
    chunks = server.stream("chat/completions", **CHAT, n=2)
    told = [(chunk["choices"][0]["index"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert told == [(0, None), (0, None), (0, "stop"), (1, None), (1, None), (1, "stop")]


def test_a_copy_brings_its_system_prompt_and_options(serve: Callable[..., Server], tmp_path: Path) -> None:
    copy = {"from": "scripted:latest", "system": "Be kind.", "parameters": {"temperature": 0.25, "stop": ["END"]}}
    (tmp_path / "http-models.json").write_text(json.dumps({"kind:latest": copy}), encoding="utf-8")
    server = serve(["yes END", "no"])
    _, answer = server.post("chat/completions", model="kind", messages=HI)
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("kind", "yes ")
    assert server.engine.prompts == ["system\nBe kind.\nuser\nhi\nassistant\n"]
    assert (server.params.temperature, server.params.top_k) == (0.25, 0)
    server.post("chat/completions", model="kind", messages=[{"role": "system", "content": "Be short."}], temperature=2)
    assert server.engine.prompts[1] == "system\nBe short.\nassistant\n"
    assert server.params.temperature == 2


def test_thinking_is_told_apart_where_it_is_asked_for(serve: Callable[..., Server]) -> None:
    server = serve(["<think>\nhm\n</think>\n\nyes"] * 3)
    _, answer = server.post("chat/completions", **CHAT, reasoning_effort="low")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "yes", "reasoning": "hm"}
    deltas = [
        chunk["choices"][0]["delta"] for chunk in server.stream("chat/completions", **CHAT, reasoning_effort="low")
    ]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    _, answer = server.post("chat/completions", **CHAT, reasoning_effort="none")
    assert answer["choices"][0]["message"]["content"].startswith("<think>")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\nhm\n\nso\n</think>\n\nyes\n", "hm\n\nso", "yes\n"),
        ("\n<think>\n\n</think>\n\n  yes", "", "  yes"),
        ("<think>a < b </thin", "a < b </thin", ""),
        ("<thing>\n", "", "<thing>\n"),
        ("\n\nyes", "", "\n\nyes"),
    ],
)
def test_thinking_is_told_apart_however_it_is_cut(size: int, text: str, thinking: str, answer: str) -> None:
    splitter = ThinkSplitter(True)
    parts = [splitter.push(text[start : start + size]) for start in range(0, len(text), size)] + [splitter.flush()]
    assert tuple("".join(part) for part in zip(*parts, strict=True)) == (thinking, answer)


@pytest.mark.parametrize(
    ("wrong", "param", "message"),
    [
        ({"model": None}, "model", "model is required"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "required"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
        (
            {"messages": [{"role": "robot", "content": "hi"}]},
            "messages",
            'invalid role: "robot"; must be one of system, developer, user, assistant, tool, function',
        ),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported; use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported; use tools and tool_choice"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"top_p": -1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"stop": 3}, "stop", "a string, or a list of strings"),
        ({"stop": ["a", None]}, "stop", "a string, or a list of strings"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
            "invalid JSON schema",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "each has a function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
            "type object",
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice", "required"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "space"}}},
            "tool_choice",
            'no function "space"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "messages",
            "JSON object",
        ),
    ],
)
def test_a_wrong_field_is_named(silent: Server, wrong: Any, param: str, message: str) -> None:
    status, found, said = silent.fault("chat/completions", **{**CHAT, **wrong})
    assert (status, found) == (400, param)
    assert message in said


def test_what_changes_nothing_is_no_reason_to_refuse(serve: Callable[..., Server]) -> None:
    """And an older client's history, with `function_call` and the role `function`, is read."""
    server = serve(["yes"] * 2)
    nothing: dict[str, Any] = {"logit_bias": {}, "functions": [], "function_call": "none"}
    older = {"role": "assistant", "content": None, "function_call": {"name": "time", "arguments": ""}}
    nothing["messages"] = [*HI, older, {"role": "function", "name": "time", "content": "noon"}]
    assert server.post("chat/completions", model=SCRIPTED, **nothing)[0] == 200
    assert server.engine.prompts == ["user\nhi\nassistant\ntime{}\ntool\nnoon\nassistant\n"]
    assert server.post("completions", model=SCRIPTED, prompt="a", best_of=1, logit_bias=None)[0] == 200


def test_an_image_is_refused_clearly(silent: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]}]
    assert silent.fault("chat/completions", model=SCRIPTED, messages=messages) == (
        400,
        "messages.0.content.1",
        'messages.0.content.1: parts of type "image_url" are not supported; the model reads text',
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_does_not_fit_is_refused(serve: Callable[..., Server], stream: bool) -> None:
    server = serve([], context_length=40)
    messages = [*HI, {"role": "assistant", "content": "word " * 50}, *HI]
    status, answer = server.post("chat/completions", model=SCRIPTED, messages=messages, stream=stream)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


# --- streams that go wrong -------------------------------------------------------------------------------------------


def test_a_fault_mid_stream_is_one_event(serve: Callable[..., Server]) -> None:
    server = serve([EngineError("The device failed", hint="Restart.")] * 2)
    role, fault = events(f"{server.url}/v1/chat/completions", {**CHAT, "stream": True})
    assert json.loads(role)["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(fault)["error"]["message"] == "The device failed. Restart."
    with pytest.raises(openai.APIError, match="The device failed"):
        list(server.client.chat.completions.create(model=SCRIPTED, messages=HI, stream=True))  # type: ignore


def test_headers_and_role_come_while_the_model_loads(serve: Callable[..., Server]) -> None:
    loaded = threading.Event()
    server = serve(["Hello"], loaded=loaded)
    body = json.dumps({**CHAT, "stream": True}).encode()
    with urllib.request.urlopen(f"{server.url}/v1/chat/completions", body, timeout=30) as response:
        assert response.status == 200
        assert b'"role": "assistant"' in response.readline()
        assert server.engine.requests == []
        loaded.set()
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_an_adapter_that_ships_is_for_edits_and_a_user_s_own_for_all(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(["one", "two"])
    ships = shipped_adapter("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert ships is not None
    for folder in (ships.path, write(tmp_path / "mine")):
        server.engine.use_adapter(str(folder))
        body = json.dumps(CHAT).encode()
        urllib.request.urlopen(f"{server.url}/v1/chat/completions", body, timeout=30).close()
    assert [request.adapter for request in server.engine.requests] == ["__none__", None]


def test_leaving_a_stream_cancels_it(serve: Callable[..., Server]) -> None:
    was_asked, may_answer = threading.Event(), threading.Event()

    def slow(prompt: str) -> str:
        was_asked.set()
        return "too late" if may_answer.wait(30) else ""

    server = serve(slow)
    body = json.dumps({**CHAT, "stream": True}).encode()
    try:
        with urllib.request.urlopen(f"{server.url}/v1/chat/completions", body, timeout=30) as response:
            response.readline()
            assert was_asked.wait(30), (
                "whoever leaves before that is answered by nobody, and nothing is to be cancelled"
            )
        assert server.engine.was_cancelled.wait(10)
    finally:
        may_answer.set()


# --- formats and tools -----------------------------------------------------------------------------------------------


def test_formats_become_grammars(serve: Callable[..., Server]) -> None:
    server = serve(["{}"] * 3)
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    for wanted, grammar in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}, schema),
    ):
        assert server.post("chat/completions", **CHAT, response_format=wanted)[0] == 200
        found = server.params.grammar
        assert (found and json.loads(found.text)) == grammar


def test_a_tool_call_is_told_in_openais_shape(serve: Callable[..., Server]) -> None:
    server = serve([f"I look.\n{CALL}"])
    answer = server.client.chat.completions.create(
        model=SCRIPTED,
        messages=HI,  # type: ignore
        tools=[WEATHER],  # type: ignore
        parallel_tool_calls=True,
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.\n")
    [found] = choice.message.tool_calls or []
    assert found.type == "function"
    assert found.id.startswith("call_")
    assert (found.function.name, found.function.arguments) == ("weather", '{"city": "Zürich 🌦"}')
    shown = json.loads(server.engine.prompts[0].splitlines()[1])
    assert shown["function"] == {key: value for key, value in WEATHER["function"].items() if key != "strict"}
    assert server.params.grammar is None


def test_tool_calls_are_streamed_with_their_places(serve: Callable[..., Server]) -> None:
    server = serve([f"{CALL}\n{CALL}"] * 2)
    chunks = server.stream("chat/completions", **CHAT, tools=[WEATHER])
    calls = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [(one["index"], one["type"], json.loads(one["function"]["arguments"])) for one in calls] == [
        (0, "function", {"city": "Zürich 🌦"}),
        (1, "function", {"city": "Zürich 🌦"}),
    ]
    assert len({one["id"] for one in calls}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).strip() == ""
    _, answer = server.post("chat/completions", **CHAT, tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


def test_calls_may_stand_bare_one_after_the_other() -> None:
    one, two = '{"name": "time", "arguments": {}}', '{"name": "weather", "parameters": {"city": "Bern"}}'
    text, calls = find_calls(f"{one}\n{two}\n", ["time", "weather"])
    assert (text, [call.name for call in calls]) == ("", ["time", "weather"])
    for text in (f"{one}\n{two[:-1]}", f"{one} and so on", f"{one}\n{{}}", ""):
        assert find_calls(text, ["time", "weather"]) == (text, [])


def test_turns_of_tools_are_part_of_the_history(serve: Callable[..., Server]) -> None:
    server = serve(["Rain."])
    asked = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    later = {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": ""}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [asked, later]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
    ]
    assert server.post("chat/completions", model=SCRIPTED, messages=messages)[0] == 200
    history = 'user\nhi\nassistant\nweather{"city": "Bern"}time{}\ntool\nrain\ntool\nnoon\nassistant\n'
    assert server.engine.prompts == [history]


def test_a_choice_of_tools_is_forced_by_a_grammar(serve: Callable[..., Server]) -> None:
    server = serve(['{"name": "weather", "arguments": {"city": "Bern"}}'] * 4)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, callable_ in (("required", ["weather", "time"]), (named, ["weather"])):
        _, answer = server.post("chat/completions", **CHAT, tools=[WEATHER, TIME], tool_choice=choice)
        [found] = answer["choices"][0]["message"]["tool_calls"]
        assert json.loads(found["function"]["arguments"]) == {"city": "Bern"}
        assert answer["choices"][0]["message"]["content"] is None
        ways = json.loads(server.params.grammar.text)["anyOf"]
        assert [way["properties"]["name"]["const"] for way in ways] == callable_
    _, answer = server.post("chat/completions", **CHAT, tools=[WEATHER], tool_choice="none")
    assert "tool_calls" not in answer["choices"][0]["message"]
    params = server.params
    assert params.grammar is None
    assert "weather" not in server.engine.prompts[-1]
    server.post("chat/completions", **CHAT, tools=[WEATHER], response_format={"type": "json_object"})
    assert len(json.loads(server.params.grammar.text)["anyOf"]) == 2


def test_schemas_put_together_keep_their_references() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/Leaf"}}}
    tree["$defs"] = {"Leaf": {"type": "integer"}}
    schema = answer_schema([{"name": "grow", "parameters": tree}, {"name": "stop"}], tree)
    places = schema["$defs"]
    assert places["arguments0"]["properties"]["left"] == {"$ref": "#/$defs/arguments0"}
    assert places["answer"]["properties"]["leaf"] == {"$ref": "#/$defs/answer/$defs/Leaf"}
    assert grammar_fault(Grammar("json_schema", json.dumps(schema))) == ""


# --- completions -----------------------------------------------------------------------------------------------------


def test_completions_take_text_lists_and_token_ids(serve: Callable[..., Server]) -> None:
    server = serve([" a", " b", " c", " d", " e", " f"])
    answer = server.client.completions.create(model=SCRIPTED, prompt="def f():", echo=True)
    assert (answer.choices[0].text, answer.object, answer.id[:5]) == ("def f(): a", "text_completion", "cmpl-")
    assert (server.engine.prompts, server.params.max_new_tokens) == (["def f():"], 16)
    _, several = server.post("completions", model=SCRIPTED, prompt=["x", "y"])
    assert [choice["text"] for choice in several["choices"]] == [" b", " c"]
    assert server.engine.prompts[1:] == ["x", "y"]
    ids = server.engine.tokenizer.encode("return")
    chunks = server.stream("completions", model=SCRIPTED, prompt=[ids, [float(one) for one in ids]], echo=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["return d", "return e"]
    assert server.post("completions", model=SCRIPTED, prompt=ids)[0] == 200
    assert server.engine.requests[-1].prompt_token_ids == tuple(ids)


def test_a_suffix_asks_for_the_middle(serve: Callable[..., Server]) -> None:
    server = serve(["a + b", "a + b"])
    tokenizer = server.engine.tokenizer
    answer = server.client.completions.create(
        model=SCRIPTED, prompt="def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))"
    )
    assert answer.choices[0].text == "a + b"
    expected = tokenizer.encode_fim("def add(a, b):\n    return ", "\n\nprint(add(1, 2))")  # type: ignore
    assert server.engine.requests[0].prompt_token_ids == tuple(expected)
    assert server.post("completions", model=SCRIPTED, suffix="x")[0] == 200


def test_max_tokens_0_only_counts(serve: Callable[..., Server]) -> None:
    server = serve([])
    _, answer = server.post("completions", model=SCRIPTED, prompt="return", max_tokens=0, echo=True)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("return", "length")
    assert answer["usage"]["completion_tokens"] == 0 < answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": [1, 2], "suffix": "x"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias"),
    ],
)
def test_a_wrong_completion_is_named(silent: Server, wrong: Any, param: str) -> None:
    assert silent.fault("completions", model=SCRIPTED, **wrong)[:2] == (400, param)


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_of_a_chat(serve: Callable[..., Server]) -> None:
    server = serve(["hé"] * 3)
    _, answer = server.post("chat/completions", **CHAT, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "hé"
    assert content[0]["token"] == "h"
    assert [one["logprob"] for one in content] == [-0.5] * len(content)
    assert content[0]["top_logprobs"][1] == {"token": "<|im_end|>", "logprob": -2.5, "bytes": []}
    _, answer = server.post("chat/completions", **CHAT, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    chunks = server.stream("chat/completions", **CHAT, logprobs=True, top_logprobs=2)
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content


def test_logprobs_of_completions(serve: Callable[..., Server]) -> None:
    server = serve(["ab", "ab", Reply("ab", FinishReason.LENGTH)])
    _, answer = server.post("completions", model=SCRIPTED, prompt="x", logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "ab"
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["a"], ["b"]]
    chunks = server.stream("completions", model=SCRIPTED, prompt="x", logprobs=0)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [(one["tokens"], one["text_offset"], one["top_logprobs"]) for one in told] == [
        (["a"], [0], None),
        (["b"], [1], None),
    ]


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_as_numbers_and_base64(serve: Callable[..., Server]) -> None:
    server = serve(lambda prompt: "")
    answer = server.client.embeddings.create(model=SCRIPTED, input=["a", "b"])  # the client asks for base64
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.data[0].embedding == pytest.approx([3 / 13, 4 / 13, 12 / 13])
    assert (answer.model, answer.usage.prompt_tokens) == (SCRIPTED, 2)
    _, plain = server.post("embeddings", model=SCRIPTED, input=[4, 5, 6], dimensions=2)
    assert plain["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert server.engine.requests[-1].prompt_token_ids == (4, 5, 6)
    assert server.fault("embeddings", model=SCRIPTED, input=[])[:2] == (400, "input")
    assert server.fault("embeddings", model=SCRIPTED, input="a", encoding_format="hex")[:2] == (400, "encoding_format")


def test_any_authorization_is_accepted_until_a_token_is_set(serve: Callable[..., Server]) -> None:
    assert [model.id for model in serve([]).client.models.list()] == ["scripted:latest"]
    with pytest.raises(openai.AuthenticationError):
        serve([], token="s3cret").client.models.list()
