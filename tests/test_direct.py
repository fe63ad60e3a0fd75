"""Calls past torch's dispatcher: the same bits as through it, and only where nobody would see the difference."""

import gc
import sys
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mistral_kernels as mk
from mistral_kernels import _direct, _dispatch
from mistral_kernels.testing import fill

pytestmark = pytest.mark.skipif(_direct._module() is None, reason="the module for short calls is not built")


def made(*shape, seed=0, dtype=torch.float32):
    return fill(shape, seed=seed).to(dtype)


OPS = [
    member
    for name, module in sys.modules.items()
    if name.startswith("mistral_kernels.")
    for member in vars(module).values()
    if isinstance(member, _dispatch.Op)
]
WAYS = ("at_once", "first_at_once", "_run_directly")
X, W, COS_SIN = made(3, 8), made(8, seed=1), mk.rope_table(8, 1e4, 32)


@pytest.fixture
def taken(monkeypatch):
    """Counts the direct calls of some ops that went through."""
    counts = []
    for op in OPS:
        if op.name not in ("rms_norm", "swiglu", "attention", "attention_cached", "linear"):
            continue
        for name in WAYS:
            run = getattr(op, name)

            def counted(*args, run=run, name=name):
                done = run(*args)
                if done is not None:
                    counts.append(name)
                return done

            monkeypatch.setattr(op, name, counted)
    return counts


def attention_inputs(dtype):
    q, k, v = (
        made(1, 5, 4, 8, dtype=dtype),
        made(1, 5, 2, 8, seed=1, dtype=dtype),
        made(1, 5, 2, 8, seed=2, dtype=dtype),
    )
    ring = [made(1, 6, 2, 8, seed=s, dtype=dtype) for s in (3, 4)]
    return q, k, v, ring


def calls(dtype):
    """A call of each public op that has a way past the dispatcher, on arguments made anew."""
    x, w = made(3, 8, dtype=dtype), made(8, seed=1, dtype=dtype)
    q, k, v, ring = attention_inputs(dtype)
    cos, sin = (t.double() for t in COS_SIN) if dtype == torch.float64 else COS_SIN
    at, lens = torch.arange(5)[None], torch.tensor([5], dtype=torch.int32)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    yield "rms_norm", lambda: mk.rms_norm(x, w)
    yield "rms_norm rounded once", lambda: mk.rms_norm(x, w, rounding="fp32")
    yield "add_rms_norm", lambda: mk.add_rms_norm(x, x, w)
    yield "swiglu", lambda: mk.swiglu(x, x)
    yield "swiglu_packed", lambda: mk.swiglu_packed(x)
    yield "rope", lambda: mk.rope(q, k, cos, sin)
    yield "rope at positions", lambda: mk.rope(q, k, cos, sin, at)
    yield "linear", lambda: mk.linear(x, made(4, 8, dtype=dtype))
    yield "linear with bias", lambda: mk.linear(x, made(4, 8, dtype=dtype), made(4, dtype=dtype))
    yield "attention", lambda: mk.attention(q, k, v, 3)
    yield "attention with lse", lambda: mk.attention(q, k, v, 3, return_lse=True)
    yield "attention of another scale", lambda: mk.attention(q, k, v, 3, scale=0.3)
    yield "packed attention", lambda: mk.attention(q[0], k[0], v[0], 3, cu_seqlens_q=ends)
    yield "attention_cached", lambda: mk.attention_cached(q[:, :1], *ring, lens, 3)
    yield "packed attention_cached", lambda: mk.attention_cached(q[0], *ring, lens, 2, cu_seqlens=ends[[0, 2]])
    for name, write in (
        ("write_kv", lambda own: mk.write_kv(k, v, *own, at)),
        ("rope_write_kv", lambda own: mk.rope_write_kv(q, k, v, *own, at, cos, sin)),
    ):

        def run(write=write):
            own = [t.clone() for t in ring]
            return *(write(own) or ()), *own

        yield name, run


def together(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_bits_as_through_the_dispatcher(dtype, monkeypatch):
    directly = {name: together(run()) for name, run in calls(dtype)}
    for op in OPS:
        for name in WAYS:
            monkeypatch.setattr(op, name, _direct.never)
    for name, run in calls(dtype):
        for got, expected in zip(directly[name], together(run()), strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype, name
            assert got.is_contiguous() and got.stride() == expected.stride(), name


def test_plain_calls_take_it(taken):
    mk.rms_norm(X, W)
    mk.swiglu(X, X)
    mk.rms_norm(X, torch.nn.Parameter(W, requires_grad=False))
    assert taken == ["at_once"] * 3
    with torch.no_grad():
        mk.rms_norm(X, torch.nn.Parameter(W))
    assert taken == ["at_once"] * 4


def test_under_autograd_the_kernel_is_called_below_it(taken):
    w = W.clone().requires_grad_()
    out = mk.rms_norm(X, w)
    assert taken == ["_run_directly"] and out.requires_grad and out.untyped_storage().resizable()
    (grad,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(grad, torch.autograd.grad(mk.rms_norm(X, w, impl="reference").sum(), w)[0])


class Mine(torch.Tensor):
    pass


class SeesFunctions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        SeesFunctions.seen += "rms_norm" in str(func)
        return func(*args, **(kwargs or {}))


class SeesOps(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        SeesOps.seen += "rms_norm" in str(func)
        return func(*args, **(kwargs or {}))


def test_whoever_would_see_the_call_sees_it(taken):
    expected = mk.rms_norm(X, W, impl="reference")
    taken.clear()
    with SeesFunctions():
        torch.testing.assert_close(mk.rms_norm(X, W), expected)
    with SeesOps():
        torch.testing.assert_close(mk.rms_norm(X, W), expected)
    assert SeesFunctions.seen and SeesOps.seen
    with torch.profiler.profile() as profile:
        mk.rms_norm(X, W)
    assert any("rms_norm" in event.key for event in profile.key_averages())
    rows = torch.func.vmap(lambda x: mk.rms_norm(x, W))(X)
    torch.testing.assert_close(rows, expected)
    traced = torch.jit.trace(lambda x: mk.rms_norm(x, W), X, check_trace=False)
    assert "rms_norm" in str(traced.graph)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(mk.rms_norm(X, W), expected)
    assert type(mk.rms_norm(X.as_subclass(Mine), W)) is Mine
    assert taken == []


def test_autocast_casts_what_it_casts(taken):
    q, k, v, _ = attention_inputs(torch.float32)
    weight = made(4, 8)
    mk.attention(q, k, v), mk.linear(X, weight)
    assert taken == ["first_at_once", "at_once"]
    taken.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mk.attention(q, k, v).dtype == mk.linear(X, weight).dtype == torch.bfloat16
        assert mk.rms_norm(X, W).dtype == torch.float32
    assert "first_at_once" not in taken and taken[-1:] == ["at_once"]


def test_a_scale_of_none_is_one_of_the_head(taken):
    q, k, v, ring = attention_inputs(torch.float32)
    lens = torch.tensor([5], dtype=torch.int32)
    assert torch.equal(mk.attention(q, k, v), mk.attention(q, k, v, scale=8**-0.5))
    assert torch.equal(
        mk.attention_cached(q[:, :1], *ring, lens), mk.attention_cached(q[:, :1], *ring, lens, scale=8**-0.5)
    )
    assert taken == ["first_at_once"] * 2 + ["at_once"] * 2


def test_compiled_code_sees_the_op():
    compiled = torch.compile(lambda x: mk.rms_norm(x, W) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), mk.rms_norm(X, W) + 1)


REFUSED = {
    "of another dtype than the weight": lambda: mk.rms_norm(X.double(), W),
    "of rows that do not lie in a row": lambda: mk.rms_norm(made(8, 3).T, W),
    "negated": lambda: mk.rms_norm(torch.complex(X, made(3, 8, seed=4)).conj().imag, W),
    "one number, negated": lambda: mk.rms_norm(torch.complex(X, X)[:, :1].conj().imag, W[:1]),
    "positions of one row for all": lambda: mk.rope(
        made(2, 5, 4, 8), made(2, 5, 2, 8), *COS_SIN, torch.arange(5).expand(2, 5)
    )[0],
    "eps an int": lambda: mk.rms_norm(X, W, 1),
    "many rows": lambda: mk.linear(made(40, 8), made(4, 8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_kernel_cannot_take_as_it_is_goes_the_long_way(name, monkeypatch):
    call, got = REFUSED[name], REFUSED[name]()
    for op in ("rms_norm", "rope", "linear"):
        ours = getattr(mk, op)
        monkeypatch.setattr(mk, op, lambda *args, ours=ours: ours(*args, impl="reference"))
    torch.testing.assert_close(got, call(), rtol=1e-5, atol=1e-6)


def test_errors_are_those_of_the_long_way():
    with pytest.raises(ValueError, match="weight is"):
        mk.rms_norm(X, W[:4])
    with pytest.raises(TypeError, match="x must be a tensor"):
        mk.rms_norm([1.0], W)
    with pytest.raises(TypeError, match="layout"):
        mk.rms_norm(X.to_sparse(), W)
    with pytest.raises(ValueError, match="positions"):
        mk.rope(made(1, 1, 4, 8), made(1, 1, 2, 8), *COS_SIN, torch.tensor([[99]]))
    with pytest.raises(ValueError, match="window is 2"):
        mk.attention(*attention_inputs(torch.float32)[:3], window=2, causal=False)
    with pytest.raises(ValueError, match="scale"):
        mk.attention(*attention_inputs(torch.float32)[:3], scale=float("nan"))
    q, _, _, ring = attention_inputs(torch.float32)
    with pytest.raises(ValueError, match="max_seqlen is -1"):
        mk.attention_cached(
            q[0],
            *ring,
            torch.tensor([5], dtype=torch.int32),
            2,
            cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
            max_seqlen=-1,
        )


def test_memory_lives_as_long_as_its_tensor():
    kept = [mk.swiglu(made(1, 64, seed=s), made(1, 64, seed=s + 1)) for s in range(100)]
    views = [t[:, 32:] for t in kept]
    expected = [t.clone() for t in views]
    del kept
    gc.collect()
    for _ in range(100):
        mk.swiglu(made(1, 64), made(1, 64))
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert all(t.data_ptr() % 64 == 0 for t in (mk.swiglu(X, X), mk.rms_norm(X, W)))


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.parametrize("rows", [256, 4096], ids=["of its own", "torch's"])
@pytest.mark.parametrize("impl", [None, "cpu"])
def test_memory_is_given_back(rows, impl):
    x = made(rows, 256)

    def some(count):
        for _ in range(count):
            mk.swiglu(x, x, impl=impl), mk.rms_norm(x, x[0], impl=impl), mk.linear(x[:8], x[:256], impl=impl)

    some(20)
    before = resident()
    some((1 << 28) // (rows * 256))  # 2 GB in all
    assert resident() - before < 100 << 20


def test_what_only_the_backward_reads_is_given_back():
    x = made(1 << 20, 8)  # rstd takes 4 MB
    mk.rms_norm(x, W)
    before = resident()
    for _ in range(50):
        mk.rms_norm(x, W)
    assert resident() - before < 100 << 20


def test_empty_and_scalar_shapes():
    assert mk.swiglu(made(0, 8), made(0, 8)).shape == (0, 8)
    assert mk.rms_norm(made(8), W).shape == (8,)
    assert mk.rms_norm(made(2, 0, 8), W).shape == (2, 0, 8)
    assert mk.swiglu(torch.tensor(1.0), torch.tensor(2.0)).shape == ()
    deep = made(*(1,) * 10, 8)
    torch.testing.assert_close(mk.rms_norm(deep, W), mk.rms_norm(deep, W, impl="reference"))


def test_many_threads_at_once():
    x = [made(4, 64, seed=s) for s in range(8)]
    expected = [mk.swiglu(t, t, impl="reference") for t in x]
    wrong = []

    def work(i):
        for _ in range(300):
            if not torch.allclose(mk.swiglu(x[i], x[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
