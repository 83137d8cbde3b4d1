"""What a Hopper GPU computes, kept in `tests/data` for the emulator to be compared with.

On such a GPU, from the project's root, 15 seconds:

    PYTHONPATH=.:kernels python -m tests.gpu.hopper_recordings tests/data [COMMIT]

writes `sm90_<case>.npz`, one for each of CASES (`bits` (rows, width) uint16, the bf16 output, NaN
where no row is; `digest` of the inputs), and `instructions.npz` (the bytes of each probe's answer),
all with `gpu` and `commit`. A case names its config and its number of blocks, so a recording holds
until the inputs or the order of the sums over K change: then record again.
"""

import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from bench.checkout import checkout_commit
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.spec import Gemm, Sm90Config

from tests.emulator.instruction_probes import APPROXIMATE, EXACT, answers
from tests.support.sm90_problems import Inputs, Problem, digest, make_inputs, run

DATA = Path(__file__).parents[1] / "data"
INSTRUCTIONS = "instructions.npz"


class Case(NamedTuple):
    """One launch: `num_blocks` blocks of `config` on a problem's FC1 or FC2."""

    op: str
    gather: bool
    config: Sm90Config
    num_blocks: int
    problem: Problem

    @property
    def gemm(self) -> Gemm:
        shape = self.problem.shape
        m, k = 2 * shape.intermediate, shape.hidden
        if self.op == "fc2":
            m, k = k, shape.intermediate
        experts = shape.num_local_experts
        return Gemm(self.op, experts, m, k, shape.top_k, self.gather, self.config)


def few_rows(tile_k: int) -> Sm90Config:
    return Sm90Config(1, 4, (8, 16, 24, 32), tile_k)


SKEWED = Sm90Config(1, 4, (24, 32, 40, 48), 128)
CASES = {
    # Every tile's K is split over many blocks, which pass on partial sums.
    "fc1-one-token": Case("fc1", True, few_rows(64), 20, Problem("one-token", 1, 4, 2, 1024, 128)),
    "fc2-one-token": Case("fc2", False, few_rows(64), 11, Problem("one-token", 1, 4, 2, 256, 512)),
    # The second tile of weight rows is half empty; SwiGLU's limit binds.
    "fc1-gathered": Case(
        "fc1", True, few_rows(256), 3, Problem("gathered", 9, 4, 2, 512, 192, limit=1.0)
    ),
    "fc2-decode": Case("fc2", False, few_rows(256), 3, Problem("decode", 9, 4, 2, 192, 512)),
    # Two experts have all rows, two none.
    "fc1-skewed": Case(
        "fc1", False, SKEWED, 3, Problem("skewed", 45, 4, 2, 384, 128, limit=None, skewed=True)
    ),
    "fc2-skewed": Case("fc2", False, SKEWED, 2, Problem("skewed", 45, 4, 2, 128, 384, skewed=True)),
    # Two row blocks a warpgroup; several row tiles an expert.
    "fc1-prefill": Case(
        "fc1",
        False,
        Sm90Config(2, 2, (40, 48, 56, 64), 128),
        3,
        Problem("prefill", 70, 4, 2, 256, 128, skewed=True),
    ),
    "fc2-prefill": Case(
        "fc2",
        False,
        Sm90Config(2, 2, (72, 80, 88, 96), 128),
        3,
        Problem("prefill", 85, 2, 2, 128, 256),
    ),
    # Two blocks share an expert's rows; fc1's second has no weight rows of the last tile.
    "fc1-cluster": Case(
        "fc1",
        False,
        Sm90Config(1, 2, (16, 32, 48), 64, cluster=2),
        4,
        Problem("cluster", 75, 4, 1, 384, 320, counts=(33, 0, 41, 1)),
    ),
    "fc2-cluster": Case(
        "fc2",
        False,
        Sm90Config(1, 2, (112, 120, 128, 136, 144, 152, 160), 128, cluster=2),
        4,
        Problem("cluster", 256, 3, 1, 256, 512, counts=(115, 0, 141)),
    ),
}


def run_case(case: Case, inputs: Inputs) -> torch.Tensor:
    """The case's output on the inputs' device, by the op's own host function."""
    with (
        patch.object(sm90, "gemms", lambda *given: (case.gemm, case.gemm)),
        patch.object(sm90, "num_sms", lambda device: case.num_blocks),
    ):
        return run(case.problem, inputs, case.op)


def record(folder: Path, commit: str) -> None:
    """Run everything on the GPU and write the files."""
    origin = {"gpu": torch.cuda.get_device_name(), "commit": commit}
    sm90._fix_up(torch.device("cuda", 0))
    for name, case in CASES.items():
        inputs = make_inputs(case.problem)
        out = run_case(case, inputs.to("cuda:0")).cpu()
        bits = out.view(torch.int16).numpy().view(np.uint16)
        path = folder / f"sm90_{name}.npz"
        np.savez_compressed(path, bits=bits, digest=digest(inputs), **origin)
        print(path.name)
    probes = EXACT | {name: probe.run for name, probe in APPROXIMATE.items()}
    probes = {name: answers(probe, True) for name, probe in probes.items()}
    np.savez_compressed(folder / INSTRUCTIONS, **probes, **origin)


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else checkout_commit())
