"""How fast quantised layers and models are: against the bytes that memory can deliver, torch, and llama.cpp."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mistral_kernels as mk
from mistral.generate import generate
from mistral.model import Transformer

from . import machine, timing
from .limits import Limits
from .llama import LlamaCpp

N, K, MANY = 14336, 4096, 512


# ---- one layer ----


def _cold(weight: mk.QuantizedWeight, quick: bool) -> list[mk.QuantizedWeight]:
    """The weight and copies of it, to be taken in turn, so that each comes from memory."""
    count = 2 if quick else machine.cold_copies(weight.nbytes)

    def copy() -> mk.QuantizedWeight:
        return dataclasses.replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())

    return [weight, *(copy() for _ in range(count - 1))]


def _repeated(call: Callable[[Any], Any], sets: list[Any]) -> list[Callable[[], Any]]:
    return [lambda s=s: call(s) for s in sets]  # type: ignore[misc]


def _int8_by_torch(x: torch.Tensor, weights: list[mk.QuantizedWeight]) -> list[Callable[[], Any]]:
    scale = [w.scale[:, 0].to(x.dtype) for w in weights]
    pairs = list(zip(weights, scale, strict=True))
    return _repeated(lambda pair: torch._weight_int8pack_mm(x, pair[0].codes, pair[1]), pairs)


def single_row(quick: bool) -> dict[str, Any]:
    """One row of x: the share of what the read probe reaches, and torch's own op. Rounds take turns."""
    n = N // 4 if quick else N
    x, limits = torch.randn(1, K).bfloat16(), Limits("cpu", quick)
    read, amount = limits.call("read", torch.bfloat16), limits.amount("read")
    found = {}
    for name, scheme, group in (("int8", "int8", None), ("int4 g128", "int4", 128), ("nf4 g64", "nf4", 64)):
        weights = _cold(mk.quantize_weight(torch.randn(n, K), scheme, group), quick)
        calls: dict[str, Sequence[timing.Call]] = dict(
            ours=_repeated(lambda w: mk.linear_quantized(x, w), weights), read=[read]
        )
        if name == "int8":
            calls["torch._weight_int8pack_mm"] = _int8_by_torch(x, weights)
        seen = timing.alternate(calls, timing.QUICK if quick else timing.FULL, timing.Stopwatch("cpu"))
        share = [weights[0].nbytes / o / (amount / r) for o, r in zip(seen["ours"], seen["read"], strict=True)]
        found[name] = dict(
            seconds={k: vars(timing.spread(v)) for k, v in seen.items()},
            bytes=weights[0].nbytes,
            share_of_read=vars(timing.spread(share)),
            against={k: vars(timing.ratios(seen["ours"], v)) for k, v in seen.items() if k.startswith("torch")},
        )
    return dict(shape=[1, n, K], rows=found)


def many_rows(quick: bool) -> dict[str, Any]:
    """W8A8 with bfloat16 in and out, against torch's product of codes alone and its bfloat16 product."""
    m, n = (MANY // 2, N // 8) if quick else (MANY, N // 2)
    x, weight = torch.randn(m, K).bfloat16(), torch.randn(n, K)
    quantised, whole = mk.quantize_weight(weight, "w8a8"), weight.bfloat16()
    codes = torch.randint(-127, 128, (m, K), dtype=torch.int8)
    turned = quantised.codes.T
    calls: dict[str, Sequence[timing.Call]] = {
        "ours": [lambda: mk.linear_quantized(x, quantised)],
        "torch._int_mm, codes only": [lambda: torch._int_mm(codes, turned)],
        "F.linear, bfloat16": [lambda: torch.nn.functional.linear(x, whole)],
    }
    seen = timing.alternate(calls, timing.QUICK if quick else timing.FULL, timing.Stopwatch("cpu"))
    return dict(
        shape=[m, n, K],
        seconds={k: vars(timing.spread(v)) for k, v in seen.items()},
        operations=2.0 * m * n * K,
        against={k: vars(timing.ratios(seen["ours"], v)) for k, v in seen.items() if k != "ours"},
    )


# ---- whole models ----


def _ours(model: Transformer, kv: torch.dtype | None) -> Callable[[list[int], int], tuple[float, float]]:
    def run(prompt: list[int], count: int) -> tuple[float, float]:
        done = generate(model, [prompt], count, kv_dtype=kv)
        return done.prefill_seconds, done.decode_seconds

    return run


def whole_models(
    models: dict[str, Transformer], files: dict[str, Path], prompt: list[int], count: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second of prefill and of decoding; variants take turns, and each round begins with another."""
    runs: dict[str, Any] = {name: _ours(model, None) for name, model in models.items()}
    runs["bf16, int8 keys and values"] = _ours(models["bf16"], torch.int8)
    runs |= {f"llama.cpp {name}": LlamaCpp(file, len(prompt) + count) for name, file in files.items()}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds = runs[name](prompt, count)
            if i:  # the first round loads and warms
                seen[name].append(seconds)
    return {
        name: dict(
            prefill=vars(timing.spread([len(prompt) / a for a, _ in times])),
            decode=vars(timing.spread([(count - 1) / b for _, b in times])),
        )
        for name, times in seen.items()
    }
