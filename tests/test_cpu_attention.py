"""Attention of the compiled library, dense, packed and over the ring cache, on every instruction set that is here."""

import itertools

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import _library, testing
from mistral_kernels.testing import DTYPES, KINDS, attention_case, cached_case, fill

if _library.unusable is not None:
    pytest.skip(_library.unusable, allow_module_level=True)

OPS = ("attention", "attention_cached")
CASES = [case for case in testing.cases() if case.op in OPS]


@pytest.fixture(params=testing.isa_tiers())
def tier(request):
    with testing.isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(case, dtype, kind="gaussian"):
    """`assert_parity` on every instruction set, with one eager result for all."""
    arguments = case.arguments(dtype, kind=kind)
    exact = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
    }
    eager, truth = (testing.call(case.op, a, "reference") for a in (arguments, exact))
    for name in testing.isa_tiers():
        with testing.isa(name):
            out = testing.call(case.op, arguments, "cpu")
        failed = [e for n in truth if not (e := testing.compare(n, out[n], eager[n], truth[n])).passed]
        assert not failed, f"{case.op} {case.label} {dtype} {kind} on {name}: {failed}"


def qkv(queries, keys, heads, kv_heads, dim, dtype=torch.float32, batch=1):
    q = fill((batch, queries, heads, dim)).to(dtype)
    return q, *(fill((batch, keys, kv_heads, dim), seed=s).to(dtype) for s in (1, 2))


def run(q, k, v, window=None, **how):
    return mk.attention(q, k, v, window, return_lse=True, impl="cpu", **how)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(dtype, kind):
    for case in CASES:
        check(case, dtype, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_eager(tier, kind):
    # Scores near 1e4 carry 1e-12 of their own.
    tolerance = 1e-10 if kind == "large" else 1e-12
    for case in CASES:
        arguments = case.arguments(torch.float64, kind=kind)
        eager, out = (testing.call(case.op, arguments, impl) for impl in ("reference", "cpu"))
        for name in eager:
            torch.testing.assert_close(out[name], eager[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 8))
def test_groups_and_lengths(group):
    for queries, window in itertools.product((1, 3, 17, 64, 97, 128, 217), (1, 3, 64, 65, None)):
        case = attention_case(1, queries, queries, group, 1, 64, window)
        check(case, torch.bfloat16 if queries % 2 else torch.float32)


def test_long_sums():
    """So many keys, too, that threads share their panels."""
    for queries, dtype in ((2, torch.float32), (60, torch.float32), (60, torch.bfloat16)):
        check(attention_case(1, queries, 4000, 4, 2, 64), dtype)


@pytest.mark.parametrize("dim", (1, 8, 40, 59, 64, 80, 96, 128, 192, 256, 300))
def test_head_dimensions(dim):
    batch = 1 if dim >= 8 else 32  # a dozen numbers have no reliable RMS
    for dtype in DTYPES:
        check(attention_case(batch, 70, 85, 4, 2, dim, 40), dtype)
        check(attention_case(batch, 3, 85, 4, 2, dim, 40), dtype)
        check(cached_case([1, 5, 40], [9, 70, 33], 48, 4, 2, dim, 40), dtype)


@pytest.mark.parametrize("queries", (3, 17, 64, 97, 217))
def test_window(tier, queries):
    q, k, v = qkv(queries, queries, 6, 2, 64)
    causal = run(q, k, v)
    for window in (1, 3, 64, 65, queries, queries + 9):
        out = run(q, k, v, window)
        assert same(out, causal) == (window >= queries)
    assert torch.equal(run(q, k, v, 1)[0], v.repeat_interleave(3, dim=2))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_window_of_one_gives_the_values(tier, dtype):
    q, k, v = (t * 30 for t in qkv(100, 100, 6, 2, 80, dtype))
    assert torch.equal(run(q, k, v, 1)[0], v.repeat_interleave(3, dim=2))
    assert torch.equal(run(q[:, :2], k[:, :2], v[:, :2], 1)[0], v[:, :2].repeat_interleave(3, dim=2))


@pytest.mark.parametrize("scale", (-0.2, 0.0, 3.0))
def test_scale(tier, scale):
    for queries in (2, 60):
        tensors = qkv(queries, 60, 4, 2, 64)
        exact = mk.attention(*(t.double() for t in tensors), scale=scale, return_lse=True, impl="reference")
        eager = mk.attention(*tensors, scale=scale, return_lse=True, impl="reference")
        for name, *results in zip(("out", "lse"), run(*tensors, scale=scale), eager, exact, strict=True):
            errors = testing.compare(name, *results)
            assert errors.passed, errors


@pytest.mark.parametrize("queries", (2, 130))
def test_strided_inputs_are_read_in_place(tier, queries):
    for dtype in (torch.float32, torch.bfloat16):
        heads, kv_heads, dim = 6, 2, 64
        packed = fill((2, queries, heads + 2 * kv_heads, dim)).to(dtype)
        views = packed.split((heads, kv_heads, kv_heads), dim=2)
        dense = [t.contiguous() for t in views]
        transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
        expanded = [t[:1].expand(2, -1, -1, -1) for t in dense]
        broken = [torch.stack((t, t), -1)[..., 0] for t in dense]
        kept = packed.clone()
        expected = run(*dense, 50)
        assert same(run(*views, 50), expected) and torch.equal(packed, kept)
        assert same(run(*transposed, 50), expected)
        assert same(run(*broken, 50), expected)
        assert same(run(*expanded, 50), run(*(t.contiguous() for t in expanded), 50))
        assert expected[0].is_contiguous() and expected[1].is_contiguous()


def cached(dtype, lengths, seen, slots, window, new, dim=64):
    case = cached_case(lengths, seen, slots, 8, 2, dim, window, chunk=new)
    return case.arguments(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads_change_nothing(tier, dtype):
    q, k, v = qkv(217, 217, 6, 2, 64, dtype)
    shorter = qkv(97, 130, 4, 2, 64, dtype, batch=2)  # two threads share what one packs for itself
    arguments = cached(dtype, [1, 40, 0, 3], [3000, 20, 5, 700], 2048, 2000, new=True)
    kept = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((*run(q, k, v, 64), *run(*shorter), mk.attention_cached(**arguments, impl="cpu")))
    assert same(*results)
    assert all(torch.equal(arguments[n], t) for n, t in kept.items())


def test_empty_and_unseen():
    for batch, queries, keys in ((0, 5, 5), (2, 0, 7), (2, 0, 0)):
        out, lse = run(*qkv(queries, keys, 4, 2, 64, batch=batch))
        assert out.shape == (batch, queries, 4, 64) and lse.shape == (batch, 4, queries)
    for queries, keys in ((5, 0), (120, 0), (120, 7), (9, 2)):
        out, lse = run(*qkv(queries, keys, 4, 2, 64))
        unseen = queries - keys
        assert not out[:, :unseen].any() and (lse[..., :unseen] == -torch.inf).all()
        assert out[:, unseen:].all() and lse[..., unseen:].isfinite().all()
    idle = cached(torch.float32, [1, 1], [0, 3], 16, 8, new=False)
    out = mk.attention_cached(**idle, impl="cpu")
    assert not out[0].any() and out[1].all()


def test_nan_is_not_hidden():
    for queries in (2, 90):
        q, k, v = qkv(queries, 90, 4, 2, 64)
        k[0, 80, 0, 5] = torch.nan
        seen = run(q, k, v)[0].isnan()[0].all(-1)
        expected = mk.attention(q, k, v, impl="reference").isnan()[0].all(-1)
        assert torch.equal(seen, expected) and seen.any() and not seen.all()


def step(k_cache, v_cache, q, k, v, start, window, impl="cpu"):
    """One chunk over [ring | chunk], then its write."""
    n = q.shape[1]
    seen = torch.tensor([start], dtype=torch.int32)
    out = mk.attention_cached(q, k_cache, v_cache, seen, window, k, v, impl=impl)
    mk.write_kv(k, v, k_cache, v_cache, torch.arange(start, start + n)[None], impl="reference")
    return out


@pytest.mark.parametrize("window", (16, 40))
def test_chunks_equal_one_shot(tier, window):
    length = 3 * window + 11
    q, k, v = qkv(length, length, 6, 2, 64)
    truth = mk.attention(q.double(), k.double(), v.double(), window, impl="reference")
    for chunk in (1, window - 1, window, window + 1, 23):
        caches = [torch.full((1, window, 2, 64), torch.nan) for _ in range(2)]
        spans = [slice(a, min(a + chunk, length)) for a in range(0, length, chunk)]
        outs = [step(*caches, q[:, s], k[:, s], v[:, s], s.start, window) for s in spans]
        testing_errors = testing.compare("out", torch.cat(outs, 1), run(q, k, v, window)[0], truth)
        assert testing_errors.max_error < 2e-6, (chunk, testing_errors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_over_the_ring(dtype):
    for slots, window in ((16, 16), (300, 300), (300, 33), (1500, None)):
        case = cached_case([1] * 4, [1, slots - 1, slots, slots], slots, 8, 2, 128, window, chunk=False)
        check(case, dtype)
        if window:
            seen = [slots + 1, 2 * slots, 3 * slots + 7, 5]
            check(cached_case([1] * 4, seen, slots, 6, 2, 64, window, chunk=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_over_codes(dtype):
    for slots, window, heads, dim in ((16, 16, 8, 128), (300, 33, 6, 64), (1500, None, 2, 40), (300, 300, 14, 59)):
        seen = [1, slots - 1, slots, slots if window is None else 2 * slots + 7]
        check(cached_case([1] * 4, seen, slots, heads, 2, dim, window, chunk=False, codes=True), dtype)
    # Codes and a chunk of numbers in one decoded sequence, beside one of tiles.
    check(cached_case([3, 40, 0, 1], [290, 333, 5, 900], 300, 6, 2, 64, 280, codes=True), dtype)


def test_codes_are_read_in_place(tier):
    made = cached_case([1, 1], [9, 40], 32, 4, 2, 24, 30, chunk=False, codes=True).arguments(torch.float32)
    expected = mk.attention_cached(**made, impl="cpu")
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        t = made[name]
        for view in (t.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((t, t), -1)[..., 0]):
            assert torch.equal(mk.attention_cached(**made | {name: view}, impl="cpu"), expected)


def test_lengths_that_lie_are_not_followed():
    q, k, v = (t[0] for t in qkv(20, 20, 4, 2, 64))
    honest = torch.tensor([0, 20], dtype=torch.int32)
    out, lse = torch.ops.mistral_kernels.attention(q, k, v, 0, 0.1, True, honest, honest, 20, 20)
    for ends in ([0, 900, -5, 20], [0, 900], [-5, 20], [3, 20], [0, 12, 7, 20]):
        lying = torch.tensor(ends, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.mistral_kernels.attention(q, k, v, 0, 0.1, True, lying, lying, 20, 20)
        gradients = torch.ops.mistral_kernels.attention_backward(
            out, lse, q, k, v, out, lse, 0, 0.1, True, lying, lying, 20, 20
        )
        assert all(g.shape == t.shape for g, t in zip(gradients, (q, k, v), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_the_ends(tier, dtype):
    """Few queries, whose keys are read where they lie, and many; tails of keys and of heads."""
    for sizes in ((1, 37, 4, 1, 64), (1, 64, 4, 2, 40), (5, 19, 14, 2, 8), (1, 300, 3, 1, 100), (50, 70, 2, 1, 96)):
        inputs = qkv(*sizes, dtype)
        assert same(run(*(testing.at_an_end(t) for t in inputs)), run(*inputs))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("queries", [4, 40])
def test_nan_in_a_query_stays_in_its_row(tier, window, queries):
    q, k, v = qkv(queries, 40, 8, 1, 64, torch.bfloat16)
    out, lse = run(q, k, v, window)
    q[:, 1, 3] = torch.nan
    got, got_lse = run(q, k, v, window)
    others = torch.ones(queries, 8, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(got[0][others], out[0][others]) and torch.equal(got_lse[0].T[others], lse[0].T[others])
    assert got[0, 1, 3].isnan().all() and got_lse[0, 3, 1].isnan()


def test_other_arithmetic_keeps_its_subnormals(tier):
    """Attention goes without them: where a processor scales by powers of two, each takes 150 cycles."""
    q, k, v = (30 * testing.fill((1, 70, 2, 16), seed=s).requires_grad_() for s in range(3))
    small = torch.full((1 << 18,), 1e-39)

    def kept():
        return (small * 0.5).count_nonzero() == small.numel()

    out = mk.attention(q, k, v, impl="cpu")
    assert kept()
    torch.autograd.grad(out.sum(), (q, k, v))
    assert kept()
    with torch.no_grad():
        mk.attention_cached(q[:, :1], k, v, torch.tensor([70], dtype=torch.int32), impl="cpu")
    assert kept()


@pytest.mark.skipif("amx" not in testing.isa_tiers(), reason="this processor has no matrix unit")
def test_the_matrix_unit_is_left_as_it_was():
    """torch's products configure its registers too, and remember that they did."""
    q, k, v = qkv(70, 70, 2, 1, 64, torch.bfloat16)
    shapes = [(33, 75, 21), (64, 64, 64), (17, 96, 40), (200, 31, 48)]
    pairs = [(fill((m, n)).bfloat16(), fill((o, n), seed=1).bfloat16()) for m, n, o in shapes]
    alone = [torch.nn.functional.linear(x, w) for x, w in pairs]
    first = run(q, k, v)
    for (x, w), expected in zip(pairs * 3, alone * 3, strict=True):
        assert same(run(q, k, v), first)
        assert torch.equal(torch.nn.functional.linear(x, w), expected)
