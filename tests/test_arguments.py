"""What may be handed to the ops besides what the examples hand over: index tensors of any strides, numbers of any kind.

Wrong arguments raise before a kernel runs, with the argument's name, what came and what is needed.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mistral_kernels as mk
from mistral_kernels import _dispatch
from mistral_kernels.testing import fill

IMPLS = [name for name, reason in mk.backends().items() if reason is None and name not in ("cuda", "flash_attn")]
COS, SIN = mk.rope_table(8, 1e4, 32)


def made(*shape, seed=0):
    return fill(shape, seed=seed).float()


@pytest.fixture(params=[*IMPLS, "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_ops")
    return request.param


# ---- index tensors that do not lie in a row ----


def spread(values, dtype=torch.int32):
    """The values in every second place of memory, large ones between."""
    return torch.tensor([n for v in values for n in (v, 7)], dtype=dtype)[::2]


def heads(*shape, seed=0):
    return tuple(made(*shape, h, 8, seed=seed + h) for h in (4, 2, 2))


def device_of(impl):
    return "cuda" if impl in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def packed_attention(ends, impl):
    q, k, v = (t.to(ends.device).requires_grad_() for t in heads(6))
    out = mk.attention(q, k, v, window=2, cu_seqlens_q=ends, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), made(6, 4, 8, seed=9).to(ends.device))]


def packed_ring(ends, impl):
    q, k, v, cos, sin = (t.to(ends.device) for t in (*heads(6), COS, SIN))
    ring = torch.zeros(2, 2, 12, 2, 8, device=ends.device)
    positions, lens = (torch.tensor(n, dtype=torch.int32, device=ends.device) for n in ([0, 1, 0, 1, 2, 3], [2, 4]))
    q, _ = mk.rope_write_kv(q, k, v, *ring, positions, cos, sin, cu_seqlens=ends, impl=impl)
    return [ring, mk.attention_cached(q, *ring, lens, 3, cu_seqlens=ends, impl=impl)]


def ring_of_lengths(lens, impl):
    q, k, v = (t.to(lens.device) for t in (made(2, 4, 8), *made(2, 2, 5, 2, 8, seed=1)))
    return [mk.attention_cached(q, k, v, lens, 3, impl=impl)]


def rotated(positions, impl):
    q, k, cos, sin = (t.to(positions.device) for t in (*heads(6)[:2], COS, SIN))
    return list(mk.rope(q, k, cos, sin, positions, impl=impl))


def loss(labels, impl):
    hidden, weight = (t.to(labels.device).requires_grad_() for t in (made(6, 8), made(11, 8, seed=1)))
    losses = mk.linear_cross_entropy(hidden, weight, labels, reduction="none", impl=None if impl == "cuda" else impl)
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), torch.ones_like(losses[:1]).expand(6))]


INDEXED = {
    "cu_seqlens of attention": (packed_attention, spread([0, 2, 6])),
    "cu_seqlens of the ring": (packed_ring, spread([0, 2, 6])),
    "seq_lens": (ring_of_lengths, spread([3, 5])),
    "one of seq_lens for all": (ring_of_lengths, torch.tensor([4], dtype=torch.int32).expand(2)),
    "no tokens": (ring_of_lengths, torch.tensor([0, -1], dtype=torch.int32)),
    "positions": (rotated, spread([3, 1, 4, 1, 5, 9])),
    "labels": (loss, spread([3, 1, 4, -100, 5, 9], torch.int64)),
}


@pytest.mark.parametrize("name", INDEXED)
def test_strides_of_index_tensors(name, impl):
    run, index = INDEXED[name]
    memory = index.as_strided((index.untyped_storage().nbytes() // index.element_size(),), (1,), 0)
    there = memory.to(device_of(impl)).as_strided(index.shape, index.stride(), index.storage_offset())
    for got, expected in zip(run(there, impl), run(index.contiguous(), "reference"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_values_stored_negated(impl):
    """The imaginary part of a conjugate is a view whose memory holds the negated values."""
    x = torch.complex(made(3, 8, seed=4), made(3, 8)).conj().imag
    q = torch.complex(made(5, 4, 8), made(5, 4, 8, seed=4)).conj().imag[None]
    assert x.is_neg() and q.is_neg() and not _dispatch._as_they_are([x])
    if device_of(impl) == "cpu":
        torch.testing.assert_close(mk.swiglu(x, x, impl=impl), mk.swiglu(x.clone(), x.clone(), impl="reference"))
        torch.testing.assert_close(mk.attention(q, q, q, impl=impl), mk.attention(*[q.clone()] * 3, impl="reference"))


# ---- numbers ----

Q, K, V = heads(1, 5)
X, W = made(3, 8), made(8)
LABELS = torch.tensor([1, 0, 7])
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
RING = made(1, 6, 2, 8, seed=3)
LENS = torch.tensor([5], dtype=torch.int32)


def test_windows_of_any_size(impl):
    """Where there are fewer keys than queries too, the sum of a window and a position is not past the end of int32."""
    q, k, v, ring, lens = (t.to(device_of(impl)) for t in (Q, K, V, RING, LENS))
    for keys in (5, 3):
        causal = mk.attention(q, k[:, :keys], v[:, :keys], impl=impl)
        for window in (np.int64(9), 2**31 - 1, 2**63):
            assert torch.equal(mk.attention(q, k[:, :keys], v[:, :keys], window, impl=impl), causal)
    for window in (2**31 - 1, 2**63):
        cached = mk.attention_cached(q[:, :1], ring, ring, lens, window, impl=impl)
        assert torch.equal(cached, mk.attention_cached(q[:, :1], ring, ring, lens, impl=impl))


def test_numbers_that_are_not_python_s():
    expected = mk.attention(Q, K, V, window=2, scale=0.5)
    got = mk.attention(Q, K, V, np.int32(2), np.float32(0.5), np.bool_(True))
    assert torch.equal(got, expected)
    assert torch.equal(mk.rms_norm(X, W, np.float64(1e-5)), mk.rms_norm(X, W, 1e-5))
    loss = mk.linear_cross_entropy(X, made(9, 8), LABELS, np.int64(7), chunk=np.int64(2))
    torch.testing.assert_close(loss, mk.linear_cross_entropy(X, made(9, 8), LABELS, 7))


@pytest.mark.parametrize("longest", [3, 5, 2**40, torch.tensor(3)])
def test_longest_sequence(longest, impl):
    q, k, v, ends = (t.to(device_of(impl)) for t in (Q[0], K[0], V[0], ENDS))
    how = dict(max_seqlen_q=longest, max_seqlen_k=longest)
    assert torch.equal(
        mk.attention(q, k, v, cu_seqlens_q=ends, **how, impl=impl),
        mk.attention(q, k, v, cu_seqlens_q=ends, impl=impl),
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_as_arguments_of_compiled_code(dynamic):
    def layer(q, k, v, ends, window, scale, longest):
        return mk.attention(q, k, v, window, scale, cu_seqlens_q=ends, max_seqlen_q=longest, max_seqlen_k=longest)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    for numbers in ((2, 0.25, 3), (3, 0.5, 4), (2**40, 0.125, 5)):
        assert torch.equal(compiled(Q[0], K[0], V[0], ENDS, *numbers), layer(Q[0], K[0], V[0], ENDS, *numbers))


def packed(**how):
    return mk.attention(Q[0], K[0], V[0], cu_seqlens_q=ENDS, **how)


def table(*arguments):
    return lambda: mk.rope_table(*arguments)


NONE = {
    "k": lambda: mk.attention(Q, None, None),
    "weight": lambda: mk.rms_norm(X, None),
    "residual": lambda: mk.add_rms_norm(X, None, W),
    "up": lambda: mk.swiglu(X, None),
    "gate_up": lambda: mk.swiglu_packed(None),
    "cos": lambda: mk.rope(Q, K, None, None),
    "x": lambda: mk.linear(None, X),
    "labels": lambda: mk.linear_cross_entropy(X, X, None),
    "hidden": lambda: mk.linear_cross_entropy(None, X, LABELS),
    "scale": lambda: mk.linear_int8(X, torch.zeros(4, 8, dtype=torch.int8), None),
    "positions": lambda: mk.write_kv(K, V, RING, RING, None),
    "seq_lens": lambda: mk.attention_cached(Q, RING, RING, None),
    "k_cache": lambda: mk.attention_cached(Q, None, None, LENS),
}
BAD = {
    "sparse": (lambda: mk.rms_norm(X.to_sparse(), W), TypeError, "x has layout torch.sparse_coo; it must be a dense"),
    "scale": (lambda: mk.attention(Q, K, V, scale="big"), TypeError, "scale is 'big'; it must be a number"),
    "scale nan": (lambda: mk.attention(Q, K, V, scale=float("nan")), ValueError, "scale is nan; it must be finite"),
    "scale inf": (lambda: mk.attention_cached(Q, RING, RING, LENS, scale=float("inf")), ValueError, "be finite"),
    "eps": (lambda: mk.rms_norm(X, W, eps=None), TypeError, "eps is None; it must be a number"),
    "window": (lambda: mk.attention(Q, K, V, torch.tensor(2)), ValueError, r"window is tensor\(2\); it must be None"),
    "causal": (lambda: mk.attention(Q, K, V, causal="no"), TypeError, "causal is 'no'; it must be True or False"),
    "causal None": (lambda: mk.attention(Q, K, V, causal=None), TypeError, "causal is None"),
    "interleaved": (lambda: mk.rope(Q, K, COS, SIN, interleaved=None), TypeError, "interleaved is None; it must be"),
    "too short": (lambda: packed(max_seqlen_q=2), ValueError, "max_seqlen_q is 2; .* a sequence of 3 tokens is there"),
    "none": (lambda: packed(max_seqlen_k=0), ValueError, "max_seqlen_k is 0"),
    "part": (lambda: packed(max_seqlen_k=3.5), ValueError, "max_seqlen_k is 3.5; it must be an int"),
    "no head": (lambda: mk.attention(Q[..., :0], K[..., :0], V[..., :0]), ValueError, "must be at least 1"),
    "ignore": (
        lambda: mk.linear_cross_entropy(X, X, LABELS, ignore_index=None),
        TypeError,
        "ignore_index is None; it must be an int",
    ),
    "items": (lambda: mk.linear_cross_entropy(X, X, LABELS, num_items="3"), TypeError, "num_items is '3'; it must be"),
    "cache": (
        lambda: mk.write_kv(K, V, RING.clone().requires_grad_(), RING, torch.arange(5)[None]),
        NotImplementedError,
        "k_cache requires one",
    ),
    "table size": (table(8, 1e4, 3.5), ValueError, "max_positions 3.5; they must be positive"),
    "table head": (table(8.0,), ValueError, "head_dim is 8.0; it must be an even int"),
    "table theta": (table(8, "1e4"), TypeError, "theta is '1e4'; it must be a number"),
    "table scaling": (table(8, 1e4, 4, "linear"), TypeError, "scaling is 'linear'; it must be None or a mapping"),
    "table factor": (
        table(8, 1e4, 4, {"rope_type": "linear", "factor": 0}),
        ValueError,
        r"scaling\['factor'\] is 0; it must be positive",
    ),
    "table yarn": (
        table(8, 1, 4, {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 4}),
        ValueError,
        "theta is 1 with scaling of rope_type 'yarn'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_none_is_no_tensor(name):
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor.*NoneType"):
        NONE[name]()


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_values_that_are_not_there():
    """Labels, positions and ends are looked up where they have values, and taken as they are where they have none."""
    with FakeTensorMode() as mode:
        q, k, v, x, w, labels, ends = (mode.from_tensor(t) for t in (Q, K, V, X, made(9, 8), LABELS, ENDS))
        cos, sin, positions, ring, lens = (mode.from_tensor(t) for t in (COS, SIN, torch.arange(5), RING, LENS))
        assert mk.linear_cross_entropy(x, w, labels).shape == ()
        assert mk.attention(q[0], k[0], v[0], cu_seqlens_q=ends, max_seqlen_q=3).shape == (5, 4, 8)
        assert mk.rope(q[0], k[0], cos, sin, positions)[0].shape == (5, 4, 8)
        assert mk.attention_cached(q[:, :1], ring, ring, lens, 3).shape == (1, 1, 4, 8)
        mk.write_kv(k, v, ring, ring, positions[None])
