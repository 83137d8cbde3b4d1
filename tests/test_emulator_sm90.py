"""The sm90 grouped GEMMs in the PTX emulator: against the oracle, and against recorded hardware."""

import functools
import math

import numpy as np
import pytest
import torch
from dsv4_kernels import grouped_gemm_sm90 as sm90
from dsv4_kernels.grouped_gemm_sm90_kernel import Dsv4GroupedGemmSm90, Gemm

from tests.ptx_emulator.host import EmulatedFunction, emulate
from tests.sm90_problems import (
    DATA,
    PROBLEMS,
    Problem,
    aligned,
    digest,
    expected,
    live_rows,
    make_inputs,
    run,
)

MODES = [("eager", 0), ("lazy", 0), ("random", 1)]
MODE_IDS = [mode for mode, _ in MODES]
FEW_BLOCKS = 3  # each then works on several tiles, and on parts of tiles
RECORDINGS = sorted(DATA.glob("sm90_*.npz"))


@functools.cache
def emulated(gemm: Gemm) -> EmulatedFunction:
    return emulate(Dsv4GroupedGemmSm90(gemm), *sm90.example_arguments(gemm), arch="sm_90a")


@pytest.fixture
def emulator(monkeypatch):
    """Makes sm90's host functions launch in the emulator."""
    settings = {"mode": "eager", "seed": 0, "num_sms": FEW_BLOCKS}

    def launch(gemm: Gemm, tensors: tuple[torch.Tensor, ...], limit: float | None) -> None:
        blocks = settings["num_sms"] * gemm.config.blocks_per_sm
        partials = aligned(torch.full((blocks * sm90.MOST_PARTIALS,), float("nan")))
        flags = aligned(torch.zeros(blocks * sm90._FLAGS, dtype=torch.int32))
        limit = math.inf if limit is None else limit
        arguments = (*tensors, partials, flags, limit, settings["num_sms"], None)
        emulated(gemm).run(*arguments, **settings)
        assert not flags.any(), "flags are left set"

    monkeypatch.setattr(sm90, "launch", launch)
    return _Emulator(settings)


class _Emulator:
    def __init__(self, settings: dict):
        self.settings = settings

    def run(self, problem: Problem, op: str, **settings) -> torch.Tensor:
        self.settings.update(settings)
        return run(problem, make_inputs(problem), op)


def assert_rounded(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Within one rounding to bf16 of the oracle, and fp32 sums in another order."""
    error = (out.float() - exact).abs()
    allowed = exact.abs() * 2**-8 + exact.abs().max() * 1e-5
    assert bool((error <= allowed).all()), f"off by up to {(error / allowed).max():.2f} x allowed"


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
@pytest.mark.parametrize(("mode", "seed"), MODES, ids=MODE_IDS)
def test_equals_the_oracle(emulator, problem, op, mode, seed):
    inputs = make_inputs(problem)
    out = emulator.run(problem, op, mode=mode, seed=seed)
    live = live_rows(inputs)
    assert_rounded(out[live], expected(problem, inputs, op)[live])
    assert out[~live].isnan().all(), "padding rows were written"


def test_the_result_does_not_depend_on_order_or_number_of_blocks(emulator):
    """A tile that several blocks work on is summed in the order of K all the same."""
    problem = PROBLEMS[1]
    results = [
        emulator.run(problem, "fc2", mode=mode, seed=seed, num_sms=FEW_BLOCKS).nan_to_num()
        for mode, seed in MODES
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def bf16_steps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bf16 numbers lie between two arrays of bf16 bits."""
    ordered = [np.where(x & 0x8000, -(x & 0x7FFF).astype(int), x.astype(int)) for x in (a, b)]
    return np.abs(ordered[0] - ordered[1])


def compare_with_hardware(emulator, recording, problem: Problem, op: str) -> float:
    """Same inputs, same blocks: at most one bf16 step apart. Returns the share of equal bits.

    The emulator adds a k16 step's products exactly, the hardware in an order and width of its own,
    so a sum near the middle of two bf16 numbers may round to the other one.
    """
    inputs = make_inputs(problem)
    assert str(recording["digest"]) == digest(inputs), "recorded from other inputs: record again"
    out = emulator.run(problem, op, mode="eager", seed=0, num_sms=int(recording["num_sms"]))
    live = live_rows(inputs).numpy()
    ours = out.view(torch.int16).numpy().view(np.uint16)[live]
    steps = bf16_steps(ours, recording["bits"][live])
    largest = np.abs(expected(problem, inputs, op)).max()
    values = torch.from_numpy(recording["bits"][live].view(np.int16)).view(torch.bfloat16).float()
    small = (values.abs() < largest * 2**-8).numpy()  # cancellation leaves few exact bits there
    assert steps[~small].max(initial=0) <= 1, f"{steps[~small].max()} bf16 steps apart"
    return float((steps == 0).mean())


def test_the_comparison_sees_one_wrong_element(emulator):
    problem = PROBLEMS[0]
    inputs = make_inputs(problem)
    out = emulator.run(problem, "fc2", num_sms=FEW_BLOCKS)
    bits = out.view(torch.int16).numpy().view(np.uint16).copy()
    recording = {"bits": bits, "digest": digest(inputs), "num_sms": FEW_BLOCKS}
    assert compare_with_hardware(emulator, recording, problem, "fc2") == 1.0
    row = int(live_rows(inputs).nonzero()[0])
    column = int(out[row].abs().argmax())
    bits[row, column] ^= 2
    with pytest.raises(AssertionError, match="2 bf16 steps apart"):
        compare_with_hardware(emulator, recording, problem, "fc2")
    with pytest.raises(AssertionError, match="record again"):
        compare_with_hardware(emulator, recording | {"digest": ""}, problem, "fc2")


if RECORDINGS:

    @pytest.mark.parametrize("path", RECORDINGS, ids=[p.stem for p in RECORDINGS])
    def test_equals_the_hardware(emulator, path, record_property):
        recording = np.load(path)
        _, name, op = path.stem.split("_")
        problem = next(p for p in PROBLEMS if p.name == name)
        share = compare_with_hardware(emulator, recording, problem, op)
        record_property("equal bits", share)
        print(f"{path.stem}: {share:.4%} bit-equal to {recording['gpu']}")
        assert share > 0.99
