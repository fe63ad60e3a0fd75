"""Bytes and FLOPs of the CUDA kernels, counted in their own emulated run, against what the op has to move."""

import pytest
import torch
from ptx_on_cpu import launches, missing, traffic

import mistral_kernels as m

pytestmark = [
    pytest.mark.usefixtures("cuda_ops", "one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the counts come from runs without a GPU"),
    pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}"),
]
BF16 = torch.bfloat16


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def near(value, floor):
    assert floor <= value <= 1.05 * floor, (value, floor)


def test_rms_norm_reads_and_writes_each_element_once():
    x, weight = torch.randn(64, 1024).to(BF16), torch.ones(1024, dtype=BF16)
    with launches() as found:
        y = m.rms_norm(x, weight, impl="cuda")
    assert traffic(x) == (size(x), 0)
    (launch,) = found
    near(launch.written, size(y))
    near(launch.read_once, size(x, weight))
    assert launch.accesses16 >= 0.98 * launch.accesses


def test_swiglu_moves_its_tensors_once():
    gate, up = torch.randn(2, 32, 1024).to(BF16)
    with launches() as found:
        y = m.swiglu(gate, up, impl="cuda")
    (launch,) = found
    assert (launch.read, launch.written) == (size(gate, up), size(y))
    assert launch.accesses16 == launch.accesses


def test_rope_reads_a_token_and_its_row_of_the_tables_once():
    cos, sin = m.rope_table(128, 10_000.0, 16)
    q, k = torch.randn(1, 16, 8, 128).to(BF16), torch.randn(1, 16, 2, 128).to(BF16)
    with launches() as found:
        m.rope(q, k, cos, sin, impl="cuda")
    (launch,) = found
    near(launch.read, size(q, k, cos, sin))
    assert launch.written == size(q, k)


@pytest.mark.parametrize("heads", [2, 8])
def test_decoding_reads_each_kept_key_once_for_all_heads_of_a_group(heads):
    q = torch.randn(1, heads, 64).to(BF16)
    k, v = torch.randn(2, 1, 1024, 2, 64).to(BF16)
    lens = torch.tensor([700], dtype=torch.int32)
    m.attention_cached(q, k, v, lens, impl="cuda")
    kept = 700 * 2 * 64 * 2
    assert traffic(k) == (kept, 0) and traffic(v) == (kept, 0)


@pytest.mark.parametrize(("window", "tiles"), [(None, 1 + 2 + 3 + 4), (64, 1 + 3 * 2), (1, 4), (66, 1 + 2 + 2 * 3)])
def test_attention_visits_the_tiles_that_the_window_needs(window, tiles):
    heads, rows = 2, 64
    q, k, v = torch.randn(3, 1, 256, heads, 64).to(BF16)
    with launches() as found:
        m.attention(q, k, v, window=window, impl="cuda")
    (launch,) = found
    assert launch.mma_flops == heads * tiles * 2 * (2 * rows * rows * 64)
