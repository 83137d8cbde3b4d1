"""What README and CONTRIBUTING say is what the code does: their tables, files and commands."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import expert_parallel, layer, load, mxfp4, serve

from vllm_dsv4_moe.settings import settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BOTH = README + CONTRIBUTING


def test_settings_are_the_codes():
    written = README.split("<!-- settings: begin -->\n")[1].split("<!-- settings: end -->")[0]
    assert written == settings_table()


RESULTS = ROOT / "kernels/bench/results"
REPORTS = {
    "layer": layer.report,
    "mxfp4": mxfp4.report,
    "expert_parallel": expert_parallel.report,
    "load": load.report,
    "serve": serve.report,
}


@pytest.mark.parametrize("bench", [name for name in REPORTS if (RESULTS / f"{name}.json").exists()])
def test_a_benchs_tables_are_of_the_kept_numbers(bench, capsys):
    written = README.split(f"<!-- {bench}: begin -->\n")[1].split(f"<!-- {bench}: end -->")[0]
    REPORTS[bench](SimpleNamespace(results=RESULTS / f"{bench}.json", plot=None, profile=False))
    assert written == capsys.readouterr().out


@pytest.mark.skipif(not (RESULTS / "serve.json").exists(), reason="not measured yet")
def test_the_profile_is_of_the_kept_numbers(capsys):
    serve.report(SimpleNamespace(results=RESULTS / "serve.json", plot=None, profile=True))
    assert (RESULTS / "serve-profile.md").read_text() == capsys.readouterr().out


def test_what_it_gives_is_what_its_table_says():
    table = README.split("<!-- layer: begin -->")[1].split("<!-- layer: end -->")[0]
    ratios = [float(ratio) for ratio in re.findall(r"(?m)\| ([\d.]+)× \|$", table)]
    words = " ".join(README.split())
    assert len(ratios) > 1 and f"{min(ratios)} to {max(ratios)} times as fast" in words


def messages() -> list[str]:
    """Regular expressions of the sentences that the plugin's modules are written with."""
    found = []
    for path in (ROOT / "vllm_dsv4_moe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "%s" for part in parts]
            if all(isinstance(text, str) for text in texts):
                pieces = re.split(r"%[sd]", "".join(texts).removeprefix("dsv4-moe: "))
                found.append(".+".join(map(re.escape, pieces)))
    return [message for message in found if not message.startswith(".+")]


LOGGED = re.findall(r"(?m)^ {4}((?:vllm-)?dsv4-moe(?:: | leaves ).*)", README)


@pytest.mark.parametrize("line", LOGGED)
def test_line_of_the_log_is_one_that_is_logged(line):
    sentence = line.removeprefix("dsv4-moe: ").removesuffix(" (first: …)")
    assert any(re.fullmatch(message, sentence) for message in messages())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", BOTH))))
def test_linked_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:adapter|serving)/test_\w+\.py)`", CONTRIBUTING)))
)
def test_named_test_exists(path):
    assert (ROOT / "tests" / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`python -m bench\.(\w+)", BOTH))))
def test_bench_exists(name):
    assert (ROOT / f"kernels/bench/{name}.py").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_deployment_is_listed(path):
    assert f"configs/{path.name}" in README


# In code, not in prose: after a backtick, or indented.
TARGETS = re.findall(r"(?m)(?:`|^ {4})make ([a-z-]+)", BOTH)


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_make_target_exists(target):
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())
