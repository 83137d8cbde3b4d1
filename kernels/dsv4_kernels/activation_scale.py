"""Global scales of the two NVFP4 activations of W4A4: where they come from, by policy.

    warmup      gs1 = pow2(headroom * max|x| / 2688)            x: seeded synthetic tokens
                gs2[e] = pow2(max|h_e(s * x)| / 2688)           s = 1, 2, 4, ... headroom
    token       one per row, computed by the quantising kernel
    checkpoint  max of the checkpoint's input_scale over all experts
    file        what `write_file` wrote after a calibration run

2688 = 6 * 448 is the largest value that a scale of 1 represents; pow2 rounds up to a power of two.
h_e is the product that W2 reads: clamped SwiGLU times the largest routing weight there can be. A
scale that is too small saturates E4M3 block scales at 448 and shrinks the layer silently; one that
is too large costs next to nothing until blocks fall under E4M3's normal range, 28,672 below the
largest (`bench/activation_error.py` prints the price). So headroom is generous, and FC2's goes
through the nonlinearity, where the clamp bounds it. Without a clamp the product grows with the
square of the token: tokens from 1/10 to 30 times the unit span 90,000, which no fixed scale holds,
and FC2 then gets one per row. Powers of two make every division by a scale exact, and the scales
the same on every device.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dsv4_kernels.types import NVFP4_BLOCK, NVFP4_MAX, ActivationScales, ExpertWeights

HEADROOM = 32
NUM_SYNTHETIC_TOKENS = 64
FILE_FORMAT = "dsv4-moe-activation-scales"
FILE_VERSION = 1
# Experts whose products are held at a time.
CHUNK = 8
_FP32_MIN, _FP32_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def synthetic_tokens(hidden: int, seed: int = 0) -> torch.Tensor:
    """(64, hidden) float32 rows of unit RMS with a heavy tail, the same on every machine.

    Student's t with 2 degrees of freedom, then normalised: the largest value comes near
    sqrt(hidden), the most that a row of unit RMS can hold.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (NUM_SYNTHETIC_TOKENS, hidden)
    # vLLM loads under a default dtype and device of its own.
    normal, chi2 = (torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(2))
    normal.normal_(generator=generator)
    x = normal / chi2.exponential_(generator=generator).clamp(min=1e-9).sqrt()
    return x / x.square().mean(1, keepdim=True).sqrt()


def warmup(
    weights: ExpertWeights,
    *,
    limit: float | None,
    scaling: float,
    headroom: int = HEADROOM,
    seed: int = 0,
) -> ActivationScales:
    """Scales from synthetic tokens through each expert's own weights, in checkpoint layout.

    scaling is routed_scaling_factor: a token's weights sum to it, so none is larger. FC1's scale
    depends on hidden, seed and headroom alone, FC2's on its expert's weights too: neither on
    which rank holds what (a tensor-parallel rank's is for its part of the intermediate size).
    Without a limit FC2 gets one scale per row (fc2 None). Call it before the weights are shuffled
    for a kernel; one expert is widened to fp32 at a time, 260 MiB at V4-Pro's sizes. ValueError for
    a headroom that is not a power of two, and for an expert whose product is not finite.
    """
    if headroom < 1 or headroom & (headroom - 1):
        raise ValueError(f"activation headroom is {headroom}: use a power of two, 1, 2, 4, ...")
    x, fc1 = _tokens_and_scale(weights.hidden, headroom, seed)
    x, fc1 = x.to(weights.w13.device), fc1.to(weights.w13.device, copy=True)
    if limit is None:
        return ActivationScales(fc1, None)
    chunks = zip(
        weights.w13.split(CHUNK),
        weights.w13_block_scales.split(CHUNK),
        weights.w13_global_scales.split(CHUNK),
        strict=True,
    )
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        fc2_amax = torch.cat([_product_amax(x, *chunk, limit, headroom) for chunk in chunks])
    finally:
        torch.set_float32_matmul_precision(precision)
    if not math.isfinite(float(fc2_amax.amax())):
        raise ValueError(
            f"local experts {(~fc2_amax.isfinite()).nonzero().flatten().tolist()} give products "
            "that are not finite: their weight scales are damaged"
        )
    return ActivationScales(fc1, _power_of_two(fc2_amax * scaling / NVFP4_MAX))


@functools.cache
def _tokens_and_scale(hidden: int, headroom: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The synthetic tokens and FC1's scale, on the host: every layer's are the same."""
    x = synthetic_tokens(hidden, seed)
    return x, _power_of_two(x.abs().amax().reshape(1) * headroom / NVFP4_MAX)


def _product_amax(
    x: torch.Tensor,
    w13: torch.Tensor,
    block_scales: torch.Tensor,
    global_scales: torch.Tensor,
    limit: float,
    headroom: int,
) -> torch.Tensor:
    """Each expert's max|clamped SwiGLU| of tokens s * x over s = 1, 2, 4 ... headroom, float32.

    All of them, because silu is not monotone: what a larger token gives may be smaller. w13 and
    its scales are those of a chunk of experts. An expert's sums are its own matrix product, which
    is the same whatever else is in the chunk.
    """
    table = _byte_values(x.device)
    products = x.new_empty((len(w13), len(x), w13.shape[1]))
    for product, codes, scales in zip(products, w13, block_scales, strict=True):
        torch.mm(x, _widen(codes, scales, table).T, out=product)
    products = products.unflatten(2, (2, -1)).mul_(global_scales[:, None, :, None])
    powers = x.new_tensor([2.0**power for power in range(headroom.bit_length())])
    gate, up = (products.unsqueeze(1) * powers.view(-1, 1, 1, 1)).unbind(-2)
    F.silu(gate.clamp_(max=limit), inplace=True)
    return gate.mul_(up.clamp_(-limit, limit)).abs_().amax((1, 2, 3))


def _byte_values(device: torch.device) -> torch.Tensor:
    """(256, 2) float32, the two E2M1 values of each byte."""
    signed = _E2M1 + tuple(-v for v in _E2M1)
    pairs = [(signed[byte & 15], signed[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)


def _widen(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(R, hidden // 2) uint8 and (R, hidden // 16) -> (R, hidden) fp32, without global scale."""
    values = table.index_select(0, codes.int().flatten())
    blocks = values.view(*scales.shape, NVFP4_BLOCK)
    return blocks.mul_(scales.float().unsqueeze(-1)).view(len(codes), -1)


def from_amax(fc1_amax: torch.Tensor, fc2_amax: torch.Tensor, headroom: int) -> ActivationScales:
    """Scales at which headroom times these magnitudes still fit, for a calibration run's file.

    fc1_amax () or (1,), fc2_amax (num_experts,) float32 of all global experts. Powers of two,
    never 0: an expert that saw no row (amax 0) gets the largest scale of the layer's others, and
    1 if nobody saw any.
    """
    fc2_amax = torch.where(fc2_amax > 0, fc2_amax, fc2_amax.max())
    return ActivationScales(
        _power_of_two(fc1_amax.reshape(1).float() * headroom / NVFP4_MAX),
        _power_of_two(fc2_amax.float() * headroom / NVFP4_MAX),
    )


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The next power of two from 2^-100 to 2^100; 1 for 0."""
    # A mantissa that is not 0 carries into the exponent.
    bits = (scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
    return torch.where(scale > 0, bits.view(torch.float32).clamp(2.0**-100, 2.0**100), 1.0)


def token() -> ActivationScales:
    """One scale per row, of both activations, from the row's own largest magnitude."""
    return ActivationScales(None, None)


def checkpoint(
    w13_input_scales: torch.Tensor, w2_input_scales: torch.Tensor, num_local_experts: int
) -> ActivationScales:
    """The checkpoint's input_scale (amax / 2688 of ModelOpt's calibration), maximum over experts.

    w13_input_scales (num_experts, ...) and w2_input_scales (num_experts, ...) float32 of all
    global experts, so that every rank gets the same; NaN where the checkpoint has none.
    ValueError names the first experts without a usable scale.
    """
    largest = []
    for name, scales in (("w1/w3", w13_input_scales), ("w2", w2_input_scales)):
        scales = scales.float().reshape(len(scales), -1)
        bad = (~(scales.isfinite() & (scales > 0))).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name}.input_scale of {len(bad)} of {len(scales)} experts is missing or not a "
                f"positive number (expert {bad[0]}: {scales[bad[0]].tolist()}): use the warmup or "
                "token policy for activation scales"
            )
        largest.append(scales.max())
    return ActivationScales(largest[0].reshape(1), largest[1].repeat(num_local_experts))


class LayerScales(NamedTuple):
    """One layer's entry in a file, for every global expert."""

    fc1: float
    fc2: Sequence[float]  # num_experts of them, by global (logical) expert id


def write_file(path: str | Path, layers: Mapping[int, LayerScales], **source: Any) -> None:
    """The JSON that `from_file` reads; source (model, prompts, ...) is kept for the reader's eye.

    {"format": "dsv4-moe-activation-scales", "version": 1, "source": {...},
     "layers": {"3": {"fc1": 0.5, "fc2": [0.0625, ...]}, ...}}, keys are layer indices.
    """
    for index, scales in layers.items():
        _check_layer(str(path), index, scales.fc1, scales.fc2)
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "source": source,
        "layers": {
            str(index): {"fc1": float(scales.fc1), "fc2": [float(v) for v in scales.fc2]}
            for index, scales in sorted(layers.items())
        },
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def from_file(
    path: str | Path,
    layer: int,
    num_experts: int,
    local_to_global: Sequence[int],
    device: torch.device | str = "cpu",
) -> ActivationScales:
    """One layer's scales; local_to_global names the global (logical) expert of each local one.

    ValueError says which part of the file does not fit: the file itself, the layer, the number
    of experts, or a value that is not a positive number.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"activation scale file {path} cannot be read: {error}") from error
    header = (content.get("format"), content.get("version")) if isinstance(content, dict) else ()
    if header != (FILE_FORMAT, FILE_VERSION):
        raise ValueError(
            f"{path} is not an activation scale file of version {FILE_VERSION}: write one with "
            "dsv4-moe calibrate"
        )
    layers = content.get("layers")
    entry = layers.get(str(layer)) if isinstance(layers, dict) else None
    if not isinstance(entry, dict):
        known = ", ".join(map(str, layers or ())) or "none"
        raise ValueError(f"{path} has no scales for layer {layer} (it has {known})")
    fc1: Any = entry.get("fc1")
    fc2: Any = entry.get("fc2")
    _check_layer(str(path), layer, fc1, fc2)
    if len(fc2) != num_experts:
        raise ValueError(
            f"{path} has scales of {len(fc2)} experts for layer {layer}, and the model has "
            f"{num_experts}: it was written for another model"
        )
    local = [fc2[expert] for expert in local_to_global]
    return ActivationScales(
        torch.tensor([fc1], dtype=torch.float32, device=device),
        torch.tensor(local, dtype=torch.float32, device=device),
    )


def _check_layer(path: str, layer: int, fc1: Any, fc2: Any) -> None:
    values = [fc1, *fc2] if isinstance(fc2, Sequence) and not isinstance(fc2, str) else [None]
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not _FP32_MIN <= value <= _FP32_MAX:
            raise ValueError(
                f"{path}: layer {layer} has the activation scale {value!r}, which is not a "
                "positive number"
            )
