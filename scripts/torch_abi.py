"""Builds the wheel and demands that its library runs under other versions of torch than the one it was built with.

    python scripts/torch_abi.py [--json docs/torch_abi.json] TORCH...

torch-abi-audit reads the library's symbols. Then the wheel is imported under each TORCH (2.11.0, say, as pip installs
it: from PyPI that is a torch for CUDA), and the tests of the C++ kernels run on it, with a GPU or without; the sources
that include torch are compiled with its headers. Under the environment's own torch, with which `make test` runs all
tests, only those of the elementwise ops do. Each TORCH has an environment of its own in .venvs, with the packages of
.venv behind it; one for CUDA takes some 6 GB. Exit status 1 where the audit, a test or a compiler fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out/abi"
TESTS = ("test_cpu", "test_cpu_attention", "test_cpu_backward", "test_cpu_attention_backward", "test_linear",
         "test_decode", "test_quant_cpu", "test_ring_int8", "test_linear_cross_entropy")  # fmt: skip
LOAD = """
import json, torch, mistral_kernels
from mistral_kernels import _library
print(json.dumps(dict(torch=torch.__version__, cuda=torch.version.cuda, file=str(_library.path),
                      unusable=_library.unusable)))
"""


def call(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def wheel() -> Path:
    """The package as the wheel has it."""
    shutil.rmtree(OUT, ignore_errors=True)
    call([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(OUT), "."])
    (built,) = OUT.glob("*.whl")
    zipfile.ZipFile(built).extractall(OUT / "package")
    return OUT / "package"


def environment(name: str, *packages: str) -> str:
    """The Python of an environment with these packages, and behind them those of this one."""
    folder = ROOT / ".venvs" / name
    python = folder / "bin/python"
    if not python.exists():
        call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    own = Path(call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *packages])
    return str(python)


def audit(package: Path) -> dict:
    python = environment("torch-abi-audit", "torch-abi-audit==0.3.0")
    main = "import sys; from torch_abi_audit.cli import main; sys.exit(main(sys.argv[1:]))"
    said = json.loads(call([python, "-c", main, str(package / "mistral_kernels"), "--json"]))
    (library,) = said["bundled_libs"]
    found = library["torch"]
    if not found["stable"] or found["unstable_symbols"] or found["unknown_shim_symbols"]:
        raise SystemExit(f"the library leaves torch's stable ABI: {found}")
    return dict(stable_symbols=found["stable_shim_count"], oldest_torch=found["min_torch_version"])


def tested(python: str, package: Path, names: tuple[str, ...] = TESTS) -> dict:
    """What torch this Python has, and how the tests went on the package."""
    found = json.loads(call([python, "-c", LOAD], PYTHONPATH=str(package)).splitlines()[-1])
    if found["unusable"] or Path(found["file"]).parent.parent != package:
        raise SystemExit(f"the wheel's library was not loaded: {found}")
    files = [f"tests/{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath={package} . tests"]
    end = call([python, "-m", "pytest", *options, *files]).strip().splitlines()[-1]
    row = dict(torch=found["torch"], cuda=found["cuda"], tests=end.strip("= "))
    print(row, flush=True)
    return row


def compiled(python: str) -> int:
    """How many sources compile with the headers of this Python's torch: all of csrc/torch."""
    find = "import torch; from pathlib import Path; print(Path(torch.__file__).parent / 'include')"
    include = call([python, "-c", find]).strip()
    target = re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-w",
        f"-I{ROOT / 'csrc'}",
        "-DMK_X86=1",
        f"-DTORCH_TARGET_VERSION={target}",
    ]
    sources = sorted((ROOT / "csrc/torch").glob("*.cpp"))
    for source in sources:
        call([os.environ.get("CXX", "g++"), *flags, "-isystem", include, str(source)])
    return len(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="*", help="versions of torch, as pip takes them")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args()
    package = wheel()
    found = dict(audit=audit(package), runs=[tested(sys.executable, package, TESTS[:1])])
    print(found["audit"], flush=True)
    for version in options.torch:
        python = environment(f"torch-{version}", f"torch=={version}")
        found["runs"].append(tested(python, package) | dict(sources_compiled=compiled(python)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
