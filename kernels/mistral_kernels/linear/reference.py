"""The linear layer in eager PyTorch: `torch.nn.functional.linear` defines it."""

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx = dy · weight, dweight = dyᵀ · x, dbias sums dy over the rows; None where not needed."""
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dy @ weight if needed[0] else None
    dweight = rows.T @ x.reshape(-1, x.shape[-1]) if needed[1] else None
    return dx, dweight, rows.sum(0) if needed[2] else None
