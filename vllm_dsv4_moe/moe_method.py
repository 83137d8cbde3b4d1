"""The quantisation methods of expert layers: create weights, and make a layer of them."""

from collections.abc import Callable

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels.backends import AUTO, choose_backend
from dsv4_kernels.compile_processes import num_processes
from dsv4_kernels.compiled import arch_of
from dsv4_kernels.moe import prepare_layer
from dsv4_kernels.types import ActivationScales, MoeLayer, MoeShape, fp8_h_scale
from torch.nn import Parameter
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from vllm_dsv4_moe.batched_experts import Dsv4BatchedExperts
from vllm_dsv4_moe.expert_params import (
    INPUT_SCALES,
    ExpertSizes,
    add_global_scales,
    check_block_scales,
    check_global_scales,
    checkpoint_prefix,
    create_expert_params,
    expert_weights,
    fill_dummy_scales,
    gate_and_up_differ,
    take_weights,
)
from vllm_dsv4_moe.experts import Dsv4Experts
from vllm_dsv4_moe.kernel_cache import COMPILATION, num_local_ranks
from vllm_dsv4_moe.packed_dispatch import PackedDispatch, packed_where_gathered
from vllm_dsv4_moe.router import Dsv4Router
from vllm_dsv4_moe.saturation import SATURATION
from vllm_dsv4_moe.scale_policy import activation_scales
from vllm_dsv4_moe.settings import Settings, activations_on
from vllm_dsv4_moe.warm_up import WARM_UP

logger = init_logger("vllm.dsv4_moe")


class Dsv4Method(FusedMoEMethodBase):
    """One layer's experts, in the format that a subclass names."""

    weight_format: str

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        settings: Settings,
        announce: Callable[[str, str, str], None] = lambda *_: None,
    ) -> None:
        super().__init__(moe_config)
        self.settings = settings
        # Called with format, backend and numerics before a layer is made.
        self.announce = announce
        batched = moe_config.moe_parallel_config.use_batched_activation_format
        self.experts_cls = Dsv4BatchedExperts if batched else Dsv4Experts
        self.router: Dsv4Router | None = None
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        self.reload_unsupported_reason = reload_unsupported_reason(config, moe_config)
        capability = current_platform.get_device_capability()
        self.capability = None if capability is None else tuple(capability)
        self.shape = moe_shape(moe_config, settings, self.capability, self.weight_format)
        self.backend = choose_backend(settings.backend, self.shape, self.capability)
        check_device(self.backend.name, self.capability, config.model_config.enforce_eager)
        if self.capability is not None:
            processes = num_processes(num_local_ranks(config.parallel_config))
            COMPILATION.begin(self.backend, self.shape, arch_of(self.capability), processes)
        self.num_model_layers = config.model_config.hf_text_config.num_hidden_layers

    @property
    def supports_eplb(self) -> bool:
        return True

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra,
    ) -> None:
        if params_dtype != torch.bfloat16:
            raise ValueError(
                f"{layer.layer_name}: activations are {params_dtype}, and "
                f"{self.weight_format.upper()} experts take bfloat16: serve with --dtype bfloat16"
            )
        if hidden_size != self.shape.hidden:
            raise ValueError(
                f"{layer.layer_name}: this all-to-all backend pads the hidden size from "
                f"{self.shape.hidden} to {hidden_size}: choose another --all2all-backend"
            )
        tp_size = self.moe.moe_parallel_config.tp_size
        sizes = ExpertSizes(
            num_experts, self.moe.num_experts, hidden_size, intermediate_size_per_partition, tp_size
        )
        layer.num_model_layers = self.num_model_layers
        loader = extra["weight_loader"]
        self.record = create_expert_params(layer, sizes, loader, self.weight_format)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.moe_kernel is not None and self.reload_unsupported_reason is not None:
            raise ValueError(
                f"{layer.layer_name}: weights are loaded a second time, which cannot be with "
                f"{self.reload_unsupported_reason}: start the server again with the new weights"
            )
        mode = "nvfp4" if self.shape.quantize_activations else "fp8" if self.shape.fp8 else "bf16"
        self.announce(self.weight_format, self.backend.name, NUMERICS[mode])
        # vLLM calls this with the model's dtype as the default; the scales' arithmetic is fp32.
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            moe_layer = self._made_of(layer)
            if self.moe_kernel is None:
                self._build_kernel(layer, moe_layer)
            else:
                self._take_over(moe_layer)
        finally:
            torch.set_default_dtype(default)
        self.is_dummy = False  # what is loaded again is not

    def _made_of(self, layer: RoutedExperts) -> MoeLayer:
        """Check what was loaded, and make of it a layer that runs."""
        if self.is_dummy:
            fill_dummy_scales(layer)
        else:
            self.record.check_complete()
            if self.router is not None:
                gate = checkpoint_prefix(layer).removesuffix("experts") + "gate"
                self.router.check_loaded(gate)
        check_block_scales(layer)
        scales = self._take_scales(layer)
        limit = layer.swiglu_limit
        moe_layer = prepare_layer(
            self.backend, self.shape, expert_weights(layer), limit=limit, activation_scales=scales
        )
        take_weights(layer, moe_layer.weights)
        return moe_layer

    def _take_scales(self, layer: RoutedExperts) -> ActivationScales | None:
        """Check the scales that only this format has, keep the weights' global scales as parameters
        of the layer, and return the activations' scales, which only W4A4 has."""
        raise NotImplementedError

    def _take_over(self, reloaded: MoeLayer) -> None:
        """Copy FC1's activation scale to the running layer's. vLLM itself copies parameters, which
        this scale is not, to those that the layer and its graphs read."""
        scales = self.moe_kernel.fused_experts.layer.activation_scales
        new = reloaded.activation_scales
        if scales is not None and new is not None and scales.fc1 is not None:
            scales.fc1.copy_(new.fc1)

    def _build_kernel(self, layer: RoutedExperts, moe_layer: MoeLayer) -> None:
        if self.shape.quantize_activations:
            interval = self.settings.saturation_log_interval
            SATURATION.add(layer.layer_name, moe_layer.saturated, interval)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        layout = prepare_finalize.activation_format
        assert layout == self.experts_cls.activation_format(), prepare_finalize
        prepare_finalize = packed_where_gathered(prepare_finalize, moe_layer)
        packs = isinstance(prepare_finalize, PackedDispatch)
        arguments = (self.moe, self.moe_quant_config, moe_layer)
        if self.experts_cls is Dsv4BatchedExperts:
            experts = Dsv4BatchedExperts(*arguments, prepare_finalize.num_dispatchers())
        else:
            experts = Dsv4Experts(*arguments)
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, experts)
        ids_dtype = self.topk_indices_dtype or torch.int32
        WARM_UP(moe_layer, self.router, layer.expert_map, ids_dtype, packs)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Has vLLM quantise no activations."""
        return FusedMoEQuantConfig.make(None, weight_dtype=self.weight_format)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.moe_kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )

    def router_op(self):
        """The op that routes: the oracle's with the `reference` backend, the kernel otherwise."""
        if self.backend.name == "reference":
            from dsv4_kernels.reference import router_topk
        else:
            from dsv4_kernels.route.router_topk import router_topk
        return router_topk

    def gate_op(self) -> Callable | None:
        """The op that gates and routes small batches; None where vLLM's gate serves them all."""
        if self.backend.name == "reference" or self.settings.gate == "vllm":
            return None
        from dsv4_kernels.route.gate_route import gate_route

        return gate_route


class ModelOptNvFp4Dsv4Method(Dsv4Method):
    """For NVFP4 experts. vLLM's weight loader looks for "ModelOpt" in the class's name."""

    weight_format = "nvfp4"
    # vLLM's weight loader then also loads the input scales of experts on other ranks.
    use_global_sf = True

    def uses_weight_scale_2_pattern(self) -> bool:
        return True

    def create_weights(self, layer: RoutedExperts, *args, **kwargs) -> None:
        super().create_weights(layer, *args, **kwargs)
        if current_platform.is_cpu():
            # vLLM's CPU model looks for input scales under this name: the same storage again.
            for name in INPUT_SCALES:
                alias = Parameter(getattr(layer, name).data, requires_grad=False)
                alias.weight_loader = self.record.loader(name)
                layer.register_parameter(f"{name}_2", alias)

    def _take_scales(self, layer: RoutedExperts) -> ActivationScales | None:
        check_global_scales(layer)
        if gate_and_up_differ(layer):
            logger.info_once("dsv4-moe: w1 and w3 differ in weight_scale_2: each keeps its own")
        scales = None
        if self.shape.quantize_activations:
            scales = activation_scales(layer, self.settings)
        for name in INPUT_SCALES:
            delattr(layer, name)
            layer._parameters.pop(f"{name}_2", None)
        return scales


class Mxfp4Dsv4Method(Dsv4Method):
    """For MXFP4 experts: those of DeepSeek's own checkpoints, and the drafts of NVFP4 ones. The
    class's name must not have "ModelOpt" in it."""

    weight_format = "mxfp4"

    def _take_scales(self, layer: RoutedExperts) -> ActivationScales | None:
        add_global_scales(layer)
        return None

    # The largest that was logged: 43 layers on each of eight ranks would be as many lines.
    logged_rounding = 0.0

    def _made_of(self, layer: RoutedExperts) -> MoeLayer:
        moe_layer = super()._made_of(layer)
        rounding = float(moe_layer.rounding)
        if rounding > Mxfp4Dsv4Method.logged_rounding:
            Mxfp4Dsv4Method.logged_rounding = rounding
            held, remedy = 31, ""
            if self.shape.fp8:
                held, remedy = 15, "; set activations to bf16, which holds 31, to have less of it"
            logger.info(
                "dsv4-moe: %s: block scales under the %d powers of two that %s holds of an expert "
                "are rounded into them, with an error of at most %.2g of the expert's largest "
                "scale%s (other layers are named where theirs is larger)",
                layer.layer_name, held, self.backend.name, rounding, remedy,
            )  # fmt: skip
        return moe_layer


# By what activations are multiplied in.
NUMERICS = {
    "nvfp4": "W4A4",
    "fp8": "W4A8, fp8 activations",
    "bf16": "W4A16, bf16 activations",
}
METHODS = {method.weight_format: method for method in (ModelOptNvFp4Dsv4Method, Mxfp4Dsv4Method)}


def reload_unsupported_reason(config: VllmConfig, moe_config: FusedMoEConfig) -> str | None:
    """What keeps weights from being loaded while serving; None where they can be."""
    if config.model_config.enable_sleep_mode:
        return "--enable-sleep-mode, whose level 2 drops what only loading makes"
    if moe_config.moe_parallel_config.enable_eplb:
        return "--enable-eplb, which has moved experts since the first time"
    return None


def check_device(backend: str, capability: tuple[int, int] | None, is_eager: bool) -> None:
    """ValueError for a backend that this machine could load and not run."""
    if capability is None and backend != "reference":
        raise ValueError(
            f"the {backend} backend runs on NVIDIA GPUs, and vLLM sees none: set backend to auto"
        )
    if capability is not None and backend == "reference" and not is_eager:
        raise ValueError(
            "the reference backend waits for the GPU in every layer, which no CUDA graph can "
            "hold: add --enforce-eager, or choose another backend"
        )


def moe_shape(
    config: FusedMoEConfig,
    settings: Settings,
    capability: tuple[int, int] | None,
    weight_format: str = "nvfp4",
) -> MoeShape:
    """The sizes and modes of a layer, by which kernels are chosen and the arena is sized."""
    mode = activation_mode(settings, capability, weight_format)
    no_limit = config.swiglu_limit is None
    policy = settings.activation_scale
    scale_per_row = policy == "token" or (policy == "warmup" and no_limit)
    return MoeShape(
        num_experts=config.num_experts,
        num_local_experts=config.num_local_experts,
        top_k=config.experts_per_token,
        hidden=config.hidden_dim,
        intermediate=config.intermediate_size_per_partition,
        max_num_tokens=max_num_tokens(config),
        quantize_activations=mode == "nvfp4",
        scale_per_row=fp8_h_scale(config.swiglu_limit) is None if mode == "fp8" else scale_per_row,
        weight_format=weight_format,
        all_tokens_local=config.moe_parallel_config.use_deepep_ht_kernels,
        fp8=mode == "fp8",
        batch_rows=batch_rows(config),
    )


def batch_rows(config: FusedMoEConfig) -> int:
    """Rows of each expert that a dispatch which groups them by expert has room for: as many as all
    ranks together may send. 0 for other dispatches."""
    parallel = config.moe_parallel_config
    return config.max_num_tokens * parallel.ep_size * parallel.use_batched_activation_format


def max_num_tokens(config: FusedMoEConfig) -> int:
    """The most tokens in one call: every data-parallel rank may send all that it batches.

    Sequence parallelism rounds each rank's batch up to a whole number of shards.
    """
    shards = config.sp_size if config.is_sequence_parallel else 1
    per_rank = -(-config.max_num_tokens // shards) * shards
    return per_rank * config.dp_size * config.pcp_size


def backend_name(settings: Settings, capability: tuple[int, int] | None) -> str:
    """The backend that is set, or what `auto` means on this GPU; `reference` where there is no GPU,
    or no backend for it."""
    if settings.backend != "auto":
        return settings.backend
    return "reference" if capability is None else AUTO.get(capability[0], "reference")


def has_backend(settings: Settings, capability: tuple[int, int] | None) -> bool:
    """False where `auto` finds no backend for the GPU, whose experts vLLM then keeps."""
    return settings.backend != "auto" or capability is None or capability[0] in AUTO


def activation_mode(
    settings: Settings, capability: tuple[int, int] | None, weight_format: str = "nvfp4"
) -> str:
    """A key of NUMERICS: what a layer's activations are multiplied in. ValueError where the backend
    lacks the one that is set."""
    return activations_on(backend_name(settings, capability), settings.activations, weight_format)
