"""Launches the Triton gradients of attention: each kernel in one configuration per GPU, head dimension and dtype."""

import torch

from .. import _tuned
from .._triton import blocks, in_a_row
from . import triton_backward as kernels
from .triton_blocks import Config, describable, family, launch, padded, readable

# By family, padded D and bits of an element: query rows and keys of a tile, the largest that compile without spills in
# the main loop, with Triton 3.6 and 3.9. Timed were D 64 and 128 on an H200 (bf16, 32 heads over 8, S=8192 causal, both
# kernels together); the others are chosen by the MMA share of a block's cycles as the machine code models it, 1 being
# the peak.
DQ_CONFIGS = {
    (80, 64, 16): Config(128, 32, 8, 2),  # 184 registers; 64 keys spill
    (80, 128, 16): Config(64, 64, 8, 2),
    (80, 256, 16): Config(64, 32, 8, 2),
    (86, 64, 16): Config(128, 32, 8, 2),
    (86, 128, 16): Config(64, 64, 8, 2),
    (86, 256, 16): Config(64, 32, 8, 1),  # two stages take 100 KiB of shared memory, 1 more than there is
    (90, 64, 16): Config(128, 64, 8, 3, tma=True),  # 2.30 ms, 64 rows, 4 warps, 2 stages 2.44
    (90, 128, 16): Config(128, 64, 8, 3, tma=True),  # 4.45 ms, before it 64 rows, 4 warps, 2 stages 4.66
    (90, 256, 16): Config(128, 32, 8, 2, tma=True),
    (100, 64, 16): Config(128, 64, 8, 2, tma=True),
    (100, 128, 16): Config(128, 64, 8, 2, tma=True),
    (100, 256, 16): Config(128, 32, 8, 2, tma=True),
}
DKV_CONFIGS = {
    (80, 64, 16): Config(32, 128, 8, 2),
    (80, 128, 16): Config(64, 64, 8, 2),  # 0.69
    (80, 256, 16): Config(32, 32, 8, 2),
    (86, 64, 16): Config(32, 128, 8, 2),
    (86, 128, 16): Config(64, 64, 8, 2),
    (86, 256, 16): Config(32, 32, 8, 2),
    (90, 64, 16): Config(64, 64, 4, 3, tma=True),  # 2.33 ms, two stages 2.44, 128 keys, 8 warps, three stages 2.65
    (90, 128, 16): Config(32, 64, 4, 3, tma=True),  # 3.85 ms; 64 rows spill, and take 3.77 here, W=1024 5% more
    (90, 256, 16): Config(32, 32, 8, 2, tma=True),  # by HMMA: all tiles of 64 keys, that wgmma needs, spill
    (100, 64, 16): Config(64, 128, 8, 2, tma=True),
    (100, 128, 16): Config(64, 128, 8, 2, tma=True),
    (100, 256, 16): Config(32, 64, 4, 2, tma=True),  # 128 keys want more tensor memory than there is
}
# Float32 has no tensor cores at full precision; these keep within 226 registers. One tile for both kernels: they add
# the products of a score in the same order, so that a row's largest score is the same number in both.
for _family in (80, 86, 90, 100):
    for _dim, _config in ((64, Config(32, 32, 8, 1)), (128, Config(32, 16, 8, 1)), (256, Config(16, 32, 8, 1))):
        DQ_CONFIGS[_family, _dim, 32] = DKV_CONFIGS[_family, _dim, 32] = _config


def production_configs(device_family: int, dim: int, itemsize: int) -> tuple[Config, Config]:
    """Those of dq and of dk and dv."""
    key = (device_family, max(64, padded(dim)), 8 * itemsize)
    return DQ_CONFIGS[key], DKV_CONFIGS[key]


def without_tma(device_family: int, dim: int, itemsize: int) -> tuple[Config, Config]:
    return production_configs(80, dim, itemsize)


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[Config, Config]:
    """The configs tuned on this GPU, or the production configs; with pointers where TMA cannot read the streamed."""
    case = (family(q.device), q.shape[-1], q.element_size())
    (dq, dkv), (plain_dq, plain_dkv) = production_configs(*case), without_tma(*case)
    dq = _tuned.lookup("attention_dq", q.device, *case[1:]) or dq
    dkv = _tuned.lookup("attention_dkv", q.device, *case[1:]) or dkv
    dq = dq if not dq.tma or describable(k, v) else plain_dq
    return dq, dkv if not dkv.tma or describable(q, dout) else plain_dkv


def _strides(packed: bool, *tensors: torch.Tensor) -> list[int]:
    return [s for t in tensors for s in ((0,) if packed else ()) + t.stride()[:-1]]


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    causal: bool,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    configs: tuple[Config, Config] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    packed = cu_q is not None and cu_k is not None
    (heads, dim), kv_heads = q.shape[-2:], k.shape[-2]
    tokens = q.shape[0] if packed else q.shape[1]
    sequences = q.shape[0] if cu_q is None else cu_q.numel() - 1
    q, k, v, out, dout = (readable(t) for t in (q, k, v, out, dout))
    for_dq, for_dkv = configs or choose(q, k, v, dout)
    cu_q, cu_k = in_a_row(cu_q, cu_k)
    exact = q.dtype == torch.float32
    # Numbers from one head to the next in what the first kernel leaves for the second; see statistics_of().
    pitch = (tokens + 3) // 4 * 4 + (4 * sequences if packed else 0)
    statistics = (1 if packed else sequences) * heads * pitch
    top, lse2, delta = (
        torch.empty(statistics, dtype=torch.float32, device=q.device) if exact or i else None for i in range(3)
    )
    strides = _strides(packed, q, k, v, dout)
    flags = dict(D=dim, DP=padded(dim), CAUSAL=causal, WINDOW=window > 0, PACKED=packed)
    flags |= dict(EXACT=exact)
    row_blocks = blocks(max_q, for_dq.rows)
    launch(
        kernels.attention_dq, row_blocks * sequences * heads, for_dq,
        q, k, v, dout, out, lse.contiguous(), dlse.contiguous(), top, lse2, delta, dq, cu_q, cu_k, scale,
        *strides, *_strides(packed, out), heads, heads // kv_heads, tokens, k.shape[-3], window, tokens, pitch,
        row_blocks,
        BM=for_dq.rows, BN=for_dq.keys, STAGES=for_dq.stages, TMA=for_dq.tma, **flags,
    )  # fmt: skip
    key_blocks = blocks(max_k, for_dkv.keys)
    launch(
        kernels.attention_dkv, key_blocks * sequences * kv_heads, for_dkv,
        q, k, v, dout, top, lse2, delta, dk, dv, cu_q, cu_k, scale, *strides,
        heads, tokens, k.shape[-3], window, pitch, key_blocks, statistics,
        G=heads // kv_heads, BM=for_dkv.rows, BN=for_dkv.keys, STAGES=for_dkv.stages, TMA=for_dkv.tma, **flags,
    )  # fmt: skip
    return dq, dk, dv
