"""The sm90 grouped GEMMs in the PTX emulator: against the oracle, and against recorded hardware."""

import time

import numpy as np
import pytest
import torch
from dsv4_kernels import grouped_gemm_sm90

from tests.sm90_emulation import Emulation, emulated
from tests.sm90_problems import (
    DATA,
    PROBLEMS,
    Problem,
    digest,
    expected,
    live_rows,
    make_inputs,
    run,
)

MODES = [("eager", 0), ("lazy", 0), ("random", 1)]
MODE_IDS = [mode for mode, _ in MODES]
RECORDINGS = sorted(DATA.glob("sm90_*.npz"))


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    """Makes sm90's host functions launch in the emulator."""
    emulation = Emulation()
    monkeypatch.setattr(grouped_gemm_sm90, "launch", emulation.launch)
    return emulation


def assert_rounded(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Within one rounding to bf16 of the oracle, and fp32 sums in another order."""
    error = (out.float() - exact).abs()
    allowed = exact.abs() * 2**-8 + exact.abs().max() * 1e-5
    assert bool((error <= allowed).all()), f"off by up to {(error / allowed).max():.2f} x allowed"


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
@pytest.mark.parametrize(("mode", "seed"), MODES, ids=MODE_IDS)
def test_equals_the_oracle(emulation, problem, op, mode, seed):
    inputs = make_inputs(problem)
    emulation.mode, emulation.seed = mode, seed
    out = run(problem, inputs, op)
    live = live_rows(inputs)
    assert_rounded(out[live], expected(problem, inputs, op)[live])
    assert out[~live].isnan().all(), "padding rows were written"


def test_the_result_does_not_depend_on_order_or_number_of_blocks(emulation):
    """A tile that several blocks work on is summed in the order of K all the same."""
    problem = PROBLEMS[1]
    results = []
    for emulation.mode, emulation.seed in MODES:
        results.append(run(problem, make_inputs(problem), "fc2").nan_to_num())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_four_experts_and_a_k_of_1024_take_less_than_ten_seconds(emulation):
    problem = Problem("speed", 64, 4, 2, 1024, 512)
    inputs = make_inputs(problem)
    gemm, _ = grouped_gemm_sm90.gemms(problem.shape, problem.num_tokens)
    emulated(gemm)
    start = time.process_time()
    out = run(problem, inputs, "fc1")
    seconds = time.process_time() - start
    instructions = emulation.statistics[0].warp_instructions
    print(f"{seconds:.1f} s of processor time, {instructions} warp-instructions")
    live = live_rows(inputs)
    assert_rounded(out[live], expected(problem, inputs, "fc1")[live])
    assert seconds < 10


def bf16_steps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bf16 numbers lie between two arrays of bf16 bits."""
    ordered = [np.where(x & 0x8000, -(x & 0x7FFF).astype(int), x.astype(int)) for x in (a, b)]
    return np.abs(ordered[0] - ordered[1])


def compare_with_hardware(emulation, recording, problem: Problem, op: str) -> float:
    """Same inputs, same blocks: at most one bf16 step apart. Returns the share of equal bits.

    The emulator adds a k16 step's products exactly, the hardware in an order and width of its own,
    so a sum near the middle of two bf16 numbers may round to the other one.
    """
    inputs = make_inputs(problem)
    assert str(recording["digest"]) == digest(inputs), "recorded from other inputs: record again"
    emulation.num_sms = int(recording["num_sms"])
    out = run(problem, inputs, op)
    live = live_rows(inputs).numpy()
    ours = out.view(torch.int16).numpy().view(np.uint16)[live]
    steps = bf16_steps(ours, recording["bits"][live])
    largest = np.abs(expected(problem, inputs, op)).max()
    values = torch.from_numpy(recording["bits"][live].view(np.int16)).view(torch.bfloat16).float()
    small = (values.abs() < largest * 2**-8).numpy()  # cancellation leaves few exact bits there
    assert steps[~small].max(initial=0) <= 1, f"{steps[~small].max()} bf16 steps apart"
    return float((steps == 0).mean())


def test_the_comparison_sees_one_wrong_element(emulation):
    problem = PROBLEMS[0]
    inputs = make_inputs(problem)
    out = run(problem, inputs, "fc2")
    bits = out.view(torch.int16).numpy().view(np.uint16).copy()
    recording = {"bits": bits, "digest": digest(inputs), "num_sms": emulation.num_sms}
    assert compare_with_hardware(emulation, recording, problem, "fc2") == 1.0
    row = int(live_rows(inputs).nonzero()[0])
    column = int(out[row].abs().argmax())
    bits[row, column] ^= 2
    with pytest.raises(AssertionError, match="2 bf16 steps apart"):
        compare_with_hardware(emulation, recording, problem, "fc2")
    with pytest.raises(AssertionError, match="record again"):
        compare_with_hardware(emulation, recording | {"digest": ""}, problem, "fc2")


if RECORDINGS:

    @pytest.mark.parametrize("path", RECORDINGS, ids=[p.stem for p in RECORDINGS])
    def test_equals_the_hardware(emulation, path, record_property):
        recording = np.load(path)
        _, name, op = path.stem.split("_")
        problem = next(p for p in PROBLEMS if p.name == name)
        share = compare_with_hardware(emulation, recording, problem, op)
        record_property("equal bits", share)
        print(f"{path.stem}: {share:.4%} bit-equal to {recording['gpu']}")
        assert share > 0.99
