"""Mistral 7B's shape with random bfloat16 weights on one GPU: prefill, decoding, and a training step of four layers.

    python scripts/gpu_7b.py docs/gpu/H100_7b.json

Prefill feeds chunks through the ring cache; a decoding step is one CUDA graph. `limit` is what reading the weights and
the keys and values once would take at the copy bandwidth measured beside it. The training step is forward and backward
at batch 1 (no optimizer), fused ops against eager ones; model FLOPs are those of the products and of visible keys.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from triton.testing import do_bench

import mistral_kernels
from mistral.config import ModelConfig
from mistral.graphed import GraphedStep
from mistral.model import Transformer
from mistral.training.log import step_flops

SHAPE: dict[str, Any] = dict(
    dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000, sliding_window=4096,
    max_positions=65536,
)  # fmt: skip


def build(layers: int, ops: Any = mistral_kernels, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            model = Transformer(ModelConfig(n_layers=layers, **SHAPE), ops=ops)
    finally:
        torch.set_default_dtype(default)
    model.reset_tables()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
    return model.to("cuda")


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    x = torch.empty(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / do_bench(lambda: y.copy_(x)) * 1e3


def gemm_rate() -> float:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / do_bench(lambda: a @ a) * 1e3


@torch.inference_mode()
def prefill(model: Transformer, record: Callable, length: int, chunk: int) -> None:
    ids = torch.randint(32000, (length,), device="cuda")

    def run() -> None:
        cache = model.cache(1, 65536)
        for start in range(0, length, chunk):
            part = ids[start : start + chunk]
            model(part, cache=cache, lengths=[len(part)], last_only=True)

    ms = do_bench(run, warmup=1, rep=1500)
    record(f"prefill {length} in chunks of {chunk}", ms, tokens_per_s=length / ms * 1e3)


@torch.inference_mode()
def decode(model: Transformer, record: Callable, batch: int, bandwidth: float) -> None:
    cache = model.cache(batch, 65536)
    cache.seq_lens.fill_(8000)
    cache.held = [8000] * batch
    step = GraphedStep(model, cache)
    tokens = torch.randint(32000, (batch,), device="cuda")
    ms = do_bench(lambda: step(tokens), warmup=50, rep=500)
    read = sum(p.nbytes for p in model.parameters()) - model.tok_embeddings.weight.nbytes + cache.nbytes
    limit = read / bandwidth * 1e3
    record(f"decode batch {batch}", ms, tokens_per_s=batch / ms * 1e3, limit_ms=limit, share_of_limit=limit / ms)


def train(record: Callable, ops: Any, name: str, length: int, peak: float) -> None:
    model = build(4, ops).train()
    ids = torch.randint(32000, (1, length + 1), device="cuda")
    flops = step_flops(model.config, length, length)

    def run() -> None:
        hidden = model.hidden(ids[:, :-1])[0]
        if ops is mistral_kernels:
            loss = mistral_kernels.linear_cross_entropy(hidden, model.output.weight, ids[0, 1:])
        else:
            loss = F.cross_entropy(F.linear(hidden, model.output.weight).float(), ids[0, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)

    run()
    torch.cuda.reset_peak_memory_stats()
    ms = do_bench(run, warmup=200, rep=1000)
    record(
        f"train step of 4 layers, {length} tokens, {name}", ms, tokens_per_s=length / ms * 1e3,
        model_flops_share=flops / ms * 1e3 / peak, peak_gib=torch.cuda.max_memory_allocated() / 2**30,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    facts = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__)

    def record(name: str, ms: float, **more: float) -> None:
        put(name, {k: round(v, 4) for k, v in dict(ms=ms, **more).items()})

    def put(name: str, value: Any) -> None:
        rows[name] = value
        print(name, value, flush=True)
        beside = options.out.with_suffix(".tmp")
        beside.write_text(json.dumps(facts | dict(rows=rows), indent=1))
        os.replace(beside, options.out)

    bandwidth, peak = copy_bandwidth(), gemm_rate()
    facts |= dict(copy=f"{bandwidth / 1e9:.0f} GB/s", gemm=f"{peak / 1e12:.0f} TFLOP/s")
    model = build(32)
    for batch in (1, 8, 64):
        decode(model, record, batch, bandwidth)
    for length, chunk in ((4096, 4096), (32768, 4096)):
        prefill(model, record, length, chunk)
    del model
    torch.cuda.empty_cache()
    for length in (4096, 8192):
        for ops, name in ((mistral_kernels, "fused"), (mistral_kernels.reference, "eager")):
            try:
                train(record, ops, name, length, peak)
            except torch.cuda.OutOfMemoryError:
                put(f"train step of 4 layers, {length} tokens, {name}", "out of memory")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
