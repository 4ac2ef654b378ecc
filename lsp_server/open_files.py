"""The documents that the client has open, and what the server knows of each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import SourceError, UsageError
from engine.patching.ledger_records import Entry, path_key
from engine.patching.source import MAX_SOURCE_BYTES, Source
from lsp_server.code_actions import Offer
from lsp_server.documents import Document, Encoding
from lsp_server.survival import Watch, normalised
from lsp_server.uris import path_of

_MOST_PENDING = 8


@dataclass(slots=True)
class Pending:
    """A patch that waits for the user.

    Args:
        entry: The proposal.
        offer: What the menu shows.
        base: The document's exact text that it was made for.
    """

    entry: Entry
    offer: Offer
    base: str


@dataclass(slots=True)
class Search:
    """The texts that an edit on its way may lead to, and which of them was seen.

    Args:
        targets: Normalised texts with the hunks that each has.
        found: The hunks of the one that was seen last.
    """

    targets: Mapping[str, tuple[int, ...]]
    found: tuple[int, ...] | None = None

    def look(self, text: str) -> None:
        """Take in a text that the document had."""
        self.found = self.targets.get(text, self.found)


@dataclass(slots=True)
class OpenFile:
    """One open document.

    Args:
        document: Its text.
        path: The file; None for a document that is none.
        pending: Patches that wait, by id.
        refused: The last refusal of each function, with the text that it was for.
        watches: Applied patches whose fate is watched, by id.
        late: Diverged patches whose text may still come: the text and its hunks, by id.
        applied: The last applied patch and what it was for, as the menu says it.
        rolled_back: The last one that was rolled back, likewise.
        lock: Held while an edit of ours is on its way.
        changed: Set at each change of the text.
        search: Not None while an edit of ours is on its way.
        save_is_manual: What the client said of the save that comes.
        settle: Draws notes anew after a change.
    """

    document: Document
    path: Path | None
    pending: dict[str, Pending] = field(default_factory=dict[str, Pending])
    refused: dict[str, tuple[str, Offer]] = field(default_factory=dict[str, tuple[str, Offer]])
    watches: dict[str, Watch] = field(default_factory=dict[str, Watch])
    late: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict[str, tuple[str, tuple[int, ...]]])
    applied: tuple[str, str] | None = None
    rolled_back: tuple[str, str] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    search: Search | None = None
    save_is_manual: bool | None = None
    settle: asyncio.TimerHandle | None = None

    @property
    def is_python(self) -> bool:
        """Whether it is Python."""
        return self.document.language_id == "python" or self.document.uri.endswith((".py", ".pyi"))

    @property
    def text(self) -> str:
        """Its text as two editors agree on it."""
        return normalised(self.document.text)

    def wait_for_user(self, pending: Pending) -> None:
        """Offer a patch, instead of an earlier one of the same function."""
        others = [one for one in self.pending.values() if one.offer.function != pending.offer.function]
        self.pending = {one.entry.id: one for one in (*others[-_MOST_PENDING:], pending)}

    def offered(self) -> list[Pending]:
        """The patches that wait and were made for the very text."""
        return [pending for pending in self.pending.values() if pending.base == self.document.text]

    def refusals(self) -> list[Offer]:
        """The refusals for the very text."""
        return [offer for base, offer in self.refused.values() if base == self.document.text]

    def check(self) -> None:
        """Refuse a document that cannot be edited, as far as that is seen without reading all of it.

        Raises:
            UsageError: It is not Python, or no file.
            SourceError: It may not be the client's text, or declares another encoding than UTF-8.
        """
        document = self.document
        if document.out_of_step:
            raise SourceError(
                f"The text of {self.path or document.uri} may not be the editor's: {document.out_of_step}",
                hint="Close the file and open it again.",
            )
        if not self.is_python:
            raise UsageError(f"{self.path or document.uri} is not Python", hint="PlanPatch edits Python files.")
        if self.path is None:
            raise UsageError(f"{document.uri} is no file yet", hint="Save it first.")
        if len(document.text) > MAX_SOURCE_BYTES or "\0" in document.text:
            self.source()
        head = "\n".join(document.line_text(line) for line in (0, 1))
        Source.from_text(head, self.path.as_posix())

    def source(self) -> Source:
        """The text as the patcher takes it.

        Returns:
            The text, named by its path.

        Raises:
            UsageError: It is not Python, or no file.
            SourceError: It cannot be edited, or may not be the client's text.
        """
        if self.document.out_of_step or not self.is_python or self.path is None:
            self.check()
        assert self.path is not None
        return Source.from_text(self.document.text, self.path.as_posix())


class OpenFiles:
    """Every open document, by URI.

    Args:
        encoding: What positions count.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding: Encoding = encoding
        self._files: dict[str, OpenFile] = {}

    def open(self, uri: str, text: str, version: int, language_id: str) -> OpenFile:
        """Take in a document that the client opened; one that was open already is forgotten.

        Args:
            uri: As the client writes it.
            text: Its text.
            version: The client's.
            language_id: The client's.

        Returns:
            The document.
        """
        document = Document(uri, text, version, language_id, self._encoding)
        self._files[uri] = OpenFile(document, path_of(uri))
        return self._files[uri]

    def close(self, uri: str) -> OpenFile | None:
        """Forget a document and return it."""
        return self._files.pop(uri, None)

    def get(self, uri: str) -> OpenFile | None:
        """The document, None if it is not open."""
        return self._files.get(uri)

    def __getitem__(self, uri: str) -> OpenFile:
        """The document.

        Raises:
            UsageError: It is not open.
        """
        file = self._files.get(uri)
        if file is None:
            raise UsageError(f"{uri} is not open", hint="Open the file in the editor first.")
        return file

    def __iter__(self) -> Iterator[OpenFile]:
        """The documents, as they are now."""
        return iter(list(self._files.values()))

    def of_path(self, path: Path | None) -> OpenFile | None:
        """The document of a file, None if none is open."""
        key = path_key(path)
        if key is None:
            return None
        exact = next((file for file in self if file.path == path), None)  # a link and its target are two documents
        return exact or next((file for file in self if file.path is not None and path_key(file.path) == key), None)
