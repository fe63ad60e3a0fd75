"""Rotary position embedding in Triton: queries and keys in one launch."""

import torch
import triton
import triton.language as tl

from .._checks import unit_stride
from .._triton import alignment, blocks, head_tile, launch, load_angles, rotate_heads, store_pairs


@triton.jit(do_not_specialize=["length", "table_rows", "p_b", "p_s"])
def _rope_kernel(
    Q,
    K,
    Q_OUT,
    K_OUT,
    COS,
    SIN,
    POSITIONS,
    length,
    table_rows,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    p_b,
    p_s,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One token, and TILE heads of its queries or of its keys."""
    q_tiles: tl.constexpr = (Q_HEADS + TILE - 1) // TILE
    tiles: tl.constexpr = q_tiles + (K_HEADS + TILE - 1) // TILE
    token = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b = (token // length).to(tl.int64)
    s = (token % length).to(tl.int64)
    position = s
    if POSITIONS is not None:
        position = tl.load(POSITIONS + b * p_b + s * p_s).to(tl.int64)
    cos, sin = load_angles(COS, SIN, position, table_rows, PAIRS, BLOCK, INVERSE)
    if tile < q_tiles:
        q = Q + tl.multiple_of(b * q_b + s * q_s, ALIGN)
        out = Q_OUT + token.to(tl.int64) * (Q_HEADS * PAIRS * 2)
        head = tile * TILE + tl.arange(0, TILE)
        first, second, mask = rotate_heads(q, head, q_h, cos, sin, Q_HEADS, PAIRS, BLOCK, ALIGN, INTERLEAVED)
        store_pairs(out, first, second, (head * (2 * PAIRS))[:, None], mask, PAIRS, BLOCK, INTERLEAVED)
    else:
        k = K + tl.multiple_of(b * k_b + s * k_s, ALIGN)
        out = K_OUT + token.to(tl.int64) * (K_HEADS * PAIRS * 2)
        head = (tile - q_tiles) * TILE + tl.arange(0, TILE)
        first, second, mask = rotate_heads(k, head, k_h, cos, sin, K_HEADS, PAIRS, BLOCK, ALIGN, INTERLEAVED)
        store_pairs(out, first, second, (head * (2 * PAIRS))[:, None], mask, PAIRS, BLOCK, INTERLEAVED)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    q, k = unit_stride(q), unit_stride(k)
    if q.dim() == 3:
        q, k = q[None], k[None]
        positions = None if positions is None else positions[None]
    batch, length, q_heads, dim = q.shape
    tile, block, warps = head_tile(max(q_heads, k.shape[2]), dim // 2)
    strides = (*q.stride()[:3], *k.stride()[:3])
    launch(
        _rope_kernel,
        batch * length * (blocks(q_heads, tile) + blocks(k.shape[2], tile)),
        q.device,
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        positions,
        length,
        cos.shape[0],
        *strides,
        *(positions.stride() if positions is not None else (0, 0)),
        Q_HEADS=q_heads,
        K_HEADS=k.shape[2],
        PAIRS=dim // 2,
        TILE=tile,
        BLOCK=block,
        ALIGN=alignment(*strides),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        num_warps=warps,
    )
    return q_out, k_out
