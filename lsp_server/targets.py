"""What a command is about: its argument, checked, and the function that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from engine.errors import UnknownScopeError, UsageError
from engine.patching.ledger_records import State, Summary
from engine.patching.prompts import Feedback
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import Source
from lsp_server.documents import Position


@dataclass(frozen=True, slots=True)
class Target:
    """What a command is about.

    Args:
        uri: The document.
        text: Its exact text when the command came.
        source: The same as the patcher takes it.
        scope: The function, class or file.
    """

    uri: str
    text: str
    source: Source
    scope: Scope

    @property
    def function(self) -> str:
        """Qualified name; empty for the whole file."""
        return "" if self.scope.kind == "module" else self.scope.qualname

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.scope.qualname if self.function else "the whole file"

    @property
    def scope_text(self) -> str:
        """The function's own text."""
        return self.source.text_between(self.scope.start_line, self.scope.end_line)


def text_argument(argument: Mapping[str, Any], name: str) -> str | None:
    """A field of the argument.

    Args:
        argument: The command's argument.
        name: The field.

    Returns:
        Its text; None if it is missing, null or empty.

    Raises:
        UsageError: It is no text.
    """
    value = argument.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UsageError(f"`{name}` is text, not {value!r}")
    return whole_text(value)


def whole_text(text: str) -> str:
    """A text whose lone surrogates, which some clients send half an emoji as, are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def place_argument(argument: Mapping[str, Any]) -> tuple[Position, Position]:
    """The `range` or `position` of an argument.

    Args:
        argument: The command's argument.

    Returns:
        Start and end.

    Raises:
        UsageError: It has neither.
    """
    found: Any = argument.get("range") or argument.get("position")
    try:
        first, last = (found, found) if "line" in found else (found["start"], found["end"])
        start, end = (Position(int(place["line"]), int(place["character"])) for place in (first, last))
    except (TypeError, KeyError, ValueError):
        raise UsageError(
            "The argument has neither a `range` nor a `position`", hint="Give {uri, position: {line, character}}."
        ) from None
    if start.line < 0 or start.character < 0 or end < start:
        raise UsageError(f"{found!r} is no range")
    return start, end


def hunks_argument(hunks: object, count: int, patch_id: str) -> tuple[int, ...]:
    """Which hunks of a patch are meant.

    Args:
        hunks: Indices from 0; None for all.
        count: How many it has.
        patch_id: The proposal, for the message.

    Returns:
        The indices, each once, ascending.

    Raises:
        UsageError: There are no such hunks.
    """
    if hunks is None:
        return tuple(range(count))
    numbers = cast("Sequence[object]", hunks) if isinstance(hunks, Sequence) and not isinstance(hunks, str) else ()
    chosen = [one for one in numbers if isinstance(one, int) and 0 <= one < count]
    if not chosen or len(chosen) < len(numbers):
        raise UsageError(f"{hunks!r} are no hunks of {patch_id}", hint=f"Give indices from 0 to {count - 1}.")
    return tuple(sorted(set(chosen)))


def ledger_filter(text: str, states: object) -> Callable[[Summary], bool]:
    """What is looked for in the ledger.

    Args:
        text: Words, all of which stand in what was asked for, where, or why it was refused; their case does not count.
        states: States by name; none for all.

    Returns:
        Says whether a proposal is meant.

    Raises:
        UsageError: There is no such state.
    """
    known = {state.value for state in State}
    wanted = set(cast("Sequence[str]", states)) if isinstance(states, (list, tuple)) else {states}
    if not wanted <= known:
        raise UsageError(f"`states` are some of {', '.join(sorted(known))}, not {states!r}")
    words = text.lower().split()

    def is_meant(summary: Summary) -> bool:
        fields = (summary.intent, summary.scope, str(summary.path or ""), summary.id, summary.error, summary.model)
        said = "\n".join(fields).lower()
        return (not wanted or summary.state.value in wanted) and all(word in said for word in words)

    return is_meant


def feedback_argument(found: object) -> Feedback | None:
    """The user's feedback on an earlier patch, if the argument has any."""
    if not isinstance(found, Mapping):
        return None
    table = cast("Mapping[str, Any]", found)
    reason, hint = (whole_text(str(table.get(name) or "")) for name in ("reason", "hint"))
    return Feedback(reason, hint) if reason or hint else None


def scope_at(source: Source, start: Position, end: Position) -> Scope:
    """The innermost function or class that holds the whole selection; a cursor means the innermost around it.

    Args:
        source: The file.
        start: Start of the selection; only its line counts.
        end: Its end; at the beginning of a line the line before is meant.

    Returns:
        The scope; the module where no other holds it.

    Raises:
        UnknownScopeError: The place is behind the end of the file.
        SourceError: Neither the file nor the function parses.
    """
    line, last_line = start.line, end.line - 1 if end.character == 0 and end.line > start.line else end.line
    if line > source.num_lines:
        raise UnknownScopeError(f"Line {line + 1} is behind the end of {source.path}")
    if line == source.num_lines:
        return find_scope(source)  # the empty line behind the last one belongs to no function
    last_line = min(last_line, source.num_lines - 1)
    while line < last_line and not source.lines[line].strip():
        line += 1
    while last_line > line and not source.lines[last_line].strip():
        last_line -= 1
    scope = find_scope(source, None, line + 1)
    while scope.kind != "module" and not scope.contains(last_line + 1):
        outer = scope.qualname.rpartition(".")[0]
        try:
            scope = find_scope(source, outer, scope.start_line) if outer else find_scope(source)
        except UnknownScopeError:
            scope = find_scope(source)
    return scope


def intent_of_diagnostic(diagnostic: Mapping[str, Any], source: Source) -> str:
    """A diagnostic of another server as an intent.

    Args:
        diagnostic: As JSON.
        source: The file.

    Returns:
        The intent; it quotes the line.

    Raises:
        UsageError: It has no message.
    """
    message = " ".join(whole_text(str(diagnostic.get("message", ""))).split())
    if not message:
        raise UsageError("The diagnostic has no message")
    by = f" reported by {diagnostic['source']}" if diagnostic.get("source") else ""
    code = diagnostic.get("code")
    rule = f" ({code})" if isinstance(code, (str, int)) and code != "" else ""
    with suppress(TypeError, KeyError, ValueError, IndexError):
        line = source.lines[int(diagnostic["range"]["start"]["line"])].strip()
        return f"Fix this problem{by}{rule}: {message}. It is at the line `{line}`."
    return f"Fix this problem{by}{rule}: {message}."
