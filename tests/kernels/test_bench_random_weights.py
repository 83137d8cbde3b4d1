"""bench.random_weights: a model of dummies that routes tokens apart and keeps their size."""

import importlib.metadata

import pytest
import torch
from bench.random_weights import (
    CHUNK_BYTES,
    PLUGIN_NAME,
    fill,
    parts,
    real_config,
    values_for,
    write_entry_point,
    write_model,
)
from dsv4_kernels.reference import mxfp4_dequantize, nvfp4_dequantize

HIDDEN, EXPERTS, VOCAB = 512, 256, 2000


def values(name: str, tensor: torch.Tensor) -> torch.Tensor:
    found = values_for(name, tensor, EXPERTS, torch.Generator().manual_seed(0))
    return tensor.copy_(found)


def test_tokens_route_apart():
    x = values("model.embed_tokens.weight", torch.empty(VOCAB, HIDDEN))[:64]
    gate = values("model.layers.3.ffn.gate.weight", torch.empty(EXPERTS, HIDDEN))
    bias = values("model.layers.3.ffn.gate.e_score_correction_bias", torch.empty(EXPERTS))
    chosen = (x @ gate.T).topk(6).indices
    assert not bias.any()
    # 64 tokens of 6 experts each reach 199 of 256 when chosen evenly.
    assert len(chosen.unique()) > 180
    table = values("model.layers.0.ffn.gate.tid2eid", torch.empty(VOCAB, 6, dtype=torch.int64))
    assert all(len(set(row)) == 6 for row in table.tolist())
    assert table.min() == 0 and table.max() == EXPERTS - 1


@pytest.mark.parametrize("block", [16, 32], ids=["nvfp4", "mxfp4"])
def test_experts_keep_the_size_of_what_they_multiply(block):
    prefix, rows, columns = "model.layers.3.ffn.experts.w13_weight", 64, 4096
    codes = values(prefix, torch.empty(2, rows, columns // 2, dtype=torch.uint8))
    dtype = torch.float8_e4m3fn if block == 16 else torch.uint8
    scales = values(f"{prefix}_scale", torch.empty(2, rows, columns // block).to(dtype))
    if block == 16:
        one = values(f"{prefix}_scale_2", torch.empty(()))
        weights = torch.stack(
            [nvfp4_dequantize(*pair, one) for pair in zip(codes, scales, strict=True)]
        )
    else:
        weights = mxfp4_dequantize(codes, scales)
    product = weights @ torch.randn(columns, generator=torch.Generator().manual_seed(1))
    assert 0.7 < product.square().mean().sqrt() < 1.5


NAMES = {
    "layers.0.ffn.experts.w13_weight": torch.empty(4, 8, 4, dtype=torch.uint8),
    "layers.0.ffn.experts.w13_weight_scale": torch.empty(4, 8, 2).to(torch.float8_e4m3fn),
    "layers.0.ffn.experts.w2_weight_scale_2": torch.empty(4),
    "layers.0.ffn.gate.tid2eid": torch.empty(30, 3, dtype=torch.int32),
    "layers.0.ffn.gate.weight": torch.empty(4, 16),
    "layers.0.ffn.gate.e_score_correction_bias": torch.empty(4),
    "layers.0.attn.wq_a.weight": torch.empty(8, 8).to(torch.float8_e4m3fn),
    "layers.0.attn.wq_a.weight_scale_inv": torch.empty(1, 1),
    "layers.0.attn_norm.weight": torch.empty(8),
    "embed_tokens.weight": torch.empty(32, 16),
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Parameter(torch.empty(0))

    def named_buffers(self, *_):
        return NAMES.items()


def test_dummy_weights_route_apart_and_scale_to_numbers():
    for tensor in NAMES.values():
        tensor.view(torch.uint8).fill_(0xFF)
    fill(Model(), num_experts=4)
    for name, tensor in NAMES.items():
        assert tensor.float().isfinite().all(), name
    table = NAMES["layers.0.ffn.gate.tid2eid"].sort(1).values
    assert (table.diff(dim=1) > 0).all() and 0 <= table.min() and table.max() < 4
    assert NAMES["layers.0.ffn.experts.w13_weight"].unique().numel() > 50
    assert (NAMES["layers.0.ffn.experts.w13_weight_scale"].float() > 0).all()
    assert (NAMES["layers.0.attn_norm.weight"] == 1).all()
    assert NAMES["layers.0.ffn.gate.e_score_correction_bias"].count_nonzero() == 0


def test_a_model_depends_on_names_alone():
    def model(*names: str) -> torch.nn.Module:
        made = torch.nn.Module()
        for name in names:
            made.register_parameter(name, torch.nn.Parameter(torch.zeros(8, 8)))
        return made

    first, second = model("gate_weight_embed", "other_embed"), model("other_embed", "x")
    for each in (first, second):
        fill(each, EXPERTS)
    assert torch.equal(first.other_embed, second.other_embed)
    assert not torch.equal(first.other_embed, first.gate_weight_embed)
    assert not second.x.any(), "what has no rule is left as vLLM made it"


def test_large_tensors_are_filled_by_parts():
    small, large = torch.empty(4, 4), torch.empty(5, CHUNK_BYTES // 2, dtype=torch.uint8)
    assert [len(part) for part in parts(small)] == [4]
    assert [len(part) for part in parts(large)] == [2, 2, 1]


def test_tokens_become_text_and_the_same_tokens_again(tmp_path):
    from transformers import PreTrainedTokenizerFast

    config = real_config("flash", "nvfp4", 4) | {"vocab_size": VOCAB}
    folder = write_model(tmp_path / "model", config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer) == VOCAB
    tokens = torch.randint(7, VOCAB, (500,)).tolist()
    assert tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens


def test_vllm_finds_the_plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write_entry_point(tmp_path / "site")))
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN_NAME)
    assert entry.load().__module__ == "bench.random_weights"


def test_the_models_are_v4s_with_fewer_layers():
    config = real_config("flash", "nvfp4", 2)
    assert (config["hidden_size"], config["moe_intermediate_size"]) == (4096, 2048)
    assert (config["n_routed_experts"], config["num_hidden_layers"]) == (256, 2)
    assert config["num_hash_layers"] == 2 and config["q_lora_rank"] == 1024
    config = real_config("v41", "mxfp4", 6)
    sizes = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_hash_layers")
    assert [config[name] for name in sizes] == [5120, 2304, 384, 0]
