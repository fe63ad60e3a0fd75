"""Tokenised text on disk: memory-mapped files of token ids beside the places where documents end, and an index.

The index is written last, so a folder that has one is whole; sizes and checksums in it tell a file that was cut short
or altered from one that was not.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..safetensors_file import Replacing, read_json

INDEX = "index.json"
SHARD_TOKENS = 100_000_000
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of files: NAME.tokens and NAME.ends."""

    name: str
    tokens: int
    documents: int
    crc: int  # of the tokens' bytes, then the ends'


@dataclasses.dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Args:
        shards: in order.
        itemsize: bytes of a token, 2 or 4.
        largest: the largest token id.
        vocab_size: of the tokenizer.
        fingerprint: of the sources and the tokenizer.
    """

    shards: tuple[Shard, ...]
    itemsize: int
    largest: int
    vocab_size: int
    fingerprint: str

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def fingerprint(*parts: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class ShardWriter:
    """Writes documents into shards; used with `with`, which leaves an index only where all went well.

    Args:
        folder: made if missing; an index that is there is removed first, so that it never speaks of other files.
        vocab_size: of the tokenizer; ids must be below it.
        fingerprint: kept in the index.
        shard_tokens: a shard is closed when it has so many.
    """

    def __init__(self, folder: Path, vocab_size: int, fingerprint: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.vocab_size, self.fingerprint, self.shard_tokens = (
            folder,
            vocab_size,
            fingerprint,
            shard_tokens,
        )
        self.dtype = torch.uint16 if vocab_size <= 1 << 16 else torch.int32
        self.shards: list[Shard] = []
        self.largest = -1
        self._pieces: list[torch.Tensor] = []
        self._ends: list[int] = []

    def add(self, ids: list[int]) -> None:
        """One document, at least one token.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        if not ids:
            return
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"a document has token {high if low >= 0 else low}; the vocabulary is {self.vocab_size}")
        self.largest = max(self.largest, high)
        self._pieces.append(torch.tensor(ids, dtype=torch.int32).to(self.dtype))
        self._ends.append((self._ends[-1] if self._ends else 0) + len(ids))
        if self._ends[-1] >= self.shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if not self._ends:
            return
        name = f"shard-{len(self.shards):05d}"
        tokens = torch.cat(self._pieces).view(torch.uint8).numpy().tobytes()
        ends = torch.tensor(self._ends, dtype=torch.int64).view(torch.uint8).numpy().tobytes()
        with Replacing(self.folder) as files:
            files.write(f"{name}.tokens", tokens)
            files.write(f"{name}.ends", ends)
        self.shards.append(Shard(name, self._ends[-1], len(self._ends), zlib.crc32(ends, zlib.crc32(tokens))))
        self._pieces, self._ends = [], []

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        if kind is not None:
            return
        self._flush()
        value = dict(
            version=_VERSION,
            itemsize=self.dtype.itemsize,
            largest=self.largest,
            vocab_size=self.vocab_size,
            fingerprint=self.fingerprint,
            shards=[dataclasses.asdict(shard) for shard in self.shards],
        )
        with Replacing(self.folder) as files:
            files.write(INDEX, (json.dumps(value, indent=1) + "\n").encode())


def read_index(folder: Path) -> Index:
    """The index of a folder of shards.

    Raises:
        ValueError: there is none, or one that is broken or of another version; says what to do.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {INDEX}: no text was tokenised there, or that was cut off; name the text in `data` and"
            " it is done again"
        )
    value = read_json(path)
    if value.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {value.get('version')}, needed is {_VERSION}; remove {folder}")
    try:
        shards = tuple(Shard(**shard) for shard in value["shards"])
        return Index(shards, value["itemsize"], value["largest"], value["vocab_size"], value["fingerprint"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lacks or misnames an entry ({error}); remove {folder} to have it made again"
        ) from None


class Tokens:
    """A folder of shards as one stream of tokens, memory-mapped.

    Args:
        folder: of the shards.
        verify: also compare checksums, which reads every byte.

    Raises:
        ValueError: no index, an empty folder, a file that is missing, cut short or altered; says which and what to do.
    """

    def __init__(self, folder: Path, verify: bool = False):
        self.folder, self.index = folder, read_index(folder)
        if self.index.tokens == 0:
            raise ValueError(
                f"{folder} holds no tokens: the text was empty; name other files in `data`, remove {folder}"
            )
        if self.index.itemsize not in (2, 4):
            raise ValueError(f"{folder / INDEX} has itemsize {self.index.itemsize}; it must be 2 or 4; remove {folder}")
        dtype = torch.uint16 if self.index.itemsize == 2 else torch.int32
        self._starts = [0]
        self._tokens: list[torch.Tensor] = []
        self._ends: list[torch.Tensor] = []
        for shard in self.index.shards:
            self._tokens.append(self._map(shard, "tokens", dtype, shard.tokens))
            self._ends.append(self._map(shard, "ends", torch.int64, shard.documents))
            self._check(shard, verify)
            self._starts.append(self._starts[-1] + shard.tokens)

    def _map(self, shard: Shard, kind: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        path = self.folder / f"{shard.name}.{kind}"
        size = path.stat().st_size if path.is_file() else None
        if size != count * dtype.itemsize:
            found = "is missing" if size is None else f"has {size} bytes, not {count * dtype.itemsize}"
            raise ValueError(f"{path} {found}: a torn shard; remove {self.folder} to have the text tokenised again")
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype)

    def _check(self, shard: Shard, verify: bool) -> None:
        tokens, ends = self._tokens[-1], self._ends[-1]
        torn = ends.numel() == 0 or int(ends[-1]) != shard.tokens
        if verify and not torn:
            parts = (t.view(torch.uint8).numpy().data for t in (tokens, ends))
            crc = 0
            for part in parts:
                crc = zlib.crc32(part, crc)
            torn = crc != shard.crc
        if torn:
            raise ValueError(
                f"{self.folder / shard.name}.* are not what was written: a torn shard; remove {self.folder} to have the"
                " text tokenised again"
            )

    def __len__(self) -> int:
        return self.index.tokens

    def read(self, start: int, count: int) -> torch.Tensor:
        """`count` tokens from `start` on, int64, across shards; fewer at the end."""
        return torch.cat([self._tokens[i][low:high].to(torch.int64) for i, low, high in self._spans(start, count)])

    def ends(self, start: int, count: int) -> torch.Tensor:
        """Where documents end within these tokens, int64, counted from `start`; each in (0, count]."""
        found = [torch.empty(0, dtype=torch.int64)]
        for i, low, high in self._spans(start, count):
            ends = self._ends[i]
            first, last = torch.searchsorted(ends, torch.tensor([low, high]), right=True).tolist()
            found.append(ends[first:last] + (self._starts[i] - start))
        return torch.cat(found)

    def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) of the pieces that [start, start + count) has in each shard."""
        stop = min(start + count, len(self))
        for i, (low, high) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if low < stop and start < high:
                yield i, max(start, low) - low, min(stop, high) - low


def write_shards(
    folder: Path, documents: Iterable[list[int]], vocab_size: int, fingerprint: str, shard_tokens: int = SHARD_TOKENS
) -> Index:
    """Writes all documents; returns the index."""
    with ShardWriter(folder, vocab_size, fingerprint, shard_tokens) as writer:
        for ids in documents:
            writer.add(ids)
    return read_index(folder)


def is_current(folder: Path, wanted: str) -> bool:
    """Whether the folder has shards of these sources and this tokenizer.

    Raises:
        ValueError: a broken index.
    """
    return os.path.exists(folder / INDEX) and read_index(folder).fingerprint == wanted
