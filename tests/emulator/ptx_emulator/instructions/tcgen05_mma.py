"""tcgen05.mma (PTX ISA 9.0, 9.7.16).

Sums are taken in float64 over one instruction's K and rounded once to float32; the hardware's order
is not documented.
"""

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.matrices import Operand, tcgen05_descriptor
from tests.emulator.ptx_emulator.numerics import E4M3, UE8M0, from_bf16, from_f16, unpack_e2m1
from tests.emulator.ptx_emulator.operands import Binder
from tests.emulator.ptx_emulator.program import PLAIN, Step
from tests.emulator.ptx_emulator.threads import WARP, Cta, Gang


def ctas_of(gang: Gang, paired: bool) -> tuple[Cta, ...]:
    return gang.cta.pair() if paired else (gang.cta,)


def touch(gang: Gang, lane: int, cta: Cta, columns: slice, what: str, write: bool = True) -> None:
    """A lane issues what the pipe of its CTA will do to a CTA's columns."""
    order, rank = gang.cta.tensor_order, gang.cta.rank
    by = order.warp(rank, gang.first_warp + lane // WARP)
    order.issue(by, order.pipe(rank), cta.rank, columns, what, write)


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


def compile_mma(binder: Binder) -> Step:
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
            work, touched = issue(
                ctas_of(gang, paired), values, bool(accumulate(gang)[lane]), block
            )
            for cta, columns, write in touched:
                touch(gang, int(lane), cta, columns, "tcgen05.mma", write)
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
