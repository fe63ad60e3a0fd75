"""The gradients of sliding-window attention in Triton (Dao 2023, algorithm 2), without atomics: dq, then dk and dv.

The probabilities are computed again from the lse of the forward. With P = exp(scale · S − lse), dP = dO Vᵀ and
delta = rowsum(dO ∘ O) − dlse: dS = P ∘ (dP − delta), dQ = scale · dS K, dK = scale · dSᵀ Q, dV = Pᵀ dO. P and dS are
rounded to the dtype before their products.

Where dS nearly cancels, gradients show what O was rounded by. A row of dS sums to dlse, so the dq kernel knows what
delta lacked: dk and dv get the mended one, and a tile of dq where it would show is done once more. Float32 gradients
would show lse's rounding too: for them (EXACT) the dq kernel first sums P and P ∘ dP over the keys again, and takes
these for the denominator and for delta. P is then exp(scale · (S − top)) / denominator: a large score loses no digits
beside its own row's largest.
"""

import triton
import triton.language as tl

from .triton_blocks import LOG2E, load_keys, load_rows, product


@triton.jit
def locate(CuQ, b, S, PACKED: tl.constexpr):
    """A sequence's first token (of all), and its length."""
    q0 = b * S
    if PACKED:
        q0 = tl.cast(tl.load(CuQ + b), tl.int64)
        S = tl.load(CuQ + b + 1) - tl.load(CuQ + b)
    return q0, S


@triton.jit
def statistics_of(b, h, q0, H, pitch, PACKED: tl.constexpr):
    """Where a head's numbers start in Top, Lse2 and Delta: a multiple of 4, since TMA reads from multiples of 16 bytes.

    `pitch` numbers lie from one head to the next; packed, each sequence has up to 4 more than it needs.
    """
    if PACKED:
        start = h * pitch + (q0 + 3) // 4 * 4 + 4 * b
    else:
        start = (b * H + h) * pitch
    return start


@triton.jit
def batch(b, first, s_b, s_m, PACKED: tl.constexpr):
    """The offset of a sequence's first token."""
    if PACKED:
        offset = first * s_m
    else:
        offset = b * s_b
    return offset


@triton.jit
def visible(distance, W, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the distance from key to query is inside the window; without causal order, from key to the end."""
    if CAUSAL:
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < W)
    else:
        seen = distance > 0
    return seen


@triton.jit
def probabilities(
    scores, top, lse2, distance, scale2, W,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """exp2(scale2 · scores − lse2), or with EXACT exp2(scale2 · (scores − top)) · lse2, which is then the reciprocal of
    the denominator; 0 where a key is not seen."""
    if EXACT:
        p = tl.math.exp2((scores - top) * scale2) * lse2
    else:
        p = tl.math.exp2(scores * scale2 - lse2)
    if MASKED:
        p = tl.where(visible(distance, W, CAUSAL, WINDOW), p, 0.0)
    return p


@triton.jit
def exact_sums(
    q, dout, live, K, V, lo, hi, end, position, scale2, s_kn, s_vn, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of each row its score that weighs most, and over the keys lo..hi the sums of exp2(scale2 · (S − top)) and of
    that times dP."""
    sign = tl.where(scale2 < 0.0, -1.0, 1.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    for n in tl.range(lo, hi, BN):
        keys = n + tl.arange(0, BN)
        at = keys.to(tl.int64)
        scores, dp = chunked_products(q, dout, live, K + at * s_kn, V + at * s_vn, keys < end, D, DP, BM, BN)
        if CAUSAL:
            distance = (position + tl.arange(0, BM))[:, None] - keys[None, :]
        else:
            distance = (end - keys)[None, :]
        scores = tl.where(visible(distance, W, CAUSAL, WINDOW), scores * sign, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        magnitude = scale2 * sign
        # With scale 0 the difference from −inf must not become 0 · inf.
        p = tl.where(scores == float("-inf"), 0.0, tl.math.exp2((scores - base[:, None]) * magnitude))
        decay = tl.where(top == float("-inf"), 0.0, tl.math.exp2((top - base) * magnitude))
        den = den * decay + tl.sum(p, 1)
        delta = delta * decay + tl.sum(p * dp, 1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top * sign), den, delta


@triton.jit
def chunked_products(a, c, a_live, b, d, b_live, D: tl.constexpr, DP: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr):
    """A Bᵀ and C Dᵀ of float32 rows, given the pointers to the rows: 32 columns at a time, added up chunk by chunk.

    One chain over a long head would round further off than eager's BLAS, and whole rows do not fit in registers.
    """
    ab = tl.zeros([BA, BB], tl.float32)
    cd = tl.zeros([BA, BB], tl.float32)
    width: tl.constexpr = min(32, DP)
    for first in tl.range(0, DP, width):
        columns = (first + tl.arange(0, width))[None, :]
        a_mask = a_live[:, None] & (columns < D)
        b_mask = b_live[:, None] & (columns < D)
        rows = tl.load(b[:, None] + columns, mask=b_mask, other=0.0)
        ab += tl.dot(tl.load(a[:, None] + columns, mask=a_mask, other=0.0), tl.trans(rows), input_precision="ieee")
        rows = tl.load(d[:, None] + columns, mask=b_mask, other=0.0)
        cd += tl.dot(tl.load(c[:, None] + columns, mask=a_mask, other=0.0), tl.trans(rows), input_precision="ieee")
    return ab, cd


@triton.jit
def _score_block(
    q, dout, live, top, lse2, k_ptr, k_desc, v_ptr, v_desc, start, end, position, scale2, s_kn, s_vn, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """P and dP of one block of keys, and the keys. q and dout are tiles or, with EXACT, pointers to their live rows."""
    k = load_keys(k_ptr, k_desc, start, end, s_kn, D, DP, BN, TMA, not MASKED)
    keys = start + tl.arange(0, BN)
    if EXACT:
        at = keys.to(tl.int64)
        scores, dp = chunked_products(q, dout, live, k_ptr + at * s_kn, v_ptr + at * s_vn, keys < end, D, DP, BM, BN)
    else:
        v = load_keys(v_ptr, v_desc, start, end, s_vn, D, DP, BN, TMA, not MASKED)
        scores = product(q, k)
        dp = product(dout, v)
    if CAUSAL:
        distance = (position + tl.arange(0, BM))[:, None] - keys[None, :]
    else:
        distance = (end - keys)[None, :]
    p = probabilities(scores, top[:, None], lse2[:, None], distance, scale2, W, MASKED, EXACT, CAUSAL, WINDOW)
    return p, dp, k


@triton.jit
def _dq_block(
    dq, sums, sizes, q, dout, live, top, lse2, delta, k_ptr, k_desc, v_ptr, v_desc, start, end, position, scale2,
    s_kn, s_vn, W, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    p, dp, k = _score_block(
        q, dout, live, top, lse2, k_ptr, k_desc, v_ptr, v_desc, start, end, position, scale2, s_kn, s_vn, W,
        D, DP, BM, BN, TMA, MASKED, EXACT, CAUSAL, WINDOW,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if not EXACT:
        sums += tl.sum(ds, 1)
        sizes += tl.sum(tl.abs(ds), 1)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee"), sums, sizes


@triton.jit(do_not_specialize=["S", "Sk", "W", "T", "pitch", "blocks"])
def attention_dq(
    Q, K, V, DOut, Out, Lse, DLse, Top, Lse2, Delta, DQ, CuQ, CuK, scale,
    s_qb, s_qm, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_db, s_dm, s_dh, s_ob, s_om, s_oh, H, G, S, Sk, W, T,
    pitch, blocks,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, in the order of the forward. Writes, for dk and dv, delta and lse in base 2,
    +inf where no key was seen, so that P is 0 there."""
    rest = tl.program_id(0) // G
    first_row = (blocks - 1 - rest % blocks) * BM
    kv_head = tl.cast((rest // blocks) % (H // G), tl.int64)
    b = tl.cast(rest // blocks // (H // G), tl.int64)
    h = kv_head * G + tl.program_id(0) % G
    q0, S = locate(CuQ, b, S, PACKED)
    k0, Sk = locate(CuK, b, Sk, PACKED)
    if first_row >= S:
        return
    K += batch(b, k0, s_kb, s_kn, PACKED) + kv_head * s_kh
    V += batch(b, k0, s_vb, s_vn, PACKED) + kv_head * s_vh
    rows = tl.arange(0, BM)
    columns = tl.arange(0, DP)
    live = first_row + rows < S
    start = tl.cast(first_row, tl.int64)
    shift = Sk - S
    position = first_row + shift

    # As in the forward: keys lo..hi are seen by some query of the tile, those of full_lo..full_hi by all of them.
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

    q_ptr = Q + batch(b, q0, s_qb, s_qm, PACKED) + h * s_qh + start * s_qm
    d_ptr = DOut + batch(b, q0, s_db, s_dm, PACKED) + h * s_dh + start * s_dm
    row = (b * H + h) * S
    if PACKED:
        row = h * T + q0
    at = row + first_row + rows
    own = statistics_of(b, h, q0, H, pitch, PACKED) + first_row + rows
    lse = tl.load(Lse + at, mask=live, other=float("-inf"))
    dlse = tl.load(DLse + at, mask=live, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    scale = tl.cast(scale, tl.float32)
    scale2 = scale * LOG2E
    k_desc = 0
    v_desc = 0
    if TMA:
        k_desc = tl.make_tensor_descriptor(K, [Sk, D], [s_kn, 1], [BN, DP])
        v_desc = tl.make_tensor_descriptor(V, [Sk, D], [s_vn, 1], [BN, DP])
    top = tl.zeros([BM], tl.float32)
    if EXACT:
        q = q_ptr + rows * s_qm
        dout = d_ptr + rows * s_dm
        top, den, delta = exact_sums(
            q, dout, live, K, V, lo, hi, Sk, position, scale2, s_kn, s_vn, W, D, DP, BM, BN, CAUSAL, WINDOW
        )
        lse2 = tl.where(den == 0.0, 0.0, tl.div_rn(1.0, tl.where(den == 0.0, 1.0, den)))
        delta = tl.div_rn(delta, tl.where(den == 0.0, 1.0, den)) - dlse
        tl.store(Top + own, top, mask=live)
        tl.store(Delta + own, delta, mask=live)
        full_lo = lo
        full_hi = lo
    else:
        q = load_rows(q_ptr + (rows[:, None] * s_qm + columns[None, :]), live, columns, D, DP, False)
        dout = load_rows(d_ptr + (rows[:, None] * s_dm + columns[None, :]), live, columns, D, DP, False)
        o_ptr = Out + batch(b, q0, s_ob, s_om, PACKED) + h * s_oh + start * s_om
        o = load_rows(o_ptr + (rows[:, None] * s_om + columns[None, :]), live, columns, D, DP, False)
        delta = tl.sum(o.to(tl.float32) * dout.to(tl.float32), 1) - dlse
    tl.store(Lse2 + own, lse2, mask=live)
    dq = tl.zeros([BM, DP], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    sizes = tl.zeros([BM], tl.float32)
    if WINDOW and not EXACT:
        for n in tl.range(lo, full_lo, BN, num_stages=STAGES):
            dq, sums, sizes = _dq_block(
                dq, sums, sizes, q, dout, live, top, lse2, delta, K, k_desc, V, v_desc, n, Sk, position, scale2,
                s_kn, s_vn, W, D, DP, BM, BN, TMA, True, EXACT, CAUSAL, WINDOW,
            )  # fmt: skip
    if not EXACT:
        for n in tl.range(full_lo, full_hi, BN, num_stages=STAGES):
            dq, sums, sizes = _dq_block(
                dq, sums, sizes, q, dout, live, top, lse2, delta, K, k_desc, V, v_desc, n, Sk, position, scale2,
                s_kn, s_vn, W, D, DP, BM, BN, TMA, False, EXACT, CAUSAL, WINDOW,
            )  # fmt: skip
    for n in tl.range(full_hi, hi, BN, num_stages=STAGES):
        dq, sums, sizes = _dq_block(
            dq, sums, sizes, q, dout, live, top, lse2, delta, K, k_desc, V, v_desc, n, Sk, position, scale2,
            s_kn, s_vn, W, D, DP, BM, BN, TMA, True, EXACT, CAUSAL, WINDOW,
        )  # fmt: skip
    if not EXACT:
        # What the rows of dS sum to beyond dlse is what delta lacks.
        lacks = tl.where(live, sums - dlse, 0.0)
        tl.store(Delta + own, delta + lacks, mask=live)
        rounding: tl.constexpr = 2.0**-12 if q.dtype == tl.float16 else 2.0**-9
        again = tl.max(tl.abs(lacks), 0) > rounding * tl.max(tl.where(live, sizes, 0.0), 0)
        dq = tl.where(again, 0.0, dq)
        delta += lacks
        for n in tl.range(tl.where(again, lo, hi), hi, BN, num_stages=STAGES):
            dq, sums, sizes = _dq_block(
                dq, sums, sizes, q, dout, live, top, lse2, delta, K, k_desc, V, v_desc, n, Sk, position, scale2,
                s_kn, s_vn, W, D, DP, BM, BN, TMA, True, EXACT, CAUSAL, WINDOW,
            )  # fmt: skip
    out = DQ + ((q0 + first_row) * H + h) * D + (rows[:, None] * (H * D) + columns[None, :])
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=live[:, None] & (columns < D)[None, :])


@triton.jit
def load_queries(
    pointer, descriptor, h, start, end, s_m, s_h, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows start..start+BM of head h, which `load_keys` cannot choose: the descriptor is that of all heads."""
    if TMA:
        tile = descriptor.load([start, h, 0]).reshape([BM, DP])
    else:
        rows = tl.arange(0, BM)
        columns = tl.arange(0, DP)
        base = pointer + tl.cast(h, tl.int64) * s_h + tl.cast(start, tl.int64) * s_m
        tile = load_rows(base + (rows[:, None] * s_m + columns[None, :]), start + rows < end, columns, D, DP, EVEN)
    return tile


@triton.jit
def load_statistic(source, start, count, other, BM: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr):
    """BM rows' lse or delta from `start` on; `other` from `count` on, unless EVEN says there are none.

    `source` is a pointer or, with TMA, the descriptor of the statistics of all rows: as pointers, Triton 3.6 would copy
    each number into every thread that needs it, 4 bytes at a time.
    """
    rows = tl.arange(0, BM)
    if TMA:
        statistic = source.load([tl.cast(start, tl.int32)])
        if not EVEN:
            statistic = tl.where(rows < count, statistic, other)
    else:
        if EVEN:
            statistic = tl.load(source + start + rows)
        else:
            statistic = tl.load(source + start + rows, mask=rows < count, other=other)
    return statistic


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, live, Q, q_desc, DOut, d_desc, Top, lse_from, delta_from, first, count, h0, row, pitch, n0, S, shift,
    scale2, W, s_qm, s_qh, s_dm, s_dh, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`count` blocks of queries of each of the group's heads, in one loop: so its pipeline fills once.

    Sᵀ = K Qᵀ, so that Pᵀ and dSᵀ are left operands and stay in registers. k and v are tiles or, with EXACT, pointers to
    their live rows.
    """
    rows = tl.arange(0, BM)
    m = first
    h = h0
    for _ in tl.range(0, count * G, num_stages=STAGES):
        q = load_queries(Q, q_desc, h, m, S, s_qm, s_qh, D, DP, BM, TMA, not MASKED)
        dout = load_queries(DOut, d_desc, h, m, S, s_dm, s_dh, D, DP, BM, TMA, not MASKED)
        at = row + tl.cast(h, tl.int64) * pitch + m
        lse2 = load_statistic(lse_from, at, S - m, 0.0 if EXACT else float("inf"), BM, TMA, not MASKED)
        delta = load_statistic(delta_from, at, S - m, 0.0, BM, TMA, not MASKED)
        top = lse2
        if EXACT:
            top = load_statistic(Top, at, S - m, 0.0, BM, False, False)
            q_rows = Q + tl.cast(h, tl.int64) * s_qh + (m + rows).to(tl.int64) * s_qm
            d_rows = DOut + tl.cast(h, tl.int64) * s_dh + (m + rows).to(tl.int64) * s_dm
            # In the order of the dq kernel: a score that is its row's largest must come out as `top` to the bit.
            scores, dp = chunked_products(q_rows, d_rows, m + rows < S, k, v, live, D, DP, BM, BN)
            scores, dp = tl.trans(scores), tl.trans(dp)
        else:
            scores = product(k, q)
            dp = product(v, dout)
        distance = (m + shift + rows)[None, :] - (n0 + tl.arange(0, BN))[:, None]
        masked: tl.constexpr = MASKED and CAUSAL
        p = probabilities(scores, top[None, :], lse2[None, :], distance, scale2, W, masked, EXACT, CAUSAL, WINDOW)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        # Quicker than dividing a running index.
        m += BM
        ended = m == first + count * BM
        m = tl.where(ended, first, m)
        h = tl.where(ended, h + 1, h)
    return dk, dv


@triton.jit(do_not_specialize=["S", "Sk", "W", "pitch", "blocks", "statistics"])
def attention_dkv(
    Q, K, V, DOut, Top, Lse2, Delta, DK, DV, CuQ, CuK, scale,
    s_qb, s_qm, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_db, s_dm, s_dh, H, S, Sk, W, pitch, blocks, statistics,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one head, and all heads of queries that share it. `statistics`: numbers in Lse2."""
    n0 = tl.program_id(0) % blocks * BN
    heads = H // G
    kv_head = tl.cast(tl.program_id(0) // blocks % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // blocks // heads, tl.int64)
    q0, S = locate(CuQ, b, S, PACKED)
    k0, Sk = locate(CuK, b, Sk, PACKED)
    row = statistics_of(b, 0, q0, H, pitch, PACKED)
    if n0 >= Sk:
        return
    Q += batch(b, q0, s_qb, s_qm, PACKED)
    DOut += batch(b, q0, s_db, s_dm, PACKED)
    keys = tl.arange(0, BN)
    columns = tl.arange(0, DP)
    live = n0 + keys < Sk
    start = tl.cast(n0, tl.int64)
    k_ptr = K + batch(b, k0, s_kb, s_kn, PACKED) + kv_head * s_kh + start * s_kn
    v_ptr = V + batch(b, k0, s_vb, s_vn, PACKED) + kv_head * s_vh + start * s_vn
    if EXACT:
        k = k_ptr + keys * s_kn
        v = v_ptr + keys * s_vn
    else:
        k = load_rows(k_ptr + (keys[:, None] * s_kn + columns[None, :]), live, columns, D, DP, False)
        v = load_rows(v_ptr + (keys[:, None] * s_vn + columns[None, :]), live, columns, D, DP, False)
    q_desc = 0
    d_desc = 0
    lse_from = Lse2
    delta_from = Delta
    if TMA:
        q_desc = tl.make_tensor_descriptor(Q, [S, H, D], [s_qm, s_qh, 1], [BM, 1, DP])
        d_desc = tl.make_tensor_descriptor(DOut, [S, H, D], [s_dm, s_dh, 1], [BM, 1, DP])
        lse_from = tl.make_tensor_descriptor(Lse2, [statistics], [1], [BM])
        delta_from = tl.make_tensor_descriptor(Delta, [statistics], [1], [BM])

    # Queries lo..hi see some key of the tile, those of full_lo..full_hi all of them. Rows past the last key of the
    # sequence are never stored, so that they need no mask.
    shift = Sk - S
    last = tl.minimum(n0 + BN, Sk) - 1
    lo = 0
    full_lo = 0
    hi = S
    full_hi = S // BM * BM
    if CAUSAL:
        lo = tl.maximum(n0 - shift, 0) // BM * BM
        full_lo = (tl.maximum(last - shift, 0) + BM - 1) // BM * BM
    if WINDOW:
        hi = tl.maximum(tl.minimum(last - shift + W, S), 0)
        full_hi = tl.minimum(tl.maximum(n0 - shift + W, 0), S) // BM * BM
    end = tl.maximum((hi + BM - 1) // BM * BM, lo)
    full_lo = tl.minimum(full_lo, end)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), end)
    if EXACT:
        full_hi = lo

    h0 = tl.cast(kv_head, tl.int32) * G
    scale = tl.cast(scale, tl.float32)
    scale2 = scale * LOG2E
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    if CAUSAL and not EXACT:
        dk, dv = _dkv_blocks(
            dk, dv, k, v, live, Q, q_desc, DOut, d_desc, Top, lse_from, delta_from, lo, (full_lo - lo) // BM, h0, row,
            pitch, n0, S, shift, scale2, W, s_qm, s_qh, s_dm, s_dh, G, D, DP, BM, BN, STAGES, TMA, True, EXACT, CAUSAL,
            WINDOW,
        )  # fmt: skip
    if not EXACT:
        dk, dv = _dkv_blocks(
            dk, dv, k, v, live, Q, q_desc, DOut, d_desc, Top, lse_from, delta_from, full_lo, (full_hi - full_lo) // BM,
            h0, row, pitch, n0, S, shift, scale2, W, s_qm, s_qh, s_dm, s_dh, G, D, DP, BM, BN, STAGES, TMA, False,
            EXACT, CAUSAL, WINDOW,
        )  # fmt: skip
    dk, dv = _dkv_blocks(
        dk, dv, k, v, live, Q, q_desc, DOut, d_desc, Top, lse_from, delta_from, full_hi, (end - full_hi) // BM, h0, row,
        pitch, n0, S, shift, scale2, W, s_qm, s_qh, s_dm, s_dh, G, D, DP, BM, BN, STAGES, TMA, True, EXACT, CAUSAL,
        WINDOW,
    )  # fmt: skip
    at = ((k0 + n0) * heads + kv_head) * D + (keys[:, None] * (heads * D) + columns[None, :])
    mask = live[:, None] & (columns < D)[None, :]
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=mask)
