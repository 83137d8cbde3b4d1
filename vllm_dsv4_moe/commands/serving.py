"""Start `vllm serve` on a free loopback port, wait until it answers, ask it, stop it.

The demo and the serving tests use it; nothing here imports torch or vllm.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dsv4_moe.commands.gpus import has_gpu

MODEL_NAME = "tiny"
# Nothing is fetched and nothing is reported: the checkpoint is a folder.
QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
# What vLLM's CPU build needs to serve V4 with tests/cpu_host: Triton kernels interpreted, a KV
# cache of 1 GiB, and no binding of threads to cores that a container may not own.
CPU_ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
# FlashInfer would compile its sampler, FP8 products and all-reduce with nvcc, which takes minutes,
# or is not there: small servers do without.
GPU_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
SMALL_ARGUMENTS = ("--max-model-len=1024", "--max-num-seqs=4", "--max-num-batched-tokens=256")
STOP_SECONDS = 20
# For a start, and for an answer: a CPU with other work takes minutes for what alone takes seconds.
PATIENCE_SECONDS = 600.0


class ServerError(RuntimeError):
    """The server did not start, died or answered with an error; the message ends with its log."""


def server_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment and what the server needs; what is set already stays as it is."""
    needed = QUIET_ENVIRONMENT | (GPU_ENVIRONMENT if has_gpu() else CPU_ENVIRONMENT)
    return needed | os.environ | dict(extra or {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Server:
    """A server that answers; made by `serve`."""

    port: int
    log: Path
    process: subprocess.Popen
    load_seconds: float  # from the start to the first healthy answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, timeout: float = PATIENCE_SECONDS) -> str:
        return self._ask(urllib.request.Request(self.address + path), timeout)

    def post(
        self, path: str, body: Mapping[str, Any], timeout: float = PATIENCE_SECONDS
    ) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps({"model": MODEL_NAME, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        return json.loads(self._ask(request, timeout))

    def complete(self, prompt: str | Sequence[int], **body: Any) -> dict[str, Any]:
        return self.post("/v1/completions", {"prompt": prompt, **body})

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        message = {"role": "user", "content": content}
        return self.post("/v1/chat/completions", {"messages": [message], **body})

    def _ask(self, request: urllib.request.Request, timeout: float) -> str:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            words = f"{request.full_url} answered {error.code}: {error.read().decode()}"
            raise ServerError(f"{words}\n{log_tail(self.log)}") from error
        except OSError as error:
            words = f"{request.full_url} did not answer: {error}"
            raise ServerError(f"{words}\n{log_tail(self.log)}") from error


@contextmanager
def serve(
    model: str | Path,
    log: Path,
    arguments: Sequence[str] = SMALL_ARGUMENTS,
    environment: Mapping[str, str] | None = None,
    timeout: float = PATIENCE_SECONDS,
    progress: Callable[[float, str], None] | None = None,
) -> Iterator[Server]:
    """`vllm serve model` for the length of a `with`; its whole process group is stopped after.

    Output goes to the file `log`. `environment` adds to `server_environment`. `progress` is told
    the seconds so far and the log's last line, twice a second. Raises ServerError with the log's
    tail when the server dies or is not healthy after `timeout` seconds.
    """
    port = free_port()
    started = time.monotonic()
    process = start(model, port, log, arguments, environment)
    try:
        while not _healthy(port):
            seconds = time.monotonic() - started
            if process.poll() is not None:
                words = f"vllm serve ended with status {process.returncode} while loading"
                raise ServerError(f"{words}\n{log_tail(log)}")
            if seconds > timeout:
                raise ServerError(f"no healthy answer after {timeout:.0f} s\n{log_tail(log)}")
            if progress is not None:
                progress(seconds, last_line(log))
            time.sleep(0.5)
        yield Server(port, log, process, time.monotonic() - started)
    finally:
        stop(process)


def start(
    model: str | Path,
    port: int,
    log: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None,
) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host=127.0.0.1", f"--port={port}", f"--served-model-name={MODEL_NAME}"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(environment),
            start_new_session=True,  # its process group is its own, to be stopped as one
        )


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def stop(process: subprocess.Popen) -> None:
    """End the server and the engine processes that it started: the process group is theirs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_SECONDS
        while _group_runs(process.pid) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
    process.wait()


def _group_runs(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits to be reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


def log_tail(log: Path, lines: int = 40) -> str:
    """The exceptions that the log names, in order, and its last lines."""
    text = [_bare(line) for line in log.read_text(errors="replace").splitlines()]
    raised = dict.fromkeys(line for line in text if re.match(r"[\w.]*(Error|Exception): ", line))
    return "\n".join([*raised, f"--- last lines of {log} ---", *text[-lines:]])


def last_line(log: Path) -> str:
    """The log's last line with words."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [_bare(line) for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _bare(line: str) -> str:
    """A log line without colours and without vLLM's process, level, time and place."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    return re.sub(
        r"^(\([^)]*pid=\d+\)\s*)?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\]\s*)?", "", line
    ).rstrip()
