"""The CUDA C++ ops: parity with eager, on a GPU or, without one, run from their own PTX with every access checked."""

import pytest
import torch

import mistral_kernels
from mistral_kernels import testing
from mistral_kernels.testing import (
    add_norm_case,
    attention_case,
    cached_case,
    norm_case,
    packed_attention_case,
    parity,
    pooled,
    pooled_max,
    rope_case,
    rope_write_case,
    swiglu_case,
    swiglu_packed_case,
    write_case,
)

pytestmark = pytest.mark.usefixtures("cuda_ops", "one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)

ELEMENTWISE = [
    norm_case((7, 576)),
    norm_case((5, 1000), "fp32"),
    norm_case((3, 5125)),
    add_norm_case((2, 5, 96)),
    add_norm_case((17, 264), "fp32"),
    swiglu_case((5, 1000)),
    swiglu_case((3, 7)),
    swiglu_packed_case((2, 3, 96)),
    swiglu_packed_case((5, 2 * 33)),
    rope_case(2, 5, 4, 2, 64),
    rope_case(None, 7, 9, 3, 128, interleaved=True, first=100),
    rope_case(1, 3, 3, 1, 96, first=31),
    rope_case(1, 2, 7, 7, 10, interleaved=True),
]
RING = [
    rope_write_case([5, 7, 2], [0, 1, 3], 3, 6, 2, 64),
    rope_write_case([0, 40], [5, 0], 16, 3, 1, 128, interleaved=True),
    write_case([1, 1, 1], [0, 63, 1000], 64, 2, 64),
    cached_case([1, 1, 1, 1], [1, 40, 64, 999], 64, 6, 2, 64, window=64, chunk=False),
    cached_case([1, 1], [0, 7], 16, 7, 1, 96, window=8, chunk=False),
    cached_case([1], [700], 1024, 4, 2, 128, window=700, chunk=False),
    cached_case([16, 5, 1, 0, 33], [0, 3, 77, 4, 16], 16, 6, 2, 64, window=16),
    cached_case([17, 1], [0, 100], 128, 9, 3, 128),
]
ATTENTION = [
    attention_case(1, 130, 130, 2, 1, 64),
    attention_case(1, 130, 130, 2, 1, 64, window=65),
    attention_case(1, 33, 33, 3, 1, 40, window=16),
    attention_case(1, 40, 70, 2, 2, 96, window=3),
    attention_case(1, 33, 33, 2, 1, 128),
    attention_case(1, 20, 20, 2, 1, 256, window=7),
    attention_case(1, 70, 20, 2, 2, 64),
    attention_case(1, 19, 41, 4, 2, 64, causal=False),
    packed_attention_case([(5, 5), (0, 0), (70, 70), (1, 1)], 4, 2, 64, window=32),
    packed_attention_case([(3, 60), (0, 4), (4, 0), (33, 33)], 2, 2, 128),
]


def judge(cases, dtype, kinds, gradients=False):
    """The largest error of each case, and the RMS errors of each output over all cases together."""
    found = {}
    for case in cases:
        for kind in kinds:
            result = parity(case, dtype, "cuda", device=DEVICE, kind=kind, gradients=gradients)
            assert pooled_max(result) <= 1, (case.op, case.label, kind, result)
            for e in result:
                found.setdefault((case.op, e.output), []).append(e)
    for name, errors in found.items():
        assert pooled(errors) <= 1, (name, pooled(errors))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_elementwise_and_gradients(dtype):
    judge(ELEMENTWISE, dtype, ("gaussian", "ramp"), gradients=True)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_ring_writes_and_decoding(dtype):
    judge(RING, dtype, ("gaussian",))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_attention_and_gradients(dtype):
    judge(ATTENTION, dtype, ("gaussian",), gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({c.op for c in testing.cases()} - {"linear", "linear_cross_entropy"}))
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_full_grid(op, dtype):
    differentiable = "write" not in op and "cached" not in op
    cases = [c for c in testing.cases() if c.op == op and not c.label.startswith("int8 ring")]  # not in CUDA C++
    judge(cases, dtype, testing.KINDS, gradients=differentiable)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_window_changes_the_result(dtype):
    arguments = attention_case(1, 66, 66, 2, 1, 64, window=7).arguments(dtype, DEVICE)
    windowed = mistral_kernels.attention(**arguments, impl="cuda")[0]
    causal = mistral_kernels.attention(**arguments | dict(window=None), impl="cuda")[0]
    whole = mistral_kernels.attention(**arguments | dict(window=66), impl="cuda")[0]
    assert not torch.equal(windowed, causal) and torch.equal(whole, causal)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("n", [96, 264, 600, 1024, 1032, 4096, 5000, 8192])
def test_a_norm_does_not_depend_on_the_number_of_rows(n, dtype):
    x, residual = (testing.fill((150, n), seed=i).to(DEVICE, dtype) for i in range(2))
    weight = testing.fill((n,), seed=2).to(DEVICE, dtype)
    for few, all_rows in zip(
        mistral_kernels.add_rms_norm(x[:3], residual[:3], weight, impl="cuda"),
        mistral_kernels.add_rms_norm(x, residual, weight, impl="cuda"),
        strict=True,
    ):
        assert torch.equal(few, all_rows[:3])


def test_backward_runs_in_cuda_too(monkeypatch):
    from mistral_kernels._dispatch import Op

    called = []
    call = Op.__call__
    monkeypatch.setattr(Op, "__call__", lambda self, impl, *a: called.append((self.name, impl)) or call(self, impl, *a))
    x = torch.randn(4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    mistral_kernels.rms_norm(x, torch.ones_like(x[0]), impl="cuda").sum().backward()
    q = torch.randn(1, 4, 1, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    mistral_kernels.attention(q, q, q, impl="cuda").sum().backward()
    assert ("rms_norm_backward", "cuda") in called and ("attention_backward", "cuda") in called


def test_gradients_are_deterministic():
    arguments = attention_case(1, 70, 70, 2, 1, 64, window=20).arguments(torch.bfloat16, DEVICE)
    first, second = (testing.call_with_gradients("attention", arguments, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs_are_read_in_place():
    packed = torch.randn(2, 9, 4 + 2 + 2, 64, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = packed.split((4, 2, 2), dim=2)
    strided = mistral_kernels.attention(q, k, v, impl="cuda")
    assert torch.equal(strided, mistral_kernels.attention(*(t.contiguous() for t in (q, k, v)), impl="cuda"))
    x = packed.permute(3, 1, 0, 2).flip(0)[..., 1:]
    weight = torch.ones(7, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(
        mistral_kernels.rms_norm(x, weight, impl="cuda"), mistral_kernels.rms_norm(x.contiguous(), weight, impl="cuda")
    )


def test_what_cannot_run_says_why():
    x = torch.ones(2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="no float64"):
        mistral_kernels.rms_norm(x, x[0], impl="cuda")
    q = torch.ones(1, 3, 1, 20, device=DEVICE)
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        mistral_kernels.attention(q, q, q, impl="cuda")


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty_inputs(shape):
    x = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(shape[1], device=DEVICE, dtype=torch.bfloat16)
    assert mistral_kernels.rms_norm(x, weight, impl="cuda").shape == shape
    assert mistral_kernels.swiglu(x, x, impl="cuda").shape == shape
