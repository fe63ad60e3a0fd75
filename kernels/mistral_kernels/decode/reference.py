"""All layers of a decode step in eager PyTorch: the ops one after the other."""

import torch

from ..linear.reference import linear
from ..quant_linear.reference import linear_int4, linear_int8, linear_nf4, linear_w8a8
from ..ring_cache import int8
from ..ring_cache.reference import attention_cached, rope_write_kv
from ..rms_norm.reference import add_rms_norm, rms_norm
from ..swiglu.reference import swiglu

SCHEMES = ("none", "int8", "w8a8", "int4", "nf4")


def any_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    offset: torch.Tensor,
    scheme: int,
    group: int,
) -> torch.Tensor:
    """The linear layer of a scheme by its number; `weight` holds codes where there is one."""
    if scheme == 0:
        return linear(x, weight, bias)
    if SCHEMES[scheme] == "int4":
        return linear_int4(x, weight, scale, offset if offset.numel() else None, bias, group)
    run = {"int8": linear_int8, "w8a8": linear_w8a8, "nf4": linear_nf4}[SCHEMES[scheme]]
    return run(x, weight, scale, bias, group)


def linears(scales: list[torch.Tensor], formats: list[int], x: torch.Tensor, layer: int) -> list[tuple]:
    """What `any_linear` takes after the bias, for the seven linear layers of a layer."""
    if not formats:
        return [(x, x, 0, 0)] * 7
    return [(*scales[2 * i : 2 * i + 2], *formats[2 * i : 2 * i + 2]) for i in range(7 * layer, 7 * layer + 7)]


def decode_layers(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    formats: list[int],
    biases: list[torch.Tensor],
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    k_scales: list[torch.Tensor],
    v_scales: list[torch.Tensor],
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
        q_how, k_how, v_how, o_how, *ffn = linears(scales, formats, x, i)
        how = (q_how, k_how, v_how)
        heads = (any_linear(normed, w, b, *h) for w, b, h in zip(projections, three, how, strict=True))
        q, k, v = (t.unflatten(-1, (-1, k_cache.shape[-1])) for t in heads)
        where, see = (positions, cos, sin, cu, interleaved), (seq_lens, window, scale, None, None, cu, max_q)
        if k_scales:
            rings = (k_cache, v_cache, k_scales[i], v_scales[i])
            q, _ = int8.eager_rope_write(q, k, v, *rings, *where)
            out = int8.eager_attention(q, *rings, *see)
        else:
            q, _ = rope_write_kv(q, k, v, k_cache, v_cache, *where)
            out = attention_cached(q, k_cache, v_cache, *see)
        delta = any_linear(out.flatten(-2), wo, None, *o_how)
        normed, residual, _ = add_rms_norm(delta, residual, ffn_norm, eps, True)
        gate, up = any_linear(normed, w1, None, *ffn[0]), any_linear(normed, w3, None, *ffn[2])
        delta = any_linear(swiglu(gate, up), w2, None, *ffn[1])
    return delta, residual
