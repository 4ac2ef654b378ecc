"""Ways in which a function can be wrong: each takes code that works and gives every place where it can be broken so.

A fault comes with wordings of three kinds. What the wording leaves open must be told by the rest of the code, so a
fault that only its author could repair (a threshold, a message) is worded precisely and never vaguely.

Not covered: faults that only tests could tell from another right way to write it; some of what is made is one.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from itertools import pairwise

from training.reversed_edits.code import Change, Code, FunctionNode, Splice, body_of, own_nodes, parameters

Fault = Callable[[Code, FunctionNode], Iterator[Change]]

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}
_BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_OPPOSITE = {
    "<": (">", ">="),
    "<=": (">=", ">"),
    ">": ("<", "<="),
    ">=": ("<=", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("+", "//")),
    ast.Div: ("/", ("//", "*")),
    ast.FloorDiv: ("//", ("/", "%")),
    ast.Mod: ("%", ("//",)),
    ast.BitAnd: ("&", ("|", "^")),
    ast.BitOr: ("|", ("&",)),
    ast.BitXor: ("^", ("&",)),
    ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
    ast.Pow: ("**", ("*",)),
}
_METHODS = {
    "append": "extend",
    "extend": "append",
    "startswith": "endswith",
    "endswith": "startswith",
    "lstrip": "rstrip",
    "rstrip": "lstrip",
    "upper": "lower",
    "lower": "upper",
    "keys": "values",
    "values": "keys",
    "items": "keys",
    "find": "rfind",
    "rfind": "find",
    "split": "rsplit",
    "rsplit": "split",
    "partition": "rpartition",
    "rpartition": "partition",
    "popleft": "pop",
    "appendleft": "append",
    "add": "discard",
    "union": "intersection",
    "intersection": "union",
    "match": "search",
    "isdigit": "isalpha",
    "isalpha": "isdigit",
    "update": "setdefault",
}
_FUNCTIONS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "tuple": "list",
    "sorted": "list",
    "setattr": "getattr",
    "getattr": "hasattr",
    "isinstance": "issubclass",
    "set": "list",
    "sum": "max",
}
_WRAPPERS = {"str", "int", "float", "list", "tuple", "set", "sorted", "len", "abs", "reversed", "dict", "bool", "iter"}
_CLEANING = {"strip", "lower", "upper", "lstrip", "rstrip", "copy", "casefold", "decode", "encode", "resolve", "sort"}
_EXCEPTIONS = {
    "ValueError": ("TypeError", "KeyError"),
    "TypeError": ("ValueError", "AttributeError"),
    "KeyError": ("IndexError", "ValueError"),
    "IndexError": ("KeyError", "ValueError"),
    "AttributeError": ("KeyError", "TypeError"),
    "NotImplementedError": ("RuntimeError", "ValueError"),
    "RuntimeError": ("ValueError", "TypeError"),
    "OSError": ("ValueError", "KeyError"),
    "ImportError": ("ValueError", "AttributeError"),
    "StopIteration": ("ValueError", "IndexError"),
    "FileNotFoundError": ("PermissionError", "ValueError"),
    "UnicodeDecodeError": ("KeyError", "TypeError"),
    "LookupError": ("TypeError", "ValueError"),
}
_BUILTINS = frozenset(dir(builtins))


def place_of(code: Code, node: ast.AST) -> str:
    """Where a node stands, in words: ``the condition of the `while` ``.

    Args:
        code: The text.
        node: A node of it.

    Returns:
        A phrase that goes after "in".
    """
    child = node
    while not isinstance(child, ast.stmt):
        parent = code.parents[child]
        if isinstance(parent, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return "the comprehension" if not isinstance(parent, ast.GeneratorExp) else "the generator expression"
        if isinstance(parent, ast.Lambda):
            return "the lambda"
        if isinstance(parent, (ast.If, ast.While)) and child is parent.test:
            text = code.short(parent.test, 40)
            keyword = "while" if isinstance(parent, ast.While) else "if"
            return f"the `{keyword} {text}` condition" if text and node is not child else f"the `{keyword}` condition"
        if isinstance(parent, ast.For) and child is parent.iter:
            target = code.short(parent.target, 30)
            return f"the loop over `{target}`" if target else "the `for` loop"
        if isinstance(parent, ast.Return):
            return "the return value"
        if isinstance(parent, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            target = code.short(targets[0], 40)
            return f"the assignment to `{target}`" if target else "an assignment"
        if isinstance(parent, ast.Raise):
            return "the `raise`"
        child = parent
    call = node if isinstance(node, ast.Call) else None
    return f"the call of `{code.short(call.func)}`" if call is not None and code.short(call.func) else "its body"


# --- operators -------------------------------------------------------------------------------------------------------


def _compares(code: Code, function: FunctionNode) -> Iterator[tuple[ast.Compare, int, int, str, str, str]]:
    for node in own_nodes(function):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            start, end, text = code.between(node.left, node.comparators[0])
            operator = _COMPARISONS[type(node.ops[0])]
            if text.strip() == operator:
                yield node, start, end, text, operator, code.short(node)


def boundary(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`<` for `<=` and the like."""
    for node, start, end, text, right, shown in _compares(code, function):
        if right in _BOUNDARY and shown:
            wrong = _BOUNDARY[right]
            bad = shown.replace(f" {right} ", f" {wrong} ", 1)
            left, other = code.source(node.left), code.source(node.comparators[0])
            yield Change(
                "boundary",
                (Splice(start, end, text.replace(right, wrong)),),
                precise=(
                    f"`{bad}` should be `{shown}`",
                    f"compare `{left}` and `{other}` with `{right}`, not `{wrong}`",
                    f"use {right} instead of {wrong} in {place_of(code, node)}",
                ),
                symptom=(
                    f"wrong result when `{left}` equals `{other}`",
                    f"the case where `{left}` is equal to `{other}` is on the wrong side",
                    f"off by one in {place_of(code, node)}",
                    f"the comparison of `{left}` with `{other}` is off at the boundary",
                ),
                vague=("off by one", "there is an off-by-one error", "it is wrong at the boundary"),
                korean=(f"`{left}`가 `{other}`와 같을 때 결과가 틀립니다.", f"경계 조건을 `{right}`로 고쳐 주세요."),
                plan=(f"Change `{bad}` to `{shown}`.", f"Use `{right}` instead of `{wrong}`."),
            )


def opposite(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A comparison turned round."""
    for node, start, end, text, right, shown in _compares(code, function):
        for wrong in _OPPOSITE[right]:
            if shown:
                bad = shown.replace(f" {right} ", f" {wrong} ", 1)
                yield Change(
                    "opposite",
                    (Splice(start, end, text.replace(right, wrong, 1)),),
                    precise=(
                        f"`{bad}` should be `{shown}`",
                        f"the check must be `{shown}`",
                        f"{place_of(code, node)} should use `{right}` and not `{wrong}`",
                    ),
                    symptom=(
                        f"the comparison in {place_of(code, node)} is the wrong way round",
                        f"{place_of(code, node)} tests the opposite of what it should",
                        f"`{code.source(node.left)}` is compared wrongly with `{code.source(node.comparators[0])}`",
                    ),
                    vague=("a comparison is the wrong way round", "one of the conditions is wrong"),
                    korean=(f"`{bad}` 조건이 반대로 되어 있습니다.", f"비교를 `{shown}`로 수정해 주세요."),
                    plan=(f"Change `{bad}` to `{shown}`.", f"Turn the comparison into `{shown}`."),
                )


def arithmetic(code: Code, function: FunctionNode) -> Iterator[Change]:
    """Another operator between two numbers, or in an augmented assignment."""
    for node in own_nodes(function):
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC and not _is_text(node):
            start, end, text = code.between(node.left, node.right)
            right, wrongs = _ARITHMETIC[type(node.op)]
            shown = code.short(node)
            if text.strip() != right or not shown:
                continue
            for wrong in wrongs:
                bad = code.source(node.left) + text.replace(right, wrong) + code.source(node.right)
                yield _operator(code, node, (Splice(start, end, text.replace(right, wrong)),), bad, shown, right, wrong)
        elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
            start, end, text = code.between(node.target, node.value)
            right, wrongs = _ARITHMETIC[type(node.op)]
            shown = code.short(node)
            if text.strip() != f"{right}=" or not shown or _is_text(node):
                continue
            for wrong in wrongs:
                new = text.replace(f"{right}=", f"{wrong}=")
                bad = code.source(node.target) + new + code.source(node.value)
                yield _operator(code, node, (Splice(start, end, new),), bad, shown, f"{right}=", f"{wrong}=")


def _operator(
    code: Code, node: ast.AST, splices: tuple[Splice, ...], bad: str, shown: str, right: str, wrong: str
) -> Change:
    place = place_of(code, node) if not isinstance(node, ast.stmt) else f"`{bad}`"
    return Change(
        "arithmetic",
        splices,
        precise=(f"`{bad}` should be `{shown}`", f"use `{right}` instead of `{wrong}` in {place}"),
        symptom=(f"the calculation in {place} is wrong", f"wrong operator in {place}", f"{place} computes nonsense"),
        vague=("the calculation is wrong", "one operator is wrong", "it computes the wrong value"),
        korean=(f"`{bad}` 계산이 잘못되었습니다. 고쳐 주세요.", f"`{bad}`를 `{shown}`로 바꿔 주세요."),
        plan=(f"Change `{bad}` to `{shown}`.", f"Use `{right}` instead of `{wrong}`."),
    )


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(part, (ast.JoinedStr, ast.List)) or _is_string(part) for part in ast.walk(node))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def boolean(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`and` for `or`."""
    for node in own_nodes(function):
        if isinstance(node, ast.BoolOp) and (shown := code.short(node, 80)):
            right, wrong = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            gaps = [code.between(one, other) for one, other in zip(node.values, node.values[1:], strict=False)]
            if any(text.strip() != right for _, _, text in gaps):
                continue
            splices = tuple(Splice(start, end, text.replace(right, wrong)) for start, end, text in gaps)
            place = place_of(code, node)
            yield Change(
                "boolean",
                splices,
                precise=(f"the condition should be `{shown}`", f"use `{right}` instead of `{wrong}` in {place}"),
                symptom=(
                    f"{place} combines its parts wrongly",
                    f"{place} is true in the wrong cases",
                    f"`{code.source(node.values[0])}` and `{code.source(node.values[-1])}` are combined wrongly",
                ),
                vague=("a condition is combined wrongly", "the logic of a condition is wrong"),
                korean=(f"조건을 `{shown}`로 고쳐 주세요.", f"`{wrong}` 대신 `{right}`를 사용해야 합니다."),
                plan=(f"Use `{right}` instead of `{wrong}`.", f"Make the condition `{shown}`."),
            )


def negated(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A condition that lost its `not`, or has one too many."""
    for node in own_nodes(function):
        if not isinstance(node, (ast.If, ast.While, ast.IfExp)) or not (shown := code.short(node.test)):
            continue
        test = node.test
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            wrong = code.source(test.operand)
        elif isinstance(test, (ast.Name, ast.Attribute, ast.Call)):
            wrong = f"not {shown}"
        else:
            continue
        keyword = "while" if isinstance(node, ast.While) else "if"
        yield Change(
            "negated",
            (code.replace(test, wrong),),
            precise=(
                f"the condition must be `{keyword} {shown}`",
                f"`{keyword} {wrong}` is inverted",
                f"negate the condition `{wrong}`",
            ),
            symptom=(
                f"it does the opposite of what it should depending on `{wrong.removeprefix('not ')}`",
                f"the two cases of `{wrong.removeprefix('not ')}` are mixed up",
                f"the condition on `{wrong.removeprefix('not ')}` is wrong",
            ),
            vague=("a condition is inverted", "an if is the wrong way round", "the check is inverted"),
            korean=(f"`{keyword} {wrong}` 조건이 반대입니다.", f"조건문을 `{keyword} {shown}`로 고쳐 주세요."),
            plan=(f"Change the condition to `{shown}`.", f"Replace `{keyword} {wrong}` by `{keyword} {shown}`."),
        )


# --- numbers, constants, names ---------------------------------------------------------------------------------------


def off_by_one(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A number in an index, a slice, a range or a sum is one off, or gone."""
    for node in own_nodes(function):
        for part, new in _ones(code, node):
            shown = code.short(node)
            if not shown:
                continue
            start, end = code.span(node)
            inner_start, inner_end = code.span(part)
            bad = (code.bytes[start:inner_start] + new.encode() + code.bytes[inner_end:end]).decode()
            yield Change(
                "off_by_one",
                (Splice(inner_start, inner_end, new),),
                precise=(f"`{bad}` should be `{shown}`", f"replace `{bad}` with `{shown}`"),
                symptom=(
                    f"off by one in {place_of(code, node)}",
                    f"`{bad}` is off by one",
                    f"{place_of(code, node)} takes one element too many or too few",
                ),
                vague=("off by one", "there is an off-by-one error somewhere", "fix the index"),
                korean=(f"`{bad}`에서 하나 차이로 틀립니다.", f"`{bad}`를 `{shown}`로 수정해 주세요."),
                plan=(f"Change `{bad}` to `{shown}`.",),
            )


def _ones(code: Code, node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.Slice):
            for bound in (index.lower, index.upper):
                if isinstance(bound, ast.Constant) and isinstance(bound.value, int):
                    yield bound, str(bound.value + 1)
                elif bound is not None:
                    yield from _sums(code, bound)
        elif isinstance(index, ast.Constant) and isinstance(index.value, int) and not isinstance(index.value, bool):
            yield index, str(index.value + 1 if index.value == 0 else index.value - 1)
        else:
            yield from _sums(code, index)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        for argument in node.args:
            found = list(_sums(code, argument))
            yield from found
            if isinstance(argument, ast.Constant) and argument.value in (0, 1):
                yield argument, str(1 - int(argument.value))
            elif not found and argument is node.args[-1] and len(node.args) < 3 and code.short(argument, 30):
                yield argument, f"{code.source(argument)} - 1"
                if isinstance(argument, (ast.Name, ast.Call)):
                    yield argument, f"{code.source(argument)} + 1"
    elif isinstance(node, (ast.Return, ast.Assign)) and isinstance(node.value, ast.BinOp):
        yield from _sums(code, node.value)
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
        yield from _sums(code, node.comparators[0])


def _sums(code: Code, node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """`x + 1` or `x - 1` without its number, or with the other sign."""
    is_one = isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and node.right.value in (1, 2)
    if is_one and isinstance(node.op, (ast.Add, ast.Sub)):  # type: ignore[union-attr]
        yield node, code.source(node.left)  # type: ignore[union-attr]


def constant(code: Code, function: FunctionNode) -> Iterator[Change]:
    """Another truth value or first value."""
    for node in own_nodes(function):
        parent = code.parents.get(node)
        if not isinstance(node, ast.Constant) or isinstance(parent, ast.Expr):
            continue
        if isinstance(node.value, bool):
            wrong = str(not node.value)
        elif type(node.value) is int and node.value in (0, 1) and isinstance(parent, (ast.Assign, ast.Return)):
            wrong = str(1 - node.value)
        else:
            continue
        statement = code.statement_of(node)
        shown = code.short(statement)
        if not shown or isinstance(statement, (ast.If, ast.For, ast.While, ast.With)):
            continue
        offset = code.span(node)[0] - code.span(statement)[0]
        bad = (shown.encode()[:offset] + wrong.encode() + shown.encode()[offset + len(code.source(node)) :]).decode()
        yield Change(
            "constant",
            (code.replace(node, wrong),),
            precise=(f"`{bad}` should be `{shown}`", f"write `{shown}` instead of `{bad}`"),
            symptom=(f"`{bad}` has the wrong value", f"the value in `{bad}` is wrong"),
            vague=("a constant is wrong",) if isinstance(node.value, bool) else ("it starts from the wrong value",),
            korean=(f"`{bad}`를 `{shown}`로 고쳐 주세요.",),
            plan=(f"Change `{bad}` to `{shown}`.",),
        )


def swapped_arguments(code: Code, function: FunctionNode) -> Iterator[Change]:
    """Two arguments of a call change places."""
    for node in own_nodes(function):
        if not isinstance(node, ast.Call) or len(node.args) < 2 or not (shown := code.short(node)):
            continue
        one, other = node.args[0], node.args[1]
        texts = code.source(one), code.source(other)
        if isinstance(one, ast.Starred) or isinstance(other, ast.Starred) or texts[0] == texts[1]:
            continue
        callee = code.source(node.func)
        if callee in ("min", "max") or _is_string(one) or _is_string(other):
            continue
        splices = (code.replace(one, texts[1]), code.replace(other, texts[0]))
        bad = shown.replace(f"{texts[0]}, {texts[1]}", f"{texts[1]}, {texts[0]}", 1)
        if bad == shown:
            continue
        yield Change(
            "swapped_arguments",
            splices,
            precise=(f"`{bad}` should be `{shown}`", f"swap the first two arguments of `{callee}` in `{bad}`"),
            symptom=(
                f"the arguments of `{callee}` are in the wrong order",
                f"`{callee}` is called with its arguments mixed up",
                f"`{texts[0]}` and `{texts[1]}` are swapped in the call of `{callee}`",
            ),
            vague=("arguments of a call are in the wrong order",),
            korean=(f"`{callee}` 호출의 인자 순서가 바뀌었습니다.",),
            plan=(f"Swap the arguments: `{shown}`.", f"Change `{bad}` to `{shown}`."),
        )


def wrong_name(code: Code, function: FunctionNode) -> Iterator[Change]:
    """Another variable of the function in the place of one."""
    names = [*parameters(function)]
    for node in own_nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    names = list(dict.fromkeys(name for name in names if name != "_"))
    assigned_at = {name: 0 for name in parameters(function)}
    for node in own_nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned_at.setdefault(node.id, node.lineno)
    for node in own_nodes(function):
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or node.id not in names:
            continue
        parent = code.parents[node]
        statement = code.statement_of(node)
        shown = code.short(parent) if isinstance(parent, ast.expr) else code.short(statement)
        if not shown or (isinstance(parent, ast.Call) and parent.func is node):
            continue
        holder = parent if isinstance(parent, ast.expr) else statement
        for wrong in names:
            if wrong == node.id or assigned_at.get(wrong, 10**9) > node.lineno or wrong in shown:
                continue
            offset = code.span(node)[0] - code.span(holder)[0]
            bad = (shown.encode()[:offset] + wrong.encode() + shown.encode()[offset + len(node.id.encode()) :]).decode()
            yield Change(
                "wrong_name",
                (code.replace(node, wrong),),
                precise=(
                    f"`{bad}` should be `{shown}`",
                    f"use `{node.id}` instead of `{wrong}` in `{bad}`",
                ),
                symptom=(
                    f"the wrong variable is used in {place_of(code, node)}",
                    f"`{wrong}` is used where `{node.id}` is meant",
                    f"`{node.id}` is not used where it should be",
                ),
                vague=("it uses the wrong variable somewhere", "the wrong variable is used"),
                korean=(f"`{wrong}` 대신 `{node.id}`를 사용해야 합니다.",),
                plan=(f"Use `{node.id}` instead of `{wrong}`.", f"Change `{bad}` to `{shown}`."),
            )


def wrong_function(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A function or method that does nearly the same."""
    for node in own_nodes(function):
        if not isinstance(node, ast.Call) or not (shown := code.short(node)):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            right, wrong = node.func.attr, _METHODS[node.func.attr]
            end = code.span(node.func)[1]
            splice = Splice(end - len(right), end, wrong)
        elif isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            right, wrong = node.func.id, _FUNCTIONS[node.func.id]
            splice = code.replace(node.func, wrong)
        else:
            continue
        offset = splice.start - code.span(node)[0]
        raw = shown.encode()
        bad = (raw[:offset] + wrong.encode() + raw[offset + len(right) :]).decode()
        yield Change(
            "wrong_function",
            (splice,),
            precise=(f"`{bad}` should be `{shown}`", f"call `{right}` instead of `{wrong}` in {place_of(code, node)}"),
            symptom=(f"`{wrong}` is the wrong call in {place_of(code, node)}", f"`{bad}` does not do what is meant"),
            vague=("it calls the wrong function", "a call is wrong"),
            korean=(f"`{wrong}` 대신 `{right}`를 호출해야 합니다.",),
            plan=(f"Use `{right}` instead of `{wrong}`.", f"Change `{bad}` to `{shown}`."),
        )


def wrong_exception(code: Code, function: FunctionNode) -> Iterator[Change]:
    """Another exception is raised or caught."""
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            verb = "raise"
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            named, verb = node.type, "catch"
        else:
            continue
        if not isinstance(named, ast.Name) or named.id not in _EXCEPTIONS:
            continue
        for wrong in _EXCEPTIONS[named.id]:
            yield Change(
                "wrong_exception",
                (code.replace(named, wrong),),
                precise=(
                    f"it should {verb} {named.id}, not {wrong}",
                    f"{verb} `{named.id}` instead of `{wrong}`",
                    f"`{wrong}` should be `{named.id}`",
                ),
                symptom=(
                    f"{named.id} is expected but {wrong} is raised" if verb == "raise" else f"{named.id} is not caught",
                    f"callers expect {named.id}" if verb == "raise" else f"a {named.id} goes through uncaught",
                ),
                korean=(f"{wrong} 대신 {named.id}를 사용해야 합니다.",),
                plan=(f"{verb.capitalize()} `{named.id}` instead of `{wrong}`.",),
            )


# --- what was left out -----------------------------------------------------------------------------------------------


def lost_return(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A value is computed and not returned."""
    for node in own_nodes(function):
        if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            start, _ = code.span(node)
            value = code.short(node.value)
            yield Change(
                "lost_return",
                (Splice(start, code.span(node.value)[0], ""),),
                precise=(
                    *((f"return `{value}`", f"it should return `{value}`") if value else ()),
                    "add the missing return",
                ),
                symptom=(
                    f"`{function.name}` returns None",
                    "it always gives None",
                    "the result is None instead of a value",
                ),
                vague=("the result gets lost", "nothing is returned"),
                korean=(
                    "값을 반환하지 않습니다. return을 추가해 주세요.",
                    f"`{function.name}`이 항상 None을 반환합니다.",
                ),
                plan=(f"Return `{value}`." if value else "Add the missing `return`.", "Add `return` to the last line."),
            )


def lost_await(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A coroutine is not awaited."""
    for node in own_nodes(function):
        if isinstance(node, ast.Await):
            value = code.short(node.value)
            start = code.span(node)[0]
            yield Change(
                "lost_await",
                (Splice(start, code.span(node.value)[0], ""),),
                precise=(*((f"await `{value}`",) if value else ()), "add the missing await"),
                symptom=(
                    "RuntimeWarning: coroutine was never awaited",
                    "it gets a coroutine object instead of the result",
                ),
                vague=("an await is missing", "forgot await"),
                korean=("await가 빠졌습니다.",),
                plan=(f"Await `{value}`." if value else "Add the missing `await`.",),
            )


def lost_self(code: Code, function: FunctionNode) -> Iterator[Change]:
    """An attribute without its object."""
    first = function.args.args[0].arg if function.args.args else ""
    known = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | set(parameters(function))
    for node in own_nodes(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == first == "self":
            shown = code.short(node)
            if not shown or node.attr in known or node.attr in _BUILTINS:
                continue
            yield Change(
                "lost_self",
                (code.replace(node, node.attr),),
                precise=(f"`{node.attr}` should be `{shown}`", f"use `{shown}`"),
                symptom=(
                    f"NameError: name '{node.attr}' is not defined",
                    f"`{node.attr}` is undefined in `{function.name}`",
                ),
                vague=("a self is missing", "NameError", "it fails with NameError"),
                korean=(f"NameError: name '{node.attr}' is not defined 오류를 고쳐 주세요.",),
                plan=(f"Write `{shown}` instead of `{node.attr}`.",),
            )


def lost_guard(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A check that raises or leaves early is gone."""
    for block in code.blocks(function):
        for node in block:
            if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1 or not code.owns_lines(node, node):
                continue
            action, test = node.body[0], code.short(node.test)
            said = code.short(action, 90)
            if not test or not isinstance(action, (ast.Raise, ast.Return, ast.Continue, ast.Break)):
                continue
            if isinstance(action, ast.Raise):
                name, message = _raised(code, action)
                if not name:
                    continue
                saying = f' with the message "{message}"' if message else ""
                precise = (
                    f"raise {name} if `{test}`{saying}",
                    f"check `{test}` and raise `{said}`" if said else f"raise {name} when `{test}`{saying}",
                    f"validate the input: when `{test}`, raise {name}{saying}",
                )
                symptom = (f"no {name} is raised when `{test}`{saying}", f"DID NOT RAISE {name} for `{test}`{saying}")
                plan = (f"Raise {name} if `{test}`.",)
            else:
                if not said:
                    continue
                precise = (f"`{said}` early if `{test}`", f"when `{test}`, `{said}`", f"add a check: if {test}: {said}")
                symptom = (f"the case `{test}` is not handled; it should `{said}`",)
                plan = (f"Add `if {test}: {said}`.",)
            yield Change(
                "lost_guard",
                (code.drop_lines(node, node, block),),
                precise=precise,
                symptom=symptom,
                korean=(f"`{test}`인 경우를 처리해 주세요: `{said}`",) if said else (),
                plan=plan,
            )


def _raised(code: Code, node: ast.Raise) -> tuple[str, str]:
    """Name and message of what is raised; no name if the message cannot be quoted."""
    call = node.exc
    if isinstance(call, ast.Name):
        return call.id, ""
    if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Name, ast.Attribute)) or len(call.args) > 1:
        return "", ""
    if call.keywords:
        return "", ""
    if not call.args:
        return code.source(call.func), ""
    text = code.source(call.args[0])
    return (code.source(call.func), text.strip("'\"f")) if "\n" not in text and len(text) < 90 else ("", "")


def lost_branch(code: Code, function: FunctionNode) -> Iterator[Change]:
    """An `elif` or `else` is gone."""
    for block in code.blocks(function):
        for node in block:
            if not isinstance(node, ast.If) or not node.orelse:
                continue
            chain = node.orelse[0]
            body = node.orelse
            start = code.lines_of(node.body[-1], node.body[-1])[1]
            end = code.lines_of(node.orelse[-1], node.orelse[-1])[1]
            if isinstance(chain, ast.If) and code.bytes[code.span(chain)[0] :].startswith(b"elif"):
                body = chain.body
                if chain.orelse:
                    continue
                condition = code.short(chain.test)
                phrase = f"when `{condition}`"
            else:
                test = code.short(node.test)
                phrase = f"when `{test}` is false" if test else "otherwise"
                condition = "else"
            done = "; ".join(code.short(statement) for statement in body)
            if not condition or len(body) > 2 or any(not code.short(statement) for statement in body) or len(done) > 90:
                continue
            yield Change(
                "lost_branch",
                (Splice(start, end, ""),),
                precise=(f"{phrase}, it should do `{done}`", f"add the missing branch: {phrase}, `{done}`"),
                symptom=(f"nothing happens {phrase}; it should do `{done}`",),
                korean=(f"빠진 분기를 추가해 주세요: {phrase} → `{done}`",),
                plan=(f"Add the branch with `{done}`.",),
            )


def lost_try(code: Code, function: FunctionNode) -> Iterator[Change]:
    """An error is not handled."""
    for block in code.blocks(function):
        for node in block:
            if not isinstance(node, ast.Try) or node.orelse or node.finalbody or len(node.handlers) != 1:
                continue
            handler = node.handlers[0]
            if handler.type is None or not code.owns_lines(node, node):
                continue
            body = code.move_lines(node.body[0], node.body[-1], -4)
            name, done = code.short(handler.type), "; ".join(code.short(one) for one in handler.body)
            if not body or not name or len(done) > 90 or any(not code.short(one) for one in handler.body):
                continue
            first = code.short(node.body[0])
            start, end = code.lines_of(node, node)
            what = {"pass": "ignore it", "return": "return"}.get(done, f"do `{done}`")
            binding = f" as {handler.name}" if handler.name else ""
            where = f" around `{first}`" if first and len(node.body) == 1 else ""
            yield Change(
                "lost_try",
                (Splice(start, end, body),),
                precise=(
                    f"catch {name}{binding}{where} and {what}",
                    f"handle {name}{where}: {what}",
                    f"add error handling: on {name}{binding}, {what}",
                ),
                symptom=(f"it crashes with {name}{where}; it should {what} instead",),
                korean=(f"{name} 예외를 처리해 주세요: {what}",),
                plan=(f"Catch {name}{where} and {what}.", f"Put it in a try and catch {name}."),
            )


def mutable_default(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A default that is shared by all calls."""
    defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
    for argument, default in defaults.items():
        if not (isinstance(default, ast.Constant) and default.value is None):
            continue
        for node in body_of(function):
            if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1 or node is function.body[-1]:
                continue
            made = node.body[0]
            is_check = code.source(node.test) == f"{argument.arg} is None"
            if is_check and isinstance(made, ast.Assign) and code.source(made.targets[0]) == argument.arg:
                value = code.source(made.value)
                if value in ("[]", "{}", "set()", "dict()", "list()"):
                    yield Change(
                        "mutable_default",
                        (code.replace(default, value), code.drop_lines(node, node, function.body)),
                        precise=(
                            f"use None as the default of `{argument.arg}` and make `{value}` inside",
                            f"`{argument.arg}={value}` is a mutable default argument",
                        ),
                        symptom=(
                            f"calls share the same `{argument.arg}`",
                            f"`{argument.arg}` keeps values of earlier calls",
                        ),
                        vague=("mutable default argument", "the default is shared between calls"),
                        korean=(f"`{argument.arg}`의 기본값이 호출 사이에 공유됩니다.",),
                        plan=(f"Default `{argument.arg}` to None and create it inside.",),
                    )


def lost_step(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A statement of a loop is gone: a counter, an append, a mark."""
    for block in code.blocks(function):
        for node in block:
            shown = code.short(node)
            if not shown or len(block) < 2 or not code.owns_lines(node, node):
                continue
            in_loop = isinstance(code.parents[node], (ast.For, ast.While)) or isinstance(
                code.parents.get(code.parents[node]), (ast.For, ast.While)
            )
            if isinstance(node, ast.AugAssign) and in_loop:
                target = code.source(node.target)
                symptom = (f"`{target}` is never updated", f"`{target}` stays the same in the loop")
                vague = ("the loop never ends", "something is not updated in the loop")
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and in_loop:
                call = node.value.func
                if not isinstance(call, ast.Attribute) or call.attr not in (
                    "append",
                    "add",
                    "extend",
                    "update",
                    "pop",
                    "remove",
                    "appendleft",
                    "write",
                    "put",
                    "setdefault",
                ):
                    continue
                target = code.source(call.value)
                symptom = (f"`{target}` is not filled", f"`{target}` misses the elements from the loop")
                vague = ("elements are missing from the result",)
            elif isinstance(node, (ast.Break, ast.Continue)):
                parent = code.parents[node]
                test = code.short(parent.test) if isinstance(parent, ast.If) else ""
                if not test:
                    continue
                what = "stop" if isinstance(node, ast.Break) else "go on with the next element"
                symptom = (f"the loop does not {what} when `{test}`",)
                vague = (f"the loop should {what} at some point",)
            elif isinstance(node, ast.Assign) and in_loop and isinstance(node.value, (ast.BinOp, ast.Name)):
                target = code.source(node.targets[0])
                symptom = (f"`{target}` is not updated in the loop",)
                vague = ("a variable is not updated in the loop",)
            else:
                continue
            yield Change(
                "lost_step",
                (code.drop_lines(node, node, block),),
                precise=(f"`{shown}` is missing", f"add `{shown}`", f"forgot `{shown}`"),
                symptom=symptom,
                vague=vague,
                korean=(f"`{shown}`가 빠졌습니다.", f"{symptom[0]} (버그 수정)"),
                plan=(f"Add `{shown}`.",),
            )


def lost_assignment(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A variable is used that was never set."""
    body = body_of(function)
    for node in body[:-1]:
        shown = code.short(node)
        if not shown or not isinstance(node, ast.Assign) or not code.owns_lines(node, node):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id not in parameters(function):
            name = target.id
            symptom = (f"NameError: name '{name}' is not defined", f"`{name}` is used before it is set")
            precise = (f"`{shown}` is missing", f"set `{name}` first: `{shown}`", f"initialise {name} with {shown}")
        elif isinstance(target, ast.Attribute) and code.source(target.value) == "self":
            name = code.source(target)
            symptom = (f"AttributeError: the object has no attribute '{target.attr}'", f"`{name}` is never set")
            precise = (f"set `{shown}`", f"store it: `{shown}`", f"`{shown}` is missing")
        else:
            continue
        is_plain = isinstance(node.value, (ast.List, ast.Dict, ast.Constant, ast.Name))
        yield Change(
            "lost_assignment",
            (code.drop_lines(node, node, function.body),),
            precise=precise,
            symptom=symptom if is_plain else (f"{symptom[0]} (it is `{shown}`)",),
            vague=(symptom[0],) if is_plain and isinstance(target, ast.Name) else (),
            korean=(f"`{shown}`가 빠졌습니다.",),
            plan=(f"Add `{shown}`.",),
        )


def lost_wrapper(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A conversion is gone: `str(x)`, `x.strip()`."""
    for node in own_nodes(function):
        if not isinstance(node, ast.Call) or node.keywords or not (shown := code.short(node)):
            continue
        if isinstance(code.parents[node], ast.Expr):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in _WRAPPERS and len(node.args) == 1:
            inner, what = node.args[0], f"`{node.func.id}()`"
            if isinstance(inner, (ast.GeneratorExp, ast.Starred)):
                continue
        elif isinstance(node.func, ast.Attribute) and node.func.attr in _CLEANING and not node.args:
            inner, what = node.func.value, f"`.{node.func.attr}()`"
        else:
            continue
        bare = code.source(inner)
        yield Change(
            "lost_wrapper",
            (code.replace(node, bare),),
            precise=(f"use `{shown}` instead of `{bare}`", f"apply {what} to `{bare}` in {place_of(code, node)}"),
            symptom=(f"{what} is missing in {place_of(code, node)}", f"`{bare}` has to go through {what}"),
            vague=(f"{what} is missing somewhere",),
            korean=(f"`{bare}`에 {what}를 적용해 주세요.",),
            plan=(f"Use `{shown}` instead of `{bare}`.",),
        )


def lost_default(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`d[k]` for `d.get(k)`."""
    for node in own_nodes(function):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "get":
            continue
        shown = code.short(node)
        if not shown or node.keywords or len(node.args) not in (1, 2):
            continue
        holder, key = code.source(node.func.value), code.source(node.args[0])
        default = code.source(node.args[1]) if len(node.args) == 2 else "None"
        yield Change(
            "lost_default",
            (code.replace(node, f"{holder}[{key}]"),),
            precise=(f"use {default} if {key} is not in `{holder}`", f"`{holder}[{key}]` should be `{shown}`"),
            symptom=(f"KeyError when `{holder}` has no {key}; it should be {default} then",),
            vague=(f"KeyError: {key}",) if default == "None" else (),
            korean=(f"`{holder}`에 {key}가 없으면 {default}를 사용하게 해 주세요.",),
            plan=(f"Use `{shown}`.",),
        )


def lost_part(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A part of a condition or of a sum is gone."""
    for node in own_nodes(function):
        if not isinstance(node, ast.BoolOp) or not (shown := code.short(node, 80)) or len(node.values) < 2:
            continue
        operator = "and" if isinstance(node.op, ast.And) else "or"
        gone, before = node.values[-1], node.values[-2]
        text, (_, end), rest = code.source(gone), code.span(node), code.span(before)[1]
        if isinstance(gone, ast.BoolOp) or (code.source(node).endswith(")") and not text.endswith(")")):
            continue
        place = place_of(code, node)
        yield Change(
            "lost_part",
            (Splice(rest, end, ""),),
            precise=(f"the condition should be `{shown}`", f"add `{operator} {text}` to {place}"),
            symptom=(
                f"{place} does not look at `{text}`",
                f"`{text}` should {'be required' if operator == 'and' else 'count'} too in {place}",
            ),
            korean=(f"조건에 `{operator} {text}`를 추가해 주세요.",),
            plan=(f"Add `{operator} {text}` to the condition.",),
        )


# --- order -----------------------------------------------------------------------------------------------------------


def early_return(code: Code, function: FunctionNode) -> Iterator[Change]:
    """The last `return` slid into the loop above it."""
    for block in code.blocks(function):
        for loop, last in pairwise(block):
            if isinstance(loop, (ast.For, ast.While)) and isinstance(last, ast.Return) and not loop.orelse:
                moved = code.move_lines(last, last, 4)
                if not moved or not code.owns_lines(last, last):
                    continue
                start, end = code.lines_of(last, last)
                said = code.short(last)
                yield Change(
                    "early_return",
                    (Splice(start, end, moved),),
                    precise=(
                        f"`{said}` belongs after the loop" if said else "the return belongs after the loop",
                        "dedent the last return",
                    ),
                    symptom=("it returns in the first iteration", "only the first element is looked at"),
                    vague=("it stops too early", "it returns too early", "only looks at the first element"),
                    korean=("첫 번째 반복에서 바로 반환됩니다.",),
                    plan=("Move the return out of the loop.",),
                )


def swapped_branches(code: Code, function: FunctionNode) -> Iterator[Change]:
    """The two values of a conditional expression, or two assigned names, change places."""
    for node in own_nodes(function):
        if isinstance(node, ast.IfExp) and (shown := code.short(node, 80)):
            one, other, parts = code.source(node.body), code.source(node.orelse), (node.body, node.orelse)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and (shown := code.short(node, 80)):
            if len(node.value.elts) != 2:
                continue
            parts = (node.value.elts[0], node.value.elts[1])
            one, other = code.source(parts[0]), code.source(parts[1])
        else:
            continue
        if one == other:
            continue
        yield Change(
            "swapped_branches",
            (code.replace(parts[0], other), code.replace(parts[1], one)),
            precise=(f"it should be `{shown}`", f"swap `{one}` and `{other}`"),
            symptom=(
                f"`{one}` and `{other}` are swapped",
                f"it gives `{other}` where `{one}` is right, and the other way round",
            ),
            vague=("two values are swapped", "two values are mixed up"),
            korean=(f"`{one}`와 `{other}`가 서로 바뀌었습니다.",),
            plan=(f"Swap `{one}` and `{other}`.", f"Write `{shown}`."),
        )


def lost_from(code: Code, function: FunctionNode) -> Iterator[Change]:
    """`yield x` for `yield from x`."""
    for node in own_nodes(function):
        if isinstance(node, ast.YieldFrom) and (shown := code.short(node)):
            value = code.source(node.value)
            yield Change(
                "lost_from",
                (code.replace(node, f"yield {value}"),),
                precise=(f"`yield {value}` should be `{shown}`", f"yield the elements of `{value}` one by one"),
                symptom=(
                    f"it yields `{value}` as a whole instead of its elements",
                    "the generator gives nested iterables",
                ),
                vague=("it yields an iterator instead of its elements",),
                korean=(f"`{value}`의 요소를 하나씩 yield 해야 합니다.",),
                plan=(f"Use `{shown}`.",),
            )


def recursion(code: Code, function: FunctionNode) -> Iterator[Change]:
    """A recursive call does not get smaller, or drops a part of its argument."""
    for node in own_nodes(function):
        if not isinstance(node, ast.Call) or not (shown := code.short(node)):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called != function.name:
            continue
        for argument in node.args:
            if isinstance(argument, ast.BinOp) and isinstance(argument.left, ast.Name):
                inner: ast.expr = argument.left
            elif isinstance(argument, (ast.Subscript, ast.Attribute)) and isinstance(argument.value, ast.Name):
                inner = argument.value
            else:
                continue
            bad = shown.replace(code.source(argument), code.source(inner), 1)
            yield Change(
                "recursion",
                (code.replace(argument, code.source(inner)),),
                precise=(f"`{bad}` should be `{shown}`", f"recurse with `{code.source(argument)}`"),
                symptom=("RecursionError: maximum recursion depth exceeded", "the recursion never ends"),
                vague=("infinite recursion", "it recurses forever", "the recursive call is wrong"),
                korean=("재귀가 끝나지 않습니다.",),
                plan=(f"Recurse with `{code.source(argument)}`.", f"Change `{bad}` to `{shown}`."),
            )


FAULTS: dict[str, tuple[Fault, float]] = {
    "boundary": (boundary, 1.6),
    "opposite": (opposite, 1.0),
    "arithmetic": (arithmetic, 1.4),
    "boolean": (boolean, 1.2),
    "negated": (negated, 1.0),
    "off_by_one": (off_by_one, 1.6),
    "constant": (constant, 0.8),
    "swapped_arguments": (swapped_arguments, 1.0),
    "wrong_name": (wrong_name, 1.1),
    "wrong_function": (wrong_function, 1.2),
    "wrong_exception": (wrong_exception, 0.6),
    "lost_return": (lost_return, 0.5),
    "lost_await": (lost_await, 0.6),
    "lost_self": (lost_self, 0.3),
    "lost_guard": (lost_guard, 1.2),
    "lost_branch": (lost_branch, 1.0),
    "lost_try": (lost_try, 1.2),
    "mutable_default": (mutable_default, 1.0),
    "lost_step": (lost_step, 1.4),
    "lost_assignment": (lost_assignment, 0.8),
    "lost_wrapper": (lost_wrapper, 1.2),
    "lost_default": (lost_default, 0.8),
    "lost_part": (lost_part, 0.8),
    "early_return": (early_return, 1.0),
    "swapped_branches": (swapped_branches, 0.8),
    "lost_from": (lost_from, 0.8),
    "recursion": (recursion, 1.5),
}
