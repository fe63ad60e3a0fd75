"""Writes docs/training_results.md, with its figures and plots in docs/training_results/, from what `make finetune` and
scripts/train_speed.py left in out/."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from mistral.training.log import replace_text

NAMES = {
    "ours": "`mistral.train`",
    "hf-eager": "Hugging Face Trainer, eager",
    "hf-liger": "Hugging Face Trainer, Liger",
}
HEAD = """# What training measured

`make training-docs` ran everything below and wrote this page.
"""


def speed(found: dict[str, Any]) -> str:
    shape = found["shape"]
    lines = [
        "## A step",
        "",
        f"{shape['n_layers']} layers of SmolLM2's shape, one sequence of {found['seq_len']} tokens, window"
        f" {found['window']}, {found['precision']}, {found['device']}, {found['threads']} threads. Each variant runs in"
        f" processes of its own, in turn; medians.",
        "",
        "| | s a step | of ours | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for name, seconds in found["median_step_seconds"].items():
        ratio, peak = found["speedup"][name], found["peak_gigabytes"][name]
        lines.append(f"| {NAMES[name]} | {seconds:.2f} | {ratio:.2f} x | {peak:.2f} |")
    lines += [f"\n{NAMES[name]} could not run: {why}" for name, why in found["could_not_run"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finetune", type=Path, default=Path("out/finetune"))
    parser.add_argument("--speed", type=Path, default=Path("out/train_speed.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/training_results.md"))
    options = parser.parse_args()
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for source in (options.speed, *(options.finetune / name for name in ("report.json", "lora.png", "small.png"))):
        shutil.copyfile(source, folder / source.name)
    report = (options.finetune / "report.md").read_text().replace("](", f"]({folder.name}/")
    report = report.replace("\n## ", "\n### ").replace("# ", "## ", 1)
    replace_text(options.out, "\n".join((HEAD, speed(json.loads(options.speed.read_text())), report)))


if __name__ == "__main__":
    main()
