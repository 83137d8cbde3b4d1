"""The layer through `moe`: refusals, the workspace's size and its views."""

import pytest
import torch
from dsv4_kernels import moe
from dsv4_kernels.types import ActivationScales, ExpertWeights, Routing

SHAPE = moe.MoeShape(
    num_experts=6,
    num_local_experts=6,
    top_k=3,
    hidden=64,
    intermediate=48,
    max_num_tokens=33,
    quantize_activations=True,
)


def random_weights(shape: moe.MoeShape, seed: int = 0) -> ExpertWeights:
    """Codes at random, block scales around 1, global scales that keep the outputs near 1."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    def scales(*size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(0.25, 2, generator=generator).to(torch.float8_e4m3fn)

    def positive(*size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(0.02, 0.06, generator=generator)

    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate
    return ExpertWeights(
        codes(local, 2 * inter, hidden // 2),
        scales(local, 2 * inter, hidden // 16),
        positive(local, 2),
        codes(local, hidden, inter // 2),
        scales(local, hidden, inter // 16),
        positive(local),
    )


def random_routing(num_tokens: int, shape: moe.MoeShape, seed: int = 1) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(num_tokens, shape.num_experts, generator=generator)
    ids = keys.argsort(1)[:, : shape.top_k].int()
    weights = torch.rand(num_tokens, shape.top_k, generator=generator) + 0.1
    return Routing(weights / weights.sum(1, keepdim=True) * 1.5, ids)


def unit_scales(num_local_experts: int) -> ActivationScales:
    return ActivationScales(torch.full((1,), 0.01), torch.full((num_local_experts,), 0.01))


def make_layer(shape: moe.MoeShape, weights: ExpertWeights, limit: float | None = 10.0):
    scales = unit_scales(shape.num_local_experts) if shape.quantize_activations else None
    return moe.prepare_layer(
        moe.choose_backend("reference", shape, None),
        shape,
        weights,
        limit=limit,
        activation_scales=scales,
    )


def run(layer: moe.MoeLayer, x: torch.Tensor, routing: Routing, **kwargs) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    workspace = torch.empty(moe.workspace_bytes(layer.backend, layer.shape), dtype=torch.uint8)
    return moe.moe(x, routing, layer, workspace, out=out, **kwargs)


def test_no_tokens_is_not_an_error():
    layer = make_layer(SHAPE, random_weights(SHAPE))
    out = run(layer, torch.zeros(0, 64, dtype=torch.bfloat16), random_routing(0, SHAPE))
    assert out.shape == (0, 64)


def test_more_tokens_than_sized_for_names_both_numbers():
    layer = make_layer(SHAPE, random_weights(SHAPE))
    with pytest.raises(ValueError, match="34 tokens .* sized for 33"):
        run(layer, torch.zeros(34, 64, dtype=torch.bfloat16), random_routing(34, SHAPE))


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("fp4", None, "there is no fp4 backend in this build: use .*reference"),
        ("auto", (8, 0), "no backend is made for compute capability 8.0"),
    ],
    ids=["unknown", "auto-on-ampere"],
)
def test_a_backend_that_cannot_run_says_why(name, capability, message):
    with pytest.raises(ValueError, match=message):
        moe.choose_backend(name, SHAPE, capability)


def test_a_size_that_nvfp4_cannot_split_is_refused_with_the_remedy():
    shape = SHAPE._replace(intermediate=2304 // 32)
    with pytest.raises(ValueError, match="intermediate size 72 .* NVFP4 block, 16: use a tensor-p"):
        moe.choose_backend("auto", shape, None)


# A backend that lays rows out, as the kernels' do, to size and carve a workspace without a GPU.
TILED = moe.Backend(
    name="tiled",
    supports=lambda shape, capability: None,
    prepare=lambda weights: weights,
    tile=lambda shape, num_tokens: 8 if num_tokens < 16 else 128,
    run=lambda *args: None,
)


@pytest.mark.parametrize("per_row", [False, True], ids=["static-scale", "scale-per-row"])
@pytest.mark.parametrize("quantized", [False, True], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 33])
def test_views_are_aligned_disjoint_and_fill_the_workspace(num_tokens, quantized, per_row):
    shape = SHAPE._replace(quantize_activations=quantized, scale_per_row=quantized and per_row)
    needed = moe.workspace_bytes(TILED, shape, num_tokens)
    workspace = torch.zeros(needed, dtype=torch.uint8)
    buffers = moe.carve(workspace, TILED, shape, num_tokens)
    views = [*buffers.layout, buffers.rows]
    for rows in (buffers.x, buffers.h):
        views += [rows] if isinstance(rows, torch.Tensor) else list(rows or ())
    views = [view for view in views if view is not None]
    for view in views:
        assert (view.data_ptr() - workspace.data_ptr()) % moe.ALIGNMENT == 0
        view.view(torch.uint8).add_(1)
    assert workspace.max() == 1
    assert int(workspace.sum()) == sum(view.nbytes for view in views)


def test_workspace_never_shrinks_with_more_tokens():
    sizes = [moe.workspace_bytes(TILED, SHAPE, tokens) for tokens in range(1, 40)]
    assert sizes == sorted(sizes)


def test_a_workspace_that_is_too_small_names_both_sizes():
    needed = moe.workspace_bytes(TILED, SHAPE, 16)
    with pytest.raises(ValueError, match=f"16 tokens need {needed} bytes .* given {needed - 256}"):
        moe.carve(torch.empty(needed - 256, dtype=torch.uint8), TILED, SHAPE, 16)
