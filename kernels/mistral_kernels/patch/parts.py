"""The methods that stand in for a Hugging Face model's own, made on a namespace of ops."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NORM_TYPES: set[type] = set()  # classes whose forward is known to be the RMSNorm that add_rms_norm fuses


def marked(function: Callable, part: str, impl: str | None = None) -> Callable:
    """`function`, told apart from others' by `unpatch`, and made again from this by `pickle`."""
    function.mistral_kernels_part = part, impl  # type: ignore[attr-defined]
    return function


def is_marked(function: Any) -> bool:
    return hasattr(function, "mistral_kernels_part")


def part_of(function: Any) -> tuple[str, str | None]:
    """The op and the implementation that a marked function was made with."""
    part: tuple[str, str | None] = function.mistral_kernels_part
    return part


def rms_norm_forward(ops: Any, original: Callable) -> Callable:
    rms_norm = ops.rms_norm

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _is_silu(module: Any) -> bool:
    return isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation" or module is nn.functional.silu


def has_silu(mlp: Any) -> bool:
    return _is_silu(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None))


def mlp_forward(ops: Any, original: Callable) -> Callable:
    swiglu = ops.swiglu

    def forward(self, x):
        if not _is_silu(self.act_fn):
            return original(self, x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def packed_mlp_forward(ops: Any, original: Callable) -> Callable:
    swiglu_packed = ops.swiglu_packed

    def forward(self, hidden_states):
        if not _is_silu(self.activation_fn):
            return original(self, hidden_states)
        return self.down_proj(swiglu_packed(self.gate_up_proj(hidden_states)))

    return forward


def apply_rotary(ops: Any) -> Callable:
    """What stands in for `apply_rotary_pos_emb`: q and k `[B, H, S, D]`, or `[B, S, H, D]` with unsqueeze_dim=2."""
    rope = ops.rope

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim == 2:
            return rope(q, k, cos, sin)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


def rebound(function: Any, **names: Any) -> Callable:
    """A copy of `function` that finds `names` where it looks for globals; the module they come from is untouched.

    Without `__name__`, torch.compile reads the globals from the function and not from the module of that name.
    """
    scope = {**function.__globals__, **names}
    scope.pop("__name__", None)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    return copy


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fuses(norm: nn.Module) -> bool:
    """Whether the norm is a plain one, so that nobody misses its call. FSDP and PEFT change the type or add hooks."""
    if type(norm) not in NORM_TYPES or _hooked(norm) or "_hf_hook" in norm.__dict__:
        return False
    own = norm.__dict__.get("forward")
    return own is None or is_marked(own)


def _checkpoints_in_forward(cls: type) -> bool:
    """Whether transformers wraps the forward of such a layer for gradient checkpointing (since 5.23), not its call."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return issubclass(cls, GradientCheckpointingLayer) and "__call__" not in vars(GradientCheckpointingLayer)


def _unwrapped(forward: Any) -> Any:
    """The forward below what transformers wraps around it for gradient checkpointing, once for each derived class."""
    while "forward_with_checkpointing" in getattr(getattr(forward, "__code__", None), "co_freevars", ()):
        forward = forward.__wrapped__
    return forward


def checkpointed(forward: Callable, cls: type) -> Callable:
    """`forward` of an instance of `cls`, under gradient checkpointing where the forward that it replaces was.

    transformers' own wrapper serves the forward of a class only.
    """
    if not _checkpoints_in_forward(cls):
        return forward

    def checkpointing(self, *args, **kwargs):
        if not (self.gradient_checkpointing and self.training):
            return forward(self, *args, **kwargs)
        if not getattr(self, "_can_checkpoint_with_cache", False):  # the backward would write into it a second time
            empty = dict(use_cache=False, past_key_values=None, layer_past=None)
            kwargs.update({name: value for name, value in empty.items() if name in kwargs})
        return self._gradient_checkpointing_func(functools.partial(forward, self, **kwargs), *args)

    return checkpointing


def checkpointed_class(forward: Callable, cls: type) -> Callable:
    """`forward` to be that of `cls`, wrapped by transformers as it wraps any."""
    if not _checkpoints_in_forward(cls):
        return forward
    wrapped: Callable = type(cls.__name__, (cls,), dict(forward=forward)).forward  # type: ignore[attr-defined]
    return wrapped


def layer_forward(ops: Any, original: Callable) -> Callable:
    add_rms_norm, original = ops.add_rms_norm, _unwrapped(original)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        given = dict(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        norm = self.post_attention_layernorm
        if not _fuses(norm):
            return original(self, hidden_states, **given)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        normed, residual = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        return residual + self.mlp(normed)

    return forward


def _plain_linear(head: Any) -> bool:
    """Whether the head only multiplies by its weight. Adapters, quantisation and sharding of it change its type."""
    if type(head) is not nn.Linear or head.bias is not None or _hooked(head) or "forward" in head.__dict__:
        return False
    return isinstance(head.weight, torch.Tensor) and not hasattr(head.weight, "placements")


def _shifted(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def causal_lm_forward(ops: Any, original: Callable) -> Callable:
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    linear_cross_entropy = ops.linear_cross_entropy

    @can_return_tuple
    def fused(self, labels, **kwargs):
        outputs = self.model(**kwargs)
        ignore = kwargs.get("ignore_index", -100)
        shifted = kwargs.get("shift_labels")
        shifted = _shifted(labels, ignore) if shifted is None else shifted
        hidden = outputs.last_hidden_state
        loss = linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            shifted.to(hidden.device).reshape(hidden.shape[:-1]),
            ignore,
            num_items=kwargs.get("num_items_in_batch"),
        )
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        skip_logits=None,
        **kwargs,
    ):
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        skip = self.training if skip_logits is None else skip_logits
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None or not skip or not whole or not _plain_linear(self.lm_head):
            return original(self, logits_to_keep=logits_to_keep, **given)
        if self.loss_function is not ForCausalLMLoss:
            return original(self, logits_to_keep=logits_to_keep, **given)
        return fused(self, **given)

    return forward
