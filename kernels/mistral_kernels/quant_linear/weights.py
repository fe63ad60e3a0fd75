"""Weights as codes and scales: made from floating-point ones, turned back, and multiplied."""

import dataclasses

import torch

from .. import _checks
from . import reference

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
    weight: torch.Tensor, scheme: str = "int8", group_size: int | None = None, asymmetric: bool = False
) -> QuantizedWeight:
    """Rounds a weight `[N, K]` to codes.

    int8 and w8a8 take the largest element of a group for 127. int4 takes the largest for −8, or the ends of the range
    for 0 and 15, and then the one of a few smaller steps that leaves the least squared error. nf4 takes the nearest of
    its 16 values. Groups of zeros stay zeros.

    Args:
        weight: `[N, K]`, floating-point and finite.
        scheme: "int8", "w8a8", "int4" or "nf4".
        group_size: 32, 64 or 128 elements along a row that share a scale, 0 for whole rows; None for whole rows with
            int8 and w8a8, 128 with int4 and 64 with nf4.
        asymmetric: int4 with an offset for each group.

    Raises:
        TypeError: weight is no floating-point tensor.
        ValueError: an unknown scheme or group, a weight that is not two-dimensional or not finite.
    """
    _checks.floating(weight=weight)
    group = check_scheme(scheme, group_size)
    if weight.dim() != 2:
        raise ValueError(f"weight is {_checks.shape(weight)}; it must be [N, K]")
    if asymmetric and scheme != "int4":
        raise ValueError(f"asymmetric is for int4; scheme is {scheme!r}")
    if not weight.isfinite().all():
        raise ValueError("weight has elements that are not finite; they have no codes")
    k = weight.shape[1]
    grouped = _grouped(weight.detach().float(), group)
    offset = None
    if scheme == "nf4":
        codes, scale = _nf4(grouped)
    elif scheme == "int4":
        codes, scale, offset = _int4_with_offset(grouped) if asymmetric else (*_int4(grouped), None)
    else:
        codes, scale = _int8(grouped)
    codes = codes.flatten(1)[:, :k]
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


def _steps(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale, 0 where a group has no scale."""
    return torch.where(scale != 0, values / scale, 0.0).nan_to_num()


def _int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.abs().amax(-1) / reference.LIMIT
    return _steps(w, scale[..., None]).round().clamp(-reference.LIMIT, reference.LIMIT), scale


def _least(w: torch.Tensor, widest: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from 0 to 15 about an offset and the scales, of those tried, that leave the least squared error."""
    w = w - offset[..., None]
    best, codes, scale = torch.full_like(widest, torch.inf), torch.zeros_like(w), widest
    for share in TRIED:
        tried = widest * share
        found = (_steps(w, tried[..., None]) + reference.CENTRE).round().clamp(0, 15)
        error = _relative(((found - reference.CENTRE) * tried[..., None] - w), widest)
        better = error < best
        best = torch.where(better, error, best)
        codes, scale = torch.where(better[..., None], found, codes), torch.where(better, tried, scale)
    return codes, scale


def _relative(error: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Squared and summed in units of the scale: float32 neither overflows nor underflows."""
    return _steps(error, unit[..., None]).square().sum(-1)


def _int4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    return _least(w, largest / -reference.CENTRE, torch.zeros_like(largest))


def _int4_with_offset(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = w.amin(-1), w.amax(-1)
    widest = (high - low) / 15
    offset = low + reference.CENTRE * widest
    return *_least(w, widest, offset), offset


def _nf4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.abs().amax(-1)
    table = torch.tensor(reference.NF4, device=w.device)
    return torch.bucketize(_steps(w, scale[..., None]), (table[1:] + table[:-1]) / 2), scale
