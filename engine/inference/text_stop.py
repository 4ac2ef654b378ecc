"""Text as it streams out: cut before a stop string, and nothing that may be the beginning of one is let out."""

from __future__ import annotations


class StopText:
    """Watches generated text for stop strings.

    Args:
        stop: The strings; empty ones are ignored.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._num_sent = 0
        self.text = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Add text and return what may be sent out now."""
        if self.is_stopped:
            return ""
        searched_from = max(0, len(self.text) - max((len(stop) for stop in self._stop), default=1) + 1)
        self.text += text
        places = [place for stop in self._stop if (place := self.text.find(stop, searched_from)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True
        return self._send(len(self.text) if self.is_stopped else len(self.text) - self._num_held())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        start, self._num_sent = self._num_sent, max(self._num_sent, end)
        return self.text[start : self._num_sent]

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
