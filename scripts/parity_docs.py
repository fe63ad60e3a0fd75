"""Writes docs/parity.md from the files that `python -m mistral_kernels.verify --json` left in docs/parity/."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
HEAD = """# What was verified, and how

Every op, implementation and dtype against float64, on the grid of `mistral_kernels.testing.cases()`: the worst share
of the error budget (twice eager's largest error plus one rounding; 1.1 times eager's RMS error), so at most 1 passes.
The number of checks of outputs and gradients is in brackets; "unable" counts cases that an implementation refuses.
`make parity-docs` writes this page.
"""


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["skipped"]:
        return f"not judged: {row['skipped']}"
    if row["unable"] and not row["passed"] + row["failed"]:
        return "no kernel"
    unable = f", {row['unable']} unable" if row["unable"] else ""
    return f"{'' if not row['failed'] else '**FAILED** '}{row['worst']:.2f} ({row['passed']}{unable})"


def section(title: str, found: dict[str, Any]) -> str:
    facts = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    note = [found["note"], ""] if "note" in found else []
    lines = [f"## {title}", "", facts + ".", "", *note, "| op | impl | " + " | ".join(DTYPES) + " |", "|---" * 5 + "|"]
    rows = {(r["op"], r["impl"], r["dtype"]): r for r in found["rows"]}
    for op, impl in dict.fromkeys((op, impl) for op, impl, _ in rows):
        lines.append(f"| `{op}` | {impl} | " + " | ".join(cell(rows.get((op, impl, d))) for d in DTYPES) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/parity"), help="of the JSON files")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"))
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.json"))
    text = "\n".join([HEAD, *(section(f.stem.replace("_", " "), json.loads(f.read_text())) for f in files)])
    beside = options.out.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, options.out)


if __name__ == "__main__":
    main()
