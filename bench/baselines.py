"""The peers, each imported late. One that is missing, or cannot run on a device, leaves its reason in `MISSING`."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .cases import Candidate

MISSING: dict[str, str] = {}


def load(peer: str, module: str, device: str, needs: str | None = None) -> Any:
    """The peer's module, or None with the reason in MISSING.

    Args:
        needs: the only device that the peer runs on.
    """
    if needs is not None and device != needs:
        MISSING[peer] = f"runs on {needs} only"
        return None
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way; the benchmark runs without it
        MISSING[peer] = f"{module} cannot be imported: {error}"
        return None


# ---- memory-bound ops ----


def torch_rms_norm(device: str) -> Iterator[Candidate]:
    """Rounds once, after the weight, where Mistral's code rounds before it too."""

    def prepare(a: dict[str, Any]) -> Callable[[], Any]:
        x, weight, eps = a["x"], a["weight"], a["eps"]
        return lambda: F.rms_norm(x, (x.shape[-1],), weight, eps)

    yield Candidate("F.rms_norm", prepare)


def liger_rms_norm(device: str) -> Iterator[Candidate]:
    liger = load("Liger", "liger_kernel.ops.rms_norm", device, "cuda")
    if liger is not None:
        run = liger.LigerRMSNormFunction.apply
        yield Candidate("Liger", lambda a: lambda: run(a["x"], a["weight"], a["eps"], 0.0, "llama", False))


def liger_add_rms_norm(device: str) -> Iterator[Candidate]:
    liger = load("Liger", "liger_kernel.ops.fused_add_rms_norm", device, "cuda")
    if liger is not None:
        run = liger.LigerFusedAddRMSNormFunction.apply
        yield Candidate("Liger", lambda a: lambda: run(a["x"], a["residual"], a["weight"], 1e-5, 0.0, "llama", False))


def quack_rms_norm(device: str) -> Iterator[Candidate]:
    quack = load("quack", "quack", device, "cuda")
    if quack is not None:
        yield Candidate("quack", lambda a: lambda: quack.rmsnorm(a["x"], a["weight"], eps=a["eps"]))


def liger_swiglu(device: str) -> Iterator[Candidate]:
    liger = load("Liger", "liger_kernel.ops.swiglu", device, "cuda")
    if liger is not None:
        yield Candidate("Liger", lambda a: lambda: liger.LigerSiLUMulFunction.apply(a["gate"], a["up"]))


def liger_rope(device: str) -> Iterator[Candidate]:
    """Liger takes `[B, H, S, D]` and the cos and sin of every position, and rotates in place."""
    liger = load("Liger", "liger_kernel.ops.rope", device, "cuda")
    if liger is None:
        return

    def prepare(a: dict[str, Any]) -> Callable[[], Any]:
        q, k = (a[n].clone().transpose(1, 2) for n in ("q", "k"))
        cos, sin = (a[n][: q.shape[2]].to(q.dtype).repeat(1, 2)[None] for n in ("cos", "sin"))
        return lambda: liger.LigerRopeFunction.apply(q, k, cos, sin)

    yield Candidate("Liger", prepare, lambda result: tuple(t.transpose(1, 2) for t in result))


def liger_linear_cross_entropy(device: str) -> Iterator[Candidate]:
    liger = load("Liger", "liger_kernel.ops.fused_linear_cross_entropy", device, "cuda")
    if liger is not None:
        run = liger.LigerFusedLinearCrossEntropyFunction.apply
        yield Candidate("Liger", lambda a: lambda: run(a["hidden"], a["weight"], a["labels"])[0])


def torch_cross_entropy(device: str) -> Iterator[Candidate]:
    """The whole `[T, V]` logits in the weights' dtype, as a model without a fused loss makes them."""

    def prepare(a: dict[str, Any]) -> Callable[[], Any]:
        return lambda: F.cross_entropy(F.linear(a["hidden"], a["weight"]).float(), a["labels"])

    yield Candidate("F.cross_entropy", prepare)


def torch_linear(device: str) -> Iterator[Candidate]:
    yield Candidate("F.linear", lambda a: lambda: F.linear(a["x"], a["weight"]))


# ---- attention ----


def _heads_first(a: dict[str, Any], repeat: bool) -> tuple[torch.Tensor, ...]:
    q, k, v = (a[n].transpose(1, 2) for n in ("q", "k", "v"))
    if repeat:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return q, k, v


def _back(result: torch.Tensor) -> torch.Tensor:
    return result.transpose(1, 2).contiguous()


def windowed(a: dict[str, Any]) -> bool:
    return a["window"] is not None and a["window"] < a["k"].shape[1]


def _band(queries: int, keys: int, window: int | None, device: Any) -> torch.Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def sdpa(device: str) -> Iterator[Candidate]:
    """Causal where no window cuts keys off, else with a mask; keys and values repeated for each query head outside the
    timing, since SDPA's own grouped heads are slower on a CPU."""

    def prepare(a: dict[str, Any]) -> Callable[[], Any]:
        q, k, v = _heads_first(a, repeat=True)
        if not windowed(a):
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = _band(q.shape[2], k.shape[2], a["window"], q.device)
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    yield Candidate("SDPA", prepare, _back)


def flex(device: str) -> Iterator[Candidate]:
    """FlexAttention, compiled, with a block mask of the window; its keys and values are not repeated."""

    def prepare(a: dict[str, Any]) -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Whole: beyond the limit of recompilations it would run unfused, with all scores in memory.
        run = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        q, k, v = _heads_first(a, repeat=False)
        window = a["window"] if windowed(a) else k.shape[2]

        def seen(_b: Any, _h: Any, i: Any, j: Any) -> Any:
            return (j <= i) & (j > i - window)

        mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device=str(q.device))
        return lambda: run(q, k, v, block_mask=mask, enable_gqa=True)

    yield Candidate("FlexAttention", prepare, _back)


def flash_attn(device: str) -> Iterator[Candidate]:
    """FlashAttention 2, 3 and 4; a window of W keys is a left distance of W − 1 there."""
    modules = (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface"))
    for name, module in (*modules, ("flash-attn 4", "flash_attn.cute")):
        package = load(name, module, device, "cuda")
        function = getattr(package, "flash_attn_func", None)
        if function is None:
            MISSING.setdefault(name, f"{module} has no flash_attn_func")
            continue
        unlimited = None if module == "flash_attn.cute" else -1

        def prepare(a: dict[str, Any], function: Any = function, unlimited: Any = unlimited) -> Callable[[], Any]:
            size = (a["window"] - 1, 0) if windowed(a) else (unlimited, unlimited)
            return lambda: function(a["q"], a["k"], a["v"], causal=True, window_size=size)

        yield Candidate(name, prepare, lambda result: result[0] if isinstance(result, tuple) else result)


# ---- decoding over a full ring: every slot is visible, so the order of slots does not matter ----


def _grouped(a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[B, Hkv, G, D]` and the ring as `[B, Hkv, slots, D]` views."""
    k, v = a["k_cache"].transpose(1, 2), a["v_cache"].transpose(1, 2)
    q = a["q"]
    return q.view(q.shape[0], k.shape[1], -1, q.shape[-1]), k, v


def decode_peers(device: str) -> Iterator[Candidate]:
    """SDPA with the heads of a group as its queries, its own grouped form (what Hugging Face calls), two matmuls."""

    def as_queries(a: dict[str, Any]) -> Callable[[], Any]:
        q, k, v = _grouped(a)
        return lambda: F.scaled_dot_product_attention(q, k, v).view(a["q"].shape)

    def grouped(a: dict[str, Any]) -> Callable[[], Any]:
        _, k, v = _grouped(a)
        q = a["q"][:, :, None]
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).view(a["q"].shape)

    def products(a: dict[str, Any]) -> Callable[[], Any]:
        q, k, v = _grouped(a)
        scale = 1 / math.sqrt(q.shape[-1])

        def run() -> torch.Tensor:
            scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
            return torch.matmul(scores.softmax(-1).to(v.dtype), v).view(a["q"].shape)

        return run

    yield Candidate("SDPA, heads as queries", as_queries)
    yield Candidate("matmul", products)
    yield Candidate("SDPA enable_gqa", grouped)
