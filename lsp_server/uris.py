"""File URIs and paths, as editors on Linux, macOS and Windows write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


def path_of(uri: str, *, windows: bool = os.name == "nt") -> Path | None:
    """The file that a URI names.

    Args:
        uri: Such as `file:///home/me/a.py`, `file:///c%3A/work/a.py` or `file://server/share/a.py`.
        windows: Whether drive letters and shares are meant.

    Returns:
        An absolute path; None for a URI of another kind, such as `untitled:`.
    """
    parts = urlsplit(uri)
    if parts.scheme.lower() != "file":
        return None
    path = unquote(parts.path, errors="surrogateescape")
    if windows:
        drive = re.match(r"/([A-Za-z]):", path)
        if drive is not None:
            path = f"{drive[1].upper()}:{path[3:]}"
        elif parts.netloc and parts.netloc != "localhost":
            path = f"//{parts.netloc}{path}"
    elif parts.netloc not in ("", "localhost"):
        return None
    return Path(path) if path.startswith("/") or windows else None


def uri_of(path: Path) -> str:
    """The URI of a file.

    Args:
        path: Absolute.

    Returns:
        `file://` and the path, percent-encoded.
    """
    text = path.as_posix()
    encoded = quote(os.fsencode(text) if os.name != "nt" else text.encode("utf-8"), safe="/:@!$&'()*+,;=~-._")
    return f"file://{encoded}" if text.startswith("/") else f"file:///{encoded}"
