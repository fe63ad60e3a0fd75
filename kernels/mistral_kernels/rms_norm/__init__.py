"""RMSNorm, alone and fused with the residual addition before it."""

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op, always, short
from . import reference

ROUNDINGS = ("model", "fp32")


def _fake_norm(x, weight, eps, model_rounding):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[:-1], dtype=_checks.accumulate_dtype(x.dtype))


def _fake_add_norm(x, residual, weight, eps, model_rounding):
    y, rstd = _fake_norm(x, weight, eps, model_rounding)
    return y, x.new_empty(x.shape), rstd


def _fake_backward(dy, x, weight, rstd, model_rounding):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_backward = Op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool model_rounding) -> (Tensor, Tensor)",
    eager=reference.rms_norm_backward,
    fake=_fake_backward,
    cuda=True,
    cuda_first=short,
    triton="rms_norm.triton_backward:rms_norm_backward",
)
_add_backward = Op(
    "add_rms_norm_backward(Tensor dy, Tensor dtotal, Tensor total, Tensor weight, Tensor rstd, bool model_rounding)"
    " -> (Tensor, Tensor)",
    eager=reference.add_rms_norm_backward,
    fake=lambda dy, dtotal, *rest: _fake_backward(dy, *rest),
    cuda=True,
    cuda_first=short,
    triton="rms_norm.triton_backward:add_rms_norm_backward",
)


def _save_norm(ctx, inputs, output):
    x, weight, _, ctx.model_rounding = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # rstd's would be zeros, made anew each time


def _norm_gradients(ctx, dy, _drstd):
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _backward.like_forward(ctx.impl, dy, x, weight, rstd, ctx.model_rounding)
    return dx, dweight, None, None


def _save_add_norm(ctx, inputs, output):
    _, _, weight, _, ctx.model_rounding = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _add_norm_gradients(ctx, dy, dtotal, _drstd):
    total, weight, rstd = ctx.saved_tensors
    dx, dweight = _add_backward.like_forward(ctx.impl, dy, dtotal, total, weight, rstd, ctx.model_rounding)
    return dx, dx, dweight, None, None


_rms_norm = Op(
    "rms_norm(Tensor x, Tensor weight, float eps, bool model_rounding) -> (Tensor, Tensor)",
    eager=reference.rms_norm,
    fake=_fake_norm,
    triton="rms_norm.triton_kernel:rms_norm",
    cuda=True,
    cuda_first=always,
    hidden=1,
    setup_context=_save_norm,
    backward=_norm_gradients,
)
_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool model_rounding)"
    " -> (Tensor, Tensor, Tensor)",
    eager=reference.add_rms_norm,
    fake=_fake_add_norm,
    triton="rms_norm.triton_kernel:add_rms_norm",
    cuda=True,
    cuda_first=always,
    hidden=1,
    setup_context=_save_add_norm,
    backward=_add_norm_gradients,
)


def _check(x: torch.Tensor, weight: torch.Tensor, rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; it must be 'model' or 'fp32'")
    if weight.shape != (n := x.shape[-1:]) or not n:
        if x.dim() < 1:
            raise ValueError("x is a scalar; it must be [..., N]")
        raise ValueError(f"weight is {_checks.shape(weight)}; with x {_checks.shape(x)} it must be [{x.shape[-1]}]")


def _weight_for(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight in x's dtype or, where eager arithmetic would promote, in the wider one; no value changes."""
    return weight if weight.dtype == x.dtype else weight.to(torch.promote_types(x.dtype, weight.dtype))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5, rounding: str = "model", *, impl: str | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Args:
        x: `[..., N]`, float32, bfloat16, float16 or float64; the last dimension with stride 1 is read in place.
        weight: `[N]`. Of another dtype than x it promotes the result, as eager arithmetic does.
        eps: added to the mean of squares.
        rounding: where a 16-bit result is rounded. "model" normalises in float32, rounds to x's dtype, then
            multiplies by the weight in the result's dtype: what Mistral's code and Hugging Face do. "fp32"
            multiplies in float32 and rounds once: what `torch.nn.functional.rms_norm` does.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Returns:
        `[..., N]`, contiguous, in the promoted dtype of x and weight.

    Raises:
        TypeError: x or weight is no floating-point tensor, or eps no number.
        ValueError: shapes, devices or `rounding` do not fit.
        NotImplementedError: `impl` cannot run here.
    """
    if impl is None and rounding in ROUNDINGS and not is_dynamo_compiling():
        done = _rms_norm.at_once(x, weight, eps, rounding == "model")
        if done is not None:
            return done  # type: ignore[no-any-return]
    eps = _checks.number("eps", eps)
    _checks.floating(x=x, weight=weight)
    _check(x, weight, rounding)
    weight = _weight_for(x, weight)
    if weight.dtype == torch.float64 != x.dtype:
        impl = "reference"
    return _rms_norm(impl, x, weight, eps, rounding == "model")[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    rounding: str = "model",
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual addition and the RMSNorm after it, in one pass.

    `residual_out = x + residual`, rounded to the dtype, and the norm is of that rounded sum.

    Args:
        x, residual: `[..., N]`, of one shape; of two dtypes they promote.
        weight, eps, rounding, impl: as in `rms_norm`.

    Returns:
        `(normed, residual_out)`, each `[..., N]` and contiguous; both carry gradients.

    Raises:
        TypeError, ValueError, NotImplementedError: as `rms_norm`; also where residual has another shape than x.
    """
    if impl is None and rounding in ROUNDINGS and not is_dynamo_compiling():
        done = _add_rms_norm.at_once(x, residual, weight, eps, rounding == "model")
        if done is not None:
            return done  # type: ignore[no-any-return]
    eps = _checks.number("eps", eps)
    _checks.floating(x=x, residual=residual, weight=weight)
    _checks.same_shape(x=x, residual=residual)
    _check(x, weight, rounding)
    x, residual = _checks.promote(x, residual)
    weight = _weight_for(x, weight)
    if weight.dtype == torch.float64 != x.dtype:
        impl = "reference"
    return _add_rms_norm(impl, x, residual, weight, eps, rounding == "model")[:2]
