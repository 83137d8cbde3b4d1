"""The benches' inputs, and what benches do without a GPU: casts, windows in a trace, tables."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench import decode_probe, engine, inputs, mxfp4
from bench.decode_probe import Kernel
from bench.peers import copy_padded
from dsv4_kernels.types import MoeShape

SHAPE = MoeShape(8, 4, 2, 64, 32, 16, False)


def test_inputs_are_the_seeds_and_count_what_is_local():
    found = inputs.random_inputs(SHAPE, 16, seed=1, device="cpu")
    again = inputs.random_inputs(SHAPE, 16, seed=1, device="cpu")
    other = inputs.random_inputs(SHAPE, 16, seed=2, device="cpu")
    assert torch.equal(found.x, again.x) and not torch.equal(found.x, other.x)
    mapping = inputs.expert_map(8, 4, "cpu")
    assert mapping.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    local = mapping[found.routing.ids.long()]
    assert found.local_rows == int((local >= 0).sum())
    assert found.experts_hit == len(set(local.flatten().tolist()) - {-1})
    assert inputs.expert_map(8, 8, "cpu") is None


def test_weights_have_equal_scales_of_gate_and_up_if_asked():
    different = inputs.random_weights(SHAPE, "cpu").w13_global_scales
    equal = inputs.random_weights(SHAPE, "cpu", equal_scales=True).w13_global_scales
    assert (different[:, 0] != different[:, 1]).all() and (equal[:, 0] == equal[:, 1]).all()


@pytest.mark.parametrize(
    ("rows", "hit", "us"),
    [(1, 1, 1e6 * 27 / 4.3e12 * 128), (10**6, 1, 1e6 * 10**6 * 2 * 6144 / 790e12)],
    ids=["bytes", "operations"],
)
def test_the_floor_is_the_longer_of_bytes_and_operations(rows, hit, us):
    each = inputs.Inputs(torch.empty(0), None, rows, hit)
    assert inputs.floor_us(SHAPE, [each, each]) == pytest.approx(us)


def test_the_floor_of_mxfp4_has_its_bytes():
    each = inputs.Inputs(torch.empty(0), None, 1, 1)
    of_nvfp4 = inputs.floor_us(SHAPE, [each])
    assert inputs.floor_us(SHAPE._replace(weight_format="mxfp4"), [each]) == of_nvfp4 * 17 / 18


def test_bars_are_those_of_the_shapes_and_numbers_of_tokens_that_have_one():
    us = {"sm90": 10.0, "marlin": 15.0, "humming": 14.0, "humming_fp8": 9.0}
    titles = list(mxfp4.SHAPES)
    cells = {
        (title, tokens, name): {"us": us[name], "floor_us": 8.0}
        for title in (titles[0], titles[3])
        for tokens in (1, 8, 512)
        for name in us
    }
    assert mxfp4.bars(cells) == [
        (f"{titles[0]}, 1: bf16", 1.4, 1.3),
        (f"{titles[0]}, 1: fp8", 0.9, 1.3),
        (f"{titles[0]}, 8: bf16", 1.4, 1.3),
        (f"{titles[0]}, 8: fp8", 0.9, 0.95),
        (f"{titles[0]}, 512: bf16", 1.4, 1.3),
        (f"{titles[3]}, 512: floor", 0.8, 1 / 1.15),
        (f"{titles[3]}, 512: fp8", 0.9, 1.0),
    ]


def test_parts_of_a_wider_tensor_begin_where_its_halves_do():
    source = torch.arange(1, 9).view(1, 4, 2)
    target = torch.full((1, 8, 3), 99)
    copy_padded(source, target, parts=2)
    assert torch.equal(target[:, 0:2, :2], source[:, :2])
    assert torch.equal(target[:, 4:6, :2], source[:, 2:])
    assert int(target.sum()) == int(source.sum())


# A layer: gate and routed experts on stream 7, the shared expert on stream 9 until after combine.
LAYER = [
    Kernel(0, 5, 7, "mhc_pre_big_fuse_with_norm"),
    Kernel(6, 8, 7, "LLBf16Dotprod"),
    Kernel(6, 8, 9, "quant"),
    Kernel(9, 10, 7, "_router_kernel"),
    Kernel(9, 19, 9, "deep_gemm"),
    Kernel(19, 33, 7, "fc1"),
    Kernel(33, 42, 7, "fc2"),
    Kernel(42, 44, 7, "_combine_kernel"),
    Kernel(43, 50, 9, "deep_gemm"),
    Kernel(51, 52, 7, "vectorized CUDAFunctor_add"),
    Kernel(53, 59, 7, "mhc_fused"),
]


def test_a_layers_window_is_from_before_the_gate_to_the_sum():
    later = [k._replace(start=k.start + 100, end=k.end + 100) for k in LAYER]
    first, second = decode_probe.layer_windows(LAYER + later)
    assert (first.start, first.end, len(first.kernels)) == (5, 52, 9)
    assert (second.start, second.end, len(second.kernels)) == (105, 152, 9)


def test_a_gate_without_a_sum_after_it_is_no_window():
    assert decode_probe.layer_windows(LAYER[:-2]) == []


def test_deciles_are_milliseconds():
    assert decode_probe.deciles([i / 1000 for i in range(1, 100)]) == [10, 50, 90]


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
    engine.fill(Model(), num_experts=4)
    for name, tensor in NAMES.items():
        assert tensor.float().isfinite().all(), name
    table = NAMES["layers.0.ffn.gate.tid2eid"].sort(1).values
    assert (table.diff(dim=1) > 0).all() and 0 <= table.min() and table.max() < 4
    assert NAMES["layers.0.ffn.experts.w13_weight"].unique().numel() > 50
    assert (NAMES["layers.0.ffn.experts.w13_weight_scale"].float() >= 0.5).all()
    assert (NAMES["layers.0.attn_norm.weight"] == 1).all()
    assert NAMES["layers.0.ffn.gate.e_score_correction_bias"].count_nonzero() == 0


def test_the_engines_model_is_flash_with_fewer_layers():
    config = engine.model_config(2)
    assert (config["hidden_size"], config["moe_intermediate_size"]) == (4096, 2048)
    assert (config["n_routed_experts"], config["num_hidden_layers"]) == (256, 2)
    assert config["num_hash_layers"] == 2 and config["q_lora_rank"] == 1024


def test_engine_results_are_beside_one_another(tmp_path, capsys):
    paths = []
    for backend, ms, speed in (("plugin", 2.0, 3000.0), ("marlin", 4.0, 1500.0)):
        paths.append(tmp_path / backend)
        facts = {"gpu": "H200", "layers": 16, "vllm": "0.32.0", "commit": "abc"}
        times = {"decode_ms": {"8": ms}, "prefill_tokens_per_s": {"4 × 2048": speed}}
        paths[-1].write_text(json.dumps({"backend": backend, **facts, **times}))
    engine.report(SimpleNamespace(results=paths))
    shown = capsys.readouterr().out
    assert "| decode 8, ms | 2.00 (1.00×) | 4.00 (0.50×) |" in shown
    assert "| prefill 4 × 2048, tok/s | 3000 (1.00×) | 1500 (0.50×) |" in shown


def test_mxfp4s_table_leaves_out_what_was_wrong(tmp_path, capsys):
    kept = tmp_path / "mxfp4.json"
    row = {"model": "Flash", "tokens": 8, "floor_us": 100.0, "error": 0.01}
    rows = [
        row | {"backend": "sm90", "us": 120.0},
        row | {"backend": "marlin"},
        row | {"backend": "humming_fp8", "us": 150.0},
        {"model": "Flash", "backend": "humming", "tokens": 0, "failure": "boom"},
    ]
    kept.write_text(json.dumps({"gpu": "H200", "commit": "abc", "rows": rows}))
    mxfp4.report(SimpleNamespace(results=kept))
    lines = capsys.readouterr().out.splitlines()
    assert "| Flash | 8 | 100 | 120 (1.20×) | - | - | 150 (1.50×) | - | 1.25× |" in lines
    assert lines[-1] == "1 of 1 bars met"
