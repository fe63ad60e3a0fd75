"""Plants races into copies of the kernels, one at a time, and demands that ThreadSanitizer reports each.

    python scripts/planted_races.py BUILD PACKAGE COMMAND...

BUILD is the folder of a build with `--sanitize thread`, PACKAGE that of the package on it, COMMAND a Python that loads
ThreadSanitizer. `make sanitize-threads` calls this after the unchanged kernels have passed the tests without a report.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from changed_library import LIBRARY, ROOT, copy_sources, plant, relink


@dataclasses.dataclass(frozen=True)
class Race:
    what: str
    file: str
    old: str
    new: str
    object: str
    test: str


# Whether two threads meet with no lock taken between them, which would order them too, is chance.
ATTEMPTS = 8
DECODE = "tests/test_cpu_attention.py::test_decode_over_the_ring[dtype0]"
RACES = (
    Race("parts of dweight share one sum", "torch/rms_norm_backward.cpp", "sum_data + p * n * sum_size", "sum_data",
         "torch_rms_norm_backward.o", "tests/test_cpu_backward.py::test_parity[base-rms_norm-dtype0]"),
    Race("rows of SwiGLU written by two threads", "torch/swiglu.cpp", "count = (end * 64 < total ? end * 64 : total)",
         "count = (end * 64 + 1 < total ? end * 64 + 1 : total)", "torch_swiglu.o",
         "tests/test_cpu.py::test_threads_and_streaming_change_nothing[base]"),
    Race("pieces of a decoded sequence counted without order", "torch/attention_run.cpp", "memory_order_acq_rel",
         "memory_order_relaxed", "torch_attention_run.o", DECODE),
    Race("gradients joined before all parts are seen", "torch/attention_backward.cpp", "memory_order_acq_rel",
         "memory_order_relaxed", "torch_attention_backward.o",
         "tests/test_cpu_attention_backward.py::test_threads_change_nothing_in_parts[base-0-dtype0]"),
    Race("pieces of a decoded sequence share their sums", "cpu/attention_decode.cpp",
         "a.partials + item.partial * a.partial_bytes", "a.partials", "cpu_attention_decode_base.o", DECODE),
)  # fmt: skip


def reported(race: Race, build: Path, package: Path, python: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(copy_sources(folder), race.file, race.old, race.new)
        shutil.copytree(package / "mistral_kernels", folder / "mistral_kernels")
        relink(build.resolve(), folder, [race.object], folder / "mistral_kernels" / LIBRARY)
        command = [*python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--capture=sys"]
        command += ["-o", f"pythonpath={folder} . tests", race.test]
        for _ in range(ATTEMPTS):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found = done.returncode != 0 and "WARNING: ThreadSanitizer: data race" in done.stderr + done.stdout
            if found:
                break
    if not found:
        print(done.stdout[-3000:], done.stderr[-3000:])
    print(f"{'reported' if found else 'NOT REPORTED'}: {race.what}", flush=True)
    return found


def main(build: str, package: str, *python: str) -> int:
    results = [reported(race, Path(build), Path(package), list(python)) for race in RACES]
    print(f"{sum(results)} of {len(results)} planted races reported")
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
