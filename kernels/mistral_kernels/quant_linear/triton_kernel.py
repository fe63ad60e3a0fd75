"""Linear layers on codes in Triton: codes are dequantised in registers.

A few rows are sums of products along rows of codes; more rows are tiles for the tensor cores, in which codes are exact
and the scale of a group multiplies the product of its elements. Rows in int8 are products of int8 with exact sums.
"""

import torch
import triton
import triton.language as tl

from .._checks import unit_stride
from .._triton import blocks, launch, power_of_2

INT8, INT4, NF4, W8A8 = range(4)
FEW_ROWS = 4  # one program for each row of x; the codes come from the L2 cache again
UNIT = 128  # elements of a step where a whole row shares a scale


@triton.jit
def _nf4(code):
    """The entry of the table (Dettmers et al. 2023, appendix E): a tree of selects takes no memory."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, code >= 8
    v0 = tl.where(b0, -0.6961928009986877, -1.0)
    v2 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v4 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v6 = tl.where(b0, 0.0, -0.09105003625154495)
    v8 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v10 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v12 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v14 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, v6, v4), tl.where(b1, v2, v0))
    high = tl.where(b2, tl.where(b1, v14, v12), tl.where(b1, v10, v8))
    return tl.where(b3, high, low).to(tl.float32)


@triton.jit
def _value(raw, KIND: tl.constexpr, HIGH: tl.constexpr):
    """What a byte stands for before it is scaled: an int8 code, or the code in one of its halves."""
    if KIND == 0 or KIND == 3:
        value = raw.to(tl.float32)
    else:
        if HIGH:
            code = raw.to(tl.int32) >> 4
        else:
            code = raw.to(tl.int32) & 15
        if KIND == 1:
            value = code.to(tl.float32) - 8.0
        else:
            value = _nf4(code)
    return value


@triton.jit
def _element(byte, KIND: tl.constexpr):
    """The element of a byte: of half-byte codes that in its low half; 16 further on is that in its high half."""
    if KIND == 0 or KIND == 3:
        element = byte
    else:
        element = byte // 16 * 32 + byte % 16
    return element


@triton.jit
def _row_bytes(K, KIND: tl.constexpr):
    if KIND == 0 or KIND == 3:
        count = K
    else:
        count = (K + 31) // 32 * 16
    return count


@triton.jit
def _few_kernel(
    X, CODES, SCALE, OFFSET, BIAS, Y, N, K, G, x_row, c_row,
    KIND: tl.constexpr, GROUPED: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one row of x; a step takes UNITS groups of UNIT elements."""
    BYTES: tl.constexpr = UNIT if KIND == 0 else UNIT // 2
    across = (N + ROWS - 1) // ROWS
    m = (tl.program_id(0) // across).to(tl.int64)
    n = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    row = n.to(tl.int64)[:, None, None]
    live = row < N
    unit = tl.arange(0, UNITS)[None, :, None]
    byte = tl.arange(0, BYTES)[None, None, :]
    row_bytes = _row_bytes(K, KIND)
    total = tl.zeros([ROWS, UNITS, BYTES], tl.float32)
    for start in range(0, K, UNITS * UNIT):
        group = start // UNIT + unit
        at, k = group * BYTES + byte, group * UNIT + _element(byte, KIND)
        raw = tl.load(CODES + row * c_row + at, mask=live & (at < row_bytes), other=0)
        x = tl.load(X + m * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        which = row * G + (group if GROUPED else group * 0)
        known = live & (group * UNIT < K)
        scale = tl.load(SCALE + which, mask=known, other=0.0)
        part = _value(raw, KIND, False) * x
        if KIND != 0:
            high = tl.load(X + m * x_row + k + 16, mask=k + 16 < K, other=0.0).to(tl.float32)
            part += _value(raw, KIND, True) * high
            x += high
        total += part * scale
        if HAS_OFFSET:
            total += x * tl.load(OFFSET + which, mask=known, other=0.0)
    y = tl.sum(tl.sum(total, 2), 1)
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(Y + m * N + n, y.to(Y.dtype.element_ty), mask=n < N)


@triton.jit
def _product(x, raw, KIND: tl.constexpr, HIGH: tl.constexpr):
    if KIND == 3:
        product = tl.dot(x, tl.trans(raw), out_dtype=tl.int32)
    else:
        product = tl.dot(x, tl.trans(_value(raw, KIND, HIGH).to(x.dtype)), input_precision="ieee")
    return product


@triton.jit
def _tile_kernel(
    X, X_SCALE, CODES, SCALE, OFFSET, BIAS, Y, M, N, K, G, x_row, c_row,
    KIND: tl.constexpr, GROUP: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GROUP is 0 where a whole row shares a scale; else BLOCK_K divides it. Neighbours share a block of codes.

    With float32 x a block's sum is scaled even where all have the same scale: a plain sum of products would become one
    chain over K, and lose more than the parity rule allows.
    """
    SCALED: tl.constexpr = GROUP != 0 or X.dtype.element_ty == tl.float32
    HALVES: tl.constexpr = KIND == 1 or KIND == 2
    BYTES: tl.constexpr = BLOCK_K // 2 if HALVES else BLOCK_K
    down = (M + BLOCK_M - 1) // BLOCK_M
    m = tl.program_id(0) % down * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // down * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = X + m.to(tl.int64)[:, None] * x_row
    codes_at = CODES + n.to(tl.int64)[:, None] * c_row
    live_m, live_n = m[:, None] < M, n[:, None] < N
    byte = tl.arange(0, BYTES)[None, :]
    row_bytes = _row_bytes(K, KIND)
    whole_int: tl.constexpr = KIND == 3 and GROUP == 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if whole_int else tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    x_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if KIND == 3:
        x_scale = tl.load(X_SCALE + m, mask=m < M, other=0.0)
    for start in range(0, K, BLOCK_K):
        at, k = start * BYTES // BLOCK_K + byte, start + _element(byte, KIND)
        raw = tl.load(codes_at + at, mask=live_n & (at < row_bytes), other=0)
        x = tl.load(x_at + k, mask=live_m & (k < K), other=0)
        part = _product(x, raw, KIND, False)
        if HALVES:
            high = tl.load(x_at + k + 16, mask=live_m & (k + 16 < K), other=0)
            part += _product(high, raw, KIND, True)
            if HAS_OFFSET:
                some = tl.sum(x.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)
        if not SCALED:
            acc += part
            if HAS_OFFSET:
                sums += some
        else:
            which = n.to(tl.int64) * G
            if GROUP != 0:
                which += start // GROUP
            scale = tl.load(SCALE + which, mask=n < N, other=0.0)
            acc += part.to(tl.float32) * x_scale[:, None] * scale[None, :]
            if HAS_OFFSET:
                acc += some[:, None] * tl.load(OFFSET + which, mask=n < N, other=0.0)[None, :]
    y = acc.to(tl.float32)
    if not SCALED:
        y = y * x_scale[:, None] * tl.load(SCALE + n, mask=n < N, other=0.0)[None, :]
        if HAS_OFFSET:
            y += sums[:, None] * tl.load(OFFSET + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = live_m & (n[None, :] < N)
    tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _round_kernel(X, CODES, SCALE, K, x_row, BLOCK: tl.constexpr):
    """One row of x in int8, halves to even; of a row that is not finite the scale is NaN and the codes are zeros."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    strange = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(X + row * x_row + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        strange += x * 0.0
    scale = tl.div_rn(tl.max(most, 0), 127.0) + tl.sum(strange, 0)
    by = tl.full([BLOCK], 1.0, tl.float32) * scale
    some = by > 0
    for start in range(0, K, BLOCK):
        x = tl.load(X + row * x_row + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        steps = tl.where(some, tl.div_rn(x, tl.where(some, by, 1.0)), 0.0)
        # Adding 1.5 · 2^23 leaves no fraction.
        codes = (steps + 12582912.0) - 12582912.0
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(CODES + row * K + start + at, codes.to(tl.int8), mask=start + at < K)
    tl.store(SCALE + row, scale)


def _few(x, codes, scale, offset, bias, out, group, kind, k) -> None:
    unit = group or UNIT
    units = max(1, 512 // unit) if k > UNIT else max(1, UNIT // unit)
    n, tile = codes.shape[0], 4
    launch(
        _few_kernel, x.shape[0] * blocks(n, tile), x.device,
        x, codes, scale, offset, bias, out, n, k, scale.shape[1], x.stride(0), codes.stride(0),
        KIND=kind, GROUPED=group > 0, UNIT=unit, UNITS=units, ROWS=tile,
        HAS_OFFSET=offset is not None, HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip


def _tiles(x, x_scale, codes, scale, offset, bias, out, group, kind, k) -> None:
    m, n = out.shape
    exact = x.dtype == torch.float32  # on no tensor cores: the products of larger tiles do not fit into registers
    block_m, block_n = min(32 if exact else 64, max(16, power_of_2(m))), 32 if exact else 64
    block_k = 32 if group == 32 or exact else 64
    launch(
        _tile_kernel, blocks(m, block_m) * blocks(n, block_n), x.device,
        x, x_scale, codes, scale, offset, bias, out, m, n, k, scale.shape[1], x.stride(0), codes.stride(0),
        KIND=kind, GROUP=group, HAS_OFFSET=offset is not None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)
    block = min(4096, power_of_2(x.shape[1]))
    launch(
        _round_kernel, x.shape[0], x.device, x, codes, scale, x.shape[1], x.stride(0),
        BLOCK=block, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
    return codes, scale


def _linear(
    kind: int,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    k, n = x.shape[-1], codes.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    if not out.numel():
        return out
    if not k:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    rows, flat = unit_stride(x.reshape(-1, k)), out.view(-1, n)
    codes, scale = unit_stride(codes), scale.contiguous()
    offset, bias = (None if t is None else t.contiguous() for t in (offset, bias))
    if kind == W8A8:
        rounded, x_scale = _rounded(rows)
        _tiles(rounded, x_scale, codes, scale, offset, bias, flat, group, kind, k)
    elif rows.shape[0] <= FEW_ROWS:
        _few(rows, codes, scale, offset, bias, flat, group, kind, k)
    else:
        _tiles(rows, None, codes, scale, offset, bias, flat, group, kind, k)
    return out


def linear_int8(x, codes, scale, bias, group) -> torch.Tensor:
    return _linear(INT8, x, codes, scale, None, bias, group)


def linear_w8a8(x, codes, scale, bias, group) -> torch.Tensor:
    return _linear(W8A8, x, codes, scale, None, bias, group)


def linear_int4(x, codes, scale, offset, bias, group) -> torch.Tensor:
    return _linear(INT4, x, codes, scale, offset, bias, group)


def linear_nf4(x, codes, scale, bias, group) -> torch.Tensor:
    return _linear(NF4, x, codes, scale, None, bias, group)
