"""`impl="flash_attn"`: our arguments as flash-attn 2, 3 and 4 get them, by stand-ins with their signatures.

The stand-ins refuse unknown arguments, record what comes and compute with a mask written from flash-attn's own
documentation, so that a window off by one is a wrong number and not only a wrong argument.
"""

import types

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels.attention import flash
from mistral_kernels.testing import fill


def attend(q, k, v, scale, causal, window_size):
    """[i + Sk − S − left, i + Sk − S + right], inclusive; lse of rows without keys +inf, as flash-attn 2 gives it."""
    left, right = ((-1 if w is None else w) for w in window_size)
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2).double() for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k) * scale
    diagonal = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        hidden |= key < diagonal - left
    if causal or right >= 0:
        hidden |= key > diagonal + (0 if causal else right)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1).nan_to_num(0)
    out = torch.einsum("bhst,bthd->bshd", weights, v).to(q.dtype)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).float()


def packed(q, k, v, cu_q, cu_k, *how):
    outs, lses = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        out, lse = attend(q[None, a:b], k[None, c:d], v[None, c:d], *how)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def over_cache(q, k, v, lens, *how):
    parts = [attend(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], *how)[0] for b, n in enumerate(lens.tolist())]
    return torch.cat(parts)


def library(generation, calls):
    """A module with the functions of one generation: 2 and 3 name their lse return_attn_probs, 4 return_lse."""
    module = types.ModuleType(flash.MODULES[generation])
    if generation == 4:

        def dense(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), return_lse=False):
            calls.append(("dense", causal, window_size))
            return attend(q, k, v, softmax_scale, causal, window_size)

        def varlen(
            q,
            k,
            v,
            *,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            seqused_k=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            return_lse=False,
        ):
            calls.append(("packed" if seqused_k is None else "cache", causal, window_size))
            if seqused_k is not None:
                return over_cache(q, k, v, seqused_k, softmax_scale, causal, window_size), None
            return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)
    else:

        def dense(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
            calls.append(("dense", causal, window_size))
            result = attend(q, k, v, softmax_scale, causal, window_size)
            return (*result, None) if generation == 2 else result

        def varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            return_attn_probs=False,
        ):
            assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
            calls.append(("packed", causal, window_size))
            return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)

        def cached(q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False, window_size=(-1, -1)):
            calls.append(("cache", causal, window_size))
            return over_cache(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal, window_size)

        module.flash_attn_with_kvcache = cached
    module.flash_attn_func, module.flash_attn_varlen_func = dense, varlen
    return module


@pytest.fixture(params=[2, 3, 4])
def stand_in(request, monkeypatch):
    calls = []
    monkeypatch.setattr(flash, "_capability", lambda: 9)
    monkeypatch.setattr(flash, "load", lambda: (request.param, library(request.param, calls)))
    return types.SimpleNamespace(calls=calls, unlimited=(None, None) if request.param == 4 else (-1, -1))


def qkv(queries=9, keys=9, dtype=torch.float16):
    return tuple(
        fill(shape, seed=s).to(dtype)
        for s, shape in enumerate(((2, queries, 6, 16), (2, keys, 2, 16), (2, keys, 2, 16)))
    )


@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (2, 9), (9, 4)])
def test_dense(stand_in, window, queries, keys):
    q, k, v = qkv(queries, keys)
    out, lse = mk.attention(q, k, v, window, scale=0.3, return_lse=True, impl="flash_attn")
    expected, expected_lse = mk.attention(q, k, v, window, scale=0.3, return_lse=True, impl="reference")
    assert stand_in.calls == [("dense", True, (window - 1, 0) if window else stand_in.unlimited)]
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_not_causal(stand_in):
    q, k, v = qkv(5, 9)
    out = mk.attention(q, k, v, causal=False, impl="flash_attn")
    assert stand_in.calls == [("dense", False, stand_in.unlimited)]
    torch.testing.assert_close(out, mk.attention(q, k, v, causal=False), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("window", [None, 2])
def test_packed(stand_in, window):
    q, k, v = (t[0] for t in qkv(9, 11))
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]).int(), torch.tensor([0, 4, 6, 11]).int()
    how = dict(window=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    out, lse = mk.attention(q, k, v, **how, max_seqlen_q=5, max_seqlen_k=5, impl="flash_attn")
    expected, expected_lse = mk.attention(q, k, v, **how, impl="reference")
    assert stand_in.calls == [("packed", True, (window - 1, 0) if window else stand_in.unlimited)]
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["sequences", "tokens", "lengths"])
@pytest.mark.parametrize(("window", "lens"), [(8, [3, 8, 21]), (None, [1, 8, 5])])
def test_decoding_over_a_ring(stand_in, window, lens, layout):
    q = fill((3, 1, 6, 16) if layout == "sequences" else (3, 6, 16)).half()
    k, v = (fill((3, 8, 2, 16), seed=s).half() for s in (1, 2))
    arguments = (q, k, v, torch.tensor(lens, dtype=torch.int32), window)
    lengths = dict(cu_seqlens=torch.arange(4, dtype=torch.int32), max_seqlen=1) if layout == "lengths" else {}
    out = mk.attention_cached(*arguments, **lengths, impl="flash_attn")
    assert [c[0] for c in stand_in.calls] == ["cache"]
    torch.testing.assert_close(out, mk.attention_cached(*arguments, impl="reference"), rtol=2e-3, atol=2e-3)


def test_gradients_are_flash_attns_own_and_that_of_lse_raises(stand_in):
    leaves = [t.requires_grad_() for t in qkv()]
    gradients = torch.autograd.grad(mk.attention(*leaves, 3, impl="flash_attn").sum(), leaves)
    expected = torch.autograd.grad(mk.attention(*leaves, 3, impl="reference").sum(), leaves)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    _, lse = mk.attention(*leaves, 3, return_lse=True, impl="flash_attn")
    with pytest.raises(NotImplementedError, match="no gradient of lse"):
        lse.sum().backward()


def test_empty(stand_in):
    q, k, v = (t.requires_grad_() for t in qkv())
    out, lse = mk.attention(q, k[:, :0], v[:, :0], return_lse=True, impl="flash_attn")
    assert (out == 0).all() and (lse == -torch.inf).all() and not stand_in.calls
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_what_it_cannot_do_says_so(stand_in):
    q, k, v = qkv()
    lens = torch.tensor([9, 9], dtype=torch.int32)
    for call, words in (
        (lambda: mk.attention(*(t.float() for t in (q, k, v)), impl="flash_attn"), "float16 and bfloat16, not"),
        (lambda: mk.attention(*(t[..., :12] for t in (q, k, v)), impl="flash_attn"), "head dimension is 12"),
        (lambda: mk.attention_cached(q[:, :1], k, v, lens, 5, impl="flash_attn"), "9 slots and the window is 5"),
        (lambda: mk.attention_cached(q, k, v, lens, 9, k_new=k, v_new=v, impl="flash_attn"), "one query a sequence"),
        (lambda: mk.rms_norm(q, q[0, 0, 0], impl="flash_attn"), "not in flash-attn"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            call()


@pytest.mark.parametrize(("capability", "found"), [(8, 2), (9, 3), (10, 4)])
def test_the_generation_for_the_gpu_is_taken(monkeypatch, capability, found):
    monkeypatch.setattr(flash, "_capability", lambda: capability)
    names = {name: generation for generation, name in flash.MODULES.items()}
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: library(names[name], []))
    assert flash.load.__wrapped__()[0] == found


def test_a_broken_package_breaks_nothing_else(monkeypatch):
    """Such as one whose own libraries are missing, which raises no ImportError."""

    def broken(name):
        raise RuntimeError(f"{name} lacks a library")

    monkeypatch.setattr(flash, "_capability", lambda: 9)
    monkeypatch.setattr(flash, "failures", {})
    monkeypatch.setattr(flash.importlib, "import_module", broken)
    monkeypatch.setattr(flash, "load", flash.load.__wrapped__)
    assert "flash_attn.cute fails to import: flash_attn.cute lacks a library" in flash.unusable()


def test_parity_without_the_gradient_of_lse(stand_in):
    case = testing.attention_case(1, 9, 9, 4, 2, 16, 3)
    found = testing.parity(case, torch.bfloat16, "flash_attn", gradients=True)
    assert [e.output for e in found] == ["out0", "out1", "dq", "dk", "dv"] and all(e.passed for e in found)


def test_without_the_package():
    if mk.backends()["flash_attn"] is None:
        pytest.skip("flash-attn is here")
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"impl='flash_attn' cannot run here: .*; able here: reference"):
        mk.attention(q, k, v, impl="flash_attn")
