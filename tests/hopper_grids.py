"""Cases for the attention kernels of compute capability 9.0, for their tests and for a GPU (scripts/gpu_hopper.py)."""

from collections.abc import Iterator

from mistral_kernels.testing import Case, attention_case, cached_case, packed_attention_case


def forward(dim: int) -> Iterator[Case]:
    """Tails, one tile, one block, several turns of the buffers, windows inside and over a block, all group sizes."""
    yield attention_case(1, 1, 1, 2, 1, dim)
    yield attention_case(1, 64, 64, 1, 1, dim)
    yield attention_case(1, 128, 128, 2, 2, dim)
    yield attention_case(1, 129, 129, 4, 1, dim, window=128)
    yield attention_case(2, 130, 130, 2, 1, dim, window=3)
    yield attention_case(1, 100, 333, 7, 1, dim, window=77)
    yield attention_case(1, 300, 90, 2, 1, dim)
    yield attention_case(1, 90, 300, 2, 2, dim, causal=False)
    yield attention_case(1, 70, 1100, 1, 1, dim)
    yield attention_case(1, 33, 200, 8, 1, dim, window=150)
    yield attention_case(2, 5, 300, 7, 1, dim)
    yield attention_case(2, 1, 600, 8, 2, dim)
    yield packed_attention_case([(5, 5), (0, 0), (70, 70), (1, 1)], 4, 2, dim, window=32)
    yield packed_attention_case([(3, 60), (0, 4), (4, 0), (33, 33)], 8, 1, dim)
    yield packed_attention_case([(140, 140), (0, 0), (129, 200), (1, 300)], 2, 1, dim, window=100)
    yield cached_case([1, 1, 1, 1], [1, 40, 64, 999], 64, 6, 2, dim, window=64, chunk=False)
    yield cached_case([1, 1], [700, 90], 1024, 4, 1, dim, window=700, chunk=False)
    yield cached_case([3, 3], [3, 90], 64, 4, 2, dim, window=60, chunk=False)
    yield cached_case([16, 5, 1, 0, 33], [0, 3, 77, 4, 16], 16, 7, 1, dim, window=16)
    yield cached_case([100, 3], [130, 1000], 300, 2, 1, dim, window=290)


def backward(dim: int) -> Iterator[Case]:
    """Tails, one tile, several blocks of keys in turn, windows inside and over a block, all group sizes."""
    yield attention_case(1, 2, 2, 2, 1, dim)
    yield attention_case(1, 64, 128, 1, 1, dim)
    yield attention_case(1, 130, 130, 4, 1, dim)
    yield attention_case(2, 129, 129, 2, 2, dim, window=3)
    yield attention_case(1, 300, 300, 2, 1, dim, window=77)
    yield attention_case(1, 70, 300, 7, 1, dim, window=200)
    yield attention_case(1, 300, 70, 2, 2, dim)
    yield attention_case(1, 90, 270, 8, 1, dim, causal=False)
    yield attention_case(1, 450, 450, 1, 1, dim, window=200)
    yield packed_attention_case([(5, 5), (0, 0), (70, 70), (1, 1)], 4, 2, dim, window=32)
    yield packed_attention_case([(3, 60), (0, 4), (4, 0), (33, 33)], 2, 2, dim)
    yield packed_attention_case([(140, 140), (0, 0), (129, 200), (64, 300)], 2, 1, dim, window=100)


def large() -> Iterator[Case]:
    """More blocks than a GPU runs at once, and gradients that wait for each other's turn; too long for an emulator."""
    for dim in (64, 128):
        yield attention_case(2, 2048, 2048, 8, 2, dim)
        yield attention_case(1, 3000, 3000, 8, 8, dim, window=700)
        yield attention_case(1, 1500, 2500, 4, 1, dim, causal=False)
        yield packed_attention_case([(1000, 1000), (17, 17), (1500, 1500), (0, 0), (600, 900)], 8, 2, dim, window=512)
