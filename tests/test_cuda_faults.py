"""Faults put into the project's own CUDA kernels, one instruction at a time: each must be found, or show in the result.

Nothing is compiled for a fault: the emulator lets the instruction of one line go wrong.
"""

import re

import pytest
import torch
from ptx_on_cpu import launches, planted
from ptx_on_cpu.program import entry

import mistral_kernels as mk

pytestmark = [
    pytest.mark.usefixtures("cuda_ops", "one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the emulator"),
]


def attention(queries, keys, window):
    torch.manual_seed(0)
    q = torch.randn(1, queries, 2, 64).bfloat16().requires_grad_()
    k, v = (torch.randn(1, keys, 1, 64).bfloat16().requires_grad_() for _ in "kv")

    def run():
        out = mk.attention(q, k, v, window=window, impl="cuda")
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return run


# Many tiles; query tiles that see no key; key tiles that no query sees.
CASES = [attention(200, 200, 96), attention(200, 64, None), attention(64, 200, 16)]
SYNCHRONISATION = [
    (r"^bar\.sync", "skip"),
    (r"^cp\.async\.wait_(group|all)", "skip"),
    (r"^cp\.async\.commit_group", "skip"),
]
ARITHMETIC = [(r"^mma\.", "swap")]


def kernels(run):
    with launches() as seen:
        results = run()
    return results, dict.fromkeys(launch.kernel for launch in seen)


def sites(kernel, pattern):
    return [s for s in entry(kernel).statements if s.kind == "code" and re.search(pattern, s.text)]


def outcome(run, right, site, fault):
    """What tells that the instruction at `site` went wrong: the finding, "another result", or nothing."""
    with planted(site, fault):
        try:
            results = run()
        except RuntimeError as finding:
            return str(finding)
    same = all(torch.equal(a, b) for a, b in zip(results, right, strict=True))
    return "" if same else "another result"


@pytest.mark.parametrize("pattern, fault", SYNCHRONISATION)
def test_synchronisation_is_needed_and_its_lack_is_found(pattern, fault):
    runs = [(run, *kernels(run)) for run in CASES]
    places = dict.fromkeys(
        (kernel, s.site, s.text) for _, _, used in runs for kernel in used for s in sites(kernel, pattern)
    )
    assert len(places) >= 5
    for kernel, site, text in places:
        said = next((o for run, right, used in runs if kernel in used and (o := outcome(run, right, site, fault))), "")
        assert re.search(r"(race|waited|waiting|uninitialised).* at \w+\.cuh?:\d+", said), (
            f"{text} in {kernel}: {said!r}"
        )


@pytest.mark.parametrize("pattern, fault", ARITHMETIC)
def test_wrong_arithmetic_shows_in_the_result(pattern, fault):
    run = CASES[0]
    right, used = kernels(run)
    for kernel in used:
        places = sites(kernel, pattern)
        for s in places[:: max(1, len(places) // 3)]:
            assert outcome(run, right, s.site, fault), f"{s.text} in {kernel}"
