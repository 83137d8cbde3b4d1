"""The sm90 grouped GEMMs: what they are compiled as without a GPU, and what they compute on one."""

import math
from dataclasses import replace

import pytest
import torch
from bench.inputs import expert_map, random_weights
from dsv4_kernels import backends, reference
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.moe import moe, prepare_layer
from dsv4_kernels.sm90.gemm import MOST_PARTIALS, all_gemms, compile_gemm, gemms
from dsv4_kernels.sm90.heuristic import choose_config, unsupported_reason
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import Gemm, Sm90Config
from dsv4_kernels.sm90.weights import CHUNK
from dsv4_kernels.types import ExpertWeights, MoeLayer, MoeShape

from tests.support.layers import lazy, random_call, relative_error, run
from tests.support.mxfp4_weights import every_scale, exact, multiplied

FLASH = MoeShape(256, 256, 6, 4096, 2048, 8192, False)
PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
PRO_TP8 = PRO_EP8._replace(num_local_experts=384, intermediate=384)
FLASH_41 = MoeShape(384, 384, 6, 5120, 2304, 8192, False)
SHAPES = {
    "flash": FLASH,
    "pro-ep8": PRO_EP8,
    "pro-tp8": PRO_TP8,
    "flash-4.1": FLASH_41,
    "flash-4.1-tp4": FLASH_41._replace(intermediate=576),
    "flash-4.1-tp8": FLASH_41._replace(intermediate=288),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_config_fits_the_shape(shape):
    for gemm in all_gemms(shape):
        config = gemm.config
        assert math.ceil(gemm.k / 64) * 64 % config.tile_k == 0, gemm
        assert all(n % 8 == 0 and n <= 256 for n in config.tile_n), gemm
        assert config.tile_m * config.tile_n[-1] <= MOST_PARTIALS, gemm


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_has_few_specialisations(shape):
    """Each takes seconds to compile at load."""
    assert len(all_gemms(shape)) <= 26, all_gemms(shape)


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp8_has_few_kernels_of_three_stages_at_least(shape, weight_format):
    shape = shape._replace(fp8=True, weight_format=weight_format)
    assert unsupported_reason(shape) is None
    kernels = [Dsv4GroupedGemmSm90(gemm) for gemm in all_gemms(shape)]
    assert len(kernels) <= 24
    for kernel in kernels:
        assert kernel.partial_floats <= MOST_PARTIALS, kernel.config
        # Tiles of 512 rows are for fc2 of a tensor-parallel rank, of one to three stages.
        assert kernel.stages >= (2 if kernel.config.tile_m == 512 else 3), kernel.config


@pytest.mark.parametrize("num_tokens", [1, 128, 2048, 8192])
def test_a_likely_count_of_rows_takes_one_tile_that_fits(num_tokens):
    config = choose_config(PRO_EP8, num_tokens).fc1
    rows = math.ceil(num_tokens * 6 / 384)
    fitting = next(n for n in config.tile_n if n >= rows)
    assert fitting - rows <= 16, (rows, config.tile_n)


@pytest.mark.parametrize("name", SHAPES)
def test_the_fewest_rows_take_tiles_of_at_most_16(name):
    for num_tokens in (1, 8, 16):
        _, *configs = choose_config(SHAPES[name], num_tokens)
        assert {config.tile_n for config in configs} == {(8, 16)}


@pytest.mark.parametrize(("num_tokens", "tile_n"), [(85, (8, 16)), (86, (8, 16, 24, 32))])
def test_the_fewest_rows_are_up_to_two_an_expert(num_tokens, tile_n):
    _, *configs = choose_config(FLASH, num_tokens)
    assert {config.tile_n for config in configs} == {tile_n}


@pytest.mark.parametrize(("size", "tile_m"), [(576, 384), (288, 192), (2304, 256)])
@pytest.mark.parametrize("num_tokens", [1, 32, 512])
def test_few_rows_take_tall_tiles_of_weights_where_none_is_cut(size, tile_m, num_tokens):
    fc1 = choose_config(FLASH_41._replace(intermediate=size), num_tokens).fc1
    assert fc1.tile_m == tile_m


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("size", "num_tokens", "tile_m"),
    [(576, 2, 256), (576, 3, 512), (288, 512, 512), (576, 2048, 256), (2304, 32, 256)],
)
def test_fc2_of_a_part_of_h_takes_tall_tiles_that_fill_the_gpu(size, num_tokens, tile_m, fp8):
    shape = FLASH_41._replace(intermediate=size, weight_format="mxfp4", fp8=fp8)
    assert choose_config(shape, num_tokens).fc2.tile_m == tile_m


@pytest.mark.parametrize("num_tokens, gather", [(1, True), (2048, True), (8192, False)])
def test_fc1_gathers_unless_a_cluster_shares_rows(num_tokens, gather):
    for fp8 in (False, True):
        config = choose_config(FLASH._replace(fp8=fp8), num_tokens)
        assert config.gather == gather == (config.fc1.cluster == 1)
    batched = FLASH._replace(batch_rows=64)
    assert not choose_config(batched, num_tokens).gather


@pytest.mark.parametrize("blocks", range(1, 17))
def test_every_hidden_size_has_stages_that_fc1_can_read(blocks):
    """Of 64 columns; the kernel refuses to gather where a stage is no multiple of 128."""
    for fp8 in (False, True):
        shape = MoeShape(32, 8, 4, 64 * blocks, 320, 2048, False, fp8=fp8)
        for gemm in all_gemms(shape):
            Dsv4GroupedGemmSm90(gemm)


@pytest.mark.parametrize(
    ("rows", "parts"), [(100, 1), (128, 1), (150, 1), (192, 1), (220, 2), (300, 2), (500, 3)]
)
def test_an_expert_s_rows_take_few_tiles(rows, parts):
    """Every tile more widens all of the weights again."""
    config = choose_config(FLASH, rows * 256 // 6).fc1
    assert math.ceil(rows / config.tile_n[-1]) == parts, config
    assert math.ceil((rows + math.sqrt(rows)) / config.tile_n[-1]) == parts, config
    assert config.cluster == (2 if config.tile_m == 128 else 1), config


@pytest.mark.parametrize("sizes", [(8,), (8, 16, 24), (64, 72)], ids=lambda sizes: f"{sizes[-1]}")
def test_a_largest_size_that_is_no_multiple_of_a_box_is_refused(sizes):
    """Rows cut by whole boxes would match none of the sizes: the consumers would wait for ever."""
    gemm = Gemm("fc2", 4, 256, 256, 2, False, Sm90Config(1, 2, sizes, 64))
    with pytest.raises(AssertionError, match=f"largest tile_n {sizes[-1]}, must be a multiple"):
        Dsv4GroupedGemmSm90(gemm)


def test_fc2_that_gathers_is_refused():
    """Its gathering warps would read h before fc1 has written it."""
    with pytest.raises(AssertionError, match="fc2 gathers no rows"):
        Dsv4GroupedGemmSm90(Gemm("fc2", 4, 256, 256, 2, True, Sm90Config(1, 2, (8, 16), 64)))


def test_a_stage_that_is_not_gathered_by_128_bytes_is_refused():
    config = Sm90Config(1, 2, (8, 16), 64)
    Dsv4GroupedGemmSm90(Gemm("fc1", 4, 256, 256, 2, True, config))
    with pytest.raises(AssertionError, match="tile_k 64, gathered by 128 bytes"):
        Dsv4GroupedGemmSm90(Gemm("fc1", 4, 256, 256, 2, True, config, activations="fp8"))


def test_a_cluster_that_gathers_is_refused():
    """A block's gathering warps know its own shared memory only."""
    with pytest.raises(AssertionError, match="gathers rows for itself"):
        Dsv4GroupedGemmSm90(Gemm("fc1", 4, 256, 256, 2, True, Sm90Config(1, 2, (8, 16), 64, 2)))


def test_what_the_kernels_cannot_run_is_said():
    assert unsupported_reason(FLASH) is None
    assert "--moe-backend" in unsupported_reason(FLASH_41._replace(hidden=5120 + 32))
    assert "no FP4" in unsupported_reason(FLASH._replace(quantize_activations=True))
    mxfp4 = FLASH._replace(weight_format="mxfp4")
    assert unsupported_reason(mxfp4) is None
    with_gpu = backends.unsupported_reason(BACKENDS["sm90"], FLASH, (10, 0))
    assert "9.x" in with_gpu and "10.0" in with_gpu


@pytest.mark.slow
@pytest.mark.parametrize("op", [0, 1], ids=["fc1", "fc2"])
@pytest.mark.parametrize("num_tokens", [8, 8192])
def test_compiles_without_a_gpu(op, num_tokens):
    gemm = gemms(PRO_EP8, num_tokens)[op]
    compile_gemm(gemm, "sm_90a")
    before = compile_gemm.cache_info().misses
    compile_gemm(gemms(PRO_EP8, num_tokens)[op], "sm_90a")
    assert compile_gemm.cache_info().misses == before


def random_layer(shape: MoeShape, seed: int, limit: float | None = 10.0):
    """(a copy of the weights as the checkpoint has them, the layer)"""
    # From 2^-3 to 2^5 with 0, 2^-9 and 448; of MXFP4 from 2^-11 to 2^4, and 30 powers below.
    scales = ((116, 131), (101,)) if shape.weight_format == "mxfp4" else ((32, 95), (0, 1, 0x7E))
    weights = random_weights(
        shape, seed=seed, scale_bytes=scales[0], odd_bytes=scales[1], gain=2.0**-9
    )
    kept = ExpertWeights(*(tensor.clone() for tensor in weights))
    backend = lazy(BACKENDS["sm90"])
    layer = prepare_layer(backend, shape, weights, limit=limit, activation_scales=None)
    return kept, layer


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """h and each of top_k rows round to bf16 (2^-9): the norm of the error is within 2^-8."""
    error = relative_error(out, expected)
    assert error < 2**-8, error
    assert out.isfinite().all()


SMALL = MoeShape(16, 16, 4, 512, 384, 4096, False)
SMALL_EP = SMALL._replace(num_local_experts=5)
SMALL_MXFP4 = SMALL_EP._replace(weight_format="mxfp4")
CASES = {
    **{f"tokens-{n}": (SMALL, n, "even") for n in (1, 2, 7, 33, 100, 150, 300, 577, 1000)},
    "one-expert-takes-all": (SMALL, 1000, "one-expert"),
    "four-experts-take-all": (SMALL, 777, "few-experts"),
    "padding-tokens": (SMALL, 64, "padding"),
    "ep-some-rows": (SMALL_EP, 40, "even"),
    "ep-one-token": (SMALL_EP, 1, "even"),
    "many-tokens": (SMALL, 4096, "even"),
    **{f"mxfp4-{n}": (SMALL_MXFP4, n, "even") for n in (1, 33, 300, 1000)},
    "mxfp4-one-expert": (SMALL_MXFP4, 777, "one-expert"),
}


@pytest.fixture(scope="module", params=["no-limit", "limit"])
def small_layers(request):
    limit = 1.0 if request.param == "limit" else None
    return {shape: random_layer(shape, 1, limit) for shape in (SMALL, SMALL_EP, SMALL_MXFP4)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer_matches_the_oracle(case, small_layers):
    shape, num_tokens, skew = case
    weights, layer = small_layers[shape]
    x, routing = random_call(num_tokens, shape, 2, skew, device="cuda")
    mapping = expert_map(shape.num_experts, shape.num_local_experts)
    expected = reference.moe(x, routing, weights, expert_map=mapping, limit=layer.limit)
    out = run(layer, x, routing, mapping)
    close(out, expected)
    assert torch.equal(out, run(layer, x, routing, mapping)), "two runs differ"


FULL = {
    "flash-shape": FLASH._replace(num_experts=8, num_local_experts=8),
    "pro-shape": PRO_EP8._replace(num_experts=8, num_local_experts=4),
    "pro-tp8": PRO_TP8._replace(num_experts=8, num_local_experts=8),
    "flash-4.1-shape": FLASH_41._replace(num_experts=8, num_local_experts=8),
}
FULL |= {f"{name}-mxfp4": shape._replace(weight_format="mxfp4") for name, shape in FULL.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 24, 60, 200])
@pytest.mark.parametrize("shape", FULL.values(), ids=FULL)
def test_full_sizes_match_the_oracle(shape, num_tokens):
    shape = shape._replace(max_num_tokens=256)
    check_layer(*random_layer(shape, 3), num_tokens)


# Modulo the largest tile_k, 256, and V4.1-Flash's under tensor parallelism.
SIZES = [("nvfp4", size) for size in range(16, 257, 16)]
SIZES += [("mxfp4", size) for size in (*range(32, 257, 32), 288, 576, 640, 1152)]


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("weight_format", "size"), SIZES, ids=[f"{f}-{n}" for f, n in SIZES])
def test_every_intermediate_size_matches_the_oracle(weight_format, size, fp8):
    shape = MoeShape(4, 4, 2, 256, size, 8, False, weight_format=weight_format, fp8=fp8)
    check_layer(*random_layer(shape, 3), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [3, 60, 200])
@pytest.mark.parametrize("size", [288, 576], ids=["tp8", "tp4"])
def test_v41_tensor_parallel_sizes_match_the_oracle(size, num_tokens, fp8):
    shape = MoeShape(8, 8, 6, 5120, size, 256, False, weight_format="mxfp4", fp8=fp8)
    check_layer(*random_layer(shape, 3), num_tokens)


def check_layer(weights: ExpertWeights, layer: MoeLayer, num_tokens: int) -> None:
    """Of fp8, against its numerics: a sum's last bits may move an E4M3 of h by a step, 2^-3."""
    shape = layer.shape
    x, routing = random_call(num_tokens, shape, 4, device="cuda")
    mapping = expert_map(shape.num_experts, shape.num_local_experts)
    if shape.fp8:
        of_oracle = replace(layer, backend=BACKENDS["reference"], weights=weights)
        expected = moe(x, routing, of_oracle, x, expert_map=mapping, out=torch.empty_like(x))
        assert relative_error(run(layer, x, routing, mapping), expected) < 2.0**-3
        return
    expected = reference.moe(x, routing, weights, expert_map=mapping, limit=layer.limit)
    close(run(layer, x, routing, mapping), expected)


@pytest.mark.gpu
def test_every_mxfp4_scale_byte_and_code_is_exact():
    w2, scales, powers = every_scale()
    got = multiplied(w2, scales, powers, "cuda")
    assert got.rounding == 0
    assert torch.equal(got.weights.double(), exact(w2, scales, powers))


@pytest.mark.gpu
def test_shuffling_needs_at_most_a_chunk_of_experts_more():
    shape = FLASH._replace(num_local_experts=16, num_experts=16, max_num_tokens=1)
    random_layer(shape, 7)  # allocates what is not the shuffle's
    torch.cuda.empty_cache()
    weights, layer = random_layer(shape, 8)
    chunk = sum(tensor[:CHUNK].nbytes for tensor in weights)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.backend.prepare_weights(weights, layer.rounding)
    peak = torch.cuda.max_memory_allocated() - before
    assert weights.w13[0].nbytes < peak <= chunk, (peak, chunk)
