"""Stop strings in streamed text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.inference.text_stop import StopText

pytestmark = pytest.mark.unit


def streamed(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str, bool]:
    """What is sent after each piece and at the end, the text, and whether it stopped."""
    watched = StopText(stop)
    sent = [watched.push(piece) for piece in pieces] + [watched.flush()]
    return sent, watched.text, watched.is_stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "sent", "text", "is_stopped"),
    [
        ((), ["a", "b"], ["a", "b", ""], "ab", False),
        (("",), ["a", "b"], ["a", "b", ""], "ab", False),
        (("\n```",), ["x = 1\n", "``", "`\nmore"], ["x = 1", "", "", ""], "x = 1", True),
        (("\n```",), ["x\n``", "y"], ["x", "\n``y", ""], "x\n``y", False),
        (("\n```",), ["x\n``"], ["x", "\n``"], "x\n``", False),
        (("ab", "b"), ["a", "b"], ["", "", ""], "", True),
        (("abcX", "c"), ["ab", "c"], ["", "ab", ""], "ab", True),
        (("aab",), ["aa", "ab"], ["", "a", ""], "a", True),
        (("🙂🙃",), ["x🙂", "🙂🙃y", "z"], ["x", "🙂", "", ""], "x🙂", True),
        (("\r\n",), ["a\r", "b\t\x0c\r", "\n"], ["a", "\rb\t\x0c", "", ""], "a\rb\t\x0c", True),
        (("x",), ["abx"], ["ab", ""], "ab", True),
    ],
)
def test_text_is_cut_before_a_stop_string_and_no_part_of_one_is_sent(
    stop: tuple[str, ...], pieces: list[str], sent: list[str], text: str, is_stopped: bool
) -> None:
    assert streamed(stop, pieces) == (sent, text, is_stopped)


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3),
    st.lists(st.text("ab\n", max_size=3), max_size=12),
)
def test_however_the_text_is_split_the_result_is_the_same(stop: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    sent, text, is_stopped = streamed(tuple(stop), pieces)
    assert "".join(sent) == text
    assert whole.startswith(text)
    assert not any(word in text for word in stop)
    assert is_stopped == any(word in whole for word in stop)
    if not is_stopped:
        assert text == whole
