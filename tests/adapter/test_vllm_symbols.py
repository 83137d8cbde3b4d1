"""Every name of vLLM that the plugin uses, found in both supported versions' Python sources.

Nothing is imported: the files are parsed.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vllm_sources import ROOT, sources

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
ROUTED_EXPERTS = f"{FUSED_MOE}.routed_experts.RoutedExperts"
NAIVE = f"{FUSED_MOE}.prepare_finalize.naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular"
MOE_CONFIG = f"{FUSED_MOE}.config.FusedMoEConfig"

# What the plugin calls, and what it overrides and so is called with: the parameters it relies on,
# in vLLM's order. A version may have more than these where it calls, by keyword.
SIGNATURES = {
    f"{FUSED_MOE}.runner.moe_runner.MoERunner.__init__": (
        "self layer_name moe_config router routed_experts gate"
    ),
    f"{FUSED_MOE}.router.gate_linear.GateLinear.forward": "self x",
    f"{FUSED_MOE}.router.base_router.BaseRouter.__init__": (
        "self top_k global_num_experts eplb_state"
    ),
    f"{FUSED_MOE}.router.base_router.BaseRouter._compute_routing": (
        "self hidden_states router_logits indices_type input_ids"
    ),
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.__init__": "self moe",
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype"
    ),
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.apply": (
        "self layer x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.get_fused_moe_quant_config": (
        "self layer"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEKernel.__init__": "self prepare_finalize fused_experts",
    f"{FUSED_MOE}.modular_kernel.FusedMoEKernel.apply": (
        "self hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map"
        " apply_router_weight_on_input shared_experts shared_experts_input"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEExperts.__init__": (
        "self moe_config quant_config max_num_tokens num_dispatchers"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular.workspace_shapes": (
        "self M N K topk global_num_experts local_num_experts expert_tokens_meta activation"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular.apply": (
        "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts"
        " expert_map a1q_scale a2_scale workspace13 workspace2 expert_tokens_meta"
        " apply_router_weight_on_input"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular.finalize_weight_and_reduce_impl": "self",
    f"{FUSED_MOE}.all2all_utils.maybe_make_prepare_finalize": (
        "moe quant_config routing_tables allow_new_interface use_monolithic"
    ),
    f"{NAIVE}.__init__": "self is_sequence_parallel num_dispatchers",
    f"{NAIVE}.prepare": (
        "self a1 topk_weights topk_ids num_experts expert_map apply_router_weight_on_input"
        " quant_config defer_input_quant"
    ),
    f"{FUSED_MOE}.config.FusedMoEQuantConfig.make": "quant_dtype weight_dtype",
    f"{ROUTED_EXPERTS}.weight_loader": (
        "self param loaded_weight weight_name shard_id expert_id return_success"
    ),
    f"{ROUTED_EXPERTS}._expert_routing_tables": "self",
    "vllm.model_executor.custom_op.PluggableLayer.register_oot": "cls _decorated_layer_cls",
    "vllm.model_executor.layers.quantization.register_quantization_config": "quantization",
    "vllm.model_executor.layers.quantization.get_quantization_config": "quantization",
    "vllm.model_executor.layers.quantization.utils.quant_utils.is_layer_skipped": (
        "prefix ignored_layers fused_mapping"
    ),
    "vllm.models.deepseek_v4.quant_config.DeepseekV4FP8Config.get_quant_method": (
        "self layer prefix"
    ),
    "vllm.models.deepseek_v41.quant_config.DeepseekV4FP8Config._is_nvfp4_expert_layer": (
        "self prefix"
    ),
    "vllm.model_executor.models.utils.extract_layer_index": "layer_name",
    "vllm.v1.worker.workspace.WorkspaceManager.is_locked": "self",
}

# Attributes and properties that the plugin reads.
ATTRIBUTES = {
    ROUTED_EXPERTS: (
        "layer_name moe_config quant_method expert_map local_num_experts global_num_experts"
        " swiglu_limit scoring_func routed_scaling_factor activation apply_router_weight_on_input"
    ),
    MOE_CONFIG: (
        "num_experts num_local_experts num_logical_experts experts_per_token hidden_dim"
        " intermediate_size_per_partition max_num_tokens moe_parallel_config sp_size dp_size"
        " pcp_size is_sequence_parallel moe_backend swiglu_limit is_lora_enabled"
    ),
    f"{FUSED_MOE}.config.FusedMoEParallelConfig": (
        "tp_size ep_size all2all_backend use_all2all_kernels use_deepep_ht_kernels"
        " use_batched_activation_format enable_eplb"
    ),
    f"{FUSED_MOE}.router.gate_linear.GateLinear": (
        "bias is_unquantized out_dtype allow_ll_bf16_gemm"
    ),
    "vllm.config.parallel.ParallelConfig": "num_ubatches enable_elastic_ep",
    "vllm.config.offload.UVAOffloadConfig": "cpu_offload_gb cpu_offload_params",
    "vllm.config.offload.PrefetchOffloadConfig": "offload_group_size offload_params",
    "vllm.config.offload.OffloadConfig": "uva prefetch",
    "vllm.config.lora.LoRAConfig": "target_modules",
    f"{FUSED_MOE}.router.fused_topk_bias_router.FusedTopKBiasRouter": (
        "top_k global_num_experts eplb_state routing_method_type scoring_func renormalize"
        " routed_scaling_factor e_score_correction_bias _hash_indices_table bias_vl"
        " image_sentinel_lo num_fused_shared_experts"
    ),
    f"{FUSED_MOE}.router.cpu_router.CPURouter": (
        "top_k global_num_experts eplb_state routing_method_type scoring_func renormalize"
        " routed_scaling_factor e_score_correction_bias _hash_indices_table bias_vl"
        " image_sentinel_lo"
    ),
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase": (
        "moe_kernel moe_quant_config supports_eplb uses_weight_scale_2_pattern"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular": (
        "expects_unquantized_inputs activation_format _supports_current_device"
        " _supports_no_act_and_mul _supports_quant_scheme _supports_activation"
        " _supports_parallel_config"
    ),
    f"{FUSED_MOE}.modular_kernel.FusedMoEKernel": "fused_experts",
    f"{FUSED_MOE}.modular_kernel.FusedMoEActivationFormat": "Standard BatchedExperts",
    f"{FUSED_MOE}.modular_kernel.FusedMoEPrepareAndFinalizeModular": (
        "activation_format num_dispatchers"
    ),
    f"{FUSED_MOE}.modular_kernel.ExpertTokensMetadata": "expert_num_tokens",
    NAIVE: "is_sequence_parallel num_dispatchers",
    f"{FUSED_MOE}.activation.MoEActivation": "SILU",
    "vllm.models.deepseek_v4.quant_config.DeepseekV4FP8Config": (
        "expert_dtype moe_quant_algo ignored_layers packed_modules_mapping"
    ),
    "vllm.models.deepseek_v41.quant_config.DeepseekV4FP8Config": (
        "expert_dtype moe_quant_algo ignored_layers packed_modules_mapping"
    ),
    "vllm.envs": "VLLM_MOE_SKIP_PADDING VLLM_BATCH_INVARIANT",
    "vllm.forward_context.ForwardContext": "is_padding",
    "vllm.config.vllm.VllmConfig": "additional_config load_config model_config compilation_config"
    " parallel_config offload_config lora_config",
    "vllm.config.load.LoadConfig": "load_format",
    "vllm.config.model.ModelConfig": "enable_sleep_mode enforce_eager enable_prompt_embeds"
    " hf_text_config",
    "vllm.config.compilation.CompilationConfig": "cudagraph_mode",
    "vllm.config.compilation.CUDAGraphMode": "NONE",
    "vllm.platforms.interface.Platform": "is_cpu is_cuda get_device_capability",
}


@functools.cache
def parsed(root: Path, module: str) -> ast.Module | None:
    path = root.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those under `if` and `try` at the top level."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])


def find(root: Path, dotted: str) -> tuple[str, ast.stmt] | None:
    """The module and statement that define a dotted name, re-exports followed; None if gone."""
    module, _, name = dotted.rpartition(".")
    tree = parsed(root, module)
    if tree is None:
        found = find(root, module) if module else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        return member(root, found[0], found[1], name)
    for node in statements(tree.body):
        if isinstance(node, ast.ImportFrom) and any(
            (a.asname or a.name) == name for a in node.names
        ):
            (alias,) = (a for a in node.names if (a.asname or a.name) == name)
            return find(root, f"{absolute(root, module, node)}.{alias.name}")
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return module, node
    whole = parsed(root, dotted)
    return (dotted, whole.body[0]) if whole is not None and whole.body else None


def absolute(root: Path, module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = root.joinpath(*module.split("."), "__init__.py").is_file()
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def member(root: Path, module: str, cls: ast.ClassDef, name: str) -> tuple[str, ast.stmt] | None:
    """A class's method, field, or attribute that a method sets; its bases' otherwise."""
    overloads = []
    for node in statements(cls.body):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            overloads.append(node)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return module, node
    if overloads:
        return module, overloads[-1]
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if node.attr == name and isinstance(node.value, ast.Name) and node.value.id == "self":
                return module, cls
        registers = (
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer"
        )
        if registers and node.args and getattr(node.args[0], "value", None) == name:
            return module, cls
    for base in cls.bases:
        found = find(root, f"{module}.{ast.unparse(base)}")
        inherited = found and isinstance(found[1], ast.ClassDef) and member(root, *found, name)
        if inherited:
            return inherited
    return None


def imported_names() -> Iterator[str]:
    for path in sorted((ROOT / "vllm_dsv4_moe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (a.name for a in node.names if a.name.partition(".")[0] == "vllm")


def moved(root: Path, version: str) -> list[str]:
    """What the plugin uses and that version does not have, one sentence each."""
    complaints = []
    attributes = {f"{cls}.{name}" for cls, names in ATTRIBUTES.items() for name in names.split()}
    for dotted in sorted({*imported_names(), *attributes, *SIGNATURES}):
        found = find(root, dotted)
        if found is None:
            complaints.append(f"vLLM {version} has no {dotted}")
        elif dotted in SIGNATURES:
            assert isinstance(found[1], ast.FunctionDef), dotted
            arguments = found[1].args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            wanted = SIGNATURES[dotted].split()
            if not set(wanted) <= set(names):
                complaints.append(
                    f"vLLM {version}: {dotted} takes ({', '.join(names)}), without "
                    f"{', '.join(name for name in wanted if name not in names)}"
                )
    return complaints


@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_every_symbol_is_where_the_plugin_looks(version):
    assert moved(sources(version), version) == []


OVERRIDDEN = (
    f"{FUSED_MOE}.router.base_router.BaseRouter._compute_routing",
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.apply",
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase.create_weights",
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular.apply",
    f"{FUSED_MOE}.modular_kernel.FusedMoEExpertsModular.workspace_shapes",
    f"{NAIVE}.prepare",
)


@pytest.mark.parametrize("version", ["0.32", "0.33"])
@pytest.mark.parametrize("dotted", OVERRIDDEN, ids=lambda dotted: ".".join(dotted.split(".")[-2:]))
def test_what_the_plugin_overrides_is_called_with_what_it_takes(version, dotted):
    found = find(sources(version), dotted)
    assert found is not None and isinstance(found[1], ast.FunctionDef)
    arguments = found[1].args
    names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
    assert names == SIGNATURES[dotted].split()


@pytest.mark.parametrize("version", ["0.32", "0.33"])
@pytest.mark.parametrize("model", ["nvidia", "cpu"])
def test_the_model_gives_its_runner_the_gate_and_hidden_states_for_logits(version, model):
    """What a runner without a gate hands to its router, then: see gate.py."""
    module = parsed(sources(version), f"vllm.models.deepseek_v4.{model}.model")
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call)]
    given = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls]
    runners = [keywords for keywords in given if keywords.get("router_logits") == "hidden_states"]
    assert [keywords["hidden_states"] for keywords in runners] == ["hidden_states"]
    factories = [
        k
        for call, k in zip(calls, given, strict=True)
        if "FusedMoEFactory" in ast.unparse(call.func)
    ]
    assert [keywords["gate"] for keywords in factories] == ["self.gate"]


@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_micro_batches_compute_on_one_stream(version):
    """All sm90 layers of a GPU share one buffer of partial sums, so their kernels must not overlap.

    vLLM's micro-batches have a thread each: one runs at a time, all compute on one stream, and the
    all-to-all is back on it before the experts begin.
    """
    ubatching = "vllm.v1.worker.ubatching"

    def source(dotted: str) -> list[str]:
        found = find(sources(version), dotted)
        assert found is not None and isinstance(found[1], ast.FunctionDef), dotted
        return [ast.unparse(node) for node in found[1].body]

    make = find(sources(version), f"{ubatching}.make_ubatch_contexts")
    assert make is not None and isinstance(make[1], ast.FunctionDef)
    assert "compute_stream: torch.cuda.Stream" in ast.unparse(make[1].args)
    (context,) = (
        node
        for node in ast.walk(make[1])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "UBatchContext"
    )
    given = {k.arg: ast.unparse(k.value) for k in context.keywords}
    assert given["compute_stream"] == "compute_stream"
    entered = source(f"{ubatching}.UBatchContext.__enter__")
    assert "self.cpu_wait_event.wait()" in entered
    assert "self.update_stream(self.compute_stream)" in entered
    yielded = source(f"{ubatching}.UBatchContext._cpu_yield")
    assert yielded.index("self.cpu_signal_event.set()") < yielded.index(
        "self.cpu_wait_event.wait()"
    )
    dispatch = f"{FUSED_MOE}.prepare_finalize.deepep_ht.DeepEPHTPrepareAndFinalize._do_dispatch"
    assert source(dispatch)[-2] == "dbo_switch_to_compute_sync()"


def test_a_symbol_that_moved_is_named(tmp_path):
    package = tmp_path / "vllm/model_executor/layers/fused_moe/router"
    package.mkdir(parents=True)
    (package / "base_router.py").write_text(
        "class BaseRouter:\n    def _compute_routing(self, hidden_states, logits): ...\n"
    )
    complaints = moved(tmp_path, "9.9")
    name = f"{FUSED_MOE}.router.base_router.BaseRouter._compute_routing"
    taken = "(self, hidden_states, logits), without router_logits, indices_type, input_ids"
    assert f"vLLM 9.9: {name} takes {taken}" in complaints
    assert f"vLLM 9.9 has no {FUSED_MOE}.RoutedExperts" in complaints
