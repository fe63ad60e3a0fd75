"""The mask that a Hugging Face model makes for `attn_implementation="mistral_kernels"`.

The kernels take a window and lengths, not a matrix. What a model hands from its mask to its attention is one tensor of
four dimensions, so the little that the kernels need travels as an int32 tensor whose last size is the window plus one
(1 for none; stride 0, nothing is stored for it):

    None                  causal; the last query stands at the last key
    [B, 1, 0, W + 1]      the same with a window
    [B, 1, 1, W + 1]      lengths: each row's keys written so far in a cache of fixed size
    [B, 2, 1, W + 1]      spans: the first token of each row and the one behind the last; padding around them
    [1, 1, n + 1, W + 1]  cu_seqlens: n sequences packed into the rows
    bool [B, 1, S, Sk]    anything else: the whole mask, for torch's own attention
"""

from typing import Any, NamedTuple

import torch
from transformers import masking_utils


class RingLength(int):
    """The number of keys in a ring, which lie in slot order: position p in slot `p % slots`."""


class Encoded(NamedTuple):
    """What a mask says. Of lengths, spans and cu_seqlens at most one is set."""

    window: int | None
    lengths: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


def _encode(data: torch.Tensor, window: int) -> torch.Tensor:
    return data.to(torch.int32)[..., None].expand(*data.shape, window + 1)


def decode(mask: torch.Tensor) -> Encoded:
    window = mask.shape[3] - 1 or None
    if mask.shape[1] == 2:
        return Encoded(window, spans=mask[:, :, 0, 0])
    if mask.shape[2] == 0:
        return Encoded(window)
    if mask.shape[2] == 1:
        return Encoded(window, lengths=mask[:, 0, 0, 0].contiguous())
    return Encoded(window, cu_seqlens=mask[0, 0, :, 0].contiguous())


def is_encoded(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def _free(function: Any) -> dict[str, Any]:
    """The variables that a closure captured, by name."""
    cells = function.__closure__ or ()
    return {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells, strict=True)}


_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAP = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # since transformers 5.23
_REMAPPED = None if _REMAP is None else _REMAP(masking_utils.causal_mask_function, torch.zeros(1, 1)).__code__


def read(function: Any) -> tuple[int, torch.Tensor | None] | None:
    """(window or 0, sequence of each token or None) of a mask function that transformers made; None for any other."""
    if function is masking_utils.causal_mask_function:
        return 0, None
    if getattr(function, "__code__", None) is not _AND:
        return None
    parts = _free(function).get("mask_functions", ())
    codes = [getattr(part, "__code__", None) for part in parts]
    if len(parts) != 2:
        return None
    if codes[0] is _WINDOW and parts[1] is masking_utils.causal_mask_function:
        window = _free(parts[0]).get("sliding_window")
        return None if not isinstance(window, int) or window < 1 else (window, None)
    if codes[0] is _PACKED and codes[1] is not None and codes[1] is _REMAPPED:
        return _packed(_free(parts[1]).get("mask_function"), parts[0])
    return _packed(*parts) if codes[1] is _PACKED else None


def _packed(within: Any, packed: Any) -> tuple[int, torch.Tensor | None] | None:
    inner, ids = read(within), _free(packed).get("packed_sequence_mask")
    return None if inner is None or inner[1] is not None or ids is None else (inner[0], ids)


def _pattern(function: Any, plain: bool, kwargs: dict[str, Any]) -> tuple[int, torch.Tensor | None] | None:
    """`read`, or what the other arguments tell while torch.compile traces, which cannot look into closures."""
    if not torch.compiler.is_compiling():
        return read(function)
    local = kwargs.get("local_size")
    if not plain or getattr(kwargs.get("config"), "attention_chunk_size", None) is not None:
        return None
    if local is None:
        return (0, None) if function is masking_utils.causal_mask_function else None
    return local, None


def _cu_seqlens(ids: torch.Tensor) -> torch.Tensor:
    """Where each run of one id starts, over the rows laid end to end, and the number of tokens."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    edges = starts.reshape(-1).nonzero()[:, 0]
    return torch.cat([edges, edges.new_tensor([ids.numel()])])


def _spans(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and one past the last token of each row, `[B, 2]`, and whether no row has a hole between them."""
    steps = torch.arange(padding.shape[1], device=padding.device)
    end = torch.where(padding, steps + 1, 0).amax(-1)
    start = torch.where(padding, steps, padding.shape[1]).amin(-1).minimum(end)
    return torch.stack([start, end], -1), (padding.sum(-1) == end - start).all()


def _ring_order(padding: torch.Tensor, limit: int, slots: int, device: torch.device) -> torch.Tensor:
    """bool `[B, 1, 1, slots]`: which slots of a ring hold a token, after `limit` positions were written."""
    steps = torch.arange(slots, device=device)
    positions = limit - 1 - (limit - 1 - steps) % slots
    known = padding[:, positions.clamp(0, padding.shape[1] - 1)]
    return (known & (positions >= 0))[:, None, None]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """As `transformers.masking_utils.sdpa_mask`, in the form that this module describes.

    Padding at the ends of the rows and packed sequences go to the kernels as lengths. Where padding has holes, or a
    model asks for another pattern, the whole mask is returned, and torch's attention runs.
    """
    known = None if use_vmap else _pattern(mask_function, allow_is_causal_skip, kwargs)
    geometry = dict(batch_size=batch_size, q_length=q_length, kv_length=int(kv_length), device=device)
    limit = q_offset + q_length - kv_offset

    def whole() -> Any:
        if isinstance(kv_length, RingLength) and attention_mask is not None:
            return _ring_order(attention_mask, int(q_offset) + q_length, int(kv_length), device)
        return masking_utils.sdpa_mask(
            **geometry,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            **{name: value for name, value in kwargs.items() if name not in ("allow_is_bidirectional_skip",)},
        )

    if known is None or (not allow_is_causal_skip and known[1] is None and q_length > 1):
        return whole()
    window, ids = known
    if ids is not None:
        return _encode(_cu_seqlens(ids)[None, None], window)
    aligned = not isinstance(limit, torch.Tensor) and limit == kv_length
    if attention_mask is not None:
        padding: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        return _padded(padding, window, limit, aligned, whole, isinstance(kv_length, RingLength))
    if aligned:
        return _encode(torch.empty(batch_size, 1, 0, device=device), window) if window else None
    return _encode(torch.as_tensor(limit, device=device).expand(batch_size, 1, 1), window)


def _padded(
    padding: torch.Tensor, window: int, limit: Any, aligned: bool, whole: Any, ring: bool
) -> torch.Tensor | None:
    batch, length = padding.shape
    if torch.compiler.is_compiling():
        if not aligned:
            return whole()
        spans, whole_rows = _spans(padding)
        torch._assert_async(whole_rows, "attention_mask has holes within a row; compiled models take it at the ends")
        return _encode(spans[:, :, None], window)
    if not aligned:
        written = torch.arange(length, device=padding.device) < limit
        if (padding | ~written).all():
            return _encode(torch.as_tensor(limit, device=padding.device).expand(batch, 1, 1), window)
        return whole()
    if padding.all():
        return _encode(torch.empty(batch, 1, 0, device=padding.device), window) if window else None
    if ring:
        return whole()
    spans, whole_rows = _spans(padding)
    return _encode(spans[:, :, None], window) if whole_rows else whole()


def full(mask: torch.Tensor | None, queries: int, keys: int, window: int | None, device: Any) -> torch.Tensor:
    """The encoded mask as a bool one, `[B or 1, 1, queries, keys]`."""
    encoded = Encoded(window) if mask is None else decode(mask)
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)[None]
    if encoded.lengths is not None:
        i = i[None] - (keys - encoded.lengths[:, None, None])
    i = i if i.dim() == 3 else i[None]
    seen = j <= i
    if encoded.window is not None:
        seen = seen & (j > i - encoded.window)
    if encoded.spans is not None:
        start, end = (edge[:, None, None] for edge in encoded.spans.unbind(1))
        seen = seen & (j >= start) & (j < end)
    if encoded.cu_seqlens is not None:
        tokens = torch.arange(int(encoded.cu_seqlens[-1]), device=device)
        ids = torch.bucketize(tokens, encoded.cu_seqlens[1:], right=True).view(-1, keys)
        seen = seen & (ids[:, :, None] == ids[:, None, :])
    return seen[:, None]
