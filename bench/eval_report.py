"""Tables and the plot of `eval_study`."""

from pathlib import Path
from typing import Any

from mistral.evaluation.local import TASKS
from mistral.evaluation.report import perplexity_lines, perplexity_table

from . import report

MARK = "evaluation study"


def rate(tokens: int, seconds: list[float]) -> float:
    """Tokens a second of the middle round."""
    return tokens / sorted(seconds)[len(seconds) // 2]


def harness_table(found: dict[str, Any]) -> str:
    rows = []
    for task, row in found["tasks"].items():
        theirs, ours = row["seconds"].values()
        metrics = [", ".join(f"{m} {v:.4g}" for m, v in each.items()) for each in row["metrics"].values()]
        rates = [rate(row["tokens"], s) for s in (theirs, ours)]
        figures = (f"{row['largest_difference']:.1e}", "yes" if row["greedy_agree"] else "NO")
        same = metrics[1] if metrics[0] == metrics[1] else f"{metrics[0]} / {metrics[1]}"
        speed = (f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.1f}x")
        rows.append((task, row["requests"], row["tokens"], *figures, same, *speed))
    head = ("task", "requests", "tokens", "largest difference", "greedy flags agree", "metrics (theirs / ours)")
    return report.markdown((*head, "theirs, tokens/s", "ours", "ratio"), rows)


def ratio_of_all(found: dict[str, Any]) -> float:
    """Ours over theirs, over all tasks together."""
    times = [[sorted(s)[len(s) // 2] for s in row["seconds"].values()] for row in found["tasks"].values()]
    return sum(t[0] for t in times) / sum(t[1] for t in times)


def variant_table(variants: dict[str, dict[str, Any]]) -> str:
    run = {name: v for name, v in variants.items() if "failed" not in v}
    tasks = list(dict.fromkeys(t for v in run.values() for t in v["tasks"]))
    texts = list(dict.fromkeys(t for v in run.values() for t in v["perplexity"]))
    rows = []
    for name, v in run.items():
        shares = [f"{100 * v['tasks'][t]['value']:.1f} ± {100 * v['tasks'][t]['stderr']:.1f}" for t in tasks]
        rows.append((name, *shares, *(f"{v['perplexity'][t]:.3f}" for t in texts)))
    chance = [f"{100 * c:.0f}" if (c := TASKS[t][1]) is not None else "" for t in tasks]
    rows.append(("*chance*", *chance, *("" for _ in texts)))
    return report.markdown(("", *(t.removeprefix("local_") for t in tasks), *(f"perplexity, {t}" for t in texts)), rows)


def tables(result: dict[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    failed = {name: v["failed"] for name, v in result["variants"].items() if "failed" in v} | result["harness"][
        "failed"
    ]
    parts = [
        "### The harness's Hugging Face class and ours",
        harness_table(result["harness"]),
        f"float32, the same weights and questions; over all tasks ours takes 1/{ratio_of_all(result['harness']):.1f} of"
        " the time. Tokens are those of all requests; ours runs what they share once. Medians of"
        f" {options['rounds']} rounds in turn; theirs with 8 sequences a batch.",
        "### SmolLM2-135M-Instruct in every way that it can be run",
        variant_table(result["variants"]),
        "bfloat16 where nothing else is said. Per cent of right answers with their standard error,"
        f" {options['samples']} questions of each task; perplexity of {options['tokens']} tokens in sequences of 2048."
        " The file's weights are Q4_1 and Q8_0: int8 and int4 round them again."
        f" LoRA: {options['steps']} steps of 2048 tokens of Debian's documentation, without the held-out passages.",
        *(f"Not run, {name}: {reason}" for name, reason in failed.items()),
        "### Perplexity by length and window",
        perplexity_table(result["perplexity"]),
        f"bfloat16, {options['table_tokens']} tokens of the Python reference cut into sequences of so many tokens.",
        f"Measured on {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, commit"
        f" {machine['commit']}, in {result['seconds'] / 60:.0f} minutes.",
    ]
    return "\n\n".join(parts)


def check_page(path: Path) -> None:
    """Raises before anything is measured where the page has no place for the tables."""
    report.placed(path.read_text(encoding="utf-8"), MARK, "")


def write_page(path: Path, text: str) -> None:
    report.write(path, report.placed(path.read_text(encoding="utf-8"), MARK, text))


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy of each variant, a line a task; perplexity of each; perplexity by length and window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = {name: v for name, v in result["variants"].items() if "failed" not in v}
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), width_ratios=(3, 2, 2))
    places = range(len(run))
    for i, task in enumerate(dict.fromkeys(t for v in run.values() for t in v["tasks"])):
        rows = [v["tasks"][task] for v in run.values()]
        errors = [100 * (row["stderr"] or 0) for row in rows]
        label = task.removeprefix("local_") + ("" if TASKS[task][1] is None else f" (chance {TASKS[task][1]:.0%})")
        shares = [100 * row["value"] for row in rows]
        beside = [at + 0.12 * (i - 2) for at in places]  # so that error bars do not cover each other
        axes[0].errorbar(beside, shares, errors, marker="o", capsize=2, linestyle="none", label=label)
    axes[0].set_ylabel("% right")
    for text in dict.fromkeys(t for v in run.values() for t in v["perplexity"]):
        axes[1].plot(places, [v["perplexity"][text] for v in run.values()], "o", label=text)
    axes[1].set_ylabel("perplexity, 2048 tokens at a time")
    for axis in axes[:2]:
        axis.set_xticks(places, list(run), rotation=60, ha="right", fontsize=7)
    perplexity_lines(axes[2], result["perplexity"])
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
