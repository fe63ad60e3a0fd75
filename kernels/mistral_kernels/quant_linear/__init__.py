"""Linear layers on int8, int4 and NF4 weights. With few rows their time is that of reading the codes once."""

import torch

from .. import _checks
from .._dispatch import Op, always
from . import reference
from .modules import Quantized, QuantizedLinear, quantize_
from .torchao_tensors import from_torchao, to_torchao
from .weights import GROUPS, QuantizedWeight, groups_of, quantize_weight

__all__ = [
    "Quantized",
    "QuantizedLinear",
    "QuantizedWeight",
    "from_torchao",
    "linear_int4",
    "linear_int8",
    "linear_nf4",
    "linear_quantized",
    "quantize_",
    "quantize_weight",
    "to_torchao",
]


def _save(ctx, inputs, output):
    x, codes, scale, *middle, bias, group = inputs
    offset = middle[0] if middle else None
    ctx.save_for_backward(codes, scale, *(() if offset is None else (offset,)))
    ctx.group, ctx.k, ctx.dtype, ctx.arguments = group, x.shape[-1], x.dtype, len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(weight_of):
    """dx = dy · weight; of int8 activations, as if their rounding were the identity. Codes and scales are frozen."""

    def backward(ctx, dy):
        dx = dy @ weight_of(ctx, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        dbias = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[ctx.arguments - 2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, *(None,) * (ctx.arguments - 3), dbias, None

    return backward


def _int8_of(ctx, codes, scale):
    return reference.dequantise_int8(codes, scale, ctx.group, ctx.dtype)


def _int4_of(ctx, codes, scale, offset=None):
    return reference.dequantise_int4(codes, scale, offset, ctx.group, ctx.k, ctx.dtype)


def _nf4_of(ctx, codes, scale):
    return reference.dequantise_nf4(codes, scale, ctx.group, ctx.k, ctx.dtype)


def _fake(x, codes, *_):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _all_supported(*_):
    return None


def _sums_fit(x, codes, *_):
    most = 1 << 17  # of which an int32 holds the sum of products
    return None if codes.shape[1] <= most else f"its sums of int8 products hold {most} elements, and x has more"


def _few_rows(x, *_):
    """Whether these are as many rows as CUDA C++ has a pass over the codes for: of int8 tiles Triton's are the faster
    ones (docs/gpu.md)."""
    return x.numel() <= 4 * x.shape[-1]


def _op(name: str, eager, weight_of, offset: str = "") -> Op:
    supports = _sums_fit if name == "linear_w8a8" else _all_supported
    return Op(
        f"{name}(Tensor x, Tensor codes, Tensor scale,{offset} Tensor? bias, int group) -> Tensor",
        eager=eager,
        fake=_fake,
        triton=f"quant_linear.triton_kernel:{name}",
        triton_supports=supports,
        cuda=True,
        cuda_first=_few_rows if weight_of is _int8_of else always,
        cuda_supports=supports,
        setup_context=_save,
        backward=_backward(weight_of),
    )


_int8 = _op("linear_int8", reference.linear_int8, _int8_of)
_w8a8 = _op("linear_w8a8", reference.linear_w8a8, _int8_of)
_int4 = _op("linear_int4", reference.linear_int4, _int4_of, " Tensor? offset,")
_nf4 = _op("linear_nf4", reference.linear_nf4, _nf4_of)


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int | None,
    halves: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Raises for what does not fit; returns scale and offset as `[N, G]`, and the group, 0 for whole rows."""
    _checks.floating(x=x, scale=scale, **_checks.given(offset=offset, bias=bias))
    _checks.integral(x.device, (torch.uint8,) if halves else (torch.int8,), codes=codes)
    if codes.dim() != 2:
        raise ValueError(f"codes is {_checks.shape(codes)}; it must be [N, {'16 * ceil(K / 32)' if halves else 'K'}]")
    n, group = codes.shape[0], group_size or 0
    if group not in (0, *GROUPS):
        raise ValueError(
            f"group_size is {group_size}; it must be {', '.join(map(str, GROUPS))}, or None for whole rows"
        )
    k = x.shape[-1] if x.dim() else -1
    width = -(-k // reference.BLOCK) * (reference.BLOCK // 2) if halves else k
    if k < 0 or codes.shape[1] != width:
        needed = f"K with 16 * ceil(K / 32) = {codes.shape[1]}" if halves else str(codes.shape[1])
        raise ValueError(f"x is {_checks.shape(x)}; with codes {_checks.shape(codes)} it must be [..., {needed}]")
    groups = groups_of(k, group)
    for name, t in (("scale", scale), ("offset", offset)):
        if t is None:
            continue
        if t.shape != (n, groups) and not (t.shape == (n,) and groups == 1):
            raise ValueError(f"{name} is {_checks.shape(t)}; for [{n}, {k}] in groups of {group or k} it must be"
                             f" [{n}, {groups}]")  # fmt: skip
        if t.dtype != torch.float32 and not t.dtype == x.dtype == torch.float64:
            raise TypeError(f"{name} is {t.dtype}; it must be float32")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias is {_checks.shape(bias)}; with codes {_checks.shape(codes)} it must be [{n}]")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype} but x is {x.dtype}; they must be equal")
    _checks.no_gradient("linear on codes", scale=scale, offset=offset)
    return scale.view(n, groups), None if offset is None else offset.view(n, groups), group if group < k else 0


def _autocast(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(x, torch.Tensor) or not torch.is_autocast_enabled(x.device.type):
        return x, bias
    return _checks.autocast(x)[0], None if bias is None else _checks.autocast(bias)[0]


def linear_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int | None = None,
    activations: str = "float",
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """`x · (scale · codes)ᵀ + bias`: a linear layer whose weight is int8.

    With activations "int8" (W8A8) each row of x is rounded to codes as well, `round(x / s)` with `s = max|x| / 127`
    and halves to even; the sums of products of codes are exact. The gradient of x takes that rounding for the identity.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64. Under `torch.autocast` it is taken in that dtype.
        codes: `[N, K]` int8.
        scale: `[N]` or `[N, 1]`, or `[N, ceil(K / group_size)]`; float32 (or float64 with a float64 x).
        bias: `[N]` of x's dtype, or None.
        group_size: 32, 64 or 128 elements of a row that share a scale, the last group may be shorter; None for rows.
        activations: "float" keeps x as it is, "int8" rounds it.
        impl: None for the fastest that can, or one of `backends()`.

    Returns:
        `[..., N]`, contiguous, in x's dtype: summed in float32 or in integers, and rounded once. The eager version
        rounds the weight to x's dtype first; the kernels need not.

    Raises:
        TypeError, ValueError: arguments whose types, shapes or devices do not fit.
        NotImplementedError: `impl` cannot run here; a derivative with respect to scale.
    """
    if activations not in ("float", "int8"):
        raise ValueError(f"activations is {activations!r}; it must be 'float' or 'int8'")
    x, bias = _autocast(x, bias)
    scale, _, group = _check(x, codes, scale, None, bias, group_size, halves=False)
    return (_w8a8 if activations == "int8" else _int8)(impl, x, codes, scale, bias, group)


def linear_int4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    group_size: int | None = 128,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """`x · (scale · (codes − 8) + offset)ᵀ + bias`: a linear layer whose weight is int4.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64. Under `torch.autocast` it is taken in that dtype.
        codes: `[N, 16 · ceil(K / 32)]` uint8: of 32 elements, byte j has element j in its low half and j + 16 in its
            high half, as in GGUF. What lies past K is not looked at.
        scale: `[N, ceil(K / group_size)]` float32 (or float64 with a float64 x); may be negative.
        offset: like scale, or None for symmetric weights.
        bias: `[N]` of x's dtype, or None.
        group_size: 32, 64 or 128 elements of a row that share a scale, the last group may be shorter; None for rows.
        impl: None for the fastest that can, or one of `backends()`.

    Returns:
        `[..., N]`, contiguous, in x's dtype; rounding as in `linear_int8`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_int8`.
    """
    x, bias = _autocast(x, bias)
    scale, offset, group = _check(x, codes, scale, offset, bias, group_size, halves=True)
    return _int4(impl, x, codes, scale, offset, bias, group)


def linear_nf4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int | None = 64,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """`x · (scale · NF4[codes])ᵀ + bias`, with the 16 values of NormalFloat (Dettmers et al. 2023, appendix E).

    Args:
        x, codes, bias, impl: as in `linear_int4`.
        scale: `[N, ceil(K / group_size)]` float32 (or float64 with a float64 x).
        group_size: 32, 64 or 128; None for rows.

    Returns:
        `[..., N]`, contiguous, in x's dtype; rounding as in `linear_int8`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_int8`.
    """
    x, bias = _autocast(x, bias)
    scale, _, group = _check(x, codes, scale, None, bias, group_size, halves=True)
    return _nf4(impl, x, codes, scale, bias, group)


def linear_quantized(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """The linear layer of a `QuantizedWeight`, by the op of its scheme; arguments and errors as there."""
    group = weight.group or None
    if weight.scheme == "int4":
        return linear_int4(x, weight.codes, weight.scale, weight.offset, bias, group, impl=impl)
    if weight.scheme == "nf4":
        return linear_nf4(x, weight.codes, weight.scale, bias, group, impl=impl)
    activations = "int8" if weight.scheme == "w8a8" else "float"
    return linear_int8(x, weight.codes, weight.scale, bias, group, activations, impl=impl)
