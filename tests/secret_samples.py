"""Made-up secrets of ten kinds, and ordinary code to hide them in. Random, so that none stands in the repository."""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Planted:
    """One secret and a function that holds it.

    Args:
        kind: Which of the ten kinds.
        needles: What must be found nowhere: the secret, or the lines of it.
        before: A function.
        after: The same function after an edit; both hold the secret.
        prose: A sentence of an intent, a plan or feedback that holds it.
    """

    kind: str
    needles: tuple[str, ...]
    before: str
    after: str
    prose: str


def _pick(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def _b64(rng: random.Random, num_bytes: int) -> str:
    return base64.b64encode(rng.randbytes(num_bytes)).decode()


def _jwt(rng: random.Random) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    signature = base64.urlsafe_b64encode(rng.randbytes(32)).decode().rstrip("=")
    return f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part({'sub': _pick(rng, string.digits, 10)})}.{signature}"


def _password(rng: random.Random) -> str:
    word = rng.choice(["hunter", "Winter", "tr0ub4dor", "Sommer", "letmein", "dragon", "correct-horse"])
    return word + rng.choice(["", "_", "-", "!"]) + _pick(rng, string.digits, 3) + rng.choice(["", "!", "#x", "$"])


def _aws(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        secret = "AKIA" + _pick(rng, string.ascii_uppercase + string.digits, 16)
        return secret, f'client = boto3.client("s3", aws_access_key_id="{secret}")'
    secret = _b64(rng, 30)
    return secret, f"aws_secret_access_key = '{secret}'"


def _github(rng: random.Random) -> tuple[str, str]:
    secret = rng.choice(
        ["ghp_" + _pick(rng, ALNUM, 36), "github_pat_" + _pick(rng, ALNUM, 22) + "_" + _pick(rng, ALNUM, 59)]
    )
    return secret, f'run(["git", "clone", "https://{secret}:x-oauth-basic@github.com/a/b"])'


def _slack(rng: random.Random) -> tuple[str, str]:
    digits = _pick(rng, string.digits, 11)
    secret = rng.choice([f"xoxb-{digits}-{digits}-{_pick(rng, ALNUM, 24)}", f"xoxp-{digits}-{_pick(rng, ALNUM, 32)}"])
    return secret, f"post(channel, {secret!r})  # the bot's"


def _url(rng: random.Random) -> tuple[str, str]:
    secret = _password(rng).replace("#", "%23")
    return secret, f'engine = connect("postgresql://app:{secret}@db.example.com:5432/prod")'


def _assigned_password(rng: random.Random) -> tuple[str, str]:
    secret = _password(rng)
    forms = [
        "password = '{}'",
        'db_passwd: str = "{}"',
        'login(user, password="{}")',
        'config["password"] = "{}"',
        'settings = {{"user": "app", "password": "{}"}}',
        'if given == password or password == "{}":\n        pass',
    ]
    return secret, rng.choice(forms).format(secret)


def _google(rng: random.Random) -> tuple[str, str]:
    secret = "AIza" + _pick(rng, ALNUM + "_-", 35)
    return secret, f'maps = Client("{secret}")'


def _stripe(rng: random.Random) -> tuple[str, str]:
    secret = rng.choice(["sk_live_", "rk_live_", "sk_test_"]) + _pick(rng, ALNUM, rng.choice([24, 99]))
    return secret, f"stripe.api_key = '{secret}'"


def _named(rng: random.Random) -> tuple[str, str]:
    secret = rng.choice([rng.randbytes(16).hex(), rng.randbytes(32).hex(), _b64(rng, 24), _pick(rng, ALNUM, 28)])
    forms = [
        'API_TOKEN = "{}"',
        "secret_key: Final[str] = '{}'",
        'os.environ.setdefault("SERVICE_API_KEY", "{}")',
        'headers = {{"X-Auth-Token": "{}"}}',
        'self.client_secret = b"{}"',
        'headers["Authorization"] = "Bearer {}"',
    ]
    return secret, rng.choice(forms).format(secret)


def _model_hub(rng: random.Random) -> tuple[str, str]:
    secret = rng.choice(
        [
            "hf_" + _pick(rng, string.ascii_letters, 34),
            "sk-" + _pick(rng, ALNUM, 20) + "T3BlbkFJ" + _pick(rng, ALNUM, 20),
            "sk-proj-" + _pick(rng, ALNUM + "_-", 60) + "7",
            "sk-ant-api03-" + _pick(rng, ALNUM + "_-", 80) + "9AA",
        ]
    )
    return secret, f'login("{secret}", add_to_git=False)'


def _plain(kind: str, make: Callable[[random.Random], tuple[str, str]]) -> Callable[[random.Random], Planted]:
    def plant(rng: random.Random) -> Planted:
        secret, statement = make(rng)
        before = (
            f'def send_{rng.randrange(10**6)}(items, user="me"):\n    {statement}\n    total = 0\n    return total\n'
        )
        after = before.replace("total = 0", "total = sum(items)")
        prose = {
            "password in an assignment": f"Use the password {secret} again and sum the items",
            "basic auth in a URL": f"Connect to https://app:{secret}@example.com and sum the items",
            "named hex or base64": f"The token is {secret}; sum the items",
        }.get(kind, f"Sum the items, then call it with {secret}.")
        return Planted(kind, (secret,), before, after, prose)

    return plant


def _jwt_planted(rng: random.Random) -> Planted:
    secret = _jwt(rng)
    return _plain("JSON web token", lambda _: (secret, f'check("{secret}")'))(rng)


def _private_key(rng: random.Random) -> Planted:
    kind = rng.choice(["RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "EC PRIVATE KEY"])
    text = _b64(rng, rng.randrange(300, 900))
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    begin, end = f"-----BEGIN {kind}-----", f"-----END {kind}-----"
    form = rng.randrange(3)
    if form == 0:
        literal = '"""' + "\n".join([begin, *lines, end]) + '\n"""'
    elif form == 1:
        literal = "(\n" + "".join(f'        "{line}\\n"\n' for line in [begin, *lines, end]) + "    )"
    else:
        literal = '"' + "\\n".join([begin, *lines, end]) + '"'
    before = f"def sign_{rng.randrange(10**6)}(items):\n    pem = {literal}\n    total = 0\n    return total\n"
    needles = tuple(line for line in lines if len(line) > 8)
    prose = "\n".join(["Sign with this key:", begin, *lines, end])
    return Planted("private key", needles, before, before.replace("total = 0", "total = sum(items)"), prose)


KINDS: dict[str, Callable[[random.Random], Planted]] = {
    "AWS key": _plain("AWS key", _aws),
    "GitHub token": _plain("GitHub token", _github),
    "Slack token": _plain("Slack token", _slack),
    "JSON web token": _jwt_planted,
    "private key": _private_key,
    "basic auth in a URL": _plain("basic auth in a URL", _url),
    "password in an assignment": _plain("password in an assignment", _assigned_password),
    "Google or Stripe key": lambda rng: _plain("Google or Stripe key", rng.choice([_google, _stripe]))(rng),
    "named hex or base64": _plain("named hex or base64", _named),
    "OpenAI or Hugging Face token": _plain("OpenAI or Hugging Face token", _model_hub),
}


def plant(num_each: int = 10, seed: int = 1) -> list[Planted]:
    """Secrets of every kind, the same for the same seed."""
    rng = random.Random(seed)
    return [make(rng) for make in KINDS.values() for _ in range(num_each)]
