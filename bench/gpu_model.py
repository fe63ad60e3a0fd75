"""What a kernel's registers, bytes and FLOPs allow on a GPU: a model, and no measurement.

Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Bandwidths
and dense tensor-core rates: NVIDIA's data sheets of the SXM cards (A100 80GB, H100, H200, B200).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Processor:
    """A multiprocessor: bytes of shared memory in all, and those that the system takes of each block."""

    shared: int
    reserved: int = 1024
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


@dataclasses.dataclass(frozen=True)
class Card:
    """Bytes a second of memory, FLOPs a second of bfloat16 tensor cores and of float32 without them."""

    name: str
    bandwidth: float
    tensor: float
    vector: float


PROCESSORS = {80: Processor(164 << 10), 90: Processor(228 << 10), 100: Processor(228 << 10)}
CARDS = {
    80: (Card("A100", 2.039e12, 312e12, 19.5e12),),
    90: (Card("H100", 3.35e12, 989e12, 67e12), Card("H200", 4.8e12, 989e12, 67e12)),
    100: (Card("B200", 8.0e12, 2250e12, 75e12),),
}
REGISTER_UNIT, SHARED_UNIT = 256, 128
TENSOR_CORES = ("HMMA", "HGMMA", "IMMA", "UTCMMA")


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Resident warps of a multiprocessor as a share of all it can hold.

    Args:
        registers: of a thread; a warp gets them in units of 256.
        shared: bytes of a block, static and dynamic.
        warps: of a block.
    """
    processor = PROCESSORS[capability]
    by_registers = processor.registers // _up(max(registers, 1) * 32, REGISTER_UNIT) // warps
    by_shared = processor.shared // _up(shared + processor.reserved, SHARED_UNIT)
    blocks = min(by_registers, by_shared, processor.warps // warps, processor.blocks)
    return blocks * warps / processor.warps


def roofline(card: Card, moved: float, flops: float, tensor_cores: bool) -> float:
    """Seconds that memory or arithmetic needs at least, whichever is longer."""
    return max(moved / card.bandwidth, flops / (card.tensor if tensor_cores else card.vector))


def uses_tensor_cores(count: dict[str, int]) -> bool:
    return any(count.get(name) for name in TENSOR_CORES)
