"""The output projection and the cross entropy after it, without the logits of all tokens at once."""

import numbers

import torch

from .. import _checks
from .._dispatch import Op
from . import chunked, reference

REDUCTIONS = ("mean", "sum", "none")
LABEL_DTYPES = (torch.int64, torch.int32)


def _fake(hidden, weight, labels, ignore_index, chunk):
    wide = _checks.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(labels.shape, dtype=wide), hidden.new_empty(labels.shape, dtype=wide)


def _fake_backward(dlosses, hidden, weight, labels, lse, ignore_index, chunk, of_hidden, of_weight):
    return hidden.new_empty(hidden.shape if of_hidden else 0), weight.new_empty(weight.shape if of_weight else 0)


_backward = Op(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor hidden, Tensor weight, Tensor labels, Tensor lse,"
    " int ignore_index, SymInt chunk, bool of_hidden, bool of_weight) -> (Tensor, Tensor)",
    eager=reference.linear_cross_entropy_backward,
    fake=_fake_backward,
    composite=chunked.backward,
    triton="linear_cross_entropy.triton_kernel:backward",
)


def _save(ctx, inputs, output):
    hidden, weight, labels, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dlosses, _dlse):
    needs = ctx.needs_input_grad[:2]
    gradients = _backward(ctx.impl, dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


_linear_cross_entropy = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, SymInt chunk)"
    " -> (Tensor, Tensor)",
    eager=reference.linear_cross_entropy,
    fake=_fake,
    composite=chunked.forward,
    triton="linear_cross_entropy.triton_kernel:forward",
    setup_context=_save,
    backward=_gradients,
)


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    _checks.floating(hidden=hidden, weight=weight)
    _checks.integral(hidden.device, LABEL_DTYPES, labels=labels)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden is {_checks.shape(hidden)} and weight {_checks.shape(weight)}; they must be [..., N] and [V, N],"
            " V at least 1"
        )
    if labels.shape != hidden.shape[:-1]:
        needed = ", ".join(str(n) for n in hidden.shape[:-1])
        raise ValueError(
            f"labels is {_checks.shape(labels)}; with hidden {_checks.shape(hidden)} it must be [{needed}]"
        )


def _check_chunk(chunk: int | None) -> int:
    """The chunk as the op takes it: 0 for none."""
    if chunk is None:
        return 0
    rows = _checks.integer(chunk)
    if rows is None or rows < 1:
        raise ValueError(f"chunk is {chunk!r}; it must be None or an int of at least 1 (tokens at a time)")
    return rows


def _check_labels(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises for a label outside the vocabulary; reads the values, so on a CPU only, and not while tracing."""
    if labels.numel() == 0 or not _checks.may_look(labels):
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        raise ValueError(
            f"labels holds {labels[wrong][0].item()}; with weight [{vocabulary}, N] they must be 0 to {vocabulary - 1},"
            f" or ignore_index ({ignore_index})"
        )


def _items(num_items: int | float | torch.Tensor | None, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is given with reduction={reduction!r}; it is what 'mean' divides by")
    if isinstance(num_items, torch.Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items is {_checks.shape(num_items)}; it must be a number, or a tensor of one element")
    if not isinstance(num_items, torch.Tensor | numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"num_items is {num_items!r}; it must be a number, or a tensor of one element")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | torch.Tensor | None = None,
    chunk: int | None = None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Cross entropy of the logits `hidden · weightᵀ`, `lse(logits) − logits[label]`, a chunk of tokens at a time.

    The logits of all tokens never exist: the forward keeps a number a token, and the backward forms each chunk's
    logits again. Nothing is shifted: labels[i] is what hidden[i] predicts.

    Args:
        hidden: `[T, N]` or `[..., N]`, float32, bfloat16, float16 or float64.
        weight: `[V, N]`, no bias; of another dtype than hidden both promote. A view will do, and so will a parameter
            that is gathered while its module's forward runs (FSDP2). Under autocast both are cast as by `F.linear`.
        labels: `[T]` or `[...]`, int64 or int32, in 0 … V−1 or ignore_index.
        ignore_index: the label of tokens without loss and gradient.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none".
        num_items: what "mean" divides by instead: the tokens of all micro-batches, where gradients are accumulated.
        chunk: of so many tokens logits exist at a time, at most, or in C++ as many logits of fewer words of all tokens;
            None for a size by V and T. It changes results by rounding only.
        impl: None for the fastest that can, or "reference" (the whole logits), "cpu", "triton".

    Returns:
        A scalar, or with "none" the labels' shape, in float32 (float64 for float64). The logits are rounded to the
        dtype, as a model's output projection rounds them, softmax and losses are in float32, dweight is accumulated in
        float32 and rounded once. If all labels are ignored, "sum" is 0 and "mean" is nan, as in `F.cross_entropy`,
        or 0 with num_items.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, devices, reduction, num_items or chunk do not fit; on a CPU also a label outside the
            vocabulary. On a GPU that is not looked up, which would wait for the device: such a token's loss is NaN.
        NotImplementedError: `impl` cannot run here.
    """
    _check(hidden, weight, labels)
    rows_at_once = _check_chunk(chunk)
    ignored = _checks.integer(ignore_index)
    if ignored is None:
        raise TypeError(f"ignore_index is {ignore_index!r}; it must be an int")
    _items(num_items, reduction)
    _check_labels(labels, weight.shape[0], ignored)
    hidden, weight = _checks.promote(*_checks.autocast(hidden, weight))
    rows, flat = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1).long()
    losses = _linear_cross_entropy(impl, rows, weight, flat, ignored, rows_at_once)[0]
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    if num_items is None:
        num_items = (flat != ignored).sum()
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.reshape(()).to(total)
    return total / num_items
