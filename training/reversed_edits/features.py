"""Edits that are no repair: what a function or class lacks, and code that is right and could be better.

Each takes code as it is and gives the code as it was before somebody added a docstring, a parameter, a method, or made
it shorter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from training.reversed_edits.code import (
    Change,
    Code,
    FunctionNode,
    Splice,
    body_of,
    docstring_of,
    has_docstring,
    own_nodes,
    parameters,
)

Feature = Callable[[Code, FunctionNode], Iterator[Change]]
ClassFeature = Callable[[Code, ast.ClassDef], Iterator[Change]]

_LOGGERS = re.compile(r"(?:self\.)?_?(?:log|logger|LOG|LOGGER|logging)\.(debug|info|warning|error|exception)\(")
_PLAIN_NAMES = ("tmp", "x", "value", "data", "foo", "val", "temp", "obj", "item", "res", "var")
_MOST_DOCSTRING_LINES = 10


# --- what is missing -------------------------------------------------------------------------------------------------


def docstring(code: Code, function: FunctionNode) -> Iterator[Change]:
    """The docstring is missing."""
    if not has_docstring(function) or len(function.body) < 2:
        return
    text = docstring_of(function)
    lines = text.split("\n")
    first = function.body[0]
    if not text.isascii() or len(lines) > _MOST_DOCSTRING_LINES or not code.owns_lines(first, first):
        return
    start, end = code.lines_of(first, first)
    while code.bytes[end : end + 1] == b"\n":
        end += 1
    name = function.name
    sections = [word for word in ("Args", "Returns", "Raises", "Parameters", ":param", ":return") if word in text]
    how = f" with {' and '.join(sections)}" if sections else " in one line" if len(lines) == 1 else ""
    quoted = (f'add the docstring "{lines[0]}"',) if len(lines) == 1 and '"' not in text else ()
    yield Change(
        "docstring",
        (Splice(start, end, ""),),
        precise=(*quoted, f"add a docstring{how} to `{name}`", f"document `{name}`{how}"),
        symptom=("the docstring is missing", f"`{name}` has no docstring, please write one{how}"),
        vague=(
            "Write a docstring that says what it does; change no code.",
            "add docstring",
            "docs please",
            "document this function",
            "write a short docstring",
        ),
        korean=("docstring을 추가해 주세요.", "함수 설명(docstring)을 작성해 주세요. 코드는 바꾸지 마세요."),
        plan=(f"Add a docstring{how} below the `def` line.",),
        is_fault=False,
    )


def type_hints(code: Code, function: FunctionNode) -> Iterator[Change]:
    """The type hints are missing."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    hinted = [one for one in every if one is not None and one.annotation is not None]
    if not hinted or any("\n" in code.source(one) for one in hinted):
        return
    splices = [code.replace(one, one.arg) for one in hinted]
    if function.returns is not None:
        last, end = code.span(function.returns)
        head = code.bytes[:last].rstrip()
        if not head.endswith(b"->"):
            return
        splices.append(Splice(len(head[:-2].rstrip()), end, ""))
    said = [code.source(one) for one in hinted]
    result = f", returns {code.source(function.returns)}" if function.returns is not None else ""
    precise = f"annotate it: {', '.join(said)}{result}" if len(said) <= 4 else "add type hints"
    yield Change(
        "type_hints",
        tuple(splices),
        precise=(precise, precise.replace("annotate it", "add type hints")),
        symptom=("the type hints are missing", f"annotate parameters and return type of `{function.name}`"),
        vague=("Add type hints to the parameters and the return value.", "add type hints", "type annotations please"),
        korean=("타입 힌트를 추가해 주세요.",),
        plan=("Add type hints to the `def` line.",),
        is_fault=False,
    )


def decorator(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A decorator is missing."""
    for node in function.decorator_list:
        shown = code.short(node, 50)
        if shown not in (
            "property",
            "staticmethod",
            "classmethod",
            "abstractmethod",
            "abc.abstractmethod",
            "wraps",
        ) and (
            not re.match(
                r"(?:functools\.)?(?:lru_cache|cached_property|cache|wraps|total_ordering|contextmanager)", shown
            )
        ):
            continue
        start, end = code.lines_of_decorator(node)
        yield Change(
            "decorator",
            (Splice(start, end, ""),),
            precise=(f"decorate it with `@{shown}`", f"make `{function.name}` a {shown}", f"add @{shown}"),
            symptom=(f"`@{shown}` is missing",),
            korean=(f"`@{shown}` 데코레이터를 추가해 주세요.",),
            plan=(f"Add `@{shown}` above the `def` line.",),
            is_fault=False,
        )


def parameter(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A parameter with a default is missing, with all that it is used for."""
    arguments = function.args
    pairs = [*zip(reversed(arguments.args), reversed(arguments.defaults), strict=False)]
    pairs += [pair for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if pair[1] is not None]
    for argument, default in pairs:
        if not isinstance(default, ast.Constant) or argument.arg in docstring_of(function):
            continue
        place = _without_parameter(code, argument, default)
        uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == argument.arg]
        if place is None or not 1 <= len(uses) <= 2:
            continue
        value = code.source(default)
        splices: list[Splice] = [place]
        what: list[str] = []
        for use in uses:
            made = _without_use(code, use, value)
            if made is None:
                break
            splices.append(made[0])
            what.append(made[1])
        else:
            effect = "; ".join(what)
            signature = f"{code.source(argument)}={value}" if argument.annotation is None else f"{argument.arg}={value}"
            yield Change(
                "parameter",
                tuple(splices),
                precise=(
                    f"add a parameter `{signature}`: {effect}",
                    f"add an optional argument `{argument.arg}` (default {value}). {effect[0].upper()}{effect[1:]}.",
                    f"`{function.name}` should take `{signature}`; {effect}",
                ),
                korean=(f"매개변수 `{signature}`를 추가해 주세요: {effect}",),
                plan=(f"Add the parameter `{signature}` and use it.",),
                is_fault=False,
            )


def _without_parameter(code: Code, argument: ast.arg, default: ast.expr) -> Splice | None:
    start, end = code.span(argument)[0], code.span(default)[1]
    before = code.bytes[:start].rstrip()
    if b"\n" in code.bytes[len(before) : start] or not before.endswith(b","):
        return None
    if before[:-1].rstrip().endswith(b"*"):
        return None
    return Splice(len(before) - 1, end, "")


def _without_use(code: Code, use: ast.Name, value: str) -> tuple[Splice, str] | None:
    """A use of a parameter becomes its default, or goes with the block that it guards."""
    parent = code.parents[use]
    if isinstance(parent, ast.If) and parent.test is use and not parent.orelse and value in ("False", "None"):
        block = next((block for block in _block_lists(code, parent) if parent in block), None)
        done = "; ".join(code.short(statement) for statement in parent.body)
        if block is None or not code.owns_lines(parent, parent) or len(parent.body) > 2 or len(done) > 80:
            return None
        if any(not code.short(statement) for statement in parent.body) or len(block) < 2:
            return None
        return code.drop_lines(parent, parent, block), f"if it is set, do `{done}`"
    if isinstance(parent, ast.keyword) and parent.arg is not None:
        call = code.parents[parent]
        return code.replace(use, value), f"pass it on as `{parent.arg}` to `{code.short(call.func)}`"  # type: ignore[attr-defined]
    if isinstance(parent, ast.Call) and use in parent.args:
        return code.replace(use, value), f"pass it to `{code.short(parent.func)}` instead of {value}"
    if isinstance(parent, (ast.BinOp, ast.Compare)) and value != "None" and code.short(parent):
        return code.replace(use, value), f"use it instead of {value} in `{code.short(parent)}`"
    if isinstance(parent, ast.Assign) and code.short(parent):
        return code.replace(use, value), f"`{code.short(parent)}`"
    return None


def _block_lists(code: Code, node: ast.AST) -> Iterator[list[ast.stmt]]:
    parent = code.parents[node]
    for field in ("body", "orelse", "finalbody"):
        block = getattr(parent, field, None)
        if isinstance(block, list):
            yield block


def logging(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A line of logging is missing."""
    for block in code.blocks(function):
        for node in block:
            shown = code.short(node, 90)
            match = _LOGGERS.match(shown)
            if match is None or len(block) < 2 or not code.owns_lines(node, node):
                continue
            index = block.index(node)
            near = code.short(block[index - 1], 50) if index else code.short(block[index + 1], 50)
            where = f" {'after' if index else 'before'} `{near}`" if near else ""
            yield Change(
                "logging",
                (code.drop_lines(node, node, block),),
                precise=(f"log it{where}: `{shown}`", f"add `{shown}`{where}"),
                korean=(f"로그를 추가해 주세요: `{shown}`",),
                plan=(f"Add the {match[1]} log line{where}.",),
                is_fault=False,
            )


# --- what could be better --------------------------------------------------------------------------------------------


def comprehension(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A comprehension, as a loop."""
    for block in code.blocks(function):
        for node in block:
            value = getattr(node, "value", None)
            if not isinstance(value, (ast.ListComp, ast.SetComp, ast.DictComp)) or len(value.generators) != 1:
                continue
            loop = value.generators[0]
            is_return = isinstance(node, ast.Return)
            if loop.is_async or not (is_return or isinstance(node, ast.Assign)) or not code.owns_lines(node, node):
                continue
            if isinstance(node, ast.Assign) and (len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name)):
                continue
            name = "result" if is_return else node.targets[0].id  # type: ignore[attr-defined,union-attr]
            used = {one.id for one in ast.walk(function) if isinstance(one, ast.Name)} if is_return else set[str]()
            if name in used:
                continue
            indent = code.indent_of(node)
            empty = {ast.ListComp: "[]", ast.SetComp: "set()", ast.DictComp: "{}"}[type(value)]
            lines = [f"{name} = {empty}", f"for {ast.unparse(loop.target)} in {ast.unparse(loop.iter)}:"]
            inner = "    "
            for test in loop.ifs:
                lines.append(f"{inner}if {ast.unparse(test)}:")
                inner += "    "
            if isinstance(value, ast.DictComp):
                lines.append(f"{inner}{name}[{ast.unparse(value.key)}] = {ast.unparse(value.value)}")
            else:
                verb = "append" if isinstance(value, ast.ListComp) else "add"
                lines.append(f"{inner}{name}.{verb}({ast.unparse(value.elt)})")
            if is_return:
                lines.append(f"return {name}")
            kind = {ast.ListComp: "list", ast.SetComp: "set", ast.DictComp: "dict"}[type(value)]
            start, end = code.lines_of(node, node)
            yield Change(
                "comprehension",
                (Splice(start, end, "".join(f"{indent}{line}\n" for line in lines)),),
                precise=(
                    f"use a {kind} comprehension for `{name}`",
                    f"replace the loop by a {kind} comprehension",
                    f"turn the loop over `{ast.unparse(loop.iter)[:40]}` into a {kind} comprehension",
                ),
                vague=("Make the code simpler and shorter; keep what it does.", "simplify", "make it more pythonic"),
                korean=(f"반복문을 {kind} 컴프리헨션으로 바꿔 주세요.",),
                plan=(f"Replace the loop by a {kind} comprehension.",),
                is_fault=False,
            )


def returned_condition(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`return condition`, written as `if condition: return True`."""
    for block in code.blocks(function):
        for node in block:
            if not isinstance(node, ast.Return) or not code.owns_lines(node, node) or node.value is None:
                continue
            indent, (start, end) = code.indent_of(node), code.lines_of(node, node)
            value = node.value
            if isinstance(value, (ast.Compare, ast.BoolOp)) and (shown := code.short(value, 80)):
                if isinstance(value, ast.BoolOp) and not all(isinstance(one, ast.Compare) for one in value.values):
                    continue
                lines = (f"if {shown}:", "    return True", "else:", "    return False")
                said = f"return `{shown}` directly"
            elif isinstance(value, ast.IfExp) and (shown := code.short(value, 90)):
                one, other, test = (code.source(part) for part in (value.body, value.orelse, value.test))
                lines = (f"if {test}:", f"    return {one}", "else:", f"    return {other}")
                said = f"use a conditional expression: `return {shown}`"
            else:
                continue
            yield Change(
                "returned_condition",
                (Splice(start, end, "".join(f"{indent}{line}\n" for line in lines)),),
                precise=(said, f"replace the if/else by `return {shown}`"),
                vague=("simplify the if/else", "Make the code simpler and shorter; keep what it does.", "simplify"),
                korean=("if/else를 더 간단하게 바꿔 주세요.",),
                plan=(f"Replace the if/else by `return {shown}`.",),
                is_fault=False,
            )


def bare_lookup(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`x = d.get(k, v)`, written with a test."""
    for block in code.blocks(function):
        for node in block:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            call, target = node.value, node.targets[0]
            is_get = isinstance(call.func, ast.Attribute) and call.func.attr == "get" and not call.keywords
            if not is_get or len(call.args) != 2 or not code.short(node, 100) or not code.owns_lines(node, node):
                continue
            holder, key = code.source(call.func.value), code.source(call.args[0])  # type: ignore[attr-defined]
            name, default, indent = code.source(target), code.source(call.args[1]), code.indent_of(node)
            lines = (f"if {key} in {holder}:", f"    {name} = {holder}[{key}]", "else:", f"    {name} = {default}")
            start, end = code.lines_of(node, node)
            yield Change(
                "bare_lookup",
                (Splice(start, end, "".join(f"{indent}{line}\n" for line in lines)),),
                precise=(f"use `{holder}.get` for `{name}`", f"simplify the lookup of {key} with `.get`"),
                vague=("simplify the dict lookup", "Make the code simpler and shorter; keep what it does."),
                korean=("딕셔너리 조회를 `.get`으로 간단히 해 주세요.",),
                plan=(f"Use `{holder}.get({key}, {default})`.",),
                is_fault=False,
            )


def nested_if(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A guard clause, written as a block around the rest."""
    body = body_of(function)
    for index, node in enumerate(body[:-1]):
        rest = body[index + 1 :]
        is_guard = isinstance(node, ast.If) and not node.orelse and len(node.body) == 1
        if not is_guard or not isinstance(node.body[0], ast.Return) or len(rest) > 6:  # type: ignore[attr-defined]
            continue
        test, said = code.short(node.test), code.short(node.body[0])  # type: ignore[attr-defined]
        moved = code.move_lines(rest[0], rest[-1], 4)
        if not test or not moved or said != "return" or any(isinstance(one, ast.Return) for one in ast.walk(rest[-1])):
            continue
        if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):  # type: ignore[attr-defined]
            positive = code.source(node.test.operand)  # type: ignore[attr-defined]
        elif isinstance(node.test, ast.Name):  # type: ignore[attr-defined]
            positive = f"not {test}"
        else:
            continue
        start, end = code.lines_of(node, rest[-1])
        yield Change(
            "nested_if",
            (Splice(start, end, f"{code.indent_of(node)}if {positive}:\n{moved}"),),
            precise=(f"return early if `{test}`", f"use a guard clause for `{test}` instead of nesting"),
            vague=("reduce the nesting", "flatten it with an early return"),
            korean=("중첩을 줄이고 일찍 반환하도록 해 주세요.",),
            plan=(f"Return early if `{test}` and dedent the rest.",),
            is_fault=False,
        )


def renamed(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A variable with a name that says nothing."""
    stored = [node for node in own_nodes(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | set(parameters(function))
    if any(isinstance(node, (ast.Global, ast.Nonlocal, ast.JoinedStr)) for node in ast.walk(function)):
        return
    for name in dict.fromkeys(node.id for node in stored):
        uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
        if name in parameters(function) or len(name) < 4 or not 2 <= len(uses) <= 6:
            continue
        wrong = next((plain for plain in _PLAIN_NAMES[len(name) % 5 :] if plain not in names), "")
        if wrong:
            yield Change(
                "renamed",
                tuple(code.replace(node, wrong) for node in uses),
                precise=(f"rename `{wrong}` to `{name}`", f"call the variable `{name}` instead of `{wrong}`"),
                symptom=(f"`{wrong}` should be called `{name}`",),
                korean=(f"변수 `{wrong}`의 이름을 `{name}`으로 바꿔 주세요.",),
                plan=(f"Rename `{wrong}` to `{name}`.",),
                is_fault=False,
            )


def joined_text(code: Code, function: FunctionNode) -> Iterator[Change]:
    """An f-string, written with `format`."""
    for node in own_nodes(function):
        if not isinstance(node, ast.JoinedStr) or node.lineno != node.end_lineno:
            continue
        shown = code.short(node, 90)
        parts = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        if not shown.startswith(('f"', "f'")) or not 1 <= len(parts) <= 3 or "{{" in shown or '"""' in shown:
            continue
        if any(part.format_spec is not None or part.conversion != -1 for part in parts):
            continue
        quote = shown[1]
        text = "".join("{}" if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values)  # type: ignore[attr-defined]
        if any(sign in text for sign in (quote, "\\", "\n", "\t")) or text.count("{}") != len(parts):
            continue
        arguments = ", ".join(ast.unparse(part.value) for part in parts)
        yield Change(
            "joined_text",
            (code.replace(node, f"{quote}{text}{quote}.format({arguments})"),),
            precise=("use an f-string", "use an f-string instead of `.format`", f"write it as {shown}"),
            vague=("modernise the string formatting",),
            korean=("f-string을 사용해 주세요.",),
            plan=("Replace `.format` by an f-string.",),
            is_fault=False,
        )


# --- classes and files -----------------------------------------------------------------------------------------------


def method(code: Code, owner: ast.ClassDef | ast.Module) -> Iterator[Change]:
    """A method or function is missing."""
    functions = [node for node in owner.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in functions:
        text = docstring_of(node)
        if len(owner.body) < 2 or node is owner.body[0] or node.name.startswith("test") or not text.isascii():
            continue
        if (node.end_lineno or 0) - node.lineno > 16:
            continue
        described = _described(code, node, text)
        if not described:
            continue
        what = "function" if isinstance(owner, ast.Module) else "method"
        head = f"{node.name}({ast.unparse(node.args)})"
        if node.returns is not None:
            head += f" -> {ast.unparse(node.returns)}"
        marks = [ast.unparse(one) for one in node.decorator_list]
        kind = f"{' '.join(f'@{mark}' for mark in marks)} {what}".strip()
        start, end = code.lines_of(node, node)
        while code.bytes[end : end + 1] == b"\n":
            end += 1
        if node is owner.body[-1]:
            start = len(code.bytes[:start].rstrip()) + 1
        used = {one.id for one in ast.walk(code.tree) if isinstance(one, ast.Name)}
        if isinstance(owner, ast.Module) and node.name in used:
            continue
        yield Change(
            "method" if what == "method" else "function",
            (Splice(start, end, ""),),
            precise=(
                f"Add a {kind} `{head}`. {described}",
                f"implement `{head}`: {described}",
                f"There is no {what} `{node.name}` yet. Write `{head}` ({kind}). {described}",
            ),
            korean=(f"`{head}` {what}를 추가해 주세요. {described}",),
            plan=(f"Add the {what} `{node.name}`.",),
            is_fault=False,
        )


def _described(code: Code, node: FunctionNode, text: str) -> str:
    """What a function does, told so that it can be written; empty if that cannot be told."""
    body = body_of(node)
    if text:
        first = " ".join(text.split("\n\n")[0].split())
        if len(body) <= 6 and 20 <= len(first) <= 300:
            return first if first.endswith(".") else f"{first}."
        return ""
    if len(body) == 1 and isinstance(body[0], ast.Return) and (shown := code.short(body[0], 80)):
        return f"It should `{shown}`."
    return ""


def class_docstring(code: Code, owner: ast.ClassDef) -> Iterator[Change]:
    """A class without its docstring."""
    if not has_docstring(owner) or len(owner.body) < 2:
        return
    text, first = docstring_of(owner), owner.body[0]
    lines = text.split("\n")
    if len(lines) > 4 or not text.isascii() or not code.owns_lines(first, first):
        return
    start, end = code.lines_of(first, first)
    while code.bytes[end : end + 1] == b"\n":
        end += 1
    yield Change(
        "class_docstring",
        (Splice(start, end, ""),),
        precise=(f"add a docstring to the class `{owner.name}`", f'class docstring: "{lines[0]}"'),
        vague=("document the class", "Write a docstring that says what it does; change no code."),
        korean=("클래스 docstring을 추가해 주세요.",),
        plan=("Add a docstring below the `class` line.",),
        is_fault=False,
    )


FEATURES: dict[str, tuple[Feature, float]] = {
    "docstring": (docstring, 0.8),
    "type_hints": (type_hints, 0.6),
    "decorator": (decorator, 0.8),
    "parameter": (parameter, 2.5),
    "logging": (logging, 0.8),
    "comprehension": (comprehension, 1.6),
    "returned_condition": (returned_condition, 1.0),
    "bare_lookup": (bare_lookup, 0.8),
    "nested_if": (nested_if, 1.0),
    "renamed": (renamed, 0.4),
    "joined_text": (joined_text, 0.8),
}
