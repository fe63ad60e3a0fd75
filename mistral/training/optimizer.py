"""AdamW, the cosine schedule, clipping over all processes, and loss scaling for float16."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .settings import Settings


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Of a step counted from 0: linear warm-up, then a cosine down to `min_lr · lr` at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * cosine)


def make_optimizer(module: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Fused AdamW over what is trained; matrices are decayed, vectors (norms, biases) are not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.dim() >= 2], weight_decay=settings.weight_decay),
        dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The Euclidean norm of the whole gradient, over all processes; inf or nan where a value is."""
    grads = [p.grad for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm(grads)
    return float(total.full_tensor() if isinstance(total, DTensor) else total)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


class LossScale:
    """Dynamic scaling for float16: halved and the step skipped where the gradient overflows, doubled after a while.

    Args:
        start: the first scale; a fixed 1 turns scaling off.
        enabled: whether the precision needs it.
        patience: good steps before it doubles.
    """

    def __init__(self, start: float, enabled: bool, patience: int = 2000):
        self.value, self.enabled, self.patience, self.good = start if enabled else 1.0, enabled, patience, 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.value, self.good = max(self.value / 2, 2.0**-14), 0
            return
        self.good += 1
        if self.good == self.patience:
            self.value, self.good = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        return dict(value=self.value, good=self.good)

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.good = state["value"], state["good"]
