"""Reports NVFP4 blocks that did not fit their scale, without touching the path from token to token.

The kernels count on the device. A CUDA graph replays without Python, so a thread looks now and
then, on a stream of its own.
"""

import threading
import time

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

logger = init_logger("vllm.dsv4_moe")


class SaturationLog:
    """The counters of this process's layers, and the thread that reads them."""

    def __init__(self) -> None:
        self.counters: dict[str, torch.Tensor] = {}
        self.seen: dict[str, int] = {}
        self.captures = False
        self.thread: threading.Thread | None = None
        self.stream: torch.cuda.Stream | None = None  # one for the process's life
        self.failed = False

    def add(self, layer_name: str, counter: torch.Tensor, interval: float) -> None:
        """Watch a layer's (1,) int64 counter every interval seconds; 0 is never."""
        if interval == 0:
            return
        config = get_current_vllm_config()
        if config.model_config.enable_sleep_mode:
            # Asleep, the counters' memory is not mapped.
            logger.warning_once("dsv4-moe: saturated blocks are not reported in sleep mode")
            return
        self.captures = counter.is_cuda and captures_graphs(config)
        self.counters[layer_name] = counter
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, args=(interval,), daemon=True)
            self.thread.start()

    def _watch(self, interval: float) -> None:
        while True:
            time.sleep(interval)
            self.report()

    def report(self) -> None:
        """Look and log. An error is logged once, and does not end the looking."""
        try:
            grown = self.look() if not self.captures or graphs_are_captured() else {}
        except Exception as error:  # whatever the device says, serving goes on
            if not self.failed:
                logger.warning("dsv4-moe: saturated blocks could not be counted: %s", error)
            self.failed = True
            return
        if grown:
            logger.warning("dsv4-moe: %s", describe(grown))

    def look(self) -> dict[str, int]:
        """Layer -> blocks since the last look, if there are any. Waits for its own stream only."""
        names, counters = zip(*list(self.counters.items()), strict=True)
        if counters[0].is_cuda:
            if self.stream is None:
                self.stream = torch.cuda.Stream(counters[0].device)
            with torch.cuda.stream(self.stream):
                totals = torch.cat(counters).tolist()
        else:
            totals = torch.cat(counters).tolist()
        grown = {
            name: total - self.seen.get(name, 0)
            for name, total in zip(names, totals, strict=True)
            if total > self.seen.get(name, 0)
        }
        self.seen.update(zip(names, totals, strict=True))
        return grown


SATURATION = SaturationLog()


def captures_graphs(config: VllmConfig) -> bool:
    mode = config.compilation_config.cudagraph_mode
    return not config.model_config.enforce_eager and mode != CUDAGraphMode.NONE


def graphs_are_captured() -> bool:
    """vLLM locks its workspace when it has captured: before, a copy could break the capture."""
    return is_workspace_manager_initialized() and current_workspace_manager().is_locked()


def describe(grown: dict[str, int]) -> str:
    """One sentence: how many blocks, where most, and what to do."""
    worst = max(grown, key=grown.__getitem__)
    return (
        f"{sum(grown.values())} NVFP4 blocks of activations did not fit their scale, in "
        f"{len(grown)} layers (most, {grown[worst]}, in {worst}): outputs there are too small; "
        "raise headroom, or set activation_scale to token"
    )
