"""Parsers of setting values: raw value from a file, variable, option or editor in, usable value out.

Each raises ValueError with what was expected; `lsp_server.settings` adds where the value came from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

Parser = Callable[[object], Any]

_ANY_PAGE = re.compile(r"(https?|\*)://\*(:[\d*]*)?")
_UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def text(value: object) -> str:
    """Text on one line, white space around it cut."""
    if isinstance(value, str) and "\n" not in value and "\0" not in value:
        return value.strip()
    raise ValueError("expected text on one line")


def prompt_text(value: object) -> str:
    """Text on one line that a model can read: UTF-8."""
    return _readable(text(value))


def _readable(words: str) -> str:
    """A variable with other bytes comes with lone surrogates, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise ValueError("expected text in UTF-8")
    return words


def named(expected: str) -> Parser:
    """Text on one line that is not empty; `expected` says what may stand there."""

    def parse(value: object) -> str:
        name = text(value)
        if not name:
            raise ValueError(f"expected {expected}")
        return name

    return parse


def boolean(value: object) -> bool:
    """true/false, yes/no, on/off, 1/0."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError("expected true or false")


def choice(*choices: str) -> Parser:
    """One of a few words."""

    def parse(value: object) -> str:
        word = str(value).strip().lower()
        if word not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return word

    return parse


def integer(low: int, high: int) -> Parser:
    """A whole number in a range, both ends included."""

    def parse(value: object) -> int:
        number = _number(value)
        if not number.is_integer() or not low <= number <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(number)

    return parse


def real(low: float, high: float) -> Parser:
    """A number in a range, both ends included."""

    def parse(value: object) -> float:
        number = _number(value)
        if not low <= number <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return number

    return parse


def _number(value: object) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("expected a number")


def size_bytes(value: object) -> int:
    """A number of bytes: 500MB, 1.5 GiB or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNIT_BYTES or isinstance(value, bool):
        raise ValueError("expected a size such as 500MB")
    return int(float(match[1]) * _UNIT_BYTES[match[2].lower()])


def device(value: object) -> str:
    """auto, cpu, cuda or cuda:N."""
    word = str(value).strip().lower()
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", word):
        return word
    raise ValueError("expected auto, cpu, cuda or cuda:N")


def dtype(value: object) -> str:
    """A torch dtype by its long or short name, as the long one."""
    word = str(value).strip().lower().removeprefix("torch.")
    names = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    word = names.get(word, word)
    if word in {"auto", "bfloat16", "float16", "float32"}:
        return word
    raise ValueError("expected auto, bfloat16, float16 or float32")


class PartlyUsable(ValueError):
    """Some members of a list cannot be used.

    Args:
        faults: What is wrong with each of them.
        rest: The others.
    """

    def __init__(self, faults: Sequence[str], rest: tuple[str, ...]) -> None:
        super().__init__("; ".join(faults))
        self.rest = rest


def origins(value: object) -> tuple[str, ...]:
    """Web origins, as a list or with commas between them; those that cannot be used take no other with them."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in cast(Sequence[object], words)):
        raise ValueError("expected a list of origins such as http://localhost:3000")
    origins = tuple(word.strip().rstrip("/") for word in cast(Sequence[str], words) if word.strip())
    faults = {origin: fault for origin in origins if (fault := _origin_fault(origin))}
    if faults:
        raise PartlyUsable(tuple(faults.values()), tuple(origin for origin in origins if origin not in faults))
    return origins


def _origin_fault(origin: str) -> str:
    """What is wrong with an origin; empty for nothing."""
    if origin == "*" or _ANY_PAGE.fullmatch(origin):
        return (
            f"{origin!r} is refused on purpose, because every web page could call then;"
            " write the pages that may, such as https://app.example or https://*.team.example"
        )
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        return f"{origin!r} is no origin; expected scheme://host or scheme://host:port"
    return f"{origin!r} has more than one *" if origin.count("*") > 1 else ""


@dataclass(frozen=True, slots=True)
class Preset:
    """An intent with a name.

    Args:
        name: What the command line and the editor call it by.
        title: What a menu shows.
        intent: What the model is asked to do.
    """

    name: str
    title: str
    intent: str


DEFAULT_PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("docstring", "Add or mend the docstring", "Write a docstring that says what it does; change no code."),
        Preset("type-hints", "Add type hints", "Add type hints to the parameters and the return value."),
        Preset("error-handling", "Handle errors", "Check the arguments and handle the errors that can occur here."),
        Preset("simplify", "Simplify", "Make the code simpler and shorter; keep what it does."),
    )
}


def members(value: object) -> list[object]:
    """A table as tables of one entry each; JSON text is read first, and anything else stays one value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if not isinstance(value, Mapping):
        return [value]
    table = cast(Mapping[object, object], value)
    return [{name: entry} for name, entry in table.items()] or [table]


def presets(value: object) -> dict[str, Preset]:
    """Presets by name: a table, or the same as JSON; an entry is an intent or `{title, intent}`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"expected a JSON object of presets ({error})") from error
    if not isinstance(value, Mapping):
        raise ValueError('expected a table such as docstring = "Write a docstring."')
    table = cast(Mapping[object, object], value)
    return {str(name): _preset(str(name), entry) for name, entry in table.items()}


def _preset(name: str, entry: object) -> Preset:
    table = cast(Mapping[str, object], entry) if isinstance(entry, Mapping) else {"intent": entry}
    intent, title = table.get("intent"), table.get("title", name)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise ValueError(f"{name!r} is no preset name; expected small letters, digits and hyphens, at most 40")
    if not isinstance(intent, str) or not intent.strip() or len(intent) > 1000:
        raise ValueError(f"preset {name!r}: expected an intent of 1 to 1000 characters")
    if not isinstance(title, str) or not title.strip() or len(title) > 80:
        raise ValueError(f"preset {name!r}: expected a title of 1 to 80 characters")
    return Preset(name, _readable(title.strip()), _readable(intent.strip()))
