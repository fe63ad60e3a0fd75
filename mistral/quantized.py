"""Layers on quantised weights, and a model's weights quantised in place.

The projections of all layers take the scheme. The embedding and the output projection, which every logit passes
through, take int8 with every scheme; an embedding that is no output projection stays as it is, since only its rows
are read.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mistral_kernels import QuantizedWeight, quantize_weight
from mistral_kernels.quant_linear.modules import Quantized, QuantizedLinear

from .model import WEIGHT_OF, Linear, Transformer

LINEARS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


WEIGHT_OF[QuantizedLinear] = lambda module: module.quantized


class QuantizedEmbedding(Quantized):
    """An embedding on codes; only the rows that are looked up are dequantised.

    Args:
        weight: `[V, N]`.
        dtype: of the rows.
        ops: as of the model.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, ops: SimpleNamespace):
        super().__init__(weight)
        self.dtype, self.ops = dtype, ops

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        w, at = self.quantized, tokens.reshape(-1).long()
        offset = None if w.offset is None else w.offset[at]
        rows = QuantizedWeight(w.scheme, w.codes[at], w.scale[at], offset, w.group, w.inputs)
        return rows.dequantize(self.dtype).view(*tokens.shape, self.in_features)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits, where the output projection is the embedding."""
        return self.ops.linear_quantized(hidden, self.quantized)


def output_scheme(name: str, tied: bool) -> bool:
    """Whether the weight of this name is quantised to int8 whatever the scheme."""
    return name == ("tok_embeddings" if tied else "output")


def quantized_names(config: Any) -> Iterator[str]:
    """The modules whose weights are quantised, in the model's order."""
    if config.tie_embeddings:
        yield "tok_embeddings"
    for i in range(config.n_layers):
        yield from (f"layers.{i}.{name}" for name in LINEARS)
    if not config.tie_embeddings:
        yield "output"


def put(model: Transformer, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Replaces the module `name` by one on this weight; a bias stays."""
    parent, _, leaf = name.rpartition(".")
    if name == "tok_embeddings":
        new: nn.Module = QuantizedEmbedding(weight, dtype, model.ops)
    else:
        bias: Any = model.get_submodule(name).bias
        new = QuantizedLinear(weight, None if bias is None else bias.detach(), model.ops.linear_quantized)
    setattr(model.get_submodule(parent), leaf, new)


@torch.no_grad()
def quantize_model(
    model: Transformer, scheme: str = "int8", group_size: int | None = None, asymmetric: bool = False
) -> Transformer:
    """Quantises a model in place, one weight after the other.

    Args:
        model: with its weights; parts that are quantised already, or were replaced, are left.
        scheme, group_size, asymmetric: as `mistral_kernels.quantize_weight` takes them; the output projection is int8
            by rows with every scheme.

    Returns:
        The model.

    Raises:
        ValueError: as `mistral_kernels.quantize_weight`.
    """
    dtype = model.dtype
    for name in quantized_names(model.config):
        module: Any = model.get_submodule(name)
        if type(module) not in (Linear, nn.Embedding):
            continue
        last = output_scheme(name, model.config.tie_embeddings)
        how = ("int8", None, False) if last else (scheme, group_size, asymmetric)
        put(model, name, quantize_weight(module.weight, *how), dtype)
    return model
