"""The commands ops, attention and decode: rows of the families."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from . import baselines, families, overhead, report, timing
from .cases import Bench
from .limits import Limits
from .runner import Row, Settings, chosen, run_row, time_row

OF_COMMAND: dict[str, tuple[str, ...]] = {"attention": ("attention",), "decode": ("ring_cache", "linear")}

# Compiling takes longer than the quick rows themselves.
QUICK_PEERS = (
    "eager",
    "F.rms_norm",
    "F.cross_entropy",
    "F.linear",
    "SDPA",
    "SDPA, heads as queries",
    "matmul",
    "Liger",
)


def benches_of(command: str) -> Iterator[Bench]:
    if command == "overhead":
        yield from overhead.benches()
    else:
        yield from (b for b in families.all_benches() if belongs(b, command))


def belongs(bench: Bench, command: str) -> bool:
    """Families with a command of their own are in that one, all others under `ops`."""
    own = OF_COMMAND.get(command)
    return bench.family in own if own else all(bench.family not in names for names in OF_COMMAND.values())


def settings_of(options: argparse.Namespace) -> Settings:
    effort = timing.QUICK if options.quick else timing.FULL
    if options.seconds is not None:
        effort = timing.Effort(effort.least, effort.most, options.seconds, effort.sample)
    peers = tuple(options.peers.split(",")) if options.peers is not None else None
    return Settings(options.device, options.quick, options.only, peers, effort)


def command_of(options: argparse.Namespace, bench: Bench) -> str:
    """What to type for this row alone."""
    device = "" if options.device == "cpu" else f" --device {options.device}"
    allocator = "" if options.allocator == "default" else f" --allocator {options.allocator}"
    return f"python -m bench {options.command} --only {shlex.quote(bench.key)}{device}{allocator}"


def printed(command: str, makers: Sequence[tuple[str, Callable[[], Row]]]) -> list[Row]:
    """The rows that go with these keys, each printed as soon as it is there."""
    from tqdm import tqdm

    found = []
    bar = tqdm(makers, desc=command, leave=False, disable=None)
    for key, make in bar:
        bar.set_postfix_str(key[:60])
        row = make()
        bar.clear()
        report.print_row(row)
        found.append(row)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    settings = settings_of(options)
    if options.quick and settings.peers is None:
        settings = Settings(**{**vars(settings), "peers": QUICK_PEERS})
    benches = chosen(benches_of(options.command), settings)
    if not benches:
        sys.exit(f"bench: no row of {options.command!r} has {options.only!r} in its key")
    limits = Limits(options.device, options.quick)
    makers = [(b.key, partial(run_row, b, settings, limits, command_of(options, b))) for b in benches]
    rows = printed(options.command, makers)
    for name, reason in baselines.MISSING.items():
        print(f"without {name}: {reason}")
    return dict(rows=rows, limits=limits.source, missing=dict(baselines.MISSING))


def time_whole(
    row: Row, calls: dict, limits: Limits, options: argparse.Namespace, stopwatch: timing.Stopwatch | None = None
) -> None:
    """Times the calls of a model-level row as the options say."""
    time_row(row, calls, limits, settings_of(options).effort, stopwatch or timing.Stopwatch(options.device))
