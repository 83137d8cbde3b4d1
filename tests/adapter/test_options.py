"""vLLM's options that the plugin's layer cannot serve are refused at load, in one sentence."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import loading
from tests.support.routed_experts import random_tokens
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0.ffn.experts"
CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=64, intermediate=32, experts=12, heads=4)


def changed(**changes):
    """The configuration with values put in where vLLM's own classes have them."""
    from vllm.config.lora import LoRAConfig
    from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig

    uva = UVAOffloadConfig(**changes.get("uva", {}))
    prefetch = PrefetchOffloadConfig(**changes.get("prefetch", {}))
    lora = changes.get("lora")
    return SimpleNamespace(
        parallel_config=SimpleNamespace(enable_elastic_ep=changes.get("elastic", False)),
        model_config=SimpleNamespace(enable_prompt_embeds=changes.get("embeds", False)),
        offload_config=OffloadConfig(uva=uva, prefetch=prefetch),
        lora_config=None if lora is None else LoRAConfig(**lora),
    )


def moe_config(all2all="allgather_reducescatter", ranks=2):
    """Of a layer on several data- and expert-parallel ranks."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    parallel = FusedMoEParallelConfig(
        *(1, 1, ranks, ranks), *(0, 0, 0, 0), sp_size=1, use_ep=ranks > 1,
        all2all_backend=all2all, enable_eplb=False,
    )  # fmt: skip
    return SimpleNamespace(moe_parallel_config=parallel)


REFUSED = {
    "elastic EP": ({"elastic": True}, "--enable-elastic-ep changes the number of ranks"),
    "prompts of embeddings": ({"embeds": True}, "--enable-prompt-embeds lets prompts come"),
    "LoRA": ({"lora": {}}, "--enable-lora would adapt these experts"),
    "LoRA of experts": ({"lora": {"target_modules": ["wq_a", "experts"]}}, "--lora-target-modules"),
    "UVA": ({"uva": {"cpu_offload_gb": 4}}, "with --cpu-offload-params, such as attn"),
    "UVA of experts": (
        {"uva": {"cpu_offload_gb": 4, "cpu_offload_params": {"routed_experts.w2_weight"}}},
        "read experts from GPU memory",
    ),
    "prefetch": (
        {"prefetch": {"offload_group_size": 8, "offload_params": {"experts"}}},
        "with --offload-params",
    ),
}


@pytest.mark.parametrize("changes, says", REFUSED.values(), ids=REFUSED)
def test_refused(changes, says):
    from vllm_dsv4_moe.options import unsupported_reason

    assert says in unsupported_reason(changed(**changes), moe_config(), LAYER)


TAKEN = {
    "nothing": {},
    "LoRA of attention": {"lora": {"target_modules": ["wq_a"]}},
    "offloaded attention": {"uva": {"cpu_offload_gb": 4, "cpu_offload_params": {"attn"}}},
    "a part of a name": {"uva": {"cpu_offload_gb": 4, "cpu_offload_params": {"expert", "w2"}}},
}


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_taken(changes):
    from vllm_dsv4_moe.options import unsupported_reason

    assert unsupported_reason(changed(**changes), moe_config(), LAYER) is None


def all2all_backends() -> tuple[str, ...]:
    from typing import get_args

    from vllm.config.parallel import All2AllBackend

    return get_args(All2AllBackend)


# vLLM turns these into others when it reads its options.
REPLACED = {"naive", "pplx", "flashinfer_all2allv"}


# Those that sort or repeat tokens, or do not say what they hand over.
SORTING = {"deepep_v2", "mori_high_throughput", "mori_low_latency", "moonep", "passthrough"}


@pytest.mark.parametrize("name", sorted(set(all2all_backends()) - REPLACED))
def test_an_all2all_backend_is_taken_by_name_or_refused(name):
    from vllm_dsv4_moe.options import unsupported_reason

    says = unsupported_reason(changed(), moe_config(name), LAYER)
    assert (says is None) == (name not in SORTING)
    assert says is None or f"--all2all-backend {name} hands over tokens" in says
    assert unsupported_reason(changed(), moe_config(name, ranks=1), LAYER) is None, (
        "not used by one rank"
    )


def test_batch_invariance_is_refused(monkeypatch):
    from vllm_dsv4_moe.options import unsupported_reason

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "unset it" in unsupported_reason(changed(), moe_config(), LAYER)


# How the name of an option that works begins, and the test that shows it.
SHOWN_BY = {
    "`--tensor-parallel-size`": (
        "serving/test_serve.py::test_two_expert_parallel_processes_give_the_single_process_output"
    ),
    "`--data-parallel-size`": "gpu/test_two_gpus.py::test_two_gpus_say_what_one_says",
    "`--enable-eplb`": "gpu/test_two_gpus.py::test_two_gpus_say_what_one_says",
    "`--all2all-backend allgather_reducescatter`": (
        "gpu/test_two_gpus.py::test_two_gpus_say_what_one_says"
    ),
    "`--all2all-backend deepep_low_latency`": (
        "adapter/test_batched_experts.py::test_ranks_add_up_to_plain_torch"
    ),
    "`--enable-dbo`": (
        "adapter/test_micro_batches.py::test_two_micro_batches_give_what_each_gives_alone"
    ),
    "multi-token prediction": (
        "gpu/test_serve_gpu.py::test_mxfp4_drafts_beside_nvfp4_experts_are_ours_too"
    ),
    "CUDA graphs": "gpu/test_serve_gpu.py::test_agrees_with_the_reference_backend",
    "chunked prefill": (
        "serving/test_serve.py"
        "::test_hash_layers_see_every_token_id_once_in_chunks_and_mixed_batches"
    ),
    "`reload_weights`": (
        "gpu/test_reload_gpu.py::test_reloaded_weights_are_what_captured_graphs_run"
    ),
    "`--moe-backend` other": (
        "adapter/test_plugin.py::test_layers_that_are_not_ours_get_vllms_own_method"
    ),
}


def passed_on_h200() -> set[str]:
    """file.py::test of what passed, by the kept results."""
    passed = set()
    for path in (ROOT / "kernels/bench/results").glob("test-gpu*.json"):
        kept = json.loads(path.read_text())
        if kept["gpu"] == "NVIDIA H200":
            names = (n for n, test in kept["tests"].items() if test["outcome"] == "passed")
            passed |= {re.split(r"[\[@]", name)[0].rpartition("/")[2] for name in names}
    return passed


@pytest.mark.parametrize("begin", SHOWN_BY)
def test_an_option_works_where_its_test_ran(begin):
    from vllm_dsv4_moe.options import OPTIONS

    (verdict,) = (option.verdict for option in OPTIONS if option.name.startswith(begin))
    file, _, function = SHOWN_BY[begin].partition("::")
    source = (ROOT / "tests" / file).read_text()
    assert f"def {function}(" in source
    if file.startswith("gpu/"):
        assert verdict == "works on H200"
        assert SHOWN_BY[begin].removeprefix("gpu/") in passed_on_h200()
    else:
        assert verdict == "works on CPU"


def test_every_option_that_works_has_its_test():
    from vllm_dsv4_moe.options import OPTIONS

    others = [o for o in OPTIONS if not o.name.startswith(tuple(SHOWN_BY))]
    assert {option.verdict for option in others} == {"read", "refused"}


def test_the_readmes_table_is_the_codes():
    from vllm_dsv4_moe.options import options_table

    readme = (ROOT / "README.md").read_text()
    written = readme.split("<!-- options: begin -->\n")[1].split("<!-- options: end -->")[0]
    assert written == options_table()


def test_a_refusal_names_the_layer(vllm_config):
    with mock.patch("vllm_dsv4_moe.options.unsupported_reason", return_value="--this cannot be"):
        with pytest.raises(ValueError, match=rf"^{LAYER}: --this cannot be$"):
            loading.load_model(vllm_config)


def experts_output(model, layer: int) -> torch.Tensor:
    experts = model.model.layers[layer].ffn.experts.routed_experts
    return experts.forward_modular(*random_tokens(9, CONFIG))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_are_loaded_again_replace_the_first_in_place(
    checkpoint, tmp_path, load_format
):
    other = dataclasses.replace(CONFIG, seed=7)
    other_path = write_tiny_checkpoint(tmp_path / "other", other)
    fresh = loading.load_model(loading.engine_config(other_path))
    config = loading.engine_config(checkpoint, load_format=load_format)
    model = loading.load_model(config)
    experts = model.model.layers[1].ffn.experts.routed_experts
    before = {name: param.data_ptr() for name, param in experts.named_parameters()}
    assert not torch.equal(experts_output(model, 1), experts_output(fresh, 1))
    # What was random at first is loaded as checkpoints are.
    config.load_config.load_format = "auto"
    loading.reload_weights(config, model, other_path)
    assert {name: param.data_ptr() for name, param in experts.named_parameters()} == before
    for layer in range(CONFIG.layers):
        ours, wanted = experts_output(model, layer), experts_output(fresh, layer)
        assert torch.equal(ours, wanted) and wanted.float().norm() > 0


def test_weights_that_are_loaded_again_must_all_come(checkpoint, tmp_path):
    config = loading.engine_config(checkpoint)
    model = loading.load_model(config)
    half = write_tiny_checkpoint(tmp_path / "half", CONFIG)
    for file in half.glob("*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if "layers.1.ffn.experts.3.w2" not in n}
        save_file(kept, file)
    with pytest.raises(ValueError, match=r"layers.1.ffn.experts.3.w2.weight is missing"):
        loading.reload_weights(config, model, half)


NOT_AGAIN = {
    "sleep mode": (True, False, "--enable-sleep-mode, whose level 2"),
    "EPLB": (False, True, "--enable-eplb, which has moved experts"),
    "neither": (False, False, None),
}


@pytest.mark.parametrize("sleeps, moves, says", NOT_AGAIN.values(), ids=NOT_AGAIN)
def test_weights_cannot_be_loaded_again_with(sleeps, moves, says):
    from vllm_dsv4_moe.moe_method import reload_unsupported_reason

    config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=sleeps))
    parallel = SimpleNamespace(enable_eplb=moves)
    reason = reload_unsupported_reason(config, SimpleNamespace(moe_parallel_config=parallel))
    assert reason is None if says is None else says in reason


def test_a_second_time_that_cannot_be_is_refused(checkpoint):
    config = loading.engine_config(checkpoint)
    with mock.patch("vllm_dsv4_moe.moe_method.reload_unsupported_reason", return_value="--that"):
        model = loading.load_model(config)
    with pytest.raises(ValueError, match="loaded a second time, which cannot be with --that"):
        loading.reload_weights(config, model)
