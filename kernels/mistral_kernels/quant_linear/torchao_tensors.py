"""Weights from torchao's tensors and to them: Int8Tensor and IntxUnpackedToInt8Tensor, with int8 and int4 codes."""

from typing import Any

import torch

from .reference import CENTRE, pack, unpack
from .weights import GROUPS, QuantizedWeight

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it


def _torchao() -> Any:
    try:
        import torchao.quantization as found
    except ImportError as error:
        raise ImportError(f"torchao cannot be imported ({error}); pip install torchao") from error
    return found


def from_torchao(weight: torch.Tensor) -> QuantizedWeight:
    """The same weight as codes and scales of ours.

    Args:
        weight: an Int8Tensor `[N, K]` with scales for rows or for the whole tensor (with activations in int8, one scale
            a row, it becomes w8a8), or an IntxUnpackedToInt8Tensor of int8 or int4 with groups of 32, 64, 128 or rows.

    Raises:
        ImportError: torchao is missing; says what to install.
        TypeError: another kind of tensor.
        ValueError: a setting that the schemes here do not have, named.
    """
    ao = _torchao()
    if isinstance(weight, ao.Int8Tensor):
        return _from_int8(weight, ao)
    if isinstance(weight, ao.IntxUnpackedToInt8Tensor):
        return _from_intx(weight)
    raise TypeError(f"weight is {type(weight).__name__}; it must be torchao's Int8Tensor or IntxUnpackedToInt8Tensor")


def _check_plain(weight: Any, group: int) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight is {list(weight.shape)}; it must be [N, K]")
    if group not in (*GROUPS, weight.shape[1]):
        raise ValueError(f"weight has groups of {group}; there are {', '.join(map(str, GROUPS))} and whole rows")


def _from_int8(weight: Any, ao: Any) -> QuantizedWeight:
    n, k = weight.shape[0], weight.shape[-1]
    _check_plain(weight, weight.block_size[-1])
    refused = [name for name in ("act_quant_scale", "act_pre_scale") if getattr(weight, name) is not None]
    if weight.zero_point is not None and weight.zero_point.any():
        refused.append("zero_point")
    if refused:
        raise ValueError(f"weight has {' and '.join(refused)}; int8 here has scales for the weight alone")
    scheme, how = "int8", weight.act_quant_kwargs
    if how is not None:
        if type(how.granularity) is not ao.PerRow or how.mapping_type.name != "SYMMETRIC":
            raise ValueError(f"weight has activations quantised by {how}; w8a8 here has one symmetric scale a row")
        scheme = "w8a8"
    scale = weight.scale.float().expand(n, -1).contiguous()
    return QuantizedWeight(scheme, weight.qdata.contiguous(), scale, None, weight.block_size[-1] % k, k)


def _from_intx(weight: Any) -> QuantizedWeight:
    k, group = weight.shape[-1], weight.block_size[1]
    _check_plain(weight, group)
    if weight.block_size[0] != 1 or weight.activation_quantization is not None:
        raise ValueError(
            f"weight has blocks of {tuple(weight.block_size)} and activation_quantization"
            f" {weight.activation_quantization}; blocks must be of one row, and activations plain"
        )
    scale, zero = weight.scale.float().contiguous(), weight.zero_point.to(torch.int32).float()
    if weight.target_dtype == INT4:
        offset = -zero * scale if zero.any() else None
        return QuantizedWeight("int4", pack(weight.qdata + CENTRE), scale, offset, group % k, k)
    if weight.target_dtype != torch.int8 or zero.any():
        raise ValueError(f"weight is {weight.target_dtype} with zero points; it must be int4, or int8 without them")
    return QuantizedWeight("int8", weight.qdata.contiguous(), scale, None, group % k, k)


def to_torchao(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The same weight as torchao's tensor, for `torch.nn.Parameter(..., requires_grad=False)` of a Linear.

    Args:
        weight: int8 or w8a8 by rows becomes an Int8Tensor; int8 in groups and int4 an IntxUnpackedToInt8Tensor, one
            byte an element.
        dtype: of the dequantised weight; scales stay float32.

    Raises:
        ImportError: torchao is missing; says what to install.
        ValueError: nf4, offsets, w8a8 in groups, or a shorter last group: torchao has no such tensor.
    """
    ao, (_, k), group = _torchao(), weight.shape, weight.group or weight.inputs
    if weight.scheme == "nf4" or weight.offset is not None or (weight.scheme == "w8a8" and group < k):
        what = "offsets" if weight.offset is not None else f"{weight.scheme} in groups of {group}"
        raise ValueError(f"weight has {what}, which torchao's tensors cannot state")
    if group < k and k % group:
        raise ValueError(f"weight has rows of {k} in groups of {group}; torchao has no shorter last group")
    if weight.scheme != "int4" and group >= k:
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        how = QuantizeTensorToInt8Kwargs(granularity=ao.PerRow()) if weight.scheme == "w8a8" else None
        return ao.Int8Tensor(weight.codes, weight.scale, [1, k], dtype, act_quant_kwargs=how)  # type: ignore[no-any-return]
    codes, target = weight.codes, torch.int8
    if weight.scheme == "int4":
        codes, target = unpack(weight.codes, k).to(torch.int8) - CENTRE, INT4
    zero = torch.zeros_like(weight.scale, dtype=torch.int8)
    block = (1, min(group, k))
    return ao.IntxUnpackedToInt8Tensor(codes, weight.scale, zero, target, block, dtype, None)  # type: ignore[no-any-return]
