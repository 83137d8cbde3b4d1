"""What the README says is what the code does: its tables, files and commands."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import layer, load, mxfp4

from vllm_dsv4_moe.settings import settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_settings_are_the_codes():
    written = README.split("<!-- settings: begin -->\n")[1].split("<!-- settings: end -->")[0]
    assert written == settings_table()


RESULTS = ROOT / "kernels/bench/results"
REPORTS = {"layer": layer.report, "mxfp4": mxfp4.report, "load": load.report}


@pytest.mark.parametrize("bench", [name for name in REPORTS if (RESULTS / f"{name}.json").exists()])
def test_a_benchs_tables_are_of_the_kept_numbers(bench, capsys):
    written = README.split(f"<!-- {bench}: begin -->\n")[1].split(f"<!-- {bench}: end -->")[0]
    REPORTS[bench](SimpleNamespace(results=RESULTS / f"{bench}.json", plot=None))
    assert written == capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_linked_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_deployment_is_listed(path):
    assert f"configs/{path.name}" in README


# In code, not in prose: after a backtick, or indented.
TARGETS = re.findall(r"(?m)(?:`|^ {4})make ([a-z-]+)", README)


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_make_target_exists(target):
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())
