"""The benches' command lines: what measures writes JSON that names its commit."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bench.checkout import checkout_commit


def one_command(description: str) -> argparse.Namespace:
    """out and commit, of a bench that only measures."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    _measures(parser)
    return _parsed(parser)


def run_and_report(
    description: str, run: Callable[..., None], report: Callable[..., None]
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """(parser, its `run`, its `report`), the last two for what a bench adds; see `call`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="measure on this GPU, write JSON")
    _measures(runner)
    runner.set_defaults(call=run)
    reporter = commands.add_parser("report", help="print what was measured")
    reporter.add_argument("results", type=Path, help="what `run` wrote")
    reporter.set_defaults(call=report)
    return parser, runner, reporter


def call(parser: argparse.ArgumentParser) -> None:
    """Do what the command line says."""
    arguments = _parsed(parser)
    arguments.call(arguments)


def _measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--commit", help="where there is no git")


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if "out" in arguments and not arguments.out.parent.is_dir():
        parser.error(f"--out: there is no folder {arguments.out.parent}")
    if "results" in arguments and not arguments.results.is_file():
        parser.error(f"there is no file {arguments.results}")
    if "commit" in arguments and arguments.commit is None:
        arguments.commit = checkout_commit()
    return arguments
