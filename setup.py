"""Builds one shared library on torch's stable ABI: csrc/cpu once for each instruction set, csrc/torch once, csrc/cuda
where nvcc is found. Beside it lies a small module on CPython's stable ABI, for short calls: csrc/python, where Python's
headers are found.

Writes a ninja file and lets ninja run the compilers. torch is only looked up for its headers, never imported, and may
be missing: then the package is built without the library, and everything but the C++ kernels works.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones stop at pyproject.toml, with words about a licence
    sys.exit(f"setuptools is {setuptools.__version__}; it must be 77 or later: pip install -U setuptools")

ROOT = Path(__file__).parent
LIBRARY = "libmistral_kernels.so"
CALLS = "_calls.abi3.so"
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11 and later
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512"
AVX512_BF16 = AVX512 + " -mavx512bf16 -mavx512vnni"
# Instruction set: (float lanes of a vector, flags). Chosen once at run time, the last that the processor has.
X86_TIERS = {
    "base": (4, ""),
    "avx2": (8, "-mavx2 -mfma -mf16c -mbmi2"),
    "avx512": (16, AVX512),
    "avx512bf16": (16, AVX512_BF16),
    "amx": (16, AVX512_BF16 + " -mamx-tile -mamx-bf16 -mamx-int8"),
}
# The files with kernels for the matrix unit of the tier "amx"; those of the others are the tier before's.
MATRIX_SOURCES = {
    "attention",
    "attention_backward",
    "attention_decode",
    "int8_product",
    "linear",
    "linear_cross_entropy",
    "quant_linear",
}
OTHER_TIERS = {"base": (4, "")}
# -ffp-contract=fast lets a*b+c become one FMA; -fno-math-errno and -fno-trapping-math free the vectoriser.
# g++ 12 takes the undefined vectors in its own immintrin.h for uninitialized.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
# Machine code for the A100 and the H100, and PTX from which the driver makes it for what comes after them.
CUDA_ARCHS = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]"
# Kernels named hopper_* use instructions that only this one architecture has.
HOPPER_ARCHS = "-gencode arch=compute_90a,code=sm_90a"
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
WARNINGS = "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"


def find_torch() -> Path | None:
    """The folder of the torch that the package will run with, seen through pip's build isolation too."""
    spec = find_spec("torch")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def find_cuda() -> Path | None:
    """The folder with bin/nvcc, headers and the static CUDA runtime: CUDA_HOME, that of the nvcc in PATH, or pip's."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parents[1])
    places.append(Path("/usr/local/cuda"))
    packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    places += [p / "nvidia/cu13" for p in sorted(packages)]
    return next((p for p in places if (p / "bin/nvcc").exists() and cuda_runtime(p)), None)


def cuda_runtime(cuda: Path) -> Path | None:
    """The folder of libcudart_static.a."""
    folders = (cuda / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"))
    return next((p for p in folders if (p / "libcudart_static.a").exists()), None)


def find_python() -> Path | None:
    """The folder of Python.h, or None: many systems have it in a package of its own. A Python without a global lock has
    no stable ABI."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() and not sysconfig.get_config_var("Py_GIL_DISABLED") else None


def missing_tool() -> str | None:
    """Why the library cannot be built here, or None."""
    if find_torch() is None:
        return "torch is not installed in this environment"
    if shutil.which(compiler()) is None:
        return f"the C++ compiler {compiler()!r} is not found"
    if find_ninja() is None:
        return "ninja is not found"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def jobs() -> int:
    """MAX_JOBS, else one for each core; no more than memory carries at 1.5 GB a compiler."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    asked = os.environ.get("MAX_JOBS", "")
    wanted = int(asked) if asked.isdecimal() else os.cpu_count() or 1
    return max(1, min(wanted, int(memory / 1.5e9)))


def ninja_rules(torch: Path, cuda: Path | None, sanitizer: str | None) -> list[str]:
    sanitize = f"-fsanitize={sanitizer} -fno-omit-frame-pointer -g -O1" if sanitizer else ""
    runtime = f"-L{cuda_runtime(cuda)} -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL" if cuda else ""
    return [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} {WARNINGS} -I{ROOT / 'csrc'} {sanitize}",
        f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {torch / 'include'}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $what",
        "rule nvcc",
        f"  command = {cuda}/bin/nvcc {CUDA_FLAGS} $extra -I{ROOT / 'csrc'} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $what",
        "rule link",
        f"  command = $cxx {sanitize} -shared -o $out $in -L{torch / 'lib'} -ltorch_cpu {runtime}",
        "  description = link $out",
        "rule module",
        f"  command = $cxx {sanitize} -shared -o $out $in",
        "  description = link $out",
    ]


def calls_lines(torch: Path, python: Path, folder: Path, output: Path) -> list[str]:
    """What builds the module for short calls; torch is asked for the header of DLPack only."""
    item = folder / "python_calls.o"
    return [
        f"build {item}: compile {ROOT / 'csrc/python/calls.cpp'}",
        f"  extra = -isystem {torch / 'include'} -isystem {python}",
        "  what = csrc/python/calls.cpp",
        f"build {output}: module {item}",
        f"default {output}",
        "",
    ]


def ninja_file(torch: Path, cuda: Path | None, folder: Path, output: Path, sanitizer: str | None = None) -> str:
    # What threads share does not depend on the instruction set, and ThreadSanitizer sees no masked store.
    tiers = X86_TIERS if platform.machine() in ("x86_64", "AMD64") and sanitizer != "thread" else OTHER_TIERS
    lines, objects = ninja_rules(torch, cuda, sanitizer), []

    def add(source: Path, name: str, extra: str, what: str, rule: str = "compile") -> None:
        objects.append(folder / f"{name}.o")
        lines.extend([f"build {objects[-1]}: {rule} {source}", f"  extra = {extra}", f"  what = {what}"])

    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for tier, (lanes, extra) in tiers.items():
            if tier == "amx" and source.stem not in MATRIX_SOURCES:
                continue
            bf16, matrices = tier in ("avx512bf16", "amx"), tier == "amx"
            defines = f"-DMK_ISA={tier} -DMK_LANES={lanes} -DMK_BF16={int(bf16)} -DMK_AMX={int(matrices)} {extra}"
            add(source, f"cpu_{source.stem}_{tier}", defines, f"csrc/cpu/{source.name} for {tier}")
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if cuda else ():
        archs = HOPPER_ARCHS if source.stem.startswith("hopper_") else CUDA_ARCHS
        add(source, f"cuda_{source.stem}", archs, f"csrc/cuda/{source.name}", "nvcc")
    for source in sorted((ROOT / "csrc/torch").glob("*.cpp")):
        if source.name.startswith("cuda_") and cuda is None:
            continue
        x86 = f"-DMK_X86={int(len(tiers) > 1)}"
        add(source, f"torch_{source.stem}", f"{x86} $torch", f"csrc/torch/{source.name}")
    lines += [f"build {output}: link {' '.join(map(str, objects))}", f"default {output}", ""]
    return "\n".join(lines)


class BuildLibrary(build_ext):
    """Runs ninja where setuptools would run a compiler; the result lies in the package as data."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize=", None, "build with this sanitizer of g++'s, address or thread"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = None

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return str(Path(*package) / (CALLS if name == "_calls" else LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_calls"):
            return  # with the library
        reason = missing_tool()
        if reason is not None:
            self.warn(f"mistral_kernels is built WITHOUT its C++ kernels: {reason}")
            return
        folder, torch, cuda = self.objects_folder(), find_torch(), None if self.sanitize else find_cuda()
        if cuda is None and not self.sanitize:
            self.warn("mistral_kernels is built WITHOUT its CUDA C++ kernels: nvcc is not found (docs/cuda.md)")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        for path in (folder, output.parent):
            path.mkdir(parents=True, exist_ok=True)
        lines = ninja_file(torch, cuda, folder, output, self.sanitize)
        if (python := find_python()) is not None:
            lines += "\n".join(calls_lines(torch, python, folder, output.with_name(CALLS)))
        else:
            self.warn("short calls of mistral_kernels will be slower: Python.h is not found (python3-dev)")
        (folder / "build.ninja").write_text(lines)
        subprocess.run([find_ninja(), "-C", str(folder), f"-j{jobs()}"], check=True)

    def objects_folder(self) -> Path:
        """Where objects are kept. An editable installation names a fresh temporary folder, where everything would be
        compiled once more: it takes the one of `build_ext --inplace`."""
        build = self.get_finalized_command("build")
        usual = f"{build.build_base}/temp.{build.plat_name}-{sys.implementation.cache_tag}"
        return (ROOT / (usual if self.editable_mode else self.build_temp)).resolve()

    def built(self) -> list[Extension]:
        """Those of the extensions that can be built here."""
        if missing_tool() is not None:
            return []
        return [ext for ext in self.extensions if not ext.name.endswith("_calls") or find_python() is not None]

    def copy_extensions_to_source(self) -> None:
        every, self.extensions = self.extensions, self.built()
        super().copy_extensions_to_source()
        self.extensions = every

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(ext.name) for ext in self.built()]


setup(
    ext_modules=[
        Extension(f"mistral_kernels.{name}", sources=[], py_limited_api=True)
        for name in ("libmistral_kernels", "_calls")
    ],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
