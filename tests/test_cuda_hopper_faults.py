"""Faults put into the attention kernels for compute capability 9.0, one instruction at a time: each must be found.

Nothing is compiled for a fault: the emulator leaves one instruction out. The readings of contested rules are strict.
"""

import functools
import itertools
import re
from collections import Counter

import pytest
import torch
from ptx_on_cpu import launches, option, planted
from ptx_on_cpu.program import entry

import mistral_kernels as mk

pytestmark = [
    pytest.mark.usefixtures("cuda_ops", "one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the emulator"),
]


@pytest.fixture(autouse=True)
def hopper():
    with option("capability", 90):
        yield


def tensors(queries, keys, heads, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(1, queries, heads, 64).bfloat16()
    return q, *(torch.randn(1, keys, kv_heads, 64).bfloat16() for _ in "kv")


def dense(queries, keys, heads, kv_heads):
    q, k, v = tensors(queries, keys, heads, kv_heads)
    return lambda: (mk.attention(q, k, v, impl="cuda"),)


def packed(lengths, heads, leaves=False):
    """Sequences of (queries, keys), all over one key head; behind the last key of each threads clear rows."""
    queries, keys = ([n[i] for n in lengths] for i in (0, 1))
    tokens = [t[0].requires_grad_(leaves) for t in tensors(sum(queries), sum(keys), heads, 1)]
    ends = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (queries, keys)]
    how = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=True))
    how |= dict(max_seqlen_q=max(queries), max_seqlen_k=max(keys))
    return tokens, lambda: (mk.attention(*tokens, **how, impl="cuda"),)


def gradients(lengths, heads):
    """Of a forward that has run before."""
    tokens, run = packed(lengths, heads, leaves=True)
    forward = functools.cache(run)
    return lambda: torch.autograd.grad(forward(), tokens, [torch.ones_like(forward()[0])], retain_graph=True)


# Many turns of the buffers, and several pieces of work a block; heads that share a tile; rows that are cleared.
FORWARD = [dense(300, 1400, 5, 1), dense(3, 3000, 21, 3), dense(12, 300, 7, 1)]
FORWARD += [packed([(150, 150), (130, 130), (300, 300), (20, 20)], 2)[1]]
FORWARD += [packed([(3, 700), (2, 130), (1, 20), (3, 600), (2, 60), (3, 300)] * 3, 7)[1]]
BACKWARD = [gradients([(530, 530), (128, 200), (20, 20), (20, 20)], 2)]


def kernels(cases, pattern):
    """(case, its results, the names of its kernels)"""
    found = []
    with option("capability", 90):
        for run in cases:
            with launches() as seen:
                right = run()
            found.append((run, right, {x.kernel for x in seen if re.search(pattern, x.kernel)}))
    return found


@pytest.fixture(scope="module")
def used():
    return kernels(FORWARD, "hopper_forward") + kernels(BACKWARD, "hopper_(statistics|gradient)")


def outcome(used, kernel, site):
    """What is said where an instruction is left out: a finding, "another result", "" or "never met"."""
    met = False
    for run, right, names in used:
        if kernel not in names:
            continue
        with planted(site, "skip", kernel) as times:
            try:
                results = run()
            except RuntimeError as finding:
                return str(finding)
            met |= times() > 0
        if not all(torch.equal(a, b) for a, b in zip(results, right, strict=True)):
            return "another result"
    return "" if met else "never met"


INSTRUCTIONS = {
    r"^mbarrier\.init": "where none is initialised",
    r"^fence\.mbarrier_init": "no fence.mbarrier_init",
    r"^fence\.proxy": "no fence.proxy.async",
    r"^mbarrier\.try_wait": "bulk copy is still writing|race|beyond its count|uninitialised",
    r"^mbarrier\.arrive": "deadlock|bytes due",
    r"^cp\.async\.bulk\.(tensor|shared)": "deadlock|race|uninitialised",
    r"^cp\.reduce\.async\.bulk|^cp\.async\.bulk\.(commit|wait)": "race|ends before its bulk copy|another result",
    r"^bar\.(sync|arrive)": "race|deadlock|arrivals left|block ends with|synchronisation",
    r"^bar\.warp\.sync": "race",
    r"^wgmma\.fence": "wgmma.fence",
    r"^wgmma\.(commit|wait)": "sums before|under way|race",
    r"^setmaxnreg": "registers free",
}
# What nothing tells of, and why that is right. Registers in use are not counted: the assembler sees to them.
SILENT = {
    # The fence before the scores is behind the last access of the other sums too.
    "hopper_forward_kernel": {"wgmma.fence": 1, "setmaxnreg.inc": 1},
    # No row of 64 is ever left free.
    "hopper_statistics_kernel": {"fence.proxy": 1, "setmaxnreg.inc": 1},
    # The next commit takes the batch along; that fence is the assembler's wish; the proxy fences and the second wait
    # order the adding up of different blocks, which run one after the other here.
    "hopper_gradient_kernel": {"wgmma.commit_group": 1, "wgmma.fence": 1, "fence.proxy": 2, "cp.async": 1}
    | {"setmaxnreg.inc": 1},
}


def silent(used, kernel):
    """Instructions whose absence nothing tells of; every other is found, and by the right finding."""
    found = Counter()
    for s in entry(kernel).statements:
        kinds = [kind for pattern, kind in INSTRUCTIONS.items() if s.kind == "code" and re.search(pattern, s.text)]
        if not kinds:
            continue
        said = outcome(used, kernel, s.site)
        if said in ("", "never met"):
            found[".".join(s.text.split()[0].split(".")[:2])] += 1
        else:
            assert re.search(kinds[0], said), f"{s.text}: {said}"
    return found


@pytest.mark.parametrize("family", SILENT)
def test_what_is_left_out_is_found(used, family):
    names = sorted({name for _, _, names in used for name in names if family in name})
    assert names
    for name in names:
        expected = Counter(SILENT[family])
        if "Li64ELi1E" in name:  # one warpgroup of consumers has registers enough
            del expected["setmaxnreg.inc"]
        assert silent(used, name) == expected, name
