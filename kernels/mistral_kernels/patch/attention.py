"""`attn_implementation="mistral_kernels"`: attention and its mask, as transformers calls them."""

import functools
import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import _checks, attention_cached
from ..attention import attention
from . import masks

NAME = "mistral_kernels"
# Arguments that change the scores and that the kernels do not have.
_OTHER_SCORES = ("softcap", "s_aux", "position_bias", "head_mask", "sinks")


def name_for(impl: str | None) -> str:
    return NAME if impl is None else f"{NAME}_{impl}"


def register(impl: str | None = None) -> str:
    """Registers attention and mask with transformers; returns the name for `attn_implementation`."""
    name = name_for(impl)
    AttentionInterface.register(name, functools.partial(forward, impl=impl) if impl else forward)
    AttentionMaskInterface.register(name, masks.mask)
    return name


def _eager(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any, dropout: float, kwargs: dict) -> Any:
    """The model's own eager attention: it knows its dropout, soft caps and sinks, and returns the weights."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} asks for what {NAME} attention lacks (dropout, attention weights or"
            f" {', '.join(_OTHER_SCORES)}), and its module has no eager_attention_forward to fall back on; load the"
            ' model with attn_implementation="eager"'
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _beyond_kernels(query: torch.Tensor, value: torch.Tensor, dropout: float, kwargs: dict) -> bool:
    asked = dropout > 0 or kwargs.get("output_attentions") or query.shape[-1] != value.shape[-1]
    return bool(asked) or any(kwargs.get(name) is not None for name in _OTHER_SCORES)


def _edges(spans: torch.Tensor, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens of queries and keys where each row is cut into padding, its sequence and padding.

    The padding attends to itself: its outputs mean nothing to anybody, and no row has to be gathered. The queries are
    the last of the keys.
    """
    batch = spans.shape[0]
    rows = torch.arange(batch, device=spans.device, dtype=torch.int32)[:, None]
    last = spans.new_full((batch, 1), keys)
    ends = torch.cat([spans, last], 1)
    starts_q = (ends - (keys - queries)).clamp(0, queries)
    zero = spans.new_zeros(1)
    cu_q = torch.cat([zero, (rows * queries + starts_q).reshape(-1)])
    return cu_q.int(), torch.cat([zero, (rows * keys + ends).reshape(-1)]).int()


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, *t.shape[2:])


def _packed(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, window: Any, scale: Any, impl: Any, **lengths: Any) -> Any:
    out: Any = attention(_flat(q), _flat(k), _flat(v), window, scale, True, cu_q, cu_k, impl=impl, **lengths)
    return out.view(q.shape)


def _int32(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.to(torch.int32)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, encoded: masks.Encoded, scale: Any, impl: Any, kwargs: dict
) -> torch.Tensor:
    window, queries, keys = encoded.window, q.shape[1], k.shape[1]
    cu_q, cu_k = _int32(kwargs.get("cu_seq_lens_q")), _int32(kwargs.get("cu_seq_lens_k"))
    if cu_q is not None and encoded.spans is None and encoded.lengths is None:
        longest = dict(max_seqlen_q=kwargs.get("max_length_q"), max_seqlen_k=kwargs.get("max_length_k"))
        return _packed(q, k, v, cu_q, cu_k, window, scale, impl, **longest)
    if encoded.cu_seqlens is not None:
        longest = dict(max_seqlen_q=queries, max_seqlen_k=keys)
        return _packed(q, k, v, encoded.cu_seqlens, None, window, scale, impl, **longest)
    if encoded.spans is not None:
        cu_q, cu_k = _edges(encoded.spans, queries, keys)
        return _packed(q, k, v, cu_q, cu_k, window, scale, impl, max_seqlen_q=queries, max_seqlen_k=keys)
    if encoded.lengths is not None:
        return attention_cached(q, k, v, encoded.lengths, window, scale=scale, impl=impl)
    out: Any = attention(q, k, v, window, scale, impl=impl)
    return out


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    impl: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it: query `[B, H, S, D]`, key and value `[B, Hkv, Sk, D]`.

    Sequences that `cu_seq_lens_q` names (as for flash-attn) are kept apart by it, whatever the mask repeats of them.

    Dropout, attention weights, soft caps and sinks go to the model's own eager attention; a whole bool or additive
    mask and attention that is not causal go to `sdpa`.

    Returns:
        `[B, S, H, D]`, and None or the attention weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    encoded = attention_mask is None or masks.is_encoded(attention_mask)
    query, key, value = _checks.promote(*_checks.autocast(query, key, value))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    lengths = attention_mask is not None and encoded and masks.decode(attention_mask).lengths is not None
    beyond = _beyond_kernels(query, value, dropout, kwargs)
    if encoded and causal and (beyond or (lengths and needs_grad)):
        attention_mask = masks.full(attention_mask, query.shape[2], key.shape[2], sliding_window, query.device)
        encoded = False
    if beyond:
        return _eager(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if kwargs.get("cache") is not None:
        raise NotImplementedError(f'{NAME} attention has no paged cache; use attn_implementation="sdpa" for it')
    flattened = kwargs.get("cu_seq_lens_q") is not None and (
        attention_mask is None or attention_mask.dtype == torch.bool
    )
    if not causal or not (encoded or flattened):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=causal, **kwargs
        )
    known = masks.Encoded(sliding_window)
    if attention_mask is not None and encoded:
        known = masks.decode(attention_mask)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _run(q, k, v, known, scaling, impl, kwargs), None
