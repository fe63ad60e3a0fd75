"""Random shapes, strides, windows and lengths of every op against the eager op, in every implementation usable here.

`make fuzz` runs the long profile. A failing example is printed with `@reproduce_failure`.
"""

import itertools
import os

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill

LONG = bool(os.environ.get("MISTRAL_KERNELS_FUZZ"))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("short", max_examples=6, deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("long", max_examples=int(os.environ.get("MISTRAL_KERNELS_FUZZ") or 1), deadline=None,
                          suppress_health_check=QUIET)  # fmt: skip
PROFILE = settings.get_profile("long" if LONG else "short")
IMPLS = [name for name in ("cpu", "cuda", "triton") if mk.backends()[name] is None]
DTYPES = (torch.float32, torch.float16)  # bfloat16 is miscomputed by Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


@st.composite
def strided(draw, shape, seed=0):
    """Values of a shape in a layout that the op reads in place, or must copy."""
    layout = draw(st.sampled_from(("contiguous", "padded", "offset", "transposed", "stepped", "last")))
    if layout == "padded":
        return fill((*shape[:-1], shape[-1] + 5), seed=seed)[..., : shape[-1]]
    if layout == "offset":
        return fill((shape[0] + 1, *shape[1:-1], shape[-1] + 3), seed=seed)[1:, ..., 3:]
    if layout == "transposed" and len(shape) > 2:
        return fill((shape[1], shape[0], *shape[2:]), seed=seed).transpose(0, 1)
    if layout == "stepped":
        return fill((2 * shape[0], *shape[1:]), seed=seed)[::2]
    if layout == "last":
        return fill((*shape[:-1], 2 * shape[-1]), seed=seed)[..., ::2]
    return fill(shape, seed=seed)


sizes = st.integers(1, 40)
rows = st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 4), st.integers(1, 5)))


@st.composite
def norms(draw):
    shape = (*draw(rows), draw(st.one_of(st.integers(2, 40), st.sampled_from((576, 1000)))))
    made = dict(x=draw(strided(shape)), weight=1 + 0.3 * fill(shape[-1:], seed=1))
    made["rounding"] = draw(st.sampled_from(("model", "fp32")))
    if draw(st.booleans()):
        return "add_rms_norm", made | dict(residual=draw(strided(shape, 2)))
    return "rms_norm", made


@st.composite
def gates(draw):
    shape = (*draw(rows), draw(sizes))
    if draw(st.booleans()):
        return "swiglu_packed", dict(gate_up=draw(strided((*shape[:-1], 2 * shape[-1]))))
    return "swiglu", dict(gate=draw(strided(shape)), up=draw(strided(shape, 1)))


@st.composite
def heads(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 7)))
    return kv_heads * group, kv_heads, draw(st.sampled_from((8, 16, 40)))


@st.composite
def rotations(draw):
    query_heads, kv_heads, dim = draw(heads())
    lead = draw(st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 3), st.integers(1, 9))))
    cos, sin = mk.rope_table(dim, 1e4, 50, dtype=torch.float64)
    made = dict(q=draw(strided((*lead, query_heads, dim))), k=draw(strided((*lead, kv_heads, dim), 1)))
    made |= dict(cos=cos.float().double(), sin=sin.float().double(), interleaved=draw(st.booleans()))
    if draw(st.booleans()):
        count = torch.Size(lead).numel()
        positions = draw(st.lists(st.integers(0, 49), min_size=count, max_size=count))
        made["positions"] = torch.tensor(positions, dtype=draw(st.sampled_from((torch.int32, torch.int64)))).view(lead)
    return "rope", made


windows = st.one_of(st.none(), st.integers(1, 50))


@st.composite
def dense(draw):
    query_heads, kv_heads, dim = draw(heads())
    batch, queries, keys = draw(st.integers(1, 2)), draw(sizes), draw(sizes)
    q = draw(strided((batch, queries, query_heads, dim)))
    k, v = (draw(strided((batch, keys, kv_heads, dim), s)) for s in (1, 2))
    return "attention", dict(q=q, k=k, v=v, window=draw(windows), return_lse=True)


def ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@st.composite
def packed(draw):
    query_heads, kv_heads, dim = draw(heads())
    pairs = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4))
    cu_q, cu_k = (ends(lengths) for lengths in zip(*pairs, strict=True))
    q = fill((int(cu_q[-1]), query_heads, dim))
    k, v = (fill((int(cu_k[-1]), kv_heads, dim), seed=s) for s in (1, 2))
    lengths = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return "attention", dict(q=q, k=k, v=v, window=draw(windows), return_lse=True) | lengths


@st.composite
def losses(draw):
    shape, vocabulary = (*draw(rows), draw(sizes)), draw(st.integers(2, 90))
    count = torch.Size(shape[:-1]).numel()
    labels = draw(st.lists(st.integers(0, vocabulary), min_size=count, max_size=count))
    labels = torch.tensor([n if n < vocabulary else -100 for n in labels], dtype=torch.int64).view(shape[:-1])
    made = dict(hidden=draw(strided(shape)), weight=0.2 * draw(strided((vocabulary, shape[-1]), 1)), labels=labels)
    chunk = draw(st.one_of(st.none(), st.integers(1, 30)))
    return "linear_cross_entropy", made | dict(reduction=draw(st.sampled_from(("sum", "none"))), chunk=chunk)


def cast(value, name, dtype):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or name in ("cos", "sin"):
        return value.float() if name in ("cos", "sin") else value
    # Keeps the layout: `to` would make the result dense.
    out = torch.empty(value.untyped_storage().nbytes() // 8, dtype=dtype)
    view = out.as_strided(value.shape, value.stride(), value.storage_offset())
    return view.copy_(value)


def run(op, arguments, impl):
    """Outputs and gradients by name, and the arguments bitwise as they were."""
    leaves = {
        n: t.detach().requires_grad_()
        for n, t in arguments.items()
        if isinstance(t, torch.Tensor) and t.is_floating_point() and n not in ("cos", "sin")
    }
    before = {n: t.detach().clone() for n, t in leaves.items()}
    outputs = testing.call(op, arguments | leaves, impl)
    seeds = [fill(tuple(t.shape), seed=7 + i).to(t) for i, t in enumerate(outputs.values())]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), seeds)
    assert all(torch.equal(leaves[n], t) for n, t in before.items()), "an input was written"
    assert all(t.is_contiguous() for t in outputs.values()), "an output is not contiguous"
    return outputs | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [norms, gates, rotations, dense, packed, losses], ids=lambda m: m.__name__)
@pytest.mark.usefixtures("one_thread")
def test_agrees_with_eager(make, impl):
    @PROFILE
    @given(make(), st.sampled_from(DTYPES))
    def check(drawn, dtype):
        op, exact = drawn
        arguments = {n: cast(t, n, dtype) for n, t in exact.items()}
        doubles = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
        }
        eager, truth = run(op, arguments, "reference"), run(op, doubles, "reference")
        out = run(op, arguments, impl)
        for name in truth:
            agree(testing.compare(name, out[name], eager[name], truth[name]), op, dtype)

    check()


def agree(e, op, dtype):
    """No wrong element: an error of eager's order. How many roundings it may be is the parity tests' to say.

    Among random small cases there are sums that eager happens to round exactly and gradients that cancel to nothing;
    8 units at the scale of the tensor tell a bug from either.
    """
    floor = 8 * torch.finfo(dtype).eps * (1 + e.scale)
    assert e.max_error <= 2 * e.max_budget + floor, f"{op} {dtype}: {e}"
