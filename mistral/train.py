"""`python -m mistral.train`: trains a new model, goes on with one, or fine-tunes one; on one process or many."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .training.settings import Settings, add_flags, from_mapping, read_yaml

EXAMPLES = """\
examples:
  # a small new model with a sliding window, from text files
  python -m mistral.train --shape dim=256 n_layers=6 n_heads=8 n_kv_heads=2 head_dim=32 hidden_dim=704 \\
      vocab_size=49152 tie_embeddings=true --tokenizer SmolLM2.gguf --window 256 --data docs/ --out out/small

  # LoRA, then QLoRA, on a checkpoint; out/lora/adapter is in peft's format
  python -m mistral.train --model SmolLM2.gguf --lora-rank 8 --data notes.jsonl --eval-fraction 0.05 --out out/lora
  python -m mistral.train --model SmolLM2.gguf --lora-rank 8 --quantize nf4 --data notes.jsonl --out out/qlora

  # settings from a file, some changed; the same command again goes on after the last checkpoint
  python -m mistral.train run.yaml --steps 2000 --lr 1e-4

  # four processes (FSDP2; NCCL on GPUs, gloo on CPUs); a checkpoint may be resumed by any number
  torchrun --nproc-per-node 4 -m mistral.train run.yaml

run.yaml holds `setting: value` lines, with the names of the flags below, dashes as underscores:
  model: models/Mistral-7B-v0.1
  data: [corpus/, hf:togethercomputer/RedPajama-Data-1T-Sample]
  seq_len: 8192
  batch_tokens: 4194304
  checkpoint_activations: true"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mistral.train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="YAML file of settings; flags go before it"
    )
    add_flags(made)
    return made


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """The settings of a command line: those of CONFIG, then the flags.

    Raises:
        ValueError, TypeError: as `Settings`.
    """
    given = vars(parser().parse_args(argv))
    path = given.pop("config")
    values = {} if path is None else read_yaml(path)
    if "shape" in given:
        given["shape"] = {**(values.get("shape") or {}), **dict(given["shape"])}
    return from_mapping({**values, **given}, "the command line" if path is None else str(path))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        settings = read_settings(argv)
        from .training.parallel import World
        from .training.trainer import Trainer

        world = World(settings.device)
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        return _fail(error)
    try:
        summary = Trainer(settings, world).run()
    except (OSError, ValueError, NotImplementedError, ModuleNotFoundError, FloatingPointError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    finally:
        world.stop()
    if world.first:
        held = "" if summary["perplexity"] is None else f", held-out perplexity {summary['perplexity']:.3f}"
        print(f"{settings.out}: {summary['steps']} steps, loss {summary['loss']}{held}; log.csv and summary.json there")
    return 0


def _fail(error: Exception) -> int:
    rank = os.environ.get("RANK")
    print(f"train{'' if rank is None else f' [process {rank}]'}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
