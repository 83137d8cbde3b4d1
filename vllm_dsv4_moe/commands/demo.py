"""Serve a tiny random checkpoint with the plugin, ask it, and show what ran where.

Starts `vllm serve` on a free loopback port: vLLM proper where there is a GPU with kernels for it,
otherwise vLLM's CPU build. Ends with status 1 and the server's log when any step fails.
"""

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vllm_dsv4_moe.commands.gpus import GIB, Gpu, supported_gpus, visible_gpus
from vllm_dsv4_moe.commands.serving import SMALL_ARGUMENTS, Server, ServerError, log_tail, serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import TinyConfig

if TYPE_CHECKING:
    from rich.console import Console

# V4's attention kernels for GPUs take 64 or 128 heads.
CPU_SIZES = TinyConfig()
GPU_SIZES = TinyConfig(hidden=1024, intermediate=512, experts=256, heads=64)
GPU_BYTES = 16 * GIB  # weights 1.3 GiB, graphs and vLLM's own; the rest is KV cache
PROMPT = "The experts of a mixture are"
PIPE_SECONDS = 10.0  # between lines of progress where there is no terminal to draw in
RUNS = re.compile(r"dsv4-moe: this plugin runs NVFP4 experts, on (\w+): layers ([\d, -]+)")


@dataclass(frozen=True)
class Device:
    """What serves, and how it is started there."""

    words: str
    sizes: TinyConfig
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def choose_device(gpus: Sequence[Gpu], cuda: str | None) -> Device:
    """The GPU with the most free memory, or the CPU; ServerError where neither can serve.

    cuda is the version that torch was built for, None for a CPU build.
    """
    supported = supported_gpus(gpus)
    again = "run `make demo`, which installs what fits"
    if not supported:
        why = f"{gpus[0]}: there are no kernels for it" if gpus else "no CUDA GPU here"
        if cuda is not None:
            raise ServerError(
                f"{why}, and this vLLM was built for CUDA {cuda}: a GPU of compute capability 9.0 "
                f"(H100, H200) or 10 (B200) is needed, or vLLM's CPU build: {again}"
            )
        return Device(f"CPU ({why})", CPU_SIZES)
    gpu = supported[0]
    if cuda is None:
        raise ServerError(f"{gpu} is there, and this vLLM is the CPU build: {again}")
    if gpu.free < GPU_BYTES:
        raise ServerError(
            f"{gpu} has {gpu.free / GIB:.0f} of {gpu.memory / GIB:.0f} GiB free, the most of all, "
            f"and the demo needs {GPU_BYTES // GIB}: end what uses it"
        )
    share = f"--gpu-memory-utilization={GPU_BYTES / gpu.memory:.3f}"
    order = (("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", gpu.index))
    return Device(str(gpu), GPU_SIZES, (share,), order)


@dataclass(frozen=True)
class Answer:
    """What one request gave, and how long it took."""

    request: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, help="keep checkpoint and log in this empty folder")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens an answer (default 16)")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds to wait for the server (default 600)"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}: ask for at least 1")
    # `make` and CI end a program with SIGTERM: leave through the server's clean-up then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(highlight=False, soft_wrap=True)
    with _work_folder(args.work) as work:
        try:
            show(console, work, args.max_tokens, args.timeout)
        except ServerError as error:
            console.print("[red]the demo failed[/]")
            console.print(str(error), markup=False)
            return 1
    return 0


@contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        if any(given.iterdir()):
            raise ValueError(f"--work {given} is not empty: give a new folder")
        yield given
        return
    with TemporaryDirectory(prefix="dsv4-moe-demo-") as folder:
        yield Path(folder)


def show(console: "Console", work: Path, max_tokens: int, timeout: float) -> None:
    """The whole demo. Raises ServerError, with the end of the log, for whatever goes wrong."""
    import torch

    device = choose_device(visible_gpus(), torch.version.cuda)
    sizes = device.sizes
    console.print(f"device      {device.words}", markup=False)
    model = write_tiny_checkpoint(work / "model", sizes)
    console.print(
        f"checkpoint  {sizes.layers} layers ({sizes.hash_layers} hash), {sizes.experts} NVFP4 "
        f"experts, top-{sizes.top_k}, hidden {sizes.hidden}: random, so the text will be nonsense"
    )
    log = work / "server.log"
    arguments = (*SMALL_ARGUMENTS, *device.arguments)
    environment = dict(device.environment)
    if environment:
        console.print("            the first start on a GPU compiles kernels, for some minutes")
    with console.status("vllm serve") as status:
        said = -PIPE_SECONDS

        def progress(seconds: float, line: str) -> None:
            nonlocal said
            words = f"vllm serve, {seconds:.0f} s: {_shortened(line)}"
            status.update(words)
            if not console.is_terminal and seconds - said >= PIPE_SECONDS:
                said = seconds
                console.print(f"            {words}")

        with serve(model, log, arguments, environment, timeout, progress) as server:
            console.print(
                f"server      {server.address}, healthy after {server.load_seconds:.1f} s"
            )
            backend, layers = plugin_layers(log, sizes.layers)
            console.print(f"plugin      layers {layers} run on its {backend} backend")
            for answer in answers(server, max_tokens):
                _print_answer(console, answer)
            status.update("stopping the server")
    console.print("server      stopped")


def plugin_layers(log: Path, num_layers: int) -> tuple[str, str]:
    """(backend, layers) that the plugin said it runs. ServerError unless that is every layer."""
    found = RUNS.search(log.read_text(errors="replace"))
    if found is None:
        raise ServerError(f"the plugin said nothing of its layers\n{log_tail(log)}")
    backend, layers = found[1], found[2].strip()
    whole = f"0-{num_layers - 1}" if num_layers > 1 else "0"
    if layers != whole:
        raise ServerError(f"the plugin runs layers {layers}, not {whole}\n{log_tail(log)}")
    return backend, layers


def answers(server: Server, max_tokens: int) -> Iterator[Answer]:
    """A completion, the same again (nothing is warmed up any more), and a chat request."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    for request in ("completion", "again"):
        started = time.monotonic()
        body = server.complete(PROMPT, **options)
        yield _answer(server, request, body, body["choices"][0]["text"], started)
    started = time.monotonic()
    body = server.chat("Which expert are you?", chat_template_kwargs={"thinking": False}, **options)
    text = body["choices"][0]["message"]["content"]
    yield _answer(server, "chat", body, text, started)


def _answer(
    server: Server, request: str, body: dict[str, Any], text: str | None, started: float
) -> Answer:
    usage = body["usage"]
    if not text or not usage["completion_tokens"]:
        raise ServerError(f"the {request} request gave no text: {body}\n{log_tail(server.log)}")
    seconds = time.monotonic() - started
    return Answer(request, text, usage["prompt_tokens"], usage["completion_tokens"], seconds)


def _print_answer(console: "Console", answer: Answer) -> None:
    console.print(f"{answer.request:<11} {answer.text!r}", markup=False)
    console.print(
        f"            {answer.prompt_tokens} tokens in, {answer.tokens} out, "
        f"{answer.seconds * 1000:.0f} ms, {answer.tokens / answer.seconds:.1f} tokens/s"
    )


def _shortened(line: str) -> str:
    from rich.markup import escape

    return escape(line if len(line) <= 100 else f"{line[:100]}...")
