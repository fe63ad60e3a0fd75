"""The memory of large outputs of the C++ kernels."""

import ctypes
import functools

from . import _library


@functools.cache
def _compiled() -> ctypes.CDLL:
    if _library.unusable is not None:
        raise NotImplementedError(_library.unusable)
    compiled = ctypes.CDLL(str(_library.path))
    compiled.mistral_kernels_set_output_pool.argtypes = [ctypes.c_int64]
    compiled.mistral_kernels_set_output_pool.restype = None
    compiled.mistral_kernels_output_pool_held.restype = ctypes.c_int64
    return compiled


def output_pool(limit: int) -> None:
    """How much memory of large outputs on a CPU is kept, once they are freed, for the next ones: 512 MiB until told.

    Outputs of the C++ kernels from 2 MB on take blocks that earlier ones gave back, from whatever thread, instead of
    fresh pages: docs/cpu.md has what that saves. At most `limit` bytes lie unused; beyond it those are freed that lay
    unused longest. Such outputs are ordinary tensors but for one thing: their storage cannot be resized, so `resize_`
    to more elements and `untyped_storage().resize_` raise, as for a tensor from NumPy.

    Args:
        limit: bytes; 0 turns the pool off and frees what it holds. Outputs still in use keep their memory, and one
            larger than the limit is torch's own.

    Raises:
        ValueError: limit is no int, or negative.
        NotImplementedError: the library is not built.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit < 2**63:
        raise ValueError(f"limit is {limit!r}; it must be a number of bytes, 0 for no pool")
    _compiled().mistral_kernels_set_output_pool(limit)


def held() -> int:
    """Bytes that lie unused in the pool."""
    return int(_compiled().mistral_kernels_output_pool_held())
