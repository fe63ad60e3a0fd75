"""The torch.library namespace `mistral_kernels`, and the compiled library that lies beside this file.

Schemas are defined in Python and only implemented in C++, so fake kernels, the eager versions and Triton work
without a binary. The binary is looked for beside this file and never through the import system, which could
answer with another checkout's.
"""

import warnings
from pathlib import Path

import torch

NAMESPACE = "mistral_kernels"
library = torch.library.Library(NAMESPACE, "DEF")
path = Path(__file__).with_name("libmistral_kernels.so")


def _load() -> str | None:
    """Loads the compiled library; returns None, or why it cannot be used."""
    if not path.exists():
        return "the compiled library is not built (pip install -e . --no-build-isolation builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} does not load under torch {torch.__version__}: {error}"
        warnings.warn(f"mistral_kernels is without its C++ kernels, and slower: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


unusable = _load()


def has_kernel(op: str, key: str) -> bool:
    """Whether the compiled library implements `op` for the dispatch key `key` ("CPU" or "CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)
