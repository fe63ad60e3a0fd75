"""The output projection and cross entropy over chunks of tokens, so that `[T, V]` logits never exist.

The backward forms each chunk's logits again: one product more of the four, for no gradient kept in between.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._checks import accumulate_dtype

MULTIPLE = 128


class Limits(NamedTuple):
    """Of a chunk: its logits at most, and the rows that are worth more than the memory of fewer; else `1 / parts` of
    the tokens."""

    elements: int
    rows: int
    parts: int


# 2^25 logits are 1024 rows of 32768, enough rows that a product reads its weight at less than memory's speed, and
# 128 MiB in float32. A GPU is faster by half with 2048 rows than with 512, for at most 512 MiB (docs/gpu.md).
ON_CPU, ON_GPU = Limits(2**25, MULTIPLE, 8), Limits(2**28, 2048, 4)


def rows_of_chunk(tokens: int, vocabulary: int, chunk: int, limits: Limits = ON_CPU) -> int:
    """At most `chunk`; without one what the limits say, and 128 rows at least.

    The chunks are of one size: in a short last one, products sum in another order, and less exactly.
    """
    if not chunk:
        most = max(MULTIPLE, limits.elements // vocabulary // MULTIPLE * MULTIPLE)
        chunk = min(most, max(limits.rows, -(-tokens // (limits.parts * MULTIPLE)) * MULTIPLE))
    pieces = -(-tokens // max(chunk, 1))
    return -(-tokens // max(pieces, 1))


def _spans(hidden: torch.Tensor, weight: torch.Tensor, chunk: int) -> list[slice]:
    tokens, limits = hidden.shape[0], ON_GPU if hidden.device.type == "cuda" else ON_CPU
    rows = rows_of_chunk(tokens, weight.shape[0], chunk, limits)
    return [slice(start, start + rows) for start in range(0, tokens, max(rows, 1))]


def _known(labels: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels are in the vocabulary, and the labels with 0 for those that are not, `[rows, 1]`."""
    known = (labels >= 0) & (labels < vocabulary)
    return known, torch.where(known, labels, 0).unsqueeze(-1)


def losses_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, V]` logits, which are overwritten where they are float32 or float64 → losses and lse `[rows]`."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    known, index = _known(labels, logits.shape[-1])
    picked = logits.gather(-1, index).squeeze(-1)
    largest = logits.amax(-1, keepdim=True)
    lse = logits.sub_(largest).exp_().sum(-1).log_().add_(largest.squeeze(-1))
    losses = torch.where(known, lse - picked, float("nan"))
    return losses.masked_fill_(labels == ignore_index, 0), lse


def gradient_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dlosses: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """dlosses · (softmax − one_hot(label)) in the logits' place, or in float32 where they have 16 bits."""
    gradient = logits.to(accumulate_dtype(logits.dtype))
    known, index = _known(labels, gradient.shape[-1])
    gradient.sub_(lse.unsqueeze(-1)).exp_()
    one = torch.where(known, 1.0, float("nan")).to(gradient.dtype)
    gradient.scatter_add_(-1, index, -one.unsqueeze(-1))
    gradient.mul_(torch.where(known, dlosses, float("nan")).unsqueeze(-1))
    return gradient.masked_fill_((labels == ignore_index).unsqueeze(-1), 0)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """`total += gradientᵀ · hidden`, accumulated and kept in total's float32 (float64)."""
    if gradient.device.type == "cuda" and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype))


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    chunk: int,
    losses_of: Callable = losses_of_logits,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference's; `losses_of` turns a chunk of logits into losses and lse, and may overwrite it."""
    losses, lse = (hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype)) for _ in range(2))
    for span in _spans(hidden, weight, chunk):
        logits = torch.nn.functional.linear(hidden[span], weight)
        losses[span], lse[span] = losses_of(logits, labels[span], ignore_index)
    return losses, lse


def backward(
    dlosses: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    chunk: int,
    of_hidden: bool,
    of_weight: bool,
    gradient_of: Callable = gradient_of_logits,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference's; the chunks' parts of dweight are summed in float32."""
    dhidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    spans = _spans(hidden, weight, chunk)
    parts = of_weight and len(spans) != 1
    total = weight.new_zeros(weight.shape if parts else 0, dtype=accumulate_dtype(weight.dtype))
    for span in spans:
        logits = torch.nn.functional.linear(hidden[span], weight)
        gradient = gradient_of(logits, labels[span], lse[span], dlosses[span], ignore_index)
        del logits
        if of_hidden:
            torch.mm(gradient.to(hidden.dtype), weight, out=dhidden[span])
        if of_weight and not parts:  # one product, whose own sum is in float32
            return dhidden, torch.mm(gradient.t().to(hidden.dtype), hidden)
        if of_weight:
            _add_product(total, gradient, hidden[span])
    return dhidden, total.to(weight.dtype)
