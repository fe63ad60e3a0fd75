"""SwiGLU's gate in eager PyTorch (Shazeer 2020, eq. 5): the definition, and the gradients by formula."""

import torch

from .._checks import accumulate_dtype


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    wide = accumulate_dtype(gate.dtype)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    return swiglu(*gate_up.chunk(2, dim=-1))


def swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate = dy · up · s · (1 + gate · (1 − s)) and dup = dy · gate · s, with s = sigmoid(gate) computed again."""
    wide = accumulate_dtype(gate.dtype)
    g, u, d = gate.to(wide), up.to(wide), dy.to(wide)
    s = torch.sigmoid(g)
    dgate = (d * u * s * (1 + g * (1 - s))).to(gate.dtype)
    dup = (d * g * s).to(gate.dtype)
    return dgate.contiguous(), dup.contiguous()


def swiglu_packed_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return torch.cat(swiglu_backward(dy, *gate_up.chunk(2, dim=-1)), dim=-1)
