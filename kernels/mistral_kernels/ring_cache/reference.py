"""The ring cache in eager PyTorch: the definition of its writes and of attention over it."""

import itertools

import torch

from ..attention.reference import attend
from ..rope.reference import rope


def _sequences(tokens: int, batch: int, cu: torch.Tensor | None, packed: bool) -> list[slice]:
    """The tokens of each sequence, with dense `[B, S]` flattened."""
    if packed:
        ends = list(range(batch + 1)) if cu is None else cu.tolist()
    else:
        ends = [b * (tokens // batch) for b in range(batch + 1)] if batch else [0]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu: torch.Tensor | None,
) -> None:
    batch, slots = k_cache.shape[:2]
    flat_k, flat_v, flat_p = k.reshape(-1, *k.shape[-2:]), v.reshape(-1, *v.shape[-2:]), positions.reshape(-1)
    for b, span in enumerate(_sequences(flat_p.numel(), batch, cu, k.dim() == 3)):
        p = flat_p[span].long()
        live = p >= 0
        live &= p > p.max() - slots if p.numel() else live
        k_cache[b, p[live] % slots] = flat_k[span][live]
        v_cache[b, p[live] % slots] = flat_v[span][live]


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    idle = (positions < 0)[..., None, None]
    q, k = rope(q, k, cos, sin, positions.clamp(min=0), interleaved, False)
    q, k = q.masked_fill(idle, 0), k.masked_fill(idle, 0)
    write_kv(k, v, k_cache, v_cache, positions, cu)
    return q, k


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
    batch_invariant: bool = True,
) -> torch.Tensor:
    batch, slots = k_cache.shape[:2]
    flat = q.reshape(-1, *q.shape[-2:])
    out = torch.zeros_like(flat)
    lengths = [max(n, 0) for n in seq_lens.tolist()]  # as the kernels take them
    for b, span in enumerate(_sequences(flat.shape[0], batch, cu, q.dim() == 3)):
        order = torch.arange(max(0, lengths[b] - slots), lengths[b], device=q.device) % slots
        k, v = k_cache[b, order], v_cache[b, order]
        if k_new is not None and v_new is not None:
            k = torch.cat((k, k_new.reshape(-1, *k.shape[-2:])[span]))
            v = torch.cat((v, v_new.reshape(-1, *v.shape[-2:])[span]))
        out[span] = attend(flat[None, span], k[None], v[None], window, scale, True)[0][0]
    return out.view(q.shape)
