"""`python -m mistral.convert`: rewrites a checkpoint in Mistral's or Hugging Face's format, tokenizer included."""

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .gguf_tokenizer import gguf_tokenizer
from .safetensors_file import Replacing
from .weights import open_checkpoint, save_checkpoint

EXAMPLES = """\
examples:
  python -m mistral.convert Mistral-7B-v0.3 out/mistral-7b-hf --to hf
  python -m mistral.convert out/mistral-7b-hf out/mistral-7b --to mistral
  python -m mistral.convert SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2 --to hf --dtype bfloat16

SRC is a folder with Mistral's consolidated.safetensors and params.json, one with Hugging Face's model.safetensors and
config.json (taken where there are both), or a .gguf file, whose quantised weights become float32. Weights pass through
memory one at a time; a file of DST is replaced only when the new one is whole. Pickled weights are refused."""
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|generation_config\.json|vocab\.json|merges\.txt|tekken.*\.json|.*tokenizer.*\.model(\.v\d+(m\d+)?)?"
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mistral.convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="the checkpoint: a folder or a .gguf file")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write, made if missing")
    parser.add_argument("--to", required=True, choices=("hf", "mistral"), help="the format to write")
    parser.add_argument("--dtype", default="keep", choices=DTYPES, help="of the weights written (default: keep)")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file of --to hf, in GB (default: 5)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def convert(checkpoint: Checkpoint, folder: Path, options: argparse.Namespace) -> None:
    """Writes weights, config and, where the source has one, the tokenizer."""
    save_checkpoint(
        checkpoint,
        folder,
        options.to,
        dtype=DTYPES[options.dtype],
        max_shard_bytes=int(options.shard_gb * 1e9),
        progress=not options.quiet,
    )
    if checkpoint.format == "gguf":
        try:
            gguf_tokenizer(checkpoint.path).save(folder)
        except NotImplementedError as error:
            print(f"convert: the tokenizer is left out: {error}", file=sys.stderr)
    elif checkpoint.path.resolve() != folder.resolve():
        copy_tokenizer(checkpoint.path, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    with Replacing(target) as files:
        for file in sorted(source.iterdir()):
            if file.is_file() and re.fullmatch(_TOKENIZER_FILES, file.name):
                with file.open("rb") as old, files.open(file.name) as new:
                    shutil.copyfileobj(old, new)
                    files.close(new)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.shard_gb <= 0:
        sys.exit(f"convert: --shard-gb is {options.shard_gb}; it must be positive")
    try:
        checkpoint = open_checkpoint(options.source)
        convert(checkpoint, options.target, options)
    except (OSError, ValueError, NotImplementedError, ModuleNotFoundError) as error:
        sys.exit(f"convert: {error}")
    names = ", ".join(sorted(file.name for file in options.target.iterdir() if file.is_file()))
    print(f"{options.target} holds {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
