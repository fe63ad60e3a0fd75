"""The demo's report: rows, Markdown and plots from its results."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistral_kernels.testing import Errors

from .compare import Verdict

COLOURS = {"reference": "#8c8c8c", "fused": "#1f77b4", "Hugging Face": "#ff9d2e"}


def error_row(e: Errors) -> dict[str, Any]:
    return dict(
        output=e.output,
        max_ratio=e.max_ratio,
        rms_ratio=e.rms_error / e.rms_budget if e.rms_budget else 0.0,
        passed=e.passed,
        max_fused=e.max_error,
        max_eager=e.max_eager,
        rms_fused=e.rms_error,
        rms_eager=e.rms_eager,
    )


def logit_row(e: Errors) -> dict[str, Any]:
    """Judged like an op, but for the RMS error, which may be twice eager's: rounding goes through every layer, so all
    logits of a text are one draw, and over texts either side is the nearer one as often."""
    rms_ratio = e.rms_error / (2 * e.rms_eager) if e.rms_eager else 0.0
    return error_row(e) | dict(rms_ratio=rms_ratio, passed=e.max_ratio <= 1 and rms_ratio <= 1)


def verdict_rows(verdicts: dict[str, Verdict]) -> list[dict[str, Any]]:
    return [
        dict(op=v.op, calls=v.calls)
        | error_row(v.worst)
        | dict(max_ratio=v.max_ratio, rms_ratio=v.rms_ratio, passed=v.passed)
        for v in sorted(verdicts.values(), key=lambda v: v.op)
    ]


def passed(result: dict[str, Any]) -> bool:
    """Whether every op and the logits kept within their error budgets."""
    ops = all(row["passed"] for rows in result["ops"].values() for row in rows)
    return ops and all(row["passed"] for row in result["logits"].values())


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def _op_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ("op", "calls", "worst output", "largest error, of budget", "fused", "eager", "RMS error, of budget", ""),
        (
            (
                f"`{r['op']}`",
                r["calls"],
                r["output"],
                f"{r['max_ratio']:.2f}",
                f"{r['max_fused']:.1e}",
                f"{r['max_eager']:.1e}",
                f"{r['rms_ratio']:.2f}",
                "ok" if r["passed"] else "**FAILED**",
            )
            for r in rows
        ),
    )


def _logit_table(rows: dict[str, dict[str, Any]]) -> str:
    return table(
        ("dtype", "largest error, of budget", "RMS error, of budget", "RMS fused", "RMS eager", ""),
        (
            (
                d,
                f"{r['max_ratio']:.2f}",
                f"{r['rms_ratio']:.2f}",
                f"{r['rms_fused']:.2e}",
                f"{r['rms_eager']:.2e}",
                "ok" if r["passed"] else "**FAILED**",
            )
            for d, r in rows.items()
        ),
    )


def _speed_table(speed: dict[str, dict]) -> str:
    def cell(s: dict[str, float]) -> str:
        return f"{s['median']:.0f} ({s['low']:.0f} to {s['high']:.0f})"

    return table(
        ("", "prefill tokens/s", "decode tokens/s"),
        ((name, cell(s["prefill"]), cell(s["decode"])) for name, s in speed.items()),
    )


def _continuation(label: str, found: dict[str, Any]) -> str:
    at, texts = found["parts_at"], found["text"]
    if at is None:
        said = f"Greedy tokens agree, all {len(found['fused'])}."
    elif "margin" in found:
        said = (
            f"Greedy tokens part at token {at + 1}, where the reference puts its own choice {found['margin']:.4f} above"
            " the other in logits."
        )
    else:
        said = f"One continuation ends at token {at + 1}, the other goes on."
    quoted = "\n".join("> " + line for line in texts[1].strip().splitlines())
    other = (
        "" if at is None else "\n\nReference:\n\n" + "\n".join("> " + line for line in texts[0].strip().splitlines())
    )
    return f"**After the {label}.** {said}\n\n{quoted}{other}"


def markdown(result: dict[str, Any]) -> str:
    """The report; every figure in it is from `result`."""
    model, facts = result["model"], result["machine"]
    parts = [
        "# Eager and fused, side by side",
        f"{model['path']}, {model['parameters'] / 1e6:.0f} M parameters, window {model['window']}, a text of"
        f" {result['text_tokens']} tokens. " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "Implementations: "
        + "; ".join(f"{k} {'usable' if v is None else 'not usable, ' + v}" for k, v in result["backends"].items())
        + ".",
        "## Op by op, on the model's own activations",
        "Errors against float64, as shares of their budgets: the largest of each call may be twice eager's plus one"
        " rounding (calls of fewer than 16 rows are judged together), the RMS over all calls 1.1 times eager's. At most"
        " 1 passes.",
    ]
    for dtype, rows in result["ops"].items():
        parts += [f"### {dtype}", _op_table(rows)]
    parts += [
        "## Logits of the long text",
        "The same, but the RMS error may be twice eager's: all logits of a text are one draw of roundings.",
        _logit_table(result["logits"]),
    ]
    parts += ["## Greedy continuations", f"Prompt: {result['question']}"]
    parts += [_continuation(label, found) for label, found in result["continuations"].items()]
    parts += [
        "## Speed",
        "Medians of rounds taken in turn, bfloat16, lowest and highest in brackets.",
        _speed_table(result["speed"]),
        "![tokens a second](speed.png)",
        "![error ratios](parity.png)",
    ]
    return "\n\n".join(parts) + "\n"


def plots(result: dict[str, Any], folder: Path) -> None:
    """speed.png and parity.png."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install mistral-kernels[demo]") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        for i, (name, speed) in enumerate(result["speed"].items()):
            s = speed[phase]
            spread = [[s["median"] - s["low"]], [s["high"] - s["median"]]]
            axis.bar(i, s["median"], yerr=spread, capsize=4, color=COLOURS[name], width=0.65)
            axis.annotate(f"{s['median']:.0f}", (i, s["high"]), ha="center", va="bottom")
        axis.set_xticks(range(len(result["speed"])), list(result["speed"]))
        axis.set_title(f"{phase}, tokens a second")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "speed.png", dpi=130)
    plt.close(figure)
    _parity_plot(result, folder, plt)


def _parity_plot(result: dict[str, Any], folder: Path, plt: Any) -> None:
    ops = [row["op"] for row in next(iter(result["ops"].values()))]
    figure, axis = plt.subplots(figsize=(9, 3.4))
    width = 0.8 / len(result["ops"])
    for i, (dtype, rows) in enumerate(result["ops"].items()):
        values = {row["op"]: max(row["max_ratio"], row["rms_ratio"]) for row in rows}
        axis.bar([n + i * width for n in range(len(ops))], [values.get(op, 0) for op in ops], width, label=dtype)
    axis.axhline(1, color="#c0392b", linewidth=1, label="budget")
    axis.set_xticks([n + width * (len(result["ops"]) - 1) / 2 for n in range(len(ops))], ops, rotation=15)
    axis.set_ylabel("error as a share of its budget")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "parity.png", dpi=130)
    plt.close(figure)
