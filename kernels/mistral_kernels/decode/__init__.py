"""All layers of a decode step in one call: no Python between the kernels."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import _checks
from .._dispatch import Op
from ..attention import check_longest, check_window
from ..quant_linear import QuantizedWeight
from ..ring_cache import check_history
from ..ring_cache.int8 import check_scales
from ..rope import POSITION_DTYPES, check_tables
from ..rope.reference import check_positions
from . import reference

WEIGHTS = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
LINEARS = tuple(i for i, name in enumerate(WEIGHTS) if name.startswith("w"))

_decode_layers = Op(
    "decode_layers(Tensor x, Tensor[] weights, Tensor[] scales, int[] formats, Tensor[] biases,"
    " Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!)[] k_scales, Tensor(d!)[] v_scales, Tensor positions,"
    " Tensor cos, Tensor sin, Tensor? cu, Tensor seq_lens, int window, float scale, float eps, bool interleaved,"
    " SymInt max_q) -> (Tensor, Tensor)",
    eager=reference.decode_layers,
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)


def _check_layers(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    codes: bool,
) -> None:
    layers = len(k_caches)
    if not layers or len(v_caches) != layers:
        raise ValueError(f"there are {layers} k_caches and {len(v_caches)} v_caches; there must be one of each a layer")
    if len(weights) != len(WEIGHTS) * layers:
        raise ValueError(f"there are {len(weights)} weights for {layers} layers; each takes {', '.join(WEIGHTS)}")
    if len(biases) not in (0, 3 * layers):
        raise ValueError(f"there are {len(biases)} biases for {layers} layers; each takes 3, of wq, wk and wv, or none")
    if x.dim() != 2:
        raise ValueError(f"x is {_checks.shape(x)}; it must be [T, N]")
    for i, w in enumerate(weights):
        if isinstance(w, QuantizedWeight) and i % len(WEIGHTS) not in LINEARS:
            raise TypeError(f"weights[{i}] is quantised, but {WEIGHTS[i % len(WEIGHTS)]} must be a tensor")
    norm: Any = weights[0]
    if norm.dtype != x.dtype:
        raise TypeError(f"weights[0] is {norm.dtype} but x is {x.dtype}; they must be equal")
    for name, t in (("k_caches[0]", k_caches[0]), ("v_caches[0]", v_caches[0])):
        if t.dtype != (torch.int8 if codes else x.dtype):
            why = "k_scales and v_scales are given; it must be int8" if codes else f"x is {x.dtype}; they must be equal"
            raise TypeError(f"{name} is {t.dtype} but {why}")


def _check_scales(
    k_scales: Sequence[torch.Tensor],
    v_scales: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether the caches hold codes."""
    layers = len(k_caches)
    if (len(k_scales), len(v_scales)) not in ((0, 0), (layers, layers)):
        raise ValueError(
            f"there are {len(k_scales)} k_scales and {len(v_scales)} v_scales for {layers} layers; int8 caches have one"
            " of each a layer, others none"
        )
    for k_scale, v_scale, k_cache in zip(k_scales, v_scales, k_caches, strict=False):
        check_scales(k_scale, v_scale, k_cache, dtype)
    return bool(k_scales)


def _taken_apart(
    weights: Sequence[torch.Tensor | QuantizedWeight], x: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """The weights with codes for those that are quantised, the scales and offsets, empty where there are none, and the
    scheme and group of each linear layer; the last two empty where none is quantised."""
    if not any(isinstance(w, QuantizedWeight) for w in weights):
        return list(weights), [], []  # type: ignore[arg-type]
    tensors: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    formats: list[int] = []
    none = x.new_empty(0)
    for i, w in enumerate(weights):
        if isinstance(w, QuantizedWeight):
            tensors.append(w.codes)
            scales += (w.scale, none if w.offset is None else w.offset)
            formats += (reference.SCHEMES.index(w.scheme), w.group)
        else:
            tensors.append(w)
            if i % len(WEIGHTS) in LINEARS:
                scales += (none, none)
                formats += (0, 0)
    return tensors, scales, formats


def decode_layers(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int | None = None,
    eps: float = 1e-5,
    biases: Sequence[torch.Tensor] = (),
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    *,
    k_scales: Sequence[torch.Tensor] = (),
    v_scales: Sequence[torch.Tensor] = (),
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What all layers of a Mistral-shaped decoder do to new tokens that are written to the ring cache first.

    The same ops in the same order as one by one, `rms_norm` or `add_rms_norm`, `linear`, `rope_write_kv`,
    `attention_cached`, `swiglu`, with the same results; on a CPU they follow each other in C++.

    Args:
        x: `[T, N]`, the tokens' embeddings, of the weights' dtype.
        weights: of each layer attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2 and w3, the layers one after the other;
            the linear ones may be `QuantizedWeight`s, and run as in `linear_quantized`.
        k_caches, v_caches: one `[B, slots, Hkv, D]` a layer; written in place.
        positions, cos, sin, cu_seqlens, interleaved: as in `rope_write_kv`, for packed tokens `[T]`.
        seq_lens: `[B]` int32, the tokens of each sequence with the new ones, as in `attention_cached`.
        window, max_seqlen: as in `attention_cached`.
        eps: of the norms.
        biases: of each layer those of wq, wk and wv; empty where there are none.
        k_scales, v_scales: one `[B, slots, Hkv]` a layer beside int8 caches, as in `rope_write_kv`; written in place.
        impl: None for the fastest that can, or "reference", "cpu".

    Returns:
        `(delta, residual)`, each `[T, N]`, whose sum leaves the last layer.

    Raises:
        TypeError, ValueError: an argument that does not fit, as in the ops.
        RuntimeError: from the C++ op, a weight or a cache whose shape does not fit the others.
        NotImplementedError: `impl` cannot run here, or a derivative is asked for.
    """
    _checks.floating(x=x, cos=cos, sin=sin)
    codes = _check_scales(k_scales, v_scales, k_caches, x.dtype)
    _check_layers(x, weights, biases, k_caches, v_caches, codes)
    width, (batch, slots, _, dim) = check_window(window), k_caches[0].shape
    _checks.integral(x.device, POSITION_DTYPES, positions=positions)
    _checks.integral(x.device, (torch.int32,), seq_lens=seq_lens, **_checks.given(cu_seqlens=cu_seqlens))
    if positions.shape != x.shape[:1] or seq_lens.shape != (batch,) or (cu_seqlens is None and batch != x.shape[0]):
        raise ValueError(
            f"x is {_checks.shape(x)}, positions {_checks.shape(positions)}, seq_lens {_checks.shape(seq_lens)}; they"
            f" must be [T, N], [T] and [{batch}], with T = {batch} without cu_seqlens"
        )
    plain = next((w for w in weights[1:] if isinstance(w, torch.Tensor)), None)
    _checks.no_gradient("decode_layers", x=x, weights=plain)
    check_tables(cos, sin, dim)
    check_positions(positions, cos.shape[0], idle=True)
    longest = 1 if cu_seqlens is None else check_longest("max_seqlen", max_seqlen, cu_seqlens, x.shape[0])
    check_history(seq_lens, slots, width, longest, False)
    table = _checks.accumulate_dtype(x.dtype)
    cos, sin = _checks.as_dtype(cos, table).contiguous(), _checks.as_dtype(sin, table).contiguous()
    eps, interleaved = _checks.number("eps", eps), _checks.flag("interleaved", interleaved)
    rings = (list(k_caches), list(v_caches), list(k_scales), list(v_scales))
    tensors = (list(biases), *rings, positions, cos, sin, cu_seqlens)
    return _decode_layers(
        impl, x, *_taken_apart(weights, x), *tensors, seq_lens, width, dim**-0.5, eps, interleaved, longest
    )
