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
_NAMED = re.compile(r"(HGMMA|UTMALDG|WARPGROUP\.ARRIVE|HMMA|LDSM|LDGSTS|LDG|STG|LDL|STL|BAR)\b(\S*)")
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
    return sorted(rows, key=lambda row: (row["spec"], row["capability"]))
