"""The machine code of the kernels for compute capability 9.0: products stay asynchronous, nothing spills."""

import re
import subprocess
from pathlib import Path

import pytest
from ptx_on_cpu import build, missing

WIDTHS, CONSUMERS = (64, 128, 256), (1, 2)


@pytest.fixture(scope="module")
def kernels(cuda_machine_code):
    return [k for k in cuda_machine_code if k["spec"].startswith("hopper_")]


def of_family(kernels, family):
    """(the numbers among the template arguments, the kernel) for each dtype and shape."""
    found = [k for k in kernels if k["spec"].startswith(f"{family}<")]
    return [(tuple(int(n) for n in re.findall(r", (\d+)", k["spec"])), k) for k in found]


def test_all_are_there_for_compute_capability_90_alone(kernels):
    forward = of_family(kernels, "hopper_forward_kernel")
    assert sorted(shape for shape, _ in forward) == sorted(2 * [(d, c) for d in WIDTHS for c in CONSUMERS])
    assert {k["capability"] for k in kernels} == {90}


def test_no_kernel_spills(kernels):
    assert not [k["spec"] for k in kernels if k["stack"] or k["count"].get("LDL") or k["count"].get("STL")]


def test_registers_fit_the_block(kernels):
    """65536 registers of a multiprocessor: 168 a thread for three warpgroups, 255 for two."""
    for (_, consumers), k in of_family(kernels, "hopper_forward_kernel"):
        assert k["registers"] <= (168 if consumers == 2 else 255), k["spec"]


def test_forward_has_the_products_and_copies_of_its_algorithm(kernels):
    """Scores and products with the values twice each, first and last block apart from the loop; one fence a batch."""
    for (dim, consumers), k in of_family(kernels, "hopper_forward_kernel"):
        key_rows, panels = 64 if dim == 256 else 128, dim // 64
        scores, values = dim // 16, key_rows // 16 * (2 if dim == 256 else 1)
        assert k["count"]["HGMMA"] == 2 * (scores + values), k["spec"]
        assert k["count"]["WARPGROUP.ARRIVE"] == 4, k["spec"]
        # Queries, keys, values, and values at the end of a packed sequence.
        assert k["count"]["UTMALDG"] == (consumers + 3) * panels, k["spec"]
        assert k["count"]["STG.128"] == 2 * dim // 32, k["spec"]
        assert not k["count"].get("HMMA"), k["spec"]


def test_gradients_have_five_products(kernels):
    """Scores and dP of 64 rows by 64, dV and dK over 64 queries, dQ over 128 keys; and no addition but in turn."""
    found = of_family(kernels, "hopper_gradient_kernel")
    assert sorted(shape for shape, _ in found) == sorted(2 * [(64,), (128,)])
    for (dim,), k in found:
        panels = dim // 64
        assert k["count"]["HGMMA"] == 2 * dim // 16 + 2 * 64 // 16 + 128 // 16, k["spec"]
        assert k["count"]["WARPGROUP.ARRIVE"] == (3 if dim == 128 else 4), k["spec"]
        # Keys, values, queries and gradients, and each once more at the end of a packed sequence.
        assert k["count"]["UTMALDG"] == 8 * panels and k["registers"] <= 168, k["spec"]
        assert k["count"]["STG.128"] == 2 * 2 * dim // 32, k["spec"]


def test_statistics_have_two_products(kernels):
    found = of_family(kernels, "hopper_statistics_kernel")
    assert sorted(shape for shape, _ in found) == sorted(2 * [(64,), (128,)])
    for (dim,), k in found:
        assert k["count"]["HGMMA"] == 2 * dim // 16 and k["count"]["WARPGROUP.ARRIVE"] == 1, k["spec"]
        assert k["registers"] <= 168, k["spec"]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("part, count", [("forward", len(WIDTHS) * len(CONSUMERS)), ("backward", 2 * 3)])
def test_the_assembler_serialises_no_product(part, count, dtype, tmp_path):
    """C7510 and its like say that a wgmma waits for the one before it, or was given fences that nobody wrote."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    csrc = build.ROOT / "csrc"
    folder = build.compile_cu(csrc / f"cuda/hopper_{part}_{dtype}.cu", [csrc], arch="90a")
    ptxas = Path(build.nvcc()).resolve().with_name("ptxas")
    command = [ptxas, "-v", "-arch=sm_90a", folder / "source.ptx", "-o", tmp_path / "out.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling entry function") == count
    assert not re.findall(r"C75\d\d|serializ", done.stderr), done.stderr
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}
