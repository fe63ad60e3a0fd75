"""What a checkpoint is, whatever file it lies in: a config and lazily read tensors in the model's names and layout.

Names and the order of rotary pairs are translated here, when a tensor is read or written, and nowhere else.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mistral_kernels import QuantizedWeight

from .config import ModelConfig

_SHOWN = 10  # tensors named in an error before it is cut short

# Ours, which are Mistral's; Hugging Face's; GGUF's.
_OUTER = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
)
_INNER = (
    ("attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "self_attn.o_proj", "attn_output"),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
)
_LAYERS = {"mistral": "layers", "hf": "model.layers", "gguf": "blk"}
_COLUMN = {"mistral": 0, "hf": 1, "gguf": 2}
# Tables of old checkpoints that are computed from the config.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|rope_freqs\.weight)$")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor, known by its header.

    Args:
        name: as it is stored.
        shape: of the tensor.
        dtype: of what `read` returns; None for one that is not read.
        read: returns the tensor.
        kind: the stored type, as its format calls it.
        codes: returns the weight as it is stored, where that is a scheme that runs as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], torch.Tensor]
    kind: str = ""
    codes: Callable[[], QuantizedWeight] | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * (0 if self.dtype is None else self.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Args:
        path: the folder or file.
        format: "mistral", "hf" or "gguf".
        config: as the checkpoint states it.
        tensors: under the model's names; `read` returns the model's layout.
        unknown: under their stored names, those that the model has no place for.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: dict[str, Stored]
    unknown: dict[str, Stored]

    def check(self) -> None:
        """Compares every header with what the config needs.

        Raises:
            ValueError: names all missing, unknown, misshapen and unreadable tensors at once.
        """
        needed = expected_shapes(self.config)
        have = dict(self.tensors)
        if self.config.tie_embeddings and have.get("output.weight", _NONE).shape == needed["tok_embeddings.weight"]:
            del have["output.weight"]  # a copy of the embedding, which `check_tied` looks at
        both = [(have[name], shape) for name, shape in needed.items() if name in have]
        faults = {
            "missing": [f"{stored_name(n, self.format)} {list(s)}" for n, s in needed.items() if n not in have],
            "unknown": [f"{t.name} {list(t.shape)}" for t in self.unknown.values()]
            + [f"{t.name} {list(t.shape)}" for name, t in have.items() if name not in needed],
            "misshapen": [f"{t.name} is {list(t.shape)}, needed {list(s)}" for t, s in both if t.shape != s],
            "of a type that is not read": [f"{t.name} is {t.kind}" for t, _ in both if t.dtype is None],
        }
        lines = [f"  {what} ({len(names)}): {_some(names)}" for what, names in faults.items() if names]
        if lines:
            raise ValueError("\n".join([f"the tensors in {self.path} do not fit its config:", *lines]))

    def check_tied(self) -> None:
        """Compares an output projection that is stored beside a tied embedding with it; reads both.

        Raises:
            ValueError: they differ.
        """
        if not self.config.tie_embeddings or "output.weight" not in self.tensors:
            return
        output, embedding = self.tensors["output.weight"], self.tensors["tok_embeddings.weight"]
        if not torch.equal(output.read(), embedding.read()):
            raise ValueError(
                f"the config in {self.path} ties the output projection to the embedding, but {output.name} differs"
                f" from {embedding.name}"
            )


_NONE = Stored("", (), None, lambda: torch.empty(0))


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def make_checkpoint(path: Path, format: str, config: ModelConfig, tensors: Iterable[Stored]) -> Checkpoint:
    """Sorts stored tensors under the model's names, with q and k in half-split order when read."""
    known: dict[str, Stored] = {}
    unknown: dict[str, Stored] = {}
    for tensor in tensors:
        if _COMPUTED.search(tensor.name):
            continue
        name = model_name(tensor.name, format)
        if name is None:
            unknown[tensor.name] = tensor
            continue
        heads = rotary_heads(name, config)
        known[name] = tensor if heads is None or format == "hf" else relaid(tensor, to_half_split, heads)
    return Checkpoint(path, format, config, known, unknown)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `Transformer(config)`."""
    n, f, q, kv = config.dim, config.hidden_dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention.wq.weight": (q, n),
        "attention.wk.weight": (kv, n),
        "attention.wv.weight": (kv, n),
        "attention.wo.weight": (n, q),
        "feed_forward.w1.weight": (f, n),
        "feed_forward.w2.weight": (n, f),
        "feed_forward.w3.weight": (f, n),
        "attention_norm.weight": (n,),
        "ffn_norm.weight": (n,),
    }
    if config.attention_bias:
        layer |= {"attention.wq.bias": (q,), "attention.wk.bias": (kv,), "attention.wv.bias": (kv,)}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, n), "norm.weight": (n,)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()}
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, n)
    return shapes


# ---- names ----


def model_name(name: str, format: str) -> str | None:
    """The model's name of a stored tensor, or None for one that it does not have."""
    column = _COLUMN[format]
    layer = re.fullmatch(rf"{re.escape(_LAYERS[format])}\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        index, part, kind = layer.groups()
        return next((f"layers.{index}.{row[0]}.{kind}" for row in _INNER if row[column] == part), None)
    part, _, kind = name.rpartition(".")
    return next((f"{row[0]}.weight" for row in _OUTER if row[column] == part and kind == "weight"), None)


def stored_name(name: str, format: str) -> str:
    """The name that a parameter of the model has in a format."""
    column = _COLUMN[format]
    part, _, kind = name.rpartition(".")
    if part.startswith("layers."):
        _, index, inner = part.split(".", 2)
        found = next(row[column] for row in _INNER if row[0] == inner)
        return f"{_LAYERS[format]}.{index}.{found}.{kind}"
    return next(row[column] for row in _OUTER if row[0] == part) + f".{kind}"


def to_hf_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the model under Hugging Face's names; the layout is the same."""
    return {stored_name(name, "hf"): tensor for name, tensor in state.items()}


# ---- the order of rotary pairs ----


def rotary_heads(name: str, config: ModelConfig) -> int | None:
    """The heads of a weight or bias whose rows are rotated; None for any other."""
    if ".attention.wq." in name:
        return config.n_heads
    return config.n_kv_heads if ".attention.wk." in name else None


def _reorder(w: torch.Tensor, heads: int, split: Callable[[int], tuple[int, int]]) -> torch.Tensor:
    rows = w.shape[0] if w.dim() else 0
    if heads < 1 or rows == 0 or rows % (2 * heads):
        raise ValueError(f"w is {list(w.shape)}; its rows must be a multiple of 2 x {heads} heads")
    return w.unflatten(0, (heads, *split(rows // heads // 2))).transpose(1, 2).reshape(w.shape)


def to_half_split(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from adjacent rotary pairs (Mistral's files, GGUF) to pairs half a head apart (Hugging Face, the model).

    Row `2i + j` of each head becomes row `j·D/2 + i`. A q weight has n_heads, a k weight n_kv_heads.

    Args:
        w: weight `[heads · D, N]` or bias `[heads · D]`.
        heads: how many heads the rows are; D follows from the shape.

    Raises:
        ValueError: rows that are not that many heads of an even D.
    """
    return _reorder(w, heads, lambda half: (half, 2))


def to_interleaved(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_half_split`."""
    return _reorder(w, heads, lambda half: (2, half))


def relaid(tensor: Stored, order: Callable[[torch.Tensor, int], torch.Tensor], heads: int) -> Stored:
    """The same tensor, its rows put in order when it is read."""
    stored = tensor.codes

    def codes() -> QuantizedWeight:
        weight = stored()  # type: ignore[misc]
        parts = {name: getattr(weight, name) for name in ("codes", "scale", "offset")}
        return dataclasses.replace(weight, **{n: None if t is None else order(t, heads) for n, t in parts.items()})

    return dataclasses.replace(tensor, read=lambda: order(tensor.read(), heads), codes=codes if stored else None)
