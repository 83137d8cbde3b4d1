"""Layers of every intermediate size modulo the kernels' largest stage, and V4.1-Flash's at its
tensor-parallel sizes: padding, preparing, and both GEMMs in the PTX emulator, against the oracle.
"""

import pytest
import torch
from dsv4_kernels import moe
from dsv4_kernels.backends import choose_backend
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm100 import gemm as sm100
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeShape, Routing

from tests.emulator import sm90_emulation, sm100_emulation
from tests.emulator.sm100_emulation import aligned

EXPERTS, TOP_K, NUM_TOKENS = 2, 1, 3
HIDDEN = {"sm90": 64, "sm100": 128}  # one tile of weight rows or less
# Modulo 256: NVFP4's 16 and MXFP4's 8; V4.1-Flash at TP8, TP4, padded TP4 and TP2.
LARGER = (288, 576, 640, 1152)
CASES = [
    *(("sm90", "nvfp4", size) for size in range(16, 257, 16)),
    *(("sm90", "mxfp4", size) for size in (*range(32, 257, 32), *LARGER)),
    *(("sm100", "nvfp4", size) for size in (*range(16, 257, 16), *LARGER)),
]
MODULES = {"sm90": (sm90, sm90_emulation), "sm100": (sm100, sm100_emulation)}
# sm90 rounds h and rows to bf16; on sm100 a sum in another order moves a code of h now and then.
TOLERANCE = {"sm90": 2**-8, "sm100": 2e-3}


def random_weights(hidden: int, intermediate: int, weight_format: str) -> ExpertWeights:
    generator = torch.Generator().manual_seed(intermediate)

    def part(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (EXPERTS, rows, k // 2), generator=generator)
        if weight_format == "mxfp4":
            scales = torch.randint(120, 129, (EXPERTS, rows, k // 32), generator=generator)
            return codes.to(torch.uint8), scales.to(torch.uint8)
        scales = torch.rand((EXPERTS, rows, k // 16), generator=generator) * 2
        return codes.to(torch.uint8), scales.to(torch.float8_e4m3fn)

    w13, w2 = part(2 * intermediate, hidden), part(hidden, intermediate)
    gate_up = torch.tensor([[0.01, 0.02], [0.03, 0.015]])
    return ExpertWeights(*w13, gate_up, *w2, torch.full((EXPERTS,), 0.03))


@pytest.mark.parametrize(
    ("name", "weight_format", "intermediate"), CASES, ids=["-".join(map(str, c)) for c in CASES]
)
def test_layer_against_the_oracle(monkeypatch, name, weight_format, intermediate):
    module, emulated = MODULES[name]
    emulation = emulated.Emulation(mode="lazy")
    monkeypatch.setattr(module, "launch", emulation.launch)
    quantizes, hidden = name == "sm100", HIDDEN[name]
    shape = MoeShape(
        EXPERTS, EXPERTS, TOP_K, hidden, intermediate, NUM_TOKENS, quantizes, False, weight_format
    )
    scales = None
    if quantizes:
        scales = ActivationScales(torch.tensor([0.01]), torch.full((EXPERTS,), 0.001))
    weights = random_weights(hidden, intermediate, weight_format)
    ids = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    routing = Routing(torch.tensor([[0.5], [1.0], [2.0]]), ids)
    x = torch.randn(NUM_TOKENS, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = []
    for backend in (choose_backend(name, shape, None), choose_backend("reference", shape, None)):
        given = ExpertWeights(*map(aligned, weights))
        layer = moe.prepare_layer(backend, shape, given, limit=10.0, activation_scales=scales)
        size = moe.workspace_bytes(backend, shape)
        workspace = aligned(torch.full((size,), 0xFF, dtype=torch.uint8))  # NaN everywhere
        out = torch.full_like(x, torch.nan)
        moe.moe(x, routing, layer, workspace, out=out)
        outputs.append(out.float())
    assert len(emulation.statistics) == 2
    ours, oracle = outputs
    assert oracle.norm() > 0
    error = (ours - oracle).norm() / oracle.norm()
    assert error < TOLERANCE[name], error
