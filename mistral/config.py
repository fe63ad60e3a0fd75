"""The shape of a model, read from Mistral's params.json or Hugging Face's config.json.

Both formats leave out what their own readers assume; every such assumption is made here and nowhere else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import mistral_kernels


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Mistral-shaped decoder.

    Args:
        dim: N, the width of the residual stream.
        n_layers, n_heads, n_kv_heads: layers, query heads and key/value heads of each; n_heads a multiple of
            n_kv_heads.
        head_dim: D, even; `n_heads * head_dim` need not be `dim`.
        hidden_dim: F, the width of the feed-forward layer.
        vocab_size: V.
        norm_eps: of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        sliding_window: W, the keys that a query sees, itself included; None for all before it.
        rope_scaling: None, or what `mistral_kernels.rope_table` takes as `scaling`.
        max_positions: the context the model was made for.
        tie_embeddings: the output projection is the embedding.
        attention_bias: q, k and v have biases (Qwen2's layout; the output projection has none).

    Raises:
        ValueError: a value that cannot be, named with what it must be.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int | None = None
    rope_scaling: dict[str, Any] | None = None
    max_positions: int = 32_768
    tie_embeddings: bool = False
    attention_bias: bool = False

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            _check_count(name, getattr(self, name))
        _check_count("max_positions", self.max_positions)
        if self.sliding_window is not None:
            _check_count("sliding_window", self.sliding_window, " or None")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must be a multiple of n_kv_heads, {self.n_kv_heads}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be positive")
        # Tables of one position: a head_dim, theta or scaling that cannot be raises here and not at the first token.
        mistral_kernels.rope_table(self.head_dim, self.rope_theta, 1, self.rope_scaling)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> "ModelConfig":
        """Reads Mistral's own params.json.

        Where rope_theta is missing, it is what Mistral's first code took: 10,000 with a window (v0.1), else 1,000,000.

        Raises:
            ValueError: a missing or contradictory entry.
            NotImplementedError: an entry that this model does not know, named.
        """
        given = {name: value for name, value in params.items() if value not in (None, False, {}, [])}
        window = _one_window(given.pop("sliding_window", None), given.pop("_sliding_window", None))
        known = {name: given.pop(name) for name in _PARAMS if name in given}
        for name in _PARAMS_WITHOUT_EFFECT:
            given.pop(name, None)
        contexts = [given.pop(name) for name in ("max_position_embeddings", "max_seq_len") if name in given]
        if given:
            raise NotImplementedError(f"params.json has {_named(given)}, which this model does not know")
        _require(known, ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size"), "params.json")
        known.setdefault("n_kv_heads", known["n_heads"])
        known.setdefault("head_dim", known["dim"] // known["n_heads"])
        known.setdefault("rope_theta", 1_000_000.0 if window is None else 10_000.0)
        known["tie_embeddings"] = known.pop("tied_embeddings", False)
        known["max_positions"] = contexts[0] if contexts else 32_768
        return cls(sliding_window=window, **known)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face config.json of a Mistral, Llama or Qwen2 for causal language modelling.

        Missing entries take the defaults of the architecture's own class in transformers 5; rotary settings are
        read from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

        Raises:
            ValueError: a missing or contradictory entry.
            NotImplementedError: another architecture, or a feature that this model does not have, named.
        """
        kind = _architecture(config)
        entries = {**_HF_DEFAULTS, **_HF_ARCHITECTURES[kind], **config}
        _refuse_features(entries)
        _require(entries, _HF_NAMES.values(), "config.json")
        shape = {ours: entries[theirs] for ours, theirs in _HF_NAMES.items()}
        heads, kv_heads, head_dim = (entries[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        theta, scaling = _hf_rope(entries)
        return cls(
            **shape,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=shape["dim"] // heads if head_dim is None else head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=_hf_window(kind, entries),
            tie_embeddings=bool(entries["tie_word_embeddings"]),
            attention_bias=kind == "qwen2",
        )

    def with_window(self, window: int | str | None) -> "ModelConfig":
        """This config with another window: W, None for full causal attention, or "config" for its own."""
        if isinstance(window, str):
            if window != "config":
                raise ValueError(f"window is {window!r}; it must be 'config', None or an int of at least 1")
            return self
        return dataclasses.replace(self, sliding_window=window)

    def parameter_count(self) -> int:
        """The number of weights, tied ones counted once."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = self.dim * (2 * q + 2 * kv) + (q + 2 * kv) * self.attention_bias
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.dim


def _check_count(name: str, value: Any, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least 1{also}")


def _require(entries: Mapping[str, Any], names: Any, file: str) -> None:
    if missing := [name for name in names if entries.get(name) is None]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")


def _named(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in entries.items())


# ---- params.json ----

_PARAMS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
    *("norm_eps", "rope_theta", "tied_embeddings"),
)
_PARAMS_WITHOUT_EFFECT = ("model_type", "causal", "max_batch_size")


def _one_window(window: Any, alias: Any) -> int | None:
    """mistral-inference also writes `_sliding_window`, and a list that the layers cycle through."""
    if window is not None and alias is not None and window != alias:
        raise ValueError(f"params.json has sliding_window {window} but _sliding_window {alias}; they must agree")
    window = alias if window is None else window
    if isinstance(window, (list, tuple)):
        if len(set(window)) > 1:
            raise NotImplementedError(f"sliding_window is {list(window)}; one window for all layers is supported")
        window = window[0]
    return window


# ---- config.json ----

_HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
_HF_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32_000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    hidden_act="silu",
    sliding_window=None,
)
# What the classes of transformers 5 assume beyond that.
_HF_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": dict(
        intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096
    ),
    "llama": dict(intermediate_size=11_008, max_position_embeddings=2048),
    "qwen2": dict(
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=32,
        max_position_embeddings=32_768,
        sliding_window=4096,
        max_window_layers=28,
    ),
}


def _architecture(config: Mapping[str, Any]) -> str:
    classes = {"MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
    names = config.get("architectures") or []
    kind = classes.get(names[0]) if names else config.get("model_type")
    if kind not in _HF_ARCHITECTURES:
        found = f"architectures {names}" if names else f"model_type {config.get('model_type')!r}"
        raise NotImplementedError(f"config.json has {found}; supported are {', '.join(classes)}")
    return kind


def _refuse_features(entries: Mapping[str, Any]) -> None:
    refused = ("attention_bias", "mlp_bias", "quantization_config")
    found = {name: entries[name] for name in refused if entries.get(name)}
    if entries["hidden_act"] not in ("silu", "swish"):
        found["hidden_act"] = entries["hidden_act"]
    if entries.get("partial_rotary_factor") not in (None, 1):
        found["partial_rotary_factor"] = entries["partial_rotary_factor"]
    if found:
        raise NotImplementedError(f"config.json has {_named(found)}, which this model does not have")


def _hf_rope(entries: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and scaling: transformers 5 keeps both in rope_parameters, older ones in two entries."""
    rope = dict(entries.get("rope_parameters") or entries.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or entries.get("rope_theta") or 10_000.0
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise NotImplementedError("rope_parameters has partial_rotary_factor, which this model does not have")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise NotImplementedError(f"rope_parameters is {rope}; one setting for all layers is supported")
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind in ("yarn", "llama3") and rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = entries["max_position_embeddings"]
    return float(theta), rope


def _hf_window(kind: str, entries: Mapping[str, Any]) -> int | None:
    """The window of all layers; layers of two kinds raise, so that none is silently widened."""
    window = entries["sliding_window"]
    layers = entries.get("layer_types")
    if kind == "llama" and not layers:
        return None  # LlamaForCausalLM reads no sliding_window
    if kind == "qwen2":
        window = window if entries.get("use_sliding_window") else None
        full = entries["max_window_layers"] if window else entries["num_hidden_layers"]
        layers = layers or [
            "full_attention" if i < full else "sliding_attention" for i in range(entries["num_hidden_layers"])
        ]
    kinds = set(layers or ["full_attention" if window is None else "sliding_attention"])
    if kinds == {"full_attention"} and (window is None or kind == "qwen2"):
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return window
    raise NotImplementedError(
        f"config.json has layer_types {sorted(kinds)} and sliding_window {window};"
        " one window for all layers, or none, is supported"
    )


_MISTRAL_7B: dict[str, Any] = dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14_336)
PRESETS = {
    "mistral-7b-v0.1": ModelConfig(**_MISTRAL_7B, vocab_size=32_000, sliding_window=4096),
    "mistral-7b-v0.2": ModelConfig(**_MISTRAL_7B, vocab_size=32_000, rope_theta=1_000_000.0),
    "mistral-7b-v0.3": ModelConfig(**_MISTRAL_7B, vocab_size=32_768, rope_theta=1_000_000.0),
}
