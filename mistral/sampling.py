"""Choosing the next token: greedy, by temperature, and from the nucleus (Holtzman et al. 2019, section 3.1)."""

from collections.abc import Sequence

import torch


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the fewest most likely tokens whose probabilities sum to at least `top_p`; always the likeliest.

    Args:
        probabilities: `[B, V]`, each row summing to 1.
        top_p: in (0, 1].

    Returns:
        `[B, V]`: the probabilities, 0 outside the nucleus; not normalised.
    """
    # All tokens below (1 − top_p) / V sum to less than 1 − top_p, so the nucleus needs none of them: sorting the
    # few others is what makes this cheap for a large vocabulary.
    floor = (1 - top_p) / probabilities.shape[-1]
    count = int((probabilities >= floor).sum(-1).max().clamp(min=1))
    kept, ids = probabilities.topk(count, dim=-1)
    before = kept.cumsum(-1, dtype=torch.float64) - kept
    # Back in the order of the vocabulary: drawn from in the order of their probabilities, two tokens that are all
    # but equal would change places, and the draw with them, with the last bit of a logit.
    return torch.zeros_like(probabilities).scatter_(-1, ids, kept.masked_fill(before >= top_p, 0))


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of `weights` `[B, V]` first exceeds the share `uniform` `[B]` of its total."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    index = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)
    # The product can round up to the total: the last index that has a weight then.
    last = (sums < sums[:, -1:]).sum(-1)
    return index.minimum(last)


class Sampler:
    """Draws tokens for the sequences of a batch, each from its own random numbers.

    Sequence i draws one number a token from a generator seeded with `seed + i`, or with `seed[i]`; which other
    sequences run beside it, and for how long, changes nothing. Sequence i of a batch is therefore had alone with
    `seed + i`, but where a draw falls on the very edge of two tokens: the last bits of its logits may depend on the
    batch.

    Args:
        sequences: how many.
        temperature: 0 takes the likeliest token (the first of equals); else logits are divided by it.
        top_p: share of the probability that is drawn from, in (0, 1].
        seed: None for different numbers every time.

    Raises:
        ValueError: a setting outside its range; as many seeds as sequences are needed.
    """

    def __init__(
        self, sequences: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | Sequence[int] | None = None
    ):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be at least 0 and finite")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator() for _ in range(sequences)]
        seeds = [seed + i for i in range(sequences)] if isinstance(seed, int) else seed
        if seeds is not None and len(seeds) != sequences:
            raise ValueError(f"seed has {len(seeds)} entries for {sequences} sequences; they must agree")
        for i, generator in enumerate(self.generators):
            generator.seed() if seeds is None else generator.manual_seed(seeds[i])

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """One token for each row of `logits` `[len(rows), V]`, where rows names the sequences: int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        draws = [torch.rand((), dtype=torch.float64, generator=self.generators[row]) for row in rows]
        uniform = torch.stack(draws).to(logits.device)
        return invert(probabilities if self.top_p == 1 else nucleus(probabilities, self.top_p), uniform)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability of `tokens` `[...]` under `logits` `[..., V]`, in float32 (float64 for float64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
