"""The helper that starts and stops a server, without a server: logs, ports, process groups."""

import io
import os
import subprocess
import sys
import time

import pytest

from vllm_dsv4_moe.commands import serving

LOG = """\
INFO 11-21 03:06:42 [model.py:12] Resolved architecture: DeepseekV4ForCausalLM
\x1b[0;36m(Worker pid=21980)\x1b[0;0m ERROR 11-21 03:06:55 [executor.py:953] Traceback:
(Worker pid=21980) ERROR 11-21 03:06:55 [executor.py:953] ValueError: layer 3: scale is NaN
(EngineCore pid=2) ERROR 11-21 03:06:57 [core.py:1510] ValueError: layer 3: scale is NaN
RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG)
    return path


def test_log_tail_starts_with_the_exceptions_in_order(log):
    lines = serving.log_tail(log, lines=2).splitlines()
    assert lines == [
        "ValueError: layer 3: scale is NaN",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        f"--- last lines of {log} ---",
        "ValueError: layer 3: scale is NaN",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_last_line_is_bare(tmp_path, log):
    assert serving.last_line(log).startswith("RuntimeError: Engine core")
    log.write_text(LOG.splitlines()[1])
    assert serving.last_line(log) == "Traceback:"
    log.write_text("")
    assert serving.last_line(log) == ""


def test_environment_keeps_what_is_set(monkeypatch):
    monkeypatch.setattr(serving, "has_gpu", lambda: False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    environment = serving.server_environment({"VLLM_PLUGINS": ""})
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["TRITON_INTERPRET"] == "1"
    assert environment["VLLM_PLUGINS"] == ""
    assert environment["PATH"] == os.environ["PATH"]


def test_environment_with_a_gpu_interprets_nothing_and_compiles_no_flashinfer(monkeypatch):
    monkeypatch.setattr(serving, "has_gpu", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    environment = serving.server_environment()
    assert "TRITON_INTERPRET" not in environment
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_an_answer_may_take_as_long_as_a_start(monkeypatch, log):
    """Many at once do, on a machine with other work."""
    waited = []

    def urlopen(request, timeout: float) -> io.BytesIO:
        waited.append(timeout)
        return io.BytesIO(b"{}")

    monkeypatch.setattr(serving.urllib.request, "urlopen", urlopen)
    server = serving.Server(1, log, None, 0.0)
    assert server.get("/version") == "{}" and server.complete("a") == {}
    assert waited == [600, 600]


def test_stop_ends_children_that_ignore_the_first_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "STOP_SECONDS", 1)
    # A child that ignores SIGTERM, started by a parent that waits for it.
    child = "trap '' TERM; echo up; while :; do sleep 1; done"
    process = subprocess.Popen(
        ["sh", "-c", 'sh -c "$0"; :', child], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    assert serving._group_runs(process.pid)
    started = time.monotonic()
    serving.stop(process)
    assert time.monotonic() - started < 60
    assert not serving._group_runs(process.pid)


def test_server_that_dies_ends_in_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(serving.ServerError, match="ended with status 1 while loading"):
        with serving.serve(tmp_path, tmp_path / "log"):
            raise AssertionError("it cannot be up")


def test_server_that_never_answers_is_stopped_in_time(tmp_path, monkeypatch):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho loading\nsleep 99\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    told = []
    with pytest.raises(serving.ServerError, match="no healthy answer after 1 s\n.*\nloading"):
        with serving.serve(
            tmp_path, tmp_path / "log", timeout=1, progress=lambda *line: told.append(line)
        ):
            raise AssertionError("it cannot be up")
    assert told[-1][1] == "loading"
