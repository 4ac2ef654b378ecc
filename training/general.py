"""Twenty-four small functions to write, with checks that run: has an adapter cost a model what it could do before?

The tasks are our own, so that no model has seen them with their checks. What a model writes is run, in a child process
with little memory and time, no network, no other process and no file but Python's own library.

Not covered: a program that means harm. Limits and audit hooks stop accidents; they are no sandbox against an attacker.
Windows has no limits of this kind: there the clock alone ends a program.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from engine.inference.protocol import ChatTokenizer, GenerationRequest, Message, Priority, SamplingParams

_MAX_NEW_TOKENS = 256
_TIMEOUT_S = 10.0
_QUESTION = "Write this Python function. Answer with the whole function and the imports it needs, nothing else."


@dataclass(frozen=True, slots=True)
class GeneralTask:
    """One function to write.

    Args:
        name: The function's name.
        stub: Its signature and docstring.
        checks: Statements that fail unless it is right.
    """

    name: str
    stub: str
    checks: str


def request_of(task: GeneralTask, tokenizer: ChatTokenizer, adapter: str) -> GenerationRequest:
    """The greedy request of a task.

    Args:
        task: The task.
        tokenizer: The model's.
        adapter: Adapter folder, or `__none__`.

    Returns:
        The request.
    """
    question = f"{_QUESTION}\n```python\n{task.stub}```\n"
    prompt = tokenizer.encode_chat([Message("user", question)], prefill="```python\n")
    params = SamplingParams(_MAX_NEW_TOKENS, stop=("\n```",))
    return GenerationRequest(tuple(prompt), params, Priority.BACKGROUND, adapter)


def passes(task: GeneralTask, code: str) -> bool:
    """Run what a model wrote, and the task's checks after it.

    Args:
        task: The task.
        code: The function.

    Returns:
        Whether every check held. The child says so with a word that the code cannot know beforehand.
    """
    word = secrets.token_hex(16)
    program = "\0".join((code, task.checks, word)).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory(prefix="planpatch-general-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _CHILD],
                input=program,
                capture_output=True,
                cwd=folder,
                env={name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ},
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode("utf-8", "replace").endswith(f"{word}\n")


# Standard output is closed to the code, and the word is out of its reach until the checks are through.
_CHILD = r"""
import io, os, sys
code, checks, word = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\0")
said = os.dup(1)
sys.stdin = io.StringIO()
sys.stdout = sys.stderr = io.StringIO()
try:
    import resource
    for limit, value in ((resource.RLIMIT_CPU, 5), (resource.RLIMIT_AS, 2**30), (resource.RLIMIT_FSIZE, 4096),
                         (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
except ImportError:
    pass
library = tuple(os.path.realpath(path) + os.sep for path in sys.path if path)
refused = ("socket.", "subprocess.", "shutil.", "ctypes.", "os.", "pty.", "signal.", "winreg.", "_winapi.", "fcntl.",
           "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.", "tempfile.", "webbrowser.")
harmless = ("os.listdir", "os.scandir")
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        is_reading = isinstance(path, str) and not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (is_reading and os.path.realpath(path).startswith(library)):
            raise PermissionError(f"{path} may not be opened")
    elif event.startswith(refused) and event not in harmless:
        raise PermissionError(f"{event} is not allowed")
sys.addaudithook(hook)
names = {"__name__": "written"}
exec(compile(code, "<written>", "exec"), names)
exec(compile(checks, "<checks>", "exec"), names)
os.write(said, (word + "\n").encode())
"""


def _tasks() -> Iterator[GeneralTask]:
    for text in _TEXT.strip("\n").split("\n\n"):
        stub, checks = text.split(">>>\n")
        yield GeneralTask(stub.partition("(")[0].removeprefix("def "), stub, f"{checks}\n")


# Each a signature and a docstring, then the checks.
_TEXT = '''
def middle_word(sentence: str) -> str:
    """The word in the middle of a sentence with an odd number of words, split at spaces; an empty string
    for an even number."""
>>>
assert middle_word("one two three") == "two"
assert middle_word("one two") == ""
assert middle_word("alone") == "alone"

def drop_every_third(items: list) -> list:
    """A new list without the third, sixth, ninth and so on item."""
>>>
assert drop_every_third([1, 2, 3, 4, 5, 6, 7]) == [1, 2, 4, 5, 7]
assert drop_every_third([]) == []
given = [1, 2, 3]
drop_every_third(given)
assert given == [1, 2, 3]

def price_with_tax(price: float, percent: float) -> float:
    """The price with tax of so many percent, rounded to two places."""
>>>
assert price_with_tax(100, 19) == 119.0
assert price_with_tax(9.99, 7) == 10.69

def most_letters(words: list[str]) -> str:
    """The longest word; of several the first. An empty string for no words."""
>>>
assert most_letters(["a", "bcd", "efg"]) == "bcd"
assert most_letters([]) == ""

def is_leap_free(first: int, last: int) -> bool:
    """Whether no year from first to last, both included, is a leap year of the Gregorian calendar."""
>>>
assert is_leap_free(2001, 2003)
assert not is_leap_free(2001, 2004)
assert is_leap_free(1897, 1903)
assert not is_leap_free(1999, 2001)

def swap_ends(text: str) -> str:
    """The text with its first and last character exchanged."""
>>>
assert swap_ends("abcd") == "dbca"
assert swap_ends("x") == "x"
assert swap_ends("") == ""
assert swap_ends("ab") == "ba"

def running_sum(numbers: list[int]) -> list[int]:
    """The sums of the first one, first two, first three numbers and so on."""
>>>
assert running_sum([1, 2, 3, 4]) == [1, 3, 6, 10]
assert running_sum([]) == []

def seconds_of(clock: str) -> int:
    """Seconds since midnight of a time such as 02:03:04."""
>>>
assert seconds_of("00:00:00") == 0
assert seconds_of("02:03:04") == 7384

def initials(name: str) -> str:
    """The first letters of a name's words in upper case, each followed by a dot, without spaces."""
>>>
assert initials("ada lovelace") == "A.L."
assert initials("Grace Brewster Hopper") == "G.B.H."

def count_above(grid: list[list[int]], limit: int) -> int:
    """How many numbers of a grid are greater than the limit."""
>>>
assert count_above([[1, 5], [7, 2]], 2) == 2
assert count_above([], 0) == 0
assert count_above([[3]], 3) == 0

def without_digits(text: str) -> str:
    """The text without the digits 0 to 9."""
>>>
assert without_digits("a1b22c") == "abc"
assert without_digits("123") == ""

def by_length(words: list[str]) -> dict[int, list[str]]:
    """The words by their length, in the order in which they are given."""
>>>
assert by_length(["a", "bb", "c"]) == {1: ["a", "c"], 2: ["bb"]}
assert by_length([]) == {}

def second_smallest(numbers: list[int]) -> int | None:
    """The second smallest of the different numbers; None where there are fewer than two."""
>>>
assert second_smallest([4, 1, 3]) == 3
assert second_smallest([1, 1, 2]) == 2
assert second_smallest([5, 5]) is None
assert second_smallest([]) is None

def to_binary(number: int) -> str:
    """A number that is not negative in binary digits, without a prefix."""
>>>
assert to_binary(0) == "0"
assert to_binary(10) == "1010"
assert to_binary(255) == "11111111"

def alternate(first: str, second: str) -> str:
    """Characters of both texts in turn, the first text's first; the rest of the longer text follows."""
>>>
assert alternate("abc", "12") == "a1b2c"
assert alternate("", "xy") == "xy"
assert alternate("a", "123") == "a123"

def common_prefix(first: str, second: str) -> str:
    """The longest text that both begin with."""
>>>
assert common_prefix("flower", "flow") == "flow"
assert common_prefix("dog", "cat") == ""
assert common_prefix("inside", "insight") == "insi"

def total_cost(basket: dict[str, int], prices: dict[str, float]) -> float:
    """What a basket of names and amounts costs; names without a price cost nothing."""
>>>
assert total_cost({"pen": 2, "cup": 1}, {"pen": 1.5, "cup": 4}) == 7.0
assert total_cost({"pen": 2, "sky": 9}, {"pen": 1.5}) == 3.0
assert total_cost({}, {}) == 0

def mirror(rows: list[list[int]]) -> list[list[int]]:
    """The rows with each row's items in the opposite order."""
>>>
assert mirror([[1, 2], [3, 4, 5]]) == [[2, 1], [5, 4, 3]]
assert mirror([]) == []

def has_repeats(items: list) -> bool:
    """Whether an item stands in the list more than once; items may be lists themselves."""
>>>
assert has_repeats([1, 2, 1])
assert not has_repeats([1, 2, 3])
assert has_repeats([[1], [1]])
assert not has_repeats([])

def shorten(text: str, width: int) -> str:
    """The text, cut to the width; a text that is cut ends with three dots, which count. The width is at
    least 3."""
>>>
assert shorten("hello", 5) == "hello"
assert shorten("hello world", 8) == "hello..."
assert shorten("abcd", 3) == "..."

def days_between(first: str, second: str) -> int:
    """Days from one date to another, such as 2024-02-28 and 2024-03-01; never negative."""
>>>
assert days_between("2024-02-28", "2024-03-01") == 2
assert days_between("2024-03-01", "2024-02-28") == 2
assert days_between("2023-02-28", "2023-03-01") == 1

def flatten_once(items: list) -> list:
    """The items, with those that are lists replaced by what they hold; lists inside of those stay."""
>>>
assert flatten_once([1, [2, [3]], 4]) == [1, 2, [3], 4]
assert flatten_once([]) == []

def vowel_share(text: str) -> float:
    """The share of the letters a, e, i, o and u, in upper or lower case, among the characters of a text;
    0.0 for an empty one."""
>>>
assert vowel_share("Aeb") == 2 / 3
assert vowel_share("") == 0.0
assert vowel_share("xyz") == 0.0

def next_multiple(number: int, base: int) -> int:
    """The smallest multiple of a positive base that is greater than the number."""
>>>
assert next_multiple(7, 5) == 10
assert next_multiple(10, 5) == 15
assert next_multiple(-3, 2) == -2
'''

TASKS = tuple(_tasks())
