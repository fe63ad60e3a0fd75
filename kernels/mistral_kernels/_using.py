"""The ops with one implementation chosen for all of them."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

from ._dispatch import check_impl
from .attention import attention
from .decode import decode_layers
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .quant_linear import linear_int4, linear_int8, linear_nf4, linear_quantized
from .ring_cache import attention_cached, rope_write_kv, write_kv
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_table
from .swiglu import swiglu, swiglu_packed

WITHOUT_GPU = (None, "reference", "cpu")
OPS = (
    *(add_rms_norm, attention, attention_cached, linear, linear_cross_entropy, rms_norm, rope, rope_write_kv),
    *(swiglu, swiglu_packed, write_kv),
    *(linear_int4, linear_int8, linear_nf4, linear_quantized),
)
IN_TRITON = (linear_int4, linear_int8, linear_nf4, linear_quantized)


def using(impl: str | None = None) -> SimpleNamespace:
    """The package's ops, each bound to one implementation: `using(impl="triton").rms_norm(x, weight)`.

    Not written in every implementation are the linear layers, which are then left to choose, and `decode_layers`,
    which is then None: its ops can be called one by one.

    Args:
        impl: None, or a name that `backends()` lists.

    Returns:
        A namespace with the ops of `mistral_kernels`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: an implementation that cannot run on this machine, with the reason.
    """
    check_impl(impl)

    def bind(op: Callable) -> Callable:
        free = op is linear or (op in IN_TRITON and impl != "triton")
        chosen = None if free and impl not in WITHOUT_GPU else impl
        return functools.update_wrapper(functools.partial(op, impl=chosen), op)

    ops: dict[str, Callable | None] = {op.__name__: bind(op) for op in OPS}
    ops["decode_layers"] = bind(decode_layers) if impl in WITHOUT_GPU else None
    return SimpleNamespace(rope_table=rope_table, impl=impl, **ops)
