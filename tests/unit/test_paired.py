"""Paired differences: published figures, few rows, and how often the interval holds the truth."""

from __future__ import annotations

import itertools
import random

import pytest

from training.paired import difference, mcnemar, wilson

pytestmark = pytest.mark.unit


def compare(both: int, won: int, lost: int, neither: int):
    rows = [(True, True)] * both + [(False, True)] * won + [(True, False)] * lost + [(False, False)] * neither
    return difference([base for base, _ in rows], [candidate for _, candidate in rows])


def test_newcombe_s_own_example_gives_newcombe_s_figures() -> None:
    """36, 12, 2, 0 of 50: his method 10 gives 0.0569 to 0.3404."""
    found = compare(36, 12, 2, 0)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.2, 0.0569, 0.3404)
    assert found.is_better and not found.is_worse


def test_wilson_s_interval_is_the_known_one() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, the first example of his paper on single proportions
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (3, 3, 1.0)])
def test_the_exact_test_is_the_sign_test(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == mcnemar(lost, won) == p


def test_few_rows_are_never_enough_whatever_the_interval_says() -> None:
    three = compare(0, 3, 0, 0)
    assert three.low > 0 and not three.is_better
    assert compare(0, 6, 0, 0).is_better
    assert compare(0, 0, 6, 0).is_worse


def test_the_same_answers_are_no_difference() -> None:
    same = compare(20, 0, 0, 20)
    assert same.value == 0 and same.low < 0 < same.high and not (same.is_better or same.is_worse)
    assert compare(0, 0, 0, 0).to_json()["interval"] == [-1.0, 1.0]


def test_the_interval_holds_the_truth_and_the_gate_seldom_errs() -> None:
    """2000 draws of 40 rows each from three truths; seeded."""
    numbers = random.Random(0)
    for both, won, lost in ((0.3, 0.1, 0.1), (0.3, 0.3, 0.1), (0.1, 0.2, 0.2)):
        held = better = 0
        for _ in range(2000):
            drawn = [numbers.random() for _ in range(40)]
            counts = [sum(low <= one < high for one in drawn) for low, high in _ranges(both, won, lost)]
            found = compare(*counts)
            held += found.low <= won - lost <= found.high
            better += found.is_better
        assert held / 2000 > 0.93
        assert won > lost or better / 2000 < 0.025


def _ranges(both: float, won: float, lost: float) -> list[tuple[float, float]]:
    ends = [0.0, both, both + won, both + won + lost, 1.0]
    return list(itertools.pairwise(ends))
