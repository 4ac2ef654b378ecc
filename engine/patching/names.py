"""Which names a file binds and which it uses without binding, and the imports that would bind them.

Not covered: names bound by `exec`, `globals()` or another module, and whether a bound name already has a value where it
is used.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.patching.edits import Edit
from engine.patching.scopes import (
    DefinitionNode,
    ParseFault,
    Scope,
    definitions,
    parse_text,
    shared_tree,
    standalone_text,
    warnings_lock,
)
from engine.patching.source import Source

# fmt: off
_IMPLICIT_NAMES = frozenset((
    "__file__", "__name__", "__doc__", "__path__", "__package__", "__spec__", "__loader__", "__builtins__",
    "__annotations__", "__class__", "__module__", "__qualname__", "__dict__", "WindowsError", "reveal_type",
))
BUILTIN_NAMES = frozenset(dir(builtins)) | _IMPLICIT_NAMES

# Modules whose names are also common variable names (string, code, queue, copy …) are left out on purpose.
_IMPORTABLE_MODULES = frozenset((
    "abc", "argparse", "ast", "asyncio", "base64", "bisect", "collections", "contextlib", "csv", "ctypes",
    "dataclasses", "decimal", "difflib", "enum", "fractions", "functools", "gc", "getpass", "glob", "gzip",
    "hashlib", "heapq", "hmac", "importlib", "inspect", "io", "itertools", "json", "keyword", "locale",
    "logging", "math", "mimetypes", "multiprocessing", "operator", "os", "pathlib", "pickle", "pkgutil",
    "platform", "pprint", "random", "re", "secrets", "shlex", "shutil", "socket", "sqlite3", "statistics",
    "struct", "subprocess", "sys", "sysconfig", "tempfile", "textwrap", "threading", "time", "timeit",
    "tokenize", "traceback", "types", "typing", "unicodedata", "unittest", "urllib", "uuid", "warnings",
    "weakref", "zipfile", "zlib",
))
_IMPORTABLE_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "typing": (
        "Any", "Annotated", "ClassVar", "Dict", "Final", "FrozenSet", "Generic", "List", "Literal",
        "NamedTuple", "NoReturn", "Optional", "Protocol", "Set", "Tuple", "Type", "TypeVar", "TypedDict",
        "Union", "cast", "overload",
    ),
    "collections": ("ChainMap", "Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"),
    "collections.abc": (
        "AsyncIterable", "AsyncIterator", "Awaitable", "Callable", "Collection", "Container", "Coroutine",
        "Generator", "Hashable", "Iterable", "Iterator", "Mapping", "MutableMapping", "MutableSequence",
        "MutableSet", "Sequence", "Sized",
    ),
    "functools": ("cached_property", "lru_cache", "partial", "reduce", "singledispatch", "total_ordering", "wraps"),
    "itertools": (
        "accumulate", "chain", "combinations", "combinations_with_replacement", "groupby", "islice",
        "permutations", "product", "starmap", "takewhile", "dropwhile", "zip_longest",
    ),
    "dataclasses": ("dataclass",),
    "enum": ("Enum", "Flag", "IntEnum", "IntFlag"),
    "abc": ("ABC", "abstractmethod"),
    "contextlib": ("contextmanager", "suppress", "ExitStack", "nullcontext", "asynccontextmanager"),
    "pathlib": ("Path", "PurePath", "PurePosixPath"),
    "datetime": ("timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "math": ("ceil", "factorial", "floor", "gcd", "isclose", "sqrt"),
    "copy": ("deepcopy",),
    "heapq": ("heapify", "heappop", "heappush", "heapreplace", "nlargest", "nsmallest"),
    "bisect": ("bisect_left", "bisect_right", "insort"),
    "string": ("ascii_letters", "ascii_lowercase", "ascii_uppercase"),
    "io": ("BytesIO", "StringIO"),
}
# fmt: on
_NAME_LINE = re.compile(r"#.*coding[:=]|#!")


@dataclass(frozen=True)
class ImportedName:
    """One name of an import statement; `import a, b` has two.

    Args:
        module: The module, "" for `from . import x`.
        level: Leading dots.
        member: What is imported from the module; None for `import module`.
        alias: The name after `as`, None without.
    """

    module: str
    level: int
    member: str | None
    alias: str | None

    @property
    def binds(self) -> str:
        """The name that the import defines."""
        return self.alias or self.member or self.module.partition(".")[0]


@dataclass(frozen=True)
class NameUse:
    """What a text binds and uses at module level.

    Args:
        module_names: Names bound at module level.
        all_names: Names bound in any scope.
        unbound: Names that are looked up at module level and not bound there, builtins left out.
        star_import: Whether a star import may bind more.
    """

    module_names: frozenset[str]
    all_names: frozenset[str]
    unbound: frozenset[str]
    star_import: bool


@lru_cache(maxsize=8)
def use_of_names(text: str) -> NameUse:
    """Resolve the names of a text that parses.

    Method: the interpreter's own `symtable`; names in annotations, which `from __future__ import annotations` hides
    from it, count as used if nothing in the text binds them.

    Args:
        text: A whole module.

    Returns:
        The names.

    Raises:
        ParseFault: The text does not parse or its scopes are inconsistent.
    """
    tree = shared_tree(text)
    table = _symbol_table(text)
    module_names: set[str] = set()
    all_names: set[str] = set()
    used = _exported_names(tree)
    for scope in _all_tables(table):
        at_top = scope is table
        for symbol in _symbols(scope):
            name = symbol.get_name()
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace() or symbol.is_parameter():
                all_names.add(name)
                if at_top or symbol.is_declared_global():
                    module_names.add(name)
            elif at_top and symbol.is_annotated():
                module_names.add(name)
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                used.add(name)
    used |= _annotation_names(tree) - all_names
    star_import = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
    unbound = used - module_names - BUILTIN_NAMES
    return NameUse(frozenset(module_names), frozenset(all_names), frozenset(unbound), star_import)


def _symbols(table: symtable.SymbolTable) -> list[symtable.Symbol]:
    """A table's symbols; `get_symbols` looks through all children for each, which many functions make slow."""
    flags: dict[str, int] | None = getattr(getattr(table, "_table", None), "symbols", None)
    if flags is None:
        return list(table.get_symbols())
    children: dict[str, list[symtable.SymbolTable]] = {}
    for child in table.get_children():
        children.setdefault(child.get_name(), []).append(child)
    is_module = table.get_type() == "module"
    return [symtable.Symbol(name, flags[name], children.get(name, []), module_scope=is_module) for name in flags]


def newly_undefined(before: str, after: str) -> list[str]:
    """Names that a change leaves without a definition.

    Args:
        before: The whole module before.
        after: The whole module after; it parses.

    Returns:
        Names used at the end and bound nowhere that were bound, or not used, at the start; sorted.

    Raises:
        ParseFault: The scopes of `after` are inconsistent.
    """
    new = use_of_names(after)
    try:
        old = use_of_names(before)
    except ParseFault:  # nothing is known of the start, so only names that it never mentions are new
        return sorted(name for name in new.unbound if not re.search(rf"\b{re.escape(name)}\b", before))
    fresh = new.unbound - old.unbound
    if new.star_import:
        fresh &= old.all_names
    return sorted(fresh)


def newly_missing_attributes(before: ast.Module, after: ast.Module) -> list[str]:
    """Attributes that a class used to give itself, still reads through `self`, and gives itself no more.

    Classes with bases, metaclasses or attribute hooks that the file does not show are left alone.

    Args:
        before: The tree before.
        after: The tree after.

    Returns:
        `Class.attribute`, sorted.
    """
    old, new = _class_attributes(before), _class_attributes(after)
    given_from_outside = {
        node.attr
        for node in ast.walk(after)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not _is_self(node.value)
    }
    missing: list[str] = []
    for qualname, attributes in new.items():
        if qualname in old and attributes.closed and old[qualname].closed:
            lost = (attributes.used - attributes.provided - given_from_outside) & old[qualname].provided
            missing += [f"{qualname}.{name}" for name in lost]
    return sorted(missing)


def imported_names(statement: str) -> list[ImportedName] | None:
    """The names of an import statement.

    Args:
        statement: Text that should be one or more import statements.

    Returns:
        The names, or None if the text is anything else.
    """
    try:
        body = parse_text(statement).body
    except ParseFault:
        return None
    if not body:
        return None
    names: list[ImportedName] = []
    for node in body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            return None
        names += _names_of_import(node)
    return names


def module_imports(tree: ast.Module) -> list[ImportedName]:
    """The names of every import at the top level, inside `if` and `try` too.

    Args:
        tree: A module.

    Returns:
        The names, in no promised order.
    """
    names: list[ImportedName] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names += _names_of_import(node)
        elif not isinstance(node, (DefinitionNode, ast.expr)):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def missing_stdlib_imports(names: Iterable[str], text: str | None = None) -> dict[str, str]:
    """Imports of the standard library that would define some names.

    Args:
        names: Undefined names.
        text: Code that uses them; with it, a module is proposed only if every use is `module.something`.

    Returns:
        For each name that is known, the import statement.
    """
    statements: dict[str, str] = {}
    for name in names:
        if name in _IMPORTABLE_MODULES and name in sys.stdlib_module_names:
            if text is None or not re.search(rf"(?<![\w.]){name}\b(?!\s*\.)", text):
                statements[name] = f"import {name}"
            continue
        for module, members in _IMPORTABLE_MEMBERS.items():
            if name in members:
                statements[name] = f"from {module} import {name}"
                break
    return statements


def suggest_imports(source: Source, scope: Scope, patched: Source) -> list[str]:
    """Imports that a patch forgot to declare, if the standard library has what it uses.

    A name that the scope bound itself before is never proposed: importing it would hide the patch's mistake.

    Args:
        source: The file before.
        scope: The patched scope.
        patched: The file after, without the imports.

    Returns:
        Import statements; none if the file does not parse.
    """
    if not scope.parses or scope.kind == "module":
        return []
    try:
        names = newly_undefined(source.plain_text(), patched.plain_text())
        own_text = standalone_text(source.lines[scope.start_line - 1 : scope.end_line], scope.indent)
        bound_before = _bound_anywhere(parse_text(own_text))
    except ParseFault:
        return []
    last_line = patched.num_lines - (source.num_lines - scope.end_line)
    new_text = patched.plain_text(scope.start_line, last_line)
    return list(missing_stdlib_imports([name for name in names if name not in bound_before], new_text).values())


def import_edit(source: Source, imports: Sequence[str]) -> Edit | None:
    """An edit that adds import statements at the top of the file.

    They go after the last import of the file's head, else after the docstring, else after the comments at the top.

    Args:
        source: The file; it parses.
        imports: Import statements.

    Returns:
        The insert, or None if the file has them all or does not parse.
    """
    try:
        tree = shared_tree(source.plain_text())
    except ParseFault:
        return None
    present = set(module_imports(tree))
    missing = [text.strip() for text in imports if not set(imported_names(text) or ()) <= present]
    if not missing:
        return None
    after_line, is_after_import = _import_place(source, tree)
    lines = list(dict.fromkeys(missing))
    if not is_after_import:
        if after_line and source.lines[after_line - 1].strip():
            lines.insert(0, "")
        if after_line < source.num_lines and source.lines[after_line].strip():
            lines.append("")
    return Edit(source.path, "insert", after_line + 1, after_line, "", source.newline.join(lines))


def _symbol_table(text: str) -> symtable.SymbolTable:
    with warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return symtable.symtable(text, "<text>", "exec")
        except SyntaxError as error:
            raise ParseFault(error.msg, error.lineno) from None
        except (RecursionError, MemoryError):
            raise ParseFault("nested too deeply", None) from None


def _all_tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    waiting = [table]
    while waiting:
        current = waiting.pop()
        yield current
        waiting.extend(current.get_children())


def _exported_names(tree: ast.Module) -> set[str]:
    """The strings of `__all__`."""
    names: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            constants = (child.value for child in ast.walk(node.value) if isinstance(child, ast.Constant))
            names |= {value for value in constants if isinstance(value, str)}
    return names


def _annotation_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        annotation: ast.expr | None = None
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            annotation = node.annotation
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            annotation = node.returns
        if annotation is not None:
            names |= {child.id for child in ast.walk(annotation) if isinstance(child, ast.Name)}
    return names


def _bound_anywhere(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, DefinitionNode):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {name.binds for name in _names_of_import(node)}
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
    return names


def _names_of_import(node: ast.Import | ast.ImportFrom) -> list[ImportedName]:
    if isinstance(node, ast.Import):
        return [ImportedName(alias.name, 0, None, alias.asname) for alias in node.names]
    return [ImportedName(node.module or "", node.level, alias.name, alias.asname) for alias in node.names]


@dataclass(frozen=True)
class _ClassAttributes:
    provided: frozenset[str]
    used: frozenset[str]
    closed: bool  # nothing outside the file can provide more


def _class_attributes(tree: ast.Module) -> dict[str, _ClassAttributes]:
    """By qualified name; names that several classes have are left out."""
    nodes = [(qualname, node) for qualname, node in definitions(tree) if isinstance(node, ast.ClassDef)]
    times = Counter(qualname for qualname, _ in nodes)
    single = {qualname: node for qualname, node in nodes if times[qualname] == 1}
    own = {qualname: _own_attributes(node) for qualname, node in single.items()}
    return {qualname: _with_bases(qualname, single, own, frozenset({qualname})) for qualname in single}


def _with_bases(
    qualname: str, nodes: Mapping[str, ast.ClassDef], own: Mapping[str, _ClassAttributes], seen: frozenset[str]
) -> _ClassAttributes:
    provided, closed = own[qualname].provided, own[qualname].closed
    for base in nodes[qualname].bases:
        name = base.id if isinstance(base, ast.Name) else ""
        if name in nodes and name not in seen:
            inherited = _with_bases(name, nodes, own, seen | {name})
            provided, closed = provided | inherited.provided, closed and inherited.closed
        elif name != "object":
            closed = False
    return _ClassAttributes(provided, own[qualname].used, closed)


def _own_attributes(node: ast.ClassDef) -> _ClassAttributes:
    provided: set[str] = set()
    used: set[str] = set()
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        child = waiting.pop()
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            provided.add(child.name)
            _add_self_attributes(child, provided, used)
        elif isinstance(child, ast.ClassDef):
            provided.add(child.name)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            provided |= {name.binds for name in _names_of_import(child)}
        elif isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            provided.add(child.id)
        else:
            waiting.extend(ast.iter_child_nodes(child))
    hooks = {"__getattr__", "__getattribute__", "__slots__"} & provided
    dynamic = any(isinstance(child, ast.Name) and child.id in ("setattr", "vars") for child in ast.walk(node)) or any(
        isinstance(child, ast.Attribute) and child.attr in ("__dict__", "__setattr__") for child in ast.walk(node)
    )
    return _ClassAttributes(frozenset(provided), frozenset(used), not (hooks or dynamic or node.keywords))


def _add_self_attributes(method: ast.FunctionDef | ast.AsyncFunctionDef, provided: set[str], used: set[str]) -> None:
    parameters = [*method.args.posonlyargs, *method.args.args]
    if not parameters or any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in method.decorator_list):
        return
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == parameters[0].arg:
            (used if isinstance(node.ctx, ast.Load) else provided).add(node.attr)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _import_place(source: Source, tree: ast.Module) -> tuple[int, bool]:
    """The line to insert after, and whether it ends an import."""
    place = 0
    after_import = False
    for index, node in enumerate(tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            after_import = True
        elif index > 0 or ast.get_docstring(tree, clean=False) is None:
            break
        place = node.end_lineno or node.lineno
    if place:
        return place, after_import
    first_code = tree.body[0].lineno if tree.body else source.num_lines + 1
    return _end_of_header(source, first_code), False


def _end_of_header(source: Source, first_code: int) -> int:
    """The last line of the comments at the top: the whole block if a blank line follows, else shebang and cookie."""
    block = 0
    while block < first_code - 1 and source.lines[block].startswith("#"):
        block += 1
    if block < first_code - 1 and not source.lines[block].strip():
        return block
    header = 0
    while header < min(block, 2) and _NAME_LINE.match(source.lines[header]):
        header += 1
    return header
