"""`--gpu-results FILE` keeps what a run on a GPU showed: each test, the GPU and the commit.

`--silicon tests/emulator/test_emulator_*` runs the emulator's snippets on the GPU as well.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter; Triton looks when it is first imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def give_back_gpu_memory():
    """Several processes test on one GPU, beside servers: a module leaves none in torch's cache."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def keep_sm90_choice():
    """Puts sm90's own choice of configs back after the test."""
    from dsv4_kernels.sm90.heuristic import choose_config

    from tests.support.sm90_problems import use_choice

    yield
    use_choice(choose_config)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-results", metavar="FILE", help="write outcomes, GPU and commit as JSON")
    parser.addoption(
        "--silicon", action="store_true", help="run the emulator's PTX snippets on this GPU as well"
    )
    parser.addoption("--commit", help="the commit of these files, where they are no git checkout")


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes, the one that collects their reports keeps them.
    if config.getoption("--gpu-results") and not hasattr(config, "workerinput"):
        commit = config.getoption("--commit") or _commit()
        config.pluginmanager.register(GpuResults(Path(config.getoption("--gpu-results")), commit))
    if config.getoption("--silicon"):
        from tests.emulator.ptx_emulator import silicon, snippet

        snippet.OBSERVERS.append(silicon.compare)


class GpuResults:
    """Written after every test, so that a run that is cut short keeps what it showed."""

    def __init__(self, path: Path, commit: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu-results needs a CUDA GPU, and torch sees none")
        self.path = path
        self.tests: dict[str, dict] = {}
        self.results = {
            "gpu": torch.cuda.get_device_name(),
            "commit": commit,
            "torch": torch.__version__,
            "tests": self.tests,
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = {
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "measured": dict(report.user_properties),
            }
            self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def _commit() -> str:
    from bench.checkout import checkout_commit

    try:
        return checkout_commit()
    except ValueError as error:
        raise pytest.UsageError(f"--gpu-results: {error}") from error
