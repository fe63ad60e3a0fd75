"""Attention by the flash-attn package, whichever of its generations is importable: our arguments mapped to theirs.

Their window `(left, right)` counts the keys beside the query's own and is inclusive: W visible keys are (W − 1, 0).
2 and 3 write "no limit" as −1, 4 as None. All align the last query with the last key. Generation 4 ran on an H200;
2 and 3 were never run, only their arguments are tested.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
# By the GPU's major compute capability: 3 is written for Hopper, 4 for Blackwell; 2 runs on both, slower.
ORDER = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2, 4)}
MAX_HEAD_DIM = 256
# Why a generation could not be imported.
failures: dict[int, Exception] = {}


@functools.cache
def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@functools.cache
def load() -> tuple[int, ModuleType] | None:
    """The generation and its module, or None where none can be imported."""
    for generation in ORDER.get(_capability(), (3, 4, 2)):
        try:
            module = importlib.import_module(MODULES[generation])
        except Exception as error:  # a broken one of these large packages must not break every other op
            failures[generation] = error
            continue
        if hasattr(module, "flash_attn_func"):
            return generation, module
    return None


def unusable() -> str | None:
    """Why the package cannot be used on this machine, or None."""
    if not _capability():
        return "no GPU is here"
    if load() is None:
        broken = {g: e for g, e in failures.items() if not isinstance(e, ModuleNotFoundError)}
        if broken:
            return "; ".join(f"{MODULES[g]} fails to import: {e}".split("\n")[0] for g, e in broken.items())
        names = ", ".join(MODULES[g] for g in ORDER.get(_capability(), (3, 4, 2)))
        return f"none of {names} can be imported (pip install flash-attn, or flash-attn-4 for Hopper and Blackwell)"
    return None


def supports(q: torch.Tensor, *_: Any) -> str | None:
    """Why flash-attn cannot attend with queries like q, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8:
        return f"the head dimension is {q.shape[-1]}; it must be a multiple of 8 up to {MAX_HEAD_DIM}"
    return None


class _Undifferentiable(torch.autograd.Function):
    """lse, whose gradient flash-attn would drop without a word."""

    @staticmethod
    def forward(ctx: Any, lse: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise NotImplementedError("impl='flash_attn' has no gradient of lse; the other implementations have")


def _window(generation: int, window: int, causal: bool) -> dict[str, Any]:
    unlimited = None if generation == 4 else -1
    return dict(causal=causal, window_size=(window - 1, 0) if window else (unlimited, unlimited))


def _with_lse(generation: int) -> dict[str, Any]:
    return {"return_lse" if generation == 4 else "return_attn_probs": True}


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
    """Differentiable by flash-attn's own autograd; for rows without keys its lse of +inf is made ours, −inf."""
    loaded = load()
    assert loaded is not None
    generation, module = loaded
    how: dict[str, Any] = dict(softmax_scale=scale, **_window(generation, window, causal), **_with_lse(generation))
    if q.numel() == 0 or k.numel() == 0:
        rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        # Zero gradients, where they are asked for, need an output that depends on the inputs.
        out, lse = q * 0 + (k.sum() + v.sum()) * 0, q.new_full(rows, float("-inf"), dtype=torch.float32)
        return out, _Undifferentiable.apply(lse, out)
    if cu_q is None:
        out, lse = module.flash_attn_func(q, k, v, **how)[:2]
    else:
        lengths = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
        out, lse = module.flash_attn_varlen_func(q, k, v, **lengths, **how)[:2]
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    return out, _Undifferentiable.apply(lse.detach(), out)


def supports_cached(q, k_cache, v_cache, seq_lens, window, scale, k_new, v_new, cu, max_q, batch_invariant):
    """flash-attn masks a cache by slot, so it can serve a ring only where every written slot is visible."""
    if (reason := supports(q)) is not None:
        return reason
    one_each = cu is None or (max_q == 1 and q.shape[0] == k_cache.shape[0])
    if k_new is not None or not one_each or (q.dim() == 4 and q.shape[1] != 1):
        return "over a ring flash-attn serves one query a sequence, already written (no chunks)"
    if window and k_cache.shape[1] != window:
        return f"the ring has {k_cache.shape[1]} slots and the window is {window}; flash-attn needs them to be equal"
    return "its split of the keys depends on the batch, and batch_invariant is set" if batch_invariant else None


def attention_cached(q, k_cache, v_cache, seq_lens, window, scale, k_new, v_new, cu, max_q, batch_invariant):
    """Decoding over rings whose written slots are all visible, in slot order, which softmax does not mind."""
    loaded = load()
    assert loaded is not None
    generation, module = loaded
    written = seq_lens.clamp(max=k_cache.shape[1])
    queries = q.view(q.shape[0], 1, *q.shape[-2:])
    how: dict[str, Any] = dict(softmax_scale=scale, **_window(generation, window, True))
    if generation == 4:
        out = module.flash_attn_varlen_func(queries, k_cache, v_cache, seqused_k=written, **how)
    else:
        out = module.flash_attn_with_kvcache(queries, k_cache, v_cache, cache_seqlens=written, **how)
    return (out[0] if isinstance(out, tuple) else out).view(q.shape)
