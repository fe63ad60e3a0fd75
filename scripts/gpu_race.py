"""Every CUDA C++ kernel launched once or more on small inputs, for compute-sanitizer, which slows each launch greatly.

compute-sanitizer --tool racecheck --kernel-name kernel_substring=mk4cuda python scripts/gpu_race.py
compute-sanitizer --tool memcheck python scripts/gpu_race.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402

import mistral_kernels as mk  # noqa: E402

ops = mk.using(impl="cuda")


def tensors(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def linear(dtype: torch.dtype) -> None:
    for rows, depth in ((1, 1000), (3, 1000), (2, 250), (4, 99)):
        x, weight, bias = (tensors(*s, dtype=dtype) for s in ((rows, depth), (37, depth), (37,)))
        mk.linear(x, weight, bias, impl="cuda")


def elementwise(dtype: torch.dtype) -> None:
    for rows in (5, 400):  # few take more threads each
        norms_and_rest(rows, dtype)


def norms_and_rest(rows: int, dtype: torch.dtype) -> None:
    x, residual, weight = (tensors(*s, dtype=dtype) for s in ((rows, 1000), (rows, 1000), (1000,)))
    q, k = tensors(1, 40, 4, 64, dtype=dtype), tensors(1, 40, 2, 64, dtype=dtype)
    cos, sin = mk.rope_table(64, max_positions=64, device="cuda")
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    rotated = ops.rope(q, k, cos, sin)
    parts = (ops.rms_norm(x, weight, 1e-5), normed, total, ops.swiglu(x, residual), ops.swiglu_packed(x), *rotated)
    sum(p.float().sum() for p in parts).backward()


def attention(dtype: torch.dtype) -> None:
    for dim, window in ((64, None), (96, 50), (128, 70), (256, None)):
        q, k, v = (tensors(1, 200, heads, dim, dtype=dtype) for heads in (4, 2, 2))
        ops.attention(q, k, v, window=window).float().sum().backward()


def decoding(dtype: torch.dtype) -> None:
    q, k, v = (tensors(2, 3, heads, 64, dtype=dtype).detach() for heads in (4, 2, 2))
    caches = [torch.zeros(2, 72, 2, 64, device="cuda", dtype=dtype) for _ in range(2)]
    cos, sin = mk.rope_table(64, max_positions=512, device="cuda")
    lens = torch.tensor([300, 4], device="cuda", dtype=torch.int32)
    positions = lens[:, None] - 3 + torch.arange(3, device="cuda", dtype=torch.int32)
    rotated, _ = ops.rope_write_kv(q, k, v, *caches, positions, cos, sin)
    ops.attention_cached(rotated, *caches, lens, 64)


def codes(dtype: torch.dtype) -> None:
    for scheme, group in (("int8", 0), ("w8a8", 0), ("int4", 64), ("nf4", 64)):
        q = mk.quantize_weight(torch.randn(136, 256, device="cuda"), scheme, group)
        for rows in (1, 40):
            ops.linear_quantized(tensors(rows, 256, dtype=dtype).detach(), q)


for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for part in (elementwise, attention, decoding, linear, codes):
        part(dtype)
        torch.cuda.synchronize()
        print(part.__name__, dtype, "done", flush=True)
