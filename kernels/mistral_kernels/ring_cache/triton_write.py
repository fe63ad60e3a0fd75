"""Writes into the ring cache in Triton: alone, and fused with the rotation of queries and keys."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._checks import unit_stride
from .._triton import (
    alignment,
    blocks,
    head_offset,
    head_tile,
    in_a_row,
    launch,
    load_angles,
    power_of_2,
    rotate_heads,
    store_pairs,
)

# Ends of sequences that are compared with a token at once: one load, instead of the chain of a binary search.
ENDS = 1024
NO_END = tl.constexpr(2147483647)


@triton.jit
def _sequence(token, length, CU, batch, CU_BLOCK: tl.constexpr):
    """The sequence of a token, and how many tokens of it are left, this one included: none where no sequence has it."""
    if CU is None:
        sequence = token // length
        left = length - token % length
    else:
        sequence = tl.full((), 0, tl.int32)
        for first in tl.range(0, batch, CU_BLOCK):
            index = first + tl.arange(0, CU_BLOCK)
            ends = tl.load(CU + 1 + index, mask=index < batch, other=NO_END)
            sequence += tl.sum((ends <= token).to(tl.int32), axis=0)
        left = tl.load(CU + 1 + sequence, mask=sequence < batch, other=0) - token
    return sequence.to(tl.int64), left


@triton.jit
def _slot(POSITIONS, p_b, p_s, token, length, CU, batch, slots, HEADS: tl.constexpr, CU_BLOCK: tl.constexpr):
    """The position of a token, its sequence and slot, and how many of its HEADS are written there: all or none.

    It is written unless the token `slots` behind it, which has the same slot, is in the chunk and not idle. A number
    of heads, since the interpreter cannot broadcast a mask.
    """
    sequence, left = _sequence(token, length, CU, batch, CU_BLOCK)
    at = POSITIONS + (token // length).to(tl.int64) * p_b + (token % length).to(tl.int64) * p_s
    position = tl.load(at).to(tl.int64)
    successor = tl.load(at + tl.cast(slots, tl.int64) * p_s, mask=slots < left, other=-1)
    written = (position >= 0) & (left > 0) & (successor < 0)
    return position, sequence, position % slots, tl.where(written, HEADS, 0)


@triton.jit
def _copy_heads(
    TOKEN,
    OUT,
    head,
    stride,
    out_stride,
    written,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loads whether it stores or not: waiting for the position first would put two memory latencies in a row."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS)[:, None] & (column < DIM)
    x = tl.load(TOKEN + head_offset(head, stride, ALIGN) + column, mask=mask)
    mask = (head < written)[:, None] & (column < DIM)
    tl.store(OUT + head_offset(head, out_stride, ALIGN) + column, x, mask=mask)


@triton.jit
def _codes(x, scale):
    """round(x / scale), halves to even: adding 1.5 · 2^23 leaves no fraction. 0 where scale is no number."""
    x = tl.where(scale > 0.0, tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)), 0.0)
    x = tl.where(tl.abs(x) <= 127.5, x, 0.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _largest(x):
    """max|x| of each row `[rows, 1]`; infinite where the row has a NaN, which tl.max would drop."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1, keep_dims=True)


@triton.jit
def _pair_codes(first, second, DTYPE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of rotated heads, rounded to DTYPE first, and the scale of each. Beyond PAIRS lies what was not loaded."""
    inside = tl.arange(0, BLOCK)[None, :] < PAIRS
    first = tl.where(inside, first.to(DTYPE).to(tl.float32), 0.0)
    second = tl.where(inside, second.to(DTYPE).to(tl.float32), 0.0)
    scale = tl.div_rn(tl.maximum(_largest(first), _largest(second)), 127.0)
    return _codes(first, scale), _codes(second, scale), scale


@triton.jit
def _quantise_heads(
    TOKEN,
    OUT,
    SCALES,
    head,
    stride,
    out_stride,
    written,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """As `_copy_heads`, into int8 codes and a scale for each head."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS)[:, None] & (column < DIM)
    x = tl.load(TOKEN + head_offset(head, stride, ALIGN) + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(_largest(x), 127.0)
    tl.store(SCALES + head[:, None], scale, mask=(head < written)[:, None])
    mask = (head < written)[:, None] & (column < DIM)
    tl.store(OUT + head_offset(head, out_stride, ALIGN) + column, _codes(x, scale).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["length", "batch", "slots", "p_b", "p_s"])
def _write_kernel(
    K,
    V,
    K_CACHE,
    V_CACHE,
    K_SCALE,
    V_SCALE,
    POSITIONS,
    CU,
    length,
    batch,
    slots,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    kc_b,
    kc_s,
    kc_h,
    vc_b,
    vc_s,
    vc_h,
    p_b,
    p_s,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CU_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One token, and TILE heads of its key and value."""
    tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    token = tl.program_id(0) // tiles
    head = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    _, sequence, slot, written = _slot(POSITIONS, p_b, p_s, token, length, CU, batch, slots, HEADS, CU_BLOCK)
    b = (token // length).to(tl.int64)
    s = (token % length).to(tl.int64)
    k = K + tl.multiple_of(b * k_b + s * k_s, ALIGN)
    v = V + tl.multiple_of(b * v_b + s * v_s, ALIGN)
    k_cache = K_CACHE + tl.multiple_of(sequence * kc_b + slot * kc_s, ALIGN)
    v_cache = V_CACHE + tl.multiple_of(sequence * vc_b + slot * vc_s, ALIGN)
    if K_SCALE is None:
        _copy_heads(k, k_cache, head, k_h, kc_h, written, HEADS, DIM, BLOCK, ALIGN)
        _copy_heads(v, v_cache, head, v_h, vc_h, written, HEADS, DIM, BLOCK, ALIGN)
    else:
        scales = (sequence * slots + slot) * HEADS
        _quantise_heads(k, k_cache, K_SCALE + scales, head, k_h, kc_h, written, HEADS, DIM, BLOCK, ALIGN)
        _quantise_heads(v, v_cache, V_SCALE + scales, head, v_h, vc_h, written, HEADS, DIM, BLOCK, ALIGN)


@triton.jit(do_not_specialize=["length", "batch", "slots", "table_rows", "p_b", "p_s"])
def _rope_write_kernel(
    Q,
    K,
    V,
    Q_OUT,
    K_OUT,
    K_CACHE,
    V_CACHE,
    K_SCALE,
    V_SCALE,
    COS,
    SIN,
    POSITIONS,
    CU,
    table_rows,
    length,
    batch,
    slots,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    kc_b,
    kc_s,
    kc_h,
    vc_b,
    vc_s,
    vc_h,
    p_b,
    p_s,
    Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CU_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One token, and TILE heads of its query, or of its key and value."""
    q_tiles: tl.constexpr = (Q_HEADS + TILE - 1) // TILE
    tiles: tl.constexpr = q_tiles + (HEADS + TILE - 1) // TILE
    token = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    position, sequence, slot, written = _slot(POSITIONS, p_b, p_s, token, length, CU, batch, slots, HEADS, CU_BLOCK)
    cos, sin = load_angles(COS, SIN, tl.maximum(position, 0), table_rows, PAIRS, BLOCK, False)
    b = (token // length).to(tl.int64)
    s = (token % length).to(tl.int64)
    idle = position < 0
    if tile < q_tiles:
        q = Q + tl.multiple_of(b * q_b + s * q_s, ALIGN)
        out = Q_OUT + token.to(tl.int64) * (Q_HEADS * PAIRS * 2)
        head = tile * TILE + tl.arange(0, TILE)
        first, second, mask = rotate_heads(q, head, q_h, cos, sin, Q_HEADS, PAIRS, BLOCK, ALIGN, INTERLEAVED)
        first, second = tl.where(idle, 0.0, first), tl.where(idle, 0.0, second)
        store_pairs(out, first, second, (head * (2 * PAIRS))[:, None], mask, PAIRS, BLOCK, INTERLEAVED)
    else:
        k = K + tl.multiple_of(b * k_b + s * k_s, ALIGN)
        v = V + tl.multiple_of(b * v_b + s * v_s, ALIGN)
        out = K_OUT + token.to(tl.int64) * (HEADS * PAIRS * 2)
        k_cache = K_CACHE + tl.multiple_of(sequence * kc_b + slot * kc_s, ALIGN)
        v_cache = V_CACHE + tl.multiple_of(sequence * vc_b + slot * vc_s, ALIGN)
        head = (tile - q_tiles) * TILE + tl.arange(0, TILE)
        first, second, mask = rotate_heads(k, head, k_h, cos, sin, HEADS, PAIRS, BLOCK, ALIGN, INTERLEAVED)
        first, second = tl.where(idle, 0.0, first), tl.where(idle, 0.0, second)
        store_pairs(out, first, second, (head * (2 * PAIRS))[:, None], mask, PAIRS, BLOCK, INTERLEAVED)
        kept = (head < written)[:, None]
        if K_SCALE is None:
            _copy_heads(v, v_cache, head, v_h, vc_h, written, HEADS, 2 * PAIRS, 2 * BLOCK, ALIGN)
        else:
            scales = (sequence * slots + slot) * HEADS
            _quantise_heads(v, v_cache, V_SCALE + scales, head, v_h, vc_h, written, HEADS, 2 * PAIRS, 2 * BLOCK, ALIGN)
            first, second, scale = _pair_codes(first, second, K_OUT.dtype.element_ty, PAIRS, BLOCK)
            tl.store(K_SCALE + scales + head[:, None], scale, mask=kept)
        store_pairs(k_cache, first, second, head_offset(head, kc_h, ALIGN), kept, PAIRS, BLOCK, INTERLEAVED)


class _Tokens(NamedTuple):
    """Tokens as `[B, S]`: how many, S, the strides (batch, token, head) of each tensor, and those of positions."""

    total: int
    length: int
    strides: list[tuple[int, ...]]
    position_strides: tuple[int, ...]


def _tokens(positions: torch.Tensor, cu: torch.Tensor | None, *tensors: torch.Tensor) -> _Tokens:
    """Packed tokens without ends are one a sequence: S = 1. With ends they are one row of all tokens."""
    if positions.dim() == 2:
        return _Tokens(positions.numel(), positions.shape[1], [t.stride()[:3] for t in tensors], positions.stride())
    count, step = positions.numel(), positions.stride(0)
    if cu is None:
        return _Tokens(count, 1, [(t.stride(0), 0, t.stride(1)) for t in tensors], (step, 0))
    return _Tokens(count, count, [(0, t.stride(0), t.stride(1)) for t in tensors], (0, step))


def _cu_block(batch: int) -> int:
    return min(ENDS, power_of_2(max(batch, 1)))


def _in_place(write: Callable[..., None], *caches: torch.Tensor | None) -> None:
    """Writes into caches whose last stride is not 1, and scales that are not contiguous, through copies of them."""
    unit = [c if c is None else unit_stride(c) if c.dim() == 4 else c.contiguous() for c in caches]
    write(*unit)
    for cache, copy in zip(caches, unit, strict=True):
        if cache is not None and copy is not None and copy is not cache:
            cache.copy_(copy)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu: torch.Tensor | None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    if k.numel() == 0:
        return
    k, v = unit_stride(k), unit_stride(v)
    (ends,) = in_a_row(cu)
    t = _tokens(positions, cu, k, v)
    batch, slots, heads, dim = k_cache.shape
    tile, block, warps = head_tile(heads, dim)

    def write(k_cache: torch.Tensor, v_cache: torch.Tensor, *scales: torch.Tensor | None) -> None:
        strides = [s for some in (*t.strides, k_cache.stride()[:3], v_cache.stride()[:3]) for s in some]
        launch(
            _write_kernel,
            t.total * blocks(heads, tile),
            k.device,
            k,
            v,
            k_cache,
            v_cache,
            *scales,
            positions,
            ends,
            t.length,
            batch,
            slots,
            *strides,
            *t.position_strides,
            HEADS=heads,
            DIM=dim,
            TILE=tile,
            BLOCK=block,
            CU_BLOCK=_cu_block(batch),
            ALIGN=alignment(*strides),
            num_warps=warps,
        )

    _in_place(write, k_cache, v_cache, k_scale, v_scale)


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu: torch.Tensor | None,
    interleaved: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    (ends,) = in_a_row(cu)
    t = _tokens(positions, cu, q, k, v)
    batch, slots, heads, dim = k_cache.shape
    q_heads = q.shape[-2]
    tile, block, warps = head_tile(max(q_heads, heads), dim // 2)

    def write(k_cache: torch.Tensor, v_cache: torch.Tensor, *scales: torch.Tensor | None) -> None:
        strides = [s for some in (*t.strides, k_cache.stride()[:3], v_cache.stride()[:3]) for s in some]
        launch(
            _rope_write_kernel,
            t.total * (blocks(q_heads, tile) + blocks(heads, tile)),
            q.device,
            q,
            k,
            v,
            q_out,
            k_out,
            k_cache,
            v_cache,
            *scales,
            cos,
            sin,
            positions,
            ends,
            cos.shape[0],
            t.length,
            batch,
            slots,
            *strides,
            *t.position_strides,
            Q_HEADS=q_heads,
            HEADS=heads,
            PAIRS=dim // 2,
            TILE=tile,
            BLOCK=block,
            CU_BLOCK=_cu_block(batch),
            ALIGN=alignment(*strides),
            INTERLEAVED=interleaved,
            num_warps=warps,
        )

    _in_place(write, k_cache, v_cache, k_scale, v_scale)
    return q_out, k_out


def write_kv_int8(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    positions: torch.Tensor,
    cu: torch.Tensor | None,
) -> None:
    write_kv(k, v, k_cache, v_cache, positions, cu, k_scale, v_scale)


def rope_write_kv_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_write_kv(q, k, v, k_cache, v_cache, positions, cos, sin, cu, interleaved, k_scale, v_scale)
