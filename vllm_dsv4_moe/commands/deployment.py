"""What a file for `vllm serve --config` asks of one rank: how the model is divided, and which of
its layers are this plugin's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dsv4_moe.commands.releases import model_config, text_config
from vllm_dsv4_moe.settings import MXFP4_BACKENDS, Settings, activations_on, read_settings

if TYPE_CHECKING:
    from dsv4_kernels.types import MoeShape

BACKENDS = {"sm_90a": "sm90", "sm_100a": "sm100", "sm_103a": "sm100"}
# Speculative methods that run layers of the checkpoint, by vLLM's name; others have none of ours.
DRAFTS: dict[str | None, str] = {"mtp": "mtp", "deepseek_mtp": "mtp", "dspark": "dspark"}
# n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size
SIZES = ("n_routed_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")


@dataclass(frozen=True)
class Deployment:
    """The options that say what a rank holds."""

    config: Mapping[str, Any]  # config.json
    settings: Settings
    max_num_batched_tokens: int  # of one data-parallel rank
    tensor_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1  # of prefill
    pipeline_parallel: int = 1
    is_expert_parallel: bool = False
    redundant_experts: int = 0  # EPLB's copies, over all ranks
    all2all_backend: str = "allgather_reducescatter"
    micro_batches: int = 1  # --enable-dbo has two
    draft_method: str | None = None  # mtp or dspark
    gpu_memory_utilization: float = 0.92

    @property
    def ranks(self) -> int:
        """Those that a layer's experts are divided among, in whole or in parts."""
        return self.tensor_parallel * self.data_parallel * self.context_parallel

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether each rank of a tensor-parallel group gives an MoE layer its own tokens."""
        return (
            self.is_expert_parallel
            and self.tensor_parallel > 1
            and self.data_parallel > 1
            and self.pipeline_parallel == 1
        )

    def shapes(self, arch: str) -> "tuple[MoeShape | None, MoeShape | None]":
        """A rank's layers of the model, and of its drafts; None where vLLM runs them or there are
        none. ValueError where the sizes do not divide or the settings cannot be followed."""
        drafts = self._shape(arch, "mxfp4", "dspark_") if self.draft_method else None
        return self._shape(arch, self.weight_format, ""), drafts

    @property
    def weight_format(self) -> str:
        """Of the model's experts; those of drafts are MXFP4 in every release."""
        return format_of(text_config(self.config).get("quantization_config") or {})

    def _shape(self, arch: str, weight_format: str, prefix: str) -> "MoeShape | None":
        if weight_format not in self.settings.formats.split(","):
            return None
        if weight_format == "mxfp4" and BACKENDS[arch] not in MXFP4_BACKENDS:
            return None
        tp = self.tensor_parallel
        per_rank = -(-self.max_num_batched_tokens // tp) * tp  # sequence parallelism's shards
        shape = rank_shape(
            moe_sizes(self.config, prefix),
            arch,
            ep_size=self.ranks if self.is_expert_parallel else 1,
            tp_size=1 if self.is_expert_parallel else self.ranks,
            redundant_experts=self.redundant_experts,
            max_num_tokens=per_rank * self.data_parallel * self.context_parallel,
            settings=self.settings,
            limit=text_config(self.config).get("swiglu_limit"),
            weight_format=weight_format,
        )
        dispatches = self.is_expert_parallel and self.data_parallel > 1
        groups = dispatches and self.all2all_backend in ("deepep_low_latency", "nixl_ep")
        return shape._replace(
            all_tokens_local=dispatches and self.all2all_backend == "deepep_high_throughput",
            batch_rows=self.max_num_batched_tokens * self.ranks if groups else 0,
        )


def read_deployment(path: Path, environ: Mapping[str, str]) -> Deployment:
    """A file's; environ may hold settings of this plugin. ValueError says what the file lacks."""
    options = _options(path)
    missing = {"model", "max-num-batched-tokens"} - set(options)
    if missing:
        raise ValueError(f"{path} does not say {' and '.join(sorted(missing))}: add it")
    redundant = 0
    if options.get("enable-eplb", False):
        redundant = _mapping(options, "eplb-config").get("num_redundant_experts", 0)

    def number(name: str) -> int:
        value = options.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} of {path} is {value!r}: write a whole number from 1 on")
        return value

    return Deployment(
        config=model_config(options["model"]),
        settings=read_settings(_mapping(options, "additional-config"), environ),
        max_num_batched_tokens=number("max-num-batched-tokens"),
        tensor_parallel=number("tensor-parallel-size"),
        data_parallel=number("data-parallel-size"),
        context_parallel=number("prefill-context-parallel-size"),
        pipeline_parallel=number("pipeline-parallel-size"),
        is_expert_parallel=options.get("enable-expert-parallel", False),
        redundant_experts=redundant,
        all2all_backend=options.get("all2all-backend", Deployment.all2all_backend),
        micro_batches=2 if options.get("enable-dbo", False) else options.get("ubatch-size") or 1,
        draft_method=DRAFTS.get(_mapping(options, "speculative-config").get("method")),
        gpu_memory_utilization=options.get("gpu-memory-utilization", 0.92),
    )


def _options(path: Path) -> dict[str, Any]:
    """By name, with dashes: vLLM takes underscores, too."""
    import yaml

    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options: write NAME: VALUE in each line")
    return {str(name).replace("_", "-"): value for name, value in options.items()}


def _mapping(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An option that is an object, written as one or as JSON."""
    value = options.get(name) or {}
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}, which is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}: it must be an object")
    return value


def format_of(quant: Mapping[str, Any]) -> str:
    """Of the model's experts, by config.json's quantization_config."""
    return "nvfp4" if (quant.get("moe_quant_algo") or "").upper() == "NVFP4" else "mxfp4"


def moe_sizes(config: Mapping[str, Any], prefix: str = "") -> tuple[int, int, int, int]:
    """SIZES of the model's layers; of its drafts with the prefix that V4.1 has for theirs."""
    text = text_config(config)
    sizes = [text.get(prefix + key) or text.get(key) for key in SIZES]
    missing = [key for key, size in zip(SIZES, sizes, strict=True) if not isinstance(size, int)]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}: it is not DeepSeek-V4's config")
    return tuple(sizes)  # type: ignore[return-value]


def rank_shape(
    sizes: tuple[int, int, int, int],
    arch: str,
    *,
    ep_size: int,
    tp_size: int,
    redundant_experts: int,
    max_num_tokens: int,
    settings: Settings,
    limit: float | None,
    weight_format: str,
) -> "MoeShape":
    """Of a rank; ValueError where the sizes do not divide or the settings cannot be followed.

    limit is config.json's swiglu_limit.
    """
    from dsv4_kernels.types import MoeShape, fp8_h_scale

    experts, top_k, hidden, intermediate = sizes
    experts += redundant_experts
    for name, size, parts in (
        ("experts", experts, ep_size),
        ("intermediate size", intermediate, tp_size),
        ("tokens", max_num_tokens, 1),
    ):
        if parts < 1 or size < 1 or size % parts:
            raise ValueError(f"{size} {name} cannot be divided among {parts} ranks evenly")
    mode = activations_on(BACKENDS[arch], settings.activations, weight_format)
    policy = settings.activation_scale
    scale_per_row = policy == "token" or (policy == "warmup" and limit is None)
    return MoeShape(
        num_experts=experts,
        num_local_experts=experts // ep_size,
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate // tp_size,
        max_num_tokens=max_num_tokens,
        quantize_activations=mode == "nvfp4",
        scale_per_row=fp8_h_scale(limit) is None if mode == "fp8" else scale_per_row,
        weight_format=weight_format,
        fp8=mode == "fp8",
    )
