"""Runs one small call of each op under valgrind, for bench/instructions.py.

python -m bench.instruction_cases LIBRARY_OF_REQUESTS TIER WORDS
"""

import ctypes
import sys
from collections.abc import Iterator

import torch

from mistral_kernels import testing
from mistral_kernels.testing import Case

# Caches are written or read; the gradients of layers are torch's.
NO_GRADIENT = ("rope_write_kv", "attention_cached", "linear", "linear_int8", "linear_int4", "linear_nf4")


def cases() -> Iterator[Case]:
    """Sizes of some ten thousand to a million instructions: whole vectors and tails, more than one tile and panel.
    write_kv copies memory and has no kernel."""
    yield testing.norm_case((9, 300))
    yield testing.add_norm_case((9, 300))
    yield testing.swiglu_case((3, 1000))
    yield testing.swiglu_packed_case((3, 1000))
    yield testing.rope_case(1, 5, 6, 2, 64, first=3)
    yield testing.linear_case((1,), 300, 50)
    yield testing.linear_case((9,), 300, 50)
    for scheme in ("int8", "w8a8", "int4", "nf4"):
        yield testing.quantised_case(scheme, (1,), 256, 33, 64)
        yield testing.quantised_case(scheme, (9,), 256, 33, 64)
    yield testing.linear_cross_entropy_case((9, 40), 700)
    yield testing.attention_case(1, 130, 130, 4, 1, 64, window=50)
    yield testing.attention_case(1, 40, 40, 3, 3, 128)
    yield testing.packed_attention_case([(5, 60), (40, 40)], 4, 2, 64)
    yield testing.rope_write_case([5, 1], [3, 70], 64, 6, 2, 64)
    yield testing.cached_case([1, 1], [40, 300], 64, 6, 2, 64, window=64, chunk=False)
    yield testing.cached_case([40, 3], [10, 90], 64, 6, 2, 64, window=64)
    yield testing.cached_case([1, 1], [40, 300], 64, 6, 2, 64, window=64, chunk=False, codes=True)


def runs(words: str) -> Iterator[tuple[str, Case, torch.dtype]]:
    """Cases with these words in their name."""
    for case in cases():
        for dtype in (torch.float32, torch.bfloat16):
            directions = ("forward",) if case.op in NO_GRADIENT else ("forward", "forward and backward")
            for direction in directions:
                name = f"{case.op} {case.label} {str(dtype).removeprefix('torch.')} {direction}"
                if words in name:
                    yield name, case, dtype


def main(requests: str, tier: str, words: str) -> None:
    valgrind = ctypes.CDLL(requests)
    torch.set_num_threads(1)
    with testing.isa(tier):
        valgrind.start()
        for name, case, dtype in runs(words):
            run = testing.call_with_gradients if name.endswith("backward") else testing.call
            arguments = case.arguments(dtype)
            run(case.op, arguments, "cpu")  # fills what is kept between calls
            valgrind.zero()
            run(case.op, arguments, "cpu")
            valgrind.dump(name.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
