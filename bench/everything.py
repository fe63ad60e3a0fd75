"""Every command, each in a process of its own, so that none finds the memory and threads that another left."""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The elementwise ops are timed with the C library's own habits, too: their outputs are large, and a fresh one costs
# more page faults than the kernel takes.
RUNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ops", ("ops", "--allocator", "keep")),
    ("ops-default-allocator", ("ops", "--only", "[2048,", "--allocator", "default")),
    ("attention", ("attention", "--allocator", "keep")),
    ("decode", ("decode", "--allocator", "keep")),
    ("train-step", ("train-step", "--allocator", "keep")),
    ("model", ("model", "--allocator", "keep")),
    ("overhead", ("overhead",)),
    ("window", ("window", "--allocator", "keep")),
    ("gpu-report", ("gpu-report",)),
)
PLOTTED = ("ops", "ops-default-allocator", "attention", "decode", "train-step", "model", "overhead")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the JSON (default: out/bench)")


def command(name: str, parts: tuple[str, ...], options: argparse.Namespace) -> list[str]:
    flags = ["--json", str(options.out / f"{name}.json")]
    flags += ["--plot", str(options.out)] if name in PLOTTED else []
    flags += ["--quick"] if options.quick else []
    flags += ["--device", options.device]
    flags += ["--threads", str(options.threads)] if options.threads else []
    if options.device == "cuda":
        parts = tuple("default" if p == "keep" else p for p in parts)
    return [sys.executable, "-m", "bench", *parts, *flags]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs what --only names (all without it); the status is 1 where one failed, after all have run."""
    options.out.mkdir(parents=True, exist_ok=True)
    failed, start = [], time.perf_counter()
    for name, parts in RUNS:
        if options.only not in name or (options.quick and name == "ops-default-allocator"):
            continue
        print(f"== python -m bench {' '.join(parts)}", flush=True)
        before = time.perf_counter()
        status = subprocess.run(command(name, parts, options)).returncode
        print(f"== {name}: {time.perf_counter() - before:.0f} s, status {status}", flush=True)
        failed += [name] if status else []
    minutes = (time.perf_counter() - start) / 60
    print(
        f"== all in {minutes:.1f} minutes, JSON and plots in {options.out}" + (f"; failed: {failed}" if failed else "")
    )
    return dict(status=1 if failed else 0)
