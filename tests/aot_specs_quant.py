"""Linear layers on codes in the widths of a 7B Mistral and of the sample model, for one row and for many."""

import torch
from triton_aot import Spec

from mistral_kernels.quant_linear import triton_kernel as quant

BF16, F32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(scheme: str, rows: int, k: int, n: int, group: int = 0, offset: bool = False, dtype: torch.dtype = BF16):
    def launch(_):
        halves = scheme in ("int4", "nf4")
        codes = meta(n, -(-k // 32) * 16 if halves else k, dtype=torch.uint8 if halves else torch.int8)
        scale = meta(n, -(-k // group) if group else 1, dtype=F32)
        middle = (scale if offset else None,) if scheme == "int4" else ()
        op = getattr(quant, f"linear_{scheme}")
        return op(meta(rows, k, dtype=dtype), codes, scale, *middle, None, group)

    return launch


# Scales, x's own halves of a block and the few outputs of a program are narrow by design: only tensor cores, registers
# and spills are judged.
SPECS = [
    Spec("int8 1 row", _linear("int8", 1, 4096, 14336)),
    Spec("int8 1 row g32", _linear("int8", 1, 4096, 4096, 32), slow=True),
    Spec("int4 1 row g128", _linear("int4", 1, 4096, 14336, 128)),
    Spec("int4 1 row g32 offsets", _linear("int4", 1, 576, 1536, 32, True), slow=True),
    Spec("nf4 1 row g64", _linear("nf4", 1, 4096, 14336, 64), slow=True),
    Spec("int8 512 rows", _linear("int8", 512, 4096, 14336), mma=True),
    Spec("int8 16 rows g128", _linear("int8", 16, 4096, 4096, 128), slow=True),
    Spec("int4 512 rows g128", _linear("int4", 512, 4096, 14336, 128), mma=True),
    Spec("int4 512 rows g32 offsets", _linear("int4", 512, 4096, 4096, 32, True), slow=True),
    Spec("nf4 512 rows g64", _linear("nf4", 512, 4096, 14336, 64), mma=True, slow=True),
    Spec("w8a8 512 rows", _linear("w8a8", 512, 4096, 14336)),
    Spec("int8 512 rows float32", _linear("int8", 512, 576, 1536, dtype=F32), slow=True),
]
