"""Kernels that the harness must complain about; each differs in one thing from one that it accepts."""

import torch
import triton
import triton.language as tl
from triton_aot import Spec


@triton.jit
def _mean_kernel(X, Y, stride, eps, N: tl.constexpr, CAST: tl.constexpr):
    at = tl.arange(0, N)
    if CAST:
        eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0) * stride
    x = tl.load(X + row + at).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    tl.store(Y + row + at, (x * rstd).to(Y.dtype.element_ty))


@triton.jit
def _empty_kernel(X):
    return


def _mean(n: int = 4096, warps: int = 8, stride: int = 4096, cast: bool = True):
    x = torch.empty(8, n, dtype=torch.bfloat16, device="meta")
    return lambda _: _mean_kernel[(8,)](x, x, stride, 1e-5, N=n, CAST=cast, num_warps=warps)


def _empty(_):
    _empty_kernel[(1,)](torch.empty(8, device="meta"))


def _fail(_):
    raise RuntimeError("this launcher raises")


# Name: what the sentence about it begins with.
EXPECTED = {
    "fine": None,
    "float64 eps": "float64",
    "spills": "the main loop spills",
    "narrow": "accesses of less than 16 bytes",
    "registers": "registers, over",
    "no tensor cores": "no HGMMA",
    "empty": "an empty kernel",
    "nothing": "nothing was launched",
    "raises": "this launcher raises",
}
SPECS = [
    Spec("fine", _mean(), narrow=0, doubles=True),
    Spec("float64 eps", _mean(cast=False), doubles=True),
    Spec("spills", _mean(n=32768, warps=2)),
    Spec("narrow", _mean(stride=4097), narrow=0),
    Spec("registers", _mean(), registers=16),
    Spec("no tensor cores", _mean(), mma=True),
    Spec("empty", _empty),
    Spec("nothing", lambda _: None),
    Spec("raises", _fail),
]
