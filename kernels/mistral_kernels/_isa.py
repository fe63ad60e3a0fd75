"""The instruction sets of the compiled library. It takes the processor's best; tests run the others too."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from . import _library

TIERS = ("base", "avx2", "avx512", "avx512bf16", "amx")


@functools.cache
def _compiled() -> ctypes.CDLL:
    if _library.unusable is not None:
        raise NotImplementedError(_library.unusable)
    compiled = ctypes.CDLL(str(_library.path))
    compiled.mistral_kernels_isa.restype = ctypes.c_char_p
    return compiled


@contextlib.contextmanager
def isa(tier: str) -> Iterator[None]:
    """Within it the C++ kernels run with the instruction set `tier`, in every thread.

    Raises:
        NotImplementedError: this processor or this build lacks it, or the library is not built.
    """
    before = _compiled().mistral_kernels_isa()
    if _compiled().mistral_kernels_set_isa(tier.encode()):
        raise NotImplementedError(f"this processor or this build has no instruction set {tier!r}")
    try:
        yield
    finally:
        _compiled().mistral_kernels_set_isa(before)


def isa_tiers() -> list[str]:
    """The instruction sets that the C++ kernels can run with here, the best last; none where they are not built."""
    found = []
    for tier in TIERS if _library.unusable is None else ():
        with contextlib.suppress(NotImplementedError), isa(tier):
            found.append(tier)
    return found
