"""Weights as codes and scales: made from floating-point ones, turned back, and multiplied."""

import dataclasses
from functools import partial

import torch

from .. import _checks
from . import reference
from .feedback import with_feedback

SCHEMES = ("int8", "w8a8", "int4", "nf4")
GROUPS = (32, 64, 128)
DEFAULT_GROUP = {"int8": 0, "w8a8": 0, "int4": 128, "nf4": 64}
# The largest element is not always worth a level: scales that clip it leave the others a finer step.
TRIED = tuple(1.0 - 0.02 * i for i in range(-2, 16))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight `[N, K]` of a linear layer.

    Args:
        scheme: "int8", "w8a8" (the same weights, with activations in int8 too), "int4" or "nf4".
        codes: int8 `[N, K]`, or uint8 `[N, 16 · ceil(K / 32)]` with two codes in a byte.
        scale: `[N, G]` float32.
        offset: `[N, G]` float32, for asymmetric int4, or None.
        group: elements of a row that share a scale, 0 for all.
        inputs: K.
    """

    scheme: str
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    group: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scale, self.offset) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[N, K]` that the codes stand for, rounded once to `dtype`."""
        if self.codes.dtype == torch.int8:
            return reference.dequantise_int8(self.codes, self.scale, self.group, dtype)
        if self.scheme == "nf4":
            return reference.dequantise_nf4(self.codes, self.scale, self.group, self.inputs, dtype)
        return reference.dequantise_int4(self.codes, self.scale, self.offset, self.group, self.inputs, dtype)


def groups_of(k: int, group: int) -> int:
    """How many groups a row of k elements has."""
    return -(-k // group) if 0 < group < k else 1


def check_scheme(scheme: str, group_size: int | None) -> int:
    """The group that is meant; None for the scheme's own."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; it must be one of {', '.join(map(repr, SCHEMES))}")
    group = DEFAULT_GROUP[scheme] if group_size is None else group_size
    if group not in (0, *GROUPS):
        raise ValueError(f"group_size is {group}; it must be one of {', '.join(map(str, GROUPS))}, or 0 for whole rows")
    return group


def quantize_weight(
    weight: torch.Tensor,
    scheme: str = "int8",
    group_size: int | None = None,
    asymmetric: bool = False,
    hessian: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Rounds a weight `[N, K]` to codes.

    int8 and w8a8 take the largest element of a group for 127. int4 takes the largest for −8, or the ends of the range
    for 0 and 15, and then the one of a few smaller steps that leaves the least squared error. nf4 takes the nearest of
    its 16 values. Groups of zeros stay zeros.

    With a Hessian the error of the layer's outputs counts instead: columns weigh as much as their inputs when steps are
    compared, and the codes of one column make up for the errors of those before it (GPTQ, Frantar et al. 2022).

    Args:
        weight: `[N, K]`, floating-point and finite.
        scheme: "int8", "w8a8", "int4" or "nf4".
        group_size: 32, 64 or 128 elements along a row that share a scale, 0 for whole rows; None for whole rows with
            int8 and w8a8, 128 with int4 and 64 with nf4.
        asymmetric: int4 with an offset for each group.
        hessian: `[K, K]`, the mean of `x · xᵀ` over the inputs x of the layer; its unit does not matter.

    Raises:
        TypeError: weight or hessian is no floating-point tensor.
        ValueError: an unknown scheme or group, a weight that is not two-dimensional or not finite, a hessian that does
            not fit it.
    """
    _checks.floating(weight=weight, **_checks.given(hessian=hessian))
    group = check_scheme(scheme, group_size)
    if weight.dim() != 2:
        raise ValueError(f"weight is {_checks.shape(weight)}; it must be [N, K]")
    if asymmetric and scheme != "int4":
        raise ValueError(f"asymmetric is for int4; scheme is {scheme!r}")
    if not weight.isfinite().all():
        raise ValueError("weight has elements that are not finite; they have no codes")
    n, k = weight.shape
    if hessian is not None and hessian.shape != (k, k):
        raise ValueError(f"hessian is {_checks.shape(hessian)}; for weight [{n}, {k}] it must be [{k}, {k}]")
    if hessian is not None and not (hessian.isfinite().all() and (hessian.diagonal() >= 0).all()):
        raise ValueError("hessian has elements that are not finite, or negative ones on its diagonal")
    w = weight.detach().float()
    heavy = None if hessian is None else _importance(hessian, group)
    codes, scale, offset = _fit(scheme, asymmetric, _grouped(w, group), heavy)
    codes = codes.flatten(1)[:, :k]
    if hessian is not None and k:
        of_column = torch.arange(k, device=w.device) // (group if 0 < group < k else k)
        codes = with_feedback(w, hessian, of_column, scale, offset, partial(_code, scheme), partial(_value, scheme))
    stored = codes.to(torch.int8).contiguous() if scheme in ("int8", "w8a8") else reference.pack(codes)
    return QuantizedWeight(scheme, stored, scale, offset, group, k)


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`[N, G, group]`; a shorter last group repeats its last element, which changes neither end of its range."""
    n, k = weight.shape
    if not k:
        return weight.new_zeros(n, 1, 1)
    size = group if 0 < group < k else k
    short = -k % size
    return torch.cat((weight, weight[:, -1:].expand(n, short)), 1).view(n, groups_of(k, group), size)


def _importance(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """`[G, group]`: how much the squared error of each column counts; what fills the last group counts nothing."""
    heavy = hessian.diagonal().double()
    k = len(heavy)
    size = group if 0 < group < k else max(k, 1)
    heavy = (heavy / heavy.mean().clamp(min=torch.finfo(torch.float64).tiny)).float() if k else heavy.float()
    return torch.nn.functional.pad(heavy, (0, groups_of(k, group) * size - k)).view(-1, size)


def _steps(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale, 0 where a group has no scale."""
    return torch.where(scale != 0, values / scale, 0.0).nan_to_num()


def _code(scheme: str, values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The codes nearest to values."""
    if scheme == "nf4":
        table = torch.tensor(reference.NF4, device=values.device)
        return torch.bucketize(_steps(values, scale), (table[1:] + table[:-1]) / 2)
    if scheme == "int4":
        return (_steps(values if offset is None else values - offset, scale) + reference.CENTRE).round().clamp(0, 15)
    return _steps(values, scale).round().clamp(-reference.LIMIT, reference.LIMIT)


def _value(scheme: str, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """What codes stand for."""
    if scheme == "nf4":
        return torch.tensor(reference.NF4, device=codes.device)[codes] * scale
    if scheme == "int4":
        value = (codes - reference.CENTRE) * scale
        return value if offset is None else value + offset
    return codes * scale


def _fit(
    scheme: str, asymmetric: bool, w: torch.Tensor, heavy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes `[N, G, group]`, scales and offsets of each group by itself."""
    if scheme == "int4":
        return _int4_with_offset(w, heavy) if asymmetric else (*_int4(w, heavy), None)
    scale = w.abs().amax(-1) / (1 if scheme == "nf4" else reference.LIMIT)
    return _code(scheme, w, scale[..., None], None), scale, None


def _least(
    w: torch.Tensor, widest: torch.Tensor, offset: torch.Tensor, heavy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from 0 to 15 about an offset and the scales, of those tried, that leave the least squared error."""
    w = w - offset[..., None]
    best, codes, scale = torch.full_like(widest, torch.inf), torch.zeros_like(w), widest
    for share in TRIED:
        tried = widest * share
        found = _code("int4", w, tried[..., None], None)
        error = _relative(((found - reference.CENTRE) * tried[..., None] - w), widest, heavy)
        better = error < best
        best = torch.where(better, error, best)
        codes, scale = torch.where(better[..., None], found, codes), torch.where(better, tried, scale)
    return codes, scale


def _relative(error: torch.Tensor, unit: torch.Tensor, heavy: torch.Tensor | None) -> torch.Tensor:
    """Squared and summed in units of the scale: float32 neither overflows nor underflows."""
    squares = _steps(error, unit[..., None]).square()
    return (squares if heavy is None else squares * heavy).sum(-1)


def _int4(w: torch.Tensor, heavy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    return _least(w, largest / -reference.CENTRE, torch.zeros_like(largest), heavy)


def _int4_with_offset(w: torch.Tensor, heavy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = w.amin(-1), w.amax(-1)
    widest = (high - low) / 15
    offset = low + reference.CENTRE * widest
    return *_least(w, widest, offset, heavy), offset
