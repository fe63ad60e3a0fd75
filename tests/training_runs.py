"""Tiny training runs for the tests of `mistral.training`."""

import json
from pathlib import Path

import torch

from mistral.training.log import read_csv
from mistral.training.parallel import World
from mistral.training.settings import Settings, from_mapping
from mistral.training.shards import write_shards
from mistral.training.trainer import Trainer

VOCAB = 61
SHAPE = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=24, vocab_size=VOCAB, max_positions=64)


def documents(count: int = 40, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 60 tokens, some longer than a sequence of the tests, each counting in steps of 1 or 2."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    starts = torch.randint(VOCAB, (count,), generator=generator).tolist()
    return [[(s + i * (1 + s % 2)) % VOCAB for i in range(n)] for s, n in zip(starts, lengths, strict=True)]


def make_shards(folder: Path) -> Path:
    write_shards(folder / "train", documents(), VOCAB, "test", shard_tokens=300)
    write_shards(folder / "eval", documents(6, seed=1), VOCAB, "test")
    return folder


def settings(folder: Path, **changes) -> Settings:
    shards = folder / "shards"
    if not (shards / "eval" / "index.json").exists():
        make_shards(shards)
    values = dict(
        shape=SHAPE,
        window=7,
        shards=str(shards),
        eval_fraction=0.1,
        out=str(folder / "out"),
        seq_len=24,
        batch_tokens=24 * 6,
        steps=6,
        warmup=2,
        lr=1e-2,
        precision="float32",
        mfu=False,
        device="cpu",
    )
    return from_mapping(values | changes)


def run(folder: Path, **changes) -> dict:
    """A whole run in this process; returns its summary."""
    made, world = settings(folder, **changes), World("cpu")
    try:
        return Trainer(made, world).run()
    finally:
        if world.size == 1:
            world.stop()


def losses(out: Path) -> list[str]:
    """As they are written, so that equal means bitwise equal."""
    return [row["loss"] for row in read_csv(out / "log.csv") if row["loss"]]


if __name__ == "__main__":  # a process of torchrun: several runs in one start
    import sys

    torch.set_num_threads(1)
    for changes in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), **changes)
    World("cpu").stop()
