"""The emulator's own tests of compute capability 9.0: right results, every fault found, every strict rule needed."""

import re

import pytest
import torch
from ptx_on_cpu import Finding, Program, empty, guarded, missing, option
from ptx_on_cpu.build import HERE

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}")

FIXTURES = HERE / "fixtures"


@pytest.fixture(scope="module")
def program():
    return Program("hopper", [FIXTURES / "hopper.cu"], [FIXTURES], arch="90a")


@pytest.fixture(autouse=True)
def hopper():
    with option("capability", 90):
        yield


def tile(program, *, half=False, row=128, ta=0, tb=0, by_threads=0, twice=0, bug=0):
    """Small integers, so that the product is exact."""
    torch.manual_seed(0)
    dtype = torch.float16 if half else torch.bfloat16
    a, b = (guarded(torch.randint(-4, 5, (64, 64)).to(dtype)) for _ in "ab")
    c = empty((64, 64), torch.float32)
    program.call("fixture_tile", int(half), a, b, c, row, ta, tb, by_threads, twice, bug)
    return c, (a.float().T if ta else a.float()) @ (b.float() if tb else b.float().T)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("row", [128, 64, 32, 16])
@pytest.mark.parametrize("ta, tb", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_descriptors_of_every_swizzle_and_major_order(program, half, row, ta, tb):
    got, want = tile(program, half=half, row=row, ta=ta, tb=tb)
    assert torch.equal(got, want)


@pytest.mark.parametrize("check", [0, 1])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("how", [{}, {"by_threads": 1}, {"twice": 1}])
def test_correct_kernel_has_no_finding(program, check, late, how):
    with option("check", check), option("late", late):
        got, want = tile(program, **how)
    assert torch.equal(got, want)


def test_kernel_needs_the_compute_capability(program):
    with option("capability", 80), pytest.raises(Finding, match="CUDA error 209"):
        tile(program)


TILE_FAULTS = [
    ({}, 3, "brought with a 128-byte swizzle, and whose descriptor says 64-byte"),
    ({}, 8, "leads to byte .* twice"),
    ({}, 12, "no fence.mbarrier_init"),
    ({}, 13, "without synchronisation with its initialisation"),
    ({}, 22, "no multiple of its swizzle pattern"),
    ({}, 43, "where none is initialised"),
    ({"by_threads": 1}, 41, "no fence.proxy.async between an ordinary write"),
    ({"by_threads": 1}, 42, "read-after-write race"),
    ({"by_threads": 1}, 45, "no fence.proxy.async between an ordinary write"),
    ({"twice": 1}, 44, "no fence.proxy.async between ordinary reads"),
    ({"twice": 1}, 46, "write-after-read race"),
]


@pytest.mark.parametrize("how, bug, kind", TILE_FAULTS)
def test_fault_of_a_tile_is_found(program, how, bug, kind):
    with pytest.raises(Finding, match=kind) as found:
        tile(program, bug=bug, **how)
    assert re.search(r"hopper\.cuh?:\d+", str(found.value))
