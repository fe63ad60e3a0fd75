"""What quick_interpreter.py leaves out of Triton's interpreter must not show."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mistral_kernels._dispatch import triton_interpreted

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="kernels run on the GPU here, not in the interpreter")


@triton.jit
def twice(x, WHAT: tl.constexpr):
    if WHAT == "add":
        return x + x
    if WHAT == "sub":
        return -x - x
    return x * x


@triton.jit
def kernel(x_ptr, y_ptr, WHAT: tl.constexpr):
    at = tl.arange(0, 4)
    tl.store(y_ptr + at, twice(tl.load(x_ptr + at), WHAT))


@triton.jit
def summed(x_ptr, y_ptr):
    tl.store(y_ptr, tl.sum(twice(tl.load(x_ptr + tl.arange(0, 4)), "add"), 0) / 2)


def run(values, dtype, what):
    x = torch.tensor(values, dtype=dtype)
    y = torch.empty_like(x)
    kernel[(1,)](x, y, what)
    return y.tolist()


@pytest.mark.parametrize("what", ["add", "sub", "mul"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_wrap_around(dtype, what):
    """As on a GPU, and as without the change."""
    info = torch.iinfo(dtype)
    values = [1, -3, info.max, info.min + 1]
    x = torch.tensor(values, dtype=dtype)
    assert run(values, dtype, what) == {"add": x + x, "sub": -x - x, "mul": x * x}[what].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bool], ids=str)
def test_types_are_told_apart(dtype):
    assert run([1, 0, 1, 1], dtype, "mul") == torch.tensor([1, 0, 1, 1], dtype=dtype).tolist()


def test_device_functions_of_other_modules_run():
    """`tl.sum` is one: its module knows the language by another name."""
    x, y = torch.arange(4.0), torch.empty(1)
    summed[(1,)](x, y)
    assert y.item() == 6


def test_the_language_is_as_it_was_after_a_launch():
    before = {name: getattr(tl, name) for name in ("load", "range", "static_assert", "arange")}
    run([1, 2, 3, 4], torch.int32, "add")
    assert all(getattr(tl, name) is member for name, member in before.items())
