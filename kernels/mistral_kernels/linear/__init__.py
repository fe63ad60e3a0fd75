"""The linear layer. With few rows, as in decoding, its time is that of reading the weight once."""

import math

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op
from . import reference

# Up to so many rows the kernel is quicker than torch's matrix product.
FEW_ROWS = {"cpu": 16, "cuda": 2}
CUDA_ROWS = 4  # what the kernel in CUDA C++ takes


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradients(ctx, dy):
    needed = ctx.needs_input_grad
    return reference.linear_backward(dy, *ctx.saved_tensors, (needed[0], needed[1], ctx.has_bias and needed[2]))


def _cuda_supports(x, weight, bias):
    return None if math.prod(x.shape[:-1]) <= CUDA_ROWS else f"it takes {CUDA_ROWS} rows at most"


_linear = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    eager=reference.linear,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    cuda=True,
    cuda_supports=_cuda_supports,
    casts=True,
    setup_context=_save,
    backward=_gradients,
)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight is {_checks.shape(weight)}; it must be [N, K]")
    if x.shape[-1:] != shape[1:]:
        raise ValueError(
            f"x is {_checks.shape(x)}; with weight {_checks.shape(weight)} it must be [..., {weight.shape[1]}]"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(
            f"bias is {_checks.shape(bias)}; with weight {_checks.shape(weight)} it must be [{weight.shape[0]}]"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype} but x is {x.dtype}; they must be equal")


def _kernel_pays(kind: str, x: torch.Tensor) -> bool:
    if x.numel() > FEW_ROWS.get(kind, 0) * x.shape[-1]:
        # What 16 bits are multiplied in depends on the processor, which the C++ op knows. Its gradients would be no
        # quicker than torch's.
        slow = kind == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
        return slow and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return kind == "cpu" or (not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing())


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """`x · weightᵀ + bias`, what `torch.nn.functional.linear` means.

    On a CPU with up to 16 rows (all dimensions of x but the last), and with up to 2 where a CUDA graph is captured, a
    kernel reads the weight once, at the speed of the memory; everything else is torch's matrix product, and so are
    the gradients. Where an x86 processor multiplies no 16-bit numbers and no gradient is asked for, that is the product
    of float32, block by block of the weight, with one rounding. Outside a graph the launch from Python would cost a GPU
    more than the kernel saves. Under `torch.autocast` torch's function decides the dtype, and takes the call.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64.
        weight: `[N, K]` of x's dtype; with stride 1 in the last dimension it is read in place.
        bias: `[N]` or None.
        impl: None for the fastest that can, or "reference", "cpu", "cuda" (up to 4 rows). There is none in Triton.

    Returns:
        `[..., N]`, contiguous, in x's dtype: summed in float32 and rounded once.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.
        NotImplementedError: `impl` cannot run here.
    """
    if impl is None:
        if not is_dynamo_compiling() and (done := _linear.at_once(x, weight, bias)) is not None:
            return done  # type: ignore[no-any-return]
        kind = x.device.type if isinstance(x, torch.Tensor) else "cpu"
        if _checks.autocast_is_on(kind):
            return reference.linear(x, weight, bias)
    _checks.floating(x=x, weight=weight, **_checks.given(bias=bias))
    _check(x, weight, bias)
    if impl is None and not _kernel_pays(kind, x):
        return reference.linear(x, weight, bias)
    return _linear(impl, x, weight, bias)
