"""The plugin in vLLM's registries: there when wanted, absent when not, and only for its layers."""

import json
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import vllm_dsv4_moe
from tests.support import loading
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint
from vllm_dsv4_moe.settings import Settings

REGISTRIES = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import sys
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.quantization import get_quantization_config
print("loaded", sorted(name for name in sys.modules if name.startswith("vllm_dsv4_moe")))
print(get_quantization_config("deepseek_v4_fp8").__module__, "MoERunner" in op_registry_oot)
"""


@pytest.mark.slow
def test_installed_but_not_wanted_leaves_vllm_untouched():
    command = [sys.executable, "-c", REGISTRIES]
    environment = loading.os.environ | {"VLLM_PLUGINS": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == [
        "loaded []",
        "vllm.models.deepseek_v4.quant_config False",
    ]


def test_registering_twice_changes_nothing():
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.quantization import get_quantization_config

    (entry_point,) = entry_points(group="vllm.general_plugins", name="dsv4_moe")
    entry_point.load()()
    assert "MoERunner" in op_registry_oot
    before = op_registry_oot["MoERunner"], get_quantization_config("deepseek_v4_fp8")
    vllm_dsv4_moe.register()
    assert (op_registry_oot["MoERunner"], get_quantization_config("deepseek_v4_fp8")) == before


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0rc1+cu130", "0.32.0+cpu"])
def test_builds_of_a_supported_vllm_are_taken(version):
    assert vllm_dsv4_moe.is_supported(version)


def test_a_plugin_that_replaces_the_same_class_is_named():
    from vllm.model_executor.custom_op import op_registry_oot

    from vllm_dsv4_moe import runner

    class Theirs: ...

    with mock.patch.dict(op_registry_oot, {"MoERunner": Theirs}):
        with pytest.raises(RuntimeError, match=r"test_plugin.*Theirs has replaced.*VLLM_PLUGINS"):
            runner.install()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """vLLM's config of a checkpoint whose quantization_config is that of published copies."""
    sizes = TinyConfig(layers=2, hash_layers=1, hidden=128, intermediate=128, experts=8, mtp=1)
    folder = tmp_path_factory.mktemp("published") / "tiny"
    write_tiny_checkpoint(folder, TinyConfig(**vars(sizes) | {"linear": "fp8"}))
    return loading.engine_config(folder)


def test_a_published_config_resolves_to_the_plugin(published):
    from vllm_dsv4_moe.quant_config import Dsv4Fp8Config

    config_json = json.loads((Path(published.model_config.model) / "config.json").read_text())
    quantization = config_json["quantization_config"]
    assert quantization["quant_method"] == "fp8" and quantization["moe_quant_algo"] == "NVFP4"
    assert published.model_config.quantization == "deepseek_v4_fp8"
    assert type(published.quant_config) is Dsv4Fp8Config
    assert type(pickle.loads(pickle.dumps(published.quant_config))) is Dsv4Fp8Config


def test_mtp_layers_of_a_published_checkpoint_are_mxfp4_on_gpus(published):
    from vllm.config import set_current_vllm_config
    from vllm.models.deepseek_v41.quant_config import DeepseekV4FP8Config

    from vllm_dsv4_moe.quant_config import OurLayers

    on_gpus = type("OnGpus", (OurLayers, DeepseekV4FP8Config), {})
    config_json = json.loads((Path(published.model_config.model) / "config.json").read_text())
    config = on_gpus.from_config(config_json["quantization_config"])
    with set_current_vllm_config(published):
        formats = [config.weight_format(f"model.layers.{n}.ffn.experts") for n in range(3)]
    assert formats == ["nvfp4", "nvfp4", "mxfp4"]  # two layers, and one of multi-token prediction


def config_on_a_gpu(**changes):
    """The plugin's class over one that answers as vLLM's does on GPUs: MTP layers stayed MXFP4."""
    from vllm.model_executor.layers.quantization import QuantizationConfig

    from vllm_dsv4_moe.quant_config import OurLayers

    class Theirs(QuantizationConfig):
        ignored_layers = ["layers.1.ffn.experts"]
        packed_modules_mapping: dict = {}
        expert_dtype, moe_quant_algo = "fp4", "NVFP4"

        def get_quant_method(self, layer, prefix):
            return "vLLM's own"

        def _is_nvfp4_expert_layer(self, prefix):
            return "layers.2." not in prefix

    config_class = type(
        "Config",
        (OurLayers, Theirs),
        {"_settings": Settings()} | changes | {"_check_files": lambda self: None},
    )
    config_class.__abstractmethods__ = frozenset()
    return config_class.__new__(config_class)


# What differs from an NVFP4 layer on an H200, the layer, whose it is, and what the log says.
WHOSE = {
    "NVFP4": ({}, 0, "nvfp4", "runs NVFP4 experts, on sm90: layers 0, 0 (W4A16; without nvfp4 in"),
    "NVFP4 for Marlin": ({"backend": "marlin"}, 0, None, "--moe-backend marlin asks for it"),
    "NVFP4 on ROCm": ({"platform": "rocm"}, 0, None, "runs on NVIDIA GPUs"),
    "with constant ones among them": ({"kind": "Substituted"}, 0, None, "does more than route"),
    "left out by name": ({}, 1, None, "neither NVFP4 nor MXFP4"),
    "MXFP4 in MTP": ({}, 2, "mxfp4", "runs MXFP4 experts, on sm90: layers 2, 2 ("),
    "MXFP4 in MTP, not asked for": (
        {"_settings": Settings(formats="nvfp4")}, 2, None, "are MXFP4, and the setting formats is"
    ),
    "MXFP4 for Marlin": ({"backend": "marlin"}, 2, None, "marlin asks for it"),
    "MXFP4 on a B200": ({"capability": (10, 0)}, 2, None, "sm100 backend runs NVFP4 alone"),
    "NVFP4 on an A100": ({"capability": (8, 0)}, 0, None, "is made for compute capability 8.0"),
    "MXFP4 on an RTX": ({"capability": (12, 0)}, 2, None, "is made for compute capability 12.0"),
    "on an A100, asked for": (
        {"capability": (8, 0), "_settings": Settings(backend="reference")},
        0,
        "nvfp4",
        "runs NVFP4 experts",
    ),
    "NVFP4, not asked for": (
        {"_settings": Settings(formats="mxfp4")}, 0, None, "are NVFP4, and the setting formats is"
    ),
    "FP8 experts": ({"expert_dtype": "fp8"}, 0, None, "neither NVFP4 nor MXFP4"),
    "an MXFP4 checkpoint": ({"moe_quant_algo": ""}, 0, "mxfp4", "runs MXFP4 experts"),
}  # fmt: skip


@pytest.mark.parametrize("changes, number, whose, says", WHOSE.values(), ids=WHOSE)
def test_layers_that_are_not_ours_get_vllms_own_method(changes, number, whose, says):
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from vllm_dsv4_moe import quant_config

    prefix = f"layers.{number}.ffn.experts"
    backend = changes.get("backend", "auto")
    config = config_on_a_gpu(**changes)
    kind = type(changes.get("kind"), (RoutedExperts,), {}) if "kind" in changes else RoutedExperts
    layer = mock.Mock(spec=kind, moe_config=mock.Mock(moe_backend=backend))
    platform = mock.Mock(
        is_cpu=lambda: False,
        is_cuda=lambda: "platform" not in changes,
        get_device_capability=lambda: changes.get("capability", (9, 0)),
    )
    methods = {name: mock.Mock(return_value=name) for name in ("nvfp4", "mxfp4")}
    with (
        mock.patch.object(quant_config, "current_platform", platform),
        mock.patch.object(quant_config, "METHODS", methods),
        mock.patch.object(quant_config, "get_current_vllm_config"),
        mock.patch.object(quant_config.options, "unsupported_reason", return_value=None),
        mock.patch.object(quant_config, "unsupported_config", return_value=None),
        mock.patch.object(quant_config.logger, "info") as say,
    ):
        answers = [config.get_quant_method(layer, prefix) for _ in range(2)]
        for name in methods:
            config.announce_ours(name, "sm90", "W4A16")
    assert answers == [whose or "vLLM's own"] * 2
    (sentence,) = [call.args[0] % call.args[1:] for call in say.mock_calls]
    assert says in sentence


def test_a_layer_of_another_kind_is_vllms():
    assert config_on_a_gpu().get_quant_method(object(), "layers.0.attn.wq_a") == "vLLM's own"


def test_the_reference_backend_on_a_gpu_wants_eager_mode():
    from vllm_dsv4_moe.moe_method import check_device

    check_device("reference", (9, 0), is_eager=True)
    with pytest.raises(ValueError, match="--enforce-eager"):
        check_device("reference", (9, 0), is_eager=False)


@pytest.mark.parametrize(
    "sizes, most",
    [({}, 100), ({"dp_size": 4}, 400), ({"dp_size": 2, "sp_size": 8}, 208)],
    ids=["alone", "data parallel", "sequence parallel"],
)
def test_the_arena_is_sized_for_what_every_rank_may_send(sizes, most):
    from vllm_dsv4_moe.moe_method import max_num_tokens

    sizes = {"max_num_tokens": 100, "dp_size": 1, "pcp_size": 1, "sp_size": 1} | sizes
    config = SimpleNamespace(**sizes, is_sequence_parallel=sizes["sp_size"] > 1)
    assert max_num_tokens(config) == most


def test_a_cpu_without_bf16_instructions_is_refused_in_one_sentence():
    plugin = pytest.importorskip("vllm_cpu_host.plugin", reason="made for hosts without a GPU")
    with mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=False):
        with pytest.raises(RuntimeError, match="this CPU lacks avx512_bf16.*NVIDIA GPU"):
            plugin.register()
