"""RMSNorm, SwiGLU, RoPE and the ring writes in Triton: on a GPU, or without one in Triton's interpreter.

The interpreter is judged in float32 and float16 only: it miscomputes bfloat16 (the last tests tell when it is mended).
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels._dispatch import triton_interpreted
from mistral_kernels.rms_norm.reference import rms_norm as eager_norm
from mistral_kernels.testing import KINDS, cases, errors, fill

OPS = torch.ops.mistral_kernels
NAMES = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope", "rope_write_kv", "write_kv")
INTERPRETED = triton_interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else testing.DTYPES

pytestmark = [
    pytest.mark.skipif(
        mk.backends()["triton"] is not None, reason=f"Triton cannot run here: {mk.backends()['triton']}"
    ),
    # The interpreter's NumPy says so where e^100 overflows, and where infinities are tested.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


def grid():
    """Every case; the ring writes, many programs each, in fewer kinds of values: they copy, and rotate as rope does."""
    for case in cases():
        kinds, dtypes = KINDS, DTYPES
        if "write" in case.op:
            kinds = KINDS[:2]
        if "[0, 200]" in case.label:
            kinds, dtypes = KINDS[:1], DTYPES[:1]
        for kind, dtype in itertools.product(kinds, dtypes if case.op in NAMES else ()):
            yield pytest.param(case, kind, dtype, id=f"{case.op}-{case.label}-{kind}-{dtype}")


@pytest.mark.parametrize(("case", "kind", "dtype"), list(grid()))
def test_parity(case, kind, dtype):
    testing.assert_parity(case, dtype, "triton", device=DEVICE, kind=kind)


def made(shape, dtype, seed=0):
    return fill(shape, seed=seed).to(dtype).to(DEVICE)


def check(op, **arguments):
    """Parity, contiguous outputs, and inputs that are bitwise what they were."""
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    before = {n: t.clone() for n, t in tensors.items()}
    failed = [e for e in errors(op, arguments, "triton") if not e.passed]
    assert not failed, failed
    assert all(torch.equal(before[n], t) for n, t in tensors.items())
    outputs = testing.call(op, arguments, "triton")
    assert all(t.is_contiguous() for n, t in outputs.items() if n.startswith("out"))


LAYOUTS = {
    "contiguous": lambda d: made((3, 4, 5, 48), d),
    "row stride": lambda d: made((3, 4, 5, 80), d)[..., 8:56],
    "odd row stride and offset": lambda d: made((3, 4, 5, 51), d)[..., 3:],
    "transposed": lambda d: made((5, 4, 3, 48), d).transpose(0, 2),
    "merges in two": lambda d: made((3, 4, 7, 48), d)[:, :, 1:6],
    "three that do not merge": lambda d: made((6, 8, 10, 48), d)[::2, ::2, ::2],
    "expanded": lambda d: made((4, 1, 48), d).expand(3, 4, 5, 48),
    "expanded in all": lambda d: made((48,), d).expand(3, 4, 5, 48),
    "expanded within a row": lambda d: made((3, 4, 5, 1), d).expand(3, 4, 5, 48),
    "last stride 2": lambda d: made((3, 4, 5, 96), d)[..., ::2],
    "columns first": lambda d: made((48, 3, 4, 5), d).movedim(0, -1),
    "four that do not merge": lambda d: made((4, 6, 4, 6, 48), d)[::2, ::2, ::2, ::2],
    "one column": lambda d: made((3, 4, 5, 6), d)[..., 2:3],
    "one row": lambda d: made((48,), d),
    "a dimension of one": lambda d: made((6, 1, 5, 48), d)[::2],
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_layout(layout, dtype):
    x = LAYOUTS[layout](dtype)
    other = made(tuple(x.shape), dtype, seed=3)
    weight = made(tuple(x.shape[-1:]), dtype, seed=4)
    check("rms_norm", x=x, weight=weight)
    check("add_rms_norm", x=x, residual=other, weight=weight)
    check("add_rms_norm", x=other, residual=x, weight=weight)
    check("swiglu", gate=x, up=other)
    check("swiglu", gate=other, up=x)
    if x.shape[-1] % 2 == 0:
        check("swiglu_packed", gate_up=x)


def test_swiglu_of_scalars():
    check("swiglu", gate=torch.tensor(1.5, device=DEVICE), up=torch.tensor(-2.0, device=DEVICE))


@pytest.mark.parametrize("rounding", ["model", "fp32"])
def test_norm_with_a_float32_weight_is_float32(rounding):
    x, weight = made((3, 100), torch.float16), made((100,), torch.float32, seed=1)
    assert mk.rms_norm(x, weight, rounding=rounding, impl="triton").dtype == torch.float32
    check("rms_norm", x=x, weight=weight, rounding=rounding)
    check("add_rms_norm", x=x, residual=x.flip(0), weight=weight, rounding=rounding)


def test_norm_rounds_where_it_is_told_to():
    x, weight = made((8, 1000), torch.float16), made((1000,), torch.float16, seed=1)
    results = {r: mk.rms_norm(x, weight, rounding=r, impl="triton") for r in ("model", "fp32")}
    assert not torch.equal(*results.values())
    for rounding, y in results.items():
        eager = mk.rms_norm(x, weight, rounding=rounding, impl="reference")
        assert (y != eager).float().mean() < 0.01  # the other order differs in a quarter of the elements


@pytest.mark.parametrize("n", [16384, 16385, 20000, 262144])
def test_norm_of_long_rows(n):
    x, residual, weight = (made((2, n), torch.float16, seed=s) for s in range(3))
    check("rms_norm", x=x, weight=weight[0])
    check("add_rms_norm", x=x, residual=residual, weight=weight[0])


def test_norm_of_a_row_does_not_depend_on_its_neighbours():
    for n in (96, 576, 4096):
        x, weight = made((9, n), torch.float32), made((n,), torch.float32, seed=1)
        y = mk.rms_norm(x, weight, impl="triton")
        assert torch.equal(y[7:8], mk.rms_norm(x[7:8].clone(), weight, impl="triton"))


@pytest.mark.parametrize("n", [64, 20000])
def test_norm_of_extreme_rows(n):
    """Squares that overflow give rstd 0, zeros without eps give inf: neither has a Newton step."""
    x = torch.stack([torch.full((n,), v) for v in (0.0, 1e25, float("inf"), float("nan"), 1e-25)]).to(DEVICE)
    weight = torch.ones(n, device=DEVICE)
    for eps in (0.0, 1e-5):
        results = OPS.rms_norm_triton(x, weight, eps, True), eager_norm(x, weight, eps, True)
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_swiglu_of_extreme_gates(dtype):
    gate = torch.tensor([0, 20, 60, 87.5, 90, 1e4, float("inf"), float("nan")])
    gate = torch.cat([gate, -gate]).to(dtype).to(DEVICE)
    for up in (torch.full_like(gate, 3), torch.full_like(gate, float("inf"))):
        got, expected = (mk.swiglu(gate, up, impl=i) for i in ("triton", "reference"))
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("n", [8, 20000])
def test_norm_returns_rstd(n):
    x, weight = made((3, 2, n), torch.float16), made((n,), torch.float16)
    for got, expected in zip(
        (OPS.rms_norm_triton(x, weight, 1e-3, True)[1], OPS.add_rms_norm_triton(x, x, weight, 1e-3, True)[2]),
        (eager_norm(x, weight, 1e-3, True)[1], eager_norm(x + x, weight, 1e-3, True)[1]),
        strict=True,
    ):
        assert got.dtype == torch.float32 and got.shape == x.shape[:-1]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


EMPTY = {
    "rms_norm": lambda: (torch.empty(0, 8), torch.ones(8), 1e-5, True),
    "rms_norm of nothing": lambda: (torch.empty(3, 0), torch.ones(0), 1e-5, True),
    "add_rms_norm": lambda: (torch.empty(2, 0, 8), torch.empty(2, 0, 8), torch.ones(8), 1e-5, True),
    "swiglu": lambda: (torch.empty(0, 3), torch.empty(0, 3)),
    "swiglu_packed": lambda: (torch.empty(4, 0),),
    "rope": lambda: (
        torch.empty(2, 0, 4, 8),
        torch.empty(2, 0, 2, 8),
        torch.ones(3, 4),
        torch.ones(3, 4),
        None,
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs_launch_nothing(name, monkeypatch):
    def launch(*_, **__):
        raise AssertionError("launched")

    op = name.split(" ")[0]
    module = __import__(f"mistral_kernels.{op.split('_packed')[0].removeprefix('add_')}.triton_kernel", fromlist=["_"])
    monkeypatch.setattr(module, "launch", launch)
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in EMPTY[name]())
    results = getattr(OPS, op + "_triton")(*args)
    expected = getattr(OPS, op)(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
    for got, want in zip(*(r if isinstance(r, tuple | list) else (r,) for r in (results, expected)), strict=True):
        torch.testing.assert_close(got.cpu(), want, equal_nan=True)


# ---- rotation ----


def tables(dim, rows):
    return (t.to(DEVICE) for t in mk.rope_table(dim, 1e4, rows))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (17, 3, 20), (1, 5, 6), (2, 2, 512)])
def test_rope_of_strided_heads(heads, kv_heads, dim, interleaved):
    cos, sin = tables(dim, 9)
    packed = made((2, 4, (heads + kv_heads) * dim + 5), torch.float16)[..., 5:].unflatten(-1, (heads + kv_heads, dim))
    q, k = packed[:, :, :heads], packed[:, :, heads:]
    check("rope", q=q, k=k, cos=cos, sin=sin, interleaved=interleaved)
    q, k = (made((2, n, 4, dim), torch.float32).transpose(1, 2) for n in (heads, kv_heads))
    check("rope", q=q, k=k, cos=cos, sin=sin, interleaved=interleaved)
    q, k = (made((4, dim, n), torch.float32).transpose(1, 2) for n in (heads, kv_heads))
    check("rope", q=q, k=k, cos=cos, sin=sin, interleaved=interleaved)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rope_positions(dtype):
    cos, sin = tables(16, 50)
    q, k = made((3, 4, 2, 16), torch.float32), made((3, 4, 1, 16), torch.float32)
    for positions in (
        torch.tensor([[0, 49, 3, 3], [7, 6, 5, 4], [1, 1, 1, 1]]),
        torch.arange(4).expand(3, 4),
        torch.arange(24).view(4, 6)[:, ::2].t(),
    ):
        positions = (
            positions.to(dtype).to(DEVICE) if positions.stride(0) else positions.to(dtype)[:1].expand(3, 4).to(DEVICE)
        )
        check("rope", q=q, k=k, cos=cos, sin=sin, positions=positions)
    check("rope", q=q[0], k=k[0], cos=cos, sin=sin, positions=torch.tensor([4, 9, 2, 0], dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_rotation_undoes_the_rotation(interleaved):
    cos, sin = tables(32, 100)
    q, k = made((2, 5, 3, 32), torch.float32), made((2, 5, 1, 32), torch.float32)
    positions = torch.arange(20, 30).view(2, 5).to(DEVICE)
    turned = OPS.rope_triton(q, k, cos, sin, positions, interleaved, False)
    assert not torch.allclose(turned[0], q)
    for back, x in zip(OPS.rope_triton(*turned, cos, sin, positions, interleaved, True), (q, k), strict=True):
        torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


def test_position_outside_the_table_gives_nan():
    cos, sin = tables(8, 4)
    q, k = made((5, 2, 8), torch.float32), made((5, 1, 8), torch.float32)
    positions = torch.tensor([0, -1, 3, 4, 2**40], device=DEVICE)
    bad = torch.tensor([False, True, False, True, True], device=DEVICE)
    for out in OPS.rope_triton(q, k, cos, sin, positions, False, False):
        assert out.isnan().all(dim=(1, 2)).equal(bad) and out.isnan().any(dim=(1, 2)).equal(bad)


# ---- the ring ----


def ring(lengths, before, slots, dim=8, idle=0, dtype=torch.float32):
    """Arguments of rope_write_kv; the last `idle` tokens of each sequence are idle."""
    a = testing.rope_write_case(lengths, before, slots, 3, 2, dim).arguments(dtype, DEVICE)
    if idle:
        ends = a["cu_seqlens"].tolist()
        for first, end in itertools.pairwise(ends):
            a["positions"][max(first, end - idle) : end] = -1
    return a


def without_rotation(a):
    return {n: t for n, t in a.items() if n not in ("q", "cos", "sin", "interleaved")}


def test_ring_example():
    """mistral-inference's own example: which tokens of three chunks are kept, and where."""
    lengths, slots = (5, 7, 2), 3
    tokens = torch.arange(1, 15, dtype=torch.float32, device=DEVICE).view(14, 1, 1)
    positions = torch.cat([torch.arange(p, p + n) for p, n in zip((0, 1, 3), lengths, strict=True)]).to(DEVICE)
    cu = torch.tensor([0, 5, 12, 14], dtype=torch.int32, device=DEVICE)
    caches = [torch.zeros(3, slots, 1, 1, device=DEVICE) for _ in range(2)]
    mk.write_kv(tokens, -tokens, *caches, positions, cu, impl="triton")
    expected = torch.zeros(9)
    kept = [*[0, 0, 1, 1, 1], *[0, 0, 0, 0, 1, 1, 1], *[1, 1]]
    expected[[2, 0, 1, 5, 3, 4, 6, 7]] = torch.arange(1, 15, dtype=torch.float32)[torch.tensor(kept) == 1]
    assert caches[0].flatten().tolist() == expected.tolist() == (-caches[1]).flatten().tolist()


@pytest.mark.parametrize("idle", [1, 2, 9])
@pytest.mark.parametrize(
    ("lengths", "before"), [([5, 7, 2], [0, 1, 3]), ([1, 1, 1], [4, 0, 9]), ([8, 0, 1], [2, 5, 6])]
)
def test_idle_tokens(lengths, before, idle):
    a = ring(lengths, before, 3, idle=idle)
    a["q"][a["positions"] < 0] = float("nan")  # whatever lies in the padding of a batch
    a["k"][a["positions"] < 0] = float("nan")
    out = testing.call("rope_write_kv", a, "triton")
    for name, expected in testing.call("rope_write_kv", a, "reference").items():
        torch.testing.assert_close(out[name], expected, rtol=0, atol=1e-6)
    assert not out["out0"][a["positions"] < 0].any()
    check("write_kv", **without_rotation(ring(lengths, before, 3, idle=idle)))


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_dense_chunks(length):
    a = ring([length] * 3, [0, 4, 11], 4)
    del a["cu_seqlens"]
    a = {n: t.unflatten(0, (3, length)) if n in ("q", "k", "v", "positions") else t for n, t in a.items()}
    check("rope_write_kv", **a)
    check("write_kv", **without_rotation(a))


def test_one_token_a_sequence_without_ends():
    a = ring([1, 1, 1], [0, 4, 11], 4)
    ends = testing.call("rope_write_kv", a, "triton")
    del a["cu_seqlens"]
    check("rope_write_kv", **a)
    check("write_kv", **without_rotation(a))
    assert all(torch.equal(t, ends[n]) for n, t in testing.call("rope_write_kv", a, "triton").items())


def test_more_sequences_than_ends_of_one_load(monkeypatch):
    from mistral_kernels.ring_cache import triton_write

    monkeypatch.setattr(triton_write, "ENDS", 4)
    lengths = [1, 0, 2, 1, 0, 0, 3, 1, 0, 1]
    check("rope_write_kv", **ring(lengths, list(range(10)), 2))


def test_tokens_behind_the_last_end_are_not_written():
    a = ring([2, 1], [0, 0], 4)
    cu = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    caches = [torch.zeros_like(a["k_cache"]) for _ in range(2)]
    OPS.write_kv_triton(a["k"], a["v"], *caches, a["positions"], cu)
    assert torch.equal(caches[0][0, 0], a["k"][0]) and torch.equal(caches[0][1, 1], a["k"][1])
    assert int((caches[0] != 0).sum()) == 2 * a["k"][0].numel()


@pytest.mark.parametrize("interleaved", [False, True])
def test_caches_and_tokens_of_any_layout(interleaved):
    a = ring([4, 3], [0, 6], 4, dim=12, dtype=torch.float16) | dict(interleaved=interleaved)
    packed = torch.cat([a["q"], a["k"], a["v"]], dim=1)
    a |= dict(q=packed[:, :3], k=packed[:, 3:5], v=packed[:, 5:])
    a["positions"] = a["positions"].repeat_interleave(2)[::2]
    heads_first = {n: a[n].transpose(1, 2).contiguous().transpose(1, 2) for n in testing.MUTATED}
    columns_first = {n: a[n].transpose(2, 3).contiguous().transpose(2, 3) for n in testing.MUTATED}
    for caches in ({}, heads_first, columns_first):
        check("rope_write_kv", **(a | caches))
        check("write_kv", **without_rotation(a | caches))


def test_position_outside_the_table_writes_nan():
    a = ring([1, 1], [0, 2], 4)
    positions = torch.tensor([0, 99], device=DEVICE)
    names = ("q", "k", "v", "k_cache", "v_cache")
    q, k = OPS.rope_write_kv_triton(*(a[n] for n in names), positions, a["cos"], a["sin"], a["cu_seqlens"], False)
    assert q[1].isnan().all() and k[1].isnan().all() and not q[0].isnan().any() and not k[0].isnan().any()
    assert a["k_cache"][1, 99 % 4].isnan().all() and int(a["k_cache"].isnan().sum()) == k[1].numel()
    assert torch.equal(a["v_cache"][1, 99 % 4], a["v"][1])


# ---- as torch ops ----


def opcheck_calls():
    x, w = made((2, 3, 16), torch.float32), made((16,), torch.float32, seed=1)
    cos, sin = tables(8, 32)
    q, k = made((2, 3, 4, 8), torch.float32), made((2, 3, 2, 8), torch.float32)
    a = ring([3, 0, 2], [0, 3, 9], 4)
    kv = tuple(a[n] for n in ("k", "v", "k_cache", "v_cache", "positions"))
    return {
        "rms_norm": (x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-5, True),
        "add_rms_norm": (
            x.clone().requires_grad_(),
            x.flip(0).requires_grad_(),
            w.clone().requires_grad_(),
            1e-5,
            False,
        ),
        "swiglu": (x.clone().requires_grad_(), x.flip(0).requires_grad_()),
        "swiglu_packed": (x.clone().requires_grad_(),),
        "rope": (
            q.requires_grad_(),
            k.requires_grad_(),
            cos,
            sin,
            torch.arange(6, device=DEVICE).view(2, 3),
            True,
            False,
        ),
        "write_kv": (*kv, a["cu_seqlens"]),
        "rope_write_kv": (a["q"], *kv, a["cos"], a["sin"], a["cu_seqlens"], False),
    }


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name + "_triton").default, opcheck_calls()[name])


# ---- what the interpreter cannot judge ----


@triton.jit
def _scale_kernel(X, Y, factor, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, (tl.load(X + at).to(tl.float32) * factor).to(Y.dtype.element_ty))


@triton.jit
def _square_kernel(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(Y + at, x * x)


MENDED = "Triton's interpreter now computes bfloat16 rightly: judge it in these tests, and remove this one"


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU bfloat16 is right")
def test_interpreter_still_truncates_to_bfloat16():
    x, y = fill((1024,)).float(), torch.empty(1024, dtype=torch.bfloat16)
    _scale_kernel[(1,)](x, y, 1.0, 1024)
    truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(y, truncated) and not torch.equal(y, x.bfloat16()), MENDED


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU bfloat16 is right")
def test_interpreter_still_multiplies_the_bits_of_bfloat16():
    x, y = torch.linspace(1, 2, 64).bfloat16(), torch.empty(64, dtype=torch.bfloat16)
    _square_kernel[(1,)](x, y, 64)
    assert not torch.allclose(y.float(), (x * x).float(), rtol=0.1), MENDED
