"""The backward kernels in the configurations of 7B, 12B and 123B Mistral models and of the sample model."""

import torch
from triton_aot import Spec

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
]
