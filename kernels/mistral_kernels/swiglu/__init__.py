"""The gate of a SwiGLU feed-forward layer, from two tensors or from one that packs both halves."""

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op, always
from . import reference


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _fake_packed(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_backward = Op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    eager=reference.swiglu_backward,
    fake=lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    triton="swiglu.triton_kernel:swiglu_backward",
    cuda=True,
    cuda_first=always,
)
_packed_backward = Op(
    "swiglu_packed_backward(Tensor dy, Tensor gate_up) -> Tensor",
    eager=reference.swiglu_packed_backward,
    fake=lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
    triton="swiglu.triton_kernel:swiglu_packed_backward",
    cuda=True,
    cuda_first=always,
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu = Op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    eager=reference.swiglu,
    fake=_fake,
    triton="swiglu.triton_kernel:swiglu",
    cuda=True,
    cuda_first=always,
    setup_context=_save,
    backward=lambda ctx, dy: _backward.like_forward(ctx.impl, dy, *ctx.saved_tensors),
)
_swiglu_packed = Op(
    "swiglu_packed(Tensor gate_up) -> Tensor",
    eager=reference.swiglu_packed,
    fake=_fake_packed,
    triton="swiglu.triton_kernel:swiglu_packed",
    cuda=True,
    cuda_first=always,
    setup_context=_save,
    backward=lambda ctx, dy: _packed_backward.like_forward(ctx.impl, dy, *ctx.saved_tensors),
)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """`silu(gate) · up`, elementwise (Shazeer 2020, eq. 5).

    Args:
        gate, up: `[..., F]`, of one shape, float32, bfloat16, float16 or float64; of two dtypes they promote.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Returns:
        `[..., F]`, contiguous. Computed in float32 and rounded once. The backward computes silu again and keeps
        gate and up only.

    Raises:
        TypeError: gate or up is no floating-point tensor.
        ValueError: the shapes or devices differ.
        NotImplementedError: `impl` cannot run here.
    """
    if impl is None and not is_dynamo_compiling() and (done := _swiglu.at_once(gate, up)) is not None:
        return done  # type: ignore[no-any-return]
    _checks.floating(gate=gate, up=up)
    _checks.same_shape(gate=gate, up=up)
    return _swiglu(impl, *_checks.promote(gate, up))


def swiglu_packed(gate_up: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """`swiglu` of the two halves of one tensor, as a projection with fused weights gives it.

    Args:
        gate_up: `[..., 2F]`, gate in the first half and up in the second.
        impl: as in `swiglu`.

    Returns:
        `[..., F]`, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as `swiglu`; also where the last dimension is odd.
    """
    if impl is None and not is_dynamo_compiling() and (done := _swiglu_packed.at_once(gate_up)) is not None:
        return done  # type: ignore[no-any-return]
    _checks.floating(gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {_checks.shape(gate_up)}; its last dimension must be even, gate then up")
    return _swiglu_packed(impl, gate_up)
