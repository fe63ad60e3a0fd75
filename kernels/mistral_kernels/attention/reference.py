"""Sliding-window grouped-query attention in eager PyTorch: the definition, and the gradients by formula.

Scores and softmax are in float32 (float64 for float64 inputs). As in the models' eager code and in every
tensor-core kernel, the probabilities are rounded to the values' dtype before the product with the values.
"""

import torch

from .._checks import accumulate_dtype


def visible(
    queries: int, keys: int, window: int, causal: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    """Which keys each query sees, `[queries, keys]` bool: the one place where the mask is written.

    The last query is aligned with the last key. Query at position i sees the keys j with i − window < j <= i; a
    window of 0 means none. Three queries (rows, at positions 2, 3, 4), five keys, window 3:

        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1
    """
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = j <= i
    return seen & (j > i - window) if window else seen


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[B, S, H, D]`, k and v `[B, Sk, Hkv, D]` → out `[B, S, H, D]`, lse `[B, H, S]`."""
    scores, mask = _scores(q, k, window, scale, causal)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.unsqueeze(-1)).exp().masked_fill(~mask, 0)
    out = torch.einsum("bngst,btnd->bsngd", probabilities.to(v.dtype).to(scores.dtype), v.to(scores.dtype))
    return out.reshape(q.shape).to(q.dtype), lse.flatten(1, 2)


def _scores(
    q: torch.Tensor, k: torch.Tensor, window: int, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled scores `[B, Hkv, G, S, Sk]` with −inf where the mask is false, and the mask."""
    wide = accumulate_dtype(q.dtype)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bsngd,btnd->bngst", grouped, k.to(wide)) * scale
    mask = visible(q.shape[1], k.shape[1], window, causal, q.device)
    return scores.masked_fill(~mask, float("-inf")), mask


def attend_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ) + dlse), dQ = scale · dS K, dK = scale · dSᵀ Q.

    P and dS are rounded to the dtype before their products. P and its row sums come from these very scores, not from
    lse and the rounded output: where scores are large, a forward that rounded them otherwise would not fit them.
    """
    scores, mask = _scores(q, k, window, scale, causal)
    wide = scores.dtype
    groups = (k.shape[2], -1)
    p = (scores - scores.logsumexp(-1, keepdim=True)).exp().masked_fill(~mask, 0)
    d = dout.to(wide).unflatten(2, groups)
    dv = torch.einsum("bngst,bsngd->btnd", p.to(v.dtype).to(wide), d)
    dp = torch.einsum("bsngd,btnd->bngst", d, v.to(wide))
    delta = (p * dp).sum(-1) - dlse.to(wide).unflatten(1, groups)
    ds = (p * (dp - delta.unsqueeze(-1))).to(q.dtype).to(wide)
    dq = torch.einsum("bngst,btnd->bsngd", ds, k.to(wide)).reshape(q.shape) * scale
    dk = torch.einsum("bngst,bsngd->btnd", ds, q.to(wide).unflatten(2, groups)) * scale
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sequences(cu_q: torch.Tensor, cu_k: torch.Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


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
) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_q is None or cu_k is None:
        return attend(q, k, v, window, scale, causal)
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0, dtype=accumulate_dtype(q.dtype))]
    for a, b in _sequences(cu_q, cu_k):
        out, lse = attend(q[None, a], k[None, b], v[None, b], window, scale, causal)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    causal: bool,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if cu_q is None or cu_k is None:
        return attend_backward(dout, dlse, q, k, v, out, lse, window, scale, causal)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for a, b in _sequences(cu_q, cu_k):
        rows = (dout[None, a], dlse[None, :, a], q[None, a], k[None, b], v[None, b], out[None, a], lse[None, :, a])
        gradients = attend_backward(*rows, window, scale, causal)
        for whole, part, span in zip((dq, dk, dv), gradients, (a, b, b), strict=True):
            whole[span] = part[0]
    return dq, dk, dv
