"""Causal and sliding-window attention; FLOPs count the visible keys only."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count
from .rms_norm import ITEM

ROWS = 48


def visible_pairs(queries: int, window: int | None) -> int:
    """Pairs of a query and a key it sees: the sum of min(i + 1, W) over the S queries."""
    w = queries if window is None else min(window, queries)
    return w * (w + 1) // 2 + (queries - w) * w


def _peers(device: str, backward: bool) -> Iterator[Candidate]:
    yield from baselines.sdpa(device)
    # On a CPU FlexAttention is for inference only.
    if not backward or device == "cuda":
        yield from baselines.flex(device)
    yield from baselines.flash_attn(device)


def few_rows(a: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable]]:
    """The first, middle and last queries with the keys up to them: rows of the whole, computed alone."""
    length = a["q"].shape[1]
    for first in sorted({0, max(0, length // 2 - ROWS // 2), max(0, length - ROWS)}):
        last = min(length, first + ROWS)
        part = a | dict(q=a["q"][:, first:last], k=a["k"][:, :last], v=a["v"][:, :last])
        yield part, lambda outputs, first=first, last=last: [outputs[0][:, first:last]]


def bench(
    length: int,
    window: int | None,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: str = "bfloat16",
    backward: bool = False,
    quick: bool = False,
    isa: str | None = None,
) -> Bench:
    """One sequence; eager PyTorch, with all its scores in memory, takes part up to 1024 tokens."""
    size, pairs = ITEM[dtype], visible_pairs(length, window)
    products, tensors = (10, 4) if backward else (4, 2)
    flops = Count(products * pairs * heads * dim, f"{products} H D sum over i of min(i + 1, W)")
    moved = Count(tensors * length * (heads + kv_heads) * dim * size, f"{tensors} S (H + Hkv) D {size}")
    case = testing.attention_case(1, length, length, heads, kv_heads, dim, window, return_lse=False)
    series = f"{heads}/{kv_heads} D{dim} " + (f"W{window}" if window else "causal")
    peers = functools.partial(_peers, backward=backward)
    small = length <= 1024
    curve = None if backward or isa else (series, "S", length)
    slices = None if small or backward else few_rows
    limit = "fma" if isa else "gemm"
    alone = (heads, length, length, dim) if small and not (backward or isa) else None
    eager = small or backward
    return Bench(
        "attention", case, dtype, moved, flops, limit, peers, backward, eager, slices, curve, quick, isa, alone
    )


def benches() -> Iterator[Bench]:
    yield bench(256, None, 9, 3, 64, quick=True)
    yield bench(512, 128, 9, 3, 64, quick=True)
    yield bench(128, None, 9, 3, 64)
    for dim in (64, 80, 96, 256):
        yield bench(512, None, 8, 2, dim)
        yield bench(512, None, 8, 2, dim, dtype="float32")
    for length in (512, 1024, 2048, 4096):
        yield bench(length, None)
    for length in (2048, 4096, 8192):
        yield bench(length, 1024)
    yield bench(8192, 4096)
    yield bench(1024, None, dtype="float32")
    yield bench(1024, None, 8, 2, backward=True)
    yield bench(1024, 256, 8, 2, backward=True)
    if "avx2" in testing.isa_tiers():
        for dtype in ("float32", "bfloat16"):
            yield bench(1024, None, 8, 2, dtype=dtype, isa="avx2")
