"""RMSNorm alone and with the residual addition before it."""

import dataclasses
from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled

ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


def norm_peers(device: str) -> Iterator[Candidate]:
    yield compiled("rms_norm")
    yield from baselines.torch_rms_norm(device)
    yield from baselines.liger_rms_norm(device)
    yield from baselines.quack_rms_norm(device)


def add_norm_peers(device: str) -> Iterator[Candidate]:
    yield compiled("add_rms_norm")
    yield from baselines.liger_add_rms_norm(device)


def _norm(rows: int, n: int, dtype: str, backward: bool = False, quick: bool = False) -> Bench:
    size = ITEM[dtype]
    # Backward reads x and dout and writes dx; the weight's row is left out beside thousands of them.
    moved = Count((3 if backward else 2) * rows * n * size, f"{3 if backward else 2} T N {size}")
    flops = Count((8 if backward else 4) * rows * n, f"{8 if backward else 4} T N")
    case = testing.norm_case((rows, n))
    return Bench("rms_norm", case, dtype, moved, flops, "copy", norm_peers, backward, quick=quick)


def _add_norm(rows: int, n: int, dtype: str, backward: bool = False, quick: bool = False) -> Bench:
    size = ITEM[dtype]
    # Forward reads x and residual and writes both outputs. Backward reads the sum and both gradients and writes one,
    # which both inputs get.
    moved = Count(4 * rows * n * size, f"4 T N {size}")
    flops = Count((9 if backward else 5) * rows * n, f"{9 if backward else 5} T N")
    case = testing.add_norm_case((rows, n))
    return Bench("rms_norm", case, dtype, moved, flops, "copy", add_norm_peers, backward, quick=quick)


def benches() -> Iterator[Bench]:
    yield _norm(512, 576, "bfloat16", quick=True)
    yield _norm(2048, 4096, "bfloat16")
    yield _norm(2048, 4096, "float32")
    yield _norm(2048, 4096, "bfloat16", backward=True)
    yield _add_norm(512, 576, "bfloat16", quick=True)
    yield _add_norm(2048, 4096, "bfloat16")
    yield _add_norm(2048, 4096, "bfloat16", backward=True)
    if "avx2" in testing.isa_tiers():
        for row in (_norm(2048, 4096, "bfloat16"), _add_norm(2048, 4096, "bfloat16")):
            yield dataclasses.replace(row, isa="avx2")
