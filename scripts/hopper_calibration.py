"""What hardware of compute capability 9.0 says to the questions on which the emulator of tests/ptx_on_cpu assumes
something: each function is one, and yields what it found.

They run scripts/hopper_calibration.cu and the emulator's own fixtures, on a GPU or in the emulator.
"""

import contextlib
import ctypes
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/ptx_on_cpu/fixtures"
Answers = Iterator[dict[str, Any]]
BF16 = torch.bfloat16


class Machine:
    """Compiles a source and calls its functions with tensors; in the emulator where there is no GPU."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.libraries: dict[str, Any] = {}

    def tensor(self, t: torch.Tensor) -> torch.Tensor:
        if self.gpu:
            return t.cuda()
        from ptx_on_cpu import guarded

        return guarded(t)

    def program(self, source: Path) -> Any:
        if source.name not in self.libraries:
            self.libraries[source.name] = self._compile(source)
        return self.libraries[source.name]

    def _compile(self, source: Path) -> Any:
        if not self.gpu:
            from ptx_on_cpu import Program

            return Program(source.stem, [source], [FIXTURES], arch="90a")
        from ptx_on_cpu.build import nvcc

        out = Path(tempfile.mkdtemp()) / f"{source.stem}.so"
        command = [nvcc() or "nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared"]
        command += ["-gencode", "arch=compute_90a,code=sm_90a", f"-I{FIXTURES}", source, "-o", out]
        subprocess.run([str(part) for part in command], check=True)
        return ctypes.CDLL(str(out))

    def call(self, source: Path, function: str, *arguments: Any) -> None:
        """Raises RuntimeError where the launch or the kernel fails."""
        program = self.program(source)
        if not self.gpu:
            program.call(function, *arguments)
            return
        raw = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        if status := getattr(program, function)(*raw):
            raise RuntimeError(f"{function}: CUDA error {status}")
        torch.cuda.synchronize()


MINE, TILES, PIPELINE = ROOT / "scripts/hopper_calibration.cu", FIXTURES / "hopper.cu", FIXTURES / "pipeline.cu"


# ---- the rounding of a product


def largest_exponent(products: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Of the products, as the sum of their factors' exponents, and of c: where the addends are aligned."""
    return torch.maximum(products.amax(-1), torch.frexp(c)[1] - 1)


def aligned_sum(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, bits: int) -> torch.Tensor:
    """c + a b' with all addends cut to `bits` bits below the largest exponent, and the sum cut to float32.

    The model of arXiv 2512.07004 for tensor cores; float64 in, exact up to the cuts.
    """
    x, y = a[:, None, :], b[None, :, :]
    exponents = torch.frexp(x)[1] + torch.frexp(y)[1] - 2
    top = largest_exponent(exponents, c)
    unit = torch.ldexp(torch.ones_like(c), top - bits)
    total = torch.trunc(x * y / unit[..., None]).sum(-1) + torch.trunc(c / unit)
    return cut_to_float32(total * unit)


def cut_to_float32(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2**24), exponent - 24).float()


def fma_in_order(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The emulator's: float32 after each product, in the order of k."""
    total = c.float()
    for k in range(a.shape[1]):
        total = (total.double() + a[:, None, k] * b[None, :, k]).float()
    return total


def rounding(machine: Machine) -> Answers:
    """Of 40960 sums, how many bits differ from each model of the arithmetic."""
    generator = torch.Generator().manual_seed(0)
    models: dict[str, Callable] = {"float32 FMA in order of k": fma_in_order}
    models["exact, rounded once"] = lambda a, b, c: (a @ b.T + c).float()
    for bits in range(22, 28):
        models[f"cut to {bits} bits below the largest"] = lambda a, b, c, bits=bits: aligned_sum(a, b, c, bits)
    for half in (0, 1):
        dtype = torch.float16 if half else BF16
        wrong, count = dict.fromkeys(models, 0), 0
        for spread in (0, 1, 2, 4, 6):
            a, b = (torch.randn(64, 16, generator=generator) for _ in "ab")
            a = (a * torch.exp2(torch.randint(-spread, spread + 1, a.shape, generator=generator))).to(dtype)
            b, c = b.to(dtype), torch.randn(64, 64, generator=generator) * 2.0**spread
            out = machine.tensor(c.clone())
            machine.call(MINE, "calibrate_one_product", half, machine.tensor(a), machine.tensor(b), out)
            for name, model in models.items():
                wrong[name] += int((model(a.double(), b.double(), c.double()) != out.cpu()).sum())
            count += c.numel()
        yield {"dtype": str(dtype), "sums": count, "differ": wrong}


# ---- where copies put things, and where products look for them


def swizzled(address: torch.Tensor) -> torch.Tensor:
    return address ^ (address >> 7 & 7) << 4


def placed(b: torch.Tensor, columns: int, shift: int, absolute: bool, row: int) -> torch.Tensor:
    """Shared memory after a box of `columns` of b came to `shift`, in rows of `row` bytes; -1 where nothing came."""
    image = torch.full((8192,), -1, dtype=torch.int16)
    words = b[:, :columns].contiguous().view(torch.int16)
    at = torch.arange(64)[:, None] * row + torch.arange(columns)[None, :] * 2
    at = swizzled(at + shift) if absolute else swizzled(at) + shift
    image[at // 2] = words
    return image


def shifted(machine: Machine, a: torch.Tensor, b: torch.Tensor, *how: int) -> tuple[torch.Tensor, torch.Tensor]:
    c, image = machine.tensor(torch.zeros(64, 64)), machine.tensor(torch.zeros(4096, dtype=torch.int32))
    machine.call(MINE, "calibrate_shifted", machine.tensor(a), machine.tensor(b), *how, c, image)
    return c.cpu(), image.cpu().view(torch.int16)


def small_integers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = (torch.randint(-4, 5, (64, 64)).to(BF16) for _ in "ab")
    return a, b, a.float() @ b.float().T


def base_offset(machine: Machine) -> Answers:
    """A tile that starts inside a swizzle pattern: which pattern a copy writes, and with which base offset a product
    reads it."""
    a, b, want = small_integers()
    for rows in range(8):
        shift = rows * 128
        images = {}
        for field in sorted({0, rows, (8 - rows) % 8}):
            c, image = shifted(machine, a, b, 64, shift, field)
            right = torch.equal(c, want)
            for name, absolute in (("absolute", True), ("relative", False)):
                images[name] = torch.equal(image, placed(b, 64, shift, absolute, 128))
            yield {"rows into the pattern": rows, "base offset": field, "right": right, "copy is": images}


def narrow_box(machine: Machine) -> Answers:
    """A box narrower than its swizzle: where its rows go."""
    a, b, _ = small_integers()
    for columns in (8, 16, 32):
        _, image = shifted(machine, a, b, columns, 0, 0)
        rows = {row: torch.equal(image, placed(b, columns, 0, True, row)) for row in (2 * columns, 128)}
        yield {"columns": columns, "rows of so many bytes": rows, "written": int((image != -1).sum())}


def early_copy(machine: Machine) -> Answers:
    """A copy that lands before its bytes are expected."""
    x, said = torch.arange(1024, dtype=torch.int32) + 5, torch.zeros(3, dtype=torch.int32)
    said = machine.tensor(said)
    machine.call(MINE, "calibrate_early_copy", machine.tensor(x), 4096, said)
    before, after, first = said.tolist()
    yield {"phase over before the arrival": before, "after": after, "came": first == 5}


# ---- the fixtures


def tiles(machine: Machine) -> Answers:
    """Every swizzle, major order and type, exact on small integers; and what is a fault by a strict reading only."""
    shapes = [(h, row, ta, tb, 0, 0, 0) for h in (0, 1) for row in (128, 64, 32, 16) for ta in (0, 1) for tb in (0, 1)]
    special = [(0, 128, 0, 0, 1, 0, bug) for bug in (0, 41, 45)] + [(0, 128, 0, 0, 0, 1, bug) for bug in (0, 44)]
    for half, row, ta, tb, *how in shapes + special:
        torch.manual_seed(0)
        a, b = (machine.tensor(torch.randint(-4, 5, (64, 64)).to(torch.float16 if half else BF16)) for _ in "ab")
        want = (a.float().T if ta else a.float()) @ (b.float() if tb else b.float().T)
        c = machine.tensor(torch.zeros(64, 64))
        wrong = 0
        for _ in range(50 if machine.gpu else 1):
            machine.call(TILES, "fixture_tile", half, a, b, c, row, ta, tb, *how)
            wrong += not torch.equal(c, want)
        how_ = dict(zip(("by threads", "twice", "bug"), how, strict=True))
        yield {"half": half, "row": row, "transposed": [ta, tb], **how_, "wrong runs": wrong}


# Faults of fixtures/pipeline.cu that end: none; no fence after mbarrier.init; no proxy fence before the store; one in
# the storing thread; no wait for the store; a tile reused without a barrier; what one lane waits for or releases.
STRESSED = (0, 12, 2, 34, 20, 19, 41, 37, 42, 30, 21, 60)


def stress(machine: Machine) -> Answers:
    """Pipelines with a fault that only contested rules forbid, many times over: a wrong result refutes, a right one
    proves nothing."""
    B, S, H = (4, 2048, 16) if machine.gpu else (1, 128, 1)
    torch.manual_seed(0)
    q, k, v = (machine.tensor(torch.randn(B, S, H, 128).to(BF16)) for _ in "qkv")
    for bug, times in itertools.product(STRESSED, (100 if machine.gpu else 1,)):
        wrong = 0
        for _ in range(times):
            out = machine.tensor(torch.zeros(B, S, H, 128, dtype=BF16))
            machine.call(PIPELINE, "fixture_pipeline", q, k, v, out, B, S, S, H, H, ctypes.c_float(0.0625), bug)
            if bug == 0 and _ == 0:
                right = out.clone()
            wrong += not torch.equal(out, right)
        yield {"bug": bug, "runs": times, "wrong runs": wrong}


def registers(machine: Machine) -> Answers:
    """setmaxnreg for more registers than there are: expected to hang."""
    q, k, v, out = (machine.tensor(torch.zeros(1, 128, 1, 128, dtype=BF16)) for _ in range(4))
    machine.call(PIPELINE, "fixture_pipeline", q, k, v, out, 1, 128, 128, 1, 1, ctypes.c_float(1.0), 26)
    yield {"hung": False}


QUESTIONS: dict[str, Callable[[Machine], Answers]] = {
    f.__name__: f for f in (rounding, tiles, stress, early_copy, base_offset, narrow_box, registers)
}


def ask(question: str) -> Answers:
    sys.path.insert(0, str(ROOT / "tests"))
    machine = Machine()
    if machine.gpu:
        yield from QUESTIONS[question](machine)
        return
    from ptx_on_cpu import option

    with contextlib.ExitStack() as stack:
        stack.enter_context(option("capability", 90))
        for name in ("strict_warpgroup", "strict_fence", "init_fence", "war_fence", "check"):
            stack.enter_context(option(name, 0))
        yield from QUESTIONS[question](machine)
