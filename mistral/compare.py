"""Parity on a model's own activations: an `ops` namespace that judges every call while the model runs."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import mistral_kernels
from mistral_kernels import testing
from mistral_kernels._using import OPS


@dataclasses.dataclass
class Verdict:
    """What was seen of one op: calls, the worst output of all of them, and the RMS error over all of them."""

    op: str
    calls: int = 0
    outputs: dict[str, list[testing.Errors]] = dataclasses.field(default_factory=dict)

    def add(self, errors: list[testing.Errors]) -> None:
        self.calls += 1
        for e in errors:
            self.outputs.setdefault(e.output, []).append(e)

    @property
    def worst(self) -> testing.Errors:
        """The output whose largest error takes the largest share of its budget; nan first."""
        seen = [e for errors in self.outputs.values() for e in errors]
        return max(seen, key=lambda e: math.inf if math.isnan(e.max_ratio) else e.max_ratio)

    @property
    def rms_ratio(self) -> float:
        """The largest share that an output's RMS error over all calls takes of its budget."""
        shares = [testing.pooled(errors) for errors in self.outputs.values()]
        return math.nan if any(math.isnan(s) for s in shares) else max(shares)

    @property
    def max_ratio(self) -> float:
        """The largest share that an output's largest error takes of its budget, few rows judged together."""
        shares = [testing.pooled_max(errors) for errors in self.outputs.values()]
        return math.nan if any(math.isnan(s) for s in shares) else max(shares)

    @property
    def passed(self) -> bool:
        return self.max_ratio <= 1 and self.rms_ratio <= 1


def judged(impl: str | None, verdicts: dict[str, Verdict], every: int = 1) -> SimpleNamespace:
    """The eager ops, each comparing `impl` and itself with float64 truth on the arguments that the model passes.

    Args:
        impl: the implementation to judge, as `mistral_kernels` takes it.
        verdicts: filled, by op name.
        every: judge only each `every`-th call of an op, since truth in float64 takes time.

    Returns:
        A namespace for `Transformer(config, ops=...)`; the model computes on with the eager results.
    """

    def watch(op: Callable) -> Callable:
        name, signature = op.__name__, inspect.signature(op)
        seen = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if seen % every == 0:
                arguments = dict(signature.bind(*args, **kwargs).arguments)
                verdicts.setdefault(name, Verdict(name)).add(testing.errors(name, arguments, impl))
            seen += 1
            return op(*args, **kwargs, impl="reference")

        return run

    return SimpleNamespace(
        rope_table=mistral_kernels.rope_table, impl="reference", **{op.__name__: watch(op) for op in OPS}
    )


def parting(a: list[int], b: list[int]) -> int | None:
    """The first place where two lists differ, or None."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if shared == len(a) == len(b) else shared


def margin(logits: torch.Tensor, chosen: int, other: int) -> float:
    """By how much the chosen token's logit lies above the other's."""
    return (logits[chosen].double() - logits[other].double()).item()
