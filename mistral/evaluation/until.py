"""Generation up to stop strings, which may begin and end within tokens; sequences leave and others take their rows."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ..generate import TextStream
from ..model import Transformer
from ..session import Session
from ..tokenizer import Tokenizer

ROWS = 16  # sequences that decode at a time


@dataclasses.dataclass
class Request:
    """A prompt to continue.

    Attributes:
        prompt: its tokens, at least one.
        max_tokens: new tokens, at most.
        until: strings that end the text and are not part of it. One that is the text of a special token ends it too.
        temperature, top_p, seed: as `generate` takes them.
    """

    prompt: Sequence[int]
    max_tokens: int
    until: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class _Open:
    """The text of a sequence so far, and whether a stop string is in it."""

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.stream = TextStream(tokenizer, request.prompt)
        self.until = [stop for stop in request.until if stop]
        self.text, self.reach = "", max(map(len, self.until), default=0)

    def put(self, token: int) -> bool:
        """Takes a token; whether the text has ended."""
        return self._add(self.stream.put(token))

    def end(self) -> str:
        """The whole text, without the stop string and what follows it."""
        self._add(self.stream.end())
        return self.text

    def _add(self, piece: str) -> bool:
        # A stop string that this piece completes begins at most so far before it.
        start = max(0, len(self.text) - self.reach + 1)
        self.text += piece
        found = [at for at in (self.text.find(stop, start) for stop in self.until) if at >= 0]
        if found:
            self.text, self.until = self.text[: min(found)], []
        return bool(found)


def generate_until(
    model: Transformer,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    rows: int = ROWS,
    kv_dtype: torch.dtype | None = None,
    on_done: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The continuations as text, without the stop strings that ended them.

    Args:
        model, tokenizer: of one checkpoint.
        requests: what to continue; the longest sets the size of the cache.
        rows: sequences that decode at a time.
        kv_dtype: as in `RingCache`.
        on_done: called with the index and the text of each that has ended.

    Raises:
        ValueError: as `Session.add`.
    """
    if not requests:
        return []
    session = Session(
        model,
        batch=min(rows, len(requests)),
        max_seq_len=max(len(r.prompt) + max(r.max_tokens, 1) - 1 for r in requests),
        kv_dtype=kv_dtype,
    )
    texts = [""] * len(requests)
    running: dict[int, tuple[int, _Open]] = {}
    # The longest first: what is left for the end is short.
    waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    while waiting or running:
        while waiting and session.cache.batch > len(session.rows):
            i = waiting.pop()
            running[_begin(session, tokenizer, requests[i])] = (i, _Open(requests[i], tokenizer))
        for row, token in session.step().items():
            i, text = running[row]
            done = token in tokenizer.stop_ids or text.put(token)
            if done and row in session.rows:
                session.remove(row)
            if row not in session.rows:
                texts[i] = text.end()
                del running[row]
                if on_done is not None:
                    on_done(i, texts[i])
    return texts


def _begin(session: Session, tokenizer: Tokenizer, request: Request) -> int:
    stops = {*tokenizer.stop_ids, *_special_stops(tokenizer, request.until)}
    how = (request.temperature, request.top_p, request.seed)
    return session.add(request.prompt, request.max_tokens, stops, *how)


def _special_stops(tokenizer: Tokenizer, until: Sequence[str]) -> list[int]:
    """Ids of stop strings that are special tokens: these leave no text to look for."""
    ids = [tokenizer.encode(stop, bos=False) for stop in until if stop]
    return [i[0] for i in ids if len(i) == 1 and not tokenizer.decode(i)]
