"""Plots of a report, as PNG and SVG: bars against peers with the limit as a line, and curves over length."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runner import LIMIT, Row

COLOURS = dict(ours="#1f77b4", eager="#8c8c8c", SDPA="#2ca02c", FlexAttention="#d62728")
COLOURS["torch.compile"] = "#ff9d2e"
MORE = ("#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")
STYLES = ("-", "--", ":", "-.")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}); pip install mistral-kernels[bench]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _colour(name: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or MORE[others.index(name) % len(MORE)]


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Both formats, without dates, so that the same figures give the same files."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = folder / f"{name}.{kind}"
        beside = path.with_name(path.name + ".tmp")
        with rc_context({"svg.hashsalt": name}):
            figure.savefig(beside, format=kind, dpi=130, metadata=metadata)
        beside.replace(path)
        paths.append(path)
    return paths


def bars(rows: Sequence[Row], title: str) -> Any:
    """For each row and candidate its speed as a share of the row's limit."""
    rows = [r for r in rows if not r.refused]
    names = list(dict.fromkeys(n for r in rows for n in r.seconds if n != LIMIT))
    height = sum(len(r.seconds) for r in rows) * 0.2 + 1.2
    figure, axes = _figure(10, max(height, 2.5))
    y, ticks, seen = 0.0, [], set()
    for row in rows:
        start = y
        for name in (n for n in names if n in row.seconds):
            share = row.amount / row.seconds[name]["median"] / row.limit_rate
            label = name if name not in seen else None
            seen.add(name)
            axes.barh(y, share, 0.9, color=_colour(name, names), label=label)
            y += 1
        direction = " backward" if row.direction == "backward" else ""
        ticks.append(((start + y - 1) / 2, f"{row.op}{direction} {row.case} {row.dtype}"))
        y += 0.8
    axes.axvline(1, color="black", linewidth=1, label="limit, measured in the same rounds")
    axes.set_yticks([t for t, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed as a share of the limit (copy or read bandwidth, or GEMM rate)")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def curves(rows: Sequence[Row], title: str) -> Any:
    """Time over length: one line for each series and candidate."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    variable = "S"
    for row in rows:
        if row.curve and not row.refused:
            series, variable, value = row.curve
            for name in (n for n in row.seconds if n != LIMIT):
                lines[series, name].append((value, row.seconds[name]["median"]))
    figure, axes = _figure(8, 5)
    names = list(dict.fromkeys(name for _, name in lines))
    order = list(dict.fromkeys(series for series, _ in lines))
    for (series, name), points in lines.items():
        x, seconds = zip(*sorted(points), strict=True)
        style, colour = STYLES[order.index(series) % len(STYLES)], _colour(name, names)
        axes.plot(x, [1e3 * s for s in seconds], style, marker="o", ms=3, color=colour, label=f"{name}, {series}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(variable)
    axes.set_ylabel("ms")
    axes.set_title(title)
    axes.legend(fontsize=6)
    return figure


def plot_rows(rows: Sequence[Row], folder: Path, command: str, stem: str) -> list[Path]:
    """Bars, and curves where a series has more than one point, in files that begin with `stem`."""
    paths = []
    if any(not r.refused for r in rows):
        paths += save(bars(rows, f"python -m bench {command}"), folder, stem)
    values = defaultdict(set)
    for row in rows:
        if row.curve and not row.refused:
            values[row.curve[0]].add(row.curve[2])
    if any(len(v) > 1 for v in values.values()):
        paths += save(curves(rows, f"python -m bench {command}"), folder, f"{stem}-curves")
    return paths
