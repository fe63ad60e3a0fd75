"""Instructions that the C++ kernels execute in one small call of each op, counted by valgrind.

    python -m bench.instructions [--write | --check] [--only WORDS] [--file bench/instructions.json]

Counts have no noise, so that a kernel that does more work than it did is seen on a busy machine too, and in one run.
Only the kernels of csrc/cpu are counted, in the instruction set TIER, which valgrind knows on every x86-64 with AVX2:
neither torch nor the binding. A compiler makes its own code, so counts are compared with those of the same one only.
Exit status 1 where --check finds a case that executes more than 1 % more, or less, than the file says.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("instructions.json")
TIER = "avx2" if platform.machine() == "x86_64" else "base"
TOLERANCE = 0.01
# What the counted process asks of valgrind; nothing outside it.
REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind is not found (apt install valgrind)"
    if shutil.which(compiler()) is None:
        return f"the C compiler {compiler()!r} is not found"
    return None


def compiler() -> str:
    return os.environ.get("CC", "gcc")


def built_by(library: Path) -> str:
    """The compiler that made the library, as it says itself."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return found.group().decode() if found else "unknown"


def read_dump(path: Path) -> tuple[str, int]:
    """The name that a dump of callgrind's was given, and the instructions of the kernels themselves in it."""
    names: dict[str, str] = {}
    case, counted, total, called = "", False, 0, False
    for line in path.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            case = line.removeprefix("desc: Trigger: Client Request: ")
        elif match := re.match(r"c?fn=(\(\d+\))(?: (.*))?$", line):
            if match[2]:
                names[match[1]] = match[2]
            if line.startswith("fn="):
                counted = f"mk::{TIER}::" in names[match[1]]
        elif line.startswith("calls="):
            called = True
        elif re.match(r"[+\-*\d]", line):
            # The line after calls= is what the called function took, which is counted where it stands.
            total += int(line.split()[1]) if counted and not called else 0
            called = False
    return case, total


def count(only: str) -> dict[str, int]:
    """Instructions by case, in the order of bench/instruction_cases.py."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "requests.c").write_text(REQUESTS)
        requests = folder / "requests.so"
        subprocess.run([compiler(), "-O1", "-shared", "-fPIC", folder / "requests.c", "-o", requests], check=True)
        tool = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        child = [sys.executable, "-m", "bench.instruction_cases", str(requests), TIER, only]
        environment = os.environ | dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONHASHSEED="0")
        subprocess.run([*tool, *child], cwd=ROOT, env=environment, check=True)
        dumps = sorted(folder.glob("out.*"), key=lambda p: int(p.suffix[1:]))
        counts = dict(map(read_dump, dumps))
    return {case: n for case, n in counts.items() if case}


def differences(expected: dict[str, int], counts: dict[str, int]) -> Iterator[str]:
    for case, n in counts.items():
        before = expected.get(case)
        if before is None:
            yield f"{case}: not in the file; {n} instructions"
        elif abs(n - before) > TOLERANCE * before:
            yield f"{case}: {n} instructions, {before} in the file ({n / before - 1:+.1%})"


def check(file: Path, compiled_by: str, counts: dict[str, int], only: str) -> int:
    expected = json.loads(file.read_text())
    made = (expected["compiler"], expected["tier"])
    if made != (compiled_by, TIER):
        print(f"{file.name} is of {made}, this library of {(compiled_by, TIER)}: nothing to compare; --write anew")
        return 1
    lines = list(differences(expected["instructions"], counts))
    lines += [
        f"{case}: in the file, but not run" for case in expected["instructions"] if not only and case not in counts
    ]
    print("\n".join(lines) or f"{len(counts)} cases execute what {file.name} says, within {TOLERANCE:.0%}")
    return 1 if lines else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write the counts to the file")
    what.add_argument("--check", action="store_true", help="compare the counts with the file's")
    parser.add_argument("--only", default="", help="cases whose name contains these words")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args(argv)
    if options.write and options.only:
        parser.error("--write takes all cases; leave --only out")
    if (reason := missing()) is not None:
        parser.error(reason)
    from mistral_kernels import _library

    counts, compiled_by = count(options.only), built_by(_library.path)
    if not counts or not all(counts.values()):
        parser.error(f"no instructions of mk::{TIER} were counted for {[c for c, n in counts.items() if not n]}")
    if options.check:
        return check(options.file, compiled_by, counts, options.only)
    if options.write:
        facts = dict(compiler=compiled_by, tier=TIER, instructions=counts)
        options.file.write_text(json.dumps(facts, indent=1) + "\n")
    for case, n in counts.items():
        print(f"{n:>12}  {case}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
