"""The memory of large outputs on a CPU: the pool that keeps it, and torch's own where that is off."""

import copy
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

import mistral_kernels as mk
from mistral_kernels import testing
from mistral_kernels._outputs import held

pytestmark = pytest.mark.skipif(not testing.isa_tiers(), reason="the C++ kernels are not built")

MB = 1 << 20
UNTIL_TOLD = 512 * MB
GATE = testing.fill((1024, 1024)).float()  # 4 MB


@pytest.fixture(autouse=True)
def empty_pool():
    mk.output_pool(0)
    yield
    mk.output_pool(UNTIL_TOLD)


@pytest.fixture
def pool(empty_pool):
    mk.output_pool(64 * MB)


def result(rows=1024):
    return mk.swiglu(GATE[:rows], GATE[:rows], impl="cpu")


def test_on_until_told_otherwise():
    code = f"""
import torch
import mistral_kernels as mk
from mistral_kernels._outputs import held
x = torch.ones(1024, 1024)
del (outputs := [mk.swiglu(x, x, impl="cpu") for _ in range(140)])[:135]
assert held() == {UNTIL_TOLD}, held()
mk.output_pool(0)
assert held() == 0 and mk.swiglu(x, x, impl="cpu").untyped_storage().resizable()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_off_outputs_are_ordinary():
    out = result()
    address = out.data_ptr()
    assert held() == 0 and out.untyped_storage().resizable()
    out.resize_(2048, 1024)
    out.untyped_storage().resize_(0)
    del out
    assert held() == 0 and address


def test_freed_memory_is_used_again(pool):
    out = result()
    address, expected = out.data_ptr(), out.clone()
    assert not out.untyped_storage().resizable() and held() == 0
    del out
    assert held() == 4 * MB
    again = result()
    assert again.data_ptr() == address and held() == 0 and torch.equal(again, expected)


@pytest.mark.parametrize("call", [mk.swiglu, torch.ops.mistral_kernels.swiglu], ids=["function", "op"])
def test_every_way_to_call_takes_from_the_pool(pool, call):
    address = call(GATE, GATE).data_ptr()
    assert held() == 4 * MB and call(GATE, GATE).data_ptr() == address
    mk.output_pool(0)
    assert call(GATE, GATE).untyped_storage().resizable()


def test_small_outputs_take_none(pool):
    out = result(rows=64)
    assert out.untyped_storage().resizable()
    del out
    assert held() == 0


def test_outputs_in_use_are_left_alone(pool):
    expected = GATE * torch.nn.functional.silu(GATE)
    first = result()
    view = first[3:5]
    del first
    others = [mk.swiglu(GATE, -GATE, impl="cpu") for _ in range(3)]
    torch.testing.assert_close(view, expected[3:5])
    assert len({t.data_ptr() for t in others}) == 3
    del view
    assert held() == 4 * MB


def test_at_most_the_limit_is_held():
    mk.output_pool(8 * MB)
    outputs = [result() for _ in range(4)]
    addresses = [t.data_ptr() for t in outputs]
    expected = outputs[3].clone()
    for i in range(3):
        outputs[i] = None
    assert held() == 8 * MB
    kept = [result(), result()]
    assert {t.data_ptr() for t in kept} == set(addresses[1:3])  # the one given back first was freed
    mk.output_pool(0)
    assert held() == 0 and torch.equal(outputs[3], expected)
    del outputs, kept
    assert held() == 0


def test_a_limit_below_the_output(pool):
    mk.output_pool(MB)
    assert result().untyped_storage().resizable() and held() == 0


def test_a_much_larger_block_is_not_taken(pool):
    del (out := [result()])[:]
    assert held() == 4 * MB and len(out) == 0
    smaller = result(rows=512)
    assert held() == 4 * MB and not smaller.untyped_storage().resizable()


def test_gradients(pool):
    def gradients():
        gate, up = GATE.clone().requires_grad_(), GATE.flip(0).requires_grad_()
        return torch.autograd.grad(mk.swiglu(gate, up, impl="cpu").square().sum(), (gate, up))

    pooled = [gradients() for _ in range(3)]
    mk.output_pool(0)
    plain = gradients()
    assert all(torch.equal(a, b) for run in pooled for a, b in zip(run, plain, strict=True))


def test_pooled_tensors_do_what_those_from_numpy_do(pool):
    expected = result().clone()
    out = result()
    stored = io.BytesIO()
    torch.save(out, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored), expected) and torch.equal(copy.deepcopy(out), expected)
    assert out.resize_(512, 1024).shape == (512, 1024) and torch.equal(out, expected[:512])
    with pytest.raises(RuntimeError, match="not resizable"):
        out.untyped_storage().resize_(0)
    other = torch.empty(0)
    other.set_(out)
    del out
    assert held() == 0 and torch.equal(other, expected[:512])  # the block is in use as long as one tensor has it
    assert torch.equal(other.share_memory_(), expected[:512])
    assert held() == 4 * MB  # the values moved to shared memory


def test_threads_give_back_and_take(pool):
    expected = result().clone()
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(result(), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < held() <= 4 * 4 * MB
    address = result().data_ptr()
    giver = [result()]
    assert giver[0].data_ptr() == address
    other = threading.Thread(target=giver.clear)
    other.start()
    other.join()
    assert result().data_ptr() == address


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_finds_the_pool_unlocked(pool):
    stop = threading.Event()

    def work():
        while not stop.is_set():
            torch.ops.mistral_kernels.swiglu(GATE[:512], GATE[:512])

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has none of the threads that a parallel kernel waits for
    busy = threading.Thread(target=work)
    busy.start()
    try:
        for _ in range(10):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                mk.output_pool(0)
                os._exit(0 if held() == 0 else 3)
            end = time.monotonic() + 20
            while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(1e-3)
            if done == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert done == (child, 0)
    finally:
        stop.set()
        busy.join()
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit", [-1, 1.5, True, None, 2**63])
def test_limits_that_are_none(limit):
    with pytest.raises(ValueError, match=r"limit is .* must be a number of bytes"):
        mk.output_pool(limit)
