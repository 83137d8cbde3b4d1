"""Values of config.json that decide whether a layer can be served, for loading and `inspect`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dsv4_kernels.types import MAX_EXPERTS, MAX_TOP_K

from vllm_dsv4_moe.checkpoint_layout import NVFP4_BLOCK

SCORING = "sqrtsoftplus"


class LayerConfig(NamedTuple):
    """The values under their names in config.json."""

    swiglu_limit: Any  # a number, or None for no limit
    scoring_func: str
    num_experts_per_tok: int
    n_routed_experts: int
    quantization_config: Mapping[str, Any]

    def problems(self) -> list[str]:
        """A sentence for each value that cannot be served; none where all can."""
        found = []
        limit = self.swiglu_limit
        if limit is not None and not (isinstance(limit, int | float) and limit >= 0):
            found.append(
                f"swiglu_limit is {limit!r}: it bounds gate and up and must be a number from 0 on, "
                "or null for no bound"
            )
        if self.scoring_func != SCORING:
            found.append(
                f"scoring_func is {self.scoring_func!r}, and this plugin's router scores by "
                f"{SCORING}: choose vLLM's own experts with --moe-backend"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(
                f"num_experts_per_tok is {self.num_experts_per_tok} and there are "
                f"{self.n_routed_experts} experts (n_routed_experts): a token's experts must differ"
            )
        for name, number, most in (
            ("num_experts_per_tok", self.num_experts_per_tok, MAX_TOP_K),
            ("n_routed_experts", self.n_routed_experts, MAX_EXPERTS),
        ):
            if number > most:
                found.append(
                    f"{name} is {number}, and this plugin's router takes at most {most}: choose "
                    "vLLM's own experts with --moe-backend"
                )
        for where, size in group_sizes(self.quantization_config):
            if size != NVFP4_BLOCK:
                found.append(
                    f"group_size of {where} is {size!r}, and NVFP4 has one scale for each "
                    f"{NVFP4_BLOCK} values: quantise the model again"
                )
                break
        return found


def group_sizes(quant: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(where, group_size) of the entries of ModelOpt's quantization_config that have one."""
    layers = quant.get("quantized_layers") or {}
    said = [("quantization_config", quant)]
    said += [(name, entry) for name, entry in layers.items() if entry.get("quant_algo") == "NVFP4"]
    return [(where, entry["group_size"]) for where, entry in said if "group_size" in entry]
