"""The demonstration: SmolLM2 with LoRA and QLoRA on Debian's documentation, a small Mistral from scratch.

Everything is written to --out: a report.md with perplexities, samples and plots, and a report.json with the same.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mistral_kernels
from mistral.adapters import load_adapter
from mistral.generate import generate
from mistral.samples import smollm2_path
from mistral.tokenizer import load_tokenizer
from mistral.training.log import plot, read_csv, replace_text
from mistral.weights import load_model

PROMPTS = ("The maintainer scripts of a Debian package", "To build the package from its source,")
SMALL = ("dim=256", "n_layers=4", "n_heads=8", "n_kv_heads=2", "head_dim=32", "hidden_dim=704", "tie_embeddings=true")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/finetune"))
    parser.add_argument("--corpus", type=Path, default=Path("out/corpus/debian.jsonl"))
    parser.add_argument("--steps", type=int, default=24, help="of LoRA and of QLoRA, 2048 tokens each (default: 24)")
    parser.add_argument("--small-steps", type=int, default=40, help="of each small model (default: 40)")
    return parser.parse_args()


def train(out: Path, *flags: str) -> dict[str, Any]:
    """One run of `python -m mistral.train`, which goes on where it was cut off; its summary and log."""
    command = [sys.executable, "-m", "mistral.train", "--out", str(out), *flags]
    print("==", " ".join(command[1:]), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    summary = json.loads((out / "summary.json").read_text())
    held = [float(row["eval_loss"]) for row in read_csv(out / "log.csv") if row["eval_loss"]]
    return summary | dict(
        wall_seconds=time.perf_counter() - start, perplexity_before=math.exp(held[0]), perplexity=math.exp(held[-1])
    )


def samples(adapter: Path | None) -> list[str]:
    """Greedy continuations of the prompts."""
    path = smollm2_path()
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=torch.bfloat16, progress=False)
    if adapter is not None:
        model = load_adapter(model, adapter)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    found = generate(model, prompts, max_tokens=48, stop_ids=tokenizer.stop_ids)
    return [tokenizer.decode(tokens) for tokens in found.tokens]


def run(options: argparse.Namespace) -> dict[str, Any]:
    out, model = options.out, str(smollm2_path())
    data = ("--data", str(options.corpus), "--eval-fraction", "0.05", "--shards", str(out / "shards"))
    batch = ("--seq-len", "1024", "--batch-tokens", "2048", "--eval-batches", "8")
    steps = ("--steps", str(options.steps), "--eval-every", str(max(1, options.steps // 3)), "--save-every", "8")
    lora = ("--model", model, "--lora-rank", "8", "--lr", "5e-4", "--warmup", "4", *data, *batch, *steps)
    small = ("--shape", *SMALL, f"vocab_size={load_tokenizer(model).vocab_size}", "--tokenizer", model)
    small += ("--window", "256", "--lr", "2e-3", "--warmup", "5", "--steps", str(options.small_steps), *data, *batch)
    small += ("--eval-every", str(max(1, options.small_steps // 4)))
    result: dict[str, Any] = dict(
        lora=train(out / "lora", *lora),
        qlora=train(out / "qlora", *lora, "--quantize", "nf4"),
        small_fused=train(out / "small-fused", *small),
        small_eager=train(out / "small-eager", *small, "--ops", "reference", "--loss", "eager"),
    )
    plot(
        out / "lora.png", out / "lora/log.csv", "SmolLM2 on Debian's documentation", [("QLoRA", out / "qlora/log.csv")]
    )
    eager = [("eager", out / "small-eager/log.csv")]
    plot(out / "small.png", out / "small-fused/log.csv", "a small Mistral with a window, from scratch", eager)
    pairs = [read_csv(out / f"small-{kind}/log.csv") for kind in ("fused", "eager")]
    both = [(float(a["loss"]), float(b["loss"])) for a, b in zip(*pairs, strict=True) if a["loss"] and b["loss"]]
    result["largest_relative_difference_of_small_losses"] = max(abs(a - b) / b for a, b in both)
    adapters = dict(before=None, lora=out / "lora/adapter", qlora=out / "qlora/adapter")
    result["samples"] = {name: samples(adapter) for name, adapter in adapters.items()}
    return result


def markdown(result: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {r['perplexity_before']:.2f} | {r['perplexity']:.2f} | {r['steps']} | {r['step_seconds']:.2f} |"
        f" {r['tokens_per_s']:.0f} | {r['mfu']:.0%} | {r['peak_bytes_of_a_process'] / 1e9:.2f} |"
        for name, r in result.items()
        if isinstance(r, dict) and "perplexity_before" in r
    ]
    usable = ", ".join(name for name, reason in mistral_kernels.backends().items() if reason is None)
    lines = [
        "# Training on Debian's documentation",
        f"{torch.get_num_threads()} threads; implementations usable here: {usable}.",
        "",
        "| run | held-out perplexity before | after | steps | s a step | tokens/s | MFU | peak GB |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "The small models, fused and eager, differ by at most "
        f"{result['largest_relative_difference_of_small_losses']:.1e} of the loss.",
        "",
        "![LoRA and QLoRA](lora.png)",
        "![small](small.png)",
    ]
    for name, made in result["samples"].items():
        lines += ["", f"## Samples: {name}", *(f"> **{p}**{text!r}\n" for p, text in zip(PROMPTS, made, strict=True))]
    return "\n".join(lines) + "\n"


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = run(options)
    result["wall_seconds"] = time.perf_counter() - start
    replace_text(options.out / "report.json", json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    replace_text(options.out / "report.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
