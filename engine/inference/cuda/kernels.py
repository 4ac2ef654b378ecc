"""Triton kernels of the fast path.

A decode step has few rows, so its time is that of reading the weights. Each linear layer is one kernel that reads its
weights once, as they are stored (int8 rows, NF4 blocks or 16 bit), widens them in registers and multiplies on the
tensor cores; sums are fp32. Rows never meet: what a row holds does not change another row's bits, and for 1 to 16 rows
tile, order of sums and instructions are the same, so a row's result does not depend on how many go with it.

Splits of a sum (over a layer's inputs, over a context) are written apart and added by the next kernel in a fixed order.
No atomics. Arguments that differ from step to step or from start to start are not specialized, so that which kernels a
model needs follows from its shapes alone (`precompile.py`). Kernels with `PDL` start while the one before still runs
(CUDA's programmatic dependent launch), ask the L2 cache for their first weights, and then wait for their inputs.

Not covered: head sizes that are no power of two, sliding windows, gradients.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportReturnType=false, reportAssignmentType=false, reportOperatorIssue=false
# ruff: noqa: SIM300, D403

from __future__ import annotations

import os
from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

KIND_16BIT = tl.constexpr(0)
KIND_INT8 = tl.constexpr(1)
KIND_NF4 = tl.constexpr(2)

USE_ASM = os.environ.get("TRITON_INTERPRET") != "1"  # Triton's interpreter knows no PTX

NF4_BLOCK = 64  # weights that share a scale
QUERY_TOKENS = 16  # tokens of one sequence that read its keys and values together

# A context is attended in segments whose borders depend on positions alone.
NEAR_TOKENS = 64
FAR_TOKENS = 256
FAR_FROM = 2048
_NEAR = tl.constexpr(NEAR_TOKENS)
_FAR = tl.constexpr(FAR_TOKENS)
_FAR_FROM = tl.constexpr(FAR_FROM)
_NUM_NEAR = tl.constexpr(FAR_FROM // NEAR_TOKENS)
_BLOCK = tl.constexpr(64)  # NF4_BLOCK
_QUERY_TOKENS = tl.constexpr(QUERY_TOKENS)

# Places in the int32 buffer that describes a step; each list has MAX_ROWS entries.
MAX_ROWS = 64
HEADER = 2  # number of query blocks, most segments of a block
TOKEN_IDS = HEADER
POSITIONS = TOKEN_IDS + MAX_ROWS
SLOTS = POSITIONS + MAX_ROWS
BLOCK_FIRST = SLOTS + MAX_ROWS  # first row of a query block, then rows, position of the first, line of the page table
BLOCK_ROWS = BLOCK_FIRST + MAX_ROWS
BLOCK_POSITION = BLOCK_ROWS + MAX_ROWS
BLOCK_LINE = BLOCK_POSITION + MAX_ROWS
BLOCK_OLD = BLOCK_LINE + MAX_ROWS  # tokens of the sequence before this step
PAGE_TABLE = BLOCK_OLD + MAX_ROWS
_TOKEN_IDS = tl.constexpr(TOKEN_IDS)
_POSITIONS = tl.constexpr(POSITIONS)
_SLOTS = tl.constexpr(SLOTS)
_BLOCK_FIRST = tl.constexpr(BLOCK_FIRST)
_BLOCK_ROWS = tl.constexpr(BLOCK_ROWS)
_BLOCK_POSITION = tl.constexpr(BLOCK_POSITION)
_BLOCK_LINE = tl.constexpr(BLOCK_LINE)
_BLOCK_OLD = tl.constexpr(BLOCK_OLD)
_PAGE_TABLE = tl.constexpr(PAGE_TABLE)


def places_of(kind: int, num_inputs: int) -> list[int]:
    """Where a layer takes each of its inputs: `_place` for the order of its kind of weights."""
    if kind == KIND_16BIT.value:
        return list(range(num_inputs))
    quarter = num_inputs // 4
    if kind == KIND_INT8.value:
        return [k % 4 * quarter + k // 4 for k in range(num_inputs)]
    return [k % 8 // 2 * quarter + k // 8 * 2 + k % 2 for k in range(num_inputs)]


def num_segments(num_tokens: int) -> int:
    """Segments of a context of `num_tokens` tokens."""
    near = -(-min(num_tokens, FAR_FROM) // NEAR_TOKENS)
    return near + -(-max(0, num_tokens - FAR_FROM) // FAR_TOKENS)


@triton.jit
def _place(k, SIZE: tl.constexpr, ORDER: tl.constexpr):
    """Where the next layer takes input k. ORDER is its kind.

    A register holds several weights of a row. Unpacked, the first of each go to one product, the second to another, and
    so on; the inputs lie so that each product reads a stretch of them.
    """
    if ORDER == KIND_INT8:
        return (k % 4) * (SIZE // 4) + k // 4
    elif ORDER == KIND_NF4:
        return k % 8 // 2 * (SIZE // 4) + k // 8 * 2 + k % 2
    else:
        return k


# --- weights to 16 bit -----------------------------------------------------------------------------------------------


# Four int8 of a register, of two registers at a time: byte i of both becomes the low bits of two floats of known
# exponent, which is subtracted. Exact.
_INT8_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, p, q, c;
mov.b32 c, 0x64806480;
xor.b32 a, $4, 0x80808080;
xor.b32 b, $5, 0x80808080;
prmt.b32 p, a, b, 0x5140;
prmt.b32 q, a, b, 0x7362;
prmt.b32 $0, p, 0x64646464, 0x4140;
prmt.b32 $1, p, 0x64646464, 0x4342;
prmt.b32 $2, q, 0x64646464, 0x4140;
prmt.b32 $3, q, 0x64646464, 0x4342;
sub.rn.f16x2 $0, $0, c;
sub.rn.f16x2 $1, $1, c;
sub.rn.f16x2 $2, $2, c;
sub.rn.f16x2 $3, $3, c;
}""")
_INT8_TO_BF16 = tl.constexpr("""{
.reg .b32 p, q, s, t, u, m;
mov.b32 m, 0xBF80BF80;
prmt.b32 p, $4, $5, 0x5140;
prmt.b32 q, $4, $5, 0x7362;
prmt.b32 u, p, 0x43434343, 0x4140;
and.b32 s, u, 0xFF80FF80;
and.b32 t, u, 0xFF7FFF7F;
fma.rn.bf16x2 $0, s, m, t;
prmt.b32 u, p, 0x43434343, 0x4342;
and.b32 s, u, 0xFF80FF80;
and.b32 t, u, 0xFF7FFF7F;
fma.rn.bf16x2 $1, s, m, t;
prmt.b32 u, q, 0x43434343, 0x4140;
and.b32 s, u, 0xFF80FF80;
and.b32 t, u, 0xFF7FFF7F;
fma.rn.bf16x2 $2, s, m, t;
prmt.b32 u, q, 0x43434343, 0x4342;
and.b32 s, u, 0xFF80FF80;
and.b32 t, u, 0xFF7FFF7F;
fma.rn.bf16x2 $3, s, m, t;
}""")


@triton.jit
def _widen_int8(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int32 that hold four int8 each to 16 bit: first, second, third and fourth bytes."""
    if not ASM:
        return (
            ((w << 24) >> 24).to(DTYPE),
            ((w << 16) >> 24).to(DTYPE),
            ((w << 8) >> 24).to(DTYPE),
            (w >> 24).to(DTYPE),
        )
    elif DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _INT8_TO_FP16,
            "=&r,=&r,=&r,=&r,r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _INT8_TO_BF16,
            "=&r,=&r,=&r,=&r,r,r",
            [w],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


# The values of bitsandbytes' NF4 (Dettmers et al. 2023, QLoRA, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_table(values: Sequence[int]) -> list[int]:
    """What a byte of two weights becomes: 256 int32 of two 16-bit values, that of the high four bits first.

    Four numbers follow by which `_widen_nf4` knows blocks 0 to 3.
    """
    pairs = (values[byte >> 4] & 0xFFFF | (values[byte & 15] & 0xFFFF) << 16 for byte in range(256))
    table = [pair - (pair >> 31 << 32) for pair in pairs]
    return table + [0x1010 + 0x2222 * block if USE_ASM else block for block in range(4)]


def _fill_table_asm(num_threads: int) -> str:
    """Copies of the table in shared memory. Eight threads write the same entries, 16 bytes of each; loads go first."""
    num_entries = 8 * 256 // num_threads
    quads = range(num_entries // 4)
    registers = [f"v{index}" for index in range(num_entries)]
    loads = [f"ld.global.nc.v4.b32 {{{', '.join(registers[4 * q : 4 * q + 4])}}}, [from + {16 * q}];" for q in quads]
    stores = [f"st.shared.v4.b32 [at + {128 * i}], {{{v}, {v}, {v}, {v}}};" for i, v in enumerate(registers)]
    return "\n".join((
        ".shared .align 128 .b8 nf4_pairs[32768];",
        "{",
        f".reg .b32 group, at, {', '.join(registers)};",
        ".reg .b64 from;",
        "mov.u32 at, %tid.x;",
        "shr.u32 group, at, 3;",
        f"mad.wide.u32 from, group, {4 * num_entries}, $1;",
        *loads,
        "and.b32 at, at, 7;",
        "shl.b32 at, at, 4;",
        f"mad.lo.u32 at, group, {128 * num_entries}, at;",
        "mov.u32 group, nf4_pairs;",
        "add.u32 at, at, group;",
        *stores,
        "mov.u32 $0, 0;",
        "}",
    ))  # fmt: skip


# The table lies in shared memory 32 times, entry by entry, so that each lane of a warp reads a bank of its own. The
# array is declared by the block of assembly that fills it and known to those after it.
_FILL_BY_64 = tl.constexpr(_fill_table_asm(64))
_FILL_BY_128 = tl.constexpr(_fill_table_asm(128))
_FILL_BY_256 = tl.constexpr(_fill_table_asm(256))


@triton.jit
def _fill_table(values, THREADS: tl.constexpr):
    """Copy the table into shared memory."""
    tl.static_assert(THREADS == 64 or THREADS == 128 or THREADS == 256)
    asm: tl.constexpr = _FILL_BY_64 if THREADS == 64 else (_FILL_BY_128 if THREADS == 128 else _FILL_BY_256)
    at = values + tl.arange(0, THREADS) // THREADS
    tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


def _nf4_lookup_asm(multiply: str) -> str:
    """Eight weights of a register: each byte is an index of the table, each entry the values of two neighbours, which
    `multiply` puts the block's scale to. Inputs come twice, once for each int16.
    """
    shifts = ("shl.b32 i0, $4, 7;", "shr.u32 i1, $4, 1;", "shr.u32 i2, $4, 9;", "shr.u32 i3, $4, 17;")
    return "\n".join((
        "{",
        ".reg .b32 lane, table, scale, zero, i0, i1, i2, i3;",
        "mov.u32 lane, %laneid;",
        "shl.b32 lane, lane, 2;",
        "mov.u32 table, nf4_pairs;",
        "mov.u32 zero, 0x80008000;",
        "prmt.b32 scale, $5, $7, $9;",
        *shifts,
        *(f"lop3.b32 i{i}, i{i}, 0x7F80, lane, 0xEA;" for i in range(4)),
        *(f"add.u32 i{i}, i{i}, table;" for i in range(4)),
        *(f"ld.shared.b32 i{i}, [i{i}];" for i in range(4)),
        *(multiply.format(f"${i}, i{i}, scale") for i in range(4)),
        "}",
    ))  # fmt: skip


_NF4_TO_FP16 = tl.constexpr(_nf4_lookup_asm("mul.rn.f16x2 {};"))
_NF4_TO_BF16 = tl.constexpr(_nf4_lookup_asm("fma.rn.bf16x2 {}, zero;"))  # a product needs Hopper
_NF4_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 7)


@triton.jit
def _widen_nf4(packed, scales, more_scales, block, table, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Two neighbouring int16 hold weights 0 to 7 of a row; to 16 bit: 0 and 1, 2 and 3, 4 and 5, 6 and 7. Each result
    pair lies where the two int16 lie: neighbours share a register in every layout that loads of 32 bits or more and the
    operands of `tl.dot` have.

    Of up to four 16-bit scales in two int32 theirs is that of `block`, a number from the end of `nf4_table`. Triton 3.6
    moves the layout change ahead of the unpacking, where it is free, only if all operands come from loads.
    """
    if not ASM:
        SHAPE: tl.constexpr = packed.shape
        chosen = tl.where(block < 2, scales, more_scales) >> (block % 2 * 16)
        factor = chosen.to(tl.int16).to(DTYPE, bitcast=True)
        first, second = tl.split(tl.reshape(packed, [SHAPE[0], SHAPE[1] // 2, 2]))
        return (
            _nf4_pair(first, table, 0, SHAPE).to(DTYPE, bitcast=True) * factor,
            _nf4_pair(first, table, 8, SHAPE).to(DTYPE, bitcast=True) * factor,
            _nf4_pair(second, table, 0, SHAPE).to(DTYPE, bitcast=True) * factor,
            _nf4_pair(second, table, 8, SHAPE).to(DTYPE, bitcast=True) * factor,
        )
    elif DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _NF4_TO_FP16, _NF4_CONSTRAINTS, [packed, scales, more_scales, block],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _NF4_TO_BF16, _NF4_CONSTRAINTS, [packed, scales, more_scales, block],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _nf4_pair(packed, table, shift: tl.constexpr, SHAPE: tl.constexpr):
    """What the interpreter does instead of the lookup: int16 patterns of a byte's two weights, as neighbours."""
    pair = tl.load(table + ((packed.to(tl.int32) >> shift) & 255))
    return tl.reshape(tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)), SHAPE)


@triton.jit
def _prefetch(pointers, num_bytes):
    """Ask the L2 cache for `num_bytes` (a multiple of 16) at each pointer."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64, bitcast=True), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# --- linear layers of a narrow step ----------------------------------------------------------------------------------


@triton.jit
def _add_product(
    accumulator, x, w, scale, cols, rows, k_start, num_rows, values, block_of_word,
    N: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    KIND: tl.constexpr, EVEN_N: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """accumulator `[BN, BM]` plus a block of weights times a block of inputs."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    is_row = rows[None, :] < num_rows
    if KIND == KIND_NF4:
        word = k_start // 4 + tl.arange(0, BK // 4)
        w_at = w + cols[:, None] * KB + word[None, :]
        PAIRS: tl.constexpr = BK // (2 * _BLOCK)
        scale_at = scale + (k_start // (2 * _BLOCK)) * N + cols
        if EVEN_N:
            scales = tl.load(scale_at)
            more_scales = tl.load(scale_at + (PAIRS - 1) * N)
        else:
            scales = tl.load(scale_at, mask=cols < N, other=0)
            more_scales = tl.load(scale_at + (PAIRS - 1) * N, mask=cols < N, other=0)
        if EVEN_N:
            packed = tl.load(w_at)
        else:
            packed = tl.load(w_at, mask=cols[:, None] < N, other=0)
        x_at = x + rows[None, :] * K + word[:, None]
        x0 = tl.load(x_at, mask=is_row, other=0.0)
        x1 = tl.load(x_at + K // 4, mask=is_row, other=0.0)
        x2 = tl.load(x_at + K // 2, mask=is_row, other=0.0)
        x3 = tl.load(x_at + K // 4 * 3, mask=is_row, other=0.0)
        w0, w1, w2, w3 = _widen_nf4(packed, scales[:, None], more_scales[:, None], block_of_word, values, DTYPE, ASM)
        accumulator = tl.dot(w0, x0, accumulator)
        accumulator = tl.dot(w1, x1, accumulator)
        accumulator = tl.dot(w2, x2, accumulator)
        return tl.dot(w3, x3, accumulator)
    elif KIND == KIND_INT8:
        word = k_start // 4 + tl.arange(0, BK // 4)
        w_at = w + cols[:, None] * KB + word[None, :]
        if EVEN_N:
            words = tl.load(w_at)
        else:
            words = tl.load(w_at, mask=cols[:, None] < N, other=0)
        x_at = x + rows[None, :] * K + word[:, None]
        x0 = tl.load(x_at, mask=is_row, other=0.0)
        x1 = tl.load(x_at + K // 4, mask=is_row, other=0.0)
        x2 = tl.load(x_at + K // 2, mask=is_row, other=0.0)
        x3 = tl.load(x_at + K // 4 * 3, mask=is_row, other=0.0)
        w0, w1, w2, w3 = _widen_int8(words, DTYPE, ASM)
        accumulator = tl.dot(w0, x0, accumulator)
        accumulator = tl.dot(w1, x1, accumulator)
        accumulator = tl.dot(w2, x2, accumulator)
        return tl.dot(w3, x3, accumulator)
    else:
        k = k_start + tl.arange(0, BK)
        w_at = w + cols[:, None] * KB + k[None, :]
        if EVEN_N:
            weights = tl.load(w_at)
        else:
            weights = tl.load(w_at, mask=cols[:, None] < N, other=0)
        inputs = tl.load(x + rows[None, :] * K + k[:, None], mask=is_row, other=0.0)
        return tl.dot(weights, inputs, accumulator)


@triton.jit
def _finished(
    accumulator, scale, row_scale, bias, lora_t, lora_b, cols, rows, num_rows, split,
    N: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr, LORA_PARTS: tl.constexpr, LORA_SPLITS: tl.constexpr,
    LORA_END_0: tl.constexpr, LORA_END_1: tl.constexpr,
):  # fmt: skip
    """Row scales, then in the first split bias and LoRA."""
    if KIND == KIND_INT8:
        accumulator *= tl.load(scale + cols, mask=cols < N, other=0.0)[:, None] * (1.0 / 127.0)
    if KIND == KIND_NF4:
        accumulator *= tl.load(row_scale + cols, mask=cols < N, other=0.0)[:, None]
    if HAS_BIAS and split == 0:
        accumulator += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    if RANK > 0 and split == 0:
        r = tl.arange(0, RANK)
        b = tl.load(lora_b + cols[:, None] * RANK + r[None, :], mask=cols[:, None] < N, other=0.0)
        part_of = tl.where(cols < LORA_END_0, 0, tl.where(cols < LORA_END_1, 1, 2))
        for part in tl.static_range(LORA_PARTS):
            t = tl.zeros([RANK, BM], dtype=tl.float32)
            for lora_split in tl.static_range(LORA_SPLITS):
                at = ((lora_split * num_rows + rows[None, :]) * LORA_PARTS + part) * RANK + r[:, None]
                t += tl.load(lora_t + at, mask=rows[None, :] < num_rows, other=0.0)
            own = tl.where(part_of[:, None] == part, b, 0.0).to(b.dtype)
            accumulator = tl.dot(own, t.to(b.dtype), accumulator)
    return accumulator


@triton.jit(do_not_specialize=["num_rows", "prefetch_bytes"])
def linear_kernel(
    x, w, scale, row_scale, bias, lora_t, lora_b, values, out, num_rows, prefetch_bytes,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    KIND: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, LORA_PARTS: tl.constexpr,
    LORA_SPLITS: tl.constexpr, LORA_END_0: tl.constexpr, LORA_END_1: tl.constexpr, ORDER: tl.constexpr,
    STAGES: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One linear layer for up to BM rows.

    x: 16 bit `[num_rows, K]`, in the order of `places_of(KIND, K)`.
    w: 16 bit `[N, K]`, int8 as int32 `[N, K // 4]`, or NF4 as int16 `[N, K // 4]`.
    scale: fp32 `[N]` for int8. For NF4 two 16-bit scales an int32, `[K // 128, N]`, as shares of the row's largest.
    row_scale: fp32 `[N]`, a row's largest scale for NF4.
    out: fp32 `[num_splits, num_rows, N]`, num_splits programs along axis 1; the sum over splits is the layer's output.
    With SILU the rows of w are gates, then ups, and out is silu(gate) * up, 16 bit `[num_rows, N // 2]`, in the order
    of ORDER.
    lora_t: fp32 `[LORA_SPLITS, num_rows, LORA_PARTS, RANK]`; lora_b: `[N, RANK]`.
    """
    OUT_BN: tl.constexpr = BN // 2 if SILU else BN
    NUM_COLS: tl.constexpr = N // 2 if SILU else N
    EVEN_N: tl.constexpr = NUM_COLS % OUT_BN == 0
    KB: tl.constexpr = K if KIND == KIND_16BIT else K // 4
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_inputs = K // tl.num_programs(1)
    first = tl.multiple_of(split * num_inputs, BK)
    rows = tl.arange(0, BM)
    outputs = tl.arange(0, BN)  # rows of w: with SILU half a tile of gates, then their ups
    if SILU:
        outputs = tile * OUT_BN + outputs % OUT_BN + outputs // OUT_BN * (N // 2)
    else:
        outputs = tile * BN + outputs
    if PDL and prefetch_bytes > 0:
        at = w + tl.minimum(outputs, N - 1) * KB + split * (num_inputs // (K // KB))
        _prefetch(at, tl.zeros([BN], tl.int32) + prefetch_bytes)
    block_of_word = 0
    if KIND == KIND_NF4:
        if ASM:
            _fill_table(values, THREADS)
        block_of_word = tl.load(values + 256 + tl.arange(0, BK // 4) // (_BLOCK // 4))[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    accumulator = tl.zeros([BN, BM], dtype=tl.float32)
    for k in tl.range(0, num_inputs, BK, num_stages=STAGES):
        accumulator = _add_product(
            accumulator, x, w, scale, outputs, rows, first + k, num_rows, values, block_of_word,
            N, K, KB, BN, BK, BM, KIND, EVEN_N, ASM,
        )  # fmt: skip
    accumulator = _finished(
        accumulator, scale, row_scale, bias, lora_t, lora_b, outputs, rows, num_rows, split,
        N, BN, BM, KIND, HAS_BIAS, RANK, LORA_PARTS, LORA_SPLITS, LORA_END_0, LORA_END_1,
    )  # fmt: skip
    cols = tile * OUT_BN + tl.arange(0, OUT_BN)
    if SILU:
        gate, up = tl.split(tl.permute(tl.reshape(accumulator, [2, OUT_BN, BM]), (1, 2, 0)))
        accumulator = gate / (1.0 + tl.exp(-gate)) * up
        at = out + rows[None, :] * NUM_COLS + _place(cols, NUM_COLS, ORDER)[:, None]
    else:
        at = out + (split * num_rows + rows[None, :]).to(tl.int64) * N + cols[:, None]
    is_inside = (rows[None, :] < num_rows) & (cols[:, None] < NUM_COLS)
    tl.store(at, accumulator.to(out.dtype.element_ty), mask=is_inside)


# --- norms, rotary embedding, activation -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["token_ids"])
def norm_kernel(
    residual, added, embeddings, token_ids, weight, out, num_rows, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, EMBED: tl.constexpr, ORDER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each row after the residual took what a layer adds.

    residual: fp32 `[num_rows, H]`, updated. added: `[SPLITS, num_rows, H]`. With EMBED the residual starts from the
    token's embedding instead. out: 16 bit or fp32 `[num_rows, H]`, in the order of ORDER.
    """
    row = tl.program_id(0)
    h = tl.arange(0, BLOCK)
    inside = h < H
    gain = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if EMBED:
        token = tl.load(token_ids + row).to(tl.int64)
        value = tl.load(embeddings + token * H + h, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(residual + row * H + h, mask=inside, other=0.0)
        for split in tl.static_range(SPLITS):
            value += tl.load(added + (split * num_rows + row) * H + h, mask=inside, other=0.0).to(tl.float32)
    if EMBED or SPLITS > 0:
        tl.store(residual + row * H + h, value, mask=inside)
    normed = value * tl.rsqrt(tl.sum(value * value) / H + eps) * gain
    place = _place(h, H, ORDER)
    tl.store(out + row * H + place, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head(at, gain_at, eps, stride, HD: tl.constexpr, SPLITS: tl.constexpr, HAS_NORM: tl.constexpr):
    """One head's values, and the same turned by half a head, both normed."""
    d = tl.arange(0, HD)
    turned = (d + HD // 2) % HD
    value = tl.zeros([HD], dtype=tl.float32)
    other = tl.zeros([HD], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(at + split * stride + d).to(tl.float32)
        other += tl.load(at + split * stride + turned).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(value * value) / HD + eps)
        value *= factor * tl.load(gain_at + d).to(tl.float32)
        other *= factor * tl.load(gain_at + turned).to(tl.float32)
    return value, other


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_kernel(
    qkv, q_out, kv, cos, sin, q_gain, k_gain, positions, slots, num_rows, v_offset, eps,
    NH: tl.constexpr, NKV: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per row and head: sum of splits, norm of queries and keys, rotary embedding; keys and values go to their page.

    qkv: `[SPLITS, num_rows, (NH + 2 * NKV) * HD]`. q_out: 16 bit `[num_rows, NH, HD]`.
    kv: one layer's keys, 16 bit `[num_pages, NKV, PAGE, HD]`; its values follow `v_offset` elements later.
    cos, sin: fp32 `[max_position, HD // 2]`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    WIDTH: tl.constexpr = (NH + 2 * NKV) * HD
    d = tl.arange(0, HD)
    at = qkv + row * WIDTH + head * HD
    stride = num_rows * WIDTH
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    c = tl.load(cos + position * (HD // 2) + d % (HD // 2))
    s = tl.load(sin + position * (HD // 2) + d % (HD // 2))
    s = tl.where(d < HD // 2, -s, s)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = head - NH
    if head >= NH + NKV:
        kv_head -= NKV
    kv_at = kv + ((slot // PAGE).to(tl.int64) * NKV + kv_head) * (PAGE * HD) + (slot % PAGE) * HD + d
    if head >= NH + NKV:
        value = tl.zeros([HD], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            value += tl.load(at + split * stride + d).to(tl.float32)
        tl.store(kv_at + v_offset, value.to(kv.dtype.element_ty))
    else:
        if head < NH:
            value, other = _head(at, q_gain, eps, stride, HD, SPLITS, HAS_NORM)
            tl.store(q_out + (row * NH + head) * HD + d, (value * c + other * s).to(q_out.dtype.element_ty))
        else:
            value, other = _head(at, k_gain, eps, stride, HD, SPLITS, HAS_NORM)
            tl.store(kv_at, (value * c + other * s).to(kv.dtype.element_ty))


@triton.jit
def silu_kernel(gate_up, out, out_stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up: 16 bit `[num_rows, 2 * INNER]` to `[num_rows, INNER]`, a row every `out_stride` elements."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < INNER
    gate = tl.load(gate_up + row * 2 * INNER + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * INNER + INNER + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


# --- attention -------------------------------------------------------------------------------------------------------


@triton.jit
def _keys_at(table, key, last_key, kv_head, NKV: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr):
    """Where keys `[BLOCK]` of a sequence begin in a layer's pool."""
    page = tl.load(table + key // PAGE, mask=key < last_key, other=0).to(tl.int64)
    return (page * NKV + kv_head) * (PAGE * HD) + (key % PAGE) * HD


@triton.jit
def _attend_block(q, keys, values, key, row_position, factor, accumulator, largest, total):
    """One block of an online softmax (Dao et al. 2022, FlashAttention).

    q: `[R, HD]`. keys: `[HD, BLOCK]`. values: `[BLOCK, HD]`. Returns what it was given, updated: weighted values, not
    normalised, `[R, HD]`; the largest score and the sum of weights of each row, `[R]`.
    """
    scores = tl.dot(q, keys) * factor
    scores = tl.where(key[None, :] <= row_position[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(q.dtype), values, accumulator * shrink[:, None])
    return accumulator, new_largest, total


@triton.jit
def _attend(
    q, kv, table, first_key, last_key, row_position, kv_head, v_offset, factor, accumulator, largest, total,
    NKV: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `first_key` up to `last_key`."""
    d = tl.arange(0, HD)
    for start in range(first_key, last_key, BLOCK):
        key = start + tl.arange(0, BLOCK)
        at = _keys_at(table, key, last_key, kv_head, NKV, HD, PAGE)
        keys = tl.load(kv + at[None, :] + d[:, None], mask=key[None, :] < last_key, other=0.0)
        values = tl.load(kv + v_offset + at[:, None] + d[None, :], mask=key[:, None] < last_key, other=0.0)
        accumulator, largest, total = _attend_block(
            q, keys, values, key, row_position, factor, accumulator, largest, total
        )
    return accumulator, largest, total


@triton.jit
def _segment_of(step, item, num_segments, table_width, NKV: tl.constexpr):
    """What one item of a step's attention is: its query block's rows, its page table, its key head, its keys, and up to
    where they were there before this step.
    """
    kv_head = item % NKV
    segment = (item // NKV) % num_segments
    block = item // (NKV * num_segments)
    first = tl.load(step + _BLOCK_FIRST + block)
    num_tokens = tl.load(step + _BLOCK_ROWS + block)
    position = tl.load(step + _BLOCK_POSITION + block)
    table = step + _PAGE_TABLE + tl.load(step + _BLOCK_LINE + block) * table_width
    is_near = segment < _NUM_NEAR
    start = tl.where(is_near, segment * _NEAR, _FAR_FROM + (segment - _NUM_NEAR) * _FAR)
    end = tl.minimum(start + tl.where(is_near, _NEAR, _FAR), position + num_tokens)
    old = tl.minimum(end, tl.load(step + _BLOCK_OLD + block))
    return first, num_tokens, position, table, kv_head, segment, start, end, old


@triton.jit(do_not_specialize=["table_width", "max_segments"])
def decode_attention_kernel(
    q, kv, step, parts, sums, v_offset, factor, table_width, max_segments,
    NH: tl.constexpr, NKV: tl.constexpr, GP: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of a narrow step, one segment of one query block's context for one key head at a time.

    A query block is up to 16 tokens of one sequence, so that drafts read keys and values once. The grid is fixed;
    programs take what the step's buffer says there is. Keys and values of earlier steps are loaded before the wait for
    the kernel before, which writes only those of this step.

    q: 16 bit `[num_rows, NH, HD]`. parts: fp32 `[num_rows, NH, max_segments, HD]`. sums: fp32
    `[num_rows, NH, max_segments, 2]`, the largest score and the sum of weights. GP: queries of a key head, as a power
    of two.
    """
    G: tl.constexpr = NH // NKV
    R: tl.constexpr = _QUERY_TOKENS * GP
    num_segments = tl.load(step + 1)
    num_items = tl.load(step) * num_segments * NKV
    if PDL:
        gdc_launch_dependents()
    r = tl.arange(0, R)
    token = r // GP
    d = tl.arange(0, HD)
    is_waiting = True
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        first, num_tokens, position, table, kv_head, segment, start, end, old = _segment_of(
            step, item, num_segments, table_width, NKV
        )
        key = start + tl.arange(0, _NEAR)
        at = _keys_at(table, key, end, kv_head, NKV, HD, PAGE)
        keys_at = kv + at[None, :] + d[:, None]
        values_at = kv + v_offset + at[:, None] + d[None, :]
        keys = tl.load(keys_at, mask=key[None, :] < old, other=0.0)
        values = tl.load(values_at, mask=key[:, None] < old, other=0.0)
        if PDL and is_waiting:
            gdc_wait()
            is_waiting = False
        if start < end:
            if end > old:
                is_new = (key >= old) & (key < end)
                keys = tl.load(keys_at, mask=is_new[None, :], other=keys)
                values = tl.load(values_at, mask=is_new[:, None], other=values)
            head = kv_head * G + r % GP
            is_query = (token < num_tokens) & (r % GP < G)
            line = (first + token) * NH + head
            queries = tl.load(q + line[:, None] * HD + d[None, :], mask=is_query[:, None], other=0.0)
            accumulator = tl.zeros([R, HD], dtype=tl.float32)
            largest = tl.full([R], float("-inf"), dtype=tl.float32)
            total = tl.zeros([R], dtype=tl.float32)
            accumulator, largest, total = _attend_block(
                queries, keys, values, key, position + token, factor, accumulator, largest, total
            )
            accumulator, largest, total = _attend(
                queries, kv, table, start + _NEAR, end, position + token, kv_head, v_offset, factor,
                accumulator, largest, total, NKV, HD, PAGE, _NEAR,
            )  # fmt: skip
            place = line * max_segments + segment
            tl.store(parts + place[:, None] * HD + d[None, :], accumulator, mask=is_query[:, None])
            tl.store(sums + place * 2, largest, mask=is_query)
            tl.store(sums + place * 2 + 1, total, mask=is_query)
    # Programs without work end at once and leave their place to the next kernels; one has to wait, so that the kernel
    # does not end before the one before it.
    if PDL and is_waiting and tl.program_id(0) == 0:
        gdc_wait()


@triton.jit(do_not_specialize=["max_segments"], do_not_specialize_on_alignment=["positions"])
def combine_kernel(
    parts, sums, positions, out, max_segments,
    NH: tl.constexpr, HD: tl.constexpr, CHUNK: tl.constexpr, ORDER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per row and head: the segments' parts together. out: 16 bit `[num_rows, NH * HD]`, in the order of ORDER."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, HD)
    length = tl.load(positions + row) + 1
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    near = (tl.minimum(length, _FAR_FROM) + _NEAR - 1) // _NEAR
    num_segments = near + (tl.maximum(length - _FAR_FROM, 0) + _FAR - 1) // _FAR
    first = (row * NH + head) * max_segments
    largest = float("-inf")
    total = 0.0
    value = tl.zeros([HD], dtype=tl.float32)
    for start in range(0, num_segments, CHUNK):
        segment = start + tl.arange(0, CHUNK)
        exists = segment < num_segments
        peaks = tl.load(sums + (first + segment) * 2, mask=exists, other=float("-inf"))
        weights = tl.load(sums + (first + segment) * 2 + 1, mask=exists, other=0.0)
        part = tl.load(parts + (first + segment)[:, None] * HD + d[None, :], mask=exists[:, None], other=0.0)
        new_largest = tl.maximum(largest, tl.max(peaks, 0))
        shrink = tl.exp2(largest - new_largest)
        factors = tl.exp2(peaks - new_largest)
        total = total * shrink + tl.sum(factors * weights, 0)
        value = value * shrink + tl.sum(part * factors[:, None], 0)
        largest = new_largest
    place = _place(head * HD + d, NH * HD, ORDER)
    tl.store(out + row * (NH * HD) + place, (value / total).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "position"], do_not_specialize_on_alignment=["table"])
def prefill_attention_kernel(
    q, kv, table, out, num_rows, position, v_offset, factor,
    NH: tl.constexpr, NKV: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr, BQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of a chunk of one sequence, whose keys and values are in their pages already.

    q: 16 bit `[num_rows, NH, HD]`, the first at `position`. table: the sequence's pages, int32. out: as q.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    head = tl.program_id(1)
    d = tl.arange(0, HD)
    row = first + tl.arange(0, BQ)
    at = (row * NH + head)[:, None] * HD + d[None, :]
    queries = tl.load(q + at, mask=row[:, None] < num_rows, other=0.0)
    end = position + tl.minimum(first + BQ, num_rows)
    accumulator, _, total = _attend(
        queries, kv, table, 0, end, position + row, head // (NH // NKV), v_offset, factor,
        tl.zeros([BQ, HD], dtype=tl.float32), tl.full([BQ], float("-inf"), dtype=tl.float32),
        tl.zeros([BQ], dtype=tl.float32), NKV, HD, PAGE, BLOCK,
    )  # fmt: skip
    tl.store(out + at, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=row[:, None] < num_rows)


# --- weights for wide steps ------------------------------------------------------------------------------------------


@triton.jit
def dequantize_int8_kernel(w, scale, out, K: tl.constexpr, BLOCK: tl.constexpr):
    """int8 rows to 16 bit: `[N, K]` times scale / 127."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row) * (1.0 / 127.0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(w + row * K + k, mask=k < K, other=0).to(tl.float32) * factor
        tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def dequantize_nf4_kernel(w, scale, values, out, num_bytes, BLOCK: tl.constexpr):
    """NF4 blocks to 16 bit, in the order of the weights."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < num_bytes
    packed = tl.load(w + byte, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + byte // (_BLOCK // 2), mask=inside, other=0.0)
    even = tl.load(values + (packed >> 4)) * factor
    odd = tl.load(values + (packed & 15)) * factor
    place = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, tl.interleave(even, odd).to(out.dtype.element_ty), mask=place < 2 * num_bytes)


# --- the greedy choice -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def likeliest_of_blocks_kernel(
    logits, seen, allowed, tokens, partial, num_tokens, stride, penalty,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_SEEN: tl.constexpr, HAS_ALLOWED: tl.constexpr, MAX_TOKENS: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: largest, its place, second largest, its place, sum of exponentials."""
    row, block = tl.program_id(0), tl.program_id(1)
    places = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < V
    values = tl.load(logits + row * stride + places, mask=is_inside, other=float("-inf")).to(tl.float32)
    if HAS_SEEN:
        is_seen = tl.load(seen + places, mask=is_inside, other=0) != 0
        for index in range(num_tokens):
            token_id = tl.load(tokens + index)
            from_row = tl.load(tokens + MAX_TOKENS + index)
            is_seen = is_seen | ((places == token_id) & (row >= from_row))
        values = tl.where(is_seen, tl.where(values > 0, tl.div_rn(values, penalty), values * penalty), values)
    if HAS_ALLOWED:
        is_allowed = tl.load(allowed + row.to(tl.int64) * V + places, mask=is_inside, other=0) != 0
        values = tl.where(is_allowed, values, float("-inf"))
    first, first_at = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    others = tl.where(tl.arange(0, BLOCK) == first_at, float("-inf"), values)
    second, second_at = tl.max(others, 0, return_indices=True, return_indices_tie_break_left=True)
    shift = tl.where(first == float("-inf"), 0.0, first)
    to = partial + (row * tl.num_programs(1) + block) * 5
    tl.store(to, first)
    tl.store(to + 1, (block * BLOCK + first_at).to(tl.float32))
    tl.store(to + 2, second)
    tl.store(to + 3, (block * BLOCK + second_at).to(tl.float32))
    tl.store(to + 4, tl.sum(tl.exp(values - shift), 0))


@triton.jit
def likeliest_of_rows_kernel(partial, out, num_blocks, BLOCKS: tl.constexpr):
    """Of one row: the two likeliest tokens and their log-probabilities."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCKS)
    at = partial + (row * num_blocks + lanes) * 5
    is_inside = lanes < num_blocks
    first = tl.load(at, mask=is_inside, other=float("-inf"))
    first_at = tl.load(at + 1, mask=is_inside, other=0.0)
    second = tl.load(at + 2, mask=is_inside, other=float("-inf"))
    second_at = tl.load(at + 3, mask=is_inside, other=0.0)
    sums = tl.load(at + 4, mask=is_inside, other=0.0)
    best, winner = tl.max(first, 0, return_indices=True, return_indices_tie_break_left=True)
    log_sum = best + tl.log(tl.sum(tl.where(first == float("-inf"), 0.0, sums * tl.exp(first - best)), 0))
    is_winner = lanes == winner
    rest = tl.where(is_winner, second, first)
    rest_at = tl.where(is_winner, second_at, first_at)
    runner_up, place = tl.max(rest, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row * 4, tl.sum(tl.where(is_winner, first_at, 0.0), 0))
    tl.store(out + row * 4 + 1, best - log_sum)
    tl.store(out + row * 4 + 2, tl.sum(tl.where(lanes == place, rest_at, 0.0), 0))
    tl.store(out + row * 4 + 3, runner_up - log_sum)


def _fix_keys() -> None:
    """A kernel's key in Triton's cache depends on which keys were made before it (seen in 3.6): make all, in order."""
    for value in list(globals().values()):
        if isinstance(value, triton.JITFunction):
            _ = value.cache_key


_fix_keys()
