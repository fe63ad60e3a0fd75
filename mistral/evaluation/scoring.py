"""Log-likelihoods of continuations. Tokens that several sequences begin with run through the model once.

The sequences make a tree of common prefixes (`prefixes.py`). Runs of tokens of one level that are about as long are
packed into one pass, without padding; where a run forks, its row of the ring cache is copied, for some at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ..cache import RingCache
from ..model import Transformer
from .prefixes import Node, packs, tree

ROWS = 64  # sequences in a pass
CELLS = 16_384  # cache positions of a pass
LOGIT_ROWS = 128  # positions whose logits are formed at a time: a vocabulary wide, they outgrow all else


@dataclasses.dataclass
class Score:
    """Of one continuation: the log-probability of each token, and whether every one of them was the likeliest."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclasses.dataclass
class _Wanted:
    """What a pass must yield: rows of its packed hidden states, the tokens to look up there, and for whom."""

    rows: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    places: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Work:
    """All sequences of one call: what the model is fed, the tokens that the last positions predict, the answers."""

    inputs: list[list[int]]
    targets: list[list[int]]
    on_done: Callable[[int], None] | None
    scores: list[Score] = dataclasses.field(default_factory=list)


class Scorer:
    """Scores continuations with one model.

    Args:
        model: it runs with its own ops, window and dtype; logits are taken in float32 (float64 in a float64 model).
        kv_dtype: None, or torch.int8 for keys and values in codes. A query then sees codes of all tokens.
        rows: sequences in a pass, at most; what they share counts once.
        cells: the most cache positions of a pass; a longer sequence runs alone.
    """

    def __init__(self, model: Transformer, kv_dtype: torch.dtype | None = None, rows: int = ROWS, cells: int = CELLS):
        for name, value in (("rows", rows), ("cells", cells)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.model, self.kv_dtype, self.rows, self.cells = model, kv_dtype, rows, cells
        self.tokens_run = 0  # that went through the model, shared ones once

    @torch.inference_mode()
    def __call__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_done: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """The scores of continuations behind contexts.

        Args:
            pairs: context and continuation, in tokens. The context has at least one token; an empty continuation has
                log-likelihood 0.
            on_done: called after each pass with the number of pairs that are done with it.

        Returns:
            One Score a pair, in order.

        Raises:
            ValueError: an empty context; a token outside the vocabulary; more positions than the model has.
        """
        lists = [(list(context), list(target)) for context, target in pairs]
        self.model.reserve_positions(max(self._check(lists), 1))
        scores = [Score([0.0] * len(target), True) for _, target in lists]
        ids = [i for i, (_, target) in enumerate(lists) if target]
        work = _Work([(lists[i][0] + lists[i][1])[:-1] for i in ids], [lists[i][1] for i in ids], on_done)
        work.scores = [scores[i] for i in ids]
        self._level(tree(work.inputs, sorted(range(len(ids)), key=work.inputs.__getitem__)), work)
        return scores

    def _check(self, pairs: Sequence[tuple[list[int], list[int]]]) -> int:
        vocab, longest = self.model.config.vocab_size, 0
        for i, (context, target) in enumerate(pairs):
            both = context + target
            if not context:
                raise ValueError(f"the context of pair {i} is empty; it needs at least one token (bos, for example)")
            if min(both) < 0 or max(both) >= vocab:
                raise ValueError(f"pair {i} has tokens from {min(both)} to {max(both)}; the vocabulary is {vocab}")
            longest = max(longest, len(both) - 1)
        return longest

    def _level(
        self, nodes: list[Node], work: "_Work", cache: RingCache | None = None, parents: Sequence[int] = ()
    ) -> None:
        """Runs nodes and all below them; behind rows `parents` of the cache, or at the beginning of sequences."""
        for kind in ([n for n in nodes if not n.children], [n for n in nodes if n.children]):
            longest = [max(len(work.inputs[m]) for m in node.members) for node in kind]
            row = {id(node): parent for node, parent in zip(nodes, parents, strict=False)}
            for group in packs(kind, longest, self.rows, self.cells):
                some = [kind[i] for i in group]
                if cache is not None:
                    mine = cache.fork([row[id(node)] for node in some])
                elif some[0].children or self.kv_dtype is not None:
                    mine = self.model.cache(len(some), longest[group[0]], kv_dtype=self.kv_dtype)
                else:
                    self._score(self._whole(work.inputs, some), some, work)
                    continue
                self._score(self._cached(work.inputs, some, mine), some, work)
                below = [(child, at) for at, node in enumerate(some) for child in node.children]
                if below:
                    self._level([child for child, _ in below], work, mine, [at for _, at in below])

    def _whole(self, inputs: list[list[int]], nodes: list[Node]) -> torch.Tensor:
        """Hidden states `[T, N]` of sequences that share nothing, without a cache."""
        lengths = torch.tensor([0] + [node.end for node in nodes], dtype=torch.int32)
        tokens = torch.tensor([t for node in nodes for t in inputs[node.members[0]][: node.end]])
        self.tokens_run += len(tokens)
        device = self.model.device
        return self.model.hidden(tokens.to(device), lengths.cumsum(0, dtype=torch.int32).to(device))

    def _cached(self, inputs: list[list[int]], nodes: list[Node], cache: RingCache) -> torch.Tensor:
        """Hidden states `[T, N]` of runs behind what the cache holds, which takes them in."""
        tokens = torch.tensor([t for node in nodes for t in inputs[node.members[0]][node.start : node.end]])
        self.tokens_run += len(tokens)
        lengths = [node.end - node.start for node in nodes]
        return self.model.hidden(tokens.to(self.model.device), cache=cache, lengths=lengths)

    def _score(self, hidden: torch.Tensor, nodes: list[Node], work: "_Work") -> None:
        """Looks up the targets that the positions of these nodes predict."""
        wanted, offset, ended = _Wanted(), 0, 0
        for node in nodes:
            for member in node.members:
                length = len(work.inputs[member])
                first = length - len(work.targets[member])
                for at in range(max(node.start, first), node.end):
                    wanted.rows.append(offset + at - node.start)
                    wanted.tokens.append(work.targets[member][at - first])
                    wanted.places.append((member, at - first))
                ended += length == node.end
            offset += node.end - node.start
        for (member, at), (value, best) in zip(wanted.places, self._lookup(hidden, wanted), strict=True):
            work.scores[member].logprobs[at] = value
            work.scores[member].greedy &= best
        if work.on_done is not None:
            work.on_done(ended)

    def _lookup(self, hidden: torch.Tensor, wanted: _Wanted) -> list[tuple[float, bool]]:
        """Log-probability of each wanted token, and whether it is the likeliest (the first of equals)."""
        device, found = hidden.device, []
        rows, which = torch.tensor(wanted.rows, dtype=torch.int64).unique(return_inverse=True)
        tokens = torch.tensor(wanted.tokens, dtype=torch.int64)
        order = which.argsort(stable=True)
        back = order.argsort()
        for start in range(0, len(rows), LOGIT_ROWS):
            part = hidden[rows[start : start + LOGIT_ROWS].to(device)]
            logits = self.model.logits(part, float32=self.model.dtype != torch.float64)
            mine = order[(which[order] >= start) & (which[order] < start + LOGIT_ROWS)]
            at, ids = (which[mine] - start).to(device), tokens[mine].to(device)
            values = logits[at, ids] - logits.logsumexp(-1)[at]
            found.append(torch.stack((values.double(), (logits.argmax(-1)[at] == ids).double())).cpu())
        if not found:
            return []
        values, best = torch.cat(found, 1)[:, back].tolist()
        return [(value, hit == 1) for value, hit in zip(values, best, strict=True)]
