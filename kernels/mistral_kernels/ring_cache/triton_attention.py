"""Attention over a ring cache, or over [ring | chunk], in Triton: split over the keys for decoding.

All is counted in positions: the ring holds positions `n − slots .. n − 1` of a sequence that saw n tokens, position p
in slot `p % slots`, and the chunk those from n on. So the visible part of the ring is one run of positions that wraps
round at most once, and slots outside the window are never read.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from .._triton import in_a_row
from ..attention.triton_blocks import (
    LOG2E,
    Config,
    accumulate,
    family,
    launch,
    load_rows,
    normalise,
    padded,
    positive_scale,
    product,
    readable,
    softmax_step,
)


@triton.jit
def _block(
    acc, m, den, q, K, V, Ks, Vs, keys, row, slots, hi, positions, scale2, s_kn, s_vn, s_sn, W,
    D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """One block of keys, by position and row; a ring goes on in row 0 after its last slot.

    Where Ks and Vs are given K and V hold codes: int8 is exact in every float dtype, so the products are of codes, and
    the scales go onto the scores and the probabilities; in float32 that would round once more."""
    columns = tl.arange(0, DP)
    if RING:
        row = tl.where(row >= slots, row - slots, row)
    row = tl.cast(row, tl.int64)
    k = load_rows(K + (row * s_kn)[:, None] + columns[None, :], keys < hi, columns, D, DP, not MASKED)
    v = load_rows(V + (row * s_vn)[:, None] + columns[None, :], keys < hi, columns, D, DP, not MASKED)
    EXACT: tl.constexpr = q.dtype == tl.float32
    if Ks is not None:
        k_scale = tl.load(Ks + row * s_sn, mask=keys < hi, other=0.0)
        v_scale = tl.load(Vs + row * s_sn, mask=keys < hi, other=0.0)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        if EXACT:
            k *= k_scale[:, None]
            v *= v_scale[:, None]
    scores = product(q, k)
    if Ks is not None and not EXACT:
        scores *= k_scale[None, :]
    if MASKED:
        distance = positions[:, None] - keys[None, :]
        seen = (distance >= 0) & (keys < hi)[None, :]
        if WINDOW:
            seen = seen & (distance < W)
        scores = tl.where(seen, scores, float("-inf"))
    p, decay, m, den = softmax_step(scores, tl.max(scores, 1), m, den, scale2, MASKED)
    if Ks is not None and not EXACT:
        p *= v_scale[None, :]
    return accumulate(acc, p, v, decay), m, den


@triton.jit
def _segment(
    acc, m, den, q, K, V, Ks, Vs, lo, hi, row0, slots, earliest, latest, positions, scale2, s_kn, s_vn, s_sn, W,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The keys at positions lo..hi, of which lo lies in row0 of K and V.

    With FULL, the blocks that all queries see whole, in the middle, are not masked: worth its code where many queries
    make the arithmetic count.
    """
    full_lo = hi
    full_hi = hi
    if FULL:
        full_lo = lo
        if WINDOW:
            full_lo = tl.minimum(lo + (tl.maximum(latest - W + 1 - lo, 0) + BN - 1) // BN * BN, hi)
        full_hi = full_lo + tl.maximum(tl.minimum(hi, earliest + 1) - full_lo, 0) // BN * BN
    cells = tl.arange(0, BN)
    for start in tl.range(lo, full_lo, BN, num_stages=STAGES):
        acc, m, den = _block(
            acc, m, den, q, K, V, Ks, Vs, start + cells, row0 + (start - lo) + cells, slots, hi, positions, scale2,
            s_kn, s_vn, s_sn, W, D, DP, True, WINDOW, RING,
        )  # fmt: skip
    if FULL:
        for start in tl.range(full_lo, full_hi, BN, num_stages=STAGES):
            acc, m, den = _block(
                acc, m, den, q, K, V, Ks, Vs, start + cells, row0 + (start - lo) + cells, slots, hi, positions, scale2,
                s_kn, s_vn, s_sn, W, D, DP, False, WINDOW, RING,
            )  # fmt: skip
        for start in tl.range(full_hi, hi, BN, num_stages=STAGES):
            acc, m, den = _block(
                acc, m, den, q, K, V, Ks, Vs, start + cells, row0 + (start - lo) + cells, slots, hi, positions, scale2,
                s_kn, s_vn, s_sn, W, D, DP, True, WINDOW, RING,
            )  # fmt: skip
    return acc, m, den


@triton.jit(do_not_specialize=["S", "W", "T", "tiles", "splits", "span"])
def attention_ring(
    Q, Kc, Vc, Kn, Vn, Ks, Vs, Lens, Cu, Out, PartO, PartM, PartL, scale,
    s_qb, s_qm, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_xb, s_xn, s_xh, s_yb, s_yn, s_yh,
    slots, H, G, S, W, T, tiles, splits, span,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, a row being one query of one head of a group, and `span` keys of the ring.

    The heads of a group are rows of one tile, so each key is loaded once for all of them. The last split of a tile
    also takes the chunk."""
    split = tl.program_id(0) % splits
    rest = tl.program_id(0) // splits
    first_row = (tiles - 1 - rest % tiles) * BM
    kv_head = tl.cast((rest // tiles) % (H // G), tl.int64)
    b = tl.cast(rest // tiles // (H // G), tl.int64)
    if PACKED:
        q0 = tl.cast(tl.load(Cu + b), tl.int64)
        S = tl.load(Cu + b + 1) - tl.load(Cu + b)
        Q += q0 * s_qm
    else:
        q0 = b * S
        Q += b * s_qb
    if first_row >= S * G:
        return
    n = tl.load(Lens + b)
    rows = first_row + tl.arange(0, BM)
    columns = tl.arange(0, DP)
    live = rows < S * G
    query = rows // G
    heads = kv_head * G + rows % G
    first = n - S
    if CHUNK:
        first = n
    positions = first + query
    earliest = first + first_row // G
    latest = first + (tl.minimum(first_row + BM, S * G) - 1) // G
    q_ptr = Q + tl.cast(query, tl.int64)[:, None] * s_qm + (heads * s_qh)[:, None] + columns[None, :]
    q = load_rows(q_ptr, live, columns, D, DP, False)
    scale2 = tl.cast(scale, tl.float32) * LOG2E
    acc = tl.zeros([BM, DP], tl.float32)
    den = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)

    oldest = tl.maximum(n - slots, 0)
    if WINDOW:
        oldest = tl.maximum(oldest, earliest - W + 1)
    lo = oldest + split * span
    hi = tl.minimum(tl.minimum(lo + span, n), latest + 1)
    Kc += b * s_kb + kv_head * s_kh
    Vc += b * s_vb + kv_head * s_vh
    if Ks is not None:
        scales = b * slots * (H // G) + kv_head
        Ks += scales
        Vs += scales
    acc, m, den = _segment(
        acc, m, den, q, Kc, Vc, Ks, Vs, lo, hi, lo % slots, slots, earliest, latest, positions, scale2, s_kn, s_vn,
        H // G, W,
        D, DP, BN, STAGES, WINDOW, True, not SPLIT,
    )  # fmt: skip
    if CHUNK:
        lo = n
        if WINDOW:
            lo = tl.maximum(n, earliest - W + 1)
        hi = tl.where(split == splits - 1, latest + 1, 0)
        if PACKED:
            Kn += q0 * s_xn
            Vn += q0 * s_yn
        else:
            Kn += b * s_xb
            Vn += b * s_yb
        Kn += kv_head * s_xh
        Vn += kv_head * s_yh
        acc, m, den = _segment(
            acc, m, den, q, Kn, Vn, None, None, lo, hi, lo - n, 0, earliest, latest, positions, scale2, s_xn, s_yn, 0,
            W,
            D, DP, BN, STAGES, WINDOW, False, not SPLIT,
        )  # fmt: skip

    target = (q0 + query) * H + heads
    if SPLIT:
        target += split * (tl.cast(T, tl.int64) * H)
        tl.store(PartM + target, m, mask=live)
        tl.store(PartL + target, den, mask=live)
        tl.store(PartO + target[:, None] * DP + columns[None, :], acc, mask=(live & (den > 0.0))[:, None])
    else:
        out = normalise(acc, den).to(Out.dtype.element_ty)
        tl.store(Out + target[:, None] * D + columns[None, :], out, mask=live[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def combine(
    PartO, PartM, PartL, Out, rows, splits, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr
):
    """One program: one head of one query, merged over the splits in their order. SPLITS: a power of two above them."""
    row = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.arange(0, DP)
    every = tl.arange(0, SPLITS)
    m = tl.load(PartM + tl.cast(every, tl.int64) * rows + row, mask=every < splits, other=float("-inf"))
    den = tl.load(PartL + tl.cast(every, tl.int64) * rows + row, mask=every < splits, other=0.0)
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(den * tl.math.exp2(m - top), 0)
    out = tl.zeros([DP], tl.float32)
    for first in range(0, splits, BS):
        part = first + tl.arange(0, BS)
        i = tl.cast(part, tl.int64) * rows + row
        weight = tl.math.exp2(tl.load(PartM + i, mask=part < splits, other=float("-inf")) - top)
        tile = tl.load(PartO + i[:, None] * DP + columns[None, :], mask=(weight > 0.0)[:, None], other=0.0)
        out += tl.sum(tile * weight[:, None], 0)
    out = (out * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))).to(Out.dtype.element_ty)
    tl.store(Out + row * D + columns, out, mask=columns < D)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut: the tile, row tiles a sequence and KV head, splits of the ring and the keys of one."""

    config: Config
    tiles: int
    splits: int
    span: int


# Programs wanted for a decoding step, by padded D: one for each multiprocessor of an H100, two where the keys are short
# (a program then holds half the bytes in flight). More gained nothing there: 4096 keys, 8 KV heads, bf16, D=128, batch
# 1, 4, 16: 13.9, 30.6, 92.5 us with 132 programs and 15.6, 32.0, 98.9 with 396. Fixed numbers, so that results do not
# depend on the device.
PROGRAMS = {16: 264, 32: 264, 64: 264, 128: 132, 256: 132}
MAX_SPLITS = 128


def production_config(device_family: int, dim: int, itemsize: int, rows: int) -> Config:
    """By rows: queries × heads of a group.

    H100, bf16, 32 heads over 8: 3 stages of 64 keys beat 2 by 15% in decoding up to batch 16 (D=128) and by 2 to 15% in
    chunks; D=256 is level between 64 keys with 3 stages and 32 with 4, which need less shared memory. sm_86, sm_89 and
    sm_120 have 99 KB of it; they, sm_80 and sm_100 were compiled and not timed. float32 was only kept free of spills.
    """
    small = device_family == 86
    if itemsize == 4:
        return Config(16, 32, 8 if padded(dim) > 64 else 4, 1)
    if padded(dim) == 256:
        return Config(16, 32, 4, 2 if small else 4) if rows <= 16 else Config(64, 32, 8, 2)
    if rows <= 16:
        return Config(16, 64, 4, 3)
    return Config(32 if rows <= 32 else 64, 64, 4, 2 if small else 3)


def plan(
    config: Config, batch: int, kv_heads: int, group: int, dim: int, queries: int, slots: int, window: int
) -> Plan:
    """Splits by shape alone, never by how full the rings are: no wait for the device, and one order of adding."""
    tiles = triton.cdiv(queries * group, config.rows)
    visible = min(slots, window + min(queries, config.rows) - 1) if window else slots
    wanted = min(MAX_SPLITS, max(1, PROGRAMS[padded(dim)] // (batch * kv_heads * tiles)))
    span = triton.cdiv(triton.cdiv(visible, wanted), config.keys) * config.keys
    return Plan(config, tiles, triton.cdiv(visible, span), span)


# Keys of one split where the batch must not matter: 4096 keys of 8 heads are 128 programs, near one wave of an H100.
INVARIANT_SPAN = 256


def invariant_plan(config: Config, queries: int, group: int, slots: int, window: int) -> Plan:
    """Splits by the ring and the window only. The tile's rows, which decide where a windowed split starts, must not
    come from the longest chunk of the batch either: the config is that of a single query."""
    visible = min(slots, window + config.rows - 1) if window else slots
    span = max(INVARIANT_SPAN, triton.next_power_of_2(triton.cdiv(visible, MAX_SPLITS)))
    return Plan(config, triton.cdiv(queries * group, config.rows), triton.cdiv(visible, span), span)


def _cut(q: torch.Tensor, k_cache: torch.Tensor, window: int, max_q: int, batch_invariant: bool, itemsize: int) -> Plan:
    heads, dim = q.shape[-2:]
    batch, slots, kv_heads = k_cache.shape[:3]
    group = heads // kv_heads
    if batch_invariant:
        config = production_config(family(q.device), dim, itemsize, group)
        return invariant_plan(config, max_q, group, slots, window)
    config = production_config(family(q.device), dim, itemsize, max_q * group)
    return plan(config, batch, kv_heads, group, dim, max_q, slots, window)


def attention_cached(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    scale: float,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    cu: torch.Tensor | None,
    max_q: int,
    batch_invariant: bool = False,
    cut: Plan | None = None,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    heads, dim = q.shape[-2:]
    batch, slots, kv_heads = k_cache.shape[:3]
    rows = q.numel() // dim
    if cut is None:
        cut = _cut(q, k_cache, window, max_q, batch_invariant, q.element_size())
    q, scale = positive_scale(readable(q), scale)
    lens, ends = in_a_row(seq_lens, cu)
    new = (k_new, v_new) if k_new is not None and v_new is not None else ()
    tensors = [readable(t) for t in (q, k_cache, v_cache, *new)]
    parts: list[torch.Tensor | None] = [None] * 3
    if cut.splits > 1:
        size = (cut.splits, rows, padded(dim))
        parts = [torch.empty(s, dtype=torch.float32, device=q.device) for s in (size, size[:2], size[:2])]
    launch(
        attention_ring, cut.splits * cut.tiles * batch * kv_heads, cut.config,
        *tensors, *(() if new else (None, None)), *scales, lens, ends, out, *parts, scale,
        *_strides(tensors, cu is not None),
        slots, heads, heads // kv_heads, max_q, window, rows // heads, cut.tiles, cut.splits, cut.span,
        D=dim, DP=padded(dim), BM=cut.config.rows, BN=cut.config.keys, STAGES=cut.config.stages,
        CHUNK=bool(new), WINDOW=window > 0, PACKED=cu is not None, SPLIT=cut.splits > 1,
    )  # fmt: skip
    if cut.splits > 1:
        launch(
            combine, rows, COMBINE, *parts, out, rows, cut.splits,
            D=dim, DP=padded(dim), SPLITS=max(2, triton.next_power_of_2(cut.splits)), BS=COMBINE.rows,
        )  # fmt: skip
    return out


def attention_cached_int8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    scale: float,
    k_new: torch.Tensor | None,
    v_new: torch.Tensor | None,
    cu: torch.Tensor | None,
    max_q: int,
    batch_invariant: bool,
) -> torch.Tensor:
    where = (seq_lens, window, scale, k_new, v_new, cu, max_q, batch_invariant)
    return attention_cached(q, k_cache, v_cache, *where, scales=(k_scale.contiguous(), v_scale.contiguous()))


COMBINE = Config(rows=16, keys=0, warps=4, stages=1)


def _strides(tensors: list[torch.Tensor], packed: bool) -> list[int]:
    """(sequence, token, head) of q, the caches and the chunk. Packed without cu: one token a sequence."""
    strides: list[int] = []
    for t in tensors:
        if t.dim() == 4:
            strides += t.stride()[:3]
        else:
            strides += [0, *t.stride()[:2]] if packed else [t.stride(0), 0, t.stride(1)]
    return strides + [0] * (15 - len(strides))
