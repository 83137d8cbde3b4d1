"""Activation global scales: the same everywhere, large enough, never silently too small."""

import json
import math
from pathlib import Path

import pytest
import torch
from bench import activation_error
from dsv4_kernels import activation_scale, reference
from dsv4_kernels.activation_scale import LayerScales
from dsv4_kernels.types import ActivationScales, ExpertWeights

SCALING = 2.5
NEVER = 1e6  # a limit that clamps nothing


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return activation_error.make_weights(torch.Generator().manual_seed(0))


def warmup(weights: ExpertWeights, limit: float | None = 10.0, **kwargs) -> ActivationScales:
    return activation_scale.warmup(weights, limit=limit, scaling=SCALING, **kwargs)


def part_of(weights: ExpertWeights, experts: list[int]) -> ExpertWeights:
    return ExpertWeights(*(tensor[experts].contiguous() for tensor in weights))


def slow_product_amax(weights: ExpertWeights, limit: float, headroom: int) -> torch.Tensor:
    """(num_experts,) max|clamped SwiGLU| in float64, one expert and one size of tokens after
    another."""
    x = activation_scale.synthetic_tokens(weights.hidden).double()
    largest = torch.zeros(weights.num_local_experts, dtype=torch.float64)
    for expert, (codes, scales) in enumerate(
        zip(weights.w13, weights.w13_block_scales, strict=True)
    ):
        dense = reference.nvfp4_dequantize(codes, scales, 1.0).double()
        gate, up = (x @ half.T for half in dense.chunk(2))
        for power in range(headroom.bit_length()):
            sizes = 2**power * weights.w13_global_scales[expert].double()
            g, u = (gate * sizes[0]).clamp(max=limit), (up * sizes[1]).clamp(-limit, limit)
            product = g * g.sigmoid() * u
            largest[expert] = torch.maximum(largest[expert], product.abs().max())
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1.0, 10.0, NEVER])
@pytest.mark.parametrize("headroom", [1, 32, 1024])
def test_warmup_is_the_slow_version(weights, headroom, limit):
    """Experts of several chunks, quiet and loud; only at a power of two may rounding decide."""
    experts = [*range(8), *range(8), 3]
    many = part_of(weights, experts)
    loudness = 2.0 ** torch.arange(len(experts))[:, None] / 256
    many = many._replace(
        w13_global_scales=many.w13_global_scales * loudness * torch.tensor([1, 1.25])
    )
    exact = slow_product_amax(many, limit, headroom) * SCALING / 2688
    scales = warmup(many, limit, headroom=headroom).fc2.double()
    assert (exact <= scales * (1 + 1e-5)).all() and (scales <= 2 * exact * (1 + 1e-5)).all()
    assert (torch.frexp(scales).mantissa == 0.5).all()


def test_warmup_multiplies_in_full_fp32_whatever_was_set(weights, monkeypatch):
    seen = []
    multiply = torch.mm

    def spy(*given, **named):
        seen.append(torch.get_float32_matmul_precision())
        return multiply(*given, **named)

    monkeypatch.setattr(torch, "mm", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        warmup(weights)
        assert seen == ["highest"] * 8 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_warmup_is_the_same_at_every_start(weights):
    first = warmup(weights)
    torch.manual_seed(1234)
    torch.rand(7)
    second = warmup(weights)
    assert first.fc1.equal(second.fc1) and first.fc2.equal(second.fc2)


def test_warmup_is_the_same_under_the_defaults_that_vllm_loads_with(weights):
    expected = warmup(weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            scales = warmup(weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scales.fc1.equal(expected.fc1) and scales.fc2.equal(expected.fc2)
    assert scales.fc1.dtype == scales.fc2.dtype == torch.float32


@pytest.mark.parametrize("limit", [10.0, NEVER], ids=["limit-10", "limit-1e6"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("placement", ["linear", "round-robin", "redundant"])
def test_warmup_does_not_depend_on_who_holds_what(weights, placement, ranks, limit):
    everything = warmup(weights, limit)
    for rank in range(ranks):
        each = 8 // ranks
        experts = {
            "linear": list(range(rank * each, (rank + 1) * each)),
            "round-robin": list(range(rank, 8, ranks)),
            "redundant": [*range(rank * each, (rank + 1) * each), 5, rank],
        }[placement]
        scales = warmup(part_of(weights, experts), limit)
        assert scales.fc1.equal(everything.fc1)
        assert scales.fc2.equal(everything.fc2[experts])


def test_fc2_scales_differ_where_experts_do(weights):
    loud = weights._replace(w13_global_scales=weights.w13_global_scales.clone())
    loud.w13_global_scales[3] *= 16
    before, after = warmup(weights, NEVER), warmup(loud, NEVER)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert after.fc2[others].equal(before.fc2[others])
    # Gate and up 16 times larger: 256 where silu is linear, and near that below.
    assert 128 <= after.fc2[3] / before.fc2[3] <= 512


def test_up_and_gate_use_their_own_global_scale(weights):
    """The up's scale 64 times larger makes the product so: the gate's scale alone would not do."""
    uneven = weights._replace(w13_global_scales=weights.w13_global_scales.clone())
    uneven.w13_global_scales[:, 1] *= 64
    assert warmup(uneven, NEVER).fc2.equal(64 * warmup(weights, NEVER).fc2)


@pytest.mark.parametrize("headroom", [1, 2, 32, 256])
def test_fc1_scale_is_the_headroom_times_the_largest_token(weights, headroom):
    largest = activation_scale.synthetic_tokens(weights.hidden).abs().max()
    scale = warmup(weights, headroom=headroom).fc1
    assert scale.shape == (1,)
    exact = headroom * float(largest) / 2688
    assert exact <= float(scale) < 2 * exact
    assert math.frexp(float(scale))[0] == 0.5


@pytest.mark.parametrize("hidden", [64, 1024, 4096, 5120, 7168])
def test_synthetic_tokens_have_unit_rms_and_nearly_the_longest_tail(hidden):
    x = activation_scale.synthetic_tokens(hidden)
    torch.testing.assert_close(x.square().mean(1), torch.ones(len(x)))
    assert 0.9 * hidden**0.5 < x.abs().max() <= hidden**0.5 * 1.001


def test_a_clamp_bounds_the_scale_and_without_one_it_is_per_row(weights):
    bound = 10 * 10 * SCALING / 2688
    assert (warmup(weights, 10.0).fc2 < 2 * bound).all()
    assert (warmup(weights, 10.0, headroom=2**20).fc2 == 2.0 ** math.ceil(math.log2(bound))).all()
    assert warmup(weights, None).fc2 is None
    assert warmup(weights, None).fc1.equal(warmup(weights, 10.0).fc1)


def test_an_expert_of_zeros_gets_a_scale_that_is_not_zero(weights):
    zero = weights._replace(w13=weights.w13.clone())
    zero.w13[2] = 0
    assert warmup(zero).fc2[2] == 1
    assert (warmup(zero).fc2 > 0).all()


@pytest.mark.parametrize("headroom", [0, -2, 3, 48])
def test_a_headroom_that_is_not_a_power_of_two_is_refused(weights, headroom):
    with pytest.raises(ValueError, match=f"headroom is {headroom}: use a power of two"):
        warmup(weights, headroom=headroom)


def test_damaged_weight_scales_are_named(weights):
    damaged = weights._replace(w13_global_scales=weights.w13_global_scales.clone())
    damaged.w13_global_scales[6, 0] = torch.nan
    with pytest.raises(ValueError, match=r"local experts \[6\] .* not finite"):
        warmup(damaged)


def loud_tokens(kind: str, hidden: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    if kind == "normal":
        x = torch.randn(64, hidden, generator=generator)
    elif kind == "heavy-tail":
        x = activation_scale.synthetic_tokens(hidden, seed=99)
    else:
        x = torch.eye(hidden)[:: hidden // 32]
    return x / x.square().mean(1, keepdim=True).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10.0, None], ids=["limit-10", "no-limit"])
@pytest.mark.parametrize("kind", ["normal", "heavy-tail", "one-channel"])
def test_tokens_30_times_larger_overflow_nothing_and_3000_times_are_counted(weights, kind, limit):
    x = loud_tokens(kind, weights.hidden)
    routing = reference.router_topk(torch.randn(len(x), 8), 4, scaling=SCALING)
    for size, overflows in ((1, False), (30, False), (3000, True)):
        saturated = torch.zeros(1, dtype=torch.int64)
        y = reference.moe(
            (x * size).bfloat16(),
            routing,
            weights,
            limit=limit,
            activation_scales=warmup(weights, limit),
            saturated=saturated,
        )
        assert y.isfinite().all()
        assert (int(saturated) > 0) == overflows, f"{int(saturated)} blocks at {size}x"


@pytest.mark.parametrize("hidden", [64, 512, 1024, 2048, 3072, 4096, 5120, 7168])
def test_no_token_of_rms_30_saturates_fc1(hidden):
    """RMSNorm bounds a channel by sqrt(hidden) times the RMS; the scale covers that, bf16 too."""
    scale = activation_scale.from_amax(
        activation_scale.synthetic_tokens(hidden).abs().max(),
        torch.ones(1),
        activation_scale.HEADROOM,
    ).fc1
    spike = torch.zeros(1, hidden)
    spike[0, hidden // 2] = 30 * hidden**0.5
    _, saturated = reference.nvfp4_quantize(spike.bfloat16(), scale)
    assert saturated == 0


def test_the_token_policy_saturates_nothing(weights):
    x = loud_tokens("heavy-tail", weights.hidden)
    routing = reference.router_topk(torch.randn(len(x), 8), 4, scaling=SCALING)
    saturated = torch.zeros(1, dtype=torch.int64)
    scales = activation_scale.token()
    reference.moe(
        (x * 3000).bfloat16(), routing, weights, activation_scales=scales, saturated=saturated
    )
    assert saturated == 0


class TestCheckpoint:
    def test_is_the_maximum_over_experts(self):
        w13 = torch.tensor([[0.1, 0.1], [0.3, 0.2]])
        scales = activation_scale.checkpoint(w13, torch.tensor([0.5, 0.25]), 3)
        assert scales.fc1.equal(torch.tensor([0.3]))
        assert scales.fc2.equal(torch.tensor([0.5, 0.5, 0.5]))

    @pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
    @pytest.mark.parametrize("which", ["w1/w3", "w2"])
    def test_a_scale_that_is_not_positive_is_named(self, which, value):
        w13, w2 = torch.full((4, 2), 0.1), torch.full((4,), 0.1)
        (w13[:, 0] if which == "w1/w3" else w2)[2] = value
        with pytest.raises(ValueError, match=f"{which}.input_scale of 1 of 4 experts .*expert 2"):
            activation_scale.checkpoint(w13, w2, 4)


class TestFile:
    LAYERS = {0: LayerScales(0.1, [1.0, 2.0, 3.0]), 7: LayerScales(0.7, [0.1, 1 / 3, 1e-30])}

    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "scales.json"
        activation_scale.write_file(path, self.LAYERS, model="tiny", prompts=3)
        return path

    def read(self, path, layer=7, num_experts=3, local=(2, 1)):
        return activation_scale.from_file(path, layer, num_experts, local)

    def test_what_was_written_is_read_bit_for_bit_by_global_id(self, path):
        scales = self.read(path)
        assert scales.fc1.equal(torch.tensor([0.7]))
        assert scales.fc2.equal(torch.tensor([1e-30, 1 / 3]))

    def test_a_missing_layer_is_named_with_those_that_exist(self, path):
        with pytest.raises(ValueError, match=r"no scales for layer 5 \(it has 0, 7\)"):
            self.read(path, layer=5)

    def test_another_models_file_is_refused(self, path):
        with pytest.raises(ValueError, match="3 experts for layer 7, and the model has 256"):
            self.read(path, num_experts=256)

    def test_a_missing_file_is_a_sentence(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            self.read(tmp_path / "nowhere.json")

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"format": "other"}', "\x00"], ids=lambda t: repr(t)
    )
    def test_another_file_is_a_sentence(self, tmp_path, text):
        path = tmp_path / "scales.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read|is not an activation scale file"):
            self.read(path)

    @pytest.mark.parametrize("layers", [None, [], [7], {"7": [0.7]}], ids=str)
    def test_layers_of_another_kind_are_a_sentence(self, path, layers):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": layers}))
        with pytest.raises(ValueError, match="no scales for layer 7"):
            self.read(path)

    @pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e-60, "1", None, True])
    def test_a_value_that_is_not_a_positive_number_is_named(self, path, value):
        content = json.loads(path.read_text())
        content["layers"]["7"]["fc2"][1] = value
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="layer 7 has the activation scale"):
            self.read(path)

    def test_nothing_unusable_is_written(self, tmp_path):
        with pytest.raises(ValueError, match="layer 0 has the activation scale nan"):
            activation_scale.write_file(tmp_path / "x.json", {0: LayerScales(math.nan, [1.0])})

    def test_a_calibration_run_gives_unseen_experts_the_largest_scale(self):
        scales = activation_scale.from_amax(torch.tensor(2688.0), torch.tensor([0.0, 672, 3]), 4)
        assert scales.fc1.tolist() == [4.0]
        assert scales.fc2.tolist() == [1.0, 1.0, 2.0**-7]


@pytest.fixture(scope="module")
def results() -> dict:
    measured = activation_error.measure()
    for limit in activation_error.LIMITS:
        print(activation_error.markdown(measured, limit))
    return {(r.policy, r.headroom, r.limit, r.size): r for r in measured}


@pytest.mark.slow
def test_the_kept_numbers_are_this_codes(results):
    """1e-3: another build of PyTorch sums in another order, and a rounded value may tip over."""
    kept = activation_error.kept()
    assert len(kept) == len(results)
    for entry in kept:
        now = results[entry.policy, entry.headroom, entry.limit, entry.size]
        assert now.error == pytest.approx(entry.error, abs=1e-3)
        assert now.saturated == pytest.approx(entry.saturated, abs=8)


def test_the_readme_has_the_kept_numbers():
    readme = Path(__file__).parents[2] / "README.md"
    assert activation_error.markdown(activation_error.kept(), 10.0) in readme.read_text()


@pytest.mark.slow
def test_every_result_is_finite(results):
    assert all(r.finite and math.isfinite(r.error) for r in results.values())


@pytest.mark.parametrize("headroom", [1, 4, 16, 32, 64, 256])
@pytest.mark.parametrize("limit", [10.0, None], ids=["limit-10", "no-limit"])
def test_headroom_costs_next_to_nothing(results, limit, headroom):
    """Half a point over one scale per row, whose own error (E2M1, twice) is 16 %."""
    exact, warm = results["token", None, limit, 1], results["warmup", headroom, limit, 1]
    assert 0.14 < exact.error < 0.17
    assert warm.error < exact.error + 0.005


@pytest.mark.parametrize("limit", [10.0, None], ids=["limit-10", "no-limit"])
@pytest.mark.parametrize("size", [0.1, 1, 30])
def test_the_default_is_as_good_as_a_scale_per_row(results, size, limit):
    """From tokens 10 times quieter than the synthetic ones to 30 times louder."""
    warm = results["warmup", activation_scale.HEADROOM, limit, size]
    assert warm.error < results["token", None, limit, size].error + 0.005
    assert warm.saturated == 0


@pytest.mark.parametrize("limit", [10.0, None], ids=["limit-10", "no-limit"])
def test_a_scale_without_headroom_loses_loud_tokens_and_counts_them(results, limit):
    for policy, headroom in (("checkpoint", None), ("warmup", 1)):
        loud = results[policy, headroom, limit, 30]
        assert loud.error > 0.5 and loud.saturated > 1000
