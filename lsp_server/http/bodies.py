"""Requests' bodies: read within limits whatever their Content-Type, and checked leniently where clients are lenient.

Unknown fields are ignored, null means not given, and 5.0 is an integer. What is wrong is named by its field.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from lsp_server.http.errors import HttpError

MAX_BODY_BYTES = 8_000_000
BODY_TIME_S = 30.0
_MAX_DEPTH = 100
_KIND = re.compile(r"(function-|union|list\[|dict\[|constrained-|(float|int|str|bool)\Z)")  # pydantic's, in a place
_CLASS = re.compile(r"a valid dictionary or instance of \w+")

B = TypeVar("B", bound="Body")


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Body(BaseModel):
    """The base of every body."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in cast("dict[str, object]", value).items() if item is not None}


async def read_body(request: Request) -> bytes:
    """The whole body.

    Args:
        request: The request.

    Returns:
        Its bytes.

    Raises:
        HttpError: 413 if it is too large, 408 if it comes too slowly, 415 if it is compressed.
        ClientDisconnect: The client went away.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        body = await asyncio.wait_for(_collect(request), BODY_TIME_S)
    except asyncio.TimeoutError:
        raise HttpError(408, f"the body did not arrive within {BODY_TIME_S:g} s", close=True) from None
    encoding = request.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise HttpError(415, f"Content-Encoding: {encoding} is not supported; send the body as it is")
    return body


async def _collect(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Args:
        request: The request.

    Returns:
        The object.

    Raises:
        HttpError: 400 if it is empty, no JSON or no object; 413; 408.
    """
    data = await read_body(request)
    if not data.strip():
        raise HttpError(400, "missing request body")
    try:
        found: object = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as fault:
        raise HttpError(400, f"the body is not UTF-8 (byte {fault.start})") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply") from None
    except ValueError as fault:
        said = "a number has too many digits" if "int_max_str_digits" in str(fault) else str(fault)
        raise HttpError(400, f"the body is not valid JSON: {said}") from None
    if not isinstance(found, dict):
        raise HttpError(400, f"the body is a JSON object, not {_kind(found)}")
    body = cast("dict[str, Any]", found)
    _check_text(body, 0)
    return body


async def read(request: Request, model: type[B]) -> B:
    """The body, checked.

    Args:
        request: The request.
        model: What it should be.

    Returns:
        The body.

    Raises:
        HttpError: 400 with the field's name, 413, 408.
    """
    return checked(await read_json(request), model)


def checked(body: dict[str, Any], model: type[B]) -> B:
    """A JSON object as a body of a kind.

    Args:
        body: The object.
        model: What it should be.

    Returns:
        The body.

    Raises:
        HttpError: 400 with the field's name.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"] if not _KIND.match(str(part)))
        said = _CLASS.sub("an object", first["msg"])
        raise HttpError(400, f"{name or 'body'}: {said[:1].lower()}{said[1:]}", param=name) from None


def _check_text(value: object, depth: int) -> None:
    """Refuse nesting without end, and lone surrogates, which no later step can encode."""
    if depth > _MAX_DEPTH:
        raise HttpError(400, f"the body is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise HttpError(400, "a string holds a lone surrogate, which is no Unicode text") from None
    elif isinstance(value, dict):
        for key, item in cast("dict[str, object]", value).items():
            _check_text(key, depth + 1)
            _check_text(item, depth + 1)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            _check_text(item, depth + 1)


def _too_large() -> HttpError:
    return HttpError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", limit=MAX_BODY_BYTES, close=True)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


__all__ = ["Body", "ClientDisconnect", "Whole", "checked", "read", "read_body", "read_json"]
