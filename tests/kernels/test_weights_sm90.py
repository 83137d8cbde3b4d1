"""The sm90 shuffle: nothing is lost, and every thread finds what WGMMA wants where it looks."""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import reference
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.padding import padded_weights
from dsv4_kernels.sm90.weights import CHUNK, prepare_weights
from dsv4_kernels.types import ExpertWeights, MoeShape

from tests.support.launches import peak_bytes
from tests.support.sm90_e4m3 import shuffled_fp8
from tests.support.sm90_shuffle import shuffled, shuffled_mxfp4, unshuffled, without_dead_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weights_of(
    experts: int = 2,
    hidden: int = 128,
    intermediate: int = 192,
    *,
    mxfp4_bytes: tuple[int, int] | None = None,
    device: str = "cpu",
) -> ExpertWeights:
    """NVFP4, its block scales every byte that is no NaN, or MXFP4 with scales in these bytes."""
    shape = MoeShape(experts, experts, 1, hidden, intermediate, 1, False)
    if mxfp4_bytes is not None:
        shape = shape._replace(weight_format="mxfp4")
    return random_weights(shape, device, scale_bytes=mxfp4_bytes or (0, 126))


def shuffle_on_device(weights: ExpertWeights) -> ExpertWeights:
    """A copy, shuffled where kernels run."""
    copy = ExpertWeights(*(tensor.to(DEVICE, copy=True) for tensor in weights))
    return ExpertWeights(*(tensor.cpu() for tensor in prepare_weights(copy)))


def assert_same_bytes(got: ExpertWeights, expected: ExpertWeights) -> None:
    for name, tensor, wanted in zip(got._fields, got, expected, strict=True):
        assert torch.equal(tensor.cpu().view(torch.uint8), wanted.cpu().view(torch.uint8)), name


SHAPES = {
    "one-block-of-k": dict(hidden=64, intermediate=64),
    "four-at-a-time": dict(hidden=1024, intermediate=64, experts=1),
    "nine-of-hidden": dict(hidden=576, intermediate=64, experts=1),
    "nine-of-intermediate": dict(hidden=64, intermediate=576, experts=1),
    "two-chunks": dict(hidden=64, intermediate=64, experts=CHUNK + 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_shuffle_is_the_oracles_byte_for_byte(shape):
    weights = weights_of(**shape)
    scales = weights.w13_block_scales.view(torch.uint8)
    scales.view(-1)[:127] = torch.arange(127)  # every one that there is
    scales[0, 64:] *= torch.rand(scales[0, 64:].shape).round().byte()  # half of them 0
    assert_same_bytes(shuffle_on_device(weights), shuffled(weights))


SCALE_BYTES = {"31-powers": (104, 134), "40-powers": (100, 139), "all": (0, 254)}


@pytest.mark.slow
@pytest.mark.parametrize("scale_bytes", SCALE_BYTES.values(), ids=SCALE_BYTES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_shuffle_of_mxfp4_is_the_oracles_byte_for_byte(shape, scale_bytes):
    weights = weights_of(**shape, mxfp4_bytes=scale_bytes)
    weights.w13_block_scales[0, : weights.intermediate] = 20  # the gate's window, not the up's
    weights.w13[:, 5] = 0x80
    expected, error = shuffled_mxfp4(weights)
    rounding = torch.zeros(1, device=DEVICE)
    got = prepare_weights(ExpertWeights(*(t.to(DEVICE, copy=True) for t in weights)), rounding)
    assert_same_bytes(got, expected)
    assert rounding.item() == error
    assert (error > 0) == (scale_bytes != SCALE_BYTES["31-powers"])


FP8_SCALE_BYTES = {"15-powers": (113, 127), "40-powers": (100, 139), "all": (0, 254)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "scales", [None, *FP8_SCALE_BYTES.values()], ids=["nvfp4", *FP8_SCALE_BYTES]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_order_of_fp8_is_the_oracles_byte_for_byte(shape, scales):
    weights = weights_of(**shape, mxfp4_bytes=scales)
    if scales is None:
        weights.w13_block_scales.view(torch.uint8).view(-1)[:127] = torch.arange(127)
    else:
        weights.w13_block_scales[0, : weights.intermediate] = 20  # the gate's window, not the up's
        weights.w13[:, 5] = 0x80
    check_order_of_fp8(weights, exact=scales in (None, FP8_SCALE_BYTES["15-powers"]))


@pytest.mark.parametrize("scales", [None, FP8_SCALE_BYTES["all"]], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("intermediate", [32, 288])
def test_the_order_of_fp8_where_h_ends_in_the_middle_of_a_block(intermediate, scales):
    weights = weights_of(2, 128, intermediate, mxfp4_bytes=scales)
    padded = padded_weights(BACKENDS["sm90"], weights)
    assert (padded.intermediate, padded.w2.shape[2] * 2 - intermediate) == (intermediate, 32)
    check_order_of_fp8(padded, exact=scales is None)


def check_order_of_fp8(weights: ExpertWeights, exact: bool) -> None:
    expected, error = shuffled_fp8(weights)
    rounding = torch.zeros(1, device=DEVICE)
    copy = ExpertWeights(*(tensor.to(DEVICE, copy=True) for tensor in weights))
    assert_same_bytes(prepare_weights(copy, rounding, fp8=True), expected)
    assert rounding.item() == error
    assert (error == 0) == exact


# Scales, whether activations are FP8, the oracle, and the largest error it may report.
REAL = {
    "nvfp4-fp8": (None, True, shuffled_fp8, 2.0**-16),
    "mxfp4-fp8": (SCALE_BYTES["40-powers"], True, shuffled_fp8, 2.0**-16),
    "mxfp4": (SCALE_BYTES["40-powers"], False, shuffled_mxfp4, 2.0**-32),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate"),
    [(48, 7168, 3072), (9, 5120, 2304), (9, 5120, 576)],
    ids=["pro-ep8", "v4.1-flash", "v4.1-flash-tp4"],
)
@pytest.mark.parametrize(("scales", "fp8", "oracle", "most"), REAL.values(), ids=REAL)
def test_an_order_that_may_round_is_the_oracles_at_real_sizes(
    scales, fp8, oracle, most, experts, hidden, intermediate
):
    weights = weights_of(experts, hidden, intermediate, mxfp4_bytes=scales, device="cuda")
    checked = sorted({0, CHUNK - 1, CHUNK, experts - 1})
    expected, error = oracle(ExpertWeights(*(tensor[checked].cpu() for tensor in weights)))
    rounding = torch.zeros(1, device="cuda")
    result = prepare_weights(weights, rounding, fp8=fp8)
    assert_same_bytes(ExpertWeights(*(tensor[checked] for tensor in result)), expected)
    assert error <= rounding.item() <= most


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate"),
    [(256, 4096, 2048), (48, 7168, 3072), (9, 5120, 2304), (9, 7168, 384)],
    ids=["flash", "pro-ep8", "v4.1-flash", "pro-tp8"],
)
def test_the_shuffle_is_the_oracles_at_real_sizes(experts, hidden, intermediate):
    """On either side of where chunks meet, and at the end: w13 of Flash is 2 GiB."""
    weights = weights_of(experts, hidden, intermediate, device="cuda")
    checked = sorted({0, CHUNK - 1, CHUNK, experts - 1})
    expected = shuffled(ExpertWeights(*(tensor[checked] for tensor in weights)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = prepare_weights(weights)
    assert torch.cuda.max_memory_allocated() - before <= 300 << 20
    assert_same_bytes(ExpertWeights(*(tensor[checked] for tensor in result)), expected)


@pytest.mark.parametrize("hidden, intermediate", [(128, 192), (320, 64)])
def test_the_oracle_loses_nothing(hidden, intermediate):
    weights = weights_of(3, hidden, intermediate)
    restored = unshuffled(shuffled(weights))
    for name in ("w13", "w2"):
        codes, scales = getattr(weights, name), getattr(weights, f"{name}_block_scales")
        assert torch.equal(getattr(restored, name), without_dead_codes(codes, scales))
        got = getattr(restored, f"{name}_block_scales")
        assert torch.equal(got.view(torch.uint8), scales.view(torch.uint8))


def test_a_zero_scale_is_a_zero_matrix_and_keeps_both_signs_of_zero_elsewhere():
    weights = weights_of()
    weights.w2_block_scales.view(torch.uint8)[0, :, ::2] = 0
    weights.w2[0, :, 8:16] = 0x80  # codes +0 and -0 under a live scale
    dense = reference.nvfp4_dequantize(weights.w2, weights.w2_block_scales, 1.0)
    restored = unshuffled(shuffle_on_device(weights))
    again = reference.nvfp4_dequantize(restored.w2, restored.w2_block_scales, 1.0)
    assert torch.equal(dense, again)
    assert torch.equal(restored.w2[0, :, 8:16], weights.w2[0, :, 8:16])


def widen_like_the_kernel(words: torch.Tensor, scale_words: torch.Tensor) -> torch.Tensor:
    """(..., 4 steps) and (..., 2) scale words -> (..., 4 steps, 4 registers, 2) values.

    The kernel's own arithmetic, bit for bit, on the CPU: the masks, then a bf16 product, times 2^7.
    """
    words = words.long() & 0xFFFFFFFF
    both = 0x81C081C0
    codes = torch.stack(
        (
            words & both,
            words << 6 & both,
            (words >> 4 | words << 28) & both,
            (words << 2 ^ words >> 6) & both,
        ),
        dim=-1,
    )

    def as_float(bits):  # bf16 bits: float32 with 16 more; exact, subnormals too, in float64
        sign, magnitude = bits >> 15 & 1, bits & 0x7FFF
        exponent, mantissa = magnitude >> 7, (magnitude & 127).double() / 128
        normal = torch.ldexp(1 + mantissa, exponent.double() - 127)
        value = torch.where(exponent > 0, normal, torch.ldexp(mantissa, torch.tensor(-126.0)))
        return torch.where(sign == 1, -value, value)

    pairs = as_float(torch.stack((codes & 0xFFFF, codes >> 16), dim=-1))
    scale_words = scale_words.long() & 0xFFFFFFFF
    rotated = scale_words >> 8 | scale_words << 24
    bits = (torch.stack((scale_words, rotated), dim=-1) & 0x0FF00FF0) | 0x70007000
    scales = as_float(torch.stack((bits & 0xFFFF, bits >> 16), dim=-1)).flatten(-3, -2)
    by_register = torch.stack((scales[..., 0], scales[..., 1]) * 2, dim=-1)
    return pairs * by_register.unsqueeze(-1) * 128


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_every_thread_owns_its_fragment(name):
    weights = weights_of(hidden=128, intermediate=192)
    codes, scales = getattr(weights, name), getattr(weights, f"{name}_block_scales")
    dense = reference.nvfp4_dequantize(codes, scales, 1.0)[1]
    if name == "w13":
        gate, up = dense.chunk(2)
        # 8 gate rows, then the 8 up rows of the same columns, and so on.
        dense = torch.stack((gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))), 1).flatten(0, 2)
    result = shuffle_on_device(weights)
    rows, k = dense.shape
    words = getattr(result, name)[1].flatten().view(torch.int32).view(rows // 64, k // 64, 128, 4)
    scale_words = getattr(result, f"{name}_block_scales")[1].flatten().view(torch.int32)
    scale_words = scale_words.view(rows // 64, k // 64, 32, 2).repeat_interleave(4, dim=2)
    got = widen_like_the_kernel(words, scale_words)
    thread = torch.arange(128).view(128, 1, 1, 1)
    step, register = torch.arange(4).view(4, 1, 1), torch.arange(4).view(4, 1)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
    column = 16 * step + 8 * (register // 2) + 2 * (thread % 4) + torch.arange(2)
    blocks = dense.double().view(rows // 64, 64, k // 64, 64).transpose(1, 2)
    assert torch.equal(got, blocks[:, :, row, column])


def test_products_are_exact_in_bf16():
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    products = scales[:, None] * torch.tensor(reference.E2M1_VALUES) / 128
    assert torch.equal(products.bfloat16().float(), products)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's allocator; the GPU's has a test above")
def test_scratch_is_one_chunk_of_the_larger_matrix():
    weights = weights_of(CHUNK + 1, 64, 64)
    one_expert = weights.w13[0].nbytes + weights.w13_block_scales[0].nbytes
    # Triton's interpreter allocates a few bytes in PyTorch.
    assert 0 <= peak_bytes(lambda: prepare_weights(weights)) - CHUNK * one_expert < 4096
