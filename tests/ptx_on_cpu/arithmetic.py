"""Rules for what a thread does by itself in registers: moves, integers, bits, floating point, conversions."""

import re
from collections.abc import Callable

from .instructions import C_TYPE, HALF, group, rule
from .ptx import UnknownPtx

INT = r"(?P<t>[us](?:16|32|64))"
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">"}
COMPARE["hs"] = ">="
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
DIRECTED = {"rm": "FE_DOWNWARD", "rp": "FE_UPWARD", "rz": "FE_TOWARDZERO"}
INTEGRAL = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


def _flush(m: re.Match) -> Callable[[str], str]:
    return (lambda x: f"emu::ftz({x})") if m["ftz"] else (lambda x: x)


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


@rule(r"dp4a\.(?P<a>[us])32\.(?P<b>[us])32")
def dp4a(b, m, a):
    call = f"emu::dot_of_bytes<{C_TYPE[m['a'] + '8']}, {C_TYPE[m['b'] + '8']}>"
    return b.put(a[0], f"{call}({', '.join(b.v(x, 'u32') for x in a[1:])})")


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
