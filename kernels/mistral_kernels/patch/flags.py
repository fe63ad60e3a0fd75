"""`patch` under the names of the flags that users of Liger know."""

import inspect
from typing import Any

from .patching import Report, patch


def _ops(rope: bool, swiglu: bool, rms_norm: bool, fused: bool, attention: bool) -> list[str]:
    chosen = dict(rope=rope, swiglu=swiglu, rms_norm=rms_norm, add_rms_norm=rms_norm)
    chosen |= dict(linear_cross_entropy=fused, attention=attention)
    return [op for op, wanted in chosen.items() if wanted]


def apply_kernels(
    model: Any,
    *,
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    attention: bool = True,
    impl: str | None = None,
) -> Report:
    """`patch` with the flags of `apply_liger_kernel_to_mistral` and its kin, and one for attention.

    Args:
        model: as in `patch`: a model, a class or the name of a family, such as "mistral".
        rope, swiglu, attention: these ops.
        rms_norm: also the residual addition before it.
        fused_linear_cross_entropy: the loss without the logits.
        cross_entropy: must be False: there is no cross entropy of finished logits here, and torch's own remains.
        impl: as in `patch`.

    Returns:
        The Report of `patch`.

    Raises:
        ValueError: cross_entropy is True; else as `patch`.
    """
    if cross_entropy:
        raise ValueError("cross_entropy is True; only fused_linear_cross_entropy is here, which spares the logits too")
    return patch(model, ops=_ops(rope, swiglu, rms_norm, fused_linear_cross_entropy, attention), impl=impl)


class AutoKernelsForCausalLM:
    """`AutoModelForCausalLM` whose models are patched; takes the flags of `apply_kernels` too."""

    _FLAGS = frozenset(inspect.signature(apply_kernels).parameters) - {"model"}

    @classmethod
    def _load(cls, how: str, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        flags = {name: kwargs.pop(name) for name in cls._FLAGS & kwargs.keys()}
        model = getattr(AutoModelForCausalLM, how)(*args, **kwargs)
        apply_kernels(model, **flags)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`AutoModelForCausalLM.from_pretrained(...)`, then `apply_kernels` with the flags among the arguments."""
        return cls._load("from_pretrained", *args, **kwargs)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """`AutoModelForCausalLM.from_config(...)`, then `apply_kernels` with the flags among the arguments."""
        return cls._load("from_config", *args, **kwargs)
