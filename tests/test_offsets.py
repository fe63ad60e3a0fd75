"""Offsets of more than 2³¹ elements: views of memory that is reserved and, but for its few rows, never touched."""

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels.testing import fill

STRIDE = 2**30 + 16


def far_rows(seed: int) -> torch.Tensor:
    """Three rows whose last lies 2³¹ + 32 elements behind the first."""
    try:
        x = torch.empty(2 * STRIDE + 24, dtype=torch.float16).as_strided((3, 24), (STRIDE, 1))
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
    return x.copy_(fill((3, 24), seed=seed))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_rows_far_apart(impl):
    if mk.backends()[impl] is not None:
        pytest.skip(mk.backends()[impl])
    x = far_rows(0)
    near, weight = x.contiguous(), fill((24,), seed=1).half()
    torch.testing.assert_close(mk.rms_norm(x, weight, impl=impl), mk.rms_norm(near, weight, impl=impl), rtol=0, atol=0)
    torch.testing.assert_close(mk.swiglu_packed(x, impl=impl), mk.swiglu_packed(near, impl=impl), rtol=0, atol=0)
