"""Where secrets are in a text.

Three ways of finding, strongest first:

- shapes: the token formats of detect-secrets (its plugins' expressions), and those it lacks;
- private keys in PEM, also written as string literals, line by line;
- names: what is assigned to, compared with, said of, or a default of something called password, token, secret, api_key
  and so on, where the value looks like no word, name, path or placeholder.

Not covered: a secret without a known shape that nothing names (`connect("host", "correct horse")`), one put together
from pieces, one in a language other than those of the names below, and one that is encoded once more.
"""

from __future__ import annotations

import ast
import bisect
import io
import math
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

Span = tuple[int, int, str]


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
    is_code = parses(text)
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


def parses(text: str) -> bool:
    """Whether a text is Python.

    Args:
        text: A file, or a definition, indented or not.

    Returns:
        Whether it is.
    """
    indented = text[:1] in (" ", "\t")
    try:
        ast.parse(f"if 1:\n{text}" if indented else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


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


# --- names -----------------------------------------------------------------------------------------------------------

_PASSWORD = (
    r"db[_-]?pass(?:word|wd)?|pass(?:word|wd|phrase|code)|(?<=[\"'_])pass(?=[\"'])|pwd"
    r"|passwort|kennwort|mot_?de_?passe|contrase[nñ]a"
)
_TOKEN = (
    r"secret|token|(?:api|access|auth|account|service|private|client|encryption|signing|master|shared|secret)[ _-]?key"
    r"|credential|authorization|(?<![A-Za-z])(?:auth|salt|hmac)(?![A-Za-z])"
)
_KEYWORD = re.compile(rf"(?P<password>{_PASSWORD})|(?:{_TOKEN})", re.IGNORECASE)
_LITERAL = (
    r"[rRbBuUfF]{0,2}(?P<quote>\\?(?:\"\"\"|\'\'\'|[\"'`]))"
    r"(?P<value>(?:(?!(?P=quote))(?:\\.|[^\\\n])){1,4000})(?P=quote)"
)
_CALL = (
    r"(?:(?:\w{1,30}\.){0,2}(?:fromhex|(?:urlsafe_)?b(?:16|32|64|85)decode|SecretStr|SecretBytes|Secret|Fernet|bytes|str)"
    r"\s?\(\s*)"
)
_AFTER_NAME = re.compile(
    r"(?P<suffix>\w{0,40})(?P<close>\\?[\"'`]?\s{0,4}[\])]?)\s{0,8}"
    r"(?::\s{0,4}[\w.\[\]|, ]{1,60}?\s{0,4}(?==[^=]))?"  # an annotation
    rf"(?P<sign>=>|:=|[!=]=|=|:|,)\s*(?P<open>[\[(]?)\s*{_CALL}?{_LITERAL}",
    re.DOTALL,
)
_NEXT_LITERAL = re.compile(rf"(?P<comma>\s*,)?\s*{_LITERAL}(?!\s*:)", re.DOTALL)
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


def _named_values(text: str, *, is_code: bool) -> Iterator[Span]:
    texts_in_code = _Quoted(text)
    for keyword in _KEYWORD.finditer(text):
        is_password = keyword["password"] is not None
        kind = "Password" if is_password else "Named Secret"
        match = _AFTER_NAME.match(text, keyword.end())
        if match is not None:
            name = _name_before(text, keyword.start()) + keyword[0] + match["suffix"]
            yield from _literals(text, match, name, kind)
            continue
        compared = _COMPARED.search(text, max(0, keyword.start() - 200), keyword.start())
        if compared is not None and _is_secret(compared["value"], keyword[0], is_password=is_password):
            yield compared.start("value"), compared.end("value"), kind
        yield from _value_in_text(text, keyword, kind, is_code and not texts_in_code.holds(keyword.start()), is_code)


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
        value = "".join(part["value"] for part in parts)
        is_password = kind == "Password" or (is_pair and number == 1)
        if _is_secret(value, name, is_password=is_password, takes_words=match["sign"] != "," and not is_pair) and (
            match["sign"] != "," or not _GENERIC.search(value)
        ):
            yield from ((part.start("value"), part.end("value"), kind) for part in parts)


def _value_in_text(text: str, keyword: re.Match[str], kind: str, is_name: bool, is_code: bool) -> Iterator[Span]:
    """`password=S3cret` in a string, a comment or a sentence, and `the password is S3cret`; no name's own value."""
    is_password = kind == "Password"
    given = _IN_TEXT.match(text, keyword.end())
    if given is not None and not is_name:
        value = given["value"].rstrip(".:!?") if given["value"][-1] in ".:" else given["value"]
        may_be_code = not is_code and "\n" in text.strip() and _EXPRESSION.fullmatch(value) is not None
        is_secret = _is_secret(value, keyword[0], is_password=is_password, takes_words=False)
        if not may_be_code and (is_secret or (given["sign"] == ":" and _is_random(value, at_least=6))):
            yield given.start("value"), given.start("value") + len(value), kind
        return
    quoted = _QUOTED.match(text, keyword.end())
    if quoted is not None and not is_name:
        if _is_secret(quoted["value"], keyword[0], is_password=is_password):
            yield quoted.start("value"), quoted.end("value"), kind
        return
    said = _SAID.match(text, keyword.end())
    if said is None:
        return
    value = said["value"].rstrip(".:!?") if said["value"][-1] in ".:" else said["value"]
    may_be_code = (is_name or (not is_code and "\n" in text.strip())) and _EXPRESSION.fullmatch(value) is not None
    is_said = _SAYS.search(text, keyword.end(), said.start("value")) is not None or (is_password and not is_name)
    if is_said and not may_be_code and _is_random(value, at_least=6) and not _is_placeholder(value):
        yield said.start("value"), said.start("value") + len(value), kind


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
        if is_mixed and _entropy(match[0]) >= 4 and _is_random(match[0]):
            is_escape = text[match.start() - 1 : match.start() + 1] in ("\\n", "\\r", "\\t")
            yield match.start() + is_escape, match.end(), "High Entropy String"


def _name_before(text: str, end: int) -> str:
    match = re.search(r"[\w.-]{0,60}\Z", text[max(0, end - 60) : end])
    return match[0] if match else ""


# --- what a secret looks like ----------------------------------------------------------------------------------------

_GENERIC = re.compile(
    r"pass|pwd|secret|token|key|user|name|admin\Z|none|null|true|false|required|string|text|field|hidden|default|value"
    r"|input|login|auth|email|change|prompt|enter|invalid|missing|error|failed|wrong|incorrect|basic|bearer"
    r"|plain|hash|bcrypt|digest|encrypt|access|refresh|example|dummy|optional|test|sha|md5|utf|ascii|latin",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"<[^>]*>?|\$\w+|\$\(.*|[*.:x_#-]+|.*\.\.\..*|.*….*|(?:your|my|some|the|an?|insert|put)[-_ ].*"
    r"|user(?:name)?|pass(?:word|wd)?|pw|pwd|secret|token|key|none|null|true|false|\[[^\]]*\]|.*MASKED_SECRET.*",
    re.IGNORECASE | re.DOTALL,
)
_FIELD = re.compile(r"\{[^{}]*\}|[{}]|%(?:\(\w+\))?[sdr]|\$\{[^}]*\}")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:[./][A-Za-z_]\w*){2,}")  # a module, a class, a path
_PARTS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[A-Za-z]*\d{0,4}|\d+")
_LEAST_WORDED = 0.55  # of letters at random a fifth, of words two thirds
_COMMON_PAIRS = frozenset(
    re.findall(
        "..",
        "thheineranrendatonnthaesstenedtoitoueahiisortiasteetngofaldeselesasiarveraldurroriionemeliiccomaelec"
        "taceladissutunomnstrnousacilhopectlopochncotlygeidemwishsoadbeabuliepraikefoolcaeettwhowrsimirplamrt"
        "agayevueuprytyckspsumodomifiigboopodniivgiexosovapdacuquubipifobeyokkswordpa",
    )
)


def _is_secret(value: str, name: str, *, is_password: bool, takes_words: bool = True) -> bool:
    """Whether a value that a name stands for is one; a password may be a word, where `takes_words` says so."""
    if _is_placeholder(value) or value.strip().lower() in ("", name.lower()) or value.count(" ") > 3:
        return False
    if not is_password:
        return _is_random(value)
    if len(value) < 4 or value.endswith((":", ": ", "?")) or _DOTTED.fullmatch(value):
        return False
    if not takes_words and " " in value:
        return False
    if re.search(r"\d", value) and not re.fullmatch(r"\d{1,3}|\d+(?:\.\d+)+", value):
        return True
    if re.search(r"[^\w\s.,:/-]", value.rstrip("!?.,:")) and " " not in value:
        return True
    ends_with_word = re.search(rf"(?:{_PASSWORD})\d?\Z", name, re.IGNORECASE) is not None
    return takes_words and ends_with_word and len(value) >= 6 and not _GENERIC.search(value)


def _is_placeholder(value: str) -> bool:
    """Whether a value stands for another: `<your key>`, `{token}`, `%s`, `...`; also with words around it."""
    if _PLACEHOLDER.fullmatch(value.strip()) is not None:
        return True
    around = _FIELD.sub("", value)
    return around != value and not (len(around) >= 12 and _is_random(around))


def _is_random(value: str, *, at_least: int = 8) -> bool:
    """Whether a text looks made by a machine, or chosen to be hard to guess: no words, names, paths or numbers."""
    if len(value) < at_least or re.search(r"\s", value) or not re.search(r"[A-Za-z]", value):
        return False
    if _entropy(value) < 2.3:
        return False
    parts = [part for part in _PARTS.split(value) if part]
    num_signs = len(set(re.findall(r"[^\w\s./:-]", value)))
    if len(value) >= 20 and num_signs >= 3 and re.search(r"\d", value) and _entropy(value) >= 4:
        return True
    if len(re.findall(r"\d[A-Za-z]", value)) >= 2:
        return True
    if at_least >= 8 and _share_of_common_pairs(value) >= _LEAST_WORDED:
        return False
    if all(_WORD.fullmatch(part) for part in parts):
        has_digits = any(char.isdigit() for char in value)
        is_no_word = len(value) >= 12 and _share_of_common_pairs(value) < _LEAST_WORDED
        if at_least < 8:  # next to a word that says so, a word with a digit is enough
            return is_no_word or has_digits or bool(re.search(r"[^\w\s./:-]", value))
        return is_no_word
    return bool(re.search(r"\d", value)) or _entropy(value) >= 3.5


def _share_of_common_pairs(value: str) -> float:
    """Share of the pairs of letters in a row that are among the commonest of English and of identifiers."""
    runs = (part.lower() for part in _PARTS.split(value) for part in re.findall(r"[A-Za-z]+", part))
    pairs = [run[i : i + 2] for run in runs for i in range(len(run) - 1)]
    return sum(pair in _COMMON_PAIRS for pair in pairs) / len(pairs) if len(pairs) >= 4 else 0.0


def _entropy(value: str) -> float:
    """Shannon entropy in bits a character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
