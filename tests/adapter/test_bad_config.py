"""Values of config.json that no layer can be served with: refused by name, while vLLM loads and
by `dsv4-moe inspect`."""

import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support import loading
from vllm_dsv4_moe.commands.inspect_checkpoint import inspect
from vllm_dsv4_moe.commands.tiny import TinyConfig
from vllm_dsv4_moe.commands.tiny_config import tiny_config_json
from vllm_dsv4_moe.layer_config import LayerConfig, group_sizes

CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=128, intermediate=64, experts=8, heads=4)
QUANT = tiny_config_json(CONFIG)["quantization_config"]
MIXED = {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 32}}
# config.json's values, and what the refusal says.
BAD_CONFIGS = {
    "negative limit": ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
    "NaN limit": ({"swiglu_limit": math.nan}, "swiglu_limit is nan"),
    "softmax": ({"scoring_func": "softmax"}, "scoring_func is 'softmax', and this plugin's"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', and this plugin's"),
    "blocks of 32": (
        {"quantization_config": QUANT | {"group_size": 32}},
        "group_size of quantization_config is 32, and NVFP4",
    ),
    "blocks of 32 in one layer": (
        {"quantization_config": QUANT | {"quantized_layers": MIXED}},
        "group_size of layers.0.ffn.experts is 32, and NVFP4",
    ),
    "too many experts a token": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9 and there are 8 experts",
    ),
}


def with_config(checkpoint: Path, out: Path, changes: dict) -> Path:
    """The checkpoint with other values in its config.json."""
    out.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            os.symlink(file, out / file.name)
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("changes, says", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_refused_at_load(checkpoint, tmp_path, changes, says):
    config = loading.engine_config(with_config(checkpoint, tmp_path / "bad", changes))
    with pytest.raises(ValueError) as refusal:
        loading.load_model(config)
    assert str(refusal.value).startswith(f"model.layers.0.ffn.experts: {says}")


@pytest.mark.parametrize("changes, says", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_named_by_inspect(checkpoint, tmp_path, changes, says):
    bad = with_config(checkpoint, tmp_path / "bad", changes)
    assert any(problem.startswith(says) for problem in inspect(bad).problems)


GOOD_LIMITS = [None, 0, 0.0, 10, 10.0, math.inf]


@pytest.mark.parametrize("limit", GOOD_LIMITS)
def test_limits_that_can_be(limit):
    assert LayerConfig(limit, "sqrtsoftplus", 8, 8, QUANT).problems() == []


@pytest.mark.parametrize(
    ("top_k", "experts", "says"),
    [
        (17, 512, "num_experts_per_tok is 17, and this plugin's router takes at most 16"),
        (16, 513, "n_routed_experts is 513, and this plugin's router takes at most 512"),
    ],
)
def test_more_than_the_router_takes_is_refused(top_k, experts, says):
    (problem,) = LayerConfig(10.0, "sqrtsoftplus", top_k, experts, {}).problems()
    assert problem.startswith(says)
    assert LayerConfig(10.0, "sqrtsoftplus", 16, 512, {}).problems() == []


def test_every_layers_block_is_read():
    assert group_sizes({}) == []
    assert group_sizes(QUANT) == [
        ("quantization_config", 16),
        ("layers.0.ffn.experts", 16),
        ("layers.1.ffn.experts", 16),
    ]
    other = {"layers.0.attn.wq_a": {"quant_algo": "MXFP8", "group_size": 32}}
    assert group_sizes({"quantized_layers": other}) == []


def test_rows_of_a_table_that_name_an_expert_twice_are_one_warning():
    from vllm_dsv4_moe import router

    table = torch.arange(60, dtype=torch.int32).reshape(10, 6) % 8
    table[[2, 7], 5] = table[[2, 7], 0]
    ours = mock.Mock(
        spec=router.Dsv4Router, table=table, bias=None, num_experts=8, _image_bias=lambda: None
    )
    with mock.patch.object(router.logger, "warning_once") as say:
        router.Dsv4Router.check_loaded(ours, "layers.0.ffn.gate")
        table[7] = torch.arange(6)
        table[2] = torch.arange(6)
        router.Dsv4Router.check_loaded(ours, "layers.0.ffn.gate")
    (call,) = say.mock_calls
    assert call.args[0] % call.args[1:] == (
        "dsv4-moe: 2 of 10 rows of layers.0.ffn.gate.tid2eid name an expert twice: both count"
    )
