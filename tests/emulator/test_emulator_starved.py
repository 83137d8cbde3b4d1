"""Mode "starved" of the PTX emulator: this project's kernels are right whoever comes last."""

import numpy as np
import pytest
import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90

from tests.emulator import test_grouped_gemm_sm100 as on_sm100
from tests.emulator.ptx_emulator.starvation import victim
from tests.emulator.sm100_emulation import Emulation as Emulation100
from tests.support import sm90_problems

THREADS = np.arange(128)
PROBLEM = sm90_problems.Problem("starved", 8, 4, 2, 512, 512)
# Warps of the sm90 kernels: 16 consumers, the weights' producer, and where rows are gathered one
# that passes them on and two that fetch them. After the warps come lanes.
SM90 = {
    "fc1": {"consumer": 0, "producer": 16, "fence warp": 17, "gather": 19, "upper lanes": 20},
    "fc2": {"consumer": 15, "producer": 16, "first lanes": 21},
}
SM90_CASES = [(op, role) for op, roles in SM90.items() for role in roles]
# Warps of the sm100 kernels: four of the epilogue, the MMA's, the producer.
SM100 = {"epilogue": 3, "MMA": 4, "producer": 5, "upper lanes": 6}
OF_LAST_CTA = 8


def test_the_seed_picks_the_victim():
    assert victim(2, THREADS, 4, False).nonzero()[0].tolist() == list(range(64, 96))
    assert victim(4, THREADS, 4, False).reshape(4, 32).sum(axis=1).tolist() == [16] * 4
    assert victim(5, THREADS, 4, False).nonzero()[0].tolist() == [0, 32, 64, 96]
    assert victim(6, THREADS, 4, False) is None
    assert victim(6, THREADS, 4, True).nonzero()[0].tolist() == list(range(32))


@pytest.mark.parametrize(("op", "role"), SM90_CASES)
def test_sm90(emulation, op, role):
    inputs = sm90_problems.make_inputs(PROBLEM)
    emulation.mode, emulation.seed, emulation.num_sms = "starved", SM90[op][role], 3
    out = sm90_problems.run(PROBLEM, inputs, op)
    kernel = Dsv4GroupedGemmSm90(sm90.gemms(PROBLEM.shape, PROBLEM.num_tokens)[op == "fc2"])
    row_tiles = int(inputs.layout.counts.count_nonzero())
    assert kernel.config.warpgroups == 4
    assert row_tiles * kernel.m_tiles * kernel.k_stages > 3 * kernel.stages, "no ring is refilled"
    assert emulation.spills[0], "no tile is split"
    sm90_problems.check(PROBLEM, inputs, op, out)


@pytest.mark.parametrize("config", on_sm100.EVERY_CONFIG, ids=str)
@pytest.mark.parametrize("role", SM100)
def test_sm100(monkeypatch, role, config):
    """FC1, whose epilogue is the longer one; in a pair, the second CTA's role alone as well."""
    torch.manual_seed(0)
    problem = on_sm100.make_problem([40, 0, 130], config.tile)
    for seed in (SM100[role], SM100[role] + OF_LAST_CTA)[: config.num_ctas]:
        emulation = Emulation100(mode="starved", seed=seed, clusters=1)
        monkeypatch.setattr(on_sm100.sm100, "launch", emulation.launch)
        on_sm100.check_fc1(emulation, problem, on_sm100.LIMIT)
