"""Runs CUDA launchers on the CPU, and says what they did: `Program`, `guarded`, `launches`, `planted`."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build, ptx
from .translate import translate

COUNTS = (
    "blocks",
    "read",
    "written",
    "read_once",
    "written_once",
    "copied",
    "atomics",
    "accesses",
    "accesses16",
    "mma_flops",
    "mma",
    "ldmatrix",
    "ldmatrix_conflicts",
    "barriers",
    "wgmma",
    "bulk_read",
    "bulk_written",
    "bulk_loads",
    "bulk_stores",
)
PLANTS = ("none", "skip", "wait_one_less", "whole_copy", "swap", "flip")
LAUNCH_FAILURE = 719
LOADER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


class Finding(Exception):
    """What the checker found in a launch."""


class Line(ctypes.Structure):
    _fields_ = [("site", ctypes.c_uint32), ("text", ctypes.c_char_p)]


@dataclass
class Launch:
    """What one launch did. Bytes are of global memory; `copied` are those of cp.async, which `read` has too.

    `read_once` and `written_once` count an address once, however often it is touched. `accesses16` are the accesses of
    16 bytes a thread. `ldmatrix_conflicts` counts rows that wait for another of the same banks. `bulk_read` and
    `bulk_written` are bytes of bulk copies, which `read` and `written` have too.
    """

    kernel: str
    blocks: int
    read: int
    written: int
    read_once: int
    written_once: int
    copied: int
    atomics: int
    accesses: int
    accesses16: int
    mma_flops: int
    mma: int
    ldmatrix: int
    ldmatrix_conflicts: int
    barriers: int
    wgmma: int
    bulk_read: int
    bulk_written: int
    bulk_loads: int
    bulk_stores: int


_modules: dict[str, ptx.Module] = {}
_problem: list[Exception] = []


def _load_kernel(name: bytes) -> int:
    try:
        module = _modules[name.decode()]
        entry = module.entries[name.decode()]
        path = build.compile_kernel(entry.name, translate(module, entry.name))
        lines = (Line * len(entry.lines))(*(Line(site, text.encode()) for site, text in entry.lines))
        if error := runtime().emu_load(str(path).encode(), lines, len(lines)):
            raise build.BuildError(error.decode())
    except Exception as problem:  # it cannot pass through C++; Program.call raises it
        _problem.append(problem)
        return 0
    return 1


_loader = LOADER(_load_kernel)


@functools.cache
def runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.runtime()), mode=ctypes.RTLD_GLOBAL)
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    longs = ctypes.POINTER(ctypes.c_int64)
    library.emu_extent.argtypes = [pointer, ctypes.c_int64, ctypes.c_int, longs, longs, ctypes.c_int]
    library.emu_allocate.argtypes, library.emu_allocate.restype = [size], pointer
    library.emu_free.argtypes = [pointer]
    library.emu_written.argtypes = [pointer, size]
    library.emu_traffic.argtypes = [pointer, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64)]
    library.emu_load.argtypes, library.emu_load.restype = [text, ctypes.POINTER(Line), ctypes.c_int], text
    library.emu_finding.restype = library.emu_launch_kernel.restype = text
    library.emu_launch_counts.restype = ctypes.POINTER(ctypes.c_uint64)
    library.emu_set.argtypes = [text, ctypes.c_int]
    library.emu_plant.argtypes = [ctypes.c_uint32, ctypes.c_int, text]
    library.emu_planted.restype = ctypes.c_uint64
    library.emu_loader(_loader)
    return library


def raise_problem() -> None:
    """Raises what kept a kernel from being translated or compiled."""
    if _problem:
        raise _problem.pop()


def add_ptx(text: str) -> None:
    """Makes the kernels of a PTX module known; each is translated when it is first launched."""
    module = ptx.parse(text)
    _modules.update(dict.fromkeys(module.entries, module))


def entry(kernel: str) -> ptx.Entry:
    """The kernel of this mangled name, of any program."""
    return _modules[kernel].entries[kernel]


class Program:
    """CUDA sources with `extern "C"` launchers that return a cudaError_t.

    Args:
        name: of the library.
        sources: .cu files.
        includes: folders of headers.
        flags: further flags for nvcc.
        arch: "80", or "90a", whose kernels run where the option "capability" is 90.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        includes: Sequence[Path] = (),
        flags: Sequence[str] = (),
        arch: str = "80",
    ):
        runtime()
        folders = [build.compile_cu(source, includes, flags, arch) for source in sources]
        for folder in folders:
            add_ptx((folder / "source.ptx").read_text())
        self.library = ctypes.CDLL(str(build.link(name, [folder / "source.o" for folder in folders])))

    def call(self, launcher: str, *args: object) -> None:
        """Calls a launcher; a tensor is passed as its address and registered as what the kernel may touch.

        Raises:
            Finding: the checker found something, or the launch was refused.
        """
        runtime().emu_forget()
        status = getattr(self.library, launcher)(*(pointer(a) if isinstance(a, torch.Tensor) else a for a in args))
        raise_problem()
        if status == LAUNCH_FAILURE:
            raise Finding(runtime().emu_finding().decode())
        if status:
            raise Finding(f"{launcher} returned CUDA error {status}")


def register(tensor: torch.Tensor, writable: bool = True) -> None:
    dims = tensor.dim()
    longs = ctypes.c_int64 * max(dims, 1)
    runtime().emu_extent(
        tensor.data_ptr(), tensor.element_size(), dims, longs(*tensor.shape), longs(*tensor.stride()), int(writable)
    )


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    register(tensor)
    return ctypes.c_void_p(tensor.data_ptr())


class _Memory:
    """Guarded memory that lives as long as a tensor of it."""

    def __init__(self, size: int):
        self.size, self.address = size, runtime().emu_allocate(size)
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        runtime().emu_free(self.address)


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor between unreadable pages, NaN all over; that a kernel reads what nobody has written is a finding."""
    import numpy as np

    count = torch.Size(shape).numel()
    raw = np.asarray(_Memory(max(1, count) * dtype.itemsize))
    return torch.from_numpy(raw).view(dtype)[:count].view(*shape)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that ends where an unreadable page begins."""
    copy = empty(tensor.shape, tensor.dtype)
    copy.copy_(tensor)
    runtime().emu_written(copy.data_ptr(), copy.numel() * copy.element_size())
    return copy


def traffic(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes of this tensor that kernels have read and written since it was handed to them.

    Raises:
        ValueError: it was not.
    """
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    if not runtime().emu_traffic(tensor.data_ptr(), ctypes.byref(read), ctypes.byref(written)):
        raise ValueError(f"no kernel was handed this tensor of shape {tuple(tensor.shape)}")
    return read.value, written.value


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Fills the list with what each launch inside did, when it is left."""
    found: list[Launch] = []
    runtime().emu_clear_launches()
    yield found
    for i in range(runtime().emu_launches()):
        counts = runtime().emu_launch_counts(i)
        found.append(Launch(runtime().emu_launch_kernel(i).decode(), *(counts[j] for j in range(len(COUNTS)))))


@contextlib.contextmanager
def option(name: str, value: int) -> Iterator[None]:
    """Sets an option for a while: "check" (1), "multiprocessors" (4), "capability" (80), "shared_limit" (163 KB; 227 KB
    with capability 90), "late" (1), "cut_sums" (0), and the strict readings of contested rules, all 1:
    "strict_warpgroup", "strict_fence", "war_fence", "init_fence"; README.md says which rules."""
    before = runtime().emu_get(name.encode())
    if runtime().emu_set(name.encode(), value):
        raise ValueError(f"no option {name!r}")
    try:
        yield
    finally:
        runtime().emu_set(name.encode(), before)


@contextlib.contextmanager
def planted(site: int, fault: str, kernel: str = "") -> Iterator[Callable[[], int]]:
    """Makes the instruction at a site of a kernel, or of any, go wrong for a while: barriers, fences and copies
    `skip`, waits `wait_one_less`, copies `whole_copy`, mma `swap`, matrix loads `flip`. Yields a function that says how
    often that happened."""
    runtime().emu_plant(site, PLANTS.index(fault), kernel.encode())
    try:
        yield runtime().emu_planted
    finally:
        runtime().emu_plant(0, 0, b"")
