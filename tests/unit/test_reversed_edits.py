"""Training data by reversing edits: faults, wordings, what is never learnt from, and whole rows."""

from __future__ import annotations

import ast
import json
import random
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.errors import PathError, UsageError
from engine.patching.context import build_context
from engine.patching.formats import FORMATS
from engine.patching.prompts import Task
from engine.patching.proof import Question, prove
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from tests.tiny_model import tiny_model_files, write_files
from training.reversed_edits.build import Options, build
from training.reversed_edits.code import Change, Code, FunctionNode
from training.reversed_edits.decontaminate import read_references
from training.reversed_edits.evidence import find_evidence, setting_of
from training.reversed_edits.faults import FAULTS
from training.reversed_edits.features import FEATURES, class_docstring, method
from training.reversed_edits.intents import intent_of
from training.reversed_edits.sources import (
    Package,
    fetch,
    is_permissive,
    pin,
    read_files,
    read_packages,
    write_packages,
)

pytestmark = pytest.mark.unit

SAMPLE = '''\
def fill(items: list[int], limit: int = 3, strict: bool = False, seen=None) -> list[int]:
    """Return the items below a limit, ümlaut 🙂."""
    if seen is None:
        seen = []
    if not items:
        raise ValueError("no items")
    total = 0
    index = 1
    while index < len(items) - 1 and total <= limit:
        total += items[index + 1] * 2
        seen.append(str(items[index]).strip())
        index += 1
    if strict:
        seen.sort()
    logger.debug("filled %d", total)
    for item in items:
        if item == limit:
            break
        seen.append(item)
    return seen


def depth(tree, key):
    try:
        child = tree[key]
    except KeyError:
        return 0
    label = f"{key} of {tree}"
    return 1 + depth(child.inner, key) if max(child, label) in tree else tree.get(key, 0)


def words(text, table):
    first, second = text, table
    if text.startswith("a") or isinstance(text, str):
        result = [word for word in text.split() if word]
    elif table:
        result = table
    else:
        result = [first]
    lookup = table.get(first, second)
    return result and lookup != result


class Box:
    """A box of things."""

    @property
    def size(self):
        return compare(self.width, self.height)

    async def flush(self, sink):
        if not sink:
            return
        await sink.drain(self.width)
        sink.close()

    def walk(self):
        yield from self.things

    def area(self, unit):
        """Return the area of the box in a unit."""
        return self.width * self.height / unit
'''


def changes_of(text: str) -> Iterable[tuple[str, Change, Code]]:
    code = Code(text)
    functions: list[FunctionNode] = [
        node for node in ast.walk(code.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for name, (make, _) in {**FAULTS, **FEATURES}.items():
        for function in functions:
            yield from ((name, change, code) for change in make(code, function))


def test_every_kind_finds_its_place_and_leaves_python_that_is_worse() -> None:
    found: dict[str, int] = {}
    for name, change, code in changes_of(SAMPLE):
        before = code.applied(change.splices)
        assert before != SAMPLE
        assert ast.dump(ast.parse(before)) != ast.dump(code.tree), (name, before)
        assert change.precise and change.plan and all(change.precise) and all(change.plan)
        found[name] = found.get(name, 0) + 1
    assert found.keys() == {*FAULTS, *FEATURES}


def test_what_a_change_does_as_text() -> None:
    text = "def f(a, n):\n    if a < n:  # 🙂\n        return a\n    return n\n"
    shown = {
        (change.kind, code.applied(change.splices).splitlines()[1], change.plan[0])
        for _, change, code in changes_of(text)
        if change.kind in ("boundary", "opposite")
    }
    assert ("boundary", "    if a <= n:  # 🙂", "Change `a <= n` to `a < n`.") in shown
    assert ("opposite", "    if a > n:  # 🙂", "Change `a > n` to `a < n`.") in shown


def test_a_method_that_is_gone_is_asked_for_with_its_signature_and_what_it_does() -> None:
    code = Code(SAMPLE)
    box = next(node for node in code.tree.body if isinstance(node, ast.ClassDef))
    (area,) = [change for change in method(code, box) if "area" in change.plan[0]]
    assert "def area" not in code.applied(area.splices)
    assert "`area(self, unit)`" in area.precise[0] and "Return the area of the box in a unit." in area.precise[0]
    (docs,) = class_docstring(code, box)
    assert '"A box of things."' in docs.precise[1]


def test_wishes_hold_the_details_of_their_change() -> None:
    rng = random.Random(5)
    (change,) = [change for _, change, _ in changes_of("def f(a, n):\n    return a < n\n") if change.kind == "boundary"]
    wishes = {intent_of([change], "f", "", [], rng) for _ in range(200)}
    assert len(wishes) > 40
    assert any("`a <= n` should be `a < n`" in wish for wish in wishes)
    assert any(not wish.isascii() for wish in wishes)  # Korean
    assert not any(wish.endswith("..") or "{" in wish for wish in wishes)


def test_evidence_is_a_call_that_really_differs() -> None:
    docstring = "Give the first n.\n\n    >>> first('abc', 2)\n    "
    text = f"import re\n\ndef first(text, n):\n    '''{docstring}'''\n    return text[:n]\n"
    tree = ast.parse(text)
    function = tree.body[1]
    assert isinstance(function, ast.FunctionDef)
    setting = setting_of(function, tree)
    assert setting is not None
    right = ast.unparse(function)
    wrong = right.replace("text[:n]", "text[:n + 1]")
    (shown, *_) = find_evidence(setting, right, wrong, function, random.Random(1))
    assert (shown.call, shown.expected, shown.got) == ("first('abc', 2)", "'ab'", "'abc'")
    endless = right.replace("return text[:n]", "while True: pass")
    assert find_evidence(setting, right, endless, function, random.Random(1)) == []


@pytest.mark.parametrize("body", ["return open(a)", "return helper(a)", "import os\n    return os.listdir(a)"])
def test_what_does_not_stand_alone_is_not_run(body: str) -> None:
    tree = ast.parse(f"def f(a):\n    {body}\n")
    assert isinstance(tree.body[0], ast.FunctionDef)
    assert setting_of(tree.body[0], tree) is None


# --- where code comes from -------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str], licence: str = "MIT") -> Path:
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}-1.0.dist-info/METADATA", metadata)
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("Apache-2.0 OR BSD-2-Clause", True),
        ("ISC License (ISCL)", True),
        ("GPL-3.0-only", False),
        ("MIT AND LGPL-2.1", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("", False),
    ],
)
def test_licences(licence: str, expected: bool) -> None:
    assert is_permissive(licence) is expected


def test_only_permissive_packages_that_nothing_is_measured_with_are_pinned(tmp_path: Path) -> None:
    wheel(tmp_path, "good", {"good/a.py": SAMPLE})
    wheel(tmp_path, "boltons", {"boltons/a.py": SAMPLE})
    wheel(tmp_path, "copyleft", {"copyleft/a.py": SAMPLE}, "GPL-3.0-or-later")
    packages, refused = pin(tmp_path)
    assert [package.name for package in packages] == ["good"]
    assert refused == {"boltons": "never learnt from", "copyleft": "licence: GPL-3.0-or-later"}
    write_packages([Package("more-itertools", "1", "x.whl", "0", "MIT")], tmp_path / "list.json")
    with pytest.raises(UsageError, match="more-itertools is kept for measuring"):
        read_packages(tmp_path / "list.json")


def test_another_wheel_than_was_pinned_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path, "good", {"good/a.py": SAMPLE})
    packages, _ = pin(tmp_path)
    fetch(packages, tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PathError, match="is not the wheel that was pinned"):
        fetch(packages, tmp_path)


def test_tests_vendored_and_generated_files_are_left_out(tmp_path: Path) -> None:
    files = {
        "good/a.py": SAMPLE,
        "good/tests/b.py": SAMPLE,
        "good/test_c.py": SAMPLE,
        "good/_vendor/d/e.py": SAMPLE,
        "good/toolz/f.py": SAMPLE,
        "good/g.py": f"# Generated by hand; DO NOT EDIT\n{SAMPLE}",
        "good/h.py": "x = 1\n",
    }
    assert [file.path for file in read_files(wheel(tmp_path, "good", files), "good")] == ["good/a.py"]


def test_the_pinned_list_is_permissive_and_holds_nothing_that_is_measured_with() -> None:
    packages = read_packages()
    assert len(packages) >= 60
    assert all(is_permissive(package.licence) and len(package.sha256) == 64 for package in packages)


# --- decontamination -------------------------------------------------------------------------------------------------


def test_thirteen_tokens_in_a_row_or_the_name_of_a_task_are_found(tmp_path: Path) -> None:
    task = {"id": "a/1", "function": "area", "before": SAMPLE, "intent": "make it so"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n", encoding="utf-8")
    references = read_references([tmp_path / "tasks.jsonl"])
    copied = "def other(child, tree, key):\n  return 1 + depth(child.inner, key) if max(child, label) in tree else 5\n"
    assert references.found_in(copied, "other") == "tasks.jsonl"
    assert references.found_in("def area(a):\n    return a\n", "area") == "the name of a task's function"
    assert references.found_in("def size(a):\n    return a\n", "size2") == ""
    with pytest.raises(PathError, match="holds nothing to compare with"):
        read_references([tmp_path / "absent.jsonl"])


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="functions are tried in forked processes")
def test_rows_are_the_product_s_own_prompts_and_their_answers_pass_its_gates(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    other = SAMPLE.replace("fill", "refill").replace("depth", "height").replace("Box", "Crate")
    wheel(wheels, "good", {"good/a.py": SAMPLE, "good/b.py": other})
    packages, _ = pin(wheels)
    (tmp_path / "tasks.jsonl").write_text(
        json.dumps({"id": "x", "function": "words", "before": "def words():\n    return 1\n", "intent": "x " * 20})
        + "\n"
    )
    tokenizer = write_files(tmp_path / "model", tiny_model_files())

    def made(folder: str, seed: int) -> bytes:
        report = build(
            tmp_path / folder,
            wheels,
            [tmp_path / "tasks.jsonl"],
            tokenizer,
            Options(seed=seed, num_processes=1, most_tokens_a_row=20_000),  # a token a letter
            packages=packages,
            say=lambda _: None,
        )
        assert report["dropped_as_overlapping"] == {"the name of a task's function": 2}
        return (tmp_path / folder / "train.jsonl").read_bytes() + (tmp_path / folder / "val.jsonl").read_bytes()

    data = made("one", 1)
    assert made("two", 1) == data
    rows = [json.loads(line) for seed in range(1, 6) for line in made("more", seed).splitlines()]
    whole = [
        row for row in rows if row["stage"].startswith("patch") and "## Code Before:\n```python\ndef " in row["input"]
    ]
    assert whole
    for row in (row for row in whole if row["scope"] == "function"):
        before = row["input"].split("## Code Before:\n```python\n")[1].split("```\n## Instruction:\n")[0]
        answer = row["output"].removeprefix(row["prefill"])
        source = Source.from_text(before, "a.py")
        scope = find_scope(source, None, 1)
        task = Task(build_context(source, scope), "x")
        assert row["prefill"] == FORMATS["rewrite"].prefill(task)
        assert answer.endswith(FORMATS["rewrite"].stop(task))
        report = prove(Question(source, scope, source, scope, "rewrite"), answer.removesuffix("\n```")).report
        assert {verdict.gate for verdict in report.verdicts if not verdict.ok} <= {"names"}  # its file is not here


def test_without_references_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to compare with|forked processes"):
        build(tmp_path, tmp_path, [], tmp_path, Options(), packages=[])


def test_names_of_mutants_are_no_names_of_tasks(tmp_path: Path) -> None:
    """`merge` in a package says nothing about another function of that name."""
    text = "def merge(a):\n    return [one + other for one, other in a]\n"
    rows = [
        {"id": "mutant/p/merge", "function": "merge", "before": text},
        {"id": "y", "function": "own", "before": text},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_references([tmp_path / "t.jsonl"]).names == {"own", "merge"}
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert read_references([tmp_path / "m.jsonl"]).names == set()


def test_tasks_as_an_evaluation_harness_keeps_them(tmp_path: Path) -> None:
    """MBPP has its function in `code`, its tests in `test_list`; harnesses put the task into `doc`."""
    task = {
        "task_id": 7,
        "text": "Write a function to count words that start with a capital letter and end with a digit, please.",
        "code": "def count_such(words):\r\n    return sum(w[0].isupper() and w[-1].isdigit() for w in words if w)",
        "test_list": ["assert count_such(['Ab1', 'b2', 'C', 'Dd9', 'Ee', 'F00', 'g']) == 3"],
    }
    (tmp_path / "requests.jsonl").write_text(json.dumps({"request_type": "loglikelihood", "doc": task}) + "\n")
    found = read_references([tmp_path / "requests.jsonl"]).found_in
    assert found(str(task["code"]), "renamed") == "requests.jsonl"
    assert found(str(task["text"]), "") == "requests.jsonl"
    assert found(str(task["test_list"]), "") == "requests.jsonl"
    assert found("def count_such(): ...", "count_such") == "the name of a task's function"
    assert not found("def another(words): return len(words)", "another")
