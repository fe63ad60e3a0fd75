"""Weights quantised with the inputs that they get on a text, layer after layer (GPTQ, Frantar et al. 2022).

All windows of the text run through one layer at a time. What a projection is given is known just before it runs: its
Hessian is taken then, the weight quantised, and the layer goes on with the weight that the codes stand for. So every
projection is calibrated on what it will be given by quantised layers before it, and the text runs through the model
once. In memory are one layer's weights and the activations of all windows.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import mistral_kernels
from mistral_kernels import QuantizedWeight, quantize_weight

from .checkpoint import expected_shapes
from .config import ModelConfig
from .extras import need
from .model import _OPS, FullPass, Linear, RopeTables, Transformer, TransformerBlock
from .quantized import LINEARS, put
from .tokenizer import Tokenizer
from .training.sources import documents

WINDOW = 1024
TOKENS = 16384
How = tuple[str, int | None, bool]  # scheme, group, offsets


def calibration_windows(source: str | Path, tokenizer: Tokenizer, tokens: int, longest: int) -> torch.Tensor:
    """The first tokens of a text as windows `[B, S]`; documents follow each other.

    Args:
        source: a text or JSONL file, or whatever `mistral.train` takes as data.
        tokenizer: of the model.
        tokens: how many at most; whole windows are taken.
        longest: the most that a window may have; WINDOW tokens where that is fewer.

    Raises:
        ValueError: tokens below 1; a file that cannot be read, or that is too short for one window.
    """
    if tokens < 1:
        raise ValueError(f"calibration tokens is {tokens}; it must be at least 1")
    size, ids = min(WINDOW, longest, tokens), list[int]()
    for text in documents([str(source)]):
        ids += tokenizer.encode(text)
        if len(ids) >= tokens:
            break
    if len(ids) < size:
        raise ValueError(f"{source} has {len(ids)} tokens; calibration needs {size} at least")
    count = min(tokens, len(ids)) // size
    return torch.tensor(ids[: count * size]).view(count, size)


def hessian(x: torch.Tensor) -> torch.Tensor:
    """The mean of x · xᵀ over the rows of `[..., K]`, in float32."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return (rows.T @ rows) / max(1, len(rows))


class _OnTheWay:
    """Quantises the projections of one layer as its forward comes to them."""

    def __init__(self, how: How, bar: Any):
        self.how, self.bar = how, bar
        self.made: dict[str, QuantizedWeight] = {}
        self._x: torch.Tensor | None = None
        self._hessian = torch.empty(0)

    def watch(self, name: str, module: Linear) -> None:
        module.register_forward_pre_hook(lambda module, args: self._quantise(name, module, args[0]))

    def _quantise(self, name: str, module: Any, x: torch.Tensor) -> None:
        if self._x is not x:  # wq, wk and wv are given the same, and w1 and w3
            self._x, self._hessian = x, hessian(x)
        self.made[name] = quantize_weight(module.weight, *self.how, hessian=self._hessian)
        module.weight = nn.Parameter(self.made[name].dequantize(), requires_grad=False)
        self.bar.update()


def calibrated_weights(
    config: ModelConfig,
    parameter: Callable[[str], torch.Tensor],
    windows: torch.Tensor,
    how: How,
    ops: Any = mistral_kernels,
    progress: bool = True,
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Names and weights of the quantised modules as the model comes to them: layer by layer, the output's at the end.

    Args:
        config: of the model.
        parameter: gives a parameter by its name.
        windows: `[B, S]` token ids.
        how: scheme, group and offsets of the projections; the output projection is int8 by rows.
        ops: as of the model.
        progress: shows a bar on standard error.

    Raises:
        ValueError: windows that are not `[B, S]`, or longer than the context.
    """
    if windows.dim() != 2 or not windows.numel() or windows.shape[1] > config.max_positions:
        shape, most = list(windows.shape), config.max_positions
        raise ValueError(f"windows is {shape}; it must be [B, S] tokens, S at most the context of {most}")
    return _layer_by_layer(
        config, parameter, windows, how, SimpleNamespace(**{n: getattr(ops, n) for n in _OPS}), progress
    )


def _layer_by_layer(
    config: ModelConfig,
    parameter: Callable[[str], torch.Tensor],
    windows: torch.Tensor,
    how: How,
    ops: SimpleNamespace,
    progress: bool,
) -> Iterator[tuple[str, QuantizedWeight]]:
    last = "tok_embeddings" if config.tie_embeddings else "output"
    embedding = parameter("tok_embeddings.weight").detach()
    delta, residual = embedding[windows.to(embedding.device)].float(), None
    del embedding
    rope = RopeTables(config, ops).to(delta.device)
    plan = FullPass(ops, rope.cos, rope.sin, config.sliding_window, None, None)
    bar = need("tqdm").tqdm(
        total=len(LINEARS) * config.n_layers + 1, desc="calibrating", disable=None if progress else True, leave=False
    )
    with bar:
        for i in range(config.n_layers):
            made = _OnTheWay(how, bar)
            # Entered for each layer: a generator that pauses inside would leave it on for whoever called it.
            with torch.no_grad():
                layer = _layer(config, parameter, i, ops)
                for name in LINEARS:
                    made.watch(name, layer.get_submodule(name))  # type: ignore[arg-type]
                delta, residual = layer(delta, residual, plan)
            del layer
            yield from ((f"layers.{i}.{name}", made.made[name]) for name in LINEARS)
        with torch.no_grad():
            hidden = ops.add_rms_norm(delta, residual, parameter("norm.weight").float(), config.norm_eps)[0]
            weight = quantize_weight(parameter(f"{last}.weight"), "int8", hessian=hessian(hidden))
        bar.update()
        yield last, weight


def _layer(
    config: ModelConfig, parameter: Callable[[str], torch.Tensor], index: int, ops: SimpleNamespace
) -> TransformerBlock:
    """One layer in float32."""
    with torch.device("meta"):
        layer = TransformerBlock(config, ops)
    for name, _ in list(layer.named_parameters()):
        module, _, leaf = name.rpartition(".")
        values = parameter(f"layers.{index}.{name}").detach().float()
        setattr(layer.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
    return layer


class InOrder:
    """Weights that are made one after the other, asked for by name; those made on the way are kept until then."""

    def __init__(self, weights: Iterator[tuple[str, QuantizedWeight]]):
        self._weights, self._held = weights, dict[str, QuantizedWeight]()

    def __call__(self, name: str) -> QuantizedWeight:
        while name not in self._held:
            made, weight = next(self._weights)
            self._held[made] = weight
        return self._held.pop(name)


def calibrate_model(
    model: Transformer,
    windows: torch.Tensor,
    scheme: str = "int8",
    group_size: int | None = None,
    asymmetric: bool = False,
    progress: bool = True,
) -> Transformer:
    """Quantises a model in place, calibrated on a text; in float32, whatever the model's dtype.

    Args:
        model: with its weights, none of them quantised or replaced.
        windows: `[B, S]` token ids, as `calibration_windows` returns them.
        scheme, group_size, asymmetric: as `quantize_model` takes them.
        progress: shows a bar on standard error.

    Returns:
        The model.

    Raises:
        ValueError: a model with other parts than it was built with; as `calibrated_weights` and
            `mistral_kernels.quantize_weight`.
    """
    known, dtype = dict(model.named_parameters()), model.dtype
    if missing := [n for n in expected_shapes(model.config) if n not in known]:
        raise ValueError(f"model has no {missing[0]}; calibration takes models that are as they were built")
    how = (scheme, group_size, asymmetric)
    for name, weight in calibrated_weights(model.config, known.__getitem__, windows, how, model.ops, progress):
        put(model, name, weight, dtype)
    return model
