"""`python -I -m lsp_server`, the way every launcher starts PlanPatch."""

from __future__ import annotations

import sys

from lsp_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
