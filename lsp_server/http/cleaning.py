"""The original service's cleaning of a short answer: what a model wrote around it is taken away.

Three readings in turn, the first that leaves something: the weakly cleaned text, the text in its quotation marks, and
the text as it was. Never used for streams, `format`, `tools` or `raw`.
"""

from __future__ import annotations

import re

_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w.+-]*[ \t]*$\n?", re.MULTILINE)
_LABEL = re.compile(r"\A\s*(?:assistant|answer|response|output|답변|답)\s*[:：]\s*", re.IGNORECASE)
_QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|「([^」\n]+)」|\'([^\'\n]+)\'|`([^`\n]+)`')


def weakly_cleaned(text: str) -> str:
    """A text without thinking, fences and a label in front.

    Args:
        text: What the model wrote.

    Returns:
        The rest, stripped; may be empty.
    """
    return _LABEL.sub("", _FENCE.sub("", _THINK.sub("", text)).replace("</think>", "")).strip()


def cleaned(text: str) -> str:
    """The answer in a text.

    Args:
        text: What the model wrote.

    Returns:
        The weakly cleaned text; if that is empty the quoted text; if there is none, the text itself.
    """
    weak = weakly_cleaned(text)
    if weak:
        return weak
    found = _QUOTED.search(text)
    return next((group for group in found.groups() if group), text) if found else text
