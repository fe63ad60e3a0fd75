"""The ops of `mistral_kernels` in eager PyTorch, under the same names: the specification, and a model's plain ops."""

from ._using import using

_ops = using(impl="reference")
add_rms_norm = _ops.add_rms_norm
attention = _ops.attention
attention_cached = _ops.attention_cached
decode_layers = _ops.decode_layers
linear = _ops.linear
linear_cross_entropy = _ops.linear_cross_entropy
linear_int4 = _ops.linear_int4
linear_int8 = _ops.linear_int8
linear_nf4 = _ops.linear_nf4
linear_quantized = _ops.linear_quantized
rms_norm = _ops.rms_norm
rope = _ops.rope
rope_table = _ops.rope_table
rope_write_kv = _ops.rope_write_kv
swiglu = _ops.swiglu
swiglu_packed = _ops.swiglu_packed
write_kv = _ops.write_kv
