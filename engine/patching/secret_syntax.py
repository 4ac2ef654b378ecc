"""Secrets that the syntax of Python gives a name: one of several values, a part of a sum, a default, an element.

What a regular expression cannot see: `user, password = "bob", …`, `password = "" if local else …`,
`password = field(default=…)`.

Not covered: values that a call makes, other than the calls below; formatted strings; what a loop or a function assigns.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from engine.patching.secret_values import (
    GENERIC,
    KEYWORD,
    LITERAL,
    MIN_NUMBER_DIGITS,
    PASSWORD,
    is_secret,
    names_hex_key,
)

Span = tuple[int, int, str]

_LITERAL = re.compile(LITERAL, re.DOTALL)
_OPAQUE = re.compile(r"(?=\D*\d)[\w+/=.-]+")  # an element of `tokens`: no expression of a lexer, no name of a layer
_SUFFIX = re.compile(r"\w*")  # `token_2` is a token, `embed_tokens.weight` is none
_SPACE = re.compile(r"(?:\s|\\\n|#[^\n]*\n)*")
_KEEPS_FIRST = {
    "SecretStr",
    "SecretBytes",
    "Secret",
    "Fernet",
    "str",
    "bytes",
    "fromhex",
    "Field",
    "Value",
    "quote",
    "b16decode",
    "b32decode",
    "b64decode",
    "b85decode",
    "urlsafe_b64decode",
}
_GIVES_SECOND = {"get", "getenv", "pop", "setdefault", "getattr"}
_KEEPS_ITSELF = {"encode", "strip", "rstrip", "lstrip", "lower", "upper"}
_NO_PASSWORD = re.compile(r"(?:\A|_)(?:max|min|num|len|count|no|n)_", re.IGNORECASE)
_ENDS_WITH_PASSWORD = re.compile(rf"(?:{PASSWORD})\d?\Z", re.IGNORECASE)


def syntax_of(text: str) -> ast.Module | None:
    """The tree of a text.

    Args:
        text: A file, or a definition, indented or not.

    Returns:
        Its tree, a line further down where the text is indented; None if it is no Python.
    """
    try:
        return ast.parse(f"if 1:\n{text}" if _is_indented(text) else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_config(tree: ast.Module) -> bool:
    """Whether a tree is `name: value` alone, which is YAML as well.

    Args:
        tree: What the text was read as.

    Returns:
        Whether there is nothing but annotations that are names or numbers.
    """
    return bool(tree.body) and all(
        isinstance(one, ast.AnnAssign) and one.value is None and isinstance(one.annotation, (ast.Name, ast.Constant))
        for one in tree.body
    )


def values_by_syntax(text: str, tree: ast.Module) -> Iterator[Span]:
    """The places of secrets that stand behind a name in a tree.

    Args:
        text: Python.
        tree: What `syntax_of` made of it.

    Yields:
        Start, end (exclusive) and kind of each.
    """
    places = _Places(text)
    for node in ast.walk(tree):
        for target, value in _named(node):
            name = _name_of(target)
            keyword = next((one for one in KEYWORD.finditer(name) if _SUFFIX.fullmatch(name, one.end())), None)
            if keyword is None and not names_hex_key(name):
                continue
            is_password = keyword is not None and keyword["password"] is not None
            for parts, is_element in _texts(value):
                if _is_secret(parts, name, is_password=is_password, is_element=is_element):
                    for part in parts:
                        yield from (
                            (start, end, "Password" if is_password else "Named Secret")
                            for start, end in places.of(part)
                        )


def _is_secret(parts: Sequence[ast.Constant], name: str, *, is_password: bool, is_element: bool) -> bool:
    values = [part.value for part in parts]
    if isinstance(values[0], int):
        is_long = len(str(values[0])) >= MIN_NUMBER_DIGITS
        return is_long and not is_element and bool(_ENDS_WITH_PASSWORD.search(name)) and not _NO_PASSWORD.search(name)
    value = "".join(value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values).strip()
    if is_element and (GENERIC.search(value) if is_password else not _OPAQUE.fullmatch(value)):
        return False
    return is_secret(value, name, is_password=is_password, takes_words=not is_element)


# --- what stands for what --------------------------------------------------------------------------------------------


def _named(node: ast.AST) -> Iterator[tuple[ast.AST | str, ast.expr]]:
    """Names and the values that they are given by one node."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _unpacked(target, value)
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.AugAssign(target=target, value=value):
            yield target, value
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case ast.Dict(keys=keys, values=values):
            yield from ((key, value) for key, value in zip(keys, values, strict=True) if key is not None)
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq()], comparators=[right]):
            yield left, right
            yield right, left
        case ast.arguments(posonlyargs=first, args=args, kwonlyargs=named, defaults=defaults, kw_defaults=others):
            names = [*first, *args]
            yield from ((arg.arg, value) for arg, value in zip(names[::-1], defaults[::-1], strict=False))
            yield from ((arg.arg, value) for arg, value in zip(named, others, strict=True) if value is not None)
        case _:
            return


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """`a, b = 1, 2` as two; whole where the two sides do not answer each other."""
    waiting = [(target, value)]
    while waiting:
        target, value = waiting.pop()
        match target, value:
            case (ast.Tuple(elts=names) | ast.List(elts=names), ast.Tuple(elts=values) | ast.List(elts=values)):
                if len(names) == len(values):
                    waiting += zip(names, values, strict=True)
            case _:
                yield target, value


def _name_of(target: ast.AST | str) -> str:
    match target:
        case str(name) | ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name if len(name) <= 120 else ""
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return name if len(name) <= 120 else ""
        case _:
            return ""


def _texts(value: ast.expr) -> Iterator[tuple[list[ast.Constant], bool]]:
    """The constants that an expression may be: those added to each other together; whether it is inside something."""
    waiting: list[tuple[ast.expr, bool]] = [(value, False)]
    while waiting:
        node, is_element = waiting.pop()
        match node:
            case ast.Constant(value=str() | bytes() | int()) if not isinstance(node.value, bool):
                yield [node], is_element
            case ast.IfExp(body=one, orelse=other):
                waiting += [(one, is_element), (other, is_element)]
            case ast.BoolOp(values=values):
                waiting += ((one, is_element) for one in values)
            case ast.BinOp(op=ast.Add()):
                operands = _operands(node)
                constants = [one for one in operands if isinstance(one, ast.Constant)]
                if len(constants) == len(operands) and all(isinstance(one.value, (str, bytes)) for one in constants):
                    yield constants, is_element
                else:
                    waiting += ((one, is_element) for one in operands)
            case ast.Tuple(elts=values) | ast.List(elts=values) | ast.Set(elts=values):
                waiting += ((one, True) for one in values)
            case ast.Dict(values=values):
                waiting += ((one, True) for one in values)
            case ast.NamedExpr(value=inner) | ast.Lambda(body=inner) | ast.Await(value=inner):
                waiting.append((inner, is_element))
            case ast.Call():
                waiting += ((one, is_element) for one in _results(node))
            case _:
                pass


def _operands(node: ast.BinOp) -> list[ast.expr]:
    """What is added up, in order."""
    operands: list[ast.expr] = []
    waiting: list[ast.expr] = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Add):
            waiting += [one.left, one.right]
        else:
            operands.append(one)
    return operands[::-1]


def _results(call: ast.Call) -> Iterator[ast.expr]:
    """Of a call's arguments those that it may give back."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    yield from (one.value for one in call.keywords if one.arg in ("default", "default_factory"))
    if name in _KEEPS_FIRST:
        yield from call.args[:1]
    elif name in _GIVES_SECOND:
        yield from call.args[1:]
    elif name in _KEEPS_ITSELF and isinstance(function, ast.Attribute):
        yield function.value


# --- where it stands -------------------------------------------------------------------------------------------------


def _is_indented(text: str) -> bool:
    return text[:1] in (" ", "\t")


class _Places:
    """From rows and columns of a tree to places in the text.

    Args:
        text: Python.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
        self._lines: dict[int, bytes] = {}
        self._num_rows_before = 1 + _is_indented(text)

    def of(self, node: ast.Constant) -> Iterator[tuple[int, int]]:
        """What stands between the quotes of a literal, for each of its parts; or a number."""
        start = self._place(node.lineno, node.col_offset)
        end = self._place(node.end_lineno or node.lineno, node.end_col_offset or 0)
        if isinstance(node.value, int):
            if self._text[start:end].replace("_", "").isdigit():
                yield start, end
            return
        while (literal := _LITERAL.match(self._text, start, end)) is not None:
            value = literal["value"]
            first = literal.start("value") + len(value) - len(value.lstrip())
            yield first, first + len(value.strip())
            gap = _SPACE.match(self._text, literal.end(), end)
            start = gap.end() if gap is not None else literal.end()

    def _place(self, row: int, column: int) -> int:
        """The place of a column in bytes of UTF-8."""
        index = row - self._num_rows_before
        if index not in self._lines:
            until = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._text)
            self._lines[index] = self._text[self._starts[index] : until].encode("utf-8", "surrogatepass")
        return self._starts[index] + len(self._lines[index][:column].decode("utf-8", "ignore"))
