"""All layers of a decode step in one call: the same as op by op, and only where the model is what it was built as."""

import pytest
import tiny
import torch

import mistral_kernels as mk
from mistral.model import Transformer
from mistral_kernels import testing


def model_of(ops=mk, dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    return Transformer(tiny.config(**changes), ops).to(dtype)


def run(model, chunks, one_by_one=False, kv_dtype=None):
    """Logits of packed passes of these chunk lengths, and what they leave in the cache."""
    model.ops.decode_layers = None if one_by_one else mk.decode_layers
    cache = model.cache(len(chunks[0]), 40, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(1)
    outs = []
    with torch.inference_mode():
        for lengths in chunks:
            tokens = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator)
            outs.append(model(tokens, cache=cache, lengths=lengths))
    return [*outs, *cache.k, *cache.v, *cache.k_scale, *cache.v_scale]


CHUNKS = [[3, 1], [1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=4), dict(attention_bias=True)])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_equals_op_by_op(one_thread, dtype, changes, kv_dtype):
    model = model_of(dtype=dtype, **changes)
    together, alone = (run(model, CHUNKS, one, kv_dtype) for one in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_the_step_is_taken(one_thread, monkeypatch, kv_dtype):
    calls = []
    model = model_of()
    inner = mk.decode_layers
    monkeypatch.setattr(mk, "decode_layers", lambda *a, **k: calls.append(1) or inner(*a, **k))
    run(model, CHUNKS, kv_dtype=kv_dtype)
    assert len(calls) == len(CHUNKS) - 1  # not the chunk of 3, which is attended to before it is written


def plain(model):
    return all(layer.plain_weights() is not None for layer in model.layers)


def test_a_changed_model_runs_op_by_op(one_thread):
    assert plain(model_of())
    hooked, replaced, compiled = model_of(), model_of(), model_of()
    handle = hooked.layers[0].feed_forward.w2.register_forward_hook(lambda m, i, o: o * 0)
    replaced.layers[1].attention.wq = torch.nn.Linear(
        *reversed(replaced.layers[1].attention.wq.weight.shape)
    ).bfloat16()
    compiled.layers[0].attention.compile(backend="eager")
    assert not plain(hooked) and not plain(replaced) and not plain(compiled)
    zeroed = run(hooked, CHUNKS)
    handle.remove()
    assert plain(hooked) and not torch.equal(zeroed[-1], run(hooked, CHUNKS)[-1])


def test_reference_and_cpu_implementations(one_thread):
    """The eager op is the eager ops one by one; in float32 both implementations agree closely."""
    outs = {}
    for impl in ("reference", None):
        model = model_of(mk.using(impl=impl), torch.float32)
        outs[impl] = run(model, CHUNKS, one_by_one=False)
    for a, b in zip(outs["reference"], outs[None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if mk.backends()["triton"] is None:
        assert mk.using(impl="triton").decode_layers is None


def arguments(dtype=torch.float32):
    """Two layers, 12 wide, of 4 heads on 2 with 6 dimensions; three sequences."""

    def fill(*shape, seed=0):
        return (testing.fill(shape, seed=seed) * 0.3).to(dtype)

    shapes = ((12,), (24, 12), (12, 12), (12, 12), (12, 24), (12,), (20, 12), (12, 20), (20, 12))
    weights = [fill(*s, seed=i) for i, s in enumerate(shapes * 2)]
    caches = [[fill(3, 8, 2, 6, seed=30 + 2 * i + j) for i in range(2)] for j in range(2)]
    cos, sin = mk.rope_table(6, 1e4, 16)
    lens = torch.tensor([2, 0, 7], dtype=torch.int32)
    return [fill(3, 12), weights, *caches, lens, cos, sin, lens + 1]


def test_opcheck():
    x, weights, k, v, positions, cos, sin, lens = arguments()
    op = torch.ops.mistral_kernels.decode_layers.default
    torch.library.opcheck(
        op, (x, weights, [], [], [], k, v, [], [], positions, cos, sin, None, lens, 0, 0.4, 1e-5, False, 1)
    )


BAD = {
    "weights": (1, lambda a: a[:-1], ValueError, "17 weights for 2 layers; each takes attention_norm, wq"),
    "caches": (2, lambda a: a[:1], ValueError, "1 k_caches and 2 v_caches"),
    "x": (0, lambda a: a[0], ValueError, r"x is \[12\]; it must be \[T, N\]"),
    "dtype": (0, lambda a: a.double(), TypeError, r"weights\[0\] is torch.float32 but x is torch.float64"),
    "tokens": (0, lambda a: a[:2], ValueError, "with T = 3 without cu_seqlens"),
    "positions": (4, lambda a: a + 20, ValueError, "positions run from 20 to 27"),
    "full": (7, lambda a: a + 9, ValueError, "k_cache has 8 slots"),
    "heads": (1, lambda a: [a[0], a[1][:20], *a[2:]], RuntimeError, "wq, wk and wv must have rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    at, change, error, words = BAD[name]
    given = arguments()
    given[at] = change(given[at])
    if error is RuntimeError and not testing.isa_tiers():
        pytest.skip("the C++ kernels are not built")
    with pytest.raises(error, match=words):
        mk.decode_layers(*given)


def with_codes():
    x, weights, k, v, *rest = arguments()
    codes = [[t.new_zeros(t.shape, dtype=torch.int8) for t in caches] for caches in (k, v)]
    scales = [[t.new_zeros(t.shape[:3]) for t in caches] for caches in (k, v)]
    return (x, weights, *codes, *rest), dict(k_scales=scales[0], v_scales=scales[1])


def test_opcheck_of_codes():
    (x, weights, k, v, positions, cos, sin, lens), scales = with_codes()
    op = torch.ops.mistral_kernels.decode_layers.default
    rings = (k, v, *scales.values())
    torch.library.opcheck(op, (x, weights, [], [], [], *rings, positions, cos, sin, None, lens, 0, 0.4, 1e-5, False, 1))


def test_bad_scales():
    given, scales = with_codes()
    with pytest.raises(ValueError, match="1 k_scales and 2 v_scales for 2 layers"):
        mk.decode_layers(*given, **scales | {"k_scales": scales["k_scales"][:1]})
    with pytest.raises(TypeError, match=r"k_caches\[0\] is torch.int8 but x is torch.float32"):
        mk.decode_layers(*given)
    with pytest.raises(TypeError, match="k_cache"):
        mk.decode_layers(*arguments(), **scales)
    with pytest.raises(ValueError, match="k_scale"):
        mk.decode_layers(*given, **scales | {"k_scales": [t[:, :-1] for t in scales["k_scales"]]})
