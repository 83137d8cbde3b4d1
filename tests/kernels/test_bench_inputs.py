"""The benches' inputs, and what benches do without a GPU: casts and tables."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench import inputs, mxfp4
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


@pytest.mark.parametrize("num_tokens", [1, 16, 512])
def test_an_error_is_of_enough_rows(num_tokens):
    checked = inputs.checked_inputs(SHAPE, num_tokens, "cpu")
    rows = [each.local_rows for each in checked]
    assert sum(rows) >= inputs.CHECKED_ROWS > sum(rows[:-1])
    assert torch.equal(checked[0].x, inputs.random_inputs(SHAPE, num_tokens, 0, "cpu").x)
    assert all(not torch.equal(each.x, checked[0].x) for each in checked[1:])


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


def test_w4a8_has_bars_beside_bf16_and_beside_the_default_peer():
    us = {"sm90": 10.0, "sm90_fp8": 11.0, "humming_fp8": 22.0}
    errors = {"sm90": 0.001, "sm90_fp8": 0.5, "humming_fp8": 0.25}
    title = list(mxfp4.SHAPES)[0]
    cells = {
        (title, tokens, name): {"us": us[name], "error": errors[name]}
        for tokens in (32, 2048)
        for name in us
    }
    assert mxfp4.w4a8_bars(cells) == [
        (f"{title}, 32: W4A8 beside bf16 + 2 us", 12 / 11, 1.0),
        (f"{title}, 32: W4A8's error", 0.5, 1 / 1.05),
        (f"{title}, 2048: W4A8", 2.0, 1.4),
        (f"{title}, 2048: W4A8's error", 0.5, 1 / 1.05),
    ]


def test_auto_is_w4a8_while_no_size_is_slower_by_more_than_3_percent_and_2_us():
    times = {(1, "sm90"): 20.0, (1, "sm90_fp8"): 22.0, (2, "sm90"): 200.0, (2, "sm90_fp8"): 207.0}
    title = list(mxfp4.SHAPES)[4]
    cells = {(title, tokens, name): {"us": us} for (tokens, name), us in times.items()}
    assert mxfp4.auto_bars(cells) == [
        (f"{title}, 1: W4A8 as `auto`", 1.0, 1.0),
        (f"{title}, 2: W4A8 as `auto`", 206 / 207, 1.0),
    ]


def test_parts_of_a_wider_tensor_begin_where_its_halves_do():
    source = torch.arange(1, 9).view(1, 4, 2)
    target = torch.full((1, 8, 3), 99)
    copy_padded(source, target, parts=2)
    assert torch.equal(target[:, 0:2, :2], source[:, :2])
    assert torch.equal(target[:, 4:6, :2], source[:, 2:])
    assert int(target.sum()) == int(source.sum())


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
