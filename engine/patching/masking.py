"""Secrets in text, found and replaced by `<secret>`, so that nothing that is learnt from holds them.

`secret_rules.py` finds them. Texts that belong together are masked together: a value found in one is masked in all.
Lines stay lines and literals stay literals, so masked code parses as it did.

Not covered: what the rules do not find, and a value of fewer than six characters in another place than where it was
found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.patching.secret_rules import Span, find_secrets, parses

MASK = "<secret>"
_NAME_MASK = "MASKED_SECRET"  # outside of a literal, where `<secret>` would be no Python
_MIN_SHARED_CHARS = 6  # a shorter value is masked at its own place only: elsewhere it may be an ordinary word


@dataclass(frozen=True, slots=True)
class Masked:
    """Texts without their secrets.

    Args:
        texts: The texts, in the order given.
        counts: Number of masked places by kind.
        is_sound: Whether every text that parsed as Python before does so still.
    """

    texts: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    is_sound: bool = True


def mask_text(text: str) -> str:
    """One text without its secrets.

    Args:
        text: Prose or code.

    Returns:
        The text, `<secret>` in their places.
    """
    return mask_together([text]).texts[0]


def mask_together(texts: Sequence[str]) -> Masked:
    """Texts that belong together without their secrets: a value found in one of them is masked in all.

    Args:
        texts: Prose or code, such as an intent, a plan, a file before and after.

    Returns:
        The texts, `<secret>` in their places.
    """
    found = [list(find_secrets(text)) for text in texts]
    shared = {text[start:end]: kind for text, spans in zip(texts, found, strict=True) for start, end, kind in spans}
    everywhere = _occurrences_of(value for value in shared if len(value) >= _MIN_SHARED_CHARS)
    counts: Counter[str] = Counter()
    masked: list[str] = []
    is_sound = True
    for text, spans in zip(texts, found, strict=True):
        if everywhere is not None:
            spans = [*spans, *((m.start(), m.end(), shared[m[0]]) for m in everywhere.finditer(text))]
        merged = _merged(spans)
        counts.update(kind for _, _, kind in merged)
        result, stays_sound = _replaced(text, merged)
        is_sound = is_sound and stays_sound
        masked.append(result)
    return Masked(tuple(masked), dict(sorted(counts.items())), is_sound)


def _occurrences_of(values: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(values), key=lambda value: (-len(value), value))
    if not longest_first:
        return None
    words = (
        (r"(?<![A-Za-z0-9])" if value[0].isalnum() else "")
        + re.escape(value)
        + (r"(?![A-Za-z0-9])" if value[-1].isalnum() else "")
        for value in longest_first
    )
    return re.compile("|".join(words))


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end, kind in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), merged[-1][2])
        elif end > start:
            merged.append((start, end, kind))
    return merged


def _replaced(text: str, spans: Sequence[Span]) -> tuple[str, bool]:
    """The text with every span masked; names where literals would not parse. Whether it is as sound as before."""
    if not spans:
        return text, True
    first = _with_mask(text, spans, MASK)
    if not parses(text) or parses(first):
        return first, True
    second = _with_mask(text, spans, _NAME_MASK)
    return second, parses(second)


def _with_mask(text: str, spans: Sequence[Span], mask: str) -> str:
    parts: list[str] = []
    at = 0
    for start, end, _ in spans:
        parts += [text[at:start], mask, "\n" * text.count("\n", start, end)]
        at = end
    return "".join([*parts, text[at:]])
