"""Vectors of texts, for whichever API asks: the mean of the last hidden states, of length 1."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from engine.inference.adapters import BASE
from engine.inference.catalogue import is_shipped
from engine.inference.protocol import Engine, GenerationRequest, Priority, SamplingParams
from lsp_server.http.errors import HttpError
from lsp_server.http.service import Service, tokenizer_of

_MOST_INPUTS = 2048


async def embeddings(
    service: Service,
    texts: Sequence[str | Sequence[int]],
    path: str,
    *,
    truncate: bool = True,
    dimensions: int | None = None,
) -> tuple[list[list[float]], int]:
    """Vectors of texts.

    Args:
        service: The service.
        texts: The texts, or the token ids of one.
        path: What was called.
        truncate: Whether a text that is too long is cut; else it is refused.
        dimensions: How many numbers of each vector are kept; None keeps all.

    Returns:
        The vectors, each of length 1, and how many tokens were read.

    Raises:
        HttpError: 400: too many texts, or one is too long; 503.
    """
    if len(texts) > _MOST_INPUTS:
        raise HttpError(400, f"input: {len(texts)} texts; {_MOST_INPUTS} are possible at once", param="input")
    vectors: list[list[float]] = []
    count = 0
    async with service.generations.call(path) as call:
        engine = await service.engine()
        for text in texts:
            request = await asyncio.to_thread(_embedding_request, engine, text, truncate=truncate)
            completion = await service.generations.complete(engine, request, call)
            count += completion.num_prompt_tokens
            vectors.append(_unit(completion.embedding[: dimensions or None]))
    return vectors, count


def _embedding_request(engine: Engine, text: str | Sequence[int], *, truncate: bool) -> GenerationRequest:
    status = engine.status()
    most, adapter = status.context_length - 1, BASE if is_shipped(status.adapter) else None
    tokenizer = tokenizer_of(engine)
    token_ids = (tokenizer.encode(text) or tokenizer.encode(" ")) if isinstance(text, str) else text
    if len(token_ids) > most and not truncate:
        raise HttpError(
            400, "the input length exceeds the context length", code="context_length_exceeded", param="input"
        )
    params = SamplingParams(1)
    return GenerationRequest(tuple(token_ids[:most]), params, Priority.BACKGROUND, adapter=adapter, embed=True)


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(number * number for number in vector))
    return [number / length for number in vector] if length > 0 else list(vector)
