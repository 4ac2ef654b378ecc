"""The OpenAPI document: routes read their bodies by hand, so what they take is said here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_STATUSES = {
    400: "The request is wrong; the field is named",
    401: "A token is needed",
    403: "A foreign Host or Origin, or a path outside the root",
    404: "Unknown model, plan, patch or path",
    408: "The body came too slowly",
    409: "The code changed, or another model is in memory",
    413: "Too large",
    415: "The body is compressed",
    422: "A gate refused the patch",
    503: "There is no model now, or the queue is full; Retry-After, if there, says when to come again",
    504: "Out of tokens or time",
}
_schemas: dict[str, Any] = {}


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a route that takes a body of a kind.

    Args:
        body: The kind.

    Returns:
        For `@router.post(path, **takes(Body))`.
    """
    found = body.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
    _schemas.update(found.pop("$defs", {}))
    _schemas[body.__name__] = found
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def describe(app: FastAPI) -> None:
    """Complete an application's document.

    Args:
        app: The application, its routes added.
    """
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas)
        for operations in document["paths"].values():
            for operation in operations.values():
                responses = operation.setdefault("responses", {})
                responses.pop("422", None)
                for status, words in _STATUSES.items():
                    responses.setdefault(str(status), {"description": words})
        return document

    app.openapi = openapi
