"""What the shared expert costs beside the routed ones on one Hopper GPU, in microseconds a layer.

    python -m bench.overlap --out overlap.json [--commit ABC]

The gate and the routed experts are timed alone, then with the shared expert after them, and with
the shared expert on a second stream from before the gate on, as vLLM runs it: `exposed` is what
that adds. Its two FP8 products go through cuBLASLt, as a stand-in for vLLM's DeepGEMM. `left free`
is how many multiprocessors the grouped GEMMs do not use; `priority` is the second stream's.
"""

import itertools
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from bench.arguments import one_command
from bench.inputs import Inputs, cold_inputs, random_weights
from bench.layer import SHAPES, ours
from bench.timing import print_table, time_us, write_results
from dsv4_kernels.sm90 import gemm
from dsv4_kernels.types import MoeShape

TOKENS = (1, 8, 32)
LEFT_FREE = (0, 8, 16, 32)
PRIORITIES = (0, -5)
FP8_ROWS = 16  # what cuBLASLt's FP8 product wants rows to be a multiple of


class SharedExpert(NamedTuple):
    w13: torch.Tensor  # (2 * intermediate, hidden) E4M3, gate above up
    w2: torch.Tensor  # (hidden, intermediate) E4M3

    @classmethod
    def random(cls, shape: MoeShape) -> "SharedExpert":
        def weight(rows: int, k: int) -> torch.Tensor:
            return torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn)

        inter = shape.intermediate
        return cls(weight(2 * inter, shape.hidden), weight(shape.hidden, inter))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, -len(x) % FP8_ROWS)).to(torch.float8_e4m3fn)
        gate, up = fp8_product(padded, self.w13).chunk(2, dim=1)
        h = (F.silu(gate) * up).to(torch.float8_e4m3fn)
        return fp8_product(h, self.w2)[: len(x)]


def fp8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device="cuda")
    return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)


def bench_tokens(shape: MoeShape, make_call, num_tokens: int) -> list[dict]:
    """A row for every way to make room."""
    sets = cold_inputs(shape, num_tokens)
    shared = [SharedExpert.random(shape) for _ in sets]
    gate = torch.randn(shape.num_experts, shape.hidden, device="cuda").bfloat16()
    side = torch.cuda.Stream()

    def routed(inputs: Inputs) -> torch.Tensor:
        torch.mm(inputs.x, gate.t())
        return make_call(inputs)()

    def serial(inputs: Inputs, expert: SharedExpert) -> torch.Tensor:
        out = routed(inputs)
        return out.add_(expert(inputs.x))

    def forked(inputs: Inputs, expert: SharedExpert) -> torch.Tensor:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            shared_out = expert(inputs.x)
        out = routed(inputs)
        main.wait_stream(side)
        return out.add_(shared_out)

    def us(call, *arguments) -> float:
        return time_us([partial(call, *each) for each in zip(*arguments, strict=True)])

    expected = routed(sets[0]).clone()
    together = expected + shared[0](sets[0].x)
    alone_us = us(lambda inputs, expert: expert(inputs.x), sets, shared)
    multiprocessors = gemm.num_blocks
    rows = []
    for left_free, priority in itertools.product(LEFT_FREE, PRIORITIES):
        side = torch.cuda.Stream(priority=priority)
        fewer = lambda spec, count: multiprocessors(spec, count - left_free)  # noqa: E731
        with mock.patch.object(gemm, "num_blocks", fewer):
            check(routed(sets[0]), expected)
            check(forked(sets[0], shared[0]), together)
            routed_us, forked_us = us(routed, sets), us(forked, sets, shared)
            row = {
                "tokens": num_tokens,
                "left free": left_free,
                "priority": priority,
                "gate and routed": routed_us,
                "shared": alone_us,
                "serial": us(serial, sets, shared),
                "forked": forked_us,
                "exposed": forked_us - routed_us,
            }
        rows.append(row)
    return rows


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Partial sums are split elsewhere with fewer blocks: bf16's rounding may differ."""
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < 2.0**-7, f"{float(error)} off"


def main() -> None:
    arguments = one_command(__doc__)
    torch.manual_seed(0)
    rows: list[dict] = []
    for title, shape in SHAPES.items():
        make_call = ours(shape, random_weights(shape))
        for num_tokens in TOKENS:
            found = bench_tokens(shape, make_call, num_tokens)
            rows += [{"model": title, **row} for row in found]
    print_table(rows)
    write_results(arguments.out, rows, arguments.commit)


if __name__ == "__main__":
    main()
