"""No line of what is measured with may be learnt from.

A text is broken into lower-case words and signs, comments and docstrings included, and every 13 in a row are looked
up among those of the references (13 as in Brown et al. 2020, appendix C; in code that is one to two lines). One match
drops the function. Functions that bear the name of a task's function are dropped too, whatever their text.

Not covered: the same algorithm under other names, and reference sets that are not at hand; the report says what it had.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import PathError

NUM_TOKENS = 13
_TOKEN = re.compile(r"\w+|[^\w\s]")
_COMMON_NAMES = {"main", "wrap", "__init__", "__eq__", "__lt__", "__repr__", "__str__", "__call__", "__iter__"}


@dataclass(slots=True)
class References:
    """What is measured with.

    Args:
        grams: Hashes of 13 tokens in a row, with the reference they are of.
        names: Names of functions that a task is about.
        sizes: Texts of each reference.
        hits: Functions that were dropped, by reference.
    """

    grams: dict[int, str] = field(default_factory=dict[int, str])
    names: set[str] = field(default_factory=set[str])
    sizes: Counter[str] = field(default_factory=Counter[str])
    hits: Counter[str] = field(default_factory=Counter[str])

    def add(self, reference: str, texts: Iterable[str], names: Iterable[str] = ()) -> None:
        """Add texts.

        Args:
            reference: What they are of.
            texts: The texts.
            names: Functions that tasks are about.
        """
        for text in texts:
            self.sizes[reference] += 1
            for gram in grams_of(text):
                self.grams.setdefault(gram, reference)
        self.names.update(name.rpartition(".")[2] for name in names if name)
        self.names -= _COMMON_NAMES

    def found_in(self, text: str, name: str) -> str:
        """Which reference a function overlaps with.

        Args:
            text: The function, or any text.
            name: Its name; empty for a text without one.

        Returns:
            The reference, or nothing.
        """
        if name in self.names:
            return "the name of a task's function"
        return next((self.grams[gram] for gram in grams_of(text) if gram in self.grams), "")


def grams_of(text: str) -> Iterator[int]:
    """Hashes of every 13 tokens in a row of a text.

    Args:
        text: Code or prose.

    Yields:
        Numbers of 64 bits.
    """
    tokens = _TOKEN.findall(text.lower())
    for start in range(len(tokens) - NUM_TOKENS + 1):
        run = "\0".join(tokens[start : start + NUM_TOKENS])
        yield int.from_bytes(hashlib.blake2b(run.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def read_references(paths: Iterable[Path]) -> References:
    """Read what is measured with.

    Args:
        paths: Files of tasks (`.jsonl`, `.jsonl.gz`), wheels that carry such files or packages, and folders of Python.

    Returns:
        The references.

    Raises:
        PathError: One is not there or holds nothing.
    """
    references = References()
    for path in paths:
        before = len(references.grams)
        if path.is_dir():
            texts = (file.read_text(encoding="utf-8", errors="replace") for file in sorted(path.rglob("*.py")))
            references.add(path.name, texts)
        elif path.suffix == ".whl":
            _add_wheel(references, path)
        elif path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            _add_tasks(references, path.name, data)
        if len(references.grams) == before:
            raise PathError(f"{path} holds nothing to compare with", hint="Name a file of tasks, a wheel or a folder.")
    return references


def _add_wheel(references: References, path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".jsonl.gz"):
                _add_tasks(references, Path(name).name, gzip.decompress(archive.read(name)))
            elif name.endswith(".py"):
                references.add(path.name.split("-")[0], [archive.read(name).decode("utf-8", "replace")])


def _add_tasks(references: References, name: str, data: bytes) -> None:
    """Code, instructions and tests of tasks; the names of their functions."""
    for line in data.decode("utf-8").splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        row = row["doc"] if isinstance(row.get("doc"), dict) else row  # as evaluation harnesses keep tasks
        function = row.get("function") or row.get("entry_point") or ""
        solution = f"{row.get('prompt', '')}{row.get('canonical_solution', '')}"
        texts = [
            str(row[key]) for key in ("before", "after", "intent", "tests", "test", "text", "code") if row.get(key)
        ]
        texts += [str(test) for test in row.get("test_list", ())]
        # A mutant's function is one of its package; a name such as `add` or `merge` says nothing there.
        is_own = not str(row.get("id", "")).startswith("mutant/")
        references.add(name, [*texts, *([solution] if solution else [])], [function] if is_own else [])
        if is_own and (code := row.get("before") or row.get("code")):
            references.names.update(_function_names(str(code)))
            references.names -= _COMMON_NAMES


def _function_names(text: str) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.name) > 3:
            yield node.name
