"""Small random models for the tests of `mistral`."""

import dataclasses

import torch

import mistral_kernels
from mistral.config import ModelConfig
from mistral.model import Transformer

# H/Hkv is 3, head_dim is not dim / n_heads, and no size equals another.
CONFIG = ModelConfig(
    dim=40, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=56, vocab_size=97, max_positions=256
)


def config(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def model(ops=mistral_kernels, dtype=torch.float32, seed=0, **changes) -> Transformer:
    """A model whose weights depend on `seed` alone, large enough that attention matters to the logits."""
    built = Transformer(config(**changes), ops=ops)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(built.state_dict().items()):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            weight.copy_(1 + 0.2 * noise)
        elif weight.dim() == 1:
            weight.copy_(0.5 * noise)
        else:
            weight.copy_(noise * (1.0 if "tok_embeddings" in name else 1.6 * weight.shape[1] ** -0.5))
    return built.to(dtype).eval()


def tokens(*shape: int, seed: int = 0, vocab: int = CONFIG.vocab_size) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def through_cache(
    net: Transformer, sequences: list[torch.Tensor], chunk: int, ring_chunk: int = 1
) -> list[torch.Tensor]:
    """The logits of every position of each sequence, fed `chunk` tokens at a time."""
    longest = max(len(s) for s in sequences)
    cache = net.cache(len(sequences), longest, ring_chunk)
    rows = [[] for _ in sequences]
    for start in range(0, longest, chunk):
        pieces = [s[start : start + chunk] for s in sequences]
        out = net(torch.cat(pieces), cache=cache, lengths=[len(p) for p in pieces])
        for row, part in zip(rows, out.split([len(p) for p in pieces]), strict=True):
            row.append(part)
    return [torch.cat(row) for row in rows]
