"""Tables and plots of what was measured, beside what others have published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import need
from .published import COLUMNS, NOTE


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shown(row: dict[str, Any]) -> str:
    """A value with its standard error: percent of a share, else as it is."""
    share = row["metric"] in ("acc", "acc_norm", "exact_match")
    value, error = row["value"], row["stderr"]
    if not share:
        return f"{value:.2f}"
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def task_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, row in results.items():
        chance = "" if row["chance"] is None else f"{100 * row['chance']:.0f}"
        beside = [f"{column[name]:.1f}" if name in column else "" for column in COLUMNS.values()]
        rows.append((name, row["metric"], str(row["shots"]), str(row["samples"]), shown(row), chance, *beside))
    return table(("task", "metric", "shots", "questions", "this model", "chance", *COLUMNS), rows)


def perplexity_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lengths down, windows across; a window that hides nothing of a length is that of none."""
    windows = sorted({r["window"] for r in rows if r["window"] is not None})
    found = {(r["length"], r["window"]): r["value"] for r in rows}
    lines = []
    for length in sorted({r["length"] for r in rows}):
        cells = [f"{found[length, w]:.2f}" if (length, w) in found else "" for w in (*windows, None)]
        lines.append((str(length), *cells))
    return table(("tokens", *(f"window {w}" for w in windows), "no window"), lines)


def markdown(result: dict[str, Any]) -> str:
    about = ", ".join(f"{name} {value}" for name, value in result["model"].items() if value is not None)
    parts = ["# Evaluation", f"Model: {about}."]
    if result["tasks"]:
        parts += [task_table(result["tasks"]), NOTE]
    parts += [f"Not run, {name}: {reason}" for name, reason in result["failed"].items()]
    if result["perplexity"]:
        one = result["perplexity"][0]
        parts += [
            "## Perplexity",
            f"Of {one['tokens']} tokens of {result['text']}, cut into sequences of so many tokens.",
            perplexity_table(result["perplexity"]),
        ]
    parts.append("![the figures](evaluation.png)")
    return "\n\n".join(parts) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Shares of right answers beside the published ones; perplexity by length, a line for each window."""
    need("matplotlib", "eval").use("Agg")
    import matplotlib.pyplot as plt

    shares = {n: r for n, r in result["tasks"].items() if r["metric"] in ("acc", "acc_norm", "exact_match")}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1))
    columns = {"this model": {n: 100 * r["value"] for n, r in shares.items()}, **COLUMNS}
    columns = {label: values for label, values in columns.items() if values.keys() & shares.keys()}
    width = 0.8 / max(len(columns), 1)
    for i, (label, values) in enumerate(columns.items()):
        places = [at + i * width for at, name in enumerate(shares) if name in values]
        axes[0].bar(places, [values[name] for name in shares if name in values], width, label=label)
    for at, row in enumerate(shares.values()):
        if row["chance"] is not None:
            axes[0].hlines(100 * row["chance"], at - width / 2, at + 0.8 - width / 2, "k", "dotted")
    axes[0].set_xticks([at + 0.4 - width / 2 for at in range(len(shares))], [n.replace("_", "\n") for n in shares])
    axes[0].set_ylabel("% right (dotted: chance)")
    perplexity_lines(axes[1], result["perplexity"])
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def perplexity_lines(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    plain = {r["length"]: r["value"] for r in rows if r["window"] is None}
    for window in sorted({r["window"] for r in rows if r["window"] is not None}):
        own = {r["length"]: r["value"] for r in rows if r["window"] == window}
        # Up to its own length a window hides nothing.
        points = sorted({**{n: v for n, v in plain.items() if n <= window}, **own}.items())
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"window {window}")
    if plain:
        axis.plot(*zip(*sorted(plain.items()), strict=True), "k", marker="o", markersize=3, label="no window")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylabel("perplexity")
