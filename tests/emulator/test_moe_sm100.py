"""The whole layer on the sm100 backend: Triton's ops interpreted, the GEMMs in the PTX emulator."""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe
from dsv4_kernels.backends import BACKENDS, SM100, choose_backend
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.sm100 import gemm as sm100
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeShape

from tests.emulator.sm100_emulation import Emulation
from tests.support.layers import aligned, relative_error, run

EXPERTS, LOCAL, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 3, 256, 128
SHAPE = MoeShape(EXPERTS, LOCAL, TOP_K, HIDDEN, INTERMEDIATE, 700, True)
SCALES = {
    "static": ActivationScales(torch.tensor([0.01]), torch.full((LOCAL,), 0.001)),
    "token": ActivationScales(None, None),
}


@pytest.mark.parametrize(
    ("num_tokens", "policy", "tile", "skewed"),
    [
        pytest.param(1, "static", 64, False, id="one token"),
        pytest.param(30, "static", 64, False, id="thirty tokens"),
        pytest.param(30, "token", 64, False, id="a scale per row"),
        pytest.param(215, "static", 128, True, id="all tokens on two experts"),
    ],
)
def test_layer_against_the_oracle(monkeypatch, num_tokens, policy, tile, skewed):
    emulation = Emulation(mode="random", seed=num_tokens)
    monkeypatch.setattr(sm100, "launch", emulation.launch)
    shape = SHAPE._replace(scale_per_row=policy == "token")
    weights = random_weights(shape, "cpu", scale_bytes=(40, 64), gain=0.5)
    generator = torch.Generator().manual_seed(num_tokens)
    # This rank owns experts 3, 7, 11 and 15.
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[3::4] = torch.arange(LOCAL, dtype=torch.int32)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator)
    if skewed:
        logits[:, [3, 11]] += 20
    routing = router_topk(logits, TOP_K, scaling=2.5)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()

    outputs, counts = [], []
    for name in ("sm100", "reference"):
        backend = choose_backend(name, shape, None)
        layer = moe.prepare_layer(
            backend,
            shape,
            ExpertWeights(*map(aligned, weights)),
            limit=10.0,
            activation_scales=SCALES[policy],
        )
        out = run(layer, x, routing, expert_map)
        outputs.append(out.float())
        counts.append(int(layer.saturated))
    assert BACKENDS["sm100"].tile(shape, num_tokens) == tile
    assert len(emulation.statistics) == 2
    ours, oracle = outputs
    assert oracle.abs().max() > 0.1
    # A sum in another order moves a code of h now and then, and with it a row by a little.
    assert relative_error(ours, oracle) < 2e-3
    assert (ours - oracle).abs().max() <= oracle.abs().max() * 0.02
    assert counts[0] == counts[1]


def test_auto_means_sm100_on_compute_capability_10():
    assert choose_backend("auto", SHAPE, (10, 0)) is SM100
    assert choose_backend("auto", SHAPE, (10, 3)) is SM100


def test_another_gpu_is_refused():
    with pytest.raises(ValueError, match="compute capability 10.x, and this GPU has 9.0"):
        choose_backend("sm100", SHAPE, (9, 0))
