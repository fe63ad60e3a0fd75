"""A run as a table, JSON, CSV; files are written beside and renamed."""

import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import COMPUTE
from .runner import LIMIT, Row

SCHEMA = 1
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
HEAD = ("op", "case", "dtype", "ours (10-90 %)", "rate", "of limit", "peers, times ours")


def duration(seconds: float) -> str:
    size, unit = next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def between(spread: dict[str, float]) -> str:
    """Median and range in one unit."""
    size, unit = next((u for u in UNITS if spread["median"] >= u[0]), UNITS[-1])
    return f"{spread['median'] / size:.3g} {unit} ({spread['low'] / size:.3g}-{spread['high'] / size:.3g})"


def rate(row: Row) -> str:
    if row.limit == "call":
        return ""
    if row.limit in COMPUTE:
        return f"{row.rate / 1e9:.0f} GFLOP/s" if row.rate < 1e12 else f"{row.rate / 1e12:.3g} TFLOP/s"
    return f"{row.rate / 1e9:.3g} GB/s"


def peer(row: Row, name: str) -> str:
    mark = "" if row.parity.get(name, 0.0) <= 1 else f" (error {row.parity[name]:.2g}x budget)"
    return f"{name} {row.ratios[name]['median']:.2f}x{mark}"


def cells(row: Row) -> tuple[str, ...]:
    op = row.op + (" backward" if row.direction == "backward" else "")
    if row.refused:
        return (op, row.case, row.dtype, f"REFUSED: {row.refused}", "", "", "")
    share = f"{100 * row.share['median']:.0f} % of {row.limit}" if row.share else ""
    if row.share_of_size:
        share += f", {100 * row.share_of_size['median']:.0f} % of its size"
    peers = ", ".join(peer(row, name) for name in sorted(row.ratios, key=lambda n: row.ratios[n]["median"]))
    return (op, row.case, row.dtype, between(row.seconds["ours"]), rate(row), share, peers)


def print_row(row: Row) -> None:
    op, case, dtype, time, speed, share, peers = cells(row)
    print(f"{op:<22} {case:<34} {dtype:<9} {time:<26} {speed:<14} {share:<32} {peers}", flush=True)
    for name, reason in row.left_out.items():
        print(f"{'':<22} without {name}: {reason}", flush=True)


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


# ---- files ----


def write(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp", encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def placed(page: str, mark: str, text: str) -> str:
    """The page with what lies between the comments `mark begins` and `mark ends` replaced."""
    before, first, rest = page.partition(f"<!-- {mark} begins -->")
    _, last, after = rest.partition(f"<!-- {mark} ends -->")
    if not first or not last:
        raise ValueError(f"the page has no <!-- {mark} begins --> followed by <!-- {mark} ends -->")
    return f"{before}{first}\n{text}\n{last}{after}"


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become None, times keep six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def write_json(path: Path, run: dict[str, Any]) -> None:
    write(path, json.dumps(plain(dict(schema=SCHEMA) | run), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A report that `write_json` wrote.

    Raises:
        ValueError: it is not one, or of another schema.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        found = run.get("schema") if isinstance(run, dict) else type(run).__name__
        raise ValueError(f"{path} has schema {found!r}; this version reads schema {SCHEMA}")
    return run


def rows_of(run: dict[str, Any]) -> list[Row]:
    names = {f.name for f in dataclasses.fields(Row)}
    return [Row(**{k: v for k, v in row.items() if k in names}) for row in run.get("rows", [])]


def csv_text(rows: Iterable[Row]) -> str:
    """One line for each candidate of each row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ("key", "candidate", "median_s", "low_s", "high_s", "rounds", "amount", "per", "error_share", "refused")
    writer.writerow(head)
    for row in rows:
        unit = {"gemm": "FLOP", "fma": "FLOP", "call": "call"}.get(row.limit, "byte")
        if row.refused:
            writer.writerow((row.key, "ours", "", "", "", 0, row.amount, unit, row.parity.get("ours"), row.refused))
        for name, s in row.seconds.items():
            error = "" if name == LIMIT else row.parity.get(name, "")
            amount = "" if name == LIMIT else row.amount
            writer.writerow((row.key, name, s["median"], s["low"], s["high"], s["count"], amount, unit, error, ""))
    return out.getvalue()
