"""Every Triton and CUDA kernel for sm_80, sm_90 and sm_100: machine code as it is, and the time that a model gives it.

Registers, memory and instruction counts are read from the machine code; occupancy and times follow from them and from
each launch's bytes and FLOPs by `gpu_model`. Nothing here ran on a GPU.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from . import gpu_cuda, gpu_model, gpu_triton, report

CAPABILITIES = (80, 90, 100)
NOTE = "A model, not a measurement: none of these kernels ran for this table."
HEAD = ("kernel", "sm", "registers", "stack", "shared", "occupancy", "tensor", "16-byte", "MB", "GFLOP", "roofline, µs")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sm", type=int, action="append", choices=CAPABILITIES, help="only this one (may be repeated)")
    parser.add_argument("--source", choices=("Triton", "CUDA"), help="only these kernels")
    parser.add_argument("--slow", action="store_true", help="every configuration that is tested, not the main ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")


def modelled(kernel: dict[str, Any]) -> dict[str, Any]:
    """The kernel with occupancy, and roofline times where its work is known."""
    capability, count = kernel["capability"], kernel.get("count", {})
    if "registers" in kernel and capability in gpu_model.PROCESSORS:
        # The block size of a CUDA kernel is chosen when it is launched; one warp shows what registers allow.
        warps = kernel.get("warps", 1)
        share = gpu_model.occupancy(capability, kernel["registers"], kernel["shared"], warps)
        kernel = kernel | dict(
            occupancy=share, occupancy_of=f"blocks of {warps} warps" if "warps" in kernel else "registers"
        )
        if "warps" not in kernel:
            processor = gpu_model.PROCESSORS[capability]
            resident = processor.registers // (-(-kernel["registers"] * 32 // gpu_model.REGISTER_UNIT) * 256)
            kernel |= dict(occupancy=min(1.0, resident / processor.warps))
    if kernel.get("work"):
        tensor = gpu_model.uses_tensor_cores(count)
        times = {
            card.name: gpu_model.roofline(card, kernel["work"]["bytes"], kernel["work"]["flops"], tensor)
            for card in gpu_model.CARDS[capability]
        }
        kernel = kernel | dict(roofline=times)
    return kernel


def wide(count: dict[str, int]) -> int:
    """Global accesses of 16 bytes or more, and bulk copies."""
    return sum(n for name, n in count.items() if name.endswith((".128", ".256")) or name == "UTMALDG")


def cells(kernel: dict[str, Any]) -> tuple[str, ...]:
    name = f"{kernel['source']} {kernel['spec']}"
    if kernel["source"] == "Triton" and "kernel" in kernel:
        name += f": {kernel['kernel']}"
    if "shape" in kernel:
        name += f": {kernel['shape']}"
    if "registers" not in kernel:
        return (name, str(kernel["capability"]), "; ".join(kernel.get("problems", ["not compiled"])), *[""] * 8)
    count, needed = kernel["count"], kernel.get("work")
    return (
        name,
        str(kernel["capability"]),
        str(kernel["registers"]),
        str(kernel["stack"]),
        f"{kernel['shared'] / 1024:.3g} K",
        f"{100 * kernel['occupancy']:.0f} %" if "occupancy" in kernel else "",
        str(sum(count.get(n, 0) for n in gpu_model.TENSOR_CORES)),
        str(wide(count)),
        f"{needed['bytes'] / 1e6:.3g}" if needed else "",
        f"{needed['flops'] / 1e9:.3g}" if needed else "",
        ", ".join(f"{card} {1e6 * t:.3g}" for card, t in kernel.get("roofline", {}).items()),
    )


def print_kernel(kernel: dict[str, Any]) -> None:
    widths = (58, 4, 10, 6, 8, 10, 7, 8, 7, 7, 0)
    print(" ".join(f"{c:<{w}}" for c, w in zip(cells(kernel), widths, strict=True)), flush=True)


def _collect(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    capabilities = tuple(options.sm or ((90,) if options.quick else CAPABILITIES))
    if options.source != "CUDA":
        for capability in capabilities:
            yield from gpu_triton.kernels(capability, options.slow, options.only, options.jobs)
    if options.source != "Triton":
        from mistral_kernels import _library

        reason = gpu_cuda.unusable(_library.path)
        if reason is not None:
            print(f"without CUDA kernels: {reason}")
            return
        for kernel in gpu_cuda.kernels(_library.path, lambda capability: capability in capabilities):
            if options.only in kernel["spec"]:
                yield kernel


def run(options: argparse.Namespace) -> dict[str, Any]:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("bench: gpu-report compiles Triton's kernels; unset TRITON_INTERPRET")
    print(NOTE)
    print_kernel_head()
    kernels = []
    for kernel in _collect(options):
        kernels.append(modelled(kernel))
        print_kernel(kernels[-1])
    if not kernels:
        sys.exit(f"bench: no kernel has {options.only!r} in its name")
    failed = [k for k in kernels if "registers" not in k]
    return dict(rows=[], kernels=kernels, note=NOTE, failed=len(failed))


def print_kernel_head() -> None:
    widths = (58, 4, 10, 6, 8, 10, 7, 8, 7, 7, 0)
    print(" ".join(f"{c:<{w}}" for c, w in zip(HEAD, widths, strict=True)))


def markdown(kernels: list[dict[str, Any]]) -> str:
    return report.markdown(HEAD, [cells(k) for k in kernels])
