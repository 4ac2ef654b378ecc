"""Which API a path belongs to."""

from __future__ import annotations

from lsp_server.http.errors import ErrorShape


def shape_of(path: str) -> ErrorShape:
    """The shape that errors take below a path.

    Args:
        path: Path of a request.

    Returns:
        Whose API it is; ours where it is nobody's.
    """
    if path.startswith("/v1/") or path == "/v1":
        return "openai"
    return "ollama" if path.startswith("/api/") or path in ("/", "/api") else "planpatch"
