"""Linear layers on codes in Triton: on a GPU, or without one in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels._dispatch import triton_interpreted
from mistral_kernels.testing import fill, quantised_case

INTERPRETED = triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else testing.DTYPES
SCHEMES = ("int8", "w8a8", "int4", "nf4")

pytestmark = [
    pytest.mark.skipif(
        mk.backends()["triton"] is not None, reason=f"Triton cannot run here: {mk.backends()['triton']}"
    ),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


def shapes(scheme):
    """Few rows and many, widths and depths around groups, blocks of codes and tiles."""
    for i, k in enumerate((1, 15, 16, 17, 33, 64, 127, 128, 130, 200, 515, 700)):
        group = (0, 32, 64, 128)[i % 4]
        yield quantised_case(scheme, (1 + i % 4,), k, 5 + i, group, bias=i % 2 == 0)
        yield quantised_case(scheme, (5 + 7 * (i % 3),), k, 60 + i, group, bias=i % 2 == 1)
        if scheme == "int4":
            for rows in (2, 9):
                yield quantised_case(scheme, (rows,), k, 9, (0, 128, 32, 64)[i % 4], asymmetric=True)
    yield quantised_case(scheme, (70,), 96, 70, 32)
    yield quantised_case(scheme, (2, 3, 2), 64, 3)
    for size in (1e2, 1e-6):
        for rows in (2, 20):
            yield quantised_case(scheme, (rows,), 300, 20, 64, size=size)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype, scheme):
    errors = []
    kinds = testing.KINDS if dtype != torch.float16 else testing.KINDS[:3]  # products of large ones are beyond it
    for i, case in enumerate(shapes(scheme)):
        errors += testing.parity(case, dtype, "triton", device=DEVICE, kind=kinds[i % len(kinds)])
    assert testing.pooled_max(errors) <= 1 and testing.pooled(errors) <= 1, errors


@pytest.mark.parametrize("rows", [1, 3, 6, 40])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_int8_activations_equal_the_reference(rows, group):
    """The sums are whole numbers: only their scaling rounds."""
    x, weight = fill((rows, 300), seed=rows).float().to(DEVICE), fill((21, 300), seed=1).to(DEVICE)
    q = mk.quantize_weight(weight, "w8a8", group)
    out, expected = (mk.linear_quantized(x, q, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layouts_change_nothing(scheme, rows):
    weight, x = fill((21, 70), seed=1).to(DEVICE), fill((rows, 2, 70)).half().to(DEVICE)
    q = mk.quantize_weight(weight, scheme, 32)
    expected = mk.linear_quantized(x, q, impl="triton")
    wide = torch.full((rows, 2, 90), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[..., 5:75] = x
    codes = torch.full((21, q.codes.shape[1] + 9), 77, dtype=q.codes.dtype, device=DEVICE)
    codes[:, 4:-5] = q.codes
    apart = mk.QuantizedWeight(scheme, codes[:, 4:-5], q.scale.T.contiguous().T, None, 32, 70)
    for inputs in (wide[..., 5:75], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        for weight in (q, apart):
            got = mk.linear_quantized(inputs, weight, impl="triton")
            assert got.is_contiguous() and torch.equal(got, expected)
    row = x[0, :1].expand(6, 70)
    assert torch.equal(mk.linear_quantized(row, q, impl="triton"), mk.linear_quantized(row.clone(), q, impl="triton"))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_row(scheme, rows):
    q = mk.quantize_weight(fill((9, 200), seed=1).to(DEVICE), scheme, 64)
    x = torch.ones(rows, 200, device=DEVICE)
    x[0, 150], x[1, 3], x[3] = torch.nan, torch.inf, 0
    out = mk.linear_quantized(x, q, impl="triton")
    assert out[0].isnan().all() and not out[1].isfinite().any() and out[2].isfinite().all() and not out[3].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_of_x(scheme):
    q = mk.quantize_weight(fill((24, 70), seed=1).float().to(DEVICE), scheme)
    x = fill((5, 70)).float().to(DEVICE).requires_grad_()
    dy = fill((5, 24), seed=4).float().to(DEVICE)
    (dx,) = torch.autograd.grad(mk.linear_quantized(x, q, impl="triton"), x, dy)
    torch.testing.assert_close(dx, dy @ q.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty(scheme):
    q = mk.quantize_weight(fill((3, 40)).to(DEVICE), scheme)
    assert mk.linear_quantized(torch.empty(0, 40, device=DEVICE), q, impl="triton").shape == (0, 3)
    none = mk.quantize_weight(torch.empty(0, 40, device=DEVICE), scheme)
    assert mk.linear_quantized(torch.ones(2, 40, device=DEVICE), none, impl="triton").shape == (2, 0)
    narrow, bias = mk.quantize_weight(torch.empty(3, 0, device=DEVICE), scheme), torch.arange(3.0, device=DEVICE)
    out = mk.linear_quantized(torch.empty(2, 0, device=DEVICE), narrow, bias, impl="triton")
    assert torch.equal(out, bias.expand(2, 3))


def test_rows_too_long_for_int32_are_refused():
    x, codes = (
        torch.ones(1, (1 << 17) + 1, device=DEVICE),
        torch.ones(1, (1 << 17) + 1, dtype=torch.int8, device=DEVICE),
    )
    with pytest.raises(NotImplementedError, match="its sums of int8 products hold 131072 elements"):
        mk.linear_int8(x, codes, torch.ones(1, device=DEVICE), activations="int8", impl="triton")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme):
    q = mk.quantize_weight(fill((24, 64)).float().to(DEVICE), scheme)
    op = getattr(torch.ops.mistral_kernels, f"linear_{scheme}_triton").default
    middle = (q.offset,) if scheme == "int4" else ()
    x = fill((3, 64)).float().to(DEVICE).requires_grad_()
    torch.library.opcheck(op, (x, q.codes, q.scale, *middle, None, q.group))
