"""Parity of what is timed, on the very inputs that are timed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from mistral_kernels import testing

from .cases import Bench, eager, timed_call

SAME = 0.05


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far a candidate is from float64 truth.

    Attributes:
        share: the worst error as a share of its budget (`mistral_kernels.testing`); at most 1 passes.
        relative: the largest RMS error of an output, relative to that output.
        where: the output with the worst share.
    """

    share: float
    relative: float
    where: str

    @property
    def passed(self) -> bool:
        return self.share <= 1

    @property
    def same_function(self) -> bool:
        """Whether it computes the op at all, if less exactly."""
        return self.relative <= SAME


def _double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()}


def _whole(arguments: dict[str, Any]) -> list[tuple[dict[str, Any], Callable]]:
    return [(arguments, lambda outputs: outputs)]


class Judge:
    """Eager and truth of one bench's arguments, computed once for all candidates."""

    def __init__(self, bench: Bench, arguments: dict[str, Any]):
        self.parts: list[tuple[Callable, list[torch.Tensor], list[torch.Tensor]]] = []
        for part, cut in (bench.slices or _whole)(arguments):
            sides = []
            for side in (part, _double(part)):
                call, outputs = timed_call(eager(bench.case.op), side, bench.backward)
                sides.append([t.detach().clone() for t in outputs(call())])
            self.parts.append((cut, sides[0], sides[1]))
        self.kind = "gradient" if bench.backward else "output"

    def __call__(self, outputs: tuple[torch.Tensor, ...]) -> Verdict:
        found = []
        for cut, eager_outputs, truth in self.parts:
            mine = cut(outputs)
            if len(mine) != len(truth):
                raise AssertionError(f"{len(mine)} {self.kind}s came, and {len(truth)} are needed")
            for i, (o, e, t) in enumerate(zip(mine, eager_outputs, truth, strict=True)):
                found.append(testing.compare(f"{self.kind} {i}", o, e, t))
        worst = max(found, key=lambda e: math.inf if math.isnan(e.ratio) else e.ratio)
        relative = max((_relative(e) for e in found), default=0.0)
        return Verdict(math.inf if math.isnan(worst.ratio) else worst.ratio, relative, worst.output)


def _relative(e: testing.Errors) -> float:
    if math.isnan(e.rms_error):
        return math.inf
    return e.rms_error / e.scale if e.scale > 0 else e.rms_error
