"""One rule for each form of a PTX instruction: a pattern for the whole opcode, and the C++ statement that does it.

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
INT = r"(?P<t>[us](?:16|32|64))"
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">"}
COMPARE["hs"] = ">="
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
DIRECTED = {"rm": "FE_DOWNWARD", "rp": "FE_UPWARD", "rz": "FE_TOWARDZERO"}
INTEGRAL = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
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


def _flush(m: re.Match) -> Callable[[str], str]:
    return (lambda x: f"emu::ftz({x})") if m["ftz"] else (lambda x: x)


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


# ---- moves and choices


@rule(r"mov\.(?P<t>pred|[busf](16|32|64|128))")
def mov(b, m, a):
    if a[1].startswith("{"):
        parts = group(a[1])
        bits = int(m["t"][1:]) // len(parts)
        joined = " | ".join(f"(uint64_t){b.v(x, f'b{bits}')} << {i * bits}" for i, x in enumerate(parts))
        return b.put(a[0], f"(uint{m['t'][1:]}_t)({joined})")
    if a[0].startswith("{"):
        parts = group(a[0])
        bits = int(m["t"][1:]) // len(parts)
        out = (b.put(x, f"(uint{bits}_t)(q >> {i * bits})") for i, x in enumerate(parts) if x != "_")
        return f"{{ const uint64_t q = {b.v(a[1], 'b' + m['t'][1:])}; {' '.join(out)} }}"
    if (copy := b.copy(a[0], a[1], m["t"])) is not None:
        return copy
    return b.put(a[0], b.v(a[1], m["t"]))


@rule(r"setp\.(?P<c>\w+)(\.(?P<bool>and|or|xor))?(?P<ftz>\.ftz)?\.(?P<t>[bus](16|32|64)|f32|f64)")
def setp(b, m, a):
    f = _flush(m)
    x, y = f(b.v(a[1], m["t"])), f(b.v(a[2], m["t"]))
    if m["c"] in UNORDERED:
        test = f"!({x} {UNORDERED[m['c']]} {y})"
    elif m["c"] in ("num", "nan"):
        test = f"{'!' if m['c'] == 'num' else ''}(std::isnan({x}) || std::isnan({y}))"
    elif m["c"] == "ne" and m["t"][0] == "f":
        test = f"({x} < {y} || {x} > {y})"  # ordered: false with a NaN
    else:
        test = f"({x} {COMPARE[m['c']]} {y})"
    target, _, inverse = a[0].partition("|")
    join = {"and": "&", "or": "|", "xor": "^", None: ""}[m["bool"]]
    last = b.v(a[3], "pred") if join else ""
    both = [b.put(target, f"q {join} {last}")] + ([b.put(inverse, f"(!q) {join} {last}")] if inverse else [])
    return f"{{ const bool q = {test}; {' '.join(both)} }}"


@rule(r"selp\.(?P<t>[busf](16|32|64))")
def selp(b, m, a):
    return b.put(a[0], f"{b.v(a[3], 'pred')} ? {b.v(a[1], m['t'])} : {b.v(a[2], m['t'])}")


# ---- integers and bits


@rule(rf"(add|sub)\.{INT}")
def int_add(b, m, a):
    t = "u" + m["t"][1:]
    return b.put(a[0], f"{b.v(a[1], t)} {'+' if m[0][0] == 'a' else '-'} {b.v(a[2], t)}")


@rule(rf"(mul|mad)\.(?P<part>lo|hi|wide)\.{INT}")
def int_mul(b, m, a):
    t, bits = m["t"], int(m["t"][1:])
    if m["part"] == "wide":
        wide = f"{t[0]}{2 * bits}"
        product, t = f"({C_TYPE[wide]}){b.v(a[1], t)} * ({C_TYPE[wide]}){b.v(a[2], t)}", wide
    elif m["part"] == "hi":
        product = f"emu::mul_hi<{C_TYPE[t]}>({b.v(a[1], t)}, {b.v(a[2], t)})"
    else:
        product = f"(uint64_t){b.v(a[1], 'u' + t[1:])} * {b.v(a[2], 'u' + t[1:])}"
    add = f" + (uint64_t){b.v(a[3], t)}" if m[0].startswith("mad") else ""
    return b.put(a[0], f"(uint{t[1:]}_t)((uint64_t)({product}){add})")


@rule(rf"(div|rem)\.{INT}")
def int_div(b, m, a):
    function = "divide" if m[0].startswith("div") else "remainder"
    return b.put(a[0], f"emu::{function}<{C_TYPE[m['t']]}>({b.v(a[1], m['t'])}, {b.v(a[2], m['t'])})")


@rule(rf"(min|max)\.{INT}")
def int_min(b, m, a):
    return b.put(a[0], f"emu::{m[0][:3]}imum<{C_TYPE[m['t']]}>({b.v(a[1], m['t'])}, {b.v(a[2], m['t'])})")


@rule(r"(abs|neg)\.(?P<t>s(16|32|64))")
def int_neg(b, m, a):
    x = b.v(a[1], m["t"])
    negative = f"({C_TYPE[m['t']]})(0 - (uint64_t){x})"
    return b.put(a[0], negative if m[0].startswith("neg") else f"{x} < 0 ? {negative} : {x}")


@rule(r"(and|or|xor|not)\.(?P<t>b(16|32|64)|pred)")
def logic(b, m, a):
    sign = {"and": "&", "or": "|", "xor": "^", "not": "!" if m["t"] == "pred" else "~"}[m[0].split(".")[0]]
    if sign in "!~":
        return b.put(a[0], f"({C_TYPE[m['t']]})({sign}{b.v(a[1], m['t'])})")
    return b.put(a[0], f"({C_TYPE[m['t']]})({b.v(a[1], m['t'])} {sign} {b.v(a[2], m['t'])})")


@rule(r"(shl|shr)\.(?P<t>[bus](16|32|64))")
def shift(b, m, a):
    return b.put(a[0], f"emu::{m[0][:3]}<{C_TYPE[m['t']]}>({b.v(a[1], m['t'])}, {b.v(a[2], 'u32')})")


@rule(r"shf\.(?P<way>[lr])\.(?P<k>wrap|clamp)\.b32")
def funnel(b, m, a):
    n = b.v(a[3], "u32")
    n = f"{n} & 31" if m["k"] == "wrap" else f"std::min<uint32_t>({n}, 32)"
    function = "left" if m["way"] == "l" else "right"
    return b.put(a[0], f"emu::funnel_{function}({b.v(a[1], 'u32')}, {b.v(a[2], 'u32')}, {n})")


@rule(r"(bfi)\.(?P<t>b(32|64))")
def bfi(b, m, a):
    args = ", ".join([b.v(a[1], m["t"]), b.v(a[2], m["t"]), b.v(a[3], "u32"), b.v(a[4], "u32")])
    return b.put(a[0], f"emu::bit_insert<{C_TYPE[m['t']]}>({args})")


@rule(r"(bfe)\.(?P<t>[us](32|64))")
def bfe(b, m, a):
    return b.put(
        a[0], f"emu::bit_extract<{C_TYPE[m['t']]}>({b.v(a[1], m['t'])}, {b.v(a[2], 'u32')}, {b.v(a[3], 'u32')})"
    )


@rule(r"(popc|clz|brev)\.b32")
def count_bits(b, m, a):
    x = b.v(a[1], "u32")
    each = {"popc": f"__builtin_popcount({x})", "clz": f"({x} ? __builtin_clz({x}) : 32)"}
    return b.put(a[0], each.get(m[1], f"emu::reverse_bits({x})"))


@rule(r"prmt\.b32")
def prmt(b, m, a):
    return b.put(a[0], f"emu::permute_bytes({', '.join(b.v(x, 'u32') for x in a[1:])})")


@rule(r"lop3\.b32")
def lop3(b, m, a):
    return b.put(a[0], f"emu::lookup3({', '.join(b.v(x, 'u32') for x in a[1:5])})")


# ---- floating point

ROUND = r"(\.(?P<round>rn|rz|rm|rp))?(?P<ftz>\.ftz)?(?P<sat>\.sat)?"


def _float(b, m, a, expression: str, exact: str) -> str:
    f = _flush(m)
    t = m["t"]
    names = "xyz"[: len(a) - 1]
    operands = " ".join(f"const {C_TYPE[t]} {n} = {f(b.v(o, t))};" for n, o in zip(names, a[1:], strict=True))
    if m["round"] in DIRECTED:
        if t == "f64":
            raise UnknownPtx(f"unknown instruction: {m[0]}")
        expression = f"emu::directed({exact}, {DIRECTED[m['round']]})"
    value = f(expression)
    return f"{{ {operands} {b.put(a[0], f'emu::sat({value})' if m['sat'] else value)} }}"


@rule(rf"(add|sub|mul){ROUND}\.(?P<t>f32|f64)")
def float_op(b, m, a):
    sign = {"add": "+", "sub": "-", "mul": "*"}[m[1]]
    return _float(b, m, a, f"x {sign} y", f"(double)x {sign} (double)y")


@rule(rf"(fma|mad){ROUND}\.(?P<t>f32|f64)")
def float_fma(b, m, a):
    return _float(b, m, a, "std::fma(x, y, z)", "std::fma((double)x, (double)y, (double)z)")


@rule(r"(div|rcp|sqrt|rsqrt)\.(?P<round>rn|approx|full)(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<t>f32|f64)")
def float_div(b, m, a):
    one = {"div": "x / y", "rcp": "1 / x", "sqrt": "std::sqrt(x)", "rsqrt": "1 / std::sqrt(x)"}[m[1]]
    return _float(b, m, a, one, one)


@rule(r"(ex2|lg2|sin|cos|tanh)\.approx(?P<round>)(?P<ftz>\.ftz)?(?P<sat>)\.(?P<t>f32)")
def transcendental(b, m, a):
    name = {"ex2": "std::exp2", "lg2": "std::log2"}.get(m[1], f"std::{m[1]}")
    return _float(b, m, a, f"{name}(x)", "x")


@rule(r"(min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<t>f32|f64)")
def float_min(b, m, a):
    f, nan = _flush(m), "_nan" if m["nan"] else ""
    x, y = f(b.v(a[1], m["t"])), f(b.v(a[2], m["t"]))
    return b.put(a[0], f"emu::{m[1]}imum{nan}({x}, {y})")


@rule(r"(abs|neg)(?P<ftz>\.ftz)?\.(?P<t>f32|f64)")
def float_neg(b, m, a):
    x = _flush(m)(b.v(a[1], m["t"]))
    return b.put(a[0], f"-{x}" if m[1] == "neg" else f"std::fabs({x})")


@rule(r"copysign\.(?P<t>f32|f64)")
def copysign(b, m, a):
    return b.put(a[0], f"std::copysign({b.v(a[2], m['t'])}, {b.v(a[1], m['t'])})")


HALF_OPS = {"add": "x + y", "sub": "x - y", "mul": "x * y", "fma": "std::fma(x, y, z)", "neg": "-x"}
HALF_OPS |= {"abs": "std::fabs(x)", "min": "emu::minimum(x, y)", "max": "emu::maximum(x, y)", "ex2": "std::exp2(x)"}


@rule(r"(add|sub|mul|fma|neg|abs|min|max|ex2)(\.(rn|approx))?(\.ftz)?\.(?P<t>bf16|f16)(?P<two>x2)?")
def half(b, m, a):
    names = ["x", "y", "z"][: len(a) - 1]
    lambda_ = f"[]({', '.join(f'float {n}' for n in names)}) {{ return {HALF_OPS[m[1]]}; }}"
    values = ", ".join(b.v(x, "b32" if m["two"] else "b16") for x in a[1:])
    return b.put(a[0], f"emu::map{2 if m['two'] else 1}<{HALF[m['t']]}>({lambda_}, {values})")


# ---- conversions


@rule(r"cvt\.(?P<round>rn|rz)\.(?P<d>bf16|f16)(?P<two>x2)?\.f32")
def cvt_to_half(b, m, a):
    mode = f"emu::Round::{'zero' if m['round'] == 'rz' else 'nearest'}"
    if m["two"]:  # the first source is the upper half
        return b.put(a[0], f"emu::pack<{HALF[m['d']]}>({b.v(a[2], 'f32')}, {b.v(a[1], 'f32')}, {mode})")
    return b.put(a[0], f"emu::narrow<{HALF[m['d']]}>({b.v(a[1], 'f32')}, {mode}).bits")


@rule(r"cvt(\.ftz)?\.f32\.(?P<s>bf16|f16)")
def cvt_from_half(b, m, a):
    return b.put(a[0], f"emu::wide({HALF[m['s']]}{{{b.v(a[1], 'b16')}}})")


@rule(r"cvt\.rna(\.satfinite)?\.tf32\.f32")
def cvt_tf32(b, m, a):
    return b.put(a[0], f"emu::to_tf32({b.v(a[1], 'f32')})")


@rule(r"cvt(?P<sat>\.sat)?\.(?P<d>[us](8|16|32|64))\.(?P<s>[us](8|16|32|64))")
def cvt_int(b, m, a):
    x, d = b.v(a[1], m["s"]), C_TYPE[m["d"]]
    if m["sat"]:
        low, high = f"std::numeric_limits<{d}>::min()", f"std::numeric_limits<{d}>::max()"
        x = f"std::min<__int128>(std::max<__int128>({x}, {low}), {high})"
    return b.put(a[0], f"({d}){x}")


@rule(r"cvt(\.(?P<round>rn|rz|rm|rp))?(\.ftz)?\.(?P<d>f32|f64)\.(?P<s>[us](8|16|32|64))")
def cvt_int_to_float(b, m, a):
    if m["round"] in DIRECTED:
        if m["d"] == "f64" or m["s"][1:] == "64":
            raise UnknownPtx(f"unknown instruction: {m[0]}")
        return b.put(a[0], f"emu::directed((double){b.v(a[1], m['s'])}, {DIRECTED[m['round']]})")
    return b.put(a[0], f"({C_TYPE[m['d']]}){b.v(a[1], m['s'])}")


@rule(r"cvt\.(?P<round>rni|rzi|rmi|rpi)(?P<ftz>\.ftz)?(\.sat)?\.(?P<d>[us](8|16|32|64))\.(?P<s>f32|f64)")
def cvt_float_to_int(b, m, a):
    x = f"{INTEGRAL[m['round']]}({_flush(m)(b.v(a[1], m['s']))})"
    return b.put(a[0], f"emu::to_int<{C_TYPE[m['d']]}>({x})")


@rule(r"cvt(\.(?P<round>rni|rzi|rmi|rpi|rn|rz|rm|rp))?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<d>f32|f64)\.(?P<s>f32|f64)")
def cvt_float(b, m, a):
    x = _flush(m)(b.v(a[1], m["s"]))
    if m["round"] in INTEGRAL:
        x = f"{INTEGRAL[m['round']]}({x})"
    elif m["round"] in DIRECTED:
        x = f"emu::directed({x}, {DIRECTED[m['round']]})"
    x = f"({C_TYPE[m['d']]}){x}"
    return b.put(a[0], f"emu::sat({x})" if m["sat"] else x)
