"""Drafts from the text itself; tokens are shown as characters."""

from __future__ import annotations

import random

import pytest

from engine.inference.drafting import DraftLength, PromptLookup

pytestmark = pytest.mark.unit


def lookup(text: str) -> PromptLookup:
    return PromptLookup([ord(char) for char in text])


def draft(one: PromptLookup, num_tokens: int = 6, after: str = "") -> str:
    return "".join(map(chr, one.draft(num_tokens, [ord(char) for char in after])))


def extend(one: PromptLookup, text: str) -> PromptLookup:
    one.extend([ord(char) for char in text])
    return one


def test_what_followed_the_same_text_before_is_drafted() -> None:
    assert draft(lookup("def add(a, b): return a; def add")) == "(a, b)"
    assert draft(lookup("🙂é\r\n\t🙂é"), 3) == "\r\n\t"


def test_a_text_that_never_stood_before_has_no_draft() -> None:
    assert draft(lookup("abcdefg")) == ""
    assert draft(lookup("a")) == ""


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert draft(lookup("total + 1; x + 2; total +"), 2) == " 1"


def test_a_copy_goes_on_at_its_own_place_not_at_a_likelier_looking_one() -> None:
    one = lookup("one: x = 1\ntwo: x = 2\nend; one:")
    assert draft(one, 7) == " x = 1\n"
    extend(one, " x = 1\n")
    assert draft(one, 9) == "two: x = "


def test_after_a_changed_token_the_copy_is_found_again_by_its_next_tokens() -> None:
    one = lookup("if x < low:\n    return high\nif y < low:\n    return high\nend\nif x")
    assert draft(one, 7) == " < low:"
    extend(one, " < low:\n    return l")
    assert draft(extend(one, "ow\n"), 11) == "if y < low:", "not the lines that follow the other `low`"


def test_tokens_that_are_drafted_already_count_as_the_end() -> None:
    one = lookup('{"path": "a.py", "line": 3}, {')
    assert draft(one, 6, '"path":') == ' "a.py'
    assert draft(one, 4) == '"pat', "and nothing of them is kept"


def test_a_draft_is_always_a_piece_of_the_text_and_no_longer_than_asked() -> None:
    numbers = random.Random(7)
    for _ in range(300):
        text = "".join(numbers.choices("ab c\n", k=numbers.randint(1, 60)))
        one, grown = lookup(text), text
        for _ in range(numbers.randint(1, 12)):
            num_tokens = numbers.randint(1, 9)
            found = draft(one, num_tokens)
            assert len(found) <= num_tokens
            assert found in grown + found
            assert bool(found) == (grown[-1] in grown[:-1])
            more = found[: numbers.randint(0, len(found))] + numbers.choice("ab c\n")
            extend(one, more)
            grown += more


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert draft(lookup("1, 2, 1, 2, "), 9) == "1, 2, 1, "
    assert draft(lookup("- - "), 5) == "- - -"


def test_a_token_at_many_places_does_not_make_a_draft_slow() -> None:
    one = lookup("ab" * 20_000)
    assert draft(one, 4) == "abab"


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was() -> None:
    length = DraftLength(1, 31)
    assert length.num_tokens == 15
    length.learn(15, 15)
    assert length.num_tokens == 31
    length.learn(31, 20)
    assert length.num_tokens == 20
    for _ in range(8):
        length.learn(length.num_tokens, 0)
    assert length.num_tokens == 1
    length.learn(0, 0)
    assert length.num_tokens == 1, "a step without a draft says nothing"
    length.learn(1, 1)
    assert length.num_tokens == 4


def test_a_single_draft_token_at_most_is_one_not_none() -> None:
    assert DraftLength(1, 1).num_tokens == 1


def test_no_speculation_is_no_drafts() -> None:
    length = DraftLength(7, 0)
    assert length.num_tokens == 0
    length.learn(0, 0)
    assert length.num_tokens == 0
