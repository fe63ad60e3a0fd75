"""What must be set before torch, Triton or NumPy is imported, and the switch for the long grids."""

import json
import os
from pathlib import Path

# NumPy's BLAS threads fight with the interpreter's many small products, and the threads of one test process with those
# of its neighbours: waiting for each other takes many times what the small tensors of tests take.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import quick_gguf
import quick_interpreter

quick_gguf.install()
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()


@pytest.fixture
def one_thread():
    """Models of a few thousand weights: a second thread only waits, for long where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cuda_ops():
    """The CUDA ops on CPU tensors, run from their own PTX, every access checked; nothing on a machine with a GPU."""
    if torch.cuda.is_available():
        return
    from ptx_on_cpu import missing, torch_ops

    if (reason := missing()) is not None:
        pytest.skip(f"CUDA kernels cannot be built here: {reason}")
    torch_ops.load()


@pytest.fixture(scope="session")
def cuda_machine_code_file():
    """Every CUDA kernel in the compiled library, as JSON: registers, memory, counts of instructions; None without one.

    The disassembler takes most of a minute, so one process reads the library, and once as long as it is the same.
    """
    from ptx_on_cpu import build

    from bench import families, gpu_cuda
    from mistral_kernels import _library

    if gpu_cuda.unusable(_library.path) is not None:
        return None
    readers = (gpu_cuda.__file__, *sorted(Path(families.__file__).parent.glob("*.py")))
    return build.cached(
        "machine_code.json",
        lambda path: path.write_text(json.dumps(gpu_cuda.kernels(_library.path))),
        _library.path,
        *map(Path, readers),
        gpu_cuda.tool(),
    )


@pytest.fixture(scope="session")
def cuda_machine_code(cuda_machine_code_file):
    from bench import gpu_cuda
    from mistral_kernels import _library

    if cuda_machine_code_file is None:
        pytest.skip(f"no CUDA machine code here: {gpu_cuda.unusable(_library.path)}")
    return json.loads(cuda_machine_code_file.read_text())


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long grids too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a long grid; make test-slow runs it"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
