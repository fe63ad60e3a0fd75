"""The ring cache of a whole model, and one pass of new tokens through it.

Each layer keeps `k, v: [B, slots, Hkv, D]`; position p of sequence b lies in slot `p % slots`. With a window W there
are W slots, so the memory stays the same however long a sequence grows; without one, a slot for each position.

A pass brings every sequence a chunk of any length, 0 for those that idle. Three sequences with a window of 3, chunks
of 5, 7 and 2 tokens, behind 0, 1 and 3 tokens that the cache already holds:

    cu_seqlens  0 5 12 14
    positions   [0 1 2 3 4 | 1 2 3 4 5 6 7 | 3 4]      where each token stands
    kept        [0 0 1 1 1 | 0 0 0 0 1 1 1 | 1 1]      the last three of each chunk
    slot        [    2 0 1 |         2 0 1 | 0 1]      position % 3
    seq_lens    [0 1 3] before, [5 8 5] after

The third slot of the last sequence still holds its position 2.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch

from mistral_kernels._checks import accumulate_dtype
from mistral_kernels.ring_cache.int8 import dequantise, quantise

from .config import ModelConfig

# Positions are int32 on the device, and kernels add lengths of blocks to them.
MAX_POSITIONS = 2**30


class RingCache:
    """Keys and values of `batch` sequences.

    Args:
        config: gives the layers, the heads and the window.
        batch: B.
        max_seq_len: the most tokens that a sequence will have. A ring (`window < max_seq_len`) takes more.
        dtype, device: of the keys and values.
        chunk: chunks up to this length are written before they are attended to, in one pass; a ring then has
            `window + chunk − 1` slots. 1 serves plain decoding.
        kv_dtype: None to keep keys and values in `dtype`, or torch.int8: codes with a float32 scale for each token and
            head, half of bfloat16's memory and 4 bytes.
        poison: for finding faults: a released row is filled with NaN, which would show in any sequence that read it.

    Attributes:
        k, v: one `[B, slots, Hkv, D]` tensor a layer.
        k_scale, v_scale: one `[B, slots, Hkv]` float32 tensor a layer with int8, else empty.
        seq_lens: `[B]` int32, the tokens of each sequence so far; `held` holds the same on the host, so that
            nothing has to wait for the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_seq_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        chunk: int = 1,
        kv_dtype: torch.dtype | None = None,
        poison: bool = False,
    ):
        if kv_dtype not in (None, dtype, torch.int8):
            raise ValueError(f"kv_dtype is {kv_dtype}; it must be None, {dtype} or torch.int8")
        for name, value in (("batch", batch), ("max_seq_len", max_seq_len), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        window = config.sliding_window
        # Sequences that never outgrow the window need neither a ring nor the window.
        self.window = window if window is not None and window < max_seq_len else None
        self.slots = max_seq_len if self.window is None else self.window + chunk - 1
        self.batch, self.chunk = batch, chunk
        shape = (batch, self.slots, config.n_kv_heads, config.head_dim)
        layers = range(config.n_layers)
        self.k, self.v = ([torch.zeros(shape, dtype=kv_dtype or dtype, device=device) for _ in layers] for _ in "kv")
        scaled = layers if kv_dtype == torch.int8 else ()
        wide = accumulate_dtype(dtype)
        self.k_scale, self.v_scale = ([torch.zeros(shape[:3], dtype=wide, device=device) for _ in scaled] for _ in "kv")
        self.poison = poison
        self._taken: list[bool] | None = None
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.held = [0] * batch

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and scales; constant."""
        return sum(t.nbytes for t in (*self.k, *self.v, *self.k_scale, *self.v_scale))

    def acquire(self) -> int:
        """An empty row for a new sequence. From the first call on, only acquired rows take tokens.

        Raises:
            RuntimeError: all rows are taken.
        """
        taken = [False] * self.batch if self._taken is None else self._taken
        if all(taken):
            raise RuntimeError(
                f"all {self.batch} rows of the cache are taken; release one, or make the cache with a larger batch"
            )
        row = taken.index(False)
        self._taken = taken
        self.reset([row])
        taken[row] = True
        return row

    def release(self, row: int) -> None:
        """Gives a row back; its sequence is forgotten.

        Raises:
            ValueError: a row that was not acquired.
        """
        if self._taken is None or not 0 <= row < self.batch or not self._taken[row]:
            raise ValueError(f"row {row} is not taken; rows come from acquire()")
        self._taken[row] = False
        self.reset([row])
        if self.poison:
            for t in (self.k_scale or self.k) + (self.v_scale or self.v):
                t[row] = torch.nan

    @property
    def free(self) -> int:
        """How many rows `acquire` has left to give."""
        return self.batch if self._taken is None else self._taken.count(False)

    def fork(self, rows: Sequence[int]) -> "RingCache":
        """A new cache whose row i goes on from a copy of row `rows[i]` of this one; rows may repeat.

        Raises:
            ValueError: no rows, or one that the cache does not have.
        """
        if not rows or min(rows) < 0 or max(rows) >= self.batch:
            raise ValueError(f"rows is {list(rows)}; it must name rows from 0 to {self.batch - 1}, at least one")
        other = copy.copy(self)
        index = torch.tensor(rows, device=self.seq_lens.device)
        other.k, other.v, other.k_scale, other.v_scale = (
            [t[index] for t in tensors] for tensors in (self.k, self.v, self.k_scale, self.v_scale)
        )
        other.batch, other._taken = len(rows), None
        other.seq_lens, other.held = self.seq_lens[index], [self.held[row] for row in rows]
        return other

    def begin(
        self, lengths: Sequence[int] | None, cos: torch.Tensor, sin: torch.Tensor, ops: SimpleNamespace
    ) -> "CachedPass":
        """The pass of `lengths[b]` new tokens for each sequence b, None for one each; all layers share it.

        Raises:
            ValueError: lengths that do not fit the batch; a sequence that outgrows a cache without a ring, or the
                rope tables.
        """
        lengths = [1] * self.batch if lengths is None else list(lengths)
        self.check(lengths, cos.shape[0])
        if set(lengths) == {1}:
            positions, cu_seqlens, last, after = self.seq_lens, None, None, self.seq_lens + 1
        else:
            positions, cu_seqlens, last, after = self._ragged(lengths)
        longest = max(lengths)
        write_first = longest <= self.chunk
        return CachedPass(
            cache=self,
            ops=ops,
            cos=cos,
            sin=sin,
            positions=positions,
            cu_seqlens=cu_seqlens,
            seq_lens=after if write_first else self.seq_lens,
            longest=longest,
            write_first=write_first,
            last=last,
            tokens=sum(lengths),
            after=(after, [old + new for old, new in zip(self.held, lengths, strict=True)]),
        )

    def check(self, lengths: list[int], table_rows: int) -> None:
        """Raises ValueError where so many new tokens of each sequence do not fit; `begin` calls it."""
        if len(lengths) != self.batch or min(lengths) < 0 or max(lengths) < 1:
            raise ValueError(
                f"the chunk lengths are {lengths}; they must be {self.batch}, one a sequence, 0 for those that idle,"
                " and not all 0"
            )
        for b, (held, new) in enumerate(zip(self.held, lengths, strict=True)):
            if new and self._taken is not None and not self._taken[b]:
                raise ValueError(f"row {b} gets {new} tokens but is not taken; rows come from acquire()")
            if held + new > MAX_POSITIONS:
                raise ValueError(f"sequence {b} would have {held + new} tokens; a cache counts to {MAX_POSITIONS}")
            if self.window is None and held + new > self.slots:
                raise ValueError(
                    f"sequence {b} would have {held + new} tokens, but the cache was made for {self.slots} and has no"
                    " window to slide; make it with a larger max_seq_len"
                )
            if held + new > table_rows:
                raise ValueError(
                    f"sequence {b} would have {held + new} tokens, but the rope tables hold {table_rows} positions;"
                    " Transformer.reserve_positions makes more"
                )

    def _ragged(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """positions `[T]`, cu_seqlens `[B + 1]`, the row of each live sequence's last token, and the new seq_lens."""
        device, ends = self.seq_lens.device, [0]
        for n in lengths:
            ends.append(ends[-1] + n)
        spans = [torch.arange(a, a + n, dtype=torch.int32) for a, n in zip(self.held, lengths, strict=True) if n]
        last = torch.tensor([end - 1 for end, n in zip(ends[1:], lengths, strict=True) if n], device=device)
        added = torch.tensor(lengths, dtype=torch.int32, device=device)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        return torch.cat(spans).to(device), cu_seqlens, last, self.seq_lens + added

    def advance(self, done: "CachedPass") -> None:
        """Counts the tokens of a pass that all layers have finished."""
        self.seq_lens, self.held = done.after

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empties these sequences, all if None. What their slots hold is never read again."""
        rows = range(self.batch) if rows is None else rows
        empty = set(rows)
        self.held = [0 if b in empty else n for b, n in enumerate(self.held)]
        self.seq_lens = torch.tensor(self.held, dtype=torch.int32, device=self.seq_lens.device)


@dataclasses.dataclass(frozen=True)
class CachedPass:
    """What all layers share while one chunk of each sequence runs through them; made by `RingCache.begin`."""

    cache: RingCache
    ops: SimpleNamespace
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None
    seq_lens: torch.Tensor
    longest: int
    write_first: bool
    last: torch.Tensor | None
    tokens: int
    after: tuple[torch.Tensor, list[int]]

    def layers(self) -> Iterable[tuple[torch.Tensor, ...]]:
        """What each layer hands to `attend`: its rings. A compiled layer sees tensors and not its own number."""
        scales = (self.cache.k_scale, self.cache.v_scale) if self.cache.k_scale else ()
        return zip(self.cache.k, self.cache.v, *scales, strict=True)

    def attend(
        self, rings: tuple[torch.Tensor, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Rotates q and k, attends and writes k and v to the layer's rings, in the order that the chunk needs.

        Args:
            rings: the layer's entry in `layers()`.
            q: `[T, H, D]`, the packed tokens of the pass; k, v: `[T, Hkv, D]`.

        Returns:
            `[T, H, D]`.
        """
        ops, (k_cache, v_cache, *scales) = self.ops, rings
        codes = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        where = dict(cu_seqlens=self.cu_seqlens, max_seqlen=self.longest, **codes)
        if self.write_first:
            # The slots that these tokens overwrite hold keys that have just left the window.
            angles = (self.positions, self.cos, self.sin, self.cu_seqlens)
            q, _ = ops.rope_write_kv(q, k, v, k_cache, v_cache, *angles, **codes)
            return ops.attention_cached(q, k_cache, v_cache, self.seq_lens, self.cache.window, **where)
        # Written first, a longer chunk would overwrite keys that its own first queries still see.
        q, k = ops.rope(q, k, self.cos, self.sin, self.positions)
        # As codes, they are seen as later queries will see them: chunks of any length give the same.
        seen = [dequantise(*quantise(t), t.dtype) for t in (k, v)] if scales else (k, v)
        out = ops.attention_cached(q, k_cache, v_cache, self.seq_lens, self.cache.window, *seen, **where)
        ops.write_kv(k, v, k_cache, v_cache, self.positions, self.cu_seqlens, **codes)
        return out

    def step(
        self, decode_layers: Callable, weights: list, biases: list[torch.Tensor], eps: float
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """`attend` of all layers and what lies between, as one call on the embeddings; where `write_first` is set."""
        return lambda x: decode_layers(
            x,
            weights,
            self.cache.k,
            self.cache.v,
            self.positions,
            self.cos,
            self.sin,
            self.seq_lens,
            self.cache.window,
            eps,
            biases,
            self.cu_seqlens,
            self.longest,
            k_scales=self.cache.k_scale,
            v_scales=self.cache.v_scale,
        )

    def last_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[T, N]`, the last position of each sequence that has tokens in this pass."""
        return x if self.last is None else x[self.last]
