"""Text of a definition that can be changed at the places of its syntax tree; everything else stays as written."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Splice:
    """One replacement: bytes `start` to `end` of the text become `new`."""

    start: int
    end: int
    new: str


@dataclass(frozen=True, slots=True)
class Change:
    """One way to make code worse, and how a user and a plan would ask for the way back.

    Args:
        kind: Its name in the report.
        splices: What is changed.
        precise: Wordings that name the code to write.
        symptom: Wordings that say what goes wrong, and where.
        vague: Wordings that need the rest of the code to be understood.
        korean: Wordings in Korean.
        plan: The steps back.
        is_fault: Whether the worse code does something wrong; else it is right and could be better, or lacks something.
        needs_docs: Whether only a description of what the function does determines the way back.
    """

    kind: str
    splices: tuple[Splice, ...]
    precise: tuple[str, ...]
    plan: tuple[str, ...]
    symptom: tuple[str, ...] = ()
    vague: tuple[str, ...] = ()
    korean: tuple[str, ...] = ()
    is_fault: bool = True
    needs_docs: bool = field(default=False)


class Code:
    """A text and its tree.

    Args:
        text: Python that parses.

    Raises:
        SyntaxError: It does not.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self.bytes = text.encode()
        self._starts = [0]
        for line in self.bytes.split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Bytes of a node with a place."""
        start = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def source(self, node: ast.AST) -> str:
        """A node as it is written."""
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def short(self, node: ast.AST, most: int = 60) -> str:
        """A node in one line, empty if that is too long to be quoted."""
        text = self.source(node)
        return text if "\n" not in text and len(text) <= most else ""

    def between(self, left: ast.AST, right: ast.AST) -> tuple[int, int, str]:
        """What stands between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        return start, end, self.bytes[start:end].decode()

    def lines_of(self, first: ast.AST, last: ast.AST) -> tuple[int, int]:
        """Bytes of the whole lines of some statements; of a function or class with its decorators."""
        decorators = getattr(first, "decorator_list", [])
        lineno = min([first.lineno, *(decorator.lineno for decorator in decorators)])  # type: ignore[attr-defined]
        return self._starts[lineno - 1], self._starts[last.end_lineno]  # type: ignore[attr-defined]

    def lines_of_decorator(self, node: ast.expr) -> tuple[int, int]:
        """Bytes of the whole lines of a decorator."""
        return self._starts[node.lineno - 1], self._starts[node.end_lineno or node.lineno]

    def owns_lines(self, first: ast.AST, last: ast.AST) -> bool:
        """Whether some statements share no line with others."""
        start, end = self.lines_of(first, last)
        before = self.bytes[start : self.span(first)[0]].strip() if not getattr(first, "decorator_list", []) else b""
        after = self.bytes[self.span(last)[1] : end].strip()
        return not before and (not after or after.startswith(b"#"))

    def indent_of(self, node: ast.stmt) -> str:
        """The whitespace before a statement."""
        return " " * node.col_offset

    def replace(self, node: ast.AST, new: str) -> Splice:
        """A node becomes other text."""
        return Splice(*self.span(node), new)

    def drop_lines(self, first: ast.stmt, last: ast.stmt, block: Sequence[ast.stmt]) -> Splice:
        """Whole statements go; a block that would be empty gets `pass`."""
        start, end = self.lines_of(first, last)
        is_all = first is block[0] and last is block[-1]
        return Splice(start, end, f"{self.indent_of(first)}pass\n" if is_all else "")

    def move_lines(self, first: ast.stmt, last: ast.stmt, columns: int) -> str:
        """Whole lines of statements, shifted; empty if a string of several lines would be changed."""
        start, end = self.lines_of(first, last)
        if any(self._is_long_string(node) for node in self.nodes_between(first, last)):
            return ""
        moved: list[str] = []
        for line in self.bytes[start:end].decode().splitlines():
            if columns < 0 and line.strip() and line[:-columns].strip():
                return ""
            moved.append((" " * columns + line if columns > 0 else line[-columns:]) if line.strip() else "")
        return "".join(f"{line}\n" for line in moved)

    def nodes_between(self, first: ast.stmt, last: ast.stmt) -> Iterator[ast.AST]:
        """Every node that begins in the lines of some statements."""
        for node in ast.walk(self.tree):
            if getattr(node, "lineno", 0) >= first.lineno and (getattr(node, "end_lineno", 0) or 0) <= (
                last.end_lineno or 0
            ):
                yield node

    def applied(self, splices: Sequence[Splice]) -> str:
        """The text after some replacements, which must not overlap."""
        data = self.bytes
        for splice in sorted(splices, key=lambda splice: splice.start, reverse=True):
            data = data[: splice.start] + splice.new.encode() + data[splice.end :]
        return data.decode()

    def blocks(self, node: ast.AST) -> Iterator[list[ast.stmt]]:
        """Every list of statements below a node, not those of functions and classes within it."""
        for name in ("body", "orelse", "finalbody"):
            block: list[ast.stmt] = [] if isinstance(node, ast.expr) else getattr(node, name, [])  # a lambda's is one
            if block:
                yield block
                for statement in block:
                    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                        yield from self.blocks(statement)
        for handler in getattr(node, "handlers", []):
            yield from self.blocks(handler)

    def statement_of(self, node: ast.AST) -> ast.stmt:
        """The innermost statement that holds an expression."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _is_long_string(self, node: ast.AST) -> bool:
        is_string = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        return is_string and node.lineno != node.end_lineno  # type: ignore[attr-defined]


def own_nodes(function: FunctionNode) -> Iterator[ast.AST]:
    """Every node of a function's body, docstring and nested definitions left out.

    Args:
        function: The function.

    Yields:
        The nodes.
    """
    waiting: list[ast.AST] = list(reversed(body_of(function)))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.JoinedStr)):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def body_of(function: FunctionNode) -> list[ast.stmt]:
    """The statements of a function below its docstring.

    Args:
        function: The function.

    Returns:
        The statements.
    """
    return function.body[1:] if has_docstring(function) else function.body


def has_docstring(node: ast.AST) -> bool:
    """Whether a definition begins with a docstring.

    Args:
        node: A function or class.

    Returns:
        True if it does.
    """
    first = node.body[0]  # type: ignore[attr-defined]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def docstring_of(node: FunctionNode | ast.ClassDef) -> str:
    """A definition's docstring.

    Args:
        node: The definition.

    Returns:
        The cleaned text, or nothing.
    """
    return ast.get_docstring(node) or ""


def parameters(function: FunctionNode) -> list[str]:
    """Names of a function's parameters, `self` and `cls` left out.

    Args:
        function: The function.

    Returns:
        The names, in order.
    """
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]
