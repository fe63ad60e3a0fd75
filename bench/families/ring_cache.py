"""Decoding: the write into the ring and the attention over it."""

from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled
from .rms_norm import ITEM


def _attend_peers(device: str) -> Iterator[Candidate]:
    yield compiled("attention_cached")
    yield from baselines.decode_peers(device)


def _write_peers(device: str) -> Iterator[Candidate]:
    yield compiled("rope_write_kv")


def attend(batch: int, slots: int, heads: int, kv_heads: int, dim: int, quick: bool = False) -> Bench:
    """One query a sequence over a ring that is full."""
    dtype, size = "bfloat16", ITEM["bfloat16"]
    moved = Count(2 * batch * slots * kv_heads * dim * size, f"2 B W Hkv D {size}")
    flops = Count(4 * batch * slots * heads * dim, "4 B W H D")
    lengths, before = [1] * batch, [slots + 17] * batch
    case = testing.cached_case(lengths, before, slots, heads, kv_heads, dim, window=slots, chunk=False)
    curve = (f"{heads}/{kv_heads} D{dim} B{batch}", "W", slots)
    return Bench("ring_cache", case, dtype, moved, flops, "read", _attend_peers, curve=curve, quick=quick)


def write(tokens: int, slots: int, heads: int, kv_heads: int, dim: int, quick: bool = False) -> Bench:
    """One chunk of a sequence, rotated and written."""
    dtype, size = "bfloat16", ITEM["bfloat16"]
    elements = tokens * (heads + 2 * kv_heads) * dim
    # q, k and v are read; rotated q and k are returned, k and v written to the ring.
    moved = Count((2 * elements + tokens * kv_heads * dim) * size, f"T (2 H + 5 Hkv) D {size}")
    case = testing.rope_write_case([tokens], [slots], slots, heads, kv_heads, dim)
    flops = Count(3 * tokens * (heads + kv_heads) * dim, "3 T (H + Hkv) D")
    return Bench("ring_cache", case, dtype, moved, flops, "copy", _write_peers, quick=quick)


def benches() -> Iterator[Bench]:
    yield attend(1, 256, 9, 3, 64, quick=True)
    for slots in (1024, 4096, 16384):
        yield attend(1, slots, 32, 8, 128)
    yield attend(8, 4096, 32, 8, 128)
    yield write(64, 256, 9, 3, 64, quick=True)
    yield write(1024, 4096, 32, 8, 128)
