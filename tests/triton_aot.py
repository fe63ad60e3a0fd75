"""Compiles what the Triton launchers launch, for GPUs that need not be here, and reads the machine code.

    python tests/triton_aot.py aot_specs_elementwise 90 [--slow]

calls each spec of the module's SPECS on meta tensors, records the kernels that its launcher would start, compiles them
with the types, constants and divisibility that Triton's own launch would derive, disassembles them with Triton's own
cuobjdump, and prints one JSON list of reports. Each runs in a process of its own, since a failing compiler pass can
abort it. TRITON_INTERPRET must not be set.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of a launcher in a production configuration, and what its machine code must be.

    Args:
        name: of the case.
        launch: calls the launcher on meta tensors, given the compute capability (80, 90, 100).
        capabilities: those it is compiled for.
        narrow: how many global loads and stores of less than 16 bytes are by design (a position, a row's rstd); None
            where widths are not checked.
        doubles: pass Python floats as float64, as Inductor does.
        mma: the main loop must use tensor cores.
        registers: at most so many a thread.
        reloads: at most so many local loads and stores in the main loop, where a measurement paid for them.
        check: given the report and the PTX, further sentences about what is wrong.
        slow: only in the long grid.
    """

    name: str
    launch: Callable[[int], Any]
    capabilities: tuple[int, ...] = CAPABILITIES
    narrow: int | None = None
    doubles: bool = False
    mma: bool = False
    registers: int = 255
    reloads: int = 0
    check: Callable[[dict[str, Any], str], list[str]] | None = None
    slow: bool = False


# ---- what a launch would compile ----


def record(spec: Spec, capability: int) -> list[tuple[Any, tuple, dict]]:
    """(kernel, arguments, keywords) of every launch; none is made."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        spec.launch(capability)
    return launches


def compile_launch(kernel: Any, args: tuple, kwargs: dict, capability: int, doubles: bool) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kwargs = kwargs | dict(debug=False)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    if doubles:
        signature = {name: "fp64" if kind == "fp32" else kind for name, kind in signature.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


# ---- what it became ----

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_.]+)(.*?);")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_CLASSES = [
    (name, re.compile(pattern))
    for name, pattern in (
        ("FP64", r"DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w+64H|I2F\S*\.F64"),
        ("HGMMA", r"[HI]GMMA|QGMMA"),
        ("HMMA", r"HMMA"),
        ("UTCMMA", r"UTC\w*MMA"),
        ("EX2", r"MUFU\.EX2"),
        ("LDL", r"LDL"),
        ("STL", r"STL"),
        ("BAR", r"BAR"),
        ("STS", r"STSM?\b"),
        ("UTMALDG", r"UTMALDG"),
        ("FFMA", r"FFMA"),
        ("FMUL", r"FMUL"),
        ("FADD", r"FADD"),
    )
]
_GLOBAL = re.compile(r"(LDGSTS|LDG|STG)\b")
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


def _classify(opcode: str) -> str:
    if access := _GLOBAL.match(opcode):
        width = _WIDTH.search(opcode)
        return f"{access[1]}.{(width[1] or width[2]) if width else 32}"
    return next((name for name, pattern in _CLASSES if pattern.match(opcode)), "other")


def _dump(flag: str, binary: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, flag, binary], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _inner_loops(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Address ranges of backward branches that hold no other; the one that ends a kernel jumps to itself."""
    found = set()
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith(("BRA", "UBRA")) and target and int(target[1], 16) < address:
            found.add((int(target[1], 16), address))
    return [r for r in sorted(found) if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in found)]


def read(compiled: Any) -> dict[str, Any]:
    """Registers, stack, shared memory, and instructions by class: of the whole kernel and of each innermost loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        instructions = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(_dump("-sass", file.name))]
        registers, stack = map(int, _RESOURCES.search(_dump("-res-usage", file.name)).groups())

    def count(first: int, last: int) -> dict[str, int]:
        return Counter(_classify(op) for address, op, _ in instructions if first <= address <= last)

    return dict(
        kernel=compiled.metadata.name,
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        registers=registers,
        stack=stack,
        instructions=len(instructions),
        count=count(0, sys.maxsize),
        loops=[count(*span) for span in _inner_loops(instructions)],
    )


def main_loop(report: dict[str, Any]) -> dict[str, int]:
    """The shortest innermost loop that uses tensor cores: the one without masks. Without tensor cores, the shortest one
    of products; without loops of those, the whole kernel."""
    matrix = [loop for loop in report["loops"] if any(loop.get(name) for name in MMA.values())]
    matrix = matrix or [loop for loop in report["loops"] if loop.get("FFMA", 0) > sum(loop.values()) / 4]
    return min(matrix, key=lambda loop: sum(loop.values()), default=report["count"])


def problems(spec: Spec, report: dict[str, Any], ptx: str) -> list[str]:
    """One sentence for each thing that is not as the spec wants it."""
    capability, count, found = report["capability"], report["count"], []

    def expect(fine: bool, sentence: str) -> None:
        if not fine:
            found.append(sentence)

    main = main_loop(report)
    expect(report["instructions"] > 40, f"only {report['instructions']} instructions: an empty kernel")
    expect(main.get("LDL", 0) + main.get("STL", 0) <= spec.reloads, f"the main loop spills: {main}")
    expect(not count.get("FP64"), f"{count.get('FP64')} float64 instructions")
    expect(report["shared"] <= SHARED_LIMIT[capability], f"{report['shared']} bytes of shared memory")
    expect(report["tensor_memory"] <= 512, f"{report['tensor_memory']} columns of tensor memory")
    expect(report["registers"] <= spec.registers, f"{report['registers']} registers, over {spec.registers}")
    if spec.mma:
        expect(bool(main.get(MMA[capability])), f"no {MMA[capability]} in the main loop: {main}")
    if spec.narrow is not None:
        wide = sum(n for name, n in count.items() if re.fullmatch(r"(LDGSTS|LDG|STG)\.(128|256)", name))
        narrow = sum(n for name, n in count.items() if re.fullmatch(r"(LDGSTS|LDG|STG)\.(8|16|32|64)", name))
        expect(wide > 0, "no access of 16 bytes")
        expect(narrow <= spec.narrow, f"{narrow} accesses of less than 16 bytes, over {spec.narrow}")
    return found + (spec.check(report, ptx) if spec.check else [])


def examine(spec: Spec, capability: int) -> list[dict[str, Any]]:
    """The report of every kernel that the spec launches."""
    reports = []
    for kernel, args, kwargs in record(spec, capability):
        start = time.perf_counter()
        compiled = compile_launch(kernel, args, kwargs, capability, spec.doubles)
        report = dict(spec=spec.name, capability=capability, seconds=round(time.perf_counter() - start, 2))
        report |= read(compiled)
        reports.append(report | dict(problems=problems(spec, report, compiled.asm["ptx"])))
    return reports or [dict(spec=spec.name, capability=capability, problems=["nothing was launched"])]


# ---- a process each ----


def _child(spec: Spec, capability: int, out: str) -> None:
    """Forked: writes the reports, or leaves what the compiler said, and ends without cleaning up for the parent."""
    status = 1
    with open(out + ".log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            Path(out).write_text(json.dumps(examine(spec, capability)))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc(file=log)
            log.flush()
        finally:
            os._exit(status)


def _prepare() -> None:
    """What every child would do anew: half a second for the key of Triton itself."""
    from triton.compiler import compiler
    from triton.runtime import cache

    (getattr(cache, "triton_key", None) or compiler.triton_key)()
    with contextlib.suppress(ImportError):
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")


def examine_all(specs: list[Spec], capability: int, jobs: int) -> Iterator[dict[str, Any]]:
    """Reports of all specs, `jobs` at a time; one whose compiler fails reports what it said last."""
    waiting, running = list(enumerate(specs)), {}
    _prepare()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                i, spec = waiting.pop(0)
                out = f"{folder}/{i}"
                if (child := os.fork()) == 0:
                    _child(spec, capability, out)
                running[child] = (spec, out)
            child, status = os.wait()
            spec, out = running.pop(child)
            if status == 0:
                yield from json.loads(Path(out).read_text())
            else:
                said = Path(out + ".log").read_text()[-1500:]
                yield dict(spec=spec.name, capability=capability, problems=[f"failed with status {status}: {said}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="with a list SPECS")
    parser.add_argument("capability", type=int, choices=CAPABILITIES)
    parser.add_argument("--slow", action="store_true", help="the long grid too")
    parser.add_argument("--only", default="", help="specs with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        module = importlib.import_module(options.module)
    specs = [
        s
        for s in module.SPECS
        if options.capability in s.capabilities and (options.slow or not s.slow) and options.only in s.name
    ]
    print(json.dumps(list(examine_all(specs, options.capability, options.jobs))))


if __name__ == "__main__":
    # Spec modules import this one by name; run as a script it would be there twice.
    importlib.import_module("triton_aot").main()
