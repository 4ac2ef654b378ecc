"""Tiles of the CUDA path by rule, on any machine."""

from __future__ import annotations

from typing import Any

import pytest

from engine.inference.cuda.tuning import candidate_tiles, default_tiles

QWEN3_8B = [(6144, 4096, True), (4096, 4096, True), (24576, 4096, False), (4096, 12288, True)]
QWEN2_05B = [(1152, 896, True), (896, 896, True), (9728, 896, False), (896, 4864, True)]


def arguments(num_outputs: int, num_inputs: int, can_split: bool, kind: str, block_rows: int) -> dict[str, Any]:
    return dict(
        num_outputs=num_outputs, num_inputs=num_inputs, kind=kind, can_split=can_split, block_rows=block_rows
    )  # fmt: skip


@pytest.mark.parametrize("block_rows", [16, 32, 64])
@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("shape", QWEN3_8B + QWEN2_05B)
def test_tiles_divide_a_layer_evenly(shape: tuple[int, int, bool], kind: str, block_rows: int) -> None:
    num_inputs = shape[1]
    tiles = default_tiles(**arguments(*shape, kind, block_rows))
    assert num_inputs % (tiles.inputs * tiles.splits) == 0
    assert tiles.splits == 1 or shape[2]
    assert tiles.prefetch % 16 == 0


def test_nf4_has_two_warps_whatever_the_rows() -> None:
    """With four, Triton takes another instruction for 16 rows than for 8, and a row's bits would depend on others."""
    for shape in QWEN3_8B + QWEN2_05B:
        for block_rows in (16, 32, 64):
            given = arguments(*shape, "nf4", block_rows)
            assert {tiles.num_warps for tiles in (default_tiles(**given), *candidate_tiles(**given))} == {2}


@pytest.mark.parametrize(("block_rows", "inputs", "num_stages"), [(16, 256, 3), (32, 256, 3), (64, 128, 4)])
def test_nf4_leaves_room_for_its_table(block_rows: int, inputs: int, num_stages: int) -> None:
    for shape in QWEN3_8B:
        tiles = default_tiles(**arguments(*shape, "nf4", block_rows))
        assert (tiles.cols, tiles.inputs, tiles.num_stages) == (64, inputs, num_stages)


def test_nf4_is_split_into_three_programs_a_multiprocessor_of_an_h200() -> None:
    assert [default_tiles(**arguments(*shape, "nf4", 16)).splits for shape in QWEN3_8B] == [4, 4, 1, 6]
