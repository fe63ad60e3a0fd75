"""The C++ gradients of attention, dense and packed, on every instruction set that this processor has."""

import itertools

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import DTYPES, KINDS, attention_case, fill, packed_attention_case

pytestmark = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")
CASES = [case for case in testing.cases() if case.op == "attention"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


def check(cases, dtype, kind="gaussian"):
    """The largest errors of every case, and the RMS errors over all of them, on every instruction set."""
    together = {}
    for case in cases:
        arguments = case.arguments(dtype, kind=kind)
        exact = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
        }
        eager, truth = (testing.call_with_gradients(case.op, a, "reference") for a in (arguments, exact))
        for name in testing.isa_tiers():
            with testing.isa(name):
                out = testing.call_with_gradients(case.op, arguments, "cpu")
            for n in truth:
                errors = testing.compare(n, out[n], eager[n], truth[n])
                assert errors.max_ratio <= 1, (case.label, dtype, kind, name, errors)
                together.setdefault((name, n), []).append(errors)
    for where, errors in together.items():
        assert testing.pooled(errors) <= 1, (where, dtype, kind, testing.pooled(errors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(dtype, kind):
    check(CASES, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype):
    """Head dimensions, groups, and lengths and windows around strips, tiles and panels."""
    dims = [attention_case(1, 70, 85, 4, 2, dim, 40) for dim in (8, 24, 40, 72, 80, 96, 192, 256)]
    groups = [attention_case(1, 50, 50, heads, 1, 64, 33) for heads in (1, 3, 7, 8)]
    lengths = [attention_case(2, s, s, 2, 1, 64, w) for s, w in itertools.product((1, 5, 97, 193), (None, 1, 64, 150))]
    uneven = [attention_case(1, 100, 40, 2, 2, 64), attention_case(1, 3, 300, 4, 2, 64, 100)]
    check([*dims, *groups, *lengths, *uneven, attention_case(1, 37, 90, 4, 2, 64, causal=False)], dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_eager(tier, kind):
    tolerance = 1e-9 if kind == "large" else 1e-11
    for case in CASES:
        arguments = case.arguments(torch.float64, kind=kind)
        eager, out = (testing.call_with_gradients(case.op, arguments, impl) for impl in ("reference", "cpu"))
        for name in eager:
            torch.testing.assert_close(
                out[name], eager[name], rtol=tolerance, atol=tolerance, msg=f"{case.label} {name}"
            )


def test_long_sums():
    check([attention_case(1, 12, 3000, 2, 1, 64)], torch.float32)
    check([attention_case(1, 1500, 9, 2, 1, 64, causal=False)], torch.float32)


@pytest.mark.parametrize("scale", (-0.2, 0.0, 3.0))
def test_scale(tier, scale):
    q, k, v = (fill((1, n, h, 40), seed=h).requires_grad_() for n, h in ((30, 4), (45, 2), (45, 2)))
    for window in (None, 7):
        results = [
            torch.autograd.grad(mk.attention(q, k, v, window, scale, impl=impl).square().sum(), (q, k, v))
            for impl in ("reference", "cpu")
        ]
        for eager, out in zip(*results, strict=True):
            torch.testing.assert_close(out, eager, rtol=1e-10, atol=1e-10)


def test_gradcheck(tier):
    q, k, v = (fill((2, n, h, 8), seed=h + n).requires_grad_() for n, h in ((7, 6), (9, 2), (9, 2)))
    check = torch.autograd.gradcheck
    assert check(lambda q, k, v: mk.attention(q, k, v, 4, return_lse=True, impl="cpu"), (q, k, v))
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 7, 9], dtype=torch.int32)
    lengths = dict(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], impl="cpu")
    packed = [t[0].detach().requires_grad_() for t in (q, k, v)]
    assert check(lambda q, k, v: mk.attention(q, k, v, **lengths), packed)


def gradients(q, k, v, dout, dlse, window=0):
    return torch.ops.mistral_kernels.attention_backward(
        dout, dlse, q, k, v, q, dlse, window, 0.3, True, None, None, q.shape[1], k.shape[1]
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_layouts_and_threads_change_nothing(tier, dtype):
    q, dout = (fill((2, 230, 6, 40), seed=s).to(dtype) for s in (0, 1))
    k, v = (fill((2, 230, 2, 40), seed=s).to(dtype) for s in (2, 3))
    dlse = fill((2, 6, 230), seed=4).float()
    inputs = (q, k, v, dout, dlse)
    kept = [t.clone() for t in inputs]
    expected = gradients(*inputs, 70)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:4]]
    wide = [torch.cat((t, torch.full_like(t, torch.nan)), -1)[..., :40] for t in inputs[:4]]
    broken = [torch.stack((t, t), -1)[..., 0] for t in inputs[:4]]
    torch.set_num_threads(2)
    for views in (transposed, wide, broken):
        again = gradients(*views, dlse.transpose(1, 2).contiguous().transpose(1, 2), 70)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(again, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    ones = torch.ones((), dtype=dtype)
    summed = gradients(q, k, v, ones.expand(q.shape), torch.zeros(()).expand(dlse.shape))
    whole = gradients(q, k, v, torch.ones_like(q), torch.zeros_like(dlse))
    assert all(torch.equal(a, b) for a, b in zip(summed, whole, strict=True))


def test_few_heads_are_shared_out(tier):
    """One KV head: the tiles are cut into parts, whose sums are joined in order."""
    check([attention_case(1, 400, 400, 3, 1, 64, 100)], torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("queries, keys", [(700, 700), (300, 600), (600, 300)])
def test_parts_with_a_window(tier, dtype, queries, keys):
    """Each part's sums are of the keys that its own queries see."""
    check([attention_case(1, queries, keys, 2, 1, 40, 70)], dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("window", (0, 90))
def test_threads_change_nothing_in_parts(tier, dtype, window):
    """Two KV heads of a long sequence: parts of first and last tiles, some joined while others still run."""
    q, dout = (fill((1, 1100, 6, 24), seed=s).to(dtype) for s in (0, 1))
    k, v = (fill((1, 1100, 2, 24), seed=s).to(dtype) for s in (2, 3))
    dlse = fill((1, 6, 1100), seed=4).float()
    expected = gradients(q, k, v, dout, dlse, window)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        again = gradients(q, k, v, dout, dlse, window)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("window", (None, 90))
def test_long_sequences_in_parts(window):
    for queries, keys in ((1100, 1100), (700, 900)):
        check([attention_case(1, queries, keys, 6, 2, 24, window)], torch.bfloat16)


def test_empty_and_unseen():
    for batch, queries, keys in ((0, 5, 5), (2, 0, 7), (2, 5, 0)):
        q, k = fill((batch, queries, 4, 16)).requires_grad_(), fill((batch, keys, 2, 16)).requires_grad_()
        found = torch.autograd.grad(mk.attention(q, k, k, impl="cpu").sum(), (q, k))
        assert all(g.shape == t.shape and not g.any() for g, t in zip(found, (q, k), strict=True))
    case = packed_attention_case([(3, 0), (0, 4), (9, 2), (2, 2)], 4, 2, 16)
    check([case], torch.float32)


def test_nan_reaches_what_it_touches():
    q, k, v = (fill((1, 90, h, 64), seed=h).requires_grad_() for h in (4, 2, 2))
    dout = torch.ones(1, 90, 4, 64, dtype=torch.float64)
    dout[0, 60, 1] = torch.nan
    dq, dk, dv = torch.autograd.grad(mk.attention(q, k, v, 20, impl="cpu"), (q, k, v), dout)
    assert dq.isnan().any(-1).nonzero().tolist() == [[0, 60, 1]]
    for grad in (dk, dv):
        touched = {i for _, i, _ in grad.isnan().any(-1).nonzero().tolist()}
        assert set(range(41, 61)) <= touched <= set(range(30, 72))
