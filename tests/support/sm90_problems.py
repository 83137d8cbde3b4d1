"""Small seeded problems for the sm90 grouped GEMMs, the same on every machine.

For the PTX emulator, and for `hopper_recordings`, which keeps what a GPU computes.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from dsv4_kernels import reference
from dsv4_kernels.backends import SM90
from dsv4_kernels.padding import padded_weights
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90 import heuristic
from dsv4_kernels.sm90.spec import LayerConfig, Sm90Config
from dsv4_kernels.types import MXFP4_BLOCK, ExpertLayout, ExpertWeights, MoeLayer, MoeShape

from tests.support.layers import aligned, rounding_error
from tests.support.sm90_shuffle import shuffled, shuffled_mxfp4

ROW_TILE = 8  # the row groups of experts are padded to it


class Problem(NamedTuple):
    name: str
    num_tokens: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    limit: float | None = 10.0
    skewed: bool = False  # every token goes to the first experts
    seed: int = 0
    counts: tuple[int, ...] = ()  # the rows of each expert, if given; with a top_k of 1
    weight_format: str = "nvfp4"

    @property
    def shape(self) -> MoeShape:
        return MoeShape(
            self.num_experts,
            self.num_experts,
            self.top_k,
            self.hidden,
            self.intermediate,
            self.num_tokens,
            False,
            weight_format=self.weight_format,
        )


# Both GEMMs of each have tiles of several stages, some of which five blocks split.
PROBLEMS = [
    Problem("one-token", 1, 4, 2, 512, 704),
    Problem("decode", 9, 4, 2, 384, 384, limit=1.0),
    Problem("skewed", 70, 4, 2, 320, 320, limit=None, skewed=True),
    Problem("large", 120, 4, 2, 256, 192),
]


class Inputs(NamedTuple):
    weights: ExpertWeights  # as the checkpoint has them
    prepared: ExpertWeights  # the kernel's copy
    layout: ExpertLayout
    routing_weights: torch.Tensor  # (num_tokens, top_k) float32
    x: torch.Tensor  # (num_tokens, hidden) bf16
    h: torch.Tensor  # (capacity, intermediate) bf16

    def to(self, device: str) -> "Inputs":
        return Inputs(
            *(
                type(part)(*(t.to(device) for t in part))
                if isinstance(part, tuple)
                else part.to(device)
                for part in self
            )
        )


def make_inputs(problem: Problem) -> Inputs:
    rng = np.random.default_rng(problem.seed)
    experts, hidden, inter = problem.num_experts, problem.hidden, problem.intermediate

    def codes(rows: int, k: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (experts, rows, k // 2), np.uint8))

    def scales(rows: int, k: int) -> torch.Tensor:
        """From 2^-3 to 2^5, with zeros and the extremes 2^-9 and 448; MXFP4's with two powers that
        are 30 apart."""
        if problem.weight_format == "mxfp4":
            value = rng.integers(124, 132, (experts, rows, k // MXFP4_BLOCK), np.uint8)
            odd = rng.integers(0, 97, value.shape)
            value[odd == 0], value[odd == 1] = 101, 131
            return torch.from_numpy(value)
        value = rng.integers(32, 96, (experts, rows, k // 16), np.uint8)
        odd = rng.integers(0, 97, value.shape)
        for i, byte in enumerate((0x00, 0x01, 0x7E)):
            value[odd == i] = byte
        return torch.from_numpy(value).view(torch.float8_e4m3fn)

    def factors(*size: int) -> torch.Tensor:
        return torch.from_numpy((rng.random(size, np.float32) + 0.5) * np.float32(2.0**-12))

    def rows(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size, np.float32)).bfloat16()

    weights = ExpertWeights(
        codes(2 * inter, hidden),
        scales(2 * inter, hidden),
        factors(experts, 2),
        codes(hidden, inter),
        scales(hidden, inter),
        factors(experts),
    )
    scores = rng.random((problem.num_tokens, experts))
    if problem.skewed:
        scores[:, : problem.top_k] += 1
    ids = torch.from_numpy(np.argsort(-scores, axis=1)[:, : problem.top_k].astype(np.int32))
    if problem.counts:
        counts = torch.tensor(problem.counts)
        ids = torch.arange(experts, dtype=torch.int32).repeat_interleave(counts)[:, None]
        assert ids.shape == (problem.num_tokens, problem.top_k), problem
    layout = reference.expert_layout(ids, experts, None, ROW_TILE)
    is_mxfp4 = problem.weight_format == "mxfp4"
    padded = padded_weights(SM90, weights)
    prepared = shuffled_mxfp4(padded)[0] if is_mxfp4 else shuffled(padded)
    prepared = ExpertWeights(*(aligned(t) for t in prepared))
    return Inputs(
        weights,
        prepared,
        ExpertLayout(*(aligned(t) for t in layout)),
        aligned(
            torch.from_numpy(rng.random((problem.num_tokens, problem.top_k), np.float32) + 0.1)
        ),
        aligned(rows(problem.num_tokens, hidden)),
        aligned(rows(len(layout.row_to_slot), padded.intermediate)),
    )


def live_rows(inputs: Inputs) -> torch.Tensor:
    return inputs.layout.row_to_slot >= 0


def expected(problem: Problem, inputs: Inputs, op: str) -> torch.Tensor:
    """The oracle's rows in float32, before their rounding to bf16; padding rows are zero."""
    layout = inputs.layout
    width = inputs.h.shape[1] if op == "fc1" else problem.hidden
    out = torch.zeros(len(layout.row_to_slot), width)
    for expert in layout.counts.nonzero().flatten().tolist():
        first = int(layout.offsets[expert])
        rows = slice(first, first + int(layout.counts[expert]))
        slot = layout.row_to_slot[rows].long()
        if op == "fc1":
            x = inputs.x[slot // problem.top_k].float()
            weight = inputs.routing_weights.flatten()[slot]
            h = reference.fc1(x, inputs.weights, expert, weight, problem.limit)
            out[rows, : problem.intermediate] = h
        else:
            h = inputs.h[rows, : problem.intermediate].float()
            out[rows] = reference.fc2(h, inputs.weights, expert)
    return out


def placed_rows(inputs: Inputs, top_k: int) -> torch.Tensor:
    """(capacity, hidden): x as the layout says, NaN in padding rows."""
    slots = inputs.layout.row_to_slot.long()
    rows = aligned(torch.full((len(slots), inputs.x.shape[1]), float("nan"), dtype=torch.bfloat16))
    rows[slots >= 0] = inputs.x.cpu()[(slots[slots >= 0] // top_k).cpu()]
    return rows.to(inputs.x.device)


def layer_of(prepared: ExpertWeights, shape: MoeShape, limit: float | None = None) -> MoeLayer:
    """A layer of weights that are in the kernels' order already."""
    nothing = torch.zeros(1, device=prepared.w13.device)
    return MoeLayer(SM90, shape, prepared, limit, None, nothing, nothing)


def run(problem: Problem, inputs: Inputs, op: str) -> torch.Tensor:
    """The op's own host function on the inputs' device; rows that do not exist stay NaN."""
    width = inputs.h.shape[1] if op == "fc1" else problem.hidden
    size = (len(inputs.layout.row_to_slot), width)
    out = aligned(torch.full(size, float("nan"), dtype=torch.bfloat16))
    out = out.to(inputs.x.device)
    layout, shape = inputs.layout, problem.shape
    layer = layer_of(inputs.prepared, shape, problem.limit)
    if op == "fc1":
        x, routing = inputs.x, inputs.routing_weights
        if not sm90.gemms(shape, problem.num_tokens)[0].gather:
            x = placed_rows(inputs, problem.top_k)
        sm90.fc1(x, routing, layout, layer, out=out)
    else:
        sm90.fc2(inputs.h, layout, layer, out=out)
    return out


def check(problem: Problem, inputs: Inputs, op: str, out: torch.Tensor) -> None:
    """Rows that exist are the oracle's, rounded to bf16, and the others were not written."""
    live = live_rows(inputs)
    error = rounding_error(out[live], expected(problem, inputs, op)[live])
    assert error <= 1, f"off by up to {error:.2f} x what is allowed"
    assert out[~live].isnan().all(), "padding rows were written"


def run_and_check(problem: Problem, op: str) -> None:
    inputs = make_inputs(problem)
    check(problem, inputs, op, run(problem, inputs, op))


def digest(inputs: Inputs) -> str:
    """Of the problem, as the checkpoint has its weights: recordings are compared with the same."""
    tensors = [*inputs.weights, *inputs.layout, inputs.routing_weights, inputs.x, inputs.h]
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def use_choice(choose_config: Callable) -> None:
    """Have the host functions choose configs so, instead of by the heuristic."""
    heuristic.choose_config = choose_config
    sm90.gemms.cache_clear()
    sm90.all_gemms.cache_clear()


def use_config(config: Sm90Config, gather: bool = False) -> None:
    """In both GEMMs, whatever the rows."""
    use_choice(lambda *_: LayerConfig(gather, config, config))
