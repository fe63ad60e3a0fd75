"""Input makers, float64 truth and error budgets, shared by the tests, the benchmarks and `verify`.

The rule: with truth = the eager op on float64 inputs and eager = the eager op in the tested dtype, a result passes
where both hold:

    max|out − truth| <= 2 · max|eager − truth| + ulp
    rms(out − truth) <= 1.1 · rms(eager − truth) + ulp / 4

with ulp the spacing of the dtype at the largest |truth| (in the first) and at the RMS of truth (in the second, where it
lets results through that are exact in eager and less than one rounding off). The elements of a row share the rounding
of one reduction, so the RMS over a few rows is a draw and no measurement: the second inequality is asked of outputs
with at least 16 rows, and of all the outputs of several calls together (`pooled`).
"""

import ctypes
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import mistral_kernels
from mistral_kernels.quant_linear import quantize_weight
from mistral_kernels.ring_cache.int8 import quantise

from ._isa import isa as isa
from ._isa import isa_tiers as isa_tiers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "ramp", "one_hot", "large")
MUTATED = ("k_cache", "v_cache")
FROZEN = ("cos", "sin", "scale", "offset")  # without a gradient
FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far one output is from the truth, and how far eager is; `scale` is the RMS of the truth."""

    output: str
    max_error: float
    max_eager: float
    rms_error: float
    rms_eager: float
    max_budget: float
    rms_budget: float
    rows: int
    scale: float

    @property
    def max_ratio(self) -> float:
        """The largest error as a share of its budget: at most 1 passes; nan never does."""
        return _share(self.max_error, self.max_budget)

    @property
    def ratio(self) -> float:
        """The larger of both errors' shares of their budgets; with few rows that of the largest error."""
        if math.isnan(self.max_ratio) or self.rows < FEW_ROWS:
            return self.max_ratio
        return max(self.max_ratio, _share(self.rms_error, self.rms_budget))

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def pooled(errors: Iterable[Errors]) -> float:
    """The RMS error over several outputs as a share of the RMS budget over them, each relative to its truth."""
    error = budget = 0.0
    for e in errors:
        weight = e.rows / e.scale**2 if e.scale > 0 else 0.0
        error += weight * e.rms_error**2
        budget += weight * e.rms_budget**2
    return _share(math.sqrt(error), math.sqrt(budget))


def pooled_max(errors: Iterable[Errors]) -> float:
    """The largest share of its budget that an output's largest error takes; nan where one is.

    Outputs of few rows are judged together, each relative to its truth: in a row alone the eager op may happen to
    round exactly, and leave nothing to compare with.
    """
    shares, error, budget = [], 0.0, 0.0
    for e in errors:
        if e.rows >= FEW_ROWS or not e.scale > 0:
            shares.append(e.max_ratio)
        else:
            error, budget = max(error, e.max_error / e.scale), max(budget, e.max_budget / e.scale)
    if budget:
        shares.append(_share(error, budget))
    return math.nan if any(math.isnan(s) for s in shares) else max(shares, default=0.0)


def _share(error: float, budget: float) -> float:
    return error / budget if budget > 0 else (0.0 if error == 0 else math.inf if error > 0 else math.nan)


def _ulp(dtype: torch.dtype, magnitude: float) -> float:
    info = torch.finfo(dtype)
    return max(info.eps * 2.0 ** math.floor(math.log2(magnitude)), info.tiny) if magnitude > 0 else info.tiny


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def compare(name: str, out: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Errors:
    """The errors of `out` and of `eager` against `truth`, all of one shape; out and eager of one dtype."""
    if out.shape != truth.shape or out.dtype != eager.dtype:
        raise AssertionError(f"{name} is {out.shape} {out.dtype}; the eager op gives {eager.shape} {eager.dtype}")
    o, e, t = (x.detach().double().cpu() for x in (out, eager, truth))
    rows = t.numel() // t.shape[-1] if t.dim() and t.shape[-1] else 0
    finite = t.isfinite()
    if not torch.equal(torch.where(finite, 0.0, t).nan_to_num(), torch.where(finite, 0.0, o).nan_to_num()):
        return Errors(name, *(math.nan,) * 6, rows, math.nan)
    o, e, t = o[finite], e[finite], t[finite]
    largest = t.abs().max().item() if t.numel() else 0.0
    max_error = (o - t).abs().max().item() if t.numel() else 0.0
    max_eager = (e - t).abs().max().item() if t.numel() else 0.0
    rms_error, rms_eager = _rms(o - t), _rms(e - t)
    max_budget = 2 * max_eager + _ulp(out.dtype, largest)
    rms_budget = 1.1 * rms_eager + _ulp(out.dtype, _rms(t)) / 4
    return Errors(name, max_error, max_eager, rms_error, rms_eager, max_budget, rms_budget, rows, _rms(t))


def fill(shape: tuple[int, ...], kind: str = "gaussian", seed: int = 0) -> torch.Tensor:
    """A float64 tensor of one kind of values; structured ones show indexing faults that Gaussian ones hide.

    Args:
        shape: of the tensor.
        kind: "gaussian"; "ramp", values rising through memory within [−1, 1]; "one_hot", a single 1 in each last
            dimension, elsewhere 0; "large", Gaussian with a deviation of 30.
        seed: of the generator.
    """
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    if kind == "ramp":
        return torch.linspace(-1, 1, max(count, 1), dtype=torch.float64)[:count].roll(seed).view(shape)
    if kind == "one_hot":
        out = torch.zeros(shape, dtype=torch.float64)
        if count:
            out.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1), generator=generator), 1.0)
        return out
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values * 30 if kind == "large" else values


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one public op: its keyword arguments in float64 (integers as they are).

    `gradients` is False where the gradient is all cancellation, so that any two correct results differ widely.
    """

    op: str
    label: str
    make: Callable[[str], dict[str, Any]]
    gradients: bool = True

    def arguments(self, dtype: torch.dtype, device: str = "cpu", kind: str = "gaussian") -> dict[str, Any]:
        """The arguments in `dtype` (rope tables and scales in float32 unless it is float64), on `device`."""
        return {name: _convert(name, value, dtype, device) for name, value in self.make(kind).items()}


def _convert(name: str, value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    if name in (*FROZEN, "k_scale", "v_scale") and dtype != torch.float64:
        dtype = torch.float32
    return value.to(device=device, dtype=dtype)


def call(op: str, arguments: dict[str, Any], impl: str | None) -> dict[str, torch.Tensor]:
    """Runs the op on clones of what it may write; returns its outputs, and what it wrote, by name."""
    arguments = {n: v.clone() if n in MUTATED and isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    result = getattr(mistral_kernels, op)(**arguments, impl=impl)
    outputs = result if isinstance(result, tuple) else () if result is None else (result,)
    named = {f"out{i}": t for i, t in enumerate(outputs)}
    if "write" in op:
        named |= {n: arguments[n] for n in MUTATED}
    return named


def call_with_gradients(
    op: str, arguments: dict[str, Any], impl: str | None, of: tuple[str, ...] | None = None
) -> dict[str, torch.Tensor]:
    """Runs the op forward and backward from fixed Gaussian gradients of all outputs, or of those named in `of`.

    Returns:
        Outputs and gradients by name.
    """
    leaves = {
        n: v.detach().clone().requires_grad_()
        for n, v in arguments.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and n not in FROZEN
    }
    outputs = call(op, arguments | leaves, impl)
    seeds = {n: fill(tuple(t.shape), seed=7 + i).to(t) for i, (n, t) in enumerate(outputs.items()) if not of or n in of}
    gradients = torch.autograd.grad([outputs[n] for n in seeds], list(leaves.values()), list(seeds.values()))
    return outputs | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def errors(op: str, arguments: dict[str, Any], impl: str | None, gradients: bool = False) -> list[Errors]:
    """The errors of every output (and gradient) of one call under `impl`, against eager on the same values."""
    exact = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()
    }
    # flash-attn has no gradient of lse.
    of = ("out0",) if impl == "flash_attn" else None
    run = functools.partial(call_with_gradients, of=of) if gradients else call
    eager, truth = run(op, arguments, "reference"), run(op, exact, "reference")
    out = run(op, arguments, impl)
    return [compare(name, out[name], eager[name], truth[name]) for name in truth]


def parity(
    case: Case,
    dtype: torch.dtype,
    impl: str | None,
    device: str = "cpu",
    kind: str = "gaussian",
    gradients: bool = False,
) -> list[Errors]:
    """`errors` of a case's arguments, rounded to `dtype`."""
    return errors(case.op, case.arguments(dtype, device, kind), impl, gradients and case.gradients)


def assert_parity(case: Case, dtype: torch.dtype, impl: str | None, **how: Any) -> list[Errors]:
    """`parity`, raising AssertionError with the errors and budgets where one fails."""
    found = parity(case, dtype, impl, **how)
    failed = [e for e in found if not e.passed]
    assert not failed, f"{case.op} {case.label} {dtype} impl={impl} {how}: {failed}"
    return found


def at_an_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where an unreadable page begins: reading past its end takes the process down."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("mprotect refuses to close a page")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return copy.view(tensor.shape).copy_(tensor)


# ---- makers: one function an op, giving a Case ----


def norm_case(shape: tuple[int, ...], rounding: str = "model", eps: float = 1e-5) -> Case:
    def make(kind: str) -> dict[str, Any]:
        return dict(x=fill(shape, kind), weight=1 + 0.3 * fill(shape[-1:], seed=1), eps=eps, rounding=rounding)

    return Case("rms_norm", f"{list(shape)} {rounding}", make, gradients=shape[-1] > 1)


def add_norm_case(shape: tuple[int, ...], rounding: str = "model") -> Case:
    def make(kind: str) -> dict[str, Any]:
        return norm_case(shape, rounding).make(kind) | dict(residual=fill(shape, kind, seed=2))

    return Case("add_rms_norm", f"{list(shape)} {rounding}", make, gradients=shape[-1] > 1)


def swiglu_case(shape: tuple[int, ...]) -> Case:
    return Case("swiglu", str(list(shape)), lambda kind: dict(gate=fill(shape, kind), up=fill(shape, kind, seed=1)))


def swiglu_packed_case(shape: tuple[int, ...]) -> Case:
    return Case("swiglu_packed", str(list(shape)), lambda kind: dict(gate_up=fill(shape, kind)))


def linear_case(lead: tuple[int, ...], k: int, n: int, bias: bool = False) -> Case:
    def make(kind: str) -> dict[str, Any]:
        made = dict(x=fill((*lead, k), kind), weight=fill((n, k), seed=1))
        return made | (dict(bias=fill((n,), seed=2)) if bias else {})

    return Case("linear", f"{[*lead, k]} by {[n, k]}{' with bias' if bias else ''}", make)


def quantised_case(
    scheme: str,
    lead: tuple[int, ...],
    k: int,
    n: int,
    group: int | None = None,
    asymmetric: bool = False,
    bias: bool = False,
    size: float = 1.0,
) -> Case:
    """A linear layer on codes of a Gaussian weight of this size, of which the first row is zeros; `k` >= 1."""

    def make(kind: str) -> dict[str, Any]:
        weight = fill((n, k), seed=1) * size
        weight[:1] = 0
        q = quantize_weight(weight, scheme, group, asymmetric)
        made = dict(x=fill((*lead, k), kind), codes=q.codes, scale=q.scale.double(), group_size=q.group)
        if q.offset is not None:
            made["offset"] = q.offset.double()
        if scheme == "w8a8":
            made["activations"] = "int8"
        return made | (dict(bias=fill((n,), seed=2)) if bias else {})

    op = "linear_int8" if scheme == "w8a8" else f"linear_{scheme}"
    label = f"{scheme}{' asymmetric' if asymmetric else ''} {[*lead, k]} by {[n, k]} groups of {group}"
    return Case(op, label + (" with bias" if bias else ""), make)


def linear_cross_entropy_case(
    shape: tuple[int, ...],
    vocabulary: int,
    reduction: str = "mean",
    ignored: int = 0,
    chunk: int | None = None,
    num_items: int | None = None,
) -> Case:
    """shape: of hidden; every `ignored`-th label is ignored."""

    def make(kind: str) -> dict[str, Any]:
        labels = torch.randint(vocabulary, shape[:-1], generator=torch.Generator().manual_seed(3))
        if ignored:
            labels.view(-1)[::ignored] = -100
        made = dict(hidden=fill(shape, kind), weight=fill((vocabulary, shape[-1]), seed=1) * shape[-1] ** -0.5)
        return made | dict(labels=labels, reduction=reduction, chunk=chunk, num_items=num_items)

    return Case("linear_cross_entropy", f"{list(shape)} V{vocabulary} {reduction} chunk {chunk}", make)


def _tables(dim: int, rows: int) -> dict[str, torch.Tensor]:
    cos, sin = mistral_kernels.rope_table(dim, 10_000.0, rows, dtype=torch.float64)
    return dict(cos=cos.float().double(), sin=sin.float().double())


def rope_case(
    batch: int | None, length: int, heads: int, kv_heads: int, dim: int, interleaved: bool = False, first: int = 0
) -> Case:
    """batch None: packed. `first` shifts the positions; 0 leaves them to the default."""

    def make(kind: str) -> dict[str, Any]:
        lead = (length,) if batch is None else (batch, length)
        made: dict[str, Any] = dict(q=fill((*lead, heads, dim), kind), k=fill((*lead, kv_heads, dim), kind, seed=1))
        made |= _tables(dim, first + length + 1) | dict(interleaved=interleaved)
        if first:
            made["positions"] = torch.arange(first, first + length).expand(lead).contiguous()
        return made

    return Case("rope", f"{batch}x{length} {heads}/{kv_heads} D{dim} interleaved={interleaved} from {first}", make)


def attention_case(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = True,
) -> Case:
    def make(kind: str) -> dict[str, Any]:
        q = fill((batch, queries, heads, dim), kind)
        k, v = (fill((batch, keys, kv_heads, dim), kind, seed=s) for s in (1, 2))
        return dict(q=q, k=k, v=v, window=window, causal=causal, return_lse=return_lse)

    return Case("attention", f"{batch}x{queries}/{keys} {heads}/{kv_heads} D{dim} W{window} causal={causal}", make)


def packed_attention_case(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, window: int | None = None
) -> Case:
    """lengths: (queries, keys) of each sequence."""

    def make(kind: str) -> dict[str, Any]:
        ends = [[0], [0]]
        for pair in lengths:
            for end, n in zip(ends, pair, strict=True):
                end.append(end[-1] + n)
        cu_q, cu_k = (torch.tensor(e, dtype=torch.int32) for e in ends)
        q = fill((ends[0][-1], heads, dim), kind)
        k, v = (fill((ends[1][-1], kv_heads, dim), kind, seed=s) for s in (1, 2))
        return dict(q=q, k=k, v=v, window=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)

    return Case("attention", f"packed {lengths} {heads}/{kv_heads} D{dim} W{window}", make)


def _ring(
    lengths: list[int], before: list[int], slots: int, heads: int, kv_heads: int, dim: int, kind: str
) -> dict[str, Any]:
    """Packed chunks of `lengths` tokens behind `before` tokens that full rings already hold."""
    tokens, shape = sum(lengths), (len(lengths), slots, kv_heads, dim)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    k, v = (fill((tokens, kv_heads, dim), kind, seed=s) for s in (1, 2))
    caches = dict(k_cache=fill(shape, kind, seed=3), v_cache=fill(shape, kind, seed=4))
    steps = [torch.arange(b, b + n) for b, n in zip(before, lengths, strict=True)]
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *steps])
    return dict(q=fill((tokens, heads, dim), kind), k=k, v=v, positions=positions, cu_seqlens=ends) | caches


def rope_write_case(
    lengths: list[int],
    before: list[int],
    slots: int,
    heads: int,
    kv_heads: int,
    dim: int,
    interleaved: bool = False,
) -> Case:
    def make(kind: str) -> dict[str, Any]:
        made = _ring(lengths, before, slots, heads, kv_heads, dim, kind)
        rows = max((b + n for b, n in zip(before, lengths, strict=True)), default=0) + 1
        return made | _tables(dim, rows) | dict(interleaved=interleaved)

    return Case("rope_write_kv", f"{lengths} after {before} slots {slots} {heads}/{kv_heads} D{dim}", make)


def write_case(lengths: list[int], before: list[int], slots: int, kv_heads: int, dim: int) -> Case:
    def make(kind: str) -> dict[str, Any]:
        made = _ring(lengths, before, slots, kv_heads, kv_heads, dim, kind)
        return {n: made[n] for n in ("k", "v", "k_cache", "v_cache", "positions", "cu_seqlens")}

    return Case("write_kv", f"{lengths} after {before} slots {slots} {kv_heads} D{dim}", make)


def cached_case(
    lengths: list[int],
    before: list[int],
    slots: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None = None,
    chunk: bool = True,
    codes: bool = False,
) -> Case:
    """chunk: attend over [ring | chunk]; else over the ring alone, which already holds the queries' own tokens. codes:
    the rings are int8."""

    def make(kind: str) -> dict[str, Any]:
        ring = _ring(lengths, before, slots, heads, kv_heads, dim, kind)
        made = {n: ring[n] for n in ("q", "k_cache", "v_cache", "cu_seqlens")} | dict(window=window)
        made["seq_lens"] = torch.tensor(before, dtype=torch.int32)
        if codes:
            for name, scale in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
                made[name], scales = quantise(made[name])
                made[scale] = scales.float().double()
        made["max_seqlen"] = max(lengths)  # on a GPU nobody looks it up, and the bound taken instead needs more slots
        return made | (dict(k_new=ring["k"], v_new=ring["v"]) if chunk else {})

    where = ("int8 " if codes else "") + ("ring+chunk" if chunk else "ring")
    return Case(
        "attention_cached", f"{where} {lengths} after {before} slots {slots} {heads}/{kv_heads} D{dim} W{window}", make
    )


def _quantised_cases() -> Iterator[Case]:
    for lead, k, n in (((1,), 576, 192), ((2, 3), 1000, 33), ((16,), 64, 9), ((40,), 96, 50), ((1,), 5000, 40)):
        for scheme in ("int8", "w8a8", "int4", "nf4"):
            yield quantised_case(scheme, lead, k, n, bias=n % 2 == 1)
            yield quantised_case(scheme, lead, k, n, 32 if n % 2 else 128)
        yield quantised_case("int4", lead, k, n, 64, asymmetric=True, bias=n % 2 == 1)
    for size in (10.0, 1e-6):  # the products of larger ones are beyond float16
        for scheme in ("int8", "w8a8", "int4", "nf4"):
            yield quantised_case(scheme, (3,), 200, 24, 64, size=size)


def cases() -> Iterator[Case]:
    """A grid that visits every op: odd sizes, tails, windows inside and over the length, ragged and empty sequences."""
    for rounding in ("model", "fp32"):
        for shape in ((1, 1), (3, 8), (2, 5, 96), (7, 576), (5, 1000), (2, 4096), (3, 5125)):
            yield norm_case(shape, rounding)
            yield add_norm_case(shape, rounding)
    yield norm_case((0, 16))
    for shape in ((1, 1), (3, 7), (2, 3, 1536), (5, 1000), (2, 14336)):
        yield swiglu_case(shape)
        yield swiglu_packed_case((*shape[:-1], 2 * shape[-1]))
    for lead, k, n in (((1,), 576, 192), ((2, 3), 1000, 33), ((16,), 64, 8), ((40,), 96, 50), ((1,), 5000, 40)):
        yield linear_case(lead, k, n, bias=n % 2 == 1)
    yield from _quantised_cases()
    for reduction in ("mean", "sum", "none"):
        yield linear_cross_entropy_case((5, 24), 7, reduction)
        yield linear_cross_entropy_case((2, 75, 64), 1000, reduction, ignored=3, chunk=37)
    yield linear_cross_entropy_case((130, 40), 5125, ignored=7, num_items=1000)
    for interleaved in (False, True):
        yield rope_case(2, 5, 4, 2, 64, interleaved)
        yield rope_case(None, 7, 9, 3, 128, interleaved, first=1000)
        yield rope_case(1, 3, 3, 1, 96, interleaved, first=31)
        yield rope_case(1, 2, 7, 7, 10, interleaved)
    for dim in (8, 40, 64, 80, 96, 128, 256):
        yield attention_case(2, 33, 33, 6, 2, dim, window=16)
    for window in (None, 1, 3, 64, 65, 500):
        yield attention_case(1, 130, 130, 4, 1, 64, window)
    yield attention_case(1, 1, 97, 7, 1, 64, window=33)
    yield attention_case(1, 17, 217, 9, 3, 64, window=64)
    yield attention_case(1, 70, 20, 2, 2, 32)
    yield attention_case(2, 19, 41, 4, 2, 64, causal=False)
    yield attention_case(0, 5, 5, 2, 1, 16)
    yield packed_attention_case([(5, 5), (0, 0), (70, 70), (1, 1)], 6, 2, 64, window=32)
    yield packed_attention_case([(3, 60), (0, 4), (4, 0), (33, 33)], 4, 4, 128)
    for lengths, before, slots in (([5, 7, 2], [0, 1, 3], 3), ([1, 1, 1], [0, 63, 1000], 64), ([0, 200], [5, 0], 64)):
        yield rope_write_case(lengths, before, slots, 6, 2, 64)
        yield rope_write_case(lengths, before, slots, 3, 1, 128, interleaved=True)
        yield write_case(lengths, before, slots, 2, 64)
    for dim in (64, 96, 128):
        yield cached_case([1, 1, 1, 1], [1, 40, 64, 999], 64, 6, 2, dim, window=64, chunk=False)
    yield cached_case([1, 1], [0, 7], 16, 7, 1, 64, window=8, chunk=False)
    yield cached_case([3, 3], [3, 90], 64, 4, 2, 64, window=60, chunk=False)
    yield cached_case([1, 1], [50, 64], 64, 8, 8, 64, chunk=False)
    for window in (3, 16):
        yield cached_case([16, 5, 1, 0, 33], [0, 3, 77, 4, 16], 16, 6, 2, 64, window=window)
    yield cached_case([17, 1], [0, 100], 128, 9, 3, 128)
    yield cached_case([1, 1, 1], [1, 64, 999], 64, 6, 2, 96, window=64, chunk=False, codes=True)
    yield cached_case([16, 5, 1, 0, 33], [0, 3, 77, 4, 16], 16, 6, 2, 64, window=16, codes=True)
