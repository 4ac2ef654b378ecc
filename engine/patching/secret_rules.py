"""Where secrets are in a text.

Ways of finding, strongest first:

- shapes: the token formats of detect-secrets (its plugins' expressions), and those it lacks;
- private keys in PEM, also written as string literals, line by line;
- credentials of a protocol: headers, cookies, `curl -u NAME:PASSWORD`;
- names: what is assigned to, compared with, said of, or a default of something called password, token, secret, api_key
  and so on, where the value looks like no word, name, path or placeholder. `secret_syntax.py` reads the rest of a
  statement: the second of two values, what is added up, defaults, elements.

Not covered: a secret without a known shape that nothing names (`connect("host", "correct horse")`), one put together
from pieces, one in a language other than those of the names below, and one that is encoded once more.
"""

from __future__ import annotations

import base64
import bisect
import io
import itertools
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from engine.patching.secret_syntax import Span, is_config, syntax_of, values_by_syntax
from engine.patching.secret_values import (
    GENERIC,
    KEYWORD,
    LITERAL,
    entropy,
    is_opaque,
    is_placeholder,
    is_random,
    is_secret,
)


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
            if end > start and not is_placeholder(text[start:end]) and (kind != "API Key" or is_random(match[0])):
                yield start, end, kind
    yield from _private_keys(text)
    yield from _credentials(text)
    tree = syntax_of(text)
    is_code = tree is not None and not is_config(tree)
    yield from _named_values(text, is_code=is_code, is_config=tree is not None and not is_code)
    if tree is not None:
        yield from values_by_syntax(text, tree)
    else:
        yield from _values_in_lines(text)
    if not is_code:
        yield from _random_runs(text)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the quotes and signs that some expressions take along."""
    while start < end and text[start] in " \t\n=:\"'":
        start += 1
    while end > start and text[end - 1] in " \t\n\"'":
        end -= 1
    return start, end


def parses(text: str) -> bool:
    """Whether a text is Python.

    Args:
        text: A file, or a definition, indented or not.

    Returns:
        Whether it is.
    """
    return syntax_of(text) is not None


# --- shapes ----------------------------------------------------------------------------------------------------------

_MORE_SHAPES: tuple[tuple[str, str, int], ...] = (
    ("JSON Web Token", r"eyJ[\w-]{8,1000}\.eyJ[\w-]{8,8000}(?:\.[\w-]*)?", 0),
    ("Google API Key", r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}", 0),
    ("Hugging Face Token", r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}", 0),
    ("GitHub Token", r"(?<![A-Za-z0-9])(?:github_pat_\w{22,}|gh[pousr]_\w{30,})", 0),
    ("Slack Token", r"xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{10,}", 0),
    ("Stripe Access Key", r"(?<![A-Za-z0-9])(?:[srp]k_(?:live|test)_\w{10,}|whsec_\w{16,})", 0),
    ("API Key", r"(?<![\w-])sk-[\w-]{18,}", 0),
    ("npm Token", r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}", 0),
    ("Shopify or DigitalOcean Token", r"(?<![A-Za-z0-9])(?:shp(?:at|ca|pa|ss)_\w{30,}|do[opr]_v1_[0-9a-f]{60,})", 0),
    ("Basic Auth Credentials", r"://[^\s/:@\"'<>{}]{0,200}:([^\s/@\"'<>{}]{1,300})@", 1),
    (
        "Authorization Header",
        r"(?i)\b(?:bearer|basic|token|apikey)\s{1,8}((?=[\w.~+/-]{0,200}\d)[\w.~+/-]{16,}={0,2})",
        1,
    ),
)


@cache
def _shapes() -> tuple[tuple[str, re.Pattern[str], int], ...]:
    """Kind, expression and the group that is the secret. detect-secrets is imported here: most runs never mask.

    Left out are its detectors of assignments (Cloudant, IBM, SoftLayer), which the names below cover, and which take
    cubic time on a line of spaces; and those that find names, entropy and addresses.
    """
    from detect_secrets.plugins import (
        artifactory,
        aws,
        azure_storage_key,
        discord,
        gitlab_token,
        mailchimp,
        pypi_token,
        sendgrid,
        slack,
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
    shapes: list[tuple[str, re.Pattern[str], int]] = []
    detectors: tuple[Any, ...] = whole  # their class attributes are annotated as abstract properties
    for detector in detectors:
        patterns: Iterable[re.Pattern[str]] = detector.denylist
        for pattern in patterns:
            group = pattern.groups if detector is aws.AWSKeyDetector else 0
            shapes.append((str(detector.secret_type), pattern, group))
    return (*shapes, *((kind, re.compile(text), group) for kind, text, group in _MORE_SHAPES))


# --- private keys ----------------------------------------------------------------------------------------------------

_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d")
_KEY_BODY = re.compile(r"[A-Za-z0-9+/=\s\\\"'(),:-]{0,20000}")  # what stands in a key, and in literals that hold one
_KEY_RUN = re.compile(r"\\[a-z]|(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{2,}|(?<=\\[nrt])[A-Za-z0-9+/=]{2,}")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]*PRIVATE KEY")
_MIN_KEY_RUN = 16
_MAX_KEY_CHARS = 20_000


def _private_keys(text: str) -> Iterator[Span]:
    """Runs of base64 from a key's beginning on: to its end, or as far as they go."""
    for begin in _KEY_BEGIN.finditer(text):
        end = _KEY_END.search(text, begin.end(), begin.end() + _MAX_KEY_CHARS)
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


# --- credentials of a protocol ----------------------------------------------------------------------------------------

_BASIC = re.compile(r"\bbasic\s{1,8}([A-Za-z0-9+/]{6,2000}={0,2})", re.IGNORECASE)
_HEADER = re.compile(
    r"\b(?:proxy-)?authorization\\?[\"'`]?\]?\s{0,4}[:=,]\s{0,4}[fF]?\\?[\"'`]?(?:bearer|basic|token|digest|apikey)\s{1,8}"
    r"([^\s\"'`\\,;<>]{6,4000})",
    re.IGNORECASE,
)
_COOKIE = re.compile(
    r"\b(?:set-)?cookies?\\?[\"'`]?\]?\s{0,4}[:=,(]\s{0,4}[fF]?\\?[\"'`]?(?P<pairs>[\w.-]{1,60}=[^\"'`\n\\]{1,4000})",
    re.IGNORECASE,
)
_COOKIE_PAIR = re.compile(r"(?:\A|;\s{0,4})[\w.-]{1,60}=(?P<value>[^\s;]{6,4000})")
_USER_OPTION = re.compile(
    r"(?<![\w-])(?:-u|--user|--proxy-user|-U)(?:[ \t=]{1,4}|\\?[\"'`],\s{0,8})\\?[\"'`]?"
    r"[^\s:\"'`$\\,]{1,100}:([^\s\"'`\\]{4,200})"
)


def _credentials(text: str) -> Iterator[Span]:
    """What headers carry, and the password of `curl -u NAME:PASSWORD`."""
    for match in _BASIC.finditer(text):
        if _is_name_and_password(match[1]):
            yield *match.span(1), "Authorization Header"
    for match in _HEADER.finditer(text):
        if not is_placeholder(match[1]) and is_random(match[1], at_least=6):
            yield *match.span(1), "Authorization Header"
    for match in _COOKIE.finditer(text):
        for pair in _COOKIE_PAIR.finditer(match["pairs"]):
            if is_secret(pair["value"], "cookie token", is_password=False):
                start = match.start("pairs")
                yield start + pair.start("value"), start + pair.end("value"), "Cookie"
    for match in _USER_OPTION.finditer(text):
        is_curl = "curl" in text[max(0, match.start() - 400) : match.start()]
        is_mixed = is_curl or re.search(r"[A-Za-z]", match[1]) is not None
        if is_mixed and is_secret(match[1], "password", is_password=True, takes_words=is_curl):
            yield *match.span(1), "Password"


def _is_name_and_password(value: str) -> bool:
    """Whether base64 holds `name:password`."""
    try:
        plain = base64.b64decode(value + "=" * (-len(value) % 4), validate=True).decode("ascii")
    except ValueError:
        return False
    return plain.isprintable() and ":" in plain[:-1]


# --- names -----------------------------------------------------------------------------------------------------------

_CALL = (
    r"(?:(?:\w{1,30}\.){0,2}(?:fromhex|(?:urlsafe_)?b(?:16|32|64|85)decode|SecretStr|SecretBytes|Secret|Fernet|bytes|str)"
    r"\s?\(\s*)"
)
_AFTER_NAME = re.compile(
    r"(?P<suffix>\w{0,40})(?P<close>\\?[\"'`]?\s{0,4}[\])]?)\s{0,8}"
    r"(?::\s{0,4}[\w.\[\]|, ]{1,60}?\s{0,4}(?==[^=]))?"  # an annotation
    rf"(?P<sign>=>|:=|[!=]=|=|:|,)\s*(?P<open>[\[(]?)\s*{_CALL}?{LITERAL}",
    re.DOTALL,
)
_NEXT_LITERAL = re.compile(rf"(?P<comma>\s*,)?\s*{LITERAL}(?!\s*:)", re.DOTALL)
_COMPARED = re.compile(r"(?P<quote>[\"'])(?P<value>[^\"'\n]{4,200})(?P=quote)\s{0,8}[!=]=\s*[\w.]{0,60}$")
_IN_TEXT = re.compile(r"\w{0,40}[ \t]?(?P<sign>[:=])[ \t]?(?P<value>[^\s\"'`,;&<>()\[\]{}\\]{4,300})")
_SAID = re.compile(
    r"[\w-]{0,40}[\"'`]?(?:[ \t](?P<word>is|to|was|as|with|value|of|the|for|key)\b){0,4}[ \t]"
    r"[\"'`]?(?P<value>[^\s\"'`,;()#=*-][^\s\"'`,;()]{5,300})",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?:[ \t](?:is|to|was|as|of)\b)?:?[ \t](?P<quote>[\"'`])(?P<value>[^\"'`\n]{4,})(?P=quote)")
_SAYS = re.compile(r"[ \t](?:is|to|was|as)[ \t]", re.IGNORECASE)
_RANDOM_RUN = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/_-]{24,}={0,2}(?![\w+/-])")
_EXPRESSION = re.compile(r"[A-Za-z_][\w.]*[:.]?|[\d.]+[:.]?|.*[\[\]{}<>|].*")


def _named_values(text: str, *, is_code: bool, is_config: bool) -> Iterator[Span]:
    texts_in_code = _Quoted(text)
    for keyword in KEYWORD.finditer(text):
        is_password = keyword["password"] is not None
        kind = "Password" if is_password else "Named Secret"
        match = _AFTER_NAME.match(text, keyword.end())
        if match is not None:
            name = _name_before(text, keyword.start()) + keyword[0] + match["suffix"]
            yield from _literals(text, match, name, kind)
            continue
        compared = _COMPARED.search(text, max(0, keyword.start() - 200), keyword.start())
        if compared is not None and is_secret(compared["value"], keyword[0], is_password=is_password):
            yield compared.start("value"), compared.end("value"), kind
        is_name = is_code and not texts_in_code.holds(keyword.start())
        yield from _value_in_text(text, keyword, kind, is_name, is_code or is_config)


def _literals(text: str, match: re.Match[str], name: str, kind: str) -> Iterator[Span]:
    """The literal behind a name: with those that are parts of the same string, and those of the same list."""
    if match["sign"] == "," and not match["close"].strip():  # an argument of a call, not a name and its default
        return
    values: list[list[re.Match[str]]] = [[match]]
    literal = match
    while (following := _NEXT_LITERAL.match(text, literal.end())) is not None:
        literal = following
        if literal["comma"] is None:
            values[-1].append(literal)
        elif match["open"]:
            values.append([literal])
        else:
            break
    is_pair = name.lower() == "auth" and len(values) == 2  # ("user", "password")
    for number, parts in enumerate(values):
        value = "".join(part["value"] for part in parts).strip()
        is_password = kind == "Password" or (is_pair and number == 1)
        if is_secret(value, name, is_password=is_password, takes_words=match["sign"] != "," and not is_pair) and (
            match["sign"] != "," or not GENERIC.search(value)
        ):
            for part in parts:
                yield (*_trimmed(text, *part.span("value")), kind)


def _value_in_text(text: str, keyword: re.Match[str], kind: str, is_name: bool, is_code: bool) -> Iterator[Span]:
    """`password=S3cret` in a string, a comment or a sentence, and `the password is S3cret`; no name's own value."""
    is_password = kind == "Password"
    given = _IN_TEXT.match(text, keyword.end())
    if given is not None and not is_name:
        value = given["value"].rstrip(".:!?") if given["value"][-1] in ".:" else given["value"]
        may_be_code = not is_code and "\n" in text.strip() and _EXPRESSION.fullmatch(value) is not None
        may_be_code = may_be_code and not (given["sign"] == ":" and is_opaque(value))
        looks_secret = is_secret(value, keyword[0], is_password=is_password, takes_words=False)
        if not may_be_code and (looks_secret or (given["sign"] == ":" and is_random(value, at_least=6))):
            yield given.start("value"), given.start("value") + len(value), kind
        return
    quoted = _QUOTED.match(text, keyword.end())
    if quoted is not None and not is_name:
        if is_secret(quoted["value"], keyword[0], is_password=is_password):
            yield quoted.start("value"), quoted.end("value"), kind
        return
    said = _SAID.match(text, keyword.end())
    if said is None:
        return
    value = said["value"].rstrip(".:!?") if said["value"][-1] in ".:" else said["value"]
    may_be_code = (is_name or (not is_code and "\n" in text.strip())) and _EXPRESSION.fullmatch(value) is not None
    is_said = _SAYS.search(text, keyword.end(), said.start("value")) is not None or (is_password and not is_name)
    if is_said and not may_be_code and is_random(value, at_least=6) and not is_placeholder(value):
        yield said.start("value"), said.start("value") + len(value), kind


def _values_in_lines(text: str) -> Iterator[Span]:
    """Statements in what is no Python as a whole: a line of a log, of a plan, of a difference."""
    for line in re.finditer(r"[^\r\n]{6,2000}", text):
        names = [*itertools.islice(KEYWORD.finditer(line[0]), _MAX_TRIES), *_KEY_NAME.finditer(line[0])]
        for name in names[:_MAX_TRIES]:
            before = re.search(r"(?:[\w.]{1,60},[ \t]?){0,4}[\w.]{0,60}\Z", line[0][: name.start()][-300:])
            start = line.start() + name.start() - (len(before[0]) if before else 0)
            statement = text[start : line.end()].rstrip()
            tree = syntax_of(statement) if _ASSIGNS.search(statement) else None
            if tree is not None and not is_config(tree):
                yield from (
                    (start + first, start + end, kind) for first, end, kind in values_by_syntax(statement, tree)
                )


_MAX_TRIES = 4  # of a line
_KEY_NAME = re.compile(r"(?<![A-Za-z])key(?=[ \t]?=)", re.IGNORECASE)
_ASSIGNS = re.compile(r"=[ \t]*[^=\s].*[\"'\d]", re.DOTALL)


class _Quoted:
    """Where the strings and comments of code are; looked up only when it is asked.

    Args:
        text: Python.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._spans: list[tuple[int, int]] | None = None

    def holds(self, place: int) -> bool:
        if self._spans is None:
            self._spans = list(self._find())
        index = bisect.bisect_right(self._spans, (place, len(self._text))) - 1
        return index >= 0 and place < self._spans[index][1]

    def _find(self) -> Iterator[tuple[int, int]]:
        starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", self._text))]
        is_indented = self._text[:1] in (" ", "\t")
        code = f"if 1:\n{self._text}" if is_indented else self._text
        try:
            for token in tokenize.generate_tokens(io.StringIO(code).readline):
                if token.type in _TEXT_TOKENS and token.start[0] > is_indented:
                    rows = token.start[0] - 1 - is_indented, token.end[0] - 1 - is_indented
                    yield starts[rows[0]] + token.start[1], starts[rows[1]] + token.end[1]
        except (tokenize.TokenError, SyntaxError, IndexError):
            return


_TEXT_TOKENS = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def _random_runs(text: str) -> Iterator[Span]:
    """In a sentence nothing else looks like a long run of mixed letters and digits; in code much does."""
    for match in _RANDOM_RUN.finditer(text):
        is_mixed = all(re.search(some, match[0]) for some in ("[a-z]", "[A-Z]", r"\d"))
        if is_mixed and entropy(match[0]) >= 4 and is_random(match[0]):
            is_escape = text[match.start() - 1 : match.start() + 1] in ("\\n", "\\r", "\\t")
            yield match.start() + is_escape, match.end(), "High Entropy String"


def _name_before(text: str, end: int) -> str:
    match = re.search(r"[\w.-]{0,60}\Z", text[max(0, end - 60) : end])
    return match[0] if match else ""
