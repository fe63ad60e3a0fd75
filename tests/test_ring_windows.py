"""Decoding token by token over the ring, past its end three times, in every implementation: one full attention."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels.testing import fill

IMPLS = [name for name, reason in mk.backends().items() if reason is None and name not in ("cuda", "flash_attn")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STARTS = (0, 1, 5)  # tokens of each sequence before the first step
HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(params=[*IMPLS, "cuda"])
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_ops")
        request.getfixturevalue("one_thread")
    return request.param


def whole(q, k, v, tables, window):
    """Every query of the sequences in float64, with the window alone between it and the keys."""
    q, k = mk.reference.rope(q.double(), k.double(), *(t.double() for t in tables))
    return mk.reference.attention(q, k, v.double(), window=window)


@pytest.mark.parametrize("window", [1, 3, 8, pytest.param(64, marks=pytest.mark.slow)])
def test_steps_over_the_ring_are_one_attention(impl, window):
    device = DEVICE if impl in ("cuda", "triton") else "cpu"
    steps = 3 * window + 5
    shapes = [(len(STARTS), max(STARTS) + steps, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (fill(shape, seed=i).float().to(device) for i, shape in enumerate(shapes))
    tables = mk.rope_table(DIM, max_positions=shapes[0][1], device=device)
    rings = [torch.full((len(STARTS), window, KV_HEADS, DIM), torch.nan, device=device) for _ in range(2)]
    expected = whole(q, k, v, tables, window)
    rows = torch.arange(len(STARTS), device=device)
    for step in range(-max(STARTS), steps):
        positions = torch.tensor([[start + step] for start in STARTS], device=device)
        began = rows[positions[:, 0] >= 0]
        at = positions[began]
        token = [t[began[:, None], at] for t in (q, k, v)]
        held = [ring[began] for ring in rings]
        rotated, _ = mk.rope_write_kv(*token, *held, at, *tables, impl=impl)
        for ring, part in zip(rings, held, strict=True):
            ring[began] = part
        lens = (at[:, 0] + 1).int()
        out = mk.attention_cached(rotated, *held, lens, window, impl=impl)
        assert (out - expected[began[:, None], at]).abs().max() < 2e-6 * expected.abs().max()
