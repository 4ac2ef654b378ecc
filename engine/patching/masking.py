"""Secrets in text, found and replaced by `<secret>`, so that nothing that is learnt from holds them.

Three ways of finding, strongest first:

- shapes: the token formats of detect-secrets (its plugins' expressions), and those it lacks;
- private keys in PEM, also written as string literals, line by line;
- names: what is assigned to, compared with, or a default of something called password, token, secret, api_key and so
  on, where the value looks like no word, name, path or placeholder.

Texts that belong together are masked together: a value found in one is masked in all. Lines stay lines and literals
stay literals, so masked code parses as it did.

Not covered: a secret without a known shape that nothing names (`connect("host", "correct horse")`), one put together
from pieces, one in a language other than those of the names below, and one that is encoded once more.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

MASK = "<secret>"
_NAME_MASK = "MASKED_SECRET"  # outside of a literal, where `<secret>` would be no Python
_MIN_SHARED_CHARS = 6  # a shorter value is masked at its own place only: elsewhere it may be an ordinary word

Span = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Masked:
    """Texts without their secrets.

    Args:
        texts: The texts, in the order given.
        counts: Number of masked places by kind.
        is_sound: Whether every text that parsed as Python before does so still.
    """

    texts: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    is_sound: bool = True


def mask_text(text: str) -> str:
    """One text without its secrets.

    Args:
        text: Prose or code.

    Returns:
        The text, `<secret>` in their places.
    """
    return mask_together([text]).texts[0]


def mask_together(texts: Sequence[str]) -> Masked:
    """Texts that belong together without their secrets: a value found in one of them is masked in all.

    Args:
        texts: Prose or code, such as an intent, a plan, a file before and after.

    Returns:
        The texts, `<secret>` in their places.
    """
    found = [list(find_secrets(text)) for text in texts]
    shared = {text[start:end]: kind for text, spans in zip(texts, found, strict=True) for start, end, kind in spans}
    everywhere = _occurrences_of(value for value in shared if len(value) >= _MIN_SHARED_CHARS)
    counts: Counter[str] = Counter()
    masked: list[str] = []
    is_sound = True
    for text, spans in zip(texts, found, strict=True):
        if everywhere is not None:
            spans = [*spans, *((m.start(), m.end(), shared[m[0]]) for m in everywhere.finditer(text))]
        merged = _merged(spans)
        counts.update(kind for _, _, kind in merged)
        result, stays_sound = _replaced(text, merged)
        is_sound = is_sound and stays_sound
        masked.append(result)
    return Masked(tuple(masked), dict(sorted(counts.items())), is_sound)


def find_secrets(text: str) -> Iterator[Span]:
    """The places of secrets in one text.

    Args:
        text: Prose or code.

    Yields:
        Start, end (exclusive) and kind of each; places may overlap.
    """
    for kind, pattern, group in _shapes():
        for match in pattern.finditer(text):
            start, end = _trimmed(text, *match.span(group))
            if end > start and not _is_placeholder(text[start:end]) and (kind != "API Key" or _is_random(match[0])):
                yield start, end, kind
    yield from _private_keys(text)
    is_code = _parses(text)
    yield from _named_values(text, is_code=is_code)
    if not is_code:
        yield from _random_runs(text)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the quotes and signs that some expressions take along."""
    while start < end and text[start] in " \t\n=:\"'":
        start += 1
    while end > start and text[end - 1] in " \t\n\"'":
        end -= 1
    return start, end


def _occurrences_of(values: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(values), key=lambda value: (-len(value), value))
    if not longest_first:
        return None
    words = (
        (r"(?<![A-Za-z0-9])" if value[0].isalnum() else "")
        + re.escape(value)
        + (r"(?![A-Za-z0-9])" if value[-1].isalnum() else "")
        for value in longest_first
    )
    return re.compile("|".join(words))


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end, kind in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), merged[-1][2])
        elif end > start:
            merged.append((start, end, kind))
    return merged


def _replaced(text: str, spans: Sequence[Span]) -> tuple[str, bool]:
    """The text with every span masked; names where literals would not parse. Whether it is as sound as before."""
    if not spans:
        return text, True
    first = _with_mask(text, spans, MASK)
    if not _parses(text) or _parses(first):
        return first, True
    second = _with_mask(text, spans, _NAME_MASK)
    return second, _parses(second)


def _with_mask(text: str, spans: Sequence[Span], mask: str) -> str:
    parts: list[str] = []
    at = 0
    for start, end, _ in spans:
        parts += [text[at:start], mask, "\n" * text.count("\n", start, end)]
        at = end
    return "".join([*parts, text[at:]])


def _parses(text: str) -> bool:
    indented = text[:1] in (" ", "\t")
    try:
        ast.parse(f"if 1:\n{text}" if indented else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# --- shapes ----------------------------------------------------------------------------------------------------------

_MORE_SHAPES: tuple[tuple[str, str, int], ...] = (
    ("JSON Web Token", r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?", 0),
    ("Google API Key", r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}", 0),
    ("Hugging Face Token", r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}", 0),
    ("GitHub Token", r"(?<![A-Za-z0-9])(?:github_pat_\w{22,}|gh[pousr]_\w{30,})", 0),
    ("Slack Token", r"xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{10,}", 0),
    ("Stripe Access Key", r"(?<![A-Za-z0-9])(?:[srp]k_(?:live|test)_\w{10,}|whsec_\w{16,})", 0),
    ("API Key", r"(?<![\w-])sk-[\w-]{18,}", 0),
    ("npm Token", r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}", 0),
    ("Shopify or DigitalOcean Token", r"(?<![A-Za-z0-9])(?:shp(?:at|ca|pa|ss)_\w{30,}|do[opr]_v1_[0-9a-f]{60,})", 0),
    ("Basic Auth Credentials", r"://[^\s/:@\"'<>{}]*:([^\s/@\"'<>{}]+)@", 1),
    ("Authorization Header", r"(?i)\b(?:bearer|basic)\s+((?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*)", 1),
)


@cache
def _shapes() -> tuple[tuple[str, re.Pattern[str], int], ...]:
    """Kind, expression and the group that is the secret. detect-secrets is imported here: most runs never mask."""
    from detect_secrets.plugins import (
        artifactory,
        aws,
        azure_storage_key,
        cloudant,
        discord,
        gitlab_token,
        ibm_cloud_iam,
        ibm_cos_hmac,
        mailchimp,
        pypi_token,
        sendgrid,
        slack,
        softlayer,
        square_oauth,
        telegram_token,
        twilio,
    )

    whole = (
        artifactory.ArtifactoryDetector,
        azure_storage_key.AzureStorageKeyDetector,
        discord.DiscordBotTokenDetector,
        gitlab_token.GitLabTokenDetector,
        mailchimp.MailchimpDetector,
        pypi_token.PypiTokenDetector,
        sendgrid.SendGridDetector,
        slack.SlackDetector,
        square_oauth.SquareOAuthDetector,
        telegram_token.TelegramBotTokenDetector,
        twilio.TwilioKeyDetector,
        aws.AWSKeyDetector,
    )
    assigned = (
        cloudant.CloudantDetector,
        ibm_cloud_iam.IbmCloudIamDetector,
        ibm_cos_hmac.IbmCosHmacDetector,
        softlayer.SoftlayerDetector,
    )
    shapes: list[tuple[str, re.Pattern[str], int]] = []
    detectors: tuple[Any, ...] = (*whole, *assigned)  # their class attributes are annotated as abstract properties
    for detector in detectors:
        patterns: Iterable[re.Pattern[str]] = detector.denylist
        for pattern in patterns:
            is_part = detector in assigned or detector is aws.AWSKeyDetector
            shapes.append((str(detector.secret_type), pattern, pattern.groups if is_part else 0))
    return (*shapes, *((kind, re.compile(text), group) for kind, text, group in _MORE_SHAPES))


# --- private keys ----------------------------------------------------------------------------------------------------

_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d")
_KEY_BODY = re.compile(r"[A-Za-z0-9+/=\s\\\"'(),:-]*")  # what stands in a key, and in literals that hold one
_KEY_RUN = re.compile(r"\\[a-z]|(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{2,}|(?<=\\[nrt])[A-Za-z0-9+/=]{2,}")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]*PRIVATE KEY")
_MIN_KEY_RUN = 16


def _private_keys(text: str) -> Iterator[Span]:
    """Runs of base64 from a key's beginning on: to its end, or as far as they go."""
    for begin in _KEY_BEGIN.finditer(text):
        end = _KEY_END.search(text, begin.end())
        body = _KEY_BODY.match(text, begin.end())
        stop = body.end() if body else begin.end()
        is_whole = end is not None and stop >= end.start()
        if is_whole and end is not None:
            stop = end.start()
        runs = [run for run in _KEY_RUN.finditer(text, begin.end(), stop) if not run[0].startswith("\\")]
        if not any(len(run[0]) >= _MIN_KEY_RUN for run in runs):
            continue
        for run in runs:
            if is_whole or len(run[0]) >= _MIN_KEY_RUN:
                yield run.start(), run.end(), "Private Key"


# --- names -----------------------------------------------------------------------------------------------------------

_PASSWORD = (
    r"db[_-]?pass(?:word|wd)?|pass(?:word|wd|phrase|code)|(?<=[\"'_])pass(?=[\"'])|pwd"
    r"|passwort|kennwort|mot_?de_?passe|contrase[nñ]a"
)
_TOKEN = (
    r"secret|token|api[_-]?key|access[_-]?key|auth[_-]?key|account[_-]?key|service[_-]?key|private[_-]?key|client[_-]?key"
    r"|encryption[_-]?key|signing[_-]?key|master[_-]?key|shared[_-]?key|secret[_-]?key|credential|authorization"
    r"|(?<![A-Za-z])(?:auth|salt|hmac)(?![A-Za-z])"
)
_KEYWORD = re.compile(rf"(?P<password>{_PASSWORD})|(?:{_TOKEN})", re.IGNORECASE)
_LITERAL = r"(?:[rRbBuUfF]{0,2})(?P<quote>\"\"\"|'''|[\"'`])(?P<value>(?:\\.|(?!(?P=quote))[^\\\n])+)(?P=quote)"
_AFTER_NAME = re.compile(
    r"(?P<suffix>\w{0,40})(?P<close>\\?[\"'`]?\s{0,4}[\])]?)\s{0,8}"
    r"(?::\s{0,4}[\w.\[\]|, ]{1,60}?\s{0,4}(?==[^=]))?"  # an annotation
    rf"(?P<sign>=>|:=|[=!]=|=|:|,)\s*\(?\s*{_LITERAL}",
    re.DOTALL,
)
_NEXT_LITERAL = re.compile(rf"\s*{_LITERAL}", re.DOTALL)
_COMPARED = re.compile(r"(?P<quote>[\"'])(?P<value>[^\"'\n]{4,})(?P=quote)\s*[!=]=\s*[\w.]{0,60}$")
_IN_PROSE = re.compile(
    r"[\w-]{0,40}[\"'`]?(?P<sign>[ \t]?[:=][ \t]?|(?:[ \t](?:is|to|was|as|with|value|of|the|for|key)\b){0,4}[ \t])"
    r"[\"'`]?(?P<value>[^\s\"'`,;()#=*-][^\s\"'`,;()]{5,})",
    re.IGNORECASE,
)
_RANDOM_RUN = re.compile(r"(?<![\w+/=-])(?=[^\s]*\d)[A-Za-z0-9+/_-]{24,}={0,2}(?![\w+/-])")
_WORD_SIGN = re.compile(r"\b(?:is|to|was|as)\b|=", re.IGNORECASE)
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*[:.]?|[\d.]+[:.]?|.*[\[\]{}<>|].*")


def _named_values(text: str, *, is_code: bool) -> Iterator[Span]:
    for keyword in _KEYWORD.finditer(text):
        is_password = keyword["password"] is not None
        kind = "Password" if is_password else "Named Secret"
        match = _AFTER_NAME.match(text, keyword.end())
        if match is not None:
            name = _name_before(text, keyword.start()) + keyword[0] + match["suffix"]
            yield from _literals(text, match, name, kind, is_password=is_password and match["sign"] != ",")
            continue
        compared = _COMPARED.search(text, max(0, keyword.start() - 200), keyword.start())
        if compared is not None and _is_secret(compared["value"], keyword[0], is_password=is_password):
            yield compared.start("value"), compared.end("value"), kind
        yield from _value_in_prose(text, keyword, kind, is_code=is_code)


def _literals(text: str, match: re.Match[str], name: str, kind: str, *, is_password: bool) -> Iterator[Span]:
    """The literal behind a name, and those that follow it as parts of the same string."""
    if match["sign"] == "," and not match["close"].strip():  # an argument of a call, not a name and its default
        return
    literal: re.Match[str] | None = match
    parts: list[re.Match[str]] = []
    while literal is not None:
        parts.append(literal)
        literal = _NEXT_LITERAL.match(text, literal.end())
    if _is_secret("".join(part["value"] for part in parts), name, is_password=is_password):
        for part in parts:
            yield part.start("value"), part.end("value"), kind


def _value_in_prose(text: str, keyword: re.Match[str], kind: str, *, is_code: bool) -> Iterator[Span]:
    """`the password is S3cret!`: in comments and sentences; where it may be code a value that is one is let be."""
    match = _IN_PROSE.match(text, keyword.end())
    if match is None:
        return
    value = match["value"].rstrip(".:!?") if match["value"][-1:] in ".:" else match["value"]
    line_start = text.rfind("\n", 0, keyword.start()) + 1
    is_comment = "#" in text[line_start : keyword.start()]
    is_sentence = not is_code and "\n" not in text.strip()
    is_named = kind == "Password" or ":" in match["sign"]
    is_said = _WORD_SIGN.search(match["sign"]) is not None or (is_named and (is_comment or not is_code))
    may_be_code = not (is_comment or is_sentence) and _EXPRESSION.fullmatch(value) is not None
    if is_said and not may_be_code and _is_random(value, at_least=6) and not _is_placeholder(value):
        yield match.start("value"), match.start("value") + len(value), kind


def _random_runs(text: str) -> Iterator[Span]:
    """In a sentence nothing else looks like a long run of mixed letters and digits; in code much does."""
    for match in _RANDOM_RUN.finditer(text):
        is_mixed = all(re.search(some, match[0]) for some in ("[a-z]", "[A-Z]", r"\d"))
        if is_mixed and _entropy(match[0]) >= 4 and _is_random(match[0]):
            is_escape = text[match.start() - 1 : match.start() + 1] in ("\\n", "\\r", "\\t")
            yield match.start() + is_escape, match.end(), "High Entropy String"


def _name_before(text: str, end: int) -> str:
    match = re.search(r"[\w.-]{0,60}\Z", text[max(0, end - 60) : end])
    return match[0] if match else ""


# --- what a secret looks like ----------------------------------------------------------------------------------------

_GENERIC = re.compile(
    r"pass|pwd|secret|token|key|user|name|admin\Z|none|null|true|false|required|string|text|field|hidden|default|value"
    r"|input|login|auth|email|change|prompt|enter|invalid|missing|error|failed|wrong|correct|incorrect|basic|bearer"
    r"|plain|hash|bcrypt|digest|encrypt|access|refresh|example|dummy|optional|test|sha|md5|utf|ascii|latin",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"<[^>]*>?|.*[{}].*|.*%[sdr(].*|\$\w+|\$\(.*|[*.:x_#-]+|.*\.\.\..*|.*….*|(?:your|my|some|the|an?|insert|put)[-_ ].*"
    r"|user(?:name)?|pass(?:word|wd)?|pw|pwd|secret|token|key|none|null|true|false|\[[^\]]*\]|.*MASKED_SECRET.*",
    re.IGNORECASE | re.DOTALL,
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:[./][A-Za-z_]\w*){2,}")  # a module, a class, a path
_PARTS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[A-Za-z]*\d{0,4}|\d+")


def _is_secret(value: str, name: str, *, is_password: bool) -> bool:
    if _is_placeholder(value) or value.strip().lower() in ("", name.lower()) or value.count(" ") > 3:
        return False
    if not is_password:
        return _is_random(value)
    if len(value) < 4 or value.endswith((":", ": ", "?")) or _DOTTED.fullmatch(value):
        return False
    if re.search(r"\d", value) and not re.fullmatch(r"\d{1,3}|[\d.]+", value):
        return True
    if re.search(r"[^\w\s.,:/-]", value.rstrip("!?.,:")) and " " not in value:
        return True
    ends_with_word = re.search(rf"(?:{_PASSWORD})\d?\Z", name, re.IGNORECASE) is not None
    return ends_with_word and len(value) >= 6 and not _GENERIC.search(value) and value.count(" ") < 4


def _is_placeholder(value: str) -> bool:
    return _PLACEHOLDER.fullmatch(value.strip()) is not None


def _is_random(value: str, *, at_least: int = 8) -> bool:
    """Whether a text looks made by a machine, or chosen to be hard to guess: no words, names, paths or numbers."""
    if len(value) < at_least or re.search(r"\s", value) or not re.search(r"[A-Za-z]", value):
        return False
    if _entropy(value) < 2.3:
        return False
    parts = [part for part in _PARTS.split(value) if part]
    if at_least >= 8 and sum(map(len, re.findall(r"[a-z]{4,}", value))) >= 0.6 * len(value):
        return False
    if all(_WORD.fullmatch(part) for part in parts):
        has_digits = any(char.isdigit() for char in value)
        is_chopped = len(parts) >= 4 and sum(map(len, parts)) / len(parts) < 3.2 and len(value) >= 12
        if at_least < 8:  # next to a word that says so, a word with a digit is enough
            return is_chopped or has_digits or bool(re.search(r"[^\w\s./:-]", value))
        is_long_run = any(len(part) >= 20 for part in parts) and _entropy(value) >= 3.5
        is_hex = re.fullmatch(r"[0-9a-fA-F]{16,}", value) is not None and has_digits
        return is_chopped or is_long_run or is_hex
    return bool(re.search(r"\d", value)) or _entropy(value) >= 3.5


def _entropy(value: str) -> float:
    """Shannon entropy in bits a character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
