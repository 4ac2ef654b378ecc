"""Plan documents: a Markdown file for each planned function, which the user may edit in any editor.

It is found again from the *Python* file, so no server has to be attached to Markdown. What counts is the saved file at
the moment a patch is asked for: the text below `## Intent` and below `## Plan`. Its first line says which function it
is for; documents outlive the server.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import PathError, UsageError
from engine.patching.disk import write_atomically
from engine.patching.ledger_records import path_key
from engine.patching.patcher import Plan
from lsp_server.paths import make_private_folder

_MARK = re.compile(r"\A\ufeff?<!-- planpatch (\{.*\}) -->[ \t]*\r?$", re.MULTILINE)
_HEADING = re.compile(r"^##[ \t]+(Intent|Plan)[ \t]*$", re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_MAX_AGE_S = 30 * 24 * 3600
_MAX_BYTES = 200_000
_MOST_LINES_SHOWN = 60


@dataclass(frozen=True, slots=True)
class PlanDocument:
    """One plan document.

    Args:
        file: Where it is.
        path: The Python file.
        function: Qualified name of the function; empty for the whole file.
        plan_id: The plan in the ledger; empty while only an intent was asked for.
        intent: What it was written for; the file may say something else by now.
    """

    file: Path
    path: str
    function: str
    plan_id: str = ""
    intent: str = ""


@dataclass(frozen=True, slots=True)
class PlanText:
    """What a plan document says now."""

    intent: str
    steps: tuple[str, ...]


class PlanDocuments:
    """The plan documents of one PLANPATCH_HOME.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], PlanDocument] | None = None

    def find(self, path: Path, function: str) -> PlanDocument | None:
        """The latest document for a function.

        Args:
            path: The Python file.
            function: Qualified name; empty for the whole file.

        Returns:
            The document, None if there is none.
        """
        key = (path_key(path) or "", function)
        known = self._all()
        document = known.get(key)
        if document is not None and not document.file.is_file():
            del known[key]
            return None
        return document

    def write(
        self, path: Path, function: str, intent: str, steps: Sequence[str], plan_id: str = "", about: str = ""
    ) -> PlanDocument:
        """Write a function's document anew.

        Args:
            path: The Python file.
            function: Qualified name; empty for the whole file.
            intent: What the user wants; may be empty, to be filled in.
            steps: The plan.
            plan_id: The plan in the ledger.
            about: Markdown above the headings, for the reader: what the model was shown.

        Returns:
            The document.

        Raises:
            WriteError: It cannot be written.
        """
        make_private_folder(self._folder)
        key = (path_key(path) or "", function)
        old = self._all().get(key)
        file = old.file if old is not None else self._free_name(path, function)
        document = PlanDocument(file, str(path), function, plan_id, intent)
        text = _rendered(document, intent, steps, about)
        write_atomically(file, text.encode("utf-8", "replace"), expected_sha256=None, private=True)
        self._all()[key] = document
        return document

    def of(self, path: Path) -> list[PlanDocument]:
        """The latest document of each function of a file.

        Args:
            path: The Python file.

        Returns:
            The documents.
        """
        key = path_key(path) or ""
        return [found for known, name in list(self._all()) if known == key and (found := self.find(path, name))]

    def read(self, document: PlanDocument) -> PlanText:
        """What a document says now.

        Args:
            document: The document.

        Returns:
            Intent and steps, comments left out.

        Raises:
            PathError: It is gone or cannot be read.
            UsageError: Its headings are gone.
        """
        try:
            text = document.file.read_bytes()[:_MAX_BYTES].decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as fault:
            raise PathError(
                f"The plan document {document.file} cannot be read: {fault}", hint="Plan the change again."
            ) from fault
        text = _COMMENT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        parts = _HEADING.split(text)
        sections = {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
        if not sections:
            raise UsageError(
                f"{document.file} has neither `## Intent` nor `## Plan`", hint="Put the headings back, or plan again."
            )
        steps = (_ITEM.sub("", line).strip() for line in sections.get("Plan", "").splitlines())
        return PlanText(" ".join(sections.get("Intent", "").split()), tuple(step for step in steps if step))

    def _all(self) -> dict[tuple[str, str], PlanDocument]:
        """Every document, read from the folder once; those that are too old are removed."""
        if self._known is None:
            found: list[tuple[float, PlanDocument]] = []
            for file in self._folder.glob("*.md") if self._folder.is_dir() else ():
                try:
                    changed_at = file.stat().st_mtime
                    if time.time() - changed_at > _MAX_AGE_S:
                        file.unlink()
                    elif (document := _document_in(file)) is not None:
                        found.append((changed_at, replace(document, intent=self.read(document).intent)))
                except (OSError, PathError, UsageError):
                    continue  # gone, another user's, or without its headings: nothing to offer
            found.sort(key=lambda pair: pair[0])
            self._known = {(path_key(Path(one.path)) or "", one.function): one for _, one in found}
        return self._known

    def _free_name(self, path: Path, function: str) -> Path:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{path.stem}-{function or 'file'}").strip("-.")[:60] or "plan"
        number, file = 1, self._folder / f"{stem}.md"
        while file.exists():
            number += 1
            file = self._folder / f"{stem}-{number}.md"
        return file


def _document_in(file: Path) -> PlanDocument | None:
    with file.open("rb") as stream:
        match = _MARK.search(stream.read(8192).decode("utf-8", "replace"))
    if match is None:
        return None
    try:
        facts = json.loads(match[1])
        path, function, plan_id = (facts[name] for name in ("path", "function", "plan"))
    except (ValueError, KeyError, TypeError):
        return None
    is_ours = all(isinstance(value, str) for value in (path, function, plan_id)) and Path(path).is_absolute()
    return PlanDocument(file, path, function, plan_id) if is_ours else None


def shown_context(plan: Plan, function_text: str, context_length: int) -> str:
    """What the model was shown for a plan, as Markdown that holds neither a heading nor a comment of ours.

    Args:
        plan: The plan.
        function_text: The function's own text.
        context_length: Most tokens of prompt and answer together; 0 if it is not known.

    Returns:
        Lines of the function, tokens of its context, what was left out, and the function.
    """
    scope, tokens = plan.scope, plan.timings.num_prompt_tokens
    limit = f" of {context_length}" if context_length else ""
    left_out = "; ".join(plan.dropped) or "nothing"
    lines = re.split(r"\r\n|\r|\n", function_text.rstrip())
    code = lines if len(lines) <= _MOST_LINES_SHOWN else [*lines[:_MOST_LINES_SHOWN], "…"]
    shown = "\n".join(f"    {line}".rstrip() for line in code).replace("<!--", "<!- -").replace("-->", "- ->")
    facts = f"Lines {scope.start_line} to {scope.end_line}; context: {tokens}{limit} tokens; left out: {left_out}."
    return f"{facts}\n\n{shown}\n"


def _rendered(document: PlanDocument, intent: str, steps: Sequence[str], about: str) -> str:
    facts = json.dumps({"path": document.path, "function": document.function, "plan": document.plan_id})
    facts = facts.replace("--", "-\\u002d")  # a comment of HTML may not hold two hyphens
    what = f"`{document.function}`" if document.function else "the whole file"
    lines = "".join(f"- {step}\n" for step in steps)
    how = (
        "Edit intent and plan as you like and save. Then, in the Python file, choose"
        f' "PlanPatch: patch from plan" on {what}.'
        if steps
        else "Write what you want to change below Intent and save. Then, in the Python file, choose"
        f' "PlanPatch: patch from plan" on {what}, or "PlanPatch: plan a change" for a plan first.'
    )
    return (
        f"<!-- planpatch {facts} -->\n"
        f"# Plan for {what} in {Path(document.path).name}\n\n<!-- {how} -->\n\n"
        f"{about}{chr(10) if about else ''}"
        f"## Intent\n\n{intent}\n\n## Plan\n\n{lines}"
    )
