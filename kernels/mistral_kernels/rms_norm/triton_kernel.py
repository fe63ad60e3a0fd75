"""RMSNorm, and the residual addition before it, in Triton: a kernel for rows that fit in registers, one for longer."""

import functools

import torch
import triton
import triton.language as tl

from .._triton import alignment, blocks, launch, power_of_2, row_offset, rows

# 16 elements a thread: for 16-bit types 31 to 40 registers on sm_80, 90 and 100 (read from SASS), so that 48 to 64
# warps stay resident, each with two or more 16-byte loads of a tensor in flight. H100 (HBM3), 64 Mi bfloat16 elements:
# 2.80 to 2.85 TB/s for N from 128 to 16384, where a copy has 2.85; 8 or 32 elements a thread are no faster anywhere,
# and with 8 N = 576 has 2.36.
TILE_PER_WARP = 512
# Short rows share a program, 4 warps of them: its width does not depend on how many rows there are, so the result of a
# row never depends on its neighbours.
SHORT_TILE = 2048
# 16384 elements are 32 warps, all that a program can have; more elements a thread would spill or leave 16 warps an SM.
LONGEST_IN_REGISTERS = 16384
# Longer rows are read twice, in blocks; the second time from the L2 cache where the rows in flight fit in it. H100, N =
# 32768 and 131072: 2.70 and 2.07 TB/s, with blocks of 8192 2.34 and 1.88.
LOOP_BLOCK = 16384


@triton.jit
def _load_total(X, RESIDUAL, x_at, residual_at, mask):
    """x in float32; with a residual their sum, rounded as it is stored."""
    x = tl.load(X + x_at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + residual_at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _rstd(squares, eps, SHARE: tl.constexpr, SHARE_REST: tl.constexpr, EXACT: tl.constexpr):
    """1 / sqrt(sum(squares) · share + eps) of each row, `[rows, 1]`; share + share_rest is 1/N to twice the precision.

    An error here is in every element of the row. Float32 results show it, so for them (EXACT) only the end is rounded:
    squares are split at a common bit, so that their high parts add up without rounding (Rump, Ogita & Oishi 2008,
    ExtractVector); the mean is a float32 number and the rest; and a Newton step with the residual
    1 − (mean + rest) · r², r² in twice the precision, mends the GPU's rsqrt, which is up to two units off.
    """
    total = tl.sum(squares, axis=1, keep_dims=True)
    eps = tl.cast(eps, tl.float32)
    if not EXACT:
        return tl.rsqrt(total * SHARE + eps)
    high = (squares + 2 * total) - 2 * total
    low = tl.sum(squares - high, axis=1, keep_dims=True)
    high = tl.sum(high, axis=1, keep_dims=True)
    eps += tl.zeros(total.shape, tl.float32)
    share = tl.full(total.shape, SHARE, tl.float32)
    mean = tl.fma(high, share, eps)
    without = mean - eps
    rest = tl.fma(high, share, -without) - ((mean - without) - eps) + (high * SHARE_REST + low * SHARE)
    mean = tl.where(mean == mean, mean, total)  # an infinite sum has no parts
    r = tl.rsqrt(mean)
    squared = r * r
    residual = tl.fma(-mean, squared, tl.full(total.shape, 1.0, tl.float32))
    residual -= mean * tl.fma(r, r, -squared) + rest * squared
    refined = tl.fma(0.5 * r, residual, r)
    return tl.where(refined == refined, refined, r)  # 0 and infinity have no Newton step


@triton.jit
def _store_normed(X, W, Y, x, rstd, y_at, column, mask, column_mask, MODEL_ROUNDING: tl.constexpr):
    """Bfloat16 products are formed in float32: rounded once, they are what a bfloat16 multiplication gives."""
    w = tl.load(W + column, mask=column_mask, other=0.0).to(tl.float32)
    n = x * rstd
    if MODEL_ROUNDING:
        n = n.to(X.dtype.element_ty).to(tl.float32)
    tl.store(Y + y_at, (n * w).to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "n1", "n2"])
def _norm_kernel(
    X,
    RESIDUAL,
    W,
    Y,
    TOTAL,
    RSTD,
    eps,
    count,
    n1,
    n2,
    x0,
    x1,
    x2,
    r0,
    r1,
    r2,
    N: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    MODEL_ROUNDING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    column_mask = column < N
    mask = column_mask & (row < count)[:, None]
    x_at = row_offset(row, n1, n2, x0, x1, x2, DEPTH, ALIGN)[:, None] + column
    residual_at = row_offset(row, n1, n2, r0, r1, r2, DEPTH, ALIGN)[:, None] + column
    y_at = (row * N)[:, None] + column
    x = _load_total(X, RESIDUAL, x_at, residual_at, mask)
    if TOTAL is not None:
        tl.store(TOTAL + y_at, x.to(TOTAL.dtype.element_ty), mask=mask)
    rstd = _rstd(x * x, eps, SHARE, SHARE_REST, Y.dtype.element_ty == tl.float32)
    tl.store(RSTD + row[:, None], rstd, mask=(row < count)[:, None])
    _store_normed(X, W, Y, x, rstd, y_at, column, mask, column_mask, MODEL_ROUNDING)


@triton.jit(do_not_specialize=["count", "n1", "n2"])
def _long_norm_kernel(
    X,
    RESIDUAL,
    W,
    Y,
    TOTAL,
    RSTD,
    eps,
    count,
    n1,
    n2,
    x0,
    x1,
    x2,
    r0,
    r1,
    r2,
    N: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
    MODEL_ROUNDING: tl.constexpr,
):
    """One row a program. The sum x + residual is formed twice: reading back what was stored would need a barrier."""
    row = tl.program_id(0).to(tl.int64)
    x_row = row_offset(row, n1, n2, x0, x1, x2, DEPTH, ALIGN)
    residual_row = row_offset(row, n1, n2, r0, r1, r2, DEPTH, ALIGN)
    squares = tl.zeros([1, BLOCK], tl.float32)
    for first in tl.range(0, N, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        x = _load_total(X, RESIDUAL, x_row + column, residual_row + column, column < N)
        if TOTAL is not None:
            tl.store(TOTAL + row * N + column, x.to(TOTAL.dtype.element_ty), mask=column < N)
        squares += x * x
    rstd = _rstd(squares, eps, SHARE, SHARE_REST, Y.dtype.element_ty == tl.float32)
    tl.store(RSTD + row + tl.zeros([1, 1], tl.int32), rstd)
    for first in tl.range(0, N, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = column < N
        x = _load_total(X, RESIDUAL, x_row + column, residual_row + column, mask)
        _store_normed(X, W, Y, x, rstd, row * N + column, column, mask, mask, MODEL_ROUNDING)


@functools.cache
def _share(n: int) -> tuple[float, float]:
    """1/n as the sum of two float32 numbers."""
    high = torch.tensor(1 / n, dtype=torch.float32).item()
    return high, 1 / n - high


def _run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    model_rounding: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    n = x.shape[-1]
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel() == 0:
        return y, total, rstd
    if n == 0:
        return y, total, rstd.fill_(float("nan"))  # the mean of nothing
    r = rows(x) if residual is None else rows(x, residual)
    strides = [s for tensor in r.strides for s in tensor] + [0] * (3 if residual is None else 0)
    kernel, together, block = _norm_kernel, 1, power_of_2(n)
    if block > LONGEST_IN_REGISTERS:
        kernel, block = _long_norm_kernel, LOOP_BLOCK
    elif block < SHORT_TILE:
        together = SHORT_TILE // block
    high, rest = _share(n)
    launch(
        kernel,
        blocks(r.total, together),
        x.device,
        r.tensors[0],
        None if residual is None else r.tensors[1],
        weight.contiguous(),
        y,
        total,
        rstd,
        eps,
        r.total,
        *r.sizes,
        *strides,
        N=n,
        SHARE=high,
        SHARE_REST=rest,
        ROWS=together,
        BLOCK=block,
        DEPTH=r.depth,
        ALIGN=alignment(*strides),
        MODEL_ROUNDING=model_rounding,
        num_warps=together * block // TILE_PER_WARP,
    )
    return y, total, rstd


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = _run(x, None, weight, eps, model_rounding)
    return y, rstd


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total, rstd = _run(x, residual, weight, eps, model_rounding)
    assert total is not None
    return y, total, rstd
