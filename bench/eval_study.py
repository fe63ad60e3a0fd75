"""`python -m bench.eval_study`: SmolLM2 on tasks made from local text, in every way that it can be run.

First the harness's own Hugging Face class and ours on the same weights in float32: every log-likelihood, and tokens a
second in turns. Then windows, dtypes, quantised weights, int8 keys and values, and a LoRA adapter: accuracy and
perplexity. What cannot be run here is named with the reason. Writes evaluation.json, evaluation.png and the marked
part of a page.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mistral.evaluation import loading, local, perplexity, running
from mistral.evaluation.scoring import Scorer
from mistral.samples import smollm2_path
from mistral.tokenizer import load_tokenizer
from mistral.weights import load_model, save_hf

from . import eval_report, report
from .machine import facts

WINDOWS = (128, 256, 512, 1024, 2048)
CHOICE_TASKS = ("local_endings", "local_words", "local_order", "local_recall", "local_cloze")
HELD_OUT = 20  # every so many passages of the corpus stay out of the training
TOLERANCE = 1e-3
FLOAT32 = "float32"  # the folder of the model as Hugging Face reads it


def variants(adapter: Path | None) -> dict[str, dict[str, Any]]:
    """What is run, by name, as arguments of `Variant`."""
    found: dict[str, dict[str, Any]] = {f"window {w}": dict(window=w) for w in WINDOWS}
    found["bfloat16"] = {}
    found["float32"] = dict(dtype="float32")
    found["the file's codes (Q4_1)"] = dict(weights="codes")
    found["int8 weights"] = dict(weights="int8")
    found["int8 weights and activations"] = dict(weights="w8a8")
    found["int4 weights"] = dict(weights="int4:64")
    found["int8 keys and values"] = dict(kv="int8")
    if adapter is not None:
        found["LoRA, merged"] = dict(adapter=str(adapter), merge=True)
    return found


# ---- against the harness's own class ----


def recorded(lm: Any) -> list[tuple[int, float, bool]]:
    """From now on, what `lm.loglikelihood` is asked and answers: tokens of the request, log-likelihood, greedy."""
    kept: list[tuple[int, float, bool]] = []
    asked = lm.loglikelihood

    def loglikelihood(requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        started = time.perf_counter()
        answers = asked(requests, disable_tqdm=True)
        lm.seconds = time.perf_counter() - started
        texts = [a + b for a, b in (r.args for r in requests)]
        kept.extend((len(lm.tok_encode(t)), *answer) for t, answer in zip(texts, answers, strict=True))
        return answers

    lm.loglikelihood = loglikelihood
    return kept


def against_harness(options: argparse.Namespace, tasks: Path) -> dict[str, Any]:
    """Both classes on the same questions: the largest difference, the accuracies, seconds of rounds taken in turn."""
    from lm_eval.models.huggingface import HFLM

    from mistral.evaluation.harness import MistralLM

    folder = options.out / FLOAT32
    load_tokenizer(smollm2_path()).save(folder)  # type: ignore[attr-defined]
    save_hf(load_model(smollm2_path(), dtype=torch.float32, progress=False), folder, progress=False)
    both = {
        "Hugging Face's class": HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8),
        "ours": MistralLM(str(folder), dtype="float32", device="cpu"),
    }
    kept = {name: recorded(lm) for name, lm in both.items()}
    loaded, failed = running.load_tasks(CHOICE_TASKS, include=tasks)
    found: dict[str, Any] = dict(failed=failed, tasks={})
    for task, made in loaded.items():
        limit = max(2, options.compared // 12) if task == "local_recall" else options.compared
        rows: dict[str, Any] = {name: dict(rounds=[]) for name in both}
        first = len(kept["ours"])
        for n in range(options.rounds + 1):
            for name, lm in both.items():
                if n == 0:  # the first round says what each answers, and warms up
                    rows[name] |= running.run_task(lm, task, made, limit)
                else:
                    running.run_task(lm, task, made, limit)
                    rows[name]["rounds"].append(lm.seconds)
        answers = [kept[name][first:] for name in both]
        asked = len(answers[0]) // (options.rounds + 1)
        found["tasks"][task] = dict(
            questions=rows["ours"]["samples"],
            requests=asked,
            tokens=sum(t for t, _, _ in answers[1][:asked]),
            largest_difference=max(abs(a[1] - b[1]) for a, b in zip(*answers, strict=True)),
            greedy_agree=all(a[2] == b[2] for a, b in zip(*answers, strict=True)),
            metrics={name: row["metrics"] for name, row in rows.items()},
            seconds={name: row["rounds"] for name, row in rows.items()},
        )
        print(f"{task}: largest difference {found['tasks'][task]['largest_difference']:.1e}", flush=True)
    return found


# ---- variants ----


def make_adapter(options: argparse.Namespace) -> tuple[Path | None, list[str], str | None]:
    """A LoRA adapter trained on all but the held-out passages of the corpus; these; or why there is none."""
    try:
        rows = [json.loads(line) for line in options.corpus.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        return None, [], f"no corpus for LoRA: {error}"
    held = [row["text"] for row in rows[::HELD_OUT]]
    folder = options.out / "lora"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for i, r in enumerate(rows) if i % HELD_OUT))
    command = [sys.executable, "-m", "mistral.train", "--out", str(folder), "--model", str(smollm2_path())]
    command += ["--data", str(data), "--shards", str(folder / "shards"), "--lora-rank", "8", "--lr", "5e-4"]
    command += ["--warmup", "4", "--seq-len", "1024", "--batch-tokens", "2048", "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, held, f"LoRA could not be trained: {done.stderr.strip().rpartition(chr(10))[2][:200]}"
    return folder / "adapter", held, None


def one_variant(
    folder: Path, settings: dict[str, Any], tasks: dict[str, Any], texts: dict[str, list[int]], samples: int
) -> dict[str, Any]:
    """Accuracies and perplexities of one way to run the model, read from `folder` (the same weights in float32)."""
    from mistral.evaluation.harness import MistralLM

    started = time.perf_counter()
    # Only the file itself has codes; to read it takes seconds, because it is dequantised in NumPy.
    source = loading.SAMPLE if settings.get("weights") == "codes" else str(folder)
    model, tokenizer = loading.Variant(source, **settings).load()
    lm = MistralLM(model, tokenizer, kv=settings.get("kv", "model"))
    found: dict[str, Any] = dict(settings=settings, tasks={}, perplexity={})
    for name, made in tasks.items():
        found["tasks"][name] = running.run_task(lm, name, made, samples)
    scorer = Scorer(model, lm.kv_dtype)
    for name, tokens in texts.items():
        found["perplexity"][name] = perplexity.perplexity(scorer, tokens, 2048, lm.prefix_token_id).value
    found["seconds"] = time.perf_counter() - started
    return found


def all_variants(options: argparse.Namespace, tasks: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant's figures, or its reason under "failed"."""
    adapter, held, reason = make_adapter(options)
    if reason is not None:
        yield "LoRA, merged", dict(failed=reason)
    tokenizer = load_tokenizer(smollm2_path())
    texts = {"Python reference": tokenizer.encode(local.read_text([]), bos=False)[: options.tokens]}
    if held:
        texts["Debian, held out"] = tokenizer.encode("\n\n".join(held), bos=False)[: options.tokens]
    loaded, failed = running.load_tasks(CHOICE_TASKS, include=tasks)
    if failed:
        raise ValueError(f"tasks cannot be loaded: {failed}")
    for name, settings in variants(adapter).items():
        try:
            yield name, one_variant(options.out / FLOAT32, settings, loaded, texts, options.samples)
        except (ValueError, NotImplementedError, ModuleNotFoundError) as error:
            yield name, dict(failed=str(error))
        gc.collect()


def perplexities(options: argparse.Namespace) -> list[dict[str, Any]]:
    """By length and window, in bfloat16."""
    model, tokenizer = loading.Variant(str(options.out / FLOAT32)).load()
    tokens = tokenizer.encode(local.read_text([]), bos=False)[: options.table_tokens]
    start = tokenizer.special("bos_token")
    rows = perplexity.by_length_and_window(
        model, tokens, options.lengths, [*WINDOWS, None], tokenizer.stop_ids[0] if start is None else start[0]
    )
    return [dataclasses.asdict(row) for row in rows]


# ---- the whole ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.eval_study", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/evaluation"), help="folder of everything that is made")
    add("--results", type=Path, help="folder of evaluation.json and evaluation.png (default: --out)")
    add("--page", type=Path, help="a Markdown page whose marked part is replaced by the tables")
    add("--corpus", type=Path, default=Path("out/corpus/debian.jsonl"), help="for LoRA (scripts/debian_corpus.py)")
    add("--samples", type=int, default=60, help="questions of each task and variant (default: 60)")
    add("--compared", type=int, default=20, help="questions of each task for both classes (default: 20)")
    add("--rounds", type=int, default=1, help="timed rounds of both classes, in turn (default: 1)")
    add("--tokens", type=int, default=4096, help="of each text for a variant's perplexity (default: 4096)")
    add("--table-tokens", type=int, default=4096, help="of the table by length and window (default: 4096)")
    add("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    add("--steps", type=int, default=16, help="of LoRA, 2048 tokens each (default: 16)")
    add("--quick", action="store_true", help="a few questions of each, to see that it runs; no figures to keep")
    options = parser.parse_args(argv)
    if options.quick:
        options.samples, options.compared, options.rounds, options.steps = 4, 3, 1, 2
        options.tokens, options.table_tokens, options.lengths = 256, 512, [64, 256]
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    started = time.perf_counter()
    if options.page is not None:
        eval_report.check_page(options.page)
    results = options.results or options.out
    tasks = options.out / "tasks"
    counts = local.make_tasks(tasks, samples=max(options.samples, options.compared))
    result: dict[str, Any] = dict(
        machine=facts("cpu", "default"),
        options={n: getattr(options, n) for n in ("samples", "compared", "rounds", "tokens", "table_tokens", "steps")},
        questions=counts,
        harness=against_harness(options, tasks),
        variants={},
    )
    for name, found in all_variants(options, tasks):
        result["variants"][name] = found
        seen = found.get("failed") or ", ".join(f"{t} {r['value']:.3f}" for t, r in found["tasks"].items())
        print(f"{name}: {seen}", flush=True)
    result["perplexity"] = perplexities(options)
    result["seconds"] = time.perf_counter() - started
    report.write_json(results / "evaluation.json", result)
    eval_report.plot(result, results / "evaluation.png")
    text = eval_report.tables(result)
    if options.page is not None:
        eval_report.write_page(options.page, text)
    print(text)
    worst = max(row["largest_difference"] for row in result["harness"]["tasks"].values())
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
