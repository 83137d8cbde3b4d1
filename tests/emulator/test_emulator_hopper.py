"""The emulator against an H200: single instructions, and this project's sm90 kernels.

What the GPU computed is in `tests/data`, made there by the command that `hopper_recordings` names.
Where a kernel's order of sums changes (its stages, its split of K, its epilogue), its recording no
longer holds and is made again by that command; a case's config and blocks are its own, so
`choose_config` may change freely. `pytest -m gpu` asks the GPU at hand instead of the recording.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90

from tests.emulator.instruction_probes import APPROXIMATE, EXACT, Approximation, answers
from tests.emulator.ptx_emulator import tensor_core
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.sm90_emulation import Emulation, emulated
from tests.gpu.hopper_recordings import CASES, DATA, INSTRUCTIONS, run_case
from tests.support.sm90_problems import digest, live_rows, make_inputs

WHOLE_TILES = ("fc2-skewed", "fc2-cluster")  # of the cases; the others split some
AGAIN = "record again: see tests/gpu/hopper_recordings.py"


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / INSTRUCTIONS))


def assert_same_bits(name: str, gpu: np.ndarray) -> None:
    ours = answers(EXACT[name], False)
    assert ours.shape == gpu.shape, AGAIN
    differing = (ours != gpu).sum()
    assert differing == 0, f"{differing} of {len(gpu)} bytes differ"


def assert_close(name: str, gpu: np.ndarray) -> None:
    """The error that the PTX ISA allows an approximation, against the emulator's rounded value."""
    probe: Approximation = APPROXIMATE[name]
    ours, theirs = (x.view(np.float32).astype(np.float64) for x in (answers(probe.run, False), gpu))
    assert ours.shape == theirs.shape, AGAIN
    special = ~np.isfinite(ours) | (ours == 0)
    assert np.array_equal(ours[special], theirs[special])
    ours, theirs = ours[~special], theirs[~special]
    # 2^-24 is the emulator's own rounding.
    allowed = probe.absolute + (probe.relative + 2.0**-24) * np.abs(ours)
    used = (np.abs(theirs - ours) / allowed).max()
    print(f"{name}: up to {used:.2f} of what the PTX ISA allows")
    assert used <= 1


@pytest.mark.parametrize("name", EXACT)
def test_an_instruction_gives_the_bits_of_the_gpu(recorded, name):
    assert_same_bits(name, recorded[name])


@pytest.mark.parametrize("name", APPROXIMATE)
def test_an_approximation_is_as_close_as_documented(recorded, name):
    assert_close(name, recorded[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXACT | APPROXIMATE)
def test_the_gpu_at_hand_answers_like_the_emulator(name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the probes are sm_90a's, and this GPU is another")
    if name in EXACT:
        assert_same_bits(name, answers(EXACT[name], True))
    else:
        assert_close(name, answers(APPROXIMATE[name].run, True))


@pytest.mark.parametrize("bits", [23, 24, 26, 27, 40])
def test_the_recording_tells_how_wide_hopper_adds(recorded, monkeypatch, bits):
    """With another width than 25 bits, of sums of products from 2^-20 to 2^20 at most 82 % have the
    GPU's bits (24: 65 %, 26: 82 %, without limit: 71 %)."""
    monkeypatch.setitem(tensor_core.FRACTION_BITS, "bf16", bits)
    ours = answers(EXACT["wgmma-wide"], False).view(np.uint32)
    assert (ours == recorded["wgmma-wide"].view(np.uint32)).mean() < 0.82


def bf16_steps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bf16 numbers lie between two arrays of bf16 bits."""
    ordered = [np.where(x & 0x8000, -(x & 0x7FFF).astype(int), x.astype(int)) for x in (a, b)]
    return np.abs(ordered[0] - ordered[1])


def assert_equals_the_gpu(name: str, recording) -> None:
    """FC2 bit by bit. FC1's SwiGLU goes through ex2 and rcp, whose approximations the emulator
    rounds: each may be an ulp of float32 off (see APPROXIMATE), 5 in all at 2^-24 with the
    products, which moves a value over a boundary of bf16's 2^-9 in one of 6000 cases or fewer."""
    case = CASES[name]
    inputs = make_inputs(case.problem)
    assert str(recording["digest"]) == digest(inputs), f"recorded from other inputs; {AGAIN}"
    out = run_case(case, inputs)
    live = live_rows(inputs).numpy()
    ours = out.view(torch.int16).numpy().view(np.uint16)[live]
    steps = bf16_steps(ours, recording["bits"][live])
    print(f"{name}: {(steps == 0).mean():.4%} bit-equal to {recording['gpu']}")
    differing = f"{(steps > 0).sum()} of {steps.size} differ, up to {steps.max()} bf16 steps"
    if case.op == "fc2":
        assert steps.max() == 0, f"{differing}; {AGAIN} if the order of sums changed"
    else:
        assert steps.max() <= 1, f"{differing}; {AGAIN} if the order of sums changed"
        assert (steps > 0).sum() <= 2 + steps.size / 2000, differing


@pytest.fixture
def in_emulator(monkeypatch) -> Callable[..., Emulation]:
    """Makes sm90's launches, of as many blocks as the named case has, go to the emulator."""

    def prepare(name: str, **options) -> Emulation:
        blocks = CASES[name].num_blocks
        emulation = Emulation(**{"num_sms": blocks, "blocks": blocks} | options)
        monkeypatch.setattr(sm90, "launch", emulation.launch)
        return emulation

    return prepare


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_the_gpu(in_emulator, name):
    emulation = in_emulator(name)
    assert_equals_the_gpu(name, np.load(DATA / f"sm90_{name}.npz"))
    assert bool(emulation.spills[0]) == (name not in WHOLE_TILES), "which tiles are split"


class Impatient(Dsv4GroupedGemmSm90):
    """Traps at the first look at a flag that is not set."""

    spin_limit = 1


@pytest.mark.parametrize("name", CASES)
def test_one_resident_block_equals_the_gpu_and_waits_for_none(in_emulator, name):
    """As where other kernels hold all multiprocessors but one: a block, or cluster, starts when the
    one before has ended."""
    in_emulator(name, num_sms=1, kernel=Impatient)
    assert_equals_the_gpu(name, np.load(DATA / f"sm90_{name}.npz"))


@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_a_flag_that_never_comes_ends_in_a_trap(in_emulator, op):
    """With a spin limit; without one, as served, nothing in the kernel traps."""

    class Patient(Dsv4GroupedGemmSm90):
        spin_limit = 500

    case = CASES[f"{op}-one-token"]
    inputs = make_inputs(case.problem)
    in_emulator(f"{op}-one-token", kernel=Patient)
    run_case(case, inputs)
    ptx = emulated(case.gemm, Patient).ptx
    missing, flags = re.subn(r"st\.release\.gpu\.global\.b32[^;]*;", "", ptx)
    assert flags
    in_emulator(f"{op}-one-token", kernel=Patient, ptx=missing)
    with pytest.raises(Finding, match="trap"):
        run_case(case, inputs)
    assert "trap;" in ptx and "trap" not in emulated(case.gemm).ptx


def test_the_comparison_sees_one_wrong_element(in_emulator):
    name = "fc2-one-token"
    in_emulator(name)
    recording = dict(np.load(DATA / f"sm90_{name}.npz"))
    bits = recording["bits"].copy()
    row = int(live_rows(make_inputs(CASES[name].problem)).nonzero()[0])
    bits[row, 7] ^= 1
    with pytest.raises(AssertionError, match="1 of 512 differ, up to 1 bf16 steps"):
        assert_equals_the_gpu(name, recording | {"bits": bits})
    with pytest.raises(AssertionError, match="record again"):
        assert_equals_the_gpu(name, recording | {"digest": ""})


def test_the_cases_cover_the_kernel():
    """Both ops, gathered rows and TMA, one and two row blocks, clusters, stages of 64 to 256."""
    gemms = [case.gemm for case in CASES.values()]
    assert {g.op for g in gemms} == {"fc1", "fc2"}
    assert {g.gather for g in gemms} == {True, False}
    assert {g.config.m_blocks for g in gemms} == {1, 2}
    assert {(g.op, g.config.cluster) for g in gemms} >= {("fc1", 2), ("fc2", 2)}
    assert {g.config.tile_k for g in gemms} == {64, 128, 256}
    counts = [make_inputs(case.problem).layout.counts for case in CASES.values()]
    assert any(0 in c for c in counts), "no case has an expert without rows"
