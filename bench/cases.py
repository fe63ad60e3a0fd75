"""What a benchmark is: one call of one op, its floor of bytes and FLOPs, and those it is timed against."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

import mistral_kernels
from mistral_kernels import testing

LIMITS = ("copy", "read", "gemm", "fma", "call")
COMPUTE = ("gemm", "fma")  # those that are about FLOPs
TABLES = ("cos", "sin")


@dataclasses.dataclass(frozen=True)
class Count:
    """How many bytes or FLOPs one call needs at least, and the formula that says so."""

    value: float
    formula: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute an op.

    Args:
        name: in tables.
        prepare: from the op's keyword arguments to a call without arguments, which is what is timed. Layouts may be
            converted here, outside the timing, in the peer's favour.
        restore: from what the call returns to the op's own outputs and layout.
    """

    name: str
    prepare: Callable[[dict[str, Any]], Callable[[], Any]]
    restore: Callable[[Any], Any] = lambda result: result


@dataclasses.dataclass(frozen=True)
class Bench:
    """One row: an op on one input in one dtype, forward or backward.

    Args:
        family: the op family, as its folder is named.
        case: names the op and makes its arguments.
        dtype: "bfloat16", "float32", …
        bytes, flops: the floor of one call.
        limit: what bounds it: "copy" or "read" bandwidth, or "gemm", the rate of a large matrix product, "fma", that
            of multiply-adds in registers of 256 bits, or "call", the time of the smallest torch op.
        peers: from a device ("cpu", "cuda") to the candidates besides ours and eager.
        backward: time the gradients of all floating-point arguments, given those of the outputs.
        eager: False where eager PyTorch would take too much memory or time; parity then needs `slices`.
        slices: from the arguments to pairs of smaller arguments, small enough for the eager op, and a function that
            cuts the same part from the outputs of the whole. None: the whole.
        curve: (series, variable, value) of a row that is a point of a scaling curve.
        quick: whether it belongs to `--quick`.
        isa: the instruction set that the C++ kernels are held to; None for the processor's best.
        products: (heads, queries, keys, head dimension) of attention whose two matrix products are timed alone.
    """

    family: str
    case: testing.Case
    dtype: str
    bytes: Count
    flops: Count
    limit: str
    peers: Callable[[str], Iterable[Candidate]] = lambda device: ()
    backward: bool = False
    eager: bool = True
    slices: Callable[[dict[str, Any]], Iterable[tuple[dict[str, Any], Callable]]] | None = None
    curve: tuple[str, str, int] | None = None
    quick: bool = False
    isa: str | None = None
    products: tuple[int, int, int, int] | None = None

    @property
    def label(self) -> str:
        return self.case.label + (f" {self.isa}" if self.isa else "")

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def key(self) -> str:
        """The same in every run: what `--compare` matches rows by."""
        return f"{self.case.op} {self.direction} {self.label} {self.dtype}"

    def arguments(self, device: str) -> dict[str, Any]:
        return self.case.arguments(getattr(torch, self.dtype), device)


def another(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    """The n-th copy of the arguments, in memory of its own: the same tables and integers, other floats."""
    fresh = leaves(arguments)
    return {name: v.roll(n, 0) if name in fresh else v for name, v in arguments.items()}


def leaves(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is differentiated: every floating-point tensor but rope's tables."""
    return {
        n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and n not in TABLES
    }


def flatten(result: Any) -> tuple[torch.Tensor, ...]:
    if result is None:
        return ()
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def op_candidate(name: str, ops: Any, op: str, compiled: bool = False) -> Candidate:
    """The op of a namespace with our public functions; it writes into caches of its own."""

    def prepare(arguments: dict[str, Any]) -> Callable[[], Any]:
        # Looked up here and not earlier, so that what is timed is what the package holds at that moment.
        function = getattr(ops, op)
        own = {n: v.clone() if n in testing.MUTATED and "write" in op else v for n, v in arguments.items()}
        written = tuple(own[n] for n in testing.MUTATED) if "write" in op else ()
        run = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        if not written:
            return lambda: run(**own)
        return lambda: (*flatten(run(**own)), *written)

    return Candidate(name, prepare)


def ours(op: str) -> Candidate:
    return op_candidate("ours", mistral_kernels, op)


def eager(op: str) -> Candidate:
    return op_candidate("eager", mistral_kernels.reference, op)


def compiled(op: str) -> Candidate:
    return op_candidate("torch.compile", mistral_kernels.reference, op, compiled=True)


def timed_call(candidate: Candidate, arguments: dict[str, Any], backward: bool) -> tuple[Callable[[], Any], Callable]:
    """The call to time, and a function from its result to the op's outputs (or gradients).

    A backward call differentiates one forward pass again and again; its incoming gradients are fixed and Gaussian.
    """
    if not backward:
        return candidate.prepare(arguments), lambda result: flatten(candidate.restore(result))
    held = {n: v.detach().requires_grad_() for n, v in leaves(arguments).items()}
    with torch.enable_grad():
        outputs = flatten(candidate.restore(candidate.prepare(arguments | held)()))
    outputs = tuple(t for t in outputs if t.requires_grad)
    seeds = [testing.fill(tuple(t.shape), seed=7 + i).to(t) for i, t in enumerate(outputs)]
    wanted = list(held.values())
    return lambda: torch.autograd.grad(outputs, wanted, seeds, retain_graph=True), flatten
