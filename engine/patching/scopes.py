"""What may be edited: a function, a class or the whole module, found by name or by line.

A file that parses is read with `ast`. A file that does not is scanned by indentation, brackets and quotes, and a
function found there counts only if its own text parses.

Not covered: lambdas, functions made by calls, and definitions that a star import or `exec` brings in.
"""

from __future__ import annotations

import ast
import difflib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engine.errors import SourceError, UnknownScopeError
from engine.patching.source import Source

ScopeKind = Literal["function", "class", "module"]
DefinitionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

MODULE_NAME = "<module>"

_DEFINITION = re.compile(r"([ \t\f]*)(?:async[ \t]+)?(def|class)[ \t]+(\w+)")
_BLANK_OR_COMMENT = re.compile(r"[ \t\f]*(?:#.*)?")
_COMMENT_LINE = re.compile(r"([ \t\f]*)#")
_LEXEME = re.compile(r"#.*|\"\"\"|'''|\"|'|[(\[{]|[)\]}]|\\$")
_OVERLOAD = re.compile(r"[ \t\f]*@[ \t]*(?:\w+\.)*overload\b")
_QUOTE_END = {quote: re.compile(r"(?:[^\\]|\\.)*?" + quote, re.DOTALL) for quote in ('"""', "'''", '"', "'")}

# warnings.catch_warnings swaps process-wide state; two parses at once would leave each other's filters behind.
warnings_lock = threading.Lock()


class ParseFault(ValueError):
    """Python text that does not parse; never leaves engine.patching.

    Args:
        message: What the parser said.
        line: 1-based line of the text, None if unknown.
    """

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class Scope:
    """A part of a file that may be edited.

    Args:
        kind: What it is.
        qualname: `Sorter.sort`, `outer.inner`; `<module>` for the module.
        start_line: First line, decorators included; 1-based.
        def_line: The line of `def` or `class`.
        end_line: Last line, inclusive, comments that trail inside its body included.
        indent: Whitespace before `def` or `class`.
        parses: Whether the whole file parses; if not, only this scope's own text does.
    """

    kind: ScopeKind
    qualname: str
    start_line: int
    def_line: int
    end_line: int
    indent: str
    parses: bool = True

    @property
    def name(self) -> str:
        """The last part of the qualified name."""
        return self.qualname.rpartition(".")[2]

    def contains(self, line: int) -> bool:
        """Whether a 1-based line belongs to the scope."""
        return self.start_line <= line <= self.end_line


@dataclass(frozen=True)
class _Candidate:
    scope: Scope
    is_overload: bool


def find_scope(source: Source, name: str | None = None, line: int | None = None) -> Scope:
    """Find what a name or a cursor means.

    Args:
        source: The file.
        name: Qualified name, or a trailing part of one that is unique; `name@LINE` picks one of several; None for
            whatever holds `line`.
        line: 1-based line; picks among several of one name, or alone the innermost function (else class, else module).

    Returns:
        The scope; the module if both are None.

    Raises:
        UnknownScopeError: No such name or line, or several and `line` does not tell which.
        SourceError: The file does not parse, nor does the scope's own text.
    """
    wanted, wanted_line = _split_name(name)
    try:
        candidates = _candidates(source)
    except ParseFault as fault:
        return _find_in_broken(source, wanted, wanted_line, line, fault)
    return _pick(source, candidates, wanted, wanted_line, line).scope


def list_scopes(source: Source) -> list[Scope]:
    """Every function and class, in the order of the file.

    Args:
        source: The file.

    Returns:
        The scopes; of a file that does not parse, those whose own text does.
    """
    try:
        return [candidate.scope for candidate in _candidates(source)]
    except ParseFault:
        scopes = [candidate.scope for candidate in _scan(source, trust_strings=True)]
        return [scope for scope in scopes if _own_fault(source, scope) is None]


def module_scope(source: Source, *, parses: bool = True) -> Scope:
    """The whole file as a scope.

    Args:
        source: The file.
        parses: Whether it parses.

    Returns:
        The scope; `end_line` is 0 for an empty file.
    """
    return Scope("module", MODULE_NAME, 1, 1, source.num_lines, "", parses)


def parse_text(text: str) -> ast.Module:
    """Parse Python text of any origin.

    Args:
        text: The text.

    Returns:
        The tree.

    Raises:
        ParseFault: It does not parse, or is nested too deeply for the parser.
    """
    with warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except SyntaxError as error:
            raise ParseFault(error.msg, error.lineno) from None
        except (RecursionError, MemoryError):
            raise ParseFault("nested too deeply for the parser", None) from None
        except ValueError as error:  # NUL characters, lone surrogates
            raise ParseFault(str(error), None) from None


@lru_cache(maxsize=2)
def shared_tree(text: str) -> ast.Module:
    """The same as `parse_text`, made once for the texts that were asked for last: not to be changed.

    Args:
        text: The text.

    Returns:
        The tree.

    Raises:
        ParseFault: It does not parse.
    """
    return parse_text(text)


def compile_fault(text: str) -> ParseFault | None:
    """What the compiler has against text that parses: `return` outside a function, `nonlocal` without a binding.

    Args:
        text: The text; it is compiled, never run.

    Returns:
        The fault, or None.
    """
    with warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<text>", "exec", dont_inherit=True)
        except SyntaxError as error:
            return ParseFault(error.msg, error.lineno)
        except (RecursionError, MemoryError):
            return ParseFault("nested too deeply for the compiler", None)
        except (ValueError, OverflowError) as error:
            return ParseFault(str(error), None)
    return None


def standalone_text(lines: Sequence[str], indent: str) -> str:
    """A definition's lines as text that parses alone.

    An indented definition goes below an `if`: taking its indentation away would change multi-line strings.

    Args:
        lines: The definition's lines.
        indent: Its indentation.

    Returns:
        Text whose line numbers are one too high if `indent` is not empty.
    """
    return ("if 1:\n" if indent else "") + "".join(line + "\n" for line in lines)


def parse_definition(lines: Sequence[str], scope: Scope) -> DefinitionNode:
    """Parse the lines of one function or class on their own.

    Args:
        lines: Decorators to the end of the body.
        scope: Names its kind, name and indentation.

    Returns:
        The definition; line numbers as in `standalone_text`.

    Raises:
        ParseFault: The lines do not parse, or are not exactly one definition of that kind and name; its line counts
            from the first of `lines`.
    """
    shift = 1 if scope.indent else 0
    try:
        body = parse_text(standalone_text(lines, scope.indent)).body
    except ParseFault as fault:
        raise ParseFault(fault.message, None if fault.line is None else max(1, fault.line - shift)) from None
    if shift:
        wrapper = body[0]
        if len(body) != 1 or not isinstance(wrapper, ast.If) or wrapper.orelse:
            raise ParseFault(f"more than the {scope.kind} `{scope.name}` at its indentation", None)
        body = wrapper.body
    node = body[0] if len(body) == 1 else None
    if not is_definition(node, scope.kind, scope.name):
        raise ParseFault(f"not exactly one {scope.kind} `{scope.name}`", None)
    assert isinstance(node, DefinitionNode)
    return node


def is_definition(node: ast.AST | None, kind: ScopeKind, name: str) -> bool:
    """Whether a node defines a function or class of that name.

    Args:
        node: Any node.
        kind: `function` or `class`.
        name: The unqualified name.

    Returns:
        True for `def` and `async def` alike.
    """
    if kind == "class":
        return isinstance(node, ast.ClassDef) and node.name == name
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name


def definitions(tree: ast.Module) -> list[tuple[str, DefinitionNode]]:
    """Every function and class of a tree, with its qualified name.

    Args:
        tree: A module.

    Returns:
        Pairs in the order of the file.
    """
    found: list[tuple[str, DefinitionNode]] = []
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:  # not recursive: a long `elif` chain is a deep tree
        node, prefix = waiting.pop()
        if isinstance(node, DefinitionNode):
            qualname = prefix + node.name
            found.append((qualname, node))
            prefix = qualname + "."
        waiting.extend((child, prefix) for child in _blocks_of(node))
    return sorted(found, key=lambda pair: (pair[1].lineno, pair[1].col_offset))


def find_definition(tree: ast.Module, scope: Scope) -> DefinitionNode | None:
    """The node of a function or class scope.

    Args:
        tree: The parsed file that the scope was found in.
        scope: The scope.

    Returns:
        The node, or None for the module or if there is none.
    """
    for qualname, node in definitions(tree):
        if qualname == scope.qualname and node.lineno == scope.def_line:
            return node
    return None


def indent_width(indent: str) -> int:
    """Column of what follows some whitespace, as Python counts it.

    Args:
        indent: Leading whitespace.

    Returns:
        The column; a form feed starts over, a tab goes to the next multiple of 8.
    """
    return len(indent.rpartition("\f")[2].expandtabs(8))


def leading_whitespace(line: str) -> str:
    """The whitespace a line starts with.

    Args:
        line: One line.

    Returns:
        Spaces, tabs and form feeds only.
    """
    return line[: len(line) - len(line.lstrip(" \t\f"))]


def _blocks_of(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield child


def _split_name(name: str | None) -> tuple[str | None, int | None]:
    if name is None:
        return None, None
    plain, at, line = name.strip().replace(".<locals>", "").rpartition("@")
    if at and line.isdecimal():
        return plain, int(line)
    return name.strip().replace(".<locals>", ""), None


@lru_cache(maxsize=4)
def _candidates(source: Source) -> tuple[_Candidate, ...]:
    return tuple(_candidates_of_tree(source, shared_tree(source.plain_text())))


def _candidates_of_tree(source: Source, tree: ast.Module) -> list[_Candidate]:
    return [_candidate_of_node(source, qualname, node) for qualname, node in definitions(tree)]


def _candidate_of_node(source: Source, qualname: str, node: DefinitionNode) -> _Candidate:
    indent = leading_whitespace(source.lines[node.lineno - 1])
    start_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    end_line = _with_trailing_comments(source.lines, node.end_lineno or node.lineno, indent)
    kind: ScopeKind = "class" if isinstance(node, ast.ClassDef) else "function"
    scope = Scope(kind, qualname, start_line, node.lineno, end_line, indent)
    return _Candidate(scope, any(_is_overload(decorator) for decorator in node.decorator_list))


def _is_overload(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Attribute):
        return decorator.attr == "overload"
    return isinstance(decorator, ast.Name) and decorator.id == "overload"


def _with_trailing_comments(lines: Sequence[str], end_line: int, indent: str) -> int:
    """`end_line`, moved over following comments that are indented deeper than the definition."""
    line_number = end_line
    for line in lines[end_line:]:
        line_number += 1
        comment = _COMMENT_LINE.match(line)
        if comment and indent_width(comment.group(1)) > indent_width(indent):
            end_line = line_number
        elif line.strip(" \t\f"):
            break
    return end_line


def _pick(
    source: Source, candidates: Sequence[_Candidate], name: str | None, name_line: int | None, line: int | None
) -> _Candidate:
    if name is None or name == MODULE_NAME:
        return _pick_by_line(source, candidates, None if name == MODULE_NAME else line)
    named = [candidate for candidate in candidates if candidate.scope.qualname == name]
    named = named or [candidate for candidate in candidates if candidate.scope.qualname.endswith("." + name)]
    if not named:
        raise _unknown(source, name, candidates)
    if name_line is not None:
        named = [candidate for candidate in named if candidate.scope.contains(name_line)]
        if not named:
            raise _unknown(source, f"{name}@{name_line}", candidates)
        line = name_line
    if len(named) > 1 and line is not None:
        named = _innermost([candidate for candidate in named if candidate.scope.contains(line)]) or named
    if len(named) > 1:
        named = _implementations(named)
    if len(named) > 1:
        raise _ambiguous(source, name, named)
    return named[0]


def _pick_by_line(source: Source, candidates: Sequence[_Candidate], line: int | None) -> _Candidate:
    if line is None:
        return _Candidate(module_scope(source), False)
    if not 1 <= line <= source.num_lines + 1:
        raise UnknownScopeError(
            f"{source.path} has {source.num_lines} lines; there is no line {line}.",
            hint=f"Give a line from 1 to {source.num_lines}.",
            path=source.path,
        )
    around = [candidate for candidate in candidates if candidate.scope.contains(line)]
    functions = [candidate for candidate in around if candidate.scope.kind == "function"]
    chosen = _innermost(functions or around)
    return chosen[0] if chosen else _Candidate(module_scope(source), False)


def _innermost(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [max(candidates, key=lambda candidate: candidate.scope.start_line)] if candidates else []


def _implementations(named: Sequence[_Candidate]) -> list[_Candidate]:
    """Without typing's overload stubs, if something else is left."""
    return [candidate for candidate in named if not candidate.is_overload] or list(named)


def _unknown(source: Source, name: str, candidates: Sequence[_Candidate]) -> UnknownScopeError:
    names = list(dict.fromkeys(candidate.scope.qualname for candidate in candidates))
    nearest = _nearest(name.partition("@")[0], names)
    if nearest:
        hint = f"Nearest: {', '.join(nearest)}."
    elif names:
        hint = f"It has: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}."
    else:
        hint = "It has no functions or classes; only the file as a whole can be edited (--module)."
    if "@" in name:
        lines = [f"{c.scope.qualname}@{c.scope.def_line}" for c in candidates if c.scope.qualname in nearest]
        hint = f"Nearest: {', '.join(lines)}." if lines else hint
    return UnknownScopeError(
        f"{source.path} has no function or class `{name}`.", hint=hint, path=source.path, name=name, nearest=nearest
    )


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    by_last_part = {qualname: qualname.rpartition(".")[2] for qualname in names}
    last = name.rpartition(".")[2]

    def likeness(qualname: str) -> float:
        pairs = ((name.lower(), qualname.lower()), (last.lower(), by_last_part[qualname].lower()))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    scored = sorted(((likeness(qualname), qualname) for qualname in names[:2000]), key=lambda pair: -pair[0])
    return [qualname for score, qualname in scored[:5] if score >= 0.6]


def _ambiguous(source: Source, name: str, named: Sequence[_Candidate]) -> UnknownScopeError:
    places = [f"{candidate.scope.qualname}@{candidate.scope.def_line}" for candidate in named]
    return UnknownScopeError(
        f"{source.path} has {len(named)} definitions that `{name}` could mean: {', '.join(places)}.",
        hint=f"Say which one by its line, for instance `{places[0]}`.",
        path=source.path,
        name=name,
        candidates=places,
    )


def _find_in_broken(
    source: Source, name: str | None, name_line: int | None, line: int | None, whole_fault: ParseFault
) -> Scope:
    """The scope in a file that does not parse: quotes are believed at first, then mistrusted."""
    first_error: SourceError | UnknownScopeError | None = None
    for trust_strings in (True, False):
        try:
            scope = _pick(source, _scan(source, trust_strings=trust_strings), name, name_line, line).scope
        except UnknownScopeError as error:
            first_error = first_error or error
            continue
        fault = whole_fault if scope.kind == "module" else _own_fault(source, scope)
        if fault is None:
            return scope
        first_error = first_error or _does_not_parse(source, scope, fault)
    assert first_error is not None
    if isinstance(first_error, UnknownScopeError):
        first_error.hint += f" The file does not parse: {whole_fault}."
    raise first_error


def _own_fault(source: Source, scope: Scope) -> ParseFault | None:
    """What the parser has against the scope's own text, with the file's line numbers."""
    try:
        parse_definition(source.lines[scope.start_line - 1 : scope.end_line], scope)
    except ParseFault as fault:
        return ParseFault(fault.message, scope.start_line - 1 + (fault.line or scope.def_line - scope.start_line + 1))
    return None


def _does_not_parse(source: Source, scope: Scope, fault: ParseFault) -> SourceError:
    what = f"{source.path}" if scope.kind == "module" else f"`{scope.qualname}` in {source.path}"
    return SourceError(
        f"{what} does not parse: {fault}.",
        hint="Mend the syntax error, or name a function whose own text parses.",
        path=source.path,
        line=fault.line,
    )


@dataclass(frozen=True)
class _LogicalLine:
    start_line: int
    end_line: int
    indent: str
    text: str  # of its first physical line


def _scan(source: Source, *, trust_strings: bool) -> list[_Candidate]:
    """Definitions by indentation alone, whether or not they parse."""
    candidates: list[_Candidate] = []
    logical_lines = _logical_lines(source.lines, trust_strings=trust_strings)
    prefixes: list[tuple[int, str]] = []  # column and qualified name of the definitions around this line
    for index, logical in enumerate(logical_lines):
        width = indent_width(logical.indent)
        while prefixes and prefixes[-1][0] >= width:
            prefixes.pop()
        match = _DEFINITION.match(logical.text)
        if match is None:
            continue
        qualname = f"{prefixes[-1][1]}.{match.group(3)}" if prefixes else match.group(3)
        prefixes.append((width, qualname))
        start_line = _first_decorator(logical_lines, index)
        end_line = _with_trailing_comments(source.lines, _block_end(logical_lines, index), logical.indent)
        kind: ScopeKind = "class" if match.group(2) == "class" else "function"
        scope = Scope(kind, qualname, start_line, logical.start_line, end_line, logical.indent, parses=False)
        decorators = source.lines[start_line - 1 : logical.start_line - 1]
        candidates.append(_Candidate(scope, any(_OVERLOAD.match(line) for line in decorators)))
    return candidates


def _first_decorator(logical_lines: Sequence[_LogicalLine], index: int) -> int:
    first = logical_lines[index]
    for logical in reversed(logical_lines[:index]):
        if not logical.text.lstrip(" \t\f").startswith("@") or logical.indent != first.indent:
            break
        first = logical
    return first.start_line


def _block_end(logical_lines: Sequence[_LogicalLine], index: int) -> int:
    width = indent_width(logical_lines[index].indent)
    end_line = logical_lines[index].end_line
    for logical in logical_lines[index + 1 :]:
        if indent_width(logical.indent) <= width:
            break
        end_line = logical.end_line
    return end_line


def _logical_lines(lines: Sequence[str], *, trust_strings: bool) -> list[_LogicalLine]:
    """Statements as groups of lines; blank and comment lines between them left out.

    A line that starts a definition ends any bracket still open, and any string unless `trust_strings`. A string that
    is never closed counts as closed at the end of its line.
    """
    found: list[_LogicalLine] = []
    state = _LexState()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        definition = _DEFINITION.match(line) is not None
        if state.is_open and definition and (not state.quote or not trust_strings):
            state = _LexState()
        if not state.is_open:
            if _BLANK_OR_COMMENT.fullmatch(line):
                continue
            found.append(_LogicalLine(number, number, leading_whitespace(line), line))
        elif found:
            found[-1] = _LogicalLine(found[-1].start_line, number, found[-1].indent, found[-1].text)
        state.read(line, number)
        if number == len(lines) and len(state.quote) == 3:
            number = state.quote_line
            found = [logical for logical in found if logical.start_line <= number]
            found[-1] = _LogicalLine(found[-1].start_line, number, found[-1].indent, found[-1].text)
            state = _LexState()
    return found


@dataclass
class _LexState:
    """Where a line leaves the reader: inside a string, inside brackets, or after a backslash."""

    quote: str = ""
    quote_line: int = 0
    depth: int = 0
    continued: bool = False

    @property
    def is_open(self) -> bool:
        return bool(self.quote) or self.depth > 0 or self.continued

    def read(self, line: str, number: int) -> None:
        self.continued = False
        position = 0
        while True:
            if self.quote:
                end = _QUOTE_END[self.quote].match(line, position)
                if end is None:
                    if len(self.quote) == 1 and not line.endswith("\\"):
                        self.quote = ""
                    return
                self.quote = ""
                position = end.end()
            lexeme = _LEXEME.search(line, position)
            if lexeme is None:
                return
            position = lexeme.end()
            self._take(lexeme.group(), number)

    def _take(self, lexeme: str, number: int) -> None:
        if lexeme[0] in "\"'":
            self.quote, self.quote_line = lexeme, number
        elif lexeme in "([{":
            self.depth += 1
        elif lexeme in ")]}":
            self.depth = max(0, self.depth - 1)
        elif lexeme == "\\":
            self.continued = True
