"""What the roles of the sm_100a grouped GEMM are given, by name: groups of device values."""

from typing import NamedTuple

from cutlass import Float32, Int32, Uint32, cute


class Loads(NamedTuple):
    """TMA load atoms; the producer has their descriptors' addresses under the same names."""

    weights: cute.CopyAtom
    weight_scales: cute.CopyAtom
    tokens: cute.CopyAtom
    token_scales: cute.CopyAtom


class Layout(NamedTuple):
    counts: cute.Pointer
    offsets: cute.Pointer
    tile_to_expert: cute.Pointer


class GlobalScales(NamedTuple):
    weights: cute.Pointer
    tokens: cute.Pointer


class Output(NamedTuple):
    store: cute.CopyAtom | None  # fc2: TMA
    rows: cute.Tensor | cute.Pointer  # fc2: TMA's view of out; fc1: out
    scales: cute.Pointer  # None unless quantize, like the next
    global_scales: cute.Pointer


class Routing(NamedTuple):
    """fc1's; saturated: quantize."""

    row_to_slot: cute.Pointer | None
    weights: cute.Pointer | None
    saturated: cute.Pointer | None
    limit: Float32


class Barriers(NamedTuple):
    """Full and empty of the stages, and of the two accumulators."""

    full: cute.Pointer
    empty: cute.Pointer
    acc_full: cute.Pointer
    acc_empty: cute.Pointer


class Stages(NamedTuple):
    """Shared-memory addresses: operands (stages, rows, 128 bytes) and their block scales."""

    weights: Int32
    tokens: Int32
    weight_scales: Int32
    token_scales: Int32


class Work(NamedTuple):
    """This cluster's tiles: range(first, end, step)."""

    first: Uint32
    step: Uint32
    end: Uint32


class TileScales(NamedTuple):
    """Factors of a tile's sums (fc1: of gate and up; fc2: twice the same), the global scale of what
    is quantised, and fc1's limit."""

    gate: Float32
    up: Float32
    out: Float32
    limit: Float32
