"""The model of GPU kernels: occupancy and roofline by hand, bytes of launches against the ops' own floors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_cuda, gpu_model, gpu_report, gpu_triton
from bench.families.attention import visible_pairs

ROOT = Path(__file__).parents[1]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(*tensors):
    return (None, tensors, {})


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 8, 1.0),
        (90, 40, 0, 4, 48 / 64),  # 1280 registers a warp, 51 warps, 12 blocks of 4
        (90, 255, 0, 4, 8 / 64),  # 8192 a warp, 8 warps, 2 blocks
        (90, 64, 112 << 10, 8, 16 / 64),  # two blocks' shared memory
        (80, 64, 112 << 10, 8, 8 / 64),  # one
        (80, 16, 0, 1, 32 / 64),  # 32 blocks at most
        (90, 255, 300 << 10, 4, 0.0),
    ],
)
def test_occupancy(capability, registers, shared, warps, expected):
    assert gpu_model.occupancy(capability, registers, shared, warps) == expected


def test_roofline_takes_the_longer_of_memory_and_arithmetic():
    (card,) = gpu_model.CARDS[80]
    assert gpu_model.roofline(card, 2.039e9, 0, False) == pytest.approx(1e-3)
    assert gpu_model.roofline(card, 2.039e9, 312e10, True) == pytest.approx(1e-2)
    assert gpu_model.roofline(card, 0, 195e8, False) == pytest.approx(1e-3)


def test_work_of_launches():
    norm = launch(meta(512, 4096), meta(4096), meta(512, 4096), 1e-5)
    work = gpu_triton.work(norm, "rms_norm 4096", True)
    assert work.bytes == 2 * (2 * 512 * 4096 + 4096) and work.flops == 4 * 512 * 4096
    q, k = meta(2, 8192, 32, 128), meta(2, 8192, 8, 128)
    lse = meta(2, 32, 8192, dtype=torch.float32)
    for name, pairs in (
        ("attention D128", visible_pairs(8192, 4096)),
        ("attention D128 no window", visible_pairs(8192, None)),
        ("attention D128 not causal", 8192**2),
    ):
        work = gpu_triton.work(launch(q, k, k.clone(), torch.empty_like(q), lse), name, True)
        assert work.flops == 4 * 2 * 32 * 128 * pairs
        assert work.bytes == 2 * 2 * (q.numel() + k.numel()) + 4 * lse.numel()


def test_work_of_linear_layers_on_codes():
    x, codes, scale, out = (
        meta(512, 96),
        meta(40, 48, dtype=torch.uint8),
        meta(40, 3, dtype=torch.float32),
        meta(512, 40),
    )
    product = gpu_triton.work(launch(x, codes, scale, out), "int4 512 rows g32", True)
    assert product.flops == 2 * 512 * 40 * 96
    assert product.bytes == 2 * 512 * 96 + 40 * 48 + 4 * 40 * 3 + 2 * 512 * 40
    rounded = launch(x, meta(512, 96, dtype=torch.int8), meta(512, dtype=torch.float32))
    assert gpu_triton.work(rounded, "w8a8 512 rows", True).flops == 2 * 512 * 96
    whole = launch(*rounded[1][1:], meta(40, 96, dtype=torch.int8), scale, out)
    assert gpu_triton.work(whole, "w8a8 512 rows", False).flops == 2 * 512 * 40 * 96


def test_rings_count_where_they_are_written():
    k, ring = meta(512, 8, 128), meta(8, 4096, 8, 128)
    positions = meta(512, dtype=torch.int64)
    work = gpu_triton.work(launch(k, k.clone(), ring, ring.clone(), positions), "write_kv packed", True)
    assert work.bytes == 4 * k.numel() * 2 + positions.numel() * 8 and work.flops == 0


def test_repeated_elements_and_tensors_count_once():
    row = meta(1, 64).expand(512, 64)
    assert gpu_triton.tensor_bytes(row) == 128
    x = meta(4, 4)
    assert gpu_triton.tensors(launch(x, x)) == [x]


def test_an_unknown_kernel_gets_no_work():
    assert gpu_triton.work(launch(meta(4, 4)), "something new", True) is None


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("LDG.E.128.CONSTANT", "LDG.128"),
        ("LDG.E.U16", "LDG.16"),
        ("STG.E", "STG.32"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS.128"),
        ("HMMA.16816.F32.BF16", "HMMA"),
        ("LDSM.16.M88.4", "LDSM"),
        ("LDL.64", "LDL"),
        ("FADD", "other"),
    ],
)
def test_instructions_are_told_apart(opcode, name):
    assert gpu_cuda.classify(opcode) == name


def test_work_of_the_hopper_kernels():
    """The gradients of B2 S8192 H32 D128 in a window of 4096 are five products of the visible pairs."""
    pairs = 2 * 32 * visible_pairs(8192, 4096)
    forward, gradient = (
        gpu_cuda.hopper_work(f"hopper_{name}>") for name in ("forward_kernel<half, 128, 2", "gradient_kernel<half, 128")
    )
    assert forward["work"]["flops"] == 4 * 128 * pairs and gradient["work"]["flops"] == 10 * 128 * pairs
    q, kv = 2 * 8192 * 32 * 128, 2 * 8192 * 8 * 128
    assert forward["work"]["bytes"] == 2 * (2 * q + 2 * kv) + 4 * 2 * 8192 * 32
    decode = gpu_cuda.hopper_work("hopper_forward_kernel<__nv_bfloat16, 64, 1>")
    assert decode["work"]["bytes"] == pytest.approx(2 * 2 * 64 * 4096 * 8 * 64, rel=0.01) and decode["warps"] == 8
    assert gpu_cuda.hopper_work("attention_kernel<__half, 128, true>") == {}


def test_work_of_linear_layers_on_codes_in_cuda():
    k, n, bf16 = 4096, 14336, "__nv_bfloat16"
    one = gpu_cuda.quant_work(f"quant_few_kernel<{bf16}, (QuantKind)2, 1>")
    assert one["work"] == dict(bytes=k * n // 2 + 2 * 4 * n * k // 128 + 2 * (k + n), flops=2 * k * n)
    assert one["shape"] == f"int4 offsets M1 N{n} K{k}" and one["warps"] == 4
    many = gpu_cuda.quant_work("quant_tile_kernel_f32<(QuantKind)0>")
    assert many["work"] == dict(bytes=k * n + 4 * n + 4 * 4096 * (k + n), flops=2 * 4096 * k * n)
    int8 = gpu_cuda.quant_work("quant_int8_tile_kernel<16>")
    assert int8["shape"].startswith("w8a8 M16 ") and int8["work"]["bytes"] == k * n + 4 * n + 16 * (k + 2 * n)
    rounding = gpu_cuda.quant_work(f"quant_round_kernel<{bf16}>")
    assert rounding["warps"] == 8 and rounding["work"]["bytes"] == 4096 * (3 * k + 4)
    assert gpu_cuda.quant_work("norm_kernel<float, 4>") == {}


def test_sections():
    import re

    text = "x\narch = sm_80\nab\narch = sm_90\ncd"
    assert gpu_cuda._sections(text, gpu_cuda._ARCH) == [("80", "\nab\n"), ("90", "\ncd")]
    assert gpu_cuda._sections("nothing", re.compile("(arch)")) == []


def test_every_spec_of_the_tests_has_work():
    """A kernel that joins the tests must join the rules, or the table would have a hole."""
    pytest.importorskip("triton")
    code = """
import json
from bench import gpu_triton
missing = []
for module in gpu_triton.spec_modules():
    specs = gpu_triton._specs(module, True, "")
    missing += [n for (n, _), w in gpu_triton._works(specs, 90).items() if w is None or not w.bytes > 0]
print(json.dumps(missing))
"""
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


# Reading the library again would take most of a minute.
WITH_WHAT_WAS_READ = """
import json, pathlib, sys
from bench import cli, gpu_cuda
rows = json.loads(pathlib.Path(sys.argv[1]).read_text()) if sys.argv[1] != "None" else []
gpu_cuda.kernels = lambda library, wanted: [row for row in rows if wanted(row["capability"])]
sys.exit(cli.main(sys.argv[2:]))
"""


def test_the_report_of_one_kernel(tmp_path, cuda_machine_code_file):
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton has no cuobjdump")
    out = tmp_path / "gpu.json"
    command = ["gpu-report", "--sm", "90", "--only", "swiglu 14336", "--json", str(out)]
    done = _python("-c", WITH_WHAT_WAS_READ, str(cuda_machine_code_file), *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert gpu_report.NOTE in done.stdout
    from bench import report

    kernels = [k for k in report.read_json(out)["kernels"] if k["source"] == "Triton"]
    (kernel,) = [k for k in kernels if k["spec"] == "swiglu 14336"]
    assert kernel["work"]["bytes"] == pytest.approx(3 * 2 * 512 * 14336, rel=1e-5)
    assert kernel["registers"] > 0 and kernel["occupancy"] > 0 and gpu_report.wide(kernel["count"]) >= 3
    assert kernel["roofline"]["H100"] == pytest.approx(kernel["work"]["bytes"] / 3.35e12, rel=1e-4)


def test_the_interpreter_is_refused():
    done = _python("-m", "bench", "gpu-report", TRITON_INTERPRET="1")
    assert done.returncode and "TRITON_INTERPRET" in done.stderr


def _python(*arguments, **env):
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**base, "PYTHONPATH": path, **env}, capture_output=True, text=True
    )
