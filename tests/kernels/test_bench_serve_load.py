"""One load of bench.serve, with a client and a server that are not there."""

import sys
from types import SimpleNamespace

import pytest
from bench.serve_load import Load, ServerError, measure


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A load of a server whose client finds what is given, while its log gets what is given."""
    log = tmp_path / "log"
    log.write_text("Triton kernel JIT compilation during inference: earlier. This\n")
    server = SimpleNamespace(address="", log=log, get=lambda path: "")

    def measured(found: dict, logged: str = "") -> dict:
        async def main_async(arguments) -> dict:
            log.write_text(log.read_text() + logged)
            return found

        def add_cli_args(parser) -> None:
            parser.parse_args = lambda given: None

        module = SimpleNamespace(main_async=main_async, add_cli_args=add_cli_args)
        monkeypatch.setitem(sys.modules, "vllm.benchmarks.serve", module)
        return measure(server, tmp_path, Load(8, 32, 512), 1, 9.0)

    return measured


def test_a_load_of_which_a_request_failed_is_no_measurement(client):
    found = {"completed": 8, "failed": 0, "median_tpot_ms": 3}
    assert client(found) == found | {"step_ms": None}
    with pytest.raises(ServerError, match="7 of 8 requests were answered"):
        client({"completed": 7, "failed": 1, "median_tpot_ms": 3})


def test_kernels_compiled_during_a_load_are_named(client):
    lines = (
        "W [jit_monitor.py:134] Triton kernel JIT compilation during inference: _scan (x={}). This",
        "W [jit_monitor.py:134] TileLang JIT compilation during inference: mhc_post. This causes",
        "W [jit_monitor.py:134] Triton kernel JIT compilation during inference: _scan (y={}). This",
    )
    assert client({"completed": 8}, "\n".join(lines))["compiled"] == ["_scan", "mhc_post"]
