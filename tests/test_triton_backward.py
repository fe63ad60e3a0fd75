"""The gradients of RMSNorm, SwiGLU and RoPE in Triton: on a GPU, or without one in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels._dispatch import triton_interpreted
from mistral_kernels.rms_norm import triton_backward
from mistral_kernels.swiglu import triton_kernel as swiglu
from mistral_kernels.swiglu.reference import swiglu_backward as eager_backward
from mistral_kernels.testing import KINDS, cases, errors, fill

OPS = torch.ops.mistral_kernels
NAMES = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope")
INTERPRETED = triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else testing.DTYPES

pytestmark = [
    pytest.mark.skipif(
        mk.backends()["triton"] is not None, reason=f"Triton cannot run here: {mk.backends()['triton']}"
    ),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


def grid():
    """Every case in both dtypes; the other kinds of values for one of every two."""
    for i, case in enumerate(c for c in cases() if c.op in NAMES):
        for kind in (KINDS[0], KINDS[1 + i % 3]):
            for dtype in DTYPES:
                yield pytest.param(case, kind, dtype, id=f"{case.op}-{case.label}-{kind}-{dtype}")


def gradients(found):
    return [e for e in found if e.output.startswith("d")]


@pytest.mark.parametrize(("case", "kind", "dtype"), list(grid()))
def test_parity(case, kind, dtype):
    found = testing.assert_parity(case, dtype, "triton", device=DEVICE, kind=kind, gradients=True)
    assert gradients(found) or not case.gradients


def made(shape, dtype=torch.float32, seed=0):
    return fill(shape, seed=seed).to(dtype).to(DEVICE)


def check(op, **arguments):
    failed = [e for e in errors(op, arguments, "triton", gradients=True) if not e.passed]
    assert not failed, failed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(25, 3, 64), (70, 576), (13, 2048), (2, 8192), (2, 8200), (9, 9000)])
def test_many_and_long_rows(shape, dtype, monkeypatch):
    """More rows than programs at a time, so several steps a program; rows cut into blocks of columns."""
    monkeypatch.setattr(triton_backward, "processors", lambda _: 1)
    x, residual = made(shape, dtype), made(shape, dtype, 1)
    weight = made(shape[-1:], dtype, 2)
    check("rms_norm", x=x, weight=weight)
    check("add_rms_norm", x=x, residual=residual, weight=weight)


LAYOUTS = {
    "row stride": lambda d: made((3, 4, 5, 80), d)[..., 8:56],
    "odd row stride and offset": lambda d: made((3, 4, 5, 51), d)[..., 3:],
    "transposed": lambda d: made((5, 4, 3, 48), d).transpose(0, 2),
    "three that do not merge": lambda d: made((6, 8, 10, 48), d)[::2, ::2, ::2],
    "expanded": lambda d: made((4, 1, 48), d).expand(3, 4, 5, 48),
    "expanded in all": lambda d: made((1, 1, 1, 1), d).expand(3, 4, 5, 48),
    "columns first": lambda d: made((48, 3, 4, 5), d).movedim(0, -1),
    "four that do not merge": lambda d: made((2, 2, 4, 10, 48), d)[:, :, ::2, ::2],
    "one row": lambda d: made((48,), d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Gradients and saved tensors of any strides give, bit for bit, what contiguous ones give; none is written to."""
    t = LAYOUTS[layout](torch.float16)
    other, more = made(tuple(t.shape), torch.float16, 3), made(tuple(t.shape), torch.float16, 4)
    weight, rstd = made((48,), torch.float16, 5), made(tuple(t.shape[:-1]), seed=6).abs()
    packed = made((*t.shape[:-1], 96), torch.float16, 7)
    calls = {
        "rms_norm_backward_triton": [(t, other, weight, rstd, True), (other, t, weight, rstd, False)],
        "add_rms_norm_backward_triton": [(t, other, more, weight, rstd, True), (other, t, more, weight, rstd, True)],
        "swiglu_backward_triton": [(t, other, more), (other, t, more), (other, more, t)],
        "swiglu_packed_backward_triton": [(t, packed)],
    }
    before = t.clone()
    for name, lists in calls.items():
        for args in lists:
            got = getattr(OPS, name)(*args)
            plain = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
            expected = getattr(OPS, name)(*plain)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
                assert torch.equal(a, b) and a.is_contiguous(), name
    assert torch.equal(t, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_expanded_gradients(interleaved):
    q, k = made((2, 5, 4, 16)).requires_grad_(), made((2, 5, 2, 16), seed=1).requires_grad_()
    cos, sin = (t.to(DEVICE) for t in mk.rope_table(16, max_positions=9))
    found = {}
    for impl in ("triton", "reference"):
        outputs = mk.rope(q, k, cos, sin, interleaved=interleaved, impl=impl)
        seeds = torch.ones((), device=DEVICE).expand_as(q), made((1, 1, 2, 16), seed=2).expand_as(k)
        found[impl] = torch.autograd.grad(outputs, (q, k), seeds)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_both_outputs_carry_gradients():
    x, residual = made((5, 48)).requires_grad_(), made((5, 48), seed=1).requires_grad_()
    weight = made((48,), seed=2)
    normed, total = mk.add_rms_norm(x, residual, weight, impl="triton")
    both = torch.autograd.grad([normed, total], x, [made((5, 48), seed=3), made((5, 48), seed=4)], retain_graph=True)
    alone = torch.autograd.grad(normed, x, made((5, 48), seed=3), retain_graph=True)
    torch.testing.assert_close(both[0], alone[0] + made((5, 48), seed=4), rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.autograd.grad(total, residual, made((5, 48), seed=4))[0], made((5, 48), seed=4))


def test_mixed_dtypes():
    """A float32 weight promotes the output, so that dy is float32 and dx float16."""
    check("rms_norm", x=made((30, 100), torch.float16), weight=made((100,), seed=1))
    x, residual = made((30, 100), torch.float16), made((30, 100), torch.float16, 1)
    check("add_rms_norm", x=x, residual=residual, weight=made((100,), seed=2), rounding="fp32")


def test_gradients_come_from_triton(monkeypatch):
    """Training with impl="triton" runs Triton's backward, on a CPU in the interpreter too."""
    launched = []
    for module in (triton_backward, swiglu):

        def launch(kernel, *args, _run=module.launch, **kwargs):
            launched.append(kernel.__name__)
            _run(kernel, *args, **kwargs)

        monkeypatch.setattr(module, "launch", launch)
    x = made((3, 16)).requires_grad_()
    y = mk.swiglu(mk.rms_norm(x, made((16,)), impl="triton"), x, impl="triton")
    mk.swiglu_packed(y, impl="triton").sum().backward()
    assert launched.count("_swiglu_backward_kernel") == 2
    assert launched[-2:] == ["_norm_backward_kernel", "_sum_kernel"]


EMPTY = {
    "rms_norm_backward": lambda: (torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), torch.empty(0), True),
    "add_rms_norm_backward": lambda: (*[torch.empty(3, 0)] * 3, torch.ones(0), torch.empty(3), True),
    "swiglu_backward": lambda: [torch.empty(0, 3)] * 3,
    "swiglu_packed_backward": lambda: (torch.empty(4, 0), torch.empty(4, 0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs_launch_nothing(name, monkeypatch):
    def launch(*_, **__):
        raise AssertionError("launched")

    for module in (triton_backward, swiglu):
        monkeypatch.setattr(module, "launch", launch)
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in EMPTY[name]()]
    results = getattr(OPS, name + "_triton")(*args)
    expected = getattr(OPS, name)(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
    for got, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True):
        assert torch.equal(got.cpu(), want)


def test_same_bits_again():
    x, dy = made((50, 576), torch.float16), made((50, 576), torch.float16, 1)
    args = (dy, x, made((576,), torch.float16, 2), made((50,), seed=3), True)
    for a, b in zip(*(OPS.rms_norm_backward_triton(*args) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_its_neighbours():
    for n in (96, 576, 9000):
        x, dy, weight, rstd = made((9, n)), made((9, n), seed=1), made((n,), seed=2), made((9,), seed=3)
        dx, _ = OPS.rms_norm_backward_triton(dy, x, weight, rstd, True)
        alone, _ = OPS.rms_norm_backward_triton(dy[7:8], x[7:8], weight, rstd[7:8], True)
        assert torch.equal(dx[7:8], alone)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_swiglu_of_extreme_gates(dtype):
    gate = torch.tensor([0, 20, 60, 87.5, 90, 1e4, float("inf"), float("nan")])
    gate = torch.cat([gate, -gate]).to(dtype).to(DEVICE)
    dy, up = torch.full_like(gate, 0.5), torch.full_like(gate, 3)
    for got, expected in zip(OPS.swiglu_backward_triton(dy, gate, up), eager_backward(dy, gate, up), strict=True):
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True)


def test_opcheck():
    x = made((3, 8))
    checks = {
        "rms_norm_backward_triton": (x, x, x[0], x[:, 0], True),
        "add_rms_norm_backward_triton": (x, x, x, x[0], x[:, 0], True),
        "swiglu_backward_triton": (x, x, x),
        "swiglu_packed_backward_triton": (x[:, :4], x),
    }
    for name, args in checks.items():
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_second_derivatives_raise():
    x = made((3, 8)).requires_grad_()
    (g,) = torch.autograd.grad(mk.rms_norm(x, made((8,)), impl="triton").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm_backward cannot be differentiated"):
        g.sum().backward()
