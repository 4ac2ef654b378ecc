"""What secrets are called and what they look like: shared by the ways of finding them."""

from __future__ import annotations

import math
import re
from collections import Counter

PASSWORD = (
    r"db[_-]?pass(?:word|wd)?|pass(?:word|wd|phrase|code)|(?<=[\"'_])pass(?=[\"'])|pwd"
    r"|passwort|kennwort|mot_?de_?passe|contrase[nñ]a"
)
_TOKEN = (
    r"secret|token|(?:api|access|auth|account|service|private|client|encryption|signing|master|shared|secret)[ _-]?key"
    r"|credential|authorization|(?<![A-Za-z])(?:auth|salt|hmac)(?![A-Za-z])"
)
KEYWORD = re.compile(rf"(?P<password>{PASSWORD})|(?:{_TOKEN})", re.IGNORECASE)
LITERAL = (
    r"[rRbBuUfF]{0,2}(?P<quote>\\?(?:(?P<triple>\"\"\"|\'\'\')|[\"'`]))"
    r"(?P<value>(?:(?!(?P=quote))(?:\\.|(?(triple)[^\\]|[^\\\n]))){1,4000})(?P=quote)"
)
MIN_NUMBER_DIGITS = 4  # of a password that is a number
_HEX_KEY = re.compile(r"\A_?key\Z|(?:\A|_)(?:aes|hex|crypto|crypt|session|mac|app)_?key\Z", re.IGNORECASE)
_HEX = re.compile(r"(?:[0-9a-f]{32,}|[0-9A-F]{32,})")

GENERIC = re.compile(
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


def names_hex_key(name: str) -> bool:
    """Whether a name is that of a key, which is a secret where it is long and hexadecimal.

    Args:
        name: What stands before a value.

    Returns:
        Whether it is `key`, or a kind of it.
    """
    return _HEX_KEY.search(name) is not None


def is_secret(value: str, name: str, *, is_password: bool, takes_words: bool = True) -> bool:
    """Whether a value that a name stands for is one; a password may be a word, where `takes_words` says so."""
    if is_placeholder(value) or value.strip().lower() in ("", name.lower()) or value.count(" ") > 3:
        return False
    if not is_password:
        if KEYWORD.search(name) is None:
            return names_hex_key(name) and _HEX.fullmatch(value) is not None and entropy(value) > 2.3
        return is_random(value) or _is_short_random(value)
    if len(value) < 4 or value.endswith((":", ": ", "?")) or _DOTTED.fullmatch(value):
        return False
    if not takes_words and " " in value:
        return False
    if re.search(r"\d", value) and not re.fullmatch(r"\d{1,3}|\d+(?:\.\d+)+", value):
        return True
    if re.search(r"[^\w\s.,:/-]", value.rstrip("!?.,:")) and " " not in value:
        return True
    ends_with_word = re.search(rf"(?:{PASSWORD})\d?\Z", name, re.IGNORECASE) is not None
    return takes_words and ends_with_word and len(value) >= 6 and not GENERIC.search(value)


def is_placeholder(value: str) -> bool:
    """Whether a value stands for another: `<your key>`, `{token}`, `%s`, `...`; also with words around it."""
    if _PLACEHOLDER.fullmatch(value.strip()) is not None:
        return True
    around = _FIELD.sub("", value)
    return around != value and not (len(around) >= 12 and is_random(around))


def is_random(value: str, *, at_least: int = 8) -> bool:
    """Whether a text looks made by a machine, or chosen to be hard to guess: no words, names, paths or numbers."""
    if len(value) < at_least or re.search(r"\s", value) or not re.search(r"[A-Za-z]", value):
        return False
    if entropy(value) < 2.3:
        return False
    parts = [part for part in _PARTS.split(value) if part]
    num_signs = len(set(re.findall(r"[^\w\s./:-]", value)))
    if len(value) >= 20 and num_signs >= 3 and re.search(r"\d", value) and entropy(value) >= 4:
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
    return bool(re.search(r"\d", value)) or entropy(value) >= 3.5


def is_opaque(value: str) -> bool:
    """Whether a value that could be a name in code is rather a secret: it looks random and has digits.

    Args:
        value: What stands behind a name and a colon.

    Returns:
        Whether it is.
    """
    return re.search(r"\d", value) is not None and (is_random(value) or _is_short_random(value))


def _is_short_random(value: str) -> bool:
    """Whether a few letters and digits make no word: `zqpw41` does not, `utf8` and `name2` do."""
    if not 6 <= len(value) < 12 or not re.fullmatch(r"(?=[a-zA-Z0-9]*\d)(?=[a-zA-Z0-9]*[a-zA-Z])[a-zA-Z0-9]+", value):
        return False
    if GENERIC.search(value):
        return False
    letters = "".join(re.findall("[a-z]+", value.lower()))
    pairs = [letters[i : i + 2] for i in range(len(letters) - 1)]
    is_wordless = len(pairs) >= 3 and sum(pair in _COMMON_PAIRS for pair in pairs) < _LEAST_WORDED * len(pairs) / 2
    return is_wordless or (len(value) < 8 and re.search(r"[A-Za-z]\d{2,}[A-Za-z]", value) is not None)


def _share_of_common_pairs(value: str) -> float:
    """Share of the pairs of letters in a row that are among the commonest of English and of identifiers."""
    runs = (part.lower() for part in _PARTS.split(value) for part in re.findall(r"[A-Za-z]+", part))
    pairs = [run[i : i + 2] for run in runs for i in range(len(run) - 1)]
    return sum(pair in _COMMON_PAIRS for pair in pairs) / len(pairs) if len(pairs) >= 4 else 0.0


def entropy(value: str) -> float:
    """Shannon entropy in bits a character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
