"""The loss over the vocabularies of Mistral 7B, Mistral NeMo and the sample model, and over one of odd size."""

import torch
from triton_aot import Spec

from mistral_kernels.linear_cross_entropy import triton_kernel as loss

VOCABULARIES = (32768, 131072, 49152)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward(vocabulary: int, dtype: torch.dtype):
    return lambda _: loss.losses_of_logits(
        meta(1024, vocabulary, dtype=dtype), meta(1024, dtype=torch.int64), ignore_index=-100
    )


def _backward(vocabulary: int, dtype: torch.dtype):
    def launch(_):
        lse, dlosses = (meta(1024, dtype=torch.float32) for _ in range(2))
        labels = meta(1024, dtype=torch.int64)
        return loss.gradient_of_logits(meta(1024, vocabulary, dtype=dtype), labels, lse, dlosses, ignore_index=-100)

    return launch


# A program reads a label, and the logit at it or lse and dloss; the forward writes its loss and lse.
SPECS = [
    Spec(f"{name} {vocabulary} {dtype}", launch(vocabulary, dtype), narrow=narrow, slow=vocabulary != 32768)
    for vocabulary in VOCABULARIES
    for dtype in (torch.bfloat16, torch.float32)
    for name, launch, narrow in (("loss", _forward, 4), ("loss gradient", _backward, 3))
]
SPECS.append(Spec("loss 5125", _forward(5125, torch.bfloat16)))
