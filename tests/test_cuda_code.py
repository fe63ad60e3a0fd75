"""The machine code of the CUDA kernels: no spill, registers under ceilings, tensor cores, 16-byte accesses."""

import pytest

# Threads of a block times registers are at most 65536: 1024 threads may have 64, 512 have 128, 128 have 255. The
# attention kernels of head dimension 64 leave room for three blocks on a multiprocessor, those of 128 for two.
CEILINGS = {
    "norm_kernel": 64,
    "backward_kernel": 128,
    "long_dx_kernel": 128,
    "long_partials_kernel": 64,
    "columns_kernel": 64,
    "rope_kernel": 64,
    "swiglu_kernel": 64,
    "combine_kernel": 64,
    "linear_kernel": 64,
    "attention_kernel": 255,
    "query_gradient_kernel": 255,
    "key_gradient_kernel": 255,
    "attention_kernel_f32": 168,
    "query_gradient_kernel_f32": 168,
    "key_gradient_kernel_f32": 168,
    "quant_few_kernel": 128,
    "quant_few_int8_kernel": 64,
    "quant_round_kernel": 64,
    "quant_tile_kernel": 255,
    "quant_tile_kernel_f32": 168,
    "quant_int8_tile_kernel": 255,
}
WIDEST = {"attention_kernel": {"64": 168, "128": 255}}
TENSOR = ("attention_kernel", "query_gradient_kernel", "key_gradient_kernel")


@pytest.fixture(scope="module")
def kernels(cuda_machine_code):
    return [k for k in cuda_machine_code if not k["spec"].startswith("hopper_")]


def family(kernel):
    return kernel["spec"].partition("<")[0]


def test_every_kernel_is_there_for_both_architectures(kernels):
    for capability in (80, 90):
        assert {family(k) for k in kernels if k["capability"] == capability} == set(CEILINGS)


def test_no_kernel_spills(kernels):
    assert not [(k["spec"], k["capability"], k["stack"]) for k in kernels if k["stack"]]
    assert not [(k["spec"], k["capability"]) for k in kernels if k["count"].get("LDL") or k["count"].get("STL")]


def test_registers_stay_under_their_ceilings(kernels):
    over = [(k["spec"], k["capability"], k["registers"]) for k in kernels if k["registers"] > CEILINGS[family(k)]]
    assert not over


def test_products_are_on_tensor_cores_and_tiles_come_by_asynchronous_copies(kernels):
    tiled = [k for k in kernels if family(k) in TENSOR]
    assert len(tiled) == 2 * 2 * (8 + 4 + 5)
    for kernel in tiled:
        count = kernel["count"]
        assert count.get("HMMA", 0) and count.get("LDSM", 0) and count.get("LDGSTS.128", 0), kernel["spec"]
        assert count.get("STG.128", 0), kernel["spec"]
        assert not [name for name in count if name.startswith("LDGSTS") and name != "LDGSTS.128"], kernel["spec"]


def test_aligned_rows_move_in_16_bytes(kernels):
    """Kernels of several elements a thread load and store nothing narrower but statistics, positions and tables."""
    names = ("norm_kernel", "backward_kernel", "long_dx_kernel", "swiglu_kernel", "rope_kernel")
    checked = 0
    for kernel in kernels:
        arguments = kernel["spec"].partition("<")[2].rstrip(">").split(", ")
        if family(kernel) == "norm_kernel":
            del arguments[3]  # how many times a thread does
        if family(kernel) not in names or "1" in arguments:
            continue
        checked += 1
        count = kernel["count"]
        assert count.get("LDG.128", 0) and count.get("STG.128", 0), kernel["spec"]
        assert not count.get("LDG.16") and not count.get("STG.16") and count.get("STG.32", 0) <= 1, kernel["spec"]
    assert checked >= 2 * (5 * 2 + 5 + 5 + 6 + 6)


def test_codes_come_in_16_bytes_and_are_multiplied_on_tensor_cores(kernels):
    """What comes in single bytes are rows that are not aligned; nothing is computed for them in another way."""
    tiles = {"quant_tile_kernel": ("HMMA", "LDGSTS.128"), "quant_int8_tile_kernel": ("IMMA", "LDSM", "LDGSTS.128")}
    needed = {**tiles, "quant_few_kernel": ("LDG.128",), "quant_few_int8_kernel": ("LDG.128",)}
    checked = [k for k in kernels if family(k) in needed]
    assert len(checked) == 2 * (2 * 4 * 2 + 2 + 3 * 4 * 2 + 2)
    for kernel in checked:
        stores = ("STG.128",) if family(kernel) in tiles else ()
        assert all(kernel["count"].get(name) for name in needed[family(kernel)] + stores), kernel["spec"]
