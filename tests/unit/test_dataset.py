"""The data set: text in, text out, nothing twice, nothing of what is held out in what is trained on."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from engine.patching.patcher import SECOND_CHOICE
from tests.secret_samples import plant
from training.dataset import Built, Options, build
from training.similarity import NearIndex, fingerprint, jaccard, shingles, tokens_of

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "sigma")


def record(number: int, *, repository: str | None = None, file: str = "", **changes: Any) -> dict[str, Any]:
    """A record of the journal with a function of its own."""
    choose = random.Random(number)
    words = [f"{choose.choice(WORDS)}_{choose.randrange(1000)}" for _ in range(12)]
    lines = "".join(f"    {word} = {choose.choice(words)}({choose.randrange(99)})\n" for word in words)
    function = f"def f{number}(a):\n{lines}    return a\n"
    kept = function.replace("return a", f"return {words[0]} + a[{number}]")
    made = {
        "kind": "edit",
        "id": f"p_{number:06}",
        "seq": number,
        "created_at": f"2026-01-01T00:00:{number % 60:02}.000000Z",
        "kept_at": f"2026-02-01T00:00:{number % 60:02}.000000Z",
        "path": file or f"/code/{repository or 'alone'}/m{number}.py",
        "repository": None if repository is None else f"/code/{repository}",
        "label": "accepted",
        "repairs": [],
        "function": function,
        "kept": kept,
        "messages": [{"role": "user", "content": f"## Code Before:\n{function}## Instruction:\nchange {number}\n"}],
        "prefill": "```python\n",
        "answer": f"{kept}```",
        "is_same_prompt": True,
        "is_exact": True,
        "model": "m",
        "prompt_version": "1",
    }
    return made | changes


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def built(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> tuple[Built, list[Any], list[Any]]:
    done = build(records, tmp_path / "data", Options(**options))
    return done, lines_of(done.files["train"]), lines_of(done.files["val"])


def test_every_input_and_output_is_text_and_the_files_are_private(tmp_path: Path) -> None:
    done, train, val = built(tmp_path, [record(number) for number in range(30)])
    assert (len(train), len(val)) == (done.num_train, done.num_val) and len(train) + len(val) == 30
    for line in [*train, *val]:
        assert all(isinstance(line[name], str) for name in ("instruction", "input", "output", "id", "group"))
        assert line["output"].startswith("```python\ndef f") and line["output"].endswith("\n```")
    if sys.platform != "win32":
        assert {file.stat().st_mode & 0o777 for file in done.files.values()} == {0o600}


def test_the_same_journal_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    records = [record(number, repository=f"r{number % 9}") for number in range(60)]
    digests: set[str] = set()
    for seed in range(4):
        random.Random(seed).shuffle(records)
        done = build(records, tmp_path / str(seed), Options())
        data = b"".join(done.files[name].read_bytes() for name in ("train", "val", "manifest"))
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_ten_to_twenty_percent_are_held_out_in_whole_repositories(tmp_path: Path) -> None:
    records = [record(number, repository=f"r{number % 11}") for number in range(200)]
    done, train, val = built(tmp_path, records)
    assert done.unit == "repository" and 20 <= len(val) <= 40
    repository = {one["id"]: one["repository"] for one in records}
    assert {repository[line["id"]] for line in val}.isdisjoint(repository[line["id"]] for line in train)
    assert {line["group"] for line in val}.isdisjoint(line["group"] for line in train)


def test_one_large_repository_is_split_by_file(tmp_path: Path) -> None:
    records = [record(number, repository="only", file=f"/code/only/m{number // 5}.py") for number in range(100)]
    done, train, val = built(tmp_path, records)
    assert done.unit == "file" and 10 <= len(val) <= 20
    files = [{records[int(line["id"][2:])]["path"] for line in lines} for lines in (train, val)]
    assert files[0].isdisjoint(files[1])


def test_a_copied_function_stays_on_one_side(tmp_path: Path) -> None:
    records = [record(number, repository=f"r{number % 10}") for number in range(100)]
    copied = record(500)
    for number in range(10):  # the same function, edited in another way in each repository
        function, kept = (
            copied["function"],
            copied["function"].replace("return a", f"return sorted(a)[{number}:] * {number}"),
        )
        records.append(
            record(200 + number, repository=f"r{number}" if number < 5 else f"c{number}", function=function, kept=kept)
        )
    done, train, val = built(tmp_path, records)
    sides = [
        {line["id"] for line in lines} & {f"p_{200 + number:06}" for number in range(10)} for lines in (train, val)
    ]
    assert len(sides[0]) == 10 or len(sides[1]) == 10, done.to_json()


def test_too_few_files_hold_nothing_out_and_that_is_said(tmp_path: Path) -> None:
    done, train, val = built(tmp_path, [record(1), record(2)])
    assert (len(train), val, done.unit, done.num_groups) == (2, [], "", 2)


def test_every_record_that_is_left_out_has_a_reason(tmp_path: Path) -> None:
    records = [record(number) for number in range(10)]
    records += [
        record(20, kind="withdrawn"),
        record(21, kind="withheld"),
        record(22, label="unreviewed"),
        record(23, label="unreviewed", repairs=[SECOND_CHOICE]),
        record(24, is_same_prompt=False),
        record(25, is_exact=False),
        record(26, kept=record(26)["function"]),
        record(3, id="p_3later", kept_at="2027"),
        record(4, id="p_4other", answer="def f4(a):\n    return other\n```"),
        record(5, id="p_5near", function=f"# {record(5)['function']}"[2:].replace("\n", "  # a comment\n", 1),
               messages=[{"role": "user", "content": "other words"}]),
        record(27, kind="preference"),
    ]  # fmt: skip
    done, train, val = built(tmp_path, records)
    assert len(train) + len(val) == 10
    assert done.dropped == {
        "withdrawn": ["p_000020"],
        "withheld": ["p_000021"],
        "not_reviewed": ["p_000022", "p_000023"],
        "other_prompt": ["p_000024"],
        "not_exact": ["p_000025"],
        "unchanged": ["p_000026"],
        "exact_duplicate": ["p_000003"],
        "superseded": ["p_4other"],
        "near_duplicate": ["p_5near"],
    }
    done, train, val = built(tmp_path, records, with_unreviewed=True)
    assert len(train) + len(val) == 11
    assert done.dropped["second_choice"] == ["p_000023"] and "not_reviewed" not in done.dropped


def test_a_workspace_that_opted_out_since_is_left_out(tmp_path: Path) -> None:
    done = build([record(1), record(2)], tmp_path, Options(), {record(1)["path"]: "/code/pyproject.toml", "/x": ""})
    assert done.dropped == {"opted_out": ["p_000001"]} and done.num_train == 1


def test_a_base_goes_first_mended_masked_and_without_what_is_held_out(tmp_path: Path) -> None:
    records = [record(number) for number in range(40)]
    _, train, val = built(tmp_path, records)
    secret = plant(1)[0]
    base = tmp_path / "base.jsonl"
    rows = [
        {"instruction": "say", "input": None, "output": ["a", "b"]},
        {"instruction": "say", "input": "", "output": "a\nb"},
        {"input": train[0]["input"], "output": train[0]["output"]},
        {"instruction": "", "input": "in other words", "output": val[0]["output"] + " "},
        {"instruction": secret.prose, "input": secret.before, "output": secret.after},
    ]
    base.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    done, merged, held_out = built(tmp_path, records, base=base)
    assert held_out == val and merged[done.num_base :] == train
    assert [(row["id"], row["input"], row["output"]) for row in merged[:1]] == [("base:1", "", "a\nb")]
    assert done.dropped == {"exact_duplicate": ["base:2", "base:3"], "in_validation": ["base:4"]}
    assert lines_of(done.files["base"]) == merged[: done.num_base] and done.num_base == 2
    assert done.base is not None and len(done.base.broken) == 1
    assert not any(
        needle in file.read_text(encoding="utf-8") for file in done.files.values() for needle in secret.needles
    )
    with pytest.raises(UsageError, match="is what this command writes"):
        built(tmp_path, records, base=done.files["train"])


# --- similarity ------------------------------------------------------------------------------------------------------


def test_comments_spaces_and_one_name_are_near_and_another_edit_of_the_function_is_not() -> None:
    before = record(7)["function"]
    one = fingerprint(before, before.replace("return a", "return sorted(a)[0]"))
    spaced = before.replace(" = ", "  =  ").replace("(a):", "(a):  # a comment")
    assert one.is_near(fingerprint(spaced, spaced.replace("return a", "return sorted(a)[0]  # the least")))
    other_name = before.replace("def f7", "def g7")
    assert one.is_near(fingerprint(other_name, other_name.replace("return a", "return sorted(a)[0]")))
    assert not one.is_near(fingerprint(before, before.replace("return a", "raise ValueError(a)")))
    assert not one.is_near(fingerprint(record(8)["function"], record(8)["kept"]))


def test_banding_finds_what_comparing_all_pairs_finds() -> None:
    choose = random.Random(1)
    prints = []
    for number in range(300):
        text = record(number % 60)["function"]
        lines = text.splitlines()
        for _ in range(choose.randrange(4)):
            lines[choose.randrange(1, len(lines))] = f"    x = {choose.randrange(9)}"
        prints.append(fingerprint(text, "\n".join(lines) + "\n    return x\n"))
    index, found, expected = NearIndex(), 0, 0
    for number, one in enumerate(prints):
        expected += any(one.is_near(other) for other in prints[:number])
        found += index.find(one) is not None
        index.add(str(number), one)
    assert found == expected > 20


def test_tokens_of_methods_prose_and_broken_code() -> None:
    words = " ".join(tokens_of("    def f(self):  # comment\n        return 1\n"))
    assert words == "if 1 : def f ( self ) : return 1"
    assert tokens_of("It's (broken") == ["It", "'", "s", "(", "broken"]
    assert jaccard(shingles([]), shingles([])) == 1.0
    assert Counter(tokens_of("a b a"))["a"] == 2
