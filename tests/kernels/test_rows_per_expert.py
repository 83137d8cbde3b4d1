"""How many rows a tile is chosen for, by what a call's tokens are known to be."""

import pytest
import torch
from dsv4_kernels.sm90 import heuristic as sm90
from dsv4_kernels.sm100 import heuristic as sm100
from dsv4_kernels.types import MoeShape, rows_per_expert

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 65536, False)


@pytest.mark.parametrize("num_local", [384, 96, 48, 24])
def test_rows_are_those_of_even_routing(num_local):
    """Tokens at large, and those of them that a dispatch would have sent to this rank."""
    shape = PRO_EP8._replace(num_local_experts=num_local)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, shape.num_experts, generator=generator)
    local = scores.topk(shape.top_k, dim=1).indices < num_local
    rows = int(local.sum()) / num_local
    sent = int(local.any(dim=1).sum())
    assert rows_per_expert(shape, len(local)) == pytest.approx(rows, rel=0.02)
    received = shape._replace(all_tokens_local=True)
    assert rows_per_expert(received, sent) == pytest.approx(rows, rel=0.02)


@pytest.mark.parametrize(
    "heuristic, quantized", [(sm90, False), (sm100, True)], ids=["sm90", "sm100"]
)
@pytest.mark.parametrize("num_tokens", [64, 640, 6400])
def test_tiles_are_those_of_as_many_rows(heuristic, quantized, num_tokens):
    shape = PRO_EP8._replace(quantize_activations=quantized)
    received = shape._replace(all_tokens_local=True)
    at_large = round(rows_per_expert(received, num_tokens) * 384 / 6)
    assert at_large > 1.7 * num_tokens
    chosen = heuristic.choose_config(received, num_tokens)
    assert chosen == heuristic.choose_config(shape, at_large)
