"""A small Mistral, fused against eager on one device: decoding through the ring, loss, gradients, torch.compile."""

import argparse
import itertools
import sys

import torch

import mistral_kernels
from mistral.config import ModelConfig
from mistral.generate import generate
from mistral.model import Transformer

CONFIG = ModelConfig(
    dim=512, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=1024, vocab_size=1000, sliding_window=64,
    max_positions=1024,
)  # fmt: skip


def models(device: str, impl: str | None) -> tuple[Transformer, Transformer]:
    """The same weights on fused and on eager ops."""
    torch.manual_seed(0)
    ops = mistral_kernels if impl is None else mistral_kernels.using(impl=impl)
    fused, eager = (Transformer(CONFIG, ops=o).to(device).float() for o in (ops, mistral_kernels.reference))
    with torch.no_grad():
        for p in fused.parameters():
            p.normal_(0, 0.05) if p.dim() > 1 else p.fill_(1)
    eager.load_state_dict(fused.state_dict())
    return fused, eager


def loss_and_gradients(model: Transformer, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", choices=("triton", "cuda"), help="one implementation instead of the automatic choice")
    options = parser.parse_args()
    fused, eager = models(options.device, options.ops)
    prompts = [torch.randint(1000, (n,)).tolist() for n in (3, 100, 257)]
    ours, theirs = (generate(m, prompts, 24, chunk_size=50, logprobs=True) for m in (fused, eager))
    pairs = zip(*(itertools.chain(*run.logprobs) for run in (ours, theirs)), strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    ids = torch.randint(1000, (2, 300), device=options.device)
    (loss, gradients), (truth, expected) = loss_and_gradients(fused, ids), loss_and_gradients(eager, ids)
    worst = max(((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(gradients, expected, strict=True))
    print(f"greedy tokens equal: {ours.tokens == theirs.tokens}; log-probabilities apart by at most {apart:.1e}")
    print(f"loss {loss:.6f} and {truth:.6f}; gradients apart by at most {worst:.1e} of their norm")
    good = ours.tokens == theirs.tokens and apart < 1e-3 and abs(loss - truth) < 1e-4 and worst < 1e-3
    if options.ops is None:
        with torch.no_grad():
            compiled = (torch.compile(fused, fullgraph=True)(ids) - fused(ids)).abs().max().item()
        print(f"torch.compile(fullgraph=True) differs by at most {compiled:.1e}")
        good = good and compiled < 1e-3
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
