"""The rotary embedding of q and k."""

from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled
from .rms_norm import ITEM


def _peers(device: str) -> Iterator[Candidate]:
    yield compiled("rope")
    yield from baselines.liger_rope(device)


def _bench(
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    interleaved: bool = False,
    backward: bool = False,
    quick: bool = False,
) -> Bench:
    dtype, size = "bfloat16", ITEM["bfloat16"]
    elements = length * (heads + kv_heads) * dim
    moved = Count(2 * elements * size + length * dim * 4, f"2 S (H + Hkv) D {size} + S D 4")
    flops = Count(3 * elements, "3 S (H + Hkv) D")
    case = testing.rope_case(1, length, heads, kv_heads, dim, interleaved)
    return Bench("rope", case, dtype, moved, flops, "copy", _peers, backward, quick=quick)


def benches() -> Iterator[Bench]:
    yield _bench(512, 9, 3, 64, quick=True)
    yield _bench(2048, 32, 8, 128)
    yield _bench(2048, 32, 8, 128, interleaved=True)
    yield _bench(2048, 32, 8, 128, backward=True)
