"""The project's CUDA ops on CPU tensors: their kernels, launchers and torch bindings, on the stand-in device."""

import functools
from pathlib import Path

import torch

from . import build
from .program import add_ptx, runtime

CSRC = build.ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000"


def _bindings(includes: list[Path]) -> list[Path]:
    sources = [p for p in build.tree(CSRC / "torch", "cuda_*.cpp") if p.name != "cuda_device.cpp"]
    headers = build.tree(CSRC, "*.h")
    torch_include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-DMK_CUDA_KEY=CPU", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-w"]
    flags += ["-isystem", str(torch_include)]
    sources += [CSRC / "torch/binding.cpp", CSRC / "torch/outputs.cpp", build.HERE / "torch_device.cpp"]
    depends = [*headers, build.RUNTIME / "api.h"]
    return build.two_at_a_time(lambda source: build.compile_cpp(source, includes, flags, depends), sources)


def arch(source: Path) -> str:
    """What a CUDA source is compiled for here: its kernels run where the option "capability" is as high."""
    return "90a" if source.name.startswith("hopper") else "80"


@functools.cache
def load() -> None:
    """Builds what is not built and registers it: from then on `impl="cuda"` runs on CPU tensors, checked.

    Raises:
        RuntimeError: something that is needed is missing here.
        BuildError: a compiler refused.
    """
    if (reason := build.missing()) is not None:
        raise RuntimeError(reason)
    import mistral_kernels  # noqa: F401  (its schemas)

    runtime()
    includes = [CSRC, build.HERE]
    sources = build.tree(CSRC / "cuda", "*.cu")
    folders = build.two_at_a_time(lambda source: build.compile_cu(source, [CSRC], (), arch(source)), sources)
    for folder in folders:
        add_ptx((folder / "source.ptx").read_text())
    objects = [folder / "source.o" for folder in folders] + _bindings(includes)
    library = Path(torch.__file__).parent / "lib"
    torch.ops.load_library(str(build.link("torch_ops", objects, [f"-L{library}", "-ltorch_cpu"])))
