"""silu(gate) * up, of two tensors and of two halves of one."""

import dataclasses
from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled
from .rms_norm import ITEM


def _peers(device: str) -> Iterator[Candidate]:
    yield compiled("swiglu")
    yield from baselines.liger_swiglu(device)


def _packed_peers(device: str) -> Iterator[Candidate]:
    yield compiled("swiglu_packed")


def _bench(rows: int, f: int, packed: bool, backward: bool = False, quick: bool = False) -> Bench:
    dtype, size = "bfloat16", ITEM["bfloat16"]
    # Backward reads gate, up and dout and writes two gradients.
    tensors = 5 if backward else 3
    moved = Count(tensors * rows * f * size, f"{tensors} T F {size}")
    flops = Count((12 if backward else 5) * rows * f, f"{12 if backward else 5} T F, exp as one")
    case = testing.swiglu_packed_case((rows, 2 * f)) if packed else testing.swiglu_case((rows, f))
    peers = _packed_peers if packed else _peers
    return Bench("swiglu", case, dtype, moved, flops, "copy", peers, backward, quick=quick)


def benches() -> Iterator[Bench]:
    yield _bench(512, 1536, packed=False, quick=True)
    yield _bench(2048, 14336, packed=False)
    yield _bench(2048, 14336, packed=False, backward=True)
    yield _bench(2048, 14336, packed=True)
    if "avx2" in testing.isa_tiers():
        yield dataclasses.replace(_bench(2048, 14336, packed=False), isa="avx2")
