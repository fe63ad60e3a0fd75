"""RMSNorm in eager PyTorch (Zhang & Sennrich 2019, eq. 4): the definition, and the gradients by formula."""

import torch

from .._checks import accumulate_dtype


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * rstd
    if model_rounding:
        y = h.to(x.dtype) * weight
    else:
        y = (h * weight.to(h.dtype)).to(torch.promote_types(x.dtype, weight.dtype))
    return y, rstd.squeeze(-1)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x + residual
    y, rstd = rms_norm(total, weight, eps, model_rounding)
    return y, total, rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = _wide_backward(dy, x, weight, rstd, model_rounding)
    return dx.to(x.dtype), dweight


def add_rms_norm_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    model_rounding: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the sum, which x and the residual share: the norm's and `dtotal`, rounded once together."""
    dx, dweight = _wide_backward(dy, total, weight, rstd, model_rounding)
    return (dx + dtotal.to(dx.dtype)).to(total.dtype), dweight


def _wide_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, model_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = rstd · (g − n · mean(g · n)) with n = x · rstd and g = dy · weight; dweight sums dy · n over the rows.

    The rounding of n to x's dtype has derivative one; dweight uses the n that was multiplied.
    """
    wide = accumulate_dtype(x.dtype)
    n = x.to(wide) * rstd.to(wide).unsqueeze(-1)
    g = dy.to(wide) * weight.to(wide)
    dx = rstd.to(wide).unsqueeze(-1) * (g - n * (g * n).mean(-1, keepdim=True))
    multiplied = n.to(x.dtype).to(wide) if model_rounding else n
    dweight = (dy.to(wide) * multiplied).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dweight
