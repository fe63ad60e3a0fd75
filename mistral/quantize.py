"""`python -m mistral.quantize`: writes a checkpoint with its weights in int8, int4 or NF4.

Weights pass through memory one at a time; the files are replaced only when the new ones are whole.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mistral_kernels import QuantizedWeight, quantize_weight
from mistral_kernels.quant_linear.weights import SCHEMES, check_scheme

from .calibrate import TOKENS, InOrder, calibrated_weights, calibration_windows
from .checkpoint import Checkpoint, Stored, expected_shapes
from .convert import copy_tokenizer
from .gguf_tokenizer import gguf_tokenizer
from .quantized import output_scheme, quantized_names
from .quantized_file import FILE, METHOD, part_shapes
from .safetensors_file import Replacing, write_json, write_safetensors
from .tokenizer import load_tokenizer
from .weights import bar, hf_config, open_checkpoint

EXAMPLES = """\
examples:
  python -m mistral.quantize --model Mistral-7B-v0.3 --scheme int8 --out out/mistral-7b-int8
  python -m mistral.quantize --model out/smollm2 --scheme int4 --group-size 64 --out out/smollm2-int4
  python -m mistral.generate --model out/smollm2-int4 --chat --prompt "Why is the sky blue?"
  python -m mistral.quantize --model out/smollm2 --scheme int4 --calibrate text.jsonl --out out/smollm2-int4

int8 keeps a scale for each row. w8a8 has the same weights, and rounds the activations to int8 as well. int4 and nf4
keep a scale for each group. The embedding of a tied model, and the output projection, are int8 with every scheme."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mistral.quantize",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint: its folder, or a .gguf file")
    parser.add_argument("--scheme", required=True, choices=SCHEMES)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write, made if missing")
    parser.add_argument(
        "--group-size", type=int, help="32, 64 or 128 inputs a scale, 0 for rows (default: rows, int4 128, nf4 64)"
    )
    parser.add_argument("--asymmetric", action="store_true", help="int4 with an offset for each group")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="a text or JSONL file: choose the codes by the inputs on it (GPTQ)"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=TOKENS, metavar="N", help=f"of that file (default: {TOKENS})"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of what stays as it is")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def _parts(name: str, weight: Stored, how: dict[str, Any], make: Callable[[], QuantizedWeight]) -> list[Stored]:
    """The codes and scales of one weight, which is made when the first of them is read."""
    held: list[QuantizedWeight] = []
    shapes = part_shapes(how, weight.shape)  # type: ignore[arg-type]

    def reader(part: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            if not held:
                held.append(make())
            tensor = getattr(held[0], part)
            if part == "codes":
                held.clear()
            return tensor

        return read

    return [Stored(f"{name}.{part}", shape, dtype, reader(part)) for part, (shape, dtype) in shapes.items()]


def _refuse_weights(folder: Path) -> None:
    """A folder with whole weights too would be read as one or as the other."""
    if left := sorted(file.name for file in folder.glob("*.safetensors*") if file.name != FILE):
        raise ValueError(f"{folder} already has {', '.join(left)}; choose another folder to write")


def _maker(
    checkpoint: Checkpoint,
    chosen: dict[str, Any],
    modules: dict[str, dict[str, Any]],
    calibration: torch.Tensor | None,
    progress: bool,
) -> Callable[[str], QuantizedWeight]:
    """Gives the quantised weight of a module by its name."""

    def parameter(name: str) -> torch.Tensor:
        return checkpoint.tensors[name].read()

    if calibration is None:
        return lambda module: quantize_weight(parameter(f"{module}.weight"), *modules[module].values())
    how = (chosen["scheme"], chosen["group"], chosen["asymmetric"])
    # No second bar: bytes are written as weights are made.
    return InOrder(calibrated_weights(checkpoint.config, parameter, calibration, how, progress=False))


def _order(config: Any, calibrated: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors as the file has them: calibrated, a tied embedding is made last."""
    shapes = list(expected_shapes(config).items())
    return shapes[1:] + shapes[:1] if calibrated and config.tie_embeddings else shapes


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: str | Path,
    scheme: str,
    group_size: int | None = None,
    asymmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    calibration: torch.Tensor | None = None,
    about_calibration: dict[str, Any] | None = None,
) -> None:
    """Writes quantized.safetensors and config.json, with one weight in memory at a time, or one layer to calibrate it.

    Args:
        checkpoint: what `open_checkpoint` returned.
        folder: made if missing.
        scheme, group_size, asymmetric: as `mistral_kernels.quantize_weight` takes them.
        dtype: of norms and biases, and of an embedding that is no output projection.
        progress: shows a bar on standard error.
        calibration: `[B, S]` token ids of a text that the weights are calibrated on, or None to round them as they are.
        about_calibration: what the metadata say of it beside its size.

    Raises:
        ValueError: tensors that do not fit the config; a scheme or group that is not known; weights that are not
            finite; a folder that has other weights; windows longer than the context.
    """
    group = check_scheme(scheme, group_size)
    if asymmetric and scheme != "int4":
        raise ValueError(f"asymmetric is for int4; scheme is {scheme!r}")
    checkpoint.check()
    checkpoint.check_tied()
    _refuse_weights(Path(folder))
    config, tied = checkpoint.config, checkpoint.config.tie_embeddings
    chosen = dict(scheme=scheme, group=group, asymmetric=asymmetric)
    whole_rows = dict(scheme="int8", group=0, asymmetric=False)
    modules = {n: whole_rows if output_scheme(n, tied) else chosen for n in quantized_names(config)}
    make = _maker(checkpoint, chosen, modules, calibration, progress)
    tensors: list[Stored] = []
    for name, shape in _order(config, calibration is not None):
        stored, module = checkpoint.tensors[name], name.removesuffix(".weight")
        if module in modules:
            tensors += _parts(module, stored, modules[module], partial(make, module))
        else:
            tensors.append(Stored(name, shape, dtype, stored.read))
    about = dict(chosen)
    if calibration is not None:
        sizes = dict(zip(("windows", "window"), calibration.shape, strict=True))
        about["calibration"] = dict(method="gptq", **sizes, **(about_calibration or {}))
    settings = hf_config(config, dtype) | dict(quantization_config=dict(quant_method=METHOD, **about))
    metadata = dict(quantization=json.dumps(dict(version=1, **about, modules=modules)))
    with Replacing(Path(folder)) as files, bar("quantising", tensors, progress) as shown:
        write_safetensors(files, FILE, tensors, shown, metadata, in_order=True)
        write_json(files, "config.json", settings)


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.format != "gguf":
        return copy_tokenizer(checkpoint.path, folder)
    try:
        gguf_tokenizer(checkpoint.path).save(folder)
    except NotImplementedError as error:
        print(f"quantize: the tokenizer is left out: {error}", file=sys.stderr)


def _calibration(
    options: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    if options.calibrate is None:
        return None, None
    tokenizer = load_tokenizer(options.model)
    longest = checkpoint.config.max_positions
    windows = calibration_windows(options.calibrate, tokenizer, options.calibration_tokens, longest)
    return windows, dict(text=Path(options.calibrate).name)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    how = (options.scheme, options.group_size, options.asymmetric, DTYPES[options.dtype], not options.quiet)
    try:
        checkpoint = open_checkpoint(options.model)
        quantize_checkpoint(checkpoint, options.out, *how, *_calibration(options, checkpoint))
        _copy_tokenizer(checkpoint, options.out)
    except (OSError, ValueError, NotImplementedError, ModuleNotFoundError) as error:
        sys.exit(f"quantize: {error}")
    size = (options.out / FILE).stat().st_size
    print(
        f"{options.out / FILE}: {size / 1e6:.1f} MB, {8 * size / checkpoint.config.parameter_count():.2f} bits a weight"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
