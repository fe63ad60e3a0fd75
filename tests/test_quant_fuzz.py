"""Random shapes, groups and layouts of linear layers on codes against the eager op; `make fuzz` runs many."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import DTYPES, IMPLS, PROFILE, agree, cast, rows, sizes, strided

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


@st.composite
def layers(draw):
    scheme = draw(st.sampled_from(("int8", "w8a8", "int4", "nf4")))
    k = draw(st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 200, 576, 1000))))
    lead, n = draw(st.one_of(rows, st.tuples(st.integers(10, 40)))), draw(sizes)
    group = draw(st.sampled_from((0, 32, 64, 128)))
    asymmetric = scheme == "int4" and draw(st.booleans())
    weight = mk.quantize_weight(fill((n, k), seed=1) * 10 ** draw(st.integers(-3, 2)), scheme, group, asymmetric)
    spare = draw(st.integers(0, 3))  # columns on both sides of the codes
    codes = torch.full((n, weight.codes.shape[1] + 2 * spare), 85, dtype=weight.codes.dtype)
    codes[:, spare : codes.shape[1] - spare] = weight.codes
    view = codes[:, spare : codes.shape[1] - spare]
    weight = mk.QuantizedWeight(scheme, view, weight.scale, weight.offset, group, k)
    return draw(strided((*lead, k))), weight, draw(st.booleans())


def run(x, weight, bias, impl):
    x = x.detach().requires_grad_()
    before = x.detach().clone()
    out = mk.linear_quantized(x, weight, bias, impl=impl)
    assert out.is_contiguous() and out.shape == (*x.shape[:-1], weight.shape[0])
    (dx,) = torch.autograd.grad(out, x, fill(tuple(out.shape), seed=7).to(out))
    assert torch.equal(x, before)
    return dict(out=out, dx=dx)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("one_thread")
def test_agrees_with_eager(impl):
    @PROFILE
    @given(layers(), st.sampled_from(DTYPES))
    def check(drawn, dtype):
        exact, weight, with_bias = drawn
        x, bias = cast(exact, "x", dtype), fill(weight.shape[:1], seed=2).to(dtype) if with_bias else None
        wide = None if bias is None else bias.double()
        truth, eager = run(x.double(), weight, wide, "reference"), run(x, weight, bias, "reference")
        out = run(x, weight, bias, impl)
        for name in truth:
            agree(testing.compare(name, out[name], eager[name], truth[name]), weight.scheme, dtype)

    check()
