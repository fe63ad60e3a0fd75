"""Step time and peak memory of training: ours against Hugging Face's Trainer with eager attention, and with Liger.

python scripts/train_speed.py out/train_speed.json --seq-len 2048

Each variant is a process of its own, for its peak memory; they take turns, so that a busy machine slows all alike.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mistral.config import ModelConfig
from mistral.training.log import replace_text

VARIANTS = ("ours", "hf-eager", "hf-liger")
SHAPE = dict(dim=576, n_layers=4, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=49_152)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after one that warms up")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def config(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(**SHAPE, sliding_window=options.window, tie_embeddings=True)


def ours(options: argparse.Namespace, folder: str) -> list[float]:
    """Seconds of each optimizer step of `mistral.train`."""
    from mistral.training.parallel import World
    from mistral.training.settings import from_mapping
    from mistral.training.trainer import Trainer

    length = options.seq_len
    shape = {**SHAPE, "sliding_window": options.window, "tie_embeddings": True}
    made: dict[str, Any] = dict(shape=shape, synthetic=length * 64, seq_len=length, batch_tokens=length, keep=0)
    made |= dict(precision=options.precision, steps=options.steps + 1, out=folder, mfu=False)
    world = World()
    trainer = Trainer(from_mapping(made), world)
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        trainer.train_step()
        seconds.append(time.perf_counter() - start)
    world.stop()
    return seconds


def hugging_face(options: argparse.Namespace, folder: str, liger: bool) -> list[float]:
    """Seconds of each step of transformers.Trainer on a MistralForCausalLM of the same shape."""
    import transformers

    from mistral.weights import hf_config

    entries = transformers.MistralConfig(**hf_config(config(options)), attn_implementation="eager")
    model = transformers.MistralForCausalLM(entries)
    tokens = torch.randint(SHAPE["vocab_size"], (64, options.seq_len))
    data = [dict(input_ids=row, labels=row) for row in tokens]
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=options.steps + 1,
        bf16=options.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        use_liger_kernel=liger,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return seconds


def child(options: argparse.Namespace) -> None:
    """Runs one variant and prints what it took as the last line."""
    with tempfile.TemporaryDirectory() as folder:
        if options.only == "ours":
            seconds = ours(options, folder)
        else:
            seconds = hugging_face(options, folder, options.only == "hf-liger")
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(seconds=seconds[1:], peak_bytes=peak)))


def main() -> int:
    options = parse()
    if options.only:
        child(options)
        return 0
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        for name in [n for n in VARIANTS if n not in failed]:
            done = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True)
            if done.returncode:
                failed[name] = done.stderr.strip().rpartition("\n")[2][:300]
            else:
                seen[name].append(json.loads(done.stdout.strip().rpartition("\n")[2]))
    medians = {n: statistics.median(s for run in runs for s in run["seconds"]) for n, runs in seen.items() if runs}
    result = dict(
        device=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        threads=torch.get_num_threads(),
        precision=options.precision,
        seq_len=options.seq_len,
        window=options.window,
        shape=SHAPE,
        median_step_seconds=medians,
        speedup={n: s / medians["ours"] for n, s in medians.items()} if "ours" in medians else {},
        peak_gigabytes={n: max(run["peak_bytes"] for run in runs) / 1e9 for n, runs in seen.items() if runs},
        could_not_run=failed,
        runs=seen,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    return 0 if "ours" in medians else 1


if __name__ == "__main__":
    sys.exit(main())
