"""What a user is told of a patch that every gate passed: comments and docstrings it drops, faults elsewhere."""

from __future__ import annotations

import pytest

from engine.patching.edits import Edit, diff_edits
from engine.patching.notices import no_longer_returning, notices, removed
from engine.patching.scopes import find_scope
from engine.patching.source import Source

OLD = '''\
@cache  # kept for a day
@retry("# not a comment")
def size(names):
    """Count 🙂."""
    # Empty names count too.
    def longest(name):
        "Its length."
        return len(name)  # in code points

    text = "# no comment either"
    return sum(map(longest, names)), text
'''


def told(before: str, after: str, name: str | None) -> list[str]:
    """The notices of a patch that makes `after` of `before`."""
    source = Source.from_bytes(before.encode(), "store.py")
    scope = find_scope(source, name)
    return notices(source, scope, diff_edits(source, Source.from_bytes(after.encode(), "store.py").lines, (1, 10_000)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([("  # kept for a day", "")], "1 comment"),
        ([("    # Empty names count too.\n", ""), ("  # in code points", "")], "2 comments"),
        ([('    """Count 🙂."""\n', "")], "the docstring"),
        ([('        "Its length."\n', "")], "the docstring of `size.longest`"),
        ([('    """Count 🙂."""\n', ""), ('        "Its length."\n', "")], "2 docstrings"),
        ([("    # Empty names count too.\n", ""), ('    """Count 🙂."""\n', "")], "1 comment and the docstring"),
        # What was in strings, moved, re-indented, spaced otherwise, reworded, or went with its function is not lost.
        ([('"# no comment either"', "''")], ""),
        ([('"# not a comment"', "3")], ""),
        ([("    # Empty names count too.\n", ""), ("    text", "        #empty names  count too\n    text")], ""),
        ([("# Empty names count too.", "# Empty names count as well.")], ""),
        ([("Count 🙂.", "Count the names.")], ""),
        ([('        "Its length."\n', ""), ("longest", "length")], ""),
        # The text of a docstring behind code is no docstring.
        ([('    """Count 🙂."""\n', '    import os\n    """Count 🙂."""\n')], "the docstring"),
        # One of two equal comments.
        ([("  # kept for a day", "  # in code points"), ("(name)  # in code points", "(name)")], "1 comment"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_comments_and_docstrings_that_are_gone_are_counted(
    change: list[tuple[str, str]], said: str, newline: str
) -> None:
    new = OLD
    for old_text, new_text in change:
        assert old_text in new
        new = new.replace(old_text, new_text)
    assert removed(OLD, new, "size") == said
    before, after = (f"import os\n\x0c\n{text}".replace("\n", newline) for text in (OLD, new))
    assert told(before, after, "size") == ([f"the patch removes {said}"] if said else [])


def test_only_the_method_is_looked_at_also_when_imports_were_added_above_it() -> None:
    before = "# above\nclass Store:\n\t# first\n\tdef size(self):\n\t\t# 🙂 one\n\t\treturn 1  # two\n\t# last\n"
    after = before.replace("\t\t# 🙂 one\n", "").replace("# above\n", "# above\nimport os\nimport re\n")
    assert told(before, after, "size") == ["the patch removes 1 comment"]
    grown = before.replace("return 1", "x = 1\n\t\ty = 2\n\t\treturn x - y")
    assert told(before, "import os\n" + grown, "Store.size") == []


def test_a_comment_that_moves_above_the_function_or_below_its_last_line_stays() -> None:
    before = "def f():\n    # why\n    return 1\n\n\ndef g():\n    return 2"
    assert told(before, before.replace("    # why\n", "").replace("def f", "# why\ndef f"), "f") == []
    assert told(before, before.replace("    # why\n", "").replace("1\n", "1\n    # why\n"), "f") == []


def test_lines_below_the_function_do_not_stand_in_for_those_in_it() -> None:
    before = "def f():\n    # same\n    return 1\n# same\nimport os\n"
    after = before.replace("    # same\n", "").replace("import os\n", "import os\nimport re\n")
    assert told(before, after, "f") == ["the patch removes 1 comment"]


def test_what_is_put_in_right_behind_the_last_line_belongs_to_the_function() -> None:
    source = Source.from_text("def f():\n    # why\n    return 1\n\n\nX = 1\n", "a.py")
    edits = [Edit("a.py", "delete", 2, 2, "    # why", ""), Edit("a.py", "insert", 4, 3, "", "    # why")]
    assert notices(source, find_scope(source, "f"), edits) == []


def test_a_whole_file_s_docstring_and_those_in_it_are_told_apart() -> None:
    before = '"""Module."""\n\n\ndef f():\n    """Function."""\n'
    assert told(before, before.replace('"""Module."""\n', ""), None) == ["the patch removes the docstring"]
    after = before.replace('"""Function."""', "return 1")
    assert told(before, after, None) == ["the patch removes the docstring of `f`"]


def test_of_a_property_and_its_setter_only_one_has_lost_its_docstring() -> None:
    before = (
        "class A:\n    @property\n    def x(self):\n        'Get.'\n        return 1\n\n"
        "    @x.setter\n    def x(self, value):\n        'Set.'\n"
    )
    after = before.replace("        'Get.'\n", "")
    assert told(before, after, "A") == ["the patch removes the docstring of `A.x`"]


def test_rules_and_empty_comments_are_no_loss() -> None:
    assert removed("# ------\n#\nx = 1\n", "x = 1\n") == ""


def test_a_directive_is_no_loss() -> None:
    assert removed("def f():\n    # pp: return 1\n    return 0  # zero\n", "def f():\n    return 1\n") == "1 comment"


def test_text_that_does_not_parse_has_lost_nothing() -> None:
    assert removed("def f(:  # a\n", "def f():\n    pass\n") == ""
    assert removed("def f():  # a\n    pass\n", "def f():\n  '''\n") == ""


def test_a_fault_elsewhere_in_the_file_is_named_with_its_line() -> None:
    before = "def good():\n    return 1\n\n\ndef bad(:\n    return 1\n"
    source = Source.from_text(before, "half.py")
    edit = Edit("half.py", "replace", 2, 2, "    return 1", "    return 2")
    assert notices(source, find_scope(source, "good"), [edit]) == [
        "half.py does not parse (line 5: invalid syntax); only `good` itself was checked"
    ]


def test_an_ordinary_patch_has_no_notice() -> None:
    assert told(OLD, OLD.replace("len(name)", "len(name.strip())"), "size") == []


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("def f():\n    return 1\n", "def f():\n    '''One 🙂.'''\n", ["f"]),
        ("def f():\n    return 1\n", "def f():\n    return\n", ["f"]),
        ("def f():\n    yield 1\n", "def f():\n    pass\n", ["f"]),
        ("def f():\n    return 1\n", "def f():\n    def g():\n        return 1\n", ["f"]),
        ("class A:\n\tasync def f(self):\n\t\treturn 1\n", "class A:\n\tasync def f(self):\n\t\tpass\n", ["A.f"]),
        ("def f():\n    return 1\n", "def f():\n    if f:\n        return 2\n", []),
        ("def f():\n    return 1\n", "def g():\n    pass\n", []),
        ("def f():\n    pass\n", "def f():\n    return\n", []),
        ("def f():\n    return 1\n", "def f(:\n", []),
    ],
)
def test_a_function_that_returns_nothing_any_more_is_named(old: str, new: str, lost: list[str]) -> None:
    assert no_longer_returning(old, new) == lost


def test_a_lost_value_is_told_with_its_function() -> None:
    after = OLD.replace("    return sum(map(longest, names)), text\n", "    print(longest, text)\n")
    assert told(OLD, after, "size") == ["after the patch `size` never returns a value, and it did before"]


def test_functions_and_classes_that_are_gone_are_named_outermost_first() -> None:
    """A patch of a whole file deleted a class and a function, and nothing but its docstring was missed."""
    before = "def total(a):\n    pass\n\n\nclass Cart:\n    def add(self):\n        pass\n\n\ndef clamp(x):\n    pass\n"
    assert told(before, "def clamp(x):\n    return x\n", None) == ["the patch removes `total`, `Cart`"]
    assert told(before, before.replace("add", "put"), None) == ["the patch removes `Cart.add`"]
    many = "".join(f"def f{number}():\n    pass\n" for number in range(8))
    assert told(many, "x = 1\n", None) == ["the patch removes `f0`, `f1`, `f2`, `f3`, `f4`, 3 more"]
    nested = "def f():\n    def g():\n        pass\n    return g\n"
    assert told(nested, "def f():\n    return 1\n", "f") == []
