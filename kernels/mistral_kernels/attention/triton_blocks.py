"""What the Triton attention kernels share: tiles of keys and values, the online softmax, and their launch."""

import contextvars
import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointers, live, columns, D: tl.constexpr, DP: tl.constexpr, EVEN: tl.constexpr):
    """A `[rows, DP]` tile: masked by `live` rows unless EVEN, and by column only where D is padded."""
    if EVEN:
        if D == DP:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        if D == DP:
            tile = tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=live[:, None] & (columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def load_keys(
    pointer,
    descriptor,
    start,
    end,
    stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows start..start+BN of one head's keys or values; those from `end` on are 0, unless EVEN says there are none."""
    if TMA:
        tile = descriptor.load([start, 0])
    else:
        rows = tl.arange(0, BN)
        columns = tl.arange(0, DP)
        pointers = pointer + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
        tile = load_rows(pointers, start + rows < end, columns, D, DP, EVEN)
    return tile


@triton.jit
def product(q, k):
    """q kᵀ in float32; float32 inputs are multiplied in full precision, never in TF32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def accumulate(acc, p, v, decay):
    """acc · decay + p v, with p rounded to the dtype of v.

    The decay comes before the product: behind it, Triton would wait for the product at once.
    """
    return tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")


@triton.jit
def softmax_step(scores, highest, m, den, scale2, MASKED: tl.constexpr):
    """One step of the online softmax in base 2: probabilities, decay of what was summed before, new maximum, new sum.

    highest: of each row of scores. MASKED says that a row may have seen no key yet; its maximum −inf must not meet
    itself in a difference.
    """
    new_m = tl.maximum(m, highest * scale2)
    if MASKED:
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
    else:
        base = new_m
    p = tl.math.exp2(scores * scale2 - base[:, None])
    decay = tl.math.exp2(m - base)
    return p, decay, new_m, den * decay + tl.sum(p, 1)


@triton.jit
def normalise(acc, den):
    """acc / den by one exactly rounded reciprocal a row; 0 where no key was seen."""
    return acc * tl.div_rn(1.0, tl.where(den == 0.0, 1.0, den))[:, None]


@triton.jit
def log_sum(top, m, den, scale, scale2):
    """The natural logarithm of the softmax's denominator; −inf where no key was seen.

    It starts from `top`, the largest score unscaled, and adds what the rounding of m took away: from m alone, the
    roundings of scale2, m and ln 2 would add up to more than the rest of the error.
    """
    dead = den == 0.0
    top = tl.where(dead, 0.0, top)
    rounded = tl.fma(top, -scale2, tl.where(dead, 0.0, m))
    return tl.where(dead, float("-inf"), top * scale + (rounded * LN2 + tl.log(tl.where(dead, 1.0, den))))


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of rows × keys, warps, pipeline stages; keys by TMA descriptors; PV one block late (sm_90)."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    lag: bool = False


def family(device: torch.device) -> int:
    """80, 86, 90 or 100: the kind of tensor core and how much shared memory. A CPU (interpreter) counts as 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) in ((8, 0), (8, 7)) else 86


def padded(dim: int) -> int:
    """The power of two that a head of `dim` is padded to in registers."""
    return max(16, triton.next_power_of_2(dim))


def readable(t: torch.Tensor) -> torch.Tensor:
    """`t` itself where a kernel reads it in place: last stride 1, and offsets within a tile below 2³¹."""
    in_place = t.shape[-1] == 1 or t.stride(-1) == 1
    return t if in_place and max(t.stride()) < 2**23 else t.contiguous()


def describable(*tensors: torch.Tensor) -> bool:
    """Whether TMA can read them: base and row strides multiples of 16 bytes, rows not repeated."""
    return all(
        t.data_ptr() % 16 == 0 and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0: the kernels take the maximum before they scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def launch(kernel: Any, programs: int, config: Config, *args: Any, **constants: Any) -> None:
    """Runs a kernel on a 1-D grid; FMA contraction is asked for, since newer Triton leaves it out by default."""

    def run() -> None:
        if config.tma:
            triton.set_allocator(_scratch)
        kernel[(programs,)](*args, **constants, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)

    # In a context of its own, so that the allocator an application has set stays set.
    contextvars.copy_context().run(run) if config.tma else run()


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Descriptors' memory from torch's own allocator: ordered by stream, and allowed inside CUDA graphs."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
