"""Checks a row's parity on the inputs it times, then times ours, its peers and the machine's limit in turn."""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from mistral_kernels import testing

from . import machine, timing
from .cases import COMPUTE, Bench, Candidate, another, eager, ours, timed_call
from .limits import Limits, in_backward
from .parity import Judge, Verdict

LIMIT = "limit"
LIMIT_OF_SIZE = "limit of its size"
COLD_SETS = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """How rows are run.

    Args:
        only: a part of a row's key.
        peers: names of peers to time; None for all.
    """

    device: str = "cpu"
    quick: bool = False
    only: str = ""
    peers: tuple[str, ...] | None = None
    effort: timing.Effort = timing.FULL

    def wants(self, name: str) -> bool:
        return self.peers is None or name in self.peers


@dataclasses.dataclass
class Row:
    """One line of a report; `refused` says why there are no times.

    Attributes:
        seconds: of each candidate, `limit` included: median, low, high and count.
        ratios: of each peer, how many times as long it takes as ours.
        share: of the limit that ours reaches: 1 is the machine's own speed.
        share_of_size: of what it gives to a copy or a read of no more bytes than ours moves, or of the rate of the
            op's own matrix products alone.
        parity: of each candidate, its worst error as a share of the budget; over 1, it is less exact than allowed.
        left_out: peers that were not timed, and why.
    """

    key: str
    command: str
    family: str
    op: str
    direction: str
    case: str
    dtype: str
    bytes: dict[str, Any]
    flops: dict[str, Any]
    limit: str
    curve: tuple[str, str, int] | None
    refused: str = ""
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    share: dict[str, float] | None = None
    share_of_size: dict[str, float] | None = None
    limit_rate: float = 0.0
    parity: dict[str, float] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def amount(self) -> float:
        """What the limit is about: bytes, FLOPs or a call."""
        if self.limit == "call":
            return 1.0
        return float((self.flops if self.limit in COMPUTE else self.bytes)["value"])

    @property
    def rate(self) -> float:
        """Bytes or FLOPs a second of ours."""
        return self.amount / self.seconds["ours"]["median"] if "ours" in self.seconds else math.nan


def empty_row(bench: Bench, command: str) -> Row:
    return Row(
        bench.key,
        command,
        bench.family,
        bench.case.op,
        bench.direction,
        bench.label,
        bench.dtype,
        dataclasses.asdict(bench.bytes),
        dataclasses.asdict(bench.flops),
        bench.limit,
        bench.curve,
    )


def input_sets(bench: Bench, arguments: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Copies of the arguments that together are twice the last cache, so that each call finds its own in memory."""
    if bench.limit in (*COMPUTE, "call") or device == "cuda":
        return [arguments]
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    count = min(COLD_SETS, machine.cold_copies(size))
    return [arguments, *(another(arguments, n) for n in range(1, count))]


class RowRunner:
    """One row on its way: candidates that were prepared and judged, ready to be timed."""

    def __init__(self, bench: Bench, settings: Settings, command: str):
        torch._dynamo.reset()  # the code of rows before this one counts toward the limit of recompilations
        self.bench, self.settings = bench, settings
        self.row = empty_row(bench, command)
        self.sets = input_sets(bench, bench.arguments(settings.device), settings.device)
        self.calls: dict[str, list[Callable[[], Any]]] = {}

    def _prepare(self, candidate: Candidate, judge: Judge) -> Verdict:
        calls = [timed_call(candidate, arguments, self.bench.backward) for arguments in self.sets]
        call, outputs = calls[0]
        verdict = judge(outputs(call()))
        self.row.parity[candidate.name] = verdict.share
        self.calls[candidate.name] = [c for c, _ in calls]
        return verdict

    def _add_peer(self, candidate: Candidate, judge: Judge) -> None:
        try:
            verdict = self._prepare(candidate, judge)
        except Exception as error:  # a peer may fail in any way; the row lives without it
            self.row.left_out[candidate.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            self.calls.pop(candidate.name, None)
            return
        if not verdict.same_function:
            self.row.left_out[candidate.name] = (
                f"computes something else: RMS error {verdict.relative:.2g} of the result"
            )
            self.calls.pop(candidate.name)

    def judge_all(self) -> bool:
        """Prepares and judges everybody; False where ours fails, and then nothing is timed."""
        bench = self.bench
        judge = Judge(bench, self.sets[0])
        verdict = self._prepare(ours(bench.case.op), judge)
        if not verdict.passed:
            self.row.refused = f"parity fails: {verdict.where} is {verdict.share:.3g} times its error budget away"
            return False
        if bench.eager and self.settings.wants("eager"):
            self._add_peer(eager(bench.case.op), judge)
        for peer in bench.peers(self.settings.device):
            if self.settings.wants(peer.name):
                self._add_peer(peer, judge)
        return True

    def time_all(self, limits: Limits, stopwatch: timing.Stopwatch) -> None:
        """Times all that were prepared with the limit, and fills in the row."""
        time_row(self.row, self.calls, limits, self.settings.effort, stopwatch, self.bench.products)


def time_row(
    row: Row,
    calls: Mapping[str, Sequence[Callable]],
    limits: Limits,
    effort: timing.Effort,
    stopwatch: timing.Stopwatch,
    products: tuple[int, int, int, int] | None = None,
) -> None:
    """Times the calls in turn with the row's limit, and with one of its size: for a gradient a gradient."""
    dtype = getattr(torch, row.dtype)
    probes = {LIMIT: [limits.call(row.limit, dtype)]}
    if products:
        of_size = limits.products(dtype, *products)
    else:
        of_size = limits.call_of_size(row.limit, row.bytes["value"], len(calls["ours"]))
    if of_size:
        backward = row.direction == "backward"
        probes[LIMIT_OF_SIZE] = [in_backward(of_size[0]) if backward else of_size[0]]
    samples = timing.alternate(dict(calls) | probes, effort, stopwatch)
    if of_size:
        row.share_of_size = shares(row, samples["ours"], samples.pop(LIMIT_OF_SIZE), of_size[1])
    fill_row(row, samples, limits.amount(row.limit))


def shares(row: Row, mine: Sequence[float], limit: Sequence[float], limit_amount: float) -> dict[str, float]:
    """Of the limit, round by round."""
    found = [row.amount / m * n / limit_amount for m, n in zip(mine, limit, strict=True)]
    return dataclasses.asdict(timing.spread(found))


def fill_row(row: Row, samples: dict[str, list[float]], limit_amount: float) -> None:
    """The figures that follow from the samples; ratios and shares are taken round by round."""
    row.seconds = {name: dataclasses.asdict(timing.spread(s)) for name, s in samples.items()}
    row.ratios = {
        name: dataclasses.asdict(timing.ratios(samples["ours"], s))
        for name, s in samples.items()
        if name not in ("ours", LIMIT)
    }
    row.share = shares(row, samples["ours"], samples[LIMIT], limit_amount)
    row.limit_rate = limit_amount / statistics.median(samples[LIMIT])


def run_row(
    bench: Bench,
    settings: Settings,
    limits: Limits,
    command: str,
    stopwatch: timing.Stopwatch | None = None,
) -> Row:
    """Runs one row; without parity it is refused, and has no times."""
    with torch.no_grad(), testing.isa(bench.isa) if bench.isa else contextlib.nullcontext():
        runner = RowRunner(bench, settings, command)
        if runner.judge_all():
            runner.time_all(limits, stopwatch or timing.Stopwatch(settings.device))
    return runner.row


def chosen(benches: Iterable[Bench], settings: Settings) -> list[Bench]:
    """Those with `only` in their key, or the one whose key it is."""
    found = [b for b in benches if settings.only in b.key and (b.quick or not settings.quick)]
    return [b for b in found if b.key == settings.only] or found
