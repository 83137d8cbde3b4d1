"""Every file of configs/ goes through vLLM's own argument parser."""

from pathlib import Path

import pytest

DEPLOYMENTS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


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
