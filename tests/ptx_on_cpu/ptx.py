"""Reads the text of a PTX module: its files, variables, and kernels as lists of statements."""

import functools
import re
from dataclasses import dataclass
from pathlib import PurePath

BYTES = {"pred": 1, **{f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}}
VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)?\.(?P<space>global|const|shared|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$%]+)(?P<dims>(?:\[\d*\])*)(?:\s*=\s*(?P<values>.*))?$",
    re.S,
)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?:\s+\.ptr[^,]*?)?\s+(?P<name>[\w$]+)(?:\[(?P<n>\d+)\])?"
)
ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry ([\w$]+)\s*\((.*?)\)([^{]*)^\{", re.S | re.M)
BRACE = re.compile(r"[{}]")
LABEL = re.compile(r"([A-Za-z_$][\w$]*):(?!:)\s*")


class UnknownPtx(Exception):
    """PTX that the translator does not know; it says so rather than guess."""


@dataclass
class Variable:
    space: str
    name: str
    type: str
    align: int
    bytes: int
    values: list[str]


@dataclass
class Statement:
    """`site` counts lines from the kernel's first, so that a kernel's text is the same wherever it stands."""

    site: int
    kind: str  # open, close, label, code, variable, registers
    text: str


@dataclass
class Entry:
    """The statements are read when they are first asked for: of hundreds of kernels few are launched."""

    name: str
    params: list[tuple[str, int, int]]  # name, offset, bytes
    max_threads: int
    registers: int  # a thread at launch, as far as the launch bounds tell; 0 where they do not
    body: str
    files: dict[str, str]

    @functools.cached_property
    def _read(self) -> tuple[list[Statement], list[tuple[int, str]]]:
        return _statements(self.body.split("\n"), self.files)

    @property
    def statements(self) -> list[Statement]:
        return self._read[0]

    @property
    def lines(self) -> list[tuple[int, str]]:
        """Sites and their "file.cu:12"."""
        return self._read[1]


@dataclass
class Module:
    entries: dict[str, Entry]
    variables: list[Variable]
    capability: int  # of .target: 80, 90


def variable(text: str) -> Variable | None:
    match = VARIABLE.match(text)
    if match is None:
        return None
    count = 1
    for n in re.findall(r"\[(\d*)\]", match["dims"]):
        count *= int(n or 0)
    values = [v.strip() for v in (match["values"] or "").strip("{} \n").split(",") if v.strip()]
    size = BYTES[match["type"]]
    return Variable(match["space"], match["name"], match["type"], int(match["align"] or size), size * count, values)


def _params(text: str) -> list[tuple[str, int, int]]:
    params, offset = [], 0
    for match in PARAMETER.finditer(text):
        size = int(match["n"]) if match["n"] else BYTES[match["type"]]
        align = int(match["align"] or size)
        offset = -(-offset // align) * align
        params.append((match["name"], offset, size))
        offset += size
    return params


def _body_end(text: str, start: int) -> int:
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    raise UnknownPtx("a kernel without an end")


def _location(text: str, files: dict[str, str]) -> str:
    match = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
    if match is None:
        raise UnknownPtx(text)
    where = f"{files.get(match[1], '?')}:{match[2]}"
    inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
    return where if inlined is None else f"{where} (inlined at {files.get(inlined[1], '?')}:{inlined[2]})"


def _statements(lines: list[str], files: dict[str, str]) -> tuple[list[Statement], list[tuple[int, str]]]:
    statements: list[Statement] = []
    locations: list[tuple[int, str]] = []
    pending = ""
    for site, line in enumerate(lines):
        text = line.strip()
        if not pending and re.match(r"\.loc\s", text):
            locations.append((site + 1, _location(text, files)))
            continue
        while text:
            if not pending:
                if text[0] in "{}":
                    statements.append(Statement(site, "open" if text[0] == "{" else "close", text[0]))
                    text = text[1:].lstrip()
                    continue
                if label := LABEL.match(text):
                    statements.append(Statement(site, "label", label[1]))
                    text = text[label.end() :]
                    continue
            head, end, text = text.partition(";")
            pending = f"{pending} {head}".strip()
            text = text.lstrip()
            if end:
                if pending:
                    statements.append(Statement(site, _kind(pending), pending))
                pending = ""
    if pending:
        raise UnknownPtx(pending)
    return statements, locations


def _kind(text: str) -> str:
    if not text.startswith("."):
        return "code"
    directive = text.split(None, 1)[0]
    kind = {".reg": "registers", ".pragma": "pragma"}.get(directive)
    if kind is None and directive in (".local", ".shared"):
        kind = "variable"
    if kind is None:
        raise UnknownPtx(text)
    return kind


def _max_threads(directives: str) -> int:
    match = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    return int(match[1]) * int(match[2] or 1) * int(match[3] or 1) if match else 1024


def _registers(directives: str) -> int:
    """A kernel that changes its threads' registers starts with as many as its launch bounds leave to each."""
    if match := re.search(r"\.maxnreg\s+(\d+)", directives):
        return int(match[1])
    if not re.search(r"\.(?:maxntid|reqntid)", directives):
        return 0
    blocks = re.search(r"\.minnctapersm\s+(\d+)", directives)
    return min(256, 65536 // (_max_threads(directives) * int(blocks[1] if blocks else 1)) // 8 * 8)


def parse(text: str) -> Module:
    """Raises UnknownPtx where functions are called; at a directive that is not known, an entry's statements do."""
    text = re.sub(r"//[^\n]*", "", text)
    if call := re.search(r"^\s*(\.visible |\.weak )?\.func\b[^;{]*", text, re.M):
        raise UnknownPtx(f"device functions must be inlined: {' '.join(call[0].split())}")
    files = {m[1]: PurePath(m[2]).name for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    entries: dict[str, Entry] = {}
    outside, position = "", 0
    for match in ENTRY.finditer(text):
        outside += text[position : match.start()]
        end = _body_end(text, match.end())
        position = end + 1
        sizes = _max_threads(match[3]), _registers(match[3])
        entries[match[1]] = Entry(match[1], _params(match[2]), *sizes, text[match.end() : end], files)
    outside += text[position:].split(".section")[0]
    declared = re.findall(r"^\s*((?:\.(?:visible|weak|extern)\s+)?\.(?:global|const|shared)\s[^;]*);", outside, re.M)
    found = [variable(declaration) for declaration in declared]
    if None in found:
        raise UnknownPtx(declared[found.index(None)])
    target = re.search(r"^\s*\.target\s+sm_(\d+)", text, re.M)
    return Module(entries, [v for v in found if v is not None], int(target[1]) if target else 0)
