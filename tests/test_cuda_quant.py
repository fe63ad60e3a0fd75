"""Linear layers on codes in CUDA C++: on a GPU, or without one run from their own PTX with every access checked."""

import itertools
import re

import pytest
import torch
from ptx_on_cpu import launches, planted, traffic
from ptx_on_cpu.program import entry

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill, quantised_case

pytestmark = pytest.mark.usefixtures("cuda_ops", "one_thread")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
SCHEMES = ("int8", "w8a8", "int4", "nf4")
emulated = pytest.mark.skipif(GPU, reason="what is counted and planted is in runs without a GPU")


def quantised(scheme, n, k, group=0, asymmetric=False):
    weight = fill((n, k), seed=1)
    q = mk.quantize_weight(weight, scheme, group, asymmetric)
    offset = None if q.offset is None else q.offset.to(DEVICE)
    return mk.QuantizedWeight(scheme, q.codes.to(DEVICE), q.scale.to(DEVICE), offset, group, k)


def run(x, q, bias=None, impl="cuda"):
    return mk.linear_quantized(x, q, bias, impl=impl)


def judge(cases, dtype):
    kinds = testing.KINDS if dtype != torch.float16 else testing.KINDS[:3]  # products of large ones are beyond it
    errors = []
    for case, kind in zip(cases, itertools.cycle(kinds)):
        found = testing.parity(case, dtype, "cuda", device=DEVICE, kind=kind)
        assert testing.pooled_max(found) <= 1, (case.label, kind, found)
        errors += found
    assert testing.pooled(errors) <= 1, testing.pooled(errors)


def shapes(scheme):
    """Few rows, 16 and more; depths and widths around groups, chunks and tiles."""
    for i, rows in enumerate((1, 3, 9, 20)):
        case = (0, 32, 64, 128)[i]
        yield quantised_case(scheme, (rows,), (576, 130, 300, 200)[i], (17, 8, 33, 66)[i], case, bias=i % 2 == 0)
        yield quantised_case(scheme, (rows,), (515, 64, 33, 515)[i], (6, 5, 70, 7)[i], (128, 0, 32, 64)[i])
        if scheme == "int4":
            yield quantised_case(scheme, (rows,), 200, (9, 10, 40, 5)[i], 64, asymmetric=True, bias=i % 2 == 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype, scheme):
    judge(shapes(scheme), dtype)


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_that_nearly_cancel(dtype, rows):
    """Of a ramp the products with the codes, and those with the offset, are far larger than their sum."""
    case = quantised_case("int4", (rows,), 64, 9, 64, asymmetric=True, bias=True)
    found = testing.parity(case, dtype, "cuda", device=DEVICE, kind="ramp")
    assert testing.pooled_max(found) <= 1 and testing.pooled(found) <= 1, found


def long_shapes(scheme):
    for i, k in enumerate((1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 200, 515, 700, 1023, 4097)):
        for rows in (1, 2, 4, 5, 16, 17, 64, 65, 130)[i % 3 :: 3]:
            asymmetric = scheme == "int4" and i % 2 == 0
            group = (0, 32, 64, 128)[(i + rows) % 4]
            yield quantised_case(scheme, (rows,), k, (1, 5, 31, 66, 129, 140)[i % 6], group, asymmetric, i % 4 == 0)
    for size, rows in itertools.product((1e2, 1e-6), (2, 16, 20)):
        yield quantised_case(scheme, (rows,), 300, 20, 64, size=size)
    yield quantised_case(scheme, (2, 3, 2), 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_of_many_shapes(dtype, scheme):
    judge(long_shapes(scheme), dtype)


@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_int8_activations_equal_the_reference(rows, group):
    """The sums are whole numbers: only their scaling rounds."""
    x, q = fill((rows, 300), seed=rows).float().to(DEVICE), quantised("w8a8", 21, 300, group)
    torch.testing.assert_close(run(x, q), run(x, q, impl="reference"), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 9])
def test_sums_of_extreme_codes_are_exact(rows):
    """Products of -128 with 127 along a row as long as an int32 holds."""
    k = 1 << 17
    codes = torch.full((3, k), -128, dtype=torch.int8, device=DEVICE)
    codes[1] = 127
    out = mk.linear_int8(torch.ones(rows, k, device=DEVICE), codes, torch.ones(3, device=DEVICE), None, None, "int8",
                         impl="cuda")  # fmt: skip
    expected = torch.tensor([-128.0, 127.0, -128.0], device=DEVICE) * k
    torch.testing.assert_close(out, expected.expand(rows, 3), rtol=2e-7, atol=0)


@pytest.mark.parametrize("rows", [2, 10])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts_change_nothing(dtype, scheme, rows):
    k = 80
    q, x = quantised(scheme, 21, k, 32), fill((rows, 2, k)).to(DEVICE, dtype)
    expected = run(x, q)
    wide = torch.full((rows, 2, k + 20), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[..., 5 : k + 5] = x
    codes = torch.full((21, q.codes.shape[1] + 9), 77, dtype=q.codes.dtype, device=DEVICE)
    codes[:, 4:-5] = q.codes
    apart = mk.QuantizedWeight(scheme, codes[:, 4:-5], q.scale.T.contiguous().T, None, 32, k)
    turned = mk.QuantizedWeight(scheme, q.codes.T.contiguous().T, q.scale, None, 32, k)
    strided = (wide[..., 5 : k + 5], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT)
    for inputs, weight in itertools.chain(itertools.product(strided, (q, apart)), [(x, apart), (x, turned)]):
        got = run(inputs, weight)
        assert got.is_contiguous() and torch.equal(got, expected)
    row = x[0, :1].expand(6, k)
    assert torch.equal(run(row, q), run(row.clone(), q))


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_rows_of_an_odd_length_that_start_aligned(scheme):
    q, x = quantised(scheme, 9, 39), fill((9, 39)).to(DEVICE, torch.float16)
    codes = torch.full((9, 48), 77, dtype=torch.int8, device=DEVICE)
    codes[:, :39] = q.codes
    padded = mk.QuantizedWeight(scheme, codes[:, :39], q.scale, None, 0, 39)
    assert torch.equal(run(x, padded), run(x, q))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_row(scheme, rows):
    q, x = quantised(scheme, 9, 200, 64), torch.ones(rows, 200, device=DEVICE, dtype=torch.bfloat16)
    x[0, 150], x[1, 3], x[3] = torch.nan, torch.inf, 0
    out = run(x, q)
    assert out[0].isnan().all() and not out[1].isfinite().any() and out[2].isfinite().all() and not out[3].any()


def test_what_lies_past_the_last_element_is_not_looked_at():
    for scheme, rows in itertools.product(("int4", "nf4"), (2, 9)):
        q, x = quantised(scheme, 5, 41), fill((rows, 41)).to(DEVICE, torch.float16)
        other = q.codes.clone()
        other[:, 16 + 9 :] ^= 255  # elements 57 to 63
        other[:, 16 : 16 + 9] ^= 240  # and 48 to 56
        assert not torch.equal(other, q.codes)
        changed = mk.QuantizedWeight(scheme, other, q.scale, None, 0, 41)
        assert torch.equal(run(x, changed), run(x, q))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty(scheme):
    q = quantised(scheme, 3, 40)
    assert run(torch.empty(0, 40, device=DEVICE), q).shape == (0, 3)
    none = mk.quantize_weight(torch.empty(0, 40, device=DEVICE), scheme)
    assert run(torch.ones(2, 40, device=DEVICE), none).shape == (2, 0)
    narrow, bias = mk.quantize_weight(torch.empty(3, 0, device=DEVICE), scheme), torch.arange(3.0, device=DEVICE)
    for rows in (2, 9):
        assert torch.equal(run(torch.empty(rows, 0, device=DEVICE), narrow, bias), bias.expand(rows, 3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_of_x_and_bias(scheme):
    q, x = quantised(scheme, 24, 70), fill((5, 70)).float().to(DEVICE).requires_grad_()
    bias, dy = torch.zeros(24, device=DEVICE, requires_grad=True), fill((5, 24), seed=4).float().to(DEVICE)
    dx, dbias = torch.autograd.grad(run(x, q, bias), (x, bias), dy)
    torch.testing.assert_close(dx, dy @ q.dequantize())
    torch.testing.assert_close(dbias, dy.sum(0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme):
    q = quantised(scheme, 24, 64)
    op = getattr(torch.ops.mistral_kernels, f"linear_{scheme}_cuda").default
    middle = (q.offset,) if scheme == "int4" else ()
    x = fill((3, 64)).float().to(DEVICE).requires_grad_()
    torch.library.opcheck(op, (x, q.codes, q.scale, *middle, None, q.group))


def test_what_cannot_run_says_why():
    x = torch.ones(1, (1 << 17) + 1, device=DEVICE)
    codes, scale = torch.ones(x.shape, dtype=torch.int8, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(NotImplementedError, match="its sums of int8 products hold 131072 elements"):
        mk.linear_int8(x, codes, scale, activations="int8", impl="cuda")
    with pytest.raises(NotImplementedError, match="no float64"):
        mk.linear_int8(x.double(), codes, scale, impl="cuda")


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@emulated
@pytest.mark.parametrize("scheme, asymmetric", [(s, False) for s in SCHEMES] + [("int4", True)])
def test_few_rows_read_each_code_once(scheme, asymmetric):
    q, x = quantised(scheme, 32, 1024, 128, asymmetric), fill((2, 1024)).bfloat16()
    with launches() as found:
        y = run(x, q)
    assert traffic(q.codes) == (size(q.codes), 0)
    last = found[-1]
    assert len(found) == (2 if scheme == "w8a8" else 1) and last.written == size(y)
    assert last.read_once <= 1.02 * (size(q.codes, q.scale, q.offset) + size(x))


@emulated
@pytest.mark.parametrize("rows, tiles", [(16, 1), (64, 1), (65, 2), (130, 3)])
@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
def test_tiles_read_codes_once_for_each_64_rows(scheme, rows, tiles):
    q, x = quantised(scheme, 128, 256), fill((rows, 256)).bfloat16()
    with launches() as found:
        y = run(x, q)
    assert traffic(q.codes) == (tiles * size(q.codes), 0)
    last, columns = found[-1], 64 if rows <= 16 else 128
    assert last.written == last.written_once == size(y)
    assert last.ldmatrix_conflicts == 0
    assert last.mma_flops == 2 * (16 if rows <= 16 else 64 * tiles) * 128 * 256
    x_bytes = rows * 256 * (1 if scheme == "w8a8" else 2) * (128 // columns)
    assert last.copied == x_bytes + tiles * size(q.codes)
    assert traffic(x)[0] == (2 * size(x) if scheme == "w8a8" else x_bytes)


def faults(kernel):
    """Every barrier, wait and commit to leave out, and a few products whose operands to exchange."""
    statements = [s for s in entry(kernel).statements if s.kind == "code"]
    products = [s for s in statements if s.text.startswith("mma.")]
    for s in statements:
        if re.match(r"bar\.sync|cp\.async\.(commit|wait)_group", s.text):
            yield s, "skip", r"(race|waited|waiting|uninitialised).* at \w+\.cuh?:\d+"
    for s in products[:: max(1, len(products) // 3)]:
        yield s, "swap", "another result"


FAULTY = [("w8a8", 9, torch.bfloat16), ("w8a8", 20, torch.bfloat16), ("int4", 9, torch.float16)]
FAULTY += [("nf4", 20, torch.bfloat16), ("nf4", 9, torch.float32), ("nf4", 2, torch.float32)]


@emulated
@pytest.mark.parametrize("scheme, rows, dtype", FAULTY)
def test_every_fault_is_found(scheme, rows, dtype):
    """What is left out is a finding; exchanged operands show in the result."""
    q, x = quantised(scheme, 9, 520, 64), fill((rows, 520)).to(dtype)
    with launches() as found:
        right = run(x, q)
    met = 0
    for kernel in {launch.kernel for launch in found}:
        for place, fault, expected in faults(kernel):
            with planted(place.site, fault, kernel) as times:
                try:
                    said = "" if torch.equal(run(x, q), right) else "another result"
                except RuntimeError as finding:
                    said = str(finding)
                met += times() > 0
            assert re.search(expected, said) or not times(), f"{place.text} in {kernel}: {said!r}"
    assert met >= (1 if rows == 2 else 3)
