"""`python -m bench.quant_large`: a model of Mistral-7B's shape with random int8 weights, written, loaded and run.

Each step prints a line of JSON; the study calls them as processes of their own, so that each has a peak of its own.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mistral.checkpoint import Stored, expected_shapes, make_checkpoint, stored_name
from mistral.config import ModelConfig
from mistral.quantize import quantize_checkpoint
from mistral.weights import load_model

from .limits import Limits
from .quant_accuracy import weight_bytes
from .window import status

SHAPE: dict[str, Any] = dict(
    dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32768, max_positions=4096
)
PATTERN = (1 << 20) + 7  # random values, repeated over a weight: no row is like the next


def write(folder: Path, layers: int, scheme: str) -> dict[str, Any]:
    """Quantises a checkpoint whose weights are made up as they are read."""
    config = ModelConfig(n_layers=layers, **SHAPE)
    values = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)) * SHAPE["dim"] ** -0.5

    def stored(name: str, shape: tuple[int, ...]) -> Stored:
        def read() -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape)
            count = shape[0] * shape[1]
            return values.repeat(-(-count // PATTERN))[:count].view(shape)

        return Stored(stored_name(name, "hf"), shape, torch.float32, read)

    tensors = [stored(*item) for item in expected_shapes(config).items()]
    start = time.perf_counter()
    quantize_checkpoint(make_checkpoint(Path("random"), "hf", config, tensors), folder, scheme)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    return dict(seconds=seconds, file_bytes=size, peak_bytes=status("VmHWM"), parameters=config.parameter_count())


@torch.inference_mode()
def run(folder: Path, tokens: int, quick: bool) -> dict[str, Any]:
    """Loads it and decodes; a read of the probe after every token says what memory delivers meanwhile."""
    start = time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16)
    loaded = dict(load_seconds=time.perf_counter() - start)
    loaded |= dict(anonymous_bytes=status("RssAnon"), peak_bytes=status("VmHWM"))
    limits = Limits("cpu", quick)
    read = limits.call("read", torch.bfloat16)
    embedding = model.tok_embeddings.weight
    weights = weight_bytes(model) - embedding.nbytes  # of which a token takes one row
    cache = model.cache(1, tokens + 8)
    steps, shares, rates = [], [], []
    for i in range(tokens + 3):
        began = time.perf_counter()
        model(torch.tensor([i % 97]), cache=cache)
        step = time.perf_counter() - began
        read()
        probe = limits.amount("read") / (time.perf_counter() - began - step)
        if i >= 3:  # the first ones wake threads and fault pages in
            steps.append(step)
            rates.append(probe)
            shares.append(weights / step / probe)
    return dict(
        **loaded,
        bytes_a_token=weights,
        tokens_per_second=1 / statistics.median(steps),
        read_bytes_per_second=statistics.median(rates),
        share_of_read=statistics.median(shares),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quant_large", description=__doc__)
    parser.add_argument("what", choices=("write", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.what == "write":
        found = write(options.folder, options.layers, options.scheme)
    else:
        found = run(options.folder, options.tokens, options.quick)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
