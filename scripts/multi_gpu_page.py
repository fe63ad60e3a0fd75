"""Writes docs/training_gpus.md from what scripts/multi_gpu_check.sh left in docs/training_gpus/.

python scripts/multi_gpu_page.py
"""

import json
from pathlib import Path
from typing import Any

from mistral.training.log import replace_text

FOLDER = Path("docs/training_gpus")
HEAD = """# Training on several GPUs

What `scripts/multi_gpu_check.sh` found: a random model of Mistral 7B's shape, cut to as many layers as the table says,
sequences of 8192 tokens with a window of 4096, bfloat16 with float32 master weights, FSDP2 over NCCL, activation
checkpointing, 65 536 tokens a step. MFU counts no recomputation and is the share of the rate of a matrix product on the
same GPUs; each layer runs its forward twice. `python scripts/multi_gpu_page.py` writes this page.
"""
COLUMNS = "| ops | GPUs | layers | s a step | tokens/s | MFU | peak GB a GPU | communication |\n" + 8 * "|---" + "|"


def communication(profile: dict[str, Any]) -> float:
    """NCCL's kernels as a share of the step; hidden behind products or not."""
    kernels = [entry["seconds"] for entry in profile["longest"] if entry["name"].startswith("ncclDevKernel")]
    return sum(kernels) / profile["seconds"]


def run_line(name: str, run: dict[str, Any]) -> str:
    if "summary" not in run:
        why = run["error"].splitlines()[-1][:80]
        return f"| {name} | {run['processes']} | {run['layers']} | could not run: {why} |"
    s = run["summary"]
    busy = f"{communication(run['profile']):.0%}" if "profile" in run else ""
    return (
        f"| {name} | {run['processes']} | {run['layers']} | {s['step_seconds']:.2f} | {s['tokens_per_s']:.0f} |"
        f" {s['mfu']:.1%} | {s['peak_bytes_of_a_process'] / 1e9:.0f} | {busy} |"
    )


def section(found: dict[str, Any], title: str) -> str:
    lines = [f"## {title}", "", f"{found['device']}.", "", COLUMNS]
    lines += [run_line(name.split("-")[0], run) for name, run in found["runs"].items()]
    compared, resume = found["compared"], found["resume"]
    lines.append("")
    for n, share in compared["scaling"].items():
        if n in compared["losses"]:
            lines.append(
                f"- {n} GPUs: {share:.0%} of as many times the fewest GPUs' speed; the losses differ by at most"
                f" {compared['losses'][n]:.1e}."
            )
    if "fused_over_eager" in compared:
        lines.append(f"- Fused ops are {compared['fused_over_eager']:.1f} times as fast as eager ones.")
    lines.append(
        f"- A checkpoint of {resume['saved_by']} processes went on in {resume['resumed_by']} after step"
        f" {resume['first_step']}: losses differ from the unbroken run by at most"
        f" {resume['largest_relative_difference_of_losses']:.1e}."
    )
    lines.append("- Communication is the time of NCCL's kernels over that of the step, hidden behind products or not.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parts = [section(json.loads(path.read_text()), path.stem) for path in sorted(FOLDER.glob("*.json"))]
    replace_text(Path("docs/training_gpus.md"), "\n".join([HEAD, *parts]))


if __name__ == "__main__":
    main()
