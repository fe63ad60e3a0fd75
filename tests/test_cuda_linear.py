"""The linear layer of few rows in CUDA C++: on a GPU, or without one run from its own PTX with every access checked."""

import itertools

import pytest
import torch
from ptx_on_cpu import launches
from torch.nn import functional

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill, linear_case

pytestmark = pytest.mark.usefixtures("cuda_ops", "one_thread")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shapes():
    """Every number of rows, and depths around vectors, a warp's and a block's rounds."""
    for rows in range(1, 5):
        yield linear_case((rows,), 576, 20 + rows, bias=rows % 2 == 0)
    for i, k in enumerate((1, 7, 8, 9, 255, 256, 257, 511, 512, 513, 520, 1000, 1024, 1032, 4096, 5001)):
        yield linear_case((1 + i % 4,), k, 5 + i, bias=i % 3 == 0)
    for n in (1, 2, 3, 4, 5, 9):
        yield linear_case((2, 2), 96, n, bias=True)


def tensors(dtype, *sizes):
    return [fill(s, seed=i).to(DEVICE, dtype) for i, s in enumerate(sizes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype):
    errors = []
    for case, kind in zip(shapes(), itertools.cycle(testing.KINDS)):
        found = testing.parity(case, dtype, "cuda", device=DEVICE, kind=kind, gradients=True)
        assert testing.pooled_max(found) <= 1, (case.label, kind, found)
        errors += found
    for output in {e.output for e in errors}:
        assert testing.pooled([e for e in errors if e.output == output]) <= 1, output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_change_nothing(dtype):
    x, w, b = tensors(dtype, (2, 2, 64), (21, 64), (21,))
    expected = mk.linear(x, w, b, impl="cuda")
    wide_x = torch.full((2, 2, 80), torch.nan, device=DEVICE, dtype=dtype)
    wide_w = torch.full((21, 96), torch.nan, device=DEVICE, dtype=dtype)
    wide_x[..., 8:72], wide_w[:, 16:80] = x, w
    layouts = (wide_x[..., 8:72], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT)
    for inputs, weight in itertools.product(layouts, (w, wide_w[:, 16:80], w.T.contiguous().T)):
        got = mk.linear(inputs, weight, torch.stack((b, b), -1)[:, 0], impl="cuda")
        assert got.is_contiguous() and torch.equal(got, expected)
    wide_x[..., 9:73], wide_w[:, 17:81] = x, w  # rows that cannot be read 16 bytes at a time
    torch.testing.assert_close(mk.linear(wide_x[..., 9:73], w, b, impl="cuda"), expected)
    torch.testing.assert_close(mk.linear(x, wide_w[:, 17:81], b, impl="cuda"), expected)
    row = x[0, :1].expand(3, 64)
    assert torch.equal(mk.linear(row, w, b, impl="cuda"), mk.linear(row.contiguous(), w, b, impl="cuda"))


def test_rows_change_nothing():
    x, w = tensors(torch.bfloat16, (4, 1000), (9, 1000))
    whole = mk.linear(x, w, impl="cuda")
    assert torch.equal(whole, torch.cat([mk.linear(x[i : i + 1], w, impl="cuda") for i in range(4)]))
    assert torch.equal(whole, mk.linear(x, w, impl="cuda"))


def test_nan_stays_where_it_belongs():
    x, w = torch.ones(2, 33, device=DEVICE), torch.ones(9, 33, device=DEVICE)
    x[0, 32], w[4, 0] = torch.nan, torch.inf
    out = mk.linear(x, w, impl="cuda")
    assert out[0].isnan().all() and out[1, 4] == torch.inf and (out[1, [0, 1, 2, 3, 5, 6, 7, 8]] == 33).all()


def test_empty():
    x, w, bias = tensors(torch.float32, (2, 8), (3, 8), (3,))
    assert mk.linear(x[:0], w, impl="cuda").shape == (0, 3)
    assert mk.linear(x, w[:0], impl="cuda").shape == (2, 0)
    assert torch.equal(mk.linear(x[:, :0], w[:, :0], bias, impl="cuda"), bias.expand(2, 3))


def test_opcheck():
    x, w, b = (t.requires_grad_() for t in tensors(torch.float32, (3, 64), (24, 64), (24,)))
    torch.library.opcheck(torch.ops.mistral_kernels.linear_cuda.default, (x, w, b))


def test_what_cannot_run_says_why():
    x, w = tensors(torch.float32, (5, 8), (3, 8))
    with pytest.raises(NotImplementedError, match="it takes 4 rows at most"):
        mk.linear(x, w, impl="cuda")
    with pytest.raises(NotImplementedError, match="no float64"):
        mk.linear(x[:1].double(), w.double(), impl="cuda")
    torch.testing.assert_close(mk.linear(x[:, :0], w[:, :0]), functional.linear(x[:, :0], w[:, :0]))


@pytest.mark.skipif(GPU, reason="the counts come from runs without a GPU")
@pytest.mark.parametrize("rows", [1, 4])
def test_each_weight_is_read_once(rows):
    x, w = tensors(torch.bfloat16, (rows, 2048), (32, 2048))
    with launches() as found:
        y = mk.linear(x, w, impl="cuda")
    (launch,) = found
    assert launch.read_once == x.nbytes + w.nbytes and launch.written == y.nbytes
    assert launch.read == w.nbytes + 32 * x.nbytes  # x comes from the caches after the first row of the weight
    assert launch.accesses16 == launch.accesses - y.numel()
