"""Names and lines to scopes, in files that parse and in files that do not."""

from __future__ import annotations

import warnings

import pytest

from engine.errors import SourceError, UnknownScopeError
from engine.patching.scopes import MODULE_NAME, find_scope, list_scopes
from engine.patching.source import Source

pytestmark = pytest.mark.unit

TEXT = '''\
import typing
from typing import overload

@decorate(
    "🙂",
)
@plain
def sort(items):
    """Sort.

def fake():
    """
    def key(item): return (item,
  1)
    return sorted(items, key=key)
    # the end of sort

# not part of sort
class Sorter(Base):
    if FAST:
        def pick(self): return 1
    else:
        def pick(self): return 2

    @property
    def size(self): return 1
    @size.setter
    def size(self, value):
        pass
    async def wait(self):
        class Inner:
            x = lambda: 1
            def deep(self): pass

    def sort(self): pass

try:
    def load(): pass
except ImportError:
    def load(): return None
for _ in ():
    while True:
        with x:
            def buried(): pass
match 1:
    case 1:
        def matched(): pass

@overload
def both(a: int) -> int: ...
@typing.overload
def both(a: str) -> str: ...
def both(a):
    return a
'''
SOURCE = Source.from_text(TEXT, "pkg/sorter.py")
BROKEN = Source.from_text(TEXT + "\ndef = broken(\n\ndef last():\n    return 1\n", "pkg/sorter.py")
VARIANTS = {
    "lf": SOURCE,
    "crlf": Source.from_text(TEXT.replace("\n", "\r\n"), "f.py"),
    "cr, no final newline": Source.from_text(TEXT.replace("\n", "\r").rstrip("\r"), "f.py"),
    "tabs and byte-order mark": Source.from_text("\ufeff" + TEXT.replace("    ", "\t"), "f.py"),
    "form feeds between": Source.from_text(TEXT.replace("\n\n", "\n\x0c\n"), "f.py"),
    "broken": BROKEN,
}


def span(source: Source, name: str | None, line: int | None = None) -> tuple[str, str, int, int, int]:
    scope = find_scope(source, name, line)
    return scope.kind, scope.qualname, scope.start_line, scope.def_line, scope.end_line


@pytest.mark.parametrize("source", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("key", ("function", "sort.key", 13, 13, 14)),
        ("sort.<locals>.key", ("function", "sort.key", 13, 13, 14)),
        ("sort", ("function", "sort", 4, 8, 16)),
        ("Sorter.sort", ("function", "Sorter.sort", 35, 35, 35)),
        ("Sorter", ("class", "Sorter", 19, 19, 35)),
        ("wait", ("function", "Sorter.wait", 30, 30, 33)),
        ("Inner.deep", ("function", "Sorter.wait.Inner.deep", 33, 33, 33)),
        ("buried", ("function", "buried", 44, 44, 44)),
        ("matched", ("function", "matched", 47, 47, 47)),
        ("both", ("function", "both", 53, 53, 54)),
        ("both@49", ("function", "both", 49, 50, 50)),
        ("size@26", ("function", "Sorter.size", 25, 26, 26)),
        ("Sorter.size@27", ("function", "Sorter.size", 27, 28, 29)),
        ("load@40", ("function", "load", 40, 40, 40)),
    ],
)
def test_a_name_finds_its_definition(source: Source, name: str, expected: tuple[str, str, int, int, int]) -> None:
    assert span(source, name) == expected
    assert find_scope(source, name).parses == (source is not BROKEN)


@pytest.mark.parametrize("source", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (4, "sort"),
        (11, "sort"),
        (14, "sort.key"),
        (16, "sort"),
        (20, "Sorter"),
        (23, "Sorter.pick"),
        (32, "Sorter.wait"),
        (33, "Sorter.wait.Inner.deep"),
        (52, "both"),
    ],
)
def test_a_line_finds_the_innermost_function(source: Source, line: int, name: str) -> None:
    scope = find_scope(source, line=line)
    assert scope.qualname == name and scope.contains(line)


def test_a_line_outside_every_definition_means_the_module() -> None:
    assert span(SOURCE, None, 1) == ("module", MODULE_NAME, 1, 1, 54)
    assert span(SOURCE, None, 55) == ("module", MODULE_NAME, 1, 1, 54)
    assert span(SOURCE, None) == span(SOURCE, MODULE_NAME, 20) == ("module", MODULE_NAME, 1, 1, 54)
    assert span(Source.from_text("", "f.py"), None, 1) == ("module", MODULE_NAME, 1, 1, 0)
    with pytest.raises(UnknownScopeError, match=r"pkg/sorter\.py has 54 lines; there is no line 99"):
        find_scope(SOURCE, line=99)


@pytest.mark.parametrize("source", [SOURCE, BROKEN], ids=["parses", "broken"])
def test_several_of_one_name_are_listed_and_a_line_picks(source: Source) -> None:
    with pytest.raises(UnknownScopeError) as caught:
        find_scope(source, "size")
    assert caught.value.message == (
        "pkg/sorter.py has 2 definitions that `size` could mean: Sorter.size@26, Sorter.size@28."
    )
    assert "`Sorter.size@26`" in caught.value.hint
    assert span(source, "size", 29) == ("function", "Sorter.size", 27, 28, 29)
    assert span(source, "pick", 21)[3] == 21 and span(source, "pick", 23)[3] == 23
    with pytest.raises(UnknownScopeError, match="load@38, load@40"):
        find_scope(source, "load", 1)


@pytest.mark.parametrize("source", [SOURCE, BROKEN], ids=["parses", "broken"])
def test_an_unknown_name_comes_with_the_nearest(source: Source) -> None:
    with pytest.raises(UnknownScopeError, match=r"no function or class `Sorter\.srot`") as caught:
        find_scope(source, "Sorter.srot")
    assert "Sorter.sort" in caught.value.hint and caught.value.exit_code == 2
    with pytest.raises(UnknownScopeError, match="`fake`"):
        find_scope(SOURCE, "fake")  # it is in a docstring
    with pytest.raises(UnknownScopeError, match="`sort@1`") as caught:
        find_scope(source, "sort@1")
    assert "sort@8" in caught.value.hint


def test_scopes_are_listed_in_the_order_of_the_file() -> None:
    names = [scope.qualname for scope in list_scopes(SOURCE)]
    assert names[:4] == ["sort", "sort.key", "Sorter", "Sorter.pick"] and names[-3:] == ["both", "both", "both"]
    assert [scope.qualname for scope in list_scopes(BROKEN)] == [*names, "last"]


def test_trailing_comments_belong_to_the_body_only_if_they_are_deeper() -> None:
    source = Source.from_text(
        "class A:\n    def f(self):\n        pass\n\n        # deep\n    # shallow\n    x = 1\n# after\n", "f.py"
    )
    assert span(source, "f")[4] == 5
    assert span(source, "A")[4] == 7


@pytest.mark.parametrize("damage", ["def = broken(", "x = 'open", 'x = """open', "x = (1,", "class", "else:"])
def test_functions_around_a_syntax_error_are_still_found(damage: str) -> None:
    lines = ["@d", "def above(a,", "    b):", "    '''Doc.", "'''", "    return 1", damage, "", "class C:"]
    lines += ["    @d(1,", "       2)", "    async def below(self):", "        return '🙂'", "", "x = 1"]
    source = Source.from_text("\r\n".join(lines), "f.py")
    above, below = find_scope(source, "above"), find_scope(source, "C.below")
    assert (above.start_line, above.def_line, above.end_line, above.parses) == (1, 2, 6, False)
    assert (below.start_line, below.def_line, below.end_line, below.indent) == (10, 12, 13, "    ")
    assert find_scope(source, line=13) == below


def test_a_function_that_does_not_parse_itself_is_refused_with_its_line() -> None:
    source = Source.from_text(
        "x = 1\n\nclass C:\n    def bad(self):\n        return (1 +\n\n    def good(self):\n        return 1\n", "f.py"
    )
    with pytest.raises(SourceError, match=r"`C\.bad` in f\.py does not parse: line 5") as caught:
        find_scope(source, "bad")
    assert caught.value.details["line"] == 5 and caught.value.hint
    assert find_scope(source, "good").end_line == 8
    with pytest.raises(SourceError, match=r"^f\.py does not parse: line 5"):
        find_scope(source)


def test_a_function_below_an_unclosed_docstring_is_found() -> None:
    text = 'def one():\n    """Never closed.\n    return 1\n\ndef two():\n    """Closed."""\n    return 2\n'
    assert span(Source.from_text(text, "f.py"), "two") == ("function", "two", 5, 5, 7)


@pytest.mark.parametrize(
    "text",
    ["x = " + "-" * 100_000 + "1\n", "x = " + "(" * 300 + ")" * 300, "if a:\n pass\n" + "elif b:\n pass\n" * 8000],
    ids=["unary", "brackets", "elif"],
)
def test_hostile_nesting_is_an_error_and_not_a_crash(text: str) -> None:
    source = Source.from_text(text + "\ndef f():\n    return 1\n", "f.py")
    assert find_scope(source, "f").parses is False
    with pytest.raises(SourceError, match="does not parse"):
        find_scope(source)


def test_a_long_elif_chain_is_not_too_deep() -> None:
    text = "def f(a):\n    if a == 0:\n        pass\n" + "".join(
        f"    elif a == {i}:\n        pass\n" for i in range(900)
    )
    assert find_scope(Source.from_text(text, "f.py"), "f").end_line == 1803


def test_invalid_escapes_warn_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_scope(Source.from_text("def f():\n    return '\\d' is 1\n", "f.py"), "f").end_line == 2
