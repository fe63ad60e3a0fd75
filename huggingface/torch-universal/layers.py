"""Stateless layers whose forward `kernelize` lends to a model's own."""

import torch
from torch import nn

import mistral_kernels


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight`, rounded to x's dtype before the weight, as in Mistral and Llama."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return mistral_kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class apply_rotary_transformers(nn.Module):
    """`apply_rotary_pos_emb`: q `[B, H, S, D]` and k `[B, Hkv, S, D]`, or `[B, S, H, D]` with unsqueeze_dim=2."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim == 2:
            return mistral_kernels.rope(q, k, cos, sin)
        q, k = mistral_kernels.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)
