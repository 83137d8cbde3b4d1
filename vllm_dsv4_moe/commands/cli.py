"""`dsv4-moe`: one subcommand, one module. Nothing heavy is imported before a command runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

# A command's module has add_arguments(parser) and run(args) -> exit status, and imports torch or
# vLLM inside run only.
COMMANDS = {
    "doctor": ("vllm_dsv4_moe.commands.doctor", "say whether this machine can serve, and how"),
    "tiny": ("vllm_dsv4_moe.commands.tiny", "write a small random checkpoint"),
    "demo": ("vllm_dsv4_moe.commands.demo", "serve a tiny checkpoint, ask it, show what ran where"),
    "config": ("vllm_dsv4_moe.commands.config", "list the shipped deployments, or print one"),
    "inspect": ("vllm_dsv4_moe.commands.inspect", "check a checkpoint without loading it"),
    "verify": (
        "vllm_dsv4_moe.commands.verify",
        "run a real layer of each kind against plain arithmetic",
    ),
    "compile": ("vllm_dsv4_moe.commands.compile", "compile the expert kernels ahead of time"),
    "calibrate": ("vllm_dsv4_moe.commands.calibrate", "write activation scales from prompts"),
}


class ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} {version('vllm-dsv4-moe')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4-moe", description="The MoE layer of DeepSeek-V4 in FP4, as a vLLM plugin."
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show it and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A user's mistake, or a library that is not there, ends in one sentence on
    stderr and status 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"dsv4-moe: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"dsv4-moe: {error}: `dsv4-moe doctor` says what is missing", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
