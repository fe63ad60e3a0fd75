"""One rule for each form of a PTX instruction: a pattern for the whole opcode, and the C++ statement that does it.

Here are control, warps and memory; arithmetic.py and hardware.py have the others.

A pattern names every modifier that it knows, so an opcode with another one matches no rule and stops the translation.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .ptx import UnknownPtx

if TYPE_CHECKING:
    from .translate import Body

C_TYPE = {
    "pred": "bool",
    **{f"{k}{n}": f"uint{n}_t" for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
HALF = {"bf16": "emu::bf16", "f16": "emu::f16"}

Rule = Callable[["Body", re.Match, list[str]], str]
RULES: dict[str, list[tuple[re.Pattern, Rule]]] = {}


def rule(pattern: str) -> Callable[[Rule], Rule]:
    roots = re.match(r"\((?:\?:)?([\w|]+)\)|(\w+)", pattern)
    assert roots is not None

    def register(function: Rule) -> Rule:
        for root in (roots[1] or roots[2]).split("|"):
            RULES.setdefault(root, []).append((re.compile(pattern), function))
        return function

    return register


def emit(body: "Body", opcode: str, operands: list[str], text: str) -> str:
    for pattern, function in RULES.get(opcode.split(".")[0], ()):
        if match := pattern.fullmatch(opcode):
            return function(body, match, operands)
    raise UnknownPtx(f"unknown instruction: {text}")


def group(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


# ---- control, nothing, barriers


@rule(r"bra(\.uni)?")
def bra(b, m, a):
    return b.jump(a[0])


@rule(r"(ret|exit)(\.uni)?")
def leave(b, m, a):
    return "return;"


@rule(r"trap")
def trap(b, m, a):
    return f'emu::fail_at("trap", {b.site});'


@rule(r"(prefetch|prefetchu|discard|applypriority|nanosleep)(\.\w+|::\w+)*")
def nothing(b, m, a):
    return ";"


@rule(r"(membar|fence)(\.(sc|acq_rel|acquire|release))?\.(cta|cluster|gpu|gl|sys)")
def fence(b, m, a):
    return ";"


@rule(r"(bar|barrier)(\.cta)?\.(?P<k>sync|arrive)(\.aligned)?")
def barrier(b, m, a):
    count = b.v(a[1], "s32") if len(a) > 1 else "0"
    return f"emu::bar_{m['k']}({b.v(a[0], 's32')}, {count}, {b.site});"


@rule(r"bar\.warp\.sync")
def syncwarp(b, m, a):
    return f"emu::syncwarp({b.v(a[0], 'u32')}, {b.site});"


# ---- warps


@rule(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def shfl(b, m, a):
    target, _, inside = a[0].partition("|")
    call = f"emu::shfl(emu::Shfl::{m['mode']}, {', '.join(b.v(x, 'u32') for x in a[1:5])}, &in, {b.site})"
    return f"{{ bool in; uint32_t q = {call}; {b.put(target, 'q')} {b.put(inside, 'in') if inside else ''} }}"


@rule(r"vote\.sync\.(?P<k>all|any|uni|ballot)\.(pred|b32)")
def vote(b, m, a):
    ballot = f"uint32_t q = emu::ballot({b.v(a[1], 'pred')}, {b.v(a[2], 'u32')}, {b.site});"
    mask = f"({b.v(a[2], 'u32')})"
    value = {"ballot": "q", "any": "q != 0", "all": f"q == {mask}", "uni": f"q == 0 || q == {mask}"}[m["k"]]
    return f"{{ {ballot} {b.put(a[0], value)} }}"


@rule(r"redux\.sync\.(?P<k>add|min|max|and|or|xor)\.(?P<t>[bus])32")
def redux(b, m, a):
    what = m["k"] + ("_" if m["k"] in ("and", "or", "xor") else "")
    signed = "true" if m["t"] == "s" else "false"
    call = f"emu::redux(emu::Reduce::{what}, {signed}, {b.v(a[1], 'u32')}, {b.v(a[2], 'u32')}, {b.site})"
    return b.put(a[0], call)


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared(::cta)?\.b16")
def ldmatrix(b, m, a):
    call = f"emu::ldmatrix(q, {m['n']}, {'true' if m['trans'] else 'false'}, {b.address(a[1], 'shared')}, {b.site});"
    out = " ".join(b.put(x, f"q[{i}]") for i, x in enumerate(group(a[0])))
    return f"{{ uint32_t q[4]; {call} {out} }}"


@rule(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared(::cta)?\.b16")
def stmatrix(b, m, a):
    values = ", ".join(b.v(x, "u32") for x in group(a[1]))
    call = f"emu::stmatrix(q, {m['n']}, {'true' if m['trans'] else 'false'}, {b.address(a[0], 'shared')}, {b.site});"
    return f"{{ const uint32_t q[4] = {{{values}}}; {call} }}"


@rule(r"mma\.sync\.aligned\.m16n8k(?P<k>4|8|16)\.row\.col\.f32\.(?P<e>bf16|f16|tf32)\.(?P=e)\.f32")
def mma(b, m, a):
    shape = (m["e"], m["k"])
    if shape not in (("bf16", "16"), ("f16", "16"), ("bf16", "8"), ("f16", "8"), ("tf32", "8"), ("tf32", "4")):
        raise UnknownPtx(f"unknown instruction: {m[0]}")
    d, fa, fb, fc = map(group, a)
    arrays = [
        f"const uint32_t qa[4] = {{{', '.join(b.v(x, 'u32') for x in fa)}}}, "
        f"qb[2] = {{{', '.join(b.v(x, 'u32') for x in fb)}}};",
        f"const float qc[4] = {{{', '.join(b.v(x, 'f32') for x in fc)}}}; float qd[4];",
        f"emu::mma(emu::Element::{m['e']}, {m['k']}, qd, qa, qb, qc, {b.site});",
    ]
    return f"{{ {' '.join(arrays)} {' '.join(b.put(x, f'qd[{i}]') for i, x in enumerate(d))} }}"


@rule(r"mma\.sync\.aligned\.m16n8k(?P<k>16|32)\.row\.col\.s32\.s8\.s8\.s32")
def mma_bytes(b, m, a):
    d, *inputs = map(group, a)
    arrays = [
        f"const uint32_t {name}[4] = {{{', '.join(b.v(x, 'u32') for x in values)}}};"
        for name, values in zip(("qa", "qb", "qc"), inputs, strict=True)
    ]
    call = f"uint32_t qd[4]; emu::mma_bytes({m['k']}, qd, qa, qb, qc, {b.site});"
    return f"{{ {' '.join(arrays)} {call} {' '.join(b.put(x, f'qd[{i}]') for i, x in enumerate(d))} }}"


# ---- memory

ORDER = r"(\.weak|\.volatile|(\.(relaxed|acquire|release)(\.(cta|gpu|sys))))?"
SPACE = r"(\.(?P<space>param|shared|global|local|const)(::cta)?)?"
CACHE = r"(\.(ca|cg|cs|lu|cv|wb|wt|nc|L1::\w+|L2::(64B|128B|256B|evict_\w+)))*"
WIDTH = r"(\.v(?P<n>[24]))?\.(?P<t>[busf](8|16|32|64))"


@rule(rf"ld{ORDER}{SPACE}{CACHE}{WIDTH}")
def load(b, m, a):
    space, c = m["space"] or "generic", C_TYPE[m["t"]]
    targets = group(a[0])
    p = b.address(a[1], space)
    if space in ("param", "local"):
        read = f"const char* q = {p};"
    else:
        read = f"const char* q = emu::at<emu::Access::read>({p}, {len(targets)} * sizeof({c}), {b.site});"
    return f"{{ {read} {' '.join(b.put(x, f'emu::get<{c}>(q, {i})') for i, x in enumerate(targets))} }}"


@rule(rf"st{ORDER}{SPACE}{CACHE}{WIDTH}")
def store(b, m, a):
    space, c = m["space"] or "generic", C_TYPE[m["t"]]
    values = group(a[1])
    p = b.address(a[0], space)
    if space == "local":
        write = f"char* q = {p};"
    else:
        write = f"char* q = emu::at<emu::Access::write>({p}, {len(values)} * sizeof({c}), {b.site});"
    sets = " ".join(f"emu::set<{c}>(q, {i}, {b.v(x, m['t'])});" for i, x in enumerate(values))
    return f"{{ {write} {sets} }}"


@rule(r"cvta(?P<to>\.to)?\.(?P<space>shared|global|local|const|param)\.u64")
def cvta(b, m, a):
    if m["space"] != "shared":
        return b.put(a[0], b.v(a[1], "u64"))
    x = b.v(a[1], "u64")
    return b.put(a[0], f"emu::to_shared({x})" if m["to"] else f"(uint64_t)emu::shared((uint32_t){x})")


ATOMIC = r"(\.(relaxed|acquire|release|acq_rel))?(\.(cta|gpu|sys))?(\.(?P<space>global|shared)(::cta)?)?"
ATOMIC_KIND = r"\.(?P<k>add|min|max|exch|and|or|xor|cas|inc)(\.noftz)?"


@rule(rf"(atom|red){ATOMIC}{ATOMIC_KIND}\.(?P<t>[bus](32|64)|f32|f64|bf16x2|f16x2|bf16|f16)")
def atomic(b, m, a):
    returns = m[0].startswith("atom")
    address, values = a[1 if returns else 0], a[2 if returns else 1 :]
    t = m["t"]
    if base := HALF.get(t.removesuffix("x2")):
        if m["k"] != "add":
            raise UnknownPtx(f"unknown instruction: {m[0]}")
        c = "uint32_t" if t.endswith("x2") else "uint16_t"
        mapped = f"emu::map{2 if t.endswith('x2') else 1}<{base}>([](auto x, auto y) {{ return x + y; }}, o, w)"
        values_c = [b.v(values[0], "b32" if t.endswith("x2") else "b16")]
    else:
        c = C_TYPE[t]
        plain = {"add": "o + w", "min": "emu::minimum(o, w)", "max": "emu::maximum(o, w)", "exch": "w", "and": "o & w"}
        plain |= {"or": "o | w", "xor": "o ^ w", "cas": "o == w ? w2 : o", "inc": "o >= w ? 0 : o + 1"}
        mapped, values_c = plain[m["k"]], [b.v(x, t) for x in values]
    named = " ".join(f"const {c} w{'' if i == 0 else i + 1} = {x};" for i, x in enumerate(values_c))
    p = b.address(address, m["space"] or "generic")
    call = f"emu::atomic<{c}>({p}, {b.site}, [&]({c} o) -> {c} {{ return {mapped}; }})"
    return f"{{ {named} {b.put(a[0], call) if returns else call + ';'} }}"


@rule(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::(64B|128B|256B))?")
def cp_async(b, m, a):
    size = b.v(a[2], "s32")
    given = b.v(a[3], "s32") if len(a) > 3 else size
    return f"emu::cp_async({b.address(a[0], 'shared')}, {b.address(a[1], 'global')}, {size}, (int)({given}), {b.site});"


@rule(r"cp\.async\.(?P<k>commit_group|wait_group|wait_all)")
def cp_async_group(b, m, a):
    call = {"commit_group": "commit", "wait_group": "wait", "wait_all": "wait_all"}[m["k"]]
    return f"emu::cp_async_{call}({b.v(a[0], 's32') + ', ' if a else ''}{b.site});"
