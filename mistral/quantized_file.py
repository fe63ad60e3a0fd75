"""Folders of quantised models: quantized.safetensors, with the scheme in its metadata, and config.json.

Tensors have the model's own names, q and k in half-split order; of a quantised weight there are `NAME.codes`,
`NAME.scale` and, for asymmetric int4, `NAME.offset`. config.json is Hugging Face's with a `quantization_config` that no
other reader knows, so that none takes the codes for weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mistral_kernels import QuantizedWeight
from mistral_kernels.quant_linear.modules import PARTS
from mistral_kernels.quant_linear.weights import SCHEMES, groups_of

from .checkpoint import expected_shapes
from .config import ModelConfig
from .extras import need
from .model import Transformer
from .quantized import put
from .safetensors_file import KINDS, read_json

FILE = "quantized.safetensors"
METHOD = "mistral_kernels"


def is_quantized(path: str | Path) -> bool:
    """Whether it is a folder that `mistral.quantize` wrote."""
    return (Path(path) / FILE).is_file()


def part_shapes(how: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the codes, scales and offsets of a weight `[N, K]`; `how` as in the metadata."""
    (n, k), bytes = shape, how["scheme"] in ("int8", "w8a8")
    codes = ((n, k), torch.int8) if bytes else ((n, -(-k // 32) * 16), torch.uint8)
    per_group = ((n, groups_of(k, how["group"])), torch.float32)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"scale": per_group}
    return shapes | ({"offset": per_group} if how["asymmetric"] else {}) | {"codes": codes}


def read_quantized_config(folder: Path) -> ModelConfig:
    entries = read_json(folder / "config.json")
    method = (entries.pop("quantization_config", None) or {}).get("quant_method")
    if method != METHOD:
        raise ValueError(f"{folder / 'config.json'} has quantization_config.quant_method {method!r}, not {METHOD!r}")
    return ModelConfig.from_hf(entries)


def _schemes(path: Path, metadata: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """Of each quantised module its scheme, group and whether it has offsets."""
    try:
        found = json.loads((metadata or {})["quantization"])
        modules: dict[str, dict[str, Any]] = found["modules"]
        wrong = [
            n for n, how in modules.items() if how["scheme"] not in SCHEMES or how["group"] not in (0, 32, 64, 128)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no metadata that says how it is quantised: {error!r}") from error
    if wrong:
        raise ValueError(f"{path} has {wrong[0]} in {modules[wrong[0]]}, which this version does not know")
    return modules


def _expected(
    config: ModelConfig, modules: Mapping[str, dict[str, Any]]
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and, of codes and scales, the dtype of every tensor that a file has to hold."""
    whole = expected_shapes(config)
    needed = {name: (shape, None) for name, shape in whole.items() if name.removesuffix(".weight") not in modules}
    parts = {name: part_shapes(how, whole.get(f"{name}.weight", (0, 0))) for name, how in modules.items()}  # type: ignore[arg-type]
    return needed | {f"{name}.{part}": what for name, of in parts.items() for part, what in of.items()}


def _check_tensors(path: Path, handle: Any, needed: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
    have = set(handle.keys())
    wrong = [f"{n} is {'missing' if n in needed else 'unknown'}" for n in sorted(needed.keys() ^ have)]
    for name in sorted(needed.keys() & have):
        (shape, dtype), header = needed[name], handle.get_slice(name)
        found, kind = header.get_shape(), header.get_dtype()
        if tuple(found) != shape:
            wrong.append(f"{name} is {found}, needed {list(shape)}")
        if dtype is not None and kind != KINDS[dtype]:
            wrong.append(f"{name} is {kind}, needed {KINDS[dtype]}")
    if wrong:
        raise ValueError(f"the tensors in {path} do not fit its config: {', '.join(wrong[:10])}")


def load_quantized(
    path: str | Path,
    ops: Any,
    dtype: torch.dtype,
    window: int | str | None,
    device: torch.device | str,
    progress: bool,
) -> Transformer:
    """Loads what `mistral.quantize` wrote; arguments as `load_model`. `dtype` is of all that has no codes.

    Raises:
        ValueError: a broken file, or one whose tensors do not fit its config; names them.
    """
    folder = Path(path)
    safetensors, config = need("safetensors"), read_quantized_config(folder)
    try:
        handle = safetensors.safe_open(folder / FILE, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / FILE} is no whole safetensors file: {error}") from error
    modules = _schemes(folder / FILE, handle.metadata())
    needed = _expected(config, modules)
    _check_tensors(folder / FILE, handle, needed)
    with torch.device("meta"):
        model = Transformer(config.with_window(window), ops=ops)
    names = [n for n in expected_shapes(config) if n in needed] + list(modules)
    for name in need("tqdm").tqdm(names, desc="loading", disable=None if progress else True, leave=False):
        if name in modules:
            how = modules[name]
            parts = {p: handle.get_tensor(f"{name}.{p}").clone().to(device) for p in PARTS if f"{name}.{p}" in needed}
            inputs = expected_shapes(config)[f"{name}.weight"][1]
            weight = QuantizedWeight(
                how["scheme"], parts["codes"], parts["scale"], parts.get("offset"), how["group"], inputs
            )
            put(model, name, weight, dtype)
        else:
            module, _, leaf = name.rpartition(".")
            values = handle.get_tensor(name)
            copied = torch.empty(values.shape, dtype=dtype, device=device).copy_(values)
            setattr(model.get_submodule(module), leaf, nn.Parameter(copied, requires_grad=False))
    return model.to(device).eval()
