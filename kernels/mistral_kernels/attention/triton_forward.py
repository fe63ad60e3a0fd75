"""Sliding-window grouped-query attention in Triton: FlashAttention-2 (Dao 2023, algorithm 1)."""

import dataclasses

import torch
import triton
import triton.language as tl

from .. import _tuned
from .._triton import in_a_row
from .triton_blocks import (
    LOG2E,
    Config,
    accumulate,
    describable,
    family,
    launch,
    load_keys,
    load_rows,
    log_sum,
    normalise,
    padded,
    positive_scale,
    product,
    readable,
    softmax_step,
)


@triton.jit
def _visible(
    scores, start, position, end, W, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """−inf where a query does not see a key; the first stands at `position`. Causal order implies `key < end`: the
    last query stands at end − 1."""
    keys = start + tl.arange(0, BN)
    if CAUSAL:
        distance = (position + tl.arange(0, BM))[:, None] - keys[None, :]
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < W)
    else:
        seen = (keys < end)[None, :]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _block(
    acc, top, m, den, p, decay, q, k_ptr, k_desc, v_ptr, v_desc, start, end, position, scale2, s_kn, s_vn, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, LAG: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One block of keys. With LAG the product with V is that of the block before: it has nothing to wait for, so on
    Hopper it runs beside the exponentials of this block."""
    k = load_keys(k_ptr, k_desc, start, end, s_kn, D, DP, BN, TMA, not MASKED)
    scores = product(q, k)
    if LAG:
        v = load_keys(v_ptr, v_desc, start - BN, end, s_vn, D, DP, BN, TMA, True)
        acc = accumulate(acc, p, v, decay)
    if MASKED:
        scores = _visible(scores, start, position, end, W, BM, BN, CAUSAL, WINDOW)
    highest = tl.max(scores, 1)
    p, decay, m, den = softmax_step(scores, highest, m, den, scale2, MASKED)
    top = tl.maximum(top, highest)
    if not LAG:
        v = load_keys(v_ptr, v_desc, start, end, s_vn, D, DP, BN, TMA, not MASKED)
        acc = accumulate(acc, p, v, decay)
    return acc, top, m, den, p, decay


@triton.jit
def _store(Out, Lse, out, lse, first, lse_row, rows, live, h, H, D: tl.constexpr, DP: tl.constexpr):
    columns = tl.arange(0, DP)
    pointers = Out + (first * H + h) * D + (rows[:, None] * (H * D) + columns[None, :])
    if D == DP:
        tl.store(pointers, out.to(Out.dtype.element_ty), mask=live[:, None])
    else:
        tl.store(pointers, out.to(Out.dtype.element_ty), mask=live[:, None] & (columns < D)[None, :])
    tl.store(Lse + lse_row + rows, lse, mask=live)


@triton.jit(do_not_specialize=["S", "Sk", "W", "T", "blocks"])
def attention_forward(
    Q, K, V, Out, Lse, CuQ, CuK, scale, s_qb, s_qm, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh,
    H, G, S, Sk, W, T, blocks,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, LAG: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. The G heads that share keys are neighbours in the grid, so that these come
    from L2; the blocks with the most keys go first."""
    g = tl.program_id(0) % G
    rest = tl.program_id(0) // G
    first_row = (blocks - 1 - rest % blocks) * BM
    kv_head = tl.cast((rest // blocks) % (H // G), tl.int64)
    b = tl.cast(rest // blocks // (H // G), tl.int64)
    h = kv_head * G + g
    if PACKED:
        q0 = tl.cast(tl.load(CuQ + b), tl.int64)
        k0 = tl.cast(tl.load(CuK + b), tl.int64)
        S = tl.load(CuQ + b + 1) - tl.load(CuQ + b)
        Sk = tl.load(CuK + b + 1) - tl.load(CuK + b)
        Q += q0 * s_qm
        K += k0 * s_kn
        V += k0 * s_vn
        lse_row = h * T + q0 + first_row
    else:
        q0 = b * S
        Q += b * s_qb
        K += b * s_kb
        V += b * s_vb
        lse_row = (b * H + h) * S + first_row
    if first_row >= S:
        return
    K += kv_head * s_kh
    V += kv_head * s_vh
    rows = tl.arange(0, BM)
    columns = tl.arange(0, DP)
    live = first_row + rows < S
    shift = Sk - S
    position = first_row + shift

    # Keys lo..hi are seen by some query of the tile; the blocks in full_lo..full_hi by all of them.
    last = tl.minimum(first_row + BM, S) - 1 + shift
    lo = 0
    full_lo = 0
    if CAUSAL:
        hi = last + 1
        full_hi = tl.maximum(position + 1, 0) // BN * BN
    else:
        hi = Sk
        full_hi = Sk // BN * BN
    if WINDOW:
        lo = tl.maximum(position - W + 1, 0) // BN * BN
        full_lo = (tl.maximum(last - W + 1, 0) + BN - 1) // BN * BN
    full_hi = tl.maximum(full_hi, lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), full_hi)

    acc = tl.zeros([BM, DP], tl.float32)
    den = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    top = m
    if hi <= 0:
        _store(Out, Lse, acc, m, q0 + first_row, lse_row, rows, live, h, H, D, DP)
        return
    q_ptr = Q + h * s_qh + tl.cast(first_row, tl.int64) * s_qm + (rows[:, None] * s_qm + columns[None, :])
    q = load_rows(q_ptr, live, columns, D, DP, False)
    k_desc = 0
    v_desc = 0
    if TMA:
        # Bounded by the sequence, so that a block past its end reads zeros and not its neighbour.
        k_desc = tl.make_tensor_descriptor(K, [Sk, D], [s_kn, 1], [BN, DP])
        v_desc = tl.make_tensor_descriptor(V, [Sk, D], [s_vn, 1], [BN, DP])
    scale = tl.cast(scale, tl.float32)
    scale2 = scale * LOG2E
    p = tl.zeros([BM, BN], tl.float32)
    decay = tl.zeros([BM], tl.float32)
    start = lo
    if LAG:
        k = load_keys(K, k_desc, lo, Sk, s_kn, D, DP, BN, TMA, False)
        scores = _visible(product(q, k), lo, position, Sk, W, BM, BN, CAUSAL, WINDOW)
        top = tl.max(scores, 1)
        p, decay, m, den = softmax_step(scores, top, m, den, scale2, True)
        start = lo + BN
    if WINDOW:
        for n in tl.range(start, full_lo, BN, num_stages=STAGES):
            acc, top, m, den, p, decay = _block(
                acc, top, m, den, p, decay, q, K, k_desc, V, v_desc, n, Sk, position, scale2, s_kn, s_vn, W,
                D, DP, BM, BN, TMA, LAG, True, CAUSAL, WINDOW,
            )  # fmt: skip
    for n in tl.range(tl.maximum(start, full_lo), full_hi, BN, num_stages=STAGES):
        acc, top, m, den, p, decay = _block(
            acc, top, m, den, p, decay, q, K, k_desc, V, v_desc, n, Sk, position, scale2, s_kn, s_vn, W,
            D, DP, BM, BN, TMA, LAG, False, CAUSAL, WINDOW,
        )  # fmt: skip
    for n in tl.range(tl.maximum(start, full_hi), hi, BN, num_stages=STAGES):
        acc, top, m, den, p, decay = _block(
            acc, top, m, den, p, decay, q, K, k_desc, V, v_desc, n, Sk, position, scale2, s_kn, s_vn, W,
            D, DP, BM, BN, TMA, LAG, True, CAUSAL, WINDOW,
        )  # fmt: skip
    if LAG:
        v = load_keys(V, v_desc, tl.maximum(lo, (hi - 1) // BN * BN), Sk, s_vn, D, DP, BN, TMA, False)
        acc = accumulate(acc, p, v, decay)
    lse = log_sum(top, m, den, scale, scale2)
    _store(Out, Lse, normalise(acc, den), lse, q0 + first_row, lse_row, rows, live, h, H, D, DP)


# By family, padded D and bits of an element. H100 (bf16, 32 or 64 heads over 8 or 16, TFLOP/s at S=4096 causal / 16384
# causal / 16384 with a window of 4096; cuDNN's causal figures: D=64 414 / 460, D=128 527 / 585, D=256 525 / 648):
CONFIGS = {
    (80, 64, 16): Config(128, 64, 4, 3),
    (80, 128, 16): Config(128, 64, 8, 3),
    (80, 256, 16): Config(64, 64, 8, 2),
    (86, 64, 16): Config(128, 64, 4, 2),
    (86, 128, 16): Config(128, 32, 8, 3),
    (86, 256, 16): Config(64, 32, 8, 2),
    # 383 / 406 / 414; by TMA 369 / 390 / 364; without lag, 128 rows: 356 / 429 / 403, but spills
    (90, 64, 16): Config(64, 64, 4, 3, lag=True),
    # 453 / 513 / 466; by pointers 437 / 519 / 462, but spills under Triton 3.9; 128 x 128 with 8 warps 410 / 453 / 453
    (90, 128, 16): Config(64, 64, 4, 2, tma=True, lag=True),
    # 529 / 651 / 583; without lag 475 / 531 / 538. Triton 3.9 reloads one value a block
    (90, 256, 16): Config(128, 64, 8, 2, tma=True, lag=True),
    # Not timed, like 80 and 86: the largest tiles that compile without spills in the main loop
    (100, 64, 16): Config(128, 128, 8, 2, tma=True),
    (100, 128, 16): Config(128, 128, 8, 2, tma=True),
    (100, 256, 16): Config(128, 64, 8, 2, tma=True),
}
# float32 has no tensor cores at full precision: one config for every GPU, the largest tile without spills.
for _family in (80, 86, 90, 100):
    CONFIGS |= {
        (_family, 64, 32): Config(32, 32, 4, 1),
        (_family, 128, 32): Config(32, 32, 8, 1),
        (_family, 256, 32): Config(32, 16, 8, 1),
    }


def production_config(device_family: int, dim: int, itemsize: int) -> Config:
    return CONFIGS[(device_family, max(64, padded(dim)), 8 * itemsize)]


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Config:
    """The config tuned on this GPU, or the production config; with pointers where TMA cannot read k and v."""
    case = (family(q.device), q.shape[-1], q.element_size())
    config = _tuned.lookup("attention_forward", q.device, *case[1:]) or production_config(*case)
    return config if not config.tma or describable(k, v) else without_tma(*case)


def without_tma(device_family: int, dim: int, itemsize: int) -> Config:
    """Pointers need registers for addresses: on sm_90 up to D=128 the same tile has them, else sm_80's tile does."""
    if device_family == 90 and padded(dim) <= 128:
        return dataclasses.replace(production_config(90, dim, itemsize), tma=False)
    return production_config(80, dim, itemsize)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    causal: bool,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = cu_q is not None and cu_k is not None
    heads, dim = q.shape[-2:]
    tokens = q.shape[0] if packed else q.shape[1]
    sequences = q.shape[0] if cu_q is None else cu_q.numel() - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = (heads, tokens) if packed else (sequences, heads, tokens)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = readable(q), readable(k), readable(v)
    q, scale = positive_scale(q, scale)
    cu_q, cu_k = in_a_row(cu_q, cu_k)
    config = config or choose(q, k, v)
    blocks = triton.cdiv(max_q, config.rows)
    strides = [s for t in (q, k, v) for s in ((0,) if packed else ()) + t.stride()[:-1]]
    launch(
        attention_forward, blocks * sequences * heads, config,
        q, k, v, out, lse, cu_q, cu_k, scale, *strides,
        heads, heads // k.shape[-2], tokens, k.shape[-3], window, tokens, blocks,
        D=dim, DP=padded(dim), BM=config.rows, BN=config.keys, STAGES=config.stages,
        TMA=config.tma, LAG=config.lag, CAUSAL=causal, WINDOW=window > 0, PACKED=packed,
    )  # fmt: skip
    return out, lse
