"""What became slower since an older report.

Machines change speed from minute to minute. So a row's new time is first divided by what the same machine did to the
row's other candidates and to its limit, which were timed in the same rounds: their median change from report to
report. What is left is the change of ours.
"""

import dataclasses
import statistics
from collections.abc import Iterable

from .report import duration
from .runner import Row

TOLERANCE = 1.2


@dataclasses.dataclass(frozen=True)
class Change:
    """A row of two reports; `factor` is the new time over the old one, the machine's own change taken out."""

    key: str
    old: float
    new: float
    machine: float
    factor: float
    verdict: str


def _machine(old: Row, new: Row) -> float:
    common = [name for name in new.seconds if name in old.seconds and name != "ours"]
    return statistics.median(new.seconds[n]["median"] / old.seconds[n]["median"] for n in common) if common else 1.0


def change(old: Row, new: Row, tolerance: float) -> Change:
    if new.refused or old.refused:
        return Change(new.key, 0.0, 0.0, 1.0, 1.0, "REFUSED" if new.refused else "was refused")
    before, after, machine = old.seconds["ours"], new.seconds["ours"], _machine(old, new)
    factor = after["median"] / before["median"] / machine
    verdict = "SLOWER" if factor > tolerance else "faster" if factor < 1 / tolerance else "same"
    return Change(new.key, before["median"], after["median"], machine, factor, verdict)


def changes(old: Iterable[Row], new: Iterable[Row], tolerance: float = TOLERANCE) -> list[Change]:
    """One for each row of the new report that the old one has, the slowest first.

    Raises:
        ValueError: a tolerance that is not above 1, or reports without a row in common.
    """
    if not tolerance > 1:
        raise ValueError(f"tolerance is {tolerance}; it must be above 1 (1.2 lets a row take 20 % longer)")
    before = {row.key: row for row in old}
    found = [change(before[row.key], row, tolerance) for row in new if row.key in before]
    if not found:
        raise ValueError("the two reports have no row in common")
    return sorted(found, key=lambda c: -c.factor)


def failed(found: Iterable[Change]) -> bool:
    return any(c.verdict in ("SLOWER", "REFUSED") for c in found)


def print_changes(found: list[Change], missing: list[str]) -> None:
    print(f"\n{'change':>8} {'old':>9} {'new':>9} {'machine':>8}  verdict  row")
    for c in found:
        print(f"{c.factor:>7.2f}x {duration(c.old):>9} {duration(c.new):>9} {c.machine:>7.2f}x  {c.verdict:<8} {c.key}")
    for key in missing:
        print(f"{'':>8} {'':>9} {'':>9} {'':>8}  missing  {key}")
