"""What the model-level rows share: a row without a bench, and the parity of whole models.

Rounding goes through every layer, so all outputs of a model are one draw, and over inputs either side is the nearer
one as often: the RMS error over all of them may be twice eager's. Wrong kernels are off by far more.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mistral_kernels import testing

from . import rows
from .runner import Row


def run_rows(options: argparse.Namespace, makers: Mapping[str, Callable[[], Row]]) -> list[Row]:
    """The rows with `--only` in their keys."""
    chosen = [(key, make) for key, make in makers.items() if options.only in key]
    if not chosen:
        sys.exit(f"bench: no row of {options.command!r} has {options.only!r} in its key: {', '.join(makers)}")
    return rows.printed(options.command, chosen)


def wanted(options: argparse.Namespace, calls: dict[str, Any]) -> dict[str, Any]:
    """Ours and those peers that `--peers` leaves."""
    settings = rows.settings_of(options)
    return {name: call for name, call in calls.items() if name == "ours" or settings.wants(name)}


def key_of(family: str, case: str, dtype: str) -> str:
    return f"{family} {case} {dtype}"


def whole_row(
    options: argparse.Namespace,
    family: str,
    case: str,
    dtype: str,
    moved: tuple[float, str],
    flops: tuple[float, str],
    limit: str,
    curve: tuple[str, str, int] | None = None,
) -> Row:
    counts = [dict(value=value, formula=formula) for value, formula in (moved, flops)]
    key, command = key_of(family, case, dtype), f"python -m bench {options.command}"
    return Row(key, command, family, family, "forward", case, dtype, counts[0], counts[1], limit, curve)


def share_of_twice_eager(out: Sequence[Any], eager: Sequence[Any], truth: Sequence[Any]) -> float:
    """The RMS error of all tensors together as a share of twice eager's, each relative to its truth; inf for nan."""
    mine = theirs = 0.0
    for o, e, t in zip(out, eager, truth, strict=True):
        found = testing.compare("", o, e, t)
        if math.isnan(found.rms_error):
            return math.inf
        if found.scale > 0:
            mine += (found.rms_error / found.scale) ** 2
            theirs += (found.rms_eager / found.scale) ** 2
    return math.sqrt(mine / theirs) / 2 if theirs else (0.0 if mine == 0 else math.inf)


def refuse(row: Row, share: float, what: str) -> bool:
    """Notes the parity of ours; True, with the reason in the row, where it fails."""
    row.parity["ours"] = share
    if not share <= 1:
        row.refused = f"parity fails: the RMS error of {what} is {2 * share:.3g} times eager's"
    return bool(row.refused)


def tokens_of(count: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(5))
