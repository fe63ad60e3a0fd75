"""The projections of a decoding step, where the weight is read once for few rows."""

from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled
from .rms_norm import ITEM


def _peers(device: str) -> Iterator[Candidate]:
    yield compiled("linear")
    yield from baselines.torch_linear(device)


def _bench(rows: int, k: int, n: int, dtype: str = "bfloat16", quick: bool = False) -> Bench:
    size = ITEM[dtype]
    moved = Count((rows * k + n * k + rows * n) * size, f"(M K + N K + M N) {size}")
    flops = Count(2 * rows * k * n, "2 M N K")
    limit = "read" if rows <= 16 else "gemm"
    return Bench("linear", testing.linear_case((rows,), k, n), dtype, moved, flops, limit, _peers, quick=quick)


def benches() -> Iterator[Bench]:
    yield _bench(1, 576, 1536, quick=True)
    yield _bench(1, 4096, 14336)
    yield _bench(1, 4096, 14336, "float32")
    yield _bench(8, 4096, 14336)
    yield _bench(512, 4096, 4096)
