"""The backward kernels in the configurations of 7B, 12B and 123B Mistral models and of the sample model."""

import re

import torch
from triton_aot import Spec, main_loop

from mistral_kernels.attention import triton_backward_launch as attention
from mistral_kernels.rms_norm import triton_backward as norm
from mistral_kernels.swiglu import triton_kernel as swiglu

BF16, F32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(n: int, dtype: torch.dtype = BF16, weight: torch.dtype | None = None, total: bool = False):
    def launch(_):
        x, rstd, model = meta(8192, n, dtype=dtype), meta(8192, dtype=F32), weight is None
        w, dy = meta(n, dtype=weight or dtype), meta(8192, n, dtype=weight or dtype)
        if total:
            return norm.add_rms_norm_backward(dy, x, x, w, rstd, model)
        return norm.rms_norm_backward(dy, x, w, rstd, model)

    return launch


def _swiglu(f: int, dtype: torch.dtype = BF16):
    return lambda _: swiglu.swiglu_backward(*(meta(512, f, dtype=dtype) for _ in range(3)))


def _swiglu_packed(_):
    return swiglu.swiglu_packed_backward(meta(512, 14336), meta(512, 28672))


def _attention(dim, dtype=BF16, window=4096, causal=True, packed=False, tma=True, family=None):
    """q, k and v are views of one packed projection of 32 heads over 8."""

    def launch(capability):
        choice = attention.production_configs if tma else attention.without_tma
        configs = choice(family or capability, dim, dtype.itemsize)
        lead = (8192,) if packed else (2, 4096)
        q, k, v = meta(*lead, 48, dim, dtype=dtype).split((32, 8, 8), dim=-2)
        out = meta(*lead, 32, dim, dtype=dtype)
        lse = meta(*((32, 8192) if packed else (2, 32, 4096)), dtype=F32)
        cu = meta(9, dtype=torch.int32) if packed else None
        lengths = (window, dim**-0.5, causal, cu, cu, lead[-1], lead[-1])
        return attention.attention_backward(out, lse, q, k, v, out, lse, *lengths, configs=configs)

    return launch


def _products(report, ptx):
    """Tensor cores in the main loop, its tiles by TMA or in pieces of 16 bytes. sm_90 has HMMA at D=256."""
    loop = main_loop(report)
    found = [] if any(loop.get(n) for n in ("HMMA", "HGMMA", "UTCMMA")) else [f"no tensor cores: {loop}"]
    products = [each for each in report["loops"] if any(each.get(name) for name in ("HMMA", "HGMMA", "UTCMMA"))]
    # Of 32 bits are lse and delta, and before a loop of 64: there Triton 3.6 knows that the first pairs are aligned.
    narrow = [n for n in report["count"] if re.fullmatch(r"LDGSTS\.(8|16)", n)]
    if narrow := narrow + [n for each in products for n in each if n == "LDGSTS.64"]:
        found.append(f"narrow copies: {narrow}")
    wide = loop.get("UTMALDG") or loop.get("LDGSTS.128") or loop.get("LDG.128")
    return found if wide else [*found, f"no wide copies: {loop}"]


TENSOR = dict(check=_products, mma=True)
SPECS = [
    Spec("rms_norm backward 128", _norm(128), narrow=2, slow=True),
    Spec("rms_norm backward 576", _norm(576), narrow=2),
    Spec("rms_norm backward 4096", _norm(4096), narrow=1),
    Spec("rms_norm backward 4096 float32", _norm(4096, F32), narrow=1, slow=True),
    Spec("rms_norm backward 4096 float32 weight", _norm(4096, weight=F32), narrow=1, slow=True),
    Spec("rms_norm backward 5120", _norm(5120), narrow=1, slow=True),
    Spec("rms_norm backward 12288", _norm(12288), narrow=2, slow=True),
    Spec("add_rms_norm backward 4096", _norm(4096, total=True), narrow=1, slow=True),
    Spec("add_rms_norm backward 5120", _norm(5120, total=True), narrow=1, slow=True),
    Spec("add_rms_norm backward 12288", _norm(12288, total=True), narrow=2),
    Spec("swiglu backward 14336", _swiglu(14336), narrow=0),
    Spec("swiglu backward 14336 float32", _swiglu(14336, F32), narrow=0, slow=True),
    Spec(
        "swiglu_packed backward", lambda _: swiglu.swiglu_packed_backward(meta(512, 14336), meta(512, 28672)), narrow=0
    ),
    Spec("attention backward D128", _attention(128), **TENSOR),
    Spec("attention backward D64", _attention(64), (80, 90), **TENSOR),
    Spec("attention backward D64", _attention(64), (100,), slow=True, **TENSOR),
    Spec("attention backward D256", _attention(256), (80, 100), slow=True, **TENSOR),
    Spec("attention backward D256", _attention(256), (90,), slow=True, check=_products),
    Spec("attention backward D128 packed", _attention(128, packed=True), slow=True, **TENSOR),
    Spec("attention backward D128 not causal", _attention(128, window=0, causal=False), slow=True, **TENSOR),
    Spec("attention backward D128 no window", _attention(128, window=0), slow=True, **TENSOR),
    Spec("attention backward D96", _attention(96), slow=True, **TENSOR),
    Spec("attention backward D128 without TMA", _attention(128, tma=False), (90, 100), slow=True, check=_products),
    Spec("attention backward D64 without TMA", _attention(64, tma=False), (90, 100), slow=True, check=_products),
    Spec("attention backward D256 without TMA", _attention(256, tma=False), (90, 100), slow=True, check=_products),
    Spec("attention backward D256 sm_86", _attention(256, family=86), (80,), slow=True, **TENSOR),
    Spec("attention backward D64 float32", _attention(64, F32)),
    Spec("attention backward D128 float32", _attention(128, F32), slow=True),
    Spec("attention backward D256 float32", _attention(256, F32), slow=True),
]
