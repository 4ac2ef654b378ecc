"""Options of a generation as clients give them, and what the engine makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import field_validator

from engine.inference.protocol import Grammar, SamplingParams
from lsp_server.http.bodies import Body, Whole
from lsp_server.http.errors import HttpError
from lsp_server.http.schemas import enforceable

_MAX_GRAMMAR_BYTES = 200_000


class Options(Body):
    """Ollama's `options` with its defaults; unknown ones are ignored."""

    num_predict: Whole = -1
    num_ctx: Whole | None = None
    temperature: float = 0.8
    top_k: Whole = 40
    top_p: float = 0.9
    min_p: float = 0.0
    seed: Whole = -1
    stop: list[str] | str | None = None
    repeat_penalty: float = 1.0
    max_time: float | None = None

    @field_validator("temperature", "top_p", "min_p", "repeat_penalty", "max_time")
    @classmethod
    def _is_finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("is no finite number")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, empty ones left out."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)


def room(options: Options, context_length: int) -> int:
    """Most tokens of prompt and answer together: `num_ctx`, never more than the model's own."""
    wanted = options.num_ctx if options.num_ctx is not None and options.num_ctx > 0 else context_length
    return max(2, min(wanted, context_length))


def params_of(
    options: Options,
    *,
    num_left: int,
    grammar: Grammar | None = None,
    stop_token_ids: Sequence[int] = (),
    top_logprobs: int = 0,
) -> SamplingParams:
    """The engine's parameters.

    Args:
        options: What the client asked for.
        num_left: Tokens that prompt and context leave for the answer.
        grammar: Constraint on the text.
        stop_token_ids: End tokens besides the model's own.
        top_logprobs: How many of the likeliest tokens to report.

    Returns:
        The parameters; values out of range are brought into it, as Ollama does.
    """
    budget = options.num_predict if options.num_predict >= 0 else num_left
    temperature = min(max(options.temperature, 0.0), 100.0)
    return SamplingParams(
        max_new_tokens=max(1, min(budget, num_left)),
        max_time_s=options.max_time if options.max_time is not None and options.max_time > 0 else None,
        temperature=temperature,
        top_k=max(0, min(options.top_k, 1_000_000)),
        top_p=min(max(options.top_p, 0.0), 1.0),
        min_p=min(max(options.min_p, 0.0), 1.0),
        seed=None if options.seed < 0 else options.seed % 2**63,
        repetition_penalty=min(max(options.repeat_penalty, 0.001), 1000.0) if options.repeat_penalty > 0 else 1.0,
        stop=options.stop_strings,
        stop_token_ids=tuple(stop_token_ids),
        grammar=grammar,
        top_logprobs=top_logprobs,
    )


def grammar_of(wanted: object, param: str = "format") -> Grammar | None:
    """The grammar of a `format`: `"json"`, a JSON schema, or nothing.

    Args:
        wanted: What the client gave.
        param: Which field gave it.

    Returns:
        The grammar; None for none.

    Raises:
        HttpError: 400: it is neither, or the schema cannot be used.
    """
    if wanted is None or wanted == "":
        return None
    if wanted == "json":
        return Grammar("json_schema", json.dumps({"type": "object"}))
    if not isinstance(wanted, Mapping):
        raise HttpError(400, f'invalid {param}: {json.dumps(wanted)}; expected "json" or a JSON schema', param=param)
    return checked_grammar(cast("Mapping[str, Any]", wanted), param)


def checked_grammar(schema: Mapping[str, Any], param: str = "format") -> Grammar:
    """The grammar of a JSON schema.

    Args:
        schema: The schema.
        param: Which field gave it.

    Returns:
        The grammar.

    Raises:
        HttpError: 400: it cannot be used, and why.
    """
    if len(json.dumps(schema)) > _MAX_GRAMMAR_BYTES:
        raise HttpError(400, f"the {param} is longer than {_MAX_GRAMMAR_BYTES:,} characters", param=param)
    grammar, fault = enforceable(schema)
    if fault:
        raise HttpError(400, f"invalid JSON schema in {param}: {fault}", param=param)
    return grammar
