"""The kernels for compute capability 9.0 on a GPU: parity, times, and the calibration of their emulator.

    python scripts/gpu_hopper.py out/hopper.json                    everything, about eight minutes on an H100
    python scripts/gpu_hopper.py out/hopper.json forward times      these parts
    python scripts/gpu_hopper.py --dry-run out/hopper.json          what there is without a GPU, in the emulator

Each piece is a process of its own with a time limit: one that hangs is ended, what it found so far is kept, and the
others run. The exit status is 1 where a parity fails or a piece does not end (but for those that may hang).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "scripts"), str(ROOT / "tests")]
MARK = "found: "
KINDS = ("gaussian", "ramp", "one_hot", "large")
Found = Iterator[dict[str, Any]]


# ---- pieces: each runs alone in a process


def facts() -> Found:
    """The machine, and which kernels a call of attention and of its gradient really launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import mistral_kernels as mk

    yield {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    yield {"torch": torch.__version__, "cuda": torch.version.cuda}
    shapes = ((32, 128), (8, 128), (8, 128))
    q, k, v = (torch.randn(1, 1024, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, d in shapes)
    mk.attention(q, k, v, impl="cuda").sum().backward()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        mk.attention(q, k, v, impl="cuda").sum().backward()
        torch.cuda.synchronize()
    yield {"kernels": sorted({e.key.split("(")[0] for e in seen.key_averages() if "mk::cuda" in e.key})}


def judged(case: Any, dtype: str, kind: str, gradients: bool, device: str) -> tuple[dict[str, Any], list]:
    import torch

    from mistral_kernels.testing import parity, pooled_max

    result = parity(case, getattr(torch, dtype), "cuda", device=device, kind=kind, gradients=gradients)
    worst = pooled_max(result)
    row = {"op": case.op, "case": case.label, "dtype": dtype, "kind": kind, "gradients": gradients, "share": worst}
    errors = {e.output: [e.max_error, e.max_eager, round(e.max_ratio, 3)] for e in result}
    return row | {"passed": bool(worst <= 1), "errors": errors}, result


def shares(cases: list, dtype: str, gradients: bool, kinds: tuple[str, ...] = KINDS) -> Found:
    """The largest error of each case as a share of its budget, and the RMS error of each output over all cases."""
    import torch

    from mistral_kernels.testing import pooled

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind in kinds:
        outputs: dict[str, list] = {}
        for case in cases:
            row, result = judged(case, dtype, kind, gradients, device)
            yield row
            for e in result:
                outputs.setdefault(f"{case.op} {e.output}", []).append(e)
        for name, errors in outputs.items():
            worst = pooled(errors)
            yield {"output": name, "dtype": dtype, "kind": kind, "rms share": worst, "passed": bool(worst <= 1)}


def forward(dim: str, dtype: str) -> Found:
    import hopper_grids

    yield from shares(list(hopper_grids.forward(int(dim))), dtype, False)


def backward(dim: str, dtype: str) -> Found:
    import hopper_grids

    yield from shares(list(hopper_grids.backward(int(dim))), dtype, True)


def large(gradients: str, dtype: str) -> Found:
    import hopper_grids

    yield from shares(list(hopper_grids.large()), dtype, gradients == "gradients", ("gaussian",))


def repeated() -> Found:
    """The same call two hundred times: every result must be bitwise the first."""
    import torch

    import mistral_kernels as mk

    for dim, window in itertools.product((64, 128), (None, 500)):
        q, k, v = (torch.randn(2, 3000, h, dim, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        first, wrong = None, 0
        for _ in range(200):
            out = mk.attention(*leaves, window=window, impl="cuda")
            found = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
            first = first or found
            wrong += not all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
        yield {"dim": dim, "window": window, "runs": 200, "different": wrong, "passed": wrong == 0}


def calibrate(question: str) -> Found:
    import hopper_calibration

    yield from hopper_calibration.ask(question)


# ---- times

SHAPES = [(1024 << i, window, 128) for i in range(7) for window in (None, 4096) if not window or 1024 << i > window]
SHAPES += [(8192, None, 64), (8192, None, 256)]


def measured(run: Callable[[], Any], amount: float) -> dict[str, Any]:
    from triton.testing import do_bench

    ms = do_bench(run, warmup=10, rep=60, return_mode="median")
    return {"ms": round(ms, 4), "per s": round(amount / ms * 1e3)}


def times(which: str) -> Found:
    """Attention with 32 heads over 8 KV heads, of 16384 tokens or more; FLOP of visible pairs, backward 2.5 times."""
    import torch

    import mistral_kernels as mk

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for sequence, window, dim in SHAPES:
        batch, width = max(1, 16384 // sequence), min(window or sequence, sequence)
        q, k, v = (
            torch.randn(batch, sequence, h, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for h in (32, 8, 8)
        )
        flops = 4 * batch * 32 * dim * (sequence * width - width * (width - 1) / 2)
        inputs = (q, k, v)
        if which == "sdpa":
            if window:
                continue
            inputs = tuple(t.detach().transpose(1, 2).requires_grad_() for t in inputs)
            call = lambda x=inputs: sdpa(*x, is_causal=True, enable_gqa=True)  # noqa: E731
        else:
            call = mk.using(impl="triton" if which == "triton" else "cuda").attention
            call = lambda x=inputs, f=call, w=window: f(*x, window=w)  # noqa: E731
        row = {"which": which, "sequence": sequence, "batch": batch, "window": window, "dim": dim}
        with torch.no_grad():
            yield {**row, "pass": "forward", **measured(call, flops)}
        out = call()
        grad = torch.randn_like(out)
        run = lambda o=out, x=inputs, g=grad: torch.autograd.grad(o, x, g, retain_graph=True)  # noqa: E731
        yield {**row, "pass": "backward", **measured(run, 2.5 * flops)}


def decode(which: str) -> Found:
    """One query a sequence over a full ring of 4096; bytes of keys and values. And short chunks before it."""
    import torch

    import mistral_kernels as mk

    def tensors(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    for batch, queries in itertools.product((1, 8, 64), (1, 8)):
        slots = 4096 + (queries - 1)
        q, k, v = tensors(batch, queries, 32, 128), *tensors(2, batch, slots, 8, 128)
        lens = torch.full((batch,), 9000, device="cuda", dtype=torch.int32)
        impl = "triton" if which == "triton" else "cuda"
        call = lambda q=q, k=k, v=v, n=lens, i=impl: mk.attention_cached(q, k, v, n, 4096, impl=i)  # noqa: E731
        row = {"which": which, "batch": batch, "queries": queries, "pass": "decode"}
        yield {**row, **measured(call, k.nbytes * 2)}


PIECES = {f.__name__: f for f in (facts, forward, backward, large, repeated, calibrate, times, decode)}


# ---- all of them

# Parts, and how many pieces of them at a time.
PHASES = ((("facts",), 1), (("large", "backward", "forward", "calibration"), 5), (("times", "hang"), 1))


def plan(parts: list[str], dry: bool) -> list[tuple[str, list[str], int, bool]]:
    """(part, piece and arguments, seconds at most, whether it may hang), in the order of the parts."""
    from hopper_calibration import QUESTIONS

    dtypes = ("bfloat16", "float16")
    questions = [q for q in QUESTIONS if q != "registers"]
    if dry:
        asked = {"calibration": [["calibrate", q] for q in ("rounding", "tiles", "stress")]}
    else:
        asked = {
            "facts": [["facts"]],
            "forward": [["forward", str(d), t] for d in (8, 64, 96, 128, 200, 256) for t in dtypes],
            "backward": [["backward", str(d), t] for d in (8, 64, 96, 128) for t in dtypes],
            "large": [["repeated"]] + [["large", g, t] for g in ("none", "gradients") for t in dtypes],
            "times": [[kind, w] for w in ("hopper", "sm_80", "triton", "sdpa") for kind in ("times", "decode")],
            "calibration": [["calibrate", q] for q in questions],
            "hang": [["calibrate", "registers"]],
        }
    limit = {"times": 200, "facts": 60, "hang": 20}
    return [(p, piece, limit.get(p, 120), p == "hang") for p in parts for piece in asked.get(p, [])]


def run(part: str, piece: list[str], limit: int, may_hang: bool) -> dict[str, Any]:
    """A piece in its own process; `found` is what it printed before it ended."""
    # Tensors are small, and threads of several processes would wait for each other.
    environment = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    if "sm_80" in piece:
        environment["MISTRAL_KERNELS_HOPPER"] = "0"
    start = time.monotonic()
    command = [sys.executable, __file__, "--piece", *piece]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, said = process.communicate()
        said = f"not done after {limit} s\n{said}"
    found = [json.loads(line[len(MARK) :]) for line in out.split("\n") if line.startswith(MARK)]
    failed = [f for f in found if f.get("passed") is False]
    row = {"part": part, "piece": " ".join(piece), "seconds": round(time.monotonic() - start, 1), "found": found}
    row["ok"] = may_hang or (process.returncode == 0 and not failed)
    if process.returncode:
        row["said"] = said[-2000:]
    print(f"== {row['piece']}: {len(found)} found, {len(failed)} failed, {row['seconds']} s", flush=True)
    for f in failed[:5] if part in ("forward", "backward", "large") else found:
        print("  ", f)
    if process.returncode:
        print("  ", row["said"][-700:], flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("json", nargs="?", type=Path)
    names = [part for parts, _ in PHASES for part in parts if part != "hang"]
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(names)}, and hang: what is expected to hang")
    options = parser.parse_args()
    if options.piece:
        for found in PIECES[options.piece[0]](*options.piece[1:]):
            print(MARK + json.dumps(found), flush=True)
        return 0
    if options.json is None:
        parser.error("the path of the JSON to write is missing")
    pieces = plan(options.parts or names, options.dry_run)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    writing = threading.Lock()

    def finish(row: dict[str, Any]) -> None:
        """Written after each piece, so that what ends the whole run does not take the rest along."""
        with writing:
            rows.append(row)
            beside = options.json.with_suffix(".tmp")
            beside.write_text(json.dumps(rows, indent=1))
            os.replace(beside, options.json)

    for parts, together in PHASES:
        with ThreadPoolExecutor(1 if options.dry_run else together) as pool:
            list(pool.map(lambda p: finish(run(*p)), [p for p in pieces if p[0] in parts]))
    print(f"{sum(not r['ok'] for r in rows)} of {len(rows)} pieces failed")
    return int(not all(r["ok"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
