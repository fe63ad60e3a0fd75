"""The loss of the output projection, without the logits of all tokens."""

from collections.abc import Iterator

from mistral_kernels import testing

from .. import baselines
from ..cases import Bench, Candidate, Count, compiled
from .rms_norm import ITEM


def _peers(device: str) -> Iterator[Candidate]:
    yield compiled("linear_cross_entropy")
    yield from baselines.torch_cross_entropy(device)
    yield from baselines.liger_linear_cross_entropy(device)


def _bench(tokens: int, n: int, vocabulary: int, backward: bool = False, quick: bool = False) -> Bench:
    dtype, size = "bfloat16", ITEM["bfloat16"]
    # Backward forms the logits again and multiplies their gradient with hidden and with the weight.
    products = 6 if backward else 2
    flops = Count(products * tokens * n * vocabulary, f"{products} T N V")
    once = (tokens + vocabulary) * n * size
    moved = Count(2 * once if backward else once, f"{'2 ' if backward else ''}(T + V) N {size}")
    case = testing.linear_cross_entropy_case((tokens, n), vocabulary)
    return Bench("linear_cross_entropy", case, dtype, moved, flops, "gemm", _peers, backward, quick=quick)


def benches() -> Iterator[Bench]:
    yield _bench(128, 576, 4096, quick=True)
    yield _bench(1024, 576, 49152)
    yield _bench(1024, 576, 49152, backward=True)
