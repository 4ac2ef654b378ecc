"""`python -I -m lsp_server`, the way every launcher starts PlanPatch."""

from __future__ import annotations

import sys


def _run() -> int:
    """The command line; Ctrl-C while it is still being imported ends it without a traceback, too."""
    try:
        from lsp_server.cli import main

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(_run())
