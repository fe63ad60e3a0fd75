"""The gradients of attention for compute capability 9.0: parity with eager, run on a CPU with every access checked.

The blocks of a launch run one after the other here: that a block waits for the right number of others is tested, that
the flags between them order memory on a GPU is not.
"""

import itertools

import pytest
import torch
from hopper_grids import backward
from ptx_on_cpu import launches, option

import mistral_kernels as mk
from mistral_kernels.testing import (
    attention_case,
    call_with_gradients,
    parity,
    pooled,
    pooled_max,
)

pytestmark = [
    pytest.mark.usefixtures("cuda_ops", "one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own kernels are tested by test_cuda.py"),
]
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def hopper():
    with option("capability", 90):
        yield


def judge(cases, dtype, kind="gaussian"):
    found = {}
    for case in cases:
        with launches() as seen:
            result = parity(case, dtype, "cuda", kind=kind, gradients=True)
        used = [launch.kernel for launch in seen]
        assert [name for name in used if "hopper_gradient_kernel" in name], (case.label, used)
        assert pooled_max(result) <= 1, (case.label, kind, result)
        for e in result:
            found.setdefault(e.output, []).append(e)
    for name, errors in found.items():
        assert pooled(errors) <= 1, (name, pooled(errors))


@pytest.mark.parametrize("dim", [64, 128])
def test_parity(dim):
    judge(backward(dim), BF16)


def test_parity_of_padded_heads_and_large_scores():
    cases = [attention_case(1, 130, 150, 2, 1, dim, window=100) for dim in (40, 96)]
    judge(cases, BF16)
    judge([attention_case(1, 130, 200, 2, 1, 64)], BF16, "large")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "ramp", "one_hot", "large"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dim", [8, 64, 96, 128])
def test_full_grid(dim, dtype, kind):
    judge(backward(dim), dtype, kind)


def test_gradients_are_deterministic():
    arguments = attention_case(1, 300, 300, 2, 1, 64, window=200).arguments(BF16)
    first, second = (call_with_gradients("attention", arguments, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_with_a_negative_and_with_no_scale():
    for scale in (-0.125, 0.0):
        arguments = attention_case(1, 140, 140, 2, 1, 64).arguments(BF16) | dict(scale=scale)
        wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        truth, out = (call_with_gradients("attention", a, i) for a, i in ((wide, "reference"), (arguments, "cuda")))
        for name in truth:
            assert (out[name].double() - truth[name]).abs().max() < 0.05, (scale, name)


def test_neighbours_of_a_packed_sequence_do_not_leak():
    lengths = [140, 100, 3]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=140, max_seqlen_k=140)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(sum(lengths), heads, 64).to(BF16) for heads in (2, 1, 1, 2))

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(mk.attention(*leaves, **packed, impl="cuda"), leaves, dout)

    clean = gradients()
    for t in (q, k, v, dout):
        t[140:240] = torch.nan
    for dirty, expected in zip(gradients(), clean, strict=True):
        assert torch.equal(dirty[:140], expected[:140]) and torch.equal(dirty[240:], expected[240:])
        assert dirty[140:240].isnan().all()


def test_wider_heads_and_expanded_gradients():
    """Wider ones have other kernels; a sum's gradient is one number with strides of 0, and is copied or goes there."""
    q = torch.randn(1, 70, 2, 64).to(BF16).requires_grad_()
    summed = torch.autograd.grad(mk.attention(q, q, q, impl="cuda").sum(), q)[0]
    filled = torch.autograd.grad(mk.attention(q, q, q, impl="cuda"), q, torch.ones_like(q))[0]
    assert (summed.float() - filled.float()).abs().max() < 0.05
    wide = torch.randn(1, 20, 1, 160).to(BF16).requires_grad_()
    with launches() as seen:
        torch.autograd.grad(mk.attention(wide, wide, wide, impl="cuda"), wide, torch.ones_like(wide))
    assert not [launch.kernel for launch in seen if "hopper_gradient" in launch.kernel]
