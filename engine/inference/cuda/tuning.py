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

_VERSION = 3
_MOST_INPUTS: dict[Kind, int] = {"plain": 128, "int8": 256, "nf4": 256}
MOST_SPLITS = 6
_SPLITS = (1, 2, 4)  # more are a little faster by themselves, and cost the kernel that adds them more
_NF4_SPLITS = (1, 2, 3, 4, 6)  # three of its programs share a multiprocessor, if there are so many
_SHARED_BYTES = 99_000  # of two programs on one multiprocessor of Hopper, or one of Ada
_TABLE_BYTES = 33_000  # of which NF4's programs have a copy each, for lookups
# Two warps keep Triton from Hopper's wgmma, which waits for each product where weights come from a lookup, and whose
# bits are not those of the instruction that tiles of 8 rows take.
_WARPS: dict[Kind, tuple[int, ...]] = {"plain": (4, 8), "int8": (4, 8), "nf4": (2,)}
_BITS: dict[Kind, int] = {"plain": 16, "int8": 8, "nf4": 4}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one linear kernel is cut up.

    Args:
        cols: Rows of weights that a program reads; where gates and ups are fused, half of them are gates.
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


def default_tiles(num_outputs: int, num_inputs: int, *, kind: Kind, can_split: bool, block_rows: int) -> Tiles:
    """Tiles by rule: about 200 programs where a layer is large enough, and loads of 60 to 100 kB under way in each.

    Args:
        num_outputs: Rows of the weights.
        num_inputs: Their length.
        kind: How they are held.
        can_split: Whether the next kernel adds splits.
        block_rows: Height of the step.

    Returns:
        Tiles that divide the layer evenly and fit into 99 kB of shared memory.
    """
    fitting = [
        (cols, inputs, num_stages)
        for cols, inputs, num_stages in itertools.product((64, 32), (256, 128, 64, 32, 16), (4, 3))
        if inputs in _input_blocks(num_inputs, kind)
        and not (kind == "nf4" and inputs == 256 and num_stages == 4)  # three programs are better than deeper ones
        and inputs <= _MOST_INPUTS[kind]
        and _shared_bytes(cols, inputs, num_stages, kind, block_rows=block_rows) <= _SHARED_BYTES
    ]
    cols, inputs, num_stages = fitting[0] if fitting else (32, _input_blocks(num_inputs, kind)[-1], 2)
    choices, enough = (_NF4_SPLITS, 300) if kind == "nf4" and block_rows == 16 else (_SPLITS, 150)
    possible = [splits for splits in choices if splits == 1 or (can_split and num_inputs % (inputs * splits) == 0)]
    splits = next((splits for splits in possible if num_outputs // cols * splits >= enough), possible[-1])
    prefetch = _prefetch_bytes(num_inputs // splits, kind, 256)
    return Tiles(cols, inputs, splits, num_warps=_WARPS[kind][0], num_stages=num_stages, prefetch=prefetch)


def candidate_tiles(num_outputs: int, num_inputs: int, *, kind: Kind, can_split: bool, block_rows: int) -> list[Tiles]:
    """Tiles worth measuring.

    Args:
        num_outputs: Rows of the weights.
        num_inputs: Their length.
        kind: How they are held.
        can_split: Whether the next kernel adds splits.
        block_rows: Height of the step.

    Returns:
        Tiles that divide the layer evenly and fit into a multiprocessor.
    """
    found: list[Tiles] = []
    for cols, inputs, num_stages, num_warps, splits, prefetch in itertools.product(
        (32, 64, 128), (64, 128, 256), (3, 4, 6), _WARPS[kind], _NF4_SPLITS if kind == "nf4" else _SPLITS, (0, 256)
    ):
        num_programs = -(-num_outputs // cols) * splits
        num_bytes = _shared_bytes(cols, inputs, num_stages, kind, block_rows=block_rows)
        if (
            inputs not in _input_blocks(num_inputs, kind)
            or num_inputs % (inputs * splits) != 0
            or (splits > 1 and (not can_split or num_programs > 600))
            or not (
                num_programs >= 100 or splits >= _SPLITS[-1] or not can_split or num_inputs % (inputs * splits * 2) != 0
            )
            or not 20_000 <= num_bytes <= 200_000
            or (kind != "nf4" and (num_warps == 8) != (cols == 128))
            or prefetch > num_inputs // splits * _BITS[kind] // 8
        ):
            continue
        found.append(Tiles(cols, inputs, splits, num_warps, num_stages, prefetch))
    return found or [default_tiles(num_outputs, num_inputs, kind=kind, can_split=can_split, block_rows=block_rows)]


def _input_blocks(num_inputs: int, kind: Kind) -> list[int]:
    least = {"plain": 16, "int8": 64, "nf4": 128}[kind]
    return [size for size in (128, 256, 64, 32, 16) if num_inputs % size == 0 and size >= least] or [least]


def _shared_bytes(cols: int, inputs: int, num_stages: int, kind: Kind, *, block_rows: int) -> int:
    stage = cols * inputs * _BITS[kind] // 8 + block_rows * inputs * 2
    return (num_stages - 1) * stage + _TABLE_BYTES if kind == "nf4" else num_stages * stage


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
