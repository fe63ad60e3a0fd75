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


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        s = tl.div_rn(1.0, 1 + _exp(-x))
    else:
        s = 1 / (1 + tl.exp(-x))
    return s


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


@triton.jit(do_not_specialize=["count", "n1", "n2"])
def _swiglu_backward_kernel(
    DY, GATE, UP, DGATE, DUP, count, n1, n2, d0, d1, d2, g0, g1, g2, u0, u1, u2,
    N: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT is the row stride of DGATE and DUP: two tensors, or the halves of one."""
    across: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (column < N) & (row < count)[:, None]
    dy_at = row_offset(row, n1, n2, d0, d1, d2, DEPTH, ALIGN)[:, None] + column
    gate_at = row_offset(row, n1, n2, g0, g1, g2, DEPTH, ALIGN)[:, None] + column
    up_at = row_offset(row, n1, n2, u0, u1, u2, DEPTH, ALIGN)[:, None] + column
    dy = tl.load(DY + dy_at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid(gate, DGATE.dtype.element_ty == tl.float32)
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s
    at = (row * OUT)[:, None] + column
    tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), mask=mask)
    tl.store(DUP + at, dup.to(DUP.dtype.element_ty), mask=mask)


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor, out_stride: int
) -> None:
    """Writes dgate and dup, whose rows are `out_stride` apart."""
    r = rows(dy, gate, up)
    n = gate.shape[-1]
    block = min(power_of_2(n), TILE)
    strides = [s for tensor in r.strides for s in tensor]
    launch(
        _swiglu_backward_kernel, blocks(r.total, TILE // block) * blocks(n, block), gate.device,
        *r.tensors, dgate, dup, r.total, *r.sizes, *strides,
        N=n, OUT=out_stride, ROWS=TILE // block, BLOCK=block, DEPTH=r.depth, ALIGN=alignment(*strides),
        num_warps=WARPS,
    )  # fmt: skip


def swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        dy, gate, up = (t.view(1) if t.dim() == 0 else t for t in (dy, gate, up))
        _backward(dy, gate, up, dgate, dup, gate.shape[-1])
    return dgate, dup


def swiglu_packed_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    out = gate_up.new_empty(gate_up.shape)
    if out.numel():
        (gate, up), (dgate, dup) = gate_up.chunk(2, dim=-1), out.chunk(2, dim=-1)
        _backward(dy, gate, up, dgate, dup, out.shape[-1])
    return out
