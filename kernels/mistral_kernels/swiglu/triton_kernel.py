"""The gate of a SwiGLU layer in Triton: silu in float32, one rounding."""

import torch
import triton
import triton.language as tl

from .._triton import alignment, launch, row_offset, rows

# Elements of a program and its warps: one 16-byte load of gate and one of up a thread for 16-bit types, 32 registers
# or fewer on sm_80, 90 and 100 (read from SASS), so that all 64 warps of an SM are resident. Not timed on a GPU.
TILE = 1024
WARPS = 4


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
    y = gate / (1 + tl.exp(-gate)) * up  # one rounding less than gate · sigmoid(gate)
    tl.store(Y + (row * N)[:, None] + column, y.to(Y.dtype.element_ty), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    if gate.dim() == 0:
        gate, up = gate.view(1), up.view(1)
    r = rows(gate, up)
    n = gate.shape[-1]
    block = min(triton.next_power_of_2(n), TILE)
    launch(
        _swiglu_kernel,
        triton.cdiv(r.count, TILE // block) * triton.cdiv(n, block),
        y.device,
        *r.tensors,
        y,
        r.count,
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
