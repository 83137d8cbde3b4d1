"""wgmma: asynchronous warpgroup matrix multiplication (PTX ISA 9.0, 9.7.15).

Each warp owns 16 of the 64 rows, so a warp's part is computed on its own. An instruction's
accumulators, and its A fragments, belong to it until the warp has waited for its group.
"""

import re

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.matrices import Operand, wgmma_descriptor
from tests.emulator.ptx_emulator.numerics import E4M3, from_bf16, from_f16
from tests.emulator.ptx_emulator.operands import Binder, literal
from tests.emulator.ptx_emulator.program import COLLECTIVE, Step
from tests.emulator.ptx_emulator.tensor_core import multiply_add
from tests.emulator.ptx_emulator.threads import WARP, AsyncResult, Gang, InFlight

_ROWS = 16  # of a warp
_STEP_BYTES = 32  # of K
_UNPACK = {
    "bf16": lambda rows: from_bf16(rows.view(np.uint16)),
    "f16": lambda rows: from_f16(rows.view(np.uint16)),
    "e4m3": lambda rows: E4M3[rows],
}


def compile_wgmma(binder: Binder) -> Step:
    form = binder.parts[1]
    if form == "mma_async":
        return _compile_mma(binder)
    if form == "fence":
        return Step(COLLECTIVE, _fence, None)
    if form == "commit_group":
        return Step(COLLECTIVE, _commit, None)
    if form == "wait_group":
        keep = literal(binder.operands[0])
        return Step(COLLECTIVE, lambda gang, mask: _wait(gang, mask, keep), None)
    raise binder.unsupported()


def _fence(gang: Gang, mask: np.ndarray) -> None:
    gang.machine.counts["wgmma.fence"] += len(gang.warps_of(mask))
    # Registers are replaced, never changed in place: a value that is one of these objects was
    # there at the fence. The compiler may have renamed it since.
    gang.fenced_registers = list(gang.registers)


def _commit(gang: Gang, mask: np.ndarray) -> None:
    for warp in gang.warps_of(mask):
        gang.wgmma_groups[warp].append(gang.wgmma[warp])
        gang.wgmma[warp] = []


def _wait(gang: Gang, mask: np.ndarray, keep: int) -> None:
    for warp in gang.warps_of(mask):
        groups = gang.wgmma_groups[warp]
        while len(groups) > keep:
            for operation, results in groups.pop(0):
                gang.machine.engine.drain(gang.wgmma_queue, operation)
                for result in results:
                    result.settle(gang.warp_lanes(warp))


class _Accumulators(AsyncResult):
    """The output of one instruction: a (16 * warps, N) matrix, gathered by register on demand."""

    matrix: np.ndarray | None = None

    def value(self, position: int) -> np.ndarray | None:
        if self.matrix is None:
            return None
        lane = np.arange(self.matrix.shape[0] // _ROWS * WARP)
        row = lane // WARP * _ROWS + lane % WARP // 4 + 8 * (position >> 1 & 1)
        column = position // 4 * 8 + lane % 4 * 2 + (position & 1)
        return self.matrix[row, column]


def _matrix_of(gang: Gang, registers: list, n: int) -> np.ndarray:
    """(16 * warps, n) float32 from what the accumulator registers hold."""
    first = registers[0]
    if first.__class__ is InFlight and isinstance(first.owner, _Accumulators):
        owner = first.owner
        same = all(
            r.__class__ is InFlight and r.owner is owner and r.position == i
            for i, r in enumerate(registers)
        )
        if same and first.previous is None:
            return owner.matrix
    matrix = np.empty((gang.num_warps * _ROWS, n), np.float32)
    lane = np.arange(gang.lanes)
    for position, register in enumerate(registers):
        if register.__class__ is InFlight:
            register = register.merged(~gang.full)
        row = lane // WARP * _ROWS + lane % WARP // 4 + 8 * (position >> 1 & 1)
        column = position // 4 * 8 + lane % 4 * 2 + (position & 1)
        matrix[row, column] = np.nan if register is None else register.view(np.float32)
    return matrix


def _fragments(registers: list[np.ndarray], num_warps: int) -> np.ndarray:
    """Four A registers of four bytes -> (16 * warps, _STEP_BYTES) uint8."""
    matrix = np.empty((num_warps * _ROWS, _STEP_BYTES // 4), np.uint32)
    lane = np.arange(num_warps * WARP)
    for i, register in enumerate(registers):
        row = lane // WARP * _ROWS + lane % WARP // 4 + 8 * (i & 1)
        matrix[row, lane % 4 + 4 * (i >> 1)] = register
    return matrix.view(np.uint8)


class _Form:
    """A wgmma.mma_async instruction's fixed part."""

    def __init__(self, binder: Binder):
        match = re.search(r"\.m64n(\d+)k(16|32)\.f32\.(bf16|f16|e4m3)\.\3$", binder.opcode)
        if match is None or (match.group(2) == "32") != (match.group(3) == "e4m3"):
            raise binder.unsupported()
        self.n = int(match.group(1))
        self.unpack = _UNPACK[match.group(3)]
        self.kind = match.group(3)
        operands = list(binder.operands)
        self.targets = [binder.kernel.registers[t][0] for t in binder.vector(operands[0])]
        self.from_registers = operands[1].startswith("{")
        self.b = binder.read(operands[2], "u64")
        self.accumulate = binder.read(operands[3], "pred")
        self.sign = literal(operands[4]) * literal(operands[5])
        transposes = [literal(o) for o in operands[6:]]
        if len(self.targets) != self.n // 2 or self.n % 8 or not 8 <= self.n <= 256:
            raise binder.unsupported()
        if self.from_registers:
            names = binder.vector(operands[1])
            self.a_registers = [binder.kernel.registers[r][0] for r in names]
            self.a_reads = [binder.read(r, "u32") for r in names]
            transposes = [0] + transposes if transposes else []
        else:
            self.a = binder.read(operands[1], "u64")
        # 8-bit operands have no transposes.
        self.a_transposed, self.b_transposed = (bool(t) for t in transposes or (0, 0))
        self.name = f"the wgmma at line {binder.instruction.line}"


def _compile_mma(binder: Binder) -> Step:
    form = _Form(binder)

    def action(gang, mask):
        machine = gang.machine
        warps = gang.warps_of(mask)
        machine.counts["wgmma.mma_async"] += len(warps) / 4
        gang.cta.wgmma_counts[[gang.first_warp + warp for warp in warps]] += 1
        b_bits, accumulate = form.b(gang)[mask], form.accumulate(gang)[mask]
        if (b_bits != b_bits[0]).any() or (accumulate != accumulate[0]).any():
            raise Finding("divergent", "wgmma with different operands in one warpgroup")
        _check_fence(gang, form, bool(accumulate[0]), mask)
        what = form.name
        b = Operand(
            gang.cta.shared,
            wgmma_descriptor(int(b_bits[0])),
            form.n,
            _STEP_BYTES,
            what,
            form.b_transposed,
        )
        results = [_Accumulators(what, "wgmma.wait_group", mask.copy())]
        read_a = _a_operand(gang, form, mask, results)
        outputs = results[0]
        inputs = [gang.registers[i] for i in form.targets]
        for register in inputs:
            if register.__class__ is InFlight and not isinstance(register.owner, _Accumulators):
                register.overwrite(mask)
        _claim(gang, form, inputs, outputs, mask)

        def multiply():
            a, b_matrix = read_a(), form.unpack(b.read())
            c = _matrix_of(gang, inputs, form.n) if accumulate[0] else None
            outputs.matrix = multiply_add(a if form.sign > 0 else -a, b_matrix, c, form.kind)
            inputs.clear()

        operation = machine.engine.submit_in_order(gang.wgmma_queue, multiply)
        for warp in warps:
            gang.wgmma[warp].append((operation, results))
        machine.events += 1

    return Step(COLLECTIVE, action, None)


def _check_fence(gang: Gang, form: _Form, accumulate: bool, mask: np.ndarray) -> None:
    """Registers that ordinary instructions wrote need a wgmma.fence before they enter wgmma."""
    if gang.fenced_registers is None:
        raise Finding("async-wait", f"{form.name} without a wgmma.fence before it")
    if mask is not gang.full or gang.starved is not None:
        return  # lanes that renamed a register apart hold a new object
    entering = list(form.a_registers) if form.from_registers else []
    if accumulate:
        entering += form.targets
    for index in entering:
        value = gang.registers[index]
        if value.__class__ is InFlight and isinstance(value.owner, _Accumulators):
            continue
        value = _held(value)
        is_constant = value is None or not value.flags.writeable
        if is_constant or _held(gang.fenced_registers[index]) is value:
            continue
        if all(_held(other) is not value for other in gang.fenced_registers):
            raise Finding(
                "async-wait", f"{form.name} takes a register written after the last wgmma.fence"
            )


def _held(register):
    """What a register holds below the claims on it."""
    while register.__class__ is InFlight:
        register = register.previous
    return register


def _claim(gang: Gang, form: _Form, inputs: list, outputs: _Accumulators, mask: np.ndarray) -> None:
    """The accumulator registers now belong to the instruction."""
    everything = mask is gang.full
    for position, (index, old) in enumerate(zip(form.targets, inputs, strict=True)):
        while old.__class__ is InFlight and (everything or not (old.owner.lanes & ~mask).any()):
            old = old.previous
        gang.registers[index] = InFlight(outputs, position, None if everything else old)


def _latest(register):
    """A register without the claims of instructions that are done with it."""
    while register.__class__ is InFlight and register.owner.readable:
        if register.owner.pending.any():
            break
        register = register.previous
    return register


def _a_operand(gang: Gang, form: _Form, mask: np.ndarray, results: list[AsyncResult]):
    """A function that gives A as (16 * warps, K) float32 when the instruction executes."""
    if form.from_registers:
        bits = [read(gang) for read in form.a_reads]
        held = AsyncResult(form.name, "wgmma.wait_group", mask.copy(), readable=True)
        for position, index in enumerate(form.a_registers):
            gang.registers[index] = InFlight(held, position, _latest(gang.registers[index]))
        results.append(held)
        return lambda: form.unpack(_fragments(bits, gang.num_warps))
    a_bits = form.a(gang)[mask]
    if (a_bits != a_bits[0]).any():
        raise Finding("divergent", "wgmma with different operands in one warpgroup")
    a = Operand(
        gang.cta.shared,
        wgmma_descriptor(int(a_bits[0])),
        64,
        _STEP_BYTES,
        form.name,
        form.a_transposed,
    )
    first = gang.first_warp % 4 * _ROWS

    def read():
        return form.unpack(a.read()[first : first + gang.num_warps * _ROWS])

    return read


COMPILERS = {"wgmma": compile_wgmma}
