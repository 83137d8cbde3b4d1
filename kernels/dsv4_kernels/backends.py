"""What can run the layer: the oracle, or the grouped GEMMs of a GPU generation.

A GPU's folder has the functions of `GpuFolder`, and one line here. They are imported when they are
first called, so that naming a backend, and asking what it cannot run, needs neither its libraries
nor a GPU.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsv4_kernels.compiled import Kernel
from dsv4_kernels.packed_tokens import is_packed, unpack_tokens
from dsv4_kernels.types import (
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    Fp8Rows,
    MoeLayer,
    MoeShape,
    QuantizedRows,
    Routing,
    fp8_h_scale,
)


class GpuFolder(Protocol):
    """What `sm90` and `sm100` have in common, by module."""

    # heuristic: pure
    def unsupported_reason(self, shape: MoeShape) -> str | None:
        """Why these kernels cannot run the layer, or None."""

    def padded_intermediate(self, size: int, fp8: bool = False) -> tuple[int, int]:
        """What an intermediate size is padded to (see `padding`): rows of the gate and of the up,
        which is h's width, and columns of w2."""

    def tile(self, shape: MoeShape, num_tokens: int) -> int:
        """Rows that a group is padded to."""

    def places_rows(self, shape: MoeShape, num_tokens: int) -> bool:
        """Whether fc1 reads bf16 or fp8 rows that were placed as the layout says; otherwise it
        gathers them by token."""

    # weights
    def prepare_weights(
        self, weights: ExpertWeights, rounding: torch.Tensor, fp8: bool
    ) -> ExpertWeights:
        """Checkpoint layout -> this GPU's, in place, once, at load; W4A8 has a layout of its own.
        rounding, MoeLayer's, is written."""

    # compile
    def kernels(self, shape: MoeShape, arch: str) -> list[Kernel]:
        """All that `compile_layer` takes from the kernel cache or compiles; needs no GPU."""

    # gemm
    def compile_layer(self, shape: MoeShape, device: torch.device) -> None:
        """At load, compile and allocate what serving would have to."""

    def fc1(
        self,
        x: torch.Tensor | QuantizedRows | Fp8Rows,
        routing_weights: torch.Tensor,
        layout: ExpertLayout,
        layer: MoeLayer,
        *,
        out: torch.Tensor | QuantizedRows | Fp8Rows,
        num_tokens: int | None = None,
    ) -> None:
        """x (tokens, or placed rows, quantised or not) -> h in out: bf16 in W4A16 and where
        shape.scale_per_row, otherwise QuantizedRows or Fp8Rows. num_tokens chooses the tiles, by
        default the length of routing_weights."""

    def fc2(
        self,
        h: torch.Tensor | QuantizedRows | Fp8Rows,
        layout: ExpertLayout,
        layer: MoeLayer,
        *,
        out: torch.Tensor,
        routing_weights: torch.Tensor | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """h -> bf16 rows for `combine`, multiplied by routing_weights where they are given (W4A8).
        num_tokens as for fc1."""


MODULES = {
    "heuristic": ("unsupported_reason", "padded_intermediate", "tile", "places_rows"),
    "weights": ("prepare_weights",),
    "compile": ("kernels",),
    "gemm": ("compile_layer", "fc1", "fc2"),
}


@dataclass(frozen=True)
class Backend:
    """One way to run the layer: GpuFolder's functions, or `run`, which is the whole layer."""

    name: str
    # Compute capabilities that it is made for, by their first number; none are any device's.
    majors: tuple[int, ...]
    unsupported_reason: Callable[[MoeShape], str | None]
    prepare_weights: Callable[[ExpertWeights, torch.Tensor, bool], ExpertWeights]
    tile: Callable[[MoeShape, int], int]  # 0 where there is no workspace at all
    run: Callable[..., None] | None = None
    # What stands for `rows`' quantisers where tokens are quantised before they travel.
    quantize: Callable[..., None] | None = None
    fc1: Callable[..., None] | None = None
    fc2: Callable[..., None] | None = None
    padded_intermediate: Callable[..., tuple[int, int]] = lambda size, fp8=False: (size, size)
    places_rows: Callable[[MoeShape, int], bool] = lambda shape, num_tokens: False
    compile_layer: Callable[[MoeShape, torch.device], None] | None = None
    kernels: Callable[[MoeShape, str], list[Kernel]] | None = None


def _run_reference(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    workspace: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    from dsv4_kernels import reference

    scales, h_scale = layer.activation_scales, fp8_h_scale(layer.limit)
    if layer.shape.fp8 and h_scale is not None:
        scales = ActivationScales(None, torch.full_like(layer.weights.w2_global_scales, h_scale))
    out.copy_(
        reference.moe(
            unpack_tokens(hidden_states, layer) if is_packed(hidden_states) else hidden_states,
            routing,
            layer.weights,
            expert_map=expert_map,
            limit=layer.limit,
            activation_scales=scales,
            fp8=layer.shape.fp8,
            saturated=layer.saturated,
            amax=layer.amax,
        )
    )


def _quantize_reference(
    x: torch.Tensor,
    global_scale: torch.Tensor | None,
    *,
    live: torch.Tensor,
    saturated: torch.Tensor,
    out: QuantizedRows | Fp8Rows,
) -> None:
    """Quantise the rows of x that have a live slot into the parts of out, which has the layer's
    scale, if there is one, already."""
    from dsv4_kernels import reference

    used = (live >= 0).any(1)
    rows: Fp8Rows | QuantizedRows
    if isinstance(out, Fp8Rows):
        codes, scales, overflow = reference.fp8_quantize(x[used], None)
        rows = Fp8Rows(codes, scales)
    else:
        rows, overflow = reference.nvfp4_quantize(x[used], global_scale)
    saturated.add_(overflow)
    for part, values in zip(out, rows, strict=True):
        if part is not global_scale:
            part[used] = values


def _unsupported_weights(shape: MoeShape) -> str | None:
    """Why no backend can run these weights, or None: hidden and intermediate are whole blocks of
    16 (NVFP4) or 32 (MXFP4) values, and MXFP4 weights do not go with NVFP4 activations."""
    blocks = {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}
    if shape.weight_format not in blocks:
        return f"weight format {shape.weight_format} is not known: use {_listed(blocks)}"
    if shape.weight_format == "mxfp4" and shape.quantize_activations:
        return (
            "activations nvfp4 (W4A4) are for NVFP4 experts, and these are MXFP4: set activations "
            "to auto"
        )
    block = blocks[shape.weight_format]
    for name, remedy in (
        ("hidden", "choose vLLM's own experts with --moe-backend"),
        ("intermediate", "use a smaller tensor-parallel size, or expert parallelism"),
    ):
        size = getattr(shape, name)
        if size <= 0 or size % block:
            return (
                f"{name} size {size} of this rank is not a positive multiple of the "
                f"{shape.weight_format.upper()} block, {block}: {remedy}"
            )
    return None


def _of_folder(name: str, major: int) -> Backend:
    """dsv4_kernels.<name>, for GPUs of compute capability <major>."""

    def lazy(module: str, function: str) -> Callable[..., Any]:
        @functools.cache
        def find():
            return getattr(importlib.import_module(f"dsv4_kernels.{name}.{module}"), function)

        return lambda *args, **kwargs: find()(*args, **kwargs)

    functions = {f: lazy(module, f) for module, names in MODULES.items() for f in names}
    return Backend(name, (major,), **functions)


REFERENCE = Backend(
    name="reference",
    majors=(),
    unsupported_reason=lambda shape: None,
    prepare_weights=lambda weights, rounding, fp8: weights,
    tile=lambda shape, num_tokens: 0,
    run=_run_reference,
    quantize=_quantize_reference,
)
SM90 = _of_folder("sm90", 9)
SM100 = _of_folder("sm100", 10)
BACKENDS = {backend.name: backend for backend in (REFERENCE, SM90, SM100)}
# The backend that `auto` means, by the major compute capability; `reference` without a GPU.
AUTO = {major: backend.name for backend in BACKENDS.values() for major in backend.majors}


def unsupported_reason(
    backend: Backend, shape: MoeShape, capability: tuple[int, int] | None
) -> str | None:
    """Why the backend cannot run the layer, or None; a capability of None is not checked."""
    if capability is not None and backend.majors and capability[0] not in backend.majors:
        made_for = " or ".join(f"{major}.x" for major in backend.majors)
        return (
            f"it is made for compute capability {made_for}, and this GPU has "
            f"{capability[0]}.{capability[1]}: set backend to auto"
        )
    return _unsupported_weights(shape) or backend.unsupported_reason(shape)


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
    reason = unsupported_reason(BACKENDS[name], shape, capability)
    if reason is not None:
        raise ValueError(f"the {name} backend cannot run this layer: {reason}")
    return BACKENDS[name]


def _listed(names) -> str:
    return " or ".join(names)
