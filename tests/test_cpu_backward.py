"""The C++ backward kernels of the elementwise ops, on every instruction set that this processor has."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.rms_norm import reference
from mistral_kernels.testing import fill

OPS = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope")
ALL_DTYPES = (*testing.DTYPES, torch.float64)
BACKWARD = torch.ops.mistral_kernels

pytestmark = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")


def tails():
    """Lengths around every vector width, and rows around the blocks and parts in which dweight is summed."""
    for n in (2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 1025):
        yield testing.norm_case((3, n))
        yield testing.add_norm_case((2, n), "fp32")
        yield testing.swiglu_case((2, n))
        yield testing.swiglu_packed_case((3, 2 * n))
    for rows in (15, 16, 17, 63, 65, 200):
        yield testing.norm_case((rows, 40))
        yield testing.add_norm_case((2, rows, 24), "fp32")
    for dim in (2, 14, 34, 66):
        yield testing.rope_case(2, 3, 2, 1, dim)
        yield testing.rope_case(None, 3, 2, 1, dim, interleaved=True, first=5)


CASES = [c for c in (*testing.cases(), *tails()) if c.op in OPS and c.gradients]


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parity(tier, op, dtype):
    """Over the tiers and dtypes every case meets every kind of values; the RMS error is judged over all of them."""
    shift = testing.isa_tiers().index(tier) + testing.DTYPES.index(dtype)
    together: dict[str, list[testing.Errors]] = {}
    for i, case in enumerate(c for c in CASES if c.op == op):
        kind = testing.KINDS[(i + shift) % len(testing.KINDS)]
        for e in testing.assert_parity(case, dtype, "cpu", kind=kind, gradients=True):
            together.setdefault(e.output, []).append(e)
    assert all(testing.pooled(errors) <= 1 for errors in together.values()), together


@pytest.mark.parametrize("op", OPS)
def test_float64_equals_eager(tier, op):
    for case in (c for c in CASES if c.op == op):
        arguments = case.arguments(torch.float64)
        eager, out = (testing.call_with_gradients(op, arguments, impl) for impl in ("reference", "cpu"))
        for name, expected in eager.items():
            scale = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(out[name], expected, rtol=1e-13, atol=1e-14 * scale, msg=f"{case.label} {name}")


@pytest.mark.parametrize("rounding", ["model", "fp32"])
def test_gradcheck(tier, rounding):
    x, r, w = (fill(s, seed=i).requires_grad_() for i, s in enumerate(((2, 3, 18), (2, 3, 18), (18,))))
    check = torch.autograd.gradcheck
    assert check(lambda x, w: mk.rms_norm(x, w, 1e-5, rounding, impl="cpu"), (x, w))
    assert check(lambda x, r, w: mk.add_rms_norm(x, r, w, 1e-5, rounding, impl="cpu"), (x, r, w))
    assert check(lambda x, r: mk.swiglu(x, r, impl="cpu"), (x, r))
    assert check(lambda x: mk.swiglu_packed(x, impl="cpu"), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [False, True])
def test_float32_weight(tier, dtype, model):
    x, total = (fill((70, 131), seed=s).to(dtype) for s in (0, 3))
    dy, weight, rstd = fill((70, 131), seed=1).float(), fill((131,), seed=2).float(), 1 + fill((70,)).abs().float()
    for name, arguments in (
        ("rms_norm_backward", (dy, x, weight, rstd, model)),
        ("add_rms_norm_backward", (dy, total, x, weight, rstd, model)),
    ):
        eager = getattr(reference, name)(*arguments)
        out = getattr(BACKWARD, name)(*arguments)
        for got, want in zip(out, eager, strict=True):
            assert got.dtype == want.dtype
        torch.testing.assert_close(out[0], eager[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
        torch.testing.assert_close(out[1], eager[1], rtol=1e-5, atol=1e-4)


def layouts(t):
    """The values of `t` [a, b, n] as a slice of wider rows, transposed, and with a last stride of 2."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 24), torch.nan, dtype=t.dtype)
    wide[..., 8 : 8 + t.shape[-1]] = t
    yield wide[..., 8 : 8 + t.shape[-1]]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layouts_change_nothing(tier, dtype):
    dy, x, z = (fill((7, 31, 40), seed=s).to(dtype) for s in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, rstd = fill((40,), seed=5).to(dtype), fill((7, 31)).abs().to(wide)
    calls = {
        "rms_norm": lambda a, b, c: BACKWARD.rms_norm_backward(a, b, weight, rstd, True),
        "add_rms_norm": lambda a, b, c: BACKWARD.add_rms_norm_backward(a, c, b, weight, rstd, True),
        "swiglu": lambda a, b, c: BACKWARD.swiglu_backward(a, b, c),
        "swiglu_packed": lambda a, b, c: (BACKWARD.swiglu_packed_backward(a[..., :20], b),),
    }
    for name, run in calls.items():
        expected = run(dy, x, z)
        for a, b, c in zip(layouts(dy), (x, *list(layouts(x))[:2]), reversed(list(layouts(z))), strict=True):
            for got, want in zip(run(a, b, c), expected, strict=True):
                assert got.is_contiguous() and torch.equal(got, want), name


def test_expanded_gradient(tier):
    x, w = fill((5, 40)).requires_grad_(), fill((40,), seed=1).requires_grad_()
    summed = torch.autograd.grad(mk.rms_norm(x, w, impl="cpu").sum(), (x, w))
    ones = torch.autograd.grad(mk.rms_norm(x, w, impl="cpu"), (x, w), torch.ones(5, 40).double())
    assert all(torch.equal(a, b) for a, b in zip(summed, ones, strict=True))


def test_threads_and_streaming_change_nothing(tier):
    dy, x, up = (fill((4160, 1024), seed=s).float() for s in range(3))
    weight, rstd = fill((1024,)).float(), fill((4160,)).abs().float()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((*BACKWARD.rms_norm_backward(dy, x, weight, rstd, True), *BACKWARD.swiglu_backward(dy, x, up)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rows = slice(4100, 4105)
    for name, gradients in (("rms_norm_backward", (dy,)), ("add_rms_norm_backward", (dy, up))):
        run = getattr(BACKWARD, name)
        dx = run(*gradients, x, weight, rstd, True)[0]
        alone = run(*(t[rows] for t in gradients), x[rows], weight, rstd[rows], True)[0]
        assert torch.equal(dx[rows], alone), name
    alone = BACKWARD.swiglu_backward(dy[rows], x[rows], up[rows])
    assert all(torch.equal(a, b[rows]) for a, b in zip(alone, results[0][2:], strict=True))
    packed = BACKWARD.swiglu_packed_backward(dy, torch.cat((x, up), -1))
    assert torch.equal(packed, torch.cat(results[0][2:], -1))


def test_the_ends_of_silu(tier):
    gate = torch.tensor([-3e38, -200.0, -110.0, -89.0, 0.0, 89.0, 200.0, 3e38])
    dgate, dup = BACKWARD.swiglu_backward(torch.ones(8), gate, torch.ones(8))
    assert dgate.isfinite().all() and (dgate[:3] == 0).all() and (dgate[-3:] == 1).all() and dgate[4] == 0.5
    assert torch.equal(dup, mk.swiglu(gate, torch.ones(8), impl="cpu"))


def test_empty():
    none = torch.empty(0, 16)
    dx, dweight = BACKWARD.rms_norm_backward(none, none, torch.ones(16), torch.empty(0), True)
    assert dx.shape == (0, 16) and torch.equal(dweight, torch.zeros(16))
    thin = torch.empty(3, 0)
    dx, dweight = BACKWARD.add_rms_norm_backward(thin, thin, thin, torch.empty(0), torch.ones(3), True)
    assert dx.shape == (3, 0) and dweight.shape == (0,)
    assert BACKWARD.swiglu_backward(none, none, none)[0].shape == (0, 16)
    assert BACKWARD.swiglu_packed_backward(torch.empty(3, 0), thin).shape == (3, 0)


def test_misfits_are_refused():
    x, w = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="rstd must hold one a row"):
        BACKWARD.rms_norm_backward(x, x, w, torch.ones(2), True)
    with pytest.raises(RuntimeError, match="dy must have x's shape"):
        BACKWARD.rms_norm_backward(x[:2], x, w, torch.ones(3), True)
    with pytest.raises(RuntimeError, match="dtotal must have total's shape"):
        BACKWARD.add_rms_norm_backward(x, x[:2], x, w, torch.ones(3), True)
    with pytest.raises(RuntimeError, match="of one shape and dtype"):
        BACKWARD.swiglu_backward(x, x, x.double())
