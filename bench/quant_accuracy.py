"""What quantised weights and int8 keys and values cost in accuracy: on a text, and layer by layer.

Every variant is compared with the same checkpoint in float32, and runs in bfloat16, which has a cost of its own; int8
once more in float32 shows the codes' alone. Weights are quantised from float32.
"""

import copy
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mistral.calibrate import calibrate_model
from mistral.model import Linear, Transformer
from mistral.quantized import LINEARS, quantize_model
from mistral.weights import load_model
from mistral_kernels.quant_linear import Quantized

Logits = Callable[[torch.Tensor], torch.Tensor]
# Scheme, group, offsets.
SCHEMES: dict[str, tuple[str, int | None, bool]] = {
    "int8": ("int8", None, False),
    "int8 g32": ("int8", 32, False),
    "w8a8": ("w8a8", None, False),
    "int4 g128": ("int4", 128, False),
    "int4 g64": ("int4", 64, False),
    "int4 g32": ("int4", 32, False),
    "int4 g32, offsets": ("int4", 32, True),
    "nf4 g64": ("nf4", 64, False),
}
# Of those, the ones that are calibrated on a text too.
CALIBRATED = ("int8", "int8 g32", "int4 g128", "int4 g32")
# And the ones that also run in float32.
EXACT = ("int8", "int8 g32")
KV_CHUNK = 64


def variants(
    whole: Transformer,
    files: dict[str, Path],
    schemes: Collection[str] | None = None,
    windows: torch.Tensor | None = None,
) -> dict[str, Transformer]:
    """A float32 model in bfloat16, in every scheme or those named, and GGUF files of it on their own codes.

    With windows `[B, S]` of a text, some schemes are there once more, calibrated on it.
    """
    models = {"bf16": copy.deepcopy(whole).to(torch.bfloat16)}
    for name, how in tqdm(SCHEMES.items(), desc="quantising", leave=False, disable=None):
        if schemes is not None and name not in schemes:
            continue
        made = {name: quantize_model(copy.deepcopy(whole), *how)}
        if windows is not None and name in CALIBRATED:
            scheme, group, offsets = how
            calibrated = calibrate_model(copy.deepcopy(whole), windows, scheme, group, offsets, progress=False)
            made[f"{name}, calibrated"] = calibrated
        if name in EXACT:
            models |= {f"{label}, x in float32": copy.deepcopy(model) for label, model in made.items()}
        models |= {label: model.to(torch.bfloat16) for label, model in made.items()}
    for name, file in files.items():
        models[name] = load_model(file, dtype=torch.bfloat16, progress=False, keep_codes=True)
    return models


def weight_bytes(model: Transformer) -> int:
    """Of all weights, codes and scales; not of the rotary tables."""
    tables = {id(t) for t in model.rope.buffers()}
    tensors = (*model.parameters(), *(b for b in model.buffers() if id(b) not in tables))
    return sum(t.nbytes for t in tensors)


def direct(model: Transformer) -> Logits:
    return lambda ids: model(ids[None], float32=True)[0]


def through_cache(model: Transformer, kv_dtype: torch.dtype) -> Logits:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        cache = model.cache(1, len(ids), kv_dtype=kv_dtype)
        return torch.cat([model(c, cache=cache, lengths=[len(c)], float32=True) for c in ids.split(KV_CHUNK)])

    return logits


class Against:
    """Sums over windows of a text of how one variant's predictions differ from those of float32."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.changes: list[torch.Tensor] = []
        self.same = self.kl = 0.0

    def add(self, wanted: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> None:
        """wanted, found: log-probabilities `[S, V]`; found is overwritten."""
        at = torch.arange(len(targets)), targets
        self.losses.append(-found[at])
        self.changes.append(wanted[at] - found[at])
        self.same += (wanted.argmax(-1) == found.argmax(-1)).sum().item()
        self.kl += found.neg_().add_(wanted).mul_(wanted.exp()).sum().item()

    def result(self) -> dict[str, float]:
        losses, changes = torch.cat(self.losses).double(), torch.cat(self.changes).double()
        count = len(losses)
        # Of the mean over tokens, taken as independent.
        error = changes.std().item() / math.sqrt(count) if count > 1 else math.nan
        return dict(
            perplexity=math.exp(losses.mean().item()),
            change_percent=100 * math.expm1(changes.mean().item()),
            change_error_percent=100 * error,
            top1=self.same / count,
            kl=self.kl / count,
        )


@torch.inference_mode()
def on_text(truth: Logits, others: dict[str, Logits], tokens: list[int], window: int) -> dict[str, dict[str, float]]:
    """Perplexity, top-1 agreement and KL on consecutive windows of a text; the last one may be shorter."""
    sums = {name: Against() for name in ("float32", *others)}
    pieces = [p for p in torch.tensor(tokens).split(window) if len(p) > 1]
    with tqdm(total=len(pieces) * len(sums), desc="text", leave=False, disable=None) as bar:
        for ids in pieces:
            wanted = truth(ids)[:-1].log_softmax(-1)
            sums["float32"].add(wanted, wanted.clone(), ids[1:])
            bar.update()
            for name, logits in others.items():
                sums[name].add(wanted, logits(ids)[:-1].log_softmax(-1), ids[1:])
                bar.update()
    return {name: s.result() for name, s in sums.items()}


def decibel(signal: torch.Tensor, noise: torch.Tensor) -> float:
    """10 log10 of the ratio of the squares' sums."""
    above, below = (t.double().square().sum().item() for t in (signal, noise))
    return 10 * math.log10(above / below) if below else math.inf


@torch.inference_mode()
def of_layers(whole: Transformer, models: dict[str, Transformer], ids: torch.Tensor) -> dict[str, list[dict[str, Any]]]:
    """SQNR of each projection's weight and of its output on the activations that float32 gives it."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: inputs.update({name: i[0].flatten(0, -2)}))
        for name, module in whole.named_modules()
        if isinstance(module, Linear)
    ]
    whole(ids[None])
    for hook in hooks:
        hook.remove()
    names = [f"layers.{i}.{part}" for i in range(whole.config.n_layers) for part in LINEARS]
    found: dict[str, list[dict[str, Any]]] = {scheme: [] for scheme in models}
    for name in tqdm(names, desc="layers", leave=False, disable=None):
        weight: Any = whole.get_submodule(name).weight
        wanted = inputs[name] @ weight.T
        for scheme, model in models.items():
            module = model.get_submodule(name)
            if isinstance(module, Quantized):
                made = module.quantized.dequantize()
                out = whole.ops.linear_quantized(inputs[name], module.quantized)
                row = dict(weight=decibel(weight, made - weight), output=decibel(wanted, out - wanted))
                found[scheme].append(dict(layer=int(name.split(".")[1]), part=name.split(".", 2)[2], **row))
    return {scheme: rows for scheme, rows in found.items() if rows}
