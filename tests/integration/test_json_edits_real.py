"""`json_edits` on the real 0.5B: what it writes always parses, fits the schema and finds its anchors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from engine.errors import BudgetError, GateError
from engine.inference.engine import InProcessEngine
from engine.inference.loading import load_model
from engine.patching.edits import edits_from_json, resolve_anchors
from engine.patching.patcher import Patcher, PatcherOptions, StageOptions
from engine.patching.scopes import find_scope
from engine.patching.source import Source

FUNCTIONS = [
    "def add(a, b):\n    return a - b\n",
    "def area(w, h):\r\n\treturn w + h  # 🙂\r\n",
    'def quote(x):\n    return "\\"" + x + \'\\\\\'\n',
    "class A:\n    @property\n    def size(self):\n        return len(self.items) + 1\n",
    "async def load(path):\n    data = await read(path)\n    return None\n",
    "def outer(n):\n    def inner(k):\n        return k * 2\n\x0c\n    return inner(n + 1)",
    "def f(): return 1",
    'def doc(x):\n    """```python\n    <|im_end|>\n    ```"""\n    return x\n',
    "def first(items):\n    for item in items:\n        return item\n    raise IndexError\n",
    "def clamp(x, low, high):\n    if x < low:\n        return high\n    return min(x, high)\n",
    "def words(text):\n\n\n    return text.split(',')\n",
    "def greet(name='Ünï 🙂'):\n    print(f'hello {name}')\n",
]
NAMES = ["add", "area", "quote", "size", "load", "outer", "f", "doc", "first", "clamp", "words", "greet"]


@pytest.fixture(scope="module")
def engine(model_folder_05b: Path) -> Iterator[InProcessEngine]:
    load = partial(load_model, "0.5b", "", model_folder_05b, device="cpu", quantization="bf16")
    with InProcessEngine("0.5b", model_folder_05b, load) as engine:
        engine.wait_until_ready()
        yield engine


@pytest.mark.slow
def test_what_the_model_writes_is_a_valid_list_or_out_of_budget(engine: InProcessEngine, long_run: bool) -> None:
    num_ended = 0
    for text, name in list(zip(FUNCTIONS, NAMES, strict=True))[: None if long_run else 2]:
        source = Source.from_text(text, "code.py")
        scope = find_scope(source, name)
        written: list[str] = []
        options = PatcherOptions(patch=StageOptions(96, 1.03), edit_format="json_edits", num_repairs=0)
        patcher = Patcher(engine, None, options)
        try:
            patcher.patch(source, scope, "Fix what is wrong.", listener=lambda _, piece, to=written: to.append(piece))
        except BudgetError:
            continue
        except GateError as error:
            assert error.details["gate"] not in ("fresh", "schema"), error.message
        num_ended += 1
        edits = edits_from_json(json.loads("".join(written)))
        assert edits
        for edit in edits:
            placed, repairs = resolve_anchors(source, scope, [edit])
            assert (repairs, len(placed)) == ([], 1), "the text is at its lines, and the edit changes it"
    assert num_ended > 0
