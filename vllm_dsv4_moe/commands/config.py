"""List the deployments that are shipped with this plugin, or print one, a file for `vllm serve
--config`.

Each says in its first lines what it is for and where the memory of a GPU goes.
"""

import argparse
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Beside the package's modules where a wheel was installed, in the repository's root otherwise.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")


def run(args: argparse.Namespace) -> int:
    if args.name is not None:
        print(find(args.name).read_text(), end="")
        return 0
    for path in shipped():
        title = path.read_text().partition("\n")[0].removeprefix("# ").partition(":")[0]
        print(f"{path.stem:<16} {title}")
    return 0


def shipped() -> list[Path]:
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder is not None else []


def find(name: str) -> Path:
    """A file of this name, or a deployment's; ValueError names what there is."""
    found = {path.stem: path for path in shipped()}
    if name in found:
        return found[name]
    path = Path(name)
    if path.exists() and not path.is_dir():  # a pipe, too
        return path
    raise ValueError(f"there is no deployment or file {name}: there are {', '.join(found)}")
