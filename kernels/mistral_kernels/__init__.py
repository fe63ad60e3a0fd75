"""Fused kernels for Mistral-style transformers, as torch ops. Every op takes `impl=` and defaults to the fastest."""

from . import reference as reference
from ._dispatch import backends
from ._outputs import output_pool
from ._using import using
from .attention import attention
from .decode import decode_layers
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .patch import patch, register_attention, unpatch
from .quant_linear import (
    QuantizedWeight,
    linear_int4,
    linear_int8,
    linear_nf4,
    linear_quantized,
    quantize_,
    quantize_weight,
)
from .ring_cache import attention_cached, rope_write_kv, write_kv
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_table
from .swiglu import swiglu, swiglu_packed

__version__ = "0.1.0"
__all__ = [
    "QuantizedWeight",
    "add_rms_norm",
    "attention",
    "attention_cached",
    "backends",
    "decode_layers",
    "linear",
    "linear_cross_entropy",
    "linear_int4",
    "linear_int8",
    "linear_nf4",
    "linear_quantized",
    "output_pool",
    "patch",
    "quantize_",
    "quantize_weight",
    "reference",
    "register_attention",
    "rms_norm",
    "rope",
    "rope_table",
    "rope_write_kv",
    "swiglu",
    "swiglu_packed",
    "unpatch",
    "using",
    "write_kv",
]
