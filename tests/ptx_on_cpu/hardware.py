"""Rules for the instructions that set hardware going: mbarriers, bulk copies, wgmma, and what comes with them.

They are those of compute capability 9.0 within one block: clusters, multicast and im2col are unknown.
"""

import re

from .instructions import group, rule
from .ptx import UnknownPtx

SHARED = r"(\.(?P<space>shared)(::cta)?)?"
SCOPE = r"(\.(cta|cluster))?"
HINT = r"(?P<hint>\.L2::cache_hint)?"
MAP = re.compile(r"\[\s*([^\s,\]]+)\s*,\s*\{([^}]*)\}\s*\]")


def _barrier(b, m, operand: str) -> str:
    b.hardware = True
    return b.address(operand, m["space"] or "generic")


def _tensor(b, operand: str, rank: str) -> tuple[str, str]:
    """The tensor map of an operand, and the C++ of its coordinates as an array `q`."""
    match = MAP.fullmatch(operand.strip())
    if match is None or len(match[2].split(",")) != int(rank):
        raise UnknownPtx(f"unknown tensor coordinates {operand!r}")
    b.hardware = True
    at = ", ".join(b.v(x, "s32") for x in match[2].split(","))
    return f"(const void*){b.v(match[1], 'u64')}", f"const int q[] = {{{at}}};"


# ---- mbarriers


@rule(rf"mbarrier\.init{SHARED}\.b64")
def mbarrier_init(b, m, a):
    return f"emu::mbarrier_init({_barrier(b, m, a[0])}, {b.v(a[1], 's32')}, {b.site});"


@rule(rf"mbarrier\.inval{SHARED}\.b64")
def mbarrier_inval(b, m, a):
    return f"emu::mbarrier_inval({_barrier(b, m, a[0])}, {b.site});"


@rule(rf"mbarrier\.expect_tx(\.relaxed{SCOPE})?{SHARED}\.b64")
def mbarrier_expect(b, m, a):
    return f"emu::mbarrier_expect({_barrier(b, m, a[0])}, {b.v(a[1], 's32')}, false, {b.site});"


@rule(rf"mbarrier\.arrive(?P<tx>\.expect_tx)?(\.release{SCOPE})?{SHARED}\.b64")
def mbarrier_arrive(b, m, a):
    at = _barrier(b, m, a[1])
    if m["tx"]:
        call = f"emu::mbarrier_expect({at}, {b.v(a[2], 's32')}, true, {b.site})"
    else:
        call = f"emu::mbarrier_arrive({at}, {b.v(a[2], 's32') if len(a) > 2 else 1}, {b.site})"
    return f"{call};" if a[0] == "_" else b.put(a[0], call)


@rule(rf"mbarrier\.(?P<k>try|test)_wait(?P<parity>\.parity)?(\.acquire{SCOPE})?{SHARED}\.b64")
def mbarrier_wait(b, m, a):
    function, kind = ("mbarrier_parity", "u32") if m["parity"] else ("mbarrier_state", "u64")
    waits = "true" if m["k"] == "try" else "false"
    return b.put(a[0], f"emu::{function}({_barrier(b, m, a[1])}, {b.v(a[2], kind)}, {waits}, {b.site})")


@rule(r"fence\.proxy\.async(?P<space>\.global|\.shared::(cta|cluster))?")
def fence_proxy(b, m, a):
    b.hardware = True
    shared, of_global = (str(m["space"] is None or name in m["space"]).lower() for name in ("shared", "global"))
    return f"emu::fence_proxy({shared}, {of_global}, {b.site});"


@rule(r"fence\.mbarrier_init\.release\.cluster")
def fence_mbarrier_init(b, m, a):
    b.hardware = True
    return f"emu::fence_mbarrier_init({b.site});"


# ---- bulk copies

COMPLETES = r"\.mbarrier::complete_tx::bytes"
REDUCE = r"\.(?P<op>add|min|max)"


@rule(rf"cp\.async\.bulk\.tensor\.(?P<n>[1-5])d\.shared::(cta|cluster)\.global(\.tile)?{COMPLETES}{HINT}")
def tensor_load(b, m, a):
    tensor, at = _tensor(b, a[1], m["n"])
    to, barrier = b.address(a[0], "shared"), b.address(a[2], "shared")
    return f"{{ {at} emu::tensor_load({to}, {tensor}, {m['n']}, q, {barrier}, {b.site}); }}"


@rule(rf"cp(\.reduce)?\.async\.bulk\.tensor\.(?P<n>[1-5])d\.global\.shared::cta({REDUCE})?(\.tile)?\.bulk_group{HINT}")
def tensor_store(b, m, a):
    if bool(m["op"]) != (".reduce" in m[0]):
        raise UnknownPtx(f"unknown instruction: {m[0]}")
    tensor, at = _tensor(b, a[0], m["n"])
    op, start = f"emu::BulkOp::{m['op'] or 'store'}", b.address(a[1], "shared")
    return f"{{ {at} emu::tensor_store({op}, {tensor}, {m['n']}, q, {start}, {b.site}); }}"


@rule(rf"cp\.async\.bulk\.shared::(cta|cluster)\.global{COMPLETES}{HINT}")
def bulk_load(b, m, a):
    b.hardware = True
    to, start, barrier = b.address(a[0], "shared"), b.address(a[1], "global"), b.address(a[3], "shared")
    return f"emu::bulk_load({to}, {start}, {b.v(a[2], 'u32')}, {barrier}, {b.site});"


@rule(
    rf"cp(\.reduce)?\.async\.bulk\.global\.shared::cta\.bulk_group{HINT}"
    rf"({REDUCE}(\.noftz)?\.(?P<t>u32|s32|u64|f32|f64|f16|bf16))?"
)
def bulk_store(b, m, a):
    if bool(m["op"]) != (".reduce" in m[0]):
        raise UnknownPtx(f"unknown instruction: {m[0]}")
    b.hardware = True
    op, kind = f"emu::BulkOp::{m['op'] or 'store'}", f"emu::BulkType::{m['t'] or 'none'}"
    to, start = b.address(a[0], "global"), b.address(a[1], "shared")
    return f"emu::bulk_store({op}, {kind}, {to}, {start}, {b.v(a[2], 'u32')}, {b.site});"


@rule(r"cp\.async\.bulk\.commit_group")
def bulk_commit(b, m, a):
    return f"emu::bulk_commit({b.site});"


@rule(r"cp\.async\.bulk\.wait_group(?P<read>\.read)?")
def bulk_wait(b, m, a):
    return f"emu::bulk_wait({b.v(a[0], 's32')}, {'true' if m['read'] else 'false'}, {b.site});"


@rule(r"createpolicy\.fractional\.L2::evict_\w+(\.L2::evict_unchanged)?\.b64")
def cache_policy(b, m, a):
    return b.put(a[0], "0")


# ---- wgmma


@rule(r"wgmma\.(?P<k>fence|commit_group|wait_group)\.sync\.aligned")
def wgmma_order(b, m, a):
    b.hardware = True
    call = m["k"].removesuffix("_group")
    return f"emu::wgmma_{call}({b.v(a[0], 's32') + ', ' if a else ''}{b.site});"


@rule(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<e>bf16|f16)\.(?P=e)")
def wgmma(b, m, a):
    b.hardware = True
    sums, n, of_registers = group(a[0]), int(m["n"]), a[1].startswith("{")
    if len(sums) != n // 2 or len(a) != (7 if of_registers else 8):
        raise UnknownPtx(f"unknown operands of {m[0]}")
    left = group(a[1]) if of_registers else []
    numbers = ", ".join(map(str, b.wgmma_operands(sums, left)))
    fields = [f"emu::Element::{m['e']}", n, "operand", "touched", "at", str(bool(left)).lower()]
    fields += ["0" if left else b.v(a[1], "u64"), b.v(a[2], "u64"), b.v(a[3], "pred")]
    fields += [*(b.v(x, "s32") for x in a[4:6]), *(["0"] if left else []), *(b.v(x, "s32") for x in a[6:])]
    call = f"emu::wgmma({{{', '.join(map(str, fields))}}}, {b.site});"
    return f"{{ static const uint16_t at[] = {{{numbers}}}; {call} }}"


# ---- warps with parts to play


@rule(r"setmaxnreg\.(?P<k>inc|dec)\.sync\.aligned\.u32")
def setmaxnreg(b, m, a):
    return f"emu::setmaxnreg({b.v(a[0], 's32')}, {'true' if m['k'] == 'inc' else 'false'}, {b.site});"


@rule(r"elect\.sync")
def elect(b, m, a):
    lane, _, elected = a[0].partition("|")
    if lane.strip() != "_":
        raise UnknownPtx("unknown instruction: elect.sync with the number of the lane")
    return f"{{ const bool q = emu::elect({b.v(a[1], 'u32')}, {b.site}); {b.put(elected, 'q')} }}"
