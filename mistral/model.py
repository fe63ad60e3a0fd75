"""The transformer of Mistral 7B (Jiang et al. 2023) on the ops of `mistral_kernels`, under its checkpoint's names.

`ops` is the only seam: `mistral_kernels`, `mistral_kernels.reference` or `mistral_kernels.using(impl=...)`, taken once
when the model is built. The layers hand on (delta, residual) instead of their sum, so that each addition is made in
the same pass as the RMSNorm that follows it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import mistral_kernels

from .cache import CachedPass, RingCache
from .config import ModelConfig

DECODE_TOKENS = 16  # beyond so many, what Python takes between the ops is little beside them
NORMS = frozenset(("attention_norm", "ffn_norm"))
DECODE_WEIGHTS = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
_OPS = (
    *("rms_norm", "add_rms_norm", "linear", "linear_quantized", "swiglu", "rope", "rope_table", "attention"),
    *("rope_write_kv", "write_kv", "attention_cached"),
)


@dataclasses.dataclass(frozen=True)
class FullPass:
    """What all layers share while whole sequences run through them without a cache."""

    ops: SimpleNamespace
    cos: torch.Tensor
    sin: torch.Tensor
    window: int | None
    positions: torch.Tensor | None
    cu_seqlens: torch.Tensor | None

    def layers(self) -> Iterable[None]:
        """What each layer hands to `attend`: nothing, without a cache."""
        return itertools.repeat(None)

    def attend(self, rings: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Rotates q and k and attends: `[B, S, H, D]`, or `[T, H, D]` with cu_seqlens."""
        q, k = self.ops.rope(q, k, self.cos, self.sin, self.positions)
        return self.ops.attention(q, k, v, self.window, cu_seqlens_q=self.cu_seqlens)

    def last_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The last position of each sequence that has one: `[B, N]`."""
        if self.cu_seqlens is None:
            return x[:, -1]
        return x[(self.cu_seqlens[1:] - 1)[self.cu_seqlens.diff() > 0]]


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig, ops: SimpleNamespace):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.eps, self.ops = config.norm_eps, ops

    def forward(self, delta: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum of both, and the sum; without a residual delta is the sum."""
        if residual is None:
            return self.ops.rms_norm(delta, self.weight, self.eps), delta
        return self.ops.add_rms_norm(delta, residual, self.weight, self.eps)


class Linear(nn.Linear):
    """nn.Linear through `ops`: of few rows, as in decoding, a kernel reads the weight at the memory's speed."""

    def __init__(self, inputs: int, outputs: int, ops: SimpleNamespace, bias: bool = False):
        super().__init__(inputs, outputs, bias=bias)
        self.ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.weight, self.bias)


# How the weight of a projection is read for `decode_layers`, by the type of its module; and that of a norm.
WEIGHT_OF: dict[type, Callable[[Any], Any]] = {Linear: lambda module: module._parameters["weight"]}
NORM_WEIGHT_OF: dict[type, Callable[[Any], Any]] = {RMSNorm: lambda module: module._parameters["weight"]}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops: SimpleNamespace):
        super().__init__()
        self.head_dim = config.head_dim
        q, kv, bias = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.attention_bias
        self.wq = Linear(config.dim, q, ops, bias)
        self.wk = Linear(config.dim, kv, ops, bias)
        self.wv = Linear(config.dim, kv, ops, bias)
        self.wo = Linear(q, config.dim, ops)

    def forward(self, x: torch.Tensor, plan: Any, rings: Any) -> torch.Tensor:
        q, k, v = (w(x).view(*x.shape[:-1], -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        return self.wo(plan.attend(rings, q, k, v).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, ops: SimpleNamespace):
        super().__init__()
        self.ops = ops
        self.w1 = Linear(config.dim, config.hidden_dim, ops)
        self.w2 = Linear(config.hidden_dim, config.dim, ops)
        self.w3 = Linear(config.dim, config.hidden_dim, ops)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.ops.swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, ops: SimpleNamespace):
        super().__init__()
        self.attention_norm = RMSNorm(config, ops)
        self.attention = Attention(config, ops)
        self.ffn_norm = RMSNorm(config, ops)
        self.feed_forward = FeedForward(config, ops)

    def plain_weights(self) -> list[Any] | None:
        """The weights as `decode_layers` takes them; None where a part is not what it was built as: replaced, hooked
        or compiled, so that calling the layer means more than its weights."""
        # Not by attribute, which nn.Module looks up at several times the price: every step asks every layer.
        parts: dict[str, Any] = self._modules  # type: ignore[assignment]
        attention, feed_forward = parts["attention"], parts["feed_forward"]
        if type(attention) is not Attention or type(feed_forward) is not FeedForward:
            return None
        parts = {**parts, **attention._modules, **feed_forward._modules}
        weights = []
        for name in DECODE_WEIGHTS:
            module = parts[name]
            read = NORM_WEIGHT_OF.get(type(module)) if name in NORMS else WEIGHT_OF.get(type(module))
            if read is None or module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl:
                return None
            weights.append(read(module))
        for module in (self, attention, feed_forward):
            if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl:
                return None
        return weights

    def forward(
        self, delta: torch.Tensor, residual: torch.Tensor | None, plan: Any, rings: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns (delta, residual), whose sum is the residual stream before and after the layer.

        plan is the FullPass or CachedPass of all layers, and rings this layer's entry in its `layers()`.
        """
        x, residual = self.attention_norm(delta, residual)
        x, residual = self.ffn_norm(self.attention(x, plan, rings), residual)
        return self.feed_forward(x), residual


class RopeTables(nn.Module):
    """cos and sin, `[P, D/2]`: float64 in a float64 model, else float32. They are no part of a checkpoint, and
    `.to(bfloat16)` does not round them: in 16 bits long positions could not be told apart."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig, ops: SimpleNamespace):
        super().__init__()
        self.config, self.make = config, ops.rope_table
        self.rebuild(config.max_positions, torch.get_default_device(), torch.float32)

    def rebuild(self, positions: int, device: torch.device, dtype: torch.dtype) -> None:
        """Makes tables of this many positions; on the CPU where the weights are on "meta"."""
        c = self.config
        # Tensors made within inference mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.device("cpu"):
            cos, sin = self.make(c.head_dim, c.rope_theta, positions, c.rope_scaling, dtype=dtype)
        device = cos.device if device.type == "meta" else device
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "RopeTables":
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        dtype = torch.float64 if self.cos.dtype == torch.float64 else torch.float32
        if dtype != cos.dtype:
            self.rebuild(cos.shape[0], self.cos.device, dtype)
        else:
            device = cos.device if self.cos.is_meta else self.cos.device
            self.cos, self.sin = cos.to(device), sin.to(device)
        return self


class Transformer(nn.Module):
    """A Mistral-shaped decoder; its state dict has the names of Mistral's checkpoints.

    The weights of q and k are in half-split rotary order (Hugging Face's); `weights.py` permutes Mistral's own when
    they are read.

    Args:
        config: the shape, the window and the rotary settings.
        ops: `mistral_kernels`, `mistral_kernels.reference` or `mistral_kernels.using(impl=...)`.
    """

    def __init__(self, config: ModelConfig, ops: Any = mistral_kernels):
        super().__init__()
        self.config = config
        # The functions and not the module they come from: a model can be copied and pickled.
        self.ops = SimpleNamespace(**{name: getattr(ops, name) for name in _OPS})
        self.ops.decode_layers = getattr(ops, "decode_layers", None)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, self.ops) for _ in range(config.n_layers))
        self.norm = RMSNorm(config, self.ops)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, self.ops)
        self.rope = RopeTables(config, self.ops)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and so of a cache."""
        return self.norm.weight.dtype

    def reserve_positions(self, positions: int) -> None:
        """Makes sure that sequences of this length can be rotated.

        Raises:
            ValueError: longer than the context, without a window to keep every query within it.
        """
        if positions > self.config.max_positions and self.config.sliding_window is None:
            raise ValueError(
                f"{positions} positions are needed, but the model has a context of {self.config.max_positions} and no"
                " sliding window"
            )
        if positions > self.rope.cos.shape[0]:
            self.rope.rebuild(positions, self.rope.cos.device, self.rope.cos.dtype)

    def reset_tables(self, dtype: torch.dtype = torch.float32) -> None:
        """Makes the rope tables again, on the weights' device: float64 where weights of float64 were assigned."""
        self.rope.rebuild(self.rope.cos.shape[0], self.device, dtype)

    def cache(
        self,
        batch: int,
        max_seq_len: int,
        chunk: int = 1,
        kv_dtype: torch.dtype | None = None,
        poison: bool = False,
    ) -> RingCache:
        """An empty cache for this model; arguments as `RingCache` takes them."""
        return RingCache(self.config, batch, max_seq_len, self.dtype, self.device, chunk, kv_dtype, poison)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        cache: RingCache | None = None,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
        float32: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: int64 or int32. Without a cache `[B, S]`, or packed `[T]` with cu_seqlens: whole sequences, each
                from position 0; gradients flow. With a cache packed `[T]`: the next tokens of each sequence.
            cu_seqlens: `[sequences + 1]` int32, where each packed sequence starts, and T.
            cache: what the sequences have had so far; the new tokens are added to it. No gradients: call it under
                `torch.inference_mode()` or `torch.no_grad()`.
            lengths: how many of the tokens belong to each sequence of the cache, 0 for one that idles; None for one
                each.
            last_only: only at the last position of each sequence, so that `[T, V]` is never formed: `[B, V]`, without
                rows for empty chunks and sequences.
            float32: logits in float32, instead of the weights' dtype.

        Returns:
            `[..., V]`, as tokens has dimensions.

        Raises:
            ValueError: tokens, cu_seqlens or lengths that do not fit; more positions than tables or cache hold.
            NotImplementedError: a derivative with a cache.
        """
        return self.logits(self.hidden(tokens, cu_seqlens, cache, lengths, last_only), float32)

    def logits(self, hidden: torch.Tensor, float32: bool = False) -> torch.Tensor:
        """The output projection of what `hidden` returns."""
        embedding: Any = self.tok_embeddings
        if self.output is None and hasattr(embedding, "project"):
            logits = embedding.project(hidden)  # its weight is quantised
        elif self.output is None:
            logits = self.ops.linear(hidden, embedding.weight)
        else:
            logits = self.output(hidden)
        return logits.float() if float32 else logits

    def hidden(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cache: RingCache | None = None,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """`[..., N]`, what the output projection multiplies; arguments as in `forward`."""
        if cache is not None:
            plan: FullPass | CachedPass = self._cached(tokens, cu_seqlens, cache, lengths)
        else:
            plan = self._full(tokens, cu_seqlens, lengths)
        delta: torch.Tensor = self.tok_embeddings(tokens)
        residual: Any = None
        step = self._decode_step(plan)
        if step is not None:
            delta, residual = step(delta)
        else:
            for layer, rings in zip(self.layers, plan.layers(), strict=False):
                delta, residual = layer(delta, residual, plan, rings)
        if isinstance(plan, CachedPass):
            plan.cache.advance(plan)
        if last_only:
            delta, residual = plan.last_rows(delta), plan.last_rows(residual)
        return self.norm(delta, residual)[0]

    def _decode_step(self, plan: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
        """All layers in one call, for the few tokens of a decode step on a CPU; None where they run one by one."""
        few = isinstance(plan, CachedPass) and plan.write_first and plan.tokens <= DECODE_TOKENS
        if not few or self.ops.decode_layers is None or self.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        weights: list[Any] = []
        biases: list[torch.Tensor] = []
        layer: Any
        for layer in self.layers:
            plain = layer.plain_weights()
            if plain is None or torch.is_grad_enabled():
                return None
            weights += plain
            if self.config.attention_bias:
                biases += [w.bias for w in (layer.attention.wq, layer.attention.wk, layer.attention.wv)]
        return plan.step(self.ops.decode_layers, weights, biases, self.config.norm_eps)

    def _full(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, lengths: Sequence[int] | None) -> FullPass:
        if lengths is not None:
            raise ValueError("lengths belongs to a cache; packed sequences without one take cu_seqlens")
        if tokens.dim() != (2 if cu_seqlens is None else 1):
            needed = "[B, S]" if cu_seqlens is None else "[T] with cu_seqlens"
            raise ValueError(f"tokens is {list(tokens.shape)}; without a cache it must be {needed}")
        positions = None
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=tokens.shape[0])
            positions = torch.arange(tokens.shape[0], device=tokens.device, dtype=starts.dtype) - starts
        return FullPass(self.ops, self.rope.cos, self.rope.sin, self.config.sliding_window, positions, cu_seqlens)

    def _cached(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        cache: RingCache,
        lengths: Sequence[int] | None,
    ) -> CachedPass:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is for packed sequences without a cache; with one, pass lengths")
        plan = cache.begin(lengths, self.rope.cos, self.rope.sin, self.ops)
        if tokens.shape != (plan.tokens,):
            raise ValueError(f"tokens is {list(tokens.shape)}; for these lengths it must be [{plan.tokens}], packed")
        return plan
