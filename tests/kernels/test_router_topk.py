"""router_topk against the oracle: ids bit-equal, weights to a few ulp."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.route.router_topk import Config, choose_config, router_topk
from dsv4_kernels.types import ImageBias, Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A score is within 4 ulp, so is their sum: a share of the two is within 8.
WEIGHT_RTOL = 8 * 2.0**-23


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def on_device(value):
    if isinstance(value, ImageBias):
        return ImageBias(value.bias.to(DEVICE), value.first_token_id)
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def run(logits: torch.Tensor, top_k: int, **options) -> Routing:
    """Into outputs that start as NaN and as an id that no expert has."""
    shape, ids_dtype = (len(logits), top_k), options.pop("ids_dtype", torch.int32)
    out = Routing(
        torch.full(shape, torch.nan, device=DEVICE),
        torch.full(shape, 12345, dtype=ids_dtype, device=DEVICE),
    )
    options = {name: on_device(value) for name, value in options.items()}
    result = router_topk(logits.to(DEVICE), top_k, out=out, **options)
    assert result.weights.data_ptr() == out.weights.data_ptr()
    return Routing(result.weights.cpu(), result.ids.cpu())


def check(logits: torch.Tensor, top_k: int, **options) -> Routing:
    ours = run(logits, top_k, **options)
    expected = reference.router_topk(logits, top_k, **options)
    assert torch.equal(ours.ids, expected.ids)
    torch.testing.assert_close(ours.weights, expected.weights, rtol=WEIGHT_RTOL, atol=0)
    return ours


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 256, 6), (1, 256, 6), (33, 384, 6), (7, 512, 16), (5, 300, 8), (3, 6, 6), (4, 1, 1)],
)
def test_dense_layers_equal_the_oracle(num_tokens, num_experts, top_k, ids_dtype):
    logits = 3 * random(num_tokens, num_experts)
    bias = 0.1 * random(num_experts, seed=1)
    check(logits, top_k, bias=bias, scaling=2.5, ids_dtype=ids_dtype)


def test_programs_of_several_tokens(monkeypatch):
    monkeypatch.setattr(
        "dsv4_kernels.route.router_topk.choose_config", lambda *_, **__: Config(4, 1)
    )
    check(random(11, 96), 6, bias=random(96, seed=1), scaling=1.5)


def test_bf16_logits_and_bias_tie_to_the_lower_id():
    check((4 * random(9, 256)).bfloat16(), 8, bias=random(256, seed=1).bfloat16())


def test_equal_logits_take_the_first_experts():
    ours = check(torch.full((2, 384), 0.75), 6)
    assert ours.ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("level", [-16.6, -30.0, -103.0, -170.0])
def test_scores_far_below_zero_keep_their_ratios(level):
    """log(1 + exp(z)) is 0 from -16.6 on; the score's ratio for logits 1 apart is exp(1/2)."""
    logits = torch.full((1, 256), level - 20)
    logits[0, 17], logits[0, 200] = level, level - 1
    ours = check(logits, 2)
    assert ours.ids.tolist() == [[17, 200]]
    ratio = ours.weights[0, 0] / ours.weights[0, 1]
    torch.testing.assert_close(ratio, torch.tensor(0.5).exp(), rtol=1e-4, atol=0)


def test_below_minus_174_the_bias_selects_and_shares_are_equal():
    """Such scores are 0 on a GPU, no bias is as small, and one larger score takes all weight."""
    logits = -176.0 - 29.0 * torch.rand(4, 256, generator=torch.Generator().manual_seed(0))
    logits[3, 77] = -150.0
    bias = random(256, seed=1)
    bias[77] = 9.0
    ours = run(logits, 6, bias=bias, scaling=1.5)
    assert torch.equal(ours.ids, bias.topk(6).indices.int().expand(4, 6))
    assert torch.equal(ours.ids, reference.router_topk(logits, 6, bias=bias).ids)
    torch.testing.assert_close(ours.weights[:3], torch.full((3, 6), 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.weights[3], torch.eye(6)[0] * 1.5, rtol=1e-4, atol=1e-4)


def test_nan_comes_after_every_number_and_weights_stay_finite():
    logits = random(5, 64)
    logits[0, :60] = torch.nan
    logits[1] = torch.nan
    logits[2, 3], logits[2, 5] = torch.inf, -torch.inf
    logits[3] = -torch.inf
    logits[4, :61] = -torch.inf
    logits[4, 61] = torch.nan
    bias = random(64, seed=1)
    bias[7], bias[8], bias[9] = torch.nan, -torch.inf, torch.inf
    ours = check(logits, 6, bias=bias)
    assert ours.weights.isfinite().all()


TABLE = torch.stack(
    [torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(50)]
)
TABLE = TABLE[:, :6].contiguous()
TOKEN_IDS = torch.tensor([3, 0, -1, 49, 50, 7, 2**31 - 1, 11, 3])


@pytest.mark.parametrize("hash_weights", ["scored", "uniform"])
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=str)
def test_hash_layers_equal_the_oracle(hash_weights, table_dtype):
    """With padding tokens, tokens outside the table, and experts that do not exist."""
    table = TABLE.to(table_dtype)
    table[7, 2], table[11] = 40, -3
    logits = 5 * random(len(TOKEN_IDS), 40)
    logits[1] = -200.0
    options = {"table": table, "hash_weights": hash_weights, "scaling": 1.5}
    check(logits, 6, token_ids=TOKEN_IDS, **options)
    check(logits, 6, token_ids=TOKEN_IDS.int(), **options)


def test_a_large_hashed_batch():
    token_ids = torch.arange(2100) % 57 - 3
    assert choose_config(2100, 40, selects=False).tokens > 4
    check(random(2100, 40), 6, table=TABLE, token_ids=token_ids)


@pytest.mark.parametrize("hash_weights", ["scored", "uniform"])
@pytest.mark.parametrize("layer", ["dense", "hash"])
def test_image_tokens_select_by_their_own_bias(layer, hash_weights):
    options = {"bias": random(40, seed=1)} if layer == "dense" else {"table": TABLE}
    image_bias = ImageBias(5 * random(40, seed=2), first_token_id=7)
    token_ids = torch.tensor([6, 7, 11, 12, 3, -1, 9])
    logits = random(7, 40)
    ours = check(
        logits, 6, token_ids=token_ids, image_bias=image_bias, hash_weights=hash_weights, **options
    )
    without = run(logits, 6, token_ids=token_ids, hash_weights=hash_weights, **options)
    changed = (ours.ids != without.ids).any(1)
    assert changed.tolist() == [False, True, True, False, False, False, True]


@pytest.mark.parametrize("layer", ["dense", "hash"])
def test_padding_rows_go_nowhere(layer):
    padding = torch.arange(9) % 4 == 1
    options = {"bias": random(64, seed=1)}
    if layer == "hash":
        table = torch.randint(64, (100, 6), generator=torch.Generator().manual_seed(2))
        options = {"table": table, "token_ids": torch.arange(9)}
    ours = check(random(9, 64), 6, padding=padding, **options)
    assert (ours.ids[padding] == -1).all() and (ours.weights[padding] == 0).all()
    assert (ours.ids[~padding] >= 0).all()


def test_outputs_are_made_when_none_are_given():
    logits = random(3, 32).to(DEVICE)
    ours = router_topk(logits, 4, ids_dtype=torch.int64)
    assert ours.ids.dtype == torch.int64
    assert torch.equal(ours.ids.cpu(), reference.router_topk(logits.cpu(), 4).ids.long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 17}, "top_k 17"),
        ({"num_experts": 513}, "513 experts"),
        ({"table": TABLE}, "token ids"),
        ({"bias": torch.zeros(41)}, "41"),
    ],
    ids=["top_k", "num_experts", "token_ids", "bias"],
)
def test_a_wrong_call_is_refused_with_the_value(options, message):
    logits = torch.zeros(1, options.pop("num_experts", 40), device=DEVICE)
    with pytest.raises(AssertionError, match=message):
        router_topk(logits, options.pop("top_k", 6), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [256, 384])
@pytest.mark.parametrize("num_tokens", [1, 8, 128, 8192])
def test_real_sizes(num_tokens, num_experts):
    """Logits from a grid of 1/64, permuted in every row: no two selections are near ties."""
    grid = (torch.arange(num_experts) - num_experts / 2) / 64
    generator = torch.Generator().manual_seed(num_tokens)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)
    check(grid[order], 6, scaling=2.5)
    table = order[:, :6].contiguous()
    check(grid[order], 6, table=table, token_ids=torch.arange(num_tokens), scaling=2.5)
