"""Arguments that are not UTF-8, refused before a command runs.

Python hands a program such bytes as lone surrogates. Neither a tokenizer nor the ledger can take them, and both would
say so only after a model was loaded. Paths are let through: a system may have such names, and whoever opens one tells
what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from engine.errors import UsageError
from engine.inference.catalogue import looks_like_path

_FOLDER_PARAMETERS = ("adapter",)


def refuse_undecodable(app: typer.Typer) -> None:
    """Let every command of `app` check its arguments first.

    Args:
        app: Commands and groups, all registered.
    """
    for command in app.registered_commands:
        command.cls = _CheckedCommand
    for group in app.registered_groups:
        group.cls = _CheckedGroup
        if group.typer_instance is not None:
            refuse_undecodable(group.typer_instance)


class _CheckedCommand(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        """Run the command, if its arguments are text."""
        _check(ctx.params, self.params)
        return super().invoke(ctx)


class _CheckedGroup(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the group's own command or the one that is named, if the group's arguments are text."""
        _check(ctx.params, self.params)
        return super().invoke(ctx)


def _check(values: Mapping[str, Any], parameters: list[Any]) -> None:
    for parameter in parameters:
        value = values.get(parameter.name)
        if isinstance(value, str) and not _is_text(value) and not _is_path(parameter.name, value):
            name = (
                parameter.opts[0]
                if parameter.opts[0].startswith("-")
                else (parameter.metavar or parameter.name).upper()
            )
            shown = value.encode("utf-8", "backslashreplace").decode("utf-8")
            raise UsageError(f"{name} is not UTF-8: {shown}", hint="Give it as text in UTF-8.")


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_path(name: str, value: str) -> bool:
    return name in _FOLDER_PARAMETERS or (name in ("model", "name") and looks_like_path(value))
