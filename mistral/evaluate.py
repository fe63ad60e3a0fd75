"""`python -m mistral.evaluate`: tasks of lm-evaluation-harness and perplexity, beside the published figures.

Tasks whose data can be had are run, the others are named with the reason. Tasks named local_… (or local, for all) are
made from text on this machine. Written to --out: evaluation.json, evaluation.md and evaluation.png.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluation import loading, local, perplexity, report
from .safetensors_file import Replacing

TASKS = "mmlu,arc_challenge,arc_easy,hellaswag,winogrande,piqa,truthfulqa_mc2"
EXAMPLES = f"""\
examples:
  python -m mistral.evaluate --model models/mistral-7b-v0.1 --tasks {TASKS} --out out/mistral-7b
  python -m mistral.evaluate --model smollm2 --tasks local --samples 100 --perplexity 256,1024 --windows 128,none
  python -m mistral.evaluate --model smollm2 --weights int4:64 --kv int8 --tasks local_endings --limit 50
  python -m mistral.evaluate --model models/x --tasks arc_challenge --data data   # reads data/allenai/ai2_arc
  lm_eval --model mistral --model_args pretrained=smollm2,window=1024 --batch_size auto \\
    --include_path out/evaluation/tasks --tasks local                             # the same tasks, by the harness"""


def _numbers(text: str) -> list[int]:
    values = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be numbers of at least 1, with commas")
    return values


def _windows(text: str) -> list[int | None]:
    return [None if part == "none" else _numbers(part)[0] for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mistral.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", required=True, metavar="PATH", help="a checkpoint's folder or file, or smollm2")
    add("--out", type=Path, default=Path("out/evaluation"), help="folder of the report (default: out/evaluation)")
    add("--tasks", default="", metavar="NAMES", help="tasks and groups of the harness, with commas; local for ours")
    add("--data", type=Path, help="a folder with data sets under their hub names; default: the hub, or its cache")
    add("--include", type=Path, help="a folder with further tasks in the harness's format")
    add("--limit", type=int, help="questions of each task, at most")
    add("--shots", type=int, help="examples before each question (default: the paper's 5 of MMLU, else the task's)")
    add("--samples", type=int, default=local.SAMPLES, help="questions of each local task that is made (default: 200)")
    add("--text", type=Path, action="append", default=[], help="more text for local tasks and perplexity; repeatable")
    add("--perplexity", type=_numbers, metavar="LENGTHS", help="perplexity at these sequence lengths, with commas")
    add("--windows", type=_windows, default=[None], help="of the perplexity table, with commas, none too")
    add("--tokens", type=int, default=16_384, help="of the text for perplexity (default: 16384)")
    add("--batch-size", default="auto", help="contexts in a pass (default: auto)")
    add("--max-length", type=int, help="tokens that the model sees at most")
    add("--chat", action="store_true", help="put questions into the model's chat template")
    fields = {field.name: field for field in dataclasses.fields(loading.Variant)}
    for name, known in (("ops", loading.OPS), ("dtype", tuple(loading.DTYPES)), ("kv", tuple(loading.KV))):
        add(f"--{name}", choices=known, default=fields[name].default)
    add("--window", default="config", metavar="N|none|config", help="keys that a query sees")
    add(
        "--weights", default="model", help="model, codes (of a GGUF file), int8, w8a8, int4, nf4; int4:64 names a group"
    )
    add("--adapter", metavar="FOLDER", help="a LoRA adapter")
    add("--merge", action="store_true", help="add the adapter to the weights first")
    add("--tokenizer", metavar="PATH", help="of another checkpoint")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def _variant(options: argparse.Namespace) -> loading.Variant:
    names = [field.name for field in dataclasses.fields(loading.Variant) if field.name != "pretrained"]
    return loading.Variant(options.model, **{name: getattr(options, name) for name in names})


def _names(options: argparse.Namespace) -> list[str]:
    given = [name.strip() for name in options.tasks.split(",") if name.strip()]
    return [each for name in given for each in (local.TASKS if name == "local" else [name])]


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    variant = _variant(options)
    variant.path()
    names, include = _names(options), options.include
    if any(name in local.TASKS for name in names) and include is None:
        include = options.out / "tasks"
        local.make_tasks(include, options.text, options.samples)
    loaded: dict[str, Any] = {}
    failed: dict[str, str] = {}
    if names:
        from .evaluation import running

        loaded, failed = running.load_tasks(names, options.data, include)
    model, tokenizer = variant.load()
    result: dict[str, Any] = dict(model=dataclasses.asdict(variant), tasks={}, failed=failed, perplexity=[], text="")
    if loaded:
        from .evaluation.harness import MistralLM

        lm = MistralLM(model, tokenizer, kv=options.kv, batch_size=options.batch_size, max_length=options.max_length)
        for name, task in loaded.items():
            result["tasks"][name] = running.run_task(lm, name, task, options.limit, options.shots, options.chat)
            print(f"{name}: {report.shown(result['tasks'][name])} ({result['tasks'][name]['metric']})", flush=True)
    if options.perplexity:
        result |= _perplexity(options, model, tokenizer)
    return result


def _perplexity(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.text) or local.read_text([])
    tokens = tokenizer.encode(text, bos=False)[: options.tokens]
    start = tokenizer.special("bos_token") or (tokenizer.stop_ids[0], "")
    rows = perplexity.by_length_and_window(
        model, tokens, options.perplexity, options.windows, start[0], loading.kv_dtype(options.kv),
        lambda p: print(f"perplexity at {p.length} tokens, window {p.window}: {p.value:.3f}", flush=True),
    )  # fmt: skip
    source = ", ".join(path.name for path in options.text) or "the Python reference"
    return dict(perplexity=[dataclasses.asdict(row) for row in rows], text=source)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where everything that was asked for was run, 1 where something could not be, 2 for errors."""
    made = parser()
    options = made.parse_args(argv)
    if not options.tasks and not options.perplexity:
        made.error("nothing to do: give --tasks, --perplexity or both")
    for name in ("limit", "samples", "tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            made.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    try:
        result = run_all(options)
    except (OSError, ValueError, NotImplementedError, ModuleNotFoundError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    text = report.markdown(result)
    with Replacing(options.out) as files:
        files.write("evaluation.json", json.dumps(result, indent=1).encode())
        files.write("evaluation.md", text.encode())
    report.plot(result, options.out / "evaluation.png")
    print(text)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
