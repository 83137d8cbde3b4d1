"""What can run the layer: the oracle, or the grouped GEMMs of a GPU generation.

A backend's functions import what they call, so that naming one, and asking what it supports, needs
neither its libraries nor a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_kernels.compiled import Kernel
from dsv4_kernels.types import (
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ActivationAmax,
    ActivationScales,
    ExpertWeights,
    MoeShape,
    Routing,
)


@dataclass(frozen=True)
class Backend:
    """One way to run the layer. `supports` and `tile` are pure and need no GPU."""

    name: str
    # (shape, compute capability or None without a GPU) -> why it cannot run the layer, or None
    supports: Callable[[MoeShape, tuple[int, int] | None], str | None]
    # (weights, rounding) -> weights: checkpoint layout -> this backend's, in place; called once, at
    # load. rounding is MoeLayer's.
    prepare: Callable[[ExpertWeights, torch.Tensor], ExpertWeights]
    # (shape, num_tokens) -> rows that a group is padded to; 0 if it needs no workspace at all
    tile: Callable[[MoeShape, int], int]
    # (hidden_states, routing, layer, workspace, expert_map, out): all of it, if not by the steps of
    # `moe.run_kernels`, which are these
    run: Callable[..., None] | None = None
    # (x, routing weights, layout, layer, out=h), x being hidden_states, or placed rows, quantised
    # or not.
    # h is bf16 in W4A16 and where layer.activation_scales.fc2 is None, otherwise QuantizedRows.
    fc1: Callable[..., None] | None = None
    # (h, layout, layer, out=rows)
    fc2: Callable[..., None] | None = None
    # (shape, num_tokens) -> whether fc1 wants bf16 rows placed as the layout says, not by token
    places_rows: Callable[[MoeShape, int], bool] | None = None
    # (shape, device): all that serving would otherwise compile or allocate; called at load
    compile: Callable[[MoeShape, torch.device], None] | None = None
    # (shape, arch): what `compile` finds in the kernel cache, or compiles; needs no GPU
    kernels: Callable[[MoeShape, str], list[Kernel]] | None = None


@dataclass(frozen=True)
class MoeLayer:
    """One layer's routed experts on one rank, ready to run; made by `moe.prepare_layer`."""

    backend: Backend
    shape: MoeShape
    weights: ExpertWeights
    limit: float | None  # swiglu_limit
    activation_scales: ActivationScales | None  # None exactly in W4A16
    saturated: torch.Tensor  # (1,) int64 on the device: NVFP4 blocks that did not fit, so far
    # (1,) float32 on the device: the largest error of a weight that the backend cannot hold, over
    # the largest scale of its expert; 0 where all are exact, as all of NVFP4's are
    rounding: torch.Tensor
    amax: ActivationAmax | None = None  # recorded while calibrating, see `moe.recording_layer`


def _run_reference(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    workspace: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    from dsv4_kernels import reference

    out.copy_(
        reference.moe(
            hidden_states,
            routing,
            layer.weights,
            expert_map=expert_map,
            limit=layer.limit,
            activation_scales=layer.activation_scales,
            saturated=layer.saturated,
            amax=layer.amax,
        )
    )


def _supports_weights(shape: MoeShape) -> str | None:
    """What no backend can do: a scale is of 16 or 32 values along hidden and intermediate, and
    MXFP4 weights with NVFP4 activations are nobody's numerics."""
    blocks = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}
    if shape.weight_format not in blocks:
        return f"weight format {shape.weight_format} is not known: use {_listed(blocks)}"
    if shape.weight_format == "mxfp4" and shape.quantize_activations:
        return (
            "activations nvfp4 (W4A4) are for NVFP4 experts, and these are MXFP4: set activations "
            "to bf16"
        )
    block = blocks[shape.weight_format]
    for name in ("hidden", "intermediate"):
        size = getattr(shape, name)
        if size <= 0 or size % block:
            return (
                f"{name} size {size} of this rank is not a positive multiple of the "
                f"{shape.weight_format.upper()} block, {block}: use a tensor-parallel size that "
                "divides it evenly"
            )
    return None


REFERENCE = Backend(
    name="reference",
    supports=lambda shape, capability: _supports_weights(shape),
    prepare=lambda weights, rounding: weights,
    tile=lambda shape, num_tokens: 0,
    run=_run_reference,
)


def _supports_sm90(shape: MoeShape, capability: tuple[int, int] | None) -> str | None:
    from dsv4_kernels.sm90.gemm import unsupported

    if capability is not None and capability[0] != 9:
        major, minor = capability
        return f"it is made for compute capability 9.0, and this GPU has {major}.{minor}"
    return _supports_weights(shape) or unsupported(shape)


def _shuffle_sm90(weights: ExpertWeights, rounding: torch.Tensor) -> ExpertWeights:
    from dsv4_kernels.sm90.weights import shuffle_sm90

    return shuffle_sm90(weights, rounding)


def _places_rows_sm90(shape: MoeShape, num_tokens: int) -> bool:
    from dsv4_kernels.sm90.gemm import places_rows

    return places_rows(shape, num_tokens)


def _compile_sm90(shape: MoeShape, device: torch.device) -> None:
    from dsv4_kernels.sm90.gemm import compile_layer

    compile_layer(shape, device)


def _kernels_sm90(shape: MoeShape, arch: str) -> list[Kernel]:
    from dsv4_kernels.sm90.gemm import kernels

    return kernels(shape, arch)


def _fc1_sm90(x, routing_weights, layout, layer: MoeLayer, *, out: torch.Tensor) -> None:
    from dsv4_kernels.sm90.gemm import fc1

    fc1(x, routing_weights, layout, layer.weights, layer.shape, layer.limit, out=out)


def _fc2_sm90(h, layout, layer: MoeLayer, *, out: torch.Tensor) -> None:
    from dsv4_kernels.sm90.gemm import fc2

    fc2(h, layout, layer.weights, layer.shape, out=out)


SM90 = Backend(
    name="sm90",
    supports=_supports_sm90,
    prepare=_shuffle_sm90,
    tile=lambda shape, num_tokens: 8,
    fc1=_fc1_sm90,
    fc2=_fc2_sm90,
    places_rows=_places_rows_sm90,
    compile=_compile_sm90,
    kernels=_kernels_sm90,
)


def _supports_sm100(shape: MoeShape, capability: tuple[int, int] | None) -> str | None:
    from dsv4_kernels.sm100.spec import unsupported

    if capability is not None and capability[0] != 10:
        return (
            f"it is for compute capability 10 and this GPU has {capability[0]}.{capability[1]}: "
            "set backend to auto"
        )
    return unsupported(shape)


def _prepare_sm100(weights: ExpertWeights, rounding: torch.Tensor) -> ExpertWeights:
    from dsv4_kernels.sm100.weights import swizzle_sm100

    return swizzle_sm100(weights)


def _tile_sm100(shape: MoeShape, num_tokens: int) -> int:
    from dsv4_kernels.sm100.spec import choose_config

    return choose_config(shape, num_tokens).tile


def _compile_sm100(shape: MoeShape, device: torch.device) -> None:
    from dsv4_kernels.sm100.gemm import compile_layer

    compile_layer(shape, device)


def _kernels_sm100(shape: MoeShape, arch: str) -> list[Kernel]:
    from dsv4_kernels.sm100.gemm import kernels

    return kernels(shape, arch)


def _fc1_sm100(x, routing_weights, layout, layer, *, out) -> None:
    from dsv4_kernels.sm100.gemm import fc1

    weights, scales, limit = layer.weights, layer.activation_scales, layer.limit
    fc1(x, routing_weights, layout, weights, scales, limit, layer.saturated, out=out)


def _fc2_sm100(h, layout, layer, *, out) -> None:
    from dsv4_kernels.sm100.gemm import fc2

    fc2(h, layout, layer.weights, layer.activation_scales, out=out)


SM100 = Backend(
    name="sm100",
    supports=_supports_sm100,
    prepare=_prepare_sm100,
    tile=_tile_sm100,
    fc1=_fc1_sm100,
    fc2=_fc2_sm100,
    compile=_compile_sm100,
    kernels=_kernels_sm100,
)
BACKENDS = {backend.name: backend for backend in (REFERENCE, SM90, SM100)}
# The backend that `auto` means, by the major compute capability; `reference` without a GPU.
AUTO = {9: "sm90", 10: "sm100"}


def choose_backend(name: str, shape: MoeShape, capability: tuple[int, int] | None) -> Backend:
    """The backend of that name, or the capability's own for "auto"; ValueError says why not."""
    if name == "auto":
        if capability is not None and capability[0] not in AUTO:
            raise ValueError(
                f"no backend is made for compute capability {capability[0]}.{capability[1]} "
                f"(there are {_listed(AUTO.values())}): set backend to reference to run slowly"
            )
        name = "reference" if capability is None else AUTO[capability[0]]
    if name not in BACKENDS:
        raise ValueError(f"there is no {name} backend in this build: use {_listed(BACKENDS)}")
    reason = BACKENDS[name].supports(shape, capability)
    if reason is not None:
        raise ValueError(f"the {name} backend cannot run this layer: {reason}")
    return BACKENDS[name]


def _listed(names) -> str:
    return " or ".join(names)
