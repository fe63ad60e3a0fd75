"""LoRA adapters (Hu et al. 2021) on our model through peft: added, saved, loaded, merged, and given to other models.

Files are in peft's format, under our module names or Hugging Face's: both hold q and k in half-split rotary order.
Mistral's own format (lora.safetensors) has adjacent pairs, so the rows of B of q and k are permuted at the door.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mistral_kernels.quant_linear import QuantizedLinear

from .checkpoint import model_name, rotary_heads, stored_name, to_half_split, to_interleaved
from .config import ModelConfig
from .extras import need
from .model import Linear, Transformer
from .safetensors_file import Replacing, read_json, write_json

NAME = "default"  # peft's own name of the first adapter
FORMATS = ("ours", "hf", "mistral")
_NF4_BLOCK = 64
_PREFIX = "base_model.model."
_PEFT = ("adapter_model.safetensors", "adapter_config.json")
_MISTRAL = ("lora.safetensors", "params.json")


def add_adapters(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: list[str],
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Puts a new adapter on every projection named in `targets`; only they stay trainable.

    Args:
        model: ours, or any that peft takes; changed in place.
        rank: r; A is `[r, in]`, B `[out, r]` and zero at first.
        alpha: the adapter adds `alpha / r · B A x`.
        targets: names of the linear modules, such as "wq", or "q_proj" in a model of Hugging Face's.
        dropout: before A, while training.
        seed: of A.
        dtype: of A and B; None for that of the weights.

    Raises:
        ModuleNotFoundError: peft is not installed; says what to install.
        ValueError: no module has such a name.
    """
    peft = need("peft", "train")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets), bias="none"
    )
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    for parameter in model.parameters():
        if parameter.requires_grad and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of all that carry an adapter."""
    kind = need("peft.tuners.lora", "train").LoraLayer
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B under `MODULE.lora_A.weight` and `MODULE.lora_B.weight`; sharded where the model is."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[NAME].weight.detach()
        for name, layer in lora_layers(model)
        for part in ("lora_A", "lora_B")
    }


# ---- names and rows ----


def _renamed(name: str, convert: Any) -> str:
    """A name of an adapter's tensor, its module renamed."""
    module, part = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name).groups()  # type: ignore[union-attr]
    return f"{convert(module + '.weight').removesuffix('.weight')}.{part}.weight"


def _to_ours(name: str, format: str) -> str:
    if format != "hf":
        return name
    found = model_name(name, "hf")
    if found is None:
        raise ValueError(f"the adapter has {name.removesuffix('.weight')}, which the model does not have")
    return found


def _permuted(state: Mapping[str, torch.Tensor], config: ModelConfig, order: Any) -> dict[str, torch.Tensor]:
    """The rows of B of q and k in another order; A acts on the inputs and stays."""
    out = {}
    for name, tensor in state.items():
        heads = rotary_heads(name, config) if name.endswith("lora_B.weight") else None
        out[name] = tensor if heads is None else order(tensor, heads)
    return out


# ---- files ----


def save_adapter(
    state: Mapping[str, torch.Tensor],
    folder: str | Path,
    config: ModelConfig,
    rank: int,
    alpha: float,
    format: str = "ours",
    dropout: float = 0.0,
) -> None:
    """Writes an adapter: files under temporary names, renamed when all are whole.

    Args:
        state: what `adapter_state` returns, as whole tensors, under our names.
        folder: made if missing.
        config: of the model.
        rank, alpha, dropout: of the adapter.
        format: "ours" and "hf": peft's adapter_model.safetensors, with module names of our model or of Hugging Face's;
            "mistral": lora.safetensors, with the rows of q and k interleaved.

    Raises:
        ValueError: an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    library = need("safetensors.torch")
    if format == "mistral":
        state = _permuted(state, config, to_interleaved)
    elif format == "hf":
        state = {_renamed(name, lambda n: stored_name(n, "hf")): t for name, t in state.items()}
    prefix = "" if format == "mistral" else _PREFIX
    tensors = {prefix + name: t.to("cpu").contiguous().clone() for name, t in state.items()}
    settings: dict[str, Any] = dict(lora=dict(enable=True, rank=rank, scaling=alpha / rank))
    if format != "mistral":
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in state})
        made = need("peft", "train").LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", inference_mode=True
        )
        settings = json.loads(json.dumps(made.to_dict(), default=_plain))
    with Replacing(Path(folder)) as files:
        weights, about = _MISTRAL if format == "mistral" else _PEFT
        files.write(weights, library.save(tensors, metadata={"format": "pt"}))
        write_json(files, about, settings)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_adapter(folder: str | Path, config: ModelConfig) -> tuple[dict[str, torch.Tensor], int, float]:
    """An adapter of any of the three formats, under our names and in our order; its rank and alpha.

    Raises:
        ValueError: no adapter, a damaged one, or a kind that is not plain LoRA; says what was found.
    """
    folder = Path(folder)
    kind = next((files for files in (_PEFT, _MISTRAL) if all((folder / f).is_file() for f in files)), None)
    if kind is None:
        found = ", ".join(sorted(f.name for f in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} holds no adapter: found {found or 'nothing'}; needed is {' and '.join(_PEFT)}")
    try:
        tensors = need("safetensors.torch").load_file(folder / kind[0])
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{folder / kind[0]} is no whole safetensors file: {error}") from error
    about = read_json(folder / kind[1])
    if kind is _MISTRAL:
        lora = about.get("lora", {})
        if "rank" not in lora or "scaling" not in lora:
            raise ValueError(f"{folder / kind[1]} has no lora.rank and lora.scaling")
        return _permuted(tensors, config, to_half_split), lora["rank"], lora["scaling"] * lora["rank"]
    _refuse_variants(folder, about)
    state = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
    if odd := [name for name in state if not re.fullmatch(r".+\.lora_[AB]\.weight", name)]:
        raise ValueError(f"{folder / kind[0]} has {odd[0]}, which is no part of a plain LoRA adapter")
    format = "hf" if any(".self_attn." in name or ".mlp." in name for name in state) else "ours"
    return (
        {_renamed(name, lambda n: _to_ours(n, format)): t for name, t in state.items()},
        about["r"],
        about["lora_alpha"],
    )


def _refuse_variants(folder: Path, about: Mapping[str, Any]) -> None:
    features = ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
    used = [name for name in features if about.get(name)]
    if about.get("peft_type") != "LORA" or used or about.get("bias", "none") != "none":
        what = ", ".join(used) or f"peft_type {about.get('peft_type')}, bias {about.get('bias')}"
        raise ValueError(f"{folder} has {what}; plain LoRA is supported, load others with peft itself")


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Puts a saved adapter on a model, in place, of any format and without a copy of the weights.

    Raises:
        ValueError: as `read_adapter`; tensors that do not fit the model.
    """
    state, rank, alpha = read_adapter(folder, model.config)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in state})
    add_adapters(model, rank, alpha, targets, dtype=None)
    have = adapter_state(model)
    if wrong := sorted(have.keys() ^ state.keys()):
        raise ValueError(f"the adapter in {folder} does not fit the model: {wrong[0]} is in one of the two only")
    for name, tensor in have.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{folder}: {name} is {list(state[name].shape)}, the model needs {list(tensor.shape)}")
        tensor.copy_(state[name])
    model.requires_grad_(False)
    return model.eval()


# ---- merging ----


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """W + alpha/r · B A in float32; a W of codes is taken as it acts, dequantised."""
    base = layer.get_base_layer()
    weight = base.quantized.dequantize() if isinstance(base, QuantizedLinear) else base.weight
    if hasattr(weight, "quant_state"):
        weight = need("bitsandbytes.functional", "train").dequantize_4bit(weight.data, weight.quant_state)
    b, a = (getattr(layer, part)[NAME].weight for part in ("lora_B", "lora_A"))
    return weight.float() + layer.scaling[NAME] * (b.float() @ a.float())


def merge_adapters(model: Transformer) -> Transformer:
    """Adds the adapters to the weights, in place, and takes them off: plain linear modules in the model's dtype."""
    for name, layer in list(lora_layers(model)):
        base = layer.get_base_layer()
        with torch.device("meta"):
            linear = Linear(base.in_features, base.out_features, model.ops, base.bias is not None)
        linear.weight = nn.Parameter(merged_weight(layer).to(model.dtype), requires_grad=False)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def quantize_nf4(model: nn.Module, targets: list[str], dtype: torch.dtype) -> nn.Module:
    """Stores the named linear modules in NF4, in place (Dettmers et al. 2023): blocks of 64, scales in 8 bits too.

    Args:
        model: with its weights loaded; on a CPU they are quantised there.
        targets: names of the modules.
        dtype: that they are computed in.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed; says what to install.
        ValueError: a module whose inputs are no multiple of 64.
    """
    bnb = need("bitsandbytes", "train")
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf not in targets or type(module) not in (nn.Linear, Linear):
            continue
        if module.in_features % _NF4_BLOCK:
            raise ValueError(
                f"{name} has {module.in_features} inputs; NF4 needs a multiple of {_NF4_BLOCK}: bitsandbytes reads"
                " others wrongly on a CPU; leave it out of the targets"
            )
        four = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        four.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=four
        )
        if module.bias is not None:
            four.bias = nn.Parameter(module.bias.data, requires_grad=False)
        four.to(module.weight.device)  # this quantises
        # Else evaluation on a CPU with AVX512-BF16 packs the weights anew, in place: merging would read them wrongly.
        four.support_avx512bf16_for_cpu = False
        setattr(model.get_submodule(parent), leaf, four)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks the model for it
    return model
