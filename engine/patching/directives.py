"""An intent written into the code: `# pp: what to do`.

It is for editors that cannot ask for text. The model is shown the code without it, and the patch removes it.

Not covered: directives in strings, which are text like any other, and code that does not parse.
"""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import replace

from engine.patching.scopes import Scope, find_scope, module_scope, standalone_text
from engine.patching.source import Source

_DIRECTIVE = re.compile(r"#\s*pp:(?P<intent>.*)", re.DOTALL | re.IGNORECASE)


def directive_intent(source: Source, scope: Scope) -> str:
    """What the directives of a scope ask for.

    Args:
        source: The file.
        scope: A part of it.

    Returns:
        Their texts, joined by spaces; empty if there is none.
    """
    return " ".join(intent for _, _, intent in _directives(source, scope) if intent)


def is_directive(comment: str) -> bool:
    """Whether a comment, with its `#`, is a directive.

    Args:
        comment: The comment.

    Returns:
        Whether it is one.
    """
    return _DIRECTIVE.match(comment) is not None


def without_directives(source: Source, scope: Scope) -> tuple[Source, Scope]:
    """The text as if no directive had been written into a scope.

    Args:
        source: The file.
        scope: A part of it.

    Returns:
        The text and the same scope in it; `source` and `scope` themselves if there is no directive.

    Raises:
        UnknownScopeError: The scope is not found again.
        SourceError: The scope does not parse without them.
    """
    found = {line: column for line, column, _ in _directives(source, scope)}
    if not found:
        return source, scope
    kept: list[tuple[str, str]] = []
    for number, (line, eol) in enumerate(zip(source.lines, source.eols, strict=True), start=1):
        before = line[: found[number]].rstrip() if number in found else line
        if before or number not in found:
            kept.append((before, eol))
    if kept and source.eols[-1] == "":
        kept[-1] = (kept[-1][0], "")
    view = replace(source, lines=tuple(line for line, _ in kept), eols=tuple(eol for _, eol in kept))
    if scope.kind == "module":
        return view, module_scope(view, parses=scope.parses)
    return view, find_scope(view, scope.qualname, scope.def_line)


def _directives(source: Source, scope: Scope) -> list[tuple[int, int, str]]:
    """Line (1-based), column (0-based) and text of each directive."""
    text = standalone_text(source.lines[scope.start_line - 1 : scope.end_line], scope.indent)
    first_line = scope.start_line - (1 if scope.indent else 0)
    found: list[tuple[int, int, str]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and (match := _DIRECTIVE.match(token.string)):
                found.append((first_line + token.start[0] - 1, token.start[1], match["intent"].strip()))
    except (tokenize.TokenError, SyntaxError):
        return []
    return found
