"""Secrets are found in code and prose and masked; code stays code, and ordinary code stays as it is."""

from __future__ import annotations

import ast
import base64
import random
import string
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.patching.masking import MASK, mask_text, mask_together
from engine.patching.secret_rules import find_secrets
from tests.secret_samples import KINDS, plant


@pytest.mark.parametrize("kind", KINDS)
def test_planted_secrets_are_masked_in_code_and_prose_alone_and_together(kind: str) -> None:
    for planted in (one for one in plant(num_each=30, seed=5) if one.kind == kind):
        together = mask_together([planted.before, planted.after, planted.prose])
        alone = [mask_text(text) for text in (planted.before, planted.after, planted.prose)]
        assert together.is_sound and together.counts
        for masked in (*together.texts, *alone):
            assert not [needle for needle in planted.needles if needle in masked], masked
        for before, masked in zip((planted.before, planted.after), together.texts[:2], strict=True):
            assert ast.dump(ast.parse(masked)).count("Constant") == ast.dump(ast.parse(before)).count("Constant")
            assert masked.count("\n") == before.count("\n")


def test_a_value_found_in_one_text_is_masked_in_those_that_belong_to_it() -> None:
    code, plan = mask_together(['PASSWORD = "swordfish"\n', "connect with swordfish, not with swordfishes"]).texts
    assert code == f'PASSWORD = "{MASK}"\n'
    assert plan == f"connect with {MASK}, not with swordfishes"


@pytest.mark.parametrize(
    "text",
    [
        'token = "string"',
        "token = tokens[0]",
        'password = ""',
        'password = getpass("Password: ")',
        'password = os.environ["DB_PASSWORD"]',
        'password_field = "new_password"',
        'PASSWORD_HASHER = "django.contrib.auth.hashers.PBKDF2PasswordHasher"',
        'TOKEN_URL = "https://auth.example.com/oauth2/token"',
        'secret = "<your secret>"',
        'api_key = f"{prefix}-{name}"',
        'raise ValueError("The password is wrong")',
        'TOKEN_KINDS = ("access_token", "refresh_token2")',
        "def login(self, user='', passwd='', acct=''): pass",
        "if token is None: return other_token",
        "key = 'name'",
        'sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"',
        'url = "https://{user}:{password}@host/"',
        "Return None if the token is missing or expired.",
        'monkey = "patched-1234567890abcdef"',
        "password = get_password()",
        'tokens = ["a", "b"]',
        'tokens = {"if": "IF", "name": "NAME", "1": "NUMBER"}',
        'token = "NUMBER" if text.isdigit() else "name2"',
        'token = kind or "identifier"',
        'tokens = {"root": [(r"0x[0-9a-f]+", Number.Hex), (r"\\d+[Ee][-+]\\d+i", Number)]}',
        'tied = {"encoder.embed_tokens.weight": "lm_head.weight"}',
        'tokens = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}',
        "class A:\n    token: Name2\n    password: str\n  broken",
        'headers = {"Proxy-Authorization": "Basic <username>:<password>"}',
        'token: str = ""',
        "token: str\napi_key: str",
        "max_tokens = 1024",
        "num_tokens = 99887",
        "tokens = 99887766",
        "password_length = 4096",
        "MAX_PASSWORD = 1024",
        "password = 123",
        "password = x[1024]",
        'password = hashlib.new("pbkdf2_sha256")',
        'PASSWORD = {"hasher": "pbkdf2_sha256", "min_length": 4096}',
        'password = """\n"""',
        'cache_key = "0123456789abcdef0123456789abcdef"',
        'key = "0" * 32',
        'headers = {"Cookie": "theme=darkmode; lang=english"}',
        'headers = {"Authorization": "Basic authentication"}',
        "docker run -u 1000:1000 image",
        "docker run --user nobody:nogroup image",
        "curl -u $NAME:$PASSWORD https://example.com",
        "git push -u origin main:develop",
    ],
)
def test_ordinary_code_and_prose_stay_as_they_are(text: str) -> None:
    assert mask_text(text) == text


def test_line_ends_quotes_prefixes_and_neighbours_are_kept() -> None:
    code = (
        "\ufeffdef f(a):\r\n\tpassword = rb'tr0ub4dor&3'\r\n\tx = '\U0001f40d'  # password: tr0ub4dor&3\r\n\x0c\r\n"
        '\tapi_key = ("9f86d081884c7d65"\r\n\t\t"9a2feaa0c55ad015")\r\n\treturn a'
    )
    masked = mask_text(code)
    assert masked == (
        "\ufeffdef f(a):\r\n\tpassword = rb'<secret>'\r\n\tx = '\U0001f40d'  # password: <secret>\r\n\x0c\r\n"
        '\tapi_key = ("<secret>"\r\n\t\t"<secret>")\r\n\treturn a'
    )


def test_a_secret_that_is_no_literal_is_masked_by_a_name() -> None:
    name = "AKIA" + "Z7" * 8
    masked = mask_together([f"def {name}():\n    return {name}\n"])
    assert masked.is_sound
    assert masked.texts == ("def MASKED_SECRET():\n    return MASKED_SECRET\n",)


def test_code_that_speaks_of_private_keys_is_no_private_key() -> None:
    code = (
        'if text.startswith("-----BEGIN PRIVATE KEY-----") and text.endswith("-----END PRIVATE KEY-----"):\n    pass\n'
        "BEGIN, END = '-----BEGIN RSA PRIVATE KEY-----', '-----END RSA PRIVATE KEY-----'\n"
    )
    assert mask_text(code) == code


# What stands for the secret is @; values are made at random, so that none stands here.
HAND_WRITTEN = [
    ('DATABASES = {"default": {"USER": "app", "PASSWORD": "@"}}', "s3cr3t"),
    ('def f():\n    requests.get(url, auth=("user", "@"))', "p4ssw0rd!"),
    ('def f():\n    requests.get(url, auth=("user", "@"))', "hunter2"),
    ('conn = psycopg2.connect("dbname=test user=postgres password=@")', "secret123"),
    ('conn = "Server=db;User=sa;Password=@;"', "Abc123!"),
    ("url = 'https://api.example.com/v1?access_token=@&x=1'", "alnum 24"),
    ("headers = {'Authorization': 'Token @'}", "hex 20"),
    ("headers = {'X-API-Key': '@'}", "alnum 32"),
    ("curl -H 'Authorization: Bearer @'", "alnum 32"),
    ('os.environ["AWS_SECRET_ACCESS_KEY"] = "@"', "base64 30"),
    ("SECRET_KEY = 'django-insecure-@'", "django"),
    ("SECRET_KEY = '@'", "django"),
    ('token = "@"', "550e8400-e29b-41d4-a716-446655440000"),
    ('password = "@"', "123456"),
    ('PASSPHRASE = "@"', "correct horse battery staple"),
    ("db_password = '@'", "p@ss w0rd"),
    ('SECRET = bytes.fromhex("@")', "hex 16"),
    ('api_key = base64.b64decode("@")', "base64 24"),
    ('password = SecretStr("@")', "hunter2"),
    ('password = os.getenv("DB_PASSWORD", "@")', "hunter22"),
    ('TOKENS = ["@", "x"]', "alnum 30"),
    ('TOKENS = ["x", "@"]', "alnum 30"),
    ('data = "{\\"password\\": \\"@\\"}"', "hunter2"),
    ('"""Config:\n\n    password: @\n    user: me\n"""', "hunter2"),
    ('x = 1\n"""\nexport API_TOKEN=@\n"""', "alnum 20"),
    ('secret = "@"', "JBSWY3DPEHPK3PXP"),
    ('def login(user="me", password="@"): pass', "swordfish"),
    ('if password != "@": pass', "swordfish"),
    ('if "@" == password: pass', "swordfish"),
    ('self.password = "@"', "swordfish"),
    ('url = "redis://:@@localhost:6379/0"', "p4ss"),
    ('url = "amqp://guest:@@localhost"', "gu3st"),
    ("# the password is @", "swordfish7"),
    ("# token: @", "alnum 20"),
    ("The api key is @, use it", "hex 16"),
    ("Please set the password to @", "hunter2"),
    ('use password "@" for the login', "swordfish"),
    ('SLACK = "https://hooks.slack.com/services/TABC123DEF/BABC123DEF/@"', "alnum 24"),
    ('AUTH_TOKEN = (\n    "a1b2c3d4"\n    "@"\n)', "hex 8"),
    ("API_KEY: Final = '@'", "alnum 32"),
    ("config.set('auth', 'token', '@')", "alnum 32"),
    ("x = dict(api_key='abc', secret='@')", "alnum 32"),
    ("TWILIO = 'SK@'", "hex 16"),
    ("npm = 'npm_@'", "alnum 36"),
    ("gitlab = 'glpat-@'", "alnum 20"),
    ("k = '-----BEGIN RSA PRIVATE KEY-----\\n@\\nQUJD\\n-----END RSA PRIVATE KEY-----\\n'", "base64 48"),
    ("k = ['-----BEGIN RSA PRIVATE KEY-----',\n '@']", "base64 48"),
]


# Left unmasked until the syntax of a statement was read: other values than the first, and short ones.
SEEN_BY_SYNTAX = [
    ('user, password = "bob", "@"', "zqpw33tup"),
    ('(user, [password, _]) = ("bob", ["@", 1])', "zqpw33tup"),
    ('token = """\n@\n"""', "zqpw41m"),
    ('PASSWORD = """\n@\n"""', "zqpw34multi"),
    ("\tsecret = '''\r\n\t@\r\n\t'''", "zqpw34multi"),
    ('password = "a" if x else "@"', "zqpw42b"),
    ('password = "é\U0001f40d" if x else "@"', "zqpw42b"),
    ('password = os.getenv("P") or "@"', "zqpw42c"),
    ('password = os.environ.get("P", "@")', "zqpw42c"),
    ('password = "a" + "@"', "zqpw44b"),
    ('password = prefix + ("a"\n  "@")', "zqpw44b"),
    ('password: str = field(default="@")', "zqpw49"),
    ('password: str = field(default_factory=lambda: "@")', "zqpw49"),
    ('def f(a, *, password=x or "@"): pass', "zqpw49"),
    ('secretkey = "@"', "zqpw51"),
    ('authtoken = "@"', "zqpw51k"),
    ('f(apikey="@")', "zqpw51k"),
    ('accesskey = "@"', "zqpw51key"),
    ("password = @", "99887766"),
    ("f(password=@)", "9988"),
    ('x = {"password": @}', "99_887_766"),
    ('tokens = {"a": "@"}', "zqpw43c"),
    ('passwords = {"bob": ["@"]}', "zqpw43c"),
    ('headers = {"Authorization": "Basic @"}', "dXNlcjp6cXB3NTI="),
    ("curl -H 'Authorization: Basic @'", "dXNlcjp6cXB3NTI="),
    ('headers["Authorization"] = "Bearer @"', "zqpw52b"),
    ('headers = {"Cookie": "sessionid=@"}', "zqpw53cookie"),
    ("curl -H 'Cookie: theme=dark; sid=@'", "zqpw53cookie"),
    ("curl -u admin:@ https://example.com", "zqpw18curl"),
    ("curl --user admin:@ https://example.com", "swordfish"),
    ('run(["curl", "-u", "admin:@", url])', "zqpw18curl"),
    ("api_key: @", "zqpw22yaml"),
    ("user: bob\npassword: @\nport: 99", "zqpw22yaml"),
    ("password: @", "99887766"),
    ("db:\n  host: a\n  api_key: @\n", "zqpw22yaml"),
    ('password = b"zqpw" + b"@"', "12"),
    ('key = "@"', "hex 16"),
    ("f(KEY=bytes.fromhex('@'))", "hex 16"),
    ('Then write password = "a" if x else "@"', "zqpw42b"),
    ('+    user, password = "bob", "@"\n-    pass)', "zqpw33tup"),
]


def _value(spec: str, rng: random.Random) -> str:
    kind, _, size = spec.partition(" ")
    letters = string.ascii_letters + string.digits
    made = {
        "hex": lambda: rng.randbytes(int(size)).hex(),
        "base64": lambda: base64.b64encode(rng.randbytes(int(size))).decode(),
        "alnum": lambda: "".join(rng.choice(letters) for _ in range(int(size))),
        "django": lambda: "".join(rng.choice(letters.lower() + "!@#$%^&*(-_=+)") for _ in range(50)),
    }
    return made[kind]() if kind in made else spec


@pytest.mark.parametrize(("text", "spec"), HAND_WRITTEN + SEEN_BY_SYNTAX)
def test_other_ways_to_write_a_secret_down_are_found(text: str, spec: str) -> None:
    rng = random.Random(7)
    for _ in range(5):
        secret = _value(spec, rng)
        masked = mask_together([text.replace("@", secret, 1)])
        assert masked.is_sound and secret not in masked.texts[0]


@pytest.mark.parametrize(
    "piece",
    ["a", "password", "password=", 'password = "', '"', "\\", ":", "://a:", "eyJ", " ", "password ", "token: a, ",
     "-----BEGIN RSA PRIVATE KEY-----\n", "cl_password   ", "sk-", "aws key ", "_", "//a/:_authToken=", "password = (",
     'password = """', "password = '''\n", "password = a or ", "password,", "a, password = ", "x = {'token': ",
     "key = ", "cookie=a=", "cookie: a=bcdefg;", "authorization: basic ", "basic aaaaaa", "-u a:", "curl -u ",
     "token: a\n", "password = 'é' + ", "password=a,b,", "password = 'é1b2'; "],
)  # fmt: skip
def test_no_text_takes_long(piece: str) -> None:
    """Expressions that go back over a text again and again took minutes for a line of spaces behind `password`."""
    text = piece * (20_000 // len(piece))
    started = time.monotonic()
    mask_text(f"password{text}")
    mask_text(text)
    assert time.monotonic() - started < 20


def test_the_standard_library_has_hardly_any_false_positive(
    long_run: bool, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.glob("*.py" if not long_run else "**/*.py"))]
    files = [file for file in files if not {"site-packages", "test", "tests", "idle_test"} & set(file.parts)]
    num_lines = num_hits = 0
    for file in files if long_run else files[::4]:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        num_lines += text.count("\n")
        num_hits += len({(start, end) for start, end, _ in find_secrets(text)})
        assert mask_together([text]).is_sound, file
    record_figure("lines of the standard library that were searched for secrets", num_lines, "")
    record_figure("places in them taken for secrets", num_hits, "")
    assert num_lines > 10_000
    assert num_hits <= num_lines / 20_000
