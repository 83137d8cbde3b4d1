"""vLLM's all-gather and reduce-scatter between data-parallel ranks, threads of one process here.

A rank runs until it waits for the others, as Triton's interpreter and the PTX emulator want it.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch

FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class GatheredRanks:
    """Stands for vLLM's expert-parallel group in every rank's prepare and finalize."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(num_ranks, timeout=300)
        self.rank = threading.local()
        self.given: dict[int, dict[int, list[torch.Tensor]]] = defaultdict(dict)
        self.travelled: list[torch.Tensor] = []  # all ranks' tokens, by dispatch of rank 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        manager = SimpleNamespace(world_size=self.num_ranks)
        with (
            mock.patch(f"{FUSED_MOE}.all2all_utils.get_ep_all2all_manager", lambda: manager),
            mock.patch(f"{FUSED_MOE}.prepare_finalize.naive_dp_ep.get_ep_group", lambda: self),
        ):
            yield

    def run(self, function: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """function(rank), of all ranks."""
        self.given.clear()

        def one(rank: int) -> torch.Tensor:
            self.rank.number, self.rank.step = rank, 0
            with self.turn:
                try:
                    return function(rank)
                except BaseException:
                    self.barrier.abort()
                    raise

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return list(pool.map(one, range(self.num_ranks)))

    def exchange(self, *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
        """What every rank gave at this step."""
        step, self.rank.step = self.rank.step, self.rank.step + 1
        self.given[step][self.rank.number] = [tensor.clone() for tensor in tensors]
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return [self.given[step][rank] for rank in range(self.num_ranks)]

    def dispatch(self, *tensors, is_sequence_parallel=False, extra_tensors=None):
        assert not is_sequence_parallel and extra_tensors is None
        gathered = [torch.cat(parts) for parts in zip(*self.exchange(*tensors), strict=True)]
        if self.rank.number == 0:
            self.travelled.append(gathered[0])
        return gathered

    def allocate_combine_input(self, *args, **options) -> None:
        return None

    def combine_into_output(self, part, output, is_sequence_parallel=False) -> None:
        parts, sizes = zip(*self.exchange(part, torch.tensor(len(output))), strict=True)
        start = int(sum(sizes[: self.rank.number]))
        output.copy_(sum(part.float() for part in parts)[start : start + len(output)])
