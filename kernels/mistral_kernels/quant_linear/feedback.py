"""Codes chosen column by column, the error of each carried into those that follow: GPTQ (Frantar et al. 2022).

With U the upper Cholesky factor of the inverse of the Hessian, rounding column i leaves e = (w_i - q_i) / U_ii, and
column j > i takes -e U_ij: of all changes of what is not rounded yet, the one that leaves the outputs the least squared
error. Columns go by falling diagonal, the heaviest inputs first, while all others can still make up for them.
"""

from collections.abc import Callable

import torch

BLOCK = 128  # columns whose errors reach the others in one product
DAMPING = 0.01  # of the mean of the diagonal, added to all of it: inputs that hardly occur stay invertible

Code = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns, and U in that order, float32 `[K, K]`."""
    h = hessian.double()
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    h /= h.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    h.diagonal().add_(DAMPING)
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError("hessian is no mean of x · xᵀ: it has negative eigenvalues")
    return order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def with_feedback(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    code: Code,
    value: Code,
) -> torch.Tensor:
    """The codes `[N, K]` of a weight.

    Args:
        weight: `[N, K]` float32.
        hessian: `[K, K]`, of the inputs: the mean of x · xᵀ.
        group: `[K]`, the group of each column.
        scale, offset: `[N, G]`.
        code, value: of (column, scale, offset) the nearest codes, and of (codes, scale, offset) what they stand for.
    """
    order, upper = factor(hessian)
    groups = group[order].tolist()
    scales = scale.T.contiguous()
    offsets = None if offset is None else offset.T.contiguous()
    left = weight.T[order].contiguous()  # [K, N]: a column is one stretch of memory
    k = left.shape[0]
    codes = torch.empty(left.shape, dtype=torch.int16, device=left.device)
    for begin in range(0, k, BLOCK):
        end = min(k, begin + BLOCK)
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            of_column = scales[groups[i]], None if offsets is None else offsets[groups[i]]
            found = code(left[i], *of_column)
            codes[i] = found
            errors[i - begin] = (left[i] - value(found, *of_column)) / upper[i, i]
            left[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - begin], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T
