"""Times of the GPU kernels beside torch's own, by `triton.testing.do_bench`; writes JSON and a page for docs/.

python scripts/gpu_times.py run docs/gpu/H100_times.json
python scripts/gpu_times.py page docs/gpu/*.json > docs/gpu.md
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUPS = {"int8": 0, "w8a8": 0, "int4": 128, "nf4": 64}
HEAD = """# Times on a GPU

One run of `scripts/gpu_times.py` or, for the shape of Mistral 7B, `scripts/gpu_7b.py` (its `--help` says what its rows
mean) for each file. Kernels: medians of `triton.testing.do_bench`, bfloat16, 32 query and 8 KV
heads. Attention counts the visible keys' products only, its backward 2.5 times the forward's. SDPA is torch's own,
cuDNN or FlashAttention as it chooses. B2 where D is 64, else one sequence. `copy` and `gemm` are the machine's own
limits in the same run. On compute capability 9.0 `cuda` forward and backward are the kernels with wgmma and TMA; the
automatic choice there is `cuda` for the forward of 16-bit inputs with heads wider than 64 or at most 2048 queries, and
for gradients of at most 2048 queries up to D 128, of 4096 up to D 64, and `triton` else. Short kernels wait for their
launch from Python, Triton's more than CUDA C++'s: where both can run, norms, SwiGLU, ring writes and decoding take CUDA
C++ on a GPU, rotations and gradients of norms up to 2^23 elements. A CUDA graph (`mistral.graphed`) removes the wait:
rows "in a graph". Linear layers are one 4096 by 14336 projection in a graph, in bfloat16 and on codes, at 1, 2, 4 and
16 rows by the bytes of codes and scales, at more by the products.
"""


def attention(record: Callable, sequence: int, window: int | None, dim: int, batch: int, impls: tuple) -> None:
    import torch

    import mistral_kernels

    def tensors(heads: int) -> torch.Tensor:
        return torch.randn(batch, sequence, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v = tensors(32), tensors(8), tensors(8)
    width = min(window or sequence, sequence)
    flops = 4 * batch * 32 * dim * (sequence * width - width * (width - 1) / 2)

    def both(name: str, inputs: tuple, run: Callable) -> None:
        with torch.no_grad():
            record(f"attn fwd {name}", run, flops, "TF")
        out = run()
        grad = torch.randn_like(out)
        record(f"attn bwd {name}", lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), 2.5 * flops, "TF")

    for impl in impls:
        both(
            f"{impl} S{sequence} W{window} D{dim}", (q, k, v),
            lambda impl=impl: mistral_kernels.attention(q, k, v, window=window, impl=impl),
        )  # fmt: skip
    if window is None:
        heads_first = tuple(t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        both(f"sdpa S{sequence}", heads_first, lambda: sdpa(*heads_first, is_causal=True, enable_gqa=True))


def attention_curve(record: Callable) -> None:
    """Each length once with SDPA beside it, once with a window; the backward where it fits and ends soon."""
    for sequence in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        impls = ("triton", "cuda") if sequence <= 16384 else ("triton",)
        attention(record, sequence, None, 128, 1, impls)
        if sequence > 4096:
            attention(record, sequence, 4096, 128, 1, impls)
    for dim, batch in ((64, 2), (256, 1)):
        attention(record, 4096, None, dim, batch, ("triton", "cuda"))


def memory_bound(record: Callable) -> None:
    import torch

    import mistral_kernels as mk

    def tensors(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, residual, weight, gate, up = tensors(16384, 4096), tensors(16384, 4096), tensors(4096), *tensors(2, 16384, 14336)
    q, k, (cos, sin) = (
        tensors(2, 8192, 32, 128),
        tensors(2, 8192, 8, 128),
        mk.rope_table(128, max_positions=8192, device="cuda"),
    )
    for impl in ("triton", "cuda"):
        ops = mk.using(impl=impl)
        work = {
            "rms_norm": (lambda ops=ops: ops.rms_norm(x, weight, 1e-5), 2 * x.nbytes),
            "add_rms_norm": (lambda ops=ops: ops.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes),
            "swiglu": (lambda ops=ops: ops.swiglu(gate, up), 3 * gate.nbytes),
            "rope": (lambda ops=ops: ops.rope(q, k, cos, sin), 2 * (q.nbytes + k.nbytes)),
        }
        for name, (call, amount) in work.items():
            record(f"{name} {impl}", call, amount, "GB")
            record(f"{name} {impl} in a graph", call, amount, "GB", graph=True)
    for batch in (1, 8, 64):
        q, k, v = tensors(batch, 1, 32, 128), tensors(batch, 4096, 8, 128), tensors(batch, 4096, 8, 128)
        lens = torch.full((batch,), 9000, device="cuda", dtype=torch.int32)
        for impl in ("triton", "cuda"):
            decode = mk.using(impl=impl).attention_cached
            for graph in (False, True):
                name = f"decode {impl} B{batch}" + " in a graph" * graph
                record(name, lambda f=decode: f(q, k, v, lens, 4096), k.nbytes * 2, "GB", graph)  # noqa: B023


def codes(record: Callable) -> None:
    """A projection of Mistral 7B's MLP on codes: bytes of codes and scales for few rows, products for many."""
    import torch

    import mistral_kernels as mk

    weight = torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16)
    stored = {scheme: mk.quantize_weight(weight, scheme, group) for scheme, group in GROUPS.items()}
    for rows in (1, 2, 4, 16, 512, 4096):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        unit, flops = ("TF", 2 * rows * weight.numel()) if rows >= 512 else ("GB", 0)
        plain = {"torch": lambda x=x: x @ weight.t(), "cuda": lambda x=x: mk.linear(x, weight, impl="cuda")}
        for name, call in list(plain.items())[: 2 if rows <= 4 else 1]:
            record(f"linear bf16 {name} B{rows}", call, flops or weight.nbytes, unit, graph=True)
        for scheme, q in stored.items():
            amount = flops or q.codes.nbytes + q.scale.nbytes
            for impl in ("triton", "cuda"):
                call = lambda x=x, q=q, impl=impl: mk.linear_quantized(x, q, impl=impl)  # noqa: E731
                record(f"linear {scheme} {impl} B{rows}", call, amount, unit, graph=True)


def run(path: Path) -> None:
    import torch
    import triton
    from triton.testing import do_bench, do_bench_cudagraph

    found: dict[str, list] = {}
    facts = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)

    def record(name: str, work: Callable, amount: float, unit: str, graph: bool = False) -> None:
        ms = (
            do_bench_cudagraph(work, rep=25, return_mode="median")
            if graph
            else do_bench(work, warmup=5, rep=25, return_mode="median")
        )
        found[name] = [round(ms, 4), round(amount / ms / (1e9 if unit == "TF" else 1e6), 1), unit]
        print(name, found[name], flush=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(facts | dict(rows=found), indent=1))
        os.replace(beside, path)

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    record("copy", lambda: y.copy_(x), 2 * x.nbytes, "GB")
    record("gemm", lambda: a @ a, 2 * 8192**3, "TF")
    codes(record)
    attention_curve(record)
    memory_bound(record)


def line(name: str, measured: Any) -> str:
    if isinstance(measured, dict):
        rest = ", ".join(f"{what.replace('_', ' ')} {value:g}" for what, value in measured.items() if what != "ms")
        return f"| {name} | {measured['ms']:.3f} | {rest} |"
    if isinstance(measured, str):
        return f"| {name} | | {measured} |"
    ms, rate, unit = measured
    return f"| {name} | {ms:.3f} | {rate} {unit}/s |"


def page(paths: list[Path]) -> str:
    parts = [HEAD]
    for path in paths:
        found: dict[str, Any] = json.loads(path.read_text())
        rows = [line(*row) for row in found["rows"].items()]
        title = f"## {path.stem.replace('_', ' ')}"
        parts.append("\n".join([title, "", about(found), "", "| what | ms | rate |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def about(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if not isinstance(value, dict)) + "."


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("run", "page"):
        sys.exit(__doc__)
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]))
    else:
        print(page([Path(p) for p in sys.argv[2:]]), end="")
