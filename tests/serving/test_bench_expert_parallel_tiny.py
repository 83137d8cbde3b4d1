"""bench.expert_parallel from start to end, on two ranks of vLLM's CPU build."""

import json
import sys

import pytest
from bench import expert_parallel

from tests.support.cpu_build import needs_cpu_build
from vllm_dsv4_moe.commands.deployment import SIZES
from vllm_dsv4_moe.commands.releases import RELEASES

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow, needs_cpu_build]


def test_two_ranks_are_right_and_timed_and_a_failure_costs_no_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(RELEASES, "flash", dict(zip(SIZES, (16, 2, 128, 64), strict=True)))
    monkeypatch.setattr(expert_parallel, "TOKENS", (1, 40))
    out = tmp_path / "out.json"
    given = [
        "run",
        f"--out={out}",
        "--commit=abc",
        "--seconds=900",
        "--contenders=marlin,w4a8_packed",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.expert_parallel", *given])
    expert_parallel.main()

    results = json.loads(out.read_text())
    assert (results["commit"], results["ranks"], results["gpu"]) == ("abc", 2, "none")
    failed, *rows = results["rows"]
    assert failed["contender"] == "marlin" and "current device cpu" in failed["failure"]
    for row, tokens in zip(rows, (1, 40), strict=True):
        assert (row["contender"], row["tokens"]) == ("w4a8_packed", tokens)
        assert 0.01 < row["error"] < 0.1
        # A token's codes and scale, or bf16 where they are few; its two experts' ids and weights.
        bytes_of_token = {1: 2 * 128, 40: 128 + 16}[tokens] + 2 * (4 + 4)
        assert row["gathered_bytes"] == 2 * tokens * bytes_of_token
        assert all(row[f"{stage}_us"] > 0 for stage in expert_parallel.STAGES)
    assert "| 40 | w4a8_packed | 12.5 |" in capsys.readouterr().out
