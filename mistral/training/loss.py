"""The loss of a step, and the one module that training runs: Transformer and loss in one forward pass."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mistral_kernels

from ..model import Transformer
from .batches import IGNORED, Batch


def token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, num_items: float, fused: bool = True
) -> torch.Tensor:
    """The summed cross entropy of `hidden @ weight.T` over the labels that count, divided by `num_items`.

    Args:
        hidden: `[T, N]`.
        weight: `[V, N]`, a whole tensor.
        labels: `[T]` int64.
        num_items: labels that count in the whole step, over all micro-batches and processes.
        fused: never hold `[T, V]` logits.

    Returns:
        A float32 scalar; 0 where no label counts.
    """
    if fused:
        total = mistral_kernels.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="sum")
    else:
        logits = F.linear(hidden, weight).float()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / num_items


class Trainee(nn.Module):
    """The Transformer with the loss inside its forward pass.

    Under FSDP the parameters of a module are whole only while its forward pass runs. The output projection, often
    the embedding itself, is read by the loss and not by a module of its own: here that is within the root's pass.
    """

    def __init__(self, model: Transformer, fused_loss: bool = True):
        super().__init__()
        self.model, self.fused_loss = model, fused_loss

    def forward(self, batch: Batch, num_items: float) -> torch.Tensor:
        hidden = self.model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens)
        output = self.model.tok_embeddings if self.model.output is None else self.model.output
        return token_loss(hidden, output.weight, batch.labels, num_items, self.fused_loss)


def recompute_layers(model: Transformer) -> None:
    """Makes each layer keep only its inputs and run again in the backward pass."""
    for layer in model.layers:
        inner = layer.forward

        def run(*args: Any, inner: Any = inner) -> Any:
            return checkpoint(inner, *args, use_reentrant=False)

        layer.forward = run  # type: ignore[method-assign]
