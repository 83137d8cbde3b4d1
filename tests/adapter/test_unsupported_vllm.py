"""A vLLM that the plugin was not written for, or a patched one: vLLM keeps every layer."""

import logging
import os
import pickle
import sys
from importlib.metadata import requires
from unittest import mock

import pytest
import torch

import vllm_dsv4_moe
from tests.support import loading
from tests.support.vllm_sources import installed_under_another_version
from vllm_dsv4_moe.commands.serving import serve
from vllm_dsv4_moe.commands.tiny import TinyConfig, _write_tokenizer

MOE = "vllm.model_executor.layers.fused_moe"
OURS = ("quant_config", "runner", "unsupported_vllm")


@pytest.fixture
def fresh(monkeypatch):
    """vLLM's registries, and this package, as they are in a process that has not registered it."""
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers import quantization
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # so that what is put back after is what other tests find
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"vllm_dsv4_moe.{name}", raising=False)
        monkeypatch.delattr(vllm_dsv4_moe, name, raising=False)
    customized = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    with (
        mock.patch.dict(custom_op.op_registry_oot, clear=True),
        mock.patch.dict(customized, clear=True),
        mock.patch.dict(os.environ, {vllm_dsv4_moe.WARNED: ""}),
    ):
        yield customized, custom_op.op_registry_oot
    for name in OURS:
        sys.modules.pop(f"vllm_dsv4_moe.{name}", None)
        vars(vllm_dsv4_moe).pop(name, None)


@pytest.fixture
def warnings():
    """The sentences that the plugin logs as warnings."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.dsv4_moe")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


PATCHED = {
    "0.31": (mock.patch("vllm.__version__", "0.31.2"), "this is vLLM 0.31.2"),
    "0.34": (mock.patch("vllm.__version__", "0.34.0"), "this is vLLM 0.34.0"),
    "1.0": (mock.patch("vllm.__version__", "1.0"), "this is vLLM 1.0"),
    "a checkout": (mock.patch("vllm.__version__", "dev"), "this is vLLM dev"),
    "no version": (mock.patch("vllm.__version__", None), "AttributeError: 'NoneType'"),
    "a module that is gone": (
        mock.patch.dict(sys.modules, {f"{MOE}.runner.moe_runner": None}),
        f"ModuleNotFoundError: import of {MOE}.runner.moe_runner halted",
    ),
    "a name that is gone": (
        mock.patch.dict(sys.modules, {f"{MOE}.runner.moe_runner": mock.Mock(spec=["other"])}),
        "ImportError: cannot import name 'MoERunner'",
    ),
    "an import that fails": (
        mock.patch.dict(sys.modules, {"vllm_dsv4_moe.quant_config": None}),
        "import of vllm_dsv4_moe.quant_config halted",
    ),
    "a runner built in another way": (
        mock.patch(f"{MOE}.runner.moe_runner.MoERunner.__init__", lambda self, name, gate: None),
        "RuntimeError: vLLM's MoERunner takes self, name, gate, not all of",
    ),
    "a runner that cannot be replaced": (
        mock.patch(
            f"{MOE}.runner.moe_runner.MoERunner.register_oot", side_effect=AttributeError("gone")
        ),
        "AttributeError: gone",
    ),
}


@pytest.mark.parametrize("patch, says", PATCHED.values(), ids=PATCHED)
def test_one_warning_and_no_layer_of_ours(fresh, warnings, patch, says):
    customized, replaced = fresh
    with patch:
        vllm_dsv4_moe.register()
        vllm_dsv4_moe.register()
    (warning,) = warnings
    assert says in warning and "supports vLLM 0.32 and 0.33" in warning
    assert not replaced
    assert [config.__name__ for config in customized.values()] == ["VllmsOwnConfig"]


NO_CONFIG = {
    "no such method": (
        "vllm.model_executor.layers.quantization.get_quantization_config",
        mock.Mock(side_effect=ValueError("Invalid quantization method")),
        "ValueError: Invalid quantization method",
    ),
    "a config of another kind": (
        "vllm.models.deepseek_v4.DeepseekV4FP8Config",
        type("Theirs", (), {"expert_dtype": "fp4"}),
        "ImportError: vLLM's Theirs has no moe_quant_algo",
    ),
}


@pytest.mark.parametrize("name, other, says", NO_CONFIG.values(), ids=NO_CONFIG)
def test_where_no_config_can_be_replaced_the_warning_is_all(fresh, warnings, name, other, says):
    with mock.patch(name, other):
        vllm_dsv4_moe.register()
    (warning,) = warnings
    assert says in warning
    assert fresh == ({}, {})


def test_a_process_that_this_one_starts_does_not_repeat_the_warning(fresh, warnings):
    with mock.patch("vllm.__version__", "0.34.0"):
        vllm_dsv4_moe.register()
        child = dict(os.environ)
        del os.environ[vllm_dsv4_moe.WARNED]
        vllm_dsv4_moe.register()
        os.environ.update(child)
        vllm_dsv4_moe.register()
    assert len(warnings) == 2


def test_the_package_asks_for_no_vllm_of_its_own():
    """pip would put an older one in the place of the user's."""
    wanted = requires("vllm-dsv4-moe") or []
    assert wanted and not [name for name in wanted if name.startswith("vllm")]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A small checkpoint of a model with experts that is not DeepSeek-V4."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixtral") / "tiny"
    config = MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, torch_dtype=torch.bfloat16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder, TinyConfig())
    return folder


def test_the_config_gives_every_layer_to_vllm(fresh, other_model):
    from vllm.model_executor.layers.quantization import get_quantization_config

    theirs = get_quantization_config(vllm_dsv4_moe.METHOD_NAME)
    with mock.patch("vllm.__version__", "0.34.0"):
        vllm_dsv4_moe.register()
    ours = get_quantization_config(vllm_dsv4_moe.METHOD_NAME)
    assert ours is not theirs and issubclass(ours, theirs)
    config = ours.from_config({"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert type(pickle.loads(pickle.dumps(config))) is ours
    with mock.patch.object(theirs, "get_quant_method", return_value="vLLM's own") as asked:
        for prefix in ("layers.0.ffn.experts", "layers.0.attn.wq_a"):
            assert config.get_quant_method("layer", prefix) == "vLLM's own"
    assert asked.call_count == 2


OPTIONS = {
    "environment": ({}, {"VLLM_DSV4_MOE_BACKEND": "sm90"}, "VLLM_DSV4_MOE_BACKEND cannot"),
    "additional config": ({"dsv4_moe": {}}, {}, "dsv4_moe of additional_config cannot"),
}


@pytest.mark.parametrize("additional, environment, says", OPTIONS.values(), ids=OPTIONS)
def test_an_option_of_ours_is_refused_at_the_experts(
    fresh, other_model, additional, environment, says
):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization import get_quantization_config

    with mock.patch("vllm.__version__", "0.34.0"):
        vllm_dsv4_moe.register()
    config_class = get_quantization_config(vllm_dsv4_moe.METHOD_NAME)
    config = config_class.from_config({"quant_method": "fp8", "activation_scheme": "dynamic"})
    vllm_config = loading.engine_config(other_model)
    vllm_config.additional_config = additional
    with (
        mock.patch.object(config_class.__mro__[1], "get_quant_method", return_value="vLLM's own"),
        mock.patch.dict(os.environ, environment),
        set_current_vllm_config(vllm_config),
    ):
        with pytest.raises(ValueError, match=rf"^layers.0.ffn.experts: {says} be followed"):
            config.get_quant_method("layer", "layers.0.ffn.experts")
        assert config.get_quant_method("layer", "layers.0.attn.wq_a") == "vLLM's own"


def test_a_model_that_is_not_v4_loads_with_the_plugin(other_model, warnings):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    vllm_dsv4_moe.register()
    model = loading.load_model(loading.engine_config(other_model))
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    assert len(runners) == 2
    assert [type(runner).__name__ for runner in runners] == ["Dsv4MoERunner"] * 2
    assert warnings == []


def test_a_runner_that_takes_other_arguments_is_built_as_vllm_builds_it(monkeypatch):
    from vllm_dsv4_moe import runner

    given = []
    monkeypatch.setattr(runner.MoERunner, "__init__", lambda self, *a, **k: given.append((a, k)))
    experts = object()  # without even a quant_method
    runner.Dsv4MoERunner("name", experts, "gate", "and more", other=1)
    assert given == [(("name", experts, "gate", "and more"), {"other": 1})]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_vllm_that_calls_itself_0_34_serves_another_model(other_model, tmp_path):
    (tmp_path / "next").mkdir()
    paths = [str(installed_under_another_version(tmp_path / "next", "0.34.0"))]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    arguments = ("--enforce-eager", "--max-model-len=128", "--max-num-seqs=4")
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    with serve(other_model, tmp_path / "log", arguments, environment) as server:
        assert '"0.34.0"' in server.get("/version")
        (choice,) = server.complete("Hello", max_tokens=4, ignore_eos=True)["choices"]
        assert choice["finish_reason"] == "length"
    # The processes that vLLM starts do not repeat it.
    (warning,) = [line for line in server.log.read_text().splitlines() if "dsv4" in line]
    assert "leaves every layer to vLLM: this is vLLM 0.34.0" in warning
    assert "supports vLLM 0.32 and 0.33" in warning
