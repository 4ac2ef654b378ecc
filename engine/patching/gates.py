"""The proof of a patch: no edit is offered unless every gate passed.

    fresh    the text is the one that the edits were made for
    schema   the edits are a valid list
    anchors  each edit's place is found by its text
    ast      the result parses and compiles
    libcst   a second parser reads it too, and gives the same program back
    scope    nothing outside the selected scope changed, except declared imports; the scope is still there
    names    no name that was defined becomes undefined
    change   something besides whitespace changed
    layout   byte-order mark, newlines, indentation characters and encoding are kept

Not covered: what the code does when it runs, and whether a declared import can be found at run time.
"""

from __future__ import annotations

import ast
import io
import json
import re
import threading
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from engine.patching.edits import (
    AnchorError,
    Edit,
    SchemaFault,
    apply_edits,
    edits_from_json,
    line_range,
    new_lines,
    ordered,
    resolve_anchors,
)
from engine.patching.names import (
    BUILTIN_NAMES,
    ImportedName,
    import_edit,
    imported_names,
    missing_stdlib_imports,
    module_imports,
    newly_missing_attributes,
    newly_undefined,
    suggest_imports,
    use_of_names,
)
from engine.patching.scopes import (
    DefinitionNode,
    ParseFault,
    Scope,
    compile_fault,
    definitions,
    find_definition,
    is_definition,
    leading_whitespace,
    parse_definition,
    parse_text,
    standalone_text,
)
from engine.patching.source import MAX_SOURCE_BYTES, Source, declares_other_encoding, split_lines

__all__ = ["GateReport", "Verdict", "import_edit", "missing_stdlib_imports", "run_gates", "suggest_imports"]

# libcst recurses in native code: 100 nested blocks need more than the 1 MiB that some threads have.
_LIBCST_STACK_BYTES = 64 * 1024 * 1024
_MAX_TREE_DEPTH = 500
_stack_size_lock = threading.Lock()

# Besides tab, and form feed where the file has some: C0, C1, separators that editors show as line ends, and the marks
# that reorder or hide text.
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Verdict:
    """What one gate found.

    Args:
        gate: Its name.
        ok: Whether the patch passed.
        reason: Why not, in a sentence that a person and a model can act on; "" if it passed.
    """

    gate: str
    ok: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The verdict as an object for programs."""
        return {"gate": self.gate, "ok": self.ok, "reason": self.reason}


@dataclass(frozen=True)
class GateReport:
    """What all gates found.

    Args:
        verdicts: One for each gate that ran; the gates after a failure do not run.
        edits: The edits with their places found, once `anchors` passed.
        repairs: What had to be mended to find them, one sentence each.
        patched: The result; None unless every gate passed.
        changes_program: Whether more than layout, comments and docstrings changed; known once every gate passed.
    """

    verdicts: tuple[Verdict, ...]
    edits: tuple[Edit, ...] = ()
    repairs: tuple[str, ...] = ()
    patched: Source | None = None
    changes_program: bool = False

    @property
    def ok(self) -> bool:
        """Whether every gate passed."""
        return self.patched is not None

    @property
    def refused(self) -> Verdict | None:
        """The verdict of the gate that refused, None if all passed."""
        return next((verdict for verdict in self.verdicts if not verdict.ok), None)

    def to_json(self) -> dict[str, Any]:
        """The report as an object for programs, without the text."""
        return {
            "ok": self.ok,
            "gates": [verdict.to_json() for verdict in self.verdicts],
            "edits": [edit.to_json() for edit in self.edits],
            "repairs": list(self.repairs),
        }


class _Refusal(Exception):
    """A gate's reason to refuse."""


@dataclass
class _Case:
    """What the gates know so far; each adds to it."""

    source: Source
    scope: Scope
    proposed: object
    imports: Sequence[str]
    expected_sha256: str | None
    edits: list[Edit] = field(default_factory=lambda: list[Edit]())
    repairs: list[str] = field(default_factory=lambda: list[str]())
    import_edits: list[Edit] = field(default_factory=lambda: list[Edit]())
    _patched: Source | None = None
    _before_tree: ast.Module | None = None
    _after_tree: ast.Module | None = None

    @property
    def patched(self) -> Source:
        assert self._patched is not None
        return self._patched

    @patched.setter
    def patched(self, patched: Source) -> None:
        self._patched = patched

    @property
    def trees(self) -> tuple[ast.Module, ast.Module]:
        assert self._before_tree is not None and self._after_tree is not None
        return self._before_tree, self._after_tree

    @trees.setter
    def trees(self, trees: tuple[ast.Module, ast.Module]) -> None:
        self._before_tree, self._after_tree = trees

    @property
    def label(self) -> str:
        """The scope in words."""
        return "the module" if self.scope.kind == "module" else f"the {self.scope.kind} `{self.scope.qualname}`"

    @property
    def num_import_lines(self) -> int:
        """Lines that declared imports add; all of them are above the scope."""
        return sum(len(new_lines(edit)) for edit in self.import_edits)

    @property
    def new_range(self) -> tuple[int, int]:
        """First and last line of the scope in the result."""
        num_below = self.source.num_lines - self.scope.end_line
        return self.scope.start_line + self.num_import_lines, self.patched.num_lines - num_below

    def scope_lines(self, *, after: bool) -> tuple[str, ...]:
        """The lines of the scope."""
        if not after:
            return self.source.lines[self.scope.start_line - 1 : self.scope.end_line]
        start_line, end_line = self.new_range
        return self.patched.lines[start_line - 1 : end_line]

    def program(self, *, after: bool) -> str:
        """The text that is judged: the whole file, or the scope alone if the file does not parse."""
        if self.scope.parses:
            return (self.patched if after else self.source).plain_text()
        return standalone_text(self.scope_lines(after=after), self.scope.indent)


def run_gates(
    source: Source,
    scope: Scope,
    edits: object,
    *,
    imports: Sequence[str] = (),
    expected_sha256: str | None = None,
) -> GateReport:
    """Judge a patch.

    Args:
        source: The file as it is now.
        scope: What the user selected, found in `source`.
        edits: A list of `Edit`, or JSON (text or parsed) that should be one.
        imports: Import statements that the patch declares; only these may be added outside the scope, by inserts such
            as `import_edit` makes.
        expected_sha256: Digest of the text that the patch was made for; None if it was made for `source`.

    Returns:
        The verdicts up to the first refusal; `patched` is set if there was none.
    """
    case = _Case(source, scope, edits, imports, expected_sha256)
    verdicts: list[Verdict] = []
    for name, gate in _GATES.items():
        try:
            gate(case)
        except (_Refusal, RecursionError) as error:
            reason = str(error) if isinstance(error, _Refusal) else "The result is nested too deeply to be checked."
            verdicts.append(Verdict(name, False, reason))
            return GateReport(tuple(verdicts), tuple(case.edits), tuple(case.repairs))
        verdicts.append(Verdict(name, True))
    return GateReport(tuple(verdicts), tuple(case.edits), tuple(case.repairs), case.patched, _changes_program(case))


def _fresh(case: _Case) -> None:
    if case.expected_sha256 is not None and case.expected_sha256 != case.source.sha256:
        raise _Refusal(f"{case.source.path} has changed since this patch was made for it; make the patch again.")


def _schema(case: _Case) -> None:
    proposed = case.proposed
    try:
        if isinstance(proposed, (list, tuple)):
            items = cast("Sequence[object]", proposed)
            proposed = [item.to_json() if isinstance(item, Edit) else item for item in items]
        elif isinstance(proposed, str):
            proposed = json.loads(proposed)
        case.edits = edits_from_json(proposed)
    except SchemaFault as fault:
        raise _Refusal(f"The edit list is not valid: {fault}.") from None
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"The edit list is not valid JSON: {error}.") from None


def _anchors(case: _Case) -> None:
    if not 1 <= case.scope.start_line <= case.scope.end_line + 1 <= case.source.num_lines + 1:
        raise _Refusal(f"{case.source.path} has no lines {case.scope.start_line}-{case.scope.end_line}.")
    try:
        edits, case.repairs = resolve_anchors(case.source, case.scope, case.edits)
        case.import_edits = [edit for edit in edits if _is_declared_import(case, edit)]
        # A declared import at the scope's first line belongs above whatever else is inserted there.
        edits = ordered(case.source, [*case.import_edits, *(e for e in edits if e not in case.import_edits)])
        case.edits = edits
        case.patched = apply_edits(case.source, edits)
    except AnchorError as error:
        raise _Refusal(_sentence(str(error))) from None


def _ast(case: _Case) -> None:
    try:
        before = parse_text(case.program(after=False))
    except ParseFault as fault:
        raise _Refusal(f"{_sentence(case.label)[:-1]} did not parse before the patch: {fault}.") from None
    try:
        case.trees = before, parse_text(case.program(after=True))
    except ParseFault as fault:
        raise _Refusal(f"The result does not parse: {_placed(case, fault)}.") from None
    fault = compile_fault(case.program(after=True))
    if fault is not None and compile_fault(case.program(after=False)) is None:
        raise _Refusal(f"The result parses but does not compile: {_placed(case, fault)}.")


def _libcst(case: _Case) -> None:
    before, after = case.trees
    text = case.program(after=True)
    may_stand_alone = case.scope.parses and case.scope.kind != "module"
    if _tree_depth(after) > _MAX_TREE_DEPTH:
        alone = standalone_text(case.scope_lines(after=True), case.scope.indent)
        if not may_stand_alone or _tree_depth(before) <= _MAX_TREE_DEPTH or _depth_of(alone) > _MAX_TREE_DEPTH:
            raise _Refusal(f"The result is nested more than {_MAX_TREE_DEPTH} levels deep; split the expression.")
        text = alone  # what is nested so deeply was there before, elsewhere
    outcome = _read_with_libcst(text)
    if isinstance(outcome, Exception) and may_stand_alone and not _libcst_read_before(case):
        text = standalone_text(case.scope_lines(after=True), case.scope.indent)
        outcome = _read_with_libcst(text)
    if isinstance(outcome, Exception):
        raise _Refusal(f"libcst cannot read the result: {_first_line(outcome)}.")
    if outcome != text:  # libcst moves some form feeds and continuations; the program must be the same
        try:
            same = _same_program(parse_text(text), parse_text(outcome))
        except ParseFault:
            same = False
        if not same:
            raise _Refusal("libcst does not give the result back as it was.")


def _depth_of(text: str) -> int:
    try:
        return _tree_depth(parse_text(text))
    except ParseFault:
        return _MAX_TREE_DEPTH + 1


def _libcst_read_before(case: _Case) -> bool:
    """Whether libcst could read the whole file before the patch."""
    before, _ = case.trees
    text = case.program(after=False)
    return _tree_depth(before) <= _MAX_TREE_DEPTH and not isinstance(_read_with_libcst(text), Exception)


def _scope(case: _Case) -> None:
    _check_edit_places(case)
    _check_outside_bytes(case)
    if not case.scope.parses:
        _check_definition_alone(case)
    elif case.scope.kind == "module":
        before, after = case.trees
        if (before.body and not after.body) or (case.source.lines and not case.patched.lines):
            raise _Refusal("The patch leaves nothing of the module; keep its code.")
    else:
        _check_outside_tree(case)
        _check_imports(case)


def _names(case: _Case) -> None:
    before, after = case.trees
    try:
        names = newly_undefined(case.program(after=False), case.program(after=True))
    except ParseFault:
        names = []  # only where `before` did not compile either: the gate `ast` compares them
    if not case.scope.parses:
        outside = _identifiers_outside(case)
        names = [name for name in names if name not in outside]
    if names:
        known = missing_stdlib_imports(names)
        remedy = "; ".join(f"declare `{statement}`" for statement in known.values())
        raise _Refusal(
            f"After the patch {_quoted(names)} would be undefined; "
            + (f"{remedy}." if len(known) == len(names) else "define it, import it, or use a name that exists.")
        )
    attributes = newly_missing_attributes(before, after)
    if attributes:
        raise _Refusal(
            f"After the patch {_quoted(attributes)} would be undefined, yet `self` still reads it; keep defining it."
        )


def _change(case: _Case) -> None:
    if case.import_edits:
        return
    if not case.edits or _same_but_for_layout(case):
        raise _Refusal(f"The patch changes nothing in {case.label} but whitespace; make the change that was asked for.")


def _layout(case: _Case) -> None:
    _check_text_can_be_stored(case)
    _check_terminators(case)
    _check_indentation(case)


_GATES: dict[str, Callable[[_Case], None]] = {
    "fresh": _fresh,
    "schema": _schema,
    "anchors": _anchors,
    "ast": _ast,
    "libcst": _libcst,
    "scope": _scope,
    "names": _names,
    "change": _change,
    "layout": _layout,
}


def _is_declared_import(case: _Case, edit: Edit) -> bool:
    """Whether an edit only adds declared imports above the scope."""
    if case.scope.kind == "module" or edit.action != "insert" or edit.start_line > case.scope.start_line:
        return False
    names = _names_imported_by(edit)
    return names is not None and set(names) <= _declared(case.imports)


def _names_imported_by(edit: Edit) -> list[ImportedName] | None:
    """What an edit imports; None if it adds anything else, be it a comment."""
    return None if "#" in edit.new else imported_names("\n".join(new_lines(edit)))


def _declared(imports: Sequence[str]) -> set[ImportedName]:
    return {name for statement in imports for name in imported_names(statement.strip()) or ()}


def _check_edit_places(case: _Case) -> None:
    scope = case.scope
    for number, edit in enumerate(case.edits, 1):
        if edit in case.import_edits:
            continue
        if edit.start_line < scope.start_line or max(edit.end_line, edit.start_line - 1) > scope.end_line:
            place = line_range(edit.start_line, edit.end_line)
            raise _Refusal(
                f"Edit {number} changes {place}, outside {case.label} (lines {scope.start_line}-{scope.end_line}); "
                "change only that, and declare imports that it needs."
            )


def _check_outside_bytes(case: _Case) -> None:
    """Compare the lines around the scope with what they were, terminators included."""
    start_line, end_line = case.new_range
    old_pairs = list(zip(case.source.lines, case.source.eols, strict=True))
    new_pairs = list(zip(case.patched.lines, case.patched.eols, strict=True))
    added = _inserted_lines(case)
    above = [pair for number, pair in enumerate(new_pairs[: start_line - 1], 1) if number not in added]
    if above != old_pairs[: case.scope.start_line - 1] or new_pairs[end_line:] != old_pairs[case.scope.end_line :]:
        raise _Refusal(f"Lines outside {case.label} would change; change only its own lines.")


def _inserted_lines(case: _Case) -> set[int]:
    """The lines of the result that declared imports take."""
    added: set[int] = set()
    shift = 0
    for edit in case.edits:
        num_new = len(new_lines(edit))
        if edit in case.import_edits:
            added.update(range(edit.start_line + shift, edit.start_line + shift + num_new))
        shift += num_new - (edit.end_line - edit.start_line + 1)
    return added


def _check_definition_alone(case: _Case) -> None:
    if case.import_edits:
        raise _Refusal(f"{case.source.path} does not parse, so no import can be added to it safely; do without.")
    try:
        parse_definition(case.scope_lines(after=True), case.scope)
    except ParseFault as fault:
        raise _Refusal(f"The result must be {case.label} and nothing else, but it is {fault.message}.") from None


def _check_outside_tree(case: _Case) -> None:
    """Everything but the scope's definition must be the same program."""
    before, after = case.trees
    target = find_definition(before, case.scope)
    if target is None:
        raise _Refusal(f"{_sentence(case.label)[:-1]} is not at line {case.scope.def_line} of {case.source.path}.")
    added = _inserted_lines(case)
    bare = ast.Module([node for node in after.body if node.lineno not in added], after.type_ignores)
    if not _same_program(before, bare, target) or not _stays_in_place(case, after):
        raise _Refusal(
            f"The result must be {case.label} and nothing else: one definition of that name at the same indentation, "
            "no statement before or after it."
        )
    if ast.get_docstring(before, clean=False) != ast.get_docstring(after, clean=False):
        raise _Refusal("The module's docstring would no longer be its first statement; add imports below it.")


def _stays_in_place(case: _Case, after: ast.Module) -> bool:
    """Whether the definition fills its own lines and no others."""
    start_line, end_line = case.new_range
    for qualname, node in definitions(after):
        if qualname == case.scope.qualname and start_line <= node.lineno <= end_line:
            same_indent = leading_whitespace(case.patched.lines[node.lineno - 1]) == case.scope.indent
            return same_indent and (node.end_lineno or node.lineno) <= end_line
    return False


def _check_imports(case: _Case) -> None:
    """Declared imports must not change what the rest of the file means."""
    if not case.import_edits:
        return
    before, _ = case.trees
    present = set(module_imports(before))
    added = {name for edit in case.import_edits for name in _names_imported_by(edit) or ()}
    try:
        taken = use_of_names(case.program(after=False)).module_names
    except ParseFault:
        taken = frozenset(node.id for node in ast.walk(before) if isinstance(node, ast.Name))
    for name in sorted(added - present, key=lambda name: name.binds):
        if name.member == "*" or name.module == "__future__":
            raise _Refusal("Star imports and `from __future__` imports change the whole file; import names one by one.")
        if name.binds in taken:
            raise _Refusal(f"The file already defines `{name.binds}`; importing another would change the rest of it.")
        if name.binds in BUILTIN_NAMES and _used_outside(case, name.binds):
            raise _Refusal(f"Importing `{name.binds}` would replace the builtin that the rest of the file uses.")


def _used_outside(case: _Case, name: str) -> bool:
    before, _ = case.trees
    return any(
        isinstance(node, ast.Name) and node.id == name and not case.scope.contains(node.lineno)
        for node in ast.walk(before)
    )


def _same_program(one: ast.AST, other: ast.AST, target: DefinitionNode | None = None) -> bool:
    """Whether two trees are equal but for positions; below `target` only kind and name count.

    Iterative, because trees may be deeper than the interpreter's recursion limit.
    """
    waiting: list[tuple[object, object]] = [(one, other)]
    while waiting:
        left, right = waiting.pop()
        if target is not None and left is target:
            kind = "class" if isinstance(target, ast.ClassDef) else "function"
            if not isinstance(right, ast.AST) or not is_definition(right, kind, target.name):
                return False
        elif type(left) is not type(right):
            return False
        elif isinstance(left, ast.AST) and isinstance(right, ast.AST):
            waiting += [(getattr(left, name, None), getattr(right, name, None)) for name in left._fields]
        elif isinstance(left, list) and isinstance(right, list):
            items, others = cast("list[object]", left), cast("list[object]", right)
            if len(items) != len(others):
                return False
            waiting += zip(items, others, strict=True)
        elif isinstance(left, (float, complex)):
            if repr(left) != repr(right):  # 0.0 and -0.0 differ, nan does not
                return False
        elif left != right:
            return False
    return True


def _changes_program(case: _Case) -> bool:
    """Whether the trees differ in more than docstrings; they are not needed any more and lose theirs."""
    for tree in case.trees:
        for node in ast.walk(tree):
            has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if has_body and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return not _same_program(*case.trees)


def _tree_depth(tree: ast.AST) -> int:
    depth = 0
    level: list[ast.AST] = [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _read_with_libcst(text: str) -> str | Exception:
    """The text as libcst prints it, or why it cannot read it; on a stack of its own that is large enough."""
    outcome: list[str | Exception] = []

    def read() -> None:
        import libcst

        try:
            outcome.append(libcst.parse_module(text).code)
        except Exception as error:  # whatever it is, libcst cannot read the text
            outcome.append(error)

    with _stack_size_lock:
        previous = threading.stack_size(_LIBCST_STACK_BYTES)
        try:
            reader = threading.Thread(target=read, name="planpatch-libcst")
            reader.start()
        finally:
            threading.stack_size(previous)
    reader.join()
    return outcome[0] if outcome else RuntimeError("its parser stopped")


def _same_but_for_layout(case: _Case) -> bool:
    old_lines, new_lines = case.scope_lines(after=False), case.scope_lines(after=True)
    try:
        return _significant_tokens(old_lines, case.scope.indent) == _significant_tokens(new_lines, case.scope.indent)
    except (tokenize.TokenError, SyntaxError):  # `tokenize` refuses some layouts that the parser takes
        return _same_program(*case.trees) and _comments(old_lines) == _comments(new_lines)


def _significant_tokens(lines: Sequence[str], indent: str) -> list[tuple[int, str]]:
    """The tokens of a definition or module without spaces, line breaks inside statements and blank lines."""
    skipped = (tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
    tokens: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(standalone_text(lines, indent)).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            tokens.append((token.type, ""))
        elif token.type not in skipped:
            tokens.append((token.type, token.string.rstrip() if token.type == tokenize.COMMENT else token.string))
    return tokens


def _comments(lines: Sequence[str]) -> list[str]:
    return [line.partition("#")[2].rstrip() for line in lines if "#" in line]


def _identifiers_outside(case: _Case) -> set[str]:
    lines = case.source.lines[: case.scope.start_line - 1] + case.source.lines[case.scope.end_line :]
    return {word for line in lines for word in re.findall(r"\w+", line)}


def _check_text_can_be_stored(case: _Case) -> None:
    old_text, new_text = case.source.text, case.patched.text
    if _SURROGATE.search(new_text):
        raise _Refusal("The new text holds a lone surrogate, which UTF-8 cannot store; leave it out.")
    if len(case.patched.to_bytes()) > max(MAX_SOURCE_BYTES, len(case.source.to_bytes())):
        raise _Refusal(f"The result would be larger than {MAX_SOURCE_BYTES:,} bytes.")
    if declares_other_encoding(case.patched.lines):
        raise _Refusal("The result declares another encoding than UTF-8; leave the declaration out.")
    known = set(_CONTROL_CHARACTER.findall(old_text))
    for edit in case.edits:
        for line in new_lines(edit):
            for character in _CONTROL_CHARACTER.findall(line):
                if character not in known:
                    raise _Refusal(f"The new text holds the control character U+{ord(character):04X}; write an escape.")


def _check_terminators(case: _Case) -> None:
    source, patched = case.source, case.patched
    if source.bom != patched.bom or (source.lines and patched.lines and source.final_newline != patched.final_newline):
        raise _Refusal("The byte-order mark and the end of the file must stay as they are.")
    allowed = {source.newline, ""} | set(source.eols)
    if any("\r" in line or "\n" in line for line in patched.lines) or not set(patched.eols) <= allowed:
        raise _Refusal("Every line must end as the file's lines do.")
    if "" in patched.eols[:-1]:
        raise _Refusal("Only the last line may lack its newline.")
    if split_lines(patched.text) != (patched.lines, patched.eols):
        raise _Refusal("A line ending in a lone carriage return would run into an empty line; mend the mixed newlines.")


def _check_indentation(case: _Case) -> None:
    """A file indented by spaces alone, or tabs alone, stays so."""
    first_characters = {line[0] for line in case.source.lines if line[:1] in (" ", "\t") and line.strip()}
    uses_tabs = any("\t" in leading_whitespace(line) for line in case.source.lines)
    if not first_characters or (uses_tabs and " " in first_characters):
        return
    kept = {line for line in case.source.lines}
    inside_strings = _string_lines(case)
    for number, line in enumerate(case.patched.lines, 1):
        if line in kept or number in inside_strings or not line.strip():
            continue
        if uses_tabs and line.startswith(" "):
            raise _Refusal("The file is indented with tabs; indent new lines with tabs too.")
        if not uses_tabs and "\t" in leading_whitespace(line):
            raise _Refusal("The file is indented with spaces; indent new lines with spaces too.")


def _string_lines(case: _Case) -> set[int]:
    """Lines of the result that start inside a string."""
    _, after = case.trees
    shift = 0 if case.scope.parses else case.scope.start_line - 1 - (1 if case.scope.indent else 0)
    return {
        line + shift
        for node in ast.walk(after)
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None
        for line in range(node.lineno + 1, node.end_lineno + 1)
    }


def _placed(case: _Case, fault: ParseFault) -> ParseFault:
    """A fault with the line of the file, and that line's text."""
    if fault.line is None:
        return fault
    shift = 0 if case.scope.parses else case.scope.start_line - 1 - (1 if case.scope.indent else 0)
    line = min(max(1, fault.line + shift), max(1, case.patched.num_lines))
    text = case.patched.lines[line - 1].strip()[:80] if case.patched.lines else ""
    return ParseFault(f"{fault.message}, at `{text}`" if text else fault.message, line)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (" and others" if len(names) > 5 else "")
