"""The memory-bound ops in the configurations of 7B, 12B and 123B Mistral models and of the sample model."""

import torch
from triton_aot import Spec

from mistral_kernels.ring_cache import triton_write
from mistral_kernels.rms_norm import triton_kernel as norm
from mistral_kernels.rope import triton_kernel as rope
from mistral_kernels.swiglu import triton_kernel as swiglu

BF16, F32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(n: int, dtype: torch.dtype = BF16, weight: torch.dtype | None = None, model: bool = True):
    return lambda _: norm.rms_norm(meta(512, n, dtype=dtype), meta(n, dtype=weight or dtype), 1e-5, model)


def _add_norm(n: int, dtype: torch.dtype = BF16):
    return lambda _: norm.add_rms_norm(
        meta(512, n, dtype=dtype), meta(512, n, dtype=dtype), meta(n, dtype=dtype), 1e-5, True
    )


def _scattered(_):
    """Three leading dimensions that do not merge."""
    x = meta(4, 8, 6, 32, 128).transpose(1, 2)[:, :, :, ::2]
    return norm.rms_norm(x, meta(128), 1e-5, True)


def _rope(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = BF16, interleaved: bool = False):
    """q and k are views of one packed projection."""

    def launch(_):
        qkv = meta(2, 512, heads + 2 * kv_heads, dim, dtype=dtype)
        table, positions = meta(4096, dim // 2, dtype=F32), meta(2, 512, dtype=torch.int64)
        q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]
        return rope.rope(q, k, table, table, positions, interleaved, False)

    return launch


def _ring(tokens: tuple[int, ...], cu: int | None, rotate: bool, heads: int, kv_heads: int, dim: int):
    def launch(_):
        batch = cu if cu is not None else tokens[0]
        k = meta(*tokens, kv_heads, dim)
        cache = meta(batch, 4096, kv_heads, dim)
        ends = None if cu is None else meta(cu + 1, dtype=torch.int32)
        positions = meta(*tokens, dtype=torch.int64)
        if not rotate:
            return triton_write.write_kv(k, k, cache, cache, positions, ends)
        table = meta(4096, dim // 2, dtype=F32)
        q = meta(*tokens, heads, dim)
        return triton_write.rope_write_kv(q, k, k, cache, cache, positions, table, table, ends, False)

    return launch


def _swiglu(f: int, dtype: torch.dtype = BF16):
    return lambda _: swiglu.swiglu(meta(512, f, dtype=dtype), meta(512, f, dtype=dtype))


SPECS = [
    Spec("rms_norm 128", _norm(128), narrow=2),
    Spec("rms_norm 576", _norm(576), narrow=1),
    Spec("rms_norm 576 float32", _norm(576, F32), narrow=1, slow=True),
    Spec("rms_norm 4096", _norm(4096), narrow=1, slow=True),
    Spec("rms_norm 4096 float64 eps", _norm(4096), narrow=1, doubles=True),
    Spec("rms_norm 4096 float32 weight", _norm(4096, weight=F32, model=False), narrow=1, slow=True),
    Spec("rms_norm 5000", _norm(5000), narrow=1, slow=True),
    Spec("rms_norm 5120", _norm(5120), narrow=1, slow=True),
    Spec("rms_norm 12288", _norm(12288), narrow=1),
    Spec("rms_norm 12288 float32", _norm(12288, F32), narrow=1, slow=True),
    Spec("rms_norm 32768", _norm(32768), narrow=1),
    Spec("rms_norm 5125", _norm(5125), slow=True),
    Spec("rms_norm scattered rows", _scattered, narrow=2, slow=True),
    Spec("add_rms_norm 576", _add_norm(576), narrow=1, slow=True),
    Spec("add_rms_norm 4096", _add_norm(4096), narrow=1, slow=True),
    Spec("add_rms_norm 4096 float64 eps", _add_norm(4096), narrow=1, doubles=True),
    Spec("add_rms_norm 4096 float32", _add_norm(4096, F32), narrow=1, slow=True),
    Spec("add_rms_norm 12288", _add_norm(12288), narrow=1, slow=True),
    Spec("add_rms_norm 32768", _add_norm(32768), narrow=1),
    Spec("swiglu 14336", _swiglu(14336), narrow=0),
    Spec("swiglu 14336 float32", _swiglu(14336, F32), narrow=0, slow=True),
    Spec("swiglu 1536", _swiglu(1536), narrow=0, slow=True),
    Spec("swiglu 72", _swiglu(72), narrow=0, slow=True),
    Spec("swiglu_packed 28672", lambda _: swiglu.swiglu_packed(meta(512, 28672)), narrow=0),
    Spec("rope 32/8 128", _rope(32, 8, 128), narrow=1),
    Spec("rope 32/8 128 interleaved", _rope(32, 8, 128, interleaved=True), narrow=1),
    Spec("rope 32/8 128 float32", _rope(32, 8, 128, F32), narrow=1, slow=True),
    Spec("rope 9/3 64", _rope(9, 3, 64), narrow=1),
    Spec("rope 32/8 96", _rope(32, 8, 96), narrow=1, slow=True),
    Spec("write_kv dense", _ring((4, 512), None, False, 32, 8, 128), narrow=2),
    Spec("write_kv packed", _ring((512,), 8, False, 32, 8, 128), narrow=10),
    Spec("rope_write_kv decode", _ring((32,), None, True, 32, 8, 128), narrow=2),
    Spec("rope_write_kv packed", _ring((512,), 8, True, 32, 8, 128), narrow=10),
    Spec("rope_write_kv dense 9/3 64", _ring((4, 512), None, True, 9, 3, 64), narrow=2, slow=True),
]
