"""How users ask: from a few words to a bug report, with the details of the very change.

Templates are ours; what they are filled with comes from the code: names, conditions, the first sentence of a docstring,
calls and what they gave. Some are in lower case, some misspelt, a few in Korean.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from training.reversed_edits.code import Change
from training.reversed_edits.evidence import Evidence

_KOREAN_SHARE, _LOWER_SHARE, _TYPO_SHARE, _NO_TICKS_SHARE = 0.03, 0.14, 0.05, 0.12
_DOC_VERBS = re.compile(
    r"(?:Return|Compute|Calculate|Get|Find|Check|Parse|Convert|Create|Make|Build|Add|Remove|Split|Join|Read|Write|Load|"
    r"Generate|Yield|Iterate|Determine|Extract|Format|Normalize|Set|Update|Apply|Merge|Sort|Filter|Encode|Decode|Test|"
    r"Validate|Give|Fetch|Insert|Delete|Count|Replace|Transform|Resolve|Render|Print|Raise|Send|Register|Strip)(s|es)?\b"
)
_PLAIN_WORD = re.compile(r"[A-Z][a-z]+ ")
_PRECISE = (
    "{p}",
    "{P}.",
    "{P}",
    "{P}. Nothing else should change.",
    "In `{name}`: {p}.",
    "`{name}`: {p}",
    "please fix: {p}",
    "in {name}, {p}",
    "{P}, please.",
)
_PRECISE_FEATURE = ("{p}", "{P}.", "{P}", "In `{name}`: {p}.", "`{name}`: {p}", "{P}, please.", "please {p}")
_SYMPTOM = (
    "{p}",
    "{P}.",
    "bug: {p}",
    "fix: {p}",
    "In `{name}`, {p}. Please fix it.",
    "`{name}` is broken: {p}",
    "{P}. Can you repair that?",
    "there is a problem in {name}: {p}",
    "{P} in `{name}`.",
    "{name}: {p}",
)
_VAGUE = (
    "{p}",
    "{P}.",
    "{P} in `{name}`.",
    "bug in {name}: {p}",
    "{P}, please fix.",
    "can you fix this? {p}",
    "fix: {p}",
)
_VAGUE_FEATURE = ("{p}", "{P}", "{p}", "`{name}`: {p}")
_BARE = (
    "fix the bug",
    "There is a bug in `{name}`. Find it and fix it.",
    "`{name}` does not work, please repair it.",
    "fix {name}",
    "debug this",
    "something is wrong here, fix it",
    "{name} gives wrong results",
    "Correct `{name}`.",
)
_BEHAVIOUR = (
    "`{name}` is supposed to {doc}, but it does not. Please correct it.",
    "There is a bug in `{name}`, which is meant to {doc}.",
    "{name} is broken. It has to {doc}.",
    "Find and repair the mistake in `{name}`. What it is for: {doc}.",
    "`{name}` must {doc}; at the moment it gives wrong results.",
    "wrong behaviour of {name}: it should {doc}",
    "Repair `{name}` so that it does what it should: {doc}.",
    "{name} has a bug, it should {doc}",
)
_BEHAVIOUR_SENTENCE = (
    "`{name}` has a bug. This is what it is for: {doc}.",
    "Find the bug in `{name}`. {doc}.",
    "{name} is broken ({doc})",
    "Make `{name}` work as described: {doc}.",
)
_EXAMPLE = (
    " For example, `{call}` should be `{expected}`.",
    " E.g. {call} is {expected}.",
    " `{call}` must give `{expected}`.",
    " Example: {call} -> {expected}",
    "\n\n>>> {call}\n{expected}",
)
_REPORT = (
    "`{call}` returns `{got}`, but it should return `{expected}`.",
    "{call} gives {got} instead of {expected}",
    "Expected `{expected}` from `{call}`, got `{got}`.",
    ">>> {call}\n{got}\n\nThis should be {expected}.",
    "`assert {call} == {expected}` fails in our tests, the value is {got}. Find out why and repair `{name}`.",
    "A test of `{name}` does not pass any more:\n\n    assert {call} == {expected}\nE   assert {got} == {expected}",
    "wrong result: {call}\n  is:        {got}\n  should be: {expected}",
    "The unit test says\n\n    AssertionError: {got} != {expected}\n\nfor `{call}`. Please repair `{name}`.",
    "{name} is wrong, {call} must be {expected}",
)
_CRASH = (
    "`{call}` fails with `{error}`; it should return `{expected}`.",
    "{error}\n\nwhen calling {call}, expected {expected}",
    ">>> {call}\nTraceback (most recent call last):\n  ...\n{error}\n\nIt should give {expected}.",
    "`{name}` crashes: {call} raises {error}. Expected: {expected}.",
    "A test of `{name}` ends with an error:\n\n    assert {call} == {expected}\nE   {error}",
)
_ALSO = ("{one} Also, {other}", "1. {one}\n2. {other}", "{one}\n{other}", "{one} And: {other}", "- {one}\n- {other}")


def intent_of(
    changes: Sequence[Change], name: str, documentation: str, evidence: Sequence[Evidence], rng: random.Random
) -> str:
    """A user's wish for the way back.

    Args:
        changes: What was made worse, one or two.
        name: Name of the function or class.
        documentation: First sentence of its docstring, may be empty.
        evidence: Calls that show the fault.
        rng: Chooses the wording.

    Returns:
        The wish.
    """
    if rng.random() < _KOREAN_SHARE and all(change.korean for change in changes):
        return "\n".join(rng.choice(change.korean) for change in changes)
    if len(changes) == 1:
        text = _one(changes[0], name, documentation, evidence, rng)
    else:
        one, other = (_said(change, name, rng) for change in changes)
        text = rng.choice(_ALSO).format(one=_sentence(one), other=other)
    return _roughened(text, rng)


def documentation_of(docstring: str) -> str:
    """The first sentence of a docstring, if it says something.

    Args:
        docstring: The whole docstring.

    Returns:
        One line, without the full stop; empty if there is none of a fitting length.
    """
    first = " ".join(docstring.split("\n\n")[0].split())
    first = re.split(r"(?<=[a-z)`'])\.(?:\s|$)", first)[0].rstrip(".:")
    return first if 15 <= len(first) <= 200 and not first.startswith((":", "@", ">>>")) else ""


def _one(change: Change, name: str, documentation: str, evidence: Sequence[Evidence], rng: random.Random) -> str:
    if not change.is_fault:
        return _said(change, name, rng)
    if evidence and rng.random() < 0.75:
        return _report(name, documentation, evidence, rng)
    if documentation and rng.random() < 0.35:
        return _behaviour(name, documentation, rng)
    is_bare = change.vague and rng.random() < 0.12
    return rng.choice(_BARE).format(name=name) if is_bare else _said(change, name, rng)


def _said(change: Change, name: str, rng: random.Random) -> str:
    """One of the change's own wordings; the vaguer ones only where it has some."""
    fault = change.is_fault
    kinds: list[tuple[tuple[str, ...], tuple[str, ...], float]]
    kinds = [(change.precise, _PRECISE if fault else _PRECISE_FEATURE, 0.4 if fault else 0.6)]
    kinds.append((change.symptom, _SYMPTOM if fault else _VAGUE_FEATURE, 0.4))
    kinds.append((change.vague, _VAGUE if fault else _VAGUE_FEATURE, 0.25 if fault else 0.6))
    kinds = [kind for kind in kinds if kind[0]]
    wordings, templates, _ = rng.choices(kinds, [weight for _, _, weight in kinds])[0]
    wording, template = rng.choice(wordings), rng.choice(templates)
    if not template.endswith("}"):
        wording = wording.rstrip(".")
    inner = wording[0].lower() + wording[1:] if _PLAIN_WORD.match(wording) else wording
    return template.format(p=inner, P=wording[0].upper() + wording[1:], name=name)


def _behaviour(name: str, documentation: str, rng: random.Random) -> str:
    match = _DOC_VERBS.match(documentation)
    if match is None:
        return rng.choice(_BEHAVIOUR_SENTENCE).format(name=name, doc=documentation)
    ending = match[1] or ""
    verb = match[0].removesuffix(ending).lower()
    return rng.choice(_BEHAVIOUR).format(name=name, doc=verb + documentation[match.end() :])


def _report(name: str, documentation: str, evidence: Sequence[Evidence], rng: random.Random) -> str:
    shown = evidence[0]
    facts = {"call": shown.call, "expected": shown.expected, "got": shown.got, "error": shown.error, "name": name}
    if documentation and rng.random() < 0.4:
        return _behaviour(name, documentation, rng).rstrip(".") + "." + rng.choice(_EXAMPLE).format(**facts)
    text = rng.choice(_REPORT if shown.got else _CRASH).format(**facts)
    if len(evidence) > 1 and rng.random() < 0.3:
        text += f"\nAlso {evidence[1].call} should be {evidence[1].expected}."
    return text


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _roughened(text: str, rng: random.Random) -> str:
    if rng.random() < _NO_TICKS_SHARE:
        text = text.replace("`", "")
    if "\n" in text or ">>>" in text:
        return text
    if rng.random() < _LOWER_SHARE:
        text = (text[0].lower() + text[1:]).rstrip(".")
    if rng.random() < _TYPO_SHARE:
        text = _misspelt(text, rng)
    return text


def _misspelt(text: str, rng: random.Random) -> str:
    """Two letters of one word outside code change places."""
    words = [match for match in re.finditer(r"(?<![`\w.'\"(\[])[a-z]{5,}(?![`\w.'\"(\[=])", text)]
    words = [word for word in words if text[: word.start()].count("`") % 2 == 0]
    if not words:
        return text
    word = rng.choice(words)
    at = word.start() + rng.randrange(1, len(word[0]) - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
