"""JSON schemas of clients: keywords that the grammar engine does not know are left out, everything else holds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lsp_server.http.schemas import enforceable

NOT = {"properties": {"not": {"type": "string"}}, "required": ["not"]}


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, {"uniqueItems"}),
        ({"type": "object", **NOT, "not": {"required": ["x"]}}, {"not"}),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "contains": {}}}}, {"in a"}),
        ({"enum": [{"uniqueItems": 1}]}, set()),
    ],
)
def test_unknown_keywords_are_left_out_and_names_stay(schema: dict[str, Any], left: set[str]) -> None:
    grammar, fault = enforceable(schema)
    assert fault == ""
    kept = json.loads(grammar.text)
    if not left:
        assert kept == schema
    if "not" in left:
        assert kept == {"type": "object", **NOT}
    if "uniqueItems" in left:
        assert kept == {"type": "array", "items": {"type": "integer"}}
    if "in a" in left:
        assert kept["properties"]["a"] == {"type": "array"}


@pytest.mark.parametrize("schema", [{"type": "strin"}, {"$ref": "#/$defs/none"}, {"type": "string", "pattern": "("}])
def test_a_schema_that_is_wrong_is_refused(schema: dict[str, Any]) -> None:
    assert enforceable(schema)[1] != ""
