"""vLLM's options beside this plugin: which work, and which are refused when a layer is built.

`OPTIONS` is the README's table; `unsupported_reason` is what refuses. An option that would change
what the plugin's layer is given or may assume, and that nothing here handles, must not be served
silently.
"""

from typing import NamedTuple

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEConfig

# Tokens arrive as rows of hidden states, each with its own global expert ids; those of DeepEP's low
# latency and nixl grouped by expert.
ALL2ALL_BACKENDS = (
    "allgather_reducescatter",
    "deepep_high_throughput",
    "deepep_low_latency",
    "flashinfer_nvlink_one_sided",
    "flashinfer_nvlink_two_sided",
    "nixl_ep",
)


class Option(NamedTuple):
    name: str
    verdict: str  # works on CPU or H200, read (by vLLM's source it works, not run), or refused
    why: str


OPTIONS = (
    Option(
        "`--data-parallel-size` with `--enable-expert-parallel`",
        "works on H200",
        "on two, in NVFP4 and MXFP4, both in W4A16: 0.021 and 0.028 nats from one GPU's "
        "log-probabilities",
    ),
    Option(
        "`--tensor-parallel-size`, also with `--enable-expert-parallel`",
        "works on CPU",
        "served with two ranks, each layer compared with one rank's",
    ),
    Option(
        "`--enable-eplb`, redundant experts, `--expert-placement-strategy`",
        "works on H200",
        "on two, rearranged six times while they served: 0.020 to 0.033 nats from one GPU's; its "
        "asynchronous mode and the placement on a CPU alone. An expert's scales move along",
    ),
    Option("`--pipeline-parallel-size`", "read", "hash layers are the first rank's"),
    Option("load balancing of data-parallel ranks", "read", "nothing of it reaches a layer"),
    Option(
        "`--all2all-backend allgather_reducescatter`",
        "works on H200",
        "the default, on two; 64 tokens and more that are quantised are so before they travel: in "
        "0.28 (W4A4) and 0.50 (W4A8) times the bytes of bf16",
    ),
    Option(
        "`--all2all-backend deepep_high_throughput`, `flashinfer_nvlink_*`",
        "read",
        "tokens arrive as rows with global expert ids; from DeepEP those alone that a local expert "
        "has, by which tiles are chosen. It cannot be installed where the tests run",
    ),
    Option(
        "`--all2all-backend deepep_low_latency`, `nixl_ep`",
        "works on CPU",
        "tokens arrive as rows grouped by expert, in the tests from vLLM's own dispatch of that "
        "format: neither can be installed there. Each expert has room for ranks x "
        "`--max-num-batched-tokens` rows: keep that small, and on `sm100` a multiple of 64. "
        "Activation scales are `warmup`'s or `token`'s",
    ),
    Option(
        "the other `--all2all-backend`s", "refused", "they sort or repeat tokens before the layer"
    ),
    Option(
        "`--enable-dbo`",
        "works on CPU",
        "with DeepEP or nixl, as vLLM wants it, in whose place the test has a stand-in; not of "
        "V4.1. Each micro-batch has its own arena, which doubles that memory",
    ),
    Option(
        "CUDA graphs and compilation as vLLM sets them, `--enforce-eager`",
        "works on H200",
        "the layer is inside vLLM's custom op; the `reference` backend wants `--enforce-eager`",
    ),
    Option(
        "multi-token prediction",
        "works on H200",
        "a draft's MXFP4 experts are taken where `formats` has `mxfp4`, and are vLLM's otherwise",
    ),
    Option("DSpark", "read", "as multi-token prediction; every layer of the draft"),
    Option(
        "chunked prefill, mixed batches",
        "works on CPU",
        "every hash layer sees every token's id once",
    ),
    Option(
        "KV cache types, offloading and transfer, prefix caching",
        "read",
        "nothing of it reaches a layer",
    ),
    Option("`--enable-prompt-embeds`", "refused", "hash layers route by token id"),
    Option("`--enable-sleep-mode`", "read", "level 1; level 2 drops what only loading makes"),
    Option(
        "`reload_weights`",
        "works on H200",
        "in place, all of them; the old `gate.bias` stays where files have none; refused when "
        "called with EPLB or sleep mode",
    ),
    Option(
        "`--cpu-offload-gb`, `--offload-group-size`",
        "refused",
        "where they move experts: name other parameters",
    ),
    Option("`--enable-lora`", "refused", "where experts are among its target modules"),
    Option("`--enable-elastic-ep`", "refused", "a layer's buffers are sized for the ranks at load"),
    Option("`VLLM_BATCH_INVARIANT`", "refused", "tiles are chosen by the number of tokens"),
    Option(
        "`--moe-backend` other than `auto`",
        "works on CPU",
        "the layer is left to vLLM's own experts",
    ),
)


def unsupported_reason(
    config: VllmConfig, moe_config: FusedMoEConfig, layer_name: str
) -> str | None:
    """Why this configuration cannot be served with this plugin's layer, or None."""
    parallel = moe_config.moe_parallel_config
    if config.parallel_config.enable_elastic_ep:
        return (
            "--enable-elastic-ep changes the number of ranks while serving, and this plugin's "
            "buffers are sized at load: serve without it, or choose vLLM's experts, such as "
            "--moe-backend marlin"
        )
    backend = parallel.all2all_backend
    if parallel.use_all2all_kernels and backend not in ALL2ALL_BACKENDS:
        return (
            f"--all2all-backend {backend} hands over tokens in an order of its own, and this "
            f"plugin's experts take them as they come: use {' or '.join(ALL2ALL_BACKENDS)}"
        )
    if envs.VLLM_BATCH_INVARIANT:
        return (
            "VLLM_BATCH_INVARIANT is set, and this plugin's kernels choose tiles by the number of "
            "tokens: unset it, or choose vLLM's experts with --moe-backend"
        )
    if config.model_config.enable_prompt_embeds:
        return (
            "--enable-prompt-embeds lets prompts come without token ids, and DeepSeek-V4's hash "
            "layers route by them: serve without it"
        )
    return _lora(config) or _offload(config, layer_name)


def _lora(config: VllmConfig) -> str | None:
    lora = config.lora_config
    if lora is None:
        return None
    targets = lora.target_modules
    if targets is not None and not any("expert" in target for target in targets):
        return None
    return (
        "--enable-lora would adapt these experts, which this plugin cannot: name what else is to "
        "be adapted with --lora-target-modules, or choose --moe-backend emulation"
    )


def _offload(config: VllmConfig, layer_name: str) -> str | None:
    offload = config.offload_config
    for active, segments, option in (
        (offload.uva.cpu_offload_gb > 0, offload.uva.cpu_offload_params, "--cpu-offload-params"),
        (
            offload.prefetch.offload_group_size > 0,
            offload.prefetch.offload_params,
            "--offload-params",
        ),
    ):
        if active and (not segments or any(_is_of_experts(s, layer_name) for s in segments)):
            return (
                "weights are to be offloaded to the CPU, and this plugin's kernels read experts "
                f"from GPU memory: name other parameters with {option}, such as attn"
            )
    return None


def _is_of_experts(segments: str, layer_name: str) -> bool:
    """Whether a parameter of this layer has these whole segments in its name, as vLLM offloads."""
    return any(
        f".{segments}." in f".{layer_name}.routed_experts.{weight}{scale}."
        for weight in ("w13_weight", "w2_weight")
        for scale in ("", "_scale", "_scale_2")
    )


def options_table() -> str:
    """The README's table, in markdown."""
    lines = ["| vLLM's option | | |", "|---|---|---|"]
    lines += [f"| {option.name} | {option.verdict} | {option.why} |" for option in OPTIONS]
    return "\n".join(lines) + "\n"
