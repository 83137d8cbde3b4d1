"""Which version of the code a measurement was taken with."""

import subprocess
from pathlib import Path


def checkout_commit() -> str:
    """The commit of the checkout that this file lies in, `-dirty` if files differ from it.

    ValueError where it lies in none: a number without a commit is not kept.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("there is no git to ask for the commit: name it with --commit") from error
    if commit.returncode or tracked.returncode:
        raise ValueError("this is no git checkout, and results name their commit: add --commit")
    return commit.stdout.strip() + ("-dirty" if dirty.stdout else "")
