"""Linear layers on quantised weights in eager PyTorch: dequantise, then multiply.

    int8   w = scale · code                    codes int8 [N, K], −127 to 127
    int4   w = scale · (code − 8) + offset     codes 0 to 15, two in a byte; offset 0 where the scheme is symmetric
    nf4    w = scale · NF4[code]               codes 0 to 15, two in a byte (Dettmers et al. 2023, appendix E)

`scale` and `offset` are `[N, G]`: one for each group of `group` elements along a row, the last of which may be shorter;
a group of 0 is the whole row. Two codes in a byte: of every 32 elements along a row, byte j has element j in its low
half and element j + 16 in its high half, as GGUF has them.
"""

import torch

from .._checks import accumulate_dtype

BLOCK = 32  # elements that 16 bytes of half-byte codes hold
LIMIT = 127
CENTRE = 8
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """`[N, K]` codes of 0 to 15 as `[N, 16 · ceil(K / 32)]` uint8; past K are zeros."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -k % BLOCK)).view(n, -(-k // BLOCK), 2, BLOCK // 2)
    return (padded[:, :, 0] | padded[:, :, 1] << 4).flatten(1)


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `pack`: `[N, K]` uint8."""
    halves = packed.reshape(packed.shape[0], -(-k // BLOCK), BLOCK // 2)
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1)[:, :k]


def spread(per_group: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """`[N, G]` as `[N, K]`, or as `[N, 1]` where a group is the whole row."""
    return per_group.repeat_interleave(group, 1)[:, :k] if 0 < group < k else per_group


def dequantise_int8(codes: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[N, K]`: formed in float32 (float64 for float64) and rounded once."""
    wide = accumulate_dtype(dtype)
    return (codes.to(wide) * spread(scale.to(wide), group, codes.shape[1])).to(dtype)


def dequantise_int4(
    packed: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    wide = accumulate_dtype(dtype)
    weight = (unpack(packed, k).to(wide) - CENTRE) * spread(scale.to(wide), group, k)
    return (weight if offset is None else weight + spread(offset.to(wide), group, k)).to(dtype)


def dequantise_nf4(packed: torch.Tensor, scale: torch.Tensor, group: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    wide = accumulate_dtype(dtype)
    table = torch.tensor(NF4, dtype=torch.float32, device=packed.device).to(wide)
    return (table[unpack(packed, k).long()] * spread(scale.to(wide), group, k)).to(dtype)


def linear_int8(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    return torch.nn.functional.linear(x, dequantise_int8(codes, scale, group, x.dtype), bias)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of each row of x, as whole numbers in its accumulation dtype, and scales `[..., 1]`.

    Halves go to even; a row of zeros has scale 0, and one with an infinity or NaN a scale that is not finite.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    if not wide.shape[-1]:
        return wide, wide.new_zeros(*wide.shape[:-1], 1)
    scale = wide.abs().amax(-1, keepdim=True) / LIMIT
    codes = torch.where(scale > 0, wide / scale, 0.0).nan_to_num().round()
    return codes.clamp(-LIMIT, LIMIT), scale


def linear_w8a8(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """The sums of products of codes are exact; they are scaled in float32, and rounded once. The gradient of x is that
    of the product with x as it is."""
    rows, x_scale = quantise_rows(x.detach())
    wide, k = x_scale.dtype, codes.shape[1]
    size = group if 0 < group < k else max(k, 1)
    out = x_scale.new_zeros(*x.shape[:-1], codes.shape[0])
    for g in range(scale.shape[1]):
        part = slice(g * size, min(k, (g + 1) * size))
        sums = rows[..., part].double() @ codes[:, part].double().T
        out += sums.to(wide) * x_scale * scale[:, g].to(wide)
    if torch.is_grad_enabled() and x.requires_grad:
        straight = torch.nn.functional.linear(x, dequantise_int8(codes, scale, group, x.dtype)).to(wide)
        out = out + (straight - straight.detach())
    return (out if bias is None else out + bias).to(x.dtype)


def linear_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    weight = dequantise_int4(packed, scale, offset, group, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def linear_nf4(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    return torch.nn.functional.linear(x, dequantise_nf4(packed, scale, group, x.shape[-1], x.dtype), bias)
