"""tcgen05: tensor memory and the asynchronous matrix pipe (PTX ISA 9.0, 9.7.16).

mma, cp and commit of a CTA complete in the order of issue. Sums are taken in float64 over one
instruction's K and rounded once to float32; the hardware's order is not documented.
"""

import re

import numpy as np

from tests.ptx_emulator.findings import Finding
from tests.ptx_emulator.matrices import Operand, tcgen05_descriptor
from tests.ptx_emulator.memory import OFFSET_MASK, RANK_SHIFT
from tests.ptx_emulator.numerics import E4M3, UE8M0, from_bf16, from_f16, unpack_e2m1
from tests.ptx_emulator.operands import Binder
from tests.ptx_emulator.program import COLLECTIVE, PLAIN, Step
from tests.ptx_emulator.tensor_order import add
from tests.ptx_emulator.threads import WARP, AsyncResult, Cta, Gang, InFlight


def compile_tcgen05(binder: Binder) -> Step:
    form = binder.parts[1].split("::")[0]
    compilers = {
        "alloc": _compile_alloc,
        "dealloc": _compile_dealloc,
        "relinquish_alloc_permit": _compile_relinquish,
        "wait": _compile_wait,
        "fence": _compile_fence,
        "cp": _compile_cp,
        "commit": _compile_commit,
        "mma": _compile_mma,
        "ld": _compile_load,
        "st": _compile_store,
    }
    if form not in compilers:
        raise binder.unsupported()
    return compilers[form](binder)


def _ctas(gang: Gang, paired: bool) -> tuple[Cta, ...]:
    return gang.cta.pair() if paired else (gang.cta,)


def _per_warp(values: np.ndarray, gang: Gang, warp: int, what: str) -> int:
    lanes = values[gang.warp_lanes(warp)]
    if (lanes != lanes[0]).any():
        raise Finding("divergent", f"{what} with different operands in one warp")
    return int(lanes[0])


def _compile_alloc(binder: Binder) -> Step:
    """alloc: writes the address of the columns to shared memory. With cta_group::2 one warp of
    each CTA executes it; each allocates in its own CTA.

    That one CTA of a pair may only then allocate when the other is known to run is not in the ISA;
    CUTLASS's and DeepGEMM's kernels synchronise the cluster first, and so must ours.
    """
    address, columns = binder.address(binder.operands[0]), binder.read(binder.operands[1], "u32")
    paired = binder.has("cta_group::2")

    def action(gang, mask):
        if paired and gang.cta.cluster_barrier.phase == 0:
            raise Finding(
                "tmem", "tcgen05.alloc of a pair whose CTAs have not met: one may not run"
            )
        for warp in gang.warps_of(mask):
            at = _per_warp(address(gang), gang, warp, "tcgen05.alloc")
            first = gang.cta.tensor.allocate(_per_warp(columns(gang), gang, warp, "tcgen05.alloc"))
            offset = np.array([at & OFFSET_MASK])
            data = np.array([[first]], np.uint32).view(np.uint8)
            gang.cta.shared.scatter(offset, data, 0)
            gang.machine.events += 1

    return Step(COLLECTIVE, action, None)


def _compile_dealloc(binder: Binder) -> Step:
    address, columns = (binder.read(o, "u32") for o in binder.operands)

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            at = _per_warp(address(gang), gang, warp, "tcgen05.dealloc")
            gang.cta.tensor.free(at & 0xFFFF, _per_warp(columns(gang), gang, warp, "dealloc"))

    return Step(COLLECTIVE, action, None)


def _compile_relinquish(binder: Binder) -> Step:
    def action(gang, mask):
        gang.cta.tensor.may_allocate = False

    return Step(COLLECTIVE, action, None)


def _compile_fence(binder: Binder) -> Step:
    name = ".".join(binder.parts)
    before = "before_thread_sync" in name

    def action(gang, mask):
        order, cta = gang.cta.tensor_order, gang.cta
        for warp in gang.warps_of(mask):
            gang.machine.counts[name] += 1
            fence = order.before_sync if before else order.after_sync
            fence(order.warp(cta.rank, gang.first_warp + warp))

    return Step(PLAIN, action, None)


def _compile_wait(binder: Binder) -> Step:
    loads = "wait::ld" in binder.opcode

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            pending = gang.tensor_loads[warp] if loads else gang.tensor_stores[warp]
            for operation, result in pending:
                operation.complete()
                if result is not None:
                    result.settle(gang.warp_lanes(warp))
            pending.clear()
            order, rank = gang.cta.tensor_order, gang.cta.rank
            order.wait(order.warp(rank, gang.first_warp + warp), rank, not loads)

    return Step(COLLECTIVE, action, None)


def _order(gang: Gang, lane: int, cta: Cta, columns: slice, what: str, write: bool = True) -> None:
    """A lane issues what the pipe of its CTA will do to a CTA's columns."""
    order, rank = gang.cta.tensor_order, gang.cta.rank
    by = order.warp(rank, gang.first_warp + lane // WARP)
    order.issue(by, order.pipe(rank), cta.rank, columns, what, write)


def _compile_cp(binder: Binder) -> Step:
    """cp.32x128b.warpx4: 32 rows of 16 bytes to four columns, in all four lane quarters."""
    if not (binder.has("32x128b") and binder.has("warpx4")) or len(binder.operands) != 2:
        raise binder.unsupported()
    paired = binder.has("cta_group::2")
    target, source = binder.address(binder.operands[0]), binder.read(binder.operands[1], "u64")

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            address, bits = int(target(gang)[lane]), int(source(gang)[lane])
            moves = []
            for cta in _ctas(gang, paired):
                operand = Operand(cta.shared, tcgen05_descriptor(bits), 32, 16, "tcgen05.cp")
                columns = cta.tensor.columns(address, 4, "tcgen05.cp")
                moves.append((cta, operand, columns))
                _order(gang, int(lane), cta, columns, "tcgen05.cp")
            gang.machine.counts["tcgen05.cp"] += 1

            def copy(moves=moves):
                for cta, operand, columns in moves:
                    words = np.ascontiguousarray(operand.read()).view(np.uint32)
                    cta.tensor.words[:, columns] = np.tile(words, (4, 1))

            gang.machine.engine.submit_in_order(gang.cta.tensor_queue, copy)
        gang.machine.events += 1

    return Step(PLAIN, action, None)


def _compile_commit(binder: Binder) -> Step:
    """commit: one arrival on an mbarrier when everything issued before it is complete."""
    multicast = binder.has("multicast::cluster")
    address = binder.address(binder.operands[0])
    ctas = binder.read(binder.operands[1], "u16") if multicast else None

    def action(gang, mask):
        machine = gang.machine
        for lane in np.nonzero(mask)[0]:
            at = int(address(gang)[lane])
            receivers = [gang.cta.peer(at)]
            if multicast:
                chosen = int(ctas(gang)[lane])
                receivers = [c for c in gang.cta.cluster if chosen >> c.rank & 1]
            targets = [
                (c, gang.cta.mbarrier(c.rank << RANK_SHIFT | at & OFFSET_MASK)) for c in receivers
            ]

            order, rank = gang.cta.tensor_order, gang.cta.rank
            warp = order.warp(rank, gang.first_warp + int(lane) // WARP)
            told = order.commit(warp, order.pipe(rank))

            def arrive(targets=targets, cta=gang.cta, told=told):
                for receiver, barrier in targets:
                    cta.check_alive(receiver)
                    add(barrier, told)
                    barrier.arrive()
                machine.events += 1

            machine.engine.submit_in_order(gang.cta.tensor_queue, arrive)
        machine.events += 1

    return Step(PLAIN, action, None)


# Matrix multiplication.


class _Shape:
    """What an instruction descriptor says (PTX ISA 9.0, 9.7.16)."""

    def __init__(self, bits: int, num_ctas: int, block_scaled: bool):
        self.bits = bits
        self.n = (bits >> 17 & 63) << 3
        self.m = (bits >> 27 & 3) << 7 if block_scaled else (bits >> 24 & 31) << 4
        self.negate_a, self.negate_b = bits >> 13 & 1, bits >> 14 & 1
        self.a_rows_contiguous, self.b_rows_contiguous = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
        step = 8 * num_ctas if block_scaled or self.m == 64 else 16 * num_ctas
        if self.m != 128 * num_ctas or not step <= self.n <= 256 or self.n % step:
            raise Finding("descriptor", f"tcgen05.mma of M {self.m}, N {self.n}, {num_ctas} CTA")
        if bits & 4:
            raise Finding("descriptor", f"instruction descriptor {bits:#x} asks for sparsity")


def _compile_mma(binder: Binder) -> Step:
    paired = binder.has("cta_group::2")
    kind = next((p for p in binder.parts if p.startswith("kind::")), "")
    if binder.has("ws", "sp") or binder.operands[1].startswith("["):
        raise binder.unsupported()
    block_scaled = binder.has("block_scale")
    collector = [p for p in binder.parts if p.startswith("collector") and "::b" in p]
    if collector:
        raise binder.unsupported()
    if kind == "kind::mxf4nvf4" and block_scaled:
        block = 16 if binder.has("block16", "scale_vec::4X") else 32
    elif kind == "kind::f16" and not block_scaled:
        block = 0
    else:
        raise binder.unsupported()
    operands = binder.operands
    target = binder.address(operands[0])
    a, b = binder.read(operands[1], "u64"), binder.read(operands[2], "u64")
    shape = binder.read(operands[3], "u32")
    scales = [binder.address(o) for o in operands[4:6]] if block_scaled else []
    rest = operands[4 + len(scales) :]
    if len(rest) != 1:
        raise binder.unsupported("(with a disable-output mask or a scale of D)")
    accumulate = binder.read(rest[0], "pred")

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            gang.machine.counts["tcgen05.mma"] += 1
            values = [int(read(gang)[lane]) for read in (target, a, b, shape, *scales)]
            issue = _issue_scaled if block_scaled else _issue_half
            work, touched = issue(_ctas(gang, paired), values, bool(accumulate(gang)[lane]), block)
            for cta, columns, write in touched:
                _order(gang, int(lane), cta, columns, "tcgen05.mma", write)
            gang.machine.engine.submit_in_order(gang.cta.tensor_queue, work)
        gang.machine.events += 1

    return Step(PLAIN, action, None)


def _accumulate(cta: Cta, columns: slice, product: np.ndarray, accumulate: bool) -> None:
    words = cta.tensor.words
    if accumulate:
        product = product + words[:, columns].view(np.float32)
    words[:, columns] = product.astype(np.float32).view(np.uint32)


def _scale_factors(cta: Cta, columns: slice, rows: int, what: str) -> np.ndarray:
    """(rows, 4) bytes: row r is the word at lane r % 32, column r // 32, in every quarter."""
    words = cta.tensor.words[:, columns].reshape(4, 32, -1)
    if (words != words[:1]).any():
        raise Finding("tmem", f"{what}: the four lane quarters hold different scale factors")
    per_row = np.ascontiguousarray(words[0].T).reshape(-1)[:rows]
    return per_row.view(np.uint8).reshape(rows, 4)


def _issue_scaled(ctas: tuple[Cta, ...], values: list[int], accumulate: bool, block: int):
    """kind::mxf4nvf4: D = (A * scale_A) (B * scale_B)^T (+ D), E2M1, K of 64."""
    target, a_bits, b_bits, shape_bits, a_scale, b_scale = values
    shape = _Shape(shape_bits, len(ctas), True)
    if shape_bits >> 7 & 7 != 1 or shape_bits >> 10 & 3 != 1 or shape_bits >> 31:
        raise Finding("descriptor", f"instruction descriptor {shape_bits:#x}: E2M1, K of 64")
    if shape_bits >> 15 & 3 or shape_bits >> 4 & 3 or shape_bits >> 29 & 3:
        raise Finding("descriptor", f"instruction descriptor {shape_bits:#x}: majors and scale ids")
    table = UE8M0 if shape_bits >> 23 & 1 else E4M3
    blocks = 64 // block
    n_columns = -(-shape.n // 32)
    what = "tcgen05.mma"
    a_operands = [Operand(c.shared, tcgen05_descriptor(a_bits), 128, 32, what) for c in ctas]
    b_rows = shape.n // len(ctas)
    b_operands = [Operand(c.shared, tcgen05_descriptor(b_bits), b_rows, 32, what) for c in ctas]
    slices = [
        (
            c.tensor.columns(target, shape.n, "tcgen05.mma D"),
            c.tensor.columns(a_scale, 4, "tcgen05.mma scale A"),
            c.tensor.columns(b_scale, n_columns, "tcgen05.mma scale B"),
        )
        for c in ctas
    ]

    def multiply():
        b = np.concatenate([unpack_e2m1(o.read()) for o in b_operands]).astype(np.float64)
        for cta, a_operand, (d, sa, sb) in zip(ctas, a_operands, slices, strict=True):
            a_factors = table[_scale_factors(cta, sa, 128, "scale A")[:, :blocks]]
            b_factors = table[_scale_factors(cta, sb, shape.n, "scale B")[:, :blocks]]
            a = unpack_e2m1(a_operand.read()) * np.repeat(a_factors, block, axis=1)
            product = a.astype(np.float64) @ (b * np.repeat(b_factors, block, axis=1)).T
            if shape.negate_a ^ shape.negate_b:
                product = -product
            _accumulate(cta, d, product, accumulate)

    touched = [
        (cta, columns, write)
        for cta, of_cta in zip(ctas, slices, strict=True)
        for columns, write in zip(of_cta, (True, False, False), strict=True)
    ]
    return multiply, touched


def _issue_half(ctas: tuple[Cta, ...], values: list[int], accumulate: bool, block: int):
    """kind::f16: f16 or bf16 operands, float32 sums, K of 16."""
    target, a_bits, b_bits, shape_bits = values
    shape = _Shape(shape_bits, len(ctas), False)
    unpack = {0: from_f16, 1: from_bf16}
    a_format, b_format = shape_bits >> 7 & 7, shape_bits >> 10 & 7
    if shape_bits >> 4 & 3 != 1 or a_format not in unpack or b_format not in unpack:
        raise Finding("descriptor", f"instruction descriptor {shape_bits:#x}: f16 or bf16 to f32")
    what = "tcgen05.mma"
    a_operands = [
        Operand(c.shared, tcgen05_descriptor(a_bits), 128, 32, what, shape.a_rows_contiguous)
        for c in ctas
    ]
    b_operands = [
        Operand(
            c.shared,
            tcgen05_descriptor(b_bits),
            shape.n // len(ctas),
            32,
            what,
            shape.b_rows_contiguous,
        )
        for c in ctas
    ]
    slices = [c.tensor.columns(target, shape.n, "tcgen05.mma D") for c in ctas]

    def multiply():
        halves = [o.read().view(np.uint16) for o in b_operands]
        b = unpack[b_format](np.concatenate(halves)).astype(np.float64)
        for cta, a_operand, d in zip(ctas, a_operands, slices, strict=True):
            a = unpack[a_format](a_operand.read().view(np.uint16)).astype(np.float64)
            product = a @ b.T
            if shape.negate_a ^ shape.negate_b:
                product = -product
            _accumulate(cta, d, product, accumulate)

    return multiply, [(cta, d, True) for cta, d in zip(ctas, slices, strict=True)]


# Loads and stores.


def _access_shape(binder: Binder) -> tuple[str, int]:
    match = re.search(r"\.(\d+x\d+b)(?:x2)?\.x(\d+)", binder.opcode)
    if match is None or match.group(1) not in _FRAGMENTS or binder.has("pack::16b", "unpack::16b"):
        raise binder.unsupported()
    if "x2.x" in binder.opcode or binder.has("red"):
        raise binder.unsupported()
    return match.group(1), int(match.group(2))


# Per shape: lanes of tensor memory, and (lane, column) of each register of a thread, for .x1
# (PTX ISA 9.0, 9.7.16, figures of the data movement shapes). .xN repeats along columns.
_T = np.arange(WARP)
_FRAGMENTS = {
    "32x32b": (1, [(_T, 0 * _T)]),
    "16x128b": (4, [(_T // 4, _T % 4), (_T // 4 + 8, _T % 4)]),
    "16x256b": (
        8,
        [
            (_T // 4, _T % 4 * 2),
            (_T // 4, _T % 4 * 2 + 1),
            (_T // 4 + 8, _T % 4 * 2),
            (_T // 4 + 8, _T % 4 * 2 + 1),
        ],
    ),
}


def _positions(shape: str, repeat: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(registers, 32) lanes and columns within the access, and its width in columns."""
    width, registers = _FRAGMENTS[shape]
    lanes = np.stack([r[0] for r in registers] * repeat)
    columns = np.stack([r[1] + width * i for i in range(repeat) for r in registers])
    return lanes, columns, width * repeat


def _access(
    gang: Gang, warp: int, address: int, shape: str, width: int, write: bool
) -> tuple[int, slice]:
    what = "tcgen05.st" if write else "tcgen05.ld"
    lane = address >> 16
    quarter = 32 * ((gang.first_warp + warp) % 4)
    allowed = (quarter,) if shape == "32x32b" else (quarter, quarter + 16)
    if lane not in allowed:
        raise Finding(
            "tmem",
            f"{what} of lanes {lane}.. by warp {gang.first_warp + warp}, which owns "
            f"{quarter}..{quarter + 31}",
        )
    columns = gang.cta.tensor.columns_of_a_warp(address, width, what)
    order, rank = gang.cta.tensor_order, gang.cta.rank
    by = order.warp(rank, gang.first_warp + warp)
    order.access(by, rank, slice(quarter // 32, quarter // 32 + 1), columns, write, what)
    return lane, columns


def _compile_load(binder: Binder) -> Step:
    shape, repeat = _access_shape(binder)
    lanes, columns, width = _positions(shape, repeat)
    targets = [binder.kernel.registers[t][0] for t in binder.vector(binder.operands[0])]
    if len(targets) != len(lanes):
        raise binder.unsupported()
    address = binder.address(binder.operands[1])
    name = f"`{'.'.join(binder.parts[:2])}` at line {binder.instruction.line}"

    def action(gang, mask):
        addresses = address(gang)
        result = AsyncResult(name, "tcgen05.wait::ld", mask.copy())
        reads = []
        for warp in gang.warps_of(mask):
            at = _per_warp(addresses, gang, warp, "tcgen05.ld")
            lane, where = _access(gang, warp, at, shape, width, False)
            reads.append((gang.warp_lanes(warp), lanes + lane, columns + where.start))

        def load():
            values = np.zeros((len(targets), gang.lanes), np.uint32)
            for threads, rows, cols in reads:
                values[:, threads] = gang.cta.tensor.words[rows, cols]
            result.values = list(values)

        for position, index in enumerate(targets):
            old = gang.registers[index]
            if old.__class__ is InFlight:
                old = old.overwrite(mask)
            gang.registers[index] = InFlight(result, position, old)
        operation = gang.machine.engine.submit(load)
        for warp in gang.warps_of(mask):
            gang.tensor_loads[warp].append((operation, result))

    return Step(COLLECTIVE, action, None)


def _compile_store(binder: Binder) -> Step:
    shape, repeat = _access_shape(binder)
    lanes, columns, width = _positions(shape, repeat)
    sources = [binder.read(s, "u32") for s in binder.vector(binder.operands[1])]
    if len(sources) != len(lanes):
        raise binder.unsupported()
    address = binder.address(binder.operands[0])

    def action(gang, mask):
        addresses = address(gang)
        values = np.stack([read(gang) for read in sources])
        for warp in gang.warps_of(mask):
            at = _per_warp(addresses, gang, warp, "tcgen05.st")
            lane, where = _access(gang, warp, at, shape, width, True)

            def store(warp=warp, lane=lane, first=where.start):
                written = values[:, gang.warp_lanes(warp)]
                gang.cta.tensor.words[lanes + lane, columns + first] = written

            operation = gang.machine.engine.submit(store)
            gang.tensor_stores[warp].append((operation, None))

    return Step(COLLECTIVE, action, None)


COMPILERS = {"tcgen05": compile_tcgen05}
