"""What the Triton kernels of several ops share: launching, rows with any strides, rotations."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._checks import unit_stride

ALIGNMENT = 16  # elements; no load is wider than 16 bytes, and an element has at least one


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs of `kernel` on `device`, with FMA contraction (Triton 3.10 turns it off by default)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, enable_fp_fusion=True, **constants)
    else:
        kernel[(programs,)](*args, enable_fp_fusion=True, **constants)


# triton.cdiv and triton.next_power_of_2 cost microseconds a call on the host.
def blocks(n: int, size: int) -> int:
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def in_a_row(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Ends, lengths and labels as kernels read them: one after the other."""
    return [None if t is None else t.contiguous() for t in tensors]


def alignment(*strides: int) -> int:
    """The power of two, at most ALIGNMENT, that divides every stride: what a kernel may promise the compiler."""
    return math.gcd(ALIGNMENT, *strides)


@functools.cache
def processors(device: torch.device) -> int:
    """The multiprocessors that programs spread over; 132 (an H100's) where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class Rows(NamedTuple):
    """Tensors `[..., N]` of one shape as rows: their leading dimensions merged into at most three.

    `sizes` are those of the second and third merged dimension; `strides` has, for each tensor, the strides of all
    three, outermost first. With a depth of 1 only the last counts.
    """

    tensors: list[torch.Tensor]
    total: int
    depth: int
    sizes: tuple[int, int]
    strides: list[tuple[int, int, int]]


def rows(*tensors: torch.Tensor) -> Rows:
    """Copies only tensors whose last stride is not 1, and those with more than three dimensions that do not merge."""
    n = tensors[0].shape[-1]
    if all(t.is_contiguous() for t in tensors):
        return Rows(list(tensors), tensors[0].numel() // n, 1, (1, 1), [(0, 0, n)] * len(tensors))
    unit = [unit_stride(t) for t in tensors]
    merged = _merge(unit)
    if len(merged) > 3:
        unit = [t.contiguous() for t in unit]
        merged = _merge(unit)
    depth = max(len(merged), 1)
    merged = [(1, *[0] * len(unit))] * (3 - len(merged)) + merged
    (n0, *s0), (n1, *s1), (n2, *s2) = merged
    return Rows(unit, n0 * n1 * n2, depth, (n1, n2), list(zip(s0, s1, s2, strict=True)))


def _merge(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """(size, stride in each tensor) of the leading dimensions, with those merged that are one in every tensor."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in zip(tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors), strict=True):
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged


@triton.jit
def row_offset(row, n1, n2, s0, s1, s2, DEPTH: tl.constexpr, ALIGN: tl.constexpr):
    """The offset of each row (int64) of a tensor of `Rows`; ALIGN divides the strides."""
    if DEPTH == 1:
        offset = row * s2
    elif DEPTH == 2:
        offset = (row // n2) * s1 + (row % n2) * s2
    else:
        offset = (row // n2 // n1) * s0 + (row // n2 % n1) * s1 + (row % n2) * s2
    return tl.multiple_of(offset, ALIGN)


# ---- tiles of heads of one token ----

# 16 heads of dimension 128 are 4 warps whose threads hold 8 pairs: one 16-byte load of each half for 16-bit types, and
# 30 to 40 registers (read from SASS), 48 or 64 warps an SM. H100 (HBM3), 16384 tokens of 32/8 heads of 128 in bfloat16,
# views of one projection: rope 2.77 TB/s, with the ring write 2.78, the write alone 2.57 (a copy has 2.85); 128 a warp
# is 6 to 10 % slower, 32 heads a tile up to 20 %. Of 9/3 heads of 64 rope has 2.25 TB/s, with 8 heads a tile 1.62.
HEADS_PER_TILE = 16
WIDTH_PER_WARP = 256
WIDTH_PER_TILE = 2048


def head_tile(heads: int, width: int) -> tuple[int, int, int]:
    """Heads of a tile and their width (pairs, or elements), both powers of two, and the warps for it."""
    block = power_of_2(width)
    tile = min(HEADS_PER_TILE, power_of_2(heads), max(1, WIDTH_PER_TILE // block))
    return tile, block, min(32, max(1, tile * block // WIDTH_PER_WARP))


@triton.jit
def load_angles(COS, SIN, position, table_rows, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr):
    """cos and sin `[1, BLOCK]` of one position (int64): NaN outside the table, which no launch can raise for."""
    pair = tl.arange(0, BLOCK)
    row = position + tl.zeros([BLOCK], tl.int64)  # a vector: the interpreter cannot broadcast a mask
    mask = (pair < PAIRS) & (row >= 0) & (row < table_rows)
    cos = tl.load(COS + row * PAIRS + pair, mask=mask, other=float("nan"))
    sin = tl.load(SIN + row * PAIRS + pair, mask=mask, other=float("nan"))
    if INVERSE:
        sin = -sin
    return cos[None, :], sin[None, :]


@triton.jit
def head_offset(head, stride, ALIGN: tl.constexpr):
    """The offsets `[heads, 1]` of a token's heads, in 64 bits; ALIGN divides the stride."""
    return tl.multiple_of(head.to(tl.int64) * stride, ALIGN)[:, None]


@triton.jit
def load_pairs(TOKEN, offset, mask, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of each pair, `[heads, BLOCK]` in float32; `offset` and `mask` are `[heads, 1]`."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(TOKEN + offset + column, mask=mask & (column < 2 * PAIRS), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
    else:
        pair = tl.arange(0, BLOCK)[None, :]
        mask = mask & (pair < PAIRS)
        first = tl.load(TOKEN + offset + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(TOKEN + offset + PAIRS + pair, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    TOKEN, first, second, offset, mask, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The inverse of `load_pairs`, rounding to the dtype of TOKEN."""
    dtype = TOKEN.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.reshape(tl.join(first, second), [first.shape[0], 2 * BLOCK])
        tl.store(TOKEN + offset + column, x.to(dtype), mask=mask & (column < 2 * PAIRS))
    else:
        pair = tl.arange(0, BLOCK)[None, :]
        mask = mask & (pair < PAIRS)
        tl.store(TOKEN + offset + pair, first.to(dtype), mask=mask)
        tl.store(TOKEN + offset + PAIRS + pair, second.to(dtype), mask=mask)


@triton.jit
def rotate_heads(
    TOKEN,
    head,
    stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The rotated pairs of some heads of a token (Su et al. 2021, eq. 34), and the mask of those heads."""
    mask = (head < HEADS)[:, None]
    first, second = load_pairs(TOKEN, head_offset(head, stride, ALIGN), mask, PAIRS, BLOCK, INTERLEAVED)
    return first * cos - second * sin, second * cos + first * sin, mask
