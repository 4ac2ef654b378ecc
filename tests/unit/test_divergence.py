"""Second choices of an answer."""

from __future__ import annotations

import pytest

from engine.inference.protocol import TokenLogprob
from engine.patching.divergence import Fork, likeliest_forks

pytestmark = pytest.mark.unit

ANSWER = (10, 11, 12)
TOP = (
    (TokenLogprob(10, -0.1), TokenLogprob(20, -2.5)),
    (TokenLogprob(21, -0.5), TokenLogprob(11, -0.9)),  # sampled: the second choice is the likelier one
    (TokenLogprob(12, -0.2), TokenLogprob(2, -1.7)),
)


def test_second_choices_come_likeliest_first_one_for_each_token() -> None:
    assert likeliest_forks(ANSWER, TOP, 9) == [Fork(1, 21, -0.5), Fork(2, 2, -1.7), Fork(0, 20, -2.5)]
    assert likeliest_forks(ANSWER, TOP, 1) == [Fork(1, 21, -0.5)]
    assert likeliest_forks((), (), 9) == []


def test_what_is_too_unlikely_is_no_choice() -> None:
    assert likeliest_forks(ANSWER, TOP, 9, min_probability=0.1) == [Fork(1, 21, -0.5), Fork(2, 2, -1.7)]


def test_an_end_token_is_no_choice() -> None:
    assert likeliest_forks(ANSWER, TOP, 9, excluded={2}) == [Fork(1, 21, -0.5), Fork(0, 20, -2.5)]


def test_of_equally_likely_choices_the_earlier_goes_first() -> None:
    tied = [(TokenLogprob(token_id, -0.1), TokenLogprob(30, -1.0)) for token_id in ANSWER]
    assert [fork.position for fork in likeliest_forks(ANSWER, tied, 2)] == [0, 1]
