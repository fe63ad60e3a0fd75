"""A ring cache of int8 codes: each token's key and value of each head has a scale of its own.

A code is `round(x / scale)` with `scale = max|x| / 127` over the head dimension, halves to even; a row of zeros has
scale 0. What is quantised is the key as rotated and rounded to its dtype, so that writing in one pass with the
rotation and writing later give the same codes.
"""

import torch

from .. import _checks
from .._dispatch import Op
from ..rope import rope
from . import reference

LIMIT = 127


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes like x and a scale for each of its rows, in float32 (float64 for float64).

    A row with an infinity or NaN gets a scale that is not finite, so it does not come back as numbers.
    """
    wide = x.to(_checks.accumulate_dtype(x.dtype))
    scale = wide.abs().amax(-1) / LIMIT
    codes = torch.where(scale[..., None] > 0, wide / scale[..., None], 0.0).nan_to_num().round()
    return codes.clamp(-LIMIT, LIMIT).to(torch.int8), scale


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.to(scale.dtype) * scale[..., None]).to(dtype)


def check_scales(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, k_cache: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether the caches hold codes; they do where both scales are given, `[B, slots, Hkv]` of the right dtype."""
    if k_scale is None and v_scale is None:
        if k_cache.dtype == torch.int8:
            raise ValueError("k_cache is int8; k_scale and v_scale, [B, slots, Hkv], are needed with it")
        return False
    needed = _checks.accumulate_dtype(dtype)
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is None:
            raise ValueError(f"{name} is missing; k_scale and v_scale must be given together")
        if t.shape != k_cache.shape[:3] or t.dtype != needed:
            raise ValueError(
                f"{name} is {_checks.shape(t)} {t.dtype}; for k_cache {_checks.shape(k_cache)} and {dtype} tokens it"
                f" must be {list(k_cache.shape[:3])} {needed}"
            )
        if t.device != k_cache.device:
            raise ValueError(f"{name} is on {t.device} but k_cache is on {k_cache.device}; they must be on one device")
    return True


# ---- eager ----


def _eager_write(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu):
    (k_codes, k_new), (v_codes, v_new) = quantise(k), quantise(v)
    reference.write_kv(k_codes, v_codes, k_cache, v_cache, positions, cu)
    reference.write_kv(k_new[..., None], v_new[..., None], k_scale[..., None], v_scale[..., None], positions, cu)


def eager_rope_write(q, k, v, k_cache, v_cache, k_scale, v_scale, positions, cos, sin, cu, interleaved):
    idle = (positions < 0)[..., None, None]
    q, k = reference.rope(q, k, cos, sin, positions.clamp(min=0), interleaved, False)
    q, k = q.masked_fill(idle, 0), k.masked_fill(idle, 0)
    _eager_write(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu)
    return q, k


def eager_attention(q, k_cache, v_cache, k_scale, v_scale, *rest):
    k, v = dequantise(k_cache, k_scale, q.dtype), dequantise(v_cache, v_scale, q.dtype)
    return reference.attention_cached(q, k, v, *rest)


# ---- in torch ops, without a loop over the sequences ----


def _targets(positions: torch.Tensor, batch: int, slots: int, cu: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Of the tokens that are written: which they are (flat), their sequences and their slots."""
    flat = positions.reshape(-1).long()
    if positions.dim() == 2:
        sequence = torch.arange(batch, device=flat.device).repeat_interleave(positions.shape[1])
    elif cu is None:
        sequence = torch.arange(batch, device=flat.device)
    else:
        tokens = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
        sequence = torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    newest = flat.new_full((batch,), -1).scatter_reduce(0, sequence, flat, "amax")
    which = ((flat >= 0) & (flat > newest[sequence] - slots)).nonzero()[:, 0]
    return which, sequence[which], flat[which] % slots


def _write(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu):
    batch, slots = k_cache.shape[:2]
    if k.numel() == 0:
        return
    which, *where = _targets(positions, batch, slots, cu)
    for x, codes, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        flat = x.reshape(-1, *x.shape[-2:])
        new_codes, new_scales = quantise(flat if which.numel() == flat.shape[0] else flat[which])
        codes[where[0], where[1]] = new_codes
        scales[where[0], where[1]] = new_scales


def _rope_write(q, k, v, k_cache, v_cache, k_scale, v_scale, positions, cos, sin, cu, interleaved):
    idle = (positions < 0)[..., None, None]
    q, k = rope(q, k, cos, sin, positions.clamp(min=0), interleaved)
    q, k = q.masked_fill_(idle, 0), k.masked_fill_(idle, 0)
    _write(k, v, k_cache, v_cache, k_scale, v_scale, positions, cu)
    return q, k


def _attention(q, k_cache, v_cache, k_scale, v_scale, *rest):
    k, v = dequantise(k_cache, k_scale, q.dtype), dequantise(v_cache, v_scale, q.dtype)
    return torch.ops.mistral_kernels.attention_cached(q, k, v, *rest)


def make_ops(triton_supports) -> tuple[Op, Op, Op]:
    """The three ops on codes: write_kv, rope_write_kv, attention_cached. Without the compiled library `impl="cpu"` is
    in torch ops."""
    write = Op(
        "write_kv_int8(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale,"
        " Tensor(d!) v_scale, Tensor positions, Tensor? cu) -> ()",
        eager=_eager_write,
        composite=_write,
        fake=lambda *_: None,
        triton="ring_cache.triton_write:write_kv_int8",
    )
    rope_write = Op(
        "rope_write_kv_int8(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale,"
        " Tensor(d!) v_scale, Tensor positions, Tensor cos, Tensor sin, Tensor? cu, bool interleaved)"
        " -> (Tensor, Tensor)",
        eager=eager_rope_write,
        composite=_rope_write,
        fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
        triton="ring_cache.triton_write:rope_write_kv_int8",
    )
    attention = Op(
        "attention_cached_int8(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_scale, Tensor v_scale,"
        " Tensor seq_lens, int window, float scale, Tensor? k_new, Tensor? v_new, Tensor? cu, SymInt max_q,"
        " bool batch_invariant) -> Tensor",
        eager=eager_attention,
        composite=_attention,
        fake=lambda q, *_: q.new_empty(q.shape),
        triton="ring_cache.triton_attention:attention_cached_int8",
        triton_supports=triton_supports,
    )
    return write, rope_write, attention
