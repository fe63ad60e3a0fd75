"""RMSNorm's gradients in Triton, alone and with the gradient of the residual sum; dweight in two stages, no atomics."""

import torch
import triton
import triton.language as tl

from .._triton import Rows, alignment, blocks, launch, power_of_2, processors, row_offset, rows

# 8 elements a thread: x, dy, the weight and the partial dweight of each stay in registers, 40 to 71 of them on sm_80,
# 90 and 100 (read from SASS), with 24 to 32 warps an SM; 16 elements take over 100 and leave 16 warps. Not timed.
TILE_PER_WARP = 256
SHORT_TILE = 2048
# 8192 elements are 32 warps, all that a program can have; longer rows are cut into columns, after a pass for the means.
LONGEST_IN_REGISTERS = 8192
COLUMNS = 2048
WARPS_PER_PROCESSOR = 32
# The second stage: 32 float32 columns are one 128-byte line of each partial row.
PARTIALS = 32
REDUCED_COLUMNS = 32


@triton.jit
def _load_row(X, at, mask):
    return tl.load(X + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n1", "n2"])
def _mean_kernel(
    DY, X, W, RSTD, MEAN, n1, n2, dy0, dy1, dy2, x0, x1, x2,
    N: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """mean(dy · weight · n) of one long row."""
    row = tl.program_id(0).to(tl.int64)
    dy_row = row_offset(row, n1, n2, dy0, dy1, dy2, DEPTH, ALIGN)
    x_row = row_offset(row, n1, n2, x0, x1, x2, DEPTH, ALIGN)
    rstd = tl.load(RSTD + row)
    products = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, N, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < N
        g = _load_row(DY, dy_row + column, mask) * _load_row(W, column, mask)
        products += g * (_load_row(X, x_row + column, mask) * rstd)
    tl.store(MEAN + row, tl.sum(products, 0) / N)


@triton.jit(do_not_specialize=["count", "steps", "n1", "n2"])
def _norm_backward_kernel(
    DY, X, DTOTAL, W, RSTD, MEAN, DX, PARTIAL, count, steps, n1, n2,
    dy0, dy1, dy2, x0, x1, x2, t0, t1, t2,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
    MODEL_ROUNDING: tl.constexpr,
):  # fmt: skip
    """One program: `steps` times ROWS neighbouring rows, BLOCK columns; its share of dweight stays in registers."""
    across: tl.constexpr = (N + BLOCK - 1) // BLOCK
    group = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    column_mask = column < N
    w = _load_row(W, column, column_mask)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps):
        row = (group * steps + step) * ROWS + tl.arange(0, ROWS)
        live = row < count
        mask = column_mask & live[:, None]
        dy = _load_row(DY, row_offset(row, n1, n2, dy0, dy1, dy2, DEPTH, ALIGN)[:, None] + column, mask)
        x = _load_row(X, row_offset(row, n1, n2, x0, x1, x2, DEPTH, ALIGN)[:, None] + column, mask)
        rstd = tl.load(RSTD + row, mask=live, other=0.0)[:, None]
        n = x * rstd
        g = dy * w
        if MEAN is not None:
            mean = tl.load(MEAN + row, mask=live, other=0.0)[:, None]
        else:
            mean = tl.sum(g * n, axis=1, keep_dims=True) / N
        dx = rstd * (g - n * mean)
        if DTOTAL is not None:
            dx += _load_row(DTOTAL, row_offset(row, n1, n2, t0, t1, t2, DEPTH, ALIGN)[:, None] + column, mask)
        tl.store(DX + (row * N)[:, None] + column, dx.to(DX.dtype.element_ty), mask=mask)
        if MODEL_ROUNDING:
            n = n.to(X.dtype.element_ty).to(tl.float32)
        dw += dy * n
    tl.store(PARTIAL + group * N + column, tl.sum(dw, axis=0, keep_dims=True), mask=column_mask)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(PARTIAL, DW, count, N: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight of BLOCK columns: the partial sums, in one fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([PARTIALS, BLOCK], tl.float32)
    for first in tl.range(0, count, PARTIALS):
        row = (first + tl.arange(0, PARTIALS))[:, None]
        total += tl.load(PARTIAL + row.to(tl.int64) * N + column, mask=(row < count) & (column < N), other=0.0)
    dw = tl.sum(total, axis=0, keep_dims=True)
    tl.store(DW + column, dw.to(DW.dtype.element_ty), mask=column < N)


def _means(r: Rows, weight: torch.Tensor, rstd: torch.Tensor, n: int) -> torch.Tensor:
    mean = torch.empty(r.total, dtype=torch.float32, device=rstd.device)
    strides = (*r.strides[0], *r.strides[1])
    launch(
        _mean_kernel, r.total, rstd.device,
        *r.tensors[:2], weight, rstd, mean, *r.sizes, *strides,
        N=n, BLOCK=LONGEST_IN_REGISTERS, DEPTH=r.depth, ALIGN=alignment(*strides), num_warps=32,
    )  # fmt: skip
    return mean


def _run(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    model_rounding: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[-1]
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    if dx.numel() == 0:
        return dx, dweight.zero_()
    weight, rstd = weight.contiguous(), rstd.contiguous()
    r = rows(dy, x) if dtotal is None else rows(dy, x, dtotal)
    strides = [s for tensor in r.strides for s in tensor] + [0] * (3 if dtotal is None else 0)
    together, block, mean = 1, power_of_2(n), None
    if block > LONGEST_IN_REGISTERS:
        block, mean = COLUMNS, _means(r, weight, rstd, n)
    elif block < SHORT_TILE:
        together = SHORT_TILE // block
    warps = max(1, together * block // TILE_PER_WARP)
    across = blocks(n, block)
    resident = max(1, processors(x.device) * (WARPS_PER_PROCESSOR // warps) // across)
    steps = blocks(r.total, together * resident)
    groups = blocks(r.total, together * steps)
    partial = torch.empty(groups, n, dtype=torch.float32, device=x.device)
    launch(
        _norm_backward_kernel, groups * across, x.device,
        *r.tensors[:2], None if dtotal is None else r.tensors[2], weight, rstd, mean, dx, partial,
        r.total, steps, *r.sizes, *strides,
        N=n, ROWS=together, BLOCK=block, DEPTH=r.depth, ALIGN=alignment(*strides),
        MODEL_ROUNDING=model_rounding, num_warps=warps,
    )  # fmt: skip
    launch(
        _sum_kernel, blocks(n, REDUCED_COLUMNS), x.device,
        partial, dweight, groups,
        N=n, PARTIALS=PARTIALS, BLOCK=REDUCED_COLUMNS, num_warps=4,
    )  # fmt: skip
    return dx, dweight


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(dy, None, x, weight, rstd, model_rounding)


def add_rms_norm_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    model_rounding: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(dy, dtotal, total, weight, rstd, model_rounding)
