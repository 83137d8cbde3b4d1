"""PTX text -> kernels with numbered registers, resolved scopes and a flat list of instructions."""

import re
from dataclasses import dataclass, field

from tests.emulator.ptx_emulator.findings import Unsupported

TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with every modifier, for instance "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None  # predicate register, negated
    line: int  # in the PTX text

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' if self.guard[1] else ''}{self.guard[0]} "
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, int]]  # name, bytes
    registers: dict[str, tuple[int, str]] = field(default_factory=dict)  # index, type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> instruction index
    shared: dict[str, int] = field(default_factory=dict)  # static variable -> byte offset
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)  # .reqntid and others
    dynamic_shared: set[str] = field(default_factory=set)
    static_shared_bytes: int = 0


def split_operands(text: str) -> list[str]:
    """Split at the commas that are outside brackets and braces."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return out + [last] if last else out


def parse(ptx: str) -> dict[str, Kernel]:
    """Every kernel of a PTX module by name."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), ptx, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    kernels = {}
    header = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
    first_entry = re.search(r"\.entry\b", text)
    module_text = text[: first_entry.start()] if first_entry else text
    for match in header.finditer(text):
        kernel = Kernel(match.group(1), _parse_params(match.group(2)))
        for name, values in re.findall(r"\.(\w+)\s+([\d, ]+)", match.group(3)):
            kernel.directives[name] = tuple(int(value) for value in values.split(","))
        for statement in module_text.split(";"):
            _shared_variable(kernel, statement)
        end = _matching_brace(text, match.end() - 1)
        _parse_body(kernel, text[match.end() : end], text.count("\n", 0, match.end()) + 1)
        kernels[kernel.name] = kernel
    return kernels


def _parse_params(text: str) -> list[tuple[str, int]]:
    params = []
    for declaration in filter(None, (p.strip() for p in text.split(","))):
        match = re.search(r"\.[a-z](\d+)(?: \.ptr[ .\w]*)?\s+([\w$]+)(?:\[(\d+)\])?$", declaration)
        if match is None:
            raise Unsupported(f"kernel parameter {declaration!r}")
        bits, name, count = match.groups()
        params.append((name, TYPE_BYTES[bits] * int(count or 1)))
    return params


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise Unsupported("a kernel body without an end")


def _shared_variable(kernel: Kernel, statement: str) -> bool:
    match = re.search(
        r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.\w(\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*$",
        statement,
    )
    if match is None:
        return False
    extern, align, bits, name, count = match.groups()
    if extern or count == "":
        kernel.dynamic_shared.add(name)
        return True
    size = TYPE_BYTES[bits] * int(count or 1)
    offset = -(-kernel.static_shared_bytes // int(align or 1)) * int(align or 1)
    kernel.shared[name] = offset
    kernel.static_shared_bytes = offset + size
    return True


class _Scopes:
    """Names declared in nested blocks get a suffix, so that one flat table holds them all."""

    def __init__(self) -> None:
        self.stack: list[dict[str, str]] = [{}]
        self.labels: list[str] = [""]
        self.blocks = 0

    def enter(self) -> None:
        self.blocks += 1
        self.stack.append({})
        self.labels.append(f"@{self.blocks}")

    def leave(self) -> None:
        self.stack.pop()
        self.labels.pop()

    def declare(self, name: str) -> str:
        unique = name + self.labels[-1]
        self.stack[-1][name] = unique
        return unique

    def rename(self, text: str) -> str:
        """Operand text with nested names replaced by their unique forms."""
        if len(self.stack) == 1:
            return text

        def lookup(match: re.Match) -> str:
            for names in reversed(self.stack):
                if match.group() in names:
                    return names[match.group()]
            return match.group()

        return re.sub(r"[%$A-Za-z_][\w$]*", lookup, text)


def _parse_body(kernel: Kernel, body: str, first_line: int) -> None:
    scopes = _Scopes()
    branches: list[tuple[int, str, str]] = []
    position = 0
    counted, line = 0, first_line
    token = re.compile(r"\s*(?:([{}])|([$\w]+)\s*:(?!:)|([^;]*);)", re.S)
    while match := token.match(body, position):
        position = match.end()
        brace, label, statement = match.groups()
        if brace == "{":
            scopes.enter()
        elif brace == "}":
            scopes.leave()
        elif label:
            kernel.labels[label + scopes.labels[-1]] = len(kernel.instructions)
        elif statement and statement.strip():
            line += body.count("\n", counted, match.start(3))
            counted = match.start(3)
            _parse_statement(kernel, scopes, " ".join(statement.split()), line, branches)
    if body[position:].strip():
        raise Unsupported(f"PTX that does not parse: {body[position:].strip()[:80]!r}")
    for index, target, scope in branches:
        resolved = target + scope if target + scope in kernel.labels else target
        if resolved not in kernel.labels:
            raise Unsupported(f"branch to an unknown label {target}")
        old = kernel.instructions[index]
        kernel.instructions[index] = Instruction(old.opcode, (resolved,), old.guard, old.line)


def _parse_statement(
    kernel: Kernel, scopes: _Scopes, text: str, line: int, branches: list[tuple[int, str, str]]
) -> None:
    if text.startswith((".pragma", ".loc", ".file")):
        return
    if text.startswith(".reg"):
        _declare_registers(kernel, scopes, text)
        return
    if text.startswith("."):
        if not _shared_variable(kernel, text):
            raise Unsupported(f"line {line}: {text!r}")
        return
    guard = None
    if match := re.match(r"@(!?)([%$\w]+)\s+(.*)", text):
        guard = (scopes.rename(match.group(2)), match.group(1) == "!")
        text = match.group(3)
    opcode, _, rest = text.partition(" ")
    if opcode in ("bra", "bra.uni"):
        branches.append((len(kernel.instructions), rest.strip(), scopes.labels[-1]))
        operands = [rest.strip()]
    else:
        operands = split_operands(scopes.rename(rest))
    kernel.instructions.append(Instruction(opcode, tuple(operands), guard, line))


def _declare_registers(kernel: Kernel, scopes: _Scopes, text: str) -> None:
    _, kind, names = text.split(None, 2)
    for name in (n.strip() for n in names.split(",")):
        if match := re.match(r"(.*)<(\d+)>$", name):
            every = [f"{match.group(1)}{i}" for i in range(int(match.group(2)))]
        else:
            every = [name]
        for register in every:
            kernel.registers[scopes.declare(register)] = (len(kernel.registers), kind[1:])
