"""What a run shows and writes while it goes on, and the summary and plot at its end."""

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from ..extras import need
from .log import CsvLog, TensorBoard, gemm_rate, peak_memory, plot, replace_text, step_flops

if TYPE_CHECKING:
    from .trainer import Trainer


class Report:
    """Progress bar, log.csv, events, summary.json and loss.png of a run; all but the first process keep quiet."""

    def __init__(self, trainer: "Trainer"):
        self.trainer, settings = trainer, trainer.settings
        self.active = trainer.world.first
        self.first_step = trainer.step
        self.rows: list[dict[str, Any]] = []
        self.rate = self._rate()
        if not self.active:
            return
        trainer.folder.mkdir(parents=True, exist_ok=True)
        replace_text(trainer.folder / "settings.json", json.dumps(settings.as_dict(), indent=1) + "\n")
        self.logs: list[Any] = [CsvLog(trainer.folder / "log.csv", trainer.step)]
        if settings.tensorboard:
            self.logs.append(TensorBoard(trainer.folder / "tensorboard", trainer.step))
        self.bar = need("tqdm").tqdm(
            total=trainer.steps, initial=trainer.step, desc="training", unit="step", disable=None
        )
        if trainer.step:
            self.bar.write(f"going on after step {trainer.step} of {trainer.steps}")

    def _rate(self) -> float:
        """Operations a second of all processes together, measured now; 0 where that was not asked for."""
        trainer = self.trainer
        if not trainer.settings.mfu:
            return 0.0
        mine = gemm_rate(trainer.config, trainer.dtype, trainer.world.device)
        return trainer.world.total(torch.tensor(mine, dtype=torch.float64, device=trainer.world.device)).item()

    def evaluated(self, loss: float | None) -> None:
        """Held-out loss before the first step."""
        if self.active and loss is not None:
            for log in self.logs:
                log.write(dict(step=0, tokens=0, eval_loss=loss))

    def stepped(self, row: dict[str, Any]) -> None:
        trainer = self.trainer
        row["tokens_per_s"] = trainer.settings.batch_tokens / row["seconds"]
        if self.rate:
            share = 0.0 if trainer.settings.lora_rank else 1.0
            flops = step_flops(trainer.config, trainer.settings.batch_tokens, trainer.settings.seq_len, share)
            row["mfu"] = flops / row["seconds"] / self.rate
        self.rows.append(row)
        if not self.active:
            return
        if row["step"] % trainer.settings.log_every == 0 or row["step"] == trainer.steps or row.get("eval_loss"):
            for log in self.logs:
                log.write(row)
        shown = dict(loss=f"{row['loss']:.4f}", tok_s=f"{row['tokens_per_s']:.0f}")
        if "mfu" in row:
            shown["mfu"] = f"{row['mfu']:.0%}"
        self.bar.set_postfix(shown)
        self.bar.update()

    def finish(self) -> dict[str, Any]:
        """Writes summary.json, loss.png and the export; returns the summary."""
        from .export import export

        trainer = self.trainer
        summary = self.summary()
        path = trainer.folder / "summary.json"
        if not self.rows and path.is_file():  # the run was already at its end
            summary = json.loads(path.read_text())
        if self.active:
            self.bar.close()
            for log in self.logs:
                log.close()
            summary["plot"] = plot(trainer.folder / "loss.png", trainer.folder / "log.csv", trainer.folder.name)
        summary["exported"] = export(trainer)
        if self.active:
            replace_text(path, json.dumps(summary, indent=1) + "\n")
        return summary

    def summary(self) -> dict[str, Any]:
        """Medians leave out the first step of this process, which warms up."""
        trainer, timed = self.trainer, self.rows[1:] or self.rows
        last = self.rows[-1] if self.rows else {}
        peak = torch.tensor(float(peak_memory(trainer.world.device)), device=trainer.world.device)
        held = last.get("eval_loss")
        return dict(
            steps=trainer.step,
            first_step=self.first_step,
            processes=trainer.world.size,
            device=str(trainer.world.device.type),
            parameters=trainer.config.parameter_count(),
            trained=sum(p.numel() for p in trainer.parameters),
            sequences=len(trainer.sequences),
            loss=last.get("loss"),
            eval_loss=held,
            perplexity=None if held is None else math.exp(held),
            step_seconds=median([row["seconds"] for row in timed]),
            tokens_per_s=median([row["tokens_per_s"] for row in timed]),
            mfu=median([row["mfu"] for row in timed if "mfu" in row]),
            gemm_flops_per_s=self.rate or None,
            peak_bytes_of_a_process=int(peak.item()),
        )


def median(values: list[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None
