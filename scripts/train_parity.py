"""Trains one small Mistral with eager and with fused ops from the same seed, and compares the loss curves.

    python scripts/train_parity.py [--steps 200] [--json FILE] [--png FILE]

Three runs on the same batches: eager in float32, fused in float32, and eager in float64, which differs from the first
only in rounding. The fused curve must stay as close to the eager one as the float64 curve does: its largest distance
is no larger. Exit status 1 where it is.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

import mistral_kernels
from mistral.config import ModelConfig
from mistral.model import Transformer

CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=160, vocab_size=97, max_positions=128,
    sliding_window=16,
)  # fmt: skip
BATCH, LENGTH = 4, 64


def batch(step: int) -> torch.Tensor:
    """Sequences that a model can learn: each repeats a random phrase of its own, longer than a half window."""
    generator = torch.Generator().manual_seed(1000 + step)
    phrases = torch.randint(CONFIG.vocab_size, (BATCH, 11), generator=generator)
    return phrases.repeat(1, LENGTH // 11 + 2)[:, : LENGTH + 1]


def train(ops: object, dtype: torch.dtype, steps: int) -> list[float]:
    torch.manual_seed(0)
    net = Transformer(CONFIG, ops=ops).to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95))
    curve = []
    for step in range(steps):
        tokens = batch(step)
        hidden = net.hidden(tokens[:, :-1])
        loss = ops.linear_cross_entropy(hidden, net.output.weight, tokens[:, 1:])  # type: ignore[attr-defined]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    return curve


def distances(a: list[float], b: list[float]) -> list[float]:
    """The largest distance of two curves up to each step."""
    largest, out = 0.0, []
    for x, y in zip(a, b, strict=True):
        largest = max(largest, abs(x - y))
        out.append(largest)
    return out


def plot(curves: dict[str, list[float]], fused: list[float], spread: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for (name, curve), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        left.plot(curve, style, label=name)
    left.set(xlabel="step", ylabel="loss")
    right.semilogy([max(d, 1e-9) for d in fused], label="fused − eager")
    right.semilogy([max(d, 1e-9) for d in spread], "--", label="eager float64 − eager")
    right.set(xlabel="step", ylabel="largest distance so far")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the curves to this file")
    parser.add_argument("--png", type=Path, help="write the plot to this file")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    torch.set_num_threads(1)
    curves = {
        "eager, float32": train(mistral_kernels.reference, torch.float32, options.steps),
        "fused, float32": train(mistral_kernels, torch.float32, options.steps),
        "eager, float64": train(mistral_kernels.reference, torch.float64, options.steps),
    }
    eager, fused, exact = curves.values()
    apart, spread = distances(fused, eager), distances(exact, eager)
    within = apart[-1] <= spread[-1]
    found = dict(
        steps=options.steps, window=CONFIG.sliding_window, length=LENGTH, first=eager[0], last=eager[-1],
        fused_from_eager=apart[-1], float64_from_eager=spread[-1], within=within,
    )  # fmt: skip
    print(json.dumps(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        beside = options.json.with_suffix(".tmp")
        beside.write_text(json.dumps(found | dict(curves=curves)) + "\n")
        os.replace(beside, options.json)
    if options.png:
        plot(curves, apart, spread, options.png)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
