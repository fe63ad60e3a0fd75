"""Sequences that enter and leave while others decode, over one ring cache."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from .generate import CHUNK
from .model import Transformer
from .sampling import Sampler


@dataclasses.dataclass
class _Running:
    """One sequence: tokens that the model has not seen yet, and how many it may still draw."""

    pending: list[int]
    left: int
    stop_ids: frozenset[int]
    sampler: Sampler


class Session:
    """Decodes a changing set of sequences, one step for all of them at a time.

        session = Session(model, batch=8, max_seq_len=4096)
        row = session.add(prompt, max_tokens=64)
        while session.rows:
            for row, token in session.step().items(): ...

    Prompts are fed in chunks beside the single tokens of those that decode already. A sequence that ends, by a stop
    token or by its count, leaves and its row is free at once. There is no scheduler: `add` raises where no row is left.

    Args:
        model: as `generate` takes it.
        batch: how many sequences at most.
        max_seq_len: the most tokens that a sequence will have, prompt and continuation.
        chunk_size: tokens of a prompt in one step.
        kv_dtype, poison: as in `RingCache`.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        max_seq_len: int,
        chunk_size: int = CHUNK,
        kv_dtype: torch.dtype | None = None,
        poison: bool = False,
    ):
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
        model.reserve_positions(max_seq_len)
        self.model, self.chunk_size, self.max_seq_len = model, chunk_size, max_seq_len
        self.cache = model.cache(batch, max_seq_len, kv_dtype=kv_dtype, poison=poison)
        self._running: dict[int, _Running] = {}

    @property
    def rows(self) -> list[int]:
        """The rows of the sequences that run, in order."""
        return sorted(self._running)

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop_ids: Iterable[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> int:
        """Takes a sequence in; the next `step` begins with it.

        Returns:
            Its row, which `step` names it by until it leaves.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, a setting outside its range, or more tokens
                than max_seq_len.
            RuntimeError: all rows are taken.
        """
        vocab = self.model.config.vocab_size
        if len(prompt) == 0 or min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(
                f"the prompt is {list(prompt)[:8]}…; it must be tokens from 0 to {vocab - 1}, at least one"
            )
        if max_tokens < 1 or len(prompt) + max_tokens - 1 > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; together they take"
                f" {len(prompt) + max_tokens - 1} of max_seq_len {self.max_seq_len} positions"
            )
        sampler = Sampler(1, temperature, top_p, None if seed is None else [seed])
        row = self.cache.acquire()
        self._running[row] = _Running(list(prompt), max_tokens, frozenset(stop_ids), sampler)
        return row

    def remove(self, row: int) -> None:
        """Lets a sequence leave before its end.

        Raises:
            ValueError: no sequence runs in that row.
        """
        if row not in self._running:
            raise ValueError(f"no sequence runs in row {row}; there are {self.rows}")
        del self._running[row]
        self.cache.release(row)

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """One pass of all sequences: the next token of each whose prompt has been read. Empty where none runs."""
        rows = self.rows
        if not rows:
            return {}
        chunks = [self._running[row].pending[: self.chunk_size] for row in rows]
        lengths = [0] * self.cache.batch
        for row, chunk in zip(rows, chunks, strict=True):
            lengths[row] = len(chunk)
        tokens = torch.tensor([t for chunk in chunks for t in chunk], device=self.model.device)
        logits = self.model(tokens, cache=self.cache, lengths=lengths, last_only=True)
        drawn: dict[int, int] = {}
        for at, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            sequence = self._running[row]
            del sequence.pending[: len(chunk)]
            if not sequence.pending:
                drawn[row] = self._draw(row, sequence, logits[at : at + 1])
        return drawn

    def _draw(self, row: int, sequence: _Running, logits: torch.Tensor) -> int:
        token = int(sequence.sampler(logits, [0]))
        sequence.pending.append(token)
        sequence.left -= 1
        if sequence.left == 0 or token in sequence.stop_ids:
            self.remove(row)
        return token
