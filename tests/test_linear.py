"""The linear layer: the C++ kernels of few rows on every instruction set, and what the public function promises."""

import pytest
import torch
from torch.nn import functional

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill, linear_case

compiled = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


def shapes():
    """Every number of rows up to those that torch takes, and widths and depths around vectors, groups and blocks."""
    for rows in range(1, 18):
        yield linear_case((rows,), 200, 24 + rows, bias=rows % 3 == 0)
    for k in (1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 1023, 1025, 2049, 4097, 9000, 33_001):
        yield linear_case((1 + k % 5,), k, 19)
    for n in (1, 2, 7, 8, 9, 15, 17, 32, 33):
        yield linear_case((2, 2), 96, n, bias=True)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_parity(tier, dtype):
    errors = []
    for i, case in enumerate(shapes()):
        kind = testing.KINDS[i % len(testing.KINDS)]
        errors += testing.parity(case, dtype, "cpu", kind=kind)
    assert testing.pooled_max(errors) <= 1 and testing.pooled(errors) <= 1, errors


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows(tier, dtype):
    """Blocks of the weight, with a rest, and layouts, where 16 bits are widened; else torch's product."""
    errors = testing.parity(linear_case((3, 9), 70000, 100, bias=True), dtype, "cpu")
    assert testing.pooled_max(errors) <= 1 and testing.pooled(errors) <= 1, errors
    x, w, b = (fill(s, seed=i).to(dtype) for i, s in enumerate(((4, 10, 70), (21, 70), (21,))))
    expected = mk.linear(x, w, b, impl="cpu")
    layouts = (x.transpose(0, 1).contiguous().transpose(0, 1), w.T.contiguous().T, torch.stack((b, b), -1)[:, 0])
    got = mk.linear(*layouts, impl="cpu")
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)  # torch's product may sum in another order
    with torch.inference_mode():
        assert torch.equal(mk.linear(x, w, b), expected)


@compiled
def test_float64_is_torch(tier):
    for rows in (1, 20):
        x, w, b = fill((rows, 70)), fill((9, 70), seed=1), fill((9,), seed=2)
        assert torch.equal(mk.linear(x, w, b, impl="cpu"), functional.linear(x, w, b))


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_layouts_change_nothing(tier, dtype):
    x, w, b = (fill(s, seed=i).to(dtype) for i, s in enumerate(((3, 4, 70), (21, 70), (21,))))
    expected = mk.linear(x, w, b, impl="cpu")
    wide_x, wide_w = torch.full((3, 4, 90), torch.nan, dtype=dtype), torch.full((21, 80), torch.nan, dtype=dtype)
    wide_x[..., 5:75], wide_w[:, 8:78] = x, w
    layouts = (wide_x[..., 5:75], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT)
    for inputs in layouts:
        for weight in (w, wide_w[:, 8:78]):
            got = mk.linear(inputs, weight, torch.stack((b, b), -1)[:, 0], impl="cpu")
            assert got.is_contiguous() and torch.equal(got, expected)
    transposed = mk.linear(x, w.T.contiguous().T, b, impl="cpu")
    torch.testing.assert_close(transposed, expected)
    row = x[0, :1].expand(6, 70)
    assert torch.equal(mk.linear(row, w, b, impl="cpu"), mk.linear(row.contiguous(), w, b, impl="cpu"))


@compiled
def test_rows_and_threads_change_nothing(tier):
    for k in (5000, 33_001):
        x, w = fill((16, k)).bfloat16(), fill((100, k), seed=1).bfloat16()
        whole = mk.linear(x, w, impl="cpu")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = torch.cat([mk.linear(x[i : i + 1], w, impl="cpu") for i in range(16)])
        torch.set_num_threads(before)
        assert torch.equal(whole, alone)
        for rows in range(2, 16):
            assert torch.equal(mk.linear(x[:rows], w, impl="cpu"), alone[:rows])


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("k", [33, 64, 191])
def test_nan_stays_where_it_belongs(tier, dtype, k):
    for rows in (2, 5, 16):
        x, w = torch.ones(rows, k, dtype=dtype), torch.ones(37, k, dtype=dtype)
        x[0, k - 1], w[4, 0], w[33, k - 1], w[36, 0] = torch.nan, torch.inf, torch.nan, -torch.inf
        expected = torch.full((rows, 37), float(k), dtype=dtype)
        expected[:, 4], expected[:, 33], expected[:, 36], expected[0] = torch.inf, torch.nan, -torch.inf, torch.nan
        torch.testing.assert_close(mk.linear(x, w, impl="cpu"), expected, equal_nan=True, rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nothing_is_read_past_the_ends(tier, dtype):
    """The last page of memory before one that nobody may read."""
    for rows, n, k in ((1, 19, 33), (3, 16, 64), (16, 5, 100), (7, 1, 31), (2, 40, 1)):
        x, w = fill((rows, k)).to(dtype), fill((n, k), seed=1).to(dtype)
        expected = mk.linear(x, w, impl="cpu")
        assert torch.equal(mk.linear(testing.at_an_end(x), testing.at_an_end(w), impl="cpu"), expected)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty(impl):
    assert mk.linear(torch.empty(0, 8), torch.ones(3, 8), impl=impl).shape == (0, 3)
    assert mk.linear(torch.ones(2, 8), torch.ones(0, 8), impl=impl).shape == (2, 0)
    bias = torch.arange(3.0)
    assert torch.equal(mk.linear(torch.ones(2, 0), torch.ones(3, 0), bias, impl=impl), bias.expand(2, 3))


@pytest.mark.parametrize("rows", [2, 20])
def test_gradients(rows):
    x, w, b = (fill(s, seed=i).requires_grad_() for i, s in enumerate(((rows, 6), (4, 6), (4,))))
    assert torch.autograd.gradcheck(mk.linear, (x, w, b))
    few = [t.detach().float().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(functional.linear(*few).square().sum(), few)
    got = torch.autograd.grad(mk.linear(*few).square().sum(), few)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e)
    frozen = mk.linear(few[0], few[1].detach())
    assert torch.autograd.grad(frozen.sum(), few[0])[0].shape == (rows, 6)


def test_autocast_is_torchs():
    x, w = torch.ones(2, 8), torch.ones(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.linear(x, w).dtype == torch.bfloat16


def test_compiled_with_any_number_of_rows():
    w = fill((5, 8)).float()
    run = torch.compile(lambda x: mk.linear(x, w), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 15, 40):
        x = fill((rows, 8)).float()
        torch.testing.assert_close(run(x), functional.linear(x, w))


X, W = torch.ones(2, 8), torch.ones(3, 8)
BAD = {
    "x": (lambda: mk.linear([1.0], W), TypeError, "x must be a tensor, not list"),
    "weight": (lambda: mk.linear(X, W[0]), ValueError, r"weight is \[8\]; it must be \[N, K\]"),
    "inner": (lambda: mk.linear(X[:, :4], W), ValueError, r"x is \[2, 4\]; with weight \[3, 8\] it must be \[..., 8\]"),
    "bias": (lambda: mk.linear(X, W, torch.ones(2)), ValueError, r"bias is \[2\]; .* it must be \[3\]"),
    "dtype": (lambda: mk.linear(X, W.double()), TypeError, "weight is torch.float64 but x is torch.float32"),
    "triton": (lambda: mk.linear(X, W, impl="triton"), NotImplementedError, "linear: impl='triton' cannot run here"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_using_triton_leaves_linear_to_choose():
    if mk.backends()["triton"] is None:
        assert mk.using(impl="triton").linear(X, W).shape == (2, 3)


def test_a_gpu_takes_the_kernel_for_few_rows_of_a_graph_alone(monkeypatch):
    from mistral_kernels.linear import _kernel_pays

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    few, many = torch.ones(2, 8), torch.ones(3, 8)
    assert not _kernel_pays("cuda", few) and _kernel_pays("cpu", few)
    capturing = True
    assert _kernel_pays("cuda", few) and not _kernel_pays("cuda", many) and not _kernel_pays("xpu", few)
