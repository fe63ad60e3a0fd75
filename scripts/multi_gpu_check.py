"""What scripts/multi_gpu_check.sh calls: the runs, their comparison, one JSON file."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mistral.training.log import read_csv, replace_text

BYTES_A_WEIGHT = 16  # float32 weight, gradient and two moments
SEVEN_B = ["--preset", "mistral-7b-v0.1", "--seq-len", "8192"]
TINY = [
    *("--seq-len", "64", "--shape", "dim=64", "n_heads=4", "n_kv_heads=2", "head_dim=16", "hidden_dim=128"),
    *("vocab_size=199", "sliding_window=32"),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a dry run on CPUs")
    parser.add_argument("--counts", default="", help="numbers of processes, such as '1 2 4' (default: what is here)")
    parser.add_argument("--layers", type=int, default=0, help="of the model (default: 32, or as many as fit)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (default: 8)")
    parser.add_argument("--sequences", type=int, default=8, help="of a step, over all processes (default: 8)")
    parser.add_argument("--skip-eager", action="store_true", help="leave the run on eager ops out")
    return parser.parse_args()


def layers_that_fit(processes: int) -> int:
    """Leaves a fifth of the memory to activations and gathered layers."""
    memory = torch.cuda.get_device_properties(0).total_memory * processes * 0.8
    a_layer, others = 218_112_000, 262_148_096
    return max(1, min(32, int((memory / BYTES_A_WEIGHT - others) // a_layer)))


class Runs:
    """Calls torchrun with what all runs share."""

    def __init__(self, options: argparse.Namespace, folder: Path, layers: int):
        self.options, self.folder, self.layers = options, folder, layers

    def train(self, name: str, processes: int, layers: int, steps: int, *more: str) -> dict[str, Any]:
        """One run; returns its summary, losses and profile, or its error."""
        tiny, out = self.options.tiny, self.folder / name
        length = 64 if tiny else 8192
        shape = [*TINY, f"n_layers={layers}"] if tiny else [*SEVEN_B, "--shape", f"n_layers={layers}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "mistral.train", *shape, "--out", str(out), "--steps", str(steps), "--warmup", "2"]
        command += ["--synthetic", str(length * 256), "--batch-tokens", str(length * self.options.sequences)]
        command += ["--checkpoint-activations", "--device", "cpu" if tiny else "cuda", *more]
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if tiny else "8")}
        print(f"== {name}", flush=True)
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found: dict[str, Any] = dict(processes=processes, layers=layers, status=done.returncode)
        if done.returncode:
            print(done.stdout[-3000:])
            return found | dict(error=done.stdout[-2000:])
        for part in ("summary", "profile"):
            if (out / f"{part}.json").exists():
                found[part] = json.loads((out / f"{part}.json").read_text())
        found["losses"] = [float(row["loss"]) for row in read_csv(out / "log.csv")]
        print(f"   {found['summary']['tokens_per_s']:.0f} tokens/s, MFU {found['summary']['mfu']:.1%}", flush=True)
        return found


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Of two runs' losses, relative."""
    pairs = list(zip(a.get("losses", []), b.get("losses", []), strict=False))
    return max(abs(x - y) / abs(x) for x, y in pairs) if pairs else None


def resumed(runs: Runs, counts: list[int], layers: int) -> dict[str, Any]:
    """A checkpoint of a small model saved by the most processes and resumed by the fewest."""
    many, few = counts[-1], counts[0]
    whole = runs.train("resume-whole", many, layers, 6, "--keep", "0")
    start = runs.train("resume", many, layers, 6, "--save-every", "3", "--keep", "3")
    checkpoint = runs.folder / "resume" / "checkpoints" / "step-00000006"
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    end = runs.train("resume", few, layers, 6, "--keep", "3")
    first = end.get("summary", {}).get("first_step")
    return dict(saved_by=many, resumed_by=few, first_step=first, whole=whole, start=start, end=end) | dict(
        largest_relative_difference_of_losses=largest_difference(whole, end)
    )


def main() -> int:
    options = parse()
    here = 2 if options.tiny else torch.cuda.device_count()
    counts = sorted(int(n) for n in options.counts.split()) or [n for n in (1, 2, 4, 8) if n <= here]
    if not counts or (not options.tiny and counts[-1] > here):
        print(f"multi_gpu_check: {here} GPUs are here, asked for {counts}; --tiny makes a dry run on CPUs")
        return 2
    layers = options.layers or (2 if options.tiny else layers_that_fit(counts[0]))
    folder = Path(tempfile.mkdtemp(prefix="multi_gpu_"))
    runs = Runs(options, folder, layers)
    steps = str(options.steps)
    found: dict[str, Any] = {}
    try:
        for n in counts:
            found[f"fused-{n}"] = runs.train(f"fused-{n}", n, layers, options.steps, "--keep", "0", "--profile", steps)
        if not options.skip_eager:
            how = ("--keep", "0", "--ops", "reference", "--loss", "eager")
            found["eager"] = runs.train("eager", counts[-1], layers, options.steps, *how)
        resume = resumed(runs, counts, min(layers, 2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = dict(device=device(options), shape="tiny" if options.tiny else "mistral-7b-v0.1", runs=found)
    result |= dict(resume=resume, compared=compare(found, counts))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["compared"], indent=1))
    failed = [r for r in (*found.values(), resume["whole"], resume["start"], resume["end"]) if r["status"]]
    return 1 if failed else 0


def device(options: argparse.Namespace) -> str:
    return "CPU" if options.tiny else torch.cuda.get_device_name(0)


def compare(found: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """Losses against the fewest processes, scaling, and fused against eager."""
    one = found[f"fused-{counts[0]}"]
    rates = {n: found[f"fused-{n}"].get("summary", {}).get("tokens_per_s") for n in counts}
    base = rates[counts[0]]
    made: dict[str, Any] = dict(
        losses={n: largest_difference(one, found[f"fused-{n}"]) for n in counts[1:]},
        scaling={n: rate / base / (n / counts[0]) for n, rate in rates.items() if rate and base},
        mfu={n: found[f"fused-{n}"].get("summary", {}).get("mfu") for n in counts},
    )
    eager, most = found.get("eager", {}).get("summary"), rates[counts[-1]]
    if eager and most:
        made["fused_over_eager"] = most / eager["tokens_per_s"]
    return made


if __name__ == "__main__":
    sys.exit(main())
