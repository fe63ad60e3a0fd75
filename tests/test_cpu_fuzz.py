"""Random cases of the sizes that models have, in every instruction set and number type of the C++ kernels, with one
thread and with two: beyond the few tokens of test_fuzz, where blocks, tiles and shares of threads have edges."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import LONG, PROFILE, agree

from mistral_kernels import testing

TIERS = testing.isa_tiers()
pytestmark = pytest.mark.skipif(not TIERS, reason="the C++ kernels are not built")

DIMS = st.one_of(st.sampled_from((64, 80, 96, 128, 256)), st.integers(1, 32).map(lambda n: 8 * n))
LENGTHS = st.integers(1, 300)
WINDOWS = st.one_of(st.none(), st.integers(1, 400))
WIDTHS = st.one_of(st.integers(2, 700), st.sampled_from((1024, 1536, 4096, 4097, 5120)))


@st.composite
def heads(draw):
    """Query heads and KV heads."""
    kv_heads = draw(st.integers(1, 3))
    return kv_heads * draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8))), kv_heads


@st.composite
def norms(draw):
    make = draw(st.sampled_from((testing.norm_case, testing.add_norm_case)))
    return make((draw(st.integers(1, 70)), draw(WIDTHS)), draw(st.sampled_from(("model", "fp32"))))


@st.composite
def gates(draw):
    rows, width = draw(st.integers(1, 70)), draw(WIDTHS)
    return draw(st.sampled_from((testing.swiglu_case((rows, width)), testing.swiglu_packed_case((rows, 2 * width)))))


@st.composite
def rotations(draw):
    batch, first = draw(st.one_of(st.none(), st.integers(1, 2))), draw(st.sampled_from((0, 1, 500)))
    return testing.rope_case(batch, draw(LENGTHS), *draw(heads()), draw(DIMS), draw(st.booleans()), first)


@st.composite
def dense(draw):
    queries, keys = draw(LENGTHS), draw(LENGTHS)
    keys = queries if draw(st.booleans()) else keys
    batch, causal = draw(st.integers(1, 2)), draw(st.booleans())
    window = draw(WINDOWS) if causal else None
    return testing.attention_case(batch, queries, keys, *draw(heads()), draw(DIMS), window, causal)


@st.composite
def packed(draw):
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=5))
    more = draw(st.one_of(st.just(0), st.integers(0, 90)))
    pairs = [(n, n + more) for n in lengths]
    return testing.packed_attention_case(pairs, *draw(heads()), draw(DIMS), draw(WINDOWS))


@st.composite
def cached(draw):
    """Single queries over rings, filled in part or wrapped, or chunks behind them."""
    slots, count = draw(st.integers(1, 300)), draw(st.integers(1, 3))
    chunk = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 40) if chunk else st.just(1), min_size=count, max_size=count))
    before = draw(st.lists(st.integers(0 if chunk else 1, 900), min_size=count, max_size=count))
    window = draw(st.integers(1, slots))
    return testing.cached_case(
        lengths, before, slots, *draw(heads()), draw(DIMS), window, chunk=chunk, codes=draw(st.booleans())
    )


@st.composite
def products(draw):
    """Linear layers of few and of more rows, on numbers or on codes."""
    rows, k, n = draw(st.integers(1, 60)), draw(WIDTHS), draw(st.integers(1, 90))
    scheme, bias = draw(st.sampled_from((None, "int8", "w8a8", "int4", "nf4"))), draw(st.booleans())
    if scheme is None:
        return testing.linear_case((rows,), k, n, bias)
    group = draw(st.sampled_from((None, 32, 64, 128)))
    return testing.quantised_case(scheme, (rows,), k, n, group, scheme == "int4" and draw(st.booleans()), bias)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiers", [(tier,) for tier in TIERS] if LONG else [TIERS], ids="-".join)
@pytest.mark.parametrize("make", [norms, gates, rotations, dense, packed, cached, products], ids=lambda m: m.__name__)
def test_agrees_with_eager(make, tiers, threads):
    kinds = st.sampled_from(("gaussian", "ramp"))

    @PROFILE
    @given(make(), st.sampled_from(testing.DTYPES), kinds, st.sampled_from(tiers), st.sampled_from((1, 2)))
    def check(case, dtype, kind, tier, count):
        threads(count)
        with testing.isa(tier):
            for e in testing.parity(case, dtype, "cpu", kind=kind, gradients=make is not cached):
                agree(e, f"{case.op} {case.label} {kind}", dtype)

    check()
