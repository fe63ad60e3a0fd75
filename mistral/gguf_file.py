"""GGUF files of Llama-shaped models: their metadata as a ModelConfig, their tensors dequantised when read."""

from pathlib import Path
from typing import Any

import torch

import mistral_kernels

from .checkpoint import Checkpoint, Stored, make_checkpoint
from .config import ModelConfig
from .extras import need

_UNQUANTISED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_AS_IT_IS, _BLOCK = ("Q8_0", "Q4_0", "Q4_1"), 32
_WITHOUT_EFFECT = ("tensor_data_layout", "rope.scaling.finetuned", "vocab_size")
# llama.cpp's own defaults, so that a key which only repeats them is no feature.
_ONLY = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}


def read_gguf(path: Path) -> Any:
    """A GGUFReader of a whole, single file.

    Raises:
        ValueError: a file that is cut short, or is no GGUF.
        NotImplementedError: one of several parts.
    """
    gguf = need("gguf")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is no whole GGUF file, it may be cut short: {error}") from error
    if (parts := metadata(reader).get("split.count", 1)) > 1:
        raise NotImplementedError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge")
    return reader


def metadata(reader: Any) -> dict[str, Any]:
    """Every key with its value, long arrays too."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file; quantised tensors are dequantised to float32 when read.

    Raises:
        ValueError: a broken file, or metadata that is missing.
        NotImplementedError: an architecture or a feature that the model does not have, named.
    """
    reader = read_gguf(path)
    tensors = {tensor.name: _stored(tensor) for tensor in reader.tensors}
    config = _config(path, metadata(reader), tensors)
    return make_checkpoint(path, "gguf", config, tensors.values())


def _stored(tensor: Any) -> Stored:
    quants = need("gguf.quants")
    kind = tensor.tensor_type.name
    known = kind in _UNQUANTISED or tensor.tensor_type in quants._type_traits
    dtype = _UNQUANTISED.get(kind, torch.float32) if known else None
    shape = tuple(int(n) for n in reversed(tensor.shape))

    def read() -> torch.Tensor:
        # The file is mapped read-only: a plain array is copied, a quantised or bfloat16 one is new.
        plain = kind in ("F32", "F16", "F64")
        values = tensor.data.copy() if plain else quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values).view(shape).to(dtype)

    codes = (lambda: _codes(tensor.data, kind, shape)) if kind in _AS_IT_IS and len(shape) == 2 else None
    return Stored(tensor.name, shape, dtype, read, kind, codes)


def _codes(data: Any, kind: str, shape: tuple[int, ...]) -> mistral_kernels.QuantizedWeight:
    """The blocks of 32 elements with their scales, in float16, as codes of whole rows and scales in float32."""
    n, k = shape
    blocks = torch.from_numpy(data.copy()).view(n, k // _BLOCK, -1)
    halves = 2 if kind == "Q4_1" else 1

    def float_at(i: int) -> torch.Tensor:
        return blocks[..., 2 * i : 2 * i + 2].contiguous().view(torch.float16)[..., 0].float()

    scale, codes = float_at(0), blocks[..., 2 * halves :].reshape(n, -1)
    if kind == "Q8_0":
        return mistral_kernels.QuantizedWeight("int8", codes.view(torch.int8), scale, None, _BLOCK, k)
    offset = float_at(1) + 8 * scale if kind == "Q4_1" else None  # its code is from 0 to 15, ours about 8
    return mistral_kernels.QuantizedWeight("int4", codes, scale, offset, _BLOCK, k)


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: metadata has 1e-5 as 9.99999975e-06."""
    return float(str(need("numpy").float32(value)))


def _config(path: Path, values: dict[str, Any], tensors: dict[str, Stored]) -> ModelConfig:
    if (kind := values.get("general.architecture")) != "llama":
        raise NotImplementedError(f"{path} has general.architecture {kind!r}; supported is 'llama', Mistral's too")
    given = {name.removeprefix("llama."): v for name, v in values.items() if name.startswith("llama.")}
    needed = "block_count embedding_length feed_forward_length attention.head_count attention.layer_norm_rms_epsilon"
    if missing := [f"llama.{name}" for name in needed.split() if name not in given]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    take = given.pop
    dim, heads = take("embedding_length"), take("attention.head_count")
    rotary, window = take("rope.dimension_count", None), take("attention.sliding_window", None)
    head_dim = take("attention.key_length", None) or rotary or dim // heads
    theta = _decimal(take("rope.freq_base", 10_000.0))
    context = take("context_length", 32_768)
    shape: dict[str, Any] = dict(
        dim=dim,
        n_layers=take("block_count"),
        n_heads=heads,
        n_kv_heads=take("attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden_dim=take("feed_forward_length"),
        norm_eps=_decimal(take("attention.layer_norm_rms_epsilon")),
        sliding_window=window or None,
    )
    if take("attention.value_length", head_dim) != head_dim or rotary not in (None, head_dim):
        raise NotImplementedError(f"{path} has keys, values and rotary dimensions of different sizes")
    scaling = _scaling(path, given, context) or _llama3_scaling(path, tensors, head_dim, theta, context)
    _refuse_rest(path, given)
    embedding = tensors.get("token_embd.weight")
    return ModelConfig(
        **shape,
        vocab_size=embedding.shape[0] if embedding else values.get("llama.vocab_size", 0),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=context,
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
    )


def _refuse_rest(path: Path, given: dict[str, Any]) -> None:
    rest = {n: v for n, v in given.items() if n not in _WITHOUT_EFFECT and (n not in _ONLY or v != _ONLY[n])}
    if rest:
        named = ", ".join(f"llama.{name}={str(value)[:40]}" for name, value in rest.items())
        raise NotImplementedError(f"{path} has {named}, which this model does not know")


def _scaling(path: Path, given: dict[str, Any], context: int) -> dict[str, Any] | None:
    kind = given.pop("rope.scaling.type", "linear")
    factor = given.pop("rope.scaling.factor", None) or given.pop("rope.scale_linear", None)
    original = given.pop("rope.scaling.original_context_length", None)
    betas = {name: given.pop(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    if kind == "none" or not factor:
        return None
    if kind == "linear":
        return dict(rope_type="linear", factor=_decimal(factor))
    if kind == "yarn":
        known = {name: _decimal(value) for name, value in betas.items() if value is not None}
        return dict(
            rope_type="yarn",
            factor=_decimal(factor),
            original_max_position_embeddings=original or context,
            **known,
        )
    raise NotImplementedError(f"{path} has llama.rope.scaling.type {kind!r}; supported are none, linear and yarn")


def _llama3_scaling(
    path: Path, tensors: dict[str, Stored], head_dim: int, theta: float, context: int
) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which GGUF keeps only as the resulting divisor of each frequency in rope_freqs.weight.

    Its largest divisor is the factor; the other settings are taken to be Llama 3.1's and checked against the tensor.
    """
    if "rope_freqs.weight" not in tensors:
        return None
    divisors = tensors["rope_freqs.weight"].read().double()
    if torch.equal(divisors, torch.ones_like(divisors)):
        return None
    scaling = dict(
        rope_type="llama3",
        factor=float(divisors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )

    def frequencies(scaling: dict[str, Any] | None) -> torch.Tensor:
        cos, sin = mistral_kernels.rope_table(head_dim, theta, 2, scaling, dtype=torch.float64)
        return torch.atan2(sin[1], cos[1])

    computed = frequencies(None) / frequencies(scaling)
    if divisors.shape != computed.shape or not torch.allclose(divisors, computed, rtol=1e-4, atol=0):
        raise NotImplementedError(
            f"{path} has rope_freqs.weight, divisors of the rotary frequencies, and they are not Llama 3.1's scaling;"
            " use the checkpoint in Hugging Face's format, whose config.json states the scaling"
        )
    return scaling
