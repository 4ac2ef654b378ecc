"""Is one better than the other, judged on the same rows? A paired difference of rates with its interval.

The interval is Newcombe's (Statistics in Medicine 17, 1998, 2635-2650, method 10): Wilson's intervals of both rates,
put together with the correlation of the pairs. On few rows it is too narrow, so McNemar's exact test has to agree.

Not covered: rows that depend on each other, such as many edits of one file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054
_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """Rate of the candidate minus rate of the base.

    Args:
        value: The difference.
        low: Lower end of its 95% interval.
        high: Upper end.
        num_won: Rows that only the candidate has.
        num_lost: Rows that only the base has.
        p_value: Of McNemar's exact test, two-sided.
    """

    value: float
    low: float
    high: float
    num_won: int
    num_lost: int
    p_value: float

    @property
    def is_better(self) -> bool:
        """Whether interval and test agree that the candidate is better."""
        return self.low > 0 and self.p_value < _LEVEL

    @property
    def is_worse(self) -> bool:
        """Whether interval and test agree that the candidate is worse."""
        return self.high < 0 and self.p_value < _LEVEL

    def to_json(self) -> dict[str, Any]:
        """The difference for programs."""
        return {
            "difference": round(self.value, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "won": self.num_won,
            "lost": self.num_lost,
            "p": round(self.p_value, 6),
        }


def difference(base: Sequence[bool], candidate: Sequence[bool]) -> Difference:
    """Compare two on the same rows.

    Args:
        base: Whether the base has each row.
        candidate: Whether the candidate has it.

    Returns:
        The difference; from -1 to 1 where there are no rows.
    """
    pairs = list(zip(base, candidate, strict=True))
    if not pairs:
        return Difference(0.0, -1.0, 1.0, 0, 0, 1.0)
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    won, lost = pairs.count((False, True)), pairs.count((True, False))
    low, high = _newcombe(both, won, lost, neither)
    return Difference((won - lost) / len(pairs), low, high, won, lost, mcnemar(won, lost))


def mcnemar(num_won: int, num_lost: int) -> float:
    """McNemar's exact test: how likely a split at least as uneven is, were both equally good.

    Args:
        num_won: Rows that only one has.
        num_lost: Rows that only the other has.

    Returns:
        The two-sided p-value.
    """
    total, fewer = num_won + num_lost, min(num_won, num_lost)
    return min(1.0, 2 * sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total)


def wilson(num_right: int, num_rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate.

    Args:
        num_right: Rows that are right.
        num_rows: All rows, at least one.

    Returns:
        Its ends.
    """
    rate, square = num_right / num_rows, Z_95**2
    middle = (rate + square / (2 * num_rows)) / (1 + square / num_rows)
    half = Z_95 * math.sqrt(rate * (1 - rate) / num_rows + square / (4 * num_rows**2)) / (1 + square / num_rows)
    return max(0.0, middle - half), min(1.0, middle + half)


def _newcombe(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    num_rows = both + won + lost + neither
    one, other = (both + won) / num_rows, (both + lost) / num_rows
    (low_one, high_one), (low_other, high_other) = wilson(both + won, num_rows), wilson(both + lost, num_rows)
    phi = _correlation(both, won, lost, neither)
    below = _together(one - low_one, high_other - other, phi)
    above = _together(high_one - one, other - low_other, phi)
    return max(-1.0, one - other - below), min(1.0, one - other + above)


def _together(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(both: int, won: int, lost: int, neither: int) -> float:
    """Of the two columns, a positive one made smaller by the continuity correction; 0 where a margin is empty."""
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    if margins == 0:
        return 0.0
    product = both * neither - won * lost
    if product > 0:
        product = max(product - (both + won + lost + neither) / 2, 0)
    return product / math.sqrt(margins)
