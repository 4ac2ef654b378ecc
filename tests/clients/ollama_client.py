"""ollama's own Python client against a server: prints what it saw as one JSON object. `python FILE URL MODEL`."""

from __future__ import annotations

import json
import sys

import ollama

url, model = sys.argv[1:3]
client = ollama.Client(host=url)
greedy = {"temperature": 0, "num_predict": 12}
hello = [{"role": "user", "content": "Say hi"}]
seen: dict[str, object] = {}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The sum.
    """
    return a + b


def refused(call) -> list[object]:
    try:
        call()
    except ollama.ResponseError as error:
        return [error.status_code, error.error]
    return [200, ""]


seen["list"] = [one.model for one in client.list().models]
shown = client.show(model)
seen["capabilities"] = shown.capabilities
seen["context_length"] = shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"]
seen["ps"] = [[one.model, one.context_length] for one in client.ps().models]
answer = client.chat(model, hello, options=greedy)
seen["chat"] = answer.message.content
seen["counts"] = [answer.done_reason, answer.prompt_eval_count, answer.eval_count, answer.total_duration]
seen["chat streamed"] = "".join(part.message.content for part in client.chat(model, hello, stream=True, options=greedy))
seen["generate"] = client.generate(model, "Say hi", options=greedy).response
sampled = {"temperature": 1.0, "seed": 7, "num_predict": 12}
seen["seeded"] = [client.generate(model, "Tell a story", options=sampled).response for _ in range(2)]
seen["stop"] = client.generate(model, "Count: 1, 2, 3,", raw=True, options={**greedy, "stop": ["5"]}).response
seen["middle"] = client.generate(model, "def add(a, b):\n    return ", suffix="\n", options=greedy).response
schema = {"type": "object", "properties": {"city": {"type": "string"}, "size": {"type": "integer"}}}
schema |= {"required": ["city", "size"], "additionalProperties": False}
question = [{"role": "user", "content": "Name a city and how many people live there, as JSON."}]
longer = {"temperature": 0, "num_predict": 80}
seen["schema"] = client.chat(model, question, format=schema, options=longer).message.content
seen["json"] = client.generate(model, "A JSON object with the key a", format="json", options=longer).response
use = [{"role": "user", "content": "What is 3 plus 4? Call the tool add."}]
called = client.chat(model, use, tools=[add], options=longer)
seen["tool calls"] = [[call.function.name, dict(call.function.arguments)] for call in called.message.tool_calls or []]
turns = [*use, called.message, {"role": "tool", "content": "7", "tool_name": "add"}]
seen["after the tool"] = client.chat(model, turns, options=greedy).message.content
seen["embed"] = [len(vector) for vector in client.embed(model, ["a", "b"]).embeddings]
seen["load"] = [client.generate(model, "").done_reason, client.generate(model, "", keep_alive=0).done_reason]
seen["unknown"] = refused(lambda: client.chat("nope", hello))
seen["images"] = refused(lambda: client.generate(model, "x", images=["aGk="]))
seen["think"] = refused(lambda: client.chat(model, hello, think=True))
seen["pull"] = refused(lambda: client.pull("smollm2-135m-instruct"))
print(json.dumps(seen))
