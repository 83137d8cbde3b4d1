"""Every file of configs/ goes through vLLM's own argument parser, and says what memory it takes."""

from pathlib import Path

import pytest
from dsv4_kernels.backends import SM90, SM100
from dsv4_kernels.moe import workspace_bytes
from dsv4_kernels.types import MoeShape

from tests.adapter.test_checkpoint_layout import FLASH, NVFP4, PRO, tensors_of
from vllm_dsv4_moe.commands.inspect_checkpoint import weight_bytes_per_gpu

DEPLOYMENTS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def parse(path: Path):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(["serve", "--config", str(path)])


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_vllm_parses(path):
    args = parse(path)
    model, gpus = path.stem.split("-", 1)
    assert model.lower() in args.model.lower() and "NVFP4" in args.model
    count = int(gpus.split("x")[0]) if "x" in gpus else 1
    assert args.tensor_parallel_size * args.data_parallel_size == count
    assert args.enable_expert_parallel == (count > 1)
    assert args.max_num_batched_tokens > 0


GIB = 2**30
# Of one GPU, as nvidia-smi gives it in MiB.
GPU_BYTES = {"b200": 183_359 * 2**20, "h200": 143_771 * 2**20}


def memory_comment(path: Path, args) -> str:
    """The comment that a deployment carries: where the memory of each GPU goes."""
    config = FLASH if path.stem.startswith("flash") else PRO
    gpu = path.stem[-4:]
    tp, dp = args.tensor_parallel_size, args.data_parallel_size
    weights = weight_bytes_per_gpu(tensors_of(config | NVFP4), tp, dp)
    shape = MoeShape(
        num_experts=config["n_routed_experts"],
        num_local_experts=config["n_routed_experts"] // (tp * dp),
        top_k=config["num_experts_per_tok"],
        hidden=config["hidden_size"],
        intermediate=config["moe_intermediate_size"],
        max_num_tokens=args.max_num_batched_tokens * dp,
        quantize_activations=gpu == "b200",
    )
    arena = workspace_bytes(SM100 if gpu == "b200" else SM90, shape)
    given = GPU_BYTES[gpu] * args.gpu_memory_utilization
    left = given - sum(weights.values()) - arena
    return (
        f"# Memory of a GPU, GiB: {GPU_BYTES[gpu] / GIB:.1f}, of which vLLM takes "
        f"{given / GIB:.1f}: {weights['experts'] / GIB:.1f} experts, "
        f"{weights['others'] / GIB:.1f} other weights,\n"
        f"# {arena / GIB:.1f} arena of the MoE layers, and {left / GIB:.1f} for activations, CUDA "
        "graphs and the KV cache.\n"
    )


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_memory_is_what_the_formulas_say(path):
    comment = memory_comment(path, parse(path))
    assert comment in path.read_text(), f"{path.name} should say\n{comment}"


def test_vllm_refuses_an_option_it_does_not_know(tmp_path, capsys):
    path = tmp_path / "flash-b200.yaml"
    path.write_text("model: m\nno-such-option: 1\n")
    with pytest.raises(SystemExit):
        parse(path)
    assert "no-such-option" in capsys.readouterr().err


def test_every_deployment_of_the_readme_is_there():
    assert {path.stem for path in DEPLOYMENTS} == {
        "flash-b200",
        "flash-2xh200",
        "flash-4xh200",
        "pro-8xb200",
        "pro-8xh200",
    }
