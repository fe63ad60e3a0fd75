"""Alternating timing: A, B, B, A, …, so that what the machine does meanwhile happens to all alike."""

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: rounds within [least, most], as many as fit into `seconds`; samples of at least `sample`
    seconds, for which short calls are repeated."""

    least: int = 7
    most: int = 41
    seconds: float = 1.5
    sample: float = 2e-3


FULL = Effort()
QUICK = Effort(least=3, most=7, seconds=0.25, sample=5e-4)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of several samples with the tenth and the ninetieth percentile."""

    median: float
    low: float
    high: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    if not samples:
        raise ValueError("there are no samples to take a median of")
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, round(share * (len(ordered) - 1))))]

    return Spread(statistics.median(ordered), at(0.1), at(0.9), len(ordered))


class Stopwatch:
    """Seconds of a number of calls; on a GPU between two events, so that only the device's work counts."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter):
        self.cuda, self.clock = device == "cuda", clock

    def __call__(self, calls: Sequence[Call], repeats: int) -> float:
        if self.cuda:
            return self._events(calls, repeats)
        start = self.clock()
        for i in range(repeats):
            calls[i % len(calls)]()
        return self.clock() - start

    def _events(self, calls: Sequence[Call], repeats: int) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for i in range(repeats):
            calls[i % len(calls)]()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def alternate(
    candidates: dict[str, Sequence[Call]], effort: Effort, stopwatch: Stopwatch, progress: Call | None = None
) -> dict[str, list[float]]:
    """Seconds of one call of each candidate, in rounds, each in an order of its own: nobody always follows the same
    one, whose writes in the caches can make the next one's first call slower by a quarter.

    Args:
        candidates: for each name the same call on several sets of inputs, taken in turn from sample to sample, so that
            inputs which are meant to come from memory do not lie in a cache.
    """
    repeats, used = {}, dict.fromkeys(candidates, 0)
    for name, calls in candidates.items():
        stopwatch(calls, len(calls))  # the first calls compile, allocate and wake threads
        once = stopwatch(calls, len(calls)) / len(calls)
        repeats[name] = max(1, math.ceil(effort.sample / max(once, 1e-9)))
    names = list(candidates)
    seen: dict[str, list[float]] = {name: [] for name in names}
    start, rounds, order = stopwatch.clock(), 0, random.Random(0)
    while rounds < effort.least or (rounds < effort.most and stopwatch.clock() - start < effort.seconds):
        for name in order.sample(names, len(names)):
            calls, at = candidates[name], used[name] % len(candidates[name])
            seen[name].append(stopwatch([*calls[at:], *calls[:at]], repeats[name]) / repeats[name])
            used[name] += repeats[name]
        rounds += 1
        if progress is not None:
            progress()
    return seen


def ratios(ours: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as long the other takes, round by round."""
    return spread([b / a for a, b in zip(ours, other, strict=True)])
