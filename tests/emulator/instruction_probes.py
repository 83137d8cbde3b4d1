"""Single instructions on chosen values, the same on a Hopper GPU and in the emulator.

A probe runs one snippet, and what that leaves in its buffer `result` is the answer. The answers of
an H200 are kept in `tests/data` (`tests/gpu/hopper_recordings.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from tests.emulator.matrix_snippets import run_wgmma
from tests.emulator.ptx_emulator import silicon, snippet
from tests.emulator.ptx_emulator.snippet import run_snippet

THREADS = 1024


def elementwise(instruction: str, result: type, **operands: np.ndarray) -> None:
    """`instruction` writes register d; (THREADS,) operands are in registers of their names."""
    size = np.dtype(result).itemsize
    body, buffers = [], {}
    for name, values in operands.items():
        assert values.shape == (THREADS,), (name, values.shape)
        bits = 8 * values.itemsize
        body.append(
            f".reg .b{bits} {name}; mad.wide.u32 %rd60, lane, {values.itemsize}, in_{name};"
            f"ld.global.b{bits} {name}, [%rd60];"
        )
        buffers[f"in_{name}"] = values
    body.append(f".reg .b{8 * size} d; {instruction}")
    body.append(f"mad.wide.u32 %rd60, lane, {size}, result; st.global.b{8 * size} [%rd60], d;")
    buffers["result"] = np.zeros(THREADS, result)
    run_snippet("\n".join(body), buffers, warps=THREADS // 32)


def probe(name: str, result: type = np.uint32, **operands: np.ndarray) -> Callable[[], None]:
    """Of an instruction on its operands, in this order."""
    return partial(elementwise, f"{name} d, {', '.join(operands)};", result, **operands)


def any_bits(seed: int, dtype: type = np.uint32) -> np.ndarray:
    """Every kind of number: random bits, then zeros, infinities, NaNs and the edges of subnormals,
    in pairs where dtype holds two of 16 bits."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 32, THREADS, dtype=np.uint32)
    edges = [0, 0x7F80, 0x7FC0, 0x7FFF, 0x0080, 0x007F, 0x0001, 0x7F7F]
    for i, edge in enumerate(edges):
        values[i] = edge << 16 | (0xFFFF if i % 2 else 0)
        values[8 + i] = (edge | 0x8000) << 16
        values[16 + i] = edge << 16 | (edge | 0x8000)
    return values.astype(dtype)


def floats(seed: int, low: float, high: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (low + (high - low) * rng.random(THREADS)).astype(np.float32)


def magnitudes(seed: int, low: int, high: int) -> np.ndarray:
    """Of either sign, evenly from 2^low to 2^high."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], THREADS)
    return (sign * 2.0 ** rng.uniform(low, high, THREADS)).astype(np.float32)


def widening() -> tuple[np.ndarray, np.ndarray]:
    """Codes as bf16 subnormals (code * 2^-126, in pairs) and scales times 2^119, as the sm90
    kernel multiplies them: every code with 128 scale bytes."""
    lane = np.arange(THREADS, dtype=np.uint32)
    code, byte = lane % 8, lane // 8
    low = code << 6
    scale = byte << 4 | 0x7000
    return low | (low | 0x8000) << 16, scale | scale << 16


def bf16_values(rng: np.random.Generator, low: int, high: int, *shape: int) -> np.ndarray:
    """float32 numbers that bf16 holds, of either sign, from 2^low to 2^high."""
    values = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.uniform(low, high, shape)
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def wgmma(low: int, high: int, c_low: int, c_high: int, seed: int, accumulate: bool = True) -> None:
    """Random operands of these binary orders of magnitude."""
    rng = np.random.default_rng(seed)
    a, b = bf16_values(rng, low, high, 64, 16), bf16_values(rng, low, high, 16, 16)
    c = 2.0 ** rng.uniform(c_low, c_high, (64, 16)) * rng.choice([-1.0, 1.0], (64, 16))
    run_wgmma(a, b, c.astype(np.float32) if accumulate else None, registers=True)


def wgmma_cancelling() -> None:
    """C is minus the sum, but for its last bits."""
    rng = np.random.default_rng(20)
    a, b = bf16_values(rng, -3, 3, 64, 16), bf16_values(rng, -3, 3, 16, 16)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    run_wgmma(a, b, -exact.astype(np.float32), registers=True)


def wgmma_ladder(in_c: bool, sign: int) -> None:
    """One beside small addends: in row r, column n there are n + 1 of sign * 2^-(16 + r / 4).

    The one is C, or the first product.
    """
    a, b = np.zeros((64, 16), np.float32), np.zeros((16, 16), np.float32)
    c = np.full((64, 16), float(in_c), np.float32)
    first = 0 if in_c else 1
    for row in range(64):
        a[row, first:] = 2.0 ** -(16 + row // 4)
    for column in range(16):
        b[column, first : first + column + 1] = sign
    if not in_c:
        a[:, 0] = b[:, 0] = 1.0
    run_wgmma(a, b, c, registers=True)


def wgmma_special() -> None:
    """Subnormal operands and sums, overflow, infinities, NaN, zeros of both signs."""
    a, b = np.zeros((64, 16), np.float32), np.zeros((16, 16), np.float32)
    tiny, huge = np.float32(2.0**-133), np.float32(2.0**127)
    values = [tiny, -tiny, 3 * tiny, huge, -huge, np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, -1.0]
    for row in range(64):
        a[row, 0] = values[row % len(values)]
        a[row, 1] = values[row // 2 % len(values)] if row >= 32 else 0.0
    for column in range(16):
        b[column, :2] = [1.0, 2.0**-16, -1.0, 2.0, 2.0**-7, 0.0, -0.0, tiny][column % 8]
    c = np.zeros((64, 16), np.float32)
    c[:, 8:] = -0.0
    c[::5, 12:] = 2.0**-149
    run_wgmma(a, b, c, registers=True)


EXACT: dict[str, Callable[[], None]] = {
    "mul.rn.bf16x2": probe("mul.rn.bf16x2", a=any_bits(1), b=any_bits(2)[::-1].copy()),
    "mul.rn.bf16x2-widening": probe("mul.rn.bf16x2", a=widening()[0], b=widening()[1]),
    "fma.rn.bf16x2": probe("fma.rn.bf16x2", a=any_bits(3), b=any_bits(4), c=any_bits(5)),
    "add.rn.bf16x2": probe("add.rn.bf16x2", a=any_bits(6), b=any_bits(7)),
    "max.bf16x2": probe("max.bf16x2", a=any_bits(8), b=any_bits(9)),
    "mul.rn.f32": probe("mul.rn.f32", a=any_bits(10), b=any_bits(11)),
    "add.rn.f32": probe("add.rn.f32", a=magnitudes(12, -24, 24), b=magnitudes(13, -24, 24)),
    "fma.rn.f32": probe("fma.rn.f32", a=any_bits(14), b=any_bits(15), c=any_bits(16)),
    "fma.rn.f32-near": probe(
        "fma.rn.f32", a=magnitudes(17, -3, 3), b=magnitudes(18, -3, 3), c=magnitudes(19, -24, 24)
    ),
    "mul.ftz.f32": probe("mul.rn.ftz.f32", a=magnitudes(20, -80, -40), b=magnitudes(21, -80, -40)),
    "min.f32": probe("min.f32", a=any_bits(22), b=any_bits(23)),
    "max.NaN.f32": probe("max.NaN.f32", a=any_bits(24), b=any_bits(25)),
    "div.rn.f32": probe("div.rn.f32", a=magnitudes(26, -60, 60), b=magnitudes(27, -60, 60)),
    "cvt.rn.bf16x2.f32": probe("cvt.rn.bf16x2.f32", a=any_bits(28), b=any_bits(29)),
    "cvt.rz.bf16x2.f32": probe("cvt.rz.bf16x2.f32", a=any_bits(30), b=any_bits(31)),
    "cvt.rn.f16x2.f32": probe("cvt.rn.f16x2.f32", a=magnitudes(32, -30, 20), b=any_bits(33)),
    "cvt.rn.satfinite.e4m3x2.f32": probe(
        "cvt.rn.satfinite.e4m3x2.f32", np.uint16, a=magnitudes(34, -12, 10), b=any_bits(35)
    ),
    "cvt.rn.satfinite.e5m2x2.f32": probe(
        "cvt.rn.satfinite.e5m2x2.f32", np.uint16, a=magnitudes(36, -18, 17), b=any_bits(37)
    ),
    "cvt.rn.f16x2.e4m3x2": probe("cvt.rn.f16x2.e4m3x2", a=any_bits(38).view(np.uint16)[::2].copy()),
    "cvt.rni.s32.f32": probe("cvt.rni.s32.f32", a=magnitudes(39, -3, 33)),
    "wgmma-like": lambda: wgmma(0, 1, 0, 4, 1),
    "wgmma-no-C": lambda: wgmma(0, 1, 0, 4, 2, accumulate=False),
    "wgmma-wide": lambda: wgmma(-10, 10, -12, 12, 3),
    "wgmma-small-C": lambda: wgmma(-4, 4, -30, -10, 4),
    "wgmma-large-C": lambda: wgmma(-4, 4, 8, 24, 5),
    "wgmma-cancelling": wgmma_cancelling,
    "wgmma-ladder-C": lambda: wgmma_ladder(True, 1),
    "wgmma-ladder-C-minus": lambda: wgmma_ladder(True, -1),
    "wgmma-ladder-product": lambda: wgmma_ladder(False, 1),
    "wgmma-ladder-product-minus": lambda: wgmma_ladder(False, -1),
    "wgmma-special": wgmma_special,
}


class Approximation(NamedTuple):
    run: Callable[[], None]
    relative: float = 0.0
    absolute: float = 0.0


# The PTX ISA 9.0 (9.7.3) bounds their errors; the emulator rounds the exact value.
APPROXIMATE: dict[str, Approximation] = {
    "ex2.approx.ftz.f32": Approximation(
        probe("ex2.approx.ftz.f32", a=floats(50, -30, 30)), 2.0**-22
    ),
    "ex2.approx.ftz.f32-far": Approximation(
        probe("ex2.approx.ftz.f32", a=floats(51, -160, 140)), 2.0**-22
    ),
    "rcp.approx.ftz.f32": Approximation(
        probe("rcp.approx.ftz.f32", a=magnitudes(52, -125, 125)), 2.0**-23
    ),
    "rcp.approx.ftz.f32-silu": Approximation(
        probe("rcp.approx.ftz.f32", a=floats(53, 1, 3)), 2.0**-23
    ),
    "rsqrt.approx.ftz.f32": Approximation(
        probe("rsqrt.approx.ftz.f32", a=np.abs(magnitudes(54, -100, 100))), 2.0**-22.9
    ),
    "lg2.approx.ftz.f32": Approximation(
        probe("lg2.approx.ftz.f32", a=np.abs(magnitudes(55, -100, 100))),
        2.0**-22,
        absolute=2.0**-22,
    ),
    "tanh.approx.f32": Approximation(probe("tanh.approx.f32", a=magnitudes(56, -8, 4)), 2.0**-11),
    "div.full.f32": Approximation(
        probe("div.full.f32", a=magnitudes(57, -60, 60), b=magnitudes(58, -60, 60)), 2.0**-22
    ),
}


def answers(probe: Callable[[], None], on_gpu: bool) -> np.ndarray:
    """The bytes that the probe's snippet leaves in `result`."""
    collected = []

    def observe(ptx, launch, before, after):
        if on_gpu:
            silicon.run(ptx, launch, list(before.values()))
        collected.append((before if on_gpu else after)["result"].copy())

    snippet.OBSERVERS.append(observe)
    try:
        probe()
    finally:
        snippet.OBSERVERS.remove(observe)
    (bits,) = collected
    return bits
