"""The files of configs/ through a vLLM's own parser: `python -m tests.support.deployments` prints
what they say to the vLLM that is found first, as JSON by name."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

DEPLOYMENTS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")  # 0.32, 0.33


def parse(path: Path):
    """The arguments of `vllm serve --config PATH`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for name in PARSERS:
        try:
            cli_args = importlib.import_module(name)
            break
        except ModuleNotFoundError:
            continue
    parser = cli_args.make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(["serve", "--config", str(path)])


def known_names() -> dict[str, list[str]]:
    """What may be named where the parser itself takes any word."""
    from vllm.config import SpeculativeConfig
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager

    return {
        "speculative_config": [field.name for field in dataclasses.fields(SpeculativeConfig)],
        "reasoning_parser": ReasoningParserManager.list_registered(),
        "tool_call_parser": ToolParserManager.list_registered(),
        "tokenizer_mode": list(TokenizerRegistry.tokenizers),
    }


def said() -> dict[str, Any]:
    """vLLM's version, the arguments of every file, and the names that it knows."""
    import vllm

    arguments = {path.stem: vars(parse(path)) for path in DEPLOYMENTS}
    return {"version": vllm.__version__, "known": known_names(), "arguments": arguments}


if __name__ == "__main__":
    print(json.dumps(said(), default=str))
