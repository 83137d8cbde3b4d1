"""Servers and loads of bench.serve, with a client and servers that are not there."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from bench import serve_contenders
from bench.random_weights import real_config
from bench.serve_contenders import Bench, Contender
from bench.serve_load import Load, ServerError, measure


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A load of a server whose client finds what is given, while its log gets what is given."""
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "deep_gemm"))
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
        "W [jit_monitor.py:134] TileLang JIT compilation during inference: <unknown>. This",
        "W [jit_monitor.py:134] Triton kernel JIT compilation during inference: _scan (y={}). This",
    )
    assert client({"completed": 8}, "\n".join(lines))["compiled"] == ["<unknown>", "_scan"]


def test_a_bench_that_is_ended_waits_for_no_server(monkeypatch, tmp_path):
    """As by the signal of a time limit, while they start."""
    begun, ended, stopped = threading.Barrier(3, timeout=60), [], []

    @contextmanager
    def serve(*_, progress, **__):
        begun.wait()
        deadline = time.monotonic() + 20
        try:
            while time.monotonic() < deadline:
                progress(0.0, "")
                time.sleep(0.01)
            yield None
        finally:
            stopped.append(time.monotonic() < deadline)

    def end() -> None:
        begun.wait()
        while not ended:  # a signal just before the main thread waits does not wake it
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)

    def handler(*_) -> None:
        if not ended:
            ended.append(True)
            sys.exit(1)

    monkeypatch.setattr(serve_contenders, "serve", serve)
    config = real_config("flash", "nvfp4", 4) | {"vocab_size": 300}
    bench = Bench(tmp_path, config, {}, lambda: None, deadline=0)
    sender = threading.Thread(target=end)
    earlier = signal.signal(signal.SIGUSR1, handler)
    try:
        sender.start()
        with pytest.raises(SystemExit), bench.started([Contender("a"), Contender("b")], ()):
            raise AssertionError("they cannot be up")
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, earlier)
    assert stopped == [True, True]
