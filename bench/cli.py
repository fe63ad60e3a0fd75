"""The command line: python -m bench COMMAND."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import compare, report, timing
from .machine import ALLOCATORS

DESCRIPTION = """\
Benchmarks of mistral_kernels. Each row first checks parity with float64 on the very inputs that it times; a row
that fails is refused. Then ours, the peers and the machine's own limit are timed in turn, each round in another order,
and medians with their 10-90 % range are printed. Exit status 1: a row was refused, or --compare found one slower."""
EXAMPLES = """\
examples:
  python -m bench ops --quick
  python -m bench attention --json out/attention.json --plot out
  python -m bench ops --only swiglu --compare out/ops.json
  python -m bench all --out out/bench"""
# Each command's module has `run(options) -> dict` and may have `arguments(parser)`.
COMMANDS = {
    "ops": ("rows", "memory-bound ops and the loss, forward and backward"),
    "attention": ("rows", "causal and sliding-window attention, scaling curves"),
    "decode": ("rows", "one token at a time over the ring cache"),
    "train-step": ("train_step", "forward, backward and AdamW of a small model"),
    "model": ("model", "prefill and decoding of SmolLM2-135M against Hugging Face and llama.cpp"),
    "overhead": ("rows", "what a call costs on tiny tensors"),
    "window": ("window", "time, memory, perplexity and retrieval against window and length"),
    "all": ("everything", "every command, each in a process of its own"),
    "docs": ("docs", "write docs/performance.md from docs/bench/*.json"),
    "gpu-report": ("gpu_report", "every GPU kernel's machine code, and a roofline model of it"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        common(sub)
        # Only the command's own module is imported: what one needs, others may lack.
        if name in (sys.argv[1:] if argv is None else argv)[:1]:
            getattr(importlib.import_module(f".{module}", __package__), "arguments", lambda sub: None)(sub)
    return parser.parse_args(argv)


def common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows to FILE")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each candidate of each row")
    sub.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="write PNG and SVG plots into FOLDER, named as the JSON"
    )
    sub.add_argument("--compare", type=Path, metavar="OLD.json", help="exit 1 where a row became slower since")
    sub.add_argument(
        "--tolerance", type=float, default=compare.TOLERANCE, help="how much slower --compare lets pass (default: 1.2)"
    )
    sub.add_argument("--quick", action="store_true", help="few small rows, few rounds, no torch.compile")
    sub.add_argument("--only", default="", metavar="TEXT", help="rows with TEXT in their key")
    sub.add_argument("--peers", metavar="A,B", help="only these peers (default: all that can run)")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    sub.add_argument("--seconds", type=float, help=f"to measure a row (default: {timing.FULL.seconds:g})")
    sub.add_argument(
        "--allocator",
        choices=ALLOCATORS,
        default="default",
        help="'keep': glibc keeps freed memory, so that nobody's outputs cost page faults",
    )


def check(options: argparse.Namespace) -> None:
    """Fails on what cannot work before any time is spent."""
    if options.threads is not None and options.threads < 1:
        sys.exit(f"bench: --threads is {options.threads}; it must be at least 1")
    if options.seconds is not None and not options.seconds > 0:
        sys.exit(f"bench: --seconds is {options.seconds}; it must be above 0")
    if not options.tolerance > 1:
        sys.exit(f"bench: --tolerance is {options.tolerance}; it must be above 1")
    if options.compare is not None:
        try:
            options.old = report.read_json(options.compare)
        except (OSError, ValueError) as error:
            sys.exit(f"bench: --compare: {error}")
    if options.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            sys.exit("bench: --plot needs matplotlib; pip install mistral-kernels[bench]")


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Sets device, threads and allocator; returns the facts of the machine."""
    import torch

    from . import machine

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: --device cuda was asked for, and no GPU is here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine.set_allocator(options.allocator)
    return machine.facts(options.device, options.allocator)


def finish(options: argparse.Namespace, run: dict[str, Any]) -> int:
    """Writes what was asked for; the exit status."""
    rows = run["rows"]
    if options.json:
        report.write_json(options.json, run | dict(rows=[vars(r) for r in rows]))
    if options.csv:
        report.write(options.csv, report.csv_text(rows))
    if options.plot:
        from . import plots

        stem = options.json.stem if options.json else options.command  # one command may be run in several ways
        for path in plots.plot_rows(rows, options.plot, options.command, stem):
            print(f"wrote {path}")
    refused = [r for r in rows if r.refused]
    status = 1 if refused or run.get("failed") or not (rows or run.keys() & {"study", "kernels"}) else 0
    if refused:
        print(f"bench: {len(refused)} of {len(rows)} rows were refused", file=sys.stderr)
    return max(status, compared(options, rows)) if options.compare else status


def compared(options: argparse.Namespace, rows: list[Any]) -> int:
    old = report.rows_of(options.old)
    new_keys = {r.key for r in rows}
    try:
        found = compare.changes(old, rows, options.tolerance)
    except ValueError as error:
        sys.exit(f"bench: --compare {options.compare}: {error}")
    compare.print_changes(found, [r.key for r in old if r.key not in new_keys])
    return 1 if compare.failed(found) else 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    check(options)
    facts = prepare(options)
    module = importlib.import_module(f".{COMMANDS[options.command][0]}", __package__)
    given = sys.argv[1:] if argv is None else argv
    run: Callable[..., dict[str, Any]] = module.run
    if options.command in ("all", "docs"):
        return int(run(options)["status"])
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    return finish(options, dict(argv=["python", "-m", "bench", *given], machine=facts) | run(options))
