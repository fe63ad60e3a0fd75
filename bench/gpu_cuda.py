"""The CUDA C++ kernels, read from the machine code inside the compiled library."""

import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ARCH = re.compile(r"^arch = sm_(\d+)a?", re.M)
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_.]+)")
_NAMED = re.compile(r"(HGMMA|UTMALDG|WARPGROUP\.ARRIVE|HMMA|IMMA|LDSM|LDGSTS|LDG|STG|LDL|STL|BAR)\b(\S*)")
_HOPPER = re.compile(r"hopper_(forward|statistics|gradient)_kernel<[^,]*, (\d+)(?:, (\d))?>")
_QUANT = re.compile(r"quant_(few|few_int8|tile|int8_tile|round)_kernel(?:_f32)?<(.*)>")
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


def tool() -> str | None:
    """cuobjdump: NVIDIA's own, or the one that Triton brings."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def unusable(library: Path) -> str | None:
    """Why there is nothing to read, or None."""
    if not library.exists():
        return f"{library.name} is not built"
    if tool() is None:
        return "cuobjdump is in neither PATH nor Triton; pip install mistral-kernels[triton]"
    if not _ARCH.search(_dump("-lelf", library)) and not re.search(r"sm_\d+", _dump("-lelf", library)):
        return f"{library.name} has no CUDA kernels: it was built where there was no nvcc"
    return None


def _dump(flag: str, library: Path) -> str:
    done = subprocess.run([str(tool()), flag, library], capture_output=True, text=True)
    return done.stdout + done.stderr


def _plain(names: list[str]) -> dict[str, str]:
    """Readable names; mangled ones where there is no c++filt."""
    if shutil.which("c++filt") is None or not names:
        return {n: n for n in names}
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = re.compile(r"^void |mk::cuda::|\(anonymous namespace\)::|\([^()]*\)$")
    return {n: short.sub("", text) for n, text in zip(names, done.stdout.splitlines(), strict=True)}


def classify(opcode: str) -> str:
    """The name that the count knows an instruction by; global accesses with their width in bits."""
    found = _NAMED.match(opcode)
    if found is None:
        return "other"
    if found[1] not in ("LDGSTS", "LDG", "STG"):
        return found[1]
    width = _WIDTH.search(found[2])
    return f"{found[1]}.{(width[1] or width[2]) if width else 32}"


def _sections(text: str, start: re.Pattern) -> list[tuple[str, str]]:
    """(what `start` found, the text up to its next find)."""
    found = list(start.finditer(text))
    return [(m[1], text[m.end() : n.start() if n else len(text)]) for m, n in itertools.zip_longest(found, found[1:])]


def hopper_work(spec: str) -> dict[str, Any]:
    """Warps of a block of an attention kernel for compute capability 9.0, and bytes and FLOPs of one launch; {} for
    other kernels.

    32 query heads over 8 key heads, a window of 4096: two sequences of 8192 tokens; with one warpgroup of consumers,
    one query each of 64 sequences over full rings. 4 FLOPs a visible pair and column of two products, 10 of five.
    """
    from .families.attention import visible_pairs

    found = _HOPPER.match(spec)
    if found is None:
        return {}
    part, dim = found[1], int(found[2])
    one = found[3] == "1"
    batch, queries, pairs = (64, 1, 4096) if one else (2, 8192, visible_pairs(8192, 4096))
    q, kv, rows = batch * queries * 32 * dim, batch * (4096 if one else queries) * 8 * dim, batch * queries * 32
    flops = (10 if part == "gradient" else 4) * batch * 32 * dim * pairs
    # Queries and out or its gradient, keys and values, lse or three statistics; dK and dV, and dQ summed in float32.
    moved = 2 * (2 * q + 2 * kv) + 4 * rows * (1 if part == "forward" else 3)
    if part == "gradient":
        moved += 2 * 2 * kv + 4 * q
    shape = f"B{batch} S{queries} W4096"
    return dict(warps=8 if one else 12, shape=shape, work=dict(bytes=moved, flops=flops))


def quant_work(spec: str) -> dict[str, Any]:
    """The same of a kernel for linear layers on codes: 1, 4, 16 or 4096 rows of 4096 elements, projected to 14336.

    int8 shares a scale along a row, int4 along 128 elements, nf4 along 64. Products of int8 are set against the rate
    of bfloat16, half of their own.
    """
    if (found := _QUANT.match(spec)) is None:
        return {}
    part, arguments = found[1], found[2].split(", ")
    k, n = 4096, 14336
    x = 4 if "float" in arguments or "_f32" in spec else 2
    if part == "round":
        return dict(warps=8, shape=f"M4096 K{k}", work=dict(bytes=4096 * (k * (x + 1) + 4), flops=2 * 4096 * k))
    rows = {"1": 1, "4": 4, "16": 16}.get(arguments[-1], 4096)
    kind = (
        "w8a8" if "int8" in part else ("int8", "int4", "int4 offsets", "nf4")[int(spec.partition("(QuantKind)")[2][0])]
    )
    halves, group = kind[:4] in ("int4", "nf4"), {"int4": 128, "nf4": 64}.get(kind.split()[0], k)
    scales = n * (k // group) * (8 if kind == "int4 offsets" else 4)
    codes, outputs = n * k // (2 if halves else 1), rows * n * x
    moved = codes + scales + outputs + rows * k * (1 if kind == "w8a8" else x)
    return dict(warps=4, shape=f"{kind} M{rows} N{n} K{k}", work=dict(bytes=moved, flops=2 * rows * n * k))


def kernels(library: Path, wanted: Callable[[int], bool] = lambda capability: True) -> list[dict[str, Any]]:
    """Registers, stack, shared memory and instructions of every kernel and architecture in the library."""
    counts = {}
    for arch, text in _sections(_dump("-sass", library), _ARCH):
        for function, body in _sections(text, _FUNCTION):
            counts[int(arch), function] = Counter(classify(op) for op in _INSTRUCTION.findall(body))
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for arch, text in _sections(_dump("-res-usage", library), _ARCH):
        for function, registers, stack, shared in _RESOURCES.findall(text):
            key = (int(arch), function)
            sizes = dict(registers=int(registers), stack=int(stack), shared=int(shared))
            found[key] = (
                dict(source="CUDA", capability=key[0], kernel=function, count=dict(counts.get(key, {}))) | sizes
            )
    names = _plain(sorted({function for _, function in found}))
    rows = [row | dict(spec=names[row["kernel"]]) for row in found.values() if wanted(row["capability"])]
    rows = [row | hopper_work(row["spec"]) | quant_work(row["spec"]) for row in rows]
    return sorted(rows, key=lambda row: (row["spec"], row["capability"]))
