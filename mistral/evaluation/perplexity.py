"""Perplexity of a long text by the length of the sequences it is cut into and by the window."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from ..model import Transformer
from .scoring import Scorer


@dataclasses.dataclass
class Perplexity:
    """Of the same predicted tokens, whatever the length.

    Attributes:
        length: tokens of each sequence.
        window: of the model, or None.
        value: exp of the mean negative log-likelihood.
        tokens: predicted.
    """

    length: int
    window: int | None
    value: float
    tokens: int


def perplexity(scorer: Scorer, tokens: Sequence[int], length: int, prefix: int) -> Perplexity:
    """Cuts a text into sequences that know nothing of each other, each behind `prefix`; every token is predicted once.

    Args:
        scorer: with the model, its window and its keys and values.
        tokens: the text.
        length: tokens that the model sees at a time, at least 1; the last sequence may be shorter.
        prefix: the token before each sequence (bos, for example).

    Raises:
        ValueError: no tokens, or a length below 1; as `Scorer`.
    """
    if length < 1 or not tokens:
        raise ValueError(f"length is {length} and there are {len(tokens)} tokens; each must be at least 1")
    pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    scores = scorer([([prefix], piece) for piece in pieces])
    window = scorer.model.config.sliding_window
    return Perplexity(length, window, math.exp(-sum(s.total for s in scores) / len(tokens)), len(tokens))


def with_window(model: Transformer, window: int | None) -> Transformer:
    """The same weights seen through another window; nothing is copied."""
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, sliding_window=window)
    return other


def by_length_and_window(
    model: Transformer,
    tokens: Sequence[int],
    lengths: Sequence[int],
    windows: Sequence[int | None],
    prefix: int,
    kv_dtype: torch.dtype | None = None,
    on_done: Callable[[Perplexity], None] | None = None,
) -> list[Perplexity]:
    """A table: each length with each window. A window of at least the length hides nothing and is run once, as None.

    Raises:
        ValueError: as `perplexity`; a window below 1.
    """
    found = []
    for length in lengths:
        for window in dict.fromkeys(None if w is None or w >= length else w for w in windows):
            if window is not None and window < 1:
                raise ValueError(f"the windows are {list(windows)}; each must be None or at least 1")
            scorer = Scorer(with_window(model, window), kv_dtype)
            found.append(perplexity(scorer, tokens, length, prefix))
            if on_done is not None:
                on_done(found[-1])
    return found
