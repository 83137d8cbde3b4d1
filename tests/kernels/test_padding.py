"""Intermediate sizes from 16 to 4096: what they are padded to, how they are cut, and refusals."""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import reference
from dsv4_kernels.backends import BACKENDS, unsupported_reason
from dsv4_kernels.padding import padded_shape, padded_weights
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.sm100 import heuristic as sm100
from dsv4_kernels.sm100.kernel import Dsv4GroupedGemmSm100
from dsv4_kernels.types import ExpertWeights, MoeShape

SIZES = range(16, 4097)
FORMATS = {"nvfp4": 16, "mxfp4": 32}
BACKEND_FORMATS = [("sm90", "nvfp4"), ("sm90", "mxfp4"), ("sm100", "nvfp4")]
# Of w1's and w3's rows, and of w2's columns.
MULTIPLES = {"reference": (1, 1), "sm90": (32, 64), "sm100": (64, 64)}
# Rows of an expert from few to many, over all of the heuristics' ranges.
TOKENS = (1, 200, 400, 900, 2000, 4000, 8192)


def shape_of(name: str, weight_format: str, size: int) -> MoeShape:
    return MoeShape(32, 32, 6, 5120, size, 8192, name == "sm100", False, weight_format)


@pytest.mark.parametrize(("name", "weight_format"), BACKEND_FORMATS)
def test_every_whole_number_of_blocks_is_taken_and_nothing_else(name, weight_format):
    backend, block = BACKENDS[name], FORMATS[weight_format]
    for size in SIZES:
        reason = unsupported_reason(backend, shape_of(name, weight_format, size), None)
        if size % block == 0:
            assert reason is None, (size, reason)
        else:
            assert reason is not None, size
            assert f"intermediate size {size} of this rank" in reason
            assert f"{weight_format.upper()} block, {block}" in reason
            assert "use a smaller tensor-parallel size, or expert parallelism" in reason


@pytest.mark.parametrize("name", MULTIPLES)
def test_padding_is_the_least_that_makes_whole_tiles(name):
    for size in SIZES:
        padded = BACKENDS[name].padded_intermediate(size)
        for had, multiple in zip(padded, MULTIPLES[name], strict=True):
            assert had % multiple == 0 and size <= had < size + multiple, (size, padded)
        again = BACKENDS[name].padded_intermediate(padded[0])
        assert again == padded, "a padded size needs no padding"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_size_has_sm90_tiles(weight_format, fp8):
    for size in range(FORMATS[weight_format], 4097, FORMATS[weight_format]):
        shape = shape_of("sm90", weight_format, size)._replace(fp8=fp8)
        rows, columns = BACKENDS["sm90"].padded_intermediate(size, fp8)
        assert BACKENDS["sm90"].padded_intermediate(rows, fp8) == (rows, columns), size
        for num_tokens in TOKENS:
            fc1, fc2 = sm90.gemms(shape, num_tokens)
            assert (fc1.m, fc2.k) == (2 * rows, rows), size
            for gemm in (fc1, fc2):
                kernel = Dsv4GroupedGemmSm90(gemm)  # asserts what it assumes of sizes
                assert kernel.m_tiles * kernel.m_blocks_tile * kernel.cluster * 64 >= gemm.m
            assert kernel.k_stages * fc2.config.tile_k == columns, (size, num_tokens)


def test_every_size_has_sm100_tiles():
    for size in range(16, 4097, 16):
        shape = shape_of("sm100", "nvfp4", size)
        for tile in (64, 128, 256) if size % 128 > 64 or size % 128 == 0 else (64, 128):
            for gemm in sm100.gemms(shape, tile, False):
                Dsv4GroupedGemmSm100(gemm)  # asserts what it assumes of sizes
        tiles = {sm100.choose_config(shape, num_tokens).tile for num_tokens in TOKENS}
        assert tiles == {64, 128, 256} - ({256} if -(-size // 64) % 2 else set()), (size, tiles)


def test_v41_tensor_parallel_sizes_cost_no_more_than_their_bytes():
    """576 is not padded, its stages are as large as any that divide it, and no row of a tile is in
    vain."""
    assert BACKENDS["sm90"].padded_intermediate(576) == (576, 576)
    assert BACKENDS["sm90"].padded_intermediate(288) == (288, 320)
    tp4, tp8 = (
        MoeShape(384, 384, 6, 5120, size, 8192, False, weight_format="mxfp4") for size in (576, 288)
    )
    for num_tokens in (1, 512):
        fc1, fc2 = sm90.gemms(tp4, num_tokens)
        assert fc2.config.tile_k == 192
        for gemm in (fc1, fc2, sm90.gemms(tp8, num_tokens)[0]):
            assert gemm.m % gemm.config.tile_m == 0, gemm


def test_fp8_pads_v41_tensor_parallel_sizes_no_more_than_bf16():
    for size in (576, 288):
        padded = BACKENDS["sm90"].padded_intermediate(size, fp8=True)
        assert padded == BACKENDS["sm90"].padded_intermediate(size)
        shape = MoeShape(384, 384, 6, 5120, size, 8192, False, weight_format="mxfp4", fp8=True)
        for num_tokens in (1, 512, 8192):
            fc1, fc2 = sm90.gemms(shape, num_tokens)
            assert fc1.m % (fc1.config.tile_m * fc1.config.cluster) == 0, fc1
            assert fc2.config.tile_k == {576: 192, 288: 64 if num_tokens == 8192 else 320}[size]
    # A stage of one block would be all that divides seven.
    assert BACKENDS["sm90"].padded_intermediate(448, fp8=True) == (512, 512)


def weights_of(weight_format: str, size: int) -> ExpertWeights:
    shape = MoeShape(2, 2, 1, 64, size, 1, False, weight_format=weight_format)
    return random_weights(shape, "cpu", seed=size)


@pytest.mark.parametrize("name", ["sm90", "sm100"])
@pytest.mark.parametrize(
    ("weight_format", "size"), [("nvfp4", 16), ("nvfp4", 48), ("nvfp4", 144), ("mxfp4", 96)]
)
def test_padded_weights_are_the_same_matrices_beside_zeros(name, weight_format, size):
    backend, weights = BACKENDS[name], weights_of(weight_format, size)
    rows, columns = backend.padded_intermediate(size)
    padded = padded_weights(backend, weights)
    assert padded.intermediate == rows
    assert padded.w2.shape == (2, 64, columns // 2)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(2):
        h = reference.fc1(x, weights, expert, torch.ones(3), 10.0)
        wide = reference.fc1(x, padded, expert, torch.ones(3), 10.0)
        torch.testing.assert_close(wide[:, :size], h)
        assert not wide[:, size:].any()
        wide = torch.nn.functional.pad(h, (0, columns - size))
        torch.testing.assert_close(
            reference.fc2(wide, padded, expert), reference.fc2(h, weights, expert)
        )


def test_what_needs_no_padding_is_not_copied():
    weights = weights_of("mxfp4", 576)
    padded = padded_weights(BACKENDS["sm90"], weights)
    assert all(new is old for new, old in zip(padded, weights, strict=True))
    shape = shape_of("sm90", "mxfp4", 576)
    assert padded_shape(BACKENDS["sm90"], shape) == shape
