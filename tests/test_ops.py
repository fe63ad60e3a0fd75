"""What every op promises to torch and to its caller, whichever implementation runs."""

import dataclasses
import functools
import sys

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.testing import fill

OPS = torch.ops.mistral_kernels
COS, SIN = mk.rope_table(8, 1e4, 32)


def leaf(*shape, dtype=torch.float32, seed=0):
    return fill(shape, seed=seed).to(dtype).requires_grad_()


def qkv(dtype=torch.float32, grad=True):
    tensors = (fill((2, 7, 6, 8)), fill((2, 7, 2, 8), seed=1), fill((2, 7, 2, 8), seed=2))
    return tuple(t.to(dtype).requires_grad_(grad) for t in tensors)


CU = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
CALLS = {
    "rms_norm": lambda: (leaf(2, 3, 16), leaf(16, seed=1), 1e-5, True),
    "add_rms_norm": lambda: (leaf(3, 16), leaf(3, 16, seed=1), leaf(16, seed=2), 1e-5, False),
    "swiglu": lambda: (leaf(3, 9), leaf(3, 9, seed=1)),
    "swiglu_packed": lambda: (leaf(2, 3, 10),),
    "linear": lambda: (leaf(2, 3, 16), leaf(5, 16, seed=1), leaf(5, seed=2)),
    "rope": lambda: (*qkv()[:2], COS, SIN, torch.arange(14).view(2, 7), True, False),
    "attention": lambda: (*qkv(), 3, 0.4, True, None, None, 7, 7),
    "rms_norm_backward": lambda: (fill((3, 8)), fill((3, 8)), fill((8,)), fill((3,)), True),
    "add_rms_norm_backward": lambda: (*(fill((3, 8), seed=s) for s in range(3)), fill((8,)), fill((3,)), False),
    "swiglu_backward": lambda: (fill((3, 8)), fill((3, 8)), fill((3, 8), seed=1)),
    "swiglu_packed_backward": lambda: (fill((3, 4)), fill((3, 8))),
}


def packed_call():
    q, k, v = (t[0].detach().requires_grad_() for t in qkv())
    return q, k, v, 2, 0.4, True, CU, CU, 7, 7


def ring_call(name):
    arguments = testing.rope_write_case([5, 0, 2], [0, 3, 9], 4, 6, 2, 8).arguments(torch.float32)
    a = arguments | {"cu": arguments["cu_seqlens"]}
    if name == "write_kv":
        return tuple(a[n] for n in ("k", "v", "k_cache", "v_cache", "positions", "cu"))
    if name == "rope_write_kv":
        names = ("q", "k", "v", "k_cache", "v_cache", "positions", "cos", "sin", "cu", "interleaved")
        return tuple(a[n] for n in names)
    lens = torch.tensor([0, 3, 9], dtype=torch.int32)
    return a["q"], a["k_cache"], a["v_cache"], lens, 3, 0.4, a["k"], a["v"], a["cu"], 5, False


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, CALLS[name]())


def test_opcheck_packed_attention():
    torch.library.opcheck(OPS.attention.default, packed_call())


@pytest.mark.parametrize("name", ["write_kv", "rope_write_kv", "attention_cached"])
def test_opcheck_ring(name):
    torch.library.opcheck(getattr(OPS, name).default, ring_call(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "attention"])
def test_opcheck_dtypes_and_permuted_inputs(name, dtype):
    def convert(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        t = t.detach().to(dtype)
        return (t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t).requires_grad_()

    torch.library.opcheck(getattr(OPS, name).default, tuple(convert(t) for t in CALLS[name]()))


# ---- gradients ----


def doubles(*shapes):
    return tuple(leaf(*s, dtype=torch.float64, seed=i) for i, s in enumerate(shapes))


@pytest.mark.parametrize("rounding", ["model", "fp32"])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradcheck_norms(rounding, impl):
    x, r, w = doubles((3, 4, 10), (3, 4, 10), (10,))
    assert torch.autograd.gradcheck(lambda x, w: mk.rms_norm(x, w, 1e-5, rounding, impl=impl), (x, w))
    assert torch.autograd.gradcheck(lambda x, r, w: mk.add_rms_norm(x, r, w, 1e-5, rounding, impl=impl), (x, r, w))


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradient_through_either_output_of_add_rms_norm(outputs):
    x, r, w = doubles((3, 10), (3, 10), (10,))
    assert torch.autograd.gradcheck(lambda x, r, w: tuple(mk.add_rms_norm(x, r, w)[i] for i in outputs), (x, r, w))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradcheck_elementwise(impl):
    a, b = doubles((3, 8), (3, 8))
    assert torch.autograd.gradcheck(lambda a, b: mk.swiglu(a, b, impl=impl), (a, b))
    assert torch.autograd.gradcheck(lambda a: mk.swiglu_packed(a, impl=impl), (a,))
    q, k = doubles((2, 4, 3, 8), (2, 4, 1, 8))
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, i=interleaved: mk.rope(q, k, COS, SIN, interleaved=i, impl=impl), (q, k)
        )


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_gradcheck_attention(window, impl):
    q, k, v = doubles((2, 5, 6, 4), (2, 7, 2, 4), (2, 7, 2, 4))
    check = torch.autograd.gradcheck
    assert check(lambda q, k, v: mk.attention(q, k, v, window, return_lse=True, impl=impl), (q, k, v))
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]).int(), torch.tensor([0, 3, 4, 7]).int()
    packed = (q[0].detach().requires_grad_(), k[0].detach().requires_grad_(), v[0].detach().requires_grad_())
    assert check(lambda q, k, v: mk.attention(q, k, v, window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, impl=impl), packed)


def test_a_query_that_sees_nothing():
    """More queries than keys: 0, lse −inf, zero gradients, and no NaN anywhere."""
    q, k, v = doubles((1, 5, 2, 4), (1, 2, 1, 4), (1, 2, 1, 4))
    out, lse = mk.attention(q, k, v, return_lse=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -torch.inf).all() and lse[..., 3:].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, :3] == 0).all()


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope", "attention"])
def test_inputs_and_gradients_are_left_alone(name):
    arguments = CALLS[name]()
    before = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    outputs = getattr(OPS, name).default(*arguments)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    seeds = [torch.ones(()).expand(o.shape) for o in outputs]  # stride 0, as sum() sends
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.grad(outputs, leaves, seeds)
    for now, then in zip(arguments, before, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    assert all((s == 1).all() for s in seeds)


def test_forward_mode_raises():
    """A jvp that returned zeros would be the worst of answers."""
    (a, b), like_eager = doubles((3, 8), (3, 8)), functools.partial(mk.swiglu, impl="reference")
    a, b = a.detach(), b.detach()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(mk.swiglu, (a, b), (b, a))
    assert torch.func.jvp(like_eager, (a, b), (b, a))[1].any()


def test_a_second_derivative_raises():
    a, b = doubles((3, 8), (3, 8))
    (first,) = torch.autograd.grad(mk.swiglu(a, b).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu_backward cannot be differentiated"):
        torch.autograd.grad(first.sum(), a)


OTHERS = fill((3, 8)).float(), fill((8,), seed=1).float()
TRANSFORMED = {
    "rms_norm": ((3, 8), lambda x: mk.rms_norm(x, OTHERS[1])),
    "add_rms_norm": ((3, 8), lambda x: sum(mk.add_rms_norm(x, OTHERS[0], OTHERS[1]))),
    "swiglu": ((3, 8), lambda x: mk.swiglu(x, OTHERS[0])),
    "swiglu_packed": ((3, 8), mk.swiglu_packed),
    "linear": ((3, 8), lambda x: mk.linear(x, OTHERS[0])),
    "rope": ((5, 4, 8), lambda q: mk.rope(q, q[:, :2], COS, SIN)[0]),
    "attention": ((1, 5, 4, 8), lambda q: mk.attention(q, q[:, :, :2], q[:, :, 2:], window=2)),
    "linear_cross_entropy": ((3, 8), lambda h: mk.linear_cross_entropy(h, OTHERS[0], torch.tensor([0, 2, -100]))),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_of_torch_func(name):
    shape, op = TRANSFORMED[name]
    samples = fill((3, *shape), seed=5).float().requires_grad_()
    losses = [op(x).square().sum() for x in samples]
    (expected,) = torch.autograd.grad(sum(losses), samples)
    samples = samples.detach()

    def loss(x):
        return op(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(samples[1]), expected[1])
    torch.testing.assert_close(torch.func.vmap(loss)(samples), torch.stack(losses).detach())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(samples), expected)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(samples), expected)


def test_a_second_derivative_by_transforms_raises():
    first = torch.func.grad(lambda x: mk.swiglu_packed(x).sum())
    with pytest.raises(NotImplementedError, match="swiglu_packed_backward cannot be differentiated"):
        torch.func.grad(lambda x: first(x).sum())(OTHERS[0])


def test_the_caches_refuse_a_gradient():
    k, v, k_cache, v_cache, positions, cu = ring_call("write_kv")
    with pytest.raises(NotImplementedError, match=r"write_kv has no derivative, but k requires one"):
        mk.write_kv(k.requires_grad_(), v, k_cache, v_cache, positions, cu)


# ---- torch.compile ----


def layer(x, residual, w, q, k, v):
    y, total = mk.add_rms_norm(x, residual, w)
    q, k = mk.rope(q, k, COS, SIN)
    return mk.swiglu(y, total).sum() + mk.attention(q, k, v, window=3).square().sum() + mk.rms_norm(y, w).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(dynamic):
    def inputs(length):
        q, k, v = leaf(1, length, 4, 8), leaf(1, length, 2, 8, seed=1), leaf(1, length, 2, 8, seed=2)
        return leaf(length, 16), leaf(length, 16, seed=1), leaf(16, seed=2), q, k, v

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 12):
        a, b = inputs(length), inputs(length)
        expected, got = layer(*a), compiled(*b)
        torch.testing.assert_close(got, expected)
        for x, y in zip(torch.autograd.grad(expected, a), torch.autograd.grad(got, b), strict=True):
            torch.testing.assert_close(x, y)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return layer(*inputs)

    inputs = (leaf(9, 16), leaf(9, 16, seed=1), leaf(16, seed=2), leaf(1, 9, 4, 8), leaf(1, 9, 2, 8), leaf(1, 9, 2, 8))
    inputs = tuple(t.detach() for t in inputs)
    torch.testing.assert_close(torch.export.export(Layer(), inputs).module()(*inputs), layer(*inputs))


# ---- arguments ----

X, W = torch.randn(3, 16), torch.ones(16)
Q, K = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
RING = torch.zeros(1, 4, 2, 8)
LENS = torch.zeros(1, dtype=torch.int32)
BAD = {
    "no tensor": (lambda: mk.rms_norm([1.0], W), TypeError, "x must be a tensor, not list"),
    "integers": (lambda: mk.rms_norm(X.int(), W), TypeError, "x is torch.int32"),
    "weight": (lambda: mk.rms_norm(X, W[:4]), ValueError, r"weight is \[4\]; with x \[3, 16\] it must be \[16\]"),
    "rounding": (lambda: mk.rms_norm(X, W, rounding="bf16"), ValueError, "rounding is 'bf16'"),
    "residual": (lambda: mk.add_rms_norm(X, X[:1], W), ValueError, r"residual is \[1, 16\] but x is \[3, 16\]"),
    "up": (lambda: mk.swiglu(X, X[:, :3]), ValueError, r"up is \[3, 3\] but gate is \[3, 16\]"),
    "odd": (lambda: mk.swiglu_packed(X[:, :3]), ValueError, "last dimension must be even"),
    "device": (lambda: mk.rms_norm(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu"),
    "impl": (lambda: mk.rms_norm(X, W, impl="fast"), ValueError, "impl is 'fast'; it must be None or one of"),
    "heads": (lambda: mk.attention(Q, K[:, :, [0, 1, 1]], K[:, :, [0, 1, 1]]), ValueError, "4 heads and k 3"),
    "kv": (lambda: mk.attention(Q, K, K[:, :3]), ValueError, r"v is \[1, 3, 2, 8\] but k is"),
    "dim": (lambda: mk.attention(Q, K[..., :4], K[..., :4]), ValueError, "head dimension 8 and k 4"),
    "batch": (lambda: mk.attention(Q, K.expand(2, 5, 2, 8), K.expand(2, 5, 2, 8)), ValueError, "without cu_seqlens"),
    "window 0": (lambda: mk.attention(Q, K, K, window=0), ValueError, "window is 0; it must be None or an int of at"),
    "window -1": (lambda: mk.attention(Q, K, K, window=-1), ValueError, "window is -1"),
    "window float": (lambda: mk.attention(Q, K, K, window=2.0), ValueError, "window is 2.0"),
    "window of all": (lambda: mk.attention(Q, K, K, window=2, causal=False), ValueError, "a window needs causal"),
    "cu end": (lambda: mk.attention(Q[0], K[0], K[0], cu_seqlens_q=CU), ValueError, "end at the 5 packed tokens"),
    "cu dtype": (lambda: mk.attention(Q[0], K[0], K[0], cu_seqlens_q=CU.long()), TypeError, "cu_seqlens_q must be a"),
    "cu alone": (lambda: mk.attention(Q, K, K, cu_seqlens_k=CU), ValueError, "cu_seqlens_k is given without"),
    "positions": (
        lambda: mk.rope(Q, K, COS, SIN, torch.full((1, 5), 32)),
        ValueError,
        "positions run from 32 to 32, but the cos/sin tables hold the positions 0 to 31",
    ),
    "long": (lambda: mk.rope(*(t.expand(1, 33, -1, -1) for t in (Q[:, :1], K[:, :1])), COS, SIN), ValueError, "33"),
    "float positions": (lambda: mk.rope(Q, K, COS, SIN, torch.ones(1, 5)), TypeError, "positions must be a tensor of"),
    "tables": (lambda: mk.rope(Q, K, COS[:, :2], SIN[:, :2]), ValueError, r"cos is \[32, 2\]; for head dimension 8"),
    "lens": (lambda: mk.attention_cached(Q, RING, RING, LENS.long(), 4), TypeError, "seq_lens must be a tensor"),
    "k_new": (lambda: mk.attention_cached(Q, RING, RING, LENS, 4, K), ValueError, "must be given together"),
    "cache dtype": (lambda: mk.write_kv(K, K, RING.double(), RING, torch.zeros(1, 5).int()), TypeError, "k_cache is"),
    "slots": (
        lambda: mk.attention_cached(Q, RING, RING, LENS + 9, window=4),
        ValueError,
        "k_cache has 4 slots, but a chunk of 5 with window 4 after 9 tokens needs 8",
    ),
    "no window": (
        lambda: mk.attention_cached(Q[:, :1], RING, RING, LENS + 5),
        ValueError,
        "after 5 tokens needs 5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_window_at_least_the_length_is_causal_and_window_one_is_v():
    q, k, v = qkv(grad=False)
    causal = mk.attention(q, k, v)
    assert torch.equal(mk.attention(q, k, v, window=7), causal)
    assert torch.equal(mk.attention(q, k, v, window=10**9), causal)
    assert not torch.equal(mk.attention(q, k, v, window=6), causal)
    assert torch.equal(mk.attention(q, k, v, window=1), v.repeat_interleave(3, dim=2))


def test_writing_a_long_chunk_first_is_an_error_unless_the_ring_holds_both():
    """Window 4 and a chunk of 5 after 9 tokens: 4 slots would have lost keys, 8 have not."""
    big, lens = torch.randn(1, 8, 2, 8), torch.tensor([14], dtype=torch.int32)
    assert mk.attention_cached(Q, big, big, lens, window=4).shape == Q.shape
    with pytest.raises(ValueError, match="attend over"):
        mk.attention_cached(Q, big[:, :7], big[:, :7], lens, window=4)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty_inputs(impl):
    ops = mk.using(impl=impl)
    assert ops.rms_norm(torch.empty(0, 16), W).shape == (0, 16)
    assert ops.swiglu(torch.empty(3, 0), torch.empty(3, 0)).shape == (3, 0)
    assert ops.attention(Q[:0], K[:0], K[:0]).shape == (0, 5, 4, 8)
    out, lse = ops.attention(Q, K[:, :0], K[:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert ops.rope(Q[:, :0], K[:, :0], COS, SIN)[0].shape == (1, 0, 4, 8)
    empty = torch.zeros(1, dtype=torch.int32)
    assert ops.attention(Q[0, :0], K[0, :0], K[0, :0], cu_seqlens_q=empty).shape == (0, 4, 8)


def test_gradients_of_empty_inputs_are_zero():
    x, w = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    mk.rms_norm(x, w).sum().backward()
    assert x.grad.shape == (0, 16) and (w.grad == 0).all()


def test_every_backend_gives_a_reason_or_works():
    for name, reason in mk.backends().items():
        if reason is None:
            assert name == "flash_attn" or mk.using(impl=name).rms_norm(X, W).shape == X.shape
        else:
            with pytest.raises(NotImplementedError, match="able here: reference"):
                mk.using(impl=name)


def test_parity_rule_catches_small_errors():
    """One element off by three roundings, a relative bias of a rounding, a NaN and a lost −inf all fail."""
    truth = fill((20, 50))
    eager = truth.bfloat16()
    assert testing.compare("out", eager, eager, truth).passed
    wrong = eager.clone()
    wrong.view(-1)[truth.abs().argmax()] *= 1 + 3 * 2**-7
    for bad in (wrong, (truth * (1 + 2**-8)).bfloat16(), eager.clone().fill_(torch.nan)):
        assert not testing.compare("out", bad, eager, truth).passed
    infinite = truth.clone().index_fill_(0, torch.tensor([3]), -torch.inf)
    assert not testing.compare("out", eager, infinite.bfloat16(), infinite).passed


def test_few_rows_are_judged_together():
    """The bias of a rounding passes in one short row, where it cannot be told from chance, and not in many of them."""
    rows = [fill((50,), seed=seed) for seed in range(40)]
    biased = [testing.compare("out", (r * (1 + 2**-8)).bfloat16(), r.bfloat16(), r) for r in rows]
    sound = [testing.compare("out", r.bfloat16(), r.bfloat16(), r) for r in rows]
    assert all(e.passed for e in biased)
    assert testing.pooled(biased) > 1 > testing.pooled(sound)
    lucky = dataclasses.replace(sound[0], max_error=4.0, max_eager=0.0, max_budget=1.0)
    ordinary = dataclasses.replace(sound[0], max_error=4.0, max_eager=3.0, max_budget=7.0)
    assert testing.pooled_max([lucky]) > 1 > testing.pooled_max([lucky, ordinary])
    assert testing.pooled_max([dataclasses.replace(lucky, rows=16), ordinary]) > 1


@pytest.mark.parametrize(("dim", "queries", "dtype", "capability", "expected"), [
    (128, 4096, torch.bfloat16, (9, 0), True),
    (72, 1, torch.float16, (9, 0), True),
    (64, 2048, torch.bfloat16, (9, 0), True),
    (64, 2049, torch.bfloat16, (9, 0), False),
    (128, 4096, torch.float32, (9, 0), False),
    (128, 4096, torch.bfloat16, (8, 0), False),
    (128, 4096, torch.bfloat16, (10, 0), False),
])  # fmt: skip
def test_where_attention_for_hopper_comes_first(monkeypatch, dim, queries, dtype, capability, expected):
    module = sys.modules["mistral_kernels.attention"]  # the op took the folder's name in the package
    module._is_hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = torch.empty(1, queries, 1, dim, dtype=dtype, device="meta")
    assert module.hopper_first(q, queries) is expected
    module._is_hopper.cache_clear()
