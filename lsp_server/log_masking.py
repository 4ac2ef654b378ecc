"""What is logged is masked first: an error may quote the user's code."""

from __future__ import annotations

import logging

from engine.patching.masking import mask_text


class MaskingFormatter(logging.Formatter):
    """Another formatter's lines without secrets.

    Args:
        inner: The formatter.
    """

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line and its traceback, masked; a line that cannot be masked is not written."""
        try:
            return mask_text(self._inner.format(record))
        except Exception as fault:  # whatever it is: logging must not fail, nor let a secret out
            return f"{record.name} {record.levelname} (a line that could not be masked: {type(fault).__name__})"


def mask_log() -> None:
    """Mask what every handler of the root logger writes; once is enough for each handler."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, MaskingFormatter):
            handler.setFormatter(MaskingFormatter(handler.formatter or logging.Formatter()))
