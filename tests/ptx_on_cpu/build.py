"""From CUDA sources to something that runs: nvcc for the host code and the PTX, the translator, g++; all cached.

Everything lies under build/ptx_on_cpu of the repository, named by a hash of what it was made from, so that a second
run builds nothing and processes that build at the same time do not disturb each other.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "ptx_on_cpu"
RUNTIME = HERE / "runtime"
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
CXX_FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
NVCC_FLAGS = ["-std=c++17", "-O1", "-lineinfo"]  # the level is that of the host code; the PTX is the same


class BuildError(Exception):
    """A compiler refused; its output is the message."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def nvcc() -> str | None:
    """nvcc, from PATH, CUDA_HOME or the usual place."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    beside = (str(Path(home) / "bin/nvcc") for home in homes if home)
    return next((found for name in ("nvcc", *beside) if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if nvcc() is None:
        return "nvcc is not found (pip install nvidia-cuda-nvcc and its companions, or a CUDA toolkit)"
    if shutil.which(compiler()) is None:
        return f"the C++ compiler {compiler()!r} is not found"
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return f"fibers are not written for {platform.machine()}"
    return None


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


@functools.cache
def machine() -> str:
    """What -march=native depends on, so that a copied cache is not used on another processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")


def digest(*parts: object) -> str:
    h = hashlib.sha256(machine().encode())
    for part in parts:
        h.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        h.update(b"\0")
    return h.hexdigest()[:20]


def cached(name: str, make, *parts: object) -> Path:
    """The file or folder `name`, with the hash of `parts` in its name; made by `make(path)` where it is not there."""
    stem, suffix = os.path.splitext(name)
    path = CACHE / f"{stem}-{digest(*parts)}{suffix}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that makes the same is waited for
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder) / f"made{suffix}"
                make(made)
                os.replace(made, path)
    return path


def two_at_a_time(make: Callable[[Path], Path], sources: Sequence[Path]) -> list[Path]:
    """The results in order. Compilers run two at a time: they take a gigabyte each."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, sources))


def tree(folder: Path, *patterns: str) -> list[Path]:
    return sorted(p for pattern in patterns for p in folder.rglob(pattern))


@functools.cache
def runtime() -> Path:
    sources = tree(RUNTIME, "*.cpp")
    command = [compiler(), *CXX_FLAGS, "-O3", NATIVE, "-shared", "-Wl,-z,nodelete"]
    return cached(
        "runtime.so",
        lambda path: run([*command, "-o", path, *sources, "-ldl"]),
        " ".join(command),
        *tree(RUNTIME, "*.cpp", "*.h"),
    )


def compile_cu(source: Path, includes: Sequence[Path], flags: Sequence[str] = (), arch: str = "80") -> Path:
    """The folder with source.o, nvcc's host code, and source.ptx; both from one run of nvcc."""
    headers = [p for folder in includes for p in tree(folder, "*.h", "*.cuh")]
    command = [nvcc(), *NVCC_FLAGS, *flags, f"-gencode=arch=compute_{arch},code=compute_{arch}"]
    command += [f"-I{folder}" for folder in includes]

    def make(path: Path) -> None:
        path.mkdir()
        run([*command, "-c", source, "-o", path / "source.o", "--keep", "--keep-dir", path, "-Xcompiler", "-fPIC"])
        (path / f"{source.stem}.ptx").rename(path / "source.ptx")
        for left in path.iterdir():
            if left.name not in ("source.o", "source.ptx"):
                left.unlink()

    return cached(source.stem, make, " ".join(map(str, command)), source, *headers)


def compile_cpp(source: Path, includes: Sequence[Path], flags: Sequence[str], depends: Sequence[Path] = ()) -> Path:
    command = [compiler(), *CXX_FLAGS, "-O1", *flags, *(f"-I{folder}" for folder in includes)]
    return cached(
        f"{source.stem}.o",
        lambda path: run([*command, "-c", source, "-o", path]),
        " ".join(map(str, command)),
        source,
        *depends,
    )


def cudart_object() -> Path:
    source = HERE / "cudart.cpp"
    command = [nvcc(), "-std=c++17", "-O1", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{HERE}", "-c", source]
    return cached("cudart.o", lambda path: run([*command, "-o", path]), *command, source, *tree(RUNTIME, "*.h"))


def link(name: str, objects: Sequence[Path], extra: Sequence[str] = ()) -> Path:
    """One shared library with its own stand-in for libcudart, whatever libcudart torch has loaded."""
    objects = [*objects, cudart_object()]
    command = [compiler(), "-shared", "-Wl,-Bsymbolic"]
    return cached(
        f"{name}.so",
        lambda path: run([*command, "-o", path, *objects, *extra]),
        " ".join([*command, *extra]),
        *(f"{p.parent.name}/{p.name}" for p in objects),  # the hash is in one of the two
    )


@functools.cache
def _read_header(level: str) -> Path:
    """A folder with emu.h as g++ has read it, most of the work of a small kernel; other compilers pass it by."""
    command = [compiler(), *CXX_FLAGS, level, "-w", "-x", "c++-header", RUNTIME / "emu.h"]

    def make(path: Path) -> None:
        path.mkdir()
        run([*command, "-o", path / "emu.h.gch"])

    return cached("header", make, *command, *tree(RUNTIME, "*.h"))


def compile_kernel(name: str, text: str) -> Path:
    """The shared library of one translated kernel. Higher levels take many times as long for little; least where most
    of the time goes into the products of warpgroups, which the runtime makes."""
    level = "-Og" if "emu::wgmma(" in text else "-O1"
    command = [compiler(), *CXX_FLAGS, level, "-w", "-shared"]

    def make(path: Path) -> None:
        source = path.with_suffix(".cpp")
        source.write_text(text)
        run([*command, f"-I{_read_header(level)}", f"-I{RUNTIME}", "-o", path, source])

    return cached(f"{name[:60]}.so", make, " ".join(map(str, command)), text, *tree(RUNTIME, "*.h"))
