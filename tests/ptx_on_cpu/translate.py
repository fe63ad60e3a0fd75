"""PTX to C++: a kernel becomes a function, a register a variable, an instruction a statement, a branch a goto."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import arithmetic, hardware, ptx  # noqa: F401  (the rules of the first two)
from .instructions import C_TYPE, emit
from .ptx import Entry, Module, UnknownPtx, Variable

REGISTER_TYPE = {"pred": "bool", "f32": "float", "f64": "double"}
REGISTER_TYPE |= {f"{k}{n}": f"uint{n}_t" for k in "bus" for n in (16, 32, 64)}
REGISTER_TYPE |= {"f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t"}
SPECIAL = {
    "%laneid": "me->lane",
    "%warpid": "me->warp",
    "%lanemask_lt": "((1u << me->lane) - 1)",
    "%lanemask_eq": "(1u << me->lane)",
    **{f"%tid.{d}": f"me->tid.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"emu::block_size.{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"emu::block_index.{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"emu::grid_size.{d}" for d in "xyz"},
}
FLOATS = {"float", "double"}
NUMBERS = {"int64_t": re.compile(r"\(int64_t\)-?\d+ll"), "uint64_t": re.compile(r"0[xX][0-9A-Fa-f]+ull")}
ADDRESS = re.compile(r"\[\s*([^\]+\s]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def split_operands(text: str) -> list[str]:
    operands, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            operands.append(text[start:i].strip())
            start = i + 1
    operands.append(text[start:].strip())
    return [x for x in operands if x]


@dataclass
class Flow:
    """The registers of a kernel that wgmma has to do with, by their names in C++."""

    sums: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)  # registers of an A operand
    copies: list[tuple[str, str]] = field(default_factory=list)  # from mov: to, from

    def tokens(self) -> set[str]:
        """Where the token of a sum under way may be: the sums, and copies of them."""
        return self._closure(self.sums, self.copies)

    def operands(self) -> set[str]:
        """What becomes an operand, if only after copies: of these the last access is remembered."""
        return self._closure({*self.sums, *self.left}, [(source, to) for to, source in self.copies])

    @staticmethod
    def _closure(start: Iterable[str], edges: list[tuple[str, str]]) -> set[str]:
        found, size = set(start), -1
        while size != len(found):
            size = len(found)
            found |= {to for to, source in edges if source in found}
        return found


class Body:
    """Translates the statements of one kernel. `site` is the line that is being translated.

    A kernel with wgmma is translated twice: the first time to find its `flow`, which the second is given.
    """

    def __init__(self, entry: Entry, module: Module, flow: Flow | None = None):
        self.entry, self.site, self.hardware = entry, 0, False
        self.flow = Flow()
        self.sums, self.left = (flow.sums, flow.left) if flow else (set(), set())
        self.tokens, operands = (flow.tokens(), flow.operands()) if flow else (set(), set())
        self.operands = {name: i for i, name in enumerate(sorted(operands))}
        self.params = {name: offset for name, offset, _ in entry.params}
        self.declarations: list[str] = []
        self.types: dict[str, str] = {}  # of the registers that are variables
        self.scopes: list[dict[str, str]] = [{}]
        self.seen_labels: set[str] = set()
        self._count = 0
        self.static_shared, self.dynamic_align = 0, 1
        self.symbols: dict[str, str] = {}
        for v in module.variables:
            self._place_variable(v)
        self.labels = self._find_labels()
        self.code = [line for s in entry.statements if (line := self._statement(s))]

    def _place_variable(self, v: Variable) -> None:
        if v.space == "shared" and not v.bytes:
            self.symbols[v.name] = "emu::dynamic_at"
            self.dynamic_align = max(self.dynamic_align, v.align)
        elif v.space == "shared":
            self.static_shared = -(-self.static_shared // v.align) * v.align
            self.symbols[v.name] = f"{self.static_shared}u"
            self.static_shared += v.bytes
        elif v.space == "local":
            self.declarations.append(f"alignas({v.align}) char {_name(v.name)}[{v.bytes}];")
            self.symbols[v.name] = f"(uint64_t){_name(v.name)}"
        else:
            self.symbols[v.name] = f"(uint64_t)variable_{_name(v.name)}"

    def _find_labels(self) -> list[dict[str, str]]:
        """The labels of each scope, in the order in which scopes open; a label is seen in the whole of its scope."""
        scopes: list[dict[str, str]] = [{}]
        stack = [0]
        for s in self.entry.statements:
            if s.kind == "open":
                stack.append(len(scopes))
                scopes.append({})
            elif s.kind == "close":
                stack.pop()
            elif s.kind == "label":
                self._count += 1
                scopes[stack[-1]][s.text] = f"L{self._count}_{_name(s.text)}"
        self._opened = 0
        self._label_stack = [0]
        return scopes

    def _statement(self, s: ptx.Statement) -> str:
        self.site = s.site
        if s.kind == "open":
            self.scopes.append({})
            self._opened += 1
            self._label_stack.append(self._opened)
        elif s.kind == "close":
            self.scopes.pop()
            self._label_stack.pop()
        elif s.kind == "registers":
            self._registers(s.text)
        elif s.kind == "variable":
            variable = ptx.variable(s.text)
            if variable is None:
                raise UnknownPtx(s.text)
            self._place_variable(variable)
        elif s.kind == "label":
            label = self._label(s.text)
            self.seen_labels.add(label)
            return f"{label}:;"
        elif s.kind == "code":
            return self._code(s.text)
        return ""

    def _registers(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if match is None or match[1] not in REGISTER_TYPE:
            raise UnknownPtx(text)
        for item in match[2].split(","):
            name, _, count = item.strip().rstrip(">").partition("<")
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            for n in names:
                unique = f"r_{_name(n)}"
                if len(self.scopes) > 1:
                    self._count += 1
                    unique += f"_{self._count}"
                self.scopes[-1][n] = unique
                if unique not in self.operands:
                    self.types[unique] = REGISTER_TYPE[match[1]]
                    self.declarations.append(f"{REGISTER_TYPE[match[1]]} {unique}{' = 0' * (unique in self.tokens)};")

    def _code(self, text: str) -> str:
        guard = re.match(r"@(!?)([\w%$]+)\s+", text)
        if guard:
            text = text[guard.end() :]
        opcode, _, rest = text.partition(" ")
        statement = emit(self, opcode, split_operands(rest), text)
        return f"if ({guard[1]}{self.register(guard[2])}) {{ {statement} }}" if guard else statement

    def _label(self, name: str) -> str:
        for scope in reversed(self._label_stack):
            if name in self.labels[scope]:
                return self.labels[scope][name]
        raise UnknownPtx(f"no label {name}")

    # ---- what rules use

    def jump(self, label: str) -> str:
        name = self._label(label)
        return f"{{ emu::jump_back({self.site}); goto {name}; }}" if name in self.seen_labels else f"goto {name};"

    def register(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def put(self, target: str, value: str) -> str:
        if target.strip() == "_":
            return ""
        name = self._name_of(target)
        if name not in self.operands:
            same = self.types.get(value) == self.types[name]
            return f"{name} = {value};" if same else f"{name} = emu::as<{self.types[name]}>({value});"
        return self._write(name, f"emu::as<uint32_t>({value})")

    def _name_of(self, operand: str) -> str:
        name = self.register(operand.strip())
        if name is None:
            raise UnknownPtx(f"no register {operand}")
        return name

    def _place(self, name: str) -> str:
        """A register as it is, even with a token in it: operands of wgmma are in an array."""
        return f"operand[{self.operands[name]}]" if name in self.operands else name

    def _write(self, name: str, value: str) -> str:
        i = self.operands[name]
        before = f"emu::fragment_written({i}, {self.site}); " if name in self.left else ""
        if name in self.sums:
            return f"{before}emu::write_sum(operand[{i}], touched[{i}], {value}, {self.site});"
        return f"{before}operand[{i}] = {value}; touched[{i}] = me->fences + 1;"

    def copy(self, target: str, source: str, kind: str) -> str | None:
        """A mov between registers of 32 bits that wgmma may have to do with: tokens are copied as they are."""
        to, start = self.register(target.strip()), self.register(source.strip())
        if to is None or start is None or not kind.endswith("32"):
            return None
        self.flow.copies.append((to, start))
        if not {to, start} & {*self.tokens, *self.operands}:
            return None
        a, b = self._place(to), self._place(start)
        if to not in self.operands:
            return f"emu::assign({a}, {b});"
        # The token of a sum may come back to where it is: that is no write.
        value = f"emu::as<uint32_t>({b})"
        touched = f"touched[{self.operands[start]}]" if start in self.operands else "0"
        return f"if ({a} != {value}) {{ {self._write(to, value)} }} touched[{self.operands[to]}] = {touched};"

    def wgmma_operands(self, sums: list[str], left: list[str]) -> list[int]:
        """The numbers of the registers of the sums, and those of the A operand behind them."""
        d, a = [self._name_of(x) for x in sums], [self._name_of(x) for x in left]
        self.flow.sums.update(d)
        self.flow.left.update(a)
        return [self.operands.get(name, 0) for name in (*d, *a)]

    def v(self, operand: str, kind: str) -> str:
        """The value of an operand as C++ of a PTX type."""
        x = operand.strip()
        if x.startswith("!"):
            return f"!{self.v(x[1:], kind)}"
        value, to = self._value(x), C_TYPE[kind]
        # The compiler takes longest over the template: where a register or a number needs no more, it gets a cast.
        given = self.types.get(value) or next((t for t, form in NUMBERS.items() if form.fullmatch(value)), "")
        if given == to:
            return value
        return f"(({to}){value})" if given and not {given, to} & FLOATS else f"emu::as<{to}>({value})"

    def _value(self, x: str) -> str:
        if (register := self.register(x)) is not None:
            if register in self.sums:
                i = self.operands[register]
                return f"emu::read_sum(operand[{i}], touched[{i}], {self.site})"
            place = self._place(register)
            return f"emu::settled({place}, {self.site})" if register in self.tokens else place
        if x in SPECIAL:
            return SPECIAL[x]
        if x in self.symbols:
            return self.symbols[x]
        if x in self.params:
            return f"(uint64_t)(params + {self.params[x]})"
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", x):
            return f"emu::as<float>(0x{x[2:]}u)"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", x):
            return f"emu::as<double>(0x{x[2:]}ull)"
        if re.fullmatch(r"0[xX][0-9A-Fa-f]+[uU]?", x):
            return f"{x.rstrip('uU')}ull"
        if re.fullmatch(r"-?\d+[uU]?", x):
            number = x.rstrip("uU")
            return "(int64_t)(-9223372036854775807ll - 1)" if number == str(-(2**63)) else f"(int64_t){number}ll"
        raise UnknownPtx(f"unknown operand {x!r}")

    def address(self, operand: str, space: str) -> str:
        match = ADDRESS.fullmatch(operand.strip())
        if match is None:
            raise UnknownPtx(f"unknown address {operand!r}")
        base, offset = match[1], match[2] or "0"
        if space == "shared":
            return f"emu::shared((uint32_t)({self._value(base)} + {offset}))"
        return f"((char*)({self._value(base)}) + {offset})"


def _name(symbol: str) -> str:
    return re.sub(r"\W", "_", symbol.lstrip("%$"))


def _variables(module: Module) -> tuple[str, str]:
    """Module-scope variables as C++ arrays, and the table of where they are."""
    arrays, table = [], []
    for v in module.variables:
        if v.space not in ("global", "const"):
            continue
        c = C_TYPE["b" + v.type[1:]]
        name = f"variable_{_name(v.name)}"
        for value in v.values:
            if not re.fullmatch(r"-?\d+|0[xX][0-9A-Fa-f]+", value):
                raise UnknownPtx(f"initial value {value!r} of {v.name}")
        count = v.bytes // ptx.BYTES[v.type]
        values = ", ".join(f"({c}){value}ull" for value in v.values)
        arrays.append(f"alignas({max(v.align, 16)}) static {c} {name}[{count}] = {{{values}}};")
        table.append(f"{{(char*){name}, {v.bytes}, {'false' if v.space == 'const' else 'true'}}}")
    return "\n".join(arrays), ", ".join([*table, "{nullptr, 0, false}"])


def translate(module: Module, name: str) -> str:
    """The C++ text of one kernel of a module.

    Raises:
        UnknownPtx: an instruction, a directive or an operand is not known; its text is the message.
    """
    entry = module.entries[name]
    body = Body(entry, module)
    if body.flow.sums:
        body = Body(entry, module, body.flow)
    arrays, table = _variables(module)
    offsets = ", ".join(str(offset) for _, offset, _ in entry.params) or "0"
    sizes = ", ".join(str(size) for _, _, size in entry.params) or "0"
    lines = "\n  ".join(body.code)
    count = len(body.operands)
    operands = f"uint32_t operand[{count}] = {{}}, touched[{count}] = {{}};\n  " if count else ""
    return f"""#include "emu.h"
#include <limits>
{arrays}
static void run(const char* params) {{
  emu::Fiber* const me = emu::current;
  (void)me, (void)params;
  {operands}{" ".join(body.declarations)}
  {lines}
}}
static const int offset[] = {{{offsets}}}, size[] = {{{sizes}}};
static const emu::Kernel::Constant constants[] = {{{table}}};
extern "C" __attribute__((visibility("default"))) const emu::Kernel emu_kernel = {{
    "{name}", run, {len(entry.params)}, offset, size, {body.static_shared}, {body.dynamic_align}, {entry.max_threads},
    {entry.registers}, {module.capability}, {"true" if body.hardware else "false"}, constants}};
"""
