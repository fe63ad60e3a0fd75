"""Sliding-window grouped-query attention, dense and packed."""

import functools
import itertools

import torch
from torch.compiler import is_dynamo_compiling

from .. import _checks
from .._dispatch import Op
from . import reference

MAX_TRITON_HEAD_DIM = 256
MAX_CUDA_HEAD_DIM = 256
SHORT_QUERIES = 2048
MOST_KEYS = 2**30  # no sequence is longer; kernels add a window to positions in int32


def _fake(q, k, v, window, scale, causal, cu_q, cu_k, max_q, max_k):
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=_checks.accumulate_dtype(q.dtype))


def _triton_supports(q, *_):
    if q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"the head dimension is {q.shape[-1]}, over {MAX_TRITON_HEAD_DIM}"
    return None


def cuda_supports(q, *_):
    """Why CUDA C++ cannot attend with queries like q, or None."""
    dim = q.shape[-1]
    if dim > MAX_CUDA_HEAD_DIM or dim % 8:
        return f"the head dimension is {dim}; it must be a multiple of 8 up to {MAX_CUDA_HEAD_DIM}"
    return None


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def hopper_first(q: torch.Tensor, max_q: int) -> bool:
    """Whether CUDA C++, which has kernels of its own for compute capability 9.0, is faster than Triton (docs/gpu.md):
    for wide heads, and for short sequences by its shorter launch."""
    return q.dtype != torch.float32 and (q.shape[-1] > 64 or max_q <= SHORT_QUERIES) and _is_hopper(q.device)


def _gradients_by_hopper(q: torch.Tensor, max_q: int) -> bool:
    """The same of the gradients: narrow heads gain up to twice the length (docs/gpu.md)."""
    longest = 2 * SHORT_QUERIES if q.shape[-1] <= 64 else SHORT_QUERIES
    return q.shape[-1] <= 128 and max_q <= longest and hopper_first(q, 0)


_LENGTHS = "int window, float scale, bool causal, Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k"
_backward = Op(
    "attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_LENGTHS}) -> (Tensor, Tensor, Tensor)",
    eager=reference.attention_backward,
    fake=lambda dout, dlse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    cuda=True,
    cuda_first=lambda dout, dlse, q, *rest: _gradients_by_hopper(q, rest[-2]),
    cuda_supports=lambda dout, dlse, q, *_: cuda_supports(q),
    triton="attention.triton_backward_launch:attention_backward",
    triton_supports=_triton_supports,
)


def _save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.scale, ctx.causal, cu_q, cu_k, ctx.max_q, ctx.max_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _gradients(ctx, dout, dlse):
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    lengths = (ctx.window, ctx.scale, ctx.causal, cu_q, cu_k, ctx.max_q, ctx.max_k)
    return *_backward.like_forward(ctx.impl, dout, dlse, q, k, v, out, lse, *lengths), *(None,) * 7


_attention = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_LENGTHS}) -> (Tensor, Tensor)",
    eager=reference.attention,
    fake=_fake,
    triton="attention.triton_forward:attention",
    triton_supports=_triton_supports,
    cuda=True,
    cuda_first=lambda q, *rest: hopper_first(q, rest[-2]),
    cuda_supports=cuda_supports,
    flash="attention",
    casts=True,
    setup_context=_save,
    backward=_gradients,
)


def check_window(window: int | None) -> int:
    """The window as the ops take it: 0 for none."""
    if window is None:
        return 0
    if type(window) is int and 0 < window <= MOST_KEYS:
        return window
    width = _checks.integer(window)
    if width is None or width < 1:
        raise ValueError(f"window is {window!r}; it must be None or an int of at least 1 (keys seen, itself included)")
    return min(width, MOST_KEYS)


def check_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else _checks.number("scale", scale, finite=True)


def longest_of(cu: torch.Tensor) -> int:
    """The longest of the packed sequences. By numbers of Python: torch's ops take longer than a batch is long."""
    return max((b - a for a, b in itertools.pairwise(cu.tolist())), default=0)


def check_longest(name: str, given: int | None, cu: torch.Tensor, tokens: int) -> int:
    """The longest packed sequence: as given, or all tokens. Below the longest, kernels would leave rows out; on a GPU,
    where lengths are not read, only what no lengths allow is an error."""
    looks = _checks.may_look(cu)
    if given is None or (looks and type(given) is int and given >= tokens):
        return tokens
    longest, sequences = _checks.integer(given), max(cu.numel() - 1, 1)
    if isinstance(given, torch.Tensor) and given.numel() == 1 and not given.is_floating_point():
        longest = int(given)
    least = longest_of(cu) if cu.numel() > 1 and looks else -(-tokens // sequences)
    if longest is None or longest < least:
        raise ValueError(f"{name} is {given!r}; it must be an int, and a sequence of {least} tokens is there")
    return torch.sym_min(longest, tokens)


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_name: str = "k", v_name: str = "v") -> None:
    """k and v agree, and q's heads are a multiple of theirs."""
    shape, k_shape = q.shape, k.shape
    if v.shape != k_shape:
        raise ValueError(f"{v_name} is {_checks.shape(v)} but {k_name} is {_checks.shape(k)}; they must be equal")
    heads, kv_heads = shape[-2], k_shape[-2]
    if shape[-1] < 1:
        raise ValueError(f"q is {_checks.shape(q)}; its last dimension, the head's, must be at least 1")
    if shape[-1] != k_shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} and {k_name} {k.shape[-1]}; they must be equal")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and {k_name} {kv_heads}; q's must be a multiple of {k_name}'s")


def _check_dense(q: torch.Tensor, k: torch.Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q is {_checks.shape(q)} and k {_checks.shape(k)}; without cu_seqlens they must be [B, S, H, D]"
            " and [B, Sk, Hkv, D]"
        )


def check_cu_seqlens(name: str, cu: torch.Tensor, tokens: int, sequences: int | None = None) -> None:
    """`[sequences + 1]`, from 0 to `tokens`, never falling. Values are read on a CPU only, and not while tracing."""
    if cu.dim() != 1 or cu.numel() < 1 or sequences not in (None, cu.numel() - 1):
        needed = "sequences + 1" if sequences is None else sequences + 1
        raise ValueError(f"{name} is {_checks.shape(cu)}; it must be [{needed}]")
    if not _checks.may_look(cu):
        return
    ends = cu.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{name} is {ends}; it must start at 0, never fall and end at the {tokens} packed tokens")


def _check_packed(q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"q is {_checks.shape(q)} and k {_checks.shape(k)}; with cu_seqlens they must be [T, H, D] and [Tk, Hkv, D]"
        )
    _checks.integral(q.device, (torch.int32,), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0])
    check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], cu_q.numel() - 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    *,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by FlashAttention-2 (Dao 2023, algorithm 1) with grouped heads and a sliding window.

    Query head h reads the keys of head `h // (H / Hkv)`; keys and values are never repeated in memory. With a
    window, the query at position i sees the keys j with `i − window < j <= i`: `window` keys, itself included, the
    meaning in Hugging Face 5, mistral-inference, vLLM and llama.cpp (flash-attn's `(window − 1, 0)`). With more
    keys than queries the last query is aligned with the last key. Two queries, five keys, window 3:

        0 1 1 1 0
        0 0 1 1 1

    Args:
        q: `[B, S, H, D]`, or packed `[T, H, D]` with cu_seqlens. Any D; multiples of 8 up to 256 are fast.
        k, v: `[B, Sk, Hkv, D]` or `[Tk, Hkv, D]`; H a multiple of Hkv.
        window: None, or the number of visible keys, at least 1.
        scale: of the scores; None for `D ** -0.5`.
        causal: False lets every query see every key, and takes no window.
        cu_seqlens_q: `[sequences + 1]` int32, where each packed sequence starts, and T; empty sequences are legal.
        cu_seqlens_k: the same for k and v; None for the queries' own.
        max_seqlen_q, max_seqlen_k: the longest packed sequence, if known: spares GPU kernels empty blocks. On a GPU,
            where lengths are not looked up, a number that is too small leaves rows of the result unwritten.
        return_lse: also return the log of the softmax's denominator.
        impl: None for the fastest that can, or "reference", "cpu", "cuda", "triton", "flash_attn" (its lse has no
            gradient).

    Under autocast q, k and v are cast as by `F.scaled_dot_product_attention`.

    Returns:
        out like q, contiguous; with `return_lse` also lse, float32 `[B, H, S]` or `[H, T]`, natural logarithm. A
        query that sees no key gives 0, lse −inf and zero gradients. Scores and softmax are in float32, the
        probabilities are rounded to the dtype before the product with v, the output is rounded once.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, devices, window, scale, cu_seqlens or max_seqlen do not fit.
        NotImplementedError: `impl` cannot run here.
    """
    width = check_window(window)
    if impl is None and not is_dynamo_compiling() and (cu_seqlens_q is None or max_seqlen_q is max_seqlen_k is None):
        cu = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        run = _attention.at_once if return_lse else _attention.first_at_once
        done = run(q, k, v, width, scale, causal, cu_seqlens_q, cu, 0, 0)
        if done is not None:
            return done  # type: ignore[no-any-return]
    _checks.floating(q=q, k=k, v=v)
    causal = _checks.flag("causal", causal)
    if width and not causal:
        raise ValueError(f"window is {window} with causal=False; a window needs causal=True")
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is given without cu_seqlens_q; packed attention needs cu_seqlens_q")
    if cu_seqlens_q is None:
        _check_dense(q, k)
        max_q, max_k = q.shape[1], k.shape[1]
    else:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k)
        max_q = check_longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
        max_k = check_longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    check_heads(q, k, v)
    scale = check_scale(scale, q.shape[-1])
    q, k, v = _checks.promote(*_checks.autocast(q, k, v))
    out, lse = _attention(impl, q, k, v, width, scale, causal, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    return (out, lse) if return_lse else out
