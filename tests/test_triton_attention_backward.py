"""The gradients of attention in Triton: on a GPU, or without one in Triton's interpreter.

float32 and float16 only: the interpreter computes bfloat16 products wrongly.
"""

import pytest
import torch

import mistral_kernels
from mistral_kernels import testing
from mistral_kernels._dispatch import backends
from mistral_kernels.testing import attention_case, packed_attention_case

if (reason := backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

from mistral_kernels.attention import reference
from mistral_kernels.attention import triton_backward_launch as backward
from mistral_kernels.attention.triton_blocks import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16)
FAMILIES = (80, 86, 90, 100)
CASES = [c for c in testing.cases() if c.op == "attention"]
# Small tiles, so that short sequences have blocks of every kind: both edges of the window, and whole ones.
SMALL = {
    "pointers": Config(16, 16, 4, 1),
    "TMA": Config(16, 16, 4, 1, tma=True),
    "wide rows": Config(32, 16, 4, 1),
    "wide keys": Config(16, 32, 4, 1, tma=True),
}


def parity(case, dtype, kind="gaussian"):
    """The parity rule for each gradient; the outputs have theirs in the tests of the forward."""
    found = testing.parity(case, dtype, "triton", device=DEVICE, kind=kind, gradients=True)
    found = {e.output: e for e in found if e.output in ("dq", "dk", "dv")}
    assert len(found) == 3
    failed = [e for e in found.values() if not e.passed]
    assert not failed, f"{case.label} {dtype} {kind}: {failed}"


@pytest.fixture
def family(monkeypatch, request):
    """Chooses as if the device were of this family."""
    monkeypatch.setattr(backward, "family", lambda _: request.param)


@pytest.fixture
def tiles(monkeypatch, request):
    """Small tiles instead of the production choice; float32 never has descriptors."""
    monkeypatch.setattr(backward, "choose", lambda *_: (SMALL[request.param],) * 2)


def inputs(queries, keys, heads=2, kv_heads=1, dim=16, batch=1, dtype=torch.float16, window=0, causal=True):
    """The arguments of the op, with out and lse from the eager forward."""
    shapes = [(batch, queries, heads, dim)] * 2 + [(batch, keys, kv_heads, dim)] * 2
    dout, q, k, v = (testing.fill(s, seed=i).to(dtype) for i, s in enumerate(shapes))
    dlse = testing.fill((batch, heads, queries), seed=9).float()
    out, lse = reference.attend(q, k, v, window, dim**-0.5, causal)
    return [t.to(DEVICE) for t in (dout, dlse, q, k, v, out, lse)]


def runs(tensors, window=0, config=None, causal=True, cu=(None, None)):
    dim, packed = tensors[2].shape[-1], cu[0] is not None
    lengths = [t.shape[0 if packed else 1] for t in tensors[2:4]]
    configs = None if config is None else (config, config)
    return backward.attention_backward(*tensors, window, dim**-0.5, causal, *cu, *lengths, configs=configs)


# ---- the grid of all ops, in the tiles of every GPU ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
@pytest.mark.parametrize("family", [90], indirect=True)
def test_cases(case, dtype, family):
    parity(case, dtype)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_production_tiles(family, dim):
    """Those of float32, nearly the same for every GPU, are in test_cases."""
    parity(attention_case(1, 100, 230, 1, 1, dim, window=130), torch.float16)


# ---- shapes, windows, values ----


@pytest.mark.parametrize("window", [None, 1, 3, 64, 65, 97])
@pytest.mark.parametrize("queries", [1, 3, 16, 17, 64, 97])
@pytest.mark.parametrize("tiles", ["pointers"], indirect=True)
def test_lengths_and_windows(queries, window, tiles):
    few = queries < 17
    case = attention_case(4 if few else 1, queries, queries, 4 if few else 1, 1, 16, window)
    parity(case, DTYPES[queries % 2])


@pytest.mark.slow
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (2, 1), (3, 3), (4, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_the_long_grid(heads, kv_heads, dim):
    for dtype in DTYPES:
        for length in (17, 64, 97, 128, 217):
            for window in (1, 3, 64, 65, length, None):
                parity(attention_case(1, length, length, heads, kv_heads, dim, window), dtype)


@pytest.mark.parametrize("tiles", ["TMA", "wide rows"], indirect=True)
@pytest.mark.parametrize("queries,keys", [(1, 97), (17, 50), (50, 17), (33, 32), (64, 64)])
@pytest.mark.parametrize("window", [None, 33])
def test_more_or_fewer_keys_than_queries(queries, keys, window, tiles):
    parity(attention_case(1, queries, keys, 2, 1, 16, window), torch.float16)


@pytest.mark.parametrize("tiles", SMALL, indirect=True)
def test_not_causal(tiles):
    for queries, keys in ((19, 5), (16, 32), (33, 41)):
        parity(attention_case(1, queries, keys, 2, 1, 16, causal=False), torch.float16)


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (2, 2), (6, 2), (4, 1), (7, 1), (8, 1)])
def test_groups(heads, kv_heads):
    for dtype in DTYPES:
        parity(attention_case(1, 17, 17, heads, kv_heads, 16, window=9), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 8, 32, 192, 200])
def test_head_dimensions(dim, dtype):
    parity(attention_case(2, 33, 33, 6, 2, dim, window=16), dtype)


@pytest.mark.parametrize("tiles", ["pointers", "wide rows"], indirect=True)
@pytest.mark.parametrize("kind", ["one_hot", "ramp", "large"])
def test_kinds(kind, tiles):
    for dtype in DTYPES:
        parity(attention_case(1, 50, 70, 1, 1, 16, window=33), dtype, kind=kind)
        parity(packed_attention_case([(30, 47), (0, 0), (4, 1)], 2, 1, 16, window=20), dtype, kind=kind)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scales(scale):
    _, _, q, k, v, *_ = inputs(20, 20, dtype=torch.float32)
    found = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        mistral_kernels.attention(*leaves, scale=scale, impl=impl).square().sum().backward()
        found.append([t.grad for t in leaves])
    for ours, eager, truth in zip(*found, strict=True):
        assert testing.compare("gradient", ours, eager, truth).max_ratio <= 1


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_a_window_matters_and_a_wide_one_does_not(config):
    tensors = inputs(50, 60)
    causal = runs(tensors, config=config)
    for a, b in zip(runs(tensors, 20, config), causal, strict=True):
        assert not torch.allclose(a, b)
    for window in (60, 61, 1000):
        for a, b in zip(runs(tensors, window, config), causal, strict=True):
            assert torch.equal(a, b)


# ---- what is loaded ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL["pointers"], SMALL["wide rows"]], ids=["pointers", "wide rows"])
def test_keys_outside_the_window_are_not_loaded(config, dtype):
    """The last 32 queries stand at 64..95 with a window of 20: their first key is 45."""
    tensors = inputs(96, 96, window=20, dtype=dtype)
    clean = runs(tensors, 20, config)[0][:, 64:]
    for t in tensors[3:5]:
        t[:, :32] = float("nan")
    assert torch.equal(runs(tensors, 20, config)[0][:, 64:], clean)
    for t in tensors[3:5]:
        t[:, :48] = float("nan")
    assert runs(tensors, 20, config)[0][:, 64:67].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL["pointers"], SMALL["wide rows"]], ids=["pointers", "wide rows"])
def test_queries_outside_the_window_are_not_loaded(config, dtype):
    """The keys 32..47 with a window of 10 are seen by the queries 32..56."""
    tensors = inputs(96, 96, window=10, dtype=dtype)
    clean = [t[:, 32:48] for t in runs(tensors, 10, config)[1:]]
    for t in (tensors[0], tensors[2], tensors[5]):
        t[:, :32], t[:, 64:] = float("nan"), float("nan")
    for a, b in zip(runs(tensors, 10, config)[1:], clean, strict=True):
        assert torch.equal(a[:, 32:48], b)
    tensors[2][:, 56] = float("nan")
    assert runs(tensors, 10, config)[1][:, 47].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_no_gradient(dtype):
    tensors = inputs(40, 9, dtype=dtype)
    dq, dk, dv = runs(tensors, config=SMALL["pointers"])
    assert not dq[:, :31].any() and dq[:, 31:].any(-1).all()
    for t in (tensors[0], tensors[1].transpose(1, 2), tensors[2]):
        t[:, :31] = 0
    for a, b in zip(runs(tensors, config=SMALL["pointers"]), (dq, dk, dv), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_no_query_sees_have_no_gradient(dtype):
    _, dk, dv = runs(inputs(5, 60, window=10, dtype=dtype), 10, SMALL["pointers"])
    assert not dk[:, :46].any() and not dv[:, :46].any() and dv[:, 46:].any(-1).all()


# ---- packed ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL["TMA"], SMALL["wide rows"]], ids=["TMA", "wide rows"])
def test_packed_is_each_sequence_alone(config, dtype):
    """Bitwise, and a sequence's neighbours are poisoned, so none is read."""
    config = config if dtype == torch.float16 else SMALL["pointers"]
    lengths = ((5, 5), (0, 3), (33, 40), (3, 0), (0, 0))
    ends = [torch.tensor([sum(n[i] for n in lengths[:j]) for j in range(6)], dtype=torch.int32) for i in (0, 1)]
    tensors = inputs(sum(a for a, _ in lengths), sum(b for _, b in lengths), dtype=dtype)
    for i, (queries, keys) in enumerate(lengths):
        a, b = slice(ends[0][i], ends[0][i] + queries), slice(ends[1][i], ends[1][i] + keys)
        dout, dlse, q, k, v, *_ = tensors
        out, lse = reference.attend(q[:, a], k[:, b], v[:, b], 9, 0.25, True)
        alone = runs([dout[:, a], dlse[..., a], q[:, a], k[:, b], v[:, b], out, lse], 9, config)
        dirty = [torch.full_like(t, float("nan")) for t in tensors]
        for t, part, span in zip(dirty, (dout, None, q, k, v), (a, a, a, b, b), strict=False):
            if part is not None:
                t[:, span] = part[:, span]
        dirty[1][..., a], dirty[6][..., a], dirty[5][:, a] = dlse[..., a], lse, out
        found = runs([t[0] for t in dirty], 9, config, cu=[e.to(DEVICE) for e in ends])
        for whole, part, span in zip(found, alone, (a, b, b), strict=True):
            assert torch.equal(whole[span], part[0])


def test_sequences_without_queries_get_zeros():
    cu = [torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in ([0, 0, 4], [0, 30, 34])]
    tensors = [t[0] for t in inputs(4, 34)]
    _, dk, dv = runs(tensors, cu=cu)
    assert not dk[:30].any() and not dv[:30].any() and dv[30:].any()


# ---- memory ----


def views(t):
    """The same values, other strides: a slice of a packed projection, transposed, last stride not 1, off by one."""
    wide = torch.cat((t, t, t), dim=-2)
    yield wide[..., t.shape[-2] : 2 * t.shape[-2], :]
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.transpose(-1, -2).contiguous().transpose(-1, -2)
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    yield flat[1:].view(t.shape)


@pytest.mark.parametrize("family", [80, 90], indirect=True)
def test_strides(family):
    tensors = inputs(40, 50, heads=4, kv_heads=2, batch=2, window=20)
    before = [t.clone() for t in tensors]
    expected = runs(tensors, 20)
    for dout, q, k, v, out in zip(*(views(tensors[i]) for i in (0, 2, 3, 4, 5)), strict=True):
        dlse = tensors[1].transpose(1, 2).contiguous().transpose(1, 2)
        for got, want in zip(runs([dout, dlse, q, k, v, out, tensors[6]], 20), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=4e-3)
            assert got.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("family", [80, 90], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients(family, dtype):
    tensors = inputs(20, 20, heads=4, kv_heads=2, dtype=dtype)
    for shape in ((), (16,), (1, 20, 1, 16), (1, 1, 4, 1)):
        dout, dlse = testing.fill(shape).to(DEVICE, dtype).expand(1, 20, 4, 16), torch.ones((), device=DEVICE)
        got = runs([dout, dlse.expand(1, 4, 20), *tensors[2:]])
        expected = runs([dout.contiguous(), torch.ones(1, 4, 20, device=DEVICE), *tensors[2:]])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-3 if dtype == torch.float16 else 1e-5)


def test_nothing_is_launched_for_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(backward, "launch", never)
    for shape in ((0, 5), (5, 0), (5, 5, 2, 1, 16, 0), (0, 0)):
        tensors = inputs(*shape)
        for got, of in zip(runs(tensors), tensors[2:5], strict=True):
            assert got.shape == of.shape and not got.any()


# ---- as torch ops ----


def test_gradients_come_from_triton(monkeypatch):
    launched = []
    launch = backward.launch

    def recorded(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(backward, "launch", recorded)
    parity(attention_case(1, 5, 5, 2, 1, 16), torch.float32)
    assert launched == ["attention_dq", "attention_dkv"]


def test_same_bits_again():
    tensors = inputs(70, 70, window=20)
    assert all(torch.equal(a, b) for a, b in zip(runs(tensors, 20), runs(tensors, 20), strict=True))


def test_opcheck():
    args = (*inputs(20, 20, dim=8), 7, 0.5, True, None, None, 20, 20)
    torch.library.opcheck(torch.ops.mistral_kernels.attention_backward_triton.default, args)


def test_configs_are_complete():
    for configs in (backward.DQ_CONFIGS, backward.DKV_CONFIGS):
        assert len(configs) == len(FAMILIES) * 3 * 2
        for (of, _, bits), config in configs.items():
            assert config.rows >= 16 and config.keys >= 16 and of in FAMILIES
            assert not config.tma or (of >= 90 and bits == 16)
    for dim in (1, 16, 64, 96, 128, 200, 256):
        for of in FAMILIES:
            assert not any(c.tma for c in backward.without_tma(of, dim, 2))
