"""Layers of every intermediate size modulo the kernels' largest stage, and V4.1-Flash's at its
tensor-parallel sizes: padding, preparing, and both GEMMs in the PTX emulator, against the oracle.
"""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe
from dsv4_kernels.backends import choose_backend
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm100 import gemm as sm100
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeShape, Routing

from tests.emulator import sm90_emulation, sm100_emulation
from tests.support.layers import aligned, random_call, relative_error, run

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
    scale_bytes = (120, 128) if weight_format == "mxfp4" else (40, 64)
    weights = random_weights(shape, "cpu", seed=intermediate, scale_bytes=scale_bytes, gain=0.2)
    x, _ = random_call(NUM_TOKENS, shape, 1)
    ids = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    routing = Routing(torch.tensor([[0.5], [1.0], [2.0]]), ids)
    outputs = []
    for backend in (choose_backend(name, shape, None), choose_backend("reference", shape, None)):
        given = ExpertWeights(*map(aligned, weights))
        layer = moe.prepare_layer(backend, shape, given, limit=10.0, activation_scales=scales)
        outputs.append(run(layer, x, routing).float())
    assert len(emulation.statistics) == 2
    ours, oracle = outputs
    assert oracle.norm() > 0
    assert relative_error(ours, oracle) < TOLERANCE[name]
