"""What a call costs: each op on tensors so small that only the way to the kernel counts."""

from collections.abc import Callable, Iterator
from typing import Any

from mistral_kernels import testing

from . import baselines
from .cases import Bench, Candidate, Count
from .families import ring_cache


def _linear(device: str) -> Iterator[Candidate]:
    yield from baselines.torch_linear(device)


def _bench(
    family: str, case: testing.Case, peers: Callable[[str], Any] = lambda device: (), back: bool = False
) -> Bench:
    one = Count(1, "a call")
    return Bench(family, case, "float32", one, one, "call", peers, back, quick=True)


def benches() -> Iterator[Bench]:
    norm = testing.norm_case((1, 64))
    yield _bench("rms_norm", norm, baselines.torch_rms_norm)
    yield _bench("rms_norm", norm, baselines.torch_rms_norm, back=True)
    yield _bench("rms_norm", testing.add_norm_case((1, 64)))
    yield _bench("swiglu", testing.swiglu_case((1, 64)))
    yield _bench("swiglu", testing.swiglu_case((1, 64)), back=True)
    yield _bench("rope", testing.rope_case(1, 1, 2, 1, 32))
    yield _bench("linear", testing.linear_case((1,), 64, 64), _linear)
    small = testing.attention_case(1, 4, 4, 2, 1, 32, return_lse=False)
    yield _bench("attention", small, baselines.sdpa)
    yield _bench("attention", small, baselines.sdpa, back=True)
    ring = ring_cache.attend(1, 8, 2, 1, 32)
    yield _bench("ring_cache", ring.case, baselines.decode_peers)
    yield _bench("ring_cache", ring_cache.write(1, 8, 2, 1, 32).case)
