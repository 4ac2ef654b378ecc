"""What a fault does when the code runs: calls for which the broken function gives something else than the right one.

Only functions that stand alone are run: they use their parameters, safe builtins, a few modules of the standard library
and literal constants of their file. They run in a child process that is killed after two seconds.

This is fault containment, not a security boundary: the code is that of pinned packages.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import json
import os
import random
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from engine.patching.names import use_of_names
from training.reversed_edits.code import FunctionNode, docstring_of

_SAFE_MODULES = {
    "bisect",
    "collections",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "string",
    "textwrap",
    "typing",
    "unicodedata",
}
_UNSAFE = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "exit", "quit", "globals", "print"}
_SAFE_BUILTINS = frozenset(dir(builtins)) - _UNSAFE
_TIME_LIMIT_S = 2.0
_MEMORY_BYTES = 4 * 1024**3
_MOST_SHOWN = 70

_NUMBERS = ("0", "1", "2", "3", "5", "7", "10", "-1", "12", "100")
_TEXTS = ("''", "'a'", "'abc'", "'Hello World'", "'foo_bar'", "' x '", "'a,b,c'", "'12'", "'aab'", "'FooBar'")
_LISTS = ("[]", "[1]", "[1, 2, 3]", "[3, 1, 2]", "[1, 1, 2]", "['a', 'b']", "[0, 5, -2, 5]", "[[1, 2], [3]]")
_DICTS = ("{}", "{'a': 1}", "{'a': 1, 'b': 2}", "{'x': {'y': 1}}")
_OTHERS = ("None", "True", "False", "1.5", "2.75", "(1, 2)")
_POOLS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("n", "k", "i", "j", "m", "num", "count", "size", "width", "index", "start", "end", "int", "float", "x", "y"),
        _NUMBERS,
    ),
    (("s", "str", "text", "string", "name", "word", "line", "value", "key", "path", "prefix", "char"), _TEXTS),
    (("list", "items", "seq", "iterable", "array", "arr", "values", "args", "lst", "xs", "data", "it"), _LISTS),
    (("dict", "mapping", "d", "obj", "kwargs", "params", "options", "config"), _DICTS),
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One call that tells the two apart.

    Args:
        call: The call as Python.
        expected: What the right function gives, as `repr` has it.
        got: What the broken one gives; empty if it raises.
        error: What the broken one raises, with its message; empty if it does not.
    """

    call: str
    expected: str
    got: str
    error: str


def setting_of(function: FunctionNode, file: ast.Module) -> str | None:
    """What a function needs to be run.

    Args:
        function: A function of the module's top level, without decorators.
        file: Its file.

    Returns:
        Imports and constants as Python; None if the function does not stand alone.
    """
    if function.decorator_list or isinstance(function, ast.AsyncFunctionDef) or function not in file.body:
        return None
    bare = ast.parse(ast.unparse(function))
    for node in ast.walk(bare):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return None
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            return None
    needed = set(use_of_names(ast.unparse(bare)).unbound)
    loaded = {node.id for node in ast.walk(bare) if isinstance(node, ast.Name)}
    if loaded & _UNSAFE:
        return None
    lines: list[str] = []
    for node in file.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.names[0].name if isinstance(node, ast.Import) else (node.module or "")
            names = {alias.asname or alias.name.split(".")[0] for alias in node.names}
            if names & loaded and module.split(".")[0] in _SAFE_MODULES and not getattr(node, "level", 0):
                lines.append(ast.unparse(node))
                needed -= names
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            is_short_literal = _is_literal(node.value) and len(ast.unparse(node)) < 2000
            if node.targets[0].id in loaded and is_short_literal:
                lines.append(ast.unparse(node))
                needed.discard(node.targets[0].id)
    needed -= {function.name} | _SAFE_BUILTINS
    return "\n".join(["from __future__ import annotations", *lines]) if not needed else None


def imports_of(function: FunctionNode, file: ast.Module) -> list[str] | None:
    """What a function imports through its file.

    Args:
        function: A function of the module's top level.
        file: Its file.

    Returns:
        Imports of the standard library; None if the function needs anything else.
    """
    text = ast.unparse(function)
    needed = set(use_of_names(text).unbound) - {function.name} - _SAFE_BUILTINS
    lines: list[str] = []
    for node in file.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0):
            continue
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            if name in needed and module.split(".")[0] in sys.stdlib_module_names:
                single = ast.ImportFrom(module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
                lines.append(ast.unparse(single))
                needed.discard(name)
    return None if needed else lines


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def find_evidence(
    setting: str, right: str, wrong: str, function: FunctionNode, rng: random.Random, most: int = 3
) -> list[Evidence]:
    """Calls for which two versions of a function differ.

    Args:
        setting: What both need.
        right: The function as it should be.
        wrong: The broken one.
        function: The right one's tree.
        rng: Chooses arguments.
        most: How many calls are wanted.

    Returns:
        The calls; none if no difference was seen in time.
    """
    calls = list(dict.fromkeys([*_documented(function), *_made_up(function, rng)]))
    results = _in_child(setting, (right, wrong), calls)
    found: list[Evidence] = []
    for call, pair in zip(calls, results, strict=False):
        expected, other = pair
        if not expected.startswith("=") or other == expected or len(expected) > _MOST_SHOWN or " at 0x" in expected:
            continue
        if expected == "=None" or len(other) > _MOST_SHOWN + 40 or " at 0x" in other:
            continue
        got = other[1:] if other.startswith("=") else ""
        found.append(Evidence(call, expected[1:], got, "" if got else other[1:]))
        if len(found) == most:
            break
    return found


def _documented(function: FunctionNode) -> Iterator[str]:
    try:
        examples = doctest.DocTestParser().get_examples(docstring_of(function))
    except ValueError:
        return
    for example in examples:
        source = example.source.strip()
        if source.startswith(f"{function.name}(") and "\n" not in source and len(source) < 80:
            yield source


def _made_up(function: FunctionNode, rng: random.Random) -> Iterator[str]:
    arguments = function.args
    required = [*arguments.posonlyargs, *arguments.args]
    required = required[: len(required) - len(arguments.defaults)] or required[:1]
    if not 1 <= len(required) <= 3 or any(default is None for default in arguments.kw_defaults):
        return
    pools = [_pool(one) for one in required]
    combinations = list(product(*pools))
    rng.shuffle(combinations)
    for values in combinations[:40]:
        yield f"{function.name}({', '.join(values)})"


def _pool(argument: ast.arg) -> Sequence[str]:
    said = ast.unparse(argument.annotation).lower() if argument.annotation else ""
    for names, pool in _POOLS:
        if argument.arg.lower() in names or any(said.startswith(name) for name in names if len(name) > 2):
            return pool
    for names, pool in _POOLS:
        if any(argument.arg.lower().endswith(name) for name in names if len(name) > 2):
            return pool
    return (*_NUMBERS[:4], *_TEXTS[:4], *_LISTS[:4], *_DICTS[:2], *_OTHERS)


def _in_child(setting: str, versions: tuple[str, str], calls: Sequence[str]) -> list[tuple[str, str]]:
    """`=repr` or `!error` of every call on both versions, as far as the child came."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            import resource  # not on Windows, where none of this runs

            warnings.simplefilter("ignore")
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
            spaces = [_space(setting, version) for version in versions]
            for call in calls:
                line = json.dumps([_outcome(space, call) for space in spaces]) + "\n"
                os.write(writer, line.encode())
        finally:
            os._exit(0)
    os.close(writer)
    data = _read_until(reader, _TIME_LIMIT_S)
    os.close(reader)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return [tuple(json.loads(line)) for line in data.split(b"\n")[:-1]]


def _read_until(reader: int, limit_s: float) -> bytes:
    data = b""
    while select.select([reader], [], [], limit_s)[0]:
        piece = os.read(reader, 65536)
        if not piece:
            break
        data += piece
    return data


def _space(setting: str, version: str) -> dict[str, object]:
    space: dict[str, object] = {"__name__": "example"}
    exec(setting, space)
    exec(version, space)
    return space


def _outcome(space: dict[str, object], call: str) -> str:
    try:
        value = eval(call, space)
        if hasattr(value, "__next__"):
            value = list(value)
        return f"={value!r}"[:500]
    except Exception as error:  # whatever the code raises is what is asked for
        return f"!{type(error).__name__}: {error}"[:200]
