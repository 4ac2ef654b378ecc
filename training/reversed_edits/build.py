"""Training data made by reversing edits: a real function is the answer, and what was made of it is the question.

    packages ─▶ functions ─▶ not in any reference ─▶ made worse (faults.py, features.py)
        ─▶ intent and plan of the way back ─▶ the product's own prompt ─▶ read and proved as a model's answer ─▶ rows

Questions are built by the functions that ask a model, and every answer is read back and passes every gate. Rows have
the shape of `dataset.py`. The same packages, references and seed give the same rows.

Not covered: whether another way back would be as good; the loss counts one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import PlanPatchError, UsageError
from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer
from engine.patching.context import build_context, prompt_source
from engine.patching.formats import FORMATS
from engine.patching.prompts import PROMPT_VERSION, Task, plan_messages
from engine.patching.proof import Question, prove
from engine.patching.scopes import Scope, find_scope, list_scopes
from engine.patching.source import Source
from training.reversed_edits.code import Change, Code, FunctionNode, docstring_of, has_docstring
from training.reversed_edits.decontaminate import References, read_references
from training.reversed_edits.evidence import Evidence, find_evidence, imports_of, setting_of
from training.reversed_edits.faults import FAULTS
from training.reversed_edits.features import FEATURES, class_docstring, method
from training.reversed_edits.intents import documentation_of, intent_of
from training.reversed_edits.sources import Package, SourceFile, fetch, read_files, read_packages
from training.samples import DEFAULT_FORMAT
from training.similarity import NearIndex, fingerprint

TRAIN_NAME, VAL_NAME, REPORT_NAME = "train.jsonl", "val.jsonl", "report.json"

_MIN_LINES = 4
_MOST_LINES = {"function": 80, "class": 70, "module": 110}
_SHARES = {"function": 1.0, "class": 0.25, "module": 0.12}
_MAX_FILE_CHARS = 3000
_PLAN_TOKENS = 16  # PLAN's budget
_FAULT_SHARE = 0.72
_TWO_SHARE = 0.14
_PLAN_ROW_SHARE, _WITH_PLAN_SHARE = 0.12, 0.14
_HELD_OUT_SHARE = 0.06
_DOCS_DROPPED_SHARE = 0.4
_NOISE_SHARE = 0.08
_NOISE = ("# TODO: clean this up", "# FIXME", "# see the issue tracker", "# noqa", "# (kept as it is)", "# XXX: why?")
_COMPLETE = (
    "Complete this function.\n\n```python\n{head}```\n",
    "Write the body of this Python function:\n```python\n{head}```\n",
    "{head}",
    "```python\n{head}```\nImplement it.",
    "Please implement the following function.\n\n```python\n{head}```",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What is made.

    Args:
        seed: Chooses functions, edits and wordings.
        most_a_package: Most functions that are taken from one package; classes and files are fewer.
        most_tokens: Rows end when this many tokens are reached.
        most_tokens_a_row: Longer rows are left out.
        general_share: Share of rows that ask for a function from its signature and docstring.
        num_processes: How many packages are read at once.
    """

    seed: int = 1
    most_a_package: int = 120
    most_tokens: int = 12_000_000
    most_tokens_a_row: int = 1536
    general_share: float = 0.08
    num_processes: int = 2


@dataclass(frozen=True, slots=True)
class Edit:
    """One reversed edit, before it is worded.

    Args:
        source: The file before.
        scope: What is to be edited in it.
        after: The scope's text after.
        changes: What was made worse.
        name: What the intent calls the scope.
        documentation: First sentence of its docstring.
        evidence: Calls that show the fault.
    """

    source: Source
    scope: Scope
    after: str
    changes: tuple[Change, ...]
    name: str
    documentation: str
    evidence: tuple[Evidence, ...]


@dataclass(slots=True)
class Found:
    """What one package gave.

    Args:
        rows: Rows, and with each the text before and after.
        counts: What was left out, and why.
        hits: Functions that overlap with a reference, by reference.
        kinds: How often it was made worse in each way.
    """

    rows: list[tuple[dict[str, Any], str, str]] = field(default_factory=list[tuple[dict[str, Any], str, str]])
    counts: Counter[str] = field(default_factory=Counter[str])
    hits: Counter[str] = field(default_factory=Counter[str])
    kinds: Counter[str] = field(default_factory=Counter[str])


def build(
    out: Path,
    wheels: Path,
    reference_paths: Sequence[Path],
    tokenizer: Path,
    options: Options,
    *,
    packages: Sequence[Package] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make the data set.

    Args:
        out: Folder of the rows and the report.
        wheels: Where wheels lie; missing ones are fetched.
        reference_paths: What must not be learnt from.
        tokenizer: A model's folder, to count tokens.
        options: What is made.
        packages: Where functions come from; the pinned list when left out.
        say: Told how far it is.

    Returns:
        The report.

    Raises:
        UsageError: There are no references, or this system cannot fork.
        PathError: A package or reference is not there.
    """
    if not hasattr(os, "fork"):
        raise UsageError("Functions are tried in forked processes, which this system does not have", hint="Use Linux.")
    if not reference_paths:
        raise UsageError("There is nothing to compare with", hint="Name the files of tasks with --reference.")
    started_at = time.monotonic()
    packages = read_packages() if packages is None else packages
    fetch(packages, wheels)
    references = read_references(reference_paths)
    say(f"{len(references.grams):,} runs of tokens of {sum(references.sizes.values())} reference texts")
    work = [(package, wheels / package.wheel) for package in packages]
    context = multiprocessing.get_context("fork")
    with context.Pool(options.num_processes, _start, (references, tokenizer, options)) as pool:
        found: list[Found] = []
        for number, one in enumerate(pool.imap(_rows_of_package, work), 1):
            found.append(one)
            if number % 20 == 0:
                num_rows = sum(len(each.rows) for each in found)
                say(f"{number} of {len(work)} packages, {num_rows} rows, {time.monotonic() - started_at:.0f} s")
        rows, counts = _chosen(found, options)
        rows = with_general(rows, pool.imap(_general_rows_of_package, work), options)
    report = _write(out, rows, counts, found, references, packages, options)
    say(f"{report['train']['rows']} rows in {time.monotonic() - started_at:.0f} s")
    return report


def with_general(
    rows: Sequence[dict[str, Any]], more: Iterable[Sequence[dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """Rows with more that ask for whole functions, up to their share, and all in a new order.

    Args:
        rows: What was chosen.
        more: Rows of each package.
        options: The share.

    Returns:
        The rows.
    """
    num_general = sum(row["stage"] == "general" for row in rows)
    num_wanted = int(options.general_share / (1 - options.general_share) * (len(rows) - num_general)) - num_general
    known = {row["id"] for row in rows}
    new = [row for part in more for row in part if row["id"] not in known]
    random.Random(options.seed).shuffle(new)
    mixed = [*rows, *new[: max(0, num_wanted)]]
    random.Random(options.seed + 2).shuffle(mixed)
    return mixed


# --- one package -----------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start(references: References, tokenizer: Path, options: Options) -> None:
    _worker.update(references=references, tokenizer=HFChatTokenizer(tokenizer), options=options)


def _rows_of_package(work: tuple[Package, Path]) -> Found:
    package, wheel = work
    references: References = _worker["references"]
    options: Options = _worker["options"]
    rng = random.Random(f"{options.seed} {package.name}")
    found = Found()
    places = [place for file in read_files(wheel, package.name) if _parses(file.text) for place in _places_in(file)]
    rng.shuffle(places)
    num_taken: Counter[str] = Counter()
    for file, scope in places:
        if num_taken[scope.kind] >= options.most_a_package * _SHARES[scope.kind]:
            continue
        maker = _Maker(file, scope, rng, found)
        if not maker.is_wanted:
            continue
        hit = references.found_in(maker.text, scope.name if scope.kind == "function" else "")
        if hit:
            found.hits[hit] += 1
            continue
        num_taken[scope.kind] += 1
        _add_rows(maker, found, rng)
    return found


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def _places_in(file: SourceFile) -> list[tuple[SourceFile, Scope]]:
    source = Source.from_text(file.text, file.path)
    scopes = list_scopes(source)
    num_named = Counter(scope.qualname for scope in scopes)
    places = [(file, scope) for scope in scopes if num_named[scope.qualname] == 1]
    return [*places, (file, find_scope(source))] if len(file.text) <= _MAX_FILE_CHARS else places


def _add_rows(maker: _Maker, found: Found, rng: random.Random) -> None:
    """The edits of one place: more of a function that can be run, and of a class or file, which are fewer."""
    if maker.setting is not None and has_docstring(maker.node):
        _add_general(maker, found, rng)
    num_edits = 3 if maker.setting is not None else 1 if maker.scope.kind == "function" else 2
    for _ in range(num_edits):
        edit = maker.edit()
        if edit is None:
            found.counts["no edit found"] += 1
            continue
        before = edit.source.plain_text(edit.scope.start_line, edit.scope.end_line)
        found.rows += [(row, before, edit.after) for row in _rows_of_edit(edit, maker.file, rng, found)]


def _rows_of_edit(edit: Edit, file: SourceFile, rng: random.Random, found: Found) -> Iterator[dict[str, Any]]:
    """The question of PATCH, with or without a plan, and sometimes that of PLAN."""
    references: References = _worker["references"]
    question = Question(edit.source, edit.scope, edit.source, edit.scope, DEFAULT_FORMAT)
    proof = prove(question, edit.after)
    if proof.report.patched is None:
        found.counts[f"refused: {proof.report.refused.gate if proof.report.refused else ''}"] += 1
        return
    lines = [*edit.source.lines[: edit.scope.start_line - 1], *edit.after.splitlines()]
    lines += edit.source.lines[edit.scope.end_line :]
    if list(proof.report.patched.lines) != lines:
        found.counts["answer gives another text"] += 1
        return
    intent = intent_of(edit.changes, edit.name, edit.documentation, edit.evidence, rng)
    if references.found_in(intent, ""):
        found.hits["a wish that is a task's"] += 1
        return
    context = build_context(prompt_source(edit.source), edit.scope)
    task, edit_format = Task(context, intent), FORMATS[DEFAULT_FORMAT]
    plan = "\n".join(rng.choice(change.plan) for change in edit.changes)
    kinds = "+".join(change.kind for change in edit.changes)
    answer = edit.after.rstrip("\n") + "".join(edit_format.stop(task))
    plan_text = plan if rng.random() < _WITH_PLAN_SHARE else ""
    messages = edit_format.messages(edit.source, edit.scope, task, plan_text)
    prefill = edit_format.prefill(task)
    stage = "patch with plan" if plan_text else "patch"
    yield from _row(stage, kinds, edit.scope.kind, file, messages, prefill, answer, found)
    tokenizer: HFChatTokenizer = _worker["tokenizer"]
    if rng.random() < _PLAN_ROW_SHARE and len(tokenizer.encode(plan)) < _PLAN_TOKENS:
        yield from _row("plan", kinds, edit.scope.kind, file, plan_messages(task), "", plan, found)


def _add_general(maker: _Maker, found: Found, rng: random.Random) -> None:
    """A function from its signature and docstring, so that the model keeps what it can do besides editing."""
    code, function = maker.code, maker.node
    head_end = code.lines_of(function.body[0], function.body[0])[1]
    head = code.bytes[:head_end].decode()
    if len(function.body) < 2 or len(docstring_of(function)) < 30 or not head.isascii():
        return
    question = rng.choice(_COMPLETE).format(head=head)
    answer = f"```python\n{code.text.rstrip()}\n```"
    for row in _row("general", "complete", "function", maker.file, [Message("user", question)], "", answer, found):
        found.rows.append((row, head, code.text))


def _row(
    stage: str,
    kinds: str,
    scope_kind: str,
    file: SourceFile,
    messages: Sequence[Message],
    prefill: str,
    answer: str,
    found: Found,
) -> Iterator[dict[str, Any]]:
    tokenizer: HFChatTokenizer = _worker["tokenizer"]
    num_tokens = len(tokenizer.encode_chat(messages, prefill=prefill + answer))
    options: Options = _worker["options"]
    if num_tokens > options.most_tokens_a_row:
        found.counts["too long"] += 1
        return
    question = "\n".join(message.content for message in messages)
    digest = hashlib.sha256("\0".join((question, prefill, answer)).encode("utf-8", "surrogatepass")).hexdigest()
    yield {
        "id": digest[:16],
        "instruction": "",
        "input": question,
        "output": prefill + answer,
        "prefill": prefill,
        "stage": stage,
        "kinds": kinds,
        "scope": scope_kind,
        "group": file.package,
        "file": file.path,
        "prompt_version": PROMPT_VERSION,
        "num_tokens": num_tokens,
    }


def _general_rows_of_package(work: tuple[Package, Path]) -> list[dict[str, Any]]:
    """Functions that need nothing but the standard library, asked for by imports, signature and docstring."""
    package, wheel = work
    references: References = _worker["references"]
    options: Options = _worker["options"]
    rng = random.Random(f"{options.seed} {package.name} general")
    rows: list[dict[str, Any]] = []
    for file in read_files(wheel, package.name):
        if not _parses(file.text):
            continue
        code = Code(file.text)
        for node in code.tree.body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            if not 3 <= (node.end_lineno or 0) - node.lineno <= 40:
                continue
            imports = imports_of(node, code.tree)
            if imports is None or len(docstring_of(node)) < 30 or len(node.body) < 2:
                continue
            start, end = code.lines_of(node, node)
            text, head_end = code.bytes[start:end].decode(), code.lines_of(node, node.body[0])[1]
            if not text.isascii() or references.found_in(text, node.name):
                continue
            head = "".join(f"{line}\n" for line in imports) + ("\n\n" if imports else "")
            question = rng.choice(_COMPLETE).format(head=head + code.bytes[start:head_end].decode())
            answer = f"```python\n{head}{text.rstrip()}\n```"
            message = [Message("user", question)]
            rows += _row("general", "complete", "function", file, message, "", answer, Found())
    rng.shuffle(rows)
    return rows[: options.most_a_package // 4]


class _Maker:
    """Makes edits of one function, class or file.

    Args:
        file: The file as it is.
        scope: What of it.
        rng: Chooses.
        found: Where what is left out is counted.
    """

    def __init__(self, file: SourceFile, scope: Scope, rng: random.Random, found: Found) -> None:
        self.file, self.scope, self._rng, self._found = file, scope, rng, found
        self.source = Source.from_text(file.text, file.path)
        self.text = self.source.plain_text(scope.start_line, scope.end_line)
        self.setting: str | None = None
        num_lines = scope.end_line - scope.start_line + 1
        is_test = scope.name.startswith("test") or scope.name in ("setup", "teardown")
        self.is_wanted = _MIN_LINES <= num_lines <= _MOST_LINES[scope.kind] and not is_test and self._read()

    def _read(self) -> bool:
        dedented = _dedented(self.text, self.scope.indent)
        if dedented is None:
            return False
        try:
            self.code = Code(dedented)
        except (SyntaxError, ValueError):
            return False
        self.node: Any = self.code.tree if self.scope.kind == "module" else self.code.tree.body[0]
        if self.scope.kind != "module" and len(self.code.tree.body) != 1:
            return False
        if self.scope.kind != "function":
            return len(_functions_of(self.code)) >= 2
        tree = ast.parse(self.file.text)
        own = next(
            (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.lineno == self.scope.def_line), None
        )
        self.setting = None if own is None else setting_of(own, tree)
        has_body = len(self.node.body) > (1 if has_docstring(self.node) else 0)
        return has_body and "NotImplemented" not in self.text

    def edit(self) -> Edit | None:
        """One edit of the place.

        Returns:
            The edit, None if none was found.
        """
        return self._function_edit() if self.scope.kind == "function" else self._owner_edit()

    def _function_edit(self) -> Edit | None:
        after = self._prepared(self.code)
        made = self._made_worse(after, self._rng.random() < _FAULT_SHARE)
        if made is None:
            return None
        before, changes = made
        evidence: list[Evidence] = []
        if self.setting is not None and changes[0].is_fault:
            evidence = find_evidence(self.setting, after, before, self.node, self._rng)
            if not evidence and self._rng.random() < 0.5:
                self._found.counts["no call shows the fault"] += 1
                return None
        return self._edit(after, before, changes, self.node.name, evidence)

    def _owner_edit(self) -> Edit | None:
        after = self.code.text
        name = self.node.name if self.scope.kind == "class" else Path(self.file.path).name
        if self._rng.random() < 0.55:
            changes = list(method(self.code, self.node))
            if self.scope.kind == "class" and self._rng.random() < 0.3:
                changes += class_docstring(self.code, self.node)
            if changes:
                change = self._rng.choice(changes)
                return self._edit(after, self.code.applied(change.splices), (change,), name, [])
        made = self._made_worse(after, self._rng.random() < _FAULT_SHARE)
        if made is None:
            return None
        changes = tuple(replace(change, vague=()) for change in made[1])  # a whole file holds more than one suspect
        return self._edit(after, made[0], changes, name, [])

    # --- making it worse ----------------------------------------------------------------------------------------------

    def _prepared(self, code: Code) -> str:
        """The function after: as it is, without its docstring, or with a stray comment that must stay."""
        text = code.text
        if has_docstring(self.node) and len(self.node.body) > 1 and self._rng.random() < _DOCS_DROPPED_SHARE:
            first = self.node.body[0]
            if code.owns_lines(first, first):
                start, end = code.lines_of(first, first)
                text = (code.bytes[:start] + code.bytes[end:].lstrip(b"\n")).decode()
        if self._rng.random() < _NOISE_SHARE:
            lines = text.splitlines()
            places = [
                number for number, line in enumerate(lines) if line.startswith("    ") and line.rstrip().endswith(")")
            ]
            if places and '"""' not in text:
                at = self._rng.choice(places)
                lines[at] += f"  {self._rng.choice(_NOISE)}"
                noisy = "\n".join(lines) + "\n"
                text = noisy if _parses(noisy) else text
        return text

    def _made_worse(self, after: str, is_fault: bool) -> tuple[str, tuple[Change, ...]] | None:
        """The text before, with one or two changes."""
        first = self._one_worse(after, FAULTS if is_fault else FEATURES)
        first = first or self._one_worse(after, FEATURES if is_fault else FAULTS)
        if first is None:
            return None
        before, change = first
        if self._rng.random() < _TWO_SHARE * (1 if self.scope.kind == "function" else 3):
            second = self._one_worse(before, FAULTS if self._rng.random() < 0.8 else FEATURES)
            if second is not None and second[1].kind != change.kind:
                return second[0], (change, second[1])
        return before, (change,)

    def _one_worse(
        self, text: str, table: Mapping[str, tuple[Callable[[Code, FunctionNode], Iterator[Change]], float]]
    ) -> tuple[str, Change] | None:
        """One change; of the kinds that are possible, those that this package had seldom are likelier."""
        code = Code(text)
        functions = _functions_of(code)[:1] if self.scope.kind == "function" else _functions_of(code)
        options: dict[str, list[Change]] = {}
        for name, (make, _) in table.items():
            changes = [change for function in functions for change in make(code, function)]
            if changes:
                options[name] = changes
        while options:
            names = list(options)
            weights = [table[name][1] / (1 + self._found.kinds[name]) for name in names]
            name = self._rng.choices(names, weights)[0]
            change = self._rng.choice(options.pop(name))
            before = code.applied(change.splices)
            if before != text and _parses(before) and ast.dump(ast.parse(before)) != ast.dump(code.tree):
                self._found.kinds[name] += 1
                return before, change
        return None

    def _edit(
        self, after: str, before: str, changes: tuple[Change, ...], name: str, evidence: Sequence[Evidence]
    ) -> Edit | None:
        """The edit on the file, whose scope is the text before."""
        scope = self.scope
        lines = _indented(before, scope.indent).splitlines()
        lines = [*self.source.lines[: scope.start_line - 1], *lines, *self.source.lines[scope.end_line :]]
        source = Source.from_text("".join(f"{line}\n" for line in lines), Path(self.file.path).name)
        found = find_scope(source) if scope.kind == "module" else self._found_again(source)
        if found is None:
            self._found.counts["scope is gone"] += 1
            return None
        is_documented = scope.kind != "module" and not any("docstring" in change.kind for change in changes)
        documentation = documentation_of(docstring_of(self.node)) if is_documented else ""
        shown = scope.qualname if self._rng.random() < 0.3 and scope.kind == "function" else name
        return Edit(source, found, _indented(after, scope.indent), changes, shown, documentation, tuple(evidence))

    def _found_again(self, source: Source) -> Scope | None:
        try:
            found = find_scope(source, self.scope.qualname, self.scope.start_line)
        except PlanPatchError:
            return None
        same = (self.scope.kind, self.scope.qualname, self.scope.start_line)
        return found if (found.kind, found.qualname, found.start_line) == same else None


def _functions_of(code: Code) -> list[FunctionNode]:
    return [node for node in ast.walk(code.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _dedented(text: str, indent: str) -> str | None:
    """A definition at the left margin; None if it cannot be put back the same."""
    lines = text.splitlines()
    if any(line and not line.startswith(indent) for line in lines):
        return None
    dedented = "".join(f"{line[len(indent) :]}\n" for line in lines)
    return dedented if _indented(dedented, indent).splitlines() == lines else None


def _indented(text: str, indent: str) -> str:
    return "".join(f"{indent}{line}\n" if line else "\n" for line in text.splitlines())


# --- all packages ----------------------------------------------------------------------------------------------------


def _chosen(found: Sequence[Found], options: Options) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows without near-duplicates, mixed, up to the budget of tokens; no more general ones than their share."""
    counts: Counter[str] = Counter()
    near = NearIndex()
    kept: list[dict[str, Any]] = []
    seen: dict[str, bool] = {}
    asked: set[tuple[str, str]] = set()
    for one in found:
        for row, before, after in one.rows:
            edit = hashlib.sha256(f"{before}\0{after}".encode("utf-8", "surrogatepass")).hexdigest()
            if edit not in seen:
                print_of = fingerprint(before, after)
                seen[edit] = near.find(print_of) is None
                near.add(edit, print_of)
            question = edit, row["stage"].removesuffix(" with plan")
            if seen[edit] and question not in asked:
                kept.append(row)
                asked.add(question)
            else:
                counts["near duplicate"] += 1
    random.Random(options.seed).shuffle(kept)
    general = [row for row in kept if row["stage"] == "general"]
    edits = [row for row in kept if row["stage"] != "general"]
    most_general = int(options.general_share / (1 - options.general_share) * len(edits))
    counts["general, over its share"] += max(0, len(general) - most_general)
    mixed = [*edits, *general[:most_general]]
    random.Random(options.seed + 1).shuffle(mixed)
    chosen: list[dict[str, Any]] = []
    num_tokens = 0
    for row in mixed:
        if num_tokens + row["num_tokens"] > options.most_tokens:
            counts["over the budget"] += 1
            continue
        chosen.append(row)
        num_tokens += row["num_tokens"]
    return chosen, counts


def _write(
    out: Path,
    rows: Sequence[dict[str, Any]],
    counts: Counter[str],
    found: Sequence[Found],
    references: References,
    packages: Sequence[Package],
    options: Options,
) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    held_out = {package.name for package in packages if _is_held_out(package.name)}
    parts = {
        TRAIN_NAME: [row for row in rows if row["group"] not in held_out],
        VAL_NAME: [row for row in rows if row["group"] in held_out],
    }
    for one in found:
        counts.update(one.counts)
    hits: Counter[str] = sum((one.hits for one in found), Counter[str]())
    report: dict[str, Any] = {
        "seed": options.seed,
        "packages": len(packages),
        "licences": dict(Counter(_licence_family(package.licence) for package in packages).most_common()),
        "references": {
            "texts": dict(sorted(references.sizes.items())),
            "runs_of_13_tokens": len(references.grams),
            "names_of_functions": len(references.names),
        },
        "dropped_as_overlapping": dict(hits.most_common()),
        "left_out": dict(counts.most_common()),
        "held_out_packages": sorted(held_out),
    }
    for name, part in parts.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part).encode("utf-8", "backslashreplace")
        (out / name).write_bytes(data)
        report[name.removesuffix(".jsonl")] = {**_summary(part), "sha256": hashlib.sha256(data).hexdigest()}
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _is_held_out(package: str) -> bool:
    return int(hashlib.sha256(package.encode()).hexdigest()[:8], 16) / 2**32 < _HELD_OUT_SHARE


def _licence_family(licence: str) -> str:
    names = ("Apache", "BSD", "ISC", "MIT", "Expat", "PSF", "Python Software Foundation")
    return " and ".join(dict.fromkeys(name for name in names if re.search(rf"\b{name}", licence))) or licence


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for row in rows:
        kinds.update(row["kinds"].split("+"))
    lengths = sorted(row["num_tokens"] for row in rows)
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by["stages"][row["stage"]] += 1
        by["scopes"][row["scope"]] += 1
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "tokens_a_row": {f"p{q}": lengths[min(len(lengths) - 1, len(lengths) * q // 100)] for q in (10, 50, 90, 99)}
        if lengths
        else {},
        **{name: dict(counter.most_common()) for name, counter in by.items()},
        "kinds": dict(kinds.most_common()),
    }
