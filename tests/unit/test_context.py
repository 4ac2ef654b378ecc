"""What the model sees, what is dropped first, and that nothing is shown twice."""

from __future__ import annotations

import pytest

from engine.patching.context import Context, build_context
from engine.patching.scopes import find_scope
from engine.patching.source import Source

pytestmark = pytest.mark.unit

FILLER = "".join(f"FILL_{number} = {number}\n" for number in range(60))
TEXT = (
    '''\
"""Module 🙂."""
import os
from typing import (
    Any,
)
try:
    import fast
except ImportError:
    fast = None

def far(value,
        *, deep=False):
    # a comment
    """Go far.

    More.
    """
    return value

class Base:
    """Base of all."""

class Store(Base):
    """Keeps things.

    Long story.
    """

    size: int = 1
    name = "🙂"

    def __init__(self, root):
        self.root = root

'''
    + FILLER.replace("FILL", "    FILL")
    + '''\
    @decorate
    async def read(self, path):
        """Read."""
        def inner(x): return x
        near(path)
        inner(path)
        self.check(path)
        Base()
        return far(path, deep=os.sep)
'''
    + FILLER.replace("FILL", "    FILL")
    + """\
    def check(self, path): return path

def near(a): pass
"""
)
VARIANTS = {
    "lf": TEXT,
    "crlf": TEXT.replace("\n", "\r\n"),
    "tabs": TEXT.replace("    ", "\t"),
    "no final newline, byte-order mark, form feed": "\ufeff" + TEXT.rstrip("\n").replace("\nclass", "\n\x0c\nclass"),
}


def read_context(text: str, name: str = "read", max_chars: int = 100_000, lines: int = 3) -> Context:
    source = Source.from_text(text, "pkg/store.py")
    return build_context(source, find_scope(source, name), max_chars=max_chars, surrounding_lines=lines)


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_part_is_found_in_every_style(text: str) -> None:
    context = read_context(text)
    tab = "\t" if "\t" in text else "    "
    assert context.imports == f"import os\nfrom typing import (\n{tab}Any,\n)\nimport fast\n"
    assert context.class_header == (
        f'class Store(Base):\n{tab}"""Keeps things."""\n{tab}size: int = 1\n{tab}name = "🙂"\n'
        + f"{tab}def __init__(self, root):\n{tab}{tab}self.root = root\n"
        + "".join(f"{tab}FILL_{number} = {number}\n" for number in [*range(57), *range(3, 60)])
    )
    assert context.signatures.split("\n") == [
        "def near(a): pass",
        f"{tab}def check(self, path): return path",
        "class Base:",
        f'{tab}"""Base of all."""',
        "def far(value,",
        f"{tab}{tab}*, deep=False):",
        f'{tab}"""Go far."""',
        "",
    ]
    assert context.before == "".join(f"{tab}FILL_{number} = {number}\n" for number in range(57, 60))
    assert context.function.startswith(f"{tab}@decorate\n{tab}async def read") and context.function.endswith(
        "os.sep)\n"
    )
    assert context.after == "".join(f"{tab}FILL_{number} = {number}\n" for number in range(3))
    assert context.dropped == ()


def test_things_are_dropped_in_the_order_of_their_use() -> None:
    """As the budget shrinks, each part goes away before the next one is touched."""
    seen: list[tuple[bool, ...]] = []
    function = read_context(TEXT).function
    for max_chars in range(4000, -1, -50):
        context = read_context(TEXT, max_chars=max_chars, lines=25)
        assert context.num_chars <= max_chars and context.function == function
        parts = (context.before + context.after, context.signatures, context.class_header, context.imports)
        state = tuple(bool(part) for part in parts)
        if not seen or seen[-1] != state:
            seen.append(state)
    assert seen == [
        (True, True, True, True),
        (False, True, True, True),
        (False, False, True, True),
        (False, False, False, True),
        (False, False, False, False),
    ]


def test_what_was_dropped_is_said_in_words() -> None:
    assert read_context(TEXT, max_chars=0, lines=2).dropped == (
        "2 of 2 lines before",
        "2 of 2 lines after",
        "signature: near, Store.check, Base, far",
        "class header: class Store, fields of Store, Store.__init__",
        "import: import os, from typing import Any, import fast",
    )
    small = "def a():\n    pass\n\ndef b():\n    pass\n\ndef c():\n    pass\n"
    assert read_context(small, "b", max_chars=20).dropped == ("1 of 3 lines before", "1 of 3 lines after")


def test_nothing_is_shown_twice() -> None:
    text = "import os\n\nclass A:\n    x = 1\n\n    def __init__(self): pass\n\n"
    text += "    def f(self):\n        return g(os)\n\ndef g(a): pass\n"
    context = read_context(text, "f", lines=25)
    assert (context.imports, context.class_header, context.signatures) == ("", "", "")
    assert context.before + context.function + context.after == text
    near = read_context(text, "f", lines=2)
    assert (near.imports, near.class_header) == ("import os\n", "class A:\n    x = 1\n")
    assert near.before == "    def __init__(self): pass\n\n" and near.signatures == ""


def test_a_module_is_all_function() -> None:
    source = Source.from_text(TEXT, "a.py")
    context = build_context(source, find_scope(source), max_chars=10)
    assert context.function == TEXT and context.num_chars == 0 and context.dropped == ()


def test_a_nested_class_and_its_method_see_their_class() -> None:
    text = (
        "class A:\n    class B:\n        '''Doc.'''\n        def f(self): return self.g()\n        def g(self): pass\n"
    )
    context = read_context(text, "f", lines=0)
    assert context.class_header == '    class B:\n        """Doc."""\n'
    assert context.signatures == "        def g(self): pass\n"
    assert read_context(text, "B", lines=0).class_header == "class A:\n"


def test_a_file_that_does_not_parse_still_gives_imports_and_signatures() -> None:
    text = "import os\nfrom a import b\n\ndef f(x):\n    return g(x)\n\n"
    text += "def bad(:\n\ndef g(y):\n    '''Doc 🙂.'''\n    return y\n"
    context = read_context(text, "f", lines=0)
    assert context.imports == "import os\nfrom a import b\n"
    assert context.signatures == 'def g(y):\n    """Doc 🙂."""\n'


def test_the_digest_tells_contexts_apart() -> None:
    same = read_context(TEXT).sha256
    assert same == read_context(TEXT).sha256 == read_context(TEXT.replace("\n", "\r\n")).sha256
    others = [
        read_context(TEXT, lines=2),
        read_context(TEXT, "check"),
        read_context(TEXT.replace("import os", "import io")),
    ]
    assert len({same, *(context.sha256 for context in others)}) == 4
