"""The general tasks: each can be passed, none by chance, and what is run cannot do anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from training.general import TASKS, GeneralTask, passes

pytestmark = pytest.mark.unit

SOLUTIONS = {
    "middle_word": "words = sentence.split()\n    return words[len(words) // 2] if len(words) % 2 else ''",
    "drop_every_third": "return [item for index, item in enumerate(items, 1) if index % 3]",
    "price_with_tax": "return round(price * (1 + percent / 100), 2)",
    "most_letters": "return max(words, key=len, default='')",
    "is_leap_free": "import calendar\n    return not any(calendar.isleap(year) for year in range(first, last + 1))",
    "swap_ends": "return text if len(text) < 2 else text[-1] + text[1:-1] + text[0]",
    "running_sum": "from itertools import accumulate\n    return list(accumulate(numbers))",
    "seconds_of": "hour, minute, second = map(int, clock.split(':'))\n    return hour * 3600 + minute * 60 + second",
    "initials": "return ''.join(word[0].upper() + '.' for word in name.split())",
    "count_above": "return sum(number > limit for row in grid for number in row)",
    "without_digits": "return ''.join(one for one in text if one not in '0123456789')",
    "by_length": "a = {}\n    for one in words:\n        a.setdefault(len(one), []).append(one)\n    return a",
    "second_smallest": "ranked = sorted(set(numbers))\n    return ranked[1] if len(ranked) > 1 else None",
    "to_binary": "return f'{number:b}'",
    "alternate": "from itertools import zip_longest\n    "
    "return ''.join(a + b for a, b in zip_longest(first, second, fillvalue=''))",
    "common_prefix": "import os\n    return os.path.commonprefix([first, second])",
    "total_cost": "return sum(count * prices.get(name, 0) for name, count in basket.items())",
    "mirror": "return [row[::-1] for row in rows]",
    "has_repeats": "return any(item in items[:index] for index, item in enumerate(items))",
    "shorten": "return text if len(text) <= width else text[: width - 3] + '...'",
    "days_between": "from datetime import date\n    "
    "return abs((date.fromisoformat(first) - date.fromisoformat(second)).days)",
    "flatten_once": "return [one for item in items for one in (item if isinstance(item, list) else [item])]",
    "vowel_share": "return sum(one in 'aeiouAEIOU' for one in text) / len(text) if text else 0.0",
    "next_multiple": "return (number // base + 1) * base",
}
EASY = GeneralTask("one", "def one() -> int:\n", "assert one() == 1\n")


def test_there_are_twenty_four_tasks_with_names_of_their_own() -> None:
    assert [task.name for task in TASKS] == list(SOLUTIONS)
    assert len(SOLUTIONS) == 24


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_right_function_passes_and_an_empty_one_does_not(task: GeneralTask) -> None:
    assert passes(task, f"{task.stub}    {SOLUTIONS[task.name]}\n")
    assert not passes(task, task.stub)


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "def one(): return 1\nraise SystemExit(0)\n",
        "def one(): return 2\n",
        "def one(:\n",
        "def one():\n    while True: pass\n",
        "def one(): return len([0] * 10**10)\n",
        "def one(): return one()\n",
        "print('anything')\nassert False\n",
        "",
    ],
)
def test_nothing_but_a_right_function_passes(code: str) -> None:
    assert not passes(EASY, code)


@pytest.mark.parametrize(
    "deed",
    [
        "open({there!r}, 'w').write('x')",
        "__import__('os').mkdir({there!r})",
        "__import__('os').system('touch ' + {there!r})",
        "__import__('subprocess').run(['touch', {there!r}])",
        "__import__('socket').create_connection(('127.0.0.1', 9), 1)",
        "open({secret!r}).read()",
        "__import__('os').kill({pid}, 0)",
        "__import__('ctypes').CDLL(None).getpid()",
    ],
)
def test_what_is_run_touches_nothing(deed: str, tmp_path: Path) -> None:
    there, secret = tmp_path / "made", tmp_path / "secret"
    secret.write_text("x", encoding="utf-8")
    code = deed.format(there=str(there), secret=str(secret), pid=os.getpid())
    assert not passes(EASY, f"def one():\n    {code}\n    return 1\n")
    assert not there.exists()
    assert passes(EASY, f"def one():\n    try:\n        {code}\n    except Exception:\n        return 1\n")


def test_what_is_run_learns_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANPATCH_TOKEN", "secret")
    assert passes(EASY, "import os\ndef one(): return int('PLANPATCH_TOKEN' not in os.environ)\n")
