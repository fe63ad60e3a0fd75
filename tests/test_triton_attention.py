"""The Triton attention kernels under Triton's interpreter, or on a GPU where one is.

float32 and float16 only: the interpreter computes bfloat16 products wrongly.
"""

import dataclasses
import functools

import pytest
import torch

import mistral_kernels
from mistral_kernels import testing
from mistral_kernels._dispatch import backends
from mistral_kernels.testing import assert_parity, attention_case, cached_case, packed_attention_case

if (reason := backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from mistral_kernels.attention import triton_forward as forward
from mistral_kernels.attention.triton_blocks import Config
from mistral_kernels.ring_cache import triton_attention as cached

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16)
FAMILIES = (80, 86, 90, 100)
CASES = list(testing.cases())
# Small tiles, so that short sequences have blocks of every kind: left edge, whole, diagonal.
SMALL = {
    "pointers": Config(16, 16, 4, 1),
    "pointers, lag": Config(16, 16, 4, 1, lag=True),
    "TMA": Config(16, 16, 4, 1, tma=True),
    "TMA, lag": Config(16, 16, 4, 1, tma=True, lag=True),
    "wide rows": Config(32, 16, 4, 1, lag=True),
    "wide keys": Config(16, 32, 4, 1, lag=True),
}
parity = functools.partial(assert_parity, impl="triton", device=DEVICE)


@pytest.fixture
def family(monkeypatch, request):
    """Chooses as if the device were of this family."""
    monkeypatch.setattr(forward, "family", lambda _: request.param)
    monkeypatch.setattr(cached, "family", lambda _: request.param)


@pytest.fixture
def tiles(monkeypatch, request):
    """Small tiles instead of the production choice; D=256 and float32 among them."""
    monkeypatch.setattr(forward, "choose", lambda *_: SMALL[request.param])


def runs(q, k, v, window=None, config=None, causal=True, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return forward.attention(q, k, v, window or 0, scale, causal, None, None, q.shape[1], k.shape[1], config=config)


def qkv(queries, keys, heads=2, kv_heads=1, dim=16, batch=1, kind="gaussian", dtype=torch.float32):
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim))
    return tuple(testing.fill(s, kind, seed=i).to(DEVICE, dtype) for i, s in enumerate(shapes))


# ---- the grid of all ops, in the tiles of every GPU ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "attention"], ids=lambda c: c.label)
@pytest.mark.parametrize("family", [90], indirect=True)
def test_cases(case, dtype, family):
    parity(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "attention_cached"], ids=lambda c: c.label)
def test_cached_cases(case, dtype):
    parity(case, dtype)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_production_tiles(family, dim):
    """Those of float32, the same for every GPU, are in test_cases."""
    parity(attention_case(1, 150, 290, 2, 1, dim, window=140), torch.float16)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("dim", [64, 256])
def test_production_tiles_behind_a_ring(family, dim):
    parity(cached_case([40, 3], [300, 100], 128, 4, 2, dim, window=100), torch.float16)
    parity(cached_case([1, 1], [300, 100], 128, 4, 2, dim, window=100, chunk=False), torch.float16)


# ---- shapes, windows, values ----


@pytest.mark.parametrize("tiles", ["pointers", "TMA, lag"], indirect=True)
@pytest.mark.parametrize("window", [None, 1, 3, 64, 65, 97])
@pytest.mark.parametrize("queries", [1, 3, 17, 64, 97])
def test_lengths_and_windows(queries, window, tiles):
    few = queries < 17
    parity(attention_case(4 if few else 1, queries, queries, 4 if few else 1, 1, 16, window), torch.float32)


@pytest.mark.parametrize("tiles", ["pointers", "TMA, lag"], indirect=True)
@pytest.mark.parametrize("queries,keys", [(1, 97), (17, 50), (50, 17), (33, 32), (128, 128)])
@pytest.mark.parametrize("window", [None, 33])
def test_more_or_fewer_keys_than_queries(queries, keys, window, tiles):
    parity(attention_case(1, queries, keys, 2, 1, 16, window), torch.float16)


@pytest.mark.parametrize("tiles", SMALL, indirect=True)
def test_not_causal(tiles):
    for keys in (5, 32, 41):
        parity(attention_case(1, 19, keys, 2, 1, 16, causal=False), torch.float32)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_groups(group):
    parity(attention_case(1, 17, 17, 2 * group, 2, 16, window=9), torch.float32)
    parity(cached_case([1, 1], [5, 70], 64, 2 * group, 2, 16, window=30, chunk=False), torch.float32)
    parity(cached_case([9, 2], [5, 70], 64, 2 * group, 2, 16, window=30), torch.float32)


@pytest.mark.parametrize("dim", [1, 5, 8, 40, 64, 80, 96, 128, 192, 200, 256])
def test_head_dimensions(dim):
    # At 200 the interpreter's float32 products add up in an order that costs 1.15 times eager's RMS error.
    for dtype in DTYPES if dim != 200 else DTYPES[1:]:
        parity(attention_case(1, 33, 33, 2, 1, dim, window=16), dtype)
        parity(cached_case([1, 1], [5, 70], 64, 2, 1, dim, window=30, chunk=False), dtype)


@pytest.mark.parametrize("tiles", SMALL, indirect=True)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_kinds(kind, tiles):
    for dtype in DTYPES:
        parity(attention_case(1, 70, 90, 2, 1, 16, window=33), dtype, kind=kind)
    parity(packed_attention_case([(30, 47), (0, 0), (4, 1)], 2, 1, 16, window=20), torch.float32, kind=kind)


@pytest.mark.parametrize("kind", testing.KINDS)
def test_cached_kinds(kind):
    for chunk, lengths in ((False, [1, 1, 1]), (True, [20, 1, 7])):
        parity(cached_case(lengths, [1, 64, 100], 64, 4, 2, 16, 40, chunk), torch.float32, kind=kind)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scales(scale):
    q, k, v = qkv(20, 20)
    expected = mistral_kernels.attention(q, k, v, scale=scale, impl="reference")
    torch.testing.assert_close(mistral_kernels.attention(q, k, v, scale=scale, impl="triton"), expected)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_a_window_matters_and_a_wide_one_does_not(config):
    q, k, v = qkv(50, 60)
    causal = runs(q, k, v, config=config)
    assert not torch.allclose(runs(q, k, v, 20, config)[0], causal[0])
    for window in (60, 61, 1000):
        for a, b in zip(runs(q, k, v, window, config), causal, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(runs(q, k, v, 1, config)[0], v[:, -50:].expand_as(q))


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_blocks_outside_the_window_are_not_loaded(config):
    """The last tile of queries stands at 80..95 with a window of 20: its first key is 61."""
    q, k, v = qkv(96, 96)
    clean = runs(q, k, v, 20, config)[0][:, 96 - config.rows :]
    untouched = (96 - config.rows - 19) // config.keys * config.keys
    assert untouched >= 32
    k[:, :untouched], v[:, :untouched] = float("nan"), float("nan")
    assert torch.equal(runs(q, k, v, 20, config)[0][:, 96 - config.rows :], clean)
    k[:, :], v[:, :] = float("nan"), float("nan")
    assert runs(q, k, v, 20, config)[0].isnan().all()


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_keys_after_the_query_are_not_loaded(config):
    q, k, v = qkv(96, 96)
    clean = runs(q, k, v, None, config)[0][:, : config.rows]
    k[:, 32:], v[:, 32:] = float("nan"), float("nan")
    assert torch.equal(runs(q, k, v, None, config)[0][:, : config.rows], clean)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_rows_without_keys(config):
    q, k, v = qkv(40, 9)
    out, lse = runs(q, k, v, config=config)
    assert not out[:, :31].any() and (lse[..., :31] == float("-inf")).all()
    assert out[:, 31:].any(-1).all() and lse[..., 31:].isfinite().all()


# ---- packed ----


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_packed_is_each_sequence_alone(config):
    """Bitwise, and a sequence's neighbours are poisoned, so none is read."""
    lengths = ((5, 5), (0, 3), (33, 40), (3, 0), (0, 0))
    q, k, v = qkv(sum(a for a, _ in lengths), sum(b for _, b in lengths))
    cu_q, cu_k = (
        torch.tensor([sum(n[side] for n in lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
        for side in (0, 1)
    )
    for i, (queries, keys) in enumerate(lengths):
        a, b = slice(cu_q[i], cu_q[i] + queries), slice(cu_k[i], cu_k[i] + keys)
        alone = runs(q[:, a], k[:, b], v[:, b], 9, config)
        others = [torch.full_like(t, float("nan")) for t in (k, v)]
        others[0][:, b], others[1][:, b] = k[:, b], v[:, b]
        cu = cu_q.to(DEVICE), cu_k.to(DEVICE)
        out, lse = forward.attention(q[0], others[0][0], others[1][0], 9, 0.25, True, *cu, 40, 40, config=config)
        assert torch.equal(out[a], alone[0][0]) and torch.equal(lse[:, a], alone[1][0])


# ---- memory ----


def views(t):
    """The same values under other strides: a slice of a packed projection, transposed, expanded, misaligned."""
    wide = torch.cat((t, t, t), dim=-2)
    yield wide[..., t.shape[-2] : 2 * t.shape[-2], :]
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.transpose(-1, -2).contiguous().transpose(-1, -2)
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    yield flat[1:].view(t.shape)


@pytest.mark.parametrize("family", [80, 90], indirect=True)
def test_strides(family):
    q, k, v = qkv(40, 50, heads=4, kv_heads=2, batch=2, dtype=torch.float16)
    inputs = [t.clone() for t in (q, k, v)]
    expected = runs(q, k, v, 20)
    for q2, k2, v2 in zip(*map(views, (q, k, v)), strict=True):
        for got, want in zip(runs(q2, k2, v2, 20), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
            assert got.is_contiguous()
    one = k[:, :1].expand_as(k)
    torch.testing.assert_close(runs(q, one, one, 20)[0], one[:, :40].repeat_interleave(2, 2), rtol=0, atol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), inputs, strict=True))


def ring_of(batch=2, slots=32, heads=4, kv_heads=2, dim=16, queries=1, dtype=torch.float32):
    q = testing.fill((batch, queries, heads, dim)).to(DEVICE, dtype)
    caches = [testing.fill((batch, slots, kv_heads, dim), seed=s).to(DEVICE, dtype) for s in (1, 2)]
    new = [testing.fill((batch, queries, kv_heads, dim), seed=s).to(DEVICE, dtype) for s in (3, 4)]
    return q, *caches, *new


def test_cached_strides():
    q, k, v, k_new, v_new = ring_of(queries=5)
    lens = torch.tensor([7, 90], dtype=torch.int32, device=DEVICE)
    run = functools.partial(mistral_kernels.attention_cached, seq_lens=lens, window=20, impl="triton")
    expected = run(q, k, v, k_new=k_new, v_new=v_new)
    for q2, k2, v2, kn, vn in zip(*map(views, (q, k, v, k_new, v_new)), strict=True):
        assert torch.equal(run(q2, k2, v2, k_new=kn, v_new=vn), expected)


def test_nothing_is_launched_for_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(forward, "launch", never)
    monkeypatch.setattr(cached, "launch", never)
    for q, k, v in (qkv(0, 5), qkv(5, 0), qkv(5, 5, batch=0), qkv(0, 0)):
        out, lse = runs(q, k, v)
        assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
    q, k, v, k_new, v_new = ring_of(batch=0)
    lens = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert cached.attention_cached(q, k, v, lens, 0, 1.0, k_new, v_new, None, 1).shape == q.shape


def test_tma_only_where_it_can_read():
    k = torch.zeros(1, 4, 2, 16, dtype=torch.float16, device=DEVICE)
    assert forward.describable(k)
    assert not forward.describable(k[..., 1:9])
    assert not forward.describable(k[:, :1].expand(1, 4, 2, 16))
    assert not forward.describable(torch.zeros(1, 4, 1, 10, dtype=torch.float16, device=DEVICE))


# ---- the ring ----


def cut(q, k_cache, splits, rows=16, keys=16, queries=1):
    """A plan of so many splits of the ring, if it has as many blocks."""
    config = Config(rows, keys, 4, 1)
    group = q.shape[-2] // k_cache.shape[2]
    span = -(-k_cache.shape[1] // splits // keys) * keys
    return cached.Plan(config, -(-queries * group // rows), splits, span)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("queries,chunk", [(1, False), (3, False), (17, True)])
@pytest.mark.parametrize("window", [0, 30])
def test_splits(splits, queries, chunk, window):
    slots = 64
    q, k, v, *new = ring_of(4, slots, 3, 1, queries=queries)
    lengths = [0, 5, 64, 200] if window else [0, 5, 17, 64]
    lens = torch.tensor([max(n, 0 if chunk else queries) for n in lengths], dtype=torch.int32, device=DEVICE)
    args = (lens, window, 0.3, *(new if chunk else (None, None)), None, queries, False)
    out = cached.attention_cached(q, k, v, *args, cut(q, k, splits, queries=queries))
    expected = mistral_kernels.reference.attention_cached(q, k, v, lens, window or None, *args[3:5], scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


def test_an_idle_sequence_gives_zeros():
    q, k, v, *_ = ring_of()
    lens = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    for splits in (1, 4):
        out = cached.attention_cached(q, k, v, lens, 0, 1.0, None, None, None, 1, False, cut(q, k, splits))
        assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("splits", [1, 3])
def test_slots_outside_the_window_are_not_read(splits):
    """After 100 tokens in 64 slots, position p lies in slot p % 64; the query at 99 sees 90..99: slots 26..35."""
    q, k, v, *_ = ring_of(1, 64)
    lens = torch.tensor([100], dtype=torch.int32, device=DEVICE)
    args = (lens, 10, 1.0, None, None, None, 1, False, cut(q, k, splits))
    clean = cached.attention_cached(q, k, v, *args)
    for t in (k, v):
        t[:, :26], t[:, 36:] = float("nan"), float("nan")
    assert torch.equal(cached.attention_cached(q, k, v, *args), clean)
    v[:, 26] = float("nan")
    assert cached.attention_cached(q, k, v, *args).isnan().all()


def test_slots_not_yet_written_are_not_read():
    q, k, v, *_ = ring_of(1, 64)
    lens = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    k[:, 5:], v[:, 5:] = float("nan"), float("nan")
    assert mistral_kernels.attention_cached(q, k, v, lens, impl="triton").isfinite().all()


def test_the_plan_knows_shapes_only():
    config = cached.production_config(90, 128, 2, 4)
    one = cached.plan(config, 1, 8, 4, 128, 1, 4096, 4096)
    assert one.splits * 8 >= 100 and one.splits * one.span >= 4096 and one.span % config.keys == 0
    assert cached.plan(config, 64, 8, 4, 128, 1, 4096, 4096).splits == 1
    windowed = cached.plan(config, 1, 8, 4, 128, 1, 1 << 20, 4096)
    assert windowed.splits * windowed.span < 2 * 4096
    assert cached.plan(config, 1, 1, 1, 128, 1, 1 << 20, 0).splits <= cached.MAX_SPLITS


def test_chunks_give_what_one_prefill_gives():
    """Chunked prefill through a ring of exactly the window, and single steps after it, against one pass."""
    window, slots, chunks = 24, 24, (30, 7, 1, 1, 12, 1)
    q, k, v = qkv(sum(chunks), sum(chunks), heads=4, kv_heads=2)
    expected = mistral_kernels.attention(q, k, v, window=window, impl="reference")
    caches = [torch.zeros(1, slots, 2, 16, device=DEVICE) for _ in range(2)]
    done, parts = 0, []
    for n in chunks:
        span = slice(done, done + n)
        lens = torch.tensor([done], dtype=torch.int32, device=DEVICE)
        where = dict(window=window, impl="triton")
        positions = torch.arange(done, done + n, device=DEVICE)[None]
        if n == 1:
            mistral_kernels.write_kv(k[:, span], v[:, span], *caches, positions, impl="reference")
            parts.append(mistral_kernels.attention_cached(q[:, span], *caches, lens + 1, **where))
        else:
            parts.append(
                mistral_kernels.attention_cached(q[:, span], *caches, lens, k_new=k[:, span], v_new=v[:, span], **where)
            )
            mistral_kernels.write_kv(k[:, span], v[:, span], *caches, positions, impl="reference")
        done += n
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=2e-6)


# ---- as torch ops ----


def test_same_bits_again():
    q, k, v = qkv(70, 70)
    assert all(torch.equal(a, b) for a, b in zip(runs(q, k, v, 20), runs(q, k, v, 20), strict=True))
    q, k, v, *new = ring_of(queries=5)
    lens = torch.tensor([7, 90], dtype=torch.int32, device=DEVICE)
    args = (q, k, v, lens, 20, 1.0, *new, None, 5, False, cut(q, k, 3, queries=5))
    assert torch.equal(cached.attention_cached(*args), cached.attention_cached(*args))


def test_opcheck():
    q, k, v = qkv(20, 20, dim=8)
    for t in (q, k, v):
        t.requires_grad_()
    torch.library.opcheck(
        torch.ops.mistral_kernels.attention_triton.default, (q, k, v, 7, 0.5, True, None, None, 20, 20)
    )
    q, k, v, *new = ring_of(queries=3)
    lens = torch.tensor([7, 90], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        torch.ops.mistral_kernels.attention_cached_triton.default, (q, k, v, lens, 20, 1.0, *new, None, 3, False)
    )


def test_configs_are_complete():
    for key, config in forward.CONFIGS.items():
        assert config.rows >= 16 and config.keys >= 16 and key[0] in FAMILIES
    assert len(forward.CONFIGS) == len(FAMILIES) * 3 * 2
    for dim in (1, 16, 64, 96, 128, 200, 256):
        for size in (2, 4):
            for f in FAMILIES:
                assert not forward.without_tma(f, dim, size).tma
                assert dataclasses.is_dataclass(forward.production_config(f, dim, size))


@pytest.mark.gpu
def test_cuda_graphs():
    """A graph replays on new values; the descriptors' memory outlives the capture."""
    q, k, v = (t.to(torch.bfloat16) for t in qkv(300, 300, heads=8, kv_heads=2, dim=128))
    call = functools.partial(mistral_kernels.attention, q, k, v, window=100, impl="triton")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    q.copy_(torch.randn_like(q))
    filler = [torch.randn(1000, device="cuda") for _ in range(50)]
    graph.replay()
    assert torch.equal(out, call()) and filler
