"""The C++ kernels of linear layers on codes, on every instruction set that this processor has."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill, quantised_case

SCHEMES = ("int8", "w8a8", "int4", "nf4")

pytestmark = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


def shapes(scheme):
    """Rows around what one pass takes, and widths and depths around pieces, groups, blocks and tiles."""
    for rows in (1, 2, 3, 7, 15, 16, 17, 24, 25, 40, 48, 49):
        yield quantised_case(scheme, (rows,), 200, 24 + rows, (0, 32, 64, 128)[rows % 4], bias=rows % 3 == 0)
    for i, k in enumerate((1, 2, 15, 16, 17, 31, 33, 63, 65, 96, 127, 129, 160, 191, 257, 1023, 1025, 4097, 9000)):
        yield quantised_case(scheme, (1 + k % 5,), k, 19, (0, 32, 64, 128)[i % 4])
        yield quantised_case(scheme, (1,), k, 5, (32, 64, 128, 0)[i % 4], asymmetric=scheme == "int4")
    for n in (1, 2, 7, 8, 9, 15, 17):
        yield quantised_case(scheme, (2, 2), 96, n, 32, bias=True)
    for size in (1e2, 1e-6):
        yield quantised_case(scheme, (2,), 300, 20, 64, size=size)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_parity(tier, dtype, scheme):
    errors = []
    kinds = testing.KINDS if dtype != torch.float16 else testing.KINDS[:3]  # products of large ones are beyond it
    for i, case in enumerate(shapes(scheme)):
        errors += testing.parity(case, dtype, "cpu", kind=kinds[i % len(kinds)])
    assert testing.pooled_max(errors) <= 1 and testing.pooled(errors) <= 1, errors


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_x_in_int16_costs_no_accuracy(tier, dtype, scheme):
    """Against the product with the exact weight the error is that of rounding the result, and little more."""
    x, q = fill((8, 4096)).to(dtype), mk.quantize_weight(fill((512, 4096), seed=1), scheme, 128)
    truth = x.double() @ q.dequantize(torch.float64).T
    out, ideal = mk.linear_quantized(x, q, impl="cpu").double(), truth.to(dtype).double()
    assert (out - truth).square().mean().sqrt() < 1.02 * (ideal - truth).square().mean().sqrt()


def test_int8_activations_equal_the_reference(tier):
    """The sums are whole numbers: only their scaling rounds."""
    for group in (0, 32, 128):
        for rows, n, k in ((1, 21, 700), (7, 21, 700), (31, 21, 700), (32, 65, 1), (100, 150, 703), (385, 21, 515)):
            x, q = fill((rows, k), seed=rows).float(), mk.quantize_weight(fill((n, k), seed=1), "w8a8", group)
            out, expected = (mk.linear_quantized(x, q, impl=impl) for impl in ("cpu", "reference"))
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_of_many_rows_are_those_of_each(tier, dtype):
    """Blocks of many rows multiply a packed weight, few take it as it lies; the sums are whole numbers either way."""
    for group in (0, 64):
        x, q = fill((290, 900)).to(dtype), mk.quantize_weight(fill((70, 900), seed=1), "w8a8", group)
        x[5], x[7, 3] = 0, torch.nan
        bias = fill((70,), seed=2).to(dtype)
        few = torch.cat([mk.linear_quantized(part, q, bias, impl="cpu") for part in x.split(20)])
        assert torch.equal(mk.linear_quantized(x, q, bias, impl="cpu").view(torch.int16), few.view(torch.int16))


def test_extreme_codes(tier):
    """Products of 127 and of -128, which no scheme makes but a checkpoint may hold, along a row that could overflow."""
    k = 70_000
    x = torch.ones(50, k)
    codes = torch.full((9, k), -128, dtype=torch.int8)
    codes[4] = 127
    scale = torch.full((9,), 1 / 128)
    out, few = (mk.linear_int8(rows, codes, scale, activations="int8", impl="cpu") for rows in (x, x[:2]))
    assert torch.equal(out[:2], few)
    expected = torch.full((50, 9), -float(k))
    expected[:, 4] = k * 127 / 128
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    few = mk.linear_int8(x[:2].bfloat16(), codes, torch.full((9,), 1 / 128), impl="cpu")
    torch.testing.assert_close(few.float(), expected[:2], rtol=1e-2, atol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nan_stays_in_its_row_of_many(tier, scheme, dtype):
    q, x = mk.quantize_weight(fill((33, 256), seed=1), scheme, 128), torch.ones(40, 256).to(dtype)
    x[7, 150] = torch.nan
    finite = mk.linear_quantized(x, q, impl="cpu").isfinite()
    assert not finite[7].any() and finite[:7].all() and finite[8:].all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float64_equals_eager(tier, scheme):
    for case in (quantised_case(scheme, (2, 3), 200, 9, 64, bias=True), quantised_case(scheme, (20,), 33, 5)):
        arguments = case.arguments(torch.float64)
        out, expected = (testing.call(case.op, arguments, impl)["out0"] for impl in ("cpu", "reference"))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [3, 20])
def test_layouts_change_nothing(tier, scheme, rows):
    q, x = mk.quantize_weight(fill((21, 70), seed=1), scheme, 32), fill((rows, 2, 70)).bfloat16()
    expected = mk.linear_quantized(x, q, impl="cpu")
    wide = torch.full((rows, 2, 90), torch.nan, dtype=x.dtype)
    wide[..., 5:75] = x
    codes = torch.full((21, q.codes.shape[1] + 9), 77, dtype=q.codes.dtype)
    codes[:, 4:-5] = q.codes
    apart = mk.QuantizedWeight(scheme, codes[:, 4:-5], q.scale.T.contiguous().T, None, 32, 70)
    for inputs in (wide[..., 5:75], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        for weight in (q, apart):
            got = mk.linear_quantized(inputs, weight, impl="cpu")
            assert got.is_contiguous() and torch.equal(got, expected)
    row = x[0, :1].expand(6, 70)
    assert torch.equal(mk.linear_quantized(row, q), mk.linear_quantized(row.contiguous(), q))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", [None, 0, 32, 64])
def test_rows_and_threads_change_nothing(tier, scheme, group):
    x = fill((16, 3000)).bfloat16()
    q = mk.quantize_weight(fill((100, 3000), seed=1), scheme, group, asymmetric=scheme == "int4" and group == 32)
    whole = mk.linear_quantized(x, q, impl="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = torch.cat([mk.linear_quantized(x[i : i + 1], q, impl="cpu") for i in range(16)])
    torch.set_num_threads(before)
    assert torch.equal(whole, alone)
    for rows in (2, 3, 5, 11):
        assert torch.equal(mk.linear_quantized(x[:rows], q, impl="cpu"), whole[:rows])


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nan_stays_in_its_row_and_tiny_values_count(tier, scheme, dtype):
    q, x = mk.quantize_weight(fill((9, 200), seed=1), scheme, 64), torch.ones(4, 200).to(dtype)
    x[0, 150], x[1, 3] = torch.nan, torch.inf
    x[3] = 1e-36 if dtype != torch.float16 else 1e-7
    out = mk.linear_quantized(x, q, impl="cpu")
    assert out[0].isnan().all() and not out[1].isfinite().any() and out[2].isfinite().all()
    expected = x[3].double() @ q.dequantize(torch.float64).T
    torch.testing.assert_close(out[3].double(), expected, rtol=1e-2, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("scheme, asymmetric", [("int8", False), ("int4", False), ("int4", True), ("nf4", False)])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_strange_scales_stay_in_their_outputs(tier, scheme, asymmetric, rows):
    """Rows lie side by side in memory, and a vector may load those of the next one."""
    for n, k, group in ((19, 96, 32), (40, 130, 64), (17, 500, 128), (33, 500, 0)):
        x, q = fill((rows, k)).bfloat16(), mk.quantize_weight(fill((n, k), seed=1), scheme, group, asymmetric)
        expected = mk.linear_quantized(x, q, impl="cpu")
        q.scale[3], q.scale[16] = torch.nan, torch.inf
        out = mk.linear_quantized(x, q, impl="cpu")
        strange = torch.zeros(n, dtype=torch.bool)
        strange[[3, 16]] = True
        assert torch.equal(out[:, ~strange], expected[:, ~strange]) and not out[:, strange].isfinite().any()


@pytest.mark.parametrize("scheme, asymmetric", [("int8", False), ("int4", False), ("int4", True), ("nf4", False)])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nothing_is_read_past_the_ends(tier, dtype, scheme, asymmetric):
    """The last page of memory before one that nobody may read."""
    shapes = ((1, 19, 33, 32), (3, 16, 64, 64), (16, 5, 100, 32), (7, 1, 31, 0), (2, 40, 1, 0), (1, 33, 1000, 128))
    for rows, n, k, group in (*shapes, (5, 32, 576, 64), (1, 16, 200, 32)):
        x, q = fill((rows, k)).to(dtype), mk.quantize_weight(fill((n, k), seed=1), scheme, group, asymmetric)
        expected = mk.linear_quantized(x, q, impl="cpu")
        parts = (testing.at_an_end(t) if t is not None else None for t in (q.codes, q.scale, q.offset))
        apart = mk.QuantizedWeight(scheme, *parts, q.group, k)
        assert torch.equal(mk.linear_quantized(testing.at_an_end(x), apart, impl="cpu"), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_stay_as_they_are(scheme):
    x, q = fill((5, 200)).bfloat16(), mk.quantize_weight(fill((9, 200), seed=1), scheme)
    before = x.clone(), q.codes.clone(), q.scale.clone()
    first, second = (mk.linear_quantized(x, q) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, q.codes, q.scale), strict=True))
