"""The output projection and the cross entropy after it in eager PyTorch, on the whole logits: the definition."""

import torch

from .._checks import accumulate_dtype


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden `[T, N]`, weight `[V, N]`, labels `[T]` → losses and lse `[T]`: lse(logits) − logits[label].

    The logits are rounded to the dtype, as a model's output projection rounds them. A label that is ignored has loss 0;
    one outside the vocabulary has NaN, and NaN gradients.
    """
    logits = torch.nn.functional.linear(hidden, weight).to(accumulate_dtype(hidden.dtype))
    lse = logits.logsumexp(-1)
    ignored, known = labels == ignore_index, (labels >= 0) & (labels < weight.shape[0])
    picked = logits.gather(-1, torch.where(known, labels, 0).unsqueeze(-1)).squeeze(-1)
    losses = (lse - picked) * torch.where(known | ignored, 1.0, float("nan"))
    return losses.masked_fill(ignored, 0), lse


def linear_cross_entropy_backward(
    dlosses: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    chunk: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dlogits = dlosses · (softmax − one_hot(label)), rounded to the dtype; dhidden and dweight are its products.

    The gradient that is not asked for is an empty tensor.
    """
    wide = accumulate_dtype(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight).to(wide)
    known = ((labels >= 0) & (labels < weight.shape[0])).unsqueeze(-1)
    one_hot = torch.arange(weight.shape[0], device=labels.device) == labels.unsqueeze(-1)
    gradient = torch.where(known, (logits - lse.unsqueeze(-1)).exp() - one_hot.to(wide), float("nan"))
    gradient = (gradient * dlosses.unsqueeze(-1)).masked_fill((labels == ignore_index).unsqueeze(-1), 0)
    gradient = gradient.to(hidden.dtype)
    dhidden = gradient @ weight if of_hidden else hidden.new_empty(0)
    dweight = gradient.t() @ hidden if of_weight else weight.new_empty(0)
    return dhidden, dweight
