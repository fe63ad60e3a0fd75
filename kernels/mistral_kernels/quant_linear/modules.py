"""Linear layers on codes as modules, and those of any model replaced by them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .weights import QuantizedWeight, check_scheme, quantize_weight

PARTS = ("codes", "scale", "offset")


class Quantized(nn.Module):
    """A weight `[N, K]` as codes and scales, in buffers. `.to(dtype)` leaves the scales in float32."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.scheme, self.group = weight.scheme, weight.group
        self.out_features, self.in_features = weight.shape
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))
        self._made = weight

    @property
    def quantized(self) -> QuantizedWeight:
        # Kept while the buffers are the same ones: a decode step asks every projection, and making them takes longer
        # than its small products.
        made, now = self._made, self._buffers
        if made.codes is now["codes"] and made.scale is now["scale"] and made.offset is now["offset"]:
            return made
        parts = (self.codes, self.scale, self.offset)
        self._made = QuantizedWeight(self.scheme, *parts, self.group, self.in_features)
        return self._made

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name by which peft finds the device of a layer without a `weight`."""
        return self.codes

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        scale, offset = self.scale, self.offset
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)
        self.offset = None if offset is None else offset.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, group={self.group or self.in_features}"


class QuantizedLinear(Quantized):
    """A linear layer on codes. Gradients reach its input and its bias.

    Args:
        weight: what `quantize_weight` returns.
        bias: `[N]`, or None.
        linear: called with (x, weight, bias); `linear_quantized` of an implementation.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, linear: Callable | None = None):
        super().__init__(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        from . import linear_quantized

        self.linear: Callable[..., torch.Tensor] = linear_quantized if linear is None else linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, self.quantized, self.bias)


def quantize_(
    model: nn.Module,
    scheme: str = "int8",
    group_size: int | None = None,
    asymmetric: bool = False,
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Replaces the `torch.nn.Linear` modules of a model by `QuantizedLinear`, in place, one after the other.

    For models of transformers, patched or not: patched methods call the projections as modules. Subclasses of Linear
    and modules with hooks or parametrisations are left. What is replaced is frozen.

    Args:
        model: with its weights.
        scheme, group_size, asymmetric: as `quantize_weight` takes them.
        skip: names of modules, the last part of the path or all of it, that stay as they are. The output projection is
            among them at first: it is often tied to the embedding, and the fused loss reads its weight.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.
        ValueError: an unknown scheme or group; asymmetric without int4; a weight that is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    check_scheme(scheme, group_size)
    if type(model) is nn.Linear:
        raise ValueError("model is a Linear itself; quantise the module that holds it, or use quantize_weight")
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        if type(module) is not nn.Linear or hooked or leaf in skip or name in skip:
            continue
        bias = None if module.bias is None else module.bias.detach()
        made = QuantizedLinear(quantize_weight(module.weight, scheme, group_size, asymmetric), bias)
        setattr(model.get_submodule(parent), leaf, made.train(module.training))
    return model
