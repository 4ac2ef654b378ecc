"""Text as it streams, told apart: thinking from answer, calls of tools from text. Nothing half is let out."""

from __future__ import annotations

from collections.abc import Collection

from lsp_server.http.tool_calls import OPENING, FoundCall, find_calls

_BEGIN, _END = "<think>", "</think>"


class ThinkSplitter:
    """Tells `<think>…</think>` at the beginning from the rest.

    Args:
        wanted: Whether there may be thinking; if not, everything is answer.
    """

    def __init__(self, wanted: bool) -> None:
        self._state = "start" if wanted else "answer"
        self._held = ""
        self._is_at_begin = False  # of the thinking, or of the answer behind it: line ends there are left out

    def push(self, text: str) -> tuple[str, str]:
        """Take text in.

        Args:
            text: What came.

        Returns:
            Thinking and answer that may go out now.
        """
        self._held += text
        thinking = ""
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(_BEGIN):
                self._state, self._held, self._is_at_begin = "thinking", begun[len(_BEGIN) :], True
            elif not _BEGIN.startswith(begun):
                self._state = "answer"
        if self._state == "thinking":
            self._skip_line_ends()
            before, mark, after = self._held.partition(_END)
            if mark:
                thinking = before.rstrip("\n")
                self._state, self._held, self._is_at_begin = "answer", after, True
            else:
                may_go_out = self._held[: len(self._held) - _num_held(self._held, _END)]
                thinking = self._take(len(may_go_out.rstrip("\n")))
        if self._state != "answer":
            return thinking, ""
        self._skip_line_ends()
        return thinking, self._take(len(self._held))

    def flush(self) -> tuple[str, str]:
        """What is left, at the end."""
        rest = self._take(len(self._held))
        return (rest, "") if self._state == "thinking" else ("", rest)

    def _skip_line_ends(self) -> None:
        if self._is_at_begin:
            self._held = self._held.lstrip("\n")
            self._is_at_begin = not self._held

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class ToolSplitter:
    """Holds back what may be a call of a tool.

    Args:
        names: The tools; with none everything is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = not names

    def push(self, text: str) -> str:
        """Take text in.

        Args:
            text: What came.

        Returns:
            Text that may go out now.
        """
        self._held += text
        if not self._names:
            return self._take(len(self._held))
        if not self._is_text:
            begun = self._held.lstrip()
            if not begun or begun[0] in "{[`" or OPENING.startswith(begun) or begun.startswith(OPENING):
                return ""
            self._is_text = True
        place = self._held.find(OPENING)
        return self._take(place if place >= 0 else len(self._held) - _num_held(self._held, OPENING))

    def flush(self) -> tuple[str, list[FoundCall]]:
        """What is left at the end, and the calls in it."""
        rest = self._take(len(self._held))
        return find_calls(rest, self._names) if self._names else (rest, [])

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


def _num_held(text: str, mark: str) -> int:
    """Length of the longest end of a text that begins a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
