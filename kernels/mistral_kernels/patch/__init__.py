"""Hugging Face models on these ops: `patch`, `unpatch`, an attention implementation, a ring cache.

Nothing here imports transformers before it is asked to do something.
"""

import importlib
from typing import Any

from .patching import OPS as OPS
from .patching import Report as Report
from .patching import patch as patch
from .patching import unpatch as unpatch

_LATE = {"RingCache": ".ring", "apply_kernels": ".flags", "AutoKernelsForCausalLM": ".flags"}


def register_attention(impl: str | None = None) -> str:
    """Makes `attn_implementation="mistral_kernels"` known to transformers, attention and mask both.

    The mask honours padding at either end of the rows, packed sequences (`position_ids` that start over, or
    `cu_seq_lens_q` as for flash-attn) and the window of the config. Dropout, attention weights, soft caps and sinks
    go to the model's own eager attention, masks of another pattern to torch's.

    Args:
        impl: None for the fastest that can, or "reference", "cpu", "triton".

    Returns:
        The registered name: "mistral_kernels", or with an impl "mistral_kernels_<impl>".

    Raises:
        ImportError: transformers is not installed.
        ValueError, NotImplementedError: `impl` is unknown or cannot run here.
    """
    from .._dispatch import check_impl
    from .patching import need_transformers

    check_impl(impl)
    need_transformers()
    return importlib.import_module(".attention", __name__).register(impl)


def __getattr__(name: str) -> Any:
    if name in _LATE:
        from .patching import need_transformers

        need_transformers()
        return getattr(importlib.import_module(_LATE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
