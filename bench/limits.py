"""The machine's own limits, measured in the same rounds as the ops: read and copy bandwidth, GEMM rate.

On a CPU the bandwidths come from `probe.c`, compiled when the benchmark starts; without a C compiler from torch's
`sum` and `copy_`. Each call takes the next part of buffers that are larger than the last cache, as the ops take their
inputs in turn. The GEMM rate is torch's matrix product of the row's dtype.
"""

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mistral_kernels import testing

from . import machine

COMPILERS = ("cc", "gcc", "clang")
FMA_ROUNDS, FMA_FLOPS = 5_000_000, 2 * 12 * 8  # of probe_fma: rounds of a call, and FLOPs of a round


@functools.cache
def _probe() -> Any:
    """The compiled probe, or None."""
    compiler = next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/probe.so"
        source = Path(__file__).with_name("probe.c")
        flags = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
        if subprocess.run([compiler, *flags, source, "-o", out], capture_output=True).returncode:
            return None
        library = ctypes.CDLL(out)
    library.probe_read.restype = ctypes.c_uint64
    library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.probe_fma.restype = ctypes.c_float
    library.probe_fma.argtypes = [ctypes.c_long, ctypes.c_int]
    library.probe_copy.restype = None
    library.probe_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def _aligned(count: int) -> torch.Tensor:
    t = torch.ones(count + 64, dtype=torch.int32)
    skip = -t.data_ptr() % 64 // 4
    return t[skip : skip + count]


class _InBackward(torch.autograd.Function):
    """Nothing but a call in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], Any]) -> torch.Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call()
        return gradient, None


def in_backward(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a gradient: by torch's autograd, in the backward of a Function that does nothing else."""
    x = torch.zeros(8, requires_grad=True)
    with torch.enable_grad():
        output = _InBackward.apply(x, call)
    seed = torch.ones(8)
    return lambda: torch.autograd.grad(output, x, seed, retain_graph=True)


class Limits:
    """Calls whose rate is a limit, and what one call moves or computes.

    Args:
        device: "cpu" or "cuda".
        quick: smaller buffers, which a large last cache may hold.

    Attributes:
        bytes: what one call reads, or reads and writes again.
        parts: so many lie in a buffer, twice what the last cache holds.
    """

    def __init__(self, device: str, quick: bool = False):
        self.device, self.quick = device, quick
        self.bytes = (1 << 30 if device == "cuda" else 1 << 27) >> (1 if quick else 0)
        self.parts = 1 if quick or device == "cuda" else machine.cold_copies(self.bytes)
        self.size = 8192 if device == "cuda" else 1024 if quick else 2048
        self.source = {
            "read": "probe.c" if device == "cpu" and _probe() is not None else "torch.sum",
            "copy": "probe.c, streaming stores" if device == "cpu" and _probe() is not None else "Tensor.copy_",
            "call": "clone of eight floats",
            "gemm": f"torch.mm of {self.size} x {self.size} x {self.size}, float32 where 16 bits have no products",
            "fma": "probe.c, multiply-adds of 256 bits" if device == "cpu" and _probe() is not None else "as gemm",
        }

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        return self._ones()

    @functools.cached_property
    def _copied(self) -> torch.Tensor:
        return self._ones()

    def _ones(self) -> torch.Tensor:
        count = self.parts * self.bytes // 4
        return torch.ones(count, dtype=torch.float32, device="cuda") if self.device == "cuda" else _aligned(count)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one Limits lives as long as the program
    def _matrices(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(self.size, self.size, device=self.device).to(dtype) for _ in range(2)]

    @property
    def _has_fma(self) -> bool:
        return self.device == "cpu" and _probe() is not None

    def _has_products(self, dtype: torch.dtype) -> bool:
        """Whether products of the dtype are no slower than float32's: an x86 without AVX-512 has none of 16 bits."""
        tiers = testing.isa_tiers()
        return self.device != "cpu" or dtype.itemsize != 2 or "avx2" not in tiers or "avx512" in tiers

    def amount(self, kind: str) -> float:
        """Bytes, read and written, or FLOPs of one call; 1 where the limit is a call itself."""
        if kind == "call":
            return 1.0
        if kind == "fma" and self._has_fma:
            return float(FMA_ROUNDS * FMA_FLOPS * torch.get_num_threads())
        if kind in ("gemm", "fma"):
            return 2.0 * self.size**3
        return float(self.bytes * (2 if kind == "copy" else 1))

    def call_of_size(self, kind: str, moved: float, sets: int) -> tuple[Callable[[], Any], float] | None:
        """A copy or a read of as many bytes as an op moves, on as many sets as the op has, and the bytes of one call.
        None where that is most of what `call` moves, or not bandwidth, or a GPU's.

        A call of it begins, as the op's does, with threads to start and caches that know nothing of its memory; in the
        large one that counts for nothing.
        """
        size = int(moved / (2 if kind == "copy" else 1)) // 256 * 256
        if kind not in ("copy", "read") or self.device != "cpu" or not 0 < size <= self.bytes // 2:
            return None
        parts = min(sets, self.parts * self.bytes // size)
        return self._bandwidth(kind, size, parts), float(size * (2 if kind == "copy" else 1))

    def products(
        self, dtype: torch.dtype, heads: int, queries: int, keys: int, dim: int
    ) -> tuple[Callable[[], Any], float] | None:
        """The two matrix products of attention, unmasked and without the softmax between them, and the FLOPs of one
        call. None on a GPU, and where the dtype has no products."""
        if self.device != "cpu" or not self._has_products(dtype):
            return None
        q, k = torch.randn(heads, queries, dim).to(dtype), torch.randn(heads, dim, keys).to(dtype)
        v, out = torch.randn(heads, keys, dim).to(dtype), torch.empty(heads, queries, dim, dtype=dtype)
        scores = torch.zeros(heads, queries, keys, dtype=dtype)

        def both() -> None:
            torch.bmm(q, k, out=scores)
            torch.bmm(scores, v, out=out)

        return both, 4.0 * heads * queries * keys * dim

    def call(self, kind: str, dtype: torch.dtype) -> Callable[[], Any]:
        """What to time for one limit."""
        if kind == "fma" and self._has_fma:
            return functools.partial(_probe().probe_fma, FMA_ROUNDS, torch.get_num_threads())
        if kind in ("gemm", "fma"):
            a, b = self._matrices(dtype if self._has_products(dtype) else torch.float32)
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out)
        if kind == "call":
            tiny = torch.zeros(8, device=self.device)
            return lambda: tiny.clone()
        if kind not in ("read", "copy"):
            raise ValueError(f"limit {kind!r} is not known; there are read, copy, gemm, fma and call")
        return self._bandwidth(kind, self.bytes, self.parts)

    def _bandwidth(self, kind: str, size: int, parts: int) -> Callable[[], Any]:
        """Reads or copies the next of `parts` parts of `size` bytes."""
        turns = itertools.cycle(range(parts))
        probe, threads = _probe() if self.device == "cpu" else None, torch.get_num_threads()
        source = self._buffer[: parts * size // 4].chunk(parts)
        if kind == "read":
            if probe is None:
                return lambda: source[next(turns)].sum()
            return lambda: probe.probe_read(source[next(turns)].data_ptr(), size, threads)
        target = self._copied[: parts * size // 4].chunk(parts)

        def copy() -> None:
            part = next(turns)
            if probe is None:
                target[part].copy_(source[part])
            else:
                probe.probe_copy(target[part].data_ptr(), source[part].data_ptr(), size, threads)

        return copy
