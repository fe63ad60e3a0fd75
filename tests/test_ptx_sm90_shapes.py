"""Compute capability 9.0 in the emulator: boxes of every rank, tensor maps' limits, widths of wgmma, rule by rule."""

import ctypes
import re

import pytest
import torch
from ptx_on_cpu import Finding, Program, empty, guarded, launches, missing, option, planted
from ptx_on_cpu.build import HERE
from ptx_on_cpu.program import entry

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}")

FIXTURES = HERE / "fixtures"
TYPES = {torch.uint8: 0, torch.int32: 3, torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


@pytest.fixture(scope="module")
def program():
    return Program("boxes", [FIXTURES / "boxes.cu"], [FIXTURES], arch="90a")


@pytest.fixture(autouse=True)
def hopper():
    with option("capability", 90):
        yield


def array(kind, values, length):
    return (kind * length)(*values, *[0] * (length - len(values)))


def layout(*tensors):
    """Sizes and strides in bytes of each tensor, innermost first, as tensor maps have them."""
    sizes, strides = [], []
    for t in tensors:
        sizes += [*reversed(t.shape), *[1] * (5 - t.dim())]
        strides += [*(s * t.element_size() for s in reversed(t.stride()[:-1])), *[0] * (5 - t.dim())]
    return array(ctypes.c_uint64, sizes, len(sizes)), array(ctypes.c_uint64, strides, len(strides))


def part(tensor, at, shape):
    """A box of a tensor, zeros beyond it; all outermost first."""
    box = torch.zeros(shape, dtype=tensor.dtype)
    inside = [slice(max(a, 0), min(a + n, size)) for a, n, size in zip(at, shape, tensor.shape, strict=True)]
    if all(s.start < s.stop for s in inside):
        box[tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, at, strict=True))] = tensor[tuple(inside)]
    return box


def put(tensor, at, box):
    """The tensor with the box at that place, as far as it is inside."""
    result = tensor.clone()
    inside = [slice(max(a, 0), min(a + n, size)) for a, n, size in zip(at, box.shape, tensor.shape, strict=True)]
    if all(s.start < s.stop for s in inside):
        result[tuple(inside)] = box[tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, at, strict=True))]
    return result


def move(program, x, y, shape, swizzle, start, to):
    flipped = [array(ctypes.c_int, list(reversed(v)), 5) for v in (start, to)]
    box = array(ctypes.c_uint32, list(reversed(shape)), 5)
    size = x.element_size()
    program.call("fixture_box", x, y, TYPES[x.dtype], size, x.dim(), *layout(x, y), box, swizzle, *flipped)


# Sizes, box, from, to; outermost first.
BOXES = [
    ((40,), (16,), (8,), (3,)),
    ((40,), (16,), (-5,), (31,)),
    ((9, 64), (4, 32), (2, 16), (7, 40)),
    ((9, 64), (4, 32), (-3, -8), (-1, -4)),
    ((9, 64), (4, 32), (6, 48), (20, 0)),
    ((3, 9, 64), (2, 4, 32), (2, 7, 40), (1, 1, 8)),
    ((2, 3, 9, 64), (1, 2, 4, 32), (1, 2, 7, 40), (0, -1, 3, 0)),
    ((2, 2, 3, 9, 64), (2, 1, 2, 4, 32), (1, 1, -1, 7, 40), (0, 1, 1, -2, 0)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("sizes, shape, start, to", BOXES)
def test_box_of_every_rank(program, dtype, sizes, shape, start, to):
    torch.manual_seed(0)
    x, y = (guarded(torch.randint(-99, 99, sizes).to(dtype)) for _ in "xy")
    want = put(y, to, part(x, start, shape))
    move(program, x, y, shape, 0, start, to)
    assert torch.equal(y, want)


@pytest.mark.parametrize("swizzle", [1, 2, 3])
def test_swizzled_box_comes_back_as_it_was(program, swizzle):
    columns = 8 << swizzle
    x, y = guarded(torch.randn(50, 128).half()), guarded(torch.zeros(50, 128).half())
    want = put(y, (3, 0), part(x, (17, 24), (40, columns)))
    move(program, x, y, (40, columns), swizzle, (17, 24), (3, 0))
    assert torch.equal(y, want)


def test_box_of_a_transposed_view_leaves_the_gaps_alone(program):
    """[B, S, H, D] as [B, H, S, D], of a view that is narrower than what it is a view of."""
    whole = guarded(torch.randn(2, 10, 3, 48))
    x, y = whole[..., :32].transpose(1, 2), empty((2, 3, 10, 32), torch.float32)
    move(program, x, y, (1, 1, 10, 32), 0, (1, 2, 0, 0), (1, 2, 0, 0))
    assert torch.equal(y[1, 2], x[1, 2])
    assert torch.isnan(y[0]).all() and torch.isnan(y[1, :2]).all()


# What the driver refuses (1), and what its stand-in does not do (801).
REFUSED = [
    (dict(), 0),
    (dict(offset=2), 1),
    (dict(rank=0), 1),
    (dict(rank=6), 1),
    (dict(sizes=(0, 8)), 1),
    (dict(strides=(40,)), 1),
    (dict(strides=(1 << 40,)), 1),
    (dict(box=(257, 8)), 1),
    (dict(box=(0, 8)), 1),
    (dict(box=(4, 8)), 1),
    (dict(swizzle=1), 1),
    (dict(box=(8, 8), swizzle=1), 801),
    (dict(type=13), 801),
]


@pytest.mark.parametrize("change, want", REFUSED)
def test_limits_of_tensor_maps(program, change, want):
    given = dict(offset=0, type=9, rank=2, sizes=(64, 8), strides=(128,), box=(32, 8), swizzle=0) | change
    x = torch.zeros(64 * 8 + 8, dtype=torch.bfloat16)
    at = ctypes.c_void_p(x.data_ptr() + given["offset"])
    sizes, strides = (array(ctypes.c_uint64, given[name], 5) for name in ("sizes", "strides"))
    box = array(ctypes.c_uint32, given["box"], 5)
    code = program.library.fixture_encode(at, given["type"], given["rank"], sizes, strides, box, given["swizzle"])
    assert code == want


@pytest.mark.parametrize("check", [0, 1])
def test_rounds_of_mbarriers(program, check):
    y = empty((64,), torch.float32)
    with option("check", check):
        program.call("fixture_rounds", y, 5)
    assert torch.equal(y, 5.0 * ((torch.arange(64) + 1) % 64) + 10)


@pytest.mark.parametrize("pattern", [r"mbarrier\.try_wait", r"mbarrier\.test_wait"])
def test_wait_left_out_is_found(program, pattern):
    with launches() as seen:
        program.call("fixture_rounds", empty((64,), torch.float32), 5)
    (place,) = [s for s in entry(seen[0].kernel).statements if s.kind == "code" and re.search(pattern, s.text)]
    with planted(place.site, "skip"), pytest.raises(Finding, match=r"race|uninitialised|beyond its count"):
        program.call("fixture_rounds", empty((64,), torch.float32), 5)


# ---- widths


def source(n, sign):
    """c[64, n] = ± a b^T by one warpgroup; both without a swizzle, written by threads; a from memory and registers."""
    sums = ", ".join(f"%{i}" for i in range(n // 2))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))
    head = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}"
    x = n // 2
    a = f"{{%{x}, %{x + 1}, %{x + 2}, %{x + 3}}}"
    registers = ", ".join(f'"r"(r[{i}])' for i in range(4))
    return f"""
__global__ void __launch_bounds__(128) width_{n}(const uint32_t* a, const uint32_t* b, float* c, int of_registers) {{
  __shared__ __align__(1024) uint32_t A[64 * 8], B[{n} * 8];
  const int tid = threadIdx.x, lane = tid % 32, row = tid / 32 * 16 + lane / 4;
  for (int i = tid; i < 64 * 8; i += 128) A[i / 64 * 64 + i % 8 / 4 * 32 + i / 8 % 8 * 4 + i % 4] = a[i];
  for (int i = tid; i < {n} * 8; i += 128) B[i / 64 * 64 + i % 8 / 4 * 32 + i / 8 % 8 * 4 + i % 4] = b[i];
  fence_proxy();
  __syncthreads();
  float d[{n // 2}];
  uint32_t r[4];
  for (int q = 0; q < 4; q++) r[q] = a[(row + q % 2 * 8) * 8 + q / 2 * 4 + lane % 4];
  const uint64_t x = describe(address(A), 128, 256, 0), y = describe(address(B), 128, 256, 0);
  hold(d);
  fence_products();
  if (of_registers)
    asm volatile("{head}, {a}, %{x + 4}, 0, {sign}, 1, 0;" : {operands} : {registers}, "l"(y));
  else
    asm volatile("{head}, %{x}, %{x + 1}, 0, {sign}, 1, 0, 0;" : {operands} : "l"(x), "l"(y));
  commit_products();
  wait_products<0>();
  hold(d);
#pragma unroll
  for (int i = 0; i < {n // 2}; i++)
    c[(row + i / 2 % 2 * 8) * {n} + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}}
extern "C" int launch_{n}(const uint32_t* a, const uint32_t* b, float* c, int of_registers) {{
  width_{n}<<<1, 128>>>(a, b, c, of_registers);
  return cudaGetLastError();
}}
"""


WIDTHS = {8: 1, 72: -1, 256: 1}


@pytest.fixture(scope="module")
def widths(tmp_path_factory):
    path = tmp_path_factory.mktemp("widths") / "widths.cu"
    path.write_text('#include "hopper.cuh"\n' + "".join(source(n, sign) for n, sign in WIDTHS.items()))
    return Program("widths", [path], [FIXTURES], arch="90a")


@pytest.mark.parametrize("of_registers", [0, 1])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("n", WIDTHS)
def test_wgmma_of_other_widths(widths, n, late, of_registers):
    torch.manual_seed(0)
    a, b = (guarded(torch.randint(-9, 9, (rows, 16)).bfloat16()) for rows in (64, n))
    c = empty((64, n), torch.float32)
    with option("late", late):
        widths.call(f"launch_{n}", a, b, c, of_registers)
    assert torch.equal(c, WIDTHS[n] * (a.float() @ b.float().T))


# ---- one mistake a rule


@pytest.fixture(scope="module")
def rules():
    return Program("rules", [FIXTURES / "rules.cu"], [FIXTURES], arch="90a")


def break_rule(program, bug):
    x, y, no_map = guarded(torch.zeros(128)), empty((256,), torch.float32), guarded(torch.zeros(64))
    program.call("fixture_rules", x, y, no_map, bug)


MISTAKES = {
    1: "mbarrier at an address that is no multiple of 8",
    2: "mbarrier out of bounds",
    3: "count outside 1..2",
    4: "initialisation of a live mbarrier",
    5: "bytes due",
    6: "access to an mbarrier on byte",
    7: "where none is initialised",
    8: "block ends while a bulk copy to shared memory is under way",
    9: "no multiple of 16",
    10: "no multiple of 16",
    11: "past the end of shared memory",
    12: "access out of bounds on global memory: a copy for the mbarrier",
    13: "what should be a tensor map is none",
    14: "of another rank",
    15: "no multiple of 128",
    16: "block ends while a bulk copy to shared memory is under way",
    17: "block ends with 16 bytes due",
    18: "no end of polling the mbarrier",
    19: "bulk copy is still writing",
    20: "differ within the warpgroup",
    21: "starts 128 bytes into its swizzle pattern",
    22: "past the end of shared memory",
    23: "base offset, which is not modelled",
    24: "differ within the warpgroup",
    25: "have committed different groups",
    26: "of another shape or order",
    27: "write of a register whose wgmma is under way at .*, against wgmma at",
    28: "read of sums before wgmma.wait_group",
    29: "ends without waiting for its wgmma",
    30: "some are under way and some are not",
    31: "write of a register that a wgmma under way reads at .*, against wgmma at",
    40: "setmaxnreg.dec to more",
    41: "setmaxnreg.inc to less",
    42: "have not run the same setmaxnreg",
    43: "barrier number outside",
    44: "no multiple of 32",
    45: "128 arrivals left in barrier 1",
    46: "wait in elect",
    47: "wait in wgmma",
}


@pytest.mark.parametrize("bug", MISTAKES)
def test_mistake_is_found(rules, bug):
    with pytest.raises(Finding, match=MISTAKES[bug]):
        break_rule(rules, bug)


@pytest.mark.parametrize("late", [0, 1])
def test_no_mistake_no_finding(rules, late):
    with option("late", late):
        break_rule(rules, 0)
