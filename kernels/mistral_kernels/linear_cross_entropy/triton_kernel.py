"""Losses and gradients of a chunk of logits in Triton, read once each and overwritten in place; torch's products."""

import functools

import torch
import triton
import triton.language as tl

from .._triton import blocks, in_a_row, launch, power_of_2
from . import chunked

# A row is one program, in blocks of 16 elements a thread on 8 warps. Not measured on a GPU.
BLOCK = 4096
WARPS = 8


@triton.jit
def _loss_kernel(LOGITS, LABELS, LOSSES, LSE, ignore_index, V: tl.constexpr, BLOCK: tl.constexpr):
    """lse by the online softmax (Milakov & Gimelshein 2018): the largest logit so far, and the sum relative to it."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        # Lanes that saw nothing yet hold −inf on both sides, and −inf − −inf is NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = larger
    most = tl.max(largest, axis=0)
    lse = most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0))
    known = (label >= 0) & (label < V)
    picked = tl.load(LOGITS + row * V + tl.where(known, label, 0)).to(tl.float32)
    loss = tl.where(known, lse - picked, float("nan"))
    tl.store(LOSSES + row, tl.where(label == ignore_index, 0.0, loss))
    tl.store(LSE + row, lse)


@triton.jit
def _gradient_kernel(LOGITS, LABELS, LSE, DLOSSES, ignore_index, V: tl.constexpr, BLOCK: tl.constexpr):
    """dloss · (softmax − one_hot(label)) in the logits' place."""
    across: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(LABELS + row)
    lse = tl.load(LSE + row)
    scale = tl.load(DLOSSES + row)
    at = LOGITS + row * V + column
    x = tl.load(at, mask=column < V, other=0.0).to(tl.float32)
    gradient = scale * (tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0))
    known = (label >= 0) & (label < V)
    gradient = tl.where(known, gradient, float("nan"))
    gradient = tl.where(label == ignore_index, 0.0, gradient)
    tl.store(at, gradient.to(LOGITS.dtype.element_ty), mask=column < V)


def losses_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits.shape
    losses, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    block = min(BLOCK, power_of_2(vocabulary))
    arguments = (logits, *in_a_row(labels), losses, lse, ignore_index)
    launch(_loss_kernel, rows, logits.device, *arguments, V=vocabulary, BLOCK=block, num_warps=WARPS)
    return losses, lse


def gradient_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dlosses: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    rows, vocabulary = logits.shape
    block = min(BLOCK, power_of_2(vocabulary))
    arguments = (logits, *in_a_row(labels, lse, dlosses), ignore_index)
    programs = rows * blocks(vocabulary, block)
    launch(_gradient_kernel, programs, logits.device, *arguments, V=vocabulary, BLOCK=block, num_warps=WARPS)
    return logits


forward = functools.partial(chunked.forward, losses_of=losses_of_logits)
backward = functools.partial(chunked.backward, gradient_of=gradient_of_logits)
