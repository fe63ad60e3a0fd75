"""Which tokens each step of each process sees: a pure function of seed and step, so that resuming needs no state.

The token stream is cut into sequences of S tokens, each with the token after it as its last label, and each epoch
visits them in its own pseudo-random order. Within a sequence no token attends across the end of a document.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import torch

from .shards import Tokens

IGNORED = -100  # a label that counts for nothing


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one process runs at once.

    Args:
        tokens: packed `[T]`, int64.
        cu_seqlens: `[documents + 1]`, int32.
        labels: `[T]`, int64: the next token, IGNORED at the end of a document and in padding.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.cu_seqlens.to(device), self.labels.to(device))


class Permutation:
    """A pseudo-random permutation of range(n) in constant memory: a Feistel network, walked until it lands below n.

    Four rounds over the halves of the smallest even number of bits that holds n (Luby and Rackoff 1988); the walk
    takes at most four steps on average, because n is more than a quarter of the domain.
    """

    def __init__(self, n: int, *key: int):
        self.n = n
        self.bits = max(1, ((n - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
        self.keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8)]

    def __getitem__(self, index: int) -> int:
        mask = (1 << self.bits) - 1
        while True:
            left, right = index >> self.bits, index & mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            index = left << self.bits | right
            if index < self.n:
                return index


def _mix(x: int) -> int:
    """The finalizer of splitmix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Sequences:
    """The sequences of a token stream, by number.

    Args:
        tokens: anything with `len`, `read` and `ends` as `shards.Tokens` has them.
        length: S.

    Raises:
        ValueError: not even one token and its label.
    """

    def __init__(self, tokens: "Tokens | RandomTokens", length: int):
        if len(tokens) < 2:
            raise ValueError(f"there are {len(tokens)} tokens; a sequence needs at least 2")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        """The last one may be short."""
        return -(-(len(self.tokens) - 1) // self.length)

    def read(self, number: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Tokens and labels `[S]`, and where its documents end; a short one is padded with a document of zeros."""
        start = number * self.length
        taken = self.tokens.read(start, self.length + 1)
        tokens, labels = taken[:-1], taken[1:].clone()
        ends = self.tokens.ends(start, len(tokens))
        labels[ends - 1] = IGNORED
        cuts = ends.tolist()
        if not cuts or cuts[-1] != len(tokens):
            cuts.append(len(tokens))
        if (missing := self.length - len(tokens)) > 0:
            tokens = torch.cat([tokens, tokens.new_zeros(missing)])
            labels = torch.cat([labels, labels.new_full((missing,), IGNORED)])
            cuts.append(self.length)
        return tokens, labels, cuts


class RandomTokens:
    """A stream of random tokens without document ends, to measure speed with."""

    def __init__(self, count: int, vocab: int, seed: int):
        self._values = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, count: int) -> torch.Tensor:
        return self._values[start : start + count]

    def ends(self, start: int, count: int) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)


class Order:
    """Which sequences a step takes.

    Args:
        sequences: how many there are.
        per_step: of one optimizer step over all processes.
        seed: of the order; each epoch has its own.
    """

    def __init__(self, sequences: int, per_step: int, seed: int):
        self.sequences, self.per_step, self.seed = sequences, per_step, seed
        self._epochs: dict[int, Permutation] = {}

    def of_step(self, step: int) -> list[int]:
        """The sequences of a step, counted from 0, going on into the next epoch where one ends."""
        found = []
        for place in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, index = divmod(place, self.sequences)
            if epoch not in self._epochs:
                self._epochs = {epoch: Permutation(self.sequences, self.seed, epoch)}
            found.append(self._epochs[epoch][index])
        return found


def share(numbers: list[int], rank: int, world: int, micro: int) -> list[list[int | None]]:
    """A process's part of a step as micro-batches of exactly `micro` sequences.

    Every process gets equally many micro-batches, because each is a collective call; None stands for a sequence
    that counts for nothing, where the numbers do not divide.
    """
    rounds = -(-len(numbers) // (world * micro))
    padded: list[int | None] = [*numbers, *[None] * (rounds * world * micro - len(numbers))]
    mine = padded[rank * rounds * micro : (rank + 1) * rounds * micro]
    return [mine[i : i + micro] for i in range(0, len(mine), micro)]


def make_batch(sequences: Sequences, numbers: list[int | None]) -> Batch:
    """Sequences packed behind each other; None gives sequence 0 with every label ignored."""
    tokens, labels, cuts = [], [], [0]
    for at, number in enumerate(numbers):
        t, y, ends = sequences.read(0 if number is None else number)
        tokens.append(t)
        labels.append(torch.full_like(y, IGNORED) if number is None else y)
        cuts += [at * sequences.length + end for end in ends]
    return Batch(torch.cat(tokens), torch.tensor(cuts, dtype=torch.int32), torch.cat(labels))


def count_labels(sequences: Sequences, numbers: list[int]) -> int:
    """The labels that count, of a whole step: every process computes it for itself."""
    return sum(int((sequences.read(number)[1] != IGNORED).sum()) for number in numbers)


def evaluation(sequences: Sequences, limit: int, rank: int, world: int, micro: int) -> Iterator[Batch]:
    """A process's part of a pass over held-out sequences, in order."""
    count = min(len(sequences), limit or len(sequences))
    for numbers in share(list(range(count)), rank, world, micro):
        yield make_batch(sequences, numbers)
