"""Tile sizes of the linear kernels: measured ones where there are some, else by rule. Kept on disk, so that a later
start measures nothing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["plain", "int8", "nf4"]

_VERSION = 1
_BITS: dict[Kind, int] = {"plain": 16, "int8": 8, "nf4": 4}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one linear kernel is cut up.

    Args:
        cols: Outputs of a program (of gates and ups each, where they are fused).
        inputs: Inputs of one step of its loop.
        splits: Programs that share a column's inputs.
        num_warps: Warps of a program.
        num_stages: Steps of the loop whose loads are under way together.
        prefetch: Bytes of each weight row asked for before the inputs are there.
    """

    cols: int
    inputs: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0


def default_tiles(num_outputs: int, num_inputs: int, *, kind: Kind, silu: bool) -> Tiles:
    """Tiles by rule: one to three programs a multiprocessor of a large GPU, tens of kilobytes of loads each.

    Args:
        num_outputs: Rows of the weights.
        num_inputs: Their length.
        kind: How they are held.
        silu: Whether half of the rows are gates.

    Returns:
        Tiles that divide the layer evenly.
    """
    num_cols = num_outputs // 2 if silu else num_outputs
    cols, inputs = 64, _input_blocks(num_inputs, kind)[0]
    splits = 1
    while not silu and num_cols // cols * splits < 128 and splits < 8 and num_inputs % (inputs * splits * 2) == 0:
        splits *= 2
    return Tiles(cols, inputs, splits, prefetch=_prefetch_bytes(num_inputs // splits, kind, 1024))


def candidate_tiles(num_outputs: int, num_inputs: int, *, kind: Kind, silu: bool, block_rows: int) -> list[Tiles]:
    """Tiles worth measuring.

    Args:
        num_outputs: Rows of the weights.
        num_inputs: Their length.
        kind: How they are held.
        silu: Whether half of the rows are gates.
        block_rows: Height of the step.

    Returns:
        Tiles that divide the layer evenly and fit into a multiprocessor.
    """
    num_cols = num_outputs // 2 if silu else num_outputs
    found: list[Tiles] = []
    for cols, inputs, num_stages, num_warps, splits, prefetch in itertools.product(
        (32, 64, 128), (64, 128, 256), (3, 4, 6), (4, 8), (1, 2, 4, 8), (0, 512, 2048)
    ):
        num_programs = -(-num_cols // cols) * splits
        weight_bytes = cols * inputs * _BITS[kind] // 8 * (2 if silu else 1)
        stage_bytes = weight_bytes + block_rows * inputs * 2
        if (
            inputs not in _input_blocks(num_inputs, kind)
            or num_inputs % (inputs * splits) != 0
            or (splits > 1 and (silu or num_programs > 600))
            or not (num_programs >= 100 or splits == 8 or silu or num_inputs % (inputs * splits * 2) != 0)
            or not 16_000 <= stage_bytes * (num_stages - 1) <= 160_000
            or (num_warps == 8 and cols < 128)
            or prefetch > num_inputs // splits * _BITS[kind] // 8
        ):
            continue
        found.append(Tiles(cols, inputs, splits, num_warps, num_stages, prefetch))
    return found or [default_tiles(num_outputs, num_inputs, kind=kind, silu=silu)]


def _input_blocks(num_inputs: int, kind: Kind) -> list[int]:
    least = 64 if kind != "plain" else 16
    return [size for size in (128, 256, 64, 32, 16) if num_inputs % size == 0 and size >= least] or [least]


def _prefetch_bytes(num_inputs: int, kind: Kind, most: int) -> int:
    return min(most, num_inputs * _BITS[kind] // 8) // 16 * 16


class TuningFile:
    """Measured tiles by device and shape.

    Args:
        path: A JSON file, or None to keep nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Tiles] = {}
        if path is not None and path.is_file():
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                if data["version"] == _VERSION:
                    self._entries = {key: Tiles(**entry) for key, entry in data["tiles"].items()}
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                self._entries = {}  # damaged: measured again

    def get(self, key: str) -> Tiles | None:
        """The tiles measured for `key`, if any."""
        return self._entries.get(key)

    def put(self, entries: Iterable[tuple[str, Tiles]]) -> None:
        """Keep measured tiles; the file is whole at every moment."""
        self._entries.update(entries)
        if self._path is None:
            return
        data = {"version": _VERSION, "tiles": {key: asdict(tiles) for key, tiles in sorted(self._entries.items())}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(temporary, self._path)
