"""The layer on rows grouped by expert: Triton's ops interpreted, the GEMMs in the PTX emulator."""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.batched import batched_moe
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.heuristic import gemms
from dsv4_kernels.sm100 import gemm as sm100
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeLayer, MoeShape

from tests.emulator import sm90_emulation, sm100_emulation
from tests.support.sm90_problems import aligned

EXPERTS, LOCAL, TOP_K, HIDDEN, INTERMEDIATE = 32, 5, 3, 256, 128
LIMIT = 10.0
# Relative L2: sums in another order move a bf16 value, or a code of h, now and then. In W4A8 h has
# one scale, and the oracle's a scale a row.
TOLERANCE = {"bf16": 2.0**-8, "fp8": 2.0**-7, "nvfp4": 2e-3}


def make_layer(backend: str, shape: MoeShape) -> MoeLayer:
    scales = None
    if shape.scale_per_row:
        scales = ActivationScales(None, None)
    elif shape.quantize_activations:
        scales = ActivationScales(torch.tensor([0.01]), torch.full((LOCAL,), 0.004))
    nvfp4 = {"scale_bytes": (40, 64), "gain": 0.5}
    weights = random_weights(shape, "cpu", **(nvfp4 if shape.weight_format == "nvfp4" else {}))
    return moe.prepare_layer(
        BACKENDS[backend],
        shape,
        ExpertWeights(*map(aligned, weights)),
        limit=LIMIT,
        activation_scales=scales,
    )


def run(layer: MoeLayer, x: torch.Tensor, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    size = moe.workspace_bytes(layer.backend, layer.shape)
    workspace = aligned(torch.full((size,), 0x7F, dtype=torch.uint8))
    out = aligned(torch.full_like(x, torch.nan))
    return batched_moe(x, counts, num_tokens, layer, workspace, out=out)


def grouped_rows(counts: torch.Tensor, batch_rows: int) -> torch.Tensor:
    """Random where there is a row, NaN elsewhere: nobody may read it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(LOCAL, batch_rows, HIDDEN, generator=generator).bfloat16()
    x[torch.arange(batch_rows) >= counts[:, None]] = torch.nan
    return aligned(x)


CASES = {
    # 45 rows an expert are neither whole tiles nor of TMA's boxes.
    "sm90": ("sm90", {}, 45, (3, 0, 45, 1, 18), 24),
    "sm90, mxfp4": ("sm90", {"weight_format": "mxfp4"}, 24, (0, 24, 2, 9, 0), 24),
    "sm90, fp8": ("sm90", {"weight_format": "mxfp4", "fp8": True}, 24, (0, 24, 0, 9, 0), 24),
    "sm100": ("sm100", {}, 192, (65, 0, 192, 1, 64), 200),
    "sm100, larger tiles and a scale a row": (
        *("sm100", {"scale_per_row": True}, 256, (0, 129, 0, 0, 7), 900),
    ),
}


@pytest.mark.parametrize(("name", "changes", "rows", "counts", "tokens"), CASES.values(), ids=CASES)
def test_equals_the_oracle(monkeypatch, name, changes, rows, counts, tokens):
    module, emulation = (sm90, sm90_emulation) if name == "sm90" else (sm100, sm100_emulation)
    emulation = emulation.Emulation(mode="random", seed=rows)
    monkeypatch.setattr(module, "launch", emulation.launch)
    shape = MoeShape(
        *(EXPERTS, LOCAL, TOP_K, HIDDEN, INTERMEDIATE, 2000, name == "sm100"),
        **changes,
        batch_rows=rows,
    )
    counts = aligned(torch.tensor(counts, dtype=torch.int32))
    exists = torch.arange(rows) < counts[:, None]
    x = grouped_rows(counts, rows)
    layer, oracle = make_layer(name, shape), make_layer("reference", shape)
    out = run(layer, x, counts, tokens)[exists].float()
    expected = run(oracle, x, counts, tokens)[exists].float()
    assert len(emulation.statistics) == 2
    assert expected.abs().max() > 0.1
    assert out.isfinite().all()
    error = (out - expected).norm(dim=1) / expected.norm(dim=1)
    tolerance = TOLERANCE["fp8" if shape.fp8 else "bf16" if name == "sm90" else "nvfp4"]
    assert error.max() < 10 * tolerance, error.max()
    assert (out - expected).norm() / expected.norm() < tolerance
    assert int(layer.saturated) == int(oracle.saturated)


def test_tiles_are_those_of_the_tokens_not_of_the_room():
    shape = MoeShape(*(EXPERTS, LOCAL, TOP_K, HIDDEN, INTERMEDIATE, 2000, False), batch_rows=2000)
    grouped, as_they_come = gemms(shape, 24), gemms(shape._replace(batch_rows=0), 24)
    assert not grouped[0].gather and as_they_come[0].gather
    assert [g.config for g in grouped] == [g.config for g in as_they_come]
    assert gemms(shape, 1700)[0].config.cluster == 2
    tile = BACKENDS["sm100"].tile
    tiles = [tile(shape._replace(batch_rows=rows), 2000) for rows in (0, 256, 384, 192)]
    assert tiles == [256, 256, 128, 64]
