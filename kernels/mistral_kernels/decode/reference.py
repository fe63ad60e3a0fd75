"""All layers of a decode step in eager PyTorch: the ops one after the other."""

import torch

from ..linear.reference import linear
from ..ring_cache.reference import attention_cached, rope_write_kv
from ..rms_norm.reference import add_rms_norm, rms_norm
from ..swiglu.reference import swiglu


def decode_layers(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu: torch.Tensor | None,
    seq_lens: torch.Tensor,
    window: int,
    scale: float,
    eps: float,
    interleaved: bool,
    max_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    delta, residual = x, x
    for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        attention_norm, *projections, wo, ffn_norm, w1, w2, w3 = weights[9 * i : 9 * i + 9]
        if i:
            normed, residual, _ = add_rms_norm(delta, residual, attention_norm, eps, True)
        else:
            normed, _ = rms_norm(x, attention_norm, eps, True)
        three = biases[3 * i : 3 * i + 3] or (None,) * 3
        heads = (linear(normed, w, b) for w, b in zip(projections, three, strict=True))
        q, k, v = (t.unflatten(-1, (-1, k_cache.shape[-1])) for t in heads)
        q, _ = rope_write_kv(q, k, v, k_cache, v_cache, positions, cos, sin, cu, interleaved)
        out = attention_cached(q, k_cache, v_cache, seq_lens, window, scale, None, None, cu, max_q)
        delta = linear(out.flatten(-2), wo, None)
        normed, residual, _ = add_rms_norm(delta, residual, ffn_norm, eps, True)
        delta = linear(swiglu(linear(normed, w1, None), linear(normed, w3, None)), w2, None)
    return delta, residual
