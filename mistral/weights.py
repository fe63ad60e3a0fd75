"""Loads a model from Mistral's, Hugging Face's or GGUF files, and saves it in the first two formats.

Nothing is unpickled, nothing is downloaded. Headers are compared with the config before any weight is read, and
weights are read one at a time into a model that was built without memory: the peak is one copy of the model.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mistral_kernels

from .checkpoint import (
    Checkpoint,
    Stored,
    expected_shapes,
    make_checkpoint,
    relaid,
    rotary_heads,
    stored_name,
    to_half_split,
    to_hf_names,
    to_interleaved,
)
from .config import ModelConfig
from .extras import need
from .gguf_file import open_gguf
from .model import Transformer
from .quantized import put, quantized_names
from .quantized_file import is_quantized, load_quantized
from .safetensors_file import (
    Replacing,
    folder_format,
    open_folder,
    read_folder_config,
    refuse_pickle,
    split_shards,
    write_json,
    write_safetensors,
)

__all__ = [
    "hf_config",
    "load_model",
    "load_state",
    "open_checkpoint",
    "read_config",
    "save_checkpoint",
    "save_hf",
    "save_mistral",
    "to_half_split",
    "to_hf_names",
    "to_interleaved",
]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
        path: a folder with consolidated.safetensors and params.json (Mistral's), or with model.safetensors and
            config.json (Hugging Face's, taken where a folder has both), each also in shards; or a .gguf file.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no checkpoint, or a broken one; says what was found and what is needed. Pickles are refused.
        NotImplementedError: a feature that the model does not have, named.
    """
    path = Path(path)
    if is_quantized(path):
        raise ValueError(f"{path} was written by mistral.quantize; load_model runs it, and nothing reads its weights")
    return open_gguf(path) if _is_gguf(path) else open_folder(path)


def read_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint; arguments and errors as `open_checkpoint`."""
    path = Path(path)
    if _is_gguf(path):
        return open_gguf(path).config
    return read_folder_config(path, folder_format(path))


def _is_gguf(path: Path) -> bool:
    """Whether it is a GGUF file; False for a folder."""
    if path.is_dir():
        return False
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; models are read from this machine and never downloaded")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return True
    refuse_pickle([path])
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is one file of a checkpoint; give its folder, which has the config too")
    raise ValueError(f"{path} is neither a folder nor a GGUF file")


def load_state(
    path: str | Path, dtype: torch.dtype | None = None, progress: bool = True, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights one by one, under the model's names and in its layout; q and k half-split.

    Args:
        path: as for `open_checkpoint`.
        dtype: what they are converted to; None keeps the stored type, float32 for quantised ones.
        progress: shows a bar on standard error.
        device: where they are put.

    Returns:
        An iterator of (name, tensor); each tensor is new memory and independent of the file.

    Raises:
        ValueError: before the first tensor, one error that names all missing, unknown and misshapen tensors.
        As `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    return _read(checkpoint, dtype, progress, device)


def _read(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    progress: bool,
    device: torch.device | str,
    without: Sequence[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint.check_tied()
    wanted = (name for name in expected_shapes(checkpoint.config) if name.removesuffix(".weight") not in without)
    stored = [(name, checkpoint.tensors[name]) for name in wanted]
    with bar("loading", [tensor for _, tensor in stored], progress) as shown:
        for name, tensor in stored:
            values = tensor.read()
            # A copy, because what safetensors returns may be a view of the mapped file.
            yield name, torch.empty(values.shape, dtype=dtype or values.dtype, device=device).copy_(values)
            shown.update(tensor.bytes)


def bar(label: str, tensors: Sequence[Stored], progress: bool) -> Any:
    """A progress bar in bytes."""
    total = sum(tensor.bytes for tensor in tensors)
    return need("tqdm").tqdm(
        total=total, unit="B", unit_scale=True, desc=label, disable=None if progress else True, leave=False
    )


def load_model(
    path: str | Path,
    *,
    ops: Any = mistral_kernels,
    dtype: torch.dtype = torch.bfloat16,
    window: int | str | None = "config",
    device: torch.device | str = "cpu",
    progress: bool = True,
    keep_codes: bool = False,
) -> Transformer:
    """Loads a model; one that `mistral.quantize` wrote runs on its codes.

    Args:
        path: as for `open_checkpoint`.
        ops: `mistral_kernels`, `mistral_kernels.reference` or `mistral_kernels.using(impl=...)`.
        dtype: of the weights in memory.
        window: "config" keeps the checkpoint's sliding window, None removes it, a number W sets it.
        device: where the weights are put.
        progress: shows a bar on standard error.
        keep_codes: runs a GGUF file's projections of type Q8_0, Q4_0 and Q4_1, and a tied embedding, as they are,
            instead of dequantising them.

    Raises:
        As `load_state`.
    """
    if is_quantized(path):
        return load_quantized(path, ops, dtype, window, device, progress)
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    with torch.device("meta"):
        model = Transformer(checkpoint.config.with_window(window), ops=ops)
    kept = _codes_to_keep(checkpoint) if keep_codes else []
    for name, tensor in _read(checkpoint, dtype, progress, device, kept):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    for module in kept:
        put(model, module, checkpoint.tensors[f"{module}.weight"].codes(), dtype)  # type: ignore[misc]
    return model.to(device).eval()


def _codes_to_keep(checkpoint: Checkpoint) -> list[str]:
    names = quantized_names(checkpoint.config)
    return [name for name in names if checkpoint.tensors[f"{name}.weight"].codes is not None]


# ---- saving ----


def save_mistral(model: Transformer, folder: str | Path, progress: bool = True) -> None:
    """Writes consolidated.safetensors, q and k interleaved, and params.json.

    Files are written under temporary names and renamed when all are whole; an error leaves what was there.

    Raises:
        ValueError: a config that params.json cannot state.
    """
    save_checkpoint(_of_model(model), folder, "mistral", progress=progress)


def save_hf(
    model: Transformer, folder: str | Path, max_shard_bytes: int = 5_000_000_000, progress: bool = True
) -> None:
    """Writes model.safetensors and config.json as a MistralForCausalLM, or Qwen2ForCausalLM where there are biases.

    Files are written under temporary names and renamed when all are whole; an error leaves what was there.

    Args:
        model: what to save.
        folder: made if missing.
        max_shard_bytes: a larger model is split into files of at most this size, with an index.
        progress: shows a bar on standard error.

    Raises:
        ValueError: the folder has other files of weights, which a reader could take for these.
    """
    save_checkpoint(_of_model(model), folder, "hf", max_shard_bytes=max_shard_bytes, progress=progress)


def _of_model(model: Transformer) -> Checkpoint:
    def stored(name: str, tensor: torch.Tensor) -> Stored:
        return Stored(stored_name(name, "hf"), tuple(tensor.shape), tensor.dtype, lambda: tensor)

    tensors = [stored(name, tensor.detach()) for name, tensor in model.state_dict().items()]
    return make_checkpoint(Path("the model"), "hf", model.config, tensors)


def save_checkpoint(
    checkpoint: Checkpoint,
    folder: str | Path,
    format: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Writes a checkpoint in another format, with one tensor in memory at a time.

    Args:
        checkpoint: what `open_checkpoint` returned.
        folder: made if missing.
        format: "mistral" or "hf".
        dtype: what all tensors are converted to; None keeps each one's.
        max_shard_bytes: of each file, for "hf".
        progress: shows a bar on standard error.

    Raises:
        ValueError: as `save_mistral` and `save_hf`; tensors that do not fit the config.
    """
    checkpoint.check()
    checkpoint.check_tied()
    config, folder = checkpoint.config, Path(folder)
    tensors = [_outgoing(name, checkpoint.tensors[name], config, format, dtype) for name in expected_shapes(config)]
    if format == "mistral":
        shards = {"consolidated.safetensors": tensors}
        settings = {"params.json": mistral_params(config)}
    else:
        shards = _hf_shards(tensors, max_shard_bytes)
        kinds = {tensor.dtype for tensor in tensors}
        settings = {"config.json": hf_config(config, kinds.pop() if len(kinds) == 1 else None)}
        if len(shards) > 1:
            where = {tensor.name: file for file, group in shards.items() for tensor in group}
            size = sum(tensor.bytes for tensor in tensors)
            settings = {
                "model.safetensors.index.json": dict(metadata=dict(total_size=size), weight_map=where)
            } | settings
    _refuse_leftovers(folder, format, {*shards, *settings})
    with Replacing(folder) as files, bar("saving", tensors, progress) as shown:
        for file, group in shards.items():
            write_safetensors(files, file, group, shown)
        for file, value in settings.items():
            write_json(files, file, value)


def _outgoing(name: str, tensor: Stored, config: ModelConfig, format: str, dtype: torch.dtype | None) -> Stored:
    heads = rotary_heads(name, config)
    if heads is not None and format == "mistral":
        tensor = relaid(tensor, to_interleaved, heads)
    return dataclasses.replace(tensor, name=stored_name(name, format), dtype=dtype or tensor.dtype)


def _hf_shards(tensors: list[Stored], max_bytes: int) -> dict[str, list[Stored]]:
    groups = split_shards(tensors, max_bytes)
    if len(groups) == 1:
        return {"model.safetensors": tensors}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _refuse_leftovers(folder: Path, format: str, written: set[str]) -> None:
    pattern = r"(quantized|model(-\d+-of-\d+)?)\.safetensors(\.index\.json)?"
    if format == "mistral":
        pattern = r"(quantized|consolidated(-\d+-of-\d+)?)\.safetensors"
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if left := sorted(name for name in names if re.fullmatch(pattern, name) and name not in written):
        raise ValueError(
            f"{folder} already has {', '.join(left)}, which would be mistaken for what is saved; remove it"
        )


def mistral_params(config: ModelConfig) -> dict[str, Any]:
    """The config as params.json; entries at their default are left out, because mistral-inference refuses new ones.

    Raises:
        ValueError: a setting that params.json has no entry for.
    """
    unsaid = [name for name in ("rope_scaling", "attention_bias") if getattr(config, name)]
    if unsaid:
        raise ValueError(f"params.json has no entry for {' and '.join(unsaid)}; Hugging Face's format has")
    names = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    params = {name: getattr(config, name) for name in (*names, "rope_theta")}
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.max_positions != 32_768:
        params["max_position_embeddings"] = config.max_positions
    return params | ({"tied_embeddings": True} if config.tie_embeddings else {})


def hf_config(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The config as Hugging Face's config.json of a MistralForCausalLM, or a Qwen2ForCausalLM where there are biases.

    Rotary settings are written as transformers 5 reads them, and as 4 does.
    """
    window, kind = config.sliding_window, "qwen2" if config.attention_bias else "mistral"
    entries: dict[str, Any] = dict(
        architectures=["Qwen2ForCausalLM" if config.attention_bias else "MistralForCausalLM"],
        model_type=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        hidden_act="silu",
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        sliding_window=window,
        tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_theta,
        rope_parameters={"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
    )
    if config.rope_scaling is not None:
        entries["rope_scaling"] = entries["rope_parameters"]
    if kind == "qwen2":
        entries |= dict(use_sliding_window=window is not None, max_window_layers=0 if window else config.n_layers)
    if dtype is not None:
        entries["torch_dtype"] = str(dtype).removeprefix("torch.")
    return entries
