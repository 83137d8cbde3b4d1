"""The layer through `moe`: expert parallelism, refusals, the workspace's size and its views."""

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


EP_SHAPE = SHAPE._replace(num_experts=16, num_local_experts=16, top_k=4)
POLICIES = {
    "w4a16": lambda local: None,
    "static": lambda local: ActivationScales(torch.full((1,), 0.01), EP_FC2_SCALES[local]),
    "token": lambda local: ActivationScales(None, None),
}
# Different for every expert: a rank that took another's would be seen.
EP_FC2_SCALES = torch.logspace(-3, -1, 16)


def ep_placement(name: str, ranks: int) -> list[list[int]]:
    """The (logical) expert of every local slot, by rank; "redundant" has two copies more each."""
    each = 16 // ranks
    if name == "round-robin":
        return [list(range(rank, 16, ranks)) for rank in range(ranks)]
    linear = [list(range(rank * each, (rank + 1) * each)) for rank in range(ranks)]
    if name == "redundant":
        return [experts + [(3 * rank) % 16, 5] for rank, experts in enumerate(linear)]
    return linear


def physical_routing(routing: Routing, placement: list[list[int]]) -> tuple[Routing, list]:
    """Ids of copies, each use of an expert another one, as EPLB spreads them; a map per rank."""
    logical = [expert for experts in placement for expert in experts]
    copies = [[p for p, e in enumerate(logical) if e == expert] for expert in range(16)]
    if len(logical) == 16:  # no copies: vLLM keeps logical ids, wherever the experts are
        numbers = placement
        ids = routing.ids
    else:
        numbers = list(torch.arange(len(logical)).view(len(placement), -1).tolist())
        flat = [copies[e][use % len(copies[e])] for use, e in enumerate(routing.ids.flatten())]
        ids = torch.tensor(flat, dtype=torch.int32).view_as(routing.ids)
    maps = []
    for local in numbers:
        expert_map = torch.full((len(logical),), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        maps.append(expert_map)
    return Routing(routing.weights, ids), maps


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["linear", "round-robin", "redundant"])
def test_the_sum_over_ranks_is_the_single_rank_output(name, ranks, policy):
    """Tolerance: a rank rounds its fp32 sum to bf16, by 2^-8 of it at most, and so does the single
    rank; the rows that are summed are the same. So each element is within 2^-8 of the magnitudes
    that were rounded, cancellation between ranks included.
    """
    weights = random_weights(EP_SHAPE)
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    routing = random_routing(33, EP_SHAPE)
    quantise = policy != "w4a16"

    def output(experts: list[int], used: Routing, expert_map, num_experts: int) -> torch.Tensor:
        shape = EP_SHAPE._replace(
            num_experts=num_experts,
            num_local_experts=len(experts),
            quantize_activations=quantise,
            scale_per_row=policy == "token",
        )
        layer = moe.prepare_layer(
            moe.choose_backend("reference", shape, None),
            shape,
            ExpertWeights(*(tensor[experts] for tensor in weights)),
            limit=10.0,
            activation_scales=POLICIES[policy](experts),
        )
        return run(layer, x, used, expert_map=expert_map).float()

    single = output(list(range(16)), routing, None, 16)
    placement = ep_placement(name, ranks)
    used, maps = physical_routing(routing, placement)
    parts = [output(e, used, m, len(m)) for e, m in zip(placement, maps, strict=True)]
    bound = (sum(part.abs() for part in parts) + single.abs()) * 2.0**-8
    assert ((sum(parts) - single).abs() <= bound).all()
    assert single.abs().min(dim=1).values.max() > 0, "every token has an output"
    if ranks == 1 and name == "linear":
        assert parts[0].equal(single)


def test_a_token_may_name_one_expert_twice():
    """A hash table's row may: both slots count, also where fewer experts are local than top_k."""
    shape = SHAPE._replace(num_local_experts=1)
    weights = random_weights(shape)
    layer = make_layer(shape, weights)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expert_map = torch.tensor([-1, -1, 0, -1, -1, -1], dtype=torch.int32)
    shares = torch.tensor([0.5, 0.25, 0.25]).repeat(5, 1)
    thrice = run(layer, x, Routing(shares, torch.full((5, 3), 2)), expert_map=expert_map)
    apart = [
        run(layer, x, Routing(shares, torch.tensor(ids).repeat(5, 1)), expert_map=expert_map)
        for ids in ([2, -1, -1], [-1, 2, 0], [5, 1, 2])
    ]
    torch.testing.assert_close(
        thrice.float(), sum(part.float() for part in apart), rtol=0.02, atol=0
    )


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
