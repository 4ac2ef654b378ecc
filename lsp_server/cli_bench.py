"""`planpatch bench`: edit tasks, and one edit repeated."""

from __future__ import annotations

import typer

bench_app = typer.Typer(help="Measure.", no_args_is_help=True, rich_markup_mode=None)
