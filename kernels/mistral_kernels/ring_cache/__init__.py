"""The ring cache of a sliding-window model: writing keys and values into it, and attention over it.

One layer's cache is `k_cache, v_cache: [B, slots, Hkv, D]`. The token at position p of sequence b lives in slot
`p % slots`. Keys are stored rotated, so the order of the slots does not matter to the softmax. With three slots a
sequence (counted through, as mistral-inference's own example does), three chunks of lengths 5, 7 and 2 that start at
positions 0, 1 and 3 keep these tokens, and put them into these slots:

    kept   [0 0 1 1 1 | 0 0 0 0 1 1 1 | 1 1]
    slots  [    2 0 1 |         5 3 4 | 6 7]

Order matters. Decoding is a chunk of one: write first (the slot it overwrites holds the key that just left the
window), then attend over the ring alone. A longer chunk would overwrite keys that its own first queries still see,
so attend over [ring as it was | chunk] first and write afterwards. A ring of `window + chunk − 1` slots holds both;
then writing first and attending over the ring alone is right, and with fewer slots it is an error.
"""

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op, always
from ..attention import (
    MAX_TRITON_HEAD_DIM,
    check_cu_seqlens,
    check_heads,
    check_longest,
    check_scale,
    check_window,
    cuda_supports,
    hopper_first,
    longest_of,
)
from ..rope import POSITION_DTYPES, check_tables
from ..rope.reference import check_positions
from . import int8, reference

NOT_LOOKED_UP = -(2**63)  # for the kernel, in place of the longest chunk


def _triton_supports(q, *_):
    if q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"the head dimension is {q.shape[-1]}, over {MAX_TRITON_HEAD_DIM}"
    return None


def _cuda_writes(k, *_):
    return f"the head dimension is {k.shape[-1]}, which is odd" if k.shape[-1] % 2 else None


def _cuda_attends(*args):
    if args[-1]:
        return "it splits the keys by the whole batch, and batch_invariant is set"
    return cuda_supports(*args)


def _cuda_first(q, *rest):
    return rest[-2] <= 16 or hopper_first(q, rest[-2])


_write_kv = Op(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? cu) -> ()",
    eager=reference.write_kv,
    fake=lambda *_: None,
    triton="ring_cache.triton_write:write_kv",
    cuda=True,
    cuda_first=always,
    cuda_supports=_cuda_writes,
)
_rope_write_kv = Op(
    "rope_write_kv(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions,"
    " Tensor cos, Tensor sin, Tensor? cu, bool interleaved) -> (Tensor, Tensor)",
    eager=reference.rope_write_kv,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    triton="ring_cache.triton_write:rope_write_kv",
    cuda=True,
    cuda_first=always,
)
_attention_cached = Op(
    "attention_cached(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, int window, float scale,"
    " Tensor? k_new, Tensor? v_new, Tensor? cu, SymInt max_q, bool batch_invariant) -> Tensor",
    eager=reference.attention_cached,
    fake=lambda q, *_: q.new_empty(q.shape),
    triton="ring_cache.triton_attention:attention_cached",
    triton_supports=_triton_supports,
    cuda=True,
    cuda_first=_cuda_first,
    cuda_supports=_cuda_attends,
    flash="attention_cached",
    flash_supports="supports_cached",
)


_write_kv_int8, _rope_write_kv_int8, _attention_cached_int8 = int8.make_ops(_triton_supports)


def _check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, name: str, codes: bool) -> None:
    """The caches are `[B, slots, Hkv, D]`, of one shape, for tokens of the dtype and the head dimension of `k`."""
    slots = k_cache.shape
    if len(slots) != 4 or v_cache.shape != slots or slots[1] < 1:
        raise ValueError(
            f"k_cache is {_checks.shape(k_cache)} and v_cache {_checks.shape(v_cache)};"
            " they must be equal, [B, slots, Hkv, D], with at least one slot"
        )
    if slots[-1] != k.shape[-1]:
        raise ValueError(f"k_cache has head dimension {k_cache.shape[-1]} and {name} {k.shape[-1]}; must be equal")
    needed = torch.int8 if codes else k.dtype
    if k_cache.dtype != needed or v_cache.dtype != needed:
        why = "k_scale and v_scale are given" if codes else f"{name} is {k.dtype}"
        raise TypeError(f"k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; they must be {needed}, since {why}")


def _check_tokens(t: torch.Tensor, name: str, batch: int, cu: torch.Tensor | None) -> None:
    """Dense `[B, S, heads, D]`; or packed `[T, heads, D]`, with cu_seqlens or one token a sequence."""
    if t.dim() == 4 and cu is None:
        if t.shape[0] != batch:
            raise ValueError(f"{name} holds {t.shape[0]} sequences, the caches {batch}; they must agree")
        return
    if t.dim() != 3:
        needed = "[B, S, heads, D] or [T, heads, D]" if cu is None else "[T, heads, D] with cu_seqlens"
        raise ValueError(f"{name} is {_checks.shape(t)}; it must be {needed}")
    if cu is None:
        if t.shape[0] != batch:
            raise ValueError(
                f"{name} holds {t.shape[0]} tokens for {batch} sequences; without cu_seqlens it is one each"
            )
        return
    _checks.integral(t.device, (torch.int32,), cu_seqlens=cu)
    check_cu_seqlens("cu_seqlens", cu, t.shape[0], batch)


def _check_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> bool:
    """Whether codes are written."""
    _checks.same_shape(k=k, v=v)
    _check_tokens(k, "k", k_cache.shape[0], cu)
    codes = int8.check_scales(k_scale, v_scale, k_cache, k.dtype)
    _check_caches(k_cache, v_cache, k, "k", codes)
    if k_cache.shape[2] != k.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} heads and k_cache {k_cache.shape[2]}; they must be equal")
    if v.dtype != k.dtype:
        raise TypeError(f"v is {v.dtype} but k is {k.dtype}; they must be equal")
    _checks.integral(k.device, POSITION_DTYPES, positions=positions)
    if positions.shape != k.shape[:-2]:
        raise ValueError(f"positions is {_checks.shape(positions)}; with k {_checks.shape(k)} it must hold one a token")
    return codes


def _check_float_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, **tensors: torch.Tensor) -> None:
    caches = {n: t for n, t in (("k_cache", k_cache), ("v_cache", v_cache)) if getattr(t, "dtype", None) != torch.int8}
    _checks.floating(**tensors, **caches)
    device = next(iter(tensors.values())).device
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} but the tokens are on {device}; they must be on one device")


def _write_at_once(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu):
    """`write_kv` by a kernel that looks at its arguments itself; whether it was done."""
    if k_scale is None and v_scale is None:
        return _write_kv.at_once(k, v, k_cache, v_cache, positions, cu) is not None
    return _write_kv_int8.at_once(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu) is not None


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Writes keys, already rotated, and values to their slots: what follows attention over [ring | chunk].

    Args:
        k, v: `[B, S, Hkv, D]`; or packed `[T, Hkv, D]`, one token a sequence or split by cu_seqlens.
        k_cache, v_cache: `[B, slots, Hkv, D]` of k's dtype; written in place.
        positions: int32 or int64, one a token, `[B, S]` or `[T]`: consecutive within a sequence. Negative ones
            mark idle tokens, which are not written; within a sequence they come last.
        cu_seqlens: `[B + 1]` int32, where each packed sequence starts.
        k_scale, v_scale: `[B, slots, Hkv]` float32 (float64 with float64 tokens) beside int8 caches; written in place.
            Each head of a token is quantised by itself: `scale = max|x| / 127`, `code = round(x / scale)`, halves to
            even.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Of a chunk longer than the ring only the last `slots` tokens of each sequence are written.

    Raises:
        TypeError, ValueError: a tensor that does not fit.
        NotImplementedError: `impl` cannot run here, or a derivative is asked for.
    """
    short = impl is None and not is_dynamo_compiling()
    if short and _write_at_once(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu_seqlens):
        return
    _check_float_caches(k_cache, v_cache, k=k, v=v)
    codes = _check_write(k, v, k_cache, v_cache, positions, cu_seqlens, k_scale, v_scale)
    _checks.no_gradient("write_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if codes:
        _write_kv_int8(impl, k, v, k_cache, v_cache, k_scale, v_scale, positions, cu_seqlens)
    else:
        _write_kv(impl, k, v, k_cache, v_cache, positions, cu_seqlens)


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    interleaved: bool = False,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` of q and k and `write_kv` of the rotated k and of v, in one pass.

    Args:
        q: `[B, S, H, D]` or `[T, H, D]`.
        k, v, k_cache, v_cache, positions, cu_seqlens, k_scale, v_scale: as in `write_kv`. Idle tokens give zeros.
        cos, sin, interleaved: as in `rope`, tables `[P, D/2]`.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Returns:
        `(q, k)` rotated, contiguous.

    Raises:
        TypeError, ValueError: a tensor that does not fit; on a CPU also a position outside the tables. On a GPU
            such a token's q and k become NaN, and NaN is written.
        NotImplementedError: `impl` cannot run here, or a derivative is asked for.
    """
    if impl is None and not is_dynamo_compiling():
        if k_scale is None and v_scale is None:
            done = _rope_write_kv.at_once(q, k, v, k_cache, v_cache, positions, cos, sin, cu_seqlens, interleaved)
        else:
            caches = (k_cache, v_cache, k_scale, v_scale)
            done = _rope_write_kv_int8.at_once(q, k, v, *caches, positions, cos, sin, cu_seqlens, interleaved)
        if done is not None:
            return done  # type: ignore[no-any-return]
    interleaved = _checks.flag("interleaved", interleaved)
    _check_float_caches(k_cache, v_cache, q=q, k=k, v=v, cos=cos, sin=sin)
    codes = _check_write(k, v, k_cache, v_cache, positions, cu_seqlens, k_scale, v_scale)
    shape, k_shape = q.shape, k.shape
    if shape[:-2] != k_shape[:-2] or shape[-1:] != k_shape[-1:]:
        raise ValueError(f"q is {_checks.shape(q)} but k is {_checks.shape(k)}; only the heads may differ")
    if q.dtype != k.dtype:
        raise TypeError(f"q is {q.dtype} but k is {k.dtype}; they must be equal")
    _checks.no_gradient("rope_write_kv", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    check_tables(cos, sin, q.shape[-1])
    check_positions(positions, cos.shape[0], idle=True)
    table = _checks.accumulate_dtype(q.dtype)
    cos, sin = _checks.as_dtype(cos, table).contiguous(), _checks.as_dtype(sin, table).contiguous()
    rest = (positions, cos, sin, cu_seqlens, interleaved)
    if codes:
        return _rope_write_kv_int8(impl, q, k, v, k_cache, v_cache, k_scale, v_scale, *rest)
    return _rope_write_kv(impl, q, k, v, k_cache, v_cache, *rest)


def _longest(q: torch.Tensor, cu: torch.Tensor | None) -> int:
    """The longest chunk; of packed ones an upper bound where looking it up would wait for the device."""
    if q.dim() == 4:
        return q.shape[1]
    if cu is None:
        return 1
    return longest_of(cu) if _checks.may_look(cu) else q.shape[0]


def _chunk(q: torch.Tensor, cu: torch.Tensor | None, max_seqlen: int | None) -> int:
    if max_seqlen is None or cu is None:
        return _longest(q, cu)
    return check_longest("max_seqlen", max_seqlen, cu, q.shape[0])


def check_history(seq_lens: torch.Tensor, slots: int, window: int, chunk: int, with_new: bool) -> None:
    """The ring still holds every key that the queries see. Reads seq_lens on a CPU only, and not while tracing."""
    needed = window - 1 if with_new else window + chunk - 1
    if window and slots >= needed:
        return
    if not _checks.may_look(seq_lens):
        longest = slots + 1 if window else slots
    else:
        longest = int(seq_lens.max()) if seq_lens.numel() else 0
    if longest > slots:
        raise ValueError(
            f"k_cache has {slots} slots, but a chunk of {chunk} with window {window or None} after {longest} tokens"
            f" needs {needed if window else longest}: attend over [ring | chunk] before writing, or take more slots"
        )


def attention_cached(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int | None = None,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention of new queries over the ring, or over [ring | chunk]; the ring is read in place, in slot order.

    Without k_new the queries are the last tokens written: of S queries, query i stands at position
    `seq_lens − S + i`. With k_new the queries stand behind the ring, query i at `seq_lens + i`, and see the chunk
    causally; sequences of one batch may be at different positions, first chunks (`seq_lens = 0`) among them.

    Args:
        q: `[B, S, H, D]`; or packed `[T, H, D]`, one query a sequence or split by cu_seqlens.
        k_cache, v_cache: `[B, slots, Hkv, D]` of q's dtype.
        seq_lens: `[B]` int32, the tokens of each sequence that were written so far; more than `slots` is normal.
            0 without k_new marks an idle sequence, whose output is 0.
        window: None, or the number of visible keys, itself included. A model with a window has `slots >= window`.
        k_new, v_new: the chunk's rotated keys and values, `[B, S, Hkv, D]` or `[T, Hkv, D]` like q, not yet written.
        scale: of the scores; None for `D ** -0.5`.
        cu_seqlens: `[B + 1]` int32, where each packed sequence's queries start.
        max_seqlen: the longest of them, if known: spares GPU kernels empty blocks.
        k_scale, v_scale: `[B, slots, Hkv]`, the scales of int8 caches, as `write_kv` writes them; k_new and v_new are
            not quantised.
        batch_invariant: a sequence's output is bitwise the same in whatever batch it stands: the keys are split by the
            ring and the window alone. On a GPU that costs speed where the batch is large or the chunks are long; the
            C++ kernels are so anyway.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Returns:
        like q, contiguous; rounding as in `attention`.

    Raises:
        TypeError, ValueError: a tensor that does not fit; a ring too small for the window (without a window, for
            the sequence: looked up on a CPU only, since on a GPU that would wait for the device).
        NotImplementedError: `impl` cannot run here, or a derivative is asked for.
    """
    width = check_window(window)
    if impl is None and not is_dynamo_compiling() and k_new is v_new is None:
        chunk = NOT_LOOKED_UP if max_seqlen is None else max_seqlen
        if k_scale is None and v_scale is None:
            done = _attention_cached.at_once(
                q, k_cache, v_cache, seq_lens, width, scale, None, None, cu_seqlens, chunk, batch_invariant
            )
        else:
            caches = (k_cache, v_cache, k_scale, v_scale)
            done = _attention_cached_int8.at_once(
                q, *caches, seq_lens, width, scale, None, None, cu_seqlens, chunk, batch_invariant
            )
        if done is not None:
            return done  # type: ignore[no-any-return]
    batch_invariant = _checks.flag("batch_invariant", batch_invariant)
    _check_float_caches(k_cache, v_cache, q=q, **_checks.given(k_new=k_new, v_new=v_new))
    batch, slots = k_cache.shape[0], k_cache.shape[1]
    _check_tokens(q, "q", batch, cu_seqlens)
    codes = int8.check_scales(k_scale, v_scale, k_cache, q.dtype)
    _check_caches(k_cache, v_cache, q, "q", codes)
    check_heads(q, k_cache, v_cache, "k_cache", "v_cache")
    _checks.integral(q.device, (torch.int32,), seq_lens=seq_lens)
    if seq_lens.shape != (batch,):
        raise ValueError(f"seq_lens is {_checks.shape(seq_lens)}; it must be [{batch}], one a sequence of the cache")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new must be given together")
    if k_new is not None and v_new is not None:
        expected = (*q.shape[:-2], k_cache.shape[2], q.shape[-1])
        for name, t in (("k_new", k_new), ("v_new", v_new)):
            if t.shape != expected or t.dtype != q.dtype:
                raise ValueError(f"{name} is {_checks.shape(t)} {t.dtype}; it must be {list(expected)} {q.dtype}")
    _checks.no_gradient("attention_cached", q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new)
    longest = _chunk(q, cu_seqlens, max_seqlen)
    check_history(seq_lens, slots, width, longest, k_new is not None)
    scale = check_scale(scale, q.shape[-1])
    rest = (seq_lens, width, scale, k_new, v_new, cu_seqlens, longest, batch_invariant)
    if codes:
        return _attention_cached_int8(impl, q, k_cache, v_cache, k_scale, v_scale, *rest)
    return _attention_cached(impl, q, k_cache, v_cache, *rest)
