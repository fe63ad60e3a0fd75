"""The emulator's own tests: correct kernels run without a finding, and every planted fault is found and located."""

import ctypes
import re

import pytest
import torch
from ptx_on_cpu import Finding, Program, UnknownPtx, empty, guarded, launches, missing, option, planted, traffic
from ptx_on_cpu.build import HERE
from ptx_on_cpu.program import LAUNCH_FAILURE, entry, register, runtime
from ptx_on_cpu.ptx import parse
from ptx_on_cpu.translate import translate

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}")

SOURCE = HERE / "fixtures" / "bugs.cu"
ROWS, N, K = 3, 200, 96


@pytest.fixture(scope="module")
def program():
    return Program("bugs", [SOURCE])


def row_sum(program, bug):
    torch.manual_seed(0)
    x, y = guarded(torch.randn(ROWS, N)), empty((ROWS,), torch.float32)
    program.call("fixture_row_sum", bug, x, y, ROWS, N)
    return y, x.sum(1), x


def product(program, bug, rows=50):
    torch.manual_seed(0)
    a, b = guarded(torch.randn(rows, K).bfloat16()), guarded(torch.randn(64, K).bfloat16())
    c = empty((64, 64), torch.float32)
    program.call("fixture_product", bug, a, b, c, rows, K)
    return c[:rows], a.float() @ b.float().T, a


def exchange(program, bug):
    x, y = guarded(torch.randn(32)), empty((32,), torch.float32)
    program.call("fixture_exchange", bug, x, y)
    return y, x.view(16, 2).flip(1).flatten(), x


RUNS = {"row_sum": row_sum, "product": product, "exchange": exchange}


def lines_of(bug):
    """The lines of the source that a marker names for this fault."""
    marked = re.compile(rf"// bug (?:\d+, )*{bug}\b")
    return {number for number, line in enumerate(SOURCE.read_text().split("\n"), 1) if marked.search(line)}


@pytest.mark.parametrize("kernel", RUNS)
@pytest.mark.parametrize("check", [0, 1])
def test_correct_kernels_have_no_finding(program, kernel, check):
    with option("check", check):
        got, want, _ = RUNS[kernel](program, 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_counts(program):
    with launches() as seen:
        _, _, a = product(program, 0)
    assert len(seen) == 1
    launch = seen[0]
    assert launch.copied == launch.read == (50 + 64) * K * 2  # each tile once, tail rows not at all
    assert launch.written == launch.written_once == 64 * 64 * 4
    assert launch.mma_flops == 2 * 64 * 64 * K
    assert launch.ldmatrix_conflicts == 0  # rows of 80 bytes
    assert traffic(a) == (50 * K * 2, 0)


FAULTS = [
    ("row_sum", 1, "read of uninitialised bytes|read-after-write race"),
    ("row_sum", 2, "access out of bounds"),
    ("row_sum", 3, "divergent __syncthreads"),
    ("row_sum", 4, "another block of the launch writes"),
    ("row_sum", 5, "access out of bounds"),
    ("row_sum", 6, "deadlock"),
    ("row_sum", 7, "race|another block"),
    ("row_sum", 8, "write-after-write race"),
    ("row_sum", 9, "misaligned access"),
    ("row_sum", 10, "write-after-read race"),
    ("row_sum", 11, "read of uninitialised bytes on byte . of a tensor"),
    ("product", 17, "access out of bounds"),
    ("exchange", 22, "read of uninitialised bytes|read-after-write race"),
    ("exchange", 23, "access out of bounds"),
]


@pytest.mark.parametrize("kernel, bug, kind", FAULTS)
def test_fault_is_found_at_its_line(program, kernel, bug, kind):
    with pytest.raises(Finding, match=kind) as found:
        RUNS[kernel](program, bug)
    named = {int(n) for n in re.findall(r"bugs\.cu:(\d+)", str(found.value))}
    assert named & lines_of(bug), f"{found.value}; marked: {lines_of(bug)}"


PIPELINE = [
    (13, "cp.async has not been waited for"),
    (14, "cp.async has not been waited for|read-after-write race"),
    (15, "write-after-read race"),
    (16, "cp.async has not been waited for|ends without waiting"),
    (20, "returned CUDA error 1$"),
    (21, "ends without waiting for its cp.async|write-after-read race|not been waited for"),
]


@pytest.mark.parametrize("bug, kind", PIPELINE)
def test_pipeline_fault_is_found(program, bug, kind):
    with pytest.raises(Finding, match=kind) as found:
        product(program, bug)
    if bug != 20:  # the launch itself is refused
        assert "bugs.cu:" in str(found.value)


def test_swapped_operands_give_another_result(program):
    got, want, _ = product(program, 18)
    assert (got - want).abs().max() > 1


def sites(kernel, pattern):
    found = [s.site for s in entry(kernel).statements if s.kind == "code" and re.search(pattern, s.text)]
    assert found
    return found


FAULTY = [("bar.sync", "skip"), (r"cp\.async\.wait_group", "skip"), (r"cp\.async\.wait_group 1", "wait_one_less")]


@pytest.mark.parametrize("pattern, fault", FAULTY)
def test_every_planted_fault_is_found(program, pattern, fault):
    """Faults put into the running kernel, at each instruction of a kind in turn; no other is needed to be compiled."""
    with launches() as seen:
        product(program, 0)
    for site in sites(seen[0].kernel, pattern):
        with planted(site, fault), pytest.raises(Finding, match=r"race|waited|uninitialised"):
            product(program, 0)


@pytest.mark.parametrize("pattern, fault", [(r"^mma", "swap"), (r"^ldmatrix", "flip")])
def test_every_planted_mistake_shows_in_the_result(program, pattern, fault):
    with launches() as seen:
        product(program, 0)
    for site in sites(seen[0].kernel, pattern):
        with planted(site, fault):
            got, want, _ = product(program, 0)
        assert (got - want).abs().max() > 0.1


def test_guard_page_stops_a_run_without_checks(program):
    with option("check", 0), pytest.raises(Finding, match="unmapped"):
        x = guarded(torch.randn(1, 1024))
        program.call("fixture_row_sum", 2, x[:, :1023], empty((1,), torch.float32), 1, 1025)


def test_gaps_of_a_view_are_out_of_bounds(program):
    """A read past the rows of a view lies inside the tensor that the view is of."""
    x, y = guarded(torch.randn(2, 300)), empty((1,), torch.float32)
    with pytest.raises(Finding, match="access out of bounds"):
        program.call("fixture_row_sum", 0, x[:, :200], y, 1, 201)


def test_input_may_not_be_written(program):
    x, y = guarded(torch.randn(1, N)), empty((1,), torch.float32)
    program.call("fixture_row_sum", 0, x, y, 1, N)
    runtime().emu_forget()
    register(x, writable=False)
    register(y)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
    assert program.library.fixture_row_sum(7, *addresses, 1, N) == LAUNCH_FAILURE
    assert "write into an input" in runtime().emu_finding().decode()


@pytest.fixture(scope="module")
def products_of_bytes():
    return Program("bytes", [SOURCE.with_name("bytes.cu")])


def some_bytes(*shape):
    """Of the whole range, ends among them."""
    made = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.int8)
    made.view(-1)[:2] = torch.tensor([-128, 127], dtype=torch.int8)
    return guarded(made)


@pytest.mark.parametrize("k", [16, 32])
def test_products_of_bytes_add_to_the_sums(products_of_bytes, k):
    a, b, c = some_bytes(16, k), some_bytes(8, k).flip(0), torch.arange(16 * 8, dtype=torch.int32).view(16, 8)
    c[0, 0] = 2**31 - 1  # sums wrap around
    want = (a.long() @ b.long().T + c).to(torch.int32)
    b, got = guarded(b), guarded(c)
    with launches() as seen:
        products_of_bytes.call("fixture_bytes_product", k, a, b, got)
    assert torch.equal(got, want) and seen[0].mma_flops == 2 * 16 * 8 * k
    (site,) = sites(seen[0].kernel, r"^mma")
    with planted(site, "swap"):
        products_of_bytes.call("fixture_bytes_product", k, a, b, got.copy_(c))
    assert not torch.equal(got, want)


@pytest.mark.parametrize("has_sign", [False, True])
def test_dots_of_four_bytes(products_of_bytes, has_sign):
    a, b, c = some_bytes(32, 4), some_bytes(32, 4), torch.arange(32, dtype=torch.int32)
    kind = torch.int8 if has_sign else torch.uint8
    want = (a.view(kind).long() * b.view(kind).long()).sum(1) + c
    got = guarded(c)
    products_of_bytes.call("fixture_bytes_dots", has_sign, a, b, got)
    assert torch.equal(got.long(), want)


HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"


@pytest.mark.parametrize(
    "line", ["mapa.shared::cluster.u32 %r0, %r0, 0;", "add.sat.s32 %r0, %r0, %r0;", "mov.u32 %r0, %clock;", "call f;"]
)
def test_unknown_ptx_stops_with_its_text(line):
    text = f"{HEADER}.visible .entry k()\n{{\n.reg .b32 %r<2>;\n{line}\nret;\n}}\n"
    with pytest.raises(UnknownPtx, match=re.escape(line.split()[0].rstrip(";")) + "|%clock"):
        translate(parse(text), "k")
