"""Where the memory of a rank's GPU goes, for any topology: weights, the arena, what remains.

Weights are the checkpoint's tensors as vLLM divides them, padded where this plugin pads its own; a
little more is the model's, such as copies in another layout. The arena is exact.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dsv4_moe.checkpoint_layout import ModelSizes, Named, TensorSpec, checkpoint_tensors
from vllm_dsv4_moe.commands.deployment import BACKENDS, Deployment, moe_sizes
from vllm_dsv4_moe.commands.v41_layout import v41_tensors

if TYPE_CHECKING:
    from dsv4_kernels.types import MoeShape

GIB = 2**30
# What tensor parallelism divides; the rest of what is not an expert is on every GPU.
TP_SHARDED = re.compile(r"(^embed\.|^head\.|\.attn\.(wq_b|wo_a|wo_b)\.)")
# Of layers that sequence parallelism hands each rank its own tokens: whole on every GPU then.
PER_TOKEN = re.compile(r"(\.shared_experts\.|\.engram\.wkv\.)")
# vLLM keeps these tables in the host's memory, one copy a node.
ON_HOST = re.compile(r"\.engram\.embed\.")
# Bytes, as nvidia-smi gives them in MiB, and what ptxas calls the GPU.
GPUS = {"h200": (143_771 * 2**20, "sm_90a"), "b200": (183_359 * 2**20, "sm_100a")}


class Weights(NamedTuple):
    """Bytes on one rank; host's are a node's."""

    experts: int
    others: int
    draft_experts: int
    draft_others: int
    host: int

    @property
    def drafts(self) -> int:
        return self.draft_experts + self.draft_others

    @property
    def on_gpu(self) -> int:
        return self.experts + self.others + self.drafts


class RankMemory(NamedTuple):
    """Bytes of a GPU, but for the host's, which are a node's."""

    gpu: int
    given: int  # of it, what gpu_memory_utilization gives vLLM
    weights: Weights
    arena: int  # of the model's layers, and of MTP drafts, which run in the same
    drafts_arena: int  # DSpark drafts have one of their own

    @property
    def left(self) -> int:
        """For activations, CUDA graphs and the KV cache; negative where it does not fit."""
        return self.given - self.weights.on_gpu - self.arena - self.drafts_arena

    def __str__(self) -> str:
        weights = self.weights
        drafts = f" {_gib(weights.drafts)} drafts," if weights.drafts else ""
        their_arena = f" and {_gib(self.drafts_arena)} of the drafts'" if self.drafts_arena else ""
        host = f"; {_gib(weights.host)} of Engram's tables are in the host's memory"
        return (
            f"Memory of a GPU, GiB: {_gib(self.gpu)}, of which vLLM takes {_gib(self.given)}: "
            f"{_gib(weights.experts)} experts, {_gib(weights.others)} other weights,{drafts} "
            f"{_gib(self.arena)} arena of the MoE layers{their_arena}, and {_gib(self.left)} for "
            f"activations, CUDA graphs and the KV cache{host if weights.host else ''}."
        )

    def comment(self) -> str:
        """The same as lines of a YAML file."""
        return textwrap.fill(
            str(self), 98, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def rank_memory(deployment: Deployment, gpu: int, arch: str) -> RankMemory:
    """On a GPU of that many bytes, of that architecture. ValueError where sizes do not divide."""
    from dsv4_kernels.backends import BACKENDS as backends
    from dsv4_kernels.moe import workspace_bytes

    backend = backends[BACKENDS[arch]]
    layers, drafts = deployment.shapes(arch)

    def arena(shape: "MoeShape | None") -> int:
        if shape is None:
            return 0
        # Rows in groups are as many in the output, which lies in the arena then.
        output = 2 * shape.num_local_experts * shape.batch_rows * shape.hidden
        return (workspace_bytes(backend, shape) + output) * deployment.micro_batches

    def padded(experts: int, shape: "MoeShape | None") -> int:
        if shape is None:
            return experts
        rows, columns = backend.padded_intermediate(shape.intermediate, shape.fp8)
        return experts * (2 * rows + columns) // (3 * shape.intermediate)

    weights = weights_of_rank(tensors_of(deployment.config), deployment)
    arenas = arena(layers), arena(drafts)
    if deployment.draft_method != "dspark":
        arenas = max(arenas), 0
    return RankMemory(
        gpu,
        int(gpu * deployment.gpu_memory_utilization),
        weights._replace(
            experts=padded(weights.experts, layers),
            draft_experts=padded(weights.draft_experts, drafts),
        ),
        *arenas,
    )


def tensors_of(config: Mapping[str, Any]) -> Named:
    sizes = ModelSizes.from_config(config)
    return v41_tensors(config) if sizes.is_v41 else checkpoint_tensors(sizes)


def weights_of_rank(tensors: Iterable[tuple[str, TensorSpec]], deployment: Deployment) -> Weights:
    """Of a pipeline, those of the stage with the most."""
    tensors = list(tensors)
    layers = [int(name.split(".")[1]) for name, _ in tensors if name.startswith("layers.")]
    stage_of = stages_of_layers(max(layers) + 1, deployment.pipeline_parallel)
    stages: list[Counter[str]] = [Counter() for _ in range(deployment.pipeline_parallel)]
    for name, spec in tensors:
        part, *rest = name.split(".")
        stage = stage_of[int(rest[0])] if part == "layers" else 0 if part == "embed" else -1
        whose = "drafts" if part == "mtp" else "model"
        stages[stage][f"{whose} {_kind(name, deployment)}"] += spec.num_bytes
    return max((_weights(sums, deployment) for sums in stages), key=lambda found: found.on_gpu)


def stages_of_layers(num_layers: int, stages: int) -> list[int]:
    """The stage of each layer; those that are left over go to the last stages but one, as in
    vLLM."""
    counts = [num_layers // stages] * stages
    for number in range(num_layers % stages):
        counts[-2 - number] += 1
    return [stage for stage, count in enumerate(counts) for _ in range(count)]


def _kind(name: str, deployment: Deployment) -> str:
    if ON_HOST.search(name):
        return "host"
    if ".experts." in name:
        return "experts"
    by_token = PER_TOKEN.search(name) and not deployment.is_sequence_parallel
    return "sharded" if TP_SHARDED.search(name) or by_token else "whole"


def _weights(sums: Counter[str], deployment: Deployment) -> Weights:
    """A stage's sums over all ranks, as one rank's bytes."""

    def experts(whose: str, prefix: str) -> int:
        copies = deployment.redundant_experts
        if not copies:
            return sums[f"{whose} experts"] // deployment.ranks
        number = moe_sizes(deployment.config, prefix)[0]
        return sums[f"{whose} experts"] * (number + copies) // number // deployment.ranks

    def others(whose: str) -> int:
        return sums[f"{whose} whole"] + sums[f"{whose} sharded"] // deployment.tensor_parallel

    drafts = (0, 0)
    if deployment.draft_method:
        drafts = experts("drafts", "dspark_"), others("drafts")
    return Weights(experts("model", ""), others("model"), *drafts, sums["model host"])
