"""The emulator's own tests of compute capability 9.0: right results, every fault found, every strict rule needed."""

import contextlib
import ctypes
import functools
import re

import pytest
import torch
from ptx_on_cpu import Finding, Program, empty, guarded, launches, missing, option, planted
from ptx_on_cpu.build import HERE
from ptx_on_cpu.program import entry

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
    ({"twice": 1}, 47, "read as a sum, after the last wgmma.fence"),
]


@pytest.mark.parametrize("how, bug, kind", TILE_FAULTS)
def test_fault_of_a_tile_is_found(program, how, bug, kind):
    with pytest.raises(Finding, match=kind) as found:
        tile(program, bug=bug, **how)
    assert re.search(r"hopper\.cuh?:\d+", str(found.value))


# ---- bulk copies


def rows(program, count, n, boxes, bug=0):
    torch.manual_seed(0)
    x, total = guarded(torch.randn(count, n)), guarded(torch.randn(count, n))
    want = total + x
    y = empty((count, n), torch.float32)
    program.call("fixture_rows", x, y, total, count, n, boxes, bug)
    return torch.cat([y, total]), torch.cat([x + 1, want])


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("count, n, boxes", [(128, 36, 0), (128, 36, 1), (100, 12, 1), (5, 4, 1)])
def test_bulk_copies_and_sums(program, late, count, n, boxes):
    """Rows beyond the tensor are zeros, are not written, and count in the bytes that the mbarrier waits for."""
    with option("late", late), launches() as seen:
        got, want = rows(program, count, n, boxes)
    assert torch.equal(got, want)
    assert seen[0].bulk_read == count * n * 4
    assert seen[0].bulk_loads == (count + 63) // 64 if boxes else count


ROW_FAULTS = [
    (1, 5, r"deadlock: 64 threads .* 0 of 64 arrivals and -4608 bytes due"),
    (0, 50, "bulk copy is still writing"),
    (1, 50, "bulk copy is still writing"),
    (0, 51, "write-after-read race"),
    (1, 51, "write-after-read race"),
    (1, 52, "write-after-read race"),
    (0, 53, "no fence.proxy.async between an ordinary write"),
    (1, 53, "no fence.proxy.async between an ordinary write"),
    (0, 54, "read of uninitialised bytes on byte .* of a tensor"),
    (0, 55, "ends before its bulk copy has read"),
    (0, 56, "read-after-write race on byte .* of a tensor"),
    (0, 57, "no fence.proxy.async between an ordinary write and the async proxy on byte .* of a tensor"),
]


@pytest.mark.parametrize("boxes, bug, kind", ROW_FAULTS)
def test_fault_of_a_bulk_copy_is_found(program, boxes, bug, kind):
    with pytest.raises(Finding, match=kind) as found:
        rows(program, 128, 36, boxes, bug)
    assert "hopper.cu" in str(found.value)


# ---- a whole pipeline


@pytest.fixture(scope="module")
def attention():
    return Program("pipeline", [FIXTURES / "pipeline.cu"], [FIXTURES], arch="90a")


@functools.cache
def tensors(B, S, Sk, H, Hkv):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, h, 128).bfloat16() for n, h in ((S, H), (Sk, Hkv), (Sk, Hkv)))
    keys, values = (x.float().transpose(1, 2).repeat_interleave(H // Hkv, 1) for x in (k, v))
    out = torch.zeros(B, H, S, 128)
    for j in range(0, Sk, 64):
        scores = q.float().transpose(1, 2) @ keys[:, :, j : j + 64].transpose(2, 3)
        out = out / 2 + (scores * 0.0625).bfloat16().float() @ values[:, :, j : j + 64]
    return guarded(q), guarded(k), guarded(v), out.transpose(1, 2)


def pipeline(program, bug=0, B=1, S=128, Sk=320, H=2, Hkv=1):
    """How far the result is off, relative to the largest; bf16 has 8 bits."""
    q, k, v, want = tensors(B, S, Sk, H, Hkv)
    out = empty((B, S, H, 128), torch.bfloat16)
    program.call("fixture_pipeline", q, k, v, out, B, S, Sk, H, Hkv, ctypes.c_float(0.0625), bug)
    off = (out.float() - want).abs().max().item() / want.abs().max().item()
    return off if off == off else float("inf")


CLOSE = 2**-7
SHAPES = [{}, {"S": 64, "Sk": 64}, {"B": 2, "S": 200, "Sk": 333, "H": 4, "Hkv": 2}, {"Sk": 100}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"late": 0}, {"check": 0}, {"strict_warpgroup": 0}, {"strict_fence": 0}])
def test_correct_pipeline_has_no_finding(attention, shape, options):
    with contextlib.ExitStack() as stack:
        for name, value in options.items():
            stack.enter_context(option(name, value))
        assert pipeline(attention, **shape) < CLOSE


# Faults by number, and what says so; "" where only the result does.
PIPELINE_FAULTS = {
    1: r"read of sums before wgmma.wait_group.* against wgmma at",
    16: "read of sums before wgmma.wait_group",
    28: "read of sums before wgmma.wait_group",
    32: "read of sums before wgmma.wait_group",
    18: "write of a register that a wgmma under way reads",
    10: "first wgmma without a wgmma.fence",
    11: "written, or read as a sum, after the last wgmma.fence",
    2: "no fence.proxy.async between an ordinary write",
    34: "no fence.proxy.async between an ordinary write",
    12: "no fence.mbarrier_init",
    13: "without synchronisation with its initialisation",
    3: "whose descriptor says 64-byte swizzle",
    25: "bulk copy is still writing",
    8: "leads to byte .* twice",
    9: "leads to byte .* twice",
    17: "bulk copy is still writing",
    22: "no multiple of its swizzle pattern",
    4: r"deadlock: 256 threads .* 0 of 1 arrivals and 128 bytes due",
    5: "bulk copy is still writing",
    6: r"deadlock: 256 threads .* 1 of 1 arrivals and 0 bytes due",
    7: "bulk copy is still writing",
    14: "arrival at an mbarrier beyond its count",
    38: "arrival at an mbarrier beyond its count",
    15: "write-after-read race .* a copy for the mbarrier .* against wgmma of warpgroup",
    39: "write-after-read race .* a copy for the mbarrier .* against wgmma of warpgroup",
    33: "write-after-read race .* a copy for the mbarrier .* against wgmma of warpgroup",
    41: "read-after-write race .* wgmma of warpgroup .* against a copy for the mbarrier",
    29: "read-after-write race .* a bulk copy of thread",
    20: "ends before its bulk copy has read shared memory",
    19: "write-after-read race .* against wgmma of warpgroup",
    60: "write-after-read race .* a copy for the mbarrier .* against wgmma of warpgroup",
    27: "used with different counts",
    26: r"setmaxnreg.inc \(512 registers free, 2560 needed\)",
    40: "bulk copy is still writing .* a copy for the mbarrier .* against a copy for the mbarrier",
    24: "",
    31: "",
}


@pytest.mark.parametrize("bug", PIPELINE_FAULTS)
def test_fault_of_a_pipeline_is_found(attention, bug):
    if not PIPELINE_FAULTS[bug]:
        assert pipeline(attention, bug) > 0.5
        return
    with pytest.raises(Finding, match=PIPELINE_FAULTS[bug]) as found:
        pipeline(attention, bug)
    assert re.search(r"(hopper|pipeline)\.cuh?:\d+", str(found.value))


def test_barrier_with_an_arrival_too_many_is_found(attention):
    with pytest.raises(Finding, match="arrivals left in barrier"):
        pipeline(attention, 23, S=64, Sk=64)


@pytest.mark.parametrize("bug", [21, 30, 37, 42])
def test_what_looks_like_a_fault_and_is_none_has_no_finding(attention, bug):
    assert pipeline(attention, bug) < CLOSE


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("bug", [2, 34, 12, 13, 41, 20, 19])
def test_checks_find_what_no_result_shows(attention, bug, late):
    with option("check", 0), option("late", late):
        assert pipeline(attention, bug) < CLOSE


# ---- rules on which texts and practice differ: what is a finding by the strict reading, and none by the other


def strict_cases(program, attention):
    return {
        "strict_warpgroup": lambda: max(pipeline(attention, bug) for bug in (19, 60)) < CLOSE,
        "strict_fence": lambda: pipeline(attention, 34) < CLOSE,
        "init_fence": lambda: pipeline(attention, 12) < CLOSE,
        "war_fence": lambda: torch.equal(*tile(program, twice=1, bug=44)),
    }


@pytest.mark.parametrize("rule", ["strict_warpgroup", "strict_fence", "init_fence", "war_fence"])
def test_strict_rule_asks_for_its_fence(program, attention, rule):
    run = strict_cases(program, attention)[rule]
    with pytest.raises(Finding, match=r"race|no fence"):
        run()
    with option(rule, 0):
        assert run()


# ---- faults in a kernel as it is compiled

LEFT_OUT = [
    (r"^@?.*mbarrier\.init", "where none is initialised"),
    (r"^fence\.mbarrier_init", "no fence.mbarrier_init"),
    (r"mbarrier\.try_wait", "bulk copy is still writing|race|beyond its count"),
    (r"mbarrier\.arrive", "deadlock|race|bytes due"),
    (r"^cp\.async\.bulk\.tensor\S*mbarrier", "deadlock"),
    (r"^bar\.(sync|arrive)", "race|deadlock|arrivals left|synchronisation"),
    (r"^fence\.proxy", "no fence.proxy.async"),
    (r"^wgmma\.commit", "sums before|under way|race"),
    (r"^wgmma\.wait", "sums before|under way|race"),
    (r"^cp\.async\.bulk\.(commit|wait)", "ends before its bulk copy"),
    (r"^setmaxnreg\.dec", "registers free"),
]


@pytest.mark.parametrize("pattern, kind", LEFT_OUT)
def test_every_instruction_left_out_is_found(attention, pattern, kind):
    with launches() as seen:
        pipeline(attention)
    places = [s for s in entry(seen[0].kernel).statements if s.kind == "code" and re.search(pattern, s.text)]
    assert places
    silent = []
    for s in places:
        with planted(s.site, "skip") as times:
            try:
                off = pipeline(attention)
            except Finding as finding:
                assert re.search(kind, str(finding)), f"{s.text}: {finding}"
                continue
            if times():  # not code of another fault
                assert off < CLOSE
                silent.append(s.text)
    # Of the barriers one has the warpgroups take turns, which is for speed alone.
    assert len(silent) == ("bar" in pattern and "mbarrier" not in pattern), silent
