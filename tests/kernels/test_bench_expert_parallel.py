"""bench.expert_parallel without processes: the table, and what is measured where."""

import pytest
import torch
from bench import expert_parallel

STAGES = {"dispatch_us": 10.0, "experts_us": 80.0, "combine_us": 9.0}


def a_row(contender: str, tokens: int, us: float) -> dict:
    row = {"contender": contender, "tokens": tokens, "error": 0.01, "gathered_bytes": 2048}
    return row | STAGES | {"together_us": us}


def test_the_table_is_beside_the_faster_peer_and_says_what_failed():
    results = {
        "model": "flash",
        "format": "mxfp4",
        "ranks": 2,
        "gpu": "NVIDIA H200",
        "commit": "0123abc",
        "rows": [
            a_row("w4a8_packed", 32, 100.0),
            {"contender": "w4a16", "tokens": 32, "error": 0.5, "gathered_bytes": 2048},
            a_row("marlin", 32, 140.0),
            a_row("humming_fp8", 32, 120.0),
            a_row("w4a8_packed", 1, 50.0),
            {"contender": "w4a8", "failure": "boom"},
        ],
    }
    lines = list(expert_parallel.table(results))
    assert "MXFP4 experts, on 2 × NVIDIA H200, commit 0123abc" in lines[0]
    assert lines[4] == "| 1 | w4a8_packed | 2.0 | 10 | 80 | 9 | 50 | - |"
    assert lines[5] == "| 32 | w4a8_packed | 2.0 | 10 | 80 | 9 | 100 | 1.20× |"
    assert lines[-2:] == ["\nw4a16, 32 tokens: an error of 0.500", "\nw4a8 failed: boom"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what there is without a GPU")
@pytest.mark.parametrize(
    "weight_format, names",
    [
        ("mxfp4", ["w4a16", "w4a8", "w4a8_packed"]),
        ("nvfp4", ["w4a16", "w4a8", "w4a8_packed", "w4a4", "w4a4_packed"]),
    ],
)
def test_what_is_measured_without_a_gpu(weight_format, names):
    shape = expert_parallel.shape_of("flash", weight_format, 2)
    assert shape.num_local_experts == 128 and shape.max_num_tokens == 2 * 8192
    assert expert_parallel.default_contenders(shape) == names


def test_experts_that_ranks_cannot_share_evenly():
    with pytest.raises(ValueError, match="3 ranks do not divide 256 experts: change --ranks"):
        expert_parallel.shape_of("flash", "mxfp4", 3)
