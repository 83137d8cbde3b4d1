"""Where a GPU's memory goes: the sum that `dsv4-moe doctor --config` prints."""

import dataclasses
import json

import pytest
from dsv4_kernels.backends import SM90, SM100
from dsv4_kernels.moe import workspace_bytes
from dsv4_kernels.types import MoeShape

from vllm_dsv4_moe.checkpoint_layout import TensorSpec
from vllm_dsv4_moe.commands import doctor
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.config import find, shipped
from vllm_dsv4_moe.commands.deployment import Deployment, read_deployment
from vllm_dsv4_moe.commands.memory import (
    GIB,
    GPUS,
    rank_memory,
    stages_of_layers,
    tensors_of,
    weights_of_rank,
)
from vllm_dsv4_moe.commands.releases import RELEASES, V41_FLASH
from vllm_dsv4_moe.settings import Settings

MXFP4 = Settings(formats="mxfp4")


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [("deepseek-ai/DeepSeek-V4.1-Flash", 510.29), ("nvidia/DeepSeek-V4.1-Flash-NVFP4", 527.27)],
)
def test_tensors_of_v41_are_as_many_bytes_as_published(model, gigabytes):
    found = sum(spec.num_bytes for _, spec in tensors_of(RELEASES[model])) / 1e9
    assert found == pytest.approx(gigabytes, abs=0.006)


def test_a_v41_config_without_a_size_says_which():
    text = {key: value for key, value in V41_FLASH["text_config"].items() if key != "q_lora_rank"}
    with pytest.raises(ValueError, match="config.json lacks q_lora_rank: its memory cannot be"):
        list(tensors_of(V41_FLASH | {"text_config": text}))


BYTE = TensorSpec("U8", (960,))
TENSORS = [
    ("embed.weight", BYTE),
    ("layers.0.ffn.experts.0.w1.weight", BYTE),
    ("layers.0.ffn.shared_experts.w1.weight", BYTE),
    ("layers.0.attn.wq_b.weight", BYTE),
    ("layers.0.attn.wkv.weight", BYTE),
    ("layers.1.engram.embed.weight", BYTE),
    ("layers.1.ffn.experts.0.w1.weight", BYTE),
    ("norm.weight", BYTE),
    ("head.weight", BYTE),
    ("mtp.0.ffn.experts.0.w1.weight", BYTE),
    ("mtp.0.attn.wkv.weight", BYTE),
]
ONE = Deployment({"n_routed_experts": 8, **dict.fromkeys(
    ("num_experts_per_tok", "hidden_size", "moe_intermediate_size"), 1
)}, Settings(), 16)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "experts", "others", "drafts"),
    [
        pytest.param({}, 2 * 960, 6 * 960, 0, id="one"),
        pytest.param({"draft_method": "mtp"}, 2 * 960, 6 * 960, 2 * 960, id="drafts"),
        # The embedding, the head, the shared expert and one projection are divided.
        pytest.param({"tensor_parallel": 2}, 960, 4 * 480 + 2 * 960, 0, id="tp"),
        pytest.param({"data_parallel": 2, "draft_method": "mtp"}, 960, 6 * 960, 1440, id="dp"),
        # Ranks of a group have tokens of their own, and so a whole shared expert.
        pytest.param(
            {"tensor_parallel": 2, "data_parallel": 2, "is_expert_parallel": True},
            480,
            3 * 480 + 3 * 960,
            0,
            id="sequence-parallel",
        ),
        # 8 + 4 copies over 4 ranks, instead of 8.
        pytest.param(
            {"data_parallel": 4, "is_expert_parallel": True, "redundant_experts": 4},
            720,
            6 * 960,
            0,
            id="eplb",
        ),
        # The first stage has the embedding and layer 0, whose experts and three others are more
        # than layer 1, the norm, the head and the drafts.
        pytest.param({"pipeline_parallel": 2}, 960, 4 * 960, 0, id="pp"),
    ],
)
def test_weights_are_divided_as_vllm_divides_them(changes, experts, others, drafts):
    found = weights_of_rank(TENSORS, dataclasses.replace(ONE, **changes))
    assert (found.experts, found.others, found.drafts) == (experts, others, drafts)
    assert found.host == (0 if "pipeline_parallel" in changes else 960)


@pytest.mark.parametrize(
    ("layers", "counts"), [(43, [11, 11, 11, 10]), (40, [10] * 4), (42, [10, 11, 11, 10])]
)
def test_layers_of_a_pipeline_are_vllms(layers, counts, monkeypatch):
    from vllm.distributed.utils import get_pp_indices

    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    found = stages_of_layers(layers, 4)
    assert [found.count(stage) for stage in range(4)] == counts
    for stage in range(4):
        start, end = get_pp_indices(layers, stage, 4)
        assert found[start:end] == [stage] * (end - start)


def v41_on_two_h200s(**changes) -> Deployment:
    return dataclasses.replace(
        Deployment(V41_FLASH, MXFP4, 4096, data_parallel=2, is_expert_parallel=True), **changes
    )


def test_the_arena_is_the_workspace_of_both_lanes():
    shape = MoeShape(384, 192, 6, 5120, 2304, 8192, False, weight_format="mxfp4", fp8=True)
    layers = workspace_bytes(SM90, shape)
    drafts = workspace_bytes(SM90, shape._replace(num_experts=128, num_local_experts=64, top_k=3))
    memory, arch = GPUS["h200"]
    alone = rank_memory(v41_on_two_h200s(), memory, arch)
    dspark = rank_memory(v41_on_two_h200s(draft_method="dspark"), memory, arch)
    mtp = rank_memory(v41_on_two_h200s(draft_method="mtp"), memory, arch)
    assert (alone.arena, alone.drafts_arena) == (layers, 0)
    assert (dspark.arena, dspark.drafts_arena) == (layers, drafts)
    assert (mtp.arena, mtp.drafts_arena) == (layers, 0)  # it runs in the model's
    assert alone.left - dspark.left == drafts + dspark.weights.drafts


def test_padding_is_counted():
    """An eighth of V4.1's 2304 is 288: Hopper's w2 is padded to 320 columns."""
    deployment = Deployment(V41_FLASH, MXFP4, 4096, tensor_parallel=8, draft_method="dspark")
    plain = weights_of_rank(tensors_of(V41_FLASH), deployment)
    padded = rank_memory(deployment, *GPUS["h200"]).weights
    grown = (2 * 288 + 320) / (3 * 288)
    assert padded.experts == int(plain.experts * grown)
    assert padded.draft_experts == int(plain.draft_experts * grown)
    assert padded[1::2] == plain[1::2]


def test_dual_batch_overlap_doubles_the_arena():
    deployment = Deployment(RELEASES["nvidia/DeepSeek-V4-Pro-NVFP4"], Settings(), 4096)
    deployment = dataclasses.replace(deployment, data_parallel=8, is_expert_parallel=True)
    one, two = (
        rank_memory(dataclasses.replace(deployment, micro_batches=number), *GPUS["b200"])
        for number in (1, 2)
    )
    shape = MoeShape(384, 48, 6, 7168, 3072, 8 * 4096, True)
    assert one.arena == workspace_bytes(SM100, shape)
    assert two.arena == 2 * one.arena == one.arena + one.left - two.left


@pytest.mark.parametrize("all2all", ["deepep_low_latency", "nixl_ep"])
def test_room_for_rows_in_groups_and_their_output_are_counted(all2all):
    """128 tokens of each of 8 ranks may all go to one expert, whichever."""
    deployment = Deployment(RELEASES["nvidia/DeepSeek-V4-Pro-NVFP4"], Settings(), 128)
    deployment = dataclasses.replace(
        deployment, data_parallel=8, is_expert_parallel=True, all2all_backend=all2all
    )
    shape = MoeShape(384, 48, 6, 7168, 3072, 1024, True, batch_rows=1024)
    output = 48 * 1024 * 7168 * 2
    arena = rank_memory(deployment, *GPUS["b200"]).arena
    assert arena == workspace_bytes(SM100, shape) + output
    # x and h of every row that there is room for, at 9/16 of a byte, and x's scales once more.
    packed = 48 * 1024 * (7168 + 3072) * 9 // 16
    assert packed <= workspace_bytes(SM100, shape) < packed * 1.1


def test_layers_that_vllm_runs_have_no_arena():
    memory = rank_memory(v41_on_two_h200s(settings=Settings(formats="nvfp4")), *GPUS["h200"])
    assert memory.arena == 0 and memory.weights.experts > 130 * GIB


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("enable-dbo: true", "micro_batches", 2),
        ("ubatch-size: 3", "micro_batches", 3),
        ("pipeline-parallel-size: 2", "pipeline_parallel", 2),
        ('speculative-config: \'{"method": "mtp"}\'', "draft_method", "mtp"),
        ("gpu-memory-utilization: 0.5", "gpu_memory_utilization", 0.5),
    ],
)
def test_a_files_options_are_read(text, field, value, tmp_path):
    path = tmp_path / "flash.yaml"
    path.write_text(f"model: flash\nmax-num-batched-tokens: 16\n{text}\n")
    assert getattr(read_deployment(path, {}), field) == value


def test_doctor_prints_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda: iter(()))
    assert main(["doctor", "--config", "flash-2xh200", "--gpu", "h200"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    written = " ".join(find("flash-2xh200").read_text().replace("\n# ", " ").split())
    sentence = said.partition("memory ")[2].removesuffix(" healthy")
    assert sentence.startswith("Memory of a GPU, GiB: 140.4") and sentence in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash-3xh200"], "there is no deployment or file flash-3xh200: there are flash-2xh200"),
        (["flash-2xh200"], "there is no GPU to sum up for: add --gpu h200 or --gpu b200"),
        (["nano.yaml", "--gpu", "h200"], "nano is not flash, pro, v41, the name of a published"),
        (["big.yaml", "--gpu", "h200"], "and -16.1 for activations"),
    ],
)
def test_doctor_says_what_is_wrong(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "diagnose", lambda: iter(()))
    monkeypatch.setattr(doctor.driver, "visible_gpus", lambda: [])
    (tmp_path / "nano.yaml").write_text("model: nano\nmax-num-batched-tokens: 16\n")
    (tmp_path / "big.yaml").write_text("model: flash\nmax-num-batched-tokens: 16\n")
    assert main(["doctor", "--json", "--config", *arguments]) == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["status"] == "bad" and message in check["text"]


def test_deployments_are_listed_and_printed(capsys):
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in shipped()]
    assert "DeepSeek-V4-Flash on two H200s" in lines[0]
    assert main(["config", "flash-b200"]) == 0
    assert capsys.readouterr().out == find("flash-b200").read_text()
    assert main(["config", "flash-b100"]) == 2
    assert "no deployment or file flash-b100: there are flash-2xh200" in capsys.readouterr().err
