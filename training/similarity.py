"""Which edits are the same, and which nearly so.

An edit is compared by the tokens of its function after, and by the tokens that it changed; comments and white space do
not count. Both sets of three tokens in a row must overlap (Jaccard), so two edits of one long function are two edits,
and the same edit of a copied function is one. Candidates come from MinHash with banding (Broder 1997; Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3), and each is then compared exactly: banding may miss a pair
(at a similarity of 0.8 one in twenty million), and never makes one up.

Not covered: the same edit under other names.
"""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SIMILAR_FUNCTION = 0.8
LEAST_SIMILAR_CHANGE = 0.6
_NUM_BANDS, _ROWS_A_BAND, _SHINGLE = 32, 4, 3
_PRIME = (1 << 61) - 1
_TOKEN = re.compile(r"\w+|[^\w\s]")
_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What of an edit is compared.

    Args:
        after: Hashes of three tokens in a row of the function after.
        change: Those that are in the function before or after, but not in both.
    """

    after: frozenset[int]
    change: frozenset[int]

    def is_near(self, other: Fingerprint) -> bool:
        """Whether two edits are nearly the same."""
        return (
            jaccard(self.after, other.after) >= LEAST_SIMILAR_FUNCTION
            and jaccard(self.change, other.change) >= LEAST_SIMILAR_CHANGE
        )


def fingerprint(before: str, after: str) -> Fingerprint:
    """What of an edit is compared.

    Args:
        before: The function before.
        after: The function after.

    Returns:
        Its fingerprint.
    """
    old, new = shingles(tokens_of(before)), shingles(tokens_of(after))
    return Fingerprint(new, old ^ new)


def tokens_of(text: str) -> list[str]:
    """Tokens of Python, without comments and white space; of other text its words and signs.

    Args:
        text: A function, indented or not, or any text.

    Returns:
        The tokens.
    """
    code = f"if 1:\n{text}" if text[:1] in (" ", "\t") else text
    try:
        found = [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type not in _SKIPPED]
    except (tokenize.TokenError, SyntaxError):
        return _TOKEN.findall(text)
    return [token.string for token in found]


def shingles(tokens: Sequence[str]) -> frozenset[int]:
    """Hashes of every three tokens in a row, the same in every process.

    Args:
        tokens: The tokens.

    Returns:
        Numbers of 32 bits.
    """
    runs = ("\0".join(tokens[i : i + _SHINGLE]) for i in range(max(1, len(tokens) - _SHINGLE + 1)))
    return frozenset(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=4).digest(), "big") for run in runs)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Size of what two sets share over the size of both together; 1 for two empty ones.

    Args:
        one: A set.
        other: Another.

    Returns:
        From 0 to 1.
    """
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class NearIndex:
    """Finds an edit that was added before and is nearly the same."""

    def __init__(self) -> None:
        num_hashes = _NUM_BANDS * _ROWS_A_BAND
        self._factors = np.array([_number(f"a{i}", 28) | 1 for i in range(num_hashes)], dtype=np.uint64)
        self._offsets = np.array([_number(f"b{i}", 60) for i in range(num_hashes)], dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._known: list[tuple[str, Fingerprint]] = []

    def find(self, print_of: Fingerprint) -> str | None:
        """The name of an edit that is nearly the same.

        Args:
            print_of: What is looked for.

        Returns:
            The name it was added by, of several the first; None if there is none.
        """
        numbers = sorted({number for band in self._bands_of(print_of) for number in self._bands.get(band, ())})
        near = (self._known[number] for number in numbers)
        return next((name for name, other in near if print_of.is_near(other)), None)

    def add(self, name: str, print_of: Fingerprint) -> None:
        """Add an edit.

        Args:
            name: Its name.
            print_of: Its fingerprint.
        """
        for band in self._bands_of(print_of):
            self._bands[band].append(len(self._known))
        self._known.append((name, print_of))

    def _bands_of(self, print_of: Fingerprint) -> Iterator[tuple[int, bytes]]:
        items = np.array(sorted(print_of.after), dtype=np.uint64)
        hashes = (items[:, None] * self._factors[None, :] + self._offsets[None, :]) % np.uint64(_PRIME)
        least = hashes.min(axis=0)
        for band in range(_NUM_BANDS):
            yield band, least[band * _ROWS_A_BAND : (band + 1) * _ROWS_A_BAND].tobytes()


def _number(name: str, num_bits: int) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> (64 - num_bits)
