"""Calls of tools in what a model wrote: Qwen's `<tool_call>` tags, or a bare JSON object as Llama writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lsp_server.http.errors import HttpError

_NAME = re.compile(r"[\w./:-]{1,128}")
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n\s*```\s*\Z", re.DOTALL)
OPENING = "<tool_call>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call that the model wrote.

    Args:
        name: The tool.
        arguments: What to call it with.
    """

    name: str
    arguments: dict[str, Any]


def checked_tools(tools: list[dict[str, Any]]) -> tuple[str, ...]:
    """Definitions of tools as the chat template takes them.

    Args:
        tools: As the client gave them.

    Returns:
        Each as JSON text.

    Raises:
        HttpError: 400: one is no function with a name.
    """
    for tool in tools:
        function: object = tool.get("function")
        name: object = cast("Mapping[str, object]", function).get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            message = "tools: each has a function with a name of letters, digits and _ - . : /"
            raise HttpError(400, message, param="tools")
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)


def check_call_name(name: str) -> None:
    """Refuse a name of a tool that could pose as something else in a prompt.

    Args:
        name: The name.

    Raises:
        HttpError: 400.
    """
    if not _NAME.fullmatch(name):
        raise HttpError(400, f"the tool's name {name!r} is not of letters, digits and _ - . : /", param="messages")


def find_calls(text: str, names: Collection[str]) -> tuple[str, list[FoundCall]]:
    """Take the calls out of what a model wrote.

    Args:
        text: What it wrote.
        names: The tools that it was given.

    Returns:
        The text beside the calls, and the calls; a call that is no JSON or of another tool stays text.
    """
    calls: list[FoundCall] = []

    def take(match: re.Match[str]) -> str:
        found = _calls_in(match[1], names)
        calls.extend(found)
        return "" if found else match[0]

    rest = _TAGGED.sub(take, text)
    if calls:
        return rest.strip(), calls
    fenced = _FENCED.match(text)
    bare = _calls_in(fenced[1] if fenced else text.strip(), names)
    return ("", bare) if bare else (text, [])


def _calls_in(text: str, names: Collection[str]) -> list[FoundCall]:
    """The calls that a text consists of: JSON objects, or lists of them, one after the other."""
    items: list[object] = []
    rest = text.strip()
    while rest:
        try:
            found, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        items += cast("list[object]", found) if isinstance(found, list) else [found]
        rest = rest[end:].lstrip()
    calls = [call for item in items if (call := _call_of(item, names)) is not None]
    return calls if len(calls) == len(items) else []


def _call_of(item: object, names: Collection[str]) -> FoundCall | None:
    if not isinstance(item, Mapping):
        return None
    table = cast("Mapping[str, object]", item)
    name, arguments = table.get("name"), table.get("arguments", table.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return FoundCall(name, cast("dict[str, Any]", arguments))
