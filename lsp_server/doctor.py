"""`planpatch doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

from lsp_server.cli_options import JsonOption


def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, and what to do about the rest."""
