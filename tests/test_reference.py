"""The eager ops against sources of their meaning that share no code with them: torch, Hugging Face, tables by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import mistral_kernels
from mistral_kernels import reference
from mistral_kernels.attention.reference import visible
from mistral_kernels.testing import fill

# Eight queries, eight keys, window 3, written by hand: each query sees itself and the two before it.
WINDOW_3 = """
1 0 0 0 0 0 0 0
1 1 0 0 0 0 0 0
1 1 1 0 0 0 0 0
0 1 1 1 0 0 0 0
0 0 1 1 1 0 0 0
0 0 0 1 1 1 0 0
0 0 0 0 1 1 1 0
0 0 0 0 0 1 1 1
"""


def table(text: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row.split()] for row in text.strip().splitlines()], dtype=torch.bool)


def test_window_is_the_number_of_visible_keys():
    assert torch.equal(visible(8, 8, 3, True), table(WINDOW_3))


@pytest.mark.parametrize(("queries", "keys"), [(2, 8), (8, 8), (8, 3)])
def test_the_last_query_is_aligned_with_the_last_key(queries, keys):
    whole = table(WINDOW_3)
    mask = visible(queries, keys, 3, True)
    if keys >= queries:
        assert torch.equal(mask, whole[8 - queries :, 8 - keys :])
    else:  # the first queries stand before every key
        assert not mask[: queries - keys].any()
        assert torch.equal(mask[queries - keys :], visible(keys, keys, 3, True))


def test_rms_norm_roundings():
    x, w = fill((64, 512)).bfloat16(), (1 + 0.3 * fill((512,), seed=1)).bfloat16()
    h = x.float()
    h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    model, once = reference.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5, "fp32")
    assert torch.equal(model, w * h)
    assert not torch.equal(model, once), "the two roundings must differ somewhere"
    double = F.rms_norm(x.double(), (512,), w.double(), 1e-5)
    assert torch.equal(once, double.bfloat16()) or (once.double() - double).abs().max() <= 2**-8 * double.abs().max()


def test_rms_norm_is_hugging_faces():
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    x, norm = fill((7, 96)).bfloat16(), MistralRMSNorm(96, eps=1e-5).bfloat16()
    norm.weight.data.copy_(1 + 0.3 * fill((96,), seed=1))
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_mixed_dtypes_promote_as_eager_arithmetic():
    for x_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for w_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x, w = fill((3, 40)).to(x_dtype), fill((40,), seed=1).to(w_dtype)
            out = mistral_kernels.rms_norm(x, w)
            wide = torch.float64 if x_dtype == torch.float64 else torch.float32
            h = x.to(wide)
            expected = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x_dtype) * w
            assert out.dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)


def test_add_rms_norm_normalises_the_rounded_sum():
    x, r, w = fill((9, 64)).bfloat16(), fill((9, 64), seed=1).bfloat16(), torch.ones(64, dtype=torch.bfloat16)
    y, total = reference.add_rms_norm(x, r, w)
    assert torch.equal(total, x + r)
    assert torch.equal(y, reference.rms_norm(x + r, w))


def test_swiglu_is_silu_times_up():
    gate, up = fill((5, 33)), fill((5, 33), seed=1)
    torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)
    assert torch.equal(reference.swiglu_packed(torch.cat((gate, up), -1)), reference.swiglu(gate, up))


def test_rope_halves_are_hugging_faces():
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    q, k = fill((2, 6, 4, 16)).float(), fill((2, 6, 2, 16), seed=1).float()
    cos, sin = reference.rope_table(16, 1e4, 6)
    wide = [torch.cat((t, t), -1)[None].expand(2, -1, -1) for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *wide)
    for ours in (reference.rope(q, k, cos, sin), reference.rope(q, k, *wide)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.transpose(1, 2))


def test_rope_pairs_are_complex_products():
    """Mistral's own code multiplies adjacent pairs, read as complex numbers, by exp(i · angle)."""
    q, k = fill((5, 4, 16)), fill((5, 2, 16), seed=1)
    cos, sin = reference.rope_table(16, 1e4, 5, dtype=torch.float64)
    turned = reference.rope(q, k, cos, sin, interleaved=True)
    for x, y in zip((q, k), turned, strict=True):
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
        torch.testing.assert_close(y, torch.view_as_real(z).flatten(-2))


def test_rope_tables_stay_exact_far_out():
    """cos and sin of position 131,071, where float32 angles are off by a thousandth."""
    cos, sin = reference.rope_table(128, 1e6, 131_072)
    i, p = torch.arange(64, dtype=torch.float64), 131_071
    angle = p * 1e6 ** (-2 * i / 128)
    torch.testing.assert_close(cos[p].double(), angle.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(sin[p].double(), angle.sin(), rtol=0, atol=6e-8)


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "truncate": False, "beta_slow": 2},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{len(s)}")
def test_rope_scalings_are_hugging_faces(scaling):
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    context = int(scaling.get("original_max_position_embeddings", 4096) * scaling.get("factor", 1))
    config = MistralConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=context,
        rope_parameters=scaling | {"rope_theta": 1e6},
    )
    theirs = MistralRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(300)[None])
    ours = reference.rope_table(128, 1e6, 300, scaling)
    torch.testing.assert_close(ours[0], cos[0, :, :64], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], sin[0, :, :64], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
    ],
)
def test_rope_scalings_that_are_unknown_or_incomplete(scaling, words):
    with pytest.raises(ValueError, match=words):
        reference.rope_table(64, 1e4, 16, scaling)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (4, 13), (13, 13)])
def test_attention_is_masked_sdpa(window, queries, keys):
    q, k, v = fill((2, queries, 6, 16)), fill((2, keys, 2, 16), seed=1), fill((2, keys, 2, 16), seed=2)
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    mask = (j <= i) & ((i - j < window) if window else True)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(reference.attention(q, k, v, window), theirs)


def test_attention_lse():
    q, k, v = (fill((1, 5, 1, 8), seed=s) for s in range(3))
    _, lse = reference.attention(q, k, v, return_lse=True)
    last = (q[0, -1, 0] @ k[0, :, 0].T * 8**-0.5).exp().sum().log()
    assert lse.shape == (1, 1, 5)
    assert math.isclose(lse[0, 0, -1].item(), last.item())


def test_query_heads_of_a_group_are_adjacent():
    """Query head h reads KV head h // G; h % Hkv would pass with one KV head or as many as query heads."""
    q, k, v = fill((1, 3, 6, 4)), fill((1, 3, 2, 4), seed=1), fill((1, 3, 2, 4), seed=2)
    repeated = [t.repeat_interleave(3, dim=2) for t in (k, v)]
    torch.testing.assert_close(reference.attention(q, k, v), reference.attention(q, *repeated))


def test_packed_attention_is_attention_of_each_sequence():
    lengths = [4, 0, 9, 1]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = fill((14, 4, 8)), fill((14, 2, 8), seed=1), fill((14, 2, 8), seed=2)
    packed, lse = reference.attention(q, k, v, window=3, cu_seqlens_q=cu, return_lse=True)
    assert lse.shape == (4, 14)
    for a, b in itertools.pairwise(cu.tolist()):
        if b > a:
            alone = reference.attention(q[None, a:b], k[None, a:b], v[None, a:b], window=3)
            torch.testing.assert_close(packed[a:b], alone[0])


def test_ring_example_of_mistral_inference():
    """Chunks of 5, 7 and 2 tokens at positions 0, 1 and 3, window 3; the sequences' slots are counted through."""
    lengths, starts = [5, 7, 2], [0, 1, 3]
    kept = torch.tensor([int(c) for c in "00111000011111"], dtype=torch.bool)
    slots = [2, 0, 1, 5, 3, 4, 6, 7]
    k = torch.arange(1.0, 15.0)[:, None, None].expand(14, 1, 2).contiguous()
    caches = [torch.zeros(3, 3, 1, 2) for _ in range(2)]
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    reference.write_kv(k, 10 * k, *caches, positions, torch.tensor([0, 5, 12, 14], dtype=torch.int32))
    flat = caches[0].view(9, 2)[:, 0]
    assert torch.equal(flat[slots], k[kept][:, 0, 0])
    assert flat[8] == 0
    assert torch.equal(caches[1], 10 * caches[0])
