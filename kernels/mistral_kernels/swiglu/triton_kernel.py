"""The gate of a SwiGLU layer in Triton: silu in float32, one rounding."""

import torch
import triton
import triton.language as tl

from .._triton import alignment, blocks, launch, power_of_2, row_offset, rows

# Elements of a program and its warps: one 16-byte load of gate and one of up a thread for 16-bit types, 32 registers
# or fewer on sm_80, 90 and 100 (read from SASS), so that all 64 warps of an SM are resident. H100 (HBM3), [8192, 14336]
# bfloat16: 2.99 TB/s, where a sum of two tensors has 2.92; 512 to 4096 elements on 2 to 8 warps are all within 2 %.
TILE = 1024
WARPS = 4


@triton.jit
def _exp(x):
    """e^x to a unit in the last place; tl.exp multiplies by log2(e) in float32 and so loses what that rounds off.

    x = n · ln 2 + r with |r| <= ln(2)/2; the high part of ln 2 has few enough bits that n times it is exact.
    """
    x = tl.minimum(tl.maximum(x, -150.0), 150.0)  # keeps infinities out; beyond, e^x is 0 and inf in float32
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693145751953125 - n * 1.428606765330187e-06
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit(do_not_specialize=["count", "n1", "n2"])
def _swiglu_kernel(
    GATE,
    UP,
    Y,
    count,
    n1,
    n2,
    g0,
    g1,
    g2,
    u0,
    u1,
    u2,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Neighbouring programs take neighbouring columns, so that they share the pages of a row."""
    across: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (column < N) & (row < count)[:, None]
    gate_at = row_offset(row, n1, n2, g0, g1, g2, DEPTH, ALIGN)[:, None] + column
    up_at = row_offset(row, n1, n2, u0, u1, u2, DEPTH, ALIGN)[:, None] + column
    gate = tl.load(GATE + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask=mask, other=0.0).to(tl.float32)
    if Y.dtype.element_ty == tl.float32:
        y = tl.div_rn(gate, 1 + _exp(-gate)) * up
    else:
        y = gate / (1 + tl.exp(-gate)) * up
    tl.store(Y + (row * N)[:, None] + column, y.to(Y.dtype.element_ty), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    if gate.dim() == 0:
        gate, up = gate.view(1), up.view(1)
    r = rows(gate, up)
    n = gate.shape[-1]
    block = min(power_of_2(n), TILE)
    launch(
        _swiglu_kernel,
        blocks(r.total, TILE // block) * blocks(n, block),
        y.device,
        *r.tensors,
        y,
        r.total,
        *r.sizes,
        *r.strides[0],
        *r.strides[1],
        N=n,
        ROWS=TILE // block,
        BLOCK=block,
        DEPTH=r.depth,
        ALIGN=alignment(*r.strides[0], *r.strides[1]),
        num_warps=WARPS,
    )
    return y


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    return swiglu(*gate_up.chunk(2, dim=-1))
