"""JSON schemas as the grammar engine takes them: a keyword that it does not know is left out, the rest is enforced.

Clients send such schemas (a Python set is `uniqueItems`), and Ollama ignores what it does not know; an answer then fits
the schema but for those keywords. Not covered: telling the client which were left out.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from engine.inference.grammar import grammar_fault
from engine.inference.protocol import Grammar

_UNKNOWN = re.compile(r"Unimplemented keys: (\[.*\])")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")
_MOST_ROUNDS = 5


def enforceable(schema: object) -> tuple[Grammar, str]:
    """A grammar of a schema.

    Args:
        schema: The schema, JSON.

    Returns:
        The grammar, and what keeps it from being used; empty if nothing does.
    """
    fault = ""
    for _ in range(_MOST_ROUNDS):
        grammar = Grammar("json_schema", json.dumps(schema))
        fault = grammar_fault(grammar)
        unknown = _UNKNOWN.search(fault)
        if unknown is None:
            return grammar, fault
        schema = _without(schema, set(json.loads(unknown[1])))
    return Grammar("json_schema", json.dumps(schema)), fault


def _without(schema: object, keys: set[str]) -> Any:
    """A schema without some keywords; names of properties and values are left alone."""
    if isinstance(schema, list):
        return [_without(item, keys) for item in cast("list[object]", schema)]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, object] = {}
    for key, value in cast("dict[str, object]", schema).items():
        if key in keys:
            continue
        if key in _NAMED and isinstance(value, dict):
            table = cast("dict[str, object]", value)
            found[key] = {name: _without(inner, keys) for name, inner in table.items()}
        else:
            found[key] = value if key in _VALUES else _without(value, keys)
    return found
