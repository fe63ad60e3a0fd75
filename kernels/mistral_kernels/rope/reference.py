"""Rotary position embedding in eager PyTorch (Su et al. 2021, eq. 34): the definition."""

import torch

from .._checks import accumulate_dtype, may_look


def check_positions(positions: torch.Tensor, table_rows: int, idle: bool = False) -> None:
    """Raises where a position lies outside the table; with `idle` negative ones mark idle tokens.

    Reads the values: for CPU tensors, and not while tracing.
    """
    if positions.numel() == 0 or not may_look(positions):
        return
    if positions.numel() == 1:
        low = high = positions.item()
    else:
        low, high = (int(p) for p in torch.aminmax(positions))
    if (low < 0 and not idle) or high >= table_rows:
        raise ValueError(
            f"positions run from {low} to {high}, but the cos/sin tables hold the positions 0 to {table_rows - 1}"
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates each pair of x `[..., H, D]` by the angles whose cos and sin are `[..., D/2]`; one rounding."""
    wide = accumulate_dtype(x.dtype)
    c, s = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    if interleaved:
        a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if positions is None:
        positions = torch.arange(q.shape[-3], device=q.device)
    check_positions(positions, cos.shape[0])
    index = positions.long()
    c, s = cos[index], sin[index]
    if inverse:
        s = -s
    return rotate(q, c, s, interleaved), rotate(k, c, s, interleaved)
