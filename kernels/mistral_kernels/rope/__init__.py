"""Rotary position embedding of queries and keys, and its tables."""

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op, short
from . import reference
from .table import rope_table as rope_table

POSITION_DTYPES = (torch.int32, torch.int64)


def _fake(q, k, cos, sin, positions, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, dq, dk):
    """The rotation is orthogonal (times YaRN's temperature): its transpose turns by the negative angle."""
    cos, sin, positions = ctx.saved_tensors
    dq, dk = _rope.like_forward(ctx.impl, dq, dk, cos, sin, positions, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None, None


_rope = Op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    eager=reference.rope,
    fake=_fake,
    triton="rope.triton_kernel:rope",
    cuda=True,
    cuda_first=short,
    setup_context=_save,
    backward=_gradients,
)


def check_tables(cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
    """cos and sin are `[P, D/2]` for this head_dim."""
    if head_dim % 2:
        raise ValueError(f"the head dimension is {head_dim}; it must be even")
    shape = cos.shape
    if sin.shape != shape:
        _checks.same_shape(cos=cos, sin=sin)
    if len(shape) != 2 or shape[1] != head_dim // 2:
        raise ValueError(
            f"cos is {_checks.shape(cos)}; for head dimension {head_dim} it must be [P, {head_dim // 2}]"
            f" (or [B, S, {head_dim}], as Hugging Face hands it over, in rope)"
        )


def _check(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None) -> None:
    shape, k_shape = q.shape, k.shape
    if len(shape) not in (3, 4) or k_shape[:-2] != shape[:-2] or k_shape[-1:] != shape[-1:]:
        raise ValueError(
            f"q is {_checks.shape(q)} and k {_checks.shape(k)};"
            " they must be [B, S, H, D] and [B, S, Hkv, D], or [T, H, D] and [T, Hkv, D]"
        )
    if positions is not None and positions.shape != shape[:-2]:
        raise ValueError(
            f"positions is {_checks.shape(positions)}; with q {_checks.shape(q)} it must be"
            f" [{', '.join(str(n) for n in q.shape[:-2])}]"
        )


def _tables_of_tokens(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns `[B, S, D]` values (each half-table written twice, or `[1, S, D]`) into tables and positions."""
    if positions is not None or q.dim() != 4:
        raise ValueError("cos with 3 dimensions holds one row a token: q must be [B, S, H, D] and positions None")
    batch, length, _, dim = q.shape
    if cos.shape[0] not in (1, batch) or cos.shape[1:] != (length, dim) or sin.shape != cos.shape:
        raise ValueError(
            f"cos is {_checks.shape(cos)} and sin {_checks.shape(sin)};"
            f" with q {_checks.shape(q)} they must be [{batch}, {length}, {dim}]"
        )
    rows = torch.arange(cos.shape[0] * length, device=q.device).view(cos.shape[0], length).expand(batch, length)
    cos, sin = (t[..., : dim // 2].reshape(-1, dim // 2) for t in (cos, sin))
    return cos, sin, rows.contiguous()


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs of each query and key by the angles of its position (Su et al. 2021, eq. 34).

    Args:
        q: `[B, S, H, D]` or packed `[T, H, D]`, D even.
        k: the same with Hkv heads.
        cos, sin: `[P, D/2]`, from `rope_table`; or `[B, S, D]`, as a Hugging Face model hands them over (one row a
            token, the second half repeating the first).
        positions: `[B, S]` or `[T]`, int32 or int64; None for 0 … S−1 (T−1 when packed).
        interleaved: False pairs element i with i + D/2 (Hugging Face's weights), True pairs 2i with 2i + 1
            (Mistral's own weights).
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton".

    Returns:
        `(q, k)` rotated, contiguous, in their dtype: float32 arithmetic, one rounding. The gradient is the rotation
        by the negative angle; the tables have none.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes or devices do not fit; on a CPU also a position outside the tables. On a GPU that is not
            looked up before the launch, which would wait for the device: such a token's q and k become NaN.
        NotImplementedError: `impl` cannot run here.
    """
    if impl is None and not is_dynamo_compiling() and getattr(cos, "ndim", 0) == 2:
        done = _rope.at_once(q, k, cos, sin, positions, interleaved, False)
        if done is not None:
            return done  # type: ignore[no-any-return]
    interleaved = _checks.flag("interleaved", interleaved)
    _checks.floating(q=q, k=k, cos=cos, sin=sin)
    if positions is not None:
        _checks.integral(q.device, POSITION_DTYPES, positions=positions)
    _check(q, k, positions)
    if cos.dim() == 3:
        cos, sin, positions = _tables_of_tokens(q, cos, sin, positions)
    check_tables(cos, sin, q.shape[-1])
    if positions is None and q.shape[-3] > cos.shape[0]:
        raise ValueError(f"q has {q.shape[-3]} positions, but the cos/sin tables hold {cos.shape[0]}")
    if positions is not None and impl != "reference":
        reference.check_positions(positions, cos.shape[0])
    table = _checks.accumulate_dtype(q.dtype)
    q, k = _checks.promote(q, k)
    cos, sin = _checks.as_dtype(cos, table).contiguous(), _checks.as_dtype(sin, table).contiguous()
    return _rope(impl, q, k, cos, sin, positions, interleaved, False)
