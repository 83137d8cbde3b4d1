"""A measurement names its commit: that of a checkout, marked where files differ, or a refusal."""

import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from bench import checkout

GIT = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """(the module, copied into a folder of its own; that folder)"""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    path = tmp_path / "checkout.py"
    shutil.copy(checkout.__file__, path)
    spec = spec_from_file_location("copied_checkout", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = [*GIT, str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_names_its_commit_and_says_if_files_differ(copied):
    module, folder = copied
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    commit = git(folder, "rev-parse", "HEAD")
    assert module.checkout_commit() == commit
    (folder / "more.py").write_text("")
    assert module.checkout_commit() == f"{commit}-dirty"


def test_a_copy_without_git_is_refused(copied):
    with pytest.raises(ValueError, match="no git checkout.*add --commit"):
        copied[0].checkout_commit()


def test_an_installed_copy_inside_another_checkout_is_refused(copied):
    """Such as a virtual environment in somebody's repository: that commit is not this code's."""
    module, folder = copied
    git(folder, "init", "-q")
    git(folder, "commit", "-qm", "theirs", "--allow-empty")
    with pytest.raises(ValueError, match="add --commit"):
        module.checkout_commit()


def test_a_machine_without_git_is_refused(copied, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="there is no git.*--commit"):
        copied[0].checkout_commit()
