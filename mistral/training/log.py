"""What a run leaves to read: log.csv, TensorBoard's events, a plot of the loss; and the rates behind MFU."""

import csv
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..extras import need

COLUMNS = ("step", "tokens", "loss", "eval_loss", "lr", "grad_norm", "loss_scale", "seconds", "tokens_per_s", "mfu")


def replace_text(path: Path, text: str) -> None:
    """Writes beside the file and renames."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; a last line that a killed process left unfinished is dropped."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values()]


class CsvLog:
    """log.csv, a row at a time; a run that goes on first drops the rows behind its checkpoint.

    Numbers are written so that they read back exactly.
    """

    def __init__(self, path: Path, step: int):
        kept = [row for row in read_csv(path) if int(row["step"]) <= step] if step else []
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        replace_text(path, out.getvalue())
        self.file = path.open("a", encoding="utf-8", newline="")

    def write(self, row: dict[str, Any]) -> None:
        values = ["" if row.get(name) is None else repr(row[name]) for name in COLUMNS]
        self.file.write(",".join(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files; steps behind `step` that an earlier process wrote are hidden."""

    def __init__(self, folder: Path, step: int):
        need("tensorboard", "train")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


def plot(path: Path, csv_path: Path, title: str, others: Sequence[tuple[str, Path]] = ()) -> bool:
    """Draws the losses of a log, and of others beside it; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, file in (("training", csv_path), *others):
        rows = [row for row in read_csv(file) if row["loss"]]
        axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], label=label, linewidth=1)
        held = [row for row in read_csv(file) if row["eval_loss"]]
        if held:
            steps, losses = [int(r["step"]) for r in held], [float(r["eval_loss"]) for r in held]
            axes.plot(steps, losses, "o-", label=f"{label}: held-out", markersize=3)
    axes.set(xlabel="step", ylabel="cross entropy per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    beside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    figure.savefig(beside, dpi=150)
    pyplot.close(figure)
    os.replace(beside, path)
    return True


# ---- rates ----


def step_flops(config: ModelConfig, tokens: int, seq_len: int, trained_share: float = 1.0) -> float:
    """The floating point operations of the products in one step, forward and backward, without recomputation.

    2 a weight and token forward (embedding look-ups count nothing, the output projection does), 4 H D a query and
    visible key; the backward takes as much again for the inputs, and as much for the weights that are trained (Kaplan
    et al. 2020; PaLM, appendix B). Documents that end within a sequence see fewer keys than are counted here.

    Args:
        config: of the model.
        tokens: of the step.
        seq_len: S.
        trained_share: of the weights, in products that need their gradient; about 0 for LoRA.
    """
    lookups = 0 if config.tie_embeddings else config.vocab_size * config.dim
    weights = config.parameter_count() - lookups
    window = min(seq_len, config.sliding_window or seq_len)
    visible = window * (window + 1) / 2 + (seq_len - window) * window
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * visible / seq_len
    return tokens * (2 * weights * (2 + trained_share) + 3 * attention)


@torch.no_grad()
def gemm_rate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of `torch.mm`: the best of the feed-forward layer's shape and a square."""
    side = 8192 if device.type == "cuda" else 1024
    shapes = ((2 * side, config.dim, config.hidden_dim), (side, side, side))
    return max(_rate(*shape, dtype, device) for shape in shapes)


def _rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    seconds, flops = float("inf"), 2 * m * k * n
    repeats = max(1, int((1e13 if device.type == "cuda" else 2e9) / flops))
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(device)
        seconds = min(seconds, (time.perf_counter() - start) / repeats)
    return flops / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or the most that this process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
