"""One training step, forward, backward and AdamW, of a model with SmolLM2's layers."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import mistral_kernels
from mistral.config import ModelConfig
from mistral.demo import hugging_face, with_ops
from mistral.model import Transformer
from mistral.training.log import step_flops

from . import rows, timing
from .limits import Limits
from .runner import Row
from .whole import key_of, refuse, run_rows, share_of_twice_eager, tokens_of, wanted, whole_row

SHAPE: dict[str, Any] = dict(dim=576, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, tie_embeddings=True)


def build(layers: int, vocabulary: int, window: int | None, device: str, dtype: torch.dtype) -> Transformer:
    """Random weights with the deviations that training starts from."""
    torch.manual_seed(0)
    config = ModelConfig(n_layers=layers, vocab_size=vocabulary, sliding_window=window, **SHAPE)
    model = Transformer(config, ops=mistral_kernels.reference)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device=device, dtype=dtype)


def copy_on(model: Transformer, ops: Any, dtype: torch.dtype | None = None) -> Transformer:
    other = with_ops(model, ops, dtype)
    for p in other.parameters():
        p.data = p.data.clone()
    return other.train()


def loss_of(model: Transformer, ids: torch.Tensor, fused: bool) -> torch.Tensor:
    hidden, labels = model.hidden(ids[None, :-1])[0], ids[1:]
    weight = model.tok_embeddings.weight
    if fused:
        return mistral_kernels.linear_cross_entropy(hidden, weight, labels)
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def gradients(model: Transformer, ids: torch.Tensor, fused: bool) -> list[torch.Tensor]:
    loss = loss_of(model, ids, fused)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def step(parameters: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def candidates(model: Transformer, ids: torch.Tensor, quick: bool, row: Row) -> dict[str, list[Callable]]:
    """Ours, eager, eager compiled and Hugging Face, each with weights of its own."""
    fused, eager = copy_on(model, mistral_kernels), copy_on(model, mistral_kernels.reference)
    found = {
        "ours": step(fused.parameters(), lambda: loss_of(fused, ids, True)),
        "eager": step(eager.parameters(), lambda: loss_of(eager, ids, False)),
    }
    if not quick:
        plain = copy_on(model, mistral_kernels.reference)
        compiled = torch.compile(loss_of, dynamic=False)
        found["torch.compile"] = step(plain.parameters(), lambda: compiled(plain, ids, False))
    theirs = hugging_face(copy_on(model, mistral_kernels.reference))
    if theirs is None:
        row.left_out["Hugging Face"] = "transformers cannot be imported"
    else:
        theirs.train()
        found["Hugging Face"] = step(theirs.parameters(), lambda: theirs(ids[None], labels=ids[None]).loss)
    return {name: [call] for name, call in found.items()}


def size_of(options: argparse.Namespace) -> tuple[int, int]:
    """Layers and vocabulary."""
    return (2, 2048) if options.quick else (4, 49152)


def case_of(options: argparse.Namespace, length: int, window: int | None) -> str:
    layers, vocabulary = size_of(options)
    return f"S{length} W{window} {layers} layers V{vocabulary}"


def run_case(options: argparse.Namespace, length: int, window: int | None, dtype: str, limits: Limits) -> Row:
    layers, vocabulary = size_of(options)
    model = build(layers, vocabulary, window, options.device, getattr(torch, dtype))
    ids = tokens_of(length + 1, vocabulary).to(options.device)
    flops = (step_flops(model.config, length, length), "6 weights T + 12 L H D visible keys")
    size = sum(p.nbytes for p in model.parameters())
    case = case_of(options, length, window)
    # Weights are read forward and backward; AdamW reads and writes weights and both moments, and reads gradients.
    row = whole_row(options, "train-step", case, dtype, (9.0 * size, "9 bytes of weights"), flops, "gemm")
    exact = copy_on(model, mistral_kernels.reference, torch.float64)
    truth, eager = gradients(exact, ids, False), gradients(model, ids, False)
    share = share_of_twice_eager(gradients(copy_on(model, mistral_kernels), ids, True), eager, truth)
    del exact, truth, eager
    if not refuse(row, share, "the gradients"):
        calls = wanted(options, candidates(model, ids, options.quick, row))
        stopwatch = timing.Stopwatch(options.device)
        rows.time_whole(row, calls, limits, options, stopwatch)
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(options.device, options.quick)
    dtype, cases = ("float32", ((64, 16),)) if options.quick else ("bfloat16", ((512, None), (1024, 256)))
    makers = {
        key_of("train-step", case_of(options, length, window), dtype): partial(
            run_case, options, length, window, dtype, limits
        )
        for length, window in cases
    }
    return dict(rows=run_rows(options, makers), limits=limits.source)
