"""Attention for compute capability 9.0: parity with eager, its PTX run on a CPU with every access checked.

The emulator is told that it is such a device. The checks are strict: of each rule of the memory model that is
contested, the reading that asks for more holds.
"""

import itertools

import pytest
import torch
from hopper_grids import forward
from ptx_on_cpu import launches, option

import mistral_kernels as mk
from mistral_kernels.testing import (
    attention_case,
    cached_case,
    packed_attention_case,
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


def judge(cases, dtype, kind="gaussian", outputs=("out0", "out1")):
    found = {}
    for case in cases:
        with launches() as seen:
            result = [e for e in parity(case, dtype, "cuda", kind=kind) if e.output in outputs]
        assert any("hopper" in launch.kernel for launch in seen), (case.label, [launch.kernel for launch in seen])
        assert not result or pooled_max(result) <= 1, (case.op, case.label, kind, result)
        for e in result:
            found.setdefault((case.op, e.output), []).append(e)
    for name, errors in found.items():
        assert pooled(errors) <= 1, (name, pooled(errors))


@pytest.mark.parametrize("dim", [64, 128])
def test_parity(dim):
    judge(forward(dim), BF16)


def test_parity_of_the_widest_heads():
    """Those that one kernel serves: a first run compiles each kernel for half a minute."""
    cases = [attention_case(1, 150, 150, 2, 1, 256), attention_case(1, 200, 300, 1, 1, 200, window=70)]
    cases += [packed_attention_case([(65, 65), (0, 0), (140, 200)], 2, 1, 256)]
    judge([*cases, cached_case([100, 3], [130, 1000], 300, 2, 1, 256, window=290)], BF16)


def test_parity_of_padded_heads():
    judge([attention_case(1, 130, 150, 2, 1, dim, window=100) for dim in (72, 96, 120)], BF16)


def test_parity_of_float16():
    cases = [attention_case(1, 130, 260, 4, 2, 128, window=100), attention_case(1, 200, 200, 1, 1, 96)]
    judge([*cases, packed_attention_case([(140, 140), (0, 0), (70, 200)], 2, 1, 128)], F16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "ramp", "one_hot", "large"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 200, 256])
def test_full_grid(dim, dtype, kind):
    judge(forward(dim), dtype, kind, ("out0", "out1") if dim <= 128 else ("out0",))


# Eager's lse comes from products summed in float32, a tensor core cuts every addend 25 bits below the largest: of wide
# heads, and the more where scores are large, that is over 1.1 times eager's RMS error. An H100 says the same.
# Of large scores eager is on some processors as far off.
OVER_BUDGET = {
    *((200, dtype, kind) for dtype in (BF16, F16) for kind in ("ramp", "large")),
    (256, BF16, "large"),
    *((256, F16, kind) for kind in ("gaussian", "ramp", "large")),
}


def of_wide_heads():
    for case in itertools.product((200, 256), (BF16, F16), ("gaussian", "ramp", "one_hot", "large")):
        why = "the RMS error of lse is over the budget on tensor cores (docs/cuda.md)"
        fails = pytest.mark.xfail(strict=case[-1] != "large", reason=why)
        yield pytest.param(*case, marks=fails if case in OVER_BUDGET else ())


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "dtype", "kind"), of_wide_heads())
def test_lse_of_wide_heads(dim, dtype, kind):
    judge((c for c in forward(dim) if c.op == "attention"), dtype, kind, ("out1",))


def tensors(queries, keys, heads, kv_heads, dim, dtype=BF16):
    torch.manual_seed(0)
    q = torch.randn(1, queries, heads, dim).to(dtype)
    return q, *(torch.randn(1, keys, kv_heads, dim).to(dtype) for _ in "kv")


def kernels(*args, **how):
    with launches() as seen:
        out = mk.attention(*args, impl="cuda", **how)
    return out, [launch.kernel for launch in seen]


def test_what_the_copy_engine_cannot_read_goes_to_the_other_kernels():
    q, k, v = tensors(130, 130, 2, 1, 64)
    assert "hopper" in kernels(q, k, v)[1][0]
    assert "hopper" not in kernels(*(t.float() for t in (q, k, v)))[1][0]
    wide = k.expand(-1, -1, 2, -1)
    out, used = kernels(q, wide, v.expand(-1, -1, 2, -1))
    assert "hopper" not in used[0]
    assert torch.allclose(out.float(), kernels(q, k, v)[0].float(), atol=0.02)
    with option("capability", 80):
        assert "hopper" not in kernels(q, k, v)[1][0]


def test_strided_inputs_are_read_in_place():
    packed = torch.randn(2, 150, 4 + 2 + 2, 64).to(BF16)
    q, k, v = packed.split((4, 2, 2), dim=2)
    out, used = kernels(q, k, v)
    assert "hopper" in used[0]
    assert torch.equal(out, kernels(*(t.contiguous() for t in (q, k, v)))[0])
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(out, kernels(*heads_first)[0])


@pytest.mark.parametrize("window", [1, 65, 200])
def test_a_window_changes_the_result(window):
    q, k, v = tensors(200, 200, 2, 1, 64)
    windowed, causal = (kernels(q, k, v, window=w)[0] for w in (window, None))
    assert torch.equal(windowed, causal) == (window == 200)


def test_scores_of_a_negative_and_of_no_scale():
    q, k, v = tensors(140, 140, 2, 1, 64)
    for scale in (-0.125, 0.0):
        expected = mk.attention(*(t.double() for t in (q, k, v)), scale=scale, impl="reference")
        assert (kernels(q, k, v, scale=scale)[0].double() - expected).abs().max() < 0.02


def test_neighbours_of_a_packed_sequence_do_not_leak():
    """Tokens of the next sequence come with the last block of this one: their NaN must not reach it."""
    lengths = [140, 100, 3]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), heads, 64).to(BF16) for heads in (2, 1, 1))
    how = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=140, max_seqlen_k=140)
    clean, used = kernels(q, k, v, **how)
    assert "hopper" in used[0]
    for t in (k, v):
        t[140:240] = torch.nan
    dirty = kernels(q, k, v, **how)[0]
    assert torch.equal(dirty[:140], clean[:140]) and torch.equal(dirty[240:], clean[240:])
    assert dirty[140:240].isnan().all()


def test_slots_that_nobody_has_written_do_not_matter():
    torch.manual_seed(0)
    q, ring = torch.randn(2, 8, 64).to(BF16), [torch.randn(2, 300, 2, 64).to(BF16) for _ in "kv"]
    lens = torch.tensor([130, 299], dtype=torch.int32)
    expected = mk.attention_cached(q, *ring, lens, impl="reference")
    for cache, (b, seen) in itertools.product(ring, enumerate(lens.tolist())):
        cache[b, seen:] = torch.nan
    assert torch.allclose(mk.attention_cached(q, *ring, lens, impl="cuda").float(), expected.float(), atol=0.02)


def test_splits_of_the_keys_agree_with_one_walk():
    """On four multiprocessors a sequence is walked in one go; on sixty its keys are split over blocks and combined."""
    q, k, v = tensors(1, 2500, 4, 1, 64)
    with option("multiprocessors", 1):
        whole, used = kernels(q, k, v)
    assert len(used) == 1
    with option("multiprocessors", 60):
        split, used = kernels(q, k, v)
    assert len(used) == 2 and "hopper" in used[0] and "combine" in used[1]
    assert (whole.float() - split.float()).abs().max() < 0.01


def test_it_is_deterministic_whatever_the_number_of_blocks():
    q, k, v = tensors(500, 500, 2, 1, 64)
    first, second = kernels(q, k, v)[0], kernels(q, k, v)[0]
    with option("multiprocessors", 3):
        other = kernels(q, k, v)[0]
    assert torch.equal(first, second) and torch.equal(first, other)
