"""A cache for `generate(past_key_values=...)` whose sliding layers are rings: a token is written, nothing is moved."""

from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from .. import write_kv
from .attention import NAME
from .masks import RingLength


class RingLayer(StaticLayer):
    """The keys and values of one sliding layer; position p lives in slot `p % slots`.

    A step of one token attends to the slots as they lie: softmax does not mind their order. A longer chunk attends to
    the past in order and itself, and is written behind that.
    """

    is_sliding = True
    keys: Any
    values: Any

    def __init__(self, max_cache_len: int, sliding_window: int, **kwargs: Any):
        super().__init__(max_cache_len=min(sliding_window, max_cache_len))
        self.written = 0  # the length again as a Python number, for decisions without waiting for the device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # The ops lay their caches out as [B, slots, Hkv, D].
        self.keys, self.values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (self.keys, self.values))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def _past(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a new chunk's first query sees, in the order of their positions."""
        kept = min(self.written, self.max_cache_len - 1)
        slots = torch.arange(self.written - kept, self.written, device=self.keys.device) % self.max_cache_len
        return self.keys[:, :, slots], self.values[:, :, slots]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        keys, values = key_states, value_states
        if length != 1 and self.written:
            past = self._past()
            keys, values = (torch.cat(pair, 2) for pair in zip(past, (keys, values), strict=True))
        positions = torch.arange(length, device=self.keys.device) + self.cumulative_length
        k, v = (t.to(self.keys.dtype).transpose(1, 2) for t in (key_states, value_states))
        k_ring, v_ring = (t.transpose(1, 2) for t in (self.keys, self.values))
        write_kv(k, v, k_ring, v_ring, positions.expand(batch, length))
        self.cumulative_length.add_(length)
        self.written += length
        return (self.keys, self.values) if length == 1 else (keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.written - self.max_cache_len + 1, 0)
        if query_length == 1:
            return RingLength(self.max_cache_len), offset
        return self.written - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self.written

    def reset(self) -> None:
        super().reset()
        self.written = 0

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("a ring has overwritten what came before; use DynamicCache for assisted decoding")


class RingCache(Cache):
    """A cache of fixed size for `generate`: rings of the window's size, whole tensors for layers without a window.

    transformers' own StaticCache moves the whole window at each token once it is full. Sequences may be padded on
    the left; assisted decoding, which rolls back, needs a DynamicCache.

    Args:
        config: of the model, which runs with `attn_implementation="mistral_kernels"` (`patch(model)` sets it).
        max_cache_len: the most tokens a sequence will have; layers with a window hold no more than the window.

    Raises:
        ValueError: the model runs another attention, or one of its layers is neither windowed nor full.
    """

    def __init__(self, config: Any, max_cache_len: int):
        text = config.get_text_config(decoder=True)
        if not str(text._attn_implementation).startswith(NAME):
            raise ValueError(
                f"the config's attention is {text._attn_implementation!r}; RingCache needs {NAME!r}:"
                " patch(model), or load the model with it"
            )
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len is {max_cache_len}; it must be at least 1")
        window: Any = getattr(text, "sliding_window", None)
        default = ["full_attention" if window is None else "sliding_attention"] * text.num_hidden_layers
        types = getattr(text, "layer_types", None) or default
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"a layer is of type {kind!r}; RingCache has full_attention and sliding_attention")
        layers: list[Any] = [
            RingLayer(max_cache_len, window) if kind == "sliding_attention" else StaticLayer(max_cache_len)
            for kind in types
        ]
        super().__init__(layers=layers)
